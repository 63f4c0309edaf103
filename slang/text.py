"""What a text may hold that a model is taught, told or asked: what a reader sees, nothing else.

Every text goes through `unusable`: slang, meaning, region, system prompt, question forms, records,
a question that was typed. No rule here takes longer than the text is long.
"""

import re
import unicodedata

from slang.errors import UserError

# Letters, marks and signs of Western languages, but for < and [, with which a special token begins.
# A text of these alone needs no further look.
ORDINARY = re.compile("[ -;=-Z\\\\-~\u00a1-\u00ac\u00ae-\u00ff\u2010-\u2027\u20ac]*")
# Unicode's categories of what shows nothing, or has no meaning that all agree on.
HIDDEN = {
    "Cc": "control",
    "Cf": "invisible",
    "Cs": "broken",  # half a surrogate pair
    "Co": "private",
    "Cn": "unassigned",
    "Zl": "control",  # line separator
    "Zp": "control",  # paragraph separator
}
# These show nothing although they are letters, signs or marks. U+FFFD marks a wrong decoding.
BLANK = set("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0\ufffc\ufffd")
BLANK |= set("\U00013441\U00013442\U00016fe4\U0001d159")
EMOJI_STYLE = "\ufe0e\ufe0f"  # after a sign or a digit: shown as text or as a picture
VARIANTS = re.compile("[\ufe00-\ufe0d\U000e0100-\U000e01ef]")  # of the letter before them
# What a chat tokenizer may read as the mark of a turn, an image and the like: <end_of_turn>,
# <|im_end|>, </s>, <unused7>, [INST]. People misspell them, so case and blanks don't count.
TAG = re.compile(r"<([^<>]{1,40})>|\[/?(?:INST|multimodal)\]", re.IGNORECASE)
NAMES = re.compile(
    r"(?:start|end)_of_(?:turn|image|audio)|(?:image|audio)_soft_token|im_(?:start|end)"
    r"|endoftext|eot_id|(?:begin|end)_of_text|bos|eos|pad|unk|mask|unused\d+|s|0x[0-9a-f]{2}",
    re.IGNORECASE,
)


def special_token(text: str) -> str | None:
    """The first thing in a text that a chat tokenizer may read as a special token, or None."""
    for found in TAG.finditer(text):
        name = found[1]
        if name is None or "|" in (name[0], name[-1]):
            return found[0]
        if NAMES.fullmatch(name.strip(" \t\r\n\u00a0/|")):
            return found[0]
    return None


def unusable(text: str, breaks: bool = False) -> str | None:
    """Why a text must not reach the chat template, and what to do, or None.

    `breaks` allows line breaks and tabs.
    """
    if ORDINARY.fullmatch(text):
        return None
    if token := special_token(text):
        return f"special token {token!r} in the text; take it out, the chat template writes them"
    before = " "
    for character in text:
        if "\udc80" <= character <= "\udcff":  # how Python reads a byte that it can't decode
            return f"not UTF-8 (byte {ord(character) - 0xDC00:#x}); save it as UTF-8"
        if not (breaks and character in "\n\t") and (what := _wrong(character, before)):
            return f"{what}; take it out"
        before = character
    return None


def checked(text: str, place: str) -> str:
    """The text. Raises UserError where a part of it must not reach the chat template."""
    if why := unusable(text, breaks=True):
        raise UserError(f"{place}: {why}")
    return text


def _wrong(character: str, before: str) -> str | None:
    """What is wrong with a character behind another, or None."""
    category = unicodedata.category(character)
    code = f"U+{ord(character):04X}"
    if category in HIDDEN:
        return f"{HIDDEN[category]} character {code}"
    if character == "\ufffd":
        return f"character {code}, which stands for one that was decoded wrongly"
    if character in BLANK or VARIANTS.match(character):
        return f"invisible character {code}"
    kind = unicodedata.category(before)[0]
    if character in EMOJI_STYLE:
        fits = kind == "S" or before in "#*0123456789"
        return None if fits else f"invisible character {code}"
    if category[0] == "M" and kind not in "LMN":
        return f"accent {code} without a letter"
    return None


def says_something(text: str) -> bool:
    """Whether there is a letter, a digit or a sign in it, and not punctuation alone."""
    for character in text:
        if unicodedata.category(character)[0] in "LNS" and character not in BLANK:
            return True
    return False
