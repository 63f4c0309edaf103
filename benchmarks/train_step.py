"""One training step on a real Gemma 3: slang.lora, Hugging Face PEFT and mlx_lm.lora, the same
rows, side by side.

Each side runs in a process of its own, by turns, with the same number of threads; of its steps the
fastest counts. With one thread a second is one of CPU time, so that other work on the machine does
not count. Rank 8 on every linear layer, float32 on a CPU, Adam. Each side has the middle batch, by
padded tokens, of an epoch as it makes it: slang's are of rows of like length, mlx_lm's and PEFT's
of random ones. "PEFT, slang's rows" has the rows that slang has.

    arithmetic   the multiply-adds that the gradient needs, at the rate at which a 1024 x 1024 float32 product runs here:
                 the common prefix once, rows without padding, the embedding at answers, each forward and backward
    products     the same multiply-adds as the products that they are, of few rows and weights that do not fit into cache
    peak         of the whole process, loading included
    gradient     largest difference to the gradient of mlx_lm's loss, relative to that gradient's largest entry; its pad target
                 left out, its sums over the vocabulary in parts, since one float32 for 262,144 exponentials is no reference.
                 For mlx_lm: what that costs its own

Run as: python benchmarks/train_step.py --real                     the model gemma-3-270m, batch 4 and 16
        python benchmarks/train_step.py --real FOLDER --batch 4
        python benchmarks/train_step.py --shapes                   the shapes that mx.compile meets on a GPU; runs no step
        python benchmarks/train_step.py --end-to-end 200           ./train.sh on the tiny model, the whole process

PEFT needs an environment of its own, which the first run makes in .cache/peft
(benchmarks/requirements-peft.txt).
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import types
import venv
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.datasets import load_dataset
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from slang import cpu, lora  # noqa: E402
from slang.models import find as model_files  # noqa: E402

TINY = ROOT / "models/tiny-gemma3"
PEFT = ROOT / ".cache/peft"
LORA = {"rank": 8, "dropout": 0.0, "scale": 20.0}
SAME = "PEFT, slang's rows"
ON_CPU = mx.default_device() == mx.cpu


class Pairs(list):
    """(tokens, start of the answer) of each row, where a dataset of mlx_lm is expected."""

    def process(self, pair):
        return pair


def real_rows(model: Path, data: str) -> lora.Rows:
    arguments = types.SimpleNamespace(data=data, train=True, test=False, mask_prompt=True)
    train, _, _ = load_dataset(arguments, load_tokenizer(model))
    return lora.Rows(train, 2048, "train")


def middle_batch(rows: lora.Rows, size: int, alike: bool) -> list[tuple[list[int], int]]:
    """The rows of a batch that half of an epoch's batches have fewer tokens than: rows of like
    length, or random ones.
    """
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    random = [order[at : at + size] for at in range(0, len(order), size)]
    batches = [b for b in (lora.epoch(rows, size, 0, 0) if alike else random) if len(b) == size]
    measure = sum if alike else max  # slang's are not padded
    batches.sort(key=lambda indices: measure(len(rows.tokens[i]) for i in indices))
    return [(rows.tokens[i], rows.starts[i]) for i in batches[len(batches) // 2]]


# ---------------------------------------------------------------------------------------- one side, in its own process


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
        cpu.to_float32(model)
    mx.eval(model.parameters())
    model.train()
    return model


def stock_batch(rows: lora.Rows, pad_target: bool = True) -> tuple[mx.array, mx.array]:
    """What mlx_lm.tuner.trainer.iterate_batches makes of these rows."""
    longest = max(map(len, rows.tokens))
    table = np.zeros((len(rows), 1 + 32 * -(-longest // 32)), np.int32)
    for line, tokens in zip(table, rows.tokens, strict=True):
        line[: len(tokens)] = tokens
    pairs = zip(rows.starts, rows.tokens, strict=True)
    return mx.array(table), mx.array([(start, len(tokens) - (not pad_target)) for start, tokens in pairs])


def stepper(model: nn.Module, loss_and_gradient, compiled: bool):
    """A training step with Adam, as mlx_lm.tuner.trainer.train has it, and slang.lora.train."""
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


def gradient_errors(model: nn.Module, network: lora.Network, rows: lora.Rows) -> dict[str, float]:
    """How far the gradients of slang and mlx_lm are off that of mlx_lm's loss with exact sums, over
    four rows at most.
    """
    rows = lora.Rows(Pairs(zip(rows.tokens[:4], rows.starts[:4], strict=True)), 2048, "train")
    batch = stock_batch(rows, pad_target=False)
    exact = dict(tree_flatten(nn.value_and_grad(model, partial(loss_in_parts, model))(*batch)[1]))
    mx.eval(exact)
    stock = nn.value_and_grad(model, lambda *arrays: default_loss(model, *arrays)[0])
    sides = {"slang": network.value_and_grad()(*network.batch(rows, [*range(len(rows))])), "mlx_lm": stock(*batch)}
    errors = {}
    for name, (_, gradient) in sides.items():
        pairs = [(g, exact[key]) for key, g in tree_flatten(gradient)]
        errors[name] = max((mx.abs(a - b).max() / mx.abs(b).max()).item() for a, b in pairs)
    return errors


def multiply_adds(model: nn.Module, rows: lora.Rows, prefix: int) -> int:
    """What loss and gradient of these rows need: weights times tokens, there and back."""
    layers = [w.size for name, w in tree_flatten(model.layers) if w.ndim == 2 and "lora" not in name]
    tokens = prefix + sum(len(t) - 1 - prefix for t in rows.tokens)
    answers = rows.answer_tokens(range(len(rows)))
    return 2 * (tokens * sum(layers) + answers * model.model.embed_tokens.weight.size)


def products(step: cpu.Step, tokens: int, answers: int) -> None:
    """The products of a step with the frozen weights, there and back, and nothing else."""
    weights = [w.weight for layer in step.layers for w in vars(layer).values() if isinstance(w, cpu.Linear)]
    ones = np.ones((tokens, max(max(w.shape) for w in weights)), np.float32)
    for w in weights:
        ones[:, : w.shape[1]] @ w.T
    parts = [step.head[at : at + cpu.CHUNK] for at in range(0, len(step.head), cpu.CHUNK)]
    hidden = np.ones((step.head.shape[1], answers), np.float32)
    for part in parts:
        part.T @ (part @ hidden)
    for w in reversed(weights):
        ones[:, : w.shape[0]] @ w


def side(name: str, folder: Path, rows_file: Path, prefix: int, steps: int, threads: int) -> dict:
    """Seconds of each step and peak memory of slang or mlx_lm; or the error of slang's gradient."""
    rows = lora.Rows(Pairs(json.loads(rows_file.read_text(encoding="utf-8"))), 2048, "train")
    clock = time.process_time if threads == 1 else time.perf_counter
    model = build(folder)
    network = lora.network_of(model, rows.tokens[0][:prefix])
    if name == "error":
        return gradient_errors(model, network, rows)
    if name == "slang":
        run = stepper(model, network.value_and_grad(), not ON_CPU)
        make = lambda: network.batch(rows, [*range(len(rows))])
    else:
        run = stepper(model, nn.value_and_grad(model, partial(default_loss, model)), True)
        make = lambda: stock_batch(rows)
    rate = product_rate(clock)
    seconds = []
    for _ in range(steps + 1):
        begin = clock()
        run(make())
        seconds.append(clock() - begin)
    rate = max(rate, product_rate(clock))
    alone = []
    for _ in range(steps if isinstance(network, lora.CpuNetwork) else 0):
        begin = clock()
        products(network.step, prefix + sum(len(t) - 1 - prefix for t in rows.tokens), rows.answer_tokens(range(len(rows))))
        alone.append(clock() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    needed = multiply_adds(model, rows, prefix)
    # The first step builds what is built once.
    return {"seconds": seconds[1:], "peak": peak, "rate": rate, "multiply_adds": needed, "products": alone}


# ----------------------------------------------------------------------------------------------------------- the table


def peft_python() -> str:
    """The interpreter of PEFT's environment, made on first use."""
    python = PEFT / "bin/python"
    stamp = PEFT / "installed"
    if not stamp.exists():
        print(f"Setting up {PEFT.relative_to(ROOT)} (once; minutes) ...", file=sys.stderr)
        venv.create(PEFT, with_pip=True)
        requirements = ROOT / "benchmarks/requirements-peft.txt"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", requirements], check=True)
        stamp.touch()
    return str(python)


def measured(name: str, args, folder: Path, rows_file: Path, prefix: int) -> dict:
    """What the side says of itself, in a process of its own."""
    steps = 1 if name == "mlx_lm" else args.steps
    numbers = [str(steps), str(args.threads)]
    if name.startswith("PEFT"):
        command = [args.peft or peft_python(), ROOT / "benchmarks/peft_step.py", folder, rows_file, *numbers]
    else:
        command = [sys.executable, __file__, "--side", name, folder, rows_file, str(prefix), *numbers]
    threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(args.threads))
    done = subprocess.run(command, env=os.environ | threads, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def compare(args) -> None:
    """Print the table."""
    folder = model_files.find(args.real)
    rows = real_rows(folder, args.data)
    prefix = len(lora.common_prefix(rows))
    unit = "CPU" if args.threads == 1 else "wall-clock"
    print(f"{platform.machine()} {platform.system()}, {mx.default_device()}, mlx {mx.__version__}, "
          f"numpy {np.__version__}; {folder.name}, {args.threads} threads, {unit} seconds, "
          f"a prefix of {prefix} tokens")  # fmt: skip
    head = ("rows", "tokens", "answers", "engine", "s a step", "to arithmetic", "rows/s", "slang is", "peak, GB", "slang's",
            "gradient")  # fmt: skip
    print("| " + " | ".join(head) + " |\n" + "| --- " * len(head) + "|", flush=True)
    for size in args.batch:
        compare_batch(size, args, folder, rows, prefix)


def compare_batch(size: int, args, folder: Path, rows: lora.Rows, prefix: int) -> None:
    """Print the table's lines of one batch size."""
    batches = {"slang": middle_batch(rows, size, alike=True), "others": middle_batch(rows, size, alike=False)}
    results: dict[str, list[dict]] = {name: [] for name in ("slang", "PEFT", SAME, "mlx_lm")}
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: Path(scratch) / f"{name}.json" for name in batches}
        for name, file in files.items():
            file.write_text(json.dumps(batches[name]), encoding="utf-8")
        for turn in range(args.turns):
            for name, found in results.items():
                if turn == 0 or name in ("slang", "PEFT"):
                    file = files["slang" if name in ("slang", SAME) else "others"]
                    found.append(measured(name, args, folder, file, prefix))
        errors = measured("error", args, folder, files["slang"], prefix)
    best = {name: min(s for result in found for s in result["seconds"]) for name, found in results.items()}
    peak = {name: max(result["peak"] for result in found) for name, found in results.items()}
    arithmetic = results["slang"][0]["multiply_adds"] / max(result["rate"] for result in results["slang"])
    tokens = prefix + sum(len(t) - 1 - prefix for t, _ in batches["slang"])
    answers = sum(len(t) - start for t, start in batches["slang"])
    print(f"| {size} | {tokens} | {answers} | arithmetic | {arithmetic:.2f} | 1.00 | {size / arithmetic:.2f} | | | | |")
    if alone := [s for result in results["slang"] for s in result["products"]]:
        print(f"| {size} | | | products | {min(alone):.2f} | {min(alone) / arithmetic:.2f} | {size / min(alone):.2f} | | | | |")
    for name, seconds in best.items():
        off = f"{errors[name]:.1e}" if name in errors else ""
        print(f"| {size} | | | {name} | {seconds:.2f} | {seconds / arithmetic:.2f} | {size / seconds:.2f} "
              f"| {seconds / best['slang']:.2f}x | {peak[name]:.2f} | {peak['slang'] / peak[name]:.2f} | {off} |",
              flush=True)  # fmt: skip


