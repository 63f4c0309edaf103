"""Rows of tokens that MLX reads side by side, and continues in several ways from there."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from slang.evaluate.tokens import padded

ROOM = 16  # tokens that a greedy answer gets room for at a time


class LayerCache:
    """One layer's part of a Batch. mlx_lm's models take it as the layer's cache."""

    def __init__(
        self, batch: "Batch", keys: mx.array | None = None, values: mx.array | None = None
    ):
        self.batch = batch
        self.keys = keys  # (rows, key heads, room for tokens, head dim)
        self.values = values

    @property
    def offset(self) -> mx.array:
        """The position of each row's next token, (rows,)."""
        return self.batch.offset

    def make_mask(
        self, n: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """Which keys each query sees, (rows, 1, n, tokens).

        Called by mlx_lm.models.base.create_attention_mask.
        """
        keys = self.batch.positions[:, None, None, :]
        queries = self.batch.queries[:, None, :, None]
        mask = keys <= queries
        if window_size:
            mask = mask & (keys > queries - window_size)
        return mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append the new keys and values, and return all."""
        self.keys = appended(self.keys, keys, self.batch.used)
        self.values = appended(self.values, values, self.batch.used)
        end = self.batch.used + keys.shape[2]
        return self.keys[:, :, :end], self.values[:, :, :end]


def appended(old: mx.array | None, new: mx.array, used: int) -> mx.array:
    """The first `used` tokens of old, then those of new, and perhaps room for more."""
    if old is None:
        return new
    if new.shape[2] > 1:
        return mx.concatenate([old[:, :, :used], new], axis=2)
    end = used + new.shape[2]
    if end > old.shape[2]:
        room = mx.zeros((*new.shape[:2], ROOM, new.shape[3]), new.dtype)
        old = mx.concatenate([old, room], axis=2)
    old[:, :, used:end] = new  # a step of a greedy answer is written in place
    return old


class Batch:
    """Rows of tokens that a net has read, and their keys and values.

    Rows of different length are padded on the right. A token has the position that it would have
    alone. A pad has one that no query looks back to. So each row gets what it would get by itself.
    """

    PAD = 1 << 30

    def __init__(self, n_layers: int, n_rows: int = 1):
        self.layers = [LayerCache(self) for _ in range(n_layers)]
        self.positions = mx.zeros((n_rows, 0), mx.int32)  # (rows, tokens)
        self.queries = self.positions  # of the tokens that are read now
        self.offset = mx.zeros((n_rows,), mx.int32)  # the position of each row's next token
        self.used = 0  # columns of keys and values that are filled

    def take(self, rows: list[int]) -> "Batch":
        """A copy with these rows, in this order; a row may come more than once."""
        batch = Batch(0)
        index = mx.array(rows)
        batch.positions = self.positions[index]
        batch.offset = self.offset[index]
        batch.used = self.used
        for layer in self.layers:
            keys, values = (
                None if array is None else array[index, :, : self.used]
                for array in (layer.keys, layer.values)
            )
            batch.layers.append(LayerCache(batch, keys, values))
        return batch

    def read(self, net: nn.Module, rows: Sequence[Sequence[int]]) -> mx.array:
        """Append tokens to every row.

        Returns logits, (rows, longest row, vocabulary). Beyond a row's end they mean nothing.
        """
        lengths = mx.array([len(row) for row in rows])[:, None]
        steps = mx.arange(max(map(len, rows)))
        # A pad looks at what the row's last token sees.
        self.queries = self.offset[:, None] + mx.minimum(steps, lengths - 1)
        new = mx.where(steps < lengths, self.queries, self.PAD)
        self.positions = mx.concatenate([self.positions, new], axis=1)
        logits = net(mx.array(padded(rows)), cache=self.layers)
        self.used += len(steps)
        self.offset = self.offset + lengths[:, 0]
        return logits


class Reading:
    """A Batch that goes on by one token a row at a time."""

    def __init__(self, net: nn.Module, batch: Batch):
        self.net = net
        self.batch = batch

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        self.batch = self.batch.take(rows)

    def next(self, tokens: list[int]) -> mx.array:
        """Append a token to each row. Returns the likeliest one after it, (rows,)."""
        logits = self.batch.read(self.net, [[token] for token in tokens])
        return mx.argmax(logits[:, -1], axis=-1)


def read_prompts(net: nn.Module, shared: list[int], prompts: list[list[int]]) -> Batch:
    """All of the prompts but their last tokens, which are read with what follows them.

    The prompts begin with `shared`, which is read once.
    """
    batch = Batch(len(net.layers))
    if shared[:-1]:
        batch.read(net, [shared[:-1]])
    batch = batch.take([0] * len(prompts))
    batch.read(net, [tokens[max(0, len(shared) - 1) : -1] for tokens in prompts])
    mx.eval([(layer.keys, layer.values) for layer in batch.layers])
    return batch
