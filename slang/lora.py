"""mlx_lm.lora with the same gradient for a third of the work, and nothing lost when it stops.

Takes mlx_lm.lora's flags and YAML file, and --resume, --keep, --early-stop, --stock-loss, --prompt. Reads a model and
{train,valid,test}.jsonl; writes into --adapter-path what mlx_lm.lora writes (adapters.safetensors, adapter_config.json,
numbered checkpoints) and resume.safetensors, log.jsonl, loss.svg and the other of best and last adapter.

What is not computed, because the loss does not depend on it:
  the common prefix of all rows (system prompt), once per row: it runs once, and every row attends to its keys and values;
  logits where no answer is predicted: Gemma 3's vocabulary of 262,144 costs more there than all the layers of the 270M model;
  padding: rows of like length go together, and are padded to a multiple of 8 instead of 32;
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
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import yaml
from mlx.nn.utils import average_gradients
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm import lora as stock
from mlx_lm.cli_ui import TrainUI, make_console, print_lora_run_header, rprint
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.gemma3_text import clip_residual
from mlx_lm.tuner.callbacks import get_reporting_callbacks
from mlx_lm.tuner.datasets import load_dataset
from mlx_lm.tuner.trainer import grad_checkpoint
from mlx_lm.tuner.utils import build_schedule, linear_to_lora_layers, load_adapters, print_trainable_parameters
from mlx_lm.utils import load, maybe_set_recommended_wired_limit, save_config
from rich.progress import TextColumn, TimeRemainingColumn

from slang import jsonl, prompt

PAD_TO = 8  # tokens; every new length is traced by mx.compile once
CHUNK = 32  # batches that are sorted by length together
LOGITS = 2**25  # computed at a time: 128 answer tokens with Gemma 3's vocabulary, 134 MB
OPTIMIZERS = {"adam": optim.Adam, "adamw": optim.AdamW, "muon": optim.Muon, "sgd": optim.SGD, "adafactor": optim.Adafactor}
# Flags that may change between a run and its --resume; with any other the result would be another one.
FREE = {"adapter_path", "clear_cache_threshold", "config", "data", "early_stop", "iters", "keep", "model", "project_name",
        "prompt", "report_to", "resume", "save_every", "steps_per_report", "stock_loss", "test", "test_batches", "train",
        "trust_remote_code"}  # fmt: skip


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

    def prefix(self) -> list[int]:
        """The tokens that all rows begin with; each row keeps at least one before its answer."""
        low, high = min(self.tokens), max(self.tokens)
        common = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
        return list(low[: min(common, min(self.starts) - 1)])

    def answer_tokens(self, rows) -> int:
        return sum(len(self.tokens[i]) - self.starts[i] for i in rows)

    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.tokens, self.starts]).encode()).hexdigest()[:16]


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
        packed, kept, answers, targets = [*self.prefix], [*range(n)], [], []
        longest = max([len(rows.tokens[i]) - 1 - n for i in indices], default=1)
        place = np.full((max(len(indices), 1), round_up(longest)), n)
        back = []
        for row, i in enumerate(indices):
            length, at = len(rows.tokens[i]) - 1 - n, len(packed)
            place[row, :length] = range(at, at + length)
            back += range(row * place.shape[1], row * place.shape[1] + length)
            answers += range(at + rows.starts[i] - 1 - n, at + length)
            targets += rows.tokens[i][rows.starts[i] :]
            packed += rows.tokens[i][n:-1]
            if rows.trunk is not None:
                kept += range(rows.trunk_starts[i], rows.trunk_starts[i] + length)
        weights = [1 / (tokens or len(targets))] * len(targets)

        def array(values: list, size: int, dtype: mx.Dtype = mx.int32) -> mx.array:
            return mx.array(values + [0] * (size - len(values)), dtype)

        size, n_answers = max(round_up(len(packed)), n + PAD_TO), max(round_up(len(answers)), PAD_TO)
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
        return clip_residual(h, layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(h))))

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

    def keep_trunk(self, rows: Rows, batch_size: int) -> None:
        """Compute the frozen layers' output of every row, to be used from now on."""
        n, order = len(self.prefix), sorted(range(len(rows)), key=lambda i: len(rows.tokens[i]))
        parts, starts, total = [], np.zeros(len(rows), np.int64), n
        for at in range(0, len(order), batch_size):
            indices = order[at : at + batch_size]
            _, packed, place, back, *_ = self.batch(rows, indices)
            x = self.layers(self.embed(packed), place, back, 0, self.start)
            lengths = [len(rows.tokens[i]) - 1 - n for i in indices]
            starts[indices] = total + np.cumsum([0, *lengths[:-1]])
            total += sum(lengths)
            parts.append(x[(n if parts else 0) : n + sum(lengths)])
            mx.eval(parts[-1])
        rows.trunk, rows.trunk_starts = mx.concatenate(parts), starts
        mx.eval(rows.trunk)


def round_up(n: int) -> int:
    return -(-n // PAD_TO) * PAD_TO


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
