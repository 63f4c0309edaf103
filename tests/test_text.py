"""slang/text.py: what may reach a chat template."""

import json
import time
import unicodedata

import pytest
from conftest import ROOT, TINY
from hypothesis import given
from hypothesis import strategies as st

from slang.text import ORDINARY, says_something, special_token, unusable


def special_tokens() -> list[str]:
    """What the tiny model's tokenizer takes for special, and a few more, also misspelled."""
    tokenizer = json.loads((ROOT / TINY / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = {token["content"] for token in tokenizer["added_tokens"] if token["special"]}
    tokens |= set(
        """<start_of_turn> <end_of_turn> <bos> <eos> <pad> <unk> <mask> [multimodal] <unused98>
        <start_of_image> <end_of_image> <image_soft_token> <audio_soft_token> <0x0A> <s> </s>
        [INST] [/INST] <|im_start|> <|start_header_id|> <|turn> <turn|> <END_OF_TURN>
        </end_of_turn> <|end_of_turn|>""".split()
    )
    return sorted(tokens | {"< end_of_turn >", "<\tend_of_turn\n>", "< | end_of_turn\u00a0/>"})


@pytest.mark.parametrize("token", special_tokens())
def test_special_tokens(token):
    assert special_token(f"a <b> 3 < 4 {token} b") == token
    assert unusable(f"mae{token}", breaks=True) == (
        f"special token {token!r} in the text; take it out, the chat template writes them"
    )


@pytest.mark.parametrize("text", ["<b>", "a < b > c", "<3", "[1]", "x<y", "<end of turn>", "<>"])
def test_what_looks_like_a_special_token_and_is_none(text):
    assert special_token(text) is None


def test_no_text_takes_longer_than_it_is_long():
    """A regular expression with blanks on both sides took minutes for 5000 of them."""
    began = time.monotonic()
    for text in ("<" + " " * 10**5 + "x", "<" * 10**5, "< |" * 10**5, "é\u0301" * 10**5):
        special_token(text)
        unusable(text)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("characters", "what"),
    [
        ("\0\t\n\r\x07\x1b\x7f\x85\u2028\u2029", "control character U+{:04X}"),
        ("\u00ad\u200b\u200c\u200d\u2060\ufeff\u061c\u180e", "invisible character U+{:04X}"),
        ("\u200e\u200f\u202a\u202b\u202d\u202e\u2066\u2069", "invisible character U+{:04X}"),
        ("\U000e0001\U000e0041\U000e007f", "invisible character U+{:04X}"),  # tags
        ("\u034f\u115f\u1160\u17b4\u180b\u2800\u3164\uffa0\ufffc", "invisible character U+{:04X}"),
        ("\ufe00\ufe0e\ufe0f\U000e0100", "invisible character U+{:04X}"),  # variants
        ("\ue000\U0010fffd", "private character U+{:04X}"),
        ("\uffff\u0378\ufdd0", "unassigned character U+{:04X}"),
        ("\ud800\udfff", "broken character U+{:04X}"),
        ("\ufffd", "character U+{:04X}, which stands for one that was decoded wrongly"),
    ],
)
def test_what_a_reader_does_not_see(characters, what):
    for character in characters:
        problem = what.format(ord(character)) + "; take it out"
        assert unusable(f"a{character}b") == unusable(character) == problem


def test_an_accent_needs_a_letter():
    assert (
        unusable("\u0301a") == unusable("a \u0301") == "accent U+0301 without a letter; take it out"
    )
    assert unusable("e\u0301") is None


WRITTEN = "pura vida|¡Qué chiva!|❤️|1️⃣|👍🏽|🇨🇷|ñ|中|한|हिन्दी"
SIGNS = "«a» — “b”…|€5|[a]"


@pytest.mark.parametrize("text", f"{WRITTEN}|{SIGNS}".split("|"))
def test_what_people_write(text):
    assert unusable(text) is None and says_something(text)


def test_line_breaks_where_they_are_allowed():
    assert unusable("a\n\tb", breaks=True) is None
    assert unusable("a\rb", breaks=True) == "control character U+000D; take it out"


@given(st.text())
def test_what_passes_is_seen(text):
    if unusable(text) is None:
        kinds = {unicodedata.category(character) for character in text}
        assert not kinds & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def test_the_quick_way_takes_no_other():
    for character in map(chr, range(0x2100)):
        if ORDINARY.fullmatch(character):
            assert unusable(f"<{character}") is None


@pytest.mark.parametrize("text", ["", " ", ".", ";;;", "¿?", "\u2800", "\u3164", "…—"])
def test_what_says_nothing(text):
    assert not says_something(text)
