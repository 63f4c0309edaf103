"""How many neutral questions does a quiz need?

A meaning's gain is its log-probability behind the question less that behind neutral ones, which
`slang.evaluate` takes together as the mean of their likelihoods. Here the same quizzes are judged
with fewer of them, every choice of 1, 2 or 4 out of all: which meaning is picked must not hang on
them. "mean of logs" takes them together as the mean of their logarithms.

Prints a Markdown table: the choice accuracy of each quiz, and its standard deviation over the
choices of neutral questions.

Run as: OPENBLAS_NUM_THREADS=1 python benchmarks/calibration.py --model gemma-3-270m \\
            --adapter-path adapters/demo --data data/demo
"""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import adapter

from slang.evaluate import measure, quiz, scoring
from slang.models import find

Scores = dict[str, float]  # negative log-likelihood in nats, by meaning
Together = Callable[[list[float]], float]


def mean_of_logs(losses: list[float]) -> float:
    return float(np.mean(losses))


def nothing(losses: list[float]) -> float:
    """Without calibration: the likeliest meaning wins."""
    return 0.0


def accuracy(
    asked: list[measure.QuizQuestion], scores: list[Scores], name: quiz.Quiz, neutral: Scores
) -> float:
    """Of one quiz, over the slangs that have it."""
    picks = [
        measure.choose(each.item.quizzes[name], own, neutral)[0]
        for each, own in zip(asked, scores, strict=True)
        if name in each.item.quizzes
    ]
    return float(np.mean(np.array(picks) == 0))


def row(
    asked: list[measure.QuizQuestion],
    scores: list[Scores],
    neutral: dict[str, list[float]],
    some: int,
    together: Together,
    names: tuple[quiz.Quiz, ...],
) -> list[str]:
    """Each quiz's accuracy, and its spread where there are several choices of `some` questions."""
    found = []
    n_neutral = len(quiz.INVENTED)
    for chosen in itertools.combinations(range(n_neutral), some):
        without = {text: together([each[i] for i in chosen]) for text, each in neutral.items()}
        found.append([accuracy(asked, scores, name, without) for name in names])
    means, spreads = np.mean(found, axis=0), np.std(found, axis=0)
    if len(found) == 1:
        return [f"{mean:.2f}" for mean in means]
    return [f"{mean:.2f} ± {spread:.2f}" for mean, spread in zip(means, spreads, strict=True)]


def main(argv: list[str] | None = None) -> int:
    args = adapter.parser(__doc__).parse_args(argv)
    _, items = adapter.items(args)
    models = scoring.load_models(str(find.find(args.model)), args.adapter_path)
    asked = measure.quiz_questions(models.tokenizer, items)
    for each in asked:
        each.question.generate = False

    print(f"| model | neutral questions | taken together | {' | '.join(quiz.QUIZZES)} |")
    print(f"| --- | --- | --- |{' --- |' * len(quiz.QUIZZES)}")
    most = len(quiz.INVENTED)
    kinds = [("item", "", quiz.QUIZZES)]
    told = [("open book", ", told the meanings", (quiz.NEW, quiz.NEW_CLOSE))]
    for who, asked_of_it in (("baseline", [*kinds, *told]), ("adapted", kinds)):
        purposes = {"neutral", *(purpose for purpose, *_ in asked_of_it)}
        questions = [each for each in asked if each.purpose in purposes]
        net = getattr(models, who)
        replies = scoring.ask(net, models.tokenizer, [each.question for each in questions])
        sums = measure.sums_by_meaning(questions, replies)
        neutral = measure.neutral_losses(questions, sums)
        for purpose, told_it, names in asked_of_it:
            pairs = [
                pair for pair in zip(questions, sums, strict=True) if pair[0].purpose == purpose
            ]
            own, scores = [list(part) for part in zip(*pairs, strict=True)]
            for some, how, together in (
                (0, "", nothing),
                (1, "", mean_of_logs),
                (2, "mean of likelihoods", measure.of_mean_likelihood),
                (4, "mean of likelihoods", measure.of_mean_likelihood),
                (most, "mean of likelihoods", measure.of_mean_likelihood),
                (most, "mean of logs", mean_of_logs),
            ):
                cells = row(own, scores, neutral, some, together, names)
                cells += [""] * (len(quiz.QUIZZES) - len(names))
                print(f"| {who}{told_it} | {some} | {how} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
