#!/usr/bin/env python3
"""Split chat JSONL into train, valid, test and eval (a tenth of train, to see what was learnt).

Where a record goes is decided by a hash of the seed and its normalised answer, not by its place in
the file. So equal answers stay together, and the order of the input does not matter.

    --by wording  the answer of each slang with the lowest hash is always trained, so that no slang
                  is tested that was never met
    --by slang    all records of a slang go to the same file, and with them those of all slangs
                  that share an answer with it

Run as: python split_jsonl.py
"""

if __name__ == "__main__":
    from slang.errors import program

    program("split_jsonl")

import argparse
import os
from collections import defaultdict
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from slang import files, jsonl
from slang.dictionary import normalized
from slang.errors import Problem, UserError, listed
from slang.flags import number

SPLITS = ("train", "valid", "test")


class Line(NamedTuple):
    """A record's text, and the hashes of its slang, its answer and its text, below 2**64."""

    text: bytes
    slang: int
    answer: int
    order: int


def hashed(seed: int, purpose: str, text: bytes) -> int:
    """A number below 2**64, the same on every platform and Python."""
    return int.from_bytes(
        blake2b(b"%d\0%s\0" % (seed, purpose.encode()) + text, digest_size=8).digest()
    )


def read(path: str, seed: int) -> list[Line]:
    """The records of a file. Raises UserError naming the bad ones, or when there is none."""
    files.need(Path(path), "run python make_jsonl.py first, which writes it")
    lines: list[Line] = []
    problems: list[Problem] = []
    for row in jsonl.records(path):
        if isinstance(row, Problem):
            problems.append(row)
            continue
        slang = normalized(jsonl.slang(row.record)).encode()
        answer = normalized(jsonl.answer(row.record)).encode()
        lines.append(
            Line(
                row.text,
                hashed(seed, "slang", slang),
                hashed(seed, "answer", answer),
                hashed(seed, "order", row.text),
            )
        )
    if problems:
        last = f"{len(problems)} bad record(s); mend them first. The outputs are unchanged."
        raise UserError(f"{listed(problems)}\n{last}")
    if not lines:
        raise UserError(f"{path}: no record in it; run make_jsonl.py first")
    return lines


def by_wording(lines: list[Line]) -> list[int]:
    """Each record's place below 2**64: its answer's hash, or 0 where a slang has no lower one."""
    lowest: dict[int, int] = {}
    for line in lines:
        lowest[line.slang] = min(line.answer, lowest.get(line.slang, line.answer))
    trained = set(lowest.values())
    return [0 if line.answer in trained else line.answer for line in lines]


def by_slang(lines: list[Line]) -> list[int]:
    """Each record's place below 2**64: the lowest hash of the slangs that answers join to it."""
    slangs_with: dict[int, set[int]] = defaultdict(set)
    answers_of: dict[int, set[int]] = defaultdict(set)
    for line in lines:
        slangs_with[line.answer].add(line.slang)
        answers_of[line.slang].add(line.answer)
    place: dict[int, int] = {}
    for lowest in sorted(answers_of):
        joined = [lowest]
        while joined:
            slang = joined.pop()
            if slang not in place:
                place[slang] = lowest
                for answer in answers_of[slang]:
                    joined += slangs_with.pop(answer, ())
    return [place[line.slang] for line in lines]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description="Split chat JSONL into train, valid, test and eval. "
        "DATA=FOLDER in the environment sets the folder for every step.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    data = files.default(os.environ.get("DATA") or "data")
    source = f"{data}/source_augmented.jsonl"
    p.add_argument("--input", default=source, help="chat records from make_jsonl.py")
    for name in SPLITS:
        p.add_argument(f"--{name}", default=f"{data}/{name}.jsonl", help=f"{name} records")
    p.add_argument("--eval", default=f"{data}/eval.jsonl", help="a tenth of the train records")
    p.add_argument(
        "--train-ratio", type=number(0, 1), default=0.8, help="share of the answers to train"
    )
    p.add_argument("--valid-ratio", type=number(0, 1), default=0.1, help="share to validate on")
    p.add_argument("--seed", type=int, default=42, help="another seed gives another split")
    by = ("wording", "slang")
    p.add_argument("--by", choices=by, default="wording", help="what is kept out of training")
    return p


def main(argv: list[str] | None = None) -> int:
    """Write the four files and print the table."""
    p = parser()
    args = p.parse_args(argv)
    for name in ("train", "valid"):
        if not getattr(args, f"{name}_ratio"):
            p.error(f"--{name}-ratio 0: {name} would be empty; give a share above 0")
    if args.train_ratio + args.valid_ratio >= 1:
        ratios = f"--train-ratio {args.train_ratio} and --valid-ratio {args.valid_ratio}"
        p.error(f"{ratios} leave nothing to test; their sum has to be below 1")
    outputs = [args.train, args.valid, args.test, args.eval]
    if same := files.overwritten(args.input, outputs):
        raise UserError(f"{same}: the output is the input or another output; name another file")

    lines = read(args.input, args.seed)
    places = by_wording(lines) if args.by == "wording" else by_slang(lines)
    members: dict[str, list[Line]] = {name: [] for name in SPLITS}
    for line, place in zip(lines, places, strict=True):
        share = place / 2**64
        valid_or_test = "valid" if share < args.train_ratio + args.valid_ratio else "test"
        members["train" if share < args.train_ratio else valid_or_test].append(line)
    for name, of_split in members.items():
        if not of_split:
            raise UserError(f"{args.input}: {name} would be empty: {remedy(lines, args.by)}")
        # By their hash: the same files from any order of the input, and shuffled for training.
        of_split.sort(key=lambda line: line.order)
    members["eval"] = members["train"][: max(1, round(len(members["train"]) / 10))]

    with files.replacing(*outputs) as opened:
        for file, of_split in zip(opened, members.values(), strict=True):
            file.writelines(line.text + b"\n" for line in of_split)
    print(table(members))
    return 0


def remedy(lines: list[Line], by: str) -> str:
    """Why a file would be empty, and what to do about it."""
    slangs = len({line.slang for line in lines})
    answers = len({line.answer for line in lines})
    if by == "wording" and answers <= slangs:
        why = "every slang has one wording and that one is trained"
        return f"{why}; add wordings or pass --by slang"
    what = "wordings" if by == "wording" else "slangs"
    few = f"{answers} answers of {slangs} slangs are too few for these ratios"
    return f"{few}; add {what}, change a ratio or the --seed"


def table(members: dict[str, list[Line]]) -> str:
    """What is in each file, and what one has to know to trust a figure on test.jsonl."""
    slangs = {name: {line.slang for line in lines} for name, lines in members.items()}
    answers = [{line.answer for line in members[name]} for name in SPLITS]
    text = f"{'':7}{'records':>9}{'slangs':>9}\n"
    for name, lines in members.items():
        note = "  a tenth of train" if name == "eval" else ""
        text += f"{name:7}{len(lines):9}{len(slangs[name]):9}{note}\n"
    met = len(slangs["test"] & slangs["train"]) / len(slangs["test"])
    equal = sum(map(len, answers)) - len(set().union(*answers))
    last = f"test slangs met in training: {met:.0%}"
    return f"{text}{last}; equal answers across train, valid, test: {equal}"