def shapes(folder: Path, rows: lora.Rows) -> None:
    """How many shapes mx.compile meets on a GPU, and what padding to them costs."""
    prefix = len(lora.common_prefix(rows))
    weights = lora.weighed(load_model(folder, lazy=True)[0])
    print("| batch | steps | shapes, rounded to 8 | work | shapes, planned | work |\n" + "| --- " * 6 + "|")
    for size, iters in ((4, -(-len(rows) // 4) * 5), (16, 1115)):
        found = lora.survey(rows, prefix, size, 42, iters)
        counts = np.array([*found.values()])
        exact = lora.work(np.array([*found]), weights) @ counts
        line = f"| {size} | {iters} "
        for padded in ([sizes.rounded(prefix) for sizes in found], [*lora.plan(found, weights).values()]):
            line += f"| {len(set(padded))} | {lora.work(np.array(padded), weights) @ counts / exact - 1:+.1%} "
        print(line + "|", flush=True)


def end_to_end(iters: int) -> None:
    """./train.sh on the tiny model with either engine: CPU seconds of the whole process, from the
    shell to the last file.
    """
    for engine in ("mlx_lm", "slang"):
        with tempfile.TemporaryDirectory() as folder:
            more = {"ENGINE": engine, "MODEL": str(TINY), "ADAPTER_PATH": folder}
            before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            command = [ROOT / "train.sh", "--iters", str(iters)]
            subprocess.run(command, env=os.environ | more, check=True, capture_output=True, cwd=ROOT)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            wall = time.perf_counter() - start
            print(f"ENGINE={engine} ./train.sh --iters {iters}: {used:.1f} s CPU, {wall:.1f} s", flush=True)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description="Time a training step of slang.lora, PEFT and mlx_lm.lora side by side.")
    p.add_argument("--real", nargs="?", const="gemma-3-270m", default="gemma-3-270m", metavar="MODEL", help="folder or name")
    p.add_argument("--batch", type=int, nargs="+", default=[4, 16])
    p.add_argument("--steps", type=int, default=3, help="timed steps of a side at a turn")
    p.add_argument("--turns", type=int, default=2, help="how often the sides take turns")
    p.add_argument("--threads", type=int, default=int(os.environ.get("OPENBLAS_NUM_THREADS") or os.cpu_count() or 1))
    p.add_argument("--data", default=str(ROOT / "data"))
    p.add_argument("--peft", metavar="PYTHON", help="an interpreter that has PEFT already")
    p.add_argument("--end-to-end", type=int, metavar="ITERS", help="./train.sh on the tiny model instead")
    p.add_argument("--shapes", action="store_true", help="what mx.compile meets on a GPU instead")
    p.add_argument("--side", nargs=6, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.side:
        name, folder, rows_file, *numbers = args.side
        print(json.dumps(side(name, Path(folder), Path(rows_file), *map(int, numbers))))
    elif args.shapes:
        folder = model_files.find(args.real)
        shapes(folder, real_rows(folder, args.data))
    elif args.end_to_end:
        end_to_end(args.end_to_end)
    else:
        compare(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
