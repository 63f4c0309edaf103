"""slang/evaluate/results.py and statistics.py: labels, LOG.md, JSON, figures, verdict, two runs."""

import copy
import json
import re
import sys
from datetime import date

import numpy as np
import pytest
from conftest import run
from evaluated import judged, result

from slang.errors import UserError
from slang.evaluate import page, quiz, results, statistics

NOT_A_RUN = "{}: not a run of this version of evaluate.sh ({}); evaluate again"


# ---------------------------------------------------------------------------------- labels, LOG.md


def test_label_is_the_next_free_letter_of_the_day(tmp_path):
    """In a folder with labels of the earlier form too."""
    day = date(2025, 10, 4)
    assert results.next_label(tmp_path, day) == "20251004-A"
    (tmp_path / "LOG.md").write_text("- 20251004[A]: x\n- 20251004-B: y\n- 20251003-Z: z\n")
    (tmp_path / "20251004-C.json").write_text("{}")
    assert results.next_label(tmp_path, day) == "20251004-D"
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    (tmp_path / "LOG.md").write_text("".join(f"20251004-{c} " for c in letters))
    assert results.next_label(tmp_path, day) == "20251004-AA"
    two = [a + b for a in letters for b in letters]
    (tmp_path / "LOG.md").write_text("".join(f"20251004-{c} " for c in [*letters, *two]))
    assert results.next_label(tmp_path, day) == "20251004-AAA"


@pytest.mark.parametrize("file", ["20251004[A]", "20251004-A"])
@pytest.mark.parametrize("name", ["20251004[A]", "20251004-A", "20251004A"])
def test_a_run_is_found_by_each_form_of_its_label(tmp_path, file, name):
    (tmp_path / f"{file}.json").write_text("{}")
    assert results.find(name, tmp_path) == tmp_path / f"{file}.json"


def test_log_keeps_what_a_person_wrote():
    text = (
        "# Mi bitácora\n\nHola.\n\n## Baseline\n\n- 20251004[A]: `x`\n\n"
        "## After fine-tuning\n\n- 20251004[B]: `y`\nnota\n"
    )
    text = results.log_entry(text, "## Baseline", "- new")
    text = results.log_entry(text, "## After fine-tuning", "- newer")
    assert text == (
        "# Mi bitácora\n\nHola.\n\n## Baseline\n\n- 20251004[A]: `x`\n- new\n\n"
        "## After fine-tuning\n\n- 20251004[B]: `y`\nnota\n- newer\n"
    )
    assert results.log_entry("", "## Baseline", "- a") == "# Results\n\n## Baseline\n\n- a\n"


def test_a_log_with_windows_line_ends_keeps_its_one_table(tmp_path):
    path = tmp_path / "LOG.md"
    text = results.log_row("# Results\n", ["20251004-A"] * 8)
    path.write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    assert results.read_log(path) == text


def test_log_table_stands_above_and_takes_a_row_a_run():
    losses = ["9.0 -> 2.0", "0.250 -> 1.000", "1.0 -> 2.0", ""]
    cells = ["20251004-A", "a | note\nof two lines", "tiny", "6", *losses]
    text = results.log_row("# Mi bitácora\n\nHola.\n\n## Baseline\n\n- x\n", cells)
    row = (
        "| 20251004-A | a \\| note of two lines | tiny | 6 | 9.0 -> 2.0 | 0.250 -> 1.000 "
        "| 1.0 -> 2.0 |  |\n"
    )
    table = f"{results.COLUMNS}\n| --- | --- | --- | --- | --- | --- | --- | --- |\n{row}"
    assert text == f"# Mi bitácora\n\n{table}\nHola.\n\n## Baseline\n\n- x\n"
    assert results.log_row(text, cells) == text.replace(row, row + row)
    assert results.log_row("", cells).startswith(f"# Results\n\n{table}")


def test_training_log_is_read_tolerantly(tmp_path):
    path = tmp_path / "log.jsonl"
    assert results.training(path) == results.training(tmp_path) == results.Curves([], [])
    path.write_text(
        '{"iteration": 10, "train_loss": 2.5}\n\nnot JSON\n[1]\n'
        '{"iteration": 10, "val_loss": 3}\n{"train_loss": null}\n'
        '{"iteration": NaN, "train_loss": 1}\n{"iteration": 1e400, "train_loss": 1}\n'
        f'{{"iteration": 1, "train_loss": {"9" * 401}}}\n{"[" * 100_000}\n'
    )
    assert results.training(path) == results.Curves([(10.0, 2.5)], [(10.0, 3.0)])


