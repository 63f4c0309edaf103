"""Read a dictionary of `slang::meaning` lines and tell what is wrong with it, line by line.

Reads UTF-8 (with or without BOM, LF or CRLF), one wording a line; several lines of one slang are several wordings or senses.
Blank lines are skipped, a `#` followed by a space starts a comment line; `# sentido: ...` begins a sense of the slang below it.

Standard library only, so that the data scripts start in a tenth of a second.

Run as: python -m slang.dictionary data/source_augmented.txt
    slangs              1039
    lines               4386
    wordings per slang  4-9, mean 4.2
    words per wording   3-24, mean 10.9
    problems            0
    hints               0
"""

import argparse
import codecs
import errno
import re
import stat
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO, NamedTuple

from slang.errors import UserError

SEPARATOR = "::"
SENSE = "# sentido:"
# What a chat tokenizer may read as a special token: <end_of_turn>, <start_of_image>, <|im_end|>, <unused7>, </s>, [INST].
LONGEST_LINE = 10_000  # bytes; a wording has about a hundred
SPECIAL_TOKEN = re.compile(
    r"<\s*/?\s*\|?\s*(?:(?:start|end)_of_(?:turn|image)|(?:image|audio)_soft_token|im_(?:start|end)|endoftext|eot_id|"
    r"(?:begin|end)_of_text|bos|eos|pad|unk|mask|unused\d+|s|0x[0-9a-f]{2})\s*\|?\s*>|\[/?(?:INST|multimodal)\]",
    re.IGNORECASE,
)
# Invisible characters that reorder or split what a reader sees; a soft hyphen and a BOM inside the text count.
INVISIBLE = re.compile("[\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]")
CLOSING = ".!?…"
CLOSING_WRAPPERS = "\"'”’»)]"


class Entry(NamedTuple):
    """One wording: `slang` and `meaning` NFC-normalised and trimmed, `line` counted from 1.

    `sense` is the line of the `# sentido:` comment that it stands under, 0 where there is none.
    """

    slang: str
    meaning: str
    line: int
    sense: int = 0


