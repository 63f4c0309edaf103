"""One training step, mlx_lm.lora's against slang.lora's, side by side in one run.

Random weights at the shapes of the tiny model, Gemma 3 270M and 1B; the rows are data/train.jsonl as the tokenizer of
models/tiny-gemma3 sees them (its ids stand for Gemma's own, the vocabulary has Gemma's size). Each side makes its batches as
it does in training: stock of random rows, ours of rows of like length, of which a short, a middle and a long one are timed.
On a CPU, ms is the process's CPU time, so that other work on the machine does not count. The peak is MLX's own, of weights and
step together.

The bound is what the arithmetic alone would give: multiply-adds of stock's padded batch, against prefix once, rows without
padding and the embedding at the answers, forward through all layers and backward through the adapted ones.

Run as: python benchmarks/train_step.py                           all shapes, batch 4 and 16
        python benchmarks/train_step.py --shape 270m --batch 4
        python benchmarks/train_step.py --shape 1b --num-layers 16   the trunk's output kept
        python benchmarks/train_step.py --dtype                   bf16 against float32 on this CPU
        python benchmarks/train_step.py --end-to-end 200          ./train.sh on the tiny model, the whole process
"""

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import types
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import gemma3_text
from mlx_lm.tuner.datasets import load_dataset
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from slang import lora  # noqa: E402

TINY = ROOT / "models/tiny-gemma3"
GEMMA = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144}
SHAPES = {
    "tiny": None,  # its own config.json
    "270m": {**GEMMA, "hidden_size": 640, "num_hidden_layers": 18, "intermediate_size": 2048},
    "1b": {**GEMMA, "hidden_size": 1152, "num_hidden_layers": 26, "intermediate_size": 6912},
}
LORA = {"rank": 8, "dropout": 0.0, "scale": 20.0}


def build(shape: str, num_layers: int, dtype: mx.Dtype = mx.float32) -> gemma3_text.Model:
    """A model of random weights with LoRA on its last layers, all for -1; lora_b is not zero, so that every gradient counts."""
    mx.random.seed(0)
    if SHAPES[shape] is None:
        args = gemma3_text.ModelArgs.from_dict(json.loads((TINY / "config.json").read_text(encoding="utf-8")))
    else:
        args = gemma3_text.ModelArgs(model_type="gemma3_text", **SHAPES[shape])
    model = gemma3_text.Model(args)
    model.sanitize({})  # ties the embeddings
    model.set_dtype(dtype)
    model.freeze()
    linear_to_lora_layers(model, num_layers, LORA)
    for module in model.modules():
        if "lora_b" in module:
            module.lora_b = mx.random.normal(module.lora_b.shape) * 1e-3
    model.train()
    mx.eval(model.parameters())
    return model


def real_rows(data: str) -> lora.Rows:
    tokenizer = load_tokenizer(TINY)
    train, _, _ = load_dataset(types.SimpleNamespace(data=data, train=True, test=False, mask_prompt=True), tokenizer)
    return lora.Rows(train, 2048, "train")


def stock_batch(rows: lora.Rows, indices: list[int], pad_target: bool = True) -> tuple[mx.array, mx.array]:
    """What mlx_lm.tuner.trainer.iterate_batches makes of these rows."""
    longest = max(len(rows.tokens[i]) for i in indices)
    table = np.zeros((len(indices), 1 + 32 * math.ceil(longest / 32)), np.int32)
    for row, i in enumerate(indices):
        table[row, : len(rows.tokens[i])] = rows.tokens[i]
    return mx.array(table), mx.array([(rows.starts[i], len(rows.tokens[i]) - (not pad_target)) for i in indices])


def clock() -> float:
    return time.process_time() if mx.default_device() == mx.cpu else time.perf_counter()


