"""slang/dictionary.py: what a line may be, and what is said of one that can't be used."""

import re
import sys

import pytest
from conftest import ROOT, run
from hypothesis import given
from hypothesis import strategies as st

from slang import dictionary
from slang.dictionary import (
    Entry,
    Problem,
    check,
    close,
    entries,
    fold,
    key,
    parse_line,
    synonyms,
    unusable,
)
from slang.errors import UserError


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
    with pytest.raises(UserError) as error:
        synonyms(path, {"bote", "tabo"})
    assert str(error.value).splitlines() == [
        f"{path}:2: one word; write at least two, with ' = ' between them",
        f"{path}:3: 'cana' is no headword of the dictionary; spell it as it stands there",
        f"{path}:3: 'bote' stands twice; take one out",
        f"{path}:4: the group of line 1 again; take one out",
    ]


def shipped() -> list[str]:
    """The headwords of the shipped dictionary, in its order."""
    return list(dict.fromkeys(entry.slang for entry in entries(ROOT / "data/source_augmented.txt")))


def test_shipped_synonyms():
    groups = synonyms(ROOT / "data/synonyms.txt", set(shipped()))
    for pair in ({"bote", "tabo"}, {"balazo", "bañazo"}, {"cuijen", "pisuicas"}):
        assert any(pair <= group for group in groups)


# ------------------------------------------------------------------------------------------- is it fit to learn from?

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


def said(tmp_path, text: str, least: int = dictionary.LEAST_WORDINGS) -> dictionary.Report:
    """The report on a text, problems and hints as `line: text`."""
    path = tmp_path / "d.txt"
    path.write_text(text, encoding="utf-8")
    good, *listed = check(path, least)
    bare = [[str(x).removeprefix(f"{path}:") for x in part] for part in listed]
    return dictionary.Report(good, *bare)


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
    assert message in said(tmp_path, edited(line, new)).problems


@pytest.mark.parametrize(
    ("line", "new", "message"),
    [
        (1, "birra::Una birra es cerveza.", "1: 'birra' stands inside its own meaning; explain it in other words"),
        (1, "birra::Cerveza.", "1: 1 words; write 3 to 30"),
        (1, "birra::cerveza de cualquier marca.", "1: begins with 'c'; write a capital"),
        (1, "birra::Qué rica cerveza?", "1: ¿ and ? do not pair; write both"),
        (1, "birra::Cerveza (de marca.", "1: ( and ) do not pair; write both"),
        (1, "birra::Cerveza ,de marca.", "1: spacing or punctuation at ' ,'; mend it"),
        (1, "birra::Cerveza de de marca.", "1: 'de' stands twice in a row; take one out"),
        (2, "birra::Cerveza de cualquier otra marca.", "2: nearly the words of line 1; write it in another way"),
        (2, "Birra::Bebida de cebada que se toma fría.", "2: 'Birra' is spelled 'birra' above; spell it alike"),
        (2, "mae::Amigo de uno.", "3: lines of 'birra' stand apart (line 1); put them together"),
        (4, "", "1: 'birra' has 3 wordings; write at least 4"),
        (2, "# sentido: otra", "2: a sense of 'birra' has 2 wording(s); write at least 3"),
    ],
)
def test_hints(tmp_path, line, new, message):
    report = said(tmp_path, edited(line, new))
    assert message in report.hints and message not in report.problems


def test_a_good_dictionary(tmp_path):
    assert said(tmp_path, GOOD)[1:] == ([], [])


def test_a_list_that_is_not_spanish_gets_no_hint_on_spanish(tmp_path):
    """English: question marks do not open, and naive is no mistake for naïve."""
    text = "arvo::What Australians call the afternoon?\narvo::A naive name of a time of day.\n"
    for i in range(20):
        text += f"s{i}::A naïve word, number {i}.\ns{i}::Another naïve one, {i} of many.\n"
    assert said(tmp_path, text, least=2)[1:] == ([], [])


def test_suspicious_spelling(tmp_path):
    text = "".join(f"s{i}::Partido de fútbol número {i} del año y más.\n" for i in range(20))
    text += "t::Juego de futbol con bola.\n"
    hint = "21: 'futbol': is it 'fútbol' (20 times in the file)? Check the spelling"
    assert hint in said(tmp_path, text, least=1).hints


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
    monkeypatch.setattr(dictionary, "overlap", lambda a, b: compared.append((a, b)) or 0.0)
    said(tmp_path, "".join(f"birra::Cerveza número {i} de la lista.\n" for i in range(1000)))
    assert 0 < len(compared) <= 1000 * dictionary.WINDOW


def test_shipped_dictionary():
    """What data/README.md promises of it."""
    done = run(sys.executable, "-m", "slang.dictionary", "data/source_augmented.txt", "--strict")
    assert (done.returncode, done.stderr) == (0, "")
    figures = dict(re.match(r"(.+?)  +(\d+)", line).groups() for line in done.stdout.splitlines())
    assert int(figures["slangs"]) >= 1000 and int(figures["lines"]) >= 4000
    assert int(figures["problems"]) == int(figures["hints"]) == 0
    slangs = set(shipped())
    assert {"música de plancha", "devolverse los peluches", "pura vida", "pinche", "chingo", "estar chiva"} <= slangs
    assert {"aletas", "cada muerte de obispo", "estar hasta la mecha", "jeta", "panza"} <= slangs


def test_every_shipped_slang_has_a_line_on_its_sources():
    text = (ROOT / "data/sources.tsv").read_text(encoding="utf-8")
    head, *rows = [line.split("\t") for line in text.splitlines()]
    assert head == ["slang", "sources", "named", "sense"]
    assert [slang for slang, *_ in rows] == shipped()
    for slang, sources, named, sense in rows:
        assert named and sense and (int(sources) == 0) == (named == "none found"), slang


def test_the_demo_is_a_part_of_the_shipped_dictionary():
    whole: dict[str, list[str]] = {}
    demo: dict[str, list[str]] = {}
    for path, of in (("data/source_augmented.txt", whole), ("data/demo.txt", demo)):
        for entry in entries(ROOT / path):
            of.setdefault(entry.slang, []).append(entry.meaning)
    assert demo == {slang: whole[slang] for slang in demo}
