"""Chat JSONL, one `{"messages": [...]}` a line, as mlx-lm's ChatDataset reads it."""

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Required, TypedDict

import msgspec

from slang import files
from slang.errors import Problem, UserError, first_line, listed, parted
from slang.text import says_something, unusable

ROLES = (["user", "assistant"], ["system", "user", "assistant"])
NO_RECORD = "no record in it; run make_jsonl.py and split_jsonl.py first"
SHAPE = 'a record is {"messages": [system, user, assistant]}'


class Message(TypedDict):
    role: str
    content: str


class Record(TypedDict, total=False):
    """One chat. mlx-lm ignores `slang` and `meaning`; it would use the last three."""

    messages: Required[list[Message]]
    slang: str
    meaning: str
    tools: Any
    prompt: Any
    completion: Any


class Row(NamedTuple):
    """A record and where it stands: `line` counts from 1, `text` is the line without its end."""

    path: str
    line: int
    text: bytes
    record: Record


DECODER = msgspec.json.Decoder(Record)


def dumps(record: Record) -> bytes:
    """A record as one line of UTF-8, with its end."""
    return msgspec.json.encode(record) + b"\n"


def parse(line: bytes) -> Record | str:
    """One line as a record, or what is wrong with it and what to do."""
    if b"\r" in line:
        return "a carriage return inside, at which mlx_lm would begin another line; take it out"
    try:
        line.decode()
        record = DECODER.decode(line)
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8"
    except msgspec.ValidationError as error:
        return f"not a chat record ({error}); {SHAPE}"
    except (ValueError, RecursionError) as error:
        return f"not valid JSON ({first_line(error)}); mend it, or write the file again"
    return wrong(record) or record


def wrong(record: Record) -> str | None:
    """Why a record must not be trained on or asked, with the remedy, or None."""
    if "tools" in record or {"prompt", "completion"} <= record.keys():
        what = '"tools", or "prompt" and "completion", beside "messages"'
        return f"{what}, which mlx_lm would use as well; take them out"
    roles = [message["role"] for message in record["messages"]]
    if roles not in ROLES:
        needed = "user, assistant, with or without a system message before them"
        return f"roles are {roles}; they have to be {needed}"
    for message in record["messages"]:
        role, content = message["role"], message["content"]
        if why := unusable(content, breaks=True):
            return f"the {role} message: {why}"
        if not content.strip() or (role == "assistant" and not says_something(content)):
            return f"the {role} message has no text; write its content as a string"
    for name, text in (("slang", record.get("slang", "")), ("meaning", record.get("meaning", ""))):
        if why := unusable(text):
            return f'"{name}": {why}'
    return None


def records(path: str | Path, strict: bool = False) -> Iterator[Row | Problem]:
    """Every record of a file, and every line that can't be used as a Problem.

    A byte order mark and blank lines are passed over, unless `strict`: mlx_lm stops at them.
    Raises UserError for what is no file, OSError when it can't be read.
    """
    data = files.read(path)
    if files.is_utf16(data):
        yield Problem(str(path), 1, "UTF-16, not UTF-8; save the file as UTF-8")
        return
    if data.startswith(codecs.BOM_UTF8):
        data = data.removeprefix(codecs.BOM_UTF8)
        if strict:
            what = "a byte order mark, at which mlx_lm stops; save the file as UTF-8 without it"
            yield Problem(str(path), 1, what)
    lines = data.split(b"\n")
    if not lines[-1]:
        del lines[-1]
    for number, line in enumerate(lines, 1):
        text = line.strip(b" \t\r")  # what JSON takes for blanks
        if not text:
            if strict:
                yield Problem(str(path), number, "blank, where mlx_lm stops; take the line out")
            continue
        record = parse(text)
        if isinstance(record, str):
            yield Problem(str(path), number, record)
        else:
            yield Row(str(path), number, text, record)


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a file. Raises UserError naming the lines that can't be used, or for none."""
    rows, problems = parted(records(path))
    if problems:
        raise UserError(listed(problems))
    if not rows:
        raise UserError(f"{path}: {NO_RECORD}")
    return rows


def read(path: str | Path) -> list[Record]:
    """All records of a file. Raises UserError as `read_rows` does."""
    return [row.record for row in read_rows(path)]


def check(paths: Iterable[str | Path]) -> list[list[Row]]:
    """The rows of each file. Raises UserError naming file and line of what mlx_lm can't read."""
    found = []
    problems: list[object] = []
    for path in paths:
        rows, wrong_lines = parted(records(path, strict=True))
        problems += wrong_lines
        if not rows and not wrong_lines:
            problems.append(f"{path}: {NO_RECORD}")
        found.append(rows)
    if problems:
        raise UserError(listed(problems))
    return found


def answer(record: Record) -> str:
    """What the model is taught to say."""
    return record["messages"][-1]["content"]


def slang(record: Record) -> str:
    """Which slang a record is about: the user's message where it does not say."""
    return record.get("slang") or record["messages"][-2]["content"]
