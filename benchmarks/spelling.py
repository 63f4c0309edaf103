"""Does it matter whether people type accents? Adapters trained with and without --plain-spelling.

Each slang of data/demo.txt is asked in every trained question form, as it is written and as people
type it (no capitals, accents, ¿ or ¡). Reported: in how many the two greedy answers are the same,
and how many get a meaning of the slang. The adapters are trained as demo.sh does, with that share
given to make_jsonl.py.

Run as: OPENBLAS_NUM_THREADS=1 python benchmarks/spelling.py adapters/plain-0 adapters/plain-0.2
"""

import argparse
import sys
from pathlib import Path

import mlx_lm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from make_jsonl import as_typed  # noqa: E402
from slang import prompt  # noqa: E402
from slang.dictionary import Entry, entries, normalized  # noqa: E402


def meanings_by_slang() -> dict[str, set[str]]:
    meanings: dict[str, set[str]] = {}
    for entry in entries(ROOT / "data/demo.txt"):
        if isinstance(entry, Entry):
            meanings.setdefault(entry.slang, set()).add(normalized(entry.meaning))
    return meanings


def answers(model, tokenizer, chats: list[prompt.Messages]) -> list[str]:
    """The greedy answers, in the form in which two texts count as equal."""
    tokens = [tokenizer.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    texts = mlx_lm.batch_generate(model, tokenizer, tokens, max_tokens=64).texts
    return [normalized(text) for text in texts]


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("adapters", nargs="+", help="folders of adapters of the tiny model")
    args = p.parse_args()
    its_prompt = prompt.load(ROOT / "prompt.toml")
    meanings = meanings_by_slang()
    slangs = [slang for slang in meanings for _ in its_prompt.questions]
    forms = list(range(len(its_prompt.questions))) * len(meanings)
    asked = [its_prompt.ask(*pair)[-1]["content"] for pair in zip(slangs, forms, strict=True)]
    as_written = [its_prompt.chat(question) for question in asked]
    typed = [its_prompt.chat(as_typed(question)) for question in asked]

    columns = ("questions", "same answer", "right as written", "right as typed")
    print(" " * 24 + "".join(f"{name:>18}" for name in columns))
    for adapter in args.adapters:
        model, tokenizer = mlx_lm.load(str(ROOT / "models/tiny-gemma3"), adapter_path=adapter)
        found = [answers(model, tokenizer, chats) for chats in (as_written, typed)]
        same = sum(a == b for a, b in zip(*found, strict=True))
        counts = [same]
        for texts in found:
            counts.append(sum(text in meanings[s] for s, text in zip(slangs, texts, strict=True)))
        shares = "".join(f"{count / len(asked):18.3f}" for count in counts)
        print(f"{adapter:24}{len(asked):18}{shares}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
