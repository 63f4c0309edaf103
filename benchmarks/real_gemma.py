"""Is the Gemma 3 270M that MLX gets the one in the GGUF file? Compared in llama.cpp.

Prints  tables of what was compared: the tokens of 22,000 texts and of whole chats, the next token's
        distribution, the tensors and metadata of an export beside llama.cpp's own file, and what
        comes back of exported F32 and BF16 files

Run as: python benchmarks/real_gemma.py > benchmarks/real_gemma.md
        fetches the model on first use, 238 MB
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

import gguf
import mlx.core as mx
import mlx_lm
import numpy as np
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from slang import dictionary, prompt  # noqa: E402
from slang.export import write  # noqa: E402
from slang.export.check import Likeliest, compare_next, next_tokens  # noqa: E402
from slang.export.llama import SLOTS, LlamaCpp  # noqa: E402
from slang.export.reference import next_logprobs, scale_as_llama_cpp  # noqa: E402
from slang.models import from_gguf, gemma_270m  # noqa: E402

SEED = 7
N_PROBS = 2048  # likeliest next tokens that are compared one by one
LENGTHS = (8, 16, 32, 64, 128, 256, 511, 512, 513, 640)  # of running text; the window is 512
N_QUESTIONS = 24  # short contexts beside them
MARKUP = """
<table> </table> <h1> <b> <i > </ < <0x41> <0x0A> [multimodal] [ <unused7> <start_of_turn>
<end_of_turn> user model <bos> <eos> <pad> <unk> <mask> <image_soft_token> <start_of_image> \u2581
\u2581\u2581 [PAD1] <a\u00a0href="x"> &amp; <s> <|im_end|>
""".split()
EMOJI = ["\u200d", "\ufe0f", *map(chr, range(0x1F3FB, 0x1F400))]
BLANKS = [" ", "\n", "\t"]


def entries() -> list[dictionary.Entry]:
    found = dictionary.entries(ROOT / "data/source_augmented.txt")
    return [entry for entry in found if isinstance(entry, dictionary.Entry)]


def any_character(rng: random.Random) -> str:
    """Any code point but half a surrogate pair; those that people write come up more often."""
    ranges = [
        (1, 0x110000),
        (1, 128),
        (32, 0x250),
        (0x370, 0x600),
        (0x4E00, 0x9FFF),
        (0x1F300, 0x1FAFF),
    ]
    while True:
        code = rng.randrange(*rng.choice(ranges))
        if not 0xD800 <= code < 0xE000:
            return chr(code)


def texts(vocabulary: list[str]) -> dict[str, list[str]]:
    """At least 20,000 texts by their kind, the same each time."""
    rng = random.Random(SEED)
    lines = entries()
    control = (ROOT / "data/control.jsonl").read_text(encoding="utf-8").splitlines()
    words = " ".join(entry.meaning for entry in lines).split()

    def word() -> str:
        return rng.choice(words)

    def blank() -> str:
        return rng.choice(BLANKS) * rng.randrange(1, 45)

    def some(make: Callable[[], str], most: int, between: str = "") -> str:
        return between.join(make() for _ in range(rng.randrange(1, most)))

    def many(count: int, make: Callable[[], str]) -> list[str]:
        return [make() for _ in range(count)]

    emoji = EMOJI + [chr(code) for code in range(0x1F300, 0x1FAFF)]
    return {
        "meanings of the dictionary": [entry.meaning for entry in lines],
        "slangs of the dictionary": sorted({entry.slang for entry in lines}),
        "control.jsonl": [m["content"] for line in control for m in json.loads(line)["messages"]],
        "random Unicode": many(4000, lambda: some(lambda: any_character(rng), 40)),
        "runs of blanks, line ends, tabs": many(
            2500, lambda: some(lambda: rng.choice([blank(), word(), "\r\n"]), 10)
        ),
        "digits": many(1500, lambda: some(lambda: rng.choice("0123456789.,- %$/"), 40)),
        "emoji": many(
            1500, lambda: some(lambda: rng.choice([rng.choice(emoji), word() + " "]), 12)
        ),
        "markup and turn markers": many(
            3000, lambda: some(lambda: rng.choice([*MARKUP, "\n", " ", word()]), 14)
        ),
        "pieces of the vocabulary": many(
            2500, lambda: some(lambda: rng.choice(vocabulary).replace("\u2581", " "), 14)
        ),
        "words of the dictionary": many(2000, lambda: some(word, 25, " ")),
    }


def chats(tokenizer) -> list[str]:
    """Whole chats as the template renders them, without <bos>.

    With and without a system message, of one and of two turns.
    """
    its_prompt = prompt.load(ROOT / "prompt.toml")
    rendered = []
    for n, entry in enumerate(entries()[::20]):
        chat = its_prompt.row(entry.slang, entry.meaning, n % len(its_prompt.questions))
        follow = [*chat, {"role": "user", "content": "¿Y cómo se usa?"}]
        for messages in (chat, chat[1:], follow):
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=messages is follow
            )
            rendered.append(text.removeprefix(tokenizer.bos_token))
    return rendered


def tokens_equal(llama_cpp: LlamaCpp, tokenizer: Tokenizer, some: list[str]) -> int:
    """How many texts both cut into the same tokens."""
    bodies = [{"content": text, "add_special": True, "parse_special": True} for text in some]
    theirs = [reply["tokens"] for reply in llama_cpp.requests("/tokenize", bodies)]
    ours = [encoding.ids for encoding in tokenizer.encode_batch(some)]
    return sum(a == b for a, b in zip(ours, theirs, strict=True))


def contexts(tokenizer) -> list[list[int]]:
    """Running Spanish text of LENGTHS tokens, and the beginnings of sentences about slang."""
    rng = random.Random(SEED)
    lines = entries()
    running = [
        token
        for entry in lines[:600]
        for token in tokenizer.encode(f" {entry.meaning}", add_special_tokens=False)
    ]
    found = []
    for length in LENGTHS:
        start = rng.randrange(len(running) - length)
        found.append([tokenizer.bos_token_id, *running[start : start + length - 1]])
    for entry in rng.sample(lines, N_QUESTIONS):
        found.append(tokenizer.encode(f'En Costa Rica, "{entry.slang}" significa'))
    return found


def logprobs(folder: Path, some: list[list[int]]) -> list[np.ndarray]:
    """MLX's log-probabilities of the next token behind each context.

    In float32 and with llama.cpp's embedding scale.
    """
    net, _ = mlx_lm.load(str(folder))
    net.set_dtype(mx.float32)
    scale_as_llama_cpp(net)
    return [next_logprobs(net, tokens)[0] for tokens in some]


def every(likeliest: list[Likeliest], n_tokens: int) -> list[np.ndarray]:
    """llama.cpp's answer as if it were ours: NaN for the tokens that it did not name."""
    found = []
    for tokens in likeliest:
        row = np.full(n_tokens, np.nan)
        row[tokens.ids] = tokens.logprobs
        found.append(row)
    return found


def export(folder: Path, target: Path, kinds: list[str]) -> list[Path]:
    """GGUF files of the imported model itself, without an adapter."""
    shutil.copytree(folder, target)
    shutil.copy(ROOT / "prompt.toml", target)
    with redirect_stdout(sys.stderr):
        return write.export(target, kinds, "gemma-3-270m")


def different_metadata(original: Path, ours: Path) -> Iterator[tuple[str, object, object]]:
    """Key, theirs and ours, for each that differs; None where there is none."""
    files = [gguf.GGUFReader(path).fields for path in (original, ours)]
    for key in sorted(set(files[0]) | set(files[1])):
        values = [fields[key].contents() if key in fields else None for fields in files]
        if values[0] != values[1] and not key.startswith("GGUF."):
            yield key, *values


def equal_tensors(original: Path, ours: Path) -> tuple[int, int, int]:
    """(tensors, those of equal name, shape and type, those of equal bytes too)."""
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(original).tensors}
    mine = {tensor.name: tensor for tensor in gguf.GGUFReader(ours).tensors}
    alike = [
        name
        for name in theirs.keys() & mine.keys()
        if theirs[name].tensor_type == mine[name].tensor_type
        and theirs[name].shape.tolist() == mine[name].shape.tolist()
    ]
    same = sum(np.array_equal(theirs[name].data, mine[name].data) for name in alike)
    return len(theirs.keys() | mine.keys()), len(alike), same


