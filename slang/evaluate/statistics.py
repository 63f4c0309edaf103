"""The figures of two models, their intervals and the verdict; numpy only, so that comparing two runs loads no model."""

import math

import numpy as np

from slang.errors import UserError
from slang.evaluate.quiz import NEW, QUIZZES, TRAINED
from slang.evaluate.results import WHO

DRAWS = 10_000  # of the bootstrap
HARM = 1.10  # control loss above this many times the baseline's is harm done
CHOICE = "choice accuracy, "  # and the name of the quiz
HEADLINES = (CHOICE + NEW, CHOICE + TRAINED, f"{CHOICE}{NEW}, unseen slangs")  # what the verdict goes by
SCORES = {"right answers": "right", "exact answers": "exact", "answer chrF": "chrf", "whole sentences": "whole"}


def ppl(loss: float) -> float:
    """exp(loss), infinite where a float can't hold it."""
    return math.inf if loss > 700 else math.exp(loss)


def figure(name: str, base: tuple, adapted: tuple, seed: int) -> dict:
    """One row of the table: a ratio of sums over slangs for both models, and a 95 % interval of the difference.

    `base` and `adapted` are (numerators, denominators), (slangs,) each. The bootstrap draws slangs, the same for both models.
    """
    columns, n, random = np.array([*base, *adapted], np.float64).T, len(base[0]), np.random.default_rng(seed)
    differences = []
    for _ in range(0, DRAWS, 500):
        draw = random.integers(n, size=(500, n)) + n * np.arange(500)[:, None]
        sums = np.bincount(draw.ravel(), minlength=500 * n).reshape(500, n) @ columns
        differences.append(sums[:, 2] / sums[:, 3] - sums[:, 0] / sums[:, 1])
    low, high = np.percentile(np.concatenate(differences), [2.5, 97.5])
    total = columns.sum(axis=0)
    b, a = float(total[0] / total[1]), float(total[2] / total[3])
    return {"figure": name, "baseline": b, "adapted": a, "difference": a - b, "low": float(low), "high": float(high), "n": n}


def figures(losses: dict[str, tuple[dict, dict]], items: list[tuple[bool, dict, dict]], seed: int) -> list[dict]:
    """The table of two models, losses first; slangs that were not trained are rows of their own.

    `losses` has both models' {slang: sums} of each set, `items` for each slang whether it was trained and both answers.
    """
    table = []
    for name, models in losses.items():
        both = [slang for slang in models[0] if slang in models[1]]
        sums = [tuple(np.array([side[slang][:2] for slang in both], np.float64).T) for side in models]  # JSON's null is NaN
        row = figure("control loss" if name == "control" else f"answer loss, {name}.jsonl", *sums, seed)
        table.append(row | {"ppl": [ppl(row["baseline"]), ppl(row["adapted"])]})
    for trained, suffix in ((True, ""), (False, ", unseen slangs")):
        group = [answers for seen, *answers in items if seen == trained]
        for name in (*(CHOICE + quiz for quiz in QUIZZES), *SCORES):
            pairs = [[worth(name, answer) for answer in answers] for answers in group]
            pairs = [pair for pair in pairs if None not in pair]
            if pairs:
                values = [(side, [1.0] * len(pairs)) for side in zip(*pairs, strict=True)]
                table.append(figure(name + suffix, *values, seed))
    return table


def worth(name: str, answer: dict) -> float | None:
    """What an answer counts in a figure, None where it has no part in it."""
    if name in SCORES:
        return answer.get(SCORES[name])
    pick = answer["picks"].get(name.removeprefix(CHOICE))
    return None if pick is None else float(pick == 0)


def ceilings(table: list[dict], items: list[dict]) -> None:
    """Write beside the new wordings' figures what the base model reaches that has the trained wordings in its prompt."""
    for row in table:
        quiz = row["figure"].removeprefix(CHOICE)
        told = [item["told_picks"][quiz] == 0 for item in items if quiz in item["told_picks"]]
        if told:
            row["ceiling"] = float(np.mean(told))


