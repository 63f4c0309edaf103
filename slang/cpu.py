"""The loss of packed rows and its gradient on a CPU: Gemma 3 forward and backward in numpy, for
LoRA on frozen weights.

MLX's CPU kernels for everything but products take 13 to 18 ns an entry (exp, sigmoid, max, sums),
numpy's 0.1 to 0.4. So slang/lora.py, on a CPU, computes with this file what its Network computes
with MLX elsewhere. Products are OpenBLAS's, as numpy brings it, with as many threads as
OPENBLAS_NUM_THREADS says. Everything is float32.

Shapes, in all of the file:

    tokens   packed tokens: the common prefix once, then the rows end to end, without padding
    hidden   the model's width, 640 in Gemma 3 270M
    heads    query heads, of `dim` entries each
    groups   key and value heads, of which each serves heads / groups query heads

What goes forward keeps what goes back will need, in `kept`, a list that is taken apart from its
end.
"""

import ctypes
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear

CHUNK = 2048  # vocabulary entries at a time: 512 KB of logits of 64 answers, which stay in cache
LEAST = np.float32(-87)  # below it exponentials are denormal, and products 150 times slower
ROOM = 16  # tokens that are made room for at a time, where rows go on
BLOCK = 2**17  # entries of an elementwise pass, 512 KB: `gelu_product` makes 17 passes in cache
THREADS = int(os.environ.get("OPENBLAS_NUM_THREADS") or os.cpu_count() or 1)


def view(a: mx.array) -> np.ndarray:
    """The same memory as a numpy array, float32."""
    return np.array(a, copy=False)


def over_rows(work, rows: int, width: int) -> None:
    """Call work(slice) for parts of the rows that stay in cache, on as many threads as products
    have.
    """
    height = max(1, BLOCK // max(width, 1))
    parts = [slice(at, min(at + height, rows)) for at in range(0, rows, height)]
    if THREADS == 1 or len(parts) == 1:
        for part in parts:
            work(part)
    else:
        list(pool().map(work, parts))


@cache
def pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, initializer=partial(np.seterr, all="ignore"))


def keep_memory() -> None:
    """Have glibc keep what a step frees for the next one: given back and fetched anew, 250 MB a
    step of 16 rows take 0.1 s.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):
            # M_MMAP_THRESHOLD: below 32 MB, the most there is, memory comes from the heap.
            library.mallopt(-3, 2**25)
            # M_TRIM_THRESHOLD: the heap shrinks when a GB at its end is free.
            library.mallopt(-1, 2**30)


def to_float32(model: nn.Module) -> None:
    """Convert one module after the other: the 270M model then takes 1.2 GB at most on the way, not
    1.6.
    """
    for _, module in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module):
        module.set_dtype(mx.float32)
        mx.eval(module.parameters())
    model.set_dtype(mx.float32)  # an adapter's own weights
    mx.clear_cache()


def why_not(model: nn.Module) -> str | None:
    """Why this file can't compute the model, or None."""
    if model.model_type not in ("gemma3_text", "gemma3"):
        return f"{model.model_type} is not Gemma 3"
    text = getattr(model, "language_model", model)
    body = text.model
    head = text.get("lm_head", {})
    weights = [module for _, module in model.named_modules() if "weight" in module]
    adapters = [module for _, module in model.named_modules() if "lora_a" in module]
    if any(type(module) is not LoRALinear for module in adapters):
        return "an adapter that is not plain LoRA on a linear layer"
    if "lora_a" in body.embed_tokens or "lora_a" in head:
        return "an adapter on the embedding or the head"
    if any(module.dropout._p_1 < 1 for module in adapters):
        return "dropout"
    if any("bias" in module or "scales" in module for module in weights):
        return "quantised weights, or weights with a bias"
    if any(a.dtype != mx.float32 for _, a in tree_flatten(model.parameters())):
        return "weights that are not float32"
    return None


# ---------------------------------------------------------------------------------------- batches


