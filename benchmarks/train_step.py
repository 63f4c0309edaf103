"""One training step on a real Gemma 3: slang.train, Hugging Face PEFT and mlx_lm.lora, the same
rows, side by side.

Each side runs in a process of its own, by turns, with the same number of threads; of its steps the
fastest counts. With one thread a second is one of CPU time, so that other work on the machine does
not count. Rank 8 on every linear layer, float32 on a CPU, Adam (PEFT: AdamW). Each side has
the middle batch, by padded tokens, of an epoch as it makes it: slang's are of rows of like length,
mlx_lm's and PEFT's of random ones. "PEFT, slang's rows" has the rows that slang has.

    arithmetic   the multiply-adds that the gradient needs, at the rate at which a 1024 x 1024
                 float32 product runs here: the common prefix once, rows without padding, the
                 embedding at answers, each forward and backward
    products     the same multiply-adds as the products that they are, of few rows and weights that
                 do not fit into cache
    peak         of the whole process, loading included
    gradient     largest difference to the gradient of mlx_lm's loss, relative to that gradient's
                 largest entry; its pad target left out, its sums over the vocabulary in parts,
                 since one float32 for 262,144 exponentials is no reference.
                 For mlx_lm: what that costs its own

Run as: python benchmarks/train_step.py --real               gemma-3-270m, batch 4 and 16, of data/
        python benchmarks/train_step.py --real FOLDER --batch 4
        python benchmarks/train_step.py --shapes             what mx.compile meets on a GPU; no step
        python benchmarks/train_step.py --end-to-end 200     ./train.sh, the whole process

PEFT needs an environment of its own, which the first run makes in .cache/peft
(benchmarks/requirements-peft.txt).
"""

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import types
import venv
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.tuner.datasets import load_dataset
from mlx_lm.utils import load_model, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from slang.models import find  # noqa: E402
from slang.train.batches import Rows, epoch, prefix_before_answers  # noqa: E402
from slang.train.shapes import Work, plan, survey  # noqa: E402

TINY = ROOT / "models/tiny-gemma3"
PEFT = ROOT / ".cache/peft"
SAME = "PEFT, slang's rows"


def real_rows(model: Path, data: str) -> Rows:
    arguments = types.SimpleNamespace(data=data, train=True, test=False, mask_prompt=True)
    train, _, _ = load_dataset(arguments, load_tokenizer(model))
    return Rows([train.process(train[i]) for i in range(len(train))], 2048, "train.jsonl")


