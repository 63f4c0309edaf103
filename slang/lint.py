"""Is a dictionary fit to learn from? Problems make it worse to learn from, hints are on style.

Standard library only, so that it starts in a tenth of a second.

Run as: python -m slang.dictionary data/source_augmented.txt
    slangs              1039
    lines               4386
    wordings per slang  4-9, mean 4.2
    words per wording   3-24, mean 10.9
    problems            0
    hints               0
"""

import argparse
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from slang.dictionary import Entry, entries, fold, normalized
from slang.errors import Problem, listed, parted

FEWEST_WORDINGS = 4
FEWEST_PER_SENSE = 3
WORDS = range(3, 31)  # of one wording
NEAR = 0.7  # share of words in common above which two wordings teach the same thing twice
WINDOW = 50  # earlier wordings that a wording is compared with; all would be quadratic
SPANISH = {"el", "los", "las", "y"}  # 6 % of the words of the shipped dictionary, rare elsewhere
SPANISH_SHARE = 0.02
# Pairs that differ by an accent alone and are both Spanish. Another rare word that is a frequent
# one without its accent is suspicious.
HOMOGRAPHS = set(
    """aun como cual cuando cuanto de donde el este esta ese eso aquel lastima mas mi papa papas
    porque que quien se si solo te tu""".split()
)
LINE = attrgetter("line")

Found = Iterator[tuple[int, str]]  # line; what is wrong with it and what to do
Hinted = Iterator[tuple[int, str, str]]  # line; kind; what could be better


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


def overlap(one: Collection[str], other: Collection[str]) -> float:
    """Jaccard index of two sets of words: 1 for the same words, 0 for none in common."""
    one, other = set(one), set(other)
    return len(one & other) / max(1, len(one | other))


def is_spanish(counts: Counter[str]) -> bool:
    """Whether the counted words look like a Spanish text."""
    return sum(counts[word] for word in SPANISH) >= SPANISH_SHARE * counts.total() > 0


# -------------------------------------------------------------------------------- problems


def repeated(good: list[Entry]) -> Found:
    """Meanings that an earlier line has, of this slang or of another."""
    first_with: dict[str, Entry] = {}
    for entry in good:
        first = first_with.setdefault(normalized(entry.meaning), entry)
        if first is not entry:
            same = normalized(first.slang) == normalized(entry.slang)
            whose = "this slang" if same else repr(first.slang)
            yield entry.line, f"the meaning of line {first.line}, of {whose}, again; write another"


def with_one_wording(by_slang: dict[str, list[Entry]], fewest: int) -> Found:
    """Slangs with one wording, which a model learns by heart."""
    for first, *more in by_slang.values():
        if not more and fewest > 1:
            yield first.line, f"{first.slang!r} has one wording; write at least {fewest}"


# ----------------------------------------------------------------------------------- hints


def with_few_wordings(by_slang: dict[str, list[Entry]], fewest: int) -> Hinted:
    """Slangs and senses with fewer wordings than they should have."""
    kind = "with few wordings"
    for of_slang in by_slang.values():
        first, n = of_slang[0], len(of_slang)
        if 1 < n < fewest:
            yield first.line, kind, f"{first.slang!r} has {n} wordings; write at least {fewest}"
        senses = Counter(entry.sense for entry in of_slang)
        for sense, n in senses.items():
            if len(senses) > 1 and n < FEWEST_PER_SENSE:
                what = f"a sense of {first.slang!r} has {n} wording(s)"
                yield sense or first.line, kind, f"{what}; write at least {FEWEST_PER_SENSE}"


def scattered(good: list[Entry]) -> Hinted:
    """Lines of one slang that stand apart or spell it differently."""
    above: dict[str, Entry] = {}
    spelled: dict[str, str] = {}
    previous = ""
    for entry in good:
        slang = normalized(entry.slang)
        if slang in above and slang != previous:
            where = f"lines of {entry.slang!r} stand apart (line {above[slang].line})"
            yield entry.line, "apart from their slang", f"{where}; put them together"
        if spelled.setdefault(slang, entry.slang) != entry.slang:
            text = f"{entry.slang!r} is spelled {spelled[slang]!r} above; spell it alike"
            yield entry.line, "with another spelling of the slang", text
        above[slang] = entry
        previous = slang


def nearly_alike(by_slang: dict[str, list[Entry]]) -> Hinted:
    """Wordings with nearly the words of an earlier one of their slang."""
    for of_slang in by_slang.values():
        meanings = [normalized(entry.meaning).split() for entry in of_slang]
        for i, entry in enumerate(of_slang):
            for j in range(max(0, i - WINDOW), i):
                if meanings[i] != meanings[j] and overlap(meanings[i], meanings[j]) > NEAR:
                    text = f"nearly the words of line {of_slang[j].line}; write it in another way"
                    yield entry.line, "nearly alike", text
                    break


