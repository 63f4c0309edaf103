"""Build models/tiny-gemma3: a real Gemma 3 of a few MB that writes Spanish and knows no slang.

Reads a dictionary and prompt.toml, and downloads nothing. The tokenizer is made of the whole
dictionary. The sentences are of every sixth slang and those of the demo: more would take hours to
learn. Every draw is seeded. Writes what `mlx_lm.load` reads: weights in float32, config, tokenizer
and chat template; and lora.yaml, the adapter settings that suit it.

Why it knows no slang and can be taught all the same: see rows.py.
Asked like evaluate.sh does, it picks a slang's meaning among four 30 times in 100; chance is 25.

Run as: python -m slang.models.tiny_gemma
    models/tiny-gemma3: 1,580,032 parameters, 6.43 MB, 548 s, loss 0.484
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import numpy as np
import sentencepiece
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models import gemma3_text

from slang import dictionary
from slang.errors import UserError, listed, parted
from slang.files import undisturbed
from slang.flags import number
from slang.models.tiny_gemma.rows import Entries, Row, corpus, rows
from slang.models.tokenizer import (
    CHAT_TEMPLATE,
    IMAGE_TOKEN,
    Added,
    merges,
    tokenizer_config,
    tokenizer_json,
    write_files,
    write_json,
)
from slang.prompt import Prompt, load

SEED = 3
VOCAB_SIZE = 1536
CONFIG: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,  # its root is exact in bfloat16, to which MLX rounds it
    "intermediate_size": 128,
    "num_hidden_layers": 6,  # llama.cpp makes every sixth layer global
    "sliding_window_pattern": 6,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "sliding_window": 48,  # shorter than a chat row, so that the rows test it
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "rope_scaling": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "use_cache": True,
    "pad_token_id": 0,
    "eos_token_id": [1, 0],  # <eos> and <end_of_turn>, filled in from the tokenizer
    "bos_token_id": 2,
    "torch_dtype": "float32",
}

BATCH_SIZE = 16
LEARNING_RATE = 3e-3
WARM_UP = 50  # steps

# For slang.train and mlx_lm.lora. On 62 slangs, 400 steps of 8 rows, choice accuracy is 0.82 with
# these at a learning rate of 5e-4, and 0.32 with mlx_lm's rank 8 and scale 20 at 1e-4 (one seed).
LORA = """\
# What suits this model: ./train.sh -c models/tiny-gemma3/lora.yaml --learning-rate 1e-3
lora_parameters:
  rank: 32
  scale: 4.0
  dropout: 0.0
"""

# Gemma 3's added tokens in Gemma 3's order, fewer of them.
RUNS = range(2, 17)
ADDED = (
    ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "[multimodal]"]
    + [f"<unused{n}>" for n in range(4)]
    + ["<start_of_turn>", "<end_of_turn>", "\n"]
    + ["\n" * n for n in RUNS]
    + ["\u2581" * n for n in RUNS]
    + ["<start_of_image>", "<end_of_image>"]
)
MARKERS = ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"]
SPECIAL = {"<pad>", "<eos>", "<bos>", "<unk>", *MARKERS}  # left out when text is decoded


def train_sentencepiece(texts: list[str]) -> bytes:
    """The content of a tokenizer.model like Gemma's: BPE with byte fallback, VOCAB_SIZE pieces."""
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=ADDED[4:],
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_tokenizer(texts: list[str], output: Path) -> None:
    """The four files of a tokenizer, made from the texts alone."""
    model = train_sentencepiece(texts)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(n) for n in range(processor.get_piece_size())]
    ids = {piece: n for n, piece in enumerate(pieces)}
    added = [Added(ids[token], token, token in SPECIAL) for token in ADDED]
    added.append(Added(VOCAB_SIZE, IMAGE_TOKEN, True))
    runs = [piece for piece in ADDED if len(piece) > 1 and len(set(piece)) == 1]
    learnt = pieces[ids["<0xFF>"] + 1 :]
    write_files(
        output,
        tokenizer_json(ids, added, merges(runs + learnt, ids)),
        tokenizer_config(added, CONFIG["max_position_embeddings"]),
        model,
        CHAT_TEMPLATE,
    )


def pad(tokens: list[list[int]]) -> mx.array:
    """Token ids of shape (rows, longest row), with zeros at the end."""
    width = max(map(len, tokens))
    return mx.array([row + [0] * (width - len(row)) for row in tokens])


def batches(source: Iterator[Row], rng: np.random.Generator) -> Iterator[tuple[mx.array, mx.array]]:
    """Token ids (BATCH_SIZE, length), and the flat positions whose next token is predicted.

    Rows of like length share a batch.
    """
    while True:
        chunk = sorted((next(source) for _ in range(16 * BATCH_SIZE)), key=lambda row: len(row[0]))
        for n in rng.permutation(16):
            batch = chunk[n * BATCH_SIZE : (n + 1) * BATCH_SIZE]
            tokens = pad([row for row, _ in batch])
            width = tokens.shape[1] - 1
            positions = []
            for k, (row, start) in enumerate(batch):
                positions.append(np.arange(start - 1, len(row) - 1) + k * width)
            yield tokens, mx.array(np.concatenate(positions))


