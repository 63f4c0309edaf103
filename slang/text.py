"""What a text may hold that a model is taught, told or asked: what a reader sees, and nothing else.

Every text goes through `unusable`: slang, meaning, region, system prompt, question forms, records, a question that was typed.
"""

import re
import unicodedata

# Categories of Unicode that show nothing or have no meaning that all agree on: controls, invisible marks, halves of pairs,
# private use, no character at all, line and paragraph separators.
HIDDEN = {
    "Cc": "control",
    "Cf": "invisible",
    "Cs": "broken",
    "Co": "private",
    "Cn": "unassigned",
    "Zl": "control",
    "Zp": "control",
}
# Letters, signs and marks by their category that show nothing all the same, and the mark of a text decoded wrongly.
BLANK = set("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0\ufffc\ufffd")
EMOJI_STYLE = "\ufe0e\ufe0f"  # after a sign, which they show as a picture or as text
# What a chat tokenizer reads as the mark of a turn, an image and the like: <end_of_turn>, <|im_end|>, </s>, <unused7>, [INST].
TAG = re.compile(r"<([^<>]{1,40})>|\[/?(?:INST|multimodal)\]", re.IGNORECASE)
NAMES = re.compile(
    r"(?:start|end)_of_(?:turn|image)|(?:image|audio)_soft_token|im_(?:start|end)|endoftext|eot_id|(?:begin|end)_of_text|"
    r"bos|eos|pad|unk|mask|unused\d+|s|0x[0-9a-f]{2}",
    re.IGNORECASE,
)


def special_token(text: str) -> str | None:
    """The first thing in a text that a chat tokenizer may read as a special token, or None."""
    for found in TAG.finditer(text):
        name = found[1]
        if name is None or NAMES.fullmatch(name.strip(" \t\r\n\u00a0/|")):
            return found[0]
    return None


def unusable(text: str, breaks: bool = False) -> str | None:
    """Why a text must not reach the chat template, with the remedy, or None. `breaks` allows line breaks and tabs."""
    if token := special_token(text):
        return f"special token {token!r} in the text; take it out, the chat template writes them"
    if text.isascii() and text.isprintable():
        return None
    before = " "
    for character in text:
        category = unicodedata.category(character)
        code = f"U+{ord(character):04X}"
        if category in HIDDEN and not (breaks and character in "\n\t"):
            return f"{HIDDEN[category]} character {code}; take it out"
        if character in BLANK:
            return f"character {code}, which shows nothing or a text that was decoded wrongly; take it out"
        if category[0] == "M":
            kind = unicodedata.category(before)[0]
            if character in EMOJI_STYLE:
                if kind != "S" and before not in "#*0123456789":
                    return f"invisible character {code}; take it out"
            elif "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef":
                return f"invisible character {code}; take it out"
            elif kind not in "LMN":
                return f"accent {code} without a letter; take it out"
        before = character
    return None


def says_something(text: str) -> bool:
    """Whether there is a letter, a digit or a sign in it, and not punctuation alone."""
    return any(
        unicodedata.category(character)[0] in "LNS" and character not in BLANK for character in text
    )
