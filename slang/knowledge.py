"""Does the model know the slang? Baseline against adapted, over the same questions, with one model load.

Reads   a base model, an adapter's folder (with its prompt.toml), data/{train,valid,test,eval}.jsonl, data/control.jsonl
Writes  results/<label>.json with every figure and every answer, results/<label>.html to look at (slang/report.py), and in
        results/LOG.md a row of its table and a line under each of its headings

What is measured, and on what (n is the number of slangs; every interval is a paired bootstrap over slangs):

  test loss        test.jsonl, the number of `mlx_lm.lora --test`: it counts a pad token as a target of every row
  answer loss      test.jsonl and eval.jsonl, mean NLL in nats over the answer's tokens and the closing <end_of_turn>
  choice accuracy  each trained slang, asked in a held-out question form: does one of its meanings get a higher mean
                   log-probability per token than three meanings of other slangs? Chance is 0.25
  chrF, exact      the greedy answer to the same question against all meanings of that slang
  control loss     control.jsonl, everyday Spanish: what the adapter damaged

Run as: python -m slang.knowledge --model models/tiny-gemma3 --adapter-path adapters/tiny
        python -m slang.knowledge --compare 20251004A 20251004C     adapted against adapted, paired by slang; loads no model
"""

import argparse
import hashlib
import importlib.metadata
import json
import math
import platform
import re
import signal
import string
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from huggingface_hub import snapshot_download
from mlx.utils import tree_unflatten
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load, load_model
from sacrebleu.metrics import CHRF
from tqdm import tqdm

from slang import cpu, jsonl, model_files, prompt, report
from slang.dictionary import Problem, key, synonyms, told
from slang.errors import UserError
from slang.report import WHO

N_CHOICES = 4
MAX_ANSWER_TOKENS = 64  # twice the longest meaning of the shipped dictionary
# Questions answered together in numpy. A step of few rows takes as long as one of 50, since every weight is read anyway; the
# keys and values of 256 rows take 1 GB with Gemma 3 270M when no answer ends.
BATCH_IN_NUMPY = 256
BATCH = 128  # questions whose prompts are held at a time
PACKED = 1024  # tokens of a pass in numpy, about: products are at their fastest, and memory stays below 100 MB
TOKENS = 512  # scored at a time: 512 MiB of logits over Gemma 3's vocabulary; the tiny model is 22 % slower with 4096
END_OF_TURN = "<end_of_turn>"
DRAWS = 10_000  # of the bootstrap
HARM = 1.10  # control loss above this many times the baseline's is harm done


class UsageError(Exception):
    """Something the person can mend; the message says what and how."""


# ---------------------------------------------------------------------------------------------------------------- model


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
    """A Batch that goes on by one token a row at a time, as slang/cpu.py's Reading does."""

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
    """Whether slang/cpu.py computes it, which takes a third of the time that MLX's CPU kernels take."""
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


# ---------------------------------------------------------------------------------------------------------------- items


@dataclass
class Item:
    """One slang, asked once: its four choices (the right one first) and all its meanings."""

    slang: str
    question: str
    choices: list[str]
    references: list[str]
    seen: bool  # in train.jsonl
    messages: prompt.Messages = field(repr=False)
    answers: dict[str, dict] = field(default_factory=dict)  # "baseline", "adapted" -> answer, choice, chrf, exact


def read(path: Path) -> list[dict]:
    """All records of a JSONL file. Raises UsageError naming the first line that can't be used."""
    rows = []
    for item in jsonl.records(path):
        if isinstance(item, Problem):
            raise UsageError(str(item))
        rows.append(item[3])
    if not rows:
        raise UsageError(f"{path}: no record; run make_jsonl.py and split_jsonl.py first")
    return rows


def stems(text: str) -> set[str]:
    """Content words cut to five letters, which joins cerveza and cervezas: enough to see that two meanings are alike."""
    return {word[:5] for word in key(text).split() if len(word) > 3}


