"""A model's loss over packed batches, computed by MLX.

What is not computed, because the loss does not depend on it:
  the common prefix of all rows (system prompt), once per row: it runs once, and every row attends
    to its keys and values;
  logits where no answer is predicted: Gemma 3's vocabulary of 262,144 costs more there than all the
    layers of the 270M model;
  padding: rows of like length go together, end to end;
  layers below the first adapter, after the first time: their output is kept for every row, where
    memory allows.
The pad token after each row, which mlx_lm.lora counts as a target, is none here.
"""

import math
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.gemma3_text import clip_residual

from slang.train.batches import Rows
from slang.train.packed import PackedBatch, batch_arrays
from slang.train.shapes import Sizes

Batch = Any  # what a network's `batch` makes, for its own `loss` alone
LOGITS_AT_A_TIME = 2**25  # 128 answer tokens with Gemma 3's vocabulary, 134 MB an array


def learns(module: nn.Module) -> bool:
    """Whether anything in it is trained."""
    return bool(tree_flatten(module.trainable_parameters()))


class PlainNetwork:
    """The loss by way of the model itself: every position is computed, and nothing is shared."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.prefix: list[int] = []
        self.start = 0  # the first layer with an adapter
        self.shapes: dict[Sizes, Sizes] = {}  # what batches are padded to, where that is planned

    def batch(self, rows: Rows, indices: list[int], answer_tokens: int | None = None) -> Batch:
        """The arrays of these rows; see batch_arrays."""
        return batch_arrays(self.prefix, rows, indices, answer_tokens, self.shapes)

    def loss(self, batch: Batch) -> mx.array:
        """Weighted sum of the answer tokens' cross entropy: of a batch of `batch`, its mean in
        nats."""
        batch = PackedBatch(*batch)  # mx.compile hands it on as a plain tuple
        logits = self.model(batch.tokens[batch.grid])
        logits = logits.reshape(-1, logits.shape[-1])[batch.cells][batch.answers]
        losses = nn.losses.cross_entropy(logits.astype(mx.float32), batch.targets)
        return (losses * batch.weights).sum()

    def value_and_grad(self):
        """The function that gives loss and gradients of a batch."""
        return nn.value_and_grad(self.model, self.loss)


class Network(PlainNetwork):
    """The prefix once, then the rows side by side, through every linear layer together."""

    def __init__(self, model: nn.Module, prefix: list[int], checkpoint: bool = False):
        """`checkpoint` keeps the input of each layer only, and computes the rest again (less
        memory)."""
        super().__init__(model)
        self.prefix = prefix
        self.checkpoint = checkpoint
        text = getattr(model, "language_model", model)
        self.body = text.model
        embedding = self.body.embed_tokens
        head = embedding if text.tie_word_embeddings else text.lm_head
        self.head = embedding.as_linear if text.tie_word_embeddings else head
        self.head_learns = learns(head)
        if not learns(embedding):
            found = [learns(layer) for layer in self.body.layers]
            self.start = found.index(True) if any(found) else len(found)

    def loss(self, batch: Batch) -> mx.array:
        batch = PackedBatch(*batch)
        x = batch.frozen
        if x.size == 0:
            x = self.layers(self.embed(batch.tokens), batch, 0, self.start)
        n_layers = len(self.body.layers)
        x = self.layers(x, batch, self.start, n_layers, batch.answers)
        hidden = self.body.norm(x if self.start < n_layers else x[batch.answers])
        if self.head_learns:
            logits = self.head(hidden).astype(mx.float32)
            return (nn.losses.cross_entropy(logits, batch.targets) * batch.weights).sum()
        vocabulary, training = self.body.vocab_size, self.model.training
        return frozen_head_loss(
            self.head, hidden, batch.targets, batch.weights, vocabulary, training
        )

    def embed(self, tokens: mx.array) -> mx.array:
        h = self.body.embed_tokens(tokens)
        return h * mx.array(self.body.args.hidden_size**0.5, mx.bfloat16).astype(h.dtype)

    def layers(
        self, x: mx.array, batch: PackedBatch, first: int, last: int, answers=None
    ) -> mx.array:
        """Layers first..last-1 of gemma3_text.Gemma3Model; with `answers`, the model's last layer
        gives those places only."""
        for i in range(first, last):
            layer = self.body.layers[i]
            wanted = answers if i == len(self.body.layers) - 1 else None
            if self.checkpoint and learns(layer):
                again = mx.checkpoint(partial(self._with_parameters, layer, batch, wanted))
                x = again(layer.trainable_parameters(), x)
            else:
                x = self._layer(layer, batch, wanted, x)
        return x

    def _with_parameters(self, layer, batch, wanted, parameters, x):
        layer.update(parameters)
        return self._layer(layer, batch, wanted, x)

    def _layer(
        self, layer: nn.Module, batch: PackedBatch, wanted: mx.array | None, x: mx.array
    ) -> mx.array:
        r = self._attention(layer.self_attn, layer.input_layernorm(x), batch)
        if wanted is not None:
            r = r[wanted]
            x = x[wanted]
        r = layer.self_attn.o_proj(r)
        h = clip_residual(x, layer.post_attention_layernorm(r))
        y = layer.pre_feedforward_layernorm(h)
        mlp = layer.mlp
        r = mlp.down_proj(gelu(mlp.gate_proj(y)) * mlp.up_proj(y))
        return clip_residual(h, layer.post_feedforward_layernorm(r))

    def _attention(self, attention: nn.Module, x: mx.array, batch: PackedBatch) -> mx.array:
        """gemma3_text.Attention but for o_proj: the prefix sees itself, each row the prefix and
        itself."""
        n, rows = len(self.prefix), len(batch.grid)
        window = self.body.window_size if attention.is_sliding else None

        def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            new, seen = q.shape[2], k.shape[2]
            mask = "causal"
            if window is not None and seen > window:
                mask = create_causal_mask(new, seen - new, window)
            out = mx.fast.scaled_dot_product_attention(q, k, v, scale=attention.scale, mask=mask)
            return out.transpose(0, 2, 1, 3).reshape(-1, out.shape[1] * out.shape[3])

        def heads(y: mx.array, count: int, norm=None) -> tuple[mx.array, mx.array]:
            """(of the prefix, of the rows), (rows, heads, tokens, dim) each; turned by their
            positions where they are normalised."""
            y = y.reshape(len(x), count, -1)
            y = norm(y) if norm else y
            of_prefix = y[None, :n].transpose(0, 2, 1, 3)
            of_rows = y[batch.grid].transpose(0, 2, 1, 3)
            if norm:
                return attention.rope(of_prefix), attention.rope(of_rows, offset=n)
            return of_prefix, of_rows

        queries = heads(attention.q_proj(x), attention.n_heads, attention.q_norm)
        keys = heads(attention.k_proj(x), attention.n_kv_heads, attention.k_norm)
        values = heads(attention.v_proj(x), attention.n_kv_heads)
        if not n:
            return attend(queries[1], keys[1], values[1])[batch.cells]

        def behind_prefix(pair: tuple[mx.array, mx.array]) -> mx.array:
            of_prefix = mx.broadcast_to(pair[0], (rows, *pair[0].shape[1:]))
            return mx.concatenate([of_prefix, pair[1]], axis=2)

        of_prefix = attend(queries[0], keys[0], values[0])
        of_rows = attend(queries[1], behind_prefix(keys), behind_prefix(values))
        return mx.concatenate([of_prefix, of_rows[batch.cells]])

    def frozen_output(self, rows: Rows, indices: list[int]) -> mx.array:
        """The output of the layers below the first adapter: the prefix's, then the rows',
        (tokens, hidden)."""
        batch = self.batch(rows, indices)
        return self.layers(self.embed(batch.tokens), batch, 0, self.start)

    def keep_frozen(self, rows: Rows, batch_size: int) -> None:
        """Compute the frozen layers' output of every row, to be used from now on."""
        n = len(self.prefix)
        order = sorted(range(len(rows)), key=lambda i: len(rows.tokens[i]))
        parts: list[mx.array] = []
        starts = np.zeros(len(rows), np.int64)
        total = n
        for at in range(0, len(order), batch_size):
            indices = order[at : at + batch_size]
            x = self.frozen_output(rows, indices)
            lengths = [len(rows.tokens[i]) - 1 - n for i in indices]
            starts[indices] = total + np.cumsum([0, *lengths[:-1]])
            total += sum(lengths)
            parts.append(x[(n if parts else 0) : n + sum(lengths)])
            mx.eval(parts[-1])
        rows.frozen = mx.concatenate(parts)
        rows.frozen_starts = starts
        mx.eval(rows.frozen)


