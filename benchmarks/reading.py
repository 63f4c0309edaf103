"""Can a reader tell from one wording which slang it explains? And do the wordings of a slang agree?

ask      one wording and ten headwords: the right one and nine of the likest meanings that are no
         synonyms of it (data/synonyms.txt). A reader writes a letter, or ? where none can be told.
         Every line is read once, a tenth of them by a second reader. The wordings of a slang are
         dealt to different readers, so that one does not give the other away.
entries  whole entries. A reader writes ok, or the lines that contradict one another and why.
score    reads the answers that lie beside the questions, and prints what came out.

A reader of reader1.txt sees nothing else and writes reader1-answers.txt: `number<TAB>letter`.
A reader of entries1.txt writes entries1-answers.txt: `number<TAB>ok` or `number<TAB>lines<TAB>why`.

Run as: python benchmarks/reading.py ask --seed 42 --readers 6 --output DIR --key KEY.tsv
        python benchmarks/reading.py entries --seed 42 --readers 4 --output DIR
        python benchmarks/reading.py score DIR --key KEY.tsv
"""

import argparse
import csv
import math
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from slang.dictionary import Entry, entries, synonyms  # noqa: E402
from slang.evaluate.quiz import likeness  # noqa: E402

LETTERS = "abcdefghij"
CLOSE = 12  # the wrong headwords are drawn from so many of the likest
TWICE = 10  # one line in so many is read by a second reader
ANSWERS = "-answers.txt"
Lines = list[Entry]


def grouped(dictionary: Path) -> dict[str, Lines]:
    """The entries of each slang, in the file's order."""
    of: dict[str, Lines] = defaultdict(list)
    for entry in entries(dictionary):
        if isinstance(entry, Entry):
            of[entry.slang].append(entry)
    return of


def close_ones(of: dict[str, Lines], groups: list[frozenset[str]]) -> dict[str, list[str]]:
    """The headwords whose meanings are likest to each slang's, synonyms left out."""
    slangs = list(of)
    like = likeness([[entry.meaning for entry in of[slang]] for slang in slangs])
    close = {}
    for slang, row in zip(slangs, like, strict=True):
        same = {slang}.union(*(group for group in groups if slang in group))
        ranked = (slangs[i] for i in np.argsort(-row, kind="stable"))
        close[slang] = [other for other in ranked if other not in same][:CLOSE]
    return close


