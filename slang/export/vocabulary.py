"""The tokens as llama.cpp wants them: pieces, scores and types.

Reads tokenizer.json, tokenizer_config.json and tokenizer.model.
"""

import re
from pathlib import Path
from typing import Any

import msgspec
from gguf import TokenType

from slang.errors import UserError
from slang.evaluate.tokens import END_OF_TURN
from slang.export.folder import FUSE, TokenizerConfig
from slang.models.formats import read_json
from slang.models.tokenizer import IMAGE_TOKEN, NORMALIZER, SPACE, Added

ADDED_SCORE = -1000.0  # of a token that no merge makes


class Bpe(msgspec.Struct):
    """tokenizer.json's "model". A merge is two pieces, in older files a text of both."""

    vocab: dict[str, int]
    merges: list[str | tuple[str, str]]
    type: str | None = None
    byte_fallback: bool | None = False


class Tokenizer(msgspec.Struct):
    """What counts of tokenizer.json."""

    model: Bpe
    added_tokens: list[Added] = []
    normalizer: Any = None


class Vocabulary(msgspec.Struct):
    """Each list has one item a row of the embedding."""

    pieces: list[str]
    scores: list[float]
    types: list[TokenType]


def read_vocabulary(folder: Path, n_rows: int) -> Vocabulary:
    """The `n_rows` tokens as SentencePiece would have them.

    llama.cpp merges the pair whose piece scores highest. The scores are in tokenizer.model. Where
    there is none, a piece's score is minus the rank of the first merge that makes it, which puts
    them in the same order.
    """
    path = folder / "tokenizer.json"
    tokenizer = read_json(path, Tokenizer, FUSE)
    model = tokenizer.model
    if model.type != "BPE" or not model.byte_fallback or tokenizer.normalizer != NORMALIZER:
        what = "not Gemma's tokenizer (BPE with byte fallback, spaces as U+2581)"
        raise UserError(f"{path}: {what}; take an instruction-tuned Gemma 3")
    # The text models' tokenizer has the image token too, without a row in the embedding.
    added = {token.id: token for token in tokenizer.added_tokens if token.content != IMAGE_TOKEN}
    by_id = {n: piece for piece, n in model.vocab.items() if piece != IMAGE_TOKEN}
    by_id |= {n: token.content for n, token in added.items()}
    last = max(by_id, default=0)
    if last >= n_rows:
        what = f"token {by_id[last]!r} has id {last}, but the embedding has only {n_rows} rows"
        raise UserError(f"{path}: {what}")
    scores = sentencepiece_scores(folder / "tokenizer.model") or merge_ranks(model.merges)
    lowest = min(scores.values(), default=0.0)
    vocabulary = Vocabulary([], [], [])
    for n in range(n_rows):
        piece = by_id.get(n, f"[PAD{n}]")
        type = token_type(by_id.get(n), added.get(n))
        merged = type in (TokenType.NORMAL, TokenType.BYTE)
        vocabulary.scores.append(scores.get(piece, lowest) if merged else ADDED_SCORE)
        if type == TokenType.USER_DEFINED:
            piece = piece.replace(SPACE, " ")
        vocabulary.pieces.append(piece)
        vocabulary.types.append(type)
    return vocabulary


def merge_ranks(merges: list[str | tuple[str, str]]) -> dict[str, float]:
    """Minus the rank of the first merge that makes a piece, by the piece."""
    ranks: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        piece = merge.replace(" ", "") if isinstance(merge, str) else "".join(merge)
        ranks.setdefault(piece, -float(rank))
    return ranks


def sentencepiece_scores(path: Path) -> dict[str, float]:
    """The score of every piece of a tokenizer.model; none where there is no such file."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    if not path.exists():
        return {}
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        remedy = "copy the base model's again, or delete it"
        raise UserError(f"{path}: not a SentencePiece model; {remedy}") from None
    return {piece.piece: piece.score for piece in model.pieces}


def token_type(piece: str | None, added: Added | None) -> TokenType:
    """Added tokens are found in a text before it is split, CONTROL ones if the caller allows it."""
    if piece is None:
        return TokenType.UNUSED
    if added:
        control = added.special or re.fullmatch(r"<pad>|<mask>|<unused\d+>", piece)
        return TokenType.CONTROL if control else TokenType.USER_DEFINED
    if piece.startswith("<0x") and len(piece) == 6:
        return TokenType.BYTE
    return TokenType.NORMAL


def special_ids(folder: Path, pieces: list[str]) -> dict[str, int]:
    """The ids of the tokens with a task, by the names that a GGUF file has for them."""
    path = folder / "tokenizer_config.json"
    config = read_json(path, TokenizerConfig, FUSE)
    tokens = {
        "bos": config.bos_token,
        "eos": config.eos_token,
        "eot": END_OF_TURN,
        "unknown": config.unk_token,
        "padding": config.pad_token,
    }
    ids = {}
    for name, token in tokens.items():
        text = token.get("content") if isinstance(token, dict) else token
        if text not in pieces:
            raise UserError(f"{path}: the {name} token {text!r} is not in tokenizer.json")
        ids[name] = pieces.index(text)
    return ids
