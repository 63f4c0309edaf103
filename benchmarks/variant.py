"""Trainings that `slang.train` has no flag for, for recipe.py to try; with its flags.

    together  all rows of a slang follow one another, so that a batch has one or two slangs
    held      everyday rows are held to the base model's next tokens by their KL divergence, in
              place of being trained towards their own
    dropout   numpy's step with the dropout of lora_parameters; slang.train computes that with MLX's
              own kernels, many times slower on a CPU

Run as: python benchmarks/variant.py together --train --model models/tiny-gemma3 --mask-prompt
"""

import sys
from pathlib import Path

import mlx.nn as nn
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from slang import jsonl, numpy_gemma
from slang.errors import program
from slang.numpy_gemma import layer, step
from slang.numpy_gemma.parts import Linear
from slang.numpy_gemma.vocabulary import cross_entropy
from slang.train import batches, command
from slang.train.batches import Rows
from slang.train.flags import parse
from slang.train.numpy_network import NumpyNetwork


def together() -> None:
    """Let an epoch go through the slangs in random order, and through each one's rows at once."""
    train_rows = Path(parse(sys.argv[1:]).data) / "train.jsonl"
    slangs = [jsonl.slang(record) for record in jsonl.read(train_rows)]

    def epoch(rows: Rows, batch_size: int, seed: int, number: int) -> list[list[int]]:
        random = np.random.default_rng((seed, number))
        groups: dict[str, list[int]] = {}
        for i in range(len(rows)):
            of = slangs[i] if i < len(slangs) else f"everyday row {i}"
            groups.setdefault(of, []).append(i)
        every = list(groups.values())
        order = [i for n in random.permutation(len(every)) for i in every[n]]
        found = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        return [found[n] for n in random.permutation(len(found))]

    batches.epoch = epoch


class HeldNetwork(NumpyNetwork):
    """Its everyday rows have the base model's expectation in place of their tokens as targets.

    The cross entropy towards a distribution p is log Z - h E, where E is the mean of the head's
    rows by p. So E, (hidden,), is all that is kept of p; less p's entropy, it is the KL divergence.
    """

    def __init__(self, model: nn.Module, prefix: list[int], rows: Rows):
        super().__init__(model, prefix)
        self.rows = rows
        self.first_held: dict[int, int] = {}  # of each everyday row, its first answer's place below
        expected, entropies = [], []
        count = 0
        for i in range(rows.n_own, len(rows)):
            batch = super().batch(rows, [i])
            x = self.step._hidden(batch, self.step.surroundings(batch))
            hidden, _ = self.step.norm.forward(x)
            losses, slope = cross_entropy(hidden, self.step.head, batch.targets, slope=True)
            right = self.step.head[batch.targets]
            mean = slope + right
            log_z = losses + np.einsum("ij,ij->i", hidden, right)
            expected.append(mean)
            entropies.append(log_z - np.einsum("ij,ij->i", hidden, mean))
            self.first_held[i] = count
            count += len(mean)
        self.expected, self.entropies = np.concatenate(expected), np.concatenate(entropies)
        step.cross_entropy = self.divergence

    def batch(self, rows: Rows, indices: list[int], answer_tokens: int | None = None):
        """A held answer's target is the vocabulary's size and more: its place in `expected`."""
        batch = super().batch(rows, indices, answer_tokens)
        at = 0
        for i in indices:
            count = rows.answer_tokens([i])
            if rows is self.rows and i in self.first_held:
                first = len(self.step.head) + self.first_held[i]
                batch.targets[at : at + count] = range(first, first + count)
            at += count
        return batch

    def divergence(self, hidden, head, targets, slope=False):
        """vocabulary.cross_entropy; of a held answer the KL divergence, and its gradient."""
        held = targets >= len(head)
        losses, slopes = cross_entropy(hidden, head, np.where(held, 0, targets), slope)
        places = targets[held] - len(head)
        away = head[0] - self.expected[places]
        losses[held] += np.einsum("ij,ij->i", hidden[held], away) - self.entropies[places]
        if slope:
            slopes[held] += away
        return losses, slopes


def held() -> None:
    """Train a HeldNetwork. It is made before the first step and before what --resume restores, so
    the adapter changes nothing yet, and the model is the base model."""
    add = Rows.add

    def add_everyday(rows: Rows, *other) -> None:
        rows.n_own = len(rows)
        add(rows, *other)

    def make_network(settings, model, sets):
        return HeldNetwork(model, batches.prefix_before_answers(sets), sets[0])

    Rows.add = add_everyday
    command.make_network = make_network


class Dropping(Linear):
    """A Linear whose adapter sees some of its input only, while it is trained, as in MLX's."""

    random = np.random.default_rng(0)

    def forward(self, x: np.ndarray) -> np.ndarray:
        y = x @ self.weight.T
        if self.has_adapter:
            kept = np.float32(self.module.dropout._p_1 if self.module.training else 1)
            self.factor = (self.random.random(x.shape, np.float32) < kept) / kept
            a, b, scale = self.adapter()
            y += (scale * ((x * self.factor) @ a)) @ b
        return y

    def backward(self, x: np.ndarray, dy: np.ndarray, gradients: dict) -> np.ndarray:
        dx = dy @ self.weight
        if self.has_adapter:
            a, b, scale = self.adapter()
            seen = x * self.factor
            dz = scale * (dy @ b.T)
            gradients[f"{self.name}.lora_a"] = seen.T @ dz
            gradients[f"{self.name}.lora_b"] = scale * ((seen @ a).T @ dy)
            dx += (dz @ a.T) * self.factor
        return dx


def dropout() -> None:
    """Let numpy compute it."""
    why_not = numpy_gemma.why_not
    numpy_gemma.why_not = lambda model: None if why_not(model) == "dropout" else why_not(model)
    layer.Linear = Dropping


if __name__ == "__main__":
    {"together": together, "held": held, "dropout": dropout}[sys.argv.pop(1)]()
    program("slang.train.command")
