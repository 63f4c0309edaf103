"""evaluate.sh: does the model know the slang? Baseline against adapted.

Reads   a base model, an adapter's folder (with its prompt.toml), data/{train,valid,test,eval}.jsonl
        and data/control.jsonl
Writes  results/<label>.json with every figure and every answer, results/<label>.html to look at,
        and in results/LOG.md a row of its table and a line under each of its headings

What is measured, and on what (n is the number of slangs; every interval is a paired bootstrap over
slangs):

  test loss        test.jsonl, as `mlx_lm.lora --test` prints it: it counts a pad token as a target
                   of every row
  answer loss      test.jsonl and eval.jsonl, mean NLL in nats over the answer's tokens and the
                   closing <end_of_turn>
  choice accuracy  Each slang is asked in a held-out question form. Which of four meanings gains
                   most by the question, one of its own or three of other slangs? In wordings that
                   no training met, and in trained ones; the others drawn at random, or close to it.
                   Gain is log-probability (nats) less that of its mean probability behind neutral
                   questions, about words that nobody uses. Chance is 0.25. Beside the new wordings
                   stands what the base model reaches when its prompt has the trained ones.
  right answers    the greedy answer to the same question is a meaning of that slang: word for word,
                   or chrF 80 and more
  chrF, exact      the greedy answer to the same question against all meanings of that slang
  control loss     control.jsonl, everyday Spanish: what the adapter damaged

Run as: python -m slang.evaluate --model models/tiny-gemma3 --adapter-path adapters/tiny
        python -m slang.evaluate --compare 20251004-A 20251004-C
            adapted against adapted, paired by slang; loads no model
"""

import argparse
import platform
import sys
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

from slang import files, jsonl, prompt
from slang.dictionary import normalized
from slang.evaluate import page, quiz, results, statistics
from slang.flags import number
from slang.models import find
from slang.text import unusable