def middle_batch(rows: Rows, size: int, alike: bool) -> list[tuple[list[int], int]]:
    """The rows of a batch that half of an epoch's batches have fewer tokens than: rows of like
    length, or random ones.
    """
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    random = [order[at : at + size] for at in range(0, len(order), size)]
    batches = [b for b in (epoch(rows, size, 0, 0) if alike else random) if len(b) == size]
    measure = sum if alike else max  # slang's are not padded
    batches.sort(key=lambda indices: measure(len(rows.tokens[i]) for i in indices))
    return [(rows.tokens[i], rows.starts[i]) for i in batches[len(batches) // 2]]


def peft_python() -> str:
    """The interpreter of PEFT's environment, made on first use."""
    python = PEFT / "bin/python"
    stamp = PEFT / "installed"
    if not stamp.exists():
        print(f"Setting up {PEFT.relative_to(ROOT)} (once; minutes) ...", file=sys.stderr)
        venv.create(PEFT, with_pip=True)
        requirements = ROOT / "benchmarks/requirements-peft.txt"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", requirements], check=True)
        stamp.touch()
    return str(python)


def measured(name: str, args, folder: Path, rows_file: Path, prefix: int) -> dict:
    """What the side says of itself, in a process of its own."""
    steps = 1 if name == "mlx_lm" else args.steps
    numbers = [str(steps), str(args.threads)]
    if name.startswith("PEFT"):
        python = args.peft or peft_python()
        command = [python, ROOT / "benchmarks/peft_step.py", folder, rows_file, *numbers]
    else:
        command = [sys.executable, ROOT / "benchmarks/slang_step.py", name, folder, rows_file]
        command += [str(prefix), *numbers]
    threads = dict.fromkeys(
        ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(args.threads)
    )
    done = subprocess.run(command, env=os.environ | threads, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def compare(args) -> None:
    """Print the table."""
    folder = find.find(args.real)
    rows = real_rows(folder, args.data)
    prefix = len(prefix_before_answers([rows]))
    unit = "CPU" if args.threads == 1 else "wall-clock"
    print(f"{platform.machine()} {platform.system()}, {mx.default_device()}, mlx {mx.__version__}, "
          f"numpy {np.__version__}; {folder.name}, {args.threads} threads, {unit} seconds, "
          f"a prefix of {prefix} tokens")  # fmt: skip
    head = ["rows", "tokens", "answers", "engine", "s a step", "to arithmetic", "rows/s"]
    head += ["slower than slang", "peak, GB", "slang's share", "gradient"]
    print("| " + " | ".join(head) + " |\n" + "| --- " * len(head) + "|", flush=True)
    for size in args.batch:
        compare_batch(size, args, folder, rows, prefix)


def compare_batch(size: int, args, folder: Path, rows: Rows, prefix: int) -> None:
    """Print the table's lines of one batch size."""
    batches = {
        "slang": middle_batch(rows, size, alike=True),
        "others": middle_batch(rows, size, alike=False),
    }
    results: dict[str, list[dict]] = {name: [] for name in ("slang", "PEFT", SAME, "mlx_lm")}
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: Path(scratch) / f"{name}.json" for name in batches}
        for name, file in files.items():
            file.write_text(json.dumps(batches[name]), encoding="utf-8")
        for turn in range(args.turns):
            for name, found in results.items():
                if turn == 0 or name in ("slang", "PEFT"):
                    file = files["slang" if name in ("slang", SAME) else "others"]
                    found.append(measured(name, args, folder, file, prefix))
        errors = measured("error", args, folder, files["slang"], prefix)
    best = {
        name: min(s for result in found for s in result["seconds"])
        for name, found in results.items()
    }
    peak = {name: max(result["peak"] for result in found) for name, found in results.items()}
    arithmetic = results["slang"][0]["multiply_adds"] / max(
        result["rate"] for result in results["slang"]
    )
    tokens = prefix + sum(len(t) - 1 - prefix for t, _ in batches["slang"])
    answers = sum(len(t) - start for t, start in batches["slang"])
    start = f"| {size} | | |"
    print(
        f"| {size} | {tokens} | {answers} | arithmetic | {arithmetic:.2f} | 1.00 "
        f"| {size / arithmetic:.2f} | | | | |"
    )
    if alone := [s for result in results["slang"] for s in result["products"]]:
        least = min(alone)
        ratio = f"{least / arithmetic:.2f}"
        print(f"{start} products | {least:.2f} | {ratio} | {size / least:.2f} | | | | |")
    for name, seconds in best.items():
        off = f"{errors[name]:.1e}" if name in errors else ""
        memory = f"{peak[name]:.2f} | {peak['slang'] / peak[name]:.2f}"
        print(
            f"{start} {name} | {seconds:.2f} | {seconds / arithmetic:.2f} | {size / seconds:.2f} "
            f"| {seconds / best['slang']:.2f}x | {memory} | {off} |",
            flush=True,
        )


def shapes(folder: Path, rows: Rows) -> None:
    """How many shapes mx.compile meets on a GPU, and what padding to them costs."""
    prefix = len(prefix_before_answers([rows]))
    work = Work.of(load_model(folder, lazy=True)[0])
    print(
        "| batch | steps | shapes, rounded to 8 | work | shapes, planned | work |\n"
        + "| --- " * 6
        + "|"
    )
    for size in (4, 16):
        iters = math.ceil(3.5 * len(rows) / size)  # the epochs of train.sh
        found = survey(rows, prefix, size, 42, iters)
        counts = np.array([*found.values()])
        exact = work.needed(np.array([*found])) @ counts
        rounded = [sizes.rounded(prefix) for sizes in found]
        line = f"| {size} | {iters} "
        for padded in (rounded, [*plan(found, prefix, work).values()]):
            line += (
                f"| {len(set(padded))} | {work.needed(np.array(padded)) @ counts / exact - 1:+.1%} "
            )
        print(line + "|", flush=True)


def end_to_end(iters: int) -> None:
    """./train.sh on the tiny model with either engine: CPU seconds of the whole process, from the
    shell to the last file.
    """
    for engine in ("mlx_lm", "slang"):
        with tempfile.TemporaryDirectory() as folder:
            more = {"ENGINE": engine, "MODEL": str(TINY), "ADAPTER_PATH": folder}
            before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            command = [ROOT / "train.sh", "--iters", str(iters)]
            subprocess.run(
                command, env=os.environ | more, check=True, capture_output=True, cwd=ROOT
            )
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            wall = time.perf_counter() - start
            print(
                f"ENGINE={engine} ./train.sh --iters {iters}: {used:.1f} s CPU, {wall:.1f} s",
                flush=True,
            )


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description="Time a training step of slang.train, PEFT and mlx_lm.lora side by side."
    )
    p.add_argument(
        "--real",
        nargs="?",
        const="gemma-3-270m",
        default="gemma-3-270m",
        metavar="MODEL",
        help="folder or name",
    )
    p.add_argument("--batch", type=int, nargs="+", default=[4, 16])
    p.add_argument("--steps", type=int, default=3, help="timed steps of a side at a turn")
    p.add_argument("--turns", type=int, default=2, help="how often the sides take turns")
    p.add_argument(
        "--threads",
        type=int,
        default=int(os.environ.get("OPENBLAS_NUM_THREADS") or os.cpu_count() or 1),
    )
    p.add_argument("--data", default=str(ROOT / "data"))
    p.add_argument("--peft", metavar="PYTHON", help="an interpreter that has PEFT already")
    p.add_argument(
        "--end-to-end", type=int, metavar="ITERS", help="./train.sh on the tiny model instead"
    )
    p.add_argument("--shapes", action="store_true", help="what mx.compile meets on a GPU instead")
    args = p.parse_args(argv)
    if args.shapes:
        folder = find.find(args.real)
        shapes(folder, real_rows(folder, args.data))
    elif args.end_to_end:
        end_to_end(args.end_to_end)
    else:
        compare(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
