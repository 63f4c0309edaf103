"""slang/lint.py: what is said of a dictionary that is worse to learn from than it could be."""

import re
import sys

import pytest
from conftest import ROOT, run

from slang import lint
from slang.dictionary import entries

GOOD = """\
birra::Cerveza de cualquier marca.
birra::Bebida de cebada que se toma fría en los bares.
birra::Lo que se pide al mesero cuando empieza la fiesta.
birra::Nombre de lo que viene en lata o botella y embriaga.
"""


AGAIN = ", again; write another"


def edited(line: int, new: str) -> str:
    """GOOD with another line in the place of one of its own."""
    lines = GOOD.splitlines()
    lines[line - 1] = new
    return "\n".join(lines)


def report(tmp_path, text: str, least: int = lint.FEWEST_WORDINGS) -> lint.Report:
    """The report on a text, problems and hints as `line: text`."""
    path = tmp_path / "d.txt"
    path.write_text(text, encoding="utf-8")
    good, *listed = lint.check(path, least)
    bare = [[str(x).removeprefix(f"{path}:") for x in part] for part in listed]
    return lint.Report(good, *bare)


@pytest.mark.parametrize(
    ("line", "new", "message"),
    [
        (1, "birra Cerveza.", "1: no '::' separator; write the line as slang::meaning"),
        (2, "birra::CERVEZA de cualquier marca", "2: the meaning of line 1, of this slang" + AGAIN),
        (4, "mae::Cerveza de cualquier marca.", "4: the meaning of line 1, of 'birra'" + AGAIN),
        (4, "mae::Amigo o conocido de uno.", "4: 'mae' has one wording; write at least 4"),
    ],
)
def test_problems(tmp_path, line, new, message):
    assert message in report(tmp_path, edited(line, new)).problems


@pytest.mark.parametrize(
    ("line", "new", "message"),
    [
        (
            1,
            "birra::Una birra es cerveza.",
            "1: 'birra' stands inside its own meaning; explain it in other words",
        ),
        (1, "birra::Cerveza.", "1: 1 words; write 3 to 30"),
        (1, "birra::cerveza de cualquier marca.", "1: begins with 'c'; write a capital"),
        (1, "birra::Qué rica cerveza?", "1: ¿ and ? do not pair; write both"),
        (1, "birra::Cerveza (de marca.", "1: ( and ) do not pair; write both"),
        (1, "birra::Cerveza ,de marca.", "1: spacing or punctuation at ' ,'; mend it"),
        (1, "birra::Cerveza de de marca.", "1: 'de' stands twice in a row; take one out"),
        (
            2,
            "birra::Cerveza de cualquier otra marca.",
            "2: nearly the words of line 1; write it in another way",
        ),
        (
            2,
            "Birra::Bebida de cebada que se toma fría.",
            "2: 'Birra' is spelled 'birra' above; spell it alike",
        ),
        (2, "mae::Amigo de uno.", "3: lines of 'birra' stand apart (line 1); put them together"),
        (4, "", "1: 'birra' has 3 wordings; write at least 4"),
        (2, "# sentido: otra", "2: a sense of 'birra' has 2 wording(s); write at least 3"),
    ],
)
def test_hints(tmp_path, line, new, message):
    found = report(tmp_path, edited(line, new))
    assert message in found.hints and message not in found.problems


def test_a_good_dictionary(tmp_path):
    assert report(tmp_path, GOOD)[1:] == ([], [])


def test_a_list_that_is_not_spanish_gets_no_hint_on_spanish(tmp_path):
    """English: question marks do not open, and naive is no mistake for naïve."""
    text = "arvo::What Australians call the afternoon?\narvo::A naive name of a time of day.\n"
    for i in range(20):
        text += f"s{i}::A naïve word, number {i}.\ns{i}::Another naïve one, {i} of many.\n"
    assert report(tmp_path, text, least=2)[1:] == ([], [])


def test_suspicious_spelling(tmp_path):
    text = "".join(f"s{i}::Partido de fútbol número {i} del año y más.\n" for i in range(20))
    text += "t::Juego de futbol con bola.\n"
    hint = "21: 'futbol': is it 'fútbol' (20 times in the file)? Check the spelling"
    assert hint in report(tmp_path, text, least=1).hints


def test_hints_are_counted_by_kind_and_listed_when_strict(tmp_path):
    path = tmp_path / "d.txt"
    text = GOOD.replace("::C", "::c").replace("::L", "::l") + "birra::Rubia.\n"
    path.write_text(text, encoding="utf-8")
    relaxed = run(sys.executable, "-m", "slang.dictionary", path)
    assert (relaxed.returncode, relaxed.stderr) == (0, "")
    kinds = "2 without a capital (first: line 1), 1 short or long (first: line 5)"
    assert relaxed.stdout.endswith(f"problems            0\nhints               3: {kinds}\n")
    strict = run(sys.executable, "-m", "slang.dictionary", path, "--strict")
    assert (strict.returncode, strict.stdout) == (1, relaxed.stdout)
    assert strict.stderr.splitlines() == [
        f"{path}:1: begins with 'c'; write a capital",
        f"{path}:3: begins with 'l'; write a capital",
        f"{path}:5: 1 words; write 3 to 30",
    ]


def test_problems_are_listed_and_end_with_1(tmp_path):
    path = tmp_path / "d.txt"
    path.write_text(GOOD + "mae::Amigo o conocido de uno.\n", encoding="utf-8")
    done = run(sys.executable, "-m", "slang.dictionary", path)
    assert done.returncode == 1
    assert done.stderr == f"{path}:5: 'mae' has one wording; write at least 4\n"


def test_no_hint_compares_all_wordings_of_a_slang_with_each_other(tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr(lint, "overlap", lambda a, b: compared.append((a, b)) or 0.0)
    report(tmp_path, "".join(f"birra::Cerveza número {i} de la lista.\n" for i in range(1000)))
    assert 0 < len(compared) <= 1000 * lint.WINDOW


def test_shipped_dictionary():
    """What data/README.md promises of it."""
    done = run(sys.executable, "-m", "slang.dictionary", "data/source_augmented.txt", "--strict")
    assert (done.returncode, done.stderr) == (0, "")
    figures = dict(re.match(r"(.+?)  +(\d+)", line).groups() for line in done.stdout.splitlines())
    assert int(figures["slangs"]) >= 1000 and int(figures["lines"]) >= 4000
    assert int(figures["problems"]) == int(figures["hints"]) == 0
    slangs = {entry.slang for entry in entries(ROOT / "data/source_augmented.txt")}
    assert {
        "música de plancha",
        "devolverse los peluches",
        "pura vida",
        "pinche",
        "chingo",
        "estar chiva",
    } <= slangs
    assert {"aletas", "cada muerte de obispo", "estar hasta la mecha", "jeta", "panza"} <= slangs


def test_many_problems_are_counted(tmp_path):
    path = tmp_path / "d.txt"
    path.write_text("mae\n" * 1000)
    done = run(sys.executable, "-m", "slang.dictionary", path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 21
    assert done.stderr.endswith("... and 980 more like these\n")
