"""slang/dictionary.py: what a line may be, and what is said of one that can't be used."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slang.dictionary import Entry, Problem, close, entries, key, parse_line, unusable


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
        ("mae", "no '::' separator; write the line as slang::meaning"),
        ("::Amigo.", "nothing before '::'; write the slang there"),
        ("mae::", "nothing after '::'; write the meaning there"),
        ("mae::Amigo.<end_of_turn>", "special token '<end_of_turn>' in the text; take it out"),
        ("<unused12>::Amigo.", "special token '<unused12>' in the text; take it out"),
        ("mae::Ami\x07go.", "control character U+0007; take it out"),
        ("mae::Ami\tgo.", "control character U+0009; take it out"),
        ("mae::Ami\u200bgo.", "invisible character U+200B; take it out"),
        ("mae::\u202eAmigo.", "invisible character U+202E; take it out"),
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
    assert key("...") != key("!!")


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