def likeness(meanings: list[list[str]]) -> np.ndarray:
    """Cosine of the tf-idf vectors of the slangs' meanings, (slangs, slangs): 1 for equal, 0 for no word in common."""
    counts = [Counter(stem for text in texts for stem in stems(text)) for texts in meanings]
    vocabulary = {stem: i for i, stem in enumerate(sorted({stem for count in counts for stem in count}))}
    matrix = np.zeros((len(counts), len(vocabulary)), np.float32)
    for row, count in zip(matrix, counts, strict=True):
        for stem, n in count.items():
            row[vocabulary[stem]] = 1 + math.log(n)
    matrix *= np.log(len(counts) / np.maximum((matrix > 0).sum(axis=0), 1) + 1)
    matrix /= np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-9)
    return matrix @ matrix.T


SYNONYM = 0.2  # likeness above which a slang's meaning is no fair distractor
SYNONYMS = Path(__file__).parent.parent / "data/synonyms.txt"


def same_meaning() -> dict[str, set[str]]:
    """Each slang of SYNONYMS, as `key` spells it, with all that a group of it holds."""
    same: dict[str, set[str]] = defaultdict(set)
    for group in synonyms(SYNONYMS):
        keys = {key(slang) for slang in group}
        for slang in keys:
            same[slang] |= keys
    return same


def make_items(asked: prompt.Prompt, train: list[dict], others: list[dict], seed: int) -> list[Item]:
    """One item a slang, trained ones and others, in alphabetical order; the same for the same seed and data.

    Each slang is asked in one held-out question form; the right choice is a trained meaning where the slang was trained.
    """
    names: dict[str, str] = {}
    meanings: dict[str, dict[str, None]] = defaultdict(dict)
    trained: dict[str, dict[str, None]] = defaultdict(dict)
    for record in [*train, *others]:
        slang = key(jsonl.slang(record))
        names.setdefault(slang, jsonl.slang(record))
        meanings[slang][jsonl.answer(record)] = None
    for record in train:
        trained[key(jsonl.slang(record))][jsonl.answer(record)] = None

    slangs = sorted(names)
    like = likeness([list(meanings[slang]) for slang in slangs])
    seen = np.array([slang in trained for slang in slangs])
    same, number = same_meaning(), {slang: i for i, slang in enumerate(slangs)}
    # A number of its own for each slang: one added to the dictionary leaves the others' questions as they were.
    digests = [hashlib.blake2b(f"{seed}\0{slang}".encode(), digest_size=8).digest() for slang in slangs]
    codes = np.frombuffer(b"".join(digests), np.uint64)
    items = []
    for i, slang in enumerate(slangs):
        random = np.random.default_rng(int(codes[i]))
        # Distractors are trained as the slang is, so that being familiar does not give the right one away, nor hide it.
        others = seen if seen[i] or (~seen).sum() < N_CHOICES else ~seen
        others = others & (np.arange(len(slangs)) != i)
        others[[number[other] for other in same[slang] if other in number]] = False
        if others.sum() < N_CHOICES - 1:
            raise UsageError(f"{seen.sum()} trained slangs are too few for {N_CHOICES} choices; add slangs to the dictionary")
        fair = others & (like[i] < SYNONYM)
        fair = np.flatnonzero(fair if fair.sum() >= N_CHOICES - 1 else others)
        drawn = fair[np.argsort((codes[fair] ^ codes[i]) * np.uint64(0x9E3779B97F4A7C15))[: N_CHOICES - 1]]
        choices = []
        for j in (i, *drawn):
            texts = sorted(trained.get(slangs[j]) or meanings[slangs[j]])
            choices.append(texts[random.integers(len(texts))])
        messages = asked.ask(names[slang], int(random.integers(len(asked.held_out_questions))), held_out=True)
        references = sorted(meanings[slang])
        items.append(Item(names[slang], messages[-1]["content"], choices, references, slang in trained, messages))
    return items


def sample(slangs: Iterable[str], n: int | None, seed: int) -> set[str]:
    """n of the slangs, or all for None, drawn by the seed; another slang in the dictionary changes one of them at most."""
    drawn = sorted(set(slangs), key=lambda slang: hashlib.blake2b(f"{seed} sample {slang}".encode()).digest())
    return set(drawn[:n])


# -------------------------------------------------------------------------------------------------------------- measure


def loss_questions(model: Model, rows: list[dict]) -> list[Question]:
    """Each record's answer behind its question, with the pad token that `mlx_lm.lora --test` counts as a target too.

    mlx_lm's mask reaches one past the row's last token (mlx_lm.tuner.trainer.default_loss).
    """
    chats = [row["messages"] for row in rows]
    prompts = model.prompts([chat[:-1] for chat in chats])
    return [Question(asked, [[*rest, 0]]) for asked, rest in zip(prompts, model.rests(chats, prompts), strict=True)]


