"""The figures of two models, their intervals and the verdict; comparing two runs loads no model."""

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from slang.errors import UserError
from slang.evaluate.quiz import NEW, QUIZZES, TRAINED
from slang.evaluate.results import (
    MODELS,
    Answer,
    Figure,
    ItemResult,
    Losses,
    Run,
    Sums,
    Verdict,
    real,
)

Ratio = tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]  # over, under: (slangs,)
DRAWS = 10_000  # of the bootstrap
DRAWN_TOGETHER = 500
HARM = 1.10  # control loss above this many times the baseline's is harm done
CHOICE = "choice accuracy, "  # and the name of the quiz
UNSEEN = ", unseen slangs"
# What the verdict goes by, beside the harm that is done.
HEADLINES = (CHOICE + NEW, CHOICE + TRAINED, CHOICE + NEW + UNSEEN)
SCORES = {
    "right answers": "right",
    "exact answers": "exact",
    "answer chrF": "chrf",
    "whole sentences": "whole",
}
MORE_WORDINGS = "train longer or on more wordings"
NOTHING_LEARNT = (
    "the adapter does not change the model's output; train longer, or set ADAPTER_PATH to another"
)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where a float can't hold it."""
    return math.inf if loss > 700 else math.exp(loss)


def figure(name: str, base: Ratio, adapted: Ratio, seed: int) -> Figure:
    """A ratio of sums over slangs for both models, and a 95 % interval of the difference.

    base, adapted  (numerators, denominators), (slangs,) each
    The bootstrap draws slangs, the same for both models.
    """
    columns = np.array([*base, *adapted], np.float64).T
    n = len(base[0])
    random = np.random.default_rng(seed)
    differences = []
    for _ in range(0, DRAWS, DRAWN_TOGETHER):
        drawn = random.integers(n, size=(DRAWN_TOGETHER, n))
        drawn += n * np.arange(DRAWN_TOGETHER)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=DRAWN_TOGETHER * n)
        sums = counts.reshape(DRAWN_TOGETHER, n) @ columns
        differences.append(sums[:, 2] / sums[:, 3] - sums[:, 0] / sums[:, 1])
    low, high = np.percentile(np.concatenate(differences), [2.5, 97.5])
    total = columns.sum(axis=0)
    before = float(total[0] / total[1])
    after = float(total[2] / total[3])
    return Figure(name, before, after, after - before, float(low), float(high), n)


def loss_figure(name: str, losses: Losses, seed: int) -> Figure | None:
    """The answer loss of a file in nats, with its perplexity."""
    both = [slang for slang in losses.baseline if slang in losses.adapted]
    if not both:
        return None

    def sums(model: dict[str, Sums]) -> Ratio:
        pairs = np.array([model[slang][:2] for slang in both], np.float64)  # JSON's null is NaN
        return pairs[:, 0], pairs[:, 1]

    title = "control loss" if name == "control" else f"answer loss, {name}.jsonl"
    row = figure(title, sums(losses.baseline), sums(losses.adapted), seed)
    row.ppl = (perplexity(real(row.baseline)), perplexity(real(row.adapted)))
    return row


def figures(
    losses: dict[str, Losses], answers: list[tuple[bool, Answer, Answer]], seed: int
) -> list[Figure]:
    """The table of two models, losses first. Slangs that were not trained have rows of their own.

    losses   by the name of the file
    answers  for each slang whether it was trained, and both models' answers
    """
    rows = [loss_figure(name, both, seed) for name, both in losses.items()]
    table = [row for row in rows if row is not None]
    for trained, suffix in ((True, ""), (False, UNSEEN)):
        group = [(base, adapted) for seen, base, adapted in answers if seen == trained]
        for name in (*(CHOICE + quiz for quiz in QUIZZES), *SCORES):
            pairs = [(worth(name, base), worth(name, adapted)) for base, adapted in group]
            pairs = [pair for pair in pairs if None not in pair]
            if pairs:
                before, after = zip(*pairs, strict=True)
                ones = [1.0] * len(pairs)
                table.append(figure(name + suffix, (before, ones), (after, ones), seed))
    return table


def worth(name: str, answer: Answer) -> float | None:
    """What an answer counts in a figure, None where it has no part in it."""
    if name in SCORES:
        return getattr(answer, SCORES[name])
    quiz = name.removeprefix(CHOICE)
    return float(answer.picks[quiz] == 0) if quiz in answer.picks else None


def add_ceilings(table: list[Figure], items: list[ItemResult]) -> None:
    """Put beside the new wordings' figures what the base model reaches with an open book.

    That is with the trained wordings in its prompt.
    """
    for row in table:
        quiz = row.figure.removeprefix(CHOICE)
        picks = [item.open_book_picks[quiz] for item in items if quiz in item.open_book_picks]
        if picks:
            row.ceiling = float(np.mean([pick == 0 for pick in picks]))


def same_output(items: list[ItemResult]) -> bool:
    """Whether both models answer alike and find each meaning as likely."""
    gains: tuple[list[float], list[float]] = ([], [])
    for item in items:
        if item.baseline.answer != item.adapted.answer:
            return False
        for values, answer in zip(gains, item.answers, strict=True):
            for four in answer.gains.values():
                values.extend(map(real, four))
    return np.allclose(*gains, rtol=0, atol=1e-6)