def style(entry: Entry, spanish: bool) -> Hinted:
    """What could be better in a wording by itself."""
    line, text = entry.line, entry.meaning
    plain = normalized(text)
    if f" {normalized(entry.slang)} " in f" {plain} ":
        what = f"{entry.slang!r} stands inside its own meaning; explain it in other words"
        yield line, "with the slang in its own meaning", what
    if (n_words := len(plain.split())) not in WORDS:
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
    """Rare words that look like a mistake for a more frequent one: word -> that one.

    The mistake is a missing accent or a doubled letter.
    """
    accented: dict[str, str] = {}  # the most frequent word of each spelling without accents
    for word in counts:
        bare = fold(word)
        if bare != word and counts[word] > counts[accented.get(bare, "")]:
            accented[bare] = word
    found = {}
    for bare, word in accented.items():
        if bare not in HOMOGRAPHS and 0 < counts[bare] <= 2 and counts[word] >= 5 * counts[bare]:
            found[bare] = word
    for word in counts:
        single = re.sub(r"([^lrcneo])\1|(.)\2\2", r"\1\2", word)
        if single != word and counts[single] > counts[word]:
            found[word] = single
    return found


def misspelled(good: list[Entry], counts: Counter[str]) -> Hinted:
    """Wordings with a suspicious word."""
    likely = suspicious(counts)
    for entry in good:
        for word in sorted(set(words(entry.meaning)) & likely.keys()):
            often = f"{likely[word]!r} ({counts[likely[word]]} times in the file)"
            text = f"{word!r}: is it {often}? Check the spelling"
            yield entry.line, "with a suspicious spelling", text


# ---------------------------------------------------------------------------------- report


def check(path: str | Path, fewest: int = FEWEST_WORDINGS) -> Report:
    """All entries of a dictionary, what makes it worse to learn from, and what is only style.

    Raises UserError for what is no file, OSError when it can't be read.
    """
    good, problems = parted(entries(path))
    by_slang: dict[str, list[Entry]] = defaultdict(list)
    for entry in good:
        by_slang[normalized(entry.slang)].append(entry)
    for line, text in (*repeated(good), *with_one_wording(by_slang, fewest)):
        problems.append(Problem(str(path), line, text))

    counts = Counter(word for entry in good for word in words(entry.meaning))
    spanish = is_spanish(counts)
    hinted = [*with_few_wordings(by_slang, fewest), *scattered(good), *nearly_alike(by_slang)]
    for entry in good:
        hinted += style(entry, spanish)
    if spanish:
        hinted += misspelled(good, counts)
    hints = [Hint(str(path), line, text, kind) for line, kind, text in hinted]
    return Report(good, sorted(problems, key=LINE), sorted(hints, key=LINE))


def spread(numbers: Collection[int]) -> str:
    """`4-9, mean 4.2` of some numbers."""
    if not numbers:
        return "none"
    return f"{min(numbers)}-{max(numbers)}, mean {sum(numbers) / len(numbers):.1f}"


def counted(hints: list[Hint]) -> str:
    """`2: 1 without a capital (first: line 3), 1 short or long (first: line 7)`, or `0`."""
    if not hints:
        return "0"
    first = {hint.kind: hint.line for hint in reversed(hints)}
    kinds = Counter(hint.kind for hint in hints).most_common()
    return f"{len(hints)}: " + ", ".join(
        f"{n} {kind} (first: line {first[kind]})" for kind, n in kinds
    )


def main(argv: list[str] | None = None) -> int:
    """1 when there is a problem, no entry at all, or with --strict a hint."""
    p = argparse.ArgumentParser(
        prog="python -m slang.dictionary",
        description="Count what a dictionary holds, list its problems, count hints on style.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("dictionary", help="a file of slang::meaning lines")
    p.add_argument("--least", type=int, default=FEWEST_WORDINGS, help="wordings of each slang")
    p.add_argument("--strict", action="store_true", help="list the hints too; exit with 1 on any")
    args = p.parse_args(argv)
    good, problems, hints = check(args.dictionary, args.least)
    if args.strict:
        problems_and_hints = sorted([*problems, *hints], key=LINE)
        for found in problems_and_hints:
            print(found, file=sys.stderr)
    elif problems:
        print(listed(problems), file=sys.stderr)
    per_slang = Counter(normalized(entry.slang) for entry in good)
    n_words = [len(normalized(entry.meaning).split()) for entry in good]
    print(f"slangs              {len(per_slang)}")
    print(f"lines               {len(good)}")
    print(f"wordings per slang  {spread(per_slang.values())}")
    print(f"words per wording   {spread(n_words)}")
    print(f"problems            {len(problems)}")
    print(f"hints               {counted(hints)}")
    return 1 if problems or not good or (args.strict and hints) else 0