@dataclass(frozen=True, slots=True)
class Problem:
    """A line that can't be used as it stands; `str()` gives `FILE:LINE: what; what to do`."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


class _Fold(dict):
    """Code point -> the letter without its accent, worked out once for each; for str.translate."""

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        if letter != "ñ":
            letter = "".join(c for c in unicodedata.normalize("NFD", letter) if not unicodedata.combining(c))
        self[code] = letter
        return letter


_FOLD = _Fold()
CODEC = "latin-1"  # Spanish in a byte a character, which bytes.translate folds six times as fast as str.translate


def _any_fold(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold().translate(_FOLD)


def _any_words(text: str) -> str:
    return re.sub(r"\W", " ", _any_fold(text))


def _table(change: Callable[[str], str]) -> bytes:
    """What each byte of CODEC becomes, 0 where that is no single byte of it (ß is ss)."""
    table = bytearray(256)
    for byte in range(256):
        with suppress(ValueError):
            (table[byte],) = change(bytes([byte]).decode(CODEC)).encode(CODEC)
    return bytes(table)


def _quick(change: Callable[[str], str]) -> Callable[[str], str]:
    """The same function of a text, by a table of single characters where CODEC has them all."""
    table = _table(change)

    def changed(text: str) -> str:
        try:
            quick = text.encode(CODEC).translate(table)
        except UnicodeEncodeError:
            return change(text)
        return change(text) if b"\0" in quick else quick.decode(CODEC)

    return changed


_words = _quick(_any_words)
_folded = _quick(_any_fold)


def fold(text: str) -> str:
    """Lower case without accents, as people type in a hurry; ñ stays, it is a letter of its own (caña a coin, cana jail).

    >>> fold("¿Qué es GÜILA?"), fold("Caña")
    ('¿que es guila?', 'caña')
    """
    return _folded(text)


def key(text: str) -> str:
    """Normalised form by which two texts count as equal: folded, punctuation and spacing ignored.

    A text of punctuation alone is its own key, so that two such texts stay apart.

    >>> key("  ¡Qué  CHIVA! "), key("¿?")
    ('que chiva', '¿?')
    """
    return " ".join(_words(text).split()) or " ".join(text.split())


def close(meaning: str) -> str:
    """The meaning with a full stop, unless it ends a sentence already: `Bueno` -> `Bueno.`, `¡Ay!` stays."""
    if meaning[-1] in CLOSING or meaning.rstrip(CLOSING_WRAPPERS).endswith(tuple(CLOSING)):
        return meaning
    return meaning.rstrip(",;:") + "."


def unusable(text: str) -> str | None:
    """Why a text must not reach the training data, with the remedy, or None."""
    if token := special_token(text):
        return f"special token {token!r} in the text; take it out"
    if text.isprintable():  # then none of the below
        return None
    for character in text:
        if unicodedata.category(character) == "Cc":
            return f"control character U+{ord(character):04X}; take it out"
    if found := INVISIBLE.search(text):
        return f"invisible character U+{ord(found[0]):04X}; take it out"
    return None


def special_token(text: str) -> str | None:
    """The first thing in a text that a chat tokenizer may read as a special token, or None."""
    found = ("<" in text or "[" in text) and SPECIAL_TOKEN.search(text)
    return found[0] if found else None


def parse_line(line: str) -> tuple[str, str] | str | None:
    """(slang, meaning) of one decoded line, None for a blank or comment line, or what is wrong with it and what to do."""
    text = unicodedata.normalize("NFC", line).strip()
    if not text or text[:2] in ("#", "# "):
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
    return unusable(text) or (slang, close(meaning))


def open_file(path: str | Path) -> BinaryIO:
    """A file opened for reading bytes. Raises OSError for anything else too: a pipe would have to be read twice."""
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise OSError(errno.EISDIR, "Not a regular file", str(path))
    return open(path, "rb")


def told(error: OSError, path: str | Path = "") -> str:
    """What went wrong with a file, in one line with its name and, where there is one, the remedy."""
    remedy = {
        errno.ENOENT: "; check the name",
        errno.EACCES: "; change its permissions or name another",
        errno.EROFS: "; name a folder that can be written",
        errno.ENOSPC: "; make room and run this again",
        errno.EISDIR: "; name a file of lines",
        errno.EBUSY: "; wait for it or name another",
    }.get(error.errno, "")
    return f"{error.filename or path}: {error.strerror}{remedy}"


def entries(path: str | Path) -> Iterator[Entry | Problem]:
    """Every usable line as an Entry and every other as a Problem, in the file's order, one at a time.

    Raises OSError when the file can't be read. A blank or comment line yields nothing.
    """
    sense = 0
    with open_file(path) as file:
        start = file.peek(3)
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            yield Problem(str(path), 1, "UTF-16, not UTF-8; save the file as UTF-8")
            return
        if start.startswith(codecs.BOM_UTF8):
            file.seek(len(codecs.BOM_UTF8))
        for number, raw in enumerate(iter(partial(file.readline, LONGEST_LINE + 1), b""), 1):
            if len(raw) > LONGEST_LINE:
                yield Problem(str(path), number, f"over {LONGEST_LINE} bytes; write one wording a line")
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(LONGEST_LINE)
                continue
            try:
                parsed = parse_line(raw.decode())
            except UnicodeDecodeError as error:
                yield Problem(str(path), number, f"not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8")
                continue
            if isinstance(parsed, tuple):
                slang, meaning = parsed
                yield Entry(slang, meaning, number, sense)
            elif parsed:
                yield Problem(str(path), number, parsed)
            elif raw.startswith(SENSE.encode()):
                sense = number
            elif not raw.strip():
                sense = 0


SYNONYM = " = "  # between the headwords of one group


def synonyms(path: str | Path, slangs: Container[str] | None = None) -> list[frozenset[str]]:
    """The groups of headwords that mean the same, `bote = tabo` a line.

    `slangs` are the dictionary's headwords; without them any word may stand in a group.
    Raises UserError naming every bad line, OSError when the file can't be read.
    """
    groups: dict[frozenset[str], int] = {}
    wrong: list[str] = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            text = unicodedata.normalize("NFC", line).strip()
            if not text or text.startswith("#"):
                continue
            words = [word.strip() for word in text.split(SYNONYM)]
            group = frozenset(words)
            found = [
                f"{word!r} is no headword of the dictionary; spell it as it stands there"
                for word in words
                if slangs is not None and word not in slangs
            ]
            found += [f"{word!r} stands twice; take one out" for word, n in Counter(words).items() if n > 1]
            if len(words) < 2:
                found.append("one word; write at least two, with ' = ' between them")
            if group in groups:
                found.append(f"the group of line {groups[group]} again; take one out")
            groups.setdefault(group, number)
            wrong += [str(Problem(str(path), number, text)) for text in found]
    if wrong:
        raise UserError("\n".join(wrong))
    return list(groups)


# ------------------------------------------------------------------------------------------- is it fit to learn from?

LEAST_WORDINGS, LEAST_PER_SENSE = 4, 3
WORDS = range(3, 31)  # of one wording
NEAR = 0.7  # share of words in common above which two wordings teach the same thing twice
WINDOW = 50  # earlier wordings that a wording is compared with; to take all would be quadratic
SPANISH = {"el", "los", "las", "y"}  # 6 % of the words of the shipped dictionary, rare elsewhere
SPANISH_SHARE = 0.02
LINE = attrgetter("line")
# Pairs that differ by an accent and are both Spanish; any other rare unaccented form of a word in the file is suspicious.
HOMOGRAPHS = set(
    """