@dataclass
class Row:
    """Tokens that follow one another: where they are in `packed`, and where all that comes before
    them is.

    The common prefix is a row that nothing comes before. The rows of an answer's choices come after
    their question's row.
    """

    place: slice
    before: tuple[slice, ...] = ()

    @property
    def offset(self) -> int:
        """The position of the row's first token."""
        return sum(part.stop - part.start for part in self.before)

    def positions(self) -> np.ndarray:
        """Of each of its tokens."""
        return self.offset + np.arange(self.place.stop - self.place.start)

    def of(self, a: np.ndarray) -> np.ndarray:
        """What the row sees of a (tokens, ...): all before it, and itself."""
        return np.concatenate([a[part] for part in (*self.before, self.place)])


@dataclass
class Batch:
    """Rows to compute.

    packed   token ids, (tokens,)
    x        what the frozen layers make of them, (tokens, hidden), or None where it is not kept
    rows     every token is in one of them
    answers  where in packed an answer's token is predicted, (answers,); targets is that token
    weights  what each of the answers counts in the loss, (answers,)
    """

    packed: np.ndarray
    x: np.ndarray | None
    rows: list[Row]
    answers: np.ndarray
    targets: np.ndarray
    weights: np.ndarray | None = None


# -------------------------------------------------------------------------- parts, there and back


class Linear:
    """y = x W' + scale (x A) B, W frozen."""

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name = module, name
        self.learns = "lora_a" in module
        self.weight = view((module.linear if self.learns else module).weight)  # (out, in)

    def adapter(self) -> tuple[np.ndarray, np.ndarray, np.float32]:
        """A (in, rank), B (rank, out) as they are at this step, and the scale."""
        return view(self.module.lora_a), view(self.module.lora_b), np.float32(self.module.scale)

    def forward(self, x: np.ndarray) -> np.ndarray:
        y = x @ self.weight.T
        if self.learns:
            a, b, scale = self.adapter()
            y += (scale * (x @ a)) @ b
        return y

    def backward(self, x: np.ndarray, dy: np.ndarray, gradients: dict) -> np.ndarray:
        """The gradient of x from that of y; those of A and B go into `gradients`."""
        dx = dy @ self.weight
        if self.learns:
            a, b, scale = self.adapter()
            dz = scale * (dy @ b.T)
            gradients[f"{self.name}.lora_a"] = x.T @ dz
            gradients[f"{self.name}.lora_b"] = scale * ((x @ a).T @ dy)
            dx += dz @ a.T
        return dx


class Norm:
    """Root mean square norm over the last axis, times scale; its weight is stored less 1."""

    def __init__(self, module: nn.Module, scale: float = 1):
        self.weight = (1 + view(module.weight)) * np.float32(scale)
        self.eps = np.float32(module.eps)

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """(y, what backward needs)."""
        y, unit = np.empty_like(x), np.empty_like(x)
        factor = np.empty((*x.shape[:-1], 1), np.float32)
        size = np.float32(1 / x.shape[-1])

        def work(part: slice) -> None:
            squares = np.einsum("...i,...i->...", x[part], x[part])[..., None]
            np.divide(1, np.sqrt(squares * size + self.eps), out=factor[part])
            np.multiply(x[part], factor[part], out=unit[part])
            np.multiply(unit[part], self.weight, out=y[part])

        over_rows(work, len(x), x[:1].size)
        return y, (unit, factor)

    def backward(self, kept: tuple[np.ndarray, np.ndarray], dy: np.ndarray) -> np.ndarray:
        unit, factor = kept
        dx = np.empty_like(dy)
        size = np.float32(1 / dy.shape[-1])

        def work(part: slice) -> None:
            d = np.multiply(dy[part], self.weight, out=dx[part])
            d -= unit[part] * (np.einsum("...i,...i->...", d, unit[part])[..., None] * size)
            d *= factor[part]

        over_rows(work, len(dy), dy[:1].size)
        return dx


