"""slang/dictionary.py: what a line may be, and what is said of one that can't be used."""

import re
import sys

import pytest
from conftest import ROOT, run
from hypothesis import given
from hypothesis import strategies as st

from slang import dictionary
from slang.dictionary import Entry, Problem, SynonymError, close, entries, fold, key, parse_line, problems, synonyms, unusable


@pytest.mark.parametrize(
    ("line", "parsed"),
    [
        ("pura vida::Saludo.", ("pura vida", "Saludo.")),
        ("  mae :: Amigo  \r\n", ("mae", "Amigo.")),
        ("hora::Se dice a las 3::30.", ("hora", "Se dice a las 3::30.")),
        ("e\u0301pico::Muy bueno.", ("épico", "Muy bueno.")),
        ("#hashtag::Con un numeral.", ("#hashtag", "Con un numeral.")),
        ("# comment", None),
        ("#", None),
        ("   ", None),
    ],
)
def test_line(line, parsed):
    assert parse_line(line) == parsed


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        ("Bueno", "Bueno."),
        ("¿Quién?", "¿Quién?"),
        ("Ah…", "Ah…"),
        ('Dice "ya."', 'Dice "ya."'),
        ("(Sí)", "(Sí)."),
        ("Ya,", "Ya."),
    ],
)
def test_closing_punctuation(text, closed):
    assert close(text) == closed


def test_key_ignores_case_accents_punctuation_but_not_enye():
    assert key("  ¡Qué  CHIVA! ") == key("que chiva") == "que chiva"
    assert key("caña") == key("CAN\u0303A") != key("cana")
    assert fold("¿Qué es GÜILA?") == "¿que es guila?"
    assert key("...") != key("!!")


@given(st.text() | st.text(st.characters(max_codepoint=255)))
def test_the_quick_folding_is_the_folding(text):
    assert fold(text) == dictionary._any_fold(text)
    assert key(text) == (" ".join(dictionary._any_words(text).split()) or " ".join(text.split()))


def test_every_byte_of_the_quick_folding():
    for letter in map(chr, range(256)):
        for text in (letter, f"a{letter}b"):
            assert fold(text) == dictionary._any_fold(text)


def test_file_with_bom_crlf_and_a_line_that_is_not_utf8(tmp_path):
    path = tmp_path / "d.txt"
    path.write_bytes(b"\xef\xbb\xbfmae::Amigo.\r\nbirra::Cerveza fr\xeda.\r\n\r\n# nota\r\ntuanis::Bueno.")
    assert list(entries(path)) == [
        Entry("mae", "Amigo.", 1),
        Problem(str(path), 2, "not UTF-8 (byte 18 of the line); save the file as UTF-8"),
        Entry("tuanis", "Bueno.", 5),
    ]


