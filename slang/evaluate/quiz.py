"""What is asked: the slangs, the question forms and the meanings to choose from. No MLX.

A quiz is one right meaning among four. All four were trained in these words (TRAINED), or none was
(NEW). The other three belong to slangs drawn at random of those that mean something else, or to the
three likest that are no synonyms (CLOSE).

Reads the records of data/{train,valid,test}.jsonl. Every draw follows from a seed and the data, so
that the same data give the same questions.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from slang import jsonl
from slang.dictionary import normalized, synonyms
from slang.errors import UserError
from slang.jsonl import Record
from slang.prompt import Messages, Prompt, differs

VERSION = "2"  # of what is asked and how it is judged: figures of two versions do not compare
N_CHOICES = 4
ALIKE = 0.2  # likeness from which on a slang's meaning is no easy distractor
Quiz = Literal["new wording", "new wording, close", "trained wording", "trained wording, close"]
NEW: Quiz = "new wording"  # of the right meaning and of the others
NEW_CLOSE: Quiz = "new wording, close"  # the others are the three likest that are no synonyms
TRAINED: Quiz = "trained wording"
TRAINED_CLOSE: Quiz = "trained wording, close"
QUIZZES = (NEW, NEW_CLOSE, TRAINED, TRAINED_CLOSE)
INVENTED = (  # words that nobody uses, for the neutral questions
    "zurufa",
    "trolinche",
    "champirar",
    "brelo",
    "dar la quimbola",
    "andar en frelas",
    "estar prubio",
    "a puro fleque",
)
SYNONYMS = Path(__file__).parents[2] / "data/synonyms.txt"
MIXING = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: its products are well mixed bits


@dataclass
class Item:
    """One slang, asked once: its quizzes, all its meanings, and the chats that are scored."""

    slang: str
    question: str
    quizzes: dict[Quiz, list[str]]  # the right meaning, then three others
    references: list[str]  # all its meanings
    seen: bool  # in train.jsonl
    messages: Messages = field(repr=False)
    neutral: list[Messages] = field(repr=False)  # questions about words that nobody uses
    open_book: Messages = field(repr=False)  # the same question behind the trained meanings

    def candidates(self) -> list[str]:
        """Every meaning that comes up in its quizzes."""
        return sorted({text for texts in self.quizzes.values() for text in texts})

    def new_candidates(self) -> list[str]:
        """Every meaning that comes up in its quizzes of new wordings."""
        quizzes = [self.quizzes.get(name, []) for name in (NEW, NEW_CLOSE)]
        return sorted({text for texts in quizzes for text in texts})


def read(path: Path, its_prompt: Prompt, prompt_file: Path) -> list[Record]:
    """All records of a JSONL file that was made with a prompt.

    Raises UserError naming the lines that can't be used, or the first of another prompt.
    """
    rows = jsonl.read_rows(path)
    for row in rows:
        if what := differs(its_prompt, row.record):
            raise UserError(
                f"{path}:{row.line}: made with {what} than {prompt_file} has; "
                "run make_jsonl.py and split_jsonl.py again"
            )
    return [row.record for row in rows]


def stems(text: str) -> set[str]:
    """Content words cut to five letters: enough to see that two meanings are alike.

    It joins cerveza and cervezas.
    """
    return {word[:5] for word in normalized(text).split() if len(word) > 3}


def likeness(meanings: list[list[str]]) -> np.ndarray:
    """Cosine of the tf-idf vectors of the slangs' meanings, (slangs, slangs).

    1 for equal ones, 0 where no word is in common.
    """
    counts = [Counter(stem for text in texts for stem in stems(text)) for texts in meanings]
    known = sorted({stem for count in counts for stem in count})
    vocabulary = {stem: i for i, stem in enumerate(known)}
    matrix = np.zeros((len(counts), len(vocabulary)), np.float32)
    for row, count in zip(matrix, counts, strict=True):
        for stem, n in count.items():
            row[vocabulary[stem]] = 1 + math.log(n)
    matrix *= np.log(len(counts) / np.maximum((matrix > 0).sum(axis=0), 1) + 1)
    matrix /= np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-9)
    return matrix @ matrix.T


def same_meaning(path: Path) -> dict[str, set[str]]:
    """Each slang of a synonyms.txt, as `normalized` spells it, with all that a group of it holds.

    Raises UserError naming the lines that can't be used.
    """
    same: dict[str, set[str]] = defaultdict(set)
    for group in synonyms(path):
        keys = {normalized(slang) for slang in group}
        for slang in keys:
            same[slang] |= keys
    return same


@dataclass
class Table:
    """The slangs of some data, in alphabetical order, and what there is to choose from."""

    names: dict[str, str]  # as they are spelled, by what `normalized` makes of them
    trained: dict[str, list[str]]  # wordings in train.jsonl
    new: dict[str, list[str]]  # wordings that are not

    @property
    def slangs(self) -> list[str]:
        return sorted(self.names)

    def meanings(self, slang: str) -> list[str]:
        return sorted({*self.trained[slang], *self.new[slang]})


def read_table(train: list[Record], others: list[Record]) -> Table:
    """Slangs and wordings of the trained records and of the others."""
    table = Table({}, defaultdict(list), defaultdict(list))
    for records, wordings in ((train, table.trained), (others, table.new)):
        for record in records:
            slang = normalized(jsonl.slang(record))
            meaning = jsonl.answer(record)
            table.names.setdefault(slang, jsonl.slang(record))
            if meaning not in wordings[slang] and meaning not in table.trained[slang]:
                wordings[slang].append(meaning)
    for wordings in (table.trained, table.new):
        for slang in table.names:
            wordings[slang].sort()
    return table


class Draw:
    """Draws each slang's quizzes, by a hash of the seed and the slang alone."""

    def __init__(self, table: Table, seed: int, synonyms_file: Path):
        self.table = table
        self.slangs = table.slangs
        self.likeness = likeness([table.meanings(slang) for slang in self.slangs])
        self.seen = np.array([bool(table.trained[slang]) for slang in self.slangs])
        self.synonyms = same_meaning(synonyms_file)
        with_meaning: dict[str, set[str]] = defaultdict(set)
        for slang in self.slangs:
            for meaning in table.meanings(slang):
                with_meaning[normalized(meaning)].add(slang)
        for slangs in with_meaning.values():  # those that share one are synonyms too
            for slang in slangs:
                self.synonyms[slang] = self.synonyms[slang] | slangs
        digests = [
            hashlib.blake2b(f"{seed}\0{slang}".encode(), digest_size=8).digest()
            for slang in self.slangs
        ]
        self.codes = np.frombuffer(b"".join(digests), np.uint64)

    def others(self, i: int) -> np.ndarray:
        """Which slangs may stand beside slang i, (slangs,).

        They are trained as it is, so that being familiar does not give the right one away, nor
        hide it.
        """
        slang = self.slangs[i]
        related = {slang, *self.synonyms[slang]}
        apart = np.array([other not in related for other in self.slangs])
        enough_unseen = (~self.seen).sum() >= N_CHOICES
        alike = ~self.seen if enough_unseen and not self.seen[i] else self.seen
        return apart & alike

    def orders(self, i: int, pool: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The slangs of the pool, those that go beside slang i first: at random, and the likest."""
        fair = pool & (self.likeness[i] < ALIKE)
        easy = np.flatnonzero(fair if fair.sum() >= N_CHOICES - 1 else pool)
        easy = easy[np.argsort((self.codes[easy] ^ self.codes[i]) * MIXING)]
        close = np.flatnonzero(pool)
        close = close[np.argsort(-self.likeness[i][close], kind="stable")]
        return easy, close

    def wording(self, i: int, wordings: dict[str, list[str]]) -> str:
        """The one that slang i is quizzed by, and that stands for it beside others."""
        own = wordings[self.slangs[i]]
        return own[int(self.codes[i] % np.uint64(len(own)))]

    def quizzes(self, i: int) -> dict[Quiz, list[str]]:
        """The quizzes of slang i: for each kind of wording one with others at random, one close.

        A kind is left out where fewer than three others have such a wording.
        """
        others = self.others(i)
        quizzes: dict[Quiz, list[str]] = {}
        for name, close_name, wordings in (
            (NEW, NEW_CLOSE, self.table.new),
            (TRAINED, TRAINED_CLOSE, self.table.trained),
        ):
            pool = others & np.array([bool(wordings[other]) for other in self.slangs])
            if not wordings[self.slangs[i]] or pool.sum() < N_CHOICES - 1:
                continue
            easy, close = self.orders(i, pool)
            for quiz, order in ((name, easy), (close_name, close)):
                four = (i, *order[: N_CHOICES - 1])
                quizzes[quiz] = [self.wording(j, wordings) for j in four]
        return quizzes


def make_items(
    its_prompt: Prompt,
    train: list[Record],
    others: list[Record],
    seed: int,
    synonyms_file: Path = SYNONYMS,
) -> list[Item]:
    """One item a slang, trained ones and others, in alphabetical order.

    Each slang is asked in one held-out question form. The same seed and data give the same items.
    A slang without a quiz is left out. Raises UserError where none is left.
    """
    table = read_table(train, others)
    draw = Draw(table, seed, synonyms_file)
    forms = len(its_prompt.held_out_questions)
    neutral = [its_prompt.ask(word, n % forms, held_out=True) for n, word in enumerate(INVENTED)]
    items = []
    for i, slang in enumerate(draw.slangs):
        quizzes = draw.quizzes(i)
        if not quizzes:
            continue
        form = int(np.random.default_rng(int(draw.codes[i])).integers(forms))
        name = table.names[slang]
        messages = its_prompt.ask(name, form, held_out=True)
        question = messages[-1]["content"]
        open_book = f"{name}: {' '.join(table.trained[slang])}\n\n{question}"
        items.append(
            Item(
                slang=name,
                question=question,
                quizzes=quizzes,
                references=table.meanings(slang),
                seen=bool(draw.seen[i]),
                messages=messages,
                neutral=neutral,
                open_book=its_prompt.chat(open_book),
            )
        )
    if not items:
        what = f"{len(draw.slangs)} slangs are too few for {N_CHOICES} choices"
        raise UserError(f"{what}; add slangs that mean something else to the dictionary")
    return items


def sample(slangs: Iterable[str], n: int | None, seed: int) -> set[str]:
    """n of the slangs, or all for None, drawn by the seed.

    Another slang in the dictionary changes one of them at most.
    """

    def place(slang: str) -> bytes:
        return hashlib.blake2b(f"{seed} sample {slang}".encode()).digest()

    return set(sorted(set(slangs), key=place)[:n])