def loss_sums(model: Model, rest: list[int], loss: np.ndarray) -> np.ndarray:
    """(NLL, tokens) of the answer with its <end_of_turn>, (NLL, tokens) as mlx_lm counts them, NLL of the pad target."""
    n = rest.index(model.end) + 1
    return np.array([loss[:n].sum(), n, loss.sum(), len(rest), loss[-1]], np.float64)


def item_questions(model: Model, items: list[Item]) -> list[Question]:
    """Each item with its four choices, up to <end_of_turn>, to be scored, and to be answered."""
    prompts = model.prompts([item.messages for item in items])
    said = sorted({choice for item in items for choice in item.choices})
    chats = [[*items[0].messages, {"role": "assistant", "content": choice}] for choice in said]  # a choice is tokenised once
    whole = zip(said, model.rests(chats, [prompts[0]] * len(said)), strict=True)
    rests = {choice: rest[: rest.index(model.end) + 1] for choice, rest in whole}
    return [Question(asked, [rests[c] for c in i.choices], True) for asked, i in zip(prompts, items, strict=True)]


def judged(model: Model, item: Item, losses: list[np.ndarray], answer: list[int], chrf: CHRF) -> dict:
    """What an item's scores and answer are worth. NaN scores, and a tie, are not right."""
    scores = [float(loss.mean()) for loss in losses]
    choice = 0 if scores[0] < min(scores[1:]) else 1 + int(np.argmin(scores[1:]))
    text = model.tokenizer.decode(answer, skip_special_tokens=True).strip()
    return {
        "answer": text,
        "choice": choice,
        "choice_nll": scores,
        "right": choice == 0,
        "chrf": chrf.sentence_score(text, item.references).score if text else 0.0,
        "exact": key(text) in {key(reference) for reference in item.references},
        "capped": len(answer) >= MAX_ANSWER_TOKENS,
    }


def measure(model: Model, items: list[Item], sets: dict[str, list[dict]], asks: list[prompt.Messages]) -> tuple[dict, list]:
    """Fill `item.answers`; return the losses {set: {who: {slang: sums}}} and the answers to `asks`, a dict by who each."""
    parts = {name: loss_questions(model, rows) for name, rows in sets.items()}
    parts["items"] = item_questions(model, items)
    parts["asks"] = [Question(tokens, [], True) for tokens in model.prompts(asks)]
    where = [(name, i) for name, questions in parts.items() for i in range(len(questions))]
    questions = [parts[name][i] for name, i in where]
    losses: dict = {name: {who: {} for who in WHO} for name in sets}
    answers: list[dict[str, str]] = [{} for _ in asks]
    chrf = CHRF()

    def run(who: str) -> None:
        for n, scores, answer in study(model, who, questions, bar):
            name, i = where[n]
            if name == "items":
                items[i].answers[who] = judged(model, items[i], scores, answer, chrf)
            elif name == "asks":
                answers[i][who] = model.tokenizer.decode(answer, skip_special_tokens=True).strip()
            else:
                slang, sums = key(jsonl.slang(sets[name][i])), loss_sums(model, questions[n].rests[0], scores[0])
                losses[name][who][slang] = (losses[name][who].get(slang, 0) + sums).tolist()

    def run_beside(who: str) -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            run(who)

    with tqdm(total=2 * len(questions), unit="question", disable=None, leave=False) as bar:
        if mx.default_device() == mx.cpu and not in_numpy(model.nets["adapted"]):  # MLX computes on one core; two models on two
            # Ctrl-C ends the process at once: Python would first wait for the threads, and nothing is written yet.
            handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(run_beside, WHO))
            signal.signal(signal.SIGINT, handler)
        else:
            for who in WHO:
                run(who)
    return {name: {w: {k: by[w][k] for k in sorted(by[w])} for w in WHO} for name, by in losses.items()}, answers


# -------------------------------------------------------------------------------------------------------------- figures


def ppl(loss: float) -> float:
    """exp(loss), infinite where a float can't hold it."""
    return math.inf if loss > 700 else math.exp(loss)


