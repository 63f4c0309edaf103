#!/usr/bin/env python3
"""Turn a dictionary of `slang::meaning` lines into Gemma 3 chat JSONL for mlx-lm.

Reads   data/source_augmented.txt, prompt.toml
Writes  data/source_augmented.jsonl, one {"slang", "meaning", "messages"} a line (mlx-lm ignores the first two)

Run as: python make_jsonl.py
    data/source_augmented.jsonl: 4386 records of 1039 slangs (0 duplicate, 0 bad lines left out)
"""

import argparse
import sys
from zlib import crc32

from slang import jsonl, prompt
from slang.dictionary import Problem, entries, fold, key, told


def forms(text: str) -> int | str:
    """`--forms`: `all` or a number from 1."""
    if text == "all":
        return text
    try:
        if int(text) >= 1:
            return int(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is neither 'all' nor a number from 1")


def share(text: str) -> float:
    """`--plain-spelling`: a share from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def as_typed(question: str) -> str:
    """The question without capitals, accents and ¿¡, as people type it."""
    return fold(question).replace("¿", "").replace("¡", "")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description="Turn slang::meaning lines into chat JSONL.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--input", default="data/source_augmented.txt", help="dictionary, one slang::meaning a line")
    p.add_argument("--output", default="data/source_augmented.jsonl", help="chat records, one a line")
    p.add_argument("--prompt", default="prompt.toml", help="system prompt, question forms and answer form")
    p.add_argument("--forms", type=forms, default=1, metavar="1|N|all", help="question forms asked for each line")
    p.add_argument(
        "--plain-spelling", type=share, default=0.2, metavar="SHARE", help="questions asked without accents, capitals"
    )
    p.add_argument("--skip-bad", action="store_true", help="write the good lines although there are bad ones")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        asked = prompt.load(args.prompt)
        if jsonl.overwritten(args.input, [args.output]):
            print(f"{args.output}: the output is the input; name another --output", file=sys.stderr)
            return 1
        return convert(args, asked)
    except prompt.PromptError as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(told(error, args.output), file=sys.stderr)
    except KeyboardInterrupt:
        print("Stopped; run it again", file=sys.stderr)
        return 130
    return 1


def convert(args: argparse.Namespace, asked: prompt.Prompt) -> int:
    """Write the records of all good lines; 1 when a line is bad and --skip-bad is not given, or none is good."""
    n_forms = len(asked.questions)
    per_line = n_forms if args.forms == "all" else min(args.forms, n_forms)
    plain = args.plain_spelling * 2**32
    seen: set[int] = set()
    next_form: dict[str, int] = {}  # of each slang
    bad = duplicates = records = 0
    before = slang_key = ""

    with jsonl.replacing(args.output) as (file,):
        for entry in jsonl.progress(entries(args.input), "line"):
            if isinstance(entry, Problem):
                print(entry, file=sys.stderr)
                bad += 1
                continue
            slang, meaning, _, _ = entry
            # 64 bits tell a million lines apart but for one chance in 40 million, in a third of the memory of the lines.
            fingerprint = hash((slang, meaning))
            if fingerprint in seen:
                duplicates += 1
                continue
            seen.add(fingerprint)
            if slang != before:  # the lines of a slang stand together
                before, slang_key = slang, key(slang)
            start = next_form.get(slang_key)
            if start is None:  # each slang begins elsewhere, so that all forms are used alike
                start = crc32(slang_key.encode()) % n_forms
            next_form[slang_key] = start + per_line
            draw = crc32(meaning.encode())
            for form in range(start, start + per_line):
                messages = asked.train(slang, meaning, form % n_forms)
                # An odd multiple of a number below 2**32 is, modulo 2**32, a draw of its own for each form of a line.
                if draw * (2 * form + 1) % 2**32 < plain:
                    messages[-2]["content"] = as_typed(messages[-2]["content"])
                file.write(jsonl.dumps({"slang": slang, "meaning": meaning, "messages": messages}))
                records += 1
        if bad and not args.skip_bad:
            print(f"{bad} bad line(s); mend them or pass --skip-bad. {args.output} is unchanged.", file=sys.stderr)
            raise SystemExit(1)
        if not records:
            print(f"{args.input}: no usable line; write one slang::meaning a line", file=sys.stderr)
            raise SystemExit(1)

    print(f"{args.output}: {records} records of {len(next_form)} slangs ({duplicates} duplicate, {bad} bad lines left out)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
