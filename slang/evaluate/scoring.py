"""How likely a model finds an answer, and what it answers itself: many questions at a time.

On a CPU slang/numpy_gemma computes Gemma 3 in numpy, elsewhere MLX does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.utils import dequantize_model, load_model
from tqdm import tqdm

from slang import numpy_gemma as cpu
from slang.evaluate.batch import Batch, Reading, read_prompts
from slang.evaluate.tokens import padded, stop_tokens
from slang.models import find
from slang.models.load import add_adapter, dequantized, load

# The 30 words that slang.dictionary allows a meaning are about 41 of Gemma's; the longest one of
# the shipped dictionary has 33.
MAX_ANSWER_TOKENS = 48
# Questions answered together in numpy. A step of few rows takes as long as one of 50, since every
# weight is read anyway. The keys and values of 256 rows take 1 GB with Gemma 3 270M when no answer
# ends.
BATCH_IN_NUMPY = 256
BATCH = 128  # questions whose prompts are held at a time
# Tokens of a pass in numpy, about: products are at their fastest, and memory stays below 100 MB.
PACKED = 1024
# Tokens scored at a time: 512 MiB of logits over Gemma 3's vocabulary. With 4096 the tiny model is
# 22 % slower.
TOKENS = 512


@dataclass
class Models:
    """A base model and the same with an adapter. They share the weights of the base."""

    baseline: nn.Module
    adapted: nn.Module
    tokenizer: object


def load_models(path: str, adapter_path: str) -> Models:
    """The base model and the adapted one, in float32 on a CPU. Raises UserError for a bad adapter.

    MLX multiplies bfloat16 matrices about 18 times slower on a CPU. A quantised base is computed
    unquantised there: an adapter that is fused into its weights must not be rounded with them.
    """
    base, tokenizer = load(path)
    # Its weights are never read: it gets those of the base.
    adapted, _ = load_model(find.find(path), lazy=True)
    on_cpu = mx.default_device() == mx.cpu
    if on_cpu:
        cpu.to_float32(base)
        base = dequantized(base)
        adapted = dequantize_model(adapted)
    adapted.update(base.parameters())
    add_adapter(adapted, Path(adapter_path), path)
    if on_cpu:
        adapted.set_dtype(mx.float32)
        # One product in place of three. In float32 the sum of both is as good as the two apart.
        fused = [(name, m.fuse()) for name, m in adapted.named_modules() if hasattr(m, "fuse")]
        adapted.update_modules(tree_unflatten(fused))
    mx.eval(adapted.parameters())
    return Models(base.eval(), adapted.eval(), tokenizer)


@dataclass
class Question:
    """What a model is asked, in tokens.

    Each of `answers` is scored behind the prompt. With `generate` the model answers it too.
    """

    prompt: list[int]
    answers: list[list[int]]
    generate: bool = False


class Reply(NamedTuple):
    """For each of a question's answers the loss of every token in nats, (tokens,); and the
    model's own greedy answer, empty where none was wanted."""

    losses: list[np.ndarray]
    generated: list[int]


def ask(
    net: nn.Module, tokenizer, questions: Sequence[Question], bar: tqdm | None = None
) -> list[Reply]:
    """Score and answer all questions. Returns a Reply for each, in their order.

    A prompt runs once, however many answers it has. What all prompts of a batch begin with (the
    system prompt) runs once for the batch.
    """
    step = cpu.Step(net) if in_numpy(net) else None
    size = BATCH_IN_NUMPY if step else BATCH
    stops = stop_tokens(tokenizer)
    # Prompts of one kind and of like length go together.
    order = sorted(
        range(len(questions)), key=lambda i: (questions[i].prompt[:8], len(questions[i].prompt))
    )
    replies: list[Reply] = [Reply([], [])] * len(questions)
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        batch = [questions[i] for i in indices]
        answered = ask_in_numpy(step, batch, stops) if step else ask_in_mlx(net, batch, stops)
        for i, reply in zip(indices, answered, strict=True):
            replies[i] = reply
        if bar is not None:
            bar.update(len(indices))
    return replies


def in_numpy(net: nn.Module) -> bool:
    """Whether slang/numpy_gemma computes it, in a third of the time of MLX's CPU kernels."""
    return mx.default_device() == mx.cpu and cpu.why_not(net) is None


def shared_start(questions: list[Question]) -> list[int]:
    """The tokens that all prompts begin with; at least one of each prompt is left."""
    prompts = [question.prompt for question in questions]
    length = min(cpu.common_prefix(prompts), min(map(len, prompts)) - 1)
    return prompts[0][:length]


def greedy(reading: Reading | cpu.Reading, last: list[int], stops: set[int]) -> list[list[int]]:
    """The likeliest continuation of each row, token by token, without its stop token.

    last  the token of each row that was not read yet
    An answer has at most MAX_ANSWER_TOKENS tokens.
    """
    answers: list[list[int]] = [[] for _ in last]
    rows = list(range(len(last)))
    tokens = last
    done: set[int] = set()
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
            rows = [rows[i] for i in still]
            tokens = [tokens[i] for i in still]
    return answers


