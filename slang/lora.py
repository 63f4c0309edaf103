"""mlx_lm.lora with the same gradient for a third of the work, and nothing lost when it stops.

Takes mlx_lm.lora's flags and YAML file, and --resume, --keep, --early-stop, --stock-loss, --prompt. Reads a model and
{train,valid,test}.jsonl; writes into --adapter-path what mlx_lm.lora writes (adapters.safetensors, adapter_config.json,
numbered checkpoints) and resume.safetensors, log.jsonl, loss.svg and the other of best and last adapter.

What is not computed, because the loss does not depend on it:
  the common prefix of all rows (system prompt), once per row: it runs once, and every row attends to its keys and values;
  logits where no answer is predicted: Gemma 3's vocabulary of 262,144 costs more there than all the layers of the 270M model;
  padding: rows of like length go together, end to end; a GPU's batches are padded to 32 shapes, chosen beforehand;
  layers below the first adapter, after the first time: their output is kept for every row, where memory allows.
The pad token after each row, which mlx_lm.lora counts as a target, is none here; the last, smaller batch is trained too.

Run as: python -m slang.lora --train --model models/tiny-gemma3 --data data --mask-prompt --iters 200
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import yaml
from mlx.nn.utils import average_gradients
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import lora as stock
from mlx_lm.cli_ui import TrainUI, make_console, print_lora_run_header, rprint
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.gemma3_text import clip_residual
from mlx_lm.tuner.callbacks import get_reporting_callbacks
from mlx_lm.tuner.datasets import ChatDataset, load_dataset
from mlx_lm.tuner.trainer import grad_checkpoint
from mlx_lm.tuner.utils import (
    build_schedule,
    linear_to_lora_layers,
    load_adapters,
    print_trainable_parameters,
)
from mlx_lm.utils import load, maybe_set_recommended_wired_limit, save_config
from rich.progress import TextColumn, TimeRemainingColumn

from slang import cpu, jsonl, model_files, prompt
from slang.errors import Problem, UserError, told
from slang.files import replacing

PAD_TO = 8  # tokens, where shapes are not planned
CHUNK = 32  # batches that are sorted by length together
SHAPES = 32  # of a run's batches, where steps are compiled: each is traced, and its kernels and buffers are kept
LOGITS = 2**25  # computed at a time: 128 answer tokens with Gemma 3's vocabulary, 134 MB
EVERYDAY = 0.25  # rows of everyday language for one of the dictionary's, at most
OPTIMIZERS = {"adam": optim.Adam, "adamw": optim.AdamW, "muon": optim.Muon, "sgd": optim.SGD, "adafactor": optim.Adafactor}
# Flags that may change between a run and its --resume; with any other the result would be another one.
FREE = {"adapter_path", "clear_cache_threshold", "config", "data", "early_stop", "epochs", "everyday", "iters", "keep", "model",
        "project_name", "prompt", "report_to", "resume", "save_every", "steps_per_report", "stock_loss", "test", "test_batches",
        "train", "trust_remote_code"}  # fmt: skip
# The least that a flag may be; where that is -1, all, it may not be 0.
LEAST = {"seed": 0, "early_stop": 0, "num_layers": -1, "test_batches": -1, "val_batches": -1,
         **dict.fromkeys(("batch_size", "grad_accumulation_steps", "iters", "max_seq_length", "save_every", "steps_per_eval",
                          "steps_per_report"), 1)}  # fmt: skip


class UsageError(Exception):
    """Something the person can mend; the message says what and how."""


class Stopped(Exception):
    """Ctrl-C, noticed where everything can be saved."""


# ---------------------------------------------------------------------------------------------------------------- rows


class Rows:
    """Tokenised rows that have an answer. tokens[i][starts[i]:] is what row i is trained on."""

    def __init__(self, dataset, max_seq_length: int, name: str, pad: bool = False):
        pairs = [dataset.process(dataset[i]) for i in range(len(dataset))]
        # Stock's number: the pad token behind each row, id 0, is one more target.
        pairs = [([*t, 0] if pad else t, max(start, 1)) for t, start in pairs]
        pairs = [(t[:max_seq_length], start) for t, start in pairs]
        kept = [(t, start) for t, start in pairs if len(t) > start]
        if len(kept) < len(pairs) and not pad:
            rprint(f"{len(pairs) - len(kept)} rows of {name}.jsonl have no answer within --max-seq-length {max_seq_length}")
        self.tokens = [t for t, _ in kept]
        self.starts = [start for _, start in kept]
        self.trunk: mx.array | None = None  # output of the frozen layers: the prefix, then the rows
        self.trunk_starts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, other: "Rows", count: int) -> None:
        """Take in the first rows of another set."""
        self.tokens += other.tokens[:count]
        self.starts += other.starts[:count]

    def answer_tokens(self, rows) -> int:
        return sum(len(self.tokens[i]) - self.starts[i] for i in rows)

    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.tokens, self.starts]).encode()).hexdigest()[:16]


def common_prefix(*sets: Rows) -> list[int]:
    """The tokens that all rows begin with; each row keeps at least one before its answer."""
    low, high = min(min(rows.tokens) for rows in sets), max(max(rows.tokens) for rows in sets)
    common = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return list(low[: min(common, *(min(rows.starts) - 1 for rows in sets))])


def epoch(rows: Rows, batch_size: int, seed: int, number: int) -> list[list[int]]:
    """The batches of an epoch: every row once, lengths alike within a batch, batches in random order.

    It follows from the seed and the epoch's number, so that an iteration is all one needs to find the place again.
    """
    random = np.random.default_rng((seed, number))
    order = random.permutation(len(rows))
    batches = []
    for start in range(0, len(order), CHUNK * batch_size):
        chunk = sorted(order[start : start + CHUNK * batch_size].tolist(), key=lambda i: len(rows.tokens[i]))
        batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def training_batches(rows: Rows, batch_size: int, seed: int, iteration: int) -> Iterator[list[int]]:
    """The batch of the iteration (from 0) and all that follow, for ever."""
    per_epoch = math.ceil(len(rows) / batch_size)
    while True:
        yield from epoch(rows, batch_size, seed, iteration // per_epoch)[iteration % per_epoch :]
        iteration += per_epoch - iteration % per_epoch


def fixed_batches(rows: Rows, batch_size: int, n_batches: int) -> list[list[int]]:
    """The same n batches each time, -1 for all; which rows they are is drawn once, not taken from the short end."""
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    if n_batches != -1:
        order = order[: n_batches * batch_size]
    order.sort(key=lambda i: len(rows.tokens[i]))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


# ------------------------------------------------------------------------------------------------------------ the loss


class Network:
    """A model's loss over packed batches: prefix once, then the rows side by side, through every linear layer together."""

    def __init__(self, model: nn.Module, prefix: list[int], why_all: str | None = None, checkpoint: bool = False):
        self.model, self.prefix, self.why_all, self.checkpoint = model, prefix, why_all, checkpoint
        self.start = 0
        self.shapes: dict[Sizes, Sizes] = {}  # what batches are padded to, where that is planned
        if why_all:
            self.prefix = []
            return
        text = getattr(model, "language_model", model)
        self.body = text.model
        embedding = self.body.embed_tokens
        self.head = embedding.as_linear if text.tie_word_embeddings else text.lm_head
        self.head_learns = has_adapter(embedding if text.tie_word_embeddings else text.lm_head)
        if not has_adapter(embedding):
            learn = [has_adapter(layer) for layer in self.body.layers]
            self.start = learn.index(True) if any(learn) else len(learn)  # the layers below stay as they are

    def batch(self, rows: Rows, indices: list[int], tokens: int | None = None) -> tuple[mx.array, ...]:
        """The arrays that `loss` takes for these rows: (x, packed, place, back, answers, targets, weights).

        packed   the prefix and then the rows' tokens end to end, without padding but for the last few, (packed,)
        x        what the frozen layers make of them, (packed, hidden), or empty where it is not kept
        place    where in packed each row's tokens are, (rows, longest row); back is the way back, (packed - prefix,)
        answers  where in packed an answer's token is predicted, (answer tokens,); targets is that token
        weights  1 / tokens for each of the targets, 0 for what fills the array up; tokens is that of the whole batch
                 when other machines have the rest of it
        """
        n = len(self.prefix)
        packed, kept, lengths, answers, targets = pack(self.prefix, rows, indices)
        exact = Sizes(len(indices), max(lengths, default=1), len(packed), len(answers))
        sizes = self.shapes.get(exact) or exact.rounded(n)
        place = np.full((sizes.rows, sizes.longest), n)
        back, at = [], n
        for row, length in enumerate(lengths):
            place[row, :length] = range(at, at + length)
            back += range(row * place.shape[1], row * place.shape[1] + length)
            at += length
        weights = [1 / (tokens or len(targets))] * len(targets)

        def array(values: list, size: int, dtype: mx.Dtype = mx.int32) -> mx.array:
            return mx.array(values + [0] * (size - len(values)), dtype)

        size, n_answers = sizes.packed, sizes.answers
        x = mx.zeros((0,)) if rows.trunk is None else rows.trunk[array(kept, size)]
        return (x, array(packed, size), mx.array(place), array(back, size - n), array(answers, n_answers),
                array(targets, n_answers), array(weights, n_answers, mx.float32))  # fmt: skip

    def loss(self, x: mx.array, packed: mx.array, place: mx.array, back: mx.array, answers: mx.array, targets: mx.array,
             weights: mx.array) -> mx.array:  # fmt: skip
        """Weighted sum of the answer tokens' cross entropy; for a batch of `batch`, its mean in nats."""
        if self.why_all:
            logits = self.model(packed[place])
            logits = logits.reshape(-1, logits.shape[-1])[back][answers].astype(mx.float32)
            return (nn.losses.cross_entropy(logits, targets) * weights).sum()
        if x.size == 0:
            x = self.layers(self.embed(packed), place, back, 0, self.start)
        hidden = self.body.norm(self.layers(x, place, back, self.start, len(self.body.layers), answers))
        if self.head_learns:
            logits = self.head(hidden).astype(mx.float32)
            return (nn.losses.cross_entropy(logits, targets) * weights).sum()
        return frozen_head_loss(self.head, hidden, targets, weights, self.body.vocab_size, self.model.training)

    def embed(self, packed: mx.array) -> mx.array:
        h = self.body.embed_tokens(packed)
        return h * mx.array(self.body.args.hidden_size**0.5, mx.bfloat16).astype(h.dtype)

    def layers(self, x, place, back, first: int, last: int, answers: mx.array | None = None) -> mx.array:
        """Layers first..last-1 of gemma3_text.Gemma3Model; with `answers`, the model's last layer gives those only."""
        for i in range(first, last):
            layer = self.body.layers[i]
            pick = answers if i == len(self.body.layers) - 1 else None
            if self.checkpoint and has_adapter(layer):
                x = mx.checkpoint(partial(self._restored, layer, place, back, pick))(layer.trainable_parameters(), x)
            else:
                x = self._layer(layer, place, back, pick, x)
        return x

    def _restored(self, layer, place, back, pick, parameters, x):
        layer.update(parameters)
        return self._layer(layer, place, back, pick, x)

    def _layer(self, layer: nn.Module, place: mx.array, back: mx.array, pick: mx.array | None, x: mx.array) -> mx.array:
        r = self._attention(layer.self_attn, layer.input_layernorm(x), place, back)
        if pick is not None:
            r, x = r[pick], x[pick]
        h = clip_residual(x, layer.post_attention_layernorm(layer.self_attn.o_proj(r)))
        y, mlp = layer.pre_feedforward_layernorm(h), layer.mlp
        r = mlp.down_proj(gelu(mlp.gate_proj(y)) * mlp.up_proj(y))
        return clip_residual(h, layer.post_feedforward_layernorm(r))

    def _attention(self, attention: nn.Module, x: mx.array, place: mx.array, back: mx.array) -> mx.array:
        """gemma3_text.Attention but for o_proj: the prefix sees itself, each row the prefix and itself."""
        n, batch = len(self.prefix), len(place)
        window = self.body.window_size if attention.is_sliding else None

        def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            new, seen = q.shape[2], k.shape[2]
            mask = "causal" if window is None or seen <= window else create_causal_mask(new, seen - new, window)
            out = mx.fast.scaled_dot_product_attention(q, k, v, scale=attention.scale, mask=mask)
            return out.transpose(0, 2, 1, 3).reshape(-1, out.shape[1] * out.shape[3])

        def heads(y: mx.array, count: int, norm=None) -> tuple[mx.array, mx.array]:
            y = y.reshape(len(x), count, -1)
            y = norm(y) if norm else y
            parts = y[None, :n].transpose(0, 2, 1, 3), y[place].transpose(0, 2, 1, 3)
            return (attention.rope(parts[0]), attention.rope(parts[1], offset=n)) if norm else parts

        queries = heads(attention.q_proj(x), attention.n_heads, attention.q_norm)
        keys = heads(attention.k_proj(x), attention.n_kv_heads, attention.k_norm)
        values = heads(attention.v_proj(x), attention.n_kv_heads)
        if not n:
            return attend(queries[1], keys[1], values[1])[back]
        behind = [mx.concatenate([mx.broadcast_to(a, (batch, *a.shape[1:])), b], axis=2) for a, b in (keys, values)]
        return mx.concatenate([attend(queries[0], keys[0], values[0]), attend(queries[1], *behind)[back]])

    def value_and_grad(self):
        """The function that gives loss and gradients of a batch's arrays."""
        return nn.value_and_grad(self.model, self.loss)

    def frozen(self, rows: Rows, indices: list[int]) -> mx.array:
        """The output of the layers below the first adapter: the prefix's, then the rows', (tokens, hidden)."""
        _, packed, place, back, *_ = self.batch(rows, indices)
        return self.layers(self.embed(packed), place, back, 0, self.start)

    def keep_trunk(self, rows: Rows, batch_size: int) -> None:
        """Compute the frozen layers' output of every row, to be used from now on."""
        n, order = len(self.prefix), sorted(range(len(rows)), key=lambda i: len(rows.tokens[i]))
        parts, starts, total = [], np.zeros(len(rows), np.int64), n
        for at in range(0, len(order), batch_size):
            indices = order[at : at + batch_size]
            x = self.frozen(rows, indices)
            lengths = [len(rows.tokens[i]) - 1 - n for i in indices]
            starts[indices] = total + np.cumsum([0, *lengths[:-1]])
            total += sum(lengths)
            parts.append(x[(n if parts else 0) : n + sum(lengths)])
            mx.eval(parts[-1])
        rows.trunk, rows.trunk_starts = mx.concatenate(parts), starts
        mx.eval(rows.trunk)


