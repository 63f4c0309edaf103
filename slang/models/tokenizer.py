"""Gemma's tokenizer files, from a list of pieces: for the tiny model and for those of GGUF files.

Writes tokenizer.json, tokenizer.model, tokenizer_config.json and chat_template.jinja, as Gemma 3's
folder on Hugging Face has them: BPE with byte fallback, spaces as U+2581, no space in front of a
text.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SPACE = "\u2581"
NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
IMAGE_TOKEN = "<image_soft_token>"  # in a text model's tokenizer too, without an embedding

# bos; the system text and a blank line in front of the first user turn; `model` for the assistant;
# turns that alternate.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set ns = namespace(system='', turns=messages) -%}
{%- if messages and messages[0].role == 'system' -%}
  {%- set text = messages[0].content -%}
  {%- set ns.system = (text if text is string else text[0].text) + '\\n\\n' -%}
  {%- set ns.turns = messages[1:] -%}
{%- endif -%}
{%- for turn in ns.turns -%}
  {%- if turn.role != ('user' if loop.index0 is even else 'assistant') -%}
    {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
  {%- endif -%}
  {{- '<start_of_turn>' + ('user' if turn.role == 'user' else 'model') + '\\n' -}}
  {%- if loop.first %}{{ ns.system }}{% endif -%}
  {%- if turn.content is string -%}
    {{- turn.content | trim -}}
  {%- elif turn.content is iterable -%}
    {%- for part in turn.content -%}
      {{- '<start_of_image>' if part.type == 'image' else part.text | trim -}}
    {%- endfor -%}
  {%- else -%}
    {{- raise_exception('Invalid content type') -}}
  {%- endif -%}
  {{- '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif -%}
"""


@dataclass(frozen=True)
class Added:
    """A token that is found in a text before the text is split.

    A special one is left out when tokens become text.
    """

    id: int
    content: str
    special: bool = False

    def fields(self) -> dict[str, object]:
        """As tokenizer.json and tokenizer_config.json have it, without the id."""
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        return {"content": self.content, **flags, "special": self.special}


def merges(pieces: Iterable[str], ids: dict[str, int]) -> list[list[str]]:
    """Every split of every piece into two pieces of `ids`, in the order of `pieces`.

    Those that merge first come first. A piece may be reachable by several merges; Gemma's own
    tokenizer.json lists them all.
    """
    found = []
    for piece in pieces:
        splits = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
        known = [(a, b) for a, b in splits if a in ids and b in ids]
        found += sorted(known, key=lambda split: (ids[split[0]], ids[split[1]]))
    return [list(split) for split in found]


def tokenizer_json(vocabulary: dict[str, int], added: list[Added], merged: list[list[str]]) -> dict:
    """The content of tokenizer.json (huggingface.co/docs/tokenizers)."""
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    second_bos = {"SpecialToken": {"id": "<bos>", "type_id": 1}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    special = {"<bos>": {"id": "<bos>", "ids": [vocabulary["<bos>"]], "tokens": ["<bos>"]}}
    space = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    decoders = [space, {"type": "ByteFallback"}, {"type": "Fuse"}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token.id, **token.fields()} for token in added],
        "normalizer": NORMALIZER,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, second_bos, second],
            "special_tokens": special,
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merged,
        },
    }


def tokenizer_config(added: list[Added], context: int) -> dict:
    """The content of tokenizer_config.json; `context` is the longest text in tokens."""
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(token.id): token.fields() for token in added},
        "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "mask_token": "<mask>",
        "model_max_length": context,
        "pad_token": "<pad>",
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
        "unk_token": "<unk>",
    }


def sentencepiece_model(pieces: list[str], scores: list[float], types: list[int]) -> bytes:
    """The content of tokenizer.model, which keeps the scores: tokenizer.json has only their order.

    The three lists go together. `types` are numbered alike in GGUF files and in SentencePiece's.
    """
    from sentencepiece import sentencepiece_model_pb2 as proto

    kinds = proto.ModelProto.SentencePiece
    model = proto.ModelProto()
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        text = piece.replace(" ", SPACE) if kind == kinds.USER_DEFINED else piece
        model.pieces.add(piece=text, score=score, type=kind)
    model.pieces[pieces.index("<unk>")].type = kinds.UNKNOWN
    trainer = model.trainer_spec
    trainer.model_type = proto.TrainerSpec.BPE
    trainer.vocab_size = len(pieces)
    trainer.byte_fallback = True
    for name in ("pad", "bos", "eos", "unk"):
        setattr(trainer, f"{name}_id", pieces.index(f"<{name}>"))
        setattr(trainer, f"{name}_piece", f"<{name}>")
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString()


def write_json(path: Path, value: dict, indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")


def write_files(folder: Path, tokenizer: dict, config: dict, model: bytes, template: str) -> None:
    """The four files of a tokenizer; `model` is the content of tokenizer.model."""
    write_json(folder / "tokenizer.json", tokenizer, indent=None)
    write_json(folder / "tokenizer_config.json", config, indent=None)
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
