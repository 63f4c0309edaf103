"""slang/dictionary.py: what a line may be, and what is said of one that can't be used."""

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from slang.dictionary import (
    LONGEST_LINE,
    Entry,
    Problem,
    entries,
    fold,
    normalized,
    parse_line,
    synonyms,
    with_full_stop,
)
from slang.errors import UserError
from slang.text import unusable


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
    assert with_full_stop(text) == closed


def test_normalizing_ignores_case_accents_punctuation_but_not_enye():
    assert normalized("  ¡Qué  CHIVA! ") == normalized("que chiva") == "que chiva"
    assert normalized("caña") == normalized("CAN\u0303A") != normalized("cana")
    assert fold("¿Qué es GÜILA?") == "¿que es guila?"
    assert normalized("G̃uara m̃") == "guara m"  # these have no form with the mark
    marks_are_part_of = "чай 안녕 αβγά"
    assert fold(marks_are_part_of) == marks_are_part_of
    assert normalized("...") != normalized("!!")


def test_file_with_bom_crlf_and_a_line_that_is_not_utf8(tmp_path):
    path = tmp_path / "d.txt"
    path.write_bytes(
        b"\xef\xbb\xbfmae::Amigo.\r\nbirra::Cerveza fr\xeda.\r\n\r\n# nota\r\ntuanis::Bueno."
    )
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
def test_normalizing_twice_is_normalizing_once(text):
    assert normalized(normalized(text)) == normalized(text)


def found(tmp_path, content: bytes) -> list[str]:
    """What is said of the lines of a dictionary."""
    path = tmp_path / "d.txt"
    path.write_bytes(content)
    return [
        str(item).removeprefix(f"{path}:") for item in entries(path) if isinstance(item, Problem)
    ]


SEPARATOR = "no '::' separator; write the line as slang::meaning"
UTF16 = "1: UTF-16, not UTF-8; save the file as UTF-8"
LINES = "mae::Amigo o conocido.\nbirra::Cerveza.\n"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            b"mae::Amigo.\nbirra::Fr\xeda.\n",
            "2: not UTF-8 (byte 10 of the line); save the file as UTF-8",
        ),
        (LINES.encode("utf-16"), UTF16),
        (LINES.encode("utf-16-le"), UTF16),
        (LINES.encode("utf-16-be"), UTF16),
        (b"mae::Ami\0go.\n", "1: control character U+0000; take it out"),
        (b"mae::Ami\tgo.\n", "1: control character U+0009; take it out"),
        (b"mae\t::\tAmigo.\n", "1: control character U+0009; take it out"),
        ("mae::Ami\u200bgo.\n".encode(), "1: invisible character U+200B; take it out"),
        ("\u2800::Amigo.\n".encode(), "1: invisible character U+2800; take it out"),
        ("mae::Amigo\U000e0069.\n".encode(), "1: invisible character U+E0069; take it out"),
        (
            "mae::Amigo\ufffd.\n".encode(),
            "1: character U+FFFD, which stands for one that was decoded wrongly; take it out",
        ),
        ("mae::\u0301 amigo.\n".encode(), "1: accent U+0301 without a letter; take it out"),
        (
            b"mae::Amigo.<eos>\n",
            "1: special token '<eos>' in the text; take it out, the chat template writes them",
        ),
        (
            b"<eos>::Amigo.\n",
            "1: special token '<eos>' in the text; take it out, the chat template writes them",
        ),
        (b"::\n", "1: nothing before '::'; write the slang there"),
        (b"::Amigo.\n", "1: nothing before '::'; write the slang there"),
        (b"mae:: \n", "1: nothing after '::'; write the meaning there"),
        (b"mae::,\n", "1: no word in the meaning ','; write one"),
        (b"mae::;;;\n", "1: no word in the meaning ';;;'; write one"),
        (b"mae::.\n", "1: no word in the meaning '.'; write one"),
        ("mae::\u00bf?\n".encode(), "1: no word in the meaning '\u00bf?'; write one"),
        (b"mae:::Amigo.\n", "1: ':::' in place of '::'; write the line as slang::meaning"),
        (b"mae : : Amigo.\n", f"1: {SEPARATOR}"),
        (b"# mae\nmae\n", f"2: {SEPARATOR}"),
        (
            b"mae::" + b"Amigo " * 900_000 + b"\n",
            f"1: over {LONGEST_LINE} bytes; write one wording a line",
        ),
    ],
)
def test_a_line_that_can_not_be_used_is_named(tmp_path, content, problem):
    assert found(tmp_path, content) == [problem]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_line_ends_of_every_system(tmp_path, end):
    path = tmp_path / "d.txt"
    path.write_bytes(f"mae::Amigo.{end}{end}birra::Cerveza.{end}x".encode())
    assert list(entries(path)) == [
        Entry("mae", "Amigo.", 1),
        Entry("birra", "Cerveza.", 3),
        Problem(str(path), 4, SEPARATOR),
    ]


def test_synonyms(tmp_path):
    path = tmp_path / "s.txt"
    path.write_text(
        "# jail\nbote = tabo\n\nqué, mae = tarro = cafe\u0301\ntarro = bote\n", encoding="utf-8"
    )
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
    path.write_bytes(b"ca\xf1a = bote\n")
    with pytest.raises(UserError, match=":1: not UTF-8; save the file as UTF-8"):
        synonyms(path)


def shipped() -> list[str]:
    """The headwords of the shipped dictionary, in its order."""
    return list(dict.fromkeys(entry.slang for entry in entries(ROOT / "data/source_augmented.txt")))


def test_shipped_synonyms():
    groups = synonyms(ROOT / "data/synonyms.txt", set(shipped()))
    for pair in ({"bote", "tabo"}, {"balazo", "bañazo"}, {"cuijen", "pisuicas"}):
        assert any(pair <= group for group in groups)


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
