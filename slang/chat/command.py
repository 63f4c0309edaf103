"""Ask a model about slang: one question, the lines of a file, or a conversation.

Reads the prompt.toml that the adapter was trained with, or the one in the folder of a fused model.
A text with a question mark or a quotation in it, or in a form of prompt.toml, is asked as it
stands; all else is a slang, which is asked in the first form. Answers go to stdout, everything else
to stderr.

Run as: python -m slang.chat --model models/tiny-gemma3 --adapter-path adapters/demo "pura vida"
        Todo bien, excelente.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from slang import prompt
from slang.chat.models import ExportedModel, LoadedModel, Model
from slang.errors import UserError
from slang.flags import number
from slang.prompt import Messages
from slang.text import checked

HELP = "A question or a slang; r starts anew, q or Ctrl-D leaves."


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and exits with 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags, and the question or None. Behind `--` a question may begin with a dash.

    A mistake ends the program with one line and exit code 2.
    """
    p = Parser(prog="chat.sh", allow_abbrev=False, description=(__doc__ or "").split("\n")[0])
    p.add_argument("--model", help="a folder, a .gguf file, gemma-3-270m or a name on Hugging Face")
    p.add_argument("--adapter-path", default="", help="an adapter's folder; empty for none")
    p.add_argument("--baseline", action="store_true", help="leave the adapter out, keep its prompt")
    p.add_argument("--gguf", metavar="FILE", help="an exported file, asked in llama.cpp")
    p.add_argument("--relative-to", default=".", metavar="FOLDER", help="where FILE starts")
    p.add_argument("--cache", type=Path, default=Path(".cache"), help="folders made of .gguf files")
    p.add_argument("--max-tokens", type=number(1, 1_000_000, True), default=100)
    p.add_argument("--temp", type=number(0, 10), default=0.0, help="0 takes the likeliest token")
    p.add_argument("--top-p", type=number(0, 1), default=1.0)
    p.add_argument("--min-p", type=number(0, 1), default=0.0)
    p.add_argument("--top-k", type=number(0, 1_000_000, True), default=0)
    p.add_argument("--seed", type=number(0, 2**32 - 1, True), help="for the same answer again")

    end = argv.index("--") if "--" in argv else len(argv)
    args, questions = p.parse_known_args(argv[:end])
    for word in questions:
        if word.startswith("-") and not any(map(str.isspace, word)):
            p.error(f"unknown flag {word}; see ./chat.sh --help, or put a question behind --")
    questions += argv[end + 1 :]
    if len(questions) > 1:
        p.error("one question at a time; put it in quotes")
    args.question = questions[0] if questions else None
    if questions and not args.question.strip():
        p.error("the question is empty; leave it out for a conversation")
    if args.model is None and args.gguf is None:
        p.error("name a --model")
    if args.gguf == "":
        p.error("--gguf: the name is empty; name a file")
    if args.baseline and args.gguf:
        p.error(f"--baseline: {args.gguf} holds the adapter too; leave --gguf out")
    return args


def ask(model: Model, text: str) -> str:
    """The whole answer to a question or a slang that begins a chat."""
    question = prompt.question(model.prompt, text)
    return "".join(model.answer([*model.start, {"role": "user", "content": question}])).strip()


def ask_each(model: Model, lines: Iterator[str]) -> None:
    """Print an answer a line, of each line for itself. Empty lines are passed over."""
    for n, line in enumerate(lines, 1):
        text = line.removeprefix("\ufeff" if n == 1 else "").strip()
        if text:
            try:
                answer = ask(model, checked(text, "the question"))
            except UserError as error:
                raise UserError(f"stdin:{n}: {error}") from None
            print(" ".join(answer.split()), flush=True)


def say(model: Model, messages: Messages, text: str) -> Messages:
    """Print the answer to `text` as it comes. Returns the messages with those two behind them."""
    question = prompt.question(model.prompt, checked(text, "the question"))
    if question != text:
        print(f"  {question}", file=sys.stderr)
    asked: Messages = [*messages, {"role": "user", "content": question}]
    answer = ""
    for piece in model.answer(asked):
        print(piece, end="", flush=True)
        answer += piece
    print(flush=True)
    return [*asked, {"role": "assistant", "content": answer}]


def converse(model: Model, typed: Iterator[str]) -> None:
    """Answer what is typed, with all that was said before, until q or the end."""
    print(HELP, file=sys.stderr)
    messages = list(model.start)
    for line in typed:
        text = line.strip()
        if text == "q":
            return
        if text == "r":
            messages = list(model.start)
        elif text == "h":
            print(HELP, file=sys.stderr)
        elif text:
            try:
                messages = say(model, messages, text)
            except UserError as error:
                print(error, file=sys.stderr)


def typed_lines() -> Iterator[str]:
    """What is typed at a terminal, a line at a time, until Ctrl-D. The arrow keys edit it."""
    import readline  # noqa: F401  input() uses it

    while True:
        try:
            if sys.stdout.isatty():
                yield input("> ")
            else:  # where input() would write its prompt among the answers
                print("> ", end="", file=sys.stderr, flush=True)
                yield input()
        except EOFError:
            print(file=sys.stderr)
            return


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.question is not None:
        checked(args.question, "the question")
    model = ExportedModel(args) if args.gguf else LoadedModel(args)
    if args.question is not None:
        print(ask(model, args.question))
    elif sys.stdin is not None and sys.stdin.isatty():
        converse(model, typed_lines())
    else:
        ask_each(model, sys.stdin or iter(()))
    return 0
