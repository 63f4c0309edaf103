"""What the tests of slang/train share: random models and rows, and runs on the tiny model."""

import json
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import ROOT, TINY
from mlx.utils import tree_flatten
from mlx_lm.models import gemma3_text
from mlx_lm.tuner import trainer
from mlx_lm.tuner.utils import linear_to_lora_layers

from slang.train import command
from slang.train.batches import Rows


def rows(prefix: int, *lengths: tuple[int, int], seed: int = 1) -> Rows:
    """Random rows that begin alike: (tokens of the question, tokens of the answer) each."""
    draw = np.random.default_rng(seed).integers
    head = draw(3, 200, prefix).tolist()
    pairs = []
    for question, answer in lengths:
        pairs.append((head + draw(3, 200, question + answer).tolist(), prefix + question))
    return Rows(pairs, 2048, "train.jsonl")


def model(
    num_layers: int = -1,
    dora: bool = False,
    window: int = 512,
    tied: bool = True,
    keys: tuple = (),
    dropout: float = 0.0,
    bits: int | None = None,
) -> nn.Module:
    """A random gemma3_text model of 4 layers, every second one global, with an adapter that changes
    what it says."""
    mx.random.seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 48, "head_dim": 8}
    shape |= {"num_attention_heads": 4, "query_pre_attn_scalar": 8, "vocab_size": 200}
    shape |= {"sliding_window": window, "sliding_window_pattern": 2}
    net = gemma3_text.Model(gemma3_text.ModelArgs(model_type="gemma3_text", **shape))
    if tied:
        net.sanitize({})
    if bits:

        def quantisable(_, module: nn.Module) -> bool:
            return hasattr(module, "to_quantized") and module.weight.shape[1] % 32 == 0

        nn.quantize(net, 32, bits, class_predicate=quantisable)
    net.freeze()
    parameters = {"rank": 4, "dropout": dropout, "scale": 20.0}
    if keys:
        parameters["keys"] = set(keys)
    linear_to_lora_layers(net, num_layers, parameters, use_dora=dora)
    for _, module in net.named_modules():
        if "lora_b" in module:
            module.lora_b = mx.random.normal(module.lora_b.shape) * 0.01
    net.train()
    mx.eval(net.parameters())
    return net


def mlx_lm_gradient(net: nn.Module, some: Rows, indices: list[int], pad_target: bool = False):
    """(loss, gradients) of mlx_lm's default_loss; its range of targets ends before the pad token,
    unless that is wanted as a target too."""
    longest = max(len(some.tokens[i]) for i in indices)
    table = np.zeros((len(indices), 1 + longest), np.int32)
    for row, i in enumerate(indices):
        table[row, : len(some.tokens[i])] = some.tokens[i]
    lengths = [(some.starts[i], len(some.tokens[i]) - (not pad_target)) for i in indices]
    function = nn.value_and_grad(net, partial(trainer.default_loss, net))
    (loss, _), gradients = function(mx.array(table), mx.array(lengths))
    return loss, gradients


def assert_same(ours, theirs) -> None:
    """Of two (loss, gradients)."""
    (loss, gradients), (their_loss, their_gradients) = ours, theirs
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    pairs = zip(tree_flatten(gradients), tree_flatten(their_gradients), strict=True)
    for (name, a), (_, b) in pairs:
        assert mx.abs(a - b).max().item() <= 1e-4 * mx.abs(b).max().item(), name


def make_data(folder: Path, *system: str) -> Path:
    """22 rows to train, 5 to validate and 3 to test: no number is a multiple of the batch size.

    `system` is the system prompt, if there is to be one.
    """
    number = 0
    for name, count in (("train", 22), ("valid", 5), ("test", 3)):
        lines = []
        for _ in range(count):
            slang = f"{'muy ' * (number % 4)}tuanis {number}"
            question = f"Sos de Costa Rica. ¿Qué significa {slang}?"
            answer = "Que es bueno o agradable. " * (1 + number % 3)
            lines.append(chat(*system, question, answer))
            number += 1
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def chat(*contents: str) -> str:
    """A line of JSONL: question and answer, or a system prompt before them."""
    roles = ("system", "user", "assistant")[-len(contents) :]
    pairs = zip(roles, contents, strict=True)
    messages = [{"role": role, "content": content} for role, content in pairs]
    return json.dumps({"messages": messages}) + "\n"


def flags(data: Path, adapter: Path, **more) -> list[str]:
    """A command line: 13 steps of 4 rows on the tiny model, but for `more`."""
    every = {
        "model": ROOT / TINY,
        "data": data,
        "adapter_path": adapter,
        "iters": 13,
        "batch_size": 4,
        "num_layers": 2,
        "steps_per_eval": 5,
        "steps_per_report": 2,
        "save_every": 3,
        "val_batches": -1,
        "learning_rate": 1e-3,
        "mask_prompt": True,
        "train": True,
        **more,
    }
    found = []
    for name, value in every.items():
        if value is None or value is False:
            continue
        found.append(f"--{name.replace('_', '-')}")
        if value is not True:
            found.append(str(value))
    return found


def trained(data: Path, adapter: Path, **more) -> bytes:
    """The adapter of a run in this process."""
    assert command.main(flags(data, adapter, **more)) == 0
    return (adapter / "adapters.safetensors").read_bytes()


def losses(adapter: Path, name: str) -> dict[int, float]:
    """A column of log.jsonl by iteration."""
    lines = (adapter / "log.jsonl").read_text(encoding="utf-8").splitlines()
    table = [json.loads(line) for line in lines]
    return {row["iteration"]: row[name] for row in table if name in row}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but its lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
