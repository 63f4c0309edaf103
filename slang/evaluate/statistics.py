"""The figures of two models, their intervals and the verdict; numpy only, so that comparing two runs loads no model."""

import math

import numpy as np

from slang.errors import UserError
from slang.evaluate.results import WHO

DRAWS = 10_000  # of the bootstrap
HARM = 1.10  # control loss above this many times the baseline's is harm done
SCORES = {"choice accuracy": "right", "answer chrF": "chrf", "exact answers": "exact"}
JUDGED_BY = {"right": "choices", "chrf": "references", "exact": "references"}


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
        for name, score in SCORES.items():
            pairs = [[answer[score] for answer in answers] for answers in group if all(score in answer for answer in answers)]
            if pairs:
                values = [(side, [1.0] * len(pairs)) for side in zip(*pairs, strict=True)]
                table.append(figure(name + suffix, *values, seed))
    return table


def verdict(table: list[dict], items: list[dict]) -> tuple[str, str]:
    """(better, mixed, no better or worse; a line that says why, and what to do).

    Raises UserError when there is nothing to be better than.
    """
    rows = {row["figure"]: row for row in table}
    control, choice = rows.get("control loss"), rows["choice accuracy"]
    if not all(math.isfinite(row["baseline"]) for row in table):
        raise UserError("the base model's loss is not a number; set MODEL to another, a bfloat16 one for instance")
    if not all(math.isfinite(row["adapted"]) for row in table):
        return "worse", "the adapted model's loss is not a number: training diverged; train again with a lower --learning-rate"
    pairs = [[item[who] for who in WHO] for item in items]
    nlls = [[answer["choice_nll"] for answer in side] for side in zip(*pairs, strict=True)]
    if all(b["answer"] == a["answer"] for b, a in pairs) and np.allclose(*nlls, rtol=0, atol=1e-6):
        return "no better", "the adapter does not change the model's output; train longer, or set ADAPTER_PATH to another"
    says = "choice accuracy {baseline:.3f} -> {adapted:.3f} ({difference:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}"
    because = f"{says}, {{n}} slangs)".format(**choice)
    harm = control and control["low"] > 0 and control["adapted"] > HARM * control["baseline"]
    if harm:
        because += f"; everyday Spanish suffers: control loss {control['baseline']:.3f} -> {control['adapted']:.3f}"
        because += f" ({control['adapted'] / control['baseline'] - 1:+.0%}); try a lower --learning-rate or fewer --iters"
    if choice["high"] < 0:
        return "worse", because
    if choice["low"] > 0:
        return ("mixed" if harm else "better"), because
    return ("worse" if harm else "no better"), because + ("" if harm else "; train longer or on more wordings")


def odd(items: list[dict]) -> list[str]:
    """Answers that are none: empty, or cut off because the model did not stop."""
    tests = {"empty": lambda a: not a["answer"], "cut off: they never stopped": lambda a: a["capped"]}
    counts = [(who, sum(test(item[who]) for item in items), what) for who in WHO for what, test in tests.items()]
    return [f"{who}: {n} of {len(items)} answers {what}" for who, n, what in counts if n]


def comparable(item: dict, other: dict) -> dict:
    """What an item's adapted answer is worth, as far as the other's was judged by the same."""
    return {score: item["adapted"][score] for score, by in JUDGED_BY.items() if item[by] == other[by]}


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
                             ("had other choices", "are left out of choice accuracy", "choices"),
                             ("have other known meanings", "are left out of chrF and exact answers", "references"),
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
