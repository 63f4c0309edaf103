"""slang/evaluate: the numbers against mlx_lm's own, the rules of drawing questions and intervals, the verdict, two runs."""

import copy
import json
import math
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
from datetime import date
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, TINY, run
from mlx.utils import tree_flatten
from mlx_lm.tuner.datasets import CacheDataset, load_local_dataset
from mlx_lm.tuner.trainer import default_loss, evaluate
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load
from sacrebleu.metrics import CHRF

from slang import prompt
from slang.dictionary import Entry, entries, key
from slang.errors import UserError
from slang.evaluate import __main__ as command
from slang.evaluate import measure, page, quiz, results, scoring, statistics
from slang.evaluate.results import WHO


class NoBar:
    def update(self, _):
        pass


@pytest.fixture(scope="module", params=["mlx", "numpy"])
def tiny(request):
    """The tiny model without an adapter, in the place of scoring.Model, computed by MLX and by slang/numpy_gemma."""
    model = object.__new__(scoring.Model)
    model.net, model.tokenizer = load(str(ROOT / TINY))
    model.net.set_dtype(mx.float32)
    model.nets = {"baseline": model.net}
    model.end = model.tokenizer.convert_tokens_to_ids(scoring.END_OF_TURN)
    model.stops = {model.end, *model.tokenizer.eos_token_ids}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "in_numpy", lambda _: request.param == "numpy")
        yield model


def heard(model, questions):
    """The results of scoring.study in the order of the questions."""
    return [result[1:] for result in sorted(scoring.study(model, "baseline", questions, NoBar()), key=lambda result: result[0])]


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
    """One pass over batches of unequal rows against mlx_lm.tuner.trainer.default_loss, row by row."""
    records = rows(*((f"slang {i}", text) for i, text in enumerate(SENTENCES)))
    records += [{"messages": [{"role": "user", "content": "¿Y?"}, {"role": "assistant", "content": "Nada."}]}]
    questions = measure.loss_questions(tiny, records)
    for question, (scores, _) in zip(questions, heard(tiny, questions), strict=True):
        asked, rest = question.prompt, question.rests[0][:-1]
        nll, n_tokens, mlx_nll, mlx_tokens, _ = measure.loss_sums(tiny, question.rests[0], scores[0])
        batch = mx.array([[*asked, *rest, 0, 0]])
        loss, n = default_loss(tiny.net, batch, mx.array([[len(asked), len(asked) + len(rest)]]))
        assert mlx_tokens == n.item() and mlx_nll / n.item() == pytest.approx(loss.item(), abs=1e-4)
        end = rest.index(tiny.end)
        loss, n = default_loss(tiny.net, batch, mx.array([[len(asked), len(asked) + end]]))
        assert n_tokens == n.item() and nll / n.item() == pytest.approx(loss.item(), abs=1e-4)


def test_the_whole_test_loss_is_that_of_mlx_lm_lora_test(tiny, tmp_path):
    """To the fourth decimal, against what `mlx_lm.lora --test` calls, on a file that it reads."""
    records = rows(*((f"slang {i} {'x' * i}", text) for i, text in enumerate(SENTENCES * 3)))
    for name in ("train", "valid", "test"):
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    *_, test = load_local_dataset(tmp_path, tiny.tokenizer, SimpleNamespace(mask_prompt=True))
    theirs = evaluate(tiny.net, CacheDataset(test), batch_size=1, num_batches=-1)
    questions = measure.loss_questions(tiny, records)
    sums = sum(measure.loss_sums(tiny, q.rests[0], h[0][0]) for q, h in zip(questions, heard(tiny, questions), strict=True))
    assert sums[2] / sums[3] == pytest.approx(theirs, abs=5e-5)


def likelihood(tiny, chat, text):
    """NLL in nats of an answer and its <end_of_turn>, one pass of the model over chat and answer."""
    (question,) = tiny.prompts([chat])
    said = [*tiny.tokenizer.encode(text, add_special_tokens=False), tiny.end]
    logits = tiny.net(mx.array([[*question, *said]]))[0, len(question) - 1 : -1]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return -mx.take_along_axis(logprobs, mx.array(said)[:, None], axis=-1).sum().item()


