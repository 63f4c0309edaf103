"""Which shapes batches are padded to, where steps are compiled.

mx.compile traces a step for each shape that it meets, and keeps its kernels and buffers. So a run's
batches are counted beforehand and padded to a few shapes, chosen to add the least work.
"""

from collections import Counter
from itertools import islice
from typing import NamedTuple

import mlx.nn as nn
import numpy as np

from slang.train.batches import Rows, training_batches

PAD_TO = 8  # tokens, where shapes are not planned
MOST_SHAPES = 32


def round_up(n: int) -> int:
    return max(-(-n // PAD_TO) * PAD_TO, PAD_TO)


class Sizes(NamedTuple):
    """The sizes of a batch's arrays.

    rows     in the batch
    longest  tokens of the longest row, without the prefix
    packed   tokens of all rows, and the prefix once
    answers  tokens that are predicted
    """

    rows: int
    longest: int
    packed: int
    answers: int

    def rounded(self, prefix: int) -> "Sizes":
        packed = max(round_up(self.packed), prefix + PAD_TO)
        return Sizes(max(self.rows, 1), round_up(self.longest), packed, round_up(self.answers))


def entries(module: nn.Module) -> int:
    """Of a module's matrix, of which a quantised one packs several into 32 bits."""
    return module.weight.size * 32 // getattr(module, "bits", 32)


class Work(NamedTuple):
    """Multiply-adds of a model.

    token   of a token in all layers
    answer  of an answer token in the head
    pair    of a pair of tokens in all layers' attention
    """

    token: int
    answer: int
    pair: int

    @classmethod
    def of(cls, model: nn.Module) -> "Work":
        text = getattr(model, "language_model", model)
        modules = [module for layer in text.model.layers for _, module in layer.named_modules()]
        matrices = [m for m in modules if "weight" in m and m.weight.ndim == 2]
        token = sum(map(entries, matrices))
        attention = text.model.layers[0].self_attn
        pair = 2 * len(text.model.layers) * attention.n_heads * attention.head_dim
        return cls(token, entries(text.model.embed_tokens), pair)

    def needed(self, sizes: np.ndarray) -> np.ndarray:
        """Of batches of these sizes (..., 4), there and back."""
        rows, longest, packed, answers = np.moveaxis(np.asarray(sizes, float), -1, 0)
        pairs = rows * longest * longest
        return 2 * (packed * self.token + answers * self.answer + pairs * self.pair)


def survey(
    rows: Rows, prefix: int, batch_size: int, seed: int, iters: int, share: slice = slice(None)
) -> Counter[Sizes]:
    """How often each size occurs in a run; `share` is this machine's of each batch."""
    found: Counter[Sizes] = Counter()
    for indices in islice(training_batches(rows, batch_size, seed, 0), iters):
        lengths = [len(rows.tokens[i]) - 1 - prefix for i in indices[share]]
        answers = rows.answer_tokens(indices[share])
        longest = max(lengths, default=1)
        found[Sizes(len(lengths), longest, prefix + sum(lengths), answers)] += 1
    return found


def plan(
    found: Counter[Sizes], prefix: int, work: Work, most: int = MOST_SHAPES
) -> dict[Sizes, Sizes]:
    """What each size is padded to, so that at most `most` shapes are left.

    They are rounded first, for the time of planning grows with the third power of their number. Two
    shapes at a time become the one that holds both, those first for which that adds the least
    work to the run.
    """
    rounded: Counter[Sizes] = Counter()
    for sizes, count in found.items():
        rounded[sizes.rounded(prefix)] += count
    needed = np.array([*rounded], np.int64).reshape(-1, 4)
    shapes = needed.copy()
    counts = np.array([*rounded.values()], float)
    alive = np.ones(len(shapes), bool)

    def price(i: int) -> np.ndarray:
        """What merging shape i with each of the others adds."""
        merged = work.needed(np.maximum(shapes[i], shapes)) * (counts[i] + counts)
        added = merged - work.needed(shapes[i]) * counts[i] - work.needed(shapes) * counts
        added[~alive] = np.inf
        added[i] = np.inf
        return added

    prices = np.array([price(i) for i in range(len(shapes))]).reshape(len(shapes), -1)
    for _ in range(len(shapes) - most):
        i, j = map(int, np.unravel_index(prices.argmin(), prices.shape))
        shapes[i] = np.maximum(shapes[i], shapes[j])
        counts[i] += counts[j]
        alive[j] = False
        prices[j] = np.inf
        prices[:, j] = np.inf
        prices[i] = prices[:, i] = price(i)
    shapes = shapes[alive]
    # Each size takes the cheapest shape that holds it, then shapes shrink to what they hold.
    for _ in range(20):
        holds = (needed[:, None] <= shapes).all(axis=-1)
        member = np.where(holds, work.needed(shapes), np.inf).argmin(axis=1)
        held = [needed[member == i] for i in range(len(shapes))]
        shapes = np.array([sizes.max(axis=0, initial=1) for sizes in held])
    place = dict(zip(rounded, member, strict=True))
    return {sizes: Sizes(*shapes[place[sizes.rounded(prefix)]].tolist()) for sizes in found}