CONTROL = Path(__file__).parents[2] / "data/control.jsonl"
PACKAGES = ("mlx", "mlx-lm", "transformers", "numpy")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m slang.evaluate",
        description="Compare base and adapted model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = p.add_argument
    add(
        "--model",
        default="mlx-community/gemma-3-1b-it-bf16",
        help="base model: a folder, a .gguf file or a Hugging Face repo",
    )
    add(
        "--adapter-path",
        default="adapters",
        help="folder with adapters.safetensors and prompt.toml",
    )
    add("--data", default="data", help="folder with train, valid, test and eval.jsonl")
    add("--results", default="results", help="folder of LOG.md and the JSON files")
    add("--cache", type=Path, default=find.CACHE, help="where folders made of .gguf files are kept")
    add(
        "--output",
        help="write this JSON file, and the page and LOG.md beside it, in place of a labelled one",
    )
    add("--ask", nargs="*", default=[], help="questions or slangs to ask both models")
    add("--note", default="", help="what was changed, for the log")
    add(
        "--quick",
        action="store_true",
        help="leave mlx_lm.lora --test out: its figure is recomputed, in half the time",
    )
    add(
        "--sample",
        type=number(1, whole=True),
        metavar="N",
        help="ask N slangs only, drawn by the seed, and take the rows of N in each file; quick too",
    )
    add(
        "--seed",
        type=number(0, whole=True),
        default=42,
        help="draws distractors, question forms and bootstraps",
    )
    add(
        "--fail-if-worse",
        action="store_true",
        help="exit with 3 when the adapter does harm, to slang or the rest",
    )
    add(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="put two runs side by side: labels or JSON files",
    )
    add(
        "--page",
        nargs="+",
        metavar="RUN",
        help="make the pages of runs again: labels or JSON files",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    if args.output and not args.output.endswith(".json"):
        p.error(f"--output: {args.output} is no name of a JSON file; end it in .json")
    if why := unusable(args.note):
        p.error(f"--note {args.note!r}: {why}")
    if args.compare or args.page:
        alone = "compare" if args.compare else "page"
        for name in ("page", "note", "quick", "sample", "output", "fail_if_worse"):
            if name != alone and getattr(args, name):
                p.error(f"--{name.replace('_', '-')}: nothing is run with --{alone}; leave it out")
    if args.compare:
        return compare(args)
    if args.page:
        return make_pages(args)
    return evaluate(args)


def compare(args: argparse.Namespace) -> int:
    """Print two runs side by side."""
    a, b = (results.read(results.find(name, Path(args.results))) for name in args.compare)
    print(page.compared(*statistics.compare(a, b), (a.label, b.label)))
    return 0


def make_pages(args: argparse.Namespace) -> int:
    """Write the pages of runs again, from their JSON."""
    for path in [results.find(name, Path(args.results)) for name in args.page]:
        html = page.page(results.read(path))
        with files.replacing(path.with_suffix(".html")) as (file,):
            file.write(html.encode())
        print(path.with_suffix(".html"))
    return 0


@dataclass
class Task:
    """What a run needs, read and checked before a model is loaded."""

    folder: Path  # of LOG.md and the other results
    prompt: prompt.Prompt
    rows: dict[str, list[jsonl.Record]]  # by the name of the file
    paths: dict[str, Path]
    items: list[quiz.Item]
    slangs: int  # of which items may be a sample
    loss_rows: dict[str, list[jsonl.Record]]  # the records whose loss is measured
    questions: list[str]  # of --ask


def evaluate(args: argparse.Namespace) -> int:
    """Check, measure, write, print. What was measured is written first: a pipe may be closed."""
    task = checked(args)
    model, _ = find.check(args.model, args.adapter_path, args.cache)

    # Here, so that --help, --compare and all that is checked above start without MLX.
    from slang.evaluate import measure, scoring, stock

    printed: list[str] = []
    if not args.quick and args.sample is None:
        for adapter in ("", args.adapter_path):
            printed.append(stock.test_loss(model, adapter, task.rows["test"]))
    started = time.monotonic()
    models = scoring.load_models(model, args.adapter_path)
    chats = [task.prompt.chat(question) for question in task.questions]
    measured = measure.measure(models, task.items, task.loss_rows, chats)
    seconds = round(time.monotonic() - started, 1)

    run = judged_run(args, task, measured, printed, find.typed(model), seconds)
    try:
        written = write(run, args, task.folder)
    finally:  # also where it can't be written
        print(page.run_text(run))
    print(f"\n{run.label}: {', '.join(map(str, written))}")
    return 3 if args.fail_if_worse and run.verdict in ("worse", "mixed") else 0


def checked(args: argparse.Namespace) -> Task:
    """All that costs nothing: a mistake shows now and not after minutes."""
    folder = Path(args.output).parent if args.output else Path(args.results)
    remedy = "give another --output" if args.output else "set RESULTS to another"
    files.need_folder(folder, remedy)
    written = [folder / "LOG.md"]
    if args.output:
        written += [Path(args.output), Path(args.output).with_suffix(".html")]
    for path in written:
        files.mode_of(path)
    results.read_log(folder / "LOG.md")
    data = Path(args.data)
    paths = {name: data / f"{name}.jsonl" for name in ("train", "valid", "test", "eval")}
    for path in paths.values():
        files.need(path, "run python make_jsonl.py and python split_jsonl.py first")

    find.need_files(Path(args.adapter_path))
    prompt_file = Path(args.adapter_path) / "prompt.toml"
    its_prompt = prompt.load(prompt_file)
    rows = {name: quiz.read(path, its_prompt, prompt_file) for name, path in paths.items()}
    others = rows["valid"] + rows["test"]
    # The data folder's own, else what comes with the project.
    synonyms = data / "synonyms.txt"
    synonyms = synonyms if synonyms.exists() else quiz.SYNONYMS
    items = quiz.make_items(its_prompt, rows["train"], others, args.seed, synonyms)
    say_who_is_left_out(rows["train"] + others, items)
    loss_rows = {name: rows[name] for name in ("test", "eval")}
    for path in (data / "control.jsonl", CONTROL):
        if path.exists():
            paths["control"] = path
            loss_rows["control"] = jsonl.read(path)
            break
    return Task(
        folder=folder,
        prompt=its_prompt,
        rows=rows,
        paths=paths,
        items=sampled(items, lambda item: item.slang, args),
        slangs=len(items),
        loss_rows={name: sampled(some, jsonl.slang, args) for name, some in loss_rows.items()},
        questions=[prompt.question(its_prompt, text) for text in args.ask],
    )


def say_who_is_left_out(records: list[jsonl.Record], items: list[quiz.Item]) -> None:
    """How many slangs are not asked."""
    slangs = {normalized(jsonl.slang(record)) for record in records}
    left_out = len(slangs) - len(items)
    if left_out:
        beside = f"beside fewer than {quiz.N_CHOICES - 1} others there is nothing to choose from"
        print(f"{left_out} of {len(slangs)} slangs are not asked: {beside}", file=sys.stderr)


def sampled(values: list, slang_of, args: argparse.Namespace) -> list:
    """Those of --sample slangs, drawn by the seed; all without it."""
    chosen = quiz.sample([normalized(slang_of(value)) for value in values], args.sample, args.seed)
    return [value for value in values if normalized(slang_of(value)) in chosen]


def test_losses(losses: results.Losses, printed: list[str], n_rows: int) -> results.TestLosses:
    """What mlx_lm.lora --test printed of test.jsonl, where it ran, and the same recomputed."""
    both = {}
    for i, who in enumerate(results.MODELS):
        _, _, loss, tokens, pad = map(sum, zip(*getattr(losses, who).values(), strict=True))
        mean = loss / tokens
        said = f"Test loss {mean:.3f}, Test ppl {statistics.perplexity(mean):.3f}. (recomputed)"
        both[who] = results.TestLoss(
            printed=printed[i] if printed else said,
            recomputed=mean,
            rows=n_rows,
            pad_share=pad / loss,
            pad_loss=pad / n_rows,
            without_pad=(loss - pad) / (tokens - n_rows),
        )
    return results.TestLosses(**both)


def judged_run(
    args: argparse.Namespace, task: Task, measured, printed: list[str], model: str, seconds: float
) -> results.Run:
    """All that is written about a run, but for its label."""
    adapter = Path(args.adapter_path)
    answers = [(item.seen, item.baseline, item.adapted) for item in measured.items]
    table = statistics.figures(measured.losses, answers, args.seed)
    statistics.add_ceilings(table, measured.items)
    verdict, because = statistics.verdict(table, measured.items)
    n = len(task.items)
    records = sum(len(task.rows[name]) for name in ("train", "valid", "test"))
    n_test = len(task.loss_rows["test"])
    return results.Run(
        label="",
        note=args.note,
        date=date.today().isoformat(),
        model=model,
        adapter=results.Adapter(
            args.adapter_path, results.sha256(adapter / "adapters.safetensors")
        ),
        prompt=results.PromptUsed(task.prompt.hash(), task.prompt.system),
        data={name: results.sha256(path) for name, path in task.paths.items()},
        sample=f"a sample of {n} of {task.slangs} slangs" if n < task.slangs else None,
        entries=results.Entries(task.slangs, records),
        versions={
            "quiz": quiz.VERSION,
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        seed=args.seed,
        seconds=seconds,
        test=test_losses(measured.losses["test"], printed, n_test),
        spoken=[
            results.Spoken(asked, **both)
            for asked, both in zip(task.questions, measured.spoken, strict=True)
        ],
        losses=measured.losses,
        items=measured.items,
        figures=table,
        verdict=verdict,
        because=because,
        failed_answers=statistics.count_failed_answers(measured.items),
        training=results.training(adapter / "log.jsonl"),
    )


def write(run: results.Run, args: argparse.Namespace, folder: Path) -> list[Path]:
    """Give the run its label and write its three files, LOG.md last. Returns their names.

    The label is taken while no other run writes there, so that two never have the same.
    """
    with files.locked(folder):
        if args.output:
            run.label = Path(args.output).stem
        else:
            run.label = results.next_label(folder, date.today())
        log = folder / "LOG.md"
        written = [folder / f"{run.label}.json", folder / f"{run.label}.html", log]
        encoded = results.encoded(run)
        contents = [
            encoded,
            page.page(results.decoded(encoded)).encode(),
            results.logged(results.read_log(log), run).encode(),
        ]
        with files.replacing(*written) as opened:
            for file, content in zip(opened, contents, strict=True):
                file.write(content)
    return written