def stepper(model: nn.Module, loss, compiled: bool):
    """A training step with Adam: batch -> seconds. As mlx_lm.tuner.trainer.train has it, or as slang.lora.train."""
    optimizer = optim.Adam(learning_rate=1e-5)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state, mx.random.state]
    gradient = nn.value_and_grad(model, loss)

    def step(*batch):
        value, grads = gradient(*batch)
        optimizer.update(model, grads)
        return value

    if compiled:
        step = mx.compile(step, inputs=state, outputs=state)

    def run(batch) -> float:
        start = clock()
        mx.eval(step(*batch), state)
        mx.clear_cache()  # as both do, --clear-cache-threshold being 0
        return clock() - start

    return run


def gradient_error(model: nn.Module, network: lora.Network, rows: lora.Rows, indices: list[int]) -> float:
    """Largest difference in a gradient, relative to its largest entry, over four rows; stock without its pad target."""
    ours = nn.value_and_grad(model, network.loss)(*network.batch(rows, indices))[1]
    mx.eval(ours)
    _, theirs = nn.value_and_grad(model, partial(default_loss, model))(*stock_batch(rows, indices, pad_target=False))
    pairs = zip(tree_flatten(ours), tree_flatten(theirs), strict=True)
    return max((mx.abs(a - b).max() / mx.abs(b).max()).item() for (_, a), (_, b) in pairs)


