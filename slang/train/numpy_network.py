"""The same loss and gradient on a CPU, by numpy; and which network suits a model here."""

from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.cli_ui import rprint

from slang import numpy_gemma
from slang.train.batches import Rows
from slang.train.network import Network
from slang.train.packed import pack


class NumpyNetwork(Network):
    """A Network whose batches are numpy's."""

    def __init__(self, model: nn.Module, prefix: list[int]):
        super().__init__(model, prefix)
        self.step = numpy_gemma.Step(model, self.start)

    def batch(
        self, rows: Rows, indices: list[int], answer_tokens: int | None = None
    ) -> numpy_gemma.Batch:
        packed = pack(self.prefix, rows, indices)
        frozen = None
        if rows.frozen is not None:
            frozen = numpy_gemma.view(rows.frozen)[packed.places_in_frozen]
        targets = packed.targets
        weights = np.full(len(targets), 1 / (answer_tokens or len(targets) or 1), np.float32)
        prefix = slice(0, len(self.prefix))
        ends = np.cumsum([len(self.prefix), *packed.lengths]).tolist()
        behind = [numpy_gemma.Row(slice(*pair), (prefix,)) for pair in pairwise(ends)]
        return numpy_gemma.Batch(
            packed=np.array(packed.tokens, int),
            x=frozen,
            rows=[numpy_gemma.Row(prefix), *behind],
            answers=np.array(packed.answers, int),
            targets=np.array(targets, int),
            weights=weights,
        )

    def loss(self, batch: numpy_gemma.Batch) -> mx.array:
        return mx.array(float(self.step.losses(batch) @ batch.weights))

    def value_and_grad(self):
        def loss_and_gradient(batch: numpy_gemma.Batch) -> tuple[mx.array, dict]:
            loss, gradients = self.step.loss_and_gradient(batch)
            names = [name for name, _ in tree_flatten(self.model.trainable_parameters())]
            in_order = [(name, mx.array(gradients[name])) for name in names]
            return mx.array(loss), tree_unflatten(in_order)

        return loss_and_gradient

    def frozen_output(self, rows: Rows, indices: list[int]) -> mx.array:
        return mx.array(self.step.trunk(self.batch(rows, indices)))


def network_of(model: nn.Module, prefix: list[int], checkpoint: bool = False) -> Network:
    """The fastest Network there is for this model here."""
    if mx.default_device() != mx.cpu:
        return Network(model, prefix, checkpoint)
    unsupported = "--grad-checkpoint" if checkpoint else numpy_gemma.why_not(model)
    if unsupported:
        rprint(f"Computing with MLX's own kernels, which are slower on a CPU: {unsupported}")
        return Network(model, prefix, checkpoint)
    return NumpyNetwork(model, prefix)
