"""How should one train? One thing at a time is varied around the defaults, on Gemma 3 270M.

Each training makes its data, trains and is evaluated as the wrappers do it, in
.cache/recipe/NAME-SEED. One that has a result there is not done again, and one that was stopped goes
on, so the driver goes on where it was stopped. At the end it prints the table of all results.

Run as: python benchmarks/recipe.py                        every setting, one seed; hours on two cores
        python benchmarks/recipe.py --only defaults --seeds 42 43 44
        python benchmarks/recipe.py --table                what there is, as Markdown
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / ".cache/recipe"
EVERYDAY = "data/everyday.jsonl"
DEMO = "data/demo.txt"
WHOLE = "data/source_augmented.txt"
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
    """A training: what it varies in words, its data, and the flags of slang.train."""

    varies: str
    forms: str = "3"  # question forms that each wording is asked in
    questions: int | None = None  # of prompt.toml, the first ones; all where it is None
    slangs: int | None = (
        None  # of the whole dictionary, drawn by a hash; the demo's where it is None
    )
    steps: int = 184  # 4 epochs of the demo's rows
    rate: str = "7e-4"
    bias_correction: bool = True
    decay: bool = True
    everyday: str = EVERYDAY
    share: str = "0.1"  # of everyday rows for one of the dictionary's
    more: tuple[str, ...] = ()

    def flags(self) -> list[str]:
        """The flags of slang.train."""
        given = ["--iters", str(self.steps), "--learning-rate", self.rate]
        given += ["--everyday", self.everyday, "--everyday-share", self.share]
        given += ["--decay"] * self.decay + ["--bias-correction"] * self.bias_correction
        return ["--batch-size", "16", "--num-layers", "-1", "--mask-prompt", *given, *self.more]


SETTINGS = {
    "defaults": Setting("62 slangs, 3 forms a wording of 20, everyday Spanish, decay"),
    "questions-8": Setting("8 question forms in place of 20", questions=8),
    "no-everyday": Setting("no everyday Spanish", everyday=""),
    "share-0.25": Setting("a row of everyday Spanish for four", share="0.25"),
    "forms-1": Setting("one question form a wording", forms="1"),
    "no-bias-correction": Setting(
        "Adam as MLX has it by default, 2e-4", rate="2e-4", bias_correction=False
    ),
    "400 slangs": Setting("400 slangs", slangs=400, steps=640),
}


def run(*command: str | Path, log: Path | None = None) -> None:
    """A step of the pipeline in the project's folder; stops everything when it fails."""
    with open(log or os.devnull, "w", encoding="utf-8") as output:
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed; see {log}")


def dictionary(setting: Setting, folder: Path) -> str:
    """The file to make the data of: the demo's, or one with some slangs of the whole dictionary."""
    if setting.slangs is None:
        return DEMO
    lines: dict[str, list[str]] = {}
    for line in Path(WHOLE).read_text(encoding="utf-8").splitlines():
        slang, separator, _ = line.partition("::")
        if separator:
            lines.setdefault(slang, []).append(line)
    drawn = sorted(lines, key=lambda slang: hashlib.blake2b(f"42 {slang}".encode()).digest())
    kept = set(drawn[: setting.slangs])
    text = [line for slang in lines if slang in kept for line in lines[slang]]
    path = folder / "dictionary.txt"
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return str(path)


def prompt(setting: Setting, folder: Path) -> str:
    """The prompt.toml to train with: the project's, or one with its first question forms only."""
    if setting.questions is None:
        return "prompt.toml"
    table = tomllib.loads(Path("prompt.toml").read_text(encoding="utf-8"))
    table["questions"] = table["questions"][: setting.questions]
    path = folder / "few.toml"
    text = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in table.items()]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return str(path)


def train(name: str, setting: Setting, seed: int, model: str) -> None:
    """One training and its evaluation, unless they are there."""
    folder = PLACE / f"{name}-{seed}"
    result = folder / "result.json"
    if result.exists():
        return
    print(f"{folder.name}: {setting.varies}", file=sys.stderr, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "source.jsonl"
    splits = ("train", "valid", "test", "eval")
    outputs = [part for split in splits for part in (f"--{split}", folder / f"{split}.jsonl")]
    asked = prompt(setting, folder)
    written = ["--input", dictionary(setting, folder), "--output", source]
    run("make_jsonl.py", *written, "--forms", setting.forms, "--prompt", asked)
    run("split_jsonl.py", "--input", source, *outputs)
    place = ["--model", model, "--data", folder, "--adapter-path", folder]
    seldom = ["--steps-per-eval", setting.steps, "--val-batches", "1", "--save-every", "25"]
    flags = ["--resume", "--prompt", asked, "--seed", seed, *place, *seldom, *setting.flags()]
    run("-m", "slang.train", "--train", *flags, log=folder / "train.txt")
    part = folder / "part.json"
    run("-m", "slang.evaluate", "--quick", *place, "--output", part, log=folder / "evaluate.txt")
    part.rename(result)


def figures(path: Path) -> dict[str, dict]:
    return {row["figure"]: row for row in json.loads(path.read_text(encoding="utf-8"))["figures"]}


def cell(rows: list[dict], side: str) -> str:
    """Mean over the seeds, and their standard deviation where there are several."""
    values = [row[side] for row in rows]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def table() -> str:
    """All results as Markdown."""
    lines = [
        f"| setting | what it varies | seeds | {' | '.join(FIGURES)} |",
        "| --- " * (3 + len(FIGURES)) + "|",
    ]
    for name, setting in SETTINGS.items():
        found = [figures(path) for path in sorted(PLACE.glob(f"{name}-[0-9]*/result.json"))]
        if not found:
            continue
        if len(lines) == 2:
            base = [cell([found[0][figure]], "baseline") for figure in FIGURES.values()]
            rows = [found[0][figure] for figure in FIGURES.values()]
            ceilings = [f"{row['ceiling']:.2f}" if "ceiling" in row else "" for row in rows]
            lines.append(f"| | base model | | {' | '.join(base)} |")
            lines.append(f"| | base model, told the meanings | | {' | '.join(ceilings)} |")
        cells = [
            cell([result[figure] for result in found], "adapted") for figure in FIGURES.values()
        ]
        lines.append(f"| {name} | {setting.varies} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    names = list(SETTINGS)
    p.add_argument("--only", nargs="+", choices=names, default=names, help="of these settings")
    p.add_argument("--seeds", nargs="+", type=int, default=[42], help="one training each")
    p.add_argument("--table", action="store_true", help="print what there is, train nothing")
    args = p.parse_args()
    if not args.table:
        sys.path.insert(0, str(ROOT))
        from slang.models import find

        os.chdir(ROOT)
        model = str(find.find("gemma-3-270m"))
        for seed in args.seeds:
            for name in args.only:
                train(name, SETTINGS[name], seed, model)
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