def work(model: nn.Module, network: lora.Network, rows: lora.Rows, ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Multiply-adds of stock's batches over those that the gradient of ours needs."""
    layer = model.layers[-1]
    weights = sum(w.size for name, w in tree_flatten(layer.parameters()) if w.ndim == 2 and "lora" not in name)
    learn, n = sum(map(lora.has_adapter, model.layers)), len(network.prefix)
    head = 2 * model.model.embed_tokens.weight.size
    tokens = sum(stock_batch(rows, indices)[0][:, 1:].size for indices in theirs)
    packed = sum(n + sum(len(rows.tokens[i]) - 1 - n for i in indices) for indices in ours)
    answers = sum(rows.answer_tokens(indices) for indices in ours)
    forward = learn if network.start else len(model.layers)
    return tokens * (weights * (len(model.layers) + learn) + head) / (packed * weights * (forward + learn) + answers * head)


def measure(shape: str, batch: int, num_layers: int, rows: lora.Rows, steps: int) -> tuple[str, float]:
    """(a line of the table, the ratio of the times) of one shape and batch size."""
    model = build(shape, num_layers)
    network = lora.Network(model, lora.common_prefix(rows))
    draw = np.random.default_rng(0)
    theirs = [draw.choice(len(rows), batch, replace=False).tolist() for _ in range(steps)]
    epoch = sorted(lora.epoch(rows, batch, 0, 0), key=lambda indices: sum(len(rows.tokens[i]) for i in indices))
    ours = [epoch[len(epoch) * (2 * i + 1) // (2 * steps)] for i in range(steps)]
    rows = lora.Rows(Pairs((rows.tokens[i], rows.starts[i]) for b in ours + theirs for i in b), 2048, "train")
    ours, theirs = ([[*range(at + i * batch, at + (i + 1) * batch)] for i in range(steps)] for at in (0, steps * batch))
    error = gradient_error(model, network, rows, ours[-1][:4])
    if network.start:
        network.keep_trunk(rows, batch)
    mx.clear_cache()
    seconds, peaks = [], []
    for name, batches in (("stock", theirs), ("ours", ours)):
        stock = name == "stock"
        run = stepper(model, partial(default_loss, model) if stock else network.loss, stock or mx.default_device() != mx.cpu)
        make = stock_batch if stock else network.batch
        run(make(rows, batches[0][:1]))  # what is built once
        mx.reset_peak_memory()
        seconds.append(np.mean([run(make(rows, indices)) for indices in batches]))
        peaks.append(mx.get_peak_memory() / 1e9)
    a, b = seconds
    needed = work(model, network, rows, ours, theirs)
    tokens = np.mean([sum(len(rows.tokens[i]) for i in indices) for indices in ours])
    layers = f"{sum(map(lora.has_adapter, model.layers))} of {len(model.layers)}"
    line = f"| {shape} | {batch} | {layers} | {a * 1e3:,.0f} | {b * 1e3:,.0f} | {tokens / b:,.0f} | **{a / b:.2f}** "
    line += f"| {needed:.2f} | {peaks[0]:.2f} | {peaks[1]:.2f} | {peaks[1] / peaks[0]:.2f} | {error:.1e} |"
    return line, a / b


class Pairs(list):
    """(tokens, start of the answer) of each row, where lora.Rows expects a dataset of mlx_lm."""

    def process(self, pair):
        return pair


def dtypes(shape: str, rows: lora.Rows) -> None:
    """One step of ours in bf16 and in float32."""
    for dtype in (mx.bfloat16, mx.float32):
        model = build(shape, -1, dtype)
        network = lora.Network(model, lora.common_prefix(rows))
        run = stepper(model, network.loss, mx.default_device() != mx.cpu)
        run(network.batch(rows, [0]))
        print(f"{shape}, batch 4, {dtype}: {run(network.batch(rows, [0, 1, 2, 3])) * 1e3:,.0f} ms", flush=True)


def end_to_end(iters: int) -> None:
    """./train.sh on the tiny model with either engine: CPU seconds of the whole process, from the shell to the last file."""
    for engine in ("mlx_lm", "slang"):
        with tempfile.TemporaryDirectory() as folder:
            more = {"ENGINE": engine, "MODEL": str(TINY), "ADAPTER_PATH": folder}
            before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            command = [ROOT / "train.sh", "--iters", str(iters)]
            subprocess.run(command, env=os.environ | more, check=True, capture_output=True, cwd=ROOT)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            print(
                f"ENGINE={engine} ./train.sh --iters {iters}: {used:.1f} s CPU, {time.perf_counter() - start:.1f} s", flush=True
            )


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description="Time a training step of mlx_lm.lora and of slang.lora side by side.")
    p.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    p.add_argument("--batch", type=int, nargs="+", default=[4, 16])
    p.add_argument(
        "--num-layers", type=int, default=-1, help="layers with an adapter, from the last; -1 is all, as in train.sh"
    )
    p.add_argument("--steps", type=int, default=3, help="timed steps of each side")
    p.add_argument("--data", default=str(ROOT / "data"))
    p.add_argument("--dtype", action="store_true", help="bf16 against float32 instead")
    p.add_argument("--end-to-end", type=int, metavar="ITERS", help="./train.sh on the tiny model instead")
    args = p.parse_args(argv)
    if args.end_to_end:
        end_to_end(args.end_to_end)
        return 0
    rows = real_rows(args.data)
    tokens, starts = np.mean([len(t) for t in rows.tokens]), np.mean(rows.starts)
    prefix = len(lora.common_prefix(rows))
    about = f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores, {mx.default_device()}, mlx {mx.__version__}"
    print(f"{about}; {len(rows)} rows: prefix {prefix}, question {starts - prefix:.1f}, answer {tokens - starts:.1f} tokens")
    if args.dtype:
        for shape in args.shape:
            dtypes(shape, rows)
        return 0
    print("| shape | batch | adapted layers | stock, ms | ours, ms | ours, tokens/s | ratio | arithmetic "
          "| stock peak, GB | ours | ratio | gradient error |\n" + "| --- " * 12 + "|", flush=True)  # fmt: skip
    ratios = []
    for shape in args.shape:
        for batch in args.batch:
            line, ratio = measure(shape, batch, args.num_layers, rows, args.steps)
            ratios += [ratio] if shape != "tiny" else []
            print(line, flush=True)
    if len(ratios) > 1:
        print(f"geometric mean without tiny: {math.exp(np.mean(np.log(ratios))):.2f}, least: {min(ratios):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