def dealt(of: dict[str, Lines], readers: int, random: np.random.Generator) -> list[Lines]:
    """The lines of each reader, in random order. A tenth of them goes to the next reader too."""
    slangs = list(of)
    lines = [entry for i in random.permutation(len(slangs)) for entry in of[slangs[i]]]
    hands = [lines[reader::readers] for reader in range(readers)]
    again = [random.permutation(len(hand))[: len(hand) // TWICE] for hand in hands]
    for reader in range(readers if readers > 1 else 0):
        hands[(reader + 1) % readers] += [lines[reader::readers][i] for i in again[reader]]
    return [[hand[i] for i in random.permutation(len(hand))] for hand in hands]


def ask(args: argparse.Namespace) -> None:
    """Write what each reader reads, and the key."""
    random = np.random.default_rng(args.seed)
    of = grouped(args.dictionary)
    close = close_ones(of, synonyms(args.synonyms, set(of)))
    args.output.mkdir(parents=True, exist_ok=True)
    args.key.parent.mkdir(parents=True, exist_ok=True)
    with args.key.open("w", encoding="utf-8") as key:
        for reader, hand in enumerate(dealt(of, args.readers, random), 1):
            text = ""
            for number, entry in enumerate(hand, 1):
                wrong = random.choice(close[entry.slang], len(LETTERS) - 1, replace=False)
                options = [str(option) for option in random.permutation([entry.slang, *wrong])]
                lettered = [f"{x} {o}" for x, o in zip(LETTERS, options, strict=True)]
                text += f"{number}. {entry.meaning}\n   {'   '.join(lettered)}\n\n"
                right = LETTERS[options.index(entry.slang)]
                print(f"reader{reader}", number, entry.line, right, *options, sep="\t", file=key)
            (args.output / f"reader{reader}.txt").write_text(text, encoding="utf-8")
            print(f"{args.output}/reader{reader}.txt: {len(hand)} wordings")


def ask_entries(args: argparse.Namespace) -> None:
    """Write whole entries, each wording with its line in the dictionary."""
    of = list(grouped(args.dictionary).values())
    order = np.random.default_rng(args.seed).permutation(len(of))
    args.output.mkdir(parents=True, exist_ok=True)
    for reader in range(args.readers):
        text, part = "", order[reader :: args.readers]
        for number, i in enumerate(part, 1):
            text += f"{number}. {of[i][0].slang}\n"
            sense = of[i][0].sense
            for entry in of[i]:
                text += "   (another sense)\n" if entry.sense != sense else ""
                text += f"   {entry.line} {entry.meaning}\n"
                sense = entry.sense
            text += "\n"
        name = args.output / f"entries{reader + 1}.txt"
        name.write_text(text, encoding="utf-8")
        print(f"{name}: {len(part)} entries")


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (E. B. Wilson, 1927)."""
    share, half = right / n, z * math.sqrt(right * (n - right) / n + z * z / 4) / (n + z * z)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def rows(path: Path) -> list[list[str]]:
    """The fields of each line."""
    with path.open(encoding="utf-8") as file:
        return [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row]


def print_share(name: str, right: int, n: int, unread: int) -> None:
    low, high = wilson(right, n)
    print(f"{name:10}{n:8}{right / n:8.1%}    {low:.1%} to {high:.1%}{unread:10}")


def score(args: argparse.Namespace) -> None:
    """Print each reader's share, how often two readers agree, and every line that was missed."""
    picks: dict[str, list[tuple[int, str, str]]] = defaultdict(list)  # reader: line, slang, picked
    answers: dict[str, dict[str, str]] = {}
    for reader, number, line, right, *options in rows(args.key):
        if reader not in answers:
            answers[reader] = {row[0]: row[1] for row in rows(args.directory / (reader + ANSWERS))}
        named = dict(zip(LETTERS, options, strict=True)) | {"?": "?"}
        picked = named.get(answers[reader].get(number, "").strip().lower(), "")
        picks[reader].append((int(line), named[right], picked))

    print(f"{'':10}{'n':>8}{'right':>8}    {'95 % interval':16}{'unread':>8}")
    everything = [pick for of_reader in picks.values() for pick in of_reader]
    for name, part in [*picks.items(), ("all", everything)]:
        right = sum(slang == picked for _, slang, picked in part)
        print_share(name, right, len(part), sum(not picked for *_, picked in part))
    of_line: dict[int, list[str]] = defaultdict(list)
    for line, _, picked in everything:
        of_line[line].append(picked)
    pairs = [picked for picked in of_line.values() if len(picked) == 2]
    same = sum(a == b for a, b in pairs)
    print(f"{len(of_line)} lines; {len(pairs)} of them read twice, {same} with the same answer")
    print("\nline   slang -> picked")
    for line, slang, picked in sorted(everything):
        if picked != slang:
            print(f"{line:<6} {slang} -> {picked or 'no answer'}")
    score_entries(args.directory)


def score_entries(directory: Path) -> None:
    """Print how many entries hold a contradiction, and which."""
    found, n = [], 0
    for path in sorted(directory.glob("entries*" + ANSWERS)):
        for _, lines, *why in rows(path):
            n += 1
            if lines.strip().lower() != "ok":
                found.append(f"{lines}: {' '.join(why)}")
    if n:
        print(f"\n{n} entries read, {len(found)} with a contradiction")
        print("\n".join(found))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Blind readings of the dictionary.")
    commands = parser.add_subparsers(required=True)
    for name, command, readers in (("ask", ask, 6), ("entries", ask_entries, 4)):
        p = commands.add_parser(name)
        p.set_defaults(command=command)
        p.add_argument("--dictionary", type=Path, default=ROOT / "data/source_augmented.txt")
        p.add_argument("--seed", type=int, default=42)
        p.add_argument("--readers", type=int, default=readers)
        p.add_argument("--output", type=Path, required=True)
        if name == "ask":
            p.add_argument("--synonyms", type=Path, default=ROOT / "data/synonyms.txt")
            p.add_argument("--key", type=Path, required=True, help="kept from the readers")
    p = commands.add_parser("score")
    p.set_defaults(command=score)
    p.add_argument("directory", type=Path)
    p.add_argument("--key", type=Path, required=True)
    args = parser.parse_args(argv)
    args.command(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