def gelu(x: mx.array) -> mx.array:
    """nn.gelu_approx, its (1 + tanh z) / 2 written as sigmoid(2 z): its derivative needs no second
    tanh, 20 ns on a CPU."""
    return x * mx.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))


def frozen_head_loss(
    head, hidden: mx.array, targets: mx.array, weights: mx.array, vocabulary: int, training: bool
) -> mx.array:
    """Weighted cross entropy of head(hidden), its gradient computed along with it: one exp per
    logit, no logits kept.

    Only for a head without an adapter. On a CPU the second exp that autograd needs costs as much as
    a matrix product.
    """
    parts = -(-len(targets) * vocabulary // LOGITS_AT_A_TIME)
    size = -(-len(targets) // parts)
    total, before = mx.array(0.0), None
    for at in range(0, len(targets), size):
        h, t, w = (a[at : at + size] for a in (hidden, targets, weights))
        frozen = mx.stop_gradient(h)
        if before is not None:  # one part after the other, for memory's sake
            frozen = mx.depends([frozen], [before])[0]
        logits = mx.stop_gradient(head(frozen).astype(mx.float32))
        top = logits.max(axis=-1, keepdims=True)
        exp = mx.exp(logits - top)
        sums = exp.sum(axis=-1)
        of_targets = mx.take_along_axis(logits, t[:, None], axis=-1)[:, 0]
        before = ((mx.log(sums) + top[:, 0] - of_targets) * w).sum()
        total = total + before
        if training:
            # d loss / d logits = (exp / sum - onehot) * weight. What is constant in a row waits
            # until the row is short.
            away = exp.at[mx.arange(len(t)), t].add(-sums).astype(h.dtype)
            slope = mx.vjp(head, [frozen], [away])[1][0] * (w / sums)[:, None]
            slope = before = mx.stop_gradient(slope.astype(h.dtype))
            total = total + ((h - mx.stop_gradient(h)).astype(mx.float32) * slope).sum()
    return total
