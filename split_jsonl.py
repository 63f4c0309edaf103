#!/usr/bin/env python3
"""Split chat JSONL into train, valid, test and eval (a tenth of train, to verify what was learnt).

Where a record goes is decided by a hash of the seed and its normalised answer, not by its place in the file. So equal answers
stay together, a line added for one slang moves no record of another, and the order of the input does not matter.

    --by wording  each slang's lowest-hashed answer is always trained, so that no slang is tested that was never met
    --by slang    all records of a slang, and of slangs that share an answer with it, go to the same file

Run as: python split_jsonl.py
             records   slangs
    train       3538     1039
    valid        429      371
    test         419      361
    eval         354      309  a tenth of train
    test slangs met in training: 100%; equal answers across train, valid, test: 0
"""

import argparse
import math
import os
import sys
from array import array
from collections.abc import Iterator
from hashlib import blake2b

import numpy as np

from slang import jsonl
from slang.dictionary import Problem, key, told

SPLITS = ("train", "valid", "test")


class Hashes:
    """Eight bytes for each text that depend on it and the arguments alone: the same on every platform and Python."""

    def __init__(self, seed: int, purpose: str):
        self.empty = blake2b(b"%d\0%s\0" % (seed, purpose.encode()), digest_size=8)
        self.all = bytearray()

    def of(self, text: bytes) -> bytes:
        digest = self.empty.copy()  # a third of the time of a new one
        digest.update(text)
        return digest.digest()

    def numbers(self) -> np.ndarray:
        """All that were gathered, (texts,), below 2**64."""
        return np.frombuffer(self.all, ">u8").astype(np.uint64)


def distinct(numbers: np.ndarray) -> np.ndarray:
    """Each number once, sorted: np.unique, which takes 40 times as long for a million since it hashes them (numpy 2.3)."""
    numbers = np.sort(numbers)
    return numbers[np.concatenate([[True], numbers[1:] != numbers[:-1]])]


