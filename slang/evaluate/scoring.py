"""How likely a model finds an answer, and what it answers: many questions at a time, each prompt read once.

On a CPU slang/numpy_gemma computes it in numpy where it can, elsewhere MLX does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from huggingface_hub import snapshot_download
from mlx.utils import tree_unflatten
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load, load_model
from tqdm import tqdm

from slang import numpy_gemma as cpu
from slang import prompt

MAX_ANSWER_TOKENS = 64  # twice the longest meaning of the shipped dictionary
# Questions answered together in numpy. A step of few rows takes as long as one of 50, since every weight is read anyway; the
# keys and values of 256 rows take 1 GB with Gemma 3 270M when no answer ends.
BATCH_IN_NUMPY = 256
BATCH = 128  # questions whose prompts are held at a time
PACKED = 1024  # tokens of a pass in numpy, about: products are at their fastest, and memory stays below 100 MB
TOKENS = 512  # scored at a time: 512 MiB of logits over Gemma 3's vocabulary; the tiny model is 22 % slower with 4096
END_OF_TURN = "<end_of_turn>"


class Model:
    """A base model and the same with an adapter, which share the weights of the base."""

    def __init__(self, path: str, adapter_path: str):
        base, self.tokenizer = load(path)
        on_cpu = mx.default_device() == mx.cpu
        if on_cpu:
            cpu.to_float32(base)  # MLX multiplies bf16 matrices about 18 times slower on a CPU
        folder = Path(path) if Path(path).exists() else Path(snapshot_download(path, local_files_only=True))
        adapted, _ = load_model(folder, lazy=True)  # its weights are never read: they are those of the base
        adapted.update(base.parameters())
        load_adapters(adapted, adapter_path)
        if on_cpu:
            adapted.set_dtype(mx.float32)
            # One product in place of three; in float32 the sum of base and adapter is as good as the two apart.
            fused = [(name, module.fuse()) for name, module in adapted.named_modules() if hasattr(module, "fuse")]
            adapted.update_modules(tree_unflatten(fused))
        self.nets = {"baseline": base.eval(), "adapted": adapted.eval()}
        mx.eval(adapted.parameters())
        self.end = self.tokenizer.convert_tokens_to_ids(END_OF_TURN)
        self.stops = {self.end, *self.tokenizer.eos_token_ids}

    def prompts(self, chats: list[prompt.Messages]) -> list[list[int]]:
        """Token ids of each chat up to where the model's turn begins."""
        return self.tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False) if chats else []

    def rests(self, chats: list[prompt.Messages], prompts: list[list[int]]) -> list[list[int]]:
        """What follows its prompt in each whole chat: the answer, <end_of_turn> and what the template puts after it."""
        whole = self.tokenizer.apply_chat_template(chats, return_dict=False)
        return [tokens[len(asked) :] for tokens, asked in zip(whole, prompts, strict=True)]


