"""What a run asks both models, and what their scores and answers are worth."""

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from sacrebleu.metrics import CHRF
from tqdm import tqdm

from slang import jsonl
from slang.dictionary import normalized
from slang.evaluate.quiz import NEW, NEW_CLOSE, Item, Quiz
from slang.evaluate.results import MODELS, Answer, ItemResult, Losses, Sums
from slang.evaluate.scoring import MAX_ANSWER_TOKENS, Models, Question, Reply, ask
from slang.evaluate.tokens import (
    answer_tokens,
    end_of_turn,
    prompt_tokens,
    text_of,
    tokens_behind,
)
from slang.prompt import Messages

MEANINGS = 8  # behind one neutral question
RIGHT = 80  # chrF from which on an answer is a meaning in all but a word
PAD = 0

# ---------------------------------------------------------------------------------- loss of records


def loss_questions(tokenizer, rows: list[jsonl.Record]) -> list[Question]:
    """Each record's answer behind its question, and the pad token behind it.

    `mlx_lm.lora --test` counts the pad token as a target too: its mask reaches one past the row's
    last token (mlx_lm.tuner.trainer.default_loss).
    """
    chats = [row["messages"] for row in rows]
    prompts = prompt_tokens(tokenizer, [chat[:-1] for chat in chats])
    answers = tokens_behind(tokenizer, chats, prompts)
    return [
        Question(start, [[*answer, PAD]]) for start, answer in zip(prompts, answers, strict=True)
    ]


def loss_sums(tokenizer, answer: list[int], loss: np.ndarray) -> np.ndarray:
    """What a record adds to results.Sums, (5,), from each token's loss in nats."""
    n = answer.index(end_of_turn(tokenizer)) + 1
    return np.array([loss[:n].sum(), n, loss.sum(), len(answer), loss[-1]], np.float64)


def sums_by_slang(
    tokenizer, rows: list[jsonl.Record], questions: list[Question], replies: list[Reply]
) -> dict[str, Sums]:
    """The sums of each slang of a file."""
    sums: dict[str, np.ndarray] = {}
    for record, question, reply in zip(rows, questions, replies, strict=True):
        slang = normalized(jsonl.slang(record))
        more = loss_sums(tokenizer, question.answers[0], reply.losses[0])
        sums[slang] = sums.get(slang, 0) + more
    return {slang: sums[slang].tolist() for slang in sorted(sums)}


# ------------------------------------------------------------------------------------------ quizzes


@dataclass
class QuizQuestion:
    """A question of a quiz with the meanings that are scored behind it."""

    purpose: str  # "item", "open book" or "neutral"
    item: Item  # for "neutral" the first of all
    meanings: list[str]
    question: Question


def quiz_questions(tokenizer, items: list[Item]) -> list[QuizQuestion]:
    """Each item's meanings behind its question, behind neutral ones, and with an open book."""
    meanings = sorted({text for item in items for text in item.candidates()})
    tokens = dict(zip(meanings, answer_tokens(tokenizer, items[0].messages, meanings), strict=True))

    def behind(purpose: str, item: Item, chat: Messages, texts: list[str]) -> QuizQuestion:
        (start,) = prompt_tokens(tokenizer, [chat])
        question = Question(start, [tokens[text] for text in texts], generate=purpose == "item")
        return QuizQuestion(purpose, item, texts, question)

    questions = [behind("item", item, item.messages, item.candidates()) for item in items]
    for item in items:
        if item.seen and item.new_candidates():
            questions.append(behind("open book", item, item.open_book, item.new_candidates()))
    for chat in items[0].neutral:  # they are the same for all
        for start in range(0, len(meanings), MEANINGS):
            some = meanings[start : start + MEANINGS]
            questions.append(behind("neutral", items[0], chat, some))
    return questions


def choose(
    choices: list[str], scores: dict[str, float], neutral: dict[str, float]
) -> tuple[int, list[float]]:
    """(which meaning gains most by the question, what each gains in nats).

    scores, neutral  the meanings' negative log-likelihoods behind the question and behind neutral
                     ones
    Some sentences are likelier than others whatever is asked. What they gain by the question is
    what the model knows (the pointwise mutual information of Holtzman et al. 2021, "Surface form
    competition"). The first is the right one. NaN, and a tie, are not right.
    """
    gains = [neutral[text] - scores[text] for text in choices]
    if gains[0] > max(gains[1:]):
        return 0, gains
    return 1 + int(np.argmax(gains[1:])), gains


def of_mean_likelihood(losses: list[float]) -> float:
    """The negative logarithm of the mean likelihood, in nats, from negative log-likelihoods."""
    with np.errstate(invalid="ignore"):  # NaN gives NaN
        return math.log(len(losses)) - float(np.logaddexp.reduce(-np.array(losses)))


def is_whole(text: str, capped: bool) -> bool:
    """Whether an answer is a sentence that ended by itself.

    It has a beginning and an end, and no three words twice in a row.
    """
    words = normalized(text).split()
    repeats = any(words[n : n + 3] == words[n + 3 : n + 6] for n in range(len(words) - 5))
    begins = text[:1].isupper() or text[:1] in "¿¡"
    return not capped and begins and text[-1:] in ".!?…" and len(words) > 1 and not repeats


