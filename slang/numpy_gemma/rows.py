"""What is to be computed: rows of tokens, end to end."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


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
    weights  what each of the answers counts in the loss, (answers,); not needed for `Step.losses`
    """

    packed: np.ndarray
    x: np.ndarray | None
    rows: list[Row]
    answers: np.ndarray
    targets: np.ndarray
    weights: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))


def common_prefix(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with."""
    first, last = min(rows), max(rows)  # all other rows are between the two
    shared = 0
    for a, b in zip(first, last, strict=False):
        if a != b:
            break
        shared += 1
    return shared