class LayerCache:
    """One layer's part of a Batch, in the place where mlx_lm passes a layer's cache."""

    def __init__(self, batch: "Batch", keys: mx.array | None = None, values: mx.array | None = None):
        self.batch, self.keys, self.values = batch, keys, values  # (rows, kv heads, room for tokens, head dim)

    @property
    def offset(self) -> mx.array:
        return self.batch.offset

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """(rows, 1, n, tokens): which keys each query sees (mlx_lm.models.base.create_attention_mask asks)."""
        keys, queries = self.batch.positions[:, None, None, :], self.batch.queries[:, None, :, None]
        mask = keys <= queries
        return mask & (keys > queries - window_size) if window_size else mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append the new keys and values, and return all."""
        used = self.batch.used
        end = used + keys.shape[2]
        if self.keys is None:
            self.keys, self.values = keys, values
        elif keys.shape[2] > 1:
            self.keys = mx.concatenate([self.keys[:, :, :used], keys], axis=2)
            self.values = mx.concatenate([self.values[:, :, :used], values], axis=2)
        else:  # a step of the greedy answer: written in place, room made for 16 at a time
            if end > self.keys.shape[2]:
                room = mx.zeros((*keys.shape[:2], 16, keys.shape[3]), keys.dtype)
                self.keys = mx.concatenate([self.keys, room], axis=2)
                self.values = mx.concatenate([self.values, room], axis=2)
            self.keys[:, :, used:end], self.values[:, :, used:end] = keys, values
        return self.keys[:, :, :end], self.values[:, :, :end]


class Batch:
    """Rows of tokens that a net has read, which can be continued in any number of ways without reading them again.

    Rows of different length are padded on the right. A token has the position that it would have alone, a pad one that no
    query looks back to, so that each row gets what it would get by itself (a test holds them to 1e-3).
    """

    PAD = 1 << 30

    def __init__(self, n_layers: int, n_rows: int = 1):
        self.layers = [LayerCache(self) for _ in range(n_layers)]
        self.positions = mx.zeros((n_rows, 0), mx.int32)  # (rows, tokens)
        self.offset = mx.zeros((n_rows,), mx.int32)  # of each row's next token
        self.used = 0  # columns

    def take(self, rows: list[int]) -> "Batch":
        """A copy with these rows, in this order, any of them more than once."""
        batch, index = Batch(0), mx.array(rows)
        batch.positions, batch.offset, batch.used = self.positions[index], self.offset[index], self.used
        for layer in self.layers:
            kept = (
                (None, None) if layer.keys is None else (layer.keys[index, :, : self.used], layer.values[index, :, : self.used])
            )
            batch.layers.append(LayerCache(batch, *kept))
        return batch

    def read(self, net: nn.Module, rows: Sequence[Sequence[int]]) -> mx.array:
        """Append tokens to every row; logits (rows, longest row, vocabulary), of no meaning beyond a row's end."""
        lengths, steps = mx.array([len(row) for row in rows])[:, None], mx.arange(max(map(len, rows)))
        self.queries = self.offset[:, None] + mx.minimum(steps, lengths - 1)  # a pad looks at what the last token sees
        new = mx.where(steps < lengths, self.queries, self.PAD)
        self.positions = mx.concatenate([self.positions, new], axis=1)
        logits = net(mx.array(padded(rows)), cache=self.layers)
        self.used += len(steps)
        self.offset = self.offset + lengths[:, 0]
        return logits


def padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """(rows, longest row), 0 beyond a row's end."""
    out = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    low, high = min(rows), max(rows)
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


