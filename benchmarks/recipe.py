"""How should one train? What is varied around the defaults, on Gemma 3 270M.

Each training makes its data, trains and is evaluated as the wrappers do it, in
.cache/recipe/NAME-SEED. One that has a result is not done again (delete it in recipe.json), and one
that was stopped goes on, so the driver goes on where it was stopped. The figures go to
benchmarks/recipe.json, and the table in recipe.md is made of them.

Run as: python benchmarks/recipe.py                        every setting, one seed; hours
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
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / ".cache/recipe"
KEPT = ROOT / "benchmarks/recipe.json"
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
SIDES = {"baseline": "base model", "ceiling": "base model, told the meanings"}
ATTENTION = tuple(f"self_attn.{part}_proj" for part in "qkvo")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
# As trainings were judged before: by one neutral question, other question forms and wordings.
BY_ONE_QUESTION = ("new, 1", "trained, 1")
# The defaults once more, and one that was stopped: never trained anew.
NOTED = ("first-everyday", "defaults-before", "defaults-gpu", "800-slangs-stopped")


@dataclass(frozen=True)
class Setting:
    """A training: what it varies in words, its data, and the flags of slang.train."""

    varies: str
    forms: str = "3"  # question forms that each wording is asked in
    questions: int | None = None  # of prompt.toml, the first ones; all where it is None
    slangs: int | None = None  # of the whole dictionary; the demo's where it is None
    steps: int = 161  # 3.5 epochs of the demo's rows
    rate: str = "7e-4"
    bias_correction: bool = True
    decay: bool = True
    everyday: str = EVERYDAY
    rank: int = 8  # of LoRA
    scale: float = 20  # of LoRA
    layers: int = -1  # with an adapter, from the last; -1 is all
    keys: tuple[str, ...] = ()  # linear layers with an adapter; all where there is none
    batch_size: int = 16
    weight_decay: float = 0  # of AdamW; Adam where it is 0
    dropout: float = 0  # of what LoRA sees
    variant: str = ""  # of variant.py; slang.train as it is where there is none
    share: str = "0.1"  # of everyday rows for one of the dictionary's
    sample: int | None = None  # slangs that the evaluation asks; all where it is None

    def flags(self) -> list[str]:
        """The flags of slang.train."""
        given = ["--iters", str(self.steps), "--learning-rate", self.rate]
        given += ["--everyday", self.everyday, "--everyday-share", self.share]
        given += ["--decay"] * self.decay + ["--bias-correction"] * self.bias_correction
        given += ["--num-layers", str(self.layers), "--batch-size", str(self.batch_size)]
        return ["--mask-prompt", "--optimizer", "adamw" if self.weight_decay else "adam", *given]

    def config(self) -> dict[str, dict]:
        """What only a file tells slang.train (-c)."""
        lora = {"rank": self.rank, "scale": self.scale, "dropout": self.dropout}
        if self.keys:
            lora["keys"] = self.keys
        if not self.weight_decay:
            return {"lora_parameters": lora}
        decay = {"adamw": {"weight_decay": self.weight_decay}}
        return {"lora_parameters": lora, "optimizer_config": decay}


# Trained when prompt.toml had no more question forms, and everyday rows were the file's first ones.
of_20 = partial(Setting, questions=20)
SETTINGS = {
    "defaults": Setting("24 question forms, 7e-4, everyday Spanish for a tenth, 3.5 epochs"),
    "first-everyday": Setting("the same with the first 67 everyday rows, of three topics"),
    "questions-20": of_20("first-everyday with the first 20 question forms"),
    "defaults-before": of_20("the same, trained before"),
    "defaults-gpu": of_20("the same"),
    "epochs-4": of_20("the same for 4 epochs", steps=184),
    "rate-5e-4": of_20("5e-4, 130 steps", rate="5e-4", steps=130),
    "rate-5e-4-epochs-4": of_20("5e-4, 4 epochs", rate="5e-4", steps=184),
    "rate-5e-4-epochs-4.5": of_20("5e-4, 4.5 epochs", rate="5e-4", steps=207),
    "rate-5e-4-epochs-5": of_20("5e-4, 5 epochs", rate="5e-4", steps=230),
    "rate-6e-4-epochs-4": of_20("6e-4, 4 epochs", rate="6e-4", steps=184),
    "share-0.15": of_20("everyday Spanish for a seventh, 4 epochs", share="0.15", steps=190),
    "share-0.15-epochs-5": of_20("the same for 5 epochs", share="0.15", steps=237),
    "share-0.2-epochs-5": of_20("everyday Spanish for a fifth, 5 epochs", share="0.2", steps=248),
    "share-0.05": of_20(
        "everyday Spanish for a twentieth, 8e-4, 160 steps", share="0.05", rate="8e-4", steps=160
    ),
    "questions-8": of_20(
        "8 question forms, everyday Spanish for a quarter, 5e-4, 130 steps",
        questions=8,
        share="0.25",
        rate="5e-4",
        steps=130,
    ),
    "scale-8": of_20(
        "the same with LoRA's scale 8 and 1e-3",
        questions=8,
        share="0.25",
        rate="1e-3",
        steps=130,
        scale=8,
    ),
    "no-bias-correction": of_20(
        "the same with scale 20, Adam as MLX has it, 2e-4",
        questions=8,
        share="0.25",
        rate="2e-4",
        steps=130,
        bias_correction=False,
    ),
    "layers-9": of_20("4 epochs, the last 9 of 18 layers", steps=184, layers=9),
    "rank-4": of_20("questions-20, rank 4", rank=4),
    "rank-16": of_20("questions-20, rank 16", rank=16),
    "no-everyday": of_20("questions-20 without everyday Spanish", everyday=""),
    "forms-1": of_20("questions-20, one question form a wording, as many steps", forms="1"),
    "no-decay": of_20("questions-20, the learning rate always the same", decay=False),
    "batch-8": Setting("the defaults, batches of 8", batch_size=8, steps=321),
    "batch-32": Setting("the defaults, batches of 32", batch_size=32, steps=80),
    "weight-decay": Setting("the defaults, AdamW with a weight decay of 3", weight_decay=3),
    "attention": Setting("the defaults, an adapter on attention alone", keys=ATTENTION),
    "mlp": Setting("the defaults, an adapter on the MLPs alone", keys=MLP),
    "dropout": Setting("the defaults, LoRA with a dropout of 0.1", dropout=0.1, variant="dropout"),
    "together": Setting("the defaults, a slang's rows in one batch", variant="together"),
    "held": Setting("the defaults, everyday rows held by KL to the base model", variant="held"),
    "400-slangs": Setting("the defaults", slangs=400, steps=959, sample=120),
    "400-slangs-questions-20": of_20(
        "the first 20 question forms", slangs=400, steps=959, sample=120
    ),
    "400-slangs-short": of_20(
        "6e-4, 640 steps, everyday Spanish for a thirteenth",
        share="0.0753",  # all 300 rows
        slangs=400,
        rate="6e-4",
        steps=640,
        sample=120,
    ),
    "800-slangs": Setting("the defaults", slangs=800, steps=1943, sample=120),
    "800-slangs-stopped": Setting("the defaults, stopped at step 1550 of 1943", slangs=800),
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
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    if folder.name in kept:
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
    # JSON is YAML too.
    (folder / "lora.yaml").write_text(json.dumps(setting.config()), encoding="utf-8")
    flags += ["-c", folder / "lora.yaml"]
    program = ["-m", "slang.train"]
    if setting.variant:
        program = ["benchmarks/variant.py", setting.variant]
    run(*program, "--train", *flags, log=folder / "train.txt")
    result = folder / "result.json"
    some = ["--sample", setting.sample] if setting.sample else []
    evaluated = ["--quick", *some, *place, "--output", result]
    run("-m", "slang.evaluate", *evaluated, log=folder / "evaluate.txt")
    kept[folder.name] = figures(result)
    KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def figures(path: Path) -> dict[str, dict[str, float]]:
    """{figure: {"baseline", "adapted" and, where there is one, "ceiling"}} of an evaluation."""
    rows = {row["figure"]: row for row in json.loads(path.read_text(encoding="utf-8"))["figures"]}
    found = {}
    for short, name in FIGURES.items():
        sides = {side: rows[name].get(side) for side in ("baseline", "adapted", "ceiling")}
        found[short] = {side: round(x, 3) for side, x in sides.items() if x is not None}
    return found


def cell(values: list[float]) -> str:
    """Mean over the seeds, and their standard deviation where there are several."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}" if values else ""


def table() -> str:
    """All results as Markdown, each dictionary's behind what the base model knows of it."""
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    columns = [*FIGURES, *BY_ONE_QUESTION]
    head = ["setting", "what it is", "seeds", *columns]
    rows = [head, ["---"] * len(head)]
    for slangs in dict.fromkeys(setting.slangs for setting in SETTINGS.values()):
        results = {
            name: [r for key, r in kept.items() if key.rsplit("-", 1)[0] == name]
            for name, setting in SETTINGS.items()
            if setting.slangs == slangs
        }
        of_slangs = f"; {slangs} slangs" if slangs else ""
        everyone = [r for found in results.values() for r in found]
        for side, what in SIDES.items():
            cells = [[r[c][side] for r in everyone if side in r.get(c, {})] for c in columns]
            if any(cells):
                rows.append(["", what + of_slangs, "", *(cell(values[:1]) for values in cells)])
        for name, found in results.items():
            if found:
                cells = [cell([r[c]["adapted"] for r in found if c in r]) for c in columns]
                where = "; on a GPU" if any("on a GPU" in r for r in found) else ""
                varies = SETTINGS[name].varies + of_slangs + where
                rows.append([name, varies, str(len(found)), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    names = [name for name in SETTINGS if name not in NOTED]
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
