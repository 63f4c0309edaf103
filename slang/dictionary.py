"""Read a dictionary of `slang::meaning` lines and tell what is wrong with it, line by line.

Reads UTF-8 (with or without BOM, LF or CRLF), one wording a line; several lines of one slang are several wordings or senses.
Blank lines are skipped, a `#` followed by a space starts a comment line.

Standard library only: make_jsonl.py starts before MLX is installed.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

SEPARATOR = "::"
# What a chat tokenizer may read as a special token: <end_of_turn>, <start_of_image>, <|im_end|>, <unused7>, </s>, [INST].
SPECIAL_TOKEN = re.compile(
    r"<\s*/?\s*\|?\s*(?:(?:start|end)_of_(?:turn|image)|(?:image|audio)_soft_token|im_(?:start|end)|endoftext|eot_id|"
    r"(?:begin|end)_of_text|bos|eos|pad|unk|mask|unused\d+|s|0x[0-9a-f]{2})\s*\|?\s*>|\[/?(?:INST|multimodal)\]",
    re.IGNORECASE,
)
# Invisible characters that reorder or split what a reader sees; a soft hyphen and a BOM inside the text count.
INVISIBLE = re.compile("[\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]")
CLOSING = ".!?…"
CLOSING_WRAPPERS = "\"'”’»)]"


@dataclass(frozen=True, slots=True)
class Entry:
    """One wording: `slang` and `meaning` NFC-normalised and trimmed, `line` counted from 1."""

    slang: str
    meaning: str
    line: int


@dataclass(frozen=True, slots=True)
class Problem:
    """A line that can't be used as it stands; `str()` gives `FILE:LINE: what; what to do`."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


@lru_cache(maxsize=1 << 16)
def key(text: str) -> str:
    """Normalised form by which two texts count as equal: case, accents (not ñ), punctuation and spacing are ignored.

    A text of punctuation alone is its own key, so that two such texts stay apart.

    >>> key("  ¡Qué  CHIVA! "), key("caña"), key("¿?")
    ('que chiva', 'caña', '¿?')
    """
    text = unicodedata.normalize("NFC", text).casefold()
    if text.isascii():
        folded = text
    else:
        # ñ is a letter of its own: caña is a coin, cana is jail.
        decomposed = unicodedata.normalize("NFD", text.replace("ñ", "\0"))
        folded = "".join(c for c in decomposed if not unicodedata.combining(c)).replace("\0", "ñ")
    return " ".join(re.findall(r"\w+", folded)) or " ".join(text.split())


def close(meaning: str) -> str:
    """The meaning with a full stop, unless it ends a sentence already: `Bueno` -> `Bueno.`, `¡Ay!` stays."""
    bare = meaning.rstrip(CLOSING_WRAPPERS)
    if bare.endswith(tuple(CLOSING)) or meaning.endswith(tuple(CLOSING)):
        return meaning
    return meaning.rstrip(",;:") + "."


def unusable(text: str) -> str | None:
    """Why a text must not reach the training data, with the remedy, or None."""
    if found := SPECIAL_TOKEN.search(text):
        return f"special token {found[0]!r} in the text; take it out"
    for character in text:
        if unicodedata.category(character) == "Cc":
            return f"control character U+{ord(character):04X}; take it out"
    if found := INVISIBLE.search(text):
        return f"invisible character U+{ord(found[0]):04X}; take it out"
    return None


def parse_line(line: str) -> tuple[str, str] | str | None:
    """(slang, meaning) of one decoded line, None for a blank or comment line, or what is wrong with it and what to do."""
    text = unicodedata.normalize("NFC", line).strip()
    if not text or text == "#" or text.startswith("# "):
        return None
    slang, separator, meaning = text.partition(SEPARATOR)
    slang, meaning = slang.strip(), meaning.strip()
    if not separator:
        return "no '::' separator; write the line as slang::meaning"
    if not slang:
        return "nothing before '::'; write the slang there"
    if not meaning:
        return "nothing after '::'; write the meaning there"
    if reason := unusable(text):
        return reason
    return slang, close(meaning)


def entries(path: str | Path) -> Iterator[Entry | Problem]:
    """Every usable line as an Entry and every other as a Problem, in the file's order, one at a time.

    Raises OSError when the file can't be opened. A blank or comment line yields nothing.
    """
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield Problem(str(path), number, f"not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8")
                continue
            parsed = parse_line(line)
            if isinstance(parsed, str):
                yield Problem(str(path), number, parsed)
            elif parsed:
                yield Entry(*parsed, number)
