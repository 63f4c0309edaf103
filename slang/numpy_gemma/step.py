"""The whole model: losses, and the gradient of its adapter."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from slang.numpy_gemma.arrays import keep_freed_memory, view
from slang.numpy_gemma.attention import Attention
from slang.numpy_gemma.layer import Layer
from slang.numpy_gemma.parts import Norm, angles
from slang.numpy_gemma.rows import Batch
from slang.numpy_gemma.vocabulary import cross_entropy

Table = tuple[np.ndarray, np.ndarray]  # cosines and sines of positions
Around = list[tuple[Attention, Table]]  # of each layer: who sees whom, and the angles


class Step:
    """Loss and gradient of a model's adapter.

    The layers below `start` have no adapter: nothing goes back through them.
    """

    def __init__(self, model: nn.Module, start: int = 0):
        keep_freed_memory()
        text = getattr(model, "language_model", model)
        names = {id(module): name for name, module in model.named_modules()}
        self.start, self.window = start, text.model.window_size
        self.embedding = view(text.model.embed_tokens.weight)
        self.head = self.embedding if text.tie_word_embeddings else view(text.lm_head.weight)
        # mlx_lm's factor, which is rounded to bfloat16.
        self.factor = np.float32(mx.array(text.model.args.hidden_size**0.5, mx.bfloat16).item())
        self.layers = [Layer(layer, names) for layer in text.model.layers]
        self.norm = Norm(text.model.norm)
        # gemma3_text has one rotary embedding for the sliding layers, one for the others.
        self.ropes = {layer.sliding: layer.rope for layer in self.layers}

    def tables(self, positions: np.ndarray) -> dict[bool, Table]:
        """Cosines and sines of the positions, for sliding layers and for others."""
        dim = self.layers[0].dim
        return {sliding: angles(rope, dim, positions) for sliding, rope in self.ropes.items()}

    def surroundings(self, batch: Batch) -> Around:
        """For each layer, who sees whom, and the table of angles."""
        positions = np.zeros(len(batch.packed), int)
        for row in batch.rows:
            positions[row.place] = row.positions()
        tables = self.tables(positions)
        windows = {True: self.window, False: None}
        attention = {sliding: Attention(batch.rows, windows[sliding]) for sliding in tables}
        return [(attention[layer.sliding], tables[layer.sliding]) for layer in self.layers]

    @np.errstate(all="ignore")  # a run that diverged has a loss that says so
    def trunk(self, batch: Batch) -> np.ndarray:
        """The output of the layers below `start`, (tokens, hidden)."""
        return self._through(self.embed(batch), batch, self.surroundings(batch), 0, self.start)

    @np.errstate(all="ignore")
    def losses(self, batch: Batch) -> np.ndarray:
        """The cross entropy of each answer in nats, (answers,)."""
        x = self._hidden(batch, self.surroundings(batch))
        return cross_entropy(self.norm.forward(x)[0], self.head, batch.targets)[0]

    @np.errstate(all="ignore")
    def loss_and_gradient(self, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
        """The answers' weighted cross entropy, and its gradient by every lora_a and lora_b."""
        around = self.surroundings(batch)
        kept: list[tuple] = []
        gradients: dict[str, np.ndarray] = {}
        x = self._hidden(batch, around, kept)
        hidden, at_norm = self.norm.forward(x)
        losses, slope = cross_entropy(hidden, self.head, batch.targets, slope=True)
        slope *= batch.weights[:, None]
        d = self.norm.backward(at_norm, slope)
        for i in reversed(range(self.start, len(self.layers))):
            pick = batch.answers if i == len(self.layers) - 1 else None
            d = self.layers[i].backward(kept.pop(), *around[i], pick, d, gradients)
        return float(losses @ batch.weights), gradients

    def embed(self, batch: Batch) -> np.ndarray:
        return self.embedding[batch.packed] * self.factor

    def _through(
        self,
        x: np.ndarray,
        batch: Batch,
        around: Around,
        first: int,
        last: int,
        kept: list[tuple] | None = None,
    ) -> np.ndarray:
        """The output of layers first..last-1; of the model's last layer, at the answers only."""
        for i in range(first, last):
            pick = batch.answers if i == len(self.layers) - 1 else None
            x, needed = self.layers[i].forward(x, *around[i], pick)
            if kept is not None:
                kept.append(needed)
        return x

    def _hidden(self, batch: Batch, around: Around, kept: list[tuple] | None = None) -> np.ndarray:
        """The last layer's output at the answers; `kept` is filled with what going back needs."""
        x = batch.x
        if x is None:
            x = self._through(self.embed(batch), batch, around, 0, self.start)
        x = self._through(x, batch, around, self.start, len(self.layers), kept)
        return x if self.start < len(self.layers) else x[batch.answers]