def figure(name: str, base: tuple, adapted: tuple, seed: int) -> dict:
    """One row of the table: a ratio of sums over slangs for both models, and a 95 % interval of the difference.

    `base` and `adapted` are (numerators, denominators), (slangs,) each. The bootstrap draws slangs, the same for both models.
    """
    columns, n, random = np.array([*base, *adapted], np.float64).T, len(base[0]), np.random.default_rng(seed)
    differences = []
    for _ in range(0, DRAWS, 500):
        draw = random.integers(n, size=(500, n)) + n * np.arange(500)[:, None]
        sums = np.bincount(draw.ravel(), minlength=500 * n).reshape(500, n) @ columns
        differences.append(sums[:, 2] / sums[:, 3] - sums[:, 0] / sums[:, 1])
    low, high = np.percentile(np.concatenate(differences), [2.5, 97.5])
    total = columns.sum(axis=0)
    b, a = float(total[0] / total[1]), float(total[2] / total[3])
    return {"figure": name, "baseline": b, "adapted": a, "difference": a - b, "low": float(low), "high": float(high), "n": n}


SCORES = {"choice accuracy": "right", "answer chrF": "chrf", "exact answers": "exact"}


def figures(losses: dict[str, tuple[dict, dict]], items: list[tuple[bool, dict, dict]], seed: int) -> list[dict]:
    """The table of two models, losses first; slangs that were not trained are rows of their own.

    `losses` has both models' {slang: sums} of each set, `items` for each slang whether it was trained and both answers.
    """
    table = []
    for name, models in losses.items():
        both = [slang for slang in models[0] if slang in models[1]]
        sums = [tuple(np.array([side[slang][:2] for slang in both], np.float64).T) for side in models]  # JSON's null is NaN
        row = figure("control loss" if name == "control" else f"answer loss, {name}.jsonl", *sums, seed)
        table.append(row | {"ppl": [ppl(row["baseline"]), ppl(row["adapted"])]})
    for trained, suffix in ((True, ""), (False, ", unseen slangs")):
        group = [answers for seen, *answers in items if seen == trained]
        for name, score in SCORES.items():
            pairs = [[answer[score] for answer in answers] for answers in group if all(score in answer for answer in answers)]
            if pairs:
                values = [(side, [1.0] * len(pairs)) for side in zip(*pairs, strict=True)]
                table.append(figure(name + suffix, *values, seed))
    return table


def verdict(table: list[dict], items: list[dict]) -> tuple[str, str]:
    """(better, mixed, no better or worse; a line that says why, and what to do).

    Raises UsageError when there is nothing to be better than.
    """
    rows = {row["figure"]: row for row in table}
    control, choice = rows.get("control loss"), rows["choice accuracy"]
    if not all(math.isfinite(row["baseline"]) for row in table):
        raise UsageError("the base model's loss is not a number; set MODEL to another, a bfloat16 one for instance")
    if not all(math.isfinite(row["adapted"]) for row in table):
        return "worse", "the adapted model's loss is not a number: training diverged; train again with a lower --learning-rate"
    pairs = [[item[who] for who in WHO] for item in items]
    nlls = [[answer["choice_nll"] for answer in side] for side in zip(*pairs, strict=True)]
    if all(b["answer"] == a["answer"] for b, a in pairs) and np.allclose(*nlls, rtol=0, atol=1e-6):
        return "no better", "the adapter does not change the model's output; train longer, or set ADAPTER_PATH to another"
    says = "choice accuracy {baseline:.3f} -> {adapted:.3f} ({difference:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}"
    because = f"{says}, {{n}} slangs)".format(**choice)
    harm = control and control["low"] > 0 and control["adapted"] > HARM * control["baseline"]
    if harm:
        because += f"; everyday Spanish suffers: control loss {control['baseline']:.3f} -> {control['adapted']:.3f}"
        because += f" ({control['adapted'] / control['baseline'] - 1:+.0%}); try a lower --learning-rate or fewer --iters"
    if choice["high"] < 0:
        return "worse", because
    if choice["low"] > 0:
        return ("mixed" if harm else "better"), because
    return ("worse" if harm else "no better"), because + ("" if harm else "; train longer or on more wordings")


