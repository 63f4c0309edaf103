"""How should one train? Question forms, wordings, layers, learning rate and epochs, on the tiny model, over several seeds.

A fixed part of the dictionary: --slangs of those with at least five wordings, drawn by hash; four of these may be trained.
All trainings are asked the same questions, in held-out forms, whose right choice is a wording that every training has met
("choice") or one that none has ("new wording"). Every training runs the same number of steps unless the steps are what is
varied, so that more forms or wordings mean fewer repetitions of each, not more work.

Reads   data/source_augmented.txt, prompt.toml, data/control.jsonl
Writes  one JSON line a training to --output (a second run goes on where the first stopped), and the table on stdout

Run as: ./demo.sh, or any wrapper, once for the .venv; then
        LD_PRELOAD=$PWD/.venv/lib/libcblas-openblas.so .venv/bin/python benchmarks/recipe.py
        benchmarks/recipe.md has the table and what follows from it
"""

import argparse
import contextlib
import gc
import json
import statistics
import sys
import tempfile
import time
from hashlib import blake2b
from pathlib import Path

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))
from slang import lora, prompt
from slang.dictionary import Entry, entries, key
from slang.evaluate import quiz, results, scoring

ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
USUAL = {"forms": 3, "wordings": 2, "layers": "all", "learning_rate": 1e-3, "steps": 120}
VARIED = {
    "forms": [1, 3, 6],
    "wordings": [1, 2, 4],
    "layers": ["attention", "all"],
    "learning_rate": [3e-4, 1e-3, 3e-3],
    "steps": [60, 120, 240],
}
WORDINGS = max(VARIED["wordings"])


class NoBar:
    def update(self, _):
        pass


def chosen(path: Path, n: int) -> dict[str, list[str]]:
    """slang -> five wordings, of n slangs drawn by hash among those that have so many."""
    slangs: dict[str, list[str]] = {}
    for entry in entries(path):
        if isinstance(entry, Entry):
            slangs.setdefault(entry.slang, []).append(entry.meaning)
    able = [slang for slang, meanings in slangs.items() if len(meanings) > WORDINGS]
    able.sort(key=lambda slang: blake2b(key(slang).encode()).digest())
    return {slang: slangs[slang][: WORDINGS + 1] for slang in able[:n]}


def records(asked: prompt.Prompt, slangs: dict[str, list[str]], forms: int, wordings: list[int]) -> list[dict]:
    """Training rows: each wording in so many question forms, beginning at another form each time."""
    rows = []
    for i, (slang, meanings) in enumerate(slangs.items()):
        for w in wordings:
            for f in range(forms):
                form = (i + w * forms + f) % len(asked.questions) if forms > 1 else 0
                rows.append({"slang": slang, "meaning": meanings[w], "messages": asked.train(slang, meanings[w], form)})
    return rows


