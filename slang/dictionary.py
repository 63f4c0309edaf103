"""A dictionary of `slang::meaning` lines, and the list of headwords that mean the same.

UTF-8, one wording a line; several lines of one slang are several wordings or senses of it.
Blank lines are skipped. `# ` begins a comment, `# sentido: ...` a sense of the slang below it.

Run as: python -m slang.dictionary data/source_augmented.txt     is it fit to learn from? (lint.py)
"""

if __name__ == "__main__":
    from slang.errors import program

    program("slang.lint")

import codecs
import re
import unicodedata
from collections import Counter
from collections.abc import Container, Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

from slang import files
from slang.errors import Problem, UserError, listed
from slang.text import says_something, unusable

SEPARATOR = "::"
SENSE = "# sentido:"
SYNONYM = " = "  # between the headwords of one group
LONGEST_LINE = 10_000  # bytes; a wording has about a hundred
CLOSING = (".", "!", "?", "…")
CLOSING_WRAPPERS = "\"'”’»)]"
LOOSE_ACCENT = re.compile("(?<=[a-zñ])[\u0300-\u036f]+")  # of a letter that has no form with it
SAVE = "save the file as UTF-8"


class Entry(NamedTuple):
    """One wording: `slang` and `meaning` NFC-normalised and trimmed, `line` counted from 1.

    `sense` is the line of the `# sentido:` comment that it stands under, 0 where there is none.
    """

    slang: str
    meaning: str
    line: int
    sense: int = 0


@cache
def _without_accent(letter: str) -> str:
    if letter == "ñ" or not unicodedata.name(letter, "").startswith("LATIN"):
        return letter
    return unicodedata.normalize("NFD", letter)[0]


def fold(text: str) -> str:
    """Lower case without accents, as people type in a hurry.

    ñ stays, for it is a letter of its own: caña is a coin, cana is jail. Other alphabets than the
    Latin one keep their marks.

    >>> fold("¿Qué es GÜILA?"), fold("Caña")
    ('¿que es guila?', 'caña')
    """
    letters = map(_without_accent, unicodedata.normalize("NFC", text).casefold())
    return LOOSE_ACCENT.sub("", "".join(letters))


@lru_cache(maxsize=1000)  # lines of a slang stand together
def normalized(text: str) -> str:
    """The form in which two texts count as equal: folded, without punctuation and spacing.

    A text of punctuation alone stays as it is, so that two such texts stay apart.

    >>> normalized("  ¡Qué  CHIVA! "), normalized("¿?")
    ('que chiva', '¿?')
    """
    return " ".join(re.sub(r"\W", " ", fold(text)).split()) or " ".join(text.split())


def with_full_stop(meaning: str) -> str:
    """`Bueno` becomes `Bueno.`; what ends a sentence already, such as `¡Ay!`, stays."""
    if meaning.rstrip(CLOSING_WRAPPERS).endswith(CLOSING) or meaning.endswith(CLOSING):
        return meaning
    return meaning.rstrip(",;:") + "."


def parse_line(line: str) -> tuple[str, str] | str | None:
    """(slang, meaning) of a line, None for a blank or a comment, or what is wrong with it."""
    text = unicodedata.normalize("NFC", line).strip()
    if not text or text == "#" or text.startswith("# "):
        return None
    slang, separator, meaning = text.partition(SEPARATOR)
    slang, meaning = slang.strip(), meaning.strip()
    if not separator:
        return "no '::' separator; write the line as slang::meaning"
    if meaning.startswith(":"):
        return "':::' in place of '::'; write the line as slang::meaning"
    if not slang:
        return "nothing before '::'; write the slang there"
    if not meaning:
        return "nothing after '::'; write the meaning there"
    if why := unusable(text):
        return why
    if not says_something(meaning):
        return f"no word in the meaning {meaning!r}; write one"
    return slang, with_full_stop(meaning)


def entries(path: str | Path) -> Iterator[Entry | Problem]:
    """Every usable line as an Entry and every other as a Problem, in the file's order.

    Lines end in LF, CRLF or CR.
    Raises UserError for what is no file, OSError when it can't be read.
    """
    data = files.read(path).removeprefix(codecs.BOM_UTF8)
    if files.is_utf16(data):
        yield Problem(str(path), 1, f"UTF-16, not UTF-8; {SAVE}")
        return
    sense = 0
    for number, line in enumerate(data.splitlines(), 1):
        if len(line) > LONGEST_LINE:
            what = f"over {LONGEST_LINE} bytes; write one wording a line"
            yield Problem(str(path), number, what)
            continue
        try:
            parsed = parse_line(line.decode())
        except UnicodeDecodeError as error:
            what = f"not UTF-8 (byte {error.start + 1} of the line); {SAVE}"
            yield Problem(str(path), number, what)
            continue
        if isinstance(parsed, tuple):
            yield Entry(*parsed, number, sense)
        elif parsed:
            yield Problem(str(path), number, parsed)
        elif line.startswith(SENSE.encode()):
            sense = number
        elif not line.strip():
            sense = 0


def synonyms(path: str | Path, slangs: Container[str] | None = None) -> list[frozenset[str]]:
    """The groups of headwords that mean the same, `bote = tabo` a line.

    `slangs` are the dictionary's headwords; without them any word may stand in a group.
    Raises UserError naming the bad lines, OSError when the file can't be read.
    """
    groups: dict[frozenset[str], int] = {}  # with the line that each stands in
    problems: list[Problem] = []
    for number, line in enumerate(files.read(path).removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        try:
            text = unicodedata.normalize("NFC", line.decode()).strip()
        except UnicodeDecodeError:
            problems.append(Problem(str(path), number, f"not UTF-8; {SAVE}"))
            continue
        if not text or text.startswith("#"):
            continue
        words = [word.strip() for word in text.split(SYNONYM)]
        found = list(_wrong_words(words, slangs))
        if len(words) < 2:
            found.append("one word; write at least two, with ' = ' between them")
        group = frozenset(words)
        if group in groups:
            found.append(f"the group of line {groups[group]} again; take one out")
        groups.setdefault(group, number)
        problems += [Problem(str(path), number, what) for what in found]
    if problems:
        raise UserError(listed(problems))
    return list(groups)


def _wrong_words(words: list[str], slangs: Container[str] | None) -> Iterator[str]:
    for word in words:
        if slangs is not None and word not in slangs:
            yield f"{word!r} is no headword of the dictionary; spell it as it stands there"
    for word, times in Counter(words).items():
        if times > 1:
            yield f"{word!r} stands twice; take one out"
