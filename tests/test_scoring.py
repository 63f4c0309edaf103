"""slang/evaluate/scoring.py and measure.py: the numbers against mlx_lm's own."""

import json
import math
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, TINY
from evaluated import PROMPT, SENTENCES, rows
from mlx_lm.tuner.datasets import CacheDataset, load_local_dataset
from mlx_lm.tuner.trainer import default_loss, evaluate
from mlx_lm.utils import load
from sacrebleu.metrics import CHRF

from slang import numpy_gemma
from slang.errors import UserError
from slang.evaluate import measure, quiz, scoring, tokens
from slang.evaluate.batch import Batch


@pytest.fixture(scope="module", params=["mlx", "numpy"])
def tiny(request):
    """The tiny model without an adapter, computed by MLX and by slang/numpy_gemma."""
    net, tokenizer = load(str(ROOT / TINY))
    net.set_dtype(mx.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "in_numpy", lambda _: request.param == "numpy")
        yield SimpleNamespace(net=net, tokenizer=tokenizer, end=tokens.end_of_turn(tokenizer))


def test_a_tokenizer_without_gemmas_end_of_turn_is_told():
    other = SimpleNamespace(convert_tokens_to_ids=lambda token: 3, unk_token_id=3)
    with pytest.raises(UserError, match="no <end_of_turn>; set MODEL to a Gemma 3 model"):
        tokens.end_of_turn(other)


def slangs(texts) -> list[dict]:
    return rows(*((f"slang {i}", text) for i, text in enumerate(texts)))


def test_loss_is_mlx_lms_own_with_and_without_the_pad_target(tiny):
    """One pass over batches of unequal rows against mlx_lm's default_loss, row by row."""
    records = slangs(SENTENCES)
    user = {"role": "user", "content": "¿Y?"}
    records.append({"messages": [user, {"role": "assistant", "content": "Nada."}]})
    questions = measure.loss_questions(tiny.tokenizer, records)
    replies = scoring.ask(tiny.net, tiny.tokenizer, questions)
    for question, reply in zip(questions, replies, strict=True):
        start = question.prompt
        answer = question.answers[0][:-1]
        sums = measure.loss_sums(tiny.tokenizer, question.answers[0], reply.losses[0])
        nll, n_tokens, mlx_nll, mlx_tokens, _ = sums
        batch = mx.array([[*start, *answer, 0, 0]])
        loss, n = default_loss(tiny.net, batch, mx.array([[len(start), len(start) + len(answer)]]))
        assert mlx_tokens == n.item()
        assert mlx_nll / n.item() == pytest.approx(loss.item(), abs=1e-4)
        end = answer.index(tiny.end)
        loss, n = default_loss(tiny.net, batch, mx.array([[len(start), len(start) + end]]))
        assert n_tokens == n.item()
        assert nll / n.item() == pytest.approx(loss.item(), abs=1e-4)


def test_the_whole_test_loss_is_that_of_mlx_lm_lora_test(tiny, tmp_path):
    """To the fourth decimal, against what `mlx_lm.lora --test` calls, on a file that it reads."""
    records = rows(*((f"slang {i} {'x' * i}", text) for i, text in enumerate(SENTENCES * 3)))
    for name in ("train", "valid", "test"):
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    *_, test = load_local_dataset(tmp_path, tiny.tokenizer, SimpleNamespace(mask_prompt=True))
    theirs = evaluate(tiny.net, CacheDataset(test), batch_size=1, num_batches=-1)
    questions = measure.loss_questions(tiny.tokenizer, records)
    replies = scoring.ask(tiny.net, tiny.tokenizer, questions)
    sums = measure.sums_by_slang(tiny.tokenizer, records, questions, replies)
    _, _, loss, n, _ = map(sum, zip(*sums.values(), strict=True))
    assert loss / n == pytest.approx(theirs, abs=5e-5)


def likelihood(tiny, chat, text):
    """NLL in nats of an answer and its <end_of_turn>, one pass over chat and answer."""
    (start,) = tokens.prompt_tokens(tiny.tokenizer, [chat])
    answer = [*tiny.tokenizer.encode(text, add_special_tokens=False), tiny.end]
    logits = tiny.net(mx.array([[*start, *answer]]))[0, len(start) - 1 : -1]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return -mx.take_along_axis(logprobs, mx.array(answer)[:, None], axis=-1).sum().item()


