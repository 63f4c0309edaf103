"""Does the model know the slang? Baseline against adapted, over the same questions, with one model load.

Reads   a base model, an adapter's folder (with its prompt.toml), data/{train,valid,test,eval}.jsonl, data/control.jsonl
Writes  results/<label>.json with every figure and every answer, and a line under each heading of results/LOG.md

What is measured, and on what (n is the number of slangs; every interval is a paired bootstrap over slangs):

  test loss        test.jsonl, the number of `mlx_lm.lora --test`: it counts a pad token as a target of every row
  answer loss      test.jsonl and eval.jsonl, mean NLL in nats over the answer's tokens and the closing <end_of_turn>
  choice accuracy  each trained slang, asked in a held-out question form: does one of its meanings get a higher mean
                   log-probability per token than three meanings of other slangs? Chance is 0.25
  chrF, exact      the greedy answer to the same question against all meanings of that slang
  control loss     control.jsonl, everyday Spanish: what the adapter damaged

Run as: python -m slang.knowledge --model models/tiny-gemma3 --adapter-path adapters/tiny
"""

import argparse
import hashlib
import importlib.metadata
import json
import math
import platform
import re
import string
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.base import create_causal_mask
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load
from sacrebleu.metrics import CHRF
from tqdm import tqdm

from slang import jsonl, prompt
from slang.dictionary import Problem, key

N_CHOICES = 4
MAX_ANSWER_TOKENS = 64  # twice the longest meaning of the shipped dictionary
BATCH = 32  # questions scored at a time
DRAWS = 10_000
END_OF_TURN = "<end_of_turn>"


class UsageError(Exception):
    """Something the person can mend; the message says what and how."""


# ---------------------------------------------------------------------------------------------------------------- model


class Model:
    """A base model with an adapter that can be switched off and on without loading anything again."""

    def __init__(self, path: str, adapter_path: str):
        self.net, self.tokenizer = load(path)
        if mx.default_device() == mx.cpu:
            # MLX multiplies bf16 matrices about 18 times slower than float32 on a CPU.
            self.net.set_dtype(mx.float32)
        self.end = self.tokenizer.convert_tokens_to_ids(END_OF_TURN)
        self.stops = {self.end, *self.tokenizer.eos_token_ids}
        modules, weights = dict(self.net.named_modules()), tree_flatten(self.net.parameters())
        load_adapters(self.net, adapter_path)
        if mx.default_device() == mx.cpu:
            self.net.set_dtype(mx.float32)
        self.net.eval()
        adapted = [(n, m) for n, m in self.net.named_modules() if modules.get(n, m) is not m]
        self._modules = {False: [(n, modules[n]) for n, _ in adapted], True: adapted}
        self._weights = {False: weights, True: tree_flatten(self.net.parameters())}

    def use_adapter(self, on: bool) -> None:
        """Answer as the adapted model from now on, or as the base model."""
        self.net.update_modules(tree_unflatten(self._modules[on]))
        self.net.update(tree_unflatten(self._weights[on]))

    def prompt_tokens(self, messages: prompt.Messages) -> list[int]:
        """Token ids up to where the model's turn begins."""
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    def answer_tokens(self, messages: prompt.Messages) -> tuple[list[int], list[int]]:
        """(prompt, rest) of a whole chat: the rest is the answer, <end_of_turn> and what the template puts after it."""
        asked = self.prompt_tokens(messages[:-1])
        whole = self.tokenizer.apply_chat_template(messages, return_dict=False)
        return asked, whole[len(asked) :]