def train(args, asked: prompt.Prompt, slangs: dict, setting: dict, seed: int, folder: Path) -> float:
    """Train with slang.lora, the log in the folder; seconds."""
    rows = records(asked, slangs, setting["forms"], list(range(setting["wordings"])))
    for name, part in (("train", rows), ("valid", rows[:8])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in part), encoding="utf-8")
    config = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))
    if setting["layers"] == "attention":
        config["lora_parameters"]["keys"] = ATTENTION
    (folder / "lora.yaml").write_text(json.dumps(config), encoding="utf-8")
    flags = {"model": args.model, "data": folder, "adapter-path": folder, "config": folder / "lora.yaml", "batch-size": 16,
             "iters": setting["steps"], "learning-rate": setting["learning_rate"], "num-layers": -1, "seed": seed,
             "val-batches": 1, "steps-per-eval": 9999, "save-every": 9999, "steps-per-report": 999, "keep": "last"}  # fmt: skip
    started = time.perf_counter()
    with (
        open(folder / "log.txt", "w", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        parts = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        if lora.main(["--train", "--mask-prompt", *parts]):
            raise SystemExit((folder / "log.txt").read_text(encoding="utf-8"))
    return time.perf_counter() - started


def score(args, asked: prompt.Prompt, slangs: dict, adapter: Path, whos: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """The four figures of the base model, the adapted one, or both."""
    met = records(asked, slangs, 1, [0])
    items = quiz.make_items(asked, met, records(asked, slangs, 1, list(range(1, WORDINGS))), 42)
    new = quiz.make_items(asked, records(asked, slangs, 1, [WORDINGS]), [], 42)
    control = quiz.read(Path("data/control.jsonl"))
    model = scoring.Model(args.model, str(adapter))
    parts = {"items": scoring.item_questions(model, items), "new": scoring.item_questions(model, new)}
    parts["control"] = scoring.loss_questions(model, control)
    for question in parts["new"]:
        question.generate = False
    out = {}
    for who in whos:
        got = {name: sorted(scoring.study(model, who, questions, NoBar())) for name, questions in parts.items()}
        judged = [scoring.judged(model, items[i], losses, answer, scoring.CHRF()) for i, losses, answer in got["items"]]
        sums = sum(scoring.loss_sums(model, parts["control"][i].rests[0], losses[0]) for i, losses, _ in got["control"])
        out[who] = {
            "choice": float(np.mean([answer["choice"] == 0 for answer in judged])),
            "new": float(np.mean([losses[0].mean() < min(loss.mean() for loss in losses[1:]) for _, losses, _ in got["new"]])),
            "chrF": float(np.mean([answer["chrf"] for answer in judged])),
            "control": float(sums[0] / sums[1]),
        }
    return out


def table(rows: list[dict]) -> str:
    """Markdown: mean and standard deviation over seeds; the usual setting is a row of every question."""
    figures = ("choice", "new", "chrF", "control")
    base = next(row for row in rows if row["setting"] is None)
    lines = ["| question | setting | rows | epochs | choice | new wording | chrF | control loss | s |", "| --- " * 9 + "|"]
    lines.append("| base model | | | | " + " | ".join(f"{base[f]:.{1 if f == 'chrF' else 2}f}" for f in figures) + " | |")
    for name, values in VARIED.items():
        for value in values:
            same = [r for r in rows if r["setting"] == {**USUAL, name: value}]
            if not same:
                continue
            cells = []
            for f in figures:
                numbers, places = [row[f] for row in same], 1 if f == "chrF" else 2
                spread = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
                cells.append(f"{statistics.mean(numbers):.{places}f} ± {spread:.{places}f}")
            usual = " (usual)" if value == USUAL[name] else ""
            rows_each, seconds = same[0]["rows"], statistics.mean(row["seconds"] for row in same)
            size = f"{rows_each} | {16 * same[0]['setting']['steps'] / rows_each:.1f}"
            lines.append(f"| {name.replace('_', ' ')} | {value}{usual} | {size} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--model", default="models/tiny-gemma3")
    p.add_argument("--config", default="models/tiny-gemma3/lora.yaml", help="rank, scale and dropout")
    p.add_argument("--slangs", type=int, default=48)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--output", default="results/recipe.jsonl")
    p.add_argument("--limit", type=float, default=1e9, help="begin no training after so many seconds")
    args = p.parse_args(argv)
    asked = prompt.load("prompt.toml")
    slangs = chosen(Path("data/source_augmented.txt"), args.slangs)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()] if output.exists() else []
    started = time.monotonic()
    settings = {json.dumps({**USUAL, name: value}): None for name, values in VARIED.items() for value in values}
    for seed in range(1, args.seeds + 1):
        for setting in map(json.loads, settings):
            if any(r["setting"] == setting and r["seed"] == seed for r in rows) or time.monotonic() - started > args.limit:
                continue
            with tempfile.TemporaryDirectory() as name:
                seconds = train(args, asked, slangs, setting, seed, Path(name))
                (Path(name) / "prompt.toml").write_bytes(Path("prompt.toml").read_bytes())
                first = not rows
                scores = score(args, asked, slangs, Path(name), results.WHO if first else ("adapted",))
            n = setting["forms"] * setting["wordings"] * len(slangs)
            new = [{"setting": setting, "seed": seed, "rows": n, "seconds": round(seconds, 1), **scores["adapted"]}]
            if first:
                new.insert(0, {"setting": None, "seed": 0, "rows": 0, "seconds": 0, **scores["baseline"]})
            with output.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in new)
            rows += new
            print(json.dumps(new[-1]), file=sys.stderr)
            gc.collect()
    print(f"{len(slangs)} slangs, {args.seeds} seeds, batches of 16\n\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
