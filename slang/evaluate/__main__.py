"""Does the model know the slang? Baseline against adapted, over the same questions, with one model load.

Reads   a base model, an adapter's folder (with its prompt.toml), data/{train,valid,test,eval}.jsonl, data/control.jsonl
Writes  results/<label>.json with every figure and every answer, results/<label>.html to look at, and in results/LOG.md a row of
        its table and a line under each of its headings

What is measured, and on what (n is the number of slangs; every interval is a paired bootstrap over slangs):

  test loss        test.jsonl, the number of `mlx_lm.lora --test`: it counts a pad token as a target of every row
  answer loss      test.jsonl and eval.jsonl, mean NLL in nats over the answer's tokens and the closing <end_of_turn>
  choice accuracy  each slang, asked in a held-out question form: which of four meanings gains most by the question, one of its
                   own or three of other slangs? In wordings that no training met, and in trained ones; the others drawn at
                   random, or close to it. Gain is log-probability less that behind a neutral question (nats). Chance is
                   0.25; beside the new wordings stands what the base model reaches when its prompt has the trained ones
  right answers    the greedy answer to the same question is a meaning of that slang: word for word, or chrF 80 and more
  chrF, exact      the greedy answer to the same question against all meanings of that slang
  control loss     control.jsonl, everyday Spanish: what the adapter damaged

Run as: python -m slang.evaluate --model models/tiny-gemma3 --adapter-path adapters/tiny
        python -m slang.evaluate --compare 20251004A 20251004C     adapted against adapted, paired by slang; loads no model
"""

import argparse
import importlib.metadata
import json
import platform
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np

from slang import jsonl, prompt
from slang.dictionary import key
from slang.errors import UserError, told
from slang.evaluate import measure, page, quiz, results, scoring, statistics
from slang.evaluate.results import WHO
from slang.files import replacing
from slang.models import find as model_files


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m slang.evaluate",
        description="Compare base and adapted model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--model", default="mlx-community/gemma-3-1b-it-bf16", help="base model, folder or Hugging Face repo")
    p.add_argument("--adapter-path", default="adapters", help="folder with adapters.safetensors and prompt.toml")
    p.add_argument("--data", default="data", help="folder with train, valid, test and eval.jsonl")
    p.add_argument("--results", default="results", help="folder of LOG.md and the JSON files")
    p.add_argument("--output", help="write this JSON file, and the page and LOG.md beside it, in place of a labelled one")
    p.add_argument("--ask", nargs="*", default=[], help="questions or slangs to ask both models")
    p.add_argument("--note", default="", help="what was changed, for the log")
    p.add_argument(
        "--test-lines", nargs=2, metavar=("BASELINE", "ADAPTED"), help="what mlx_lm.lora --test printed; recomputed without"
    )
    p.add_argument("--compare", nargs=2, metavar=("A", "B"), help="put two runs side by side: labels or JSON files")
    p.add_argument("--fail-if-worse", action="store_true", help="exit with 3 when the adapter does harm, to slang or the rest")
    p.add_argument(
        "--sample", type=int, metavar="N", help="ask N slangs only, drawn by the seed, and as many rows of each file"
    )
    p.add_argument("--seed", type=int, default=42, help="draws distractors, question forms and bootstrap samples")
    return p


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    if args.output and not args.output.endswith(".json"):
        p.error(f"--output: {args.output} is no name of a JSON file; end it in .json")
    if args.seed < 0:
        p.error(f"--seed {args.seed}: give a whole number from 0")
    if args.sample is not None and args.sample < 1:
        p.error(f"--sample {args.sample}: give a whole number from 1")
    try:
        if args.compare:
            a, b = (results.read(results.find(name, Path(args.results))) for name in args.compare)
            print(page.compared(*statistics.compare(a, b), (a["label"], b["label"])))
            return 0
        return run(args)
    except UserError as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(told(error), file=sys.stderr)
    except KeyboardInterrupt:
        print("Stopped; nothing was written", file=sys.stderr)
        return 130
    return 1


