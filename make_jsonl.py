#!/usr/bin/env python3
"""Turn a dictionary of `slang::meaning` lines into Gemma 3 chat JSONL for mlx-lm.

Reads   data/source_augmented.txt (or $DICTIONARY), prompt.toml
Writes  data/source_augmented.jsonl (or $DATA/...), one {"slang", "meaning", "messages"} a line

Run as: python make_jsonl.py
        python make_jsonl.py --input my.txt
"""

if __name__ == "__main__":
    from slang.errors import program

    program("make_jsonl")

import argparse
import os
import sys
from zlib import crc32

from slang import files, jsonl, prompt
from slang.dictionary import Entry, entries, fold, normalized
from slang.errors import Problem, UserError, listed
from slang.flags import number


def forms(text: str) -> int | str:
    """`--forms`: `all` or a number from 1."""
    if text == "all":
        return text
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither 'all' nor a number from 1")


def as_typed(question: str) -> str:
    """The question without capitals, accents and ¿¡, as people type it."""
    return fold(question).replace("¿", "").replace("¡", "")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description="Turn slang::meaning lines into chat JSONL. "
        "DICTIONARY=FILE and DATA=FOLDER in the environment stand for the first two.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    source = files.default(os.environ.get("DICTIONARY") or "data/source_augmented.txt")
    output = files.default(os.environ.get("DATA") or "data", "source_augmented.jsonl")
    p.add_argument("--input", default=source, help="dictionary, one slang::meaning a line")
    p.add_argument("--output", default=output, help="chat records, one a line")
    p.add_argument("--prompt", default=files.default("prompt.toml"), help="what is told and asked")
    p.add_argument(
        "--forms", type=forms, default=3, metavar="1|N|all", help="question forms for each line"
    )
    p.add_argument(
        "--plain-spelling",
        type=number(0, 1),
        default=0.2,
        metavar="SHARE",
        help="questions asked without accents and capitals",
    )
    p.add_argument("--skip-bad", action="store_true", help="leave bad lines out and go on")
    return p


def main(argv: list[str] | None = None) -> int:
    """Write the records of all good lines; none of them when one is bad, without --skip-bad."""
    args = parser().parse_args(argv)
    its_prompt = prompt.load(args.prompt)
    if files.overwritten(args.input, [args.output]):
        raise UserError(f"{args.output}: the output is the input; name another --output")

    n_forms = len(its_prompt.questions)
    per_line = n_forms if args.forms == "all" else min(args.forms, n_forms)
    problems: list[Problem] = []
    seen: set[tuple[str, str]] = set()
    next_form: dict[str, int] = {}  # of each slang
    duplicates = written = 0
    with files.replacing(args.output) as (file,):
        for entry in entries(args.input):
            if isinstance(entry, Problem):
                problems.append(entry)
                continue
            if (entry.slang, entry.meaning) in seen:
                duplicates += 1
                continue
            slang = normalized(entry.slang)
            # Each slang begins with another form, so that all are used alike.
            first = next_form.get(slang, crc32(slang.encode()) % n_forms)
            try:
                rows = [
                    row(its_prompt, entry, form, args.plain_spelling)
                    for form in range(first, first + per_line)
                ]
            except UserError as error:
                problems.append(Problem(args.input, entry.line, str(error)))
                continue
            seen.add((entry.slang, entry.meaning))
            next_form[slang] = first + per_line
            file.writelines(map(jsonl.dumps, rows))
            written += len(rows)
        if problems:
            print(listed(problems), file=sys.stderr)
        if problems and not args.skip_bad:
            remedy = f"mend them or pass --skip-bad. {args.output} is unchanged."
            raise UserError(f"{len(problems)} bad line(s); {remedy}")
        if not written:
            raise UserError(f"{args.input}: no usable line; write one slang::meaning a line")

    left_out = f"({duplicates} duplicate, {len(problems)} bad lines left out)"
    count = f"{args.output}: {written} records of {len(next_form)} slangs {left_out}"
    print(count, file=sys.stderr if files.is_device(args.output) else sys.stdout)
    return 0


def row(its_prompt: prompt.Prompt, entry: Entry, form: int, plain_spelling: float) -> jsonl.Record:
    """The record of one line in one question form; a share of them as people type it."""
    messages = its_prompt.row(entry.slang, entry.meaning, form % len(its_prompt.questions))
    # An odd multiple of a 32-bit number is, modulo 2**32, another draw for each form.
    draw = crc32(entry.meaning.encode()) * (2 * form + 1) % 2**32
    if draw < plain_spelling * 2**32:
        messages[-2]["content"] = as_typed(messages[-2]["content"])
    return {"slang": entry.slang, "meaning": entry.meaning, "messages": messages}