def within(numbers: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which numbers are among the known ones, which are sorted: np.isin, which hashes too."""
    return known[np.minimum(np.searchsorted(known, numbers), len(known) - 1)] == numbers


def by_wording(slangs: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Each record's place below 2**64: its answer's hash, or 0 where that is the lowest of any slang, so it is trained."""
    order = np.lexsort((answers, slangs))
    first = np.concatenate([[True], slangs[order][1:] != slangs[order][:-1]])
    return np.where(within(answers, distinct(answers[order][first])), np.uint64(0), answers)


def by_slang(slangs: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Each record's place below 2**64: the lowest hash of the slangs that shared answers join to its own."""
    names, slang_of = np.unique(slangs, return_inverse=True)
    parent = list(range(len(names)))  # names are sorted, so the lowest number is the lowest hash

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first_with: dict[int, int] = {}
    for slang, answer in zip(slang_of.tolist(), answers.tolist(), strict=True):
        a, b = sorted((root(slang), root(first_with.setdefault(answer, slang))))
        parent[b] = a
    return names[[root(i) for i in range(len(names))]][slang_of]


def ratio(text: str) -> float:
    """`--train-ratio`, `--valid-ratio`: a finite number from 0 to 1."""
    value = float(text)
    if not math.isfinite(value) or not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description="Split chat JSONL into train, valid, test and eval.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--input", default="data/source_augmented.jsonl", help="chat records from make_jsonl.py")
    for name in SPLITS:
        p.add_argument(f"--{name}", default=f"data/{name}.jsonl", help=f"{name} records")
    p.add_argument("--eval", default="data/eval.jsonl", help="a tenth of the train records")
    p.add_argument("--train-ratio", type=ratio, default=0.8, help="share of the answers to train on")
    p.add_argument("--valid-ratio", type=ratio, default=0.1, help="share to validate on while training; the rest is test")
    p.add_argument("--seed", type=int, default=42, help="another seed gives another split")
    p.add_argument("--by", choices=("wording", "slang"), default="wording", help="what is kept out of training")
    return p


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    if args.train_ratio + args.valid_ratio >= 1:
        p.error(f"--train-ratio {args.train_ratio} and --valid-ratio {args.valid_ratio} leave nothing to test; "
                "their sum has to be below 1")  # fmt: skip
    outputs = [args.train, args.valid, args.test, args.eval]
    try:
        if same := jsonl.overwritten(args.input, outputs):
            print(f"{same}: the output is the input or another output; name another file", file=sys.stderr)
            return 1
        return split(args, outputs)
    except OSError as error:
        print(told(error, args.train), file=sys.stderr)
    except KeyboardInterrupt:
        print("Stopped; run it again", file=sys.stderr)
        return 130
    return 1


class Lines:
    """The records of a file as five numbers each: hashes of slang, answer and line, place in the file, length in bytes."""

    def __init__(self, path: str, seed: int, by: str):
        """Read and check every record; problems are printed and counted in `bad`."""
        self.path = path
        self.bad = 0
        # What decides a record's place takes the seed and the way of splitting in; what only tells records apart does not.
        place = {"wording": ("slang", "answer"), "slang": ("place", "answer")}[by]
        slangs, answers, orders = (Hashes(seed, purpose) for purpose in (*place, "order"))
        offsets, lengths = array("Q"), array("L")
        before, of_slang = None, b""
        for item in jsonl.progress(jsonl.records(path), "record"):
            if isinstance(item, Problem):
                print(item, file=sys.stderr)
                self.bad += 1
                continue
            _, offset, text, record = item
            if (name := jsonl.slang(record)) != before:  # the records of a slang stand together
                before, of_slang = name, slangs.of(key(name).encode())
            slangs.all += of_slang
            answers.all += answers.of(key(jsonl.answer(record)).encode())
            orders.all += orders.of(text)
            offsets.append(offset)
            lengths.append(len(text))
        self.slangs, self.answers, self.orders = slangs.numbers(), answers.numbers(), orders.numbers()
        self.offsets, self.lengths = np.asarray(offsets), np.asarray(lengths)

    def __len__(self) -> int:
        return len(self.offsets)

    def text(self, members: np.ndarray) -> Iterator[bytes]:
        """The lines of some records, read again from the file."""
        with open(self.path, "rb", 0) as file:
            for offset, length in zip(self.offsets[members].tolist(), self.lengths[members].tolist(), strict=True):
                yield os.pread(file.fileno(), length, offset) + b"\n"


def split(args: argparse.Namespace, outputs: list[str]) -> int:
    """Write the four files and print the table; 1 when a record is bad or a file would be empty."""
    lines = Lines(args.input, args.seed, args.by)
    if lines.bad:
        print(f"{lines.bad} bad record(s); mend them first. The outputs are unchanged.", file=sys.stderr)
        return 1
    if not len(lines):
        print(f"{args.input}: no record in it; run make_jsonl.py first", file=sys.stderr)
        return 1

    places = (by_wording if args.by == "wording" else by_slang)(lines.slangs, lines.answers) / 2.0**64
    late = (places >= args.train_ratio).astype(int) + (places >= args.train_ratio + args.valid_ratio)
    # Sorted by hash: the same files from any order of the input, and shuffled for training.
    order = np.argsort(lines.orders, kind="stable")
    members = {name: order[late[order] == i] for i, name in enumerate(SPLITS)}
    members["eval"] = members["train"][: max(1, round(len(members["train"]) / 10))]
    for name in SPLITS:
        if not len(members[name]):
            print(empty(name, args, lines), file=sys.stderr)
            return 1

    with jsonl.replacing(*outputs) as files:
        for file, name in zip(files, (*SPLITS, "eval"), strict=True):
            file.writelines(lines.text(members[name]))
    table(members, lines)
    return 0


def empty(name: str, args: argparse.Namespace, lines: Lines) -> str:
    """Why a split file would be empty, and what to do about it."""
    slangs, answers = len(distinct(lines.slangs)), len(distinct(lines.answers))
    if args.by == "wording" and answers <= slangs:
        remedy = "every slang has one wording and that one is trained; add wordings or pass --by slang"
    else:
        what = "wordings" if args.by == "wording" else "slangs"
        remedy = f"{answers} answers of {slangs} slangs are too few for these ratios; add {what}, change a ratio or the --seed"
    return f"{args.input}: {name} would be empty: {remedy}"


def table(members: dict[str, np.ndarray], lines: Lines) -> None:
    """Print what is in each file and what a reader has to know to trust a figure on test.jsonl."""
    slangs = {name: distinct(lines.slangs[members[name]]) for name in members}
    answers = [distinct(lines.answers[members[name]]) for name in SPLITS]
    print(f"{'':7}{'records':>9}{'slangs':>9}")
    for name in (*SPLITS, "eval"):
        note = "  a tenth of train" if name == "eval" else ""
        print(f"{name:7}{len(members[name]):9}{len(slangs[name]):9}{note}")
    met = within(slangs["test"], slangs["train"]).mean()
    equal = sum(map(len, answers)) - len(distinct(np.concatenate(answers)))
    print(f"test slangs met in training: {met:.0%}; equal answers across train, valid, test: {equal}")


if __name__ == "__main__":
    sys.exit(main())
