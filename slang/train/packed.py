"""Rows of a batch end to end, as the loss takes them."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from slang.train.batches import Rows
from slang.train.shapes import Sizes


class PackedBatch(NamedTuple):
    """Rows of a batch end to end, behind the tokens that all rows begin with.

    Two rows with the prefix P P, their answers in capitals; / is padding:

        row 0     P P a b C D         each row's last token is left out: it predicts nothing
        row 1     P P e F G H I

        tokens    P P a b C e F G H / / /
        place     0 1 2 3 4 5 6 7 8

        grid      2 3 4 0             where in `tokens` each row's tokens are; attention works on
                  5 6 7 8             such a rectangle, whose gaps are filled with any place
        cells     0 1 2 4 5 6 7       of each token behind the prefix, its cell in `grid`: the way
                                      back from the rectangle to one row of tokens

        answers   3 4 5 6 7 8         where in `tokens` an answer's token is predicted
        targets   C D F G H I         and which token that is

    frozen   what the layers without an adapter make of `tokens`, (tokens, hidden), or an empty
             array (0,) where that is not kept
    tokens   token ids, (tokens,)
    grid     (rows, longest row without the prefix)
    cells    (tokens - prefix,)
    answers  (answer tokens,)
    targets  (answer tokens,)
    weights  (answer tokens,), what each counts in the loss: 1 / answer tokens of the whole batch,
             of which other machines may have a part; 0 for padding
    """

    frozen: mx.array
    tokens: mx.array
    grid: mx.array
    cells: mx.array
    answers: mx.array
    targets: mx.array
    weights: mx.array


class Packed(NamedTuple):
    """The same of Python integers, without padding.

    lengths          of each row, without the prefix and its last token
    places_in_frozen where the tokens are in `rows.frozen`, where that is kept
    """

    tokens: list[int]
    lengths: list[int]
    answers: list[int]
    targets: list[int]
    places_in_frozen: list[int]


def pack(prefix: list[int], rows: Rows, indices: list[int]) -> Packed:
    """The prefix, then these rows' tokens end to end."""
    n = len(prefix)
    packed = Packed([*prefix], [], [], [], [*range(n)])
    for i in indices:
        tokens, start = rows.tokens[i], rows.starts[i]
        length = len(tokens) - 1 - n
        at = len(packed.tokens)
        packed.answers.extend(range(at + start - 1 - n, at + length))
        packed.targets.extend(tokens[start:])
        packed.tokens.extend(tokens[n:-1])
        packed.lengths.append(length)
        if rows.frozen_starts is not None:
            first = int(rows.frozen_starts[i])
            packed.places_in_frozen.extend(range(first, first + length))
    return packed


def padded(values: list, size: int, dtype: mx.Dtype = mx.int32) -> mx.array:
    return mx.array(values + [0] * (size - len(values)), dtype)


def batch_arrays(
    prefix: list[int],
    rows: Rows,
    indices: list[int],
    answer_tokens: int | None = None,
    shapes: dict[Sizes, Sizes] | None = None,
) -> PackedBatch:
    """The arrays of these rows.

    answer_tokens  of the whole batch, where other machines have the rest of it
    shapes         what sizes are padded to, where that is planned
    """
    n = len(prefix)
    packed = pack(prefix, rows, indices)
    lengths, targets = packed.lengths, packed.targets
    longest = max(lengths, default=1)
    exact = Sizes(len(indices), longest, len(packed.tokens), len(targets))
    sizes = (shapes or {}).get(exact) or exact.rounded(n)
    grid = np.full((sizes.rows, sizes.longest), n)
    cells: list[int] = []
    at = n
    for row, length in enumerate(lengths):
        grid[row, :length] = range(at, at + length)
        cells += range(row * sizes.longest, row * sizes.longest + length)
        at += length
    weights = [1 / (answer_tokens or len(targets))] * len(targets)
    frozen = mx.zeros((0,))
    if rows.frozen is not None:
        frozen = rows.frozen[padded(packed.places_in_frozen, sizes.packed)]
    return PackedBatch(
        frozen=frozen,
        tokens=padded(packed.tokens, sizes.packed),
        grid=mx.array(grid),
        cells=padded(cells, sizes.packed - n),
        answers=padded(packed.answers, sizes.answers),
        targets=padded(targets, sizes.answers),
        weights=padded(weights, sizes.answers, mx.float32),
    )