# ----------------------------------------------------------------------------------------- the JSON


def test_a_run_is_read_as_it_was_written(tmp_path):
    made = result()
    path = tmp_path / "x.json"
    path.write_bytes(results.encoded(made))
    assert results.read(path) == made
    saved = json.loads(path.read_bytes())
    assert saved["items"][0]["told_picks"] == {} and saved["asked"][0]["adapted"] == "Saludo."


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r.pop("label"), "Object missing required field `label`"),
        (lambda r: r.update(items=[]), "Expected `array` of length >= 1 - at `$.items`"),
        (lambda r: r.update(items={}), "Expected `array`, got `object` - at `$.items`"),
        (lambda r: r.update(training=5), "Expected `object`, got `int` - at `$.training`"),
        (
            lambda r: r["losses"]["test"].pop("baseline"),
            "Object missing required field `baseline` - at `$.losses[...]`",
        ),
        (
            lambda r: r["losses"]["test"]["adapted"].update(s0=[1.0]),
            "Expected `array` of length >= 5 - at `$.losses[...].adapted[...]`",
        ),
        (
            lambda r: r["items"][1]["adapted"]["picks"].update({quiz.TRAINED: 4}),
            "Expected `int` <= 3 - at `$.items[1].adapted.picks[...]`",
        ),
        (
            lambda r: r["items"][1]["adapted"]["picks"].clear(),
            "`quizzes` and `picks` name other quizzes - at `$.items[1]`",
        ),
        (lambda r: r.update(verdict=""), "Invalid enum value '' - at `$.verdict`"),
    ],
)
def test_an_edited_run_says_what_is_wrong(tmp_path, edit, message):
    path = tmp_path / "20251004-A.json"
    saved = json.loads(results.encoded(result(8)))
    edit(saved)
    path.write_text(json.dumps(saved), encoding="utf-8")
    for arguments in (("--compare", "20251004-A", "20251004-A"), ("--page", "20251004-A")):
        done = run(sys.executable, "-m", "slang.evaluate", "--results", tmp_path, *arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == NOT_A_RUN.format(path, message) + "\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "Input data was truncated"),
        (b"", "Input data was truncated"),
        (b"[]", "Expected `object`, got `array`"),
        (b"\xff", "JSON is malformed: invalid character (byte 0)"),
    ],
)
def test_what_is_no_run(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(NOT_A_RUN.format(path, message))):
        results.read(path)


# -------------------------------------------------------------------------------- figures, verdict


def test_bootstrap_is_over_slangs():
    """Ten slangs, five of them mended: the interval is that of ten draws."""
    ones = np.ones(10)
    base = np.zeros(10)
    adapted = np.array([1.0] * 5 + [0.0] * 5)
    row = statistics.figure("x", (base, ones), (adapted, ones), seed=1)
    assert row.difference == 0.5 and row.n == 10
    assert row.low == pytest.approx(0.2, abs=0.05)
    assert row.high == pytest.approx(0.8, abs=0.05)
    before, after = ([8.0, 1.0], [4.0, 1.0]), ([4.0, 1.0], [4.0, 1.0])
    weighted = statistics.figure("x", before, after, seed=1)
    assert weighted.baseline == pytest.approx(9 / 5) and weighted.adapted == 1.0


def test_the_four_verdicts_and_what_they_say():
    better = result()
    assert better.verdict == "better"
    assert re.fullmatch(
        r"choice accuracy, trained wording 0\.250 -> 0\.900 "
        r"\(\+0\.650, 95 % interval \+0\.\d{3} to \+0\.\d{3}, 40 slangs\)",
        better.because,
    )
    assert result(adapted_right=0.0).verdict == "worse"
    same = result(adapted_right=0.25)
    assert same.verdict == "no better" and same.because.endswith(statistics.MORE_WORDINGS)
    mixed = result(control=1.2)
    assert mixed.verdict == "mixed"
    assert "everyday Spanish suffers: control loss 2.19" in mixed.because
    assert result(control=1.2, adapted_right=0.25).verdict == "worse"
    assert result(control=1.05).verdict == "better"  # up by less than a tenth
    lost = results.Figure("choice accuracy, new wording", 0.6, 0.3, -0.3, -0.5, -0.1, n=40)
    both, because = statistics.verdict([*better.figures, lost], better.items)
    assert both == "mixed" and "new wording 0.600 -> 0.300" in because


