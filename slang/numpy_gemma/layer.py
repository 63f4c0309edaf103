"""One layer of Gemma 3, there and back."""

import mlx.nn as nn
import numpy as np

from slang.numpy_gemma.attention import Attention
from slang.numpy_gemma.parts import Linear, Norm, gelu_product, rotated


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
        q, k, v, before = self.project(x, table)
        seen, shares = attention.forward(q, k, v)
        seen = seen.reshape(len(x), self.heads * self.dim)
        if pick is not None:
            seen, x = seen[pick], x[pick]
        out, after = self.combine(x, seen)
        return out, (*before, (q, k, v, shares), seen, *after)

    def project(self, x: np.ndarray, table) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple]:
        """Queries, scaled, keys and values, (tokens, heads or groups, dim), and what backward
        needs.
        """
        y, at_input = self.norms[0].forward(x)
        q, at_q = self.q_norm.forward(self.q.forward(y).reshape(len(x), self.heads, self.dim))
        k, at_k = self.k_norm.forward(self.k.forward(y).reshape(len(x), self.groups, self.dim))
        v = self.v.forward(y).reshape(len(x), self.groups, self.dim)
        q, k = rotated(q, *table), rotated(k, *table)
        return q, k, v, (y, at_input, at_q, at_k)

    def combine(self, x: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, tuple]:
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
        y, at_input, at_q, at_k, (q, k, v, shares), seen, *after = kept
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
        dout = r.reshape(len(y), self.heads, self.dim)
        dq, dk, dv = attention.backward(q, k, v, shares, dout)
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
