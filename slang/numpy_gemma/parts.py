"""The parts of a layer but attention, there and back: product, norm, rotary embedding, GELU."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from slang.numpy_gemma.arrays import over_rows, view


class Linear:
    """y = x W' + scale (x A) B, W frozen."""

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name = module, name
        self.has_adapter = "lora_a" in module
        self.weight = view((module.linear if self.has_adapter else module).weight)  # (out, in)

    def adapter(self) -> tuple[np.ndarray, np.ndarray, np.float32]:
        """A (in, rank), B (rank, out) as they are at this step, and the scale."""
        return view(self.module.lora_a), view(self.module.lora_b), np.float32(self.module.scale)

    def forward(self, x: np.ndarray) -> np.ndarray:
        y = x @ self.weight.T
        if self.has_adapter:
            a, b, scale = self.adapter()
            y += (scale * (x @ a)) @ b
        return y

    def backward(self, x: np.ndarray, dy: np.ndarray, gradients: dict) -> np.ndarray:
        """The gradient of x from that of y; those of A and B go into `gradients`."""
        dx = dy @ self.weight
        if self.has_adapter:
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
