"""Read, check and write chat JSONL, one `{"messages": [...]}` a line, as mlx-lm's ChatDataset reads it.

Outputs are written beside their targets and moved into place together at the end, so that a run that fails, or is stopped,
leaves the earlier files as they were. Standard library only; tqdm draws the progress bar where it is installed.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from slang.dictionary import Problem, open_file, special_token

ROLES = (["user", "assistant"], ["system", "user", "assistant"])
BOM = b"\xef\xbb\xbf"
quote = json.encoder.encode_basestring  # a string as JSON, without a new encoder for each


def _object(pairs: list[tuple[str, object]]) -> dict:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} stands twice")
    return table


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def dumps(record: dict) -> str:
    """A record of make_jsonl.py as one line, as json.dumps(ensure_ascii=False) writes it and several times faster."""
    messages = ", ".join(f'{{"role": {quote(m["role"])}, "content": {quote(m["content"])}}}' for m in record["messages"])
    return f'{{"slang": {quote(record["slang"])}, "meaning": {quote(record["meaning"])}, "messages": [{messages}]}}'


def decode(line: str) -> object:
    """One line of JSON. Raises ValueError, for NaN and for a key that stands twice too.

    Only a line that `dumps` would not have written is read by the strict decoder, which is three times slower.
    """
    try:
        record = json.loads(line)
        if dumps(record) == line:
            return record
    except (AttributeError, KeyError, TypeError):
        pass
    return STRICT.decode(line)


def parse(line: str) -> dict | str:
    """One line as a chat record, or what is wrong with it and what to do."""
    try:
        record = decode(line)
    except (ValueError, RecursionError) as error:
        return f"not valid JSON ({error}); write the file again with make_jsonl.py"
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        return 'no "messages" list; a record is {"messages": [system, user, assistant]}'
    messages = record["messages"]
    if not all(isinstance(message, dict) for message in messages):
        return 'a message that is not an object; write {"role": …, "content": …}'
    roles = [message.get("role") for message in messages]
    if roles not in ROLES:
        return f"roles are {roles}; they have to be user, assistant, with or without a system message before them"
    for message in messages:
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            return f"the {message['role']} message has no text; write its content as a string"
        if token := special_token(content):
            return f"special token {token!r} in the {message['role']} message; take it out"
        if "\\u" in line and any("\ud800" <= c <= "\udfff" for c in content):
            return f"half a surrogate pair in the {message['role']} message; write the character itself"
    for name in ("slang", "meaning"):
        if not isinstance(record.get(name, ""), str):
            return f'"{name}" is not a string; write it as text or leave it out'
    return record


def records(path: str | Path) -> Iterator[tuple[int, int, bytes, dict] | Problem]:
    """(line number from 1, where it begins, the line without its end, the record) or a Problem, for each line not blank.

    Raises OSError when the file can't be opened.
    """
    with open_file(path) as file:
        end = 0
        for number, raw in enumerate(file, 1):
            start, end = end, end + len(raw)
            if number == 1 and raw.startswith(BOM):
                start, raw = len(BOM), raw[len(BOM) :]
            raw = raw.strip()
            if not raw:
                continue
            try:
                record = parse(raw.decode())
            except UnicodeDecodeError as error:
                record = f"not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8"
            yield Problem(str(path), number, record) if isinstance(record, str) else (number, start, raw, record)


def answer(record: dict) -> str:
    """What the model is taught to say."""
    return record["messages"][-1]["content"]


def slang(record: dict) -> str:
    """Which slang a record is about: its "slang", or the user's message where a record of other origin has none."""
    return record.get("slang") or record["messages"][-2]["content"]


@contextmanager
def replacing(*paths: str | Path) -> Iterator[list[BinaryIO]]:
    """Open one temporary file beside each path; when the block ends well, all take their places, else none does."""
    files: list[BinaryIO] = []
    temporary: dict[str, Path] = {}
    try:
        for target in map(Path, paths):
            if target.exists() and not target.is_file():
                files.append(open(target, "wb"))  # noqa: SIM115  a pipe, /dev/stdout: there is nothing to replace
                continue
            # Through a symbolic link the file that it names is replaced, not the link.
            real = Path(os.path.realpath(target))
            try:
                real.parent.mkdir(parents=True, exist_ok=True)
                file = tempfile.NamedTemporaryFile("wb", dir=real.parent, prefix=f".{real.name}.", delete=False)  # noqa: SIM115
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(target)) from None
            files.append(file)
            temporary[file.name] = real
            os.chmod(file.name, real.stat().st_mode & 0o777 if real.exists() else 0o666 & ~_umask())
        yield files
        for file in files:
            file.flush()
            if file.name in temporary:
                os.fsync(file.fileno())
            file.close()
        for name, real in temporary.items():
            os.replace(name, real)
    finally:
        for file in files:
            with suppress(OSError):
                file.close()
        for name in temporary:
            with suppress(FileNotFoundError):
                os.unlink(name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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


def progress(items: Iterable, unit: str, total: int | None = None) -> Iterable:
    """The items with a progress bar on a terminal, and without one anywhere else."""
    if not sys.stderr.isatty():
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, unit=unit, unit_scale=True, total=total, leave=False)
