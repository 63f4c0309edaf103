"""Tokenised rows and the batches of an epoch."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence

import mlx.core as mx
import numpy as np
from mlx_lm.cli_ui import rprint

from slang import numpy_gemma

CHUNK = 32  # batches that are sorted by length together


class Rows:
    """Tokenised rows that have an answer. tokens[i][starts[i]:] is what row i is trained on."""

    def __init__(
        self,
        pairs: Iterable[tuple[list[int], int]],
        max_seq_length: int,
        name: str,
        pad: bool = False,
    ):
        """
        pairs  (tokens, where the answer starts) of each row
        name   of the file, for what is said about rows that are cut
        pad    add the pad token behind each row as one more target, as mlx_lm.lora counts
        """
        self.tokens: list[list[int]] = []
        self.starts: list[int] = []
        cut = unanswered = 0
        for tokens, start in pairs:
            start = max(start, 1)  # nothing predicts the first token
            cut += len(tokens) > max_seq_length > start
            tokens = ([*tokens, 0] if pad else tokens)[:max_seq_length]
            if len(tokens) > start:
                self.tokens.append(tokens)
                self.starts.append(start)
            else:
                unanswered += 1
        if not pad:
            total = len(self) + unanswered
            limit = f"of {total} rows of {name}", f"--max-seq-length {max_seq_length}"
            say_what_is_missing(cut, unanswered, *limit)
        self.frozen: mx.array | None = None  # output of the frozen layers: the prefix, then rows
        self.frozen_starts: np.ndarray | None = None  # where in `frozen` each row begins

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, other: "Rows", count: int, seed: int) -> None:
        """Take in so many rows of another set in random order, which begins again after the last.

        The first rows of a file that is sorted by topic would be of one topic.
        """
        order = np.random.default_rng(seed).permutation(len(other))
        for i in np.resize(order, count):
            self.tokens.append(other.tokens[i])
            self.starts.append(other.starts[i])

    def answer_tokens(self, indices: Iterable[int]) -> int:
        return sum(len(self.tokens[i]) - self.starts[i] for i in indices)

    def digest(self) -> str:
        content = json.dumps([self.tokens, self.starts])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def say_what_is_missing(cut: int, unanswered: int, of_rows: str, limit: str) -> None:
    """How many rows are trained in part, or not at all."""
    if cut == 1:
        rprint(f"1 {of_rows} is longer than {limit}: its answer is trained cut off")
    elif cut:
        rprint(f"{cut} {of_rows} are longer than {limit}: their answers are trained cut off")
    if unanswered == 1:
        rprint(f"1 {of_rows} has no answer within {limit}: it is left out")
    elif unanswered:
        rprint(f"{unanswered} {of_rows} have no answer within {limit}: they are left out")


def prefix_before_answers(sets: Sequence[Rows]) -> list[int]:
    """The tokens that all rows begin with; each row keeps at least one before its answer."""
    rows = [tokens for one in sets for tokens in one.tokens]
    earliest = min(min(one.starts) for one in sets)
    return list(rows[0][: min(numpy_gemma.common_prefix(rows), earliest - 1)])


def steps_per_epoch(rows: Rows, batch_size: int) -> int:
    return math.ceil(len(rows) / batch_size)


def epoch(rows: Rows, batch_size: int, seed: int, number: int) -> list[list[int]]:
    """The batches of an epoch: every row once, like lengths together, batches in random order.

    It follows from the seed and the epoch's number, so that an iteration is all one needs to find
    the place again.
    """
    random = np.random.default_rng((seed, number))
    order = random.permutation(len(rows))
    batches = []
    for start in range(0, len(order), CHUNK * batch_size):
        chunk = order[start : start + CHUNK * batch_size].tolist()
        chunk.sort(key=lambda i: len(rows.tokens[i]))
        batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def training_batches(rows: Rows, batch_size: int, seed: int, iteration: int) -> Iterator[list[int]]:
    """The batch of the iteration (from 0) and all that follow, for ever."""
    per_epoch = steps_per_epoch(rows, batch_size)
    number, done = divmod(iteration, per_epoch)
    while True:
        yield from epoch(rows, batch_size, seed, number)[done:]
        number, done = number + 1, 0


def fixed_batches(rows: Rows, batch_size: int, n_batches: int) -> list[list[int]]:
    """The same n batches each time, -1 for all, of rows that are drawn once."""
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    if n_batches != -1:
        order = order[: n_batches * batch_size]
    order.sort(key=lambda i: len(rows.tokens[i]))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