def with_greedy_answers(
    questions: list[Question], scores: list[list[np.ndarray]], answers: list[list[int]]
) -> list[Reply]:
    """A Reply for each question; `answers` are those of the questions that want one, in order."""
    own = iter(answers)
    return [
        Reply(losses, next(own) if question.generate else [])
        for question, losses in zip(questions, scores, strict=True)
    ]


# ------------------------------------------------------------------------------------------- numpy


def ask_in_numpy(step: cpu.Step, questions: list[Question], stops: set[int]) -> list[Reply]:
    """A batch of questions, computed by slang/numpy_gemma."""
    shared = shared_start(questions)
    scores = score_in_numpy(step, shared, questions)
    to_answer = [question.prompt for question in questions if question.generate]
    answers: list[list[int]] = []
    if to_answer:
        reading = cpu.Reading(step, shared, [tokens[len(shared) : -1] for tokens in to_answer])
        answers = greedy(reading, [tokens[-1] for tokens in to_answer], stops)
    return with_greedy_answers(questions, scores, answers)


def score_in_numpy(
    step: cpu.Step, shared: list[int], questions: list[Question]
) -> list[list[np.ndarray]]:
    """The losses of each question's answers.

    A pass holds the shared start, then question after question: a prompt, then its answers side by
    side. Each prompt sees the start, each answer the start and its prompt.
    """
    scores: list[list[np.ndarray]] = [[] for _ in questions]
    todo = [i for i, question in enumerate(questions) if question.answers]
    start = slice(0, len(shared))
    while todo:
        packed = [*shared]
        rows = [cpu.Row(start)]
        predicting: list[int] = []  # where in packed an answer's token is predicted
        targets: list[int] = []  # that token
        part: list[int] = []
        while todo and len(packed) < PACKED:
            part.append(todo.pop())
            question = questions[part[-1]]
            own = question.prompt[len(shared) :]
            prompt = slice(len(packed), len(packed) + len(own))
            packed += own
            rows.append(cpu.Row(prompt, (start,)))
            for answer in question.answers:
                place = slice(len(packed), len(packed) + len(answer) - 1)
                packed += answer[:-1]
                rows.append(cpu.Row(place, (start, prompt)))
                predicting += [prompt.stop - 1, *range(place.start, place.stop)]
                targets += answer
        batch = cpu.Batch(np.array(packed), None, rows, np.array(predicting), np.array(targets))
        losses = step.losses(batch)
        for i in part:
            for answer in questions[i].answers:
                scores[i].append(losses[: len(answer)])
                losses = losses[len(answer) :]
    return scores


# --------------------------------------------------------------------------------------------- MLX


def ask_in_mlx(net: nn.Module, questions: list[Question], stops: set[int]) -> list[Reply]:
    """A batch of questions, computed by MLX."""
    batch = read_prompts(net, shared_start(questions), [question.prompt for question in questions])
    scores = score_in_mlx(net, batch, questions)
    to_answer = [row for row, question in enumerate(questions) if question.generate]
    answers: list[list[int]] = []
    if to_answer:
        reading = Reading(net, batch.take(to_answer))
        answers = greedy(reading, [questions[row].prompt[-1] for row in to_answer], stops)
    return with_greedy_answers(questions, scores, answers)


def score_in_mlx(net: nn.Module, batch: Batch, questions: list[Question]) -> list[list[np.ndarray]]:
    """The losses of each question's answers behind the prompts that `batch` has read."""
    scores = [[np.empty(0)] * len(question.answers) for question in questions]
    # Answers of like length go together, the longest first.
    todo = [
        (row, n) for row, question in enumerate(questions) for n in range(len(question.answers))
    ]
    todo.sort(key=lambda pair: len(questions[pair[0]].answers[pair[1]]))
    while todo:
        row, n = todo[-1]
        size = max(1, TOKENS // len(questions[row].answers[n]))
        part = todo[-size:]
        del todo[-size:]
        answers = [questions[row].answers[n] for row, n in part]
        inputs = [
            [questions[row].prompt[-1], *answer[:-1]]
            for (row, _), answer in zip(part, answers, strict=True)
        ]
        logits = batch.take([row for row, _ in part]).read(net, inputs)
        losses = cross_entropy(logits, padded(answers))
        for (row, n), loss, answer in zip(part, losses, answers, strict=True):
            scores[row][n] = loss[: len(answer)]
    return scores


def cross_entropy(logits: mx.array, targets: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each target in nats, (rows, tokens).

    logits (rows, tokens, vocabulary), targets (rows, tokens)
    """
    if mx.default_device() != mx.cpu:
        return np.array(nn.losses.cross_entropy(logits.astype(mx.float32), mx.array(targets)))
    # On a CPU numpy's exponentials are faster than MLX's (see slang/numpy_gemma).
    x = np.array(logits.astype(mx.float32), copy=False)
    top = x.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(x, targets[..., None], axis=-1)
    return (np.log(np.exp(x - top).sum(axis=-1, keepdims=True)) + top - chosen)[..., 0]