def judge_answer(
    item: Item,
    text: str,
    capped: bool,
    scores: dict[str, float],
    neutral: dict[str, float],
    chrf: CHRF,
) -> Answer:
    """What an item's scores and answer are worth.

    scores, neutral  negative log-likelihoods in nats, by meaning
    """
    likeness = chrf.sentence_score(text, item.references).score if text else 0.0
    exact = normalized(text) in {normalized(reference) for reference in item.references}
    chosen = {name: choose(four, scores, neutral) for name, four in item.quizzes.items()}
    return Answer(
        answer=text,
        picks={name: pick for name, (pick, _) in chosen.items()},
        gains={name: [*gains] for name, (_, gains) in chosen.items()},
        chrf=likeness,
        exact=exact,
        right=exact or likeness >= RIGHT,
        whole=is_whole(text, capped),
        capped=capped,
    )


@dataclass
class Judged:
    """What one model made of the quizzes, by slang."""

    answers: dict[str, Answer]
    open_book_picks: dict[str, dict[Quiz, int]]


def sums_by_meaning(questions: list[QuizQuestion], replies: list[Reply]) -> list[dict[str, float]]:
    """What each question gives its meanings: their negative log-likelihoods in nats."""
    return [
        {text: float(loss.sum()) for text, loss in zip(asked.meanings, reply.losses, strict=True)}
        for asked, reply in zip(questions, replies, strict=True)
    ]


def neutral_losses(
    questions: list[QuizQuestion], sums: list[dict[str, float]]
) -> dict[str, list[float]]:
    """What each of the neutral questions gives a meaning, by meaning."""
    losses: dict[str, list[float]] = defaultdict(list)
    for asked, scores in zip(questions, sums, strict=True):
        if asked.purpose == "neutral":
            for text, loss in scores.items():
                losses[text].append(loss)
    return losses


def judge(tokenizer, questions: list[QuizQuestion], replies: list[Reply], chrf: CHRF) -> Judged:
    """What one model's replies to `quiz_questions` are worth."""
    judged = Judged({}, {})
    sums = sums_by_meaning(questions, replies)
    unasked = neutral_losses(questions, sums)
    neutral = {text: of_mean_likelihood(of_each) for text, of_each in unasked.items()}
    for asked, scores, reply in zip(questions, sums, replies, strict=True):
        item = asked.item
        if asked.purpose == "item":
            text = text_of(tokenizer, reply.generated)
            capped = len(reply.generated) >= MAX_ANSWER_TOKENS
            answer = judge_answer(item, text, capped, scores, neutral, chrf)
            judged.answers[item.slang] = answer
        elif asked.purpose == "open book":
            judged.open_book_picks[item.slang] = {
                name: choose(item.quizzes[name], scores, neutral)[0]
                for name in (NEW, NEW_CLOSE)
                if name in item.quizzes
            }
    return judged


# -------------------------------------------------------------------------------------- both models


@dataclass
class Measured:
    """What both models made of everything."""

    losses: dict[str, Losses]  # by the name of the file
    items: list[ItemResult]
    spoken: list[dict[str, str]]  # the answers to each question of --ask, by model


def measure(
    models: Models, items: list[Item], files: dict[str, list[jsonl.Record]], asks: list[Messages]
) -> Measured:
    """Ask both models the quizzes and `asks`, and the loss of the records of `files`."""
    tokenizer = models.tokenizer
    records = {name: loss_questions(tokenizer, rows) for name, rows in files.items()}
    quizzes = quiz_questions(tokenizer, items)
    # With an open book only the base model is asked.
    closed = [question for question in quizzes if question.purpose != "open book"]
    talks = [Question(start, [], generate=True) for start in prompt_tokens(tokenizer, asks)]
    of_records = [question for part in records.values() for question in part]
    total = 2 * (len(of_records) + len(talks)) + len(quizzes) + len(closed)
    chrf = CHRF()
    sums: dict[str, dict[str, dict[str, Sums]]] = {}
    judged: dict[str, Judged] = {}
    spoken: list[dict[str, str]] = [{} for _ in asks]
    with tqdm(total=total, unit="question", disable=None, leave=False) as bar:
        for who in MODELS:
            own = quizzes if who == "baseline" else closed
            questions = [*of_records, *(quiz.question for quiz in own), *talks]
            replies = iter(ask(getattr(models, who), tokenizer, questions, bar))
            for name, part in records.items():
                some = [next(replies) for _ in part]
                found = sums_by_slang(tokenizer, files[name], part, some)
                sums.setdefault(name, {})[who] = found
            judged[who] = judge(tokenizer, own, [next(replies) for _ in own], chrf)
            for answers in spoken:
                answers[who] = text_of(tokenizer, next(replies).generated)
    results = [
        ItemResult(
            slang=item.slang,
            question=item.question,
            quizzes=item.quizzes,
            references=item.references,
            seen=item.seen,
            open_book_picks=judged["baseline"].open_book_picks.get(item.slang, {}),
            **{who: judged[who].answers[item.slang] for who in MODELS},
        )
        for item in items
    ]
    return Measured({name: Losses(**both) for name, both in sums.items()}, results, spoken)
