"""A training step of slang.train or mlx_lm.lora, for benchmarks/train_step.py, which runs this in a
process of its own.

Reads   a model's folder, and a JSON file of rows: [[tokens, start of the answer], ...]
Writes  {"seconds": [of each step, ...], "peak": of the process in GB, ...} to stdout; or with the
        name "error" how far the gradients of both are off
"""

import json
import resource
import sys
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from slang import numpy_gemma  # noqa: E402
from slang.numpy_gemma import vocabulary  # noqa: E402
from slang.numpy_gemma.parts import Linear  # noqa: E402
from slang.train.batches import Rows  # noqa: E402
from slang.train.network import Network  # noqa: E402
from slang.train.numpy_network import NumpyNetwork, network_of  # noqa: E402
from slang.train.shapes import Work  # noqa: E402

LORA = {"rank": 8, "dropout": 0.0, "scale": 20.0}
ON_CPU = mx.default_device() == mx.cpu


def build(folder: Path) -> nn.Module:
    """The model with LoRA on every layer; lora_b is not zero, so that every gradient counts."""
    model, _ = load_model(folder)
    model.freeze()
    mx.random.seed(0)
    linear_to_lora_layers(model, -1, LORA)
    for module in model.modules():
        if "lora_b" in module:
            module.lora_b = mx.random.normal(module.lora_b.shape) * 1e-3
    if ON_CPU:
        numpy_gemma.to_float32(model)
    mx.eval(model.parameters())
    model.train()
    return model