def test_gains_and_answers_are_those_of_one_question_at_a_time(tiny):
    """Each meaning behind its question, less the same behind the neutral one; and what the base model picks when it is told."""
    asked = prompt.load(ROOT / "prompt.toml")
    trained = rows(*((f"slang {i}", text) for i, text in enumerate(SENTENCES)))
    new = rows(*((f"slang {i}", f"Con otras palabras, {text.lower()}") for i, text in enumerate(SENTENCES)))
    items = quiz.make_items(asked, trained, new, seed=1)
    quizzes = measure.quiz_questions(tiny, items)
    found = heard(tiny, [ask.question for ask in quizzes])
    measure.judge(tiny, items, [(ask, *result) for ask, result in zip(quizzes, found, strict=True)], "baseline", CHRF())
    for item in items:
        judged = item.answers["baseline"]
        assert set(item.quizzes) == set(quiz.QUIZZES)
        for name, choices in item.quizzes.items():
            expected = [likelihood(tiny, item.neutral, c) - likelihood(tiny, item.messages, c) for c in choices]
            assert judged["gains"][name] == pytest.approx(expected, abs=5e-3)
        for name in (quiz.NEW, quiz.NEW + quiz.CLOSE):
            told = [likelihood(tiny, item.neutral, c) - likelihood(tiny, item.told, c) for c in item.quizzes[name]]
            assert item.told_picks[name] == int(np.argmax(told))
        (question,) = tiny.prompts([item.messages])
        tokens, most = list(question), len(question) + scoring.MAX_ANSWER_TOKENS
        while (t := mx.argmax(tiny.net(mx.array([tokens]))[0, -1]).item()) not in tiny.stops and len(tokens) < most:
            tokens.append(t)
        assert tiny.tokenizer.decode(tokens[len(question) :]).strip() == judged["answer"]


def test_nan_scores_ties_and_silence_are_not_right(tiny):
    choices = ["Uno.", "Dos.", "Tres.", "Cuatro."]
    item = SimpleNamespace(references=["Uno.", "Dos."], quizzes={quiz.TRAINED: choices})
    neutral = dict.fromkeys(choices, 2.0)
    for scores in ([math.nan] * 4, [1.0] * 4, [math.nan, 1.0, 2.0, 3.0]):
        judged = measure.judged(tiny, item, dict(zip(choices, scores, strict=True)), neutral, [], CHRF())
        assert judged["picks"][quiz.TRAINED] != 0 and judged["answer"] == "" and judged["chrf"] == 0
        assert not judged["exact"] and not judged["right"] and not judged["whole"]
    scores = {choice: 1.0 + i for i, choice in enumerate(choices)}
    assert measure.judged(tiny, item, scores, neutral, [300] * 64, CHRF())["capped"]


def test_a_likely_sentence_is_not_taken_for_knowledge():
    """It is likelier than the right one behind the question, and just as much behind the neutral one."""
    scores = {"Right.": 3.0, "Likely.": 1.0, "B.": 4.0, "C.": 5.0}
    neutral = {"Right.": 4.0, "Likely.": 1.0, "B.": 4.0, "C.": 5.0}
    assert measure.picked(list(scores), scores, neutral)[0] == 0
    assert measure.picked(list(scores), scores, dict.fromkeys(scores, 4.0))[0] == 1


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


def test_unseen_slangs_are_judged_among_themselves_and_one_wording_is_enough():
    asked = prompt.load(ROOT / "prompt.toml")
    train = rows(*((f"t{i}", f"Trenado{i} conocido{i}.") for i in range(8)))
    unseen = rows(*((f"u{i}", f"Nuevo{i} desconocido{i}.") for i in range(6)))
    items = quiz.make_items(asked, train, unseen, seed=3)
    assert [item.seen for item in items] == [True] * 8 + [False] * 6
    for item in items:
        assert all(choice.startswith("Trenado" if item.seen else "Nuevo") for choice in item.candidates())
        assert set(item.quizzes) == (
            {quiz.TRAINED, quiz.TRAINED + quiz.CLOSE} if item.seen else {quiz.NEW, quiz.NEW + quiz.CLOSE}
        )
        assert item.references == next(iter(item.quizzes.values()))[:1]


