"""What the benchmarks of one adapter share: which one is meant, and what it is asked."""

import argparse
from pathlib import Path

from slang import jsonl, prompt
from slang.evaluate import quiz


def parser(doc: str, data: str = "data/demo") -> argparse.ArgumentParser:
    """--model, --adapter-path and --data, under the first line of a script's docstring."""
    p = argparse.ArgumentParser(
        description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--model", default="models/tiny-gemma3", help="folder or name")
    p.add_argument("--adapter-path", default="adapters/demo")
    p.add_argument("--data", default=data)
    return p


def items(args: argparse.Namespace) -> tuple[prompt.Prompt, list[quiz.Item]]:
    """The adapter's prompt, and the slangs of --data as evaluate.sh would ask them."""
    its_prompt = prompt.load(Path(args.adapter_path) / "prompt.toml")
    train, valid, test = (
        jsonl.read(Path(args.data) / f"{name}.jsonl") for name in ("train", "valid", "test")
    )
    return its_prompt, quiz.make_items(its_prompt, train, valid + test, 42)