def run(args: argparse.Namespace) -> int:
    """Measure, print, log."""
    data, adapter = Path(args.data), Path(args.adapter_path)
    folder = Path(args.output).parent if args.output else Path(args.results)
    label = Path(args.output).stem if args.output else results.next_label(folder, date.today())
    asked = prompt.load(adapter / "prompt.toml")
    rows = {name: quiz.read(data / f"{name}.jsonl") for name in ("train", "valid", "test", "eval")}
    items = quiz.make_items(asked, rows["train"], rows["valid"] + rows["test"], args.seed)
    sets = {name: rows[name] for name in ("test", "eval")}
    # The data folder's own, else the one that comes with the project.
    control = next((f for f in (data / "control.jsonl", Path("data/control.jsonl")) if f.exists()), None)
    if control:
        sets["control"] = quiz.read(control)
    slangs = len(items)
    few = quiz.sample([key(item.slang) for item in items], args.sample, args.seed)
    items = [item for item in items if key(item.slang) in few]
    for name, some in sets.items():
        few = quiz.sample([key(jsonl.slang(row)) for row in some], args.sample, args.seed)
        sets[name] = [row for row in some if key(jsonl.slang(row)) in few]
    questions = [prompt.question(asked, text) for text in args.ask]

    started = time.monotonic()
    model = scoring.Model(args.model, args.adapter_path)
    losses, answers = measure.measure(model, items, sets, [asked.chat(question) for question in questions])
    sums = {who: np.sum(list(losses["test"][who].values()), axis=0) for who in WHO}
    recomputed = {who: float(sums[who][2] / sums[who][3]) for who in WHO}
    said = [f"Test loss {loss:.3f}, Test ppl {statistics.ppl(loss):.3f}." for loss in recomputed.values()]
    lines = args.test_lines or said
    files = {name: data / f"{name}.jsonl" for name in rows} | ({"control": control} if control else {})
    result = {
        "label": label,
        "note": args.note,
        "date": date.today().isoformat(),
        "model": model_files.typed(args.model),
        "adapter": {"path": args.adapter_path, "sha256": results.sha256(adapter / "adapters.safetensors")},
        "prompt": {"sha256": asked.hash(), "system": asked.system},
        "data": {name: results.sha256(file) for name, file in files.items()},
        "sample": f"a sample of {len(items)} of {slangs} slangs" if len(items) < slangs else None,
        "entries": {"slangs": slangs, "records": sum(len(rows[name]) for name in ("train", "valid", "test"))},
        "versions": {"python": platform.python_version(),
                     **{name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm", "transformers", "numpy")}},
        "seed": args.seed,
        "seconds": round(time.monotonic() - started, 1),
        "test": {who: {"printed": line, "recomputed": recomputed[who], "rows": len(sets["test"]),
                       "pad_share": float(sums[who][4] / sums[who][2]),
                       "pad_loss": float(sums[who][4] / len(sets["test"])),
                       "without_pad": float((sums[who][2] - sums[who][4]) / (sums[who][3] - len(sets["test"])))}
                 for who, line in zip(WHO, lines, strict=True)},
        "asked": [{"question": q, **a} for q, a in zip(questions, answers, strict=True)],
        "losses": losses,
        "items": [{"slang": i.slang, "question": i.question, "quizzes": i.quizzes, "references": i.references,
                   "seen": i.seen, "told_picks": i.told_picks, **i.answers} for i in items],
    }  # fmt: skip
    pairs = [(i.seen, *(i.answers[who] for who in WHO)) for i in items]
    both = {name: tuple(by[who] for who in WHO) for name, by in losses.items()}
    result["figures"] = statistics.figures(both, pairs, args.seed)
    statistics.ceilings(result["figures"], result["items"])
    result["verdict"], result["because"] = statistics.verdict(result["figures"], result["items"])
    result["odd"] = statistics.odd(result["items"])
    result["training"] = results.training(adapter / "log.jsonl")
    print(page.text(result))

    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "LOG.md"
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    text = results.log_row(
        text,
        [
            label,
            args.note,
            result["model"],
            f"{len(items)} of {slangs}" if result["sample"] else str(slangs),
            *results.log_cells(result["figures"]),
        ],
    )
    for heading, line in zip(results.HEADINGS.values(), lines, strict=True):
        remarks = "; ".join(filter(None, (args.note, result["sample"])))
        text = results.log_entry(text, heading, f"- {label}: `{line}`" + (f" ({remarks})" if remarks else ""))
    paths = [folder / f"{label}.json", folder / f"{label}.html", log]
    result = results.finite(result)
    with replacing(*paths) as opened:
        for file, content in zip(opened, (json.dumps(result, ensure_ascii=False, indent=1) + "\n", page.page(result), text),
                                 strict=True):  # fmt: skip
            file.write(content.encode())
    print(f"\n{label}: {', '.join(map(str, paths))}")
    return 3 if args.fail_if_worse and result["verdict"] in ("worse", "mixed") else 0


if __name__ == "__main__":
    sys.exit(main())