def nll(logits: mx.array, targets: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each target in nats, (rows, tokens), from logits (rows, tokens, vocabulary)."""
    if mx.default_device() != mx.cpu:
        return np.array(nn.losses.cross_entropy(logits.astype(mx.float32), mx.array(targets)))
    # On a Linux CPU MLX takes 17 ns for an exponential, numpy 1.
    x = np.array(logits.astype(mx.float32), copy=False)
    top = x.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(x, targets[..., None], axis=-1)
    return (np.log(np.exp(x - top).sum(axis=-1, keepdims=True)) + top - chosen)[..., 0]


class Reading:
    """A Batch that goes on by one token a row at a time, as slang/numpy_gemma's Reading does."""

    def __init__(self, net: nn.Module, batch: Batch):
        self.net, self.batch = net, batch

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        self.batch = self.batch.take(rows)

    def next(self, tokens: list[int]) -> mx.array:
        """Append a token to each row; the likeliest one after it, (rows,)."""
        return mx.argmax(self.batch.read(self.net, [[t] for t in tokens])[:, -1], axis=-1)


def greedy(reading: Reading | cpu.Reading, last: list[int], stops: set[int]) -> list[list[int]]:
    """The likeliest continuation of each row, token by token, without its stop token; at most MAX_ANSWER_TOKENS.

    last is the token of each row that was not read yet.
    """
    answers: list[list[int]] = [[] for _ in last]
    rows, tokens, done = list(range(len(last))), last, set()
    for _ in range(MAX_ANSWER_TOKENS):
        tokens = reading.next(tokens).tolist()
        for row, token in zip(rows, tokens, strict=True):
            if token in stops:
                done.add(row)
            elif row not in done:
                answers[row].append(token)
        still = [i for i, row in enumerate(rows) if row not in done]
        if not still:
            break
        if len(still) <= 0.8 * len(rows):
            reading.keep(still)
            rows, tokens = [rows[i] for i in still], [tokens[i] for i in still]
    return answers


@dataclass
class Question:
    """What a net is to do: score each rest as the continuation of the prompt, and answer it greedily if asked."""

    prompt: list[int]
    rests: list[list[int]]
    generate: bool = False


Scores = list[list[np.ndarray]]  # of each question, each rest's NLL in nats, (tokens,)


def study(model: Model, who: str, questions: list[Question], bar: tqdm) -> Iterator[tuple[int, list[np.ndarray], list[int]]]:
    """(index, NLL in nats of every token of each rest, the greedy answer) of each question, in any order.

    A prompt runs once whatever is asked of it, and the system prompt that a batch begins with runs once for all of it.
    """
    net = model.nets[who]
    step = cpu.Step(net) if in_numpy(net) else None
    order = sorted(range(len(questions)), key=lambda i: (questions[i].prompt[:8], len(questions[i].prompt)))
    size = BATCH_IN_NUMPY if step else BATCH
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        asked = [questions[i] for i in indices]
        prompts = [question.prompt for question in asked]
        shared = prompts[0][: min(common_prefix(prompts), min(map(len, prompts)) - 1)]
        talking = [row for row, question in enumerate(asked) if question.generate]
        if step:
            scores = score_in_numpy(step, shared, asked)
            rows = [prompts[row][len(shared) : -1] for row in talking]
            reading = cpu.Reading(step, shared, rows) if talking else None
        else:
            batch = read_prompts(net, shared, prompts)
            scores = score(net, batch, asked)
            reading = Reading(net, batch if len(talking) == len(asked) else batch.take(talking)) if talking else None
        answers: dict[int, list[int]] = {}
        if talking:
            last = [prompts[row][-1] for row in talking]
            answers = dict(zip(talking, greedy(reading, last, model.stops), strict=True))
        for row, i in enumerate(indices):
            yield i, scores[row], answers.get(row, [])
        bar.update(len(indices))


def in_numpy(net: nn.Module) -> bool:
    """Whether slang/numpy_gemma computes it, which takes a third of the time that MLX's CPU kernels take."""
    return mx.default_device() == mx.cpu and cpu.why_not(net) is None


def score_in_numpy(step: cpu.Step, shared: list[int], questions: list[Question]) -> Scores:
    """Each rest's losses; the prompts begin with `shared`, which every pass reads once, as it reads a prompt once."""
    scores: Scores = [[] for _ in questions]
    todo = [i for i, question in enumerate(questions) if question.rests]
    first = slice(0, len(shared))
    while todo:
        packed, rows, answers, targets, part = [*shared], [cpu.Row(first)], [], [], []
        while todo and len(packed) < PACKED:
            part.append(todo.pop())
            question = questions[part[-1]]
            own = slice(len(packed), len(packed) + len(question.prompt) - len(shared))
            packed += question.prompt[len(shared) :]
            rows.append(cpu.Row(own, (first,)))
            for rest in question.rests:
                place = slice(len(packed), len(packed) + len(rest) - 1)
                packed += rest[:-1]
                rows.append(cpu.Row(place, (first, own)))
                answers += [own.stop - 1, *range(place.start, place.stop)]
                targets += rest
        losses = step.losses(cpu.Batch(np.array(packed), None, rows, np.array(answers), np.array(targets)))
        for i in part:
            for rest in questions[i].rests:
                scores[i].append(losses[: len(rest)])
                losses = losses[len(rest) :]
    return scores


def read_prompts(net: nn.Module, shared: list[int], prompts: list[list[int]]) -> Batch:
    """All of the prompts but their last tokens, which are read with what follows them."""
    batch = Batch(len(net.layers))
    if shared[:-1]:
        batch.read(net, [shared[:-1]])
    batch = batch.take([0] * len(prompts))
    batch.read(net, [tokens[max(0, len(shared) - 1) : -1] for tokens in prompts])
    mx.eval([(layer.keys, layer.values) for layer in batch.layers])
    return batch


def score(net: nn.Module, batch: Batch, questions: list[Question]) -> Scores:
    """Each rest's losses behind the prompts that `batch` has read."""
    scores: Scores = [[np.empty(0)] * len(question.rests) for question in questions]
    todo = [(row, n) for row, question in enumerate(questions) for n in range(len(question.rests))]
    todo.sort(key=lambda pair: len(questions[pair[0]].rests[pair[1]]))
    while todo:
        row, n = todo[-1]
        part = todo[-max(1, TOKENS // len(questions[row].rests[n])) :]
        del todo[-len(part) :]
        rests = [questions[row].rests[n] for row, n in part]
        inputs = [[questions[row].prompt[-1], *rest[:-1]] for (row, _), rest in zip(part, rests, strict=True)]
        losses = nll(batch.take([row for row, _ in part]).read(net, inputs), padded(rests))
        for (row, n), loss, rest in zip(part, losses, rests, strict=True):
            scores[row][n] = loss[: len(rest)]
    return scores