def odd(items: list[dict]) -> list[str]:
    """Answers that are none: empty, or cut off because the model did not stop."""
    tests = {"empty": lambda a: not a["answer"], "cut off: they never stopped": lambda a: a["capped"]}
    counts = [(who, sum(test(item[who]) for item in items), what) for who in WHO for what, test in tests.items()]
    return [f"{who}: {n} of {len(items)} answers {what}" for who, n, what in counts if n]


JUDGED_BY = {"right": "choices", "chrf": "references", "exact": "references"}


def comparable(item: dict, other: dict) -> dict:
    """What an item's adapted answer is worth, as far as the other's was judged by the same."""
    return {score: item["adapted"][score] for score, by in JUDGED_BY.items() if item[by] == other[by]}


def compare(a: dict, b: dict) -> tuple[list[dict], list[str]]:
    """(the table of b's adapted model against a's, what keeps the two from being like with like).

    Raises UsageError when they have nothing in common.
    """
    other = {item["slang"]: item for item in b["items"]}
    pairs = [(item, other[item["slang"]]) for item in a["items"] if item["slang"] in other]
    notes = [
        f"the {what} differ"
        for what, name in (("prompts", "prompt"), ("base models", "model"), ("seeds of the questions", "seed"))
        if a[name] != b[name]
    ]
    files = [name for name in a["data"] | b["data"] if a["data"].get(name) != b["data"].get(name)]
    notes += [f"{name}.jsonl differs" for name in files]
    left_out = {r["label"]: len(r["items"]) - len(pairs) for r in (a, b)}
    notes += [f"{n} slangs of {label} are left out" for label, n in left_out.items() if n]
    for what, does, name in (("were asked another question", "are left out", "question"),
                             ("had other choices", "are left out of choice accuracy", "choices"),
                             ("have other known meanings", "are left out of chrF and exact answers", "references"),
                             ("were trained in one of the two only", "count as unseen", "seen")):  # fmt: skip
        if n := sum(x[name] != y[name] for x, y in pairs):
            notes.append(f"{n} of {len(pairs)} slangs {what}, and {does}")
    losses = {name: tuple(r["losses"][name]["adapted"] for r in (a, b)) for name in a["losses"] if name not in files}
    answers = [
        (x["seen"] and y["seen"], comparable(x, y), comparable(y, x)) for x, y in pairs if x["question"] == y["question"]
    ]
    if not losses and not answers:
        raise UsageError(f"{a['label']} and {b['label']} share no slang and no data: nothing to compare")
    return figures(losses, answers, a["seed"]), notes


# ------------------------------------------------------------------------------------------------------------------ log


def next_label(results: Path, today: date) -> str:
    """`20251004[C]`: today and the next letter that neither the log nor a file has."""
    day = today.strftime("%Y%m%d")
    log = results / "LOG.md"
    known = log.read_text(encoding="utf-8") if log.exists() else ""
    known += " ".join(path.name for path in results.glob("*.json"))
    used = set(re.findall(re.escape(day) + r"\[([A-Z]+)\]", known))
    letters = [*string.ascii_uppercase, *(a + b for a in string.ascii_uppercase for b in string.ascii_uppercase)]
    return f"{day}[{next(letter for letter in letters if letter not in used)}]"


HEADINGS = {"baseline": "## Baseline", "adapted": "## After fine-tuning"}
COLUMNS = "| run | note | model | slangs | answer ppl | choice accuracy | chrF | control loss |"


def log_entry(text: str, heading: str, line: str) -> str:
    """The log with a line added at the end of a heading's section, the heading too where it is missing."""
    lines = text.rstrip("\n").split("\n") if text.strip() else ["# Results"]
    if heading not in lines:
        lines += ["", heading, ""]
    at = lines.index(heading) + 1
    end = next((i for i in range(at, len(lines)) if lines[i].startswith("## ")), len(lines))
    section = "\n".join(lines[at:end]).strip("\n")
    rest = "\n".join(lines[end:])
    text = "\n".join([*lines[:at], "", *([section] if section else []), line, *(["", rest] if rest else [])])
    return text.rstrip("\n") + "\n"


def log_row(text: str, cells: Sequence[str]) -> str:
    """The log with a row at the end of its table; a new table stands below the title, above what a person wrote."""
    row = "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
    lines = text.rstrip("\n").split("\n") if text.strip() else ["# Results"]
    if COLUMNS not in lines:
        at = 1 if lines[0].startswith("# ") else 0
        rule = "|" + " --- |" * len(cells)
        lines[at:at] = [*([""] if at else []), COLUMNS, rule, *([""] if lines[at : at + 1] != [""] else [])]
    at = lines.index(COLUMNS)
    while at < len(lines) and lines[at].startswith("|"):
        at += 1
    return "\n".join([*lines[:at], row, *lines[at:]]) + "\n"