def test_items_ask_held_out_forms_and_draw_no_synonym():
    asked = prompt.load(ROOT / "prompt.toml")
    pairs = [(f"s{i}", f"Significado{i} especial{i} distinto{i}.") for i in range(30)]
    pairs += [("yy", "Cerveza helada de botella."), ("zz", "Cerveza helada en botella.")]
    items = quiz.make_items(asked, rows(*pairs), [], seed=7)
    assert len(items) == 32 and all(len(set(item.quizzes[quiz.TRAINED])) == 4 for item in items)
    forms = {item.question.replace(item.slang, "{slang}") for item in items}
    assert forms == set(asked.held_out_questions)
    like = next(item for item in items if item.slang == "yy")
    choices, close = like.quizzes[quiz.TRAINED], like.quizzes[quiz.TRAINED + quiz.CLOSE]
    assert choices[0] == close[0] == "Cerveza helada de botella."
    assert "Cerveza helada en botella." not in choices and "Cerveza helada en botella." in close
    # the same questions again, and another slang leaves them as they are
    more = quiz.make_items(asked, rows(*pairs, ("otro", "Nada parecido.")), [], seed=7)
    assert {item.slang: item.question for item in items}.items() <= {item.slang: item.question for item in more}.items()


def test_slangs_of_one_group_are_no_distractors_of_each_other():
    """Bote, tabo and tarro are a jail; tarro is a face too. Nothing in these wordings is alike."""
    slangs = ["bote", "tabo", "tarro", "jáquima", "birra", "filo", "guaba", "yurro"]
    pairs = [(slang, f"Significado{i} especial{i} distinto{i}.") for i, slang in enumerate(slangs)]
    for seed in range(20):
        items = quiz.make_items(prompt.load(ROOT / "prompt.toml"), rows(*pairs), [], seed)
        choices = {item.slang: set(item.candidates()) for item in items}
        of = dict(pairs)
        assert of["tabo"] not in choices["bote"] and of["bote"] not in choices["tabo"]
        assert not choices["tarro"] & {of["bote"], of["tabo"], of["jáquima"]}
        assert of["tarro"] not in choices["jáquima"]


def test_too_few_slangs():
    with pytest.raises(UserError, match="3 trained slangs are too few for 4 choices; add slangs"):
        quiz.make_items(prompt.load(ROOT / "prompt.toml"), rows(("a", "Uno."), ("b", "Dos."), ("c", "Tres.")), [], 1)


