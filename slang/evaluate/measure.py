"""What a run asks both models, and what their scores and answers are worth."""

import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from sacrebleu.metrics import CHRF
from tqdm import tqdm

from slang import jsonl, prompt
from slang.dictionary import key
from slang.evaluate.quiz import CLOSE, NEW, Item
from slang.evaluate.results import WHO
from slang.evaluate.scoring import MAX_ANSWER_TOKENS, Model, Question, in_numpy, study

RESTS = 8  # meanings behind one neutral question
RIGHT = 80  # chrF from which on an answer is a meaning in all but a word


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


def answers_of(model: Model, items: list[Item]) -> dict[str, list[int]]:
    """The tokens of every meaning that comes up in a quiz, up to <end_of_turn>, by its text."""
    texts = sorted({text for item in items for text in item.candidates()})
    chats = [[*items[0].messages, {"role": "assistant", "content": text}] for text in texts]
    (start,) = model.prompts([items[0].messages])
    rests = model.rests(chats, [start] * len(texts))
    return {text: rest[: rest.index(model.end) + 1] for text, rest in zip(texts, rests, strict=True)}


@dataclass
class Asked:
    """A question with the meanings that are scored behind it, and what it is for."""

    purpose: str  # "item", "told" or "neutral"
    index: int  # of the item; of the first item that asks this neutral question
    texts: list[str]
    question: Question


Heard = tuple[Asked, list[np.ndarray], list[int]]  # with each meaning's losses, (tokens,), and the greedy answer


def quiz_questions(model: Model, items: list[Item]) -> list[Asked]:
    """What the quizzes need: each item's meanings behind its question, behind a neutral one, and behind what it is told."""
    tokens = answers_of(model, items)

    def ask(purpose: str, index: int, messages: prompt.Messages, texts: list[str], generate: bool = False) -> Asked:
        (start,) = model.prompts([messages])
        return Asked(purpose, index, texts, Question(start, [tokens[text] for text in texts], generate))

    asked = [ask("item", i, item.messages, item.candidates(), generate=True) for i, item in enumerate(items)]
    for i, item in enumerate(items):
        texts = sorted({text for name in (NEW, NEW + CLOSE) for text in item.quizzes.get(name, [])})
        if texts and item.seen:
            asked.append(ask("told", i, item.told, texts))
    neutral: dict[str, tuple[int, set[str]]] = {}
    for i, item in enumerate(items):
        neutral.setdefault(item.neutral[-1]["content"], (i, set()))[1].update(item.candidates())
    for index, found in neutral.values():
        texts = sorted(found)
        for start in range(0, len(texts), RESTS):
            asked.append(ask("neutral", index, items[index].neutral, texts[start : start + RESTS]))
    return asked


def picked(choices: list[str], scores: dict[str, float], neutral: dict[str, float]) -> tuple[int, list[float]]:
    """(which meaning gains most by the question, how much likelier each is than behind a neutral one, in nats).

    Some sentences are likelier than others whatever is asked; what they gain by the question is what it knows (the pointwise
    mutual information of Holtzman et al. 2021, "Surface form competition"). NaN, and a tie, are not right.
    """
    gains = [neutral[text] - scores[text] for text in choices]
    return (0 if gains[0] > max(gains[1:]) else 1 + int(np.argmax(gains[1:]))), gains


def is_whole(text: str, capped: bool) -> bool:
    """Whether an answer is a sentence that ended by itself: a beginning, an end, and no words over and over."""
    words = key(text).split()
    again = any(words[n : n + 3] == words[n + 3 : n + 6] for n in range(len(words) - 5))
    begins = text[:1].isupper() or text[:1] in "¿¡"
    return not capped and begins and text[-1:] in ".!?…" and len(words) > 1 and not again


