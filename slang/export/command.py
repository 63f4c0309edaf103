"""Fused Gemma 3 -> GGUF for llama.cpp, Ollama and LM Studio, and a check that it answers as in MLX.

Run as: python -m slang.export --model M --adapter-path A --fused-path F    what fuse.sh runs
        python -m slang.export fused_model --type bf16 q4_k_m
        python -m slang.export --check fused_model/gemma-3-1b-it-slang-Q4_K_M.gguf
"""

import argparse
from pathlib import Path

from slang.errors import UserError
from slang.export.weights import TYPES
from slang.flags import number

# What --check asks: enough to find every mistake that was tried (benchmarks/export.md).
QUESTIONS = 200
ANSWERS = 12


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="python -m slang.export",
        description=__doc__.split("\n")[0],
        usage="%(prog)s FOLDER | --fused-path FOLDER ... | --check FILE ...",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("folder", type=Path, nargs="?", help="a fused model to export")
    p.add_argument(
        "--type",
        nargs="+",
        choices=TYPES,
        default=["bf16", "q4_k_m"],
        metavar="TYPE",
        help=f"of {', '.join(TYPES)}",
    )
    p.add_argument("--name", help="file names begin with it; the folder's name when left out")

    fuse = p.add_argument_group("fuse: put a base model and an adapter into one folder")
    fuse.add_argument("--fused-path", type=Path, metavar="FOLDER", help="where to put it")
    fuse.add_argument("--model", help="the base model; with --check, the fused one to compare with")
    fuse.add_argument("--adapter-path", type=Path, metavar="FOLDER", help="the adapter")
    fuse.add_argument("--dequantize", action="store_true", help="make a 4-bit or 8-bit model whole")
    fuse.add_argument("--no-gguf", action="store_true", help="the MLX model only")
    fuse.add_argument("--cache", type=Path, default=".cache", help="for models made of .gguf files")

    some = number(1, whole=True)
    check = p.add_argument_group("check: compare files in llama.cpp with the model in MLX")
    check.add_argument("--check", nargs="+", type=Path, metavar="FILE", help="GGUF files")
    check.add_argument(
        "--data",
        type=Path,
        default="data",
        metavar="FOLDER",
        help="with the train.jsonl that the adapter was trained on",
    )
    check.add_argument("--questions", type=some, default=QUESTIONS, help="cut into tokens")
    check.add_argument("--answers", type=some, default=ANSWERS, help="of them answered")

    args = p.parse_args(argv)
    tasks = [args.folder, args.fused_path, args.check]
    if sum(task is not None for task in tasks) != 1:
        p.error("give a folder to export, --fused-path, or --check FILE")
    if args.fused_path is not None and None in (args.model, args.adapter_path):
        p.error("--fused-path needs --model and --adapter-path")
    if args.name and not args.folder:
        p.error("--name: it goes with a folder to export")
    if "/" in (args.name or ""):
        p.error(f"--name {args.name}: files begin with it; leave the / out")
    args.type = list(dict.fromkeys(args.type))
    return args


def main(argv: list[str] | None = None) -> int:
    """What needs MLX is imported where it is needed, so that a wrong flag is told at once."""
    args = parse(argv)
    if args.check:
        return check_files(args)
    if args.fused_path is not None:
        from slang.export.fuse import Task, fuse

        kinds = [] if args.no_gguf else args.type
        fuse(
            Task(
                model=args.model,
                adapter=args.adapter_path,
                fused=args.fused_path,
                kinds=kinds,
                data=args.data,
                dequantize=args.dequantize,
                n_questions=args.questions,
                n_answers=args.answers,
                cache=args.cache,
            )
        )
        return 0
    from slang.export.write import export

    export(args.folder, args.type, args.name or args.folder.resolve().name)
    return 0


def check_files(args: argparse.Namespace) -> int:
    """Print a table for each file; 1 where one answers otherwise in llama.cpp."""
    from slang.export.check import differing, read_fields
    from slang.export.reference import Reference, read_answers

    for path in args.check:
        read_fields(path)  # before MLX spends a minute
    folder = Path(args.model) if args.model else args.check[0].parent
    if not (folder / "config.json").is_file():
        remedy = "name the fused model that the file was made from with --model"
        raise UserError(f"{folder}: no model there; {remedy}")
    reference = Reference(folder, read_answers(args.data), args.questions, args.answers)
    return 1 if differing(args.check, reference) else 0