class PromptCache:
    """Keys and values of prompts, one layer: filled once, then read by any number of continuations.

    It stands where mlx_lm passes a layer's cache. Unlike mlx_lm's own it is not changed by a continuation, so that four
    choices, and then the greedy answer, start from the same prompt without running it again.
    """

    def __init__(self, keys: mx.array | None = None, values: mx.array | None = None):
        self.keys, self.values = keys, values  # (batch, kv heads, tokens, head dim)

    @property
    def offset(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append the new keys and values, and return all."""
        if self.keys is not None:
            keys = mx.concatenate([self.keys, keys], axis=2)
            values = mx.concatenate([self.values, values], axis=2)
        self.keys, self.values = keys, values
        return keys, values

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """The causal mask of n new tokens behind those in the cache (mlx_lm.models.base.create_attention_mask asks)."""
        window_size = window_size if window_size and self.offset + n > window_size else None
        if n == 1 and not window_size:
            return None
        if return_array or window_size or self.offset:
            return create_causal_mask(n, self.offset, window_size=window_size)
        return "causal"

    def repeated(self, n: int) -> "PromptCache":
        """A copy with each row n times, to be continued in n ways."""
        if self.keys is None:
            return PromptCache()
        return PromptCache(mx.repeat(self.keys, n, axis=0), mx.repeat(self.values, n, axis=0))


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    low, high = min(rows), max(rows)
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


def prefilled(net: nn.Module, prompts: list[list[int]], bar: tqdm) -> Iterator[tuple[list[int], list[PromptCache]]]:
    """(indices, caches) of batches of prompts of equal length, each without its last token; the common prefix runs once."""
    shared = min(common_prefix(prompts), min(map(len, prompts)) - 1)
    prefix = [PromptCache() for _ in net.layers]
    if shared:
        net(mx.array([prompts[0][:shared]]), cache=prefix)
    by_length = defaultdict(list)
    for i, tokens in enumerate(prompts):
        by_length[len(tokens)].append(i)
    for length in sorted(by_length):
        for start in range(0, len(by_length[length]), BATCH):
            batch = by_length[length][start : start + BATCH]
            caches = [cache.repeated(len(batch)) for cache in prefix]
            if length - 1 > shared:
                net(mx.array([prompts[i][shared:-1] for i in batch]), cache=caches)
            mx.eval([(cache.keys, cache.values) for cache in caches if cache.offset])
            yield batch, caches
            bar.update(len(batch))


def logits_of(net: nn.Module, tokens: mx.array, caches: list[PromptCache]) -> mx.array:
    """Logits in float32, (rows, tokens, vocabulary)."""
    return net(tokens, cache=caches).astype(mx.float32)


def nll(net: nn.Module, asked: list[int], rests: list[list[int]], caches: list[PromptCache]) -> np.ndarray:
    """Negative log-likelihood in nats of every token of the rests, (rows, longest rest); row i continues cache row i.

    `asked` holds the last token of each row's prompt. What is beyond a row's end means nothing.
    """
    longest = max(map(len, rests))
    padded = np.zeros((len(rests), longest), np.int32)
    for row, rest in zip(padded, rests, strict=True):
        row[: len(rest)] = rest
    inputs = np.concatenate([np.array(asked, np.int32)[:, None], padded[:, :-1]], axis=1)
    logits = logits_of(net, mx.array(inputs), caches)
    return np.array(nn.losses.cross_entropy(logits, mx.array(padded)))


def greedy(net: nn.Module, asked: list[int], caches: list[PromptCache], stops: set[int]) -> list[list[int]]:
    """The likeliest continuation of each row, token by token, without its stop token; at most MAX_ANSWER_TOKENS."""
    rows: list[list[int]] = [[] for _ in asked]
    open_rows = set(range(len(rows)))
    token = mx.array(asked)[:, None]
    for _ in range(MAX_ANSWER_TOKENS):
        token = mx.argmax(net(token, cache=caches)[:, -1:], axis=-1)
        for i, t in enumerate(token[:, 0].tolist()):
            if i in open_rows and t in stops:
                open_rows.discard(i)
            elif i in open_rows:
                rows[i].append(t)
        if not open_rows:
            break
    return rows


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


def make_items(asked: prompt.Prompt, train: list[dict], others: list[dict], seed: int) -> list[Item]:
    """One item a slang, trained ones and others, in alphabetical order; the same for the same seed and data.

    Each slang is asked in one held-out question form. The right choice is a trained meaning where the slang was trained, and
    the distractors are trained meanings of other slangs, so that being familiar does not give the right one away.
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
    pool = [i for i, slang in enumerate(slangs) if slang in trained]
    items = []
    for i, slang in enumerate(slangs):
        # A generator of its own for each slang: a slang added to the dictionary leaves the others' questions as they were.
        digest = hashlib.blake2b(f"{seed}\0{slang}".encode(), digest_size=8).digest()
        random = np.random.default_rng(int.from_bytes(digest, "big"))
        own = sorted(trained.get(slang, meanings[slang]))
        fair = [j for j in pool if j != i and like[i, j] < SYNONYM]
        if len(fair) < N_CHOICES - 1:
            fair = [j for j in pool if j != i]
        if len(fair) < N_CHOICES - 1:
            raise UsageError(f"{len(pool)} trained slangs are too few for {N_CHOICES} choices; add slangs to the dictionary")
        distractors = [slangs[j] for j in sorted(fair, key=lambda j: hashlib.blake2b(digest + slangs[j].encode()).digest())]
        choices = [own[random.integers(len(own))]]
        for other in distractors[: N_CHOICES - 1]:
            texts = sorted(trained[other])
            choices.append(texts[random.integers(len(texts))])
        messages = asked.ask(names[slang], int(random.integers(len(asked.held_out_questions))), held_out=True)
        references = sorted(meanings[slang])
        items.append(Item(names[slang], messages[-1]["content"], choices, references, slang in trained, messages))
    return items


# -------------------------------------------------------------------------------------------------------------- measure


def loss_rows(model: Model, rows: list[dict], bar: tqdm) -> list[dict]:
    """For each record the summed NLL and the number of tokens: of the answer, and as `mlx_lm.lora --test` counts them.

    mlx_lm's mask reaches one past the row's last token (mlx_lm.tuner.trainer.default_loss), so a pad token is a target too.
    """
    chats = [model.answer_tokens(row["messages"]) for row in rows]
    prompts = [asked for asked, _ in chats]
    out: list[dict] = [{} for _ in rows]
    for batch, caches in prefilled(model.net, prompts, bar):
        rests = [[*chats[i][1], 0] for i in batch]
        losses = nll(model.net, [prompts[i][-1] for i in batch], rests, caches)
        for i, rest, loss in zip(batch, rests, losses, strict=True):
            n = rest.index(model.end) + 1
            out[i] = {"slang": key(jsonl.slang(rows[i])), "nll": float(loss[:n].sum()), "tokens": n,
                      "mlx_nll": float(loss[: len(rest)].sum()), "mlx_tokens": len(rest)}  # fmt: skip
    return out


def answer_items(model: Model, items: list[Item], who: str, bar: tqdm) -> None:
    """Score the four choices of each item and let the model answer: fills `item.answers[who]`."""
    prompts = [model.prompt_tokens(item.messages) for item in items]
    chrf = CHRF()
    for batch, caches in prefilled(model.net, prompts, bar):
        last = [prompts[i][-1] for i in batch]
        rests = []
        for i in batch:
            for choice in items[i].choices:
                rests.append(model.answer_tokens([*items[i].messages, {"role": "assistant", "content": choice}])[1])
                del rests[-1][rests[-1].index(model.end) + 1 :]
        repeated = [t for t in last for _ in range(N_CHOICES)]
        losses = nll(model.net, repeated, rests, [cache.repeated(N_CHOICES) for cache in caches])
        means = [loss[: len(rest)].mean() for rest, loss in zip(rests, losses, strict=True)]
        answers = greedy(model.net, last, caches, model.stops)
        for n, i in enumerate(batch):
            scores = [float(m) for m in means[n * N_CHOICES : (n + 1) * N_CHOICES]]
            text = model.tokenizer.decode(answers[n], skip_special_tokens=True).strip()
            items[i].answers[who] = {
                "answer": text,
                "choice": int(np.argmin(scores)),
                "choice_nll": scores,
                "chrf": chrf.sentence_score(text, items[i].references).score,
                "exact": key(text) in {key(reference) for reference in items[i].references},
                "capped": len(answers[n]) >= MAX_ANSWER_TOKENS,
            }


def ask(model: Model, asked: prompt.Prompt, questions: Iterable[str]) -> list[tuple[str, str]]:
    """(question, greedy answer) for each text, asked as chat.sh asks it."""
    pairs = []
    for text in questions:
        question = prompt.question(asked, text)
        tokens = model.prompt_tokens(asked.chat(question))
        rows = greedy_one(model, tokens)
        pairs.append((question, rows))
    return pairs


def greedy_one(model: Model, tokens: list[int]) -> str:
    """The greedy answer to one prompt."""
    caches = [PromptCache() for _ in model.net.layers]
    model.net(mx.array([tokens[:-1]]), cache=caches)
    return model.tokenizer.decode(greedy(model.net, tokens[-1:], caches, model.stops)[0], skip_special_tokens=True).strip()


def ratio_of_sums(rows: list[dict], top: str, bottom: str) -> tuple[np.ndarray, np.ndarray]:
    """(sums of `top`, sums of `bottom`) per slang, in the order of the slangs' first rows."""
    sums: dict[str, list[float]] = {}
    for row in rows:
        pair = sums.setdefault(row["slang"], [0.0, 0.0])
        pair[0] += row[top]
        pair[1] += row[bottom]
    both = np.array(list(sums.values()))
    return both[:, 0], both[:, 1]


def figure(name: str, base: tuple, adapted: tuple, seed: int) -> dict:
    """One row of the table: a ratio of sums over slangs for both models, and a 95 % interval of the difference.

    `base` and `adapted` are (numerators, denominators), (slangs,) each. The bootstrap draws slangs, the same for both models.
    """
    n = len(base[0])
    random = np.random.default_rng(seed)
    differences = np.empty(DRAWS)
    for start in range(0, DRAWS, 500):
        draw = random.integers(n, size=(500, n))
        b = base[0][draw].sum(axis=1) / base[1][draw].sum(axis=1)
        a = adapted[0][draw].sum(axis=1) / adapted[1][draw].sum(axis=1)
        differences[start : start + 500] = a - b
    low, high = np.percentile(differences, [2.5, 97.5])
    b, a = float(base[0].sum() / base[1].sum()), float(adapted[0].sum() / adapted[1].sum())
    return {"figure": name, "baseline": b, "adapted": a, "difference": a - b, "low": float(low), "high": float(high), "n": n}


def measure(model: Model, items: list[Item], sets: dict[str, list[dict]], seed: int) -> tuple[list[dict], dict]:
    """(the table's rows, mlx_lm's test loss for both models as recomputed here)."""
    losses: dict[str, dict[str, list[dict]]] = {name: {} for name in sets}
    total = 2 * (len(items) + sum(map(len, sets.values())))
    with tqdm(total=total, unit="question", disable=None, leave=False) as bar:
        for who in ("baseline", "adapted"):
            model.use_adapter(who == "adapted")
            for name, rows in sets.items():
                losses[name][who] = loss_rows(model, rows, bar)
            answer_items(model, items, who, bar)

    table = []
    for name in sets:
        sums = [ratio_of_sums(losses[name][who], "nll", "tokens") for who in ("baseline", "adapted")]
        table.append(figure(f"{'control' if name == 'control' else 'answer'} loss, {name}.jsonl", *sums, seed))
    for seen, suffix in ((True, ""), (False, ", unseen slangs")):
        group = [item for item in items if item.seen == seen]
        if not group:
            continue
        ones = np.ones(len(group))
        for name, score in (("choice accuracy", lambda a: a["choice"] == 0),
                            ("answer chrF", lambda a: a["chrf"]), ("exact answers", lambda a: a["exact"])):  # fmt: skip
            values = [np.array([float(score(i.answers[who])) for i in group]) for who in ("baseline", "adapted")]
            table.append(figure(name + suffix, (values[0], ones), (values[1], ones), seed))
    recomputed = {
        who: sum(r["mlx_nll"] for r in losses["test"][who]) / sum(r["mlx_tokens"] for r in losses["test"][who])
        for who in ("baseline", "adapted")
    }
    return table, recomputed


# --------------------------------------------------------------------------------------------------------------- report


def show(table: list[dict]) -> str:
    """The table as text: losses with their perplexity."""
    lines = [f"{'':32}{'baseline':>10}{'adapted':>10}  difference, 95 % interval{'n':>8}"]
    for row in table:
        interval = f"{row['difference']:+.3f}  [{row['low']:+.3f}, {row['high']:+.3f}]"
        lines.append(f"{row['figure']:32}{row['baseline']:10.3f}{row['adapted']:10.3f}  {interval:26}{row['n']:7}")
        if "loss" in row["figure"]:
            name = row["figure"].replace("loss", "ppl")
            lines.append(f"{name:32}{math.exp(row['baseline']):10.1f}{math.exp(row['adapted']):10.1f}")
    return "\n".join(lines)


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
    p.add_argument("--ask", nargs="*", default=[], help="questions or slangs to ask both models")
    p.add_argument("--note", default="", help="what was changed, for the log")
    p.add_argument("--test-lines", nargs=2, metavar=("BASELINE", "ADAPTED"), help="what mlx_lm.lora --test printed")
    p.add_argument("--seed", type=int, default=42, help="draws distractors, question forms and bootstrap samples")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return run(args)
    except (UsageError, prompt.PromptError) as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
    return 1


def run(args: argparse.Namespace) -> int:
    """Measure, print, log."""
    data, adapter, results = Path(args.data), Path(args.adapter_path), Path(args.results)
    asked = prompt.load(adapter / "prompt.toml")
    rows = {name: read(data / f"{name}.jsonl") for name in ("train", "valid", "test", "eval")}
    items = make_items(asked, rows["train"], rows["valid"] + rows["test"], args.seed)
    sets = {name: rows[name] for name in ("test", "eval")}
    if (data / "control.jsonl").exists():
        sets["control"] = read(data / "control.jsonl")

    model = Model(args.model, args.adapter_path)
    table, recomputed = measure(model, items, sets, args.seed)
    talks = {}
    for who in ("baseline", "adapted"):
        model.use_adapter(who == "adapted")
        talks[who] = ask(model, asked, args.ask)

    lines = dict(zip(HEADINGS, args.test_lines or [f"Test loss {recomputed[w]:.3f}, Test ppl {math.exp(recomputed[w]):.3f}."
                                                   for w in HEADINGS], strict=True))  # fmt: skip
    print("mlx_lm.lora --test, a pad token counted in every row:")
    for who in HEADINGS:
        print(f"  {who:9} {lines[who]}")
    print(f"\n{show(table)}\n")
    for (question, before), (_, after) in zip(talks["baseline"], talks["adapted"], strict=True):
        print(f"{question}\n  baseline  {before}\n  adapted   {after}")

    results.mkdir(parents=True, exist_ok=True)
    label = next_label(results, date.today())
    report = {
        "label": label,
        "note": args.note,
        "model": args.model,
        "adapter": {"path": args.adapter_path, "sha256": sha256(adapter / "adapters.safetensors")},
        "prompt": {"sha256": asked.hash(), "system": asked.system},
        "data": {name: sha256(data / f"{name}.jsonl") for name in rows},
        "entries": {"slangs": len(items), "records": sum(len(rows[name]) for name in ("train", "valid", "test"))},
        "versions": {"python": platform.python_version(),
                     **{name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm", "transformers", "numpy")}},
        "seed": args.seed,
        "test": {who: {"printed": lines[who], "recomputed": recomputed[who]} for who in HEADINGS},
        "figures": table,
        "asked": [{"question": q, "baseline": b, "adapted": a}
                  for (q, b), (_, a) in zip(talks["baseline"], talks["adapted"], strict=True)],
        "items": [{"slang": i.slang, "question": i.question, "choices": i.choices, "references": i.references,
                   "seen": i.seen, **i.answers} for i in items],
    }  # fmt: skip
    log = results / "LOG.md"
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    for who, heading in HEADINGS.items():
        text = log_entry(text, heading, f"- {label}: `{lines[who]}`" + (f" ({args.note})" if args.note else ""))
    with jsonl.replacing(results / f"{label}.json", log) as (json_file, log_file):
        json_file.write(json.dumps(report, ensure_ascii=False, indent=1).encode() + b"\n")
        log_file.write(text.encode())
    print(f"\n{label}: {results / f'{label}.json'}, {log}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
