"""Rows that a model reads once and then goes on with, token by token."""

from itertools import pairwise

import numpy as np

from slang.numpy_gemma.attention import mask, softmax
from slang.numpy_gemma.rows import Batch, Row
from slang.numpy_gemma.step import Step
from slang.numpy_gemma.vocabulary import likeliest

ROOM_STEP = 16  # tokens that are made room for at a time, where rows go on


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
        x = step.embed(batch)
        for layer, (attention, table) in zip(step.layers, step.surroundings(batch), strict=True):
            x, kept = layer.forward(x, attention, table, None)
            _, keys, values, _ = kept[4]
            self.keys.append(self._gathered(keys, after))
            self.values.append(self._gathered(values, after))

    def _gathered(self, a: np.ndarray, rows: list[Row]) -> np.ndarray:
        """What each row sees of a (tokens, groups, dim), (rows, groups, room, dim)."""
        out = np.zeros(
            (len(rows), a.shape[1], self.lengths.max() + ROOM_STEP, a.shape[2]), np.float32
        )
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
    def next(self, tokens: list[int]) -> np.ndarray:
        """Append a token to each row; the likeliest one after it, (rows,)."""
        step, every = self.step, np.arange(len(tokens))
        if self.lengths.max() == self.keys[0].shape[2]:
            more = ((0, 0), (0, 0), (0, ROOM_STEP), (0, 0))
            self.keys = [np.pad(a, more) for a in self.keys]
            self.values = [np.pad(a, more) for a in self.values]
        tables = step.tables(self.lengths)
        windows = {True: step.window, False: None}
        hidden = {sliding: mask(self.lengths, windows[sliding])[:, None] for sliding in tables}
        x = step.embedding[tokens] * step.factor
        for layer, keys, values in zip(step.layers, self.keys, self.values, strict=True):
            q, k, v, _ = layer.project(x, tables[layer.sliding])
            keys[every, :, self.lengths], values[every, :, self.lengths] = k, v
            seen = slice(self.lengths.max() + 1)
            queries = q.reshape(len(x), layer.groups, -1, layer.dim)
            scores = queries @ keys[:, :, seen].swapaxes(2, 3)
            scores += hidden[layer.sliding]
            softmax(scores)
            x, _ = layer.combine(x, (scores @ values[:, :, seen]).reshape(len(x), -1))
        self.lengths = self.lengths + 1
        return likeliest(step.norm.forward(x)[0], step.head)
