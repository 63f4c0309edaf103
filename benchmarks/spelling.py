"""Does it matter whether people type accents? Adapters trained with and without --plain-spelling, asked both ways.

Each slang of data/demo.txt is asked in every trained question form, as it is written and as people type it (no capitals,
accents, ¿ or ¡). Reported: in how many the two greedy answers are the same, and how many get a meaning of the slang.
The adapters are trained as demo.sh does, with that share given to make_jsonl.py.

Run as: OPENBLAS_NUM_THREADS=1 python benchmarks/spelling.py adapters/plain-0 adapters/plain-0.2
"""

import sys
from pathlib import Path

import mlx_lm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from make_jsonl import as_typed  # noqa: E402
from slang import prompt  # noqa: E402
from slang.dictionary import Entry, entries, key  # noqa: E402


def main(adapters: list[str]) -> int:
    asked = prompt.load(ROOT / "prompt.toml")
    meanings: dict[str, set[str]] = {}
    for entry in entries(ROOT / "data/demo.txt"):
        if isinstance(entry, Entry):
            meanings.setdefault(entry.slang, set()).add(key(entry.meaning))
    pairs = []
    for slang in meanings:
        for form in range(len(asked.questions)):
            written = asked.ask(slang, form)[-1]["content"]
            pairs.append((slang, written, as_typed(written)))
    print(f"{'adapter':24}{'questions':>10}{'same answer':>13}{'right as written':>18}{'right as typed':>16}")
    for adapter in adapters:
        model, tokenizer = mlx_lm.load(str(ROOT / "models/tiny-gemma3"), adapter_path=adapter)
        answers = []
        for column in (1, 2):
            chats = [tokenizer.apply_chat_template(asked.chat(pair[column]), add_generation_prompt=True) for pair in pairs]
            texts = mlx_lm.batch_generate(model, tokenizer, chats, max_tokens=64).texts
            answers.append([key(text) for text in texts])
        same = sum(written == typed for written, typed in zip(*answers, strict=True))
        right = [sum(a in meanings[p[0]] for a, p in zip(column, pairs, strict=True)) for column in answers]
        n = len(pairs)
        print(f"{adapter:24}{n:10}{same / n:13.3f}{right[0] / n:18.3f}{right[1] / n:16.3f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