CELLS = {  # of the figures in COLUMNS
    "answer loss, test.jsonl": "{ppl[0]:.1f} -> {ppl[1]:.1f}",
    "choice accuracy": "{baseline:.3f} -> {adapted:.3f}",
    "answer chrF": "{baseline:.1f} -> {adapted:.1f}",
    "control loss": "{baseline:.3f} -> {adapted:.3f}",
}


def log_cells(table: list[dict]) -> list[str]:
    """The figures of the log's table, baseline -> adapted; empty where one is not there."""
    rows = {row["figure"]: row for row in table}
    return [form.format(**rows[name]) if name in rows else "" for name, form in CELLS.items()]


def training(path: Path) -> dict[str, list[list[float]]]:
    """{"train": [[iteration, loss], ...], "valid": [...]} of a training log in JSONL; lines that say neither are skipped."""
    curves: dict[str, list[list[float]]] = {"train": [], "valid": []}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            for name, key_ in (("train", "train_loss"), ("valid", "val_loss")):
                if math.isfinite(loss := float(row.get(key_, math.nan))):
                    curves[name].append([float(row["iteration"]), loss])
        except (ValueError, TypeError, AttributeError, KeyError):
            continue
    return curves


def finite(value: object) -> object:
    """The same structure with None for every NaN and infinity, which are not JSON."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description="Compare base and adapted model.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--model", default="mlx-community/gemma-3-1b-it-bf16", help="base model, folder or Hugging Face repo")
    p.add_argument("--adapter-path", default="adapters", help="folder with adapters.safetensors and prompt.toml")
    p.add_argument("--data", default="data", help="folder with train, valid, test and eval.jsonl")
    p.add_argument("--results", default="results", help="folder of LOG.md and the JSON files")
    p.add_argument("--output", help="write this JSON file, and the page and LOG.md beside it, in place of a labelled one")
    p.add_argument("--ask", nargs="*", default=[], help="questions or slangs to ask both models")
    p.add_argument("--note", default="", help="what was changed, for the log")
    p.add_argument(
        "--test-lines", nargs=2, metavar=("BASELINE", "ADAPTED"), help="what mlx_lm.lora --test printed; recomputed without"
    )
    p.add_argument("--compare", nargs=2, metavar=("A", "B"), help="put two runs side by side: labels or JSON files")
    p.add_argument("--fail-if-worse", action="store_true", help="exit with 3 when the adapter does harm, to slang or the rest")
    p.add_argument(
        "--sample", type=int, metavar="N", help="ask N slangs only, drawn by the seed, and as many rows of each file"
    )
    p.add_argument("--seed", type=int, default=42, help="draws distractors, question forms and bootstrap samples")
    return p


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    if args.output and not args.output.endswith(".json"):
        p.error(f"--output: {args.output} is no name of a JSON file; end it in .json")
    if args.seed < 0:
        p.error(f"--seed {args.seed}: give a whole number from 0")
    if args.sample is not None and args.sample < 1:
        p.error(f"--sample {args.sample}: give a whole number from 1")
    try:
        if args.compare:
            a, b = (report.read(report.find(name, Path(args.results))) for name in args.compare)
            print(report.compared(*compare(a, b), (a["label"], b["label"])))
            return 0
        return run(args)
    except (UsageError, UserError, prompt.PromptError, report.RunError) as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(told(error, args.results), file=sys.stderr)
    except KeyboardInterrupt:
        print("Stopped; nothing was written", file=sys.stderr)
        return 130
    return 1


def run(args: argparse.Namespace) -> int:
    """Measure, print, log."""
    data, adapter = Path(args.data), Path(args.adapter_path)
    results = Path(args.output).parent if args.output else Path(args.results)
    label = Path(args.output).stem if args.output else next_label(results, date.today())
    asked = prompt.load(adapter / "prompt.toml")
    rows = {name: read(data / f"{name}.jsonl") for name in ("train", "valid", "test", "eval")}
    items = make_items(asked, rows["train"], rows["valid"] + rows["test"], args.seed)
    sets = {name: rows[name] for name in ("test", "eval")}
    # The data folder's own, else the one that comes with the project.
    control = next((f for f in (data / "control.jsonl", Path("data/control.jsonl")) if f.exists()), None)
    if control:
        sets["control"] = read(control)
    slangs = len(items)
    few = sample([key(item.slang) for item in items], args.sample, args.seed)
    items = [item for item in items if key(item.slang) in few]
    for name, some in sets.items():
        few = sample([key(jsonl.slang(row)) for row in some], args.sample, args.seed)
        sets[name] = [row for row in some if key(jsonl.slang(row)) in few]
    questions = [prompt.question(asked, text) for text in args.ask]

    started = time.monotonic()
    model = Model(args.model, args.adapter_path)
    losses, answers = measure(model, items, sets, [asked.chat(question) for question in questions])
    sums = {who: np.sum(list(losses["test"][who].values()), axis=0) for who in WHO}
    recomputed = {who: float(sums[who][2] / sums[who][3]) for who in WHO}
    lines = args.test_lines or [f"Test loss {recomputed[who]:.3f}, Test ppl {ppl(recomputed[who]):.3f}." for who in WHO]
    result = {
        "label": label,
        "note": args.note,
        "date": date.today().isoformat(),
        "model": model_files.typed(args.model),
        "adapter": {"path": args.adapter_path, "sha256": sha256(adapter / "adapters.safetensors")},
        "prompt": {"sha256": asked.hash(), "system": asked.system},
        "data": {name: sha256(data / f"{name}.jsonl") for name in rows} | ({"control": sha256(control)} if control else {}),
        "sample": f"a sample of {len(items)} of {slangs} slangs" if len(items) < slangs else None,
        "entries": {"slangs": slangs, "records": sum(len(rows[name]) for name in ("train", "valid", "test"))},
        "versions": {"python": platform.python_version(),
                     **{name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm", "transformers", "numpy")}},
        "seed": args.seed,
        "seconds": round(time.monotonic() - started, 1),
        "test": {who: {"printed": line, "recomputed": recomputed[who], "rows": len(sets["test"]),
                       "pad_share": float(sums[who][4] / sums[who][2]),
                       "pad_loss": float(sums[who][4] / len(sets["test"])),
                       "without_pad": float((sums[who][2] - sums[who][4]) / (sums[who][3] - len(sets["test"])))}
                 for who, line in zip(WHO, lines, strict=True)},
        "asked": [{"question": q, **a} for q, a in zip(questions, answers, strict=True)],
        "losses": losses,
        "items": [{"slang": i.slang, "question": i.question, "choices": i.choices, "references": i.references,
                   "seen": i.seen, **i.answers} for i in items],
    }  # fmt: skip
    pairs = [(i.seen, *(i.answers[who] for who in WHO)) for i in items]
    result["figures"] = figures({name: tuple(by[who] for who in WHO) for name, by in losses.items()}, pairs, args.seed)
    result["verdict"], result["because"] = verdict(result["figures"], result["items"])
    result["odd"] = odd(result["items"])
    result["training"] = training(adapter / "log.jsonl")
    print(report.text(result))

    results.mkdir(parents=True, exist_ok=True)
    log = results / "LOG.md"
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    text = log_row(
        text,
        [
            label,
            args.note,
            result["model"],
            f"{len(items)} of {slangs}" if result["sample"] else str(slangs),
            *log_cells(result["figures"]),
        ],
    )
    for heading, line in zip(HEADINGS.values(), lines, strict=True):
        remarks = "; ".join(filter(None, (args.note, result["sample"])))
        text = log_entry(text, heading, f"- {label}: `{line}`" + (f" ({remarks})" if remarks else ""))
    paths = [results / f"{label}.json", results / f"{label}.html", log]
    result = finite(result)
    with jsonl.replacing(*paths) as files:
        for file, content in zip(files, (json.dumps(result, ensure_ascii=False, indent=1) + "\n", report.page(result), text),
                                 strict=True):  # fmt: skip
            file.write(content.encode())
    print(f"\n{label}: {', '.join(map(str, paths))}")
    return 3 if args.fail_if_worse and result["verdict"] in ("worse", "mixed") else 0


if __name__ == "__main__":
    sys.exit(main())
