"""What a run found, as the JSON file holds it, and the files of the results folder.

A run's label is the day and a letter, `20251004-A`. Its files are <label>.json and <label>.html. In
LOG.md it has a row of the table and a line under each heading.
"""

import hashlib
import math
import re
import string
from collections.abc import Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct, field

from slang import files
from slang.errors import UserError
from slang.evaluate.quiz import Quiz

MODELS = ("baseline", "adapted")
HEADINGS = {"baseline": "## Baseline", "adapted": "## After fine-tuning"}
COLUMNS = (
    "| run | note | model | slangs | answer ppl | new wording | trained wording | right answers "
    "| control loss |"
)
CELLS = {  # of the figures in COLUMNS
    "answer loss, test.jsonl": "{0.ppl[0]:.1f} -> {0.ppl[1]:.1f}",
    "choice accuracy, new wording": "{0.baseline:.3f} -> {0.adapted:.3f}",
    "choice accuracy, trained wording": "{0.baseline:.3f} -> {0.adapted:.3f}",
    "right answers": "{0.baseline:.3f} -> {0.adapted:.3f}",
    "control loss": "{0.baseline:.3f} -> {0.adapted:.3f}",
}

# ------------------------------------------------------------------------------- what a run holds

Number = float | None  # NaN and infinity become null, for JSON has neither; see `real`
Choices = Annotated[list[str], Meta(min_length=4, max_length=4)]
Pick = Annotated[int, Meta(ge=0, lt=4)]
Verdict = Literal["better", "mixed", "no better", "worse"]
# Of a slang's rows: NLL in nats and tokens of the answers with <end_of_turn>, the same two as
# mlx_lm counts them, and the NLL of the pad tokens that mlx_lm counts.
Sums = Annotated[list[Number], Meta(min_length=5, max_length=5)]


def real(number: Number) -> float:
    """The number, NaN for JSON's null."""
    return math.nan if number is None else number


class Adapter(Struct):
    path: str
    sha256: str


class PromptUsed(Struct):
    sha256: str
    system: str


class Entries(Struct):
    slangs: int
    records: int


class TestLoss(Struct):
    """What mlx_lm.lora --test printed, and the same recomputed, in nats."""

    printed: str
    recomputed: Number
    rows: int
    pad_share: Number  # of the whole sum
    pad_loss: Number
    without_pad: Number


class TestLosses(Struct):
    baseline: TestLoss
    adapted: TestLoss


class Spoken(Struct):
    """A question of --ask and both answers."""

    question: str
    baseline: str
    adapted: str


class Losses(Struct):
    """Both models' sums for each slang of a file."""

    baseline: dict[str, Sums]
    adapted: dict[str, Sums]


class Answer(Struct):
    """What one model made of an item: its choices and its own greedy answer."""

    answer: str
    picks: dict[Quiz, Pick]  # the meaning that gains most by the question; 0 is the right one
    gains: dict[Quiz, list[Number]]  # of each of the four meanings, in nats
    chrf: float | None  # 0 to 100, against the closest known meaning
    exact: bool | None
    right: bool | None
    whole: bool
    capped: bool


class ItemResult(Struct):
    """A slang, what was asked about it, and what both models made of it."""

    slang: str
    question: str
    quizzes: dict[Quiz, Choices]
    references: list[str]
    seen: bool
    open_book_picks: dict[Quiz, Pick] = field(name="told_picks")
    baseline: Answer
    adapted: Answer

    def __post_init__(self) -> None:
        for answer in self.answers:
            if not self.quizzes or answer.picks.keys() != self.quizzes.keys():
                raise ValueError("`quizzes` and `picks` name other quizzes")

    @property
    def answers(self) -> tuple[Answer, Answer]:
        """The baseline's and the adapted model's."""
        return self.baseline, self.adapted


class Figure(Struct, omit_defaults=True):
    """A row of the table, with the 95 % interval [low, high] of the difference."""

    figure: str
    baseline: Number
    adapted: Number
    difference: Number
    low: Number
    high: Number
    n: int
    ppl: tuple[Number, Number] | None = None
    ceiling: Number = None  # what the base model reaches that has the meanings in its prompt

    @property
    def is_gain(self) -> bool:
        """Whether the whole interval is above 0."""
        return real(self.low) > 0

    @property
    def is_loss(self) -> bool:
        """Whether the whole interval is below 0."""
        return real(self.high) < 0


class Curves(Struct):
    """(iteration, loss) of the training log, in nats."""

    train: list[tuple[float, float]] = []
    valid: list[tuple[float, float]] = []


class Logged(Struct):
    """What counts of a line of log.jsonl; JSON has no NaN, and msgspec takes no infinity."""

    iteration: float
    train_loss: float | None = None
    val_loss: float | None = None


class Run(Struct):
    """Everything that evaluate.sh writes about a run."""

    label: str
    note: str
    date: str
    model: str
    adapter: Adapter
    prompt: PromptUsed
    data: dict[str, str]  # SHA-256 of each file
    sample: str | None
    entries: Entries
    versions: dict[str, str]
    seed: Annotated[int, Meta(ge=0)]
    seconds: float
    test: TestLosses
    spoken: list[Spoken] = field(name="asked")
    losses: dict[str, Losses]
    items: Annotated[list[ItemResult], Meta(min_length=1)]
    figures: list[Figure]
    verdict: Verdict
    because: str
    failed_answers: list[str] = field(name="odd")
    training: Curves