def loss(model: nn.Module, tokens: mx.array, positions: mx.array) -> mx.array:
    """Mean negative log-likelihood in nats at the positions; other logits are not computed."""
    hidden = model.model(tokens[:, :-1]).flatten(0, 1)[positions]
    targets = tokens[:, 1:].flatten()[positions]
    logits = model.model.embed_tokens.as_linear(hidden)
    return nn.losses.cross_entropy(logits, targets, reduction="mean")


def pretrain(model: nn.Module, source: Iterator[tuple[mx.array, mx.array]], iters: int) -> float:
    """AdamW with warm-up and cosine decay; the mean loss of the last tenth."""
    warm_up = max(1, min(WARM_UP, iters - 1))
    up = optim.linear_schedule(0, LEARNING_RATE, warm_up)
    down = optim.cosine_decay(LEARNING_RATE, max(1, iters - warm_up), LEARNING_RATE / 50)
    rate = optim.join_schedules([up, down], [warm_up])
    optimizer = optim.AdamW(rate, betas=[0.9, 0.98], weight_decay=0.01)
    step = nn.value_and_grad(model, loss)
    losses = []
    start = time.process_time()
    for n in range(1, iters + 1):
        value, gradients = step(model, *next(source))
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(value.item())
        if n % 100 == 0 or n == iters:
            seconds = time.process_time() - start
            mean = np.mean(losses[-100:])
            print(f"iter {n}/{iters}: loss {mean:.3f}, {seconds:.0f} s", file=sys.stderr)
    return float(np.mean(losses[-max(1, iters // 10) :]))


def start_weight(name: str, weight: mx.array) -> mx.array:
    """Gemma multiplies by 1 + w: w of a norm starts at 0, where MLX starts it at 1."""
    return mx.zeros_like(weight) if "norm" in name else weight


def build(
    whole: Entries, part: Entries, prompt: Prompt, iters: int, output: Path
) -> tuple[int, float]:
    """Write tokenizer (of the whole), config and weights (of the part) into a folder.

    Returns the number of parameters and the loss.
    """
    write_tokenizer(corpus(whole, prompt), output)
    config = CONFIG | {"eos_token_id": [1, ADDED.index("<end_of_turn>")]}
    write_json(output / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(output / "generation_config.json", ids | {"do_sample": False})
    tokenizer = mlx_lm.utils.load_tokenizer(output)

    mx.random.seed(SEED)
    model = gemma3_text.Model(gemma3_text.ModelArgs.from_dict(config))
    model.sanitize({})  # ties the embedding
    model.update(tree_map_with_path(start_weight, model.parameters()))
    rng = np.random.default_rng(SEED)
    final = pretrain(model, batches(rows(part, prompt, tokenizer, rng), rng), iters)
    weights = dict(tree_flatten(model.parameters()))
    (output / "lora.yaml").write_text(LORA, encoding="utf-8")
    mx.save_safetensors(str(output / "model.safetensors"), weights, metadata={"format": "mlx"})
    return sum(weight.size for weight in weights.values()), final


def read_entries(path: str) -> Entries:
    """The lines of a dictionary. Raises UserError with every line that is none."""
    lines, problems = parted(dictionary.entries(path))
    if problems:
        raise UserError(listed(problems))
    return lines


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m slang.models.tiny_gemma",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--output", type=Path, default="models/tiny-gemma3", help="folder to write")
    p.add_argument(
        "--dictionary", default="data/source_augmented.txt", help="of these the tokenizer is made"
    )
    p.add_argument(
        "--demo", default="data/demo.txt", help="it learns these sentences, beside every sixth"
    )
    p.add_argument("--prompt", default="prompt.toml", help="system prompt and question forms")
    p.add_argument(
        "--iters",
        type=number(1, whole=True),
        default=800,
        help=f"pre-training steps of {BATCH_SIZE} rows",
    )
    args = p.parse_args(argv)
    prompt = load(args.prompt)
    lines = read_entries(args.dictionary)
    in_demo = {entry.slang for entry in read_entries(args.demo)}
    slangs = list(dict.fromkeys(entry.slang for entry in lines))
    chosen = set(slangs[::6]) | in_demo
    part = [entry for entry in lines if entry.slang in chosen]
    start = time.perf_counter()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent) as folder:
        parameters, final = build(lines, part, prompt, args.iters, Path(folder))
        files = sorted(Path(folder).iterdir())
        size = sum(path.stat().st_size for path in files) / 1e6
        with undisturbed():
            for path in files:
                os.replace(path, args.output / path.name)
    seconds = time.perf_counter() - start
    what = f"{parameters:,} parameters, {size:.2f} MB, {seconds:.0f} s, loss {final:.3f}"
    print(f"{args.output}: {what}")
    return 0