def same_weights(a: Path, b: Path) -> tuple[int, int]:
    """(tensors, those equal bit for bit) of two MLX folders, in the dtype of the second."""
    ours, theirs = (mx.load(str(folder / "model.safetensors")) for folder in (a, b))
    bits = {2: mx.uint16, 4: mx.uint32}
    equal = 0
    for name, array in theirs.items():
        kind = bits[array.dtype.size]
        equal += bool(mx.array_equal(ours[name].astype(array.dtype).view(kind), array.view(kind)))
    return len(theirs), equal


def short(value: object) -> str:
    text = "none" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def main() -> int:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    os.chdir(ROOT)
    original = gemma_270m.gguf_file()
    folder = gemma_270m.folder()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    _, wrapped = mlx_lm.load(str(folder), lazy=True)
    print("# Gemma 3 270M: the imported model beside the original file\n")
    print("    python benchmarks/real_gemma.py\n")

    llama_cpp = LlamaCpp(original, n_ctx=1024, slots=SLOTS, gpu=False)
    print("## Tokens\n\n| texts | number | cut alike by llama.cpp and MLX |\n| --- | ---: | ---: |")
    kinds = texts(sorted(tokenizer.get_vocab())) | {"whole chats": chats(wrapped)}
    total = np.zeros(2, int)
    for kind, some in kinds.items():
        equal = tokens_equal(llama_cpp, tokenizer, some)
        total += [len(some), equal]
        print(f"| {kind} | {len(some):,} | {equal:,} |")
    print(f"| all | {total[0]:,} | {total[1]:,} |\n")

    some = contexts(wrapped)
    with tempfile.TemporaryDirectory() as place:
        f32, bf16, q4_k_m = export(folder, Path(place) / "model", ["f32", "bf16", "q4_k_m"])
        ours = logprobs(folder, some)
        theirs = next_tokens(llama_cpp, some, N_PROBS)
        exact = LlamaCpp(f32, n_ctx=1024, slots=SLOTS, gpu=False, exact=True)
        theirs_exact = next_tokens(exact, some, N_PROBS)
        rows = {
            "imported, in MLX; original Q4_K_M, in llama.cpp": (theirs, ours),
            "imported, in MLX; the same weights as an F32 file, in llama.cpp": (theirs_exact, ours),
            "that F32 file and the original Q4_K_M, both in llama.cpp": (
                theirs,
                every(theirs_exact, len(ours[0])),
            ),
        }
        shortest, longest = min(map(len, some)), max(map(len, some))
        print(f"## The next token, behind {len(some)} contexts of {shortest} to {longest} tokens\n")
        print("| | mean KL, nats | largest KL | largest difference of a log-probability |")
        print("| --- | ---: | ---: | ---: |")
        for name, pair in rows.items():
            differences, kls = compare_next(*pair)
            print(f"| {name} | {abs(kls.mean()):.2g} | {kls.max():.2g} | {differences.max():.2g} |")
        n_tensors, alike, same = equal_tensors(original, q4_k_m)
        print("\n## Exported as Q4_K_M, beside the original\n")
        print(f"{n_tensors} tensors, {alike} of equal name, shape and type, {same} of equal bytes.")
        print("Metadata that differ:\n\n| key | original | ours |\n| --- | --- | --- |")
        for key, before, after in different_metadata(original, q4_k_m):
            print(f"| {key} | {short(before)} | {short(after)} |")
        print("\n## Exported and imported again\n")
        print("| file | tensors | the same bit for bit |\n| --- | ---: | ---: |")
        for path in (f32, bf16):
            again = from_gguf.folder_of(path, Path(place) / "cache")
            print("| {} | {} | {} |".format(path.stem.split("-")[-1], *same_weights(folder, again)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