def test_output_is_a_json_file(capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--output", "results/x"])
    assert capsys.readouterr().err.endswith("--output: results/x is no name of a JSON file; end it in .json\n")


def test_label_is_the_next_free_letter_of_the_day(tmp_path):
    day = date(2025, 10, 4)
    assert results.next_label(tmp_path, day) == "20251004[A]"
    (tmp_path / "LOG.md").write_text("- 20251004[A]: x\n- 20251004[B]: y\n- 20251003[Z]: z\n")
    (tmp_path / "20251004[C].json").write_text("{}")
    assert results.next_label(tmp_path, day) == "20251004[D]"
    (tmp_path / "LOG.md").write_text("".join(f"20251004[{c}]" for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    assert results.next_label(tmp_path, day) == "20251004[AA]"


def test_log_keeps_what_a_person_wrote():
    text = "# Mi bitácora\n\nHola.\n\n## Baseline\n\n- 20251004[A]: `x`\n\n## After fine-tuning\n\n- 20251004[B]: `y`\nnota\n"
    text = results.log_entry(text, "## Baseline", "- new")
    text = results.log_entry(text, "## After fine-tuning", "- newer")
    assert text == (
        "# Mi bitácora\n\nHola.\n\n## Baseline\n\n- 20251004[A]: `x`\n- new\n\n"
        "## After fine-tuning\n\n- 20251004[B]: `y`\nnota\n- newer\n"
    )
    assert results.log_entry("", "## Baseline", "- a") == "# Results\n\n## Baseline\n\n- a\n"


def test_a_batch_gives_each_row_what_it_gets_alone(tiny):
    """Rows of unequal length, beyond the sliding window too, continued in several ways and step by step."""
    window = tiny.net.args.sliding_window
    random = np.random.default_rng(0)
    whole = [[2, *random.integers(300, 1000, n).tolist()] for n in (2 * window, window + 7, 9)]
    alone = [tiny.net(mx.array([tokens]))[0] for tokens in whole]
    cuts = (window + 5, 1, 8)
    batch = scoring.Batch(len(tiny.net.layers), len(whole))
    batch.read(tiny.net, [tokens[:cut] for tokens, cut in zip(whole, cuts, strict=True)])
    order = [2, 0, 1, 0]
    got = batch.take(order).read(tiny.net, [whole[i][cuts[i] :] for i in order])
    for row, i in zip(got, order, strict=True):
        expected = alone[i][cuts[i] :]
        assert mx.abs(row[: len(expected)] - expected).max().item() < 1e-3
    for step in range(20):
        tokens = [whole[i][cuts[i] + step] for i in (0, 1)]
        batch = batch.take([0, 1]) if step in (0, 7) else batch
        got = batch.read(tiny.net, [[token] for token in tokens])
        for i in (0, 1):
            assert mx.abs(got[i, 0] - alone[i][cuts[i] + step]).max().item() < 1e-3


def test_log_table_stands_above_and_takes_a_row_a_run():
    cells = ["20251004[A]", "a | note\nof two lines", "tiny", "6", "9.0 -> 2.0", "0.250 -> 1.000", "1.0 -> 2.0", ""]
    text = results.log_row("# Mi bitácora\n\nHola.\n\n## Baseline\n\n- x\n", cells)
    row = "| 20251004[A] | a \\| note of two lines | tiny | 6 | 9.0 -> 2.0 | 0.250 -> 1.000 | 1.0 -> 2.0 |  |\n"
    table = f"{results.COLUMNS}\n| --- | --- | --- | --- | --- | --- | --- | --- |\n{row}"
    assert text == f"# Mi bitácora\n\n{table}\nHola.\n\n## Baseline\n\n- x\n"
    assert results.log_row(text, cells) == text.replace(row, row + row)
    assert results.log_row("", cells).startswith(f"# Results\n\n{table}")


def test_control_rows_are_everyday_spanish_without_slang():
    """Phrases only: slangs of one word (azul, gato) are everyday words in another sense too."""
    records = quiz.read(ROOT / "data" / "control.jsonl")
    slangs = {key(e.slang) for e in entries(ROOT / "data" / "source_augmented.txt") if isinstance(e, Entry)}
    phrases = [f" {slang} " for slang in slangs if len(slang.split()) > 1]
    assert len(records) >= 60 and len({r["messages"][0]["content"] for r in records}) == len(records)
    for record in records:
        assert [m["role"] for m in record["messages"]] == ["user", "assistant"]
        text = f" {key(' '.join(m['content'] for m in record['messages']))} "
        assert not [phrase for phrase in phrases if phrase in text and len(phrase) > 8], text


def test_everyday_rows_are_not_those_that_measure_the_damage():
    """No five words in a row of control.jsonl stand in everyday.jsonl, which is trained."""

    def runs(path):
        found = set()
        for record in quiz.read(path):
            for message in record["messages"]:
                words = key(message["content"]).split()
                found |= {tuple(words[n : n + 5]) for n in range(len(words) - 4)}
        return found

    assert not runs(ROOT / "data/everyday.jsonl") & runs(ROOT / "data/control.jsonl")
    assert len(quiz.read(ROOT / "data/everyday.jsonl")) == 300


# -------------------------------------------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight slangs in train.jsonl, the first three in two wordings, five others in test.jsonl alone: `--by slang`."""
    folder = tmp_path_factory.mktemp("data")
    seen = [(f"slang {i}", f"{SENTENCES[i % 4]} {i}") for i in range(8)]
    unseen = [(f"nuevo {i}", f"{SENTENCES[i % 4]} {i + 8}") for i in range(5)]
    more = [(f"slang {i}", f"Otra cosa {i}.") for i in range(3)]
    for name, pairs in {"train": seen + more, "valid": seen[:2], "test": unseen, "eval": seen}.items():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in rows(*pairs)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=["random", "zero", "nan"])
def adapter(request, tmp_path_factory):
    """An adapter of rank 4 over every layer, its second matrices random, zero (as before training) or not a number."""
    folder = tmp_path_factory.mktemp(request.param) / "adapter"
    folder.mkdir()
    model, _ = load(str(ROOT / TINY))
    lora = {"rank": 4, "scale": 8.0, "dropout": 0.0}
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), lora)
    mx.random.seed(0)
    weights = dict(tree_flatten(model.trainable_parameters()))
    values = {"random": lambda w: 0.05 * mx.random.normal(w.shape), "zero": lambda w: w, "nan": lambda w: w + math.nan}
    weights = {name: values[request.param](w) if name.endswith("lora_b") else w for name, w in weights.items()}
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": len(model.layers), "lora_parameters": lora}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shutil.copy(ROOT / "prompt.toml", folder)
    return folder


