"""A run to read: its figures, verdict and answers as text for a terminal, and as one HTML page.

The page is one file, makes no request to anywhere, and is made again from results/<label>.json by
`python -m slang.evaluate --page LABEL`.
"""

import json
from pathlib import Path

from slang.evaluate.quiz import QUIZZES
from slang.evaluate.results import MODELS, Curves, Figure, ItemResult, Run

LONGEST = 160  # characters of an answer on a terminal


def table_text(table: list[Figure], names: tuple[str, str] = MODELS) -> str:
    """The table as text, losses with their perplexity."""
    title = f"{'':50}{names[0]:>10}{names[1]:>10}"
    lines = [f"{title}  difference, 95 % interval{'n':>9}"]
    for row in table:
        interval = f"{row.difference:+.3f}  [{row.low:+.3f}, {row.high:+.3f}]"
        lines.append(
            f"{row.figure:50}{row.baseline:10.3f}{row.adapted:10.3f}  {interval:28}{row.n:7}"
        )
        if row.ppl is not None:
            name = row.figure.replace("loss", "ppl")
            lines.append(f"{name:50}{row.ppl[0]:10.1f}{row.ppl[1]:10.1f}")
        if row.ceiling is not None:
            name = "  the base model, told the meanings"
            lines.append(f"{name:50}{row.ceiling:10.3f}")
    return "\n".join(lines)


def run_text(run: Run) -> str:
    """What a terminal shows of a run, the verdict last."""
    lines = ["mlx_lm.lora --test, where a pad token counts as a target of every row:"]
    for who in MODELS:
        test = getattr(run.test, who)
        lines.append(
            f"  {who:9} {test.printed}  pad alone {test.pad_loss:.2f}, {test.pad_share:.0%} of the "
            f"sum; without it {test.without_pad:.3f}"
        )
    lines += ["", table_text(run.figures)]
    if run.sample:
        lines.append(run.sample)
    lines.append("")
    if run.failed_answers:
        lines += [*run.failed_answers, ""]
    for spoken in run.spoken:
        lines.append(one_line(spoken.question))
        lines += [f"  {who:9} {one_line(getattr(spoken, who))}" for who in MODELS]
    if run.spoken:
        lines.append("")
    lines.append(f"{run.verdict}: {run.because}")
    return "\n".join(lines)


def one_line(answer: str) -> str:
    """An answer as a terminal shows it: a model that never stops fills pages.

    What can't be printed, such as an escape sequence, is shown as U+FFFD.
    """
    words = " ".join(answer.split())
    text = "".join(letter if letter.isprintable() else "\ufffd" for letter in words) or "(empty)"
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def compared(table: list[Figure], notes: list[str], labels: tuple[str, str]) -> str:
    """Two runs side by side, and whether they may be compared."""
    if notes:
        last = f"Not like with like: {'; '.join(notes)}."
    else:
        last = "Same data, prompt, base model and questions."
    a, b = map(one_line, labels)
    return f"A is {a}, B is {b}\n\n{table_text(table, ('A', 'B'))}\n\n{last}"


def answer_row(item: ItemResult) -> list:
    """What the page's script draws an answer from, in the order that page.html names."""
    quiz = next(name for name in QUIZZES if name in item.quizzes)
    sides = []
    for answer in item.answers:
        pick = answer.picks[quiz]
        sides += [answer.answer, answer.chrf, pick == 0, item.quizzes[quiz][pick]]
    return [item.slang, item.question, item.references, *sides, item.seen]


def drawn_curves(curves: Curves) -> tuple[dict, float, float]:
    """({name: points} of the losses that were logged, the last iteration, the largest loss)."""
    drawn = {"train": curves.train, "valid": curves.valid}
    drawn = {name: points for name, points in drawn.items() if points}
    points = [point for some in drawn.values() for point in some]
    last = max((iteration for iteration, _ in points), default=0)
    largest = max((loss for _, loss in points), default=0)
    return drawn, last, largest


def page(run: Run) -> str:
    """The whole page, from a run as `results.read` gives it.

    Everything from the dictionary or the model is escaped, in the script element too.
    """
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    data = json.dumps([answer_row(item) for item in run.items], ensure_ascii=False)
    data = data.replace("<", "\\u003c").replace("&", "\\u0026")
    curves, last, largest = drawn_curves(run.training)
    return environment.get_template("page.html").render(
        r=run,
        data=data,
        curves=curves,
        last=last,
        largest=largest,
        lowest=min(run.training.valid, key=lambda point: point[1], default=None),
    )