def encoded(run: Run) -> bytes:
    """The JSON file of a run."""
    return msgspec.json.format(msgspec.json.encode(run), indent=1) + b"\n"


def decoded(content: bytes) -> Run:
    """A run from its JSON. Raises msgspec.DecodeError, which names the field that is wrong."""
    return msgspec.json.decode(content, type=Run)


def read(path: Path) -> Run:
    """A run as evaluate.sh wrote it. Raises UserError when the file holds something else."""
    try:
        return decoded(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not a run of this version of evaluate.sh ({error}); evaluate again"
        ) from None


# ---------------------------------------------------------------------------------------- labels


def find(name: str, results: Path) -> Path:
    """The JSON of a run, named by its file or its label. Raises UserError when it is not there.

    20251004-A, 20251004A and 20251004[A] are the same label.
    """
    names = [Path(name), results / f"{name}.json"]
    if label := re.fullmatch(r"(\d{8})-?\[?([A-Z]+)\]?", name):
        names += [results / f"{label[1]}-{label[2]}.json", results / f"{label[1]}[{label[2]}].json"]
    for path in names:
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in results.glob("*.json"))) or "none"
    raise UserError(f"{name}: no such run in {results} (there: {known})")


def next_label(results: Path, today: date) -> str:
    """`20251004-C`: today and the next letter that neither the log nor a file has."""
    day = today.strftime("%Y%m%d")
    log = results / "LOG.md"
    known = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    known += " ".join(path.name for path in results.glob("*.json"))
    used = set(re.findall(day + r"[-\[]([A-Z]+)\b", known))
    letters = [*string.ascii_uppercase]
    while used.issuperset(letters):  # Z is followed by AA, and ZZ by AAA
        letters = [a + b for a in letters for b in string.ascii_uppercase]
    return f"{day}-{next(letter for letter in letters if letter not in used)}"


# ---------------------------------------------------------------------------------------- LOG.md


def read_log(path: Path) -> str:
    """What LOG.md holds, nothing where it is not there. Raises UserError when it can't be read."""
    return files.text_of(files.read(path), path) if path.exists() else ""


def log_entry(text: str, heading: str, line: str) -> str:
    """The log with a line added at the end of a heading's section.

    A heading that is missing is added too.
    """
    lines = text.rstrip("\n").split("\n") if text.strip() else ["# Results"]
    if heading not in lines:
        lines += ["", heading, ""]
    start = lines.index(heading) + 1
    end = start
    while end < len(lines) and not lines[end].startswith("## "):
        end += 1
    section = "\n".join(lines[start:end]).strip("\n")
    rest = "\n".join(lines[end:])
    parts = [*lines[:start], ""]
    if section:
        parts.append(section)
    parts.append(line)
    if rest:
        parts += ["", rest]
    return "\n".join(parts).rstrip("\n") + "\n"


def log_row(text: str, cells: Sequence[str]) -> str:
    """The log with a row at the end of its table.

    A new table stands below the title, above what a person wrote.
    """
    texts = [" ".join(cell.split()).replace("|", "\\|") for cell in cells]
    row = "| " + " | ".join(texts) + " |"
    lines = text.rstrip("\n").split("\n") if text.strip() else ["# Results"]
    if COLUMNS not in lines:
        at = 1 if lines[0].startswith("# ") else 0
        table = [COLUMNS, "|" + " --- |" * len(cells)]
        if at:
            table.insert(0, "")
        if lines[at : at + 1] != [""]:
            table.append("")
        lines[at:at] = table
    at = lines.index(COLUMNS)
    while at < len(lines) and lines[at].startswith("|"):
        at += 1
    return "\n".join([*lines[:at], row, *lines[at:]]) + "\n"


def log_cells(table: list[Figure]) -> list[str]:
    """The figures of the log's table, baseline -> adapted; empty where one is not there."""
    rows = {row.figure: row for row in table}
    return [form.format(rows[name]) if name in rows else "" for name, form in CELLS.items()]


def logged(text: str, run: Run) -> str:
    """LOG.md with the run's row, and its line under each heading."""
    slangs = f"{len(run.items)} of {run.entries.slangs}" if run.sample else str(run.entries.slangs)
    text = log_row(text, [run.label, run.note, run.model, slangs, *log_cells(run.figures)])
    remarks = "; ".join(filter(None, (" ".join(run.note.split()), run.sample)))
    for who, heading in HEADINGS.items():
        line = f"- {run.label}: `{getattr(run.test, who).printed}`"
        if remarks:
            line += f" ({remarks})"
        text = log_entry(text, heading, line)
    return text


# ------------------------------------------------------------------------------- what it is made of


def training(path: Path) -> Curves:
    """The curves of a training log in JSONL. A line that holds no loss is skipped."""
    curves = Curves([], [])
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with suppress(ValueError, RecursionError):
            row = msgspec.json.decode(line, type=Logged)
            if row.train_loss is not None:
                curves.train.append((row.iteration, row.train_loss))
            if row.val_loss is not None:
                curves.valid.append((row.iteration, row.val_loss))
    return curves


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