def test_gains_and_answers_are_those_of_one_question_at_a_time(tiny):
    """Each meaning behind its question, less behind the neutral ones; the open book too."""
    trained = slangs(SENTENCES)
    new = slangs(f"Con otras palabras, {text.lower()}" for text in SENTENCES)
    items = quiz.make_items(PROMPT, trained, new, seed=1)
    quizzes = measure.quiz_questions(tiny.tokenizer, items)
    replies = scoring.ask(tiny.net, tiny.tokenizer, [asked.question for asked in quizzes])
    judged = measure.judge(tiny.tokenizer, quizzes, replies, CHRF())

    def neutral(item, text):
        likelihoods = [math.exp(-likelihood(tiny, chat, text)) for chat in item.neutral]
        return -math.log(sum(likelihoods) / len(likelihoods))

    def gains(item, chat, choices):
        return [neutral(item, c) - likelihood(tiny, chat, c) for c in choices]

    for item in items:
        answer = judged.answers[item.slang]
        assert set(item.quizzes) == set(quiz.QUIZZES)
        for name, choices in item.quizzes.items():
            expected = gains(item, item.messages, choices)
            assert answer.gains[name] == pytest.approx(expected, abs=5e-3)
        for name in (quiz.NEW, quiz.NEW_CLOSE):
            expected = gains(item, item.open_book, item.quizzes[name])
            assert judged.open_book_picks[item.slang][name] == int(np.argmax(expected))
        assert greedy(tiny, item.messages) == answer.answer


def greedy(tiny, chat) -> str:
    """The likeliest answer, token by token, all read again for each."""
    (start,) = tokens.prompt_tokens(tiny.tokenizer, [chat])
    stops = tokens.stop_tokens(tiny.tokenizer)
    answer: list[int] = []
    while len(answer) < scoring.MAX_ANSWER_TOKENS:
        token = mx.argmax(tiny.net(mx.array([start + answer]))[0, -1]).item()
        if token in stops:
            break
        answer.append(token)
    return tiny.tokenizer.decode(answer).strip()


def test_a_batch_gives_each_row_what_it_gets_alone(tiny):
    """Rows of unequal length, beyond the sliding window too, continued in several ways."""
    net = tiny.net
    window = net.args.sliding_window
    random = np.random.default_rng(0)
    whole = [[2, *random.integers(300, 1000, n).tolist()] for n in (2 * window, window + 7, 9)]
    alone = [net(mx.array([row]))[0] for row in whole]
    cuts = (window + 5, 1, 8)
    batch = Batch(len(net.layers), len(whole))
    batch.read(net, [row[:cut] for row, cut in zip(whole, cuts, strict=True)])
    order = [2, 0, 1, 0]
    got = batch.take(order).read(net, [whole[i][cuts[i] :] for i in order])
    for row, i in zip(got, order, strict=True):
        expected = alone[i][cuts[i] :]
        assert mx.abs(row[: len(expected)] - expected).max().item() < 1e-3
    for step in range(20):
        if step in (0, 7):
            batch = batch.take([0, 1])
        got = batch.read(net, [[whole[i][cuts[i] + step]] for i in (0, 1)])
        for i in (0, 1):
            assert mx.abs(got[i, 0] - alone[i][cuts[i] + step]).max().item() < 1e-3


# ------------------------------------------------------------------------ what an answer is worth


def test_nan_scores_ties_and_silence_are_not_right():
    choices = ["Uno.", "Dos.", "Tres.", "Cuatro."]
    item = SimpleNamespace(references=["Uno.", "Dos."], quizzes={quiz.TRAINED: choices})
    neutral = dict.fromkeys(choices, 2.0)
    for values in ([math.nan] * 4, [1.0] * 4, [math.nan, 1.0, 2.0, 3.0]):
        scores = dict(zip(choices, values, strict=True))
        answer = measure.judge_answer(item, "", False, scores, neutral, CHRF())
        assert answer.picks[quiz.TRAINED] != 0 and answer.chrf == 0
        assert not answer.exact and not answer.right and not answer.whole


@pytest.mark.filterwarnings("error")
def test_one_neutral_question_that_answers_with_a_meaning_costs_it_little():
    """The mean of likelihoods, not of their logarithms; NaN stays NaN and is not warned of."""
    assert measure.of_mean_likelihood([3.0] * 8) == pytest.approx(3)
    assert measure.of_mean_likelihood([0.0] + [math.inf] * 7) == pytest.approx(math.log(8))
    assert math.isnan(measure.of_mean_likelihood([math.nan] * 8))


def test_a_likely_sentence_is_not_taken_for_knowledge():
    """It is likelier than the right one behind the question, and just as much behind any other."""
    scores = {"Right.": 3.0, "Likely.": 1.0, "B.": 4.0, "C.": 5.0}
    neutral = {"Right.": 4.0, "Likely.": 1.0, "B.": 4.0, "C.": 5.0}
    assert measure.choose(list(scores), scores, neutral)[0] == 0
    assert measure.choose(list(scores), scores, dict.fromkeys(scores, 4.0))[0] == 1


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("Cerveza de cualquier marca.", True),
        ("¡Qué bonito!", True),
        ("cerveza de cualquier marca.", False),
        ("Cerveza de cualquier", False),
        ("Cerveza.", False),
        ("Una casa de la casa de la casa de la casa.", False),
        ("", False),
    ],
)
def test_whole_sentences(text, whole):
    assert measure.is_whole(text, capped=False) == whole
    assert not measure.is_whole(text, capped=True)


def test_common_prefix():
    assert numpy_gemma.common_prefix([[1, 2, 3], [1, 2], [1, 2, 4]]) == 2
    assert numpy_gemma.common_prefix([[1], [2, 1]]) == 0