@given(st.binary())
def test_any_bytes_give_entries_or_problems(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "d.txt"
    path.write_bytes(data)
    for item in entries(path):
        if isinstance(item, Entry):
            assert item.slang and item.meaning and not unusable(item.slang + item.meaning)
            assert parse_line(f"{item.slang}::{item.meaning}") in ((item.slang, item.meaning), None)


@given(st.text())
def test_key_is_its_own_key(text):
    assert key(key(text)) == key(text)


def test_synonyms(tmp_path):
    path = tmp_path / "s.txt"
    path.write_text("# jail\nbote = tabo\n\nqué, mae = tarro = cafe\u0301\ntarro = bote\n", encoding="utf-8")
    assert synonyms(path, {"bote", "tabo", "tarro", "qué, mae", "café"}) == [
        {"bote", "tabo"},
        {"qué, mae", "tarro", "café"},
        {"tarro", "bote"},
    ]


def test_every_line_of_synonyms_that_can_not_be_used_is_named(tmp_path):
    path = tmp_path / "s.txt"
    path.write_text("bote = tabo\nbote\nbote = cana = bote\ntabo = bote\n", encoding="utf-8")
    with pytest.raises(SynonymError) as error:
        synonyms(path, {"bote", "tabo"})
    assert str(error.value).splitlines() == [
        f"{path}:2: one word; write at least two, with ' = ' between them",
        f"{path}:3: 'cana' is no headword of the dictionary; spell it as it stands there",
        f"{path}:3: 'bote' stands twice; take one out",
        f"{path}:4: the group of line 1 again; take one out",
    ]


def test_shipped_synonyms():
    slangs = {entry.slang for entry in entries(ROOT / "data/source_augmented.txt")}
    groups = synonyms(ROOT / "data/synonyms.txt", slangs)
    for pair in ({"bote", "tabo"}, {"balazo", "bañazo"}, {"cuijen", "pisuicas"}):
        assert any(pair <= group for group in groups)


# ------------------------------------------------------------------------------------------- is it fit to learn from?

GOOD = """\
birra::Cerveza de cualquier marca.
birra::Bebida de cebada que se toma fría en los bares.
birra::Lo que se pide al mesero cuando empieza la fiesta.
birra::Nombre de lo que viene en lata o botella y embriaga.
"""


@pytest.mark.parametrize(
    ("line", "new", "message"),
    [
        (1, "birra::Una birra es cerveza.", "1: 'birra' stands inside its own meaning; explain it in other words"),
        (1, "birra::Cerveza.", "1: 1 words; write 3 to 30"),
        (1, "birra::cerveza de cualquier marca.", "1: begins with 'c'; write a capital"),
        (1, "birra::Qué rica cerveza?", "1: ¿ and ? do not pair; write both"),
        (1, "birra::Cerveza ,de marca.", "1: spacing or punctuation at ' ,'; mend it"),
        (1, "birra::Cerveza de de marca.", "1: 'de' stands twice in a row; take one out"),
        (2, "birra::Cerveza, de cualquier marca", "2: the meaning of line 1, of this slang, again; write another"),
        (2, "birra::Cerveza de cualquier otra marca.", "2: nearly the words of line 1; write it in another way"),
        (2, "Birra::Bebida de cebada que se toma fría.", "2: 'Birra' is spelled 'birra' above; spell it alike"),
        (4, "", "1: 'birra' has 3 wording(s); write at least 4"),
        (2, "# sentido: otra", "2: a sense of 'birra' has 2 wording(s); write at least 3"),
        (4, "mae::Amigo o conocido de uno.", "1: 'birra' has 3 wording(s); write at least 4"),
    ],
)
def test_problems(tmp_path, line, new, message):
    lines = GOOD.splitlines()
    lines[line - 1] = new
    path = tmp_path / "d.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    assert f"{path}:{message}" in [str(problem) for problem in problems(path)[1]]


def test_a_meaning_under_two_slangs_and_lines_apart(tmp_path):
    path = tmp_path / "d.txt"
    path.write_text(GOOD + "fría::Cerveza de cualquier marca.\nbirra::Lo que pide el que tiene mucha sed.\n", encoding="utf-8")
    assert [str(problem).removeprefix(f"{path}:") for problem in problems(path)[1]] == [
        "5: the meaning of line 1, of 'birra', again; write another",
        "5: 'fría' has 1 wording(s); write at least 4",
        "6: lines of 'birra' stand apart (line 4); put them together",
    ]


def test_suspicious_spelling(tmp_path):
    path = tmp_path / "d.txt"
    path.write_text(
        "".join(f"s{i}::Partido de fútbol número {i} del año con gente.\n" for i in range(20))
        + "t::Juego de futbol con bola.\n",
        encoding="utf-8",
    )
    assert "'futbol': is it 'fútbol' (20 times in the file)? Check the spelling" in [p.text for p in problems(path, 1)[1]]


def test_shipped_dictionary():
    """What data/README.md promises of it."""
    done = run(sys.executable, "-m", "slang.dictionary", "data/source_augmented.txt")
    assert (done.returncode, done.stderr) == (0, "")
    figures = dict(re.match(r"(.+?)  +(\d+)", line).groups() for line in done.stdout.splitlines())
    assert int(figures["slangs"]) >= 600 and int(figures["lines"]) >= 2600 and int(figures["problems"]) == 0
    good, _ = problems(ROOT / "data/source_augmented.txt")
    slangs = {entry.slang for entry in good}
    assert {"música de plancha", "devolverse los peluches", "pura vida", "pinche", "chingo", "estar chiva"} <= slangs