@pytest.mark.slow
def test_a_whole_run(adapter, data, tmp_path, capsys):
    """Into --output; the recomputed test loss is mlx_lm.lora's to the fourth decimal, of both models."""
    output = tmp_path / "results" / "x.json"
    flags = ["--model", str(ROOT / TINY), "--adapter-path", str(adapter), "--data", str(data), "--output", str(output)]
    status = command.main([*flags, "--note", "a note", "--ask", "pura vida", "--fail-if-worse"])
    printed, errors = capsys.readouterr()
    assert errors == "" and sorted(path.name for path in output.parent.iterdir()) == ["LOG.md", "x.html", "x.json"]
    saved = json.loads(output.read_text(encoding="utf-8"), parse_constant=pytest.fail)  # neither NaN nor Infinity
    assert printed.splitlines()[-3].startswith(f"{saved['verdict']}: {saved['because']}")
    assert "| x | a note | " in (output.parent / "LOG.md").read_text(encoding="utf-8")
    n = {row["figure"]: row["n"] for row in saved["figures"]}
    trained = {f"{statistics.CHOICE}{name}": 8 for name in (quiz.TRAINED, quiz.TRAINED + quiz.CLOSE)}
    new = {f"{statistics.CHOICE}{name}, unseen slangs": 5 for name in (quiz.NEW, quiz.NEW + quiz.CLOSE)}
    answers = dict.fromkeys(statistics.SCORES, 8) | {f"{name}, unseen slangs": 5 for name in statistics.SCORES}
    losses = {"answer loss, test.jsonl": 5, "answer loss, eval.jsonl": 8, "control loss": 64}
    assert n == losses | trained | new | answers

    if adapter.parent.name.startswith("nan"):
        assert (status, saved["verdict"]) == (3, "worse") and saved["because"].startswith("the adapted model's loss is not a")
        assert "adapted: 13 of 13 answers empty" in printed and "adapted: 13 of 13 answers cut off" in printed
        return
    if adapter.parent.name.startswith("zero"):
        assert (status, saved["verdict"]) == (0, "no better")
        assert saved["because"].startswith("the adapter does not change the model's output; ")
    else:
        assert "does not change" not in saved["because"]
    for who, path in (("baseline", None), ("adapted", str(adapter))):
        model, tokenizer = load(str(ROOT / TINY), adapter_path=path)
        *_, test = load_local_dataset(data, tokenizer, SimpleNamespace(mask_prompt=True))
        theirs = evaluate(model, CacheDataset(test), batch_size=1, num_batches=-1)
        assert saved["test"][who]["recomputed"] == pytest.approx(theirs, abs=5e-5)