class CpuNetwork(Network):
    """The same loss and gradient on a CPU, by slang/cpu.py."""

    def __init__(self, model: nn.Module, prefix: list[int]):
        super().__init__(model, prefix)
        self.step = cpu.Step(model, self.start)

    def batch(self, rows: Rows, indices: list[int], tokens: int | None = None) -> tuple[cpu.Batch]:
        packed, kept, lengths, answers, targets = pack(self.prefix, rows, indices)
        ends = np.cumsum([len(self.prefix), *lengths]).tolist()
        x = None if rows.trunk is None else cpu.view(rows.trunk)[kept]
        weights = np.full(len(targets), 1 / (tokens or len(targets) or 1), np.float32)
        prefix = slice(0, len(self.prefix))
        after = [cpu.Row(slice(*pair), (prefix,)) for pair in pairwise(ends)]
        packed, answers, targets = (np.array(a, int) for a in (packed, answers, targets))
        return (cpu.Batch(packed, x, [cpu.Row(prefix), *after], answers, targets, weights),)

    def loss(self, batch: cpu.Batch) -> mx.array:
        return mx.array(float(self.step.losses(batch) @ batch.weights))

    def value_and_grad(self):
        def loss_and_gradient(batch: cpu.Batch) -> tuple[mx.array, dict]:
            loss, gradients = self.step.loss_and_gradient(batch)
            names = [name for name, _ in tree_flatten(self.model.trainable_parameters())]
            return mx.array(loss), tree_unflatten([(name, mx.array(gradients[name])) for name in names])

        return loss_and_gradient

    def frozen(self, rows: Rows, indices: list[int]) -> mx.array:
        return mx.array(self.step.trunk(*self.batch(rows, indices)))


