"""What is asked: the slangs, the question forms and the meanings to choose from. No MLX.

Reads the records of data/{train,valid,test}.jsonl. Every draw follows from a seed and the slang, so that the same data give the
same questions.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from slang import jsonl, prompt
from slang.dictionary import Problem, key, synonyms
from slang.errors import UserError

N_CHOICES = 4
SYNONYM = 0.2  # likeness above which a slang's meaning is no fair distractor
SYNONYMS = Path(__file__).parent.parent.parent / "data/synonyms.txt"


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
    """All records of a JSONL file. Raises UserError naming the first line that can't be used."""
    rows = []
    for item in jsonl.records(path):
        if isinstance(item, Problem):
            raise UserError(str(item))
        rows.append(item[3])
    if not rows:
        raise UserError(f"{path}: no record; run make_jsonl.py and split_jsonl.py first")
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
            raise UserError(f"{seen.sum()} trained slangs are too few for {N_CHOICES} choices; add slangs to the dictionary")
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