def angles(rope: nn.Module, dim: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of each position's angles, (tokens, 1, dim / 2) each, whatever the kind of
    rotary embedding.

    A head of ones and then zeros, turned, is cosines and then sines.
    """
    half = mx.ones((1, 1, int(positions.max(initial=0)) + 1, dim // 2))
    turned = view(rope(mx.concatenate([half, mx.zeros_like(half)], axis=-1)))[0, 0, positions, None]
    return turned[..., : dim // 2], turned[..., dim // 2 :]


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Each head of x (tokens, heads, dim) turned by its token's angles, its first half against the
    second.

    With -sin it is turned back, which is what the gradient needs.
    """
    half = x.shape[-1] // 2
    out = np.empty_like(x)

    def work(part: slice) -> None:
        first, second = x[part, :, :half], x[part, :, half:]
        y, c, s = out[part], cos[part], sin[part]
        np.multiply(first, c, out=y[..., :half])
        np.multiply(second, c, out=y[..., half:])
        y[..., :half] -= second * s
        y[..., half:] += first * s

    over_rows(work, len(x), x[:1].size)
    return out


def gelu_product(gate: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """gelu(gate) * up, and its derivatives by up and by gate; (tokens, inner) each, in the memory
    of gate and up.

    gelu(g) = g h, where h = (1 + tanh(g (c + k g g))) / 2; its derivative is h + 2 g h (1 - h) (c +
    3 k g g).
    """
    c = np.float32(math.sqrt(2 / math.pi))
    k = np.float32(0.044715) * c
    by_up = np.empty_like(gate)

    def work(part: slice) -> None:
        g, u, gelu = gate[part], up[part], by_up[part]
        square = g * g
        h = square * k
        h += c
        h *= g
        np.tanh(h, out=h)
        h += 1
        h *= np.float32(0.5)
        np.multiply(g, h, out=gelu)
        square *= 6 * k
        square += 2 * c
        square *= gelu
        square *= 1 - h
        square += h
        np.multiply(square, u, out=g)
        u *= gelu

    over_rows(work, len(gate), gate.shape[1])
    return up, by_up, gate


class Attention:
    """Softmax attention of packed rows, each of which sees what comes before it and itself.

    window  how many tokens a query sees, its own included; None for all before it
    """

    def __init__(self, rows: list[Row], window: int | None):
        self.rows = [row for row in rows if row.place.stop > row.place.start]
        self.hidden = [mask(row.positions(), window) for row in self.rows]

    def forward(self, q, k, v) -> tuple[np.ndarray, list[np.ndarray]]:
        """(output (tokens, heads, dim), what backward needs) of q, which is scaled, (tokens, heads,
        dim) and k, v (tokens, groups, dim)."""
        out, shares = np.empty_like(q), []
        for row, hidden in zip(self.rows, self.hidden, strict=True):
            all_keys, all_values = row.of(k), row.of(v)
            for group, heads in enumerate(groups_of(q, k)):
                queries, keys = flat(q[row.place, heads]), all_keys[:, group]
                size = heads.stop - heads.start
                scores = (queries @ keys.T).reshape(len(hidden), size, len(keys))
                scores += hidden
                softmax(scores)
                shares.append(scores.reshape(len(queries), len(keys)))
                seen = shares[-1] @ all_values[:, group]
                out[row.place, heads] = seen.reshape(len(hidden), size, q.shape[2])
        return out, shares

    def backward(self, q, k, v, shares, dout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The gradients of q, k and v from that of the output."""
        dq, dk, dv = np.empty_like(q), np.zeros_like(k), np.zeros_like(v)
        left = iter(shares)
        for row in self.rows:
            all_keys, all_values = row.of(k), row.of(v)
            for group, heads in enumerate(groups_of(q, k)):
                queries, d = flat(q[row.place, heads]), flat(dout[row.place, heads])
                share = next(left)
                dscores = d @ all_values[:, group].T
                dscores -= np.einsum("ij,ij->i", dscores, share)[:, None]
                dscores *= share
                back = dscores @ all_keys[:, group]
                dq[row.place, heads] = back.reshape(dq[row.place, heads].shape)
                for total, part in ((dk, dscores.T @ queries), (dv, share.T @ d)):
                    for place in (*row.before, row.place):
                        length = place.stop - place.start
                        total[place, group] += part[:length]
                        part = part[length:]
        return dq, dk, dv


def mask(positions: np.ndarray, window: int | None) -> np.ndarray:
    """(queries, 1, keys): 0 where the query of a position sees the key, which are all up to the
    last; else minus infinity.
    """
    keys = np.arange(positions.max() + 1)
    seen = keys <= positions[:, None]
    if window:
        seen &= keys > positions[:, None] - window
    return np.where(seen, np.float32(0), np.float32(-np.inf))[:, None]


def groups_of(q: np.ndarray, k: np.ndarray) -> list[slice]:
    """Which of q's heads each of k's serves."""
    size = q.shape[1] // k.shape[1]
    return [slice(at, at + size) for at in range(0, q.shape[1], size)]


def flat(a: np.ndarray) -> np.ndarray:
    """(tokens, heads, dim) as (tokens * heads, dim)."""
    return a.reshape(-1, a.shape[-1])


def softmax(scores: np.ndarray) -> None:
    """Over the last axis, in place."""
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)


class Layer:
    """One gemma3_text.TransformerBlock."""

    def __init__(self, layer: nn.Module, names: dict[int, str]):
        attention, mlp = layer.self_attn, layer.mlp

        def linear(module: nn.Module) -> Linear:
            return Linear(module, names[id(module)])

        self.q, self.k, self.v = map(linear, (attention.q_proj, attention.k_proj, attention.v_proj))
        self.o = linear(attention.o_proj)
        self.gate, self.up, self.down = map(linear, (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self.q_norm = Norm(attention.q_norm, attention.scale)  # rather than one more pass
        self.k_norm = Norm(attention.k_norm)
        norms = (
            layer.input_layernorm,
            layer.post_attention_layernorm,
            layer.pre_feedforward_layernorm,
            layer.post_feedforward_layernorm,
        )
        self.norms = [Norm(norm) for norm in norms]
        self.rope = attention.rope
        self.heads, self.groups = attention.n_heads, attention.n_kv_heads
        self.dim = attention.head_dim
        self.sliding = attention.is_sliding

    def forward(self, x, attention: Attention, table, pick) -> tuple[np.ndarray, tuple]:
        """(output, what backward needs) of x (tokens, hidden); with `pick`, the output of those
        tokens only.
        """
        q, k, v, before = self.ask(x, table)
        seen, shares = attention.forward(q, k, v)
        seen = seen.reshape(len(x), self.heads * self.dim)
        if pick is not None:
            seen, x = seen[pick], x[pick]
        out, after = self.answer(x, seen)
        return out, (*before, (q, k, v, shares), seen, *after)

    def ask(self, x: np.ndarray, table) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple]:
        """Queries, scaled, keys and values, (tokens, heads or groups, dim), and what backward
        needs.
        """
        y, at_input = self.norms[0].forward(x)
        q, at_q = self.q_norm.forward(self.q.forward(y).reshape(len(x), self.heads, self.dim))
        k, at_k = self.k_norm.forward(self.k.forward(y).reshape(len(x), self.groups, self.dim))
        v = self.v.forward(y).reshape(len(x), self.groups, self.dim)
        q, k = rotated(q, *table), rotated(k, *table)
        return q, k, v, (y, at_input, at_q, at_k)

    def answer(self, x: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, tuple]:
        """(output, what backward needs) from the layer's input and what attention saw, (tokens,
        heads * dim).
        """
        r, at_attention = self.norms[1].forward(self.o.forward(seen))
        h = x + r
        z, at_mlp = self.norms[2].forward(h)
        product = gelu_product(self.gate.forward(z), self.up.forward(z))
        r, at_output = self.norms[3].forward(self.down.forward(product[0]))
        r += h
        return r, (at_attention, z, at_mlp, product, at_output)

    def backward(self, kept: tuple, attention: Attention, table, pick, d, gradients) -> np.ndarray:
        """The gradient of x from that of the output; those of the adapters go into `gradients`."""
        y, at_input, at_q, at_k, seen_by, seen, *after = kept
        at_attention, z, at_mlp, (product, by_up, by_gate), at_output = after
        cos, sin = table
        r = self.down.backward(product, self.norms[3].backward(at_output, d), gradients)
        by_up *= r
        by_gate *= r
        r = self.up.backward(z, by_up, gradients)
        r += self.gate.backward(z, by_gate, gradients)
        d = d + self.norms[2].backward(at_mlp, r)
        r = self.o.backward(seen, self.norms[1].backward(at_attention, d), gradients)
        if pick is not None:
            d, r = spread(d, pick, len(y)), spread(r, pick, len(y))
        dq, dk, dv = attention.backward(*seen_by, r.reshape(len(y), self.heads, self.dim))
        dq = self.q_norm.backward(at_q, rotated(dq, cos, -sin))
        dk = self.k_norm.backward(at_k, rotated(dk, cos, -sin))
        r = self.q.backward(y, dq.reshape(len(y), self.heads * self.dim), gradients)
        r += self.k.backward(y, dk.reshape(len(y), self.groups * self.dim), gradients)
        r += self.v.backward(y, dv.reshape(len(y), self.groups * self.dim), gradients)
        d += self.norms[0].backward(at_input, r)
        return d


def spread(picked: np.ndarray, pick: np.ndarray, tokens: int) -> np.ndarray:
    """(tokens, hidden), 0 but for the picked rows."""
    out = np.zeros((tokens, picked.shape[1]), np.float32)
    out[pick] = picked
    return out


def cross_entropy(hidden: np.ndarray, head: np.ndarray, targets: np.ndarray,
                  slope: bool = False) -> tuple[np.ndarray, np.ndarray | None]:  # fmt: skip
    """-log softmax(hidden head')[target] of each answer, in nats, and with `slope` its gradient by
    hidden (answers, hidden).

    head is (vocabulary, hidden). It is gone through once, a part at a time, and no logits are kept:
    sums of exponentials and the part of the gradient that they weigh are kept relative to the
    largest logit so far ("online softmax", Milakov and Gimelshein, arXiv 1805.02867). Parts are
    more exact, too: MLX adds up 262,144 exponentials in one float32, which puts a loss of 6.0816 at
    6.0812, and mlx_lm's gradient 9e-3 off.
    """
    answers = len(hidden)
    # OpenBLAS is at its best with 16 columns at a time: 76 answers took 0.59 s, 80 take 0.54.
    across = np.zeros((hidden.shape[1], -(-answers // 16) * 16), np.float32)
    across[:, :answers] = hidden.T
    top = np.full(across.shape[1], -np.inf, np.float32)
    sums = np.zeros(across.shape[1], np.float32)
    mean = np.zeros_like(across)
    for at in range(0, len(head), CHUNK):
        part = head[at : at + CHUNK]
        logits = part @ across
        higher = np.maximum(top, logits.max(axis=0))
        shrink = np.exp(top - higher)
        top = higher
        logits -= top
        np.maximum(logits, LEAST, out=logits)
        np.exp(logits, out=logits)
        sums = sums * shrink + np.ones(len(part), np.float32) @ logits
        if slope:
            mean *= shrink
            mean += part.T @ logits
    right = head[targets]
    total = (np.log(sums) + top)[:answers]
    losses = total - np.einsum("ij,ij->i", hidden, right)
    return losses, (mean / sums).T[:answers] - right if slope else None


def likeliest(hidden: np.ndarray, head: np.ndarray) -> np.ndarray:
    """The token with the largest logit after each of hidden (rows, hidden); 0 where none is a
    number.
    """
    best, token = np.full(len(hidden), -np.inf, np.float32), np.zeros(len(hidden), int)
    rows = np.arange(len(hidden))
    for at in range(0, len(head), CHUNK):
        logits = hidden @ head[at : at + CHUNK].T
        here = logits.argmax(axis=1)
        higher = logits[rows, here] > best
        best[higher], token[higher] = logits[rows, here][higher], at + here[higher]
    return token


# -------------------------------------------------------------------------------------- the whole


class Step:
    """Loss and gradient of a model's adapter.

    The layers below `start` have no adapter: nothing goes back through them.
    """

    def __init__(self, model: nn.Module, start: int = 0):
        keep_memory()
        text = getattr(model, "language_model", model)
        names = {id(module): name for name, module in model.named_modules()}
        self.start, self.window = start, text.model.window_size
        self.embedding = view(text.model.embed_tokens.weight)
        self.head = self.embedding if text.tie_word_embeddings else view(text.lm_head.weight)
        # mlx_lm's factor, which is rounded to bfloat16.
        self.factor = np.float32(mx.array(text.model.args.hidden_size**0.5, mx.bfloat16).item())
        self.layers = [Layer(layer, names) for layer in text.model.layers]
        self.norm = Norm(text.model.norm)
        # gemma3_text has one rotary embedding for the sliding layers, one for the others.
        self.ropes = {layer.sliding: layer.rope for layer in self.layers}

    def tables(self, positions: np.ndarray) -> dict[bool, tuple[np.ndarray, np.ndarray]]:
        """Cosines and sines of the positions, for sliding layers and for others."""
        dim = self.layers[0].dim
        return {sliding: angles(rope, dim, positions) for sliding, rope in self.ropes.items()}

    def surroundings(self, batch: Batch) -> list[tuple[Attention, tuple[np.ndarray, np.ndarray]]]:
        """For each layer, who sees whom, and the table of angles."""
        positions = np.zeros(len(batch.packed), int)
        for row in batch.rows:
            positions[row.place] = row.positions()
        tables = self.tables(positions)
        windows = {True: self.window, False: None}
        attention = {sliding: Attention(batch.rows, windows[sliding]) for sliding in tables}
        return [(attention[layer.sliding], tables[layer.sliding]) for layer in self.layers]

    @np.errstate(all="ignore")  # a run that diverged has a loss that says so
    def trunk(self, batch: Batch) -> np.ndarray:
        """The output of the layers below `start`, (tokens, hidden)."""
        return self._through(self._embed(batch), batch, self.surroundings(batch), 0, self.start)

    @np.errstate(all="ignore")
    def losses(self, batch: Batch) -> np.ndarray:
        """The cross entropy of each answer in nats, (answers,)."""
        x, _ = self._hidden(batch, self.surroundings(batch), None)
        return cross_entropy(self.norm.forward(x)[0], self.head, batch.targets)[0]

    @np.errstate(all="ignore")
    def loss_and_gradient(self, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
        """The answers' weighted cross entropy, and its gradient by every lora_a and lora_b."""
        around, gradients = self.surroundings(batch), {}
        x, kept = self._hidden(batch, around, [])
        hidden, at_norm = self.norm.forward(x)
        losses, slope = cross_entropy(hidden, self.head, batch.targets, slope=True)
        slope *= batch.weights[:, None]
        d = self.norm.backward(at_norm, slope)
        for i in reversed(range(self.start, len(self.layers))):
            pick = batch.answers if i == len(self.layers) - 1 else None
            d = self.layers[i].backward(kept.pop(), *around[i], pick, d, gradients)
        return float(losses @ batch.weights), gradients

    def _embed(self, batch: Batch) -> np.ndarray:
        return self.embedding[batch.packed] * self.factor

    def _through(self, x, batch: Batch, around, first: int, last: int, kept=None) -> np.ndarray:
        """The output of layers first..last-1; of the model's last layer, at the answers only."""
        for i in range(first, last):
            pick = batch.answers if i == len(self.layers) - 1 else None
            x, needed = self.layers[i].forward(x, *around[i], pick)
            if kept is not None:
                kept.append(needed)
        return x

    def _hidden(self, batch: Batch, around: list, kept) -> tuple[np.ndarray, list | None]:
        """(the last layer's output at the answers, kept), which is filled with what going back
        needs.
        """
        x = batch.x
        if x is None:
            x = self._through(self._embed(batch), batch, around, 0, self.start)
        x = self._through(x, batch, around, self.start, len(self.layers), kept)
        return (x if self.start < len(self.layers) else x[batch.answers]), kept


class Reading:
    """Rows that a model has read and goes on with, all by one token at a time.

    keys, values  of each layer, (rows, groups, room, dim); a row's own end at `lengths`
    """

    @np.errstate(all="ignore")
    def __init__(self, step: Step, prefix: list[int], rows: list[list[int]]):
        self.step = step
        ends = np.cumsum([len(prefix), *map(len, rows)]).tolist()
        places = [slice(*pair) for pair in pairwise(ends)]
        first = slice(0, len(prefix))
        packed = np.array([*prefix, *(token for row in rows for token in row)], int)
        after = [Row(place, (first,)) for place in places]
        batch = Batch(packed, None, [Row(first), *after], packed[:0], packed[:0])
        self.lengths = np.array([len(prefix) + len(row) for row in rows], int)
        self.keys, self.values = [], []
        x = step._embed(batch)
        for layer, (attention, table) in zip(step.layers, step.surroundings(batch), strict=True):
            x, kept = layer.forward(x, attention, table, None)
            _, keys, values, _ = kept[4]
            self.keys.append(self._gathered(keys, after))
            self.values.append(self._gathered(values, after))

    def _gathered(self, a: np.ndarray, rows: list[Row]) -> np.ndarray:
        """What each row sees of a (tokens, groups, dim), (rows, groups, room, dim)."""
        out = np.zeros((len(rows), a.shape[1], self.lengths.max() + ROOM, a.shape[2]), np.float32)
        for own, row in zip(out, rows, strict=True):
            seen = row.of(a)
            own[:, : len(seen)] = seen.swapaxes(0, 1)
        return out

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        self.lengths = self.lengths[rows]
        self.keys = [a[rows] for a in self.keys]
        self.values = [a[rows] for a in self.values]

    @np.errstate(all="ignore")
    def next(self, tokens: np.ndarray) -> np.ndarray:
        """Append a token to each row; the likeliest one after it, (rows,)."""
        step, every = self.step, np.arange(len(tokens))
        if self.lengths.max() == self.keys[0].shape[2]:
            more = ((0, 0), (0, 0), (0, ROOM), (0, 0))
            self.keys = [np.pad(a, more) for a in self.keys]
            self.values = [np.pad(a, more) for a in self.values]
        tables = step.tables(self.lengths)
        windows = {True: step.window, False: None}
        hidden = {sliding: mask(self.lengths, windows[sliding])[:, None] for sliding in tables}
        x = step.embedding[tokens] * step.factor
        for layer, keys, values in zip(step.layers, self.keys, self.values, strict=True):
            q, k, v, _ = layer.ask(x, tables[layer.sliding])
            keys[every, :, self.lengths], values[every, :, self.lengths] = k, v
            seen = slice(self.lengths.max() + 1)
            queries = q.reshape(len(x), layer.groups, -1, layer.dim)
            scores = queries @ keys[:, :, seen].swapaxes(2, 3)
            scores += hidden[layer.sliding]
            softmax(scores)
            x, _ = layer.answer(x, (scores @ values[:, :, seen]).reshape(len(x), -1))
        self.lengths = self.lengths + 1
        return likeliest(step.norm.forward(x)[0], step.head)
