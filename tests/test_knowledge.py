"""slang/knowledge.py: the numbers against mlx_lm's own, and the rules of drawing questions and intervals."""

import math
from datetime import date

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, TINY
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.utils import load

from slang import knowledge, prompt


class NoBar:
    def update(self, _):
        pass


@pytest.fixture(scope="module")
def tiny():
    """The tiny model without an adapter, in the place of knowledge.Model."""
    model = object.__new__(knowledge.Model)
    model.net, model.tokenizer = load(str(ROOT / TINY))
    model.end = model.tokenizer.convert_tokens_to_ids(knowledge.END_OF_TURN)
    model.stops = {model.end, *model.tokenizer.eos_token_ids}
    return model


def rows(*pairs):
    asked = prompt.load(ROOT / "prompt.toml")
    return [{"slang": s, "meaning": m, "messages": asked.train(s, m, i % 3)} for i, (s, m) in enumerate(pairs)]


SENTENCES = [
    "Saludo amable que se le hace a la gente.",
    "Cerveza.",
    "Trabajo con que uno se gana la vida todos los días, en la casa o en la oficina.",
    "Malestar del día después de una fiesta.",
]


def test_loss_is_mlx_lms_own_with_and_without_the_pad_target(tiny):
    """One pass over batches with a shared prefix against mlx_lm.tuner.trainer.default_loss, row by row."""
    records = rows(*((f"slang {i}", text) for i, text in enumerate(SENTENCES)))
    ours = knowledge.loss_rows(tiny, records, NoBar())
    for record, got in zip(records, ours, strict=True):
        asked, rest = tiny.answer_tokens(record["messages"])
        batch = mx.array([[*asked, *rest, 0, 0]])
        loss, n = default_loss(tiny.net, batch, mx.array([[len(asked), len(asked) + len(rest)]]))
        assert got["mlx_tokens"] == n.item()
        assert got["mlx_nll"] / n.item() == pytest.approx(loss.item(), abs=1e-4)
        end = rest.index(tiny.end)
        loss, n = default_loss(tiny.net, batch, mx.array([[len(asked), len(asked) + end]]))
        assert got["tokens"] == n.item() and got["nll"] / n.item() == pytest.approx(loss.item(), abs=1e-4)


def test_choices_and_answers_are_those_of_one_question_at_a_time(tiny):
    asked = prompt.load(ROOT / "prompt.toml")
    items = knowledge.make_items(asked, rows(*((f"slang {i}", text) for i, text in enumerate(SENTENCES))), [], seed=1)
    knowledge.answer_items(tiny, items, "baseline", NoBar())
    for item in items:
        question = tiny.prompt_tokens(item.messages)
        for choice, score in zip(item.choices, item.answers["baseline"]["choice_nll"], strict=True):
            answer = [*tiny.tokenizer.encode(choice, add_special_tokens=False), tiny.end]
            logits = tiny.net(mx.array([[*question, *answer]]))[0, len(question) - 1 : -1]
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            expected = -mx.take_along_axis(logprobs, mx.array(answer)[:, None], axis=-1).mean().item()
            assert score == pytest.approx(expected, abs=1e-4)
        tokens = list(question)
        while (t := mx.argmax(tiny.net(mx.array([tokens]))[0, -1]).item()) not in tiny.stops and len(tokens) < len(
            question
        ) + 64:
            tokens.append(t)
        assert tiny.tokenizer.decode(tokens[len(question) :]).strip() == item.answers["baseline"]["answer"]


def test_items_ask_held_out_forms_and_draw_no_synonym():
    asked = prompt.load(ROOT / "prompt.toml")
    pairs = [(f"s{i}", f"Significado{i} especial{i} distinto{i}.") for i in range(30)]
    pairs += [("birra", "Cerveza helada de botella."), ("fría", "Cerveza helada en botella.")]
    items = knowledge.make_items(asked, rows(*pairs), [], seed=7)
    assert len(items) == 32 and all(len(set(item.choices)) == 4 for item in items)
    forms = {item.question.replace(item.slang, "{slang}") for item in items}
    assert forms == set(asked.held_out_questions)
    birra = next(item for item in items if item.slang == "birra")
    assert birra.choices[0] == "Cerveza helada de botella." and "Cerveza helada en botella." not in birra.choices
    # the same questions again, and another slang leaves them as they are
    more = knowledge.make_items(asked, rows(*pairs, ("otro", "Nada parecido.")), [], seed=7)
    assert {item.slang: item.question for item in items}.items() <= {item.slang: item.question for item in more}.items()


