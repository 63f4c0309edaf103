"""What the tests of slang/evaluate share: records, adapters, and a run without a model."""

import json
import math
import shutil
from pathlib import Path

import mlx.core as mx
import msgspec
import numpy as np
from conftest import ROOT, TINY
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load

from slang import prompt
from slang.evaluate import quiz, results, statistics

SPLITS = ("train", "valid", "test", "eval")
PROMPT = prompt.load(ROOT / "prompt.toml")
SENTENCES = [
    "Saludo amable que se le hace a la gente.",
    "Cerveza.",
    "Trabajo con que uno se gana la vida todos los días, en la casa o en la oficina.",
    "Malestar del día después de una fiesta.",
]


def rows(*pairs: tuple[str, str]) -> list[dict]:
    """Records of slangs and meanings, in several question forms."""
    return [
        {"slang": slang, "meaning": meaning, "messages": PROMPT.row(slang, meaning, i % 3)}
        for i, (slang, meaning) in enumerate(pairs)
    ]


def make_data(folder: Path) -> Path:
    """Eight slangs in train.jsonl, three of them in two wordings; five others in test.jsonl."""
    seen = [(f"slang {i}", f"{SENTENCES[i % 4]} {i}") for i in range(8)]
    unseen = [(f"nuevo {i}", f"{SENTENCES[i % 4]} {i + 8}") for i in range(5)]
    more = [(f"slang {i}", f"Otra cosa {i}.") for i in range(3)]
    files = {"train": seen + more, "valid": seen[:2], "test": unseen, "eval": seen}
    for name, pairs in files.items():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in rows(*pairs)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def make_adapter(folder: Path, kind: str) -> Path:
    """An adapter of rank 4 over every layer of the tiny model.

    Its second matrices are random, zero (as before training) or not a number.
    """
    values = {
        "random": lambda w: 0.05 * mx.random.normal(w.shape),
        "zero": lambda w: w,
        "nan": lambda w: w + math.nan,
    }
    folder.mkdir()
    model, _ = load(str(ROOT / TINY))
    lora = {"rank": 4, "scale": 8.0, "dropout": 0.0}
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), lora)
    mx.random.seed(0)
    weights = dict(tree_flatten(model.trainable_parameters()))
    for name, weight in weights.items():
        if name.endswith("lora_b"):
            weights[name] = values[kind](weight)
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": len(model.layers), "lora_parameters": lora}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shutil.copy(ROOT / "prompt.toml", folder)
    return folder


def flags(adapter: Path, data: Path, model: Path = ROOT / TINY) -> list[str]:
    """Of a quick run."""
    return ["--model", str(model), "--adapter-path", str(adapter), "--data", str(data), "--quick"]


# ---------------------------------------------------------------------------- a run without a model


def answer(i: int, right: bool, random: np.random.Generator) -> dict:
    """What one model made of slang i."""
    return {
        "answer": f"Respuesta {i} {right}.",
        "picks": {quiz.TRAINED: 0 if right else 1 + i % 3},
        "gains": {quiz.TRAINED: [float(x) for x in random.random(4)]},
        "chrf": 80.0 if right else 10.0 + i,
        "right": right,
        "exact": right,
        "whole": True,
        "capped": False,
    }


def item(i: int, adapted_right: bool, random: np.random.Generator) -> dict:
    return {
        "slang": f"modismo{i}",
        "question": f'¿Qué es "modismo{i}"?',
        "quizzes": {quiz.TRAINED: [f"Bueno {i}.", "Malo.", "Feo.", "Raro."]},
        "references": [f"Bueno {i}.", f"Muy bueno {i}."],
        "seen": True,
        "told_picks": {},
        "baseline": answer(i, i % 4 == 0, random),
        "adapted": answer(i, adapted_right, random),
    }


def losses(n: int, baseline: float, adapted: float) -> dict:
    """Both models' sums of n slangs, for a loss per token each."""
    return {
        who: {f"s{i}": [level * 5 + i % 3, 5, 20.0, 7, 9.0] for i in range(n)}
        for who, level in {"baseline": baseline, "adapted": adapted}.items()
    }


def result(
    n: int = 40, adapted_right: float = 0.9, control: float = 1.0, seed: int = 0
) -> results.Run:
    """A run over n slangs: the baseline is right in a quarter, the adapted model in this share."""
    random = np.random.default_rng(seed)
    test = {
        "printed": "Test loss 2.000, Test ppl 7.389.",
        "recomputed": 2.0,
        "rows": n,
        "pad_share": 0.3,
        "pad_loss": 9.0,
        "without_pad": 1.5,
    }
    made = {
        "label": "20251004-C",
        "note": "a <b>note</b>",
        "date": "2025-10-04",
        "model": "models/tiny-gemma3",
        "adapter": {"path": "adapters/tiny", "sha256": "0"},
        "prompt": {"sha256": "p", "system": "Sos."},
        "data": {"train": "a", "test": "b", "eval": "c", "control": "d"},
        "sample": None,
        "entries": {"slangs": n, "records": 3 * n},
        "versions": {"python": "3.12"},
        "seed": 42,
        "seconds": 1.0,
        "test": dict.fromkeys(results.MODELS, test),
        "asked": [{"question": "¿Pura vida?", "baseline": "", "adapted": "Saludo."}],
        "training": {"train": [[0, 3.0], [50, 1.0]], "valid": [[50, 1.5]]},
        "losses": {
            "test": losses(n, 2.0, 1.0),
            "eval": losses(n, 2.0, 0.5),
            "control": losses(n, 2.0, 2.0 * control),
        },
        "items": [item(i, i < adapted_right * n, random) for i in range(n)],
        "figures": [],
        "verdict": "better",
        "because": "",
        "odd": [],
    }
    return judged(msgspec.convert(made, results.Run))


def judged(run: results.Run) -> results.Run:
    """The run with its figures and verdict made again."""
    answers = [(item.seen, item.baseline, item.adapted) for item in run.items]
    run.figures = statistics.figures(run.losses, answers, run.seed)
    run.verdict, run.because = statistics.verdict(run.figures, run.items)
    run.failed_answers = statistics.count_failed_answers(run.items)
    return run