def mlx_lm_batch(rows: Rows, pad_target: bool = True) -> tuple[mx.array, mx.array]:
    """What mlx_lm.tuner.trainer.iterate_batches makes of these rows."""
    longest = max(map(len, rows.tokens))
    table = np.zeros((len(rows), 1 + 32 * -(-longest // 32)), np.int32)
    for line, tokens in zip(table, rows.tokens, strict=True):
        line[: len(tokens)] = tokens
    pairs = zip(rows.starts, rows.tokens, strict=True)
    return mx.array(table), mx.array(
        [(start, len(tokens) - (not pad_target)) for start, tokens in pairs]
    )


def stepper(model: nn.Module, loss_and_gradient, compiled: bool):
    """A training step with Adam, as mlx_lm.tuner.trainer.train has it, and slang.train.loop."""
    optimizer = optim.Adam(learning_rate=1e-5)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state, mx.random.state]

    def step(*batch):
        value, gradient = loss_and_gradient(*batch)
        optimizer.update(model, gradient)
        return value

    if compiled:
        step = mx.compile(step, inputs=state, outputs=state)

    def run(batch) -> None:
        mx.eval(step(*batch), state)
        mx.clear_cache()  # as both do, --clear-cache-threshold being 0

    return run


def product_rate(clock) -> float:
    """Multiply-adds a second of 1024 x 1024 float32 products, 20 in a row, the best of 5."""
    draw = np.random.default_rng(0).standard_normal
    a, b, out = (draw((1024, 1024), dtype=np.float32) for _ in range(3))
    best = np.inf
    for _ in range(5):
        begin = clock()
        for _ in range(20):
            np.matmul(a, b, out=out)
        best = min(best, clock() - begin)
    return 20 * 1024**3 / best


def loss_in_parts(model: nn.Module, batch: mx.array, lengths: mx.array) -> mx.array:
    """mlx_lm.tuner.trainer.default_loss, its sum over the vocabulary in parts of 64."""
    inputs, targets = batch[:, :-1], batch[:, 1:]
    logits = model(inputs).astype(mx.float32)
    steps = mx.arange(1, targets.shape[1] + 1)
    counted = (steps >= lengths[:, :1]) & (steps <= lengths[:, 1:])
    parts = mx.logsumexp(logits.reshape(*targets.shape, -1, 64), axis=-1)
    right = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return ((mx.logsumexp(parts, axis=-1) - right) * counted).sum() / counted.sum()


def gradient_errors(model: nn.Module, network: Network, rows: Rows) -> dict[str, float]:
    """How far the gradients of slang and mlx_lm are off that of mlx_lm's loss with exact sums, over
    four rows at most.
    """
    rows = Rows(zip(rows.tokens[:4], rows.starts[:4], strict=True), 2048, "train")
    batch = mlx_lm_batch(rows, pad_target=False)
    exact = dict(tree_flatten(nn.value_and_grad(model, partial(loss_in_parts, model))(*batch)[1]))
    mx.eval(exact)
    theirs = nn.value_and_grad(model, lambda *arrays: default_loss(model, *arrays)[0])
    sides = {
        "slang": network.value_and_grad()(network.batch(rows, [*range(len(rows))])),
        "mlx_lm": theirs(*batch),
    }
    errors = {}
    for name, (_, gradient) in sides.items():
        pairs = [(g, exact[key]) for key, g in tree_flatten(gradient)]
        errors[name] = max((mx.abs(a - b).max() / mx.abs(b).max()).item() for a, b in pairs)
    return errors


def multiply_adds(model: nn.Module, rows: Rows, prefix: int) -> int:
    """What loss and gradient of these rows need: weights times tokens, there and back."""
    work = Work.of(model)
    tokens = prefix + sum(len(t) - 1 - prefix for t in rows.tokens)
    answers = rows.answer_tokens(range(len(rows)))
    return 2 * (tokens * work.token + answers * work.answer)


def products(step: numpy_gemma.Step, tokens: int, answers: int) -> None:
    """The products of a step with the frozen weights, there and back, and nothing else."""
    weights = [
        w.weight for layer in step.layers for w in vars(layer).values() if isinstance(w, Linear)
    ]
    ones = np.ones((tokens, max(max(w.shape) for w in weights)), np.float32)
    for w in weights:
        ones[:, : w.shape[1]] @ w.T
    parts = [
        step.head[at : at + vocabulary.CHUNK] for at in range(0, len(step.head), vocabulary.CHUNK)
    ]
    hidden = np.ones((step.head.shape[1], answers), np.float32)
    for part in parts:
        part.T @ (part @ hidden)
    for w in reversed(weights):
        ones[:, : w.shape[0]] @ w


def side(name: str, folder: Path, rows_file: Path, prefix: int, steps: int, threads: int) -> dict:
    """Seconds of each step and peak memory of slang or mlx_lm; or the error of slang's gradient."""
    rows = Rows(json.loads(rows_file.read_text(encoding="utf-8")), 2048, "train")
    clock = time.process_time if threads == 1 else time.perf_counter
    model = build(folder)
    network = network_of(model, rows.tokens[0][:prefix])
    if name == "error":
        return gradient_errors(model, network, rows)
    if name == "slang":
        run = stepper(model, network.value_and_grad(), not ON_CPU)
        make = lambda: (network.batch(rows, [*range(len(rows))]),)
    else:
        run = stepper(model, nn.value_and_grad(model, partial(default_loss, model)), True)
        make = lambda: mlx_lm_batch(rows)
    rate = product_rate(clock)
    seconds = []
    for _ in range(steps + 1):
        begin = clock()
        run(make())
        seconds.append(clock() - begin)
    rate = max(rate, product_rate(clock))
    alone = []
    for _ in range(steps if isinstance(network, NumpyNetwork) else 0):
        begin = clock()
        products(
            network.step,
            prefix + sum(len(t) - 1 - prefix for t in rows.tokens),
            rows.answer_tokens(range(len(rows))),
        )
        alone.append(clock() - begin)
    peak = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / 1e9
    )
    needed = multiply_adds(model, rows, prefix)
    # The first step builds what is built once.
    return {
        "seconds": seconds[1:],
        "peak": peak,
        "rate": rate,
        "multiply_adds": needed,
        "products": alone,
    }


if __name__ == "__main__":
    name, folder, rows_file, *numbers = sys.argv[1:]
    print(json.dumps(side(name, Path(folder), Path(rows_file), *map(int, numbers))))