def verdict(table: list[Figure], items: list[ItemResult]) -> tuple[Verdict, str]:
    """(better, mixed, no better or worse; a line that says why, and what to do).

    Raises UserError when there is nothing to be better than.
    """
    rows = {row.figure: row for row in table}
    control = rows.get("control loss")
    choices = [row for name, row in rows.items() if name in HEADLINES]
    if not all(math.isfinite(real(row.baseline)) for row in table):
        raise UserError(
            "the base model's loss is not a number; "
            "set MODEL to another, a bfloat16 one for instance"
        )
    if not all(math.isfinite(real(row.adapted)) for row in table):
        return "worse", (
            "the adapted model's loss is not a number: training diverged; "
            "train again with a lower --learning-rate"
        )
    if same_output(items):
        return "no better", NOTHING_LEARNT
    because = "; ".join(map(in_words, choices))
    harm = harm_in_words(control) if control else ""
    because += harm
    worse = bool(harm) or any(row.is_loss for row in choices)
    if any(row.is_gain for row in choices):
        return ("mixed" if worse else "better"), because
    if worse:
        return "worse", because
    return "no better", f"{because}; {MORE_WORDINGS}"


def harm_in_words(control: Figure) -> str:
    """What the adapter damaged in everyday Spanish, and what to do; empty where that is little."""
    before, after = real(control.baseline), real(control.adapted)
    if not (real(control.low) > 0 and after > HARM * before):
        return ""
    return (
        f"; everyday Spanish suffers: control loss {before:.3f} -> {after:.3f} "
        f"({after / before - 1:+.0%}); try fewer --epochs or a higher --everyday-share"
    )


def in_words(row: Figure) -> str:
    """A choice figure in words."""
    text = (
        f"{row.figure} {row.baseline:.3f} -> {row.adapted:.3f} ({row.difference:+.3f}, "
        f"95 % interval {row.low:+.3f} to {row.high:+.3f}, {row.n} slangs"
    )
    if row.ceiling is not None:
        text += f"; told the meanings, the base model reaches {row.ceiling:.3f}"
    return text + ")"


def count_failed_answers(items: list[ItemResult]) -> list[str]:
    """How many answers are none: empty, or cut off because the model did not stop."""
    tests = {
        "empty": lambda answer: not answer.answer,
        "cut off: they never stopped": lambda answer: answer.capped,
    }
    lines = []
    for who in MODELS:
        for what, failed in tests.items():
            if n := sum(failed(getattr(item, who)) for item in items):
                lines.append(f"{who}: {n} of {len(items)} answers {what}")
    return lines


# ---------------------------------------------------------------------------------------- two runs


def comparable(item: ItemResult, other: ItemResult) -> Answer:
    """What an item's adapted answer is worth, as far as the other's was judged by the same."""
    same = {name for name, four in item.quizzes.items() if four == other.quizzes.get(name)}
    picks = {name: pick for name, pick in item.adapted.picks.items() if name in same}
    answer = msgspec.structs.replace(item.adapted, picks=picks)
    if item.references != other.references:
        answer.right = answer.exact = answer.chrf = None
    return answer


def differences(a: Run, b: Run, pairs: list[tuple[ItemResult, ItemResult]]) -> list[str]:
    """What keeps two runs from being like with like."""
    notes = []
    if a.prompt != b.prompt:
        notes.append("the prompts differ")
    if a.model != b.model:
        notes.append("the base models differ")
    if a.seed != b.seed:
        notes.append("the seeds of the questions differ")
    if a.versions.get("quiz") != b.versions.get("quiz"):
        notes.append("choices were judged in another way: evaluate the older one again")
    notes += [f"{name}.jsonl differs" for name in different_files(a, b)]
    for run in (a, b):
        if n := len(run.items) - len(pairs):
            notes.append(f"{n} slangs of {run.label} are left out")
    others = "other choices, and are left out of the choice accuracy that they differ in"
    meanings = "other known meanings, and are left out of chrF, right and exact answers"
    for name, what in {
        "question": "were asked another question, and are left out",
        "quizzes": f"had {others}",
        "references": f"have {meanings}",
        "seen": "were trained in one of the two only, and count as unseen",
    }.items():
        if n := sum(getattr(x, name) != getattr(y, name) for x, y in pairs):
            notes.append(f"{n} of {len(pairs)} slangs {what}")
    return notes


def different_files(a: Run, b: Run) -> list[str]:
    """The names of the data files that the two have not in common."""
    return [name for name in a.data | b.data if a.data.get(name) != b.data.get(name)]


def compare(a: Run, b: Run) -> tuple[list[Figure], list[str]]:
    """(the table of b's adapted model against a's, what keeps the two from being like with like).

    Raises UserError when they have nothing in common.
    """
    other = {item.slang: item for item in b.items}
    pairs = [(item, other[item.slang]) for item in a.items if item.slang in other]
    files = different_files(a, b)
    losses = {
        name: Losses(a.losses[name].adapted, b.losses[name].adapted)
        for name in a.losses
        if name in b.losses and name not in files
    }
    answers = [
        (x.seen and y.seen, comparable(x, y), comparable(y, x))
        for x, y in pairs
        if x.question == y.question
    ]
    if not losses and not answers:
        raise UserError(f"{a.label} and {b.label} share no slang and no data: nothing to compare")
    return figures(losses, answers, a.seed), differences(a, b, pairs)