@pytest.mark.parametrize("adapter", ["random"], indirect=True)
def test_a_sample_says_so_in_every_figure(adapter, data, tmp_path, capsys):
    """The same slangs again, and the same figures of them as in the whole run."""
    flags = ["--model", str(ROOT / TINY), "--adapter-path", str(adapter), "--data", str(data)]
    for name, more in (("whole", []), ("few", ["--sample", "6"]), ("again", ["--sample", "6"])):
        assert command.main([*flags, *more, "--output", str(tmp_path / name / "x.json")]) == 0
    printed = capsys.readouterr().out
    whole, few, again = (json.loads((tmp_path / name / "x.json").read_text()) for name in ("whole", "few", "again"))
    assert few["sample"] == "a sample of 6 of 13 slangs" and whole["sample"] is None
    assert printed.count("a sample of 6 of 13 slangs\n") == 2
    log = (tmp_path / "few/LOG.md").read_text(encoding="utf-8")
    assert " | 6 of 13 | " in log and log.count("(a sample of 6 of 13 slangs)") == 2
    assert "a sample of 6 of 13 slangs" in (tmp_path / "few/x.html").read_text(encoding="utf-8")
    assert few["items"] == again["items"] and few["figures"] == again["figures"]
    assert all(row["n"] <= 6 for row in few["figures"])
    by_slang = {item["slang"]: item for item in whole["items"]}
    for item in few["items"]:
        for who in WHO:
            for name, gains in item[who]["gains"].items():
                assert gains == pytest.approx(by_slang[item["slang"]][who]["gains"][name], abs=5e-3)
    with pytest.raises(SystemExit, match="2"):
        command.main(["--sample", "0"])
    assert capsys.readouterr().err.endswith("--sample 0: give a whole number from 1\n")


@pytest.mark.parametrize("adapter", ["random"], indirect=True)
def test_a_bar_on_a_terminal_and_ctrl_c_leaves_nothing_half_written(adapter, data, tmp_path):
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(stderr, (24, 80))  # tqdm draws nothing where a terminal has no columns
    environment = {"MODEL": TINY, "DATA": str(data), "ADAPTER_PATH": str(adapter), "RESULTS": str(tmp_path / "results")}
    done = subprocess.Popen([ROOT / "evaluate.sh", "--quick"], env={**os.environ, **environment}, stdout=subprocess.PIPE,
                            stderr=stderr, start_new_session=True)  # fmt: skip
    os.close(stderr)
    shown = b""
    while b"question" not in shown:
        shown += os.read(terminal, 1000)
    os.killpg(done.pid, signal.SIGINT)
    assert done.communicate(timeout=20)[0] == b"" and done.returncode in (-signal.SIGINT, 130)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ figures and verdict


