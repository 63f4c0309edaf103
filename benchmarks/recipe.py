"""How should one train? One thing at a time is varied around the defaults of train.sh, on Gemma 3 270M.

Each training makes its data, trains and is evaluated as the wrappers do it, in .cache/recipe/NAME-SEED; one that has a result
there is not done again, so that the driver goes on where it was stopped. At the end it prints the table of all results.

Run as: python benchmarks/recipe.py                               every setting with the first seed; hours on two cores
        python benchmarks/recipe.py --only defaults --seeds 42 43 44
        python benchmarks/recipe.py --table                       what there is, as Markdown
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / ".cache/recipe"
EVERYDAY = "data/everyday.jsonl"
FIGURES = {
    "new": "choice accuracy, new wording",
    "close": "choice accuracy, new wording, close",
    "trained": "choice accuracy, trained wording",
    "right": "right answers",
    "whole": "whole sentences",
    "control loss": "control loss",
}


@dataclass(frozen=True)
class Setting:
    """A training: what it varies in words, the question forms of a wording, the flags of slang.train."""

    varies: str
    forms: str = "3"
    steps: int = 130
    rate: str = "2e-4"
    decay: bool = True
    everyday: str = EVERYDAY
    more: tuple[str, ...] = ()
    dictionary: str = "data/demo.txt"

    def flags(self) -> list[str]:
        given = ["--iters", str(self.steps), "--learning-rate", self.rate, "--everyday", self.everyday]
        given += ["--decay"] * self.decay
        return ["--batch-size", "16", "--num-layers", "-1", "--mask-prompt", *given, *self.more]


SETTINGS = {
    "defaults": Setting("62 slangs, 3 question forms, 130 steps of 16, 2e-4 with decay, everyday Spanish"),
    "no-everyday": Setting("no everyday Spanish", everyday=""),
    "forms-all": Setting("every question form", forms="all"),
    "forms-1": Setting("one question form a wording", forms="1"),
    "no-decay": Setting("the same learning rate throughout", decay=False),
    "rate-1e-4": Setting("learning rate 1e-4", rate="1e-4"),
    "rate-3e-4": Setting("learning rate 3e-4", rate="3e-4"),
    "steps-75": Setting("75 steps", steps=75),
    "steps-300": Setting("300 steps", steps=300),
}


def run(*command: str | Path, log: Path | None = None) -> None:
    """A step of the pipeline in the project's folder; stops everything when it fails."""
    with open(log or os.devnull, "w", encoding="utf-8") as output:
        done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed; see {log}")


def train(name: str, setting: Setting, seed: int, model: str) -> None:
    """One training and its evaluation, unless they are there."""
    folder = PLACE / f"{name}-{seed}"
    result = folder / "result.json"
    if result.exists():
        return
    print(f"{folder.name}: {setting.varies}", file=sys.stderr, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "source.jsonl"
    outputs = [part for split in ("train", "valid", "test", "eval") for part in (f"--{split}", folder / f"{split}.jsonl")]
    run("make_jsonl.py", "--input", setting.dictionary, "--output", source, "--forms", setting.forms)
    run("split_jsonl.py", "--input", source, *outputs)
    place = ["--model", model, "--data", folder, "--adapter-path", folder]
    seldom = ["--steps-per-eval", setting.steps, "--val-batches", "1", "--save-every", "25", "--seed", seed]
    trained = ["-m", "slang.train", "--train", "--resume", "--prompt", "prompt.toml", *place, *seldom, *setting.flags()]
    run(*trained, log=folder / "train.txt")
    run("-m", "slang.evaluate", *place, "--output", folder / "part.json", log=folder / "evaluate.txt")
    (folder / "part.json").rename(result)


def figures(path: Path) -> dict[str, dict]:
    return {row["figure"]: row for row in json.loads(path.read_text(encoding="utf-8"))["figures"]}


def cell(rows: list[dict], side: str) -> str:
    """Mean over the seeds, and their standard deviation where there are several."""
    values = [row[side] for row in rows]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def table() -> str:
    """All results as Markdown."""
    lines = [f"| setting | what it varies | seeds | {' | '.join(FIGURES)} |", "| --- " * (3 + len(FIGURES)) + "|"]
    for name, setting in SETTINGS.items():
        found = [figures(path) for path in sorted(PLACE.glob(f"{name}-[0-9]*/result.json"))]
        if not found:
            continue
        if len(lines) == 2:
            base = [cell([found[0][figure]], "baseline") for figure in FIGURES.values()]
            told = [
                f"{found[0][figure]['ceiling']:.2f}" if "ceiling" in found[0][figure] else "" for figure in FIGURES.values()
            ]
            lines.append(f"| | base model | | {' | '.join(base)} |")
            lines.append(f"| | base model, told the meanings | | {' | '.join(told)} |")
        cells = [cell([result[figure] for result in found], "adapted") for figure in FIGURES.values()]
        lines.append(f"| {name} | {setting.varies} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME", help="of these settings")
    p.add_argument("--seeds", nargs="+", type=int, default=[42], help="one training each")
    p.add_argument("--table", action="store_true", help="print what there is, train nothing")
    args = p.parse_args()
    if not args.table:
        sys.path.insert(0, str(ROOT))
        from slang.models import find as model_files

        os.chdir(ROOT)
        model = str(model_files.find("gemma-3-270m"))
        for seed in args.seeds:
            for name in args.only:
                train(name, SETTINGS[name], seed, model)
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