def test_too_few_slangs():
    with pytest.raises(knowledge.UsageError, match="3 trained slangs are too few for 4 choices; add slangs"):
        knowledge.make_items(prompt.load(ROOT / "prompt.toml"), rows(("a", "Uno."), ("b", "Dos."), ("c", "Tres.")), [], 1)


def test_bootstrap_is_over_slangs():
    """Ten slangs, one of them with a thousand rows: the interval is that of ten draws, not of a thousand."""
    ones = np.ones(10)
    base, adapted = np.zeros(10), np.array([1.0] * 5 + [0.0] * 5)
    row = knowledge.figure("x", (base, ones), (adapted, ones), seed=1)
    assert row["difference"] == 0.5 and row["n"] == 10
    assert row["low"] == pytest.approx(0.2, abs=0.05) and row["high"] == pytest.approx(0.8, abs=0.05)
    weighted = knowledge.figure(
        "x", (np.array([8.0, 1.0]), np.array([4.0, 1.0])), (np.array([4.0, 1.0]), np.array([4.0, 1.0])), 1
    )
    assert weighted["baseline"] == pytest.approx(9 / 5) and weighted["adapted"] == 1.0


def test_label_is_the_next_free_letter_of_the_day(tmp_path):
    day = date(2025, 10, 4)
    assert knowledge.next_label(tmp_path, day) == "20251004[A]"
    (tmp_path / "LOG.md").write_text("- 20251004[A]: x\n- 20251004[B]: y\n- 20251003[Z]: z\n")
    (tmp_path / "20251004[C].json").write_text("{}")
    assert knowledge.next_label(tmp_path, day) == "20251004[D]"
    (tmp_path / "LOG.md").write_text("".join(f"20251004[{c}]" for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    assert knowledge.next_label(tmp_path, day) == "20251004[AA]"


def test_log_keeps_what_a_person_wrote():
    text = "# Mi bitácora\n\nHola.\n\n## Baseline\n\n- 20251004[A]: `x`\n\n## After fine-tuning\n\n- 20251004[B]: `y`\nnota\n"
    text = knowledge.log_entry(text, "## Baseline", "- new")
    text = knowledge.log_entry(text, "## After fine-tuning", "- newer")
    assert text == (
        "# Mi bitácora\n\nHola.\n\n## Baseline\n\n- 20251004[A]: `x`\n- new\n\n"
        "## After fine-tuning\n\n- 20251004[B]: `y`\nnota\n- newer\n"
    )
    assert knowledge.log_entry("", "## Baseline", "- a") == "# Results\n\n## Baseline\n\n- a\n"


def test_prompt_cache_equals_a_whole_pass(tiny):
    """Beyond the sliding window too: a prompt in the cache and a continuation give the logits of one long row."""
    window = tiny.net.args.sliding_window
    tokens = [2, *np.random.default_rng(0).integers(300, 1000, 2 * window).tolist()]
    whole = tiny.net(mx.array([tokens]))
    for cut in (1, window - 1, window + 5):
        caches = [knowledge.PromptCache() for _ in tiny.net.layers]
        tiny.net(mx.array([tokens[:cut]]), cache=caches)
        rest = tiny.net(mx.array([tokens[cut:]] * 3), cache=[cache.repeated(3) for cache in caches])
        assert mx.abs(rest - whole[:, cut:]).max().item() < 1e-3
        one = tiny.net(mx.array([tokens[cut : cut + 1]]), cache=caches)
        assert mx.abs(one - whole[:, cut : cut + 1]).max().item() < 1e-3


def test_perplexity_in_the_table_is_exp_of_the_loss():
    row = {
        "figure": "answer loss, test.jsonl",
        "baseline": 2.0,
        "adapted": 1.0,
        "difference": -1.0,
        "low": -1.2,
        "high": -0.8,
        "n": 9,
    }
    lines = knowledge.show([row]).splitlines()
    assert lines[2].split()[-2:] == [f"{math.exp(2):.1f}", f"{math.exp(1):.1f}"]
