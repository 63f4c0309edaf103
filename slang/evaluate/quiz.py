"""What is asked: the slangs, the question forms and the meanings to choose from. No MLX.

A quiz is one right meaning among four. All four were trained in these words (TRAINED), or none was (NEW). The other three
belong to slangs drawn at random of those that mean something else, or to the three likest that are no synonyms (CLOSE).

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
ALIKE = 0.2  # likeness from which on a slang's meaning is no easy distractor
NEW, TRAINED = "new wording", "trained wording"  # of the right meaning and of the others
CLOSE = ", close"  # the others are the three likest slangs that are no synonyms
QUIZZES = (NEW, NEW + CLOSE, TRAINED, TRAINED + CLOSE)
NOTHING = "eso"  # what the neutral question asks about
SYNONYMS = Path(__file__).parent.parent.parent / "data/synonyms.txt"


@dataclass
class Item:
    """One slang, asked once: its quizzes, all its meanings, and the chats that a score is measured against."""

    slang: str
    question: str
    quizzes: dict[str, list[str]]  # by its name in QUIZZES: the right meaning, then three of other slangs
    references: list[str]
    seen: bool  # in train.jsonl
    messages: prompt.Messages = field(repr=False)
    neutral: prompt.Messages = field(repr=False)  # a question about nothing in particular
    told: prompt.Messages = field(repr=False)  # the same question behind the meanings that training has
    answers: dict[str, dict] = field(default_factory=dict)  # "baseline", "adapted" -> what scoring.judged says
    told_picks: dict[str, int] = field(default_factory=dict)  # what the base model picks when it is told: the ceiling

    def candidates(self) -> list[str]:
        """Every meaning that comes up in its quizzes."""
        return sorted({text for texts in self.quizzes.values() for text in texts})


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


@dataclass
class Table:
    """The slangs of some data, in alphabetical order, and what there is to choose from."""

    names: dict[str, str]  # as they are spelled, by what `key` makes of them
    trained: dict[str, list[str]]  # wordings in train.jsonl
    new: dict[str, list[str]]  # wordings that are not

    @property
    def slangs(self) -> list[str]:
        return sorted(self.names)

    def meanings(self, slang: str) -> list[str]:
        return sorted({*self.trained[slang], *self.new[slang]})


def read_table(train: list[dict], others: list[dict]) -> Table:
    """Slangs and wordings of the trained records and of the others."""
    table = Table({}, defaultdict(list), defaultdict(list))
    for records, wordings in ((train, table.trained), (others, table.new)):
        for record in records:
            slang, meaning = key(jsonl.slang(record)), jsonl.answer(record)
            table.names.setdefault(slang, jsonl.slang(record))
            if meaning not in wordings[slang] and meaning not in table.trained[slang]:
                wordings[slang].append(meaning)
    for wordings in (table.trained, table.new):
        for slang in table.names:
            wordings[slang].sort()
    return table


def make_items(asked: prompt.Prompt, train: list[dict], others: list[dict], seed: int) -> list[Item]:
    """One item a slang, trained ones and others, in alphabetical order; the same for the same seed and data.

    Each slang is asked in one held-out question form. Raises UserError where there are too few slangs to choose from.
    """
    table = read_table(train, others)
    slangs = table.slangs
    like = likeness([table.meanings(slang) for slang in slangs])
    seen = np.array([bool(table.trained[slang]) for slang in slangs])
    same = same_meaning()
    # A number of its own for each slang: one added to the dictionary leaves the others' questions as they were.
    digests = [hashlib.blake2b(f"{seed}\0{slang}".encode(), digest_size=8).digest() for slang in slangs]
    codes = np.frombuffer(b"".join(digests), np.uint64)
    items = []
    for i, slang in enumerate(slangs):
        random = np.random.default_rng(int(codes[i]))
        apart = np.array([other not in same[slang] and other != slang for other in slangs])
        # Distractors are trained as the slang is, so that being familiar does not give the right one away, nor hide it.
        group = apart & (seen if seen[i] or (~seen).sum() < N_CHOICES else ~seen)
        if group.sum() < N_CHOICES - 1:
            raise UserError(f"{seen.sum()} trained slangs are too few for {N_CHOICES} choices; add slangs to the dictionary")
        quizzes: dict[str, list[str]] = {}
        for name, wordings in ((NEW, table.new), (TRAINED, table.trained)):
            pool = group & np.array([bool(wordings[other]) for other in slangs])
            if not wordings[slang] or pool.sum() < N_CHOICES - 1:
                continue
            fair = pool & (like[i] < ALIKE)
            easy = np.flatnonzero(fair if fair.sum() >= N_CHOICES - 1 else pool)
            easy = easy[np.argsort((codes[easy] ^ codes[i]) * np.uint64(0x9E3779B97F4A7C15))]
            close = np.flatnonzero(pool)
            close = close[np.argsort(-like[i][close], kind="stable")]
            for quiz, drawn in ((name, easy), (name + CLOSE, close)):
                four = [slangs[j] for j in (i, *drawn[: N_CHOICES - 1])]
                quizzes[quiz] = [wordings[other][random.integers(len(wordings[other]))] for other in four]
            quizzes[name + CLOSE][0] = quizzes[name][0]
        form = int(random.integers(len(asked.held_out_questions)))
        messages = asked.ask(table.names[slang], form, held_out=True)
        question = messages[-1]["content"]
        items.append(
            Item(
                table.names[slang],
                question,
                quizzes,
                table.meanings(slang),
                bool(seen[i]),
                messages,
                asked.ask(NOTHING, held_out=True),
                asked.chat(f"{table.names[slang]}: {' '.join(table.trained[slang])}\n\n{question}"),
            )
        )
    return items


def sample(slangs: Iterable[str], n: int | None, seed: int) -> set[str]:
    """n of the slangs, or all for None, drawn by the seed; another slang in the dictionary changes one of them at most."""
    drawn = sorted(set(slangs), key=lambda slang: hashlib.blake2b(f"{seed} sample {slang}".encode()).digest())
    return set(drawn[:n])