def result(n: int = 40, adapted_right: float = 0.9, control: float = 1.0, seed: int = 0) -> dict:
    """A run over n slangs: the baseline right in a quarter, the adapted model in the given share."""
    random = np.random.default_rng(seed)

    def side(i: int, right: bool) -> dict:
        return {
            "answer": f"Respuesta {i} {right}.",
            "picks": {quiz.TRAINED: 0 if right else 1 + i % 3},
            "gains": {quiz.TRAINED: [float(x) for x in random.random(4)]},
            "chrf": 80.0 if right else 10.0 + i,
            "right": right,
            "exact": right,
            "whole": True,
            "capped": False,
        }

    items = [
        {
            "slang": f"modismo{i}",
            "question": f'¿Qué es "modismo{i}"?',
            "quizzes": {quiz.TRAINED: [f"Bueno {i}.", "Malo.", "Feo.", "Raro."]},
            "told_picks": {},
            "references": [f"Bueno {i}.", f"Muy bueno {i}."],
            "seen": True,
            "baseline": side(i, i % 4 == 0),
            "adapted": side(i, i < adapted_right * n),
        }
        for i in range(n)
    ]
    losses = {
        name: {
            who: {f"s{i}": [(2.0 if who == "baseline" else level) * 5 + i % 3, 5, 20.0, 7, 9.0] for i in range(n)}
            for who in results.WHO
        }
        for name, level in (("test", 1.0), ("eval", 0.5), ("control", 2.0 * control))
    }
    made = {
        "label": "20251004[C]",
        "note": "a <b>note</b>",
        "model": "models/tiny-gemma3",
        "adapter": {"path": "adapters/tiny", "sha256": "0"},
        "prompt": {"sha256": "p", "system": "Sos."},
        "data": {"train": "a", "test": "b", "eval": "c", "control": "d"},
        "entries": {"slangs": n, "records": 3 * n},
        "seed": 42,
        "test": {
            who: {
                "printed": "Test loss 2.000, Test ppl 7.389.",
                "recomputed": 2.0,
                "pad_share": 0.3,
                "pad_loss": 9.0,
                "without_pad": 1.5,
            }
            for who in results.WHO
        },
        "asked": [{"question": "¿Pura vida?", "baseline": "", "adapted": "Saludo."}],
        "training": {"train": [[0, 3.0], [50, 1.0]], "valid": [[50, 1.5]]},
        "losses": losses,
        "items": items,
    }
    return judged(made)


def judged(made: dict) -> dict:
    losses = {name: tuple(by.values()) for name, by in made["losses"].items()}
    made["figures"] = statistics.figures(
        losses, [(i["seen"], i["baseline"], i["adapted"]) for i in made["items"]], made["seed"]
    )
    made["verdict"], made["because"] = statistics.verdict(made["figures"], made["items"])
    made["odd"] = statistics.odd(made["items"])
    return made


def test_bootstrap_is_over_slangs():
    """Ten slangs, five of them mended: the interval is that of ten draws."""
    ones = np.ones(10)
    base, adapted = np.zeros(10), np.array([1.0] * 5 + [0.0] * 5)
    row = statistics.figure("x", (base, ones), (adapted, ones), seed=1)
    assert row["difference"] == 0.5 and row["n"] == 10
    assert row["low"] == pytest.approx(0.2, abs=0.05) and row["high"] == pytest.approx(0.8, abs=0.05)
    weighted = statistics.figure("x", ([8.0, 1.0], [4.0, 1.0]), ([4.0, 1.0], [4.0, 1.0]), seed=1)
    assert weighted["baseline"] == pytest.approx(9 / 5) and weighted["adapted"] == 1.0


def test_the_four_verdicts_and_what_they_say():
    better = result()
    assert better["verdict"] == "better"
    assert re.fullmatch(
        r"choice accuracy, trained wording 0\.250 -> 0\.900 \(\+0\.650, 95 % interval \+0\.\d{3} to \+0\.\d{3}, 40 slangs\)",
        better["because"],
    )
    assert result(adapted_right=0.0)["verdict"] == "worse"
    same = result(adapted_right=0.25)
    assert same["verdict"] == "no better" and "train longer" in same["because"]
    mixed = result(control=1.2)
    assert mixed["verdict"] == "mixed" and "everyday Spanish suffers: control loss 2.19" in mixed["because"]
    assert result(control=1.2, adapted_right=0.25)["verdict"] == "worse"
    assert result(control=1.05)["verdict"] == "better"  # up by less than a tenth


def test_an_adapter_that_changes_nothing_is_told():
    made = result()
    for item in made["items"]:
        item["adapted"] = copy.deepcopy(item["baseline"])
    made = judged(made)
    assert made["verdict"] == "no better" and made["because"].startswith("the adapter does not change the model's output")


def test_a_loss_that_is_no_number_is_worse_and_the_files_stay_valid():
    made = result()
    made["losses"]["test"]["adapted"]["s0"][0] = float("nan")
    made = judged(made)
    assert made["verdict"] == "worse" and "diverged" in made["because"] and "nan" in page.text(made)
    clean = results.finite(made)
    json.dumps(clean, allow_nan=False)
    assert "not a number" in page.page(clean)
    made["losses"]["test"]["baseline"]["s0"][0] = float("nan")
    with pytest.raises(UserError, match="the base model's loss is not a number; set MODEL to another"):
        judged(made)