def verdict(table: list[dict], items: list[dict]) -> tuple[str, str]:
    """(better, mixed, no better or worse; a line that says why, and what to do).

    Raises UserError when there is nothing to be better than.
    """
    rows = {row["figure"]: row for row in table}
    control = rows.get("control loss")
    choices = [row for name, row in rows.items() if name in HEADLINES]
    if not all(math.isfinite(row["baseline"]) for row in table):
        raise UserError("the base model's loss is not a number; set MODEL to another, a bfloat16 one for instance")
    if not all(math.isfinite(row["adapted"]) for row in table):
        return "worse", "the adapted model's loss is not a number: training diverged; train again with a lower --learning-rate"
    pairs = [[item[who] for who in WHO] for item in items]
    gains = [
        [gain for answer in side for four in answer["gains"].values() for gain in four] for side in zip(*pairs, strict=True)
    ]
    if all(b["answer"] == a["answer"] for b, a in pairs) and np.allclose(*gains, rtol=0, atol=1e-6):
        return "no better", "the adapter does not change the model's output; train longer, or set ADAPTER_PATH to another"
    because = "; ".join(map(said, choices))
    harm = control and control["low"] > 0 and control["adapted"] > HARM * control["baseline"]
    if harm:
        because += f"; everyday Spanish suffers: control loss {control['baseline']:.3f} -> {control['adapted']:.3f}"
        because += f" ({control['adapted'] / control['baseline'] - 1:+.0%}); try a lower --learning-rate or fewer --iters"
    if any(row["low"] > 0 for row in choices):
        return ("mixed" if harm else "better"), because
    if any(row["high"] < 0 for row in choices):
        return "worse", because
    return ("worse" if harm else "no better"), because + ("" if harm else "; train longer or on more wordings")


def said(row: dict) -> str:
    """A choice figure in words."""
    says = "{figure} {baseline:.3f} -> {adapted:.3f} ({difference:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}, {n} slangs"
    ceiling = "; told the meanings, the base model reaches {ceiling:.3f}" if "ceiling" in row else ""
    return (says + ceiling + ")").format(**row)


def odd(items: list[dict]) -> list[str]:
    """Answers that are none: empty, or cut off because the model did not stop."""
    tests = {"empty": lambda a: not a["answer"], "cut off: they never stopped": lambda a: a["capped"]}
    counts = [(who, sum(test(item[who]) for item in items), what) for who in WHO for what, test in tests.items()]
    return [f"{who}: {n} of {len(items)} answers {what}" for who, n, what in counts if n]


def comparable(item: dict, other: dict) -> dict:
    """What an item's adapted answer is worth, as far as the other's was judged by the same."""
    adapted = item["adapted"]
    same = {name for name, choices in item["quizzes"].items() if choices == other["quizzes"].get(name)}
    kept = {"picks": {name: pick for name, pick in adapted["picks"].items() if name in same}, "whole": adapted["whole"]}
    if item["references"] == other["references"]:
        kept |= {score: adapted[score] for score in ("right", "exact", "chrf")}
    return kept


def compare(a: dict, b: dict) -> tuple[list[dict], list[str]]:
    """(the table of b's adapted model against a's, what keeps the two from being like with like).

    Raises UserError when they have nothing in common.
    """
    other = {item["slang"]: item for item in b["items"]}
    pairs = [(item, other[item["slang"]]) for item in a["items"] if item["slang"] in other]
    notes = [
        f"the {what} differ"
        for what, name in (("prompts", "prompt"), ("base models", "model"), ("seeds of the questions", "seed"))
        if a[name] != b[name]
    ]
    files = [name for name in a["data"] | b["data"] if a["data"].get(name) != b["data"].get(name)]
    notes += [f"{name}.jsonl differs" for name in files]
    left_out = {r["label"]: len(r["items"]) - len(pairs) for r in (a, b)}
    notes += [f"{n} slangs of {label} are left out" for label, n in left_out.items() if n]
    for what, does, name in (("were asked another question", "are left out", "question"),
                             ("had other choices", "are left out of the choice accuracy that they differ in", "quizzes"),
                             ("have other known meanings", "are left out of chrF, right and exact answers", "references"),
                             ("were trained in one of the two only", "count as unseen", "seen")):  # fmt: skip
        if n := sum(x[name] != y[name] for x, y in pairs):
            notes.append(f"{n} of {len(pairs)} slangs {what}, and {does}")
    losses = {name: tuple(r["losses"][name]["adapted"] for r in (a, b)) for name in a["losses"] if name not in files}
    answers = [
        (x["seen"] and y["seen"], comparable(x, y), comparable(y, x)) for x, y in pairs if x["question"] == y["question"]
    ]
    if not losses and not answers:
        raise UserError(f"{a['label']} and {b['label']} share no slang and no data: nothing to compare")
    return figures(losses, answers, a["seed"]), notes
