"""Read, check and write chat JSONL, one `{"messages": [...]}` a line, as mlx-lm's ChatDataset reads it.

Outputs are written beside their targets and moved into place together at the end, so that a run that fails, or is stopped,
leaves the earlier files as they were. orjson, because json.dumps and json.loads take most of the time of a long file.
"""

import codecs
import errno
import fcntl
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import orjson

from slang.dictionary import Problem, open_file, special_token

ROLES = (["user", "assistant"], ["system", "user", "assistant"])


def _object(pairs: list[tuple[str, object]]) -> dict:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} stands twice")
    return table


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def dumps(record: dict) -> bytes:
    """A record as one line of UTF-8, with its end."""
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)


def decode(line: bytes) -> object:
    """One line of JSON without its end. Raises ValueError, for NaN and for a key that stands twice too.

    Only a line that `dumps` would not have written is read by the strict decoder, which is several times slower.
    """
    try:
        record = orjson.loads(line)
        if orjson.dumps(record) == line:
            return record
    except (ValueError, TypeError):  # TypeError: a number of more than 64 bits
        pass
    if b"\r" in line:
        raise ValueError("a carriage return inside, at which mlx_lm would begin another line")
    record = STRICT.decode(line.decode())
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair, \\u{ord(error.object[error.start]):04x}") from None
    return record


def parse(line: bytes) -> dict | str:
    """One line as a chat record, or what is wrong with it and what to do."""
    try:
        record = decode(line)
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8"
    except (ValueError, RecursionError) as error:
        return f"not valid JSON ({error}); write the file again with make_jsonl.py"
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        return 'no "messages" list; a record is {"messages": [system, user, assistant]}'
    if "tools" in record or ("prompt" in record and "completion" in record):
        return '"tools", or "prompt" and "completion", beside "messages", which mlx_lm would use as well; take them out'
    messages = record["messages"]
    try:
        roles = [message.get("role") for message in messages]
    except AttributeError:
        return 'a message that is not an object; write {"role": …, "content": …}'
    if roles not in ROLES:
        return f"roles are {roles}; they have to be user, assistant, with or without a system message before them"
    contents = [message.get("content") for message in messages]
    for content in contents:
        if not isinstance(content, str) or not content.strip():
            return f"the {roles[contents.index(content)]} message has no text; write its content as a string"
    if special_token("\0".join(contents)):  # \0, for a token does not go from one message into the next
        role, token = next((r, t) for r, c in zip(roles, contents, strict=True) if (t := special_token(c)))
        return f"special token {token!r} in the {role} message; take it out"
    for name in ("slang", "meaning"):
        if not isinstance(record.get(name, ""), str):
            return f'"{name}" is not a string; write it as text or leave it out'
    return record


def records(path: str | Path) -> Iterator[tuple[int, int, bytes, dict] | Problem]:
    """(line number from 1, where its text begins, its text, the record) or a Problem, for each line not blank.

    Raises OSError when the file can't be opened.
    """
    finish(Path(path).parent)
    with open_file(path) as file:
        if file.peek(3).startswith(codecs.BOM_UTF8):
            file.seek(len(codecs.BOM_UTF8))
        end = file.tell()
        for number, line in enumerate(file, 1):
            start, end = end, end + len(line)
            if not (text := line.strip()):
                continue
            record = parse(text)
            if isinstance(record, str):
                yield Problem(str(path), number, record)
            else:
                yield number, start + len(line) - len(line.lstrip()), text, record


def answer(record: dict) -> str:
    """What the model is taught to say."""
    return record["messages"][-1]["content"]


def slang(record: dict) -> str:
    """Which slang a record is about: its "slang", or the user's message where a record of other origin has none."""
    return record.get("slang") or record["messages"][-2]["content"]


@contextmanager
def replacing(*paths: str | Path) -> Iterator[list[BinaryIO]]:
    """Open a `.NAME.part` beside each path; when the block ends well, all take their places, else none does.

    Whatever ends the process, the paths hold the old files or the new ones, never some of each: several are listed in a
    journal first, by which whoever comes next finishes what was begun. Raises OSError when another process writes one of them.
    """
    files: list[BinaryIO] = []
    parts: dict[Path, Path] = {}
    journal: Path | None = None
    try:
        for target in map(Path, paths):
            if target.exists() and not target.is_file():
                files.append(open(target, "wb"))  # noqa: SIM115  a pipe, /dev/stdout: there is nothing to replace
                continue
            # Through a symbolic link the file that it names is replaced, not the link.
            real = Path(os.path.realpath(target))
            try:
                real.parent.mkdir(parents=True, exist_ok=True)
                finish(real.parent)
                files.append(_locked(real.with_name(f".{real.name}.part")))
                parts[Path(files[-1].name)] = real
                if real.exists():
                    os.chmod(files[-1].name, real.stat().st_mode & 0o777)
            except BlockingIOError:
                raise OSError(errno.EBUSY, "another run is writing it", str(target)) from None
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(target)) from None
        yield files
        for file in files:
            file.flush()
            if Path(file.name) in parts:
                os.fsync(file.fileno())
        if len(parts) == 1:
            os.replace(*next(iter(parts.items())))
        elif parts:
            first = next(iter(parts.values()))
            journal = first.with_name(f".{first.name}.commit")
            files.append(_locked(journal.with_name(journal.name + ".part")))
            pairs = [[os.path.relpath(path, first.parent) for path in pair] for pair in parts.items()]
            files[-1].write(json.dumps(pairs).encode())
            files[-1].flush()
            os.replace(files[-1].name, journal)  # from here on the new files count
            _move(journal)
    finally:
        if journal and journal.exists():
            _move(journal)
        for part in [*parts, journal.with_name(journal.name + ".part")] if journal else parts:
            part.unlink(missing_ok=True)
        for file in files:  # what gives the locks back
            with suppress(OSError):
                file.close()


def _locked(path: Path) -> BinaryIO:
    """An empty file that this process alone writes. Raises BlockingIOError when another does."""
    while True:
        file = open(path, "wb", 1 << 20, opener=lambda name, flags: os.open(name, flags & ~os.O_TRUNC, 0o666))  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate()  # what a killed run left
            return file
        file.close()  # another run has just moved it into place


def _move(journal: Path) -> None:
    for part, target in json.loads(journal.read_text(encoding="utf-8")):
        with suppress(FileNotFoundError):
            os.replace(journal.parent / part, journal.parent / target)
    journal.unlink(missing_ok=True)


def finish(folder: Path) -> None:
    """Do what a killed run had begun: move the files of its journal to where they belong."""
    for journal in folder.glob(".*.commit"):
        # Another has done it, or the run is alive and does it itself.
        with suppress(FileNotFoundError, BlockingIOError), open(journal, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _move(journal)


def overwritten(source: str | Path, targets: Iterable[str | Path]) -> str | None:
    """The first target that is the source, or another target, under whatever name; None when all are apart."""
    seen = [Path(source)]
    for target in map(Path, targets):
        for other in seen:
            same = os.path.realpath(target) == os.path.realpath(other)
            if same or (target.exists() and other.exists() and os.path.samefile(target, other)):
                return str(target)
        seen.append(target)
    return None


def progress(items: Iterable, unit: str) -> Iterable:
    """The items with a progress bar on a terminal, and without one anywhere else."""
    if not sys.stderr.isatty():
        return items
    from tqdm import tqdm  # a fifth of the time that a script takes to start

    return tqdm(items, unit=unit, unit_scale=True, leave=False)