def network_of(model: nn.Module, prefix: list[int], why_all: str | None = None, checkpoint: bool = False) -> Network:
    """The fastest Network there is for this model here."""
    if mx.default_device() != mx.cpu or why_all:
        return Network(model, prefix, why_all, checkpoint)
    why_not = "--grad-checkpoint" if checkpoint else cpu.why_not(model)
    if why_not:
        rprint(f"Computing with MLX's own kernels, which are slower on a CPU: {why_not}")
        return Network(model, prefix, why_all, checkpoint)
    return CpuNetwork(model, prefix)


def pack(prefix: list[int], rows: Rows, indices: list[int]) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """(packed, kept, lengths, answers, targets) of the prefix and then these rows' tokens, end to end.

    Of each row its last token is left out, which predicts nothing. packed has the token ids, lengths the rows' without the
    prefix; kept is where in rows.trunk they are, where that is kept; answers is where in packed one of targets is predicted.
    """
    n = len(prefix)
    packed, kept, lengths, answers, targets = [*prefix], [*range(n)], [], [], []
    for i in indices:
        length, at = len(rows.tokens[i]) - 1 - n, len(packed)
        answers += range(at + rows.starts[i] - 1 - n, at + length)
        targets += rows.tokens[i][rows.starts[i] :]
        packed += rows.tokens[i][n:-1]
        lengths.append(length)
        if rows.trunk is not None:
            kept += range(rows.trunk_starts[i], rows.trunk_starts[i] + length)
    return packed, kept, lengths, answers, targets


def gelu(x: mx.array) -> mx.array:
    """nn.gelu_approx, its (1 + tanh z) / 2 written as sigmoid(2 z): its derivative needs no second tanh, 20 ns on a CPU."""
    return x * mx.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))


