"""The files of a run: its label, LOG.md, the JSON, and what is read back of them."""

import hashlib
import json
import math
import re
import string
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from slang.errors import UserError

WHO = ("baseline", "adapted")
HEADINGS = {"baseline": "## Baseline", "adapted": "## After fine-tuning"}
COLUMNS = "| run | note | model | slangs | answer ppl | new wording | trained wording | right answers | control loss |"
CELLS = {  # of the figures in COLUMNS
    "answer loss, test.jsonl": "{ppl[0]:.1f} -> {ppl[1]:.1f}",
    "choice accuracy, new wording": "{baseline:.3f} -> {adapted:.3f}",
    "choice accuracy, trained wording": "{baseline:.3f} -> {adapted:.3f}",
    "right answers": "{baseline:.3f} -> {adapted:.3f}",
    "control loss": "{baseline:.3f} -> {adapted:.3f}",
}


def find(name: str, results: Path) -> Path:
    """The JSON of a run, named by its file or its label, with or without brackets. Raises UserError when it is not there."""
    label = re.sub(r"^(\d{8})([A-Z]+)$", r"\1[\2]", name)
    path = next((path for path in (Path(name), results / f"{label}.json") if path.is_file()), None)
    if path is None:
        known = ", ".join(sorted(path.stem for path in results.glob("*.json"))) or "none"
        raise UserError(f"{name}: no such run in {results} (there: {known})")
    return path


def read(path: Path) -> dict:
    """A run as evaluate.sh wrote it. Raises UserError when the file holds something else."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if result.keys() >= {"figures", "items", "odd"} and "quizzes" in result["items"][0]:
            return result
    except (ValueError, AttributeError, LookupError, TypeError):
        pass
    raise UserError(f"{path}: not a run of this version of evaluate.sh; evaluate again")


def next_label(results: Path, today: date) -> str:
    """`20251004[C]`: today and the next letter that neither the log nor a file has."""
    day = today.strftime("%Y%m%d")
    log = results / "LOG.md"
    known = log.read_text(encoding="utf-8") if log.exists() else ""
    known += " ".join(path.name for path in results.glob("*.json"))
    used = set(re.findall(re.escape(day) + r"\[([A-Z]+)\]", known))
    letters = [*string.ascii_uppercase, *(a + b for a in string.ascii_uppercase for b in string.ascii_uppercase)]
    return f"{day}[{next(letter for letter in letters if letter not in used)}]"


def log_entry(text: str, heading: str, line: str) -> str:
    """The log with a line added at the end of a heading's section, the heading too where it is missing."""
    lines = text.rstrip("\n").split("\n") if text.strip() else ["# Results"]
    if heading not in lines:
        lines += ["", heading, ""]
    at = lines.index(heading) + 1
    end = next((i for i in range(at, len(lines)) if lines[i].startswith("## ")), len(lines))
    section = "\n".join(lines[at:end]).strip("\n")
    rest = "\n".join(lines[end:])
    text = "\n".join([*lines[:at], "", *([section] if section else []), line, *(["", rest] if rest else [])])
    return text.rstrip("\n") + "\n"


def log_row(text: str, cells: Sequence[str]) -> str:
    """The log with a row at the end of its table; a new table stands below the title, above what a person wrote."""
    row = "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
    lines = text.rstrip("\n").split("\n") if text.strip() else ["# Results"]
    if COLUMNS not in lines:
        at = 1 if lines[0].startswith("# ") else 0
        rule = "|" + " --- |" * len(cells)
        lines[at:at] = [*([""] if at else []), COLUMNS, rule, *([""] if lines[at : at + 1] != [""] else [])]
    at = lines.index(COLUMNS)
    while at < len(lines) and lines[at].startswith("|"):
        at += 1
    return "\n".join([*lines[:at], row, *lines[at:]]) + "\n"


def log_cells(table: list[dict]) -> list[str]:
    """The figures of the log's table, baseline -> adapted; empty where one is not there."""
    rows = {row["figure"]: row for row in table}
    return [form.format(**rows[name]) if name in rows else "" for name, form in CELLS.items()]


def training(path: Path) -> dict[str, list[list[float]]]:
    """{"train": [[iteration, loss], ...], "valid": [...]} of a training log in JSONL; lines that say neither are skipped."""
    curves: dict[str, list[list[float]]] = {"train": [], "valid": []}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            for name, key_ in (("train", "train_loss"), ("valid", "val_loss")):
                if math.isfinite(loss := float(row.get(key_, math.nan))):
                    curves[name].append([float(row["iteration"]), loss])
        except (ValueError, TypeError, AttributeError, KeyError):
            continue
    return curves


def finite(value: object) -> object:
    """The same structure with None for every NaN and infinity, which are not JSON."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
