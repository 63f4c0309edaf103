"""Attention of packed rows, there and back."""

import numpy as np

from slang.numpy_gemma.rows import Row


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