aun como cual cuando cuanto de donde el este esta ese eso aquel lastima mas mi papa papas porque que quien se si solo te tu
""".split()
)


@dataclass(frozen=True, slots=True)
class Hint(Problem):
    """A matter of style, which does training no harm; counted by its kind, `without a capital`."""

    kind: str


class Report(NamedTuple):
    """What a dictionary holds and what there is to say of it, in the order of its lines."""

    entries: list[Entry]
    problems: list[Problem]
    hints: list[Hint]


def words(text: str) -> list[str]:
    """The words of a text in lower case, accents kept."""
    return re.findall(r"[^\W\d_]+", text.casefold())


@lru_cache(maxsize=1 << 8)
def word_set(text: str) -> frozenset[str]:
    """The words of a text as `key` gives them."""
    return frozenset(key(text).split())


def overlap(a: str, b: str) -> float:
    """Jaccard index of the words of two texts: 1 for the same words in any order, 0 for none in common."""
    one, other = word_set(a), word_set(b)
    return len(one & other) / max(1, len(one | other))


def is_spanish(counts: Counter[str]) -> bool:
    """Whether the counted words look like a Spanish text."""
    return sum(counts[word] for word in SPANISH) >= SPANISH_SHARE * counts.total() > 0


Said = Iterator[tuple[int, str]]  # line, what is wrong with it and what to do
Hinted = Iterator[tuple[int, str, str]]  # line, kind, what could be better


def repetitions(good: list[Entry]) -> Said:
    """Meanings that an earlier line has, of this slang or of another."""
    owner: dict[str, Entry] = {}
    for entry in good:
        first = owner.setdefault(key(entry.meaning), entry)
        if first is not entry:
            whose = "this slang" if key(first.slang) == key(entry.slang) else repr(first.slang)
            yield entry.line, f"the meaning of line {first.line}, of {whose}, again; write another"


def lonely(by_slang: dict[str, list[Entry]], least: int) -> Said:
    """Slangs with one wording, which a model learns by heart."""
    for first, *more in by_slang.values():
        if not more and least > 1:
            yield first.line, f"{first.slang!r} has one wording; write at least {least}"


def few(by_slang: dict[str, list[Entry]], least: int) -> Hinted:
    """Slangs and senses with fewer wordings than they should have."""
    for of_slang in by_slang.values():
        first, n = of_slang[0], len(of_slang)
        if 1 < n < least:
            text = f"{first.slang!r} has {n} wordings; write at least {least}"
            yield first.line, "with few wordings", text
        senses = Counter(entry.sense for entry in of_slang)
        for sense, n in senses.items():
            if len(senses) > 1 and n < LEAST_PER_SENSE:
                what = f"a sense of {first.slang!r} has {n} wording(s)"
                text = f"{what}; write at least {LEAST_PER_SENSE}"
                yield sense or first.line, "with few wordings", text


def scattered(good: list[Entry]) -> Hinted:
    """Lines of one slang that stand apart or spell it differently."""
    above: dict[str, Entry] = {}
    spelled: dict[str, str] = {}
    previous = ""
    for entry in good:
        slang = key(entry.slang)
        if slang in above and slang != previous:
            where = f"lines of {entry.slang!r} stand apart (line {above[slang].line})"
            yield entry.line, "apart from their slang", f"{where}; put them together"
        if spelled.setdefault(slang, entry.slang) != entry.slang:
            text = f"{entry.slang!r} is spelled {spelled[slang]!r} above; spell it alike"
            yield entry.line, "with another spelling of the slang", text
        above[slang], previous = entry, slang


def alike(by_slang: dict[str, list[Entry]]) -> Hinted:
    """Wordings with nearly the words of an earlier one of their slang."""
    for of_slang in by_slang.values():
        for i, entry in enumerate(of_slang):
            for other in of_slang[max(0, i - WINDOW) : i]:
                same = key(entry.meaning) == key(other.meaning)
                if not same and overlap(entry.meaning, other.meaning) > NEAR:
                    text = f"nearly the words of line {other.line}; write it in another way"
                    yield entry.line, "nearly alike", text
                    break


def style(entry: Entry, spanish: bool) -> Hinted:
    """What could be better in a wording by itself."""
    line, text = entry.line, entry.meaning
    if f" {key(entry.slang)} " in f" {key(text)} ":
        yield (
            line,
            "with the slang in its own meaning",
            (f"{entry.slang!r} stands inside its own meaning; explain it in other words"),
        )
    if (n_words := len(key(text).split())) not in WORDS:
        yield line, "short or long", f"{n_words} words; write {WORDS.start} to {WORDS.stop - 1}"
    first = next((c for c in text if c.isalpha()), "")
    if first != first.upper():
        yield line, "without a capital", f"begins with {first!r}; write a capital"
    for left, right in ("()", "«»", "“”", *(("¿?", "¡!") if spanish else ())):
        if text.count(left) != text.count(right):
            yield line, "with unpaired marks", f"{left} and {right} do not pair; write both"
    if found := re.search(r"\s[,.;:)]|\s{2}|[,;:](?=[^\W\d])|\.\.(?!\.)(?<!\.\.\.)", text):
        yield line, "with odd punctuation", f"spacing or punctuation at {found[0]!r}; mend it"
    if found := re.search(r"\b(\w{2,}) \1\b", text.casefold()):
        yield line, "with a word twice", f"{found[1]!r} stands twice in a row; take one out"


def suspicious(counts: Counter[str]) -> dict[str, str]:
    """Rare words that are an unaccented, or doubled-letter, form of a more frequent word of the file: word -> that word."""
    accented: dict[str, str] = {}
    for word in counts:
        if fold(word) != word and counts[word] > counts[accented.get(fold(word))]:
            accented[fold(word)] = word
    found = {w: a for w, a in accented.items() if w not in HOMOGRAPHS and 0 < counts[w] <= 2 and counts[a] >= 5 * counts[w]}
    for word in counts:
        single = re.sub(r"([^lrcneo])\1|(.)\2\2", r"\1\2", word)
        if single != word and counts[single] > counts[word]:
            found[word] = single
    return found


def misspelled(good: list[Entry], counts: Counter[str]) -> Hinted:
    """Wordings with a suspicious word."""
    rare = suspicious(counts)
    for entry in good:
        for word in sorted(set(words(entry.meaning)) & set(rare)):
            often = f"{rare[word]!r} ({counts[rare[word]]} times in the file)"
            text = f"{word!r}: is it {often}? Check the spelling"
            yield entry.line, "with a suspicious spelling", text


def check(path: str | Path, least: int = LEAST_WORDINGS) -> Report:
    """All entries of a dictionary, what makes it worse to learn from, and what is only style.

    Raises OSError when the file can't be read.
    """
    good: list[Entry] = []
    found: list[Problem] = []
    for item in entries(path):
        (good if isinstance(item, Entry) else found).append(item)
    by_slang: dict[str, list[Entry]] = defaultdict(list)
    for entry in good:
        by_slang[key(entry.slang)].append(entry)
    found += [Problem(str(path), *said) for said in (*repetitions(good), *lonely(by_slang, least))]

    counts = Counter(word for entry in good for word in words(entry.meaning))
    spanish = is_spanish(counts)
    hinted = [*few(by_slang, least), *scattered(good), *alike(by_slang)]
    hinted += [hint for entry in good for hint in style(entry, spanish)]
    hinted += misspelled(good, counts) if spanish else []
    hints = [Hint(str(path), line, text, kind) for line, kind, text in hinted]
    return Report(good, sorted(found, key=LINE), sorted(hints, key=LINE))


def spread(numbers: Iterable[int]) -> str:
    """`4-9, mean 4.2` of some numbers."""
    numbers = list(numbers)
    return f"{min(numbers)}-{max(numbers)}, mean {sum(numbers) / len(numbers):.1f}" if numbers else "none"


def counted(hints: list[Hint]) -> str:
    """`2: 1 without a capital (first: line 3), 1 short or long (first: line 7)`, or `0`."""
    first = {hint.kind: hint.line for hint in reversed(hints)}
    kinds = Counter(hint.kind for hint in hints).most_common()
    listed = ", ".join(f"{n} {kind} (first: line {first[kind]})" for kind, n in kinds)
    return f"{len(hints)}: {listed}" if hints else "0"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m slang.dictionary",
        description="Count what a dictionary holds, list its problems, count hints on style.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("dictionary", help="a file of slang::meaning lines")
    p.add_argument("--least", type=int, default=LEAST_WORDINGS, help="wordings of each slang")
    p.add_argument("--strict", action="store_true", help="list the hints too; exit with 1 on any")
    args = p.parse_args(argv)
    try:
        good, found, hints = check(args.dictionary, args.least)
    except OSError as error:
        print(told(error), file=sys.stderr)
        return 1
    listed = sorted([*found, *hints], key=LINE) if args.strict else found
    for said in listed:
        print(said, file=sys.stderr)
    per_slang = Counter(key(entry.slang) for entry in good)
    print(f"slangs              {len(per_slang)}")
    print(f"lines               {len(good)}")
    print(f"wordings per slang  {spread(per_slang.values())}")
    print(f"words per wording   {spread(len(key(entry.meaning).split()) for entry in good)}")
    print(f"problems            {len(found)}")
    print(f"hints               {counted(hints)}")
    return 1 if listed or not good else 0


if __name__ == "__main__":
    sys.exit(main())