def test_an_adapter_that_changes_nothing_says_what_helps():
    made = result()
    for item in made.items:
        item.adapted = copy.deepcopy(item.baseline)
    made = judged(made)
    assert (made.verdict, made.because) == (
        "no better",
        "the adapter does not change the model's output; "
        "train longer, or set ADAPTER_PATH to another",
    )


def test_a_loss_that_is_no_number_is_worse_and_the_files_stay_valid():
    made = result()
    made.losses["test"].adapted["s0"][0] = float("nan")
    made = judged(made)
    assert made.verdict == "worse" and "diverged" in made.because
    assert "nan" in page.run_text(made)
    encoded = results.encoded(made)
    json.loads(encoded, parse_constant=pytest.fail)
    assert "not a number" in page.page(results.decoded(encoded))
    made.losses["test"].baseline["s0"][0] = float("nan")
    with pytest.raises(UserError, match="the base model's loss is not a number; set MODEL to ano"):
        judged(made)


def test_empty_and_endless_answers_are_counted():
    made = result()
    made.items[0].adapted.answer = ""
    made.items[1].baseline.capped = made.items[2].baseline.capped = True
    made = judged(made)
    assert made.failed_answers == [
        "baseline: 2 of 40 answers cut off: they never stopped",
        "adapted: 1 of 40 answers empty",
    ]
    assert "adapted: 1 of 40 answers empty" in page.run_text(made)


# ---------------------------------------------------------------------------------------- two runs


def compare(folder, *labels):
    return run(sys.executable, "-m", "slang.evaluate", "--results", folder, "--compare", *labels)


def test_compare_pairs_by_slang_and_says_what_differs(tmp_path):
    """One of the runs has a label of the earlier form."""
    a, b = result(adapted_right=0.5), result(adapted_right=0.9)
    a.label, b.label = "20251004[A]", "20251004-C"
    for made in (a, b):
        (tmp_path / f"{made.label}.json").write_bytes(results.encoded(made))
    done = compare(tmp_path, "20251004A", "20251004-C")
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "A is 20251004[A], B is 20251004-C"
    row = next(line for line in lines if line.startswith("choice accuracy")).split()
    assert row[4:7] == ["0.500", "0.900", "+0.400"] and row[-1] == "40"
    assert lines[-1] == "Same data, prompt, base model and questions."

    b.prompt.sha256 = b.data["test"] = "other"
    b.versions["quiz"] = "another"
    b.items = b.items[:30]
    b.items[0].question = "¿Y?"
    b.items[1].quizzes[quiz.TRAINED][1] = "Otro."
    b.items[2].seen = False
    b.items[4].references = b.items[5].references = ["Otro."]
    (tmp_path / f"{b.label}.json").write_bytes(results.encoded(b))
    done = compare(tmp_path, "20251004A", "20251004C")
    lines = done.stdout.splitlines()
    assert lines[-1] == (
        "Not like with like: the prompts differ; choices were judged in another way: evaluate the "
        "older one again; test.jsonl differs; 10 slangs of 20251004[A] are left out; "
        "1 of 30 slangs were asked another question, and are left out; 1 of 30 slangs "
        "had other choices, and are left out of the choice accuracy that they differ in; 2 of 30 "
        "slangs have other known meanings, and are left out of chrF, right and exact answers; 1 of "
        "30 slangs were trained in one of the two only, and count as unseen."
    )
    table = [line for line in lines if "[" in line and "[A]" not in line]
    n = {line[:50].strip(): int(line.split()[-1]) for line in table}
    seen = {
        statistics.CHOICE + quiz.TRAINED: 27,
        "right answers": 26,
        "exact answers": 26,
        "answer chrF": 26,
        "whole sentences": 28,
    }
    unseen = {f"{name}, unseen slangs": 1 for name in seen}
    assert n == {"answer loss, eval.jsonl": 40, "control loss": 40} | seen | unseen


def test_a_run_that_is_not_there(tmp_path):
    for label in ("20251004[A]", "20251004-C"):
        (tmp_path / f"{label}.json").write_bytes(results.encoded(result(4)))
    done = compare(tmp_path, "20251004A", "20251004-B")
    assert (done.returncode, done.stdout) == (1, "")
    there = "20251004-C, 20251004[A]"
    assert done.stderr == f"20251004-B: no such run in {tmp_path} (there: {there})\n"