def round_up(n: int) -> int:
    return max(-(-n // PAD_TO) * PAD_TO, PAD_TO)


class Sizes(NamedTuple):
    """The sizes of a batch's arrays: rows, tokens of the longest without the prefix, packed tokens with it, answer tokens."""

    rows: int
    longest: int
    packed: int
    answers: int

    def rounded(self, prefix: int) -> "Sizes":
        packed = max(round_up(self.packed), prefix + PAD_TO)
        return Sizes(max(self.rows, 1), round_up(self.longest), packed, round_up(self.answers))


def survey(rows: Rows, prefix: int, batch_size: int, seed: int, iters: int, part: slice = slice(None)) -> Counter[Sizes]:
    """How often each size occurs in a run; part is this machine's of each batch."""
    found: Counter[Sizes] = Counter()
    for indices in islice(training_batches(rows, batch_size, seed, 0), iters):
        lengths = [len(rows.tokens[i]) - 1 - prefix for i in indices[part]]
        answers = rows.answer_tokens(indices[part])
        found[Sizes(len(lengths), max(lengths, default=1), prefix + sum(lengths), answers)] += 1
    return found


def work(sizes: np.ndarray, weights: tuple[int, int, int]) -> np.ndarray:
    """Multiply-adds of batches of these sizes (..., 4), there and back; weights as `weighed` gives them."""
    rows, longest, packed, answers = np.moveaxis(np.asarray(sizes, float), -1, 0)
    layers, head, attention = weights
    return 2 * (packed * layers + answers * head + rows * longest * longest * attention)


def weighed(model: nn.Module) -> tuple[int, int, int]:
    """Multiply-adds a token needs in all layers, an answer in the head, and a pair of tokens in all layers' attention."""
    text = getattr(model, "language_model", model)
    embedding = text.model.embed_tokens.weight
    layers = sum(w.size for name, w in tree_flatten(text.model.layers) if w.ndim == 2 and "lora" not in name)
    attention = text.model.layers[0].self_attn
    return layers, embedding.size, 2 * len(text.model.layers) * attention.n_heads * attention.head_dim


def plan(found: Counter[Sizes], weights: tuple[int, int, int], most: int = SHAPES) -> dict[Sizes, Sizes]:
    """What each size is padded to, so that at most `most` shapes are left, which mx.compile traces once each.

    Two shapes at a time become the one that holds both, those first for which that adds the least work to the run.
    """
    shapes = np.array([*found], np.int64).reshape(-1, 4)
    shapes[:, 0] = np.maximum(shapes[:, 0], 1)
    counts = np.array([*found.values()], float)
    alive = np.ones(len(shapes), bool)

    def price(i: int) -> np.ndarray:
        """What merging shape i with each of the others adds."""
        merged = work(np.maximum(shapes[i], shapes), weights) * (counts[i] + counts)
        price = merged - work(shapes[i], weights) * counts[i] - work(shapes, weights) * counts
        price[~alive] = np.inf
        price[i] = np.inf
        return price

    prices = np.array([price(i) for i in range(len(shapes))]).reshape(len(shapes), -1)
    for _ in range(len(shapes) - most):
        i, j = np.unravel_index(prices.argmin(), prices.shape)
        shapes[i], counts[i] = np.maximum(shapes[i], shapes[j]), counts[i] + counts[j]
        alive[j] = False
        prices[j], prices[:, j] = np.inf, np.inf
        prices[i] = prices[:, i] = price(i)
    exact = np.array([*found], np.int64).reshape(-1, 4)
    shapes = shapes[alive]
    for _ in range(20):  # then each size takes the cheapest shape that holds it, and shapes shrink to what they hold
        holds = (exact[:, None] <= shapes).all(axis=-1)
        member = np.where(holds, work(shapes, weights), np.inf).argmin(axis=1)
        shapes = np.array([exact[member == i].max(axis=0, initial=1) for i in range(len(shapes))])
    return {sizes: Sizes(*shapes[to].tolist()) for sizes, to in zip(found, member, strict=True)}


def has_adapter(module: nn.Module) -> bool:
    return bool(tree_flatten(module.trainable_parameters()))


def frozen_head_loss(head, hidden: mx.array, targets: mx.array, weights: mx.array, vocabulary: int, training: bool) -> mx.array:
    """Weighted cross entropy of head(hidden), its gradient computed along with it: one exp per logit, no logits kept.

    Only for a head without an adapter. On a CPU the second exp that autograd needs costs as much as a matrix product.
    """
    parts = -(-len(targets) * vocabulary // LOGITS)
    size = -(-len(targets) // parts)
    total, before = mx.array(0.0), None
    for at in range(0, len(targets), size):
        h, t, w = (a[at : at + size] for a in (hidden, targets, weights))
        frozen = mx.stop_gradient(h)
        if before is not None:
            frozen = mx.depends([frozen], [before])[0]  # one part after the other, for memory's sake
        logits = mx.stop_gradient(head(frozen).astype(mx.float32))
        top = logits.max(axis=-1, keepdims=True)
        exp = mx.exp(logits - top)
        sums = exp.sum(axis=-1)
        before = ((mx.log(sums) + top[:, 0] - mx.take_along_axis(logits, t[:, None], axis=-1)[:, 0]) * w).sum()
        total = total + before
        if training:
            # d loss / d logits = (exp / sum - onehot) * weight; what is constant in a row waits until the row is short.
            away = exp.at[mx.arange(len(t)), t].add(-sums).astype(h.dtype)
            slope = mx.vjp(head, [frozen], [away])[1][0] * (w / sums)[:, None]
            slope = before = mx.stop_gradient(slope.astype(h.dtype))
            total = total + ((h - mx.stop_gradient(h)).astype(mx.float32) * slope).sum()
    return total


# --------------------------------------------------------------------------------------------------- files of a run


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system gives it back however the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"{folder}: another run is training there; wait for it or choose another --adapter-path") from None
        for left in folder.glob(".*.part"):  # what a killed run was writing
            left.unlink()
        yield


def saved(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The arrays and the rest of a resume.safetensors. Raises UsageError unless it is a whole one."""
    try:
        arrays, about = mx.load(str(path), return_metadata=True)
    except RuntimeError:
        about = {}
    if not {"identity", "numbers", "iters"} <= set(about):
        raise UsageError(f"{path}: cut off, or not written by this program; leave --resume out to begin anew")
    return arrays, about


class Run:
    """What a run knows and how it is kept: one file, resume.safetensors, replaced as a whole."""

    def __init__(self, args, model: nn.Module, optimizer: optim.Optimizer, dtypes: dict[str, mx.Dtype], identity: dict):
        self.args, self.model, self.optimizer, self.dtypes, self.identity = args, model, optimizer, dtypes, identity
        self.folder = Path(args.adapter_path)
        self.iteration, self.validated, self.without_gain = 0, -1, 0
        self.best: dict[str, mx.array] = {}
        self.best_iteration, self.best_loss, self.valid_loss = -1, math.inf, math.inf
        self.seconds, self.tokens = 0.0, 0
        self.gradient: dict | None = None  # summed so far, between two updates with --grad-accumulation-steps

    NUMBERS = ("iteration", "validated", "without_gain", "best_iteration", "best_loss", "valid_loss", "seconds", "tokens")

    def adapter(self) -> dict[str, mx.array]:
        return dict(tree_flatten(self.model.trainable_parameters()))

    def save(self) -> None:
        """Write the state, then the adapters that follow from it; killed in between, --resume writes them again."""
        parts = {"adapter": self.adapter(), "best": self.best, "optimizer": dict(tree_flatten(self.optimizer.state)),
                 "gradient": self.gradient or {}, "random": {"key": mx.random.state[0]}}  # fmt: skip
        arrays = {f"{part}/{name}": a for part, values in parts.items() for name, a in values.items()}
        numbers = {name: getattr(self, name) for name in self.NUMBERS}
        about = {"numbers": json.dumps(numbers), "identity": json.dumps(self.identity), "iters": str(self.args.iters)}
        with replacing(self.folder / "resume.safetensors") as (file,):
            mx.save_safetensors(file, arrays, about)
        self.save_adapters()

    def save_adapters(self) -> Path:
        """adapters.safetensors, the other one of best and last beside it, and the numbered checkpoint; returns the last."""
        keep_best = self.args.keep == "best" and self.best
        other = "adapters_last.safetensors" if keep_best else "adapters_best.safetensors"
        last, best = self.adapter(), self.best or self.adapter()
        files = {"adapters.safetensors": best if keep_best else last}
        if self.best:
            files[other] = last if keep_best else best
        number = f"{self.iteration:07d}_adapters.safetensors"
        if self.iteration and self.iteration % self.args.save_every == 0:
            files[number] = last
        with replacing(*(self.folder / name for name in files)) as opened:
            for file, weights in zip(opened, files.values(), strict=True):
                # In one order: a file's bytes follow from the order in which its arrays are given, and mx.load has another.
                mx.save_safetensors(file, {name: weights[name].astype(dtype) for name, dtype in self.dtypes.items()})
        for stale in {"adapters_last.safetensors", "adapters_best.safetensors"} - set(files):
            (self.folder / stale).unlink(missing_ok=True)
        return self.folder / number

    def restore(self) -> bool:
        """Take up the saved state; False when there is none. Raises UsageError when it belongs to another run."""
        path = self.folder / "resume.safetensors"
        if not path.exists():
            rprint(f"{path}: not there, so this run begins at the beginning")
            return False
        arrays, about = saved(path)
        before = json.loads(about["identity"])
        if different := [k for k in {**before, **self.identity} if before.get(k) != self.identity.get(k)]:
            raise UsageError(f"{path}: saved by a run with other settings, so it can't go on from there:\n" + "".join(
                f"  {k}: {before.get(k)} then, {self.identity.get(k)} now\n" for k in different
            ) + "Give the same again, or leave --resume out to begin anew.")  # fmt: skip
        parts: dict[str, dict] = {"adapter": {}, "best": {}, "optimizer": {}, "gradient": {}, "random": {}}
        for name, array in arrays.items():
            part, name = name.split("/", 1)
            parts[part][name] = array
        self.model.load_weights(list(parts["adapter"].items()), strict=False)
        self.best = parts["best"]
        self.optimizer.state = tree_unflatten(list(parts["optimizer"].items()))
        self.gradient = parts["gradient"] or None
        high, low = parts["random"]["key"].tolist()
        mx.random.seed(high << 32 | low)  # the state is the seed's two halves
        for name, value in json.loads(about["numbers"]).items():
            setattr(self, name, value)
        return True

    def set_aside(self) -> None:
        """A new run begins: an unfinished one's state is not overwritten but renamed."""
        path = self.folder / "resume.safetensors"
        about = {}
        with suppress(UsageError):  # cut off: nothing can go on from it
            about = saved(path)[1]
        if about:
            at = json.loads(about["numbers"])["iteration"]
            if 0 < at < int(about["iters"]):
                os.replace(path, path.with_name("resume_before.safetensors"))
                rprint(f"{path}: an unfinished run stood at iteration {at}; its state is now resume_before.safetensors")

    def open_log(self) -> None:
        """Begin log.jsonl, or cut off what came after the saved state."""
        path, rows = self.folder / "log.jsonl", []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() and self.iteration else []:
            row = json.loads(line) if line.endswith("}") else {"iteration": math.inf}
            if row["iteration"] <= (self.validated if "val_loss" in row else self.iteration):
                rows.append(line + "\n")
        with replacing(path) as (file,):
            file.write("".join(rows).encode())

    def log(self, row: dict) -> None:
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "seconds": round(self.seconds, 3)}) + "\n")

    def draw(self) -> None:
        """The loss curve of log.jsonl as loss.svg."""
        import matplotlib

        matplotlib.use("svg")
        from matplotlib import pyplot

        rows = [json.loads(line) for line in (self.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        for name, label in (("train_loss", "train"), ("val_loss", "valid")):
            points = [(row["iteration"], row[name]) for row in rows if name in row]
            axes.plot(*zip(*points, strict=True), marker="." if name == "val_loss" else "", label=label) if points else None
        if self.best:
            axes.axvline(self.best_iteration, color="grey", linestyle=":", label=f"best, {self.best_loss:.3f}")
        axes.set(xlabel="iteration", ylabel="loss per answer token, nats", ylim=(0, None))
        axes.legend()
        with replacing(self.folder / "loss.svg") as (file,):
            figure.savefig(file, format="svg")
        pyplot.close(figure)


# ------------------------------------------------------------------------------------------------------------ training


class UI(TrainUI):
    """mlx_lm's, and the time left."""

    def __init__(self, iters: int, done: int, rank: int):
        super().__init__(iters, rank)
        left = TextColumn("[ui.muted]· left[/ui.muted]"), TimeRemainingColumn(compact=True)
        self._progress.columns = (*self._progress.columns, *left)
        self._progress.update(self._task, completed=done)


class Interrupt:
    """Ctrl-C or SIGTERM asks to stop where nothing is lost; a second one stops at once."""

    def __enter__(self):
        self.asked, self.before = False, {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def check(self) -> None:
        """Raise Stopped when any of the machines was asked."""
        asked = self.asked
        if mx.distributed.init().size() > 1:
            asked = mx.distributed.all_sum(mx.array(float(asked)), stream=mx.cpu).item() > 0
        if asked:
            raise Stopped


def evaluate(network: Network, rows: Rows, batch_size: int, n_batches: int, advance=None, check=None) -> float:
    """Mean cross entropy in nats of all answer tokens of n batches, -1 for every row."""
    world = mx.distributed.init()
    network.model.eval()
    total, tokens = mx.array(0.0), 0
    for indices in fixed_batches(rows, batch_size, n_batches):
        count = rows.answer_tokens(indices)
        total += network.loss(*network.batch(rows, indices[world.rank() :: world.size()], tokens=count)) * count
        tokens += count
        mx.eval(total)
        if advance:
            advance()
        if check:
            check()
    network.model.train()
    return mx.distributed.all_sum(total, stream=mx.cpu).item() / tokens


def compiles() -> bool:
    """On a CPU, mx.compile has g++ build every fused kernel, 40 s before the first step, and then gains nothing."""
    return mx.default_device() != mx.cpu


def train(run: Run, network: Network, train_rows: Rows, valid: dict[str, Rows], callback=None) -> None:
    """Train from run.iteration to args.iters, saving on the way. Raises Stopped when interrupted, with everything saved.

    The order within an iteration is: validation of what was saved, step, report, save. So that a run which goes on from
    a save does what the uninterrupted one did.
    """
    args, model, optimizer = run.args, run.model, run.optimizer
    maybe_set_recommended_wired_limit()
    world = mx.distributed.init()
    state = [model.state, optimizer.state, mx.random.state]
    loss_and_gradient = network.value_and_grad()

    def step(batch, gradient, update):
        loss, new = loss_and_gradient(*batch)
        # Each machine has its share of one mean: the sum over them is the whole gradient, the same everywhere.
        new = {name: g * world.size() for name, g in tree_flatten(average_gradients(new))}
        gradient = new if gradient is None else {name: g + gradient[name] for name, g in new.items()}
        if update:
            mean = {name: g / args.grad_accumulation_steps for name, g in gradient.items()}
            optimizer.update(model, tree_unflatten(list(mean.items())))
            gradient = None
        return loss, gradient

    if compiles():
        step = mx.compile(step, inputs=state, outputs=state)
        if not network.why_all:
            part = slice(world.rank(), None, world.size())
            found = survey(train_rows, len(network.prefix), args.batch_size, args.seed, args.iters, part)
            network.shapes = plan(found, weighed(model))

    model.train()
    batches = training_batches(train_rows, args.batch_size, args.seed, run.iteration)
    reported = {"loss": mx.array(0.0), "answers": 0, "seconds": 0.0, "steps": 0}
    with Interrupt() as interrupt, UI(args.iters, run.iteration, world.rank()) as ui:
        try:
            while True:
                at = run.iteration
                due = at % args.steps_per_eval == 0 or at >= args.iters
                if valid and due and run.validated < at:
                    validate(run, network, valid, ui, interrupt.check, callback)
                if at >= args.iters:
                    break
                if args.early_stop and run.without_gain >= args.early_stop:
                    rprint(f"No better valid loss in {run.without_gain} validations, stopped at iteration {at}")
                    break
                start = time.perf_counter()
                indices = next(batches)
                count = train_rows.answer_tokens(indices)
                batch = network.batch(train_rows, indices[world.rank() :: world.size()], tokens=count)
                loss, run.gradient = step(batch, run.gradient, (at + 1) % args.grad_accumulation_steps == 0)
                reported["loss"] += loss * count
                mx.eval(state, reported["loss"], run.gradient)
                if mx.get_cache_memory() > args.clear_cache_threshold:
                    mx.clear_cache()
                seconds = time.perf_counter() - start
                run.iteration, run.seconds, run.tokens = at + 1, run.seconds + seconds, run.tokens + count
                reported["answers"] += count
                reported["steps"] += 1
                reported["seconds"] += seconds
                ui.advance()
                if run.iteration % args.steps_per_report == 0 or run.iteration == args.iters:
                    report(run, reported, ui, callback)
                    reported = {"loss": mx.array(0.0), "answers": 0, "seconds": 0.0, "steps": 0}
                if run.iteration % args.save_every == 0 and world.rank() == 0:
                    run.save()
                    ui.report_save(run.folder / f"{run.iteration:07d}_adapters.safetensors")
                interrupt.check()
        except Stopped:
            if world.rank() == 0:
                run.save()
            raise
    if world.rank() == 0:
        run.save()


def validate(run: Run, network: Network, valid: dict[str, Rows], ui: UI, check, callback) -> None:
    """Score every row of the validation set, and keep the adapter when it is the best so far."""
    args, start, losses = run.args, time.perf_counter(), {}
    for name, rows in valid.items():
        total = len(fixed_batches(rows, args.batch_size, args.val_batches))
        with ui.val_task(total) as advance:
            losses[name] = evaluate(network, rows, args.batch_size, args.val_batches, advance, check)
    took = time.perf_counter() - start
    run.validated, run.valid_loss = run.iteration, losses["val_loss"]
    if run.iteration == 0:
        pass  # nothing was learnt yet, so there is nothing to keep
    elif run.valid_loss < run.best_loss:
        run.best_loss, run.best_iteration, run.best, run.without_gain = run.valid_loss, run.iteration, run.adapter(), 0
    else:
        run.without_gain += 1
    ui.report_val(run.iteration, run.valid_loss, took)
    if "stock_val_loss" in losses:
        rprint(f"        with a pad token as a target of every row, as mlx_lm.lora counts: {losses['stock_val_loss']:.3f}")
    info = {"iteration": run.iteration, **losses, "val_time": round(took, 3)}
    if mx.distributed.init().rank() == 0:
        run.log(info)
    if callback:
        callback.on_val_loss_report(info)


def report(run: Run, since: dict, ui: UI, callback) -> None:
    loss = mx.distributed.all_sum(since["loss"], stream=mx.cpu).item() / since["answers"]
    speed = since["answers"] / since["seconds"]
    ui.report_train(run.iteration, loss, speed, run.tokens)
    info = {
        "iteration": run.iteration,
        "train_loss": loss,
        "learning_rate": run.optimizer.learning_rate.item(),
        "iterations_per_second": round(since["steps"] / since["seconds"], 3),
        "tokens_per_second": round(speed, 3),
        "trained_tokens": run.tokens,
        "peak_memory": mx.get_peak_memory() / 1e9,
    }
    if mx.distributed.init().rank() == 0:
        run.log(info)
    if callback:
        callback.on_train_loss_report(info)


# ------------------------------------------------------------------------------------------------------- command line


def build_parser():
    p = stock.build_parser()
    p.prog, p.usage = "python -m slang.lora", "%(prog)s [flags]; --help lists them"
    p.description = (
        "LoRA finetuning as mlx_lm.lora does it, with the same gradient for less work. Flags and YAML are its own, and:"
    )
    p.add_argument("--resume", action="store_true", default=None, help="Go on from the state saved in --adapter-path.")
    p.add_argument("--keep", choices=["best", "last"], default=None,
                   help="What adapters.safetensors holds: the last (default), or the best by validation loss.")  # fmt: skip
    p.add_argument("--epochs", type=float, metavar="N", help="Passes over the training rows; --iters counts steps and wins.")
    p.add_argument("--decay", action="store_true", default=None,
                   help="Let the learning rate rise over a twentieth of the steps, then fall along a cosine.")  # fmt: skip
    p.add_argument("--everyday", metavar="FILE",
                   help="Chat rows that are trained too, lest the model forget the rest of its language.")  # fmt: skip
    p.add_argument("--early-stop", type=int, metavar="N", help="Stop after N validations without a better loss.")
    p.add_argument("--stock-loss", action="store_true", default=None,
                   help="Report mlx_lm.lora's number too, which counts a pad token as a target of every row.")  # fmt: skip
    p.add_argument("--prompt", metavar="FILE", help="The prompt.toml that the data was made with; a copy goes to the adapter.")
    return p


def parse(argv: list[str] | None) -> types.SimpleNamespace:
    """Flags before YAML before mlx_lm's defaults, as in mlx_lm.lora.main."""
    parser = build_parser()
    args = vars(parser.parse_args(argv))
    config = {}
    if args["config"]:
        rprint("Loading configuration file", args["config"])
        try:
            config = yaml.load(Path(args["config"]).read_text(encoding="utf-8"), stock.yaml_loader)
        except OSError as error:
            raise UsageError(told(error)) from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            line = getattr(error, "problem_mark", None)
            raise UsageError(f"{args['config']}:{line.line + 1 if line else 1}: not valid YAML; mend the line") from None
        if not isinstance(config, dict):
            raise UsageError(f"{args['config']}: no settings in it; write one a line, such as iters: 100")
    ours = {
        "resume": False,
        "keep": "last",
        "early_stop": 0,
        "stock_loss": False,
        "prompt": None,
        "everyday": None,
        "decay": False,
    }
    defaults = {**stock.CONFIG_DEFAULTS, **ours}
    if args["iters"] is None and "iters" not in config and (args["epochs"] or config.get("epochs")):
        del defaults["iters"]  # it follows from the rows, which are still to be read
    for values in (config, defaults):
        args.update({k: v for k, v in values.items() if args.get(k) is None})
    if problem := out_of_range(args):
        parser.error(problem)
    return types.SimpleNamespace(**args)


def out_of_range(args: dict) -> str | None:
    """The first flag, or setting of the YAML file, that no run can have, with what it may be; or None."""
    epochs = args["epochs"]
    if epochs is not None and not (type(epochs) in (int, float) and 0 < epochs < math.inf):
        return f"--epochs {epochs}: give a number above 0, such as 5"
    for name, least in LEAST.items():
        value = args[name]
        if name == "iters" and value is None:
            continue
        if type(value) is not int or value < least or (least == -1 and value == 0) or value >= 2**63:
            all_too = ", or -1 for all" if least == -1 else ""
            return f"--{name.replace('_', '-')} {value}: give a whole number from {max(least, 1 if all_too else 0)}{all_too}"
    rate, lora = args["learning_rate"], args["lora_parameters"]
    if type(rate) not in (int, float) or not 0 < rate < math.inf:
        return f"--learning-rate {rate}: give a number above 0, such as 1e-4"
    if args["fine_tune_type"] != "full" and not (
        isinstance(lora, dict)
        and type(lora.get("rank")) is int
        and lora["rank"] >= 1
        and type(lora.get("scale")) in (int, float)
        and type(lora.get("dropout")) in (int, float)
        and 0 <= lora["dropout"] < 1
    ):
        return f"lora_parameters {lora}: give rank (from 1), scale and dropout (from 0, below 1)"
    return None


def fingerprint(model: nn.Module) -> str:
    """Of the beginning of every weight: another model, or the same after another training, has another."""
    digest = hashlib.sha256()
    for name, weight in tree_flatten(model.parameters()):
        start = weight.reshape(-1)[:256]
        digest.update(f"{name} {weight.shape} {weight.dtype}".encode() + bytes(memoryview(start.view(mx.uint8))))
    return digest.hexdigest()[:16]


def why_all(args, model: nn.Module) -> str | None:
    """Why every position has to be computed, or None."""
    if args.fine_tune_type == "full":
        return "with --fine-tune-type full"
    if not args.mask_prompt:
        return "without --mask-prompt, every token is a target"
    if model.model_type not in ("gemma3_text", "gemma3"):
        return f"{model.model_type} is not Gemma 3"
    return None


def build(args, model: nn.Module) -> dict[str, mx.Dtype]:
    """Freeze the model and give it its adapter, as mlx_lm.lora.train_model; returns the dtype of what is trained."""
    mx.random.seed(args.seed)
    model.freeze()
    if args.num_layers > len(model.layers):
        raise UsageError(f"--num-layers {args.num_layers}: the model has {len(model.layers)}; -1 is all of them")
    if args.fine_tune_type == "full":
        for layer in model.layers[-max(args.num_layers, 0) :]:
            layer.unfreeze()
        args.lora_parameters = None
    else:
        linear_to_lora_layers(model, args.num_layers, args.lora_parameters, use_dora=args.fine_tune_type == "dora")
    if args.resume_adapter_file:
        rprint(f"Loading fine-tuned weights from {args.resume_adapter_file}")
        path = Path(args.resume_adapter_file)
        entries, _ = model_files.header(path, "name an adapters.safetensors")
        if {name: entry["shape"] for name, entry in entries.items()} != {
            name: a.shape for name, a in tree_flatten(model.trainable_parameters())
        }:
            raise UsageError(f"{path}: not an adapter of this model and these settings; give those that it was trained with")
        model.load_weights(str(path), strict=False)
    return {name: a.dtype for name, a in tree_flatten(model.trainable_parameters())}


def trunk_fits(network: Network, sets: list[Rows], args) -> bool:
    """Whether the frozen layers' output is worth keeping (used twice at least) and takes an eighth of memory at most."""
    if not network.start or args.iters * args.batch_size < 2 * len(sets[0]):
        return False
    tokens = sum(len(t) - len(network.prefix) for rows in sets for t in rows.tokens)
    needed = 4 * tokens * network.body.args.hidden_size
    return needed <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 8


def everyday_rows(args, tokenizer) -> ChatDataset | None:
    """The chats of --everyday, with the system prompt that the other rows have: it shall not stand for slang alone.

    Raises UsageError naming the first line that can't be used.
    """
    if not args.everyday:
        return None
    system = [{"role": "system", "content": prompt.load(args.prompt).system}] if args.prompt else []
    chats = []
    for record in jsonl.records(args.everyday):
        if isinstance(record, Problem):
            raise UsageError(str(record))
        messages = [message for message in record[3]["messages"] if message["role"] != "system"]
        chats.append({"messages": system + messages})
    return ChatDataset(chats, tokenizer, mask_prompt=args.mask_prompt)


def rate(args) -> float | Callable:
    """The learning rate, or what it is at each step: that of lr_schedule in the YAML file, or of --decay."""
    if args.lr_schedule:
        return build_schedule(args.lr_schedule)
    if not args.decay:
        return args.learning_rate
    warm = max(1, args.iters // 20)
    end = args.learning_rate / 20
    up = optim.linear_schedule(end, args.learning_rate, warm)
    down = optim.cosine_decay(args.learning_rate, max(1, args.iters - warm), end)
    return optim.join_schedules([up, down], [warm])


def train_model(args, model: nn.Module, train_set, valid_set, everyday_set=None) -> None:
    """Train, save and say what came out; the model then has the adapter of adapters.safetensors."""
    base = fingerprint(model)
    dtypes = build(args, model)
    if mx.default_device() == mx.cpu:
        cpu.to_float32(model)  # MLX multiplies bf16 matrices about 18 times slower on a CPU
    rows = Rows(train_set, args.max_seq_length, "train")
    valid = {"val_loss": Rows(valid_set, args.max_seq_length, "valid")} if len(valid_set) else {}
    everyday = Rows(everyday_set or [], args.max_seq_length, args.everyday)
    n_everyday = min(len(everyday), math.ceil(len(rows) * EVERYDAY))
    rows.add(everyday, n_everyday)
    if args.iters is None:
        args.iters = math.ceil(args.epochs * len(rows) / args.batch_size)
    if not rows.tokens or any(not len(r) for r in valid.values()):
        raise UsageError(f"{args.data}: no row has an answer within --max-seq-length {args.max_seq_length}; raise it")
    network = network_of(model, common_prefix(rows, *valid.values()), why_all(args, model), args.grad_checkpoint)
    if args.stock_loss and valid:
        valid["stock_val_loss"] = Rows(valid_set, args.max_seq_length, "valid", pad=True)

    flags = {k: v for k, v in vars(args).items() if k not in FREE}
    identity = {
        "model": f"{args.model} {base}",
        "train rows": rows.digest(),
        "valid rows": valid["val_loss"].digest() if valid else None,
        "prompt": prompt.load(args.prompt).hash()[:16] if args.prompt else None,
        **json.loads(json.dumps(flags)),
    }
    if args.decay and not args.lr_schedule:
        identity["decay over steps"] = args.iters
    learning_rate = rate(args)
    name = args.optimizer.lower()
    optimizer = OPTIMIZERS[name](learning_rate=learning_rate, **args.optimizer_config.get(name, {}))
    optimizer.init(model.trainable_parameters())
    run = Run(args, model, optimizer, dtypes, identity)
    resumed = args.resume and run.restore()

    leader = mx.distributed.init().rank() == 0
    if leader:
        print_lora_run_header(make_console(), args)
    print_trainable_parameters(model)
    if network.why_all:
        rprint(f"Computing all positions: {network.why_all}")
        if args.grad_checkpoint:
            grad_checkpoint(model.layers[0])
    else:
        passes = args.iters * args.batch_size / len(rows)
        more = f", {n_everyday} of them everyday language" if n_everyday else ""
        rprint(f"{args.iters} steps of {args.batch_size} rows: {passes:.1f} epochs of the {len(rows)} rows{more}")
        rprint(f"{len(rows)} rows share their first {len(network.prefix)} tokens, which are computed once per batch")
        if args.lora_parameters["dropout"]:
            rprint("Dropout: a batch's rows share its noise on the common prefix, with the same gradient on average")
    if not valid:
        rprint("No validation set: the last adapter is kept, and whether it is a good one is not known")
    if resumed:
        rprint(f"Going on from iteration {run.iteration} of {args.iters}")
    if not network.why_all and trunk_fits(network, [rows, *valid.values()][:2], args):
        rprint(f"Keeping the output of {network.start} frozen layers for every row")
        for some in [rows, *valid.values()][:2]:
            network.keep_trunk(some, args.batch_size)
    if leader:
        if not resumed:
            run.set_aside()
        save_config(vars(args).copy(), run.folder / "adapter_config.json")
        if args.prompt:
            shutil.copyfile(args.prompt, run.folder / "prompt.toml")
        run.open_log()
        run.save()
    callback = get_reporting_callbacks(args.report_to, args.project_name, log_dir=args.adapter_path, config=vars(args))
    train(run, network, rows, valid, callback)
    if args.keep == "best":
        model.load_weights(list(run.best.items()), strict=False)
    if leader:
        run.draw()
        speed = f"{run.seconds:.1f} s, {run.tokens / max(run.seconds, 1e-9):,.0f} tokens/s, {run.folder / 'loss.svg'}"
        held = f"{run.folder / 'adapters.safetensors'} holds the {args.keep if run.best else 'last'} one"
        best = f"Best iteration {run.best_iteration} (valid loss {run.best_loss:.3f}), " if run.best else ""
        last = f"last {run.iteration}" + (f" ({run.valid_loss:.3f})" if run.best else "")
        print(f"{best}{last}; {held}; {speed}")


def test_model(args, model: nn.Module, test_set) -> None:
    """As mlx_lm.lora.evaluate_model, every row and no pad token counted."""
    for pad in (False, True)[: 2 if args.stock_loss else 1]:
        rows = Rows(test_set, args.max_seq_length, "test", pad)
        network = network_of(model, common_prefix(rows), why_all(args, model))
        loss = evaluate(network, rows, args.batch_size, args.test_batches)
        rprint(f"Test loss {loss:.3f}, Test ppl {math.exp(loss):.3f}." + (" (a pad token counted in each row)" if pad else ""))


def run(args) -> None:
    if not (args.train or args.test):
        raise UsageError("give --train, --test or both")
    rprint("Loading pretrained model")
    options = {"trust_remote_code": args.trust_remote_code}
    model, tokenizer = load(args.model, tokenizer_config=options, **options)
    rprint("Loading datasets")
    try:
        train_set, valid_set, test_set = load_dataset(args, tokenizer)
    except ValueError as error:
        raise UsageError(f"{args.data}: {error}") from None
    if args.train:
        train_model(args, model, train_set, valid_set, everyday_rows(args, tokenizer))
    elif args.adapter_path != "":
        load_adapters(model, args.adapter_path)
    if mx.default_device() == mx.cpu:
        cpu.to_float32(model)
    if args.test:
        rprint("Testing")
        test_model(args, model, test_set)


def main(argv: list[str] | None = None) -> int:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        args = parse(argv)
        if args.train and mx.distributed.init().rank() == 0:
            with only_run(Path(args.adapter_path)):
                run(args)
        else:
            run(args)
    except (UsageError, UserError, model_files.Unusable) as error:
        if mx.distributed.init().rank() == 0:
            print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(told(error), file=sys.stderr)
        return 1
    except Stopped:
        rprint(f"Stopped, and saved in {args.adapter_path}; the same command with --resume goes on from there", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        rprint("Stopped; --resume goes on from the last save", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
