#!/usr/bin/env python3
"""Split chat JSONL into train, valid, test and eval (a tenth of train, to verify what was learnt).

Where a record goes is decided by a hash of the seed and its normalised answer, not by its place in the file. So equal answers
stay together, a line added for one slang moves no record of another, and the order of the input does not matter.

    --by wording  each slang's lowest-hashed answer is always trained, so that no slang is tested that was never met
    --by slang    all records of a slang, and of slangs that share an answer with it, go to the same file

Run as: python split_jsonl.py
OUTPUT
"""

import argparse
import math
import sys
from collections import defaultdict
from hashlib import blake2b

from slang import jsonl
from slang.dictionary import Problem, key

SPLITS = ("train", "valid", "test")


def unit(seed: int, purpose: str, text: str | bytes) -> float:
    """A number in [0, 1) that depends on the arguments alone: the same on every platform and Python."""
    data = text.encode() if isinstance(text, str) else text
    digest = blake2b(f"{seed}\0{purpose}\0".encode() + data, digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def by_wording(pairs: list[tuple[str, str]], seed: int) -> list[float]:
    """A place in [0, 1) for each (slang key, answer key): 0 for the lowest-hashed answer of any slang, so it is trained."""
    place = {answer: unit(seed, "wording", answer) for _, answer in pairs}
    lowest: dict[str, str] = {}
    for slang, answer in pairs:
        lowest[slang] = min(lowest.get(slang, answer), answer, key=lambda a: (place[a], a))
    for answer in lowest.values():
        place[answer] = 0.0
    return [place[answer] for _, answer in pairs]


def by_slang(pairs: list[tuple[str, str]], seed: int) -> list[float]:
    """A place in [0, 1) for each (slang key, answer key), the same for slangs that are joined by a shared answer."""
    parent = {slang: slang for slang, _ in pairs}

    def root(slang: str) -> str:
        while parent[slang] != slang:
            parent[slang] = slang = parent[parent[slang]]
        return slang

    first_with: dict[str, str] = {}
    for slang, answer in pairs:
        a, b = sorted((root(slang), root(first_with.setdefault(answer, slang))))
        parent[b] = a  # the alphabetically first slang names the group, whatever the order of the lines
    return [unit(seed, "slang", root(slang)) for slang, _ in pairs]


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
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
    return 1


def split(args: argparse.Namespace, outputs: list[str]) -> int:
    """Write the four files and print the table; 1 when a record is bad or a file would be empty."""
    lines: list[bytes] = []
    pairs: list[tuple[str, str]] = []
    bad = 0
    for item in jsonl.progress(jsonl.records(args.input), "record"):
        if isinstance(item, Problem):
            print(item, file=sys.stderr)
            bad += 1
            continue
        _, raw, record = item
        lines.append(raw)
        pairs.append((key(jsonl.slang(record)), key(jsonl.answer(record))))
    if bad:
        print(f"{bad} bad record(s); mend them first. The outputs are unchanged.", file=sys.stderr)
        return 1

    places = (by_wording if args.by == "wording" else by_slang)(pairs, args.seed)
    members: dict[str, list[int]] = defaultdict(list)
    # Sorted by hash: the same files from any order of the input, and shuffled for training.
    for i in sorted(range(len(lines)), key=lambda i: (unit(args.seed, "order", lines[i]), lines[i])):
        late = (places[i] >= args.train_ratio) + (places[i] >= args.train_ratio + args.valid_ratio)
        members[SPLITS[late]].append(i)
    members["eval"] = members["train"][: max(1, round(len(members["train"]) / 10))]
    for name in SPLITS:
        if not members[name]:
            print(empty(name, args, pairs), file=sys.stderr)
            return 1

    with jsonl.replacing(*outputs) as files:
        for file, name in zip(files, (*SPLITS, "eval"), strict=True):
            file.writelines(lines[i] + b"\n" for i in members[name])
    table(members, pairs)
    return 0


def empty(name: str, args: argparse.Namespace, pairs: list[tuple[str, str]]) -> str:
    """Why a split file would be empty, and what to do about it."""
    slangs, answers = len({s for s, _ in pairs}), len({a for _, a in pairs})
    if not pairs:
        remedy = "the input has no record; run make_jsonl.py first"
    elif args.by == "wording" and answers <= slangs:
        remedy = "every slang has one wording and that one is trained; add wordings or pass --by slang"
    else:
        what = "wordings" if args.by == "wording" else "slangs"
        remedy = f"{answers} answers of {slangs} slangs are too few for these ratios; add {what}, change a ratio or the --seed"
    return f"{args.input}: {name} would be empty: {remedy}"


def table(members: dict[str, list[int]], pairs: list[tuple[str, str]]) -> None:
    """Print what is in each file and what a reader has to know to trust a figure on test.jsonl."""
    slangs = {name: {pairs[i][0] for i in members[name]} for name in members}
    answers = {name: {pairs[i][1] for i in members[name]} for name in members}
    print(f"{'':7}{'records':>9}{'slangs':>9}")
    for name in (*SPLITS, "eval"):
        note = "  a tenth of train" if name == "eval" else ""
        print(f"{name:7}{len(members[name]):9}{len(slangs[name]):9}{note}")
    met = len(slangs["test"] & slangs["train"]) / len(slangs["test"])
    equal = sum(len(answers[a] & answers[b]) for a, b in (("train", "valid"), ("train", "test"), ("valid", "test")))
    print(f"test slangs met in training: {met:.0%}; equal answers across train, valid, test: {equal}")


if __name__ == "__main__":
    sys.exit(main())