def judged(
    model: Model, item: Item, scores: dict[str, float], neutral: dict[str, float], answer: list[int], chrf: CHRF
) -> dict:
    """What an item's scores and answer are worth; scores are negative log-likelihoods in nats, by meaning."""
    text = model.tokenizer.decode(answer, skip_special_tokens=True).strip()
    likeness = chrf.sentence_score(text, item.references).score if text else 0.0
    exact = key(text) in {key(reference) for reference in item.references}
    picks = {name: picked(choices, scores, neutral) for name, choices in item.quizzes.items()}
    capped = len(answer) >= MAX_ANSWER_TOKENS
    return {
        "answer": text,
        "picks": {name: pick for name, (pick, _) in picks.items()},
        "gains": {name: gains for name, (_, gains) in picks.items()},
        "chrf": likeness,
        "exact": exact,
        "right": exact or likeness >= RIGHT,
        "whole": is_whole(text, capped),
        "capped": capped,
    }


def measure(model: Model, items: list[Item], sets: dict[str, list[dict]], asks: list[prompt.Messages]) -> tuple[dict, list]:
    """Fill `item.answers`; return the losses {set: {who: {slang: sums}}} and the answers to `asks`, a dict by who each."""
    rows = {name: loss_questions(model, some) for name, some in sets.items()}
    quizzes = quiz_questions(model, items)
    talks = [Question(tokens, [], True) for tokens in model.prompts(asks)]
    heard: dict[str, list] = {}

    def run(who: str) -> None:
        some = [asked for asked in quizzes if who == "baseline" or asked.purpose != "told"]
        questions = [question for part in rows.values() for question in part]
        questions += [asked.question for asked in some] + talks
        found: list = [None] * len(questions)
        for n, scores, answer in study(model, who, questions, bar):
            found[n] = (scores, answer)
        heard[who] = found

    def run_beside(who: str) -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            run(who)

    total = 2 * (sum(map(len, rows.values())) + len(quizzes) + len(talks))
    with tqdm(total=total, unit="question", disable=None, leave=False) as bar:
        if mx.default_device() == mx.cpu and not in_numpy(model.nets["adapted"]):  # MLX computes on one core; two models on two
            # Ctrl-C ends the process at once: Python would first wait for the threads, and nothing is written yet.
            handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(run_beside, WHO))
            signal.signal(signal.SIGINT, handler)
        else:
            for who in WHO:
                run(who)

    losses: dict = {name: {who: {} for who in WHO} for name in sets}
    answers: list[dict[str, str]] = [{} for _ in asks]
    chrf = CHRF()
    for who in WHO:
        found = iter(heard[who])
        for name, part in rows.items():
            sums: dict[str, np.ndarray] = {}
            for record, question in zip(sets[name], part, strict=True):
                scores, _ = next(found)
                slang = key(jsonl.slang(record))
                sums[slang] = sums.get(slang, 0) + loss_sums(model, question.rests[0], scores[0])
            losses[name][who] = {slang: sums[slang].tolist() for slang in sorted(sums)}
        some = [asked for asked in quizzes if who == "baseline" or asked.purpose != "told"]
        judge(model, items, [(asked, *next(found)) for asked in some], who, chrf)
        for answer in answers:
            _, tokens = next(found)
            answer[who] = model.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return losses, answers


def judge(
    model: Model, items: list[Item], heard: list[tuple[Asked, list[np.ndarray], list[int]]], who: str, chrf: CHRF
) -> None:
    """Fill each item's answers for one model; and what the base model picks when it is told the meanings."""
    neutral: dict[str, dict[str, float]] = {}
    for asked, scores, _ in heard:
        if asked.purpose == "neutral":
            sums = {text: float(loss.sum()) for text, loss in zip(asked.texts, scores, strict=True)}
            neutral.setdefault(items[asked.index].neutral[-1]["content"], {}).update(sums)
    for asked, scores, answer in heard:
        item = items[asked.index]
        sums = {text: float(loss.sum()) for text, loss in zip(asked.texts, scores, strict=True)}
        without = neutral[item.neutral[-1]["content"]]
        if asked.purpose == "item":
            item.answers[who] = judged(model, item, sums, without, answer, chrf)
        elif asked.purpose == "told":
            names = [name for name in (NEW, NEW + CLOSE) if name in item.quizzes]
            item.told_picks = {name: picked(item.quizzes[name], sums, without)[0] for name in names}