def test_empty_and_endless_answers_are_counted():
    made = result()
    made["items"][0]["adapted"]["answer"] = ""
    made["items"][1]["baseline"]["capped"] = made["items"][2]["baseline"]["capped"] = True
    made = judged(made)
    assert made["odd"] == ["baseline: 2 of 40 answers cut off: they never stopped", "adapted: 1 of 40 answers empty"]
    assert "adapted: 1 of 40 answers empty" in page.text(made)


def test_training_log_is_read_tolerantly(tmp_path):
    path = tmp_path / "log.jsonl"
    assert results.training(path) == {"train": [], "valid": []}
    path.write_text(
        '{"iteration": 10, "train_loss": 2.5}\n\nnot JSON\n[1]\n{"iteration": 10, "val_loss": 3}\n{"train_loss": null}\n'
    )
    assert results.training(path) == {"train": [[10.0, 2.5]], "valid": [[10.0, 3.0]]}


# ------------------------------------------------------------------------------------------------------------- compare


def compare(folder, *labels):
    return run(sys.executable, "-m", "slang.evaluate", "--results", folder, "--compare", *labels)


def test_compare_pairs_by_slang_and_says_what_differs(tmp_path):
    a, b = result(adapted_right=0.5), result(adapted_right=0.9)
    a["label"], b["label"] = "20251004[A]", "20251004[C]"
    for run_ in (a, b):
        (tmp_path / f"{run_['label']}.json").write_text(json.dumps(run_), encoding="utf-8")
    done = compare(tmp_path, "20251004A", "20251004[C]")
    assert done.returncode == 0 and done.stderr == ""
    row = next(line for line in done.stdout.splitlines() if line.startswith("choice accuracy")).split()
    assert row[4:7] == ["0.500", "0.900", "+0.400"] and row[-1] == "40"
    assert done.stdout.splitlines()[-1] == "Same data, prompt, base model and questions."

    b["prompt"]["sha256"], b["data"]["test"] = "other", "other"
    b["items"] = b["items"][:30]
    b["items"][0]["question"], b["items"][2]["seen"] = "¿Y?", False
    b["items"][1]["quizzes"][quiz.TRAINED][1] = "Otro."
    b["items"][4]["references"] = b["items"][5]["references"] = ["Otro."]
    (tmp_path / "20251004[C].json").write_text(json.dumps(b), encoding="utf-8")
    done = compare(tmp_path, "20251004A", "20251004C")
    assert done.stdout.splitlines()[-1] == (
        "Not like with like: the prompts differ; test.jsonl differs; 10 slangs of 20251004[A] are left out; 1 of 30 slangs "
        "were asked another question, and are left out; 1 of 30 slangs had other choices, and are left out of the choice "
        "accuracy that they differ in; 2 of 30 slangs have other known meanings, and are left out of chrF, right and exact "
        "answers; 1 of 30 slangs were trained in one of the two only, and count as unseen."
    )
    n = {line[:50].strip(): int(line.split()[-1]) for line in done.stdout.splitlines() if "[" in line and "[A]" not in line}
    choice = statistics.CHOICE + quiz.TRAINED
    seen = {choice: 27, "right answers": 26, "exact answers": 26, "answer chrF": 26, "whole sentences": 28}
    unseen = {f"{name}, unseen slangs": 1 for name in seen}
    assert n == {"answer loss, eval.jsonl": 40, "control loss": 40} | seen | unseen

    done = compare(tmp_path, "20251004A", "20251004B")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"20251004B: no such run in {tmp_path} (there: 20251004[A], 20251004[C])\n"
    (tmp_path / "bad.json").write_text("[]")
    done = compare(tmp_path, "20251004A", "bad")
    assert (done.returncode, done.stderr) == (
        1,
        f"{tmp_path}/bad.json: not a run of this version of evaluate.sh; evaluate again\n",
    )
