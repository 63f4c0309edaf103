"""What a model's folder says beside its weights: sizes, prompt, chat template.

Each file is decoded and checked here, once.
"""

from pathlib import Path
from typing import Any

import msgspec
from mlx_lm.models.gemma3_text import ModelArgs

from slang import files, prompt
from slang.errors import UserError
from slang.models.formats import read_json

FUSE = "run ./fuse.sh, which writes the whole folder"
AGAIN = "copy the model again"
GELU = "gelu_pytorch_tanh"


class ConfigJson(msgspec.Struct):
    """What config.json says beside the sizes that mlx_lm's ModelArgs has."""

    model_type: str | None = None
    layer_types: list[str] | None = None
    rope_scaling: dict[str, Any] | None = None
    hidden_activation: str | None = GELU
    attention_bias: bool | None = False


class Quantised(msgspec.Struct):
    """What config.json says of a quantised model."""

    quantization: Any = None
    quantization_config: Any = None


class TokenizerConfig(msgspec.Struct):
    """What counts of tokenizer_config.json. A token is its text, or an object with "content"."""

    chat_template: Any = None
    bos_token: Any = None
    eos_token: Any = None
    unk_token: Any = None
    pad_token: Any = None


def load_prompt(folder: Path) -> prompt.Prompt:
    """The prompt that the adapter was trained with."""
    path = folder / "prompt.toml"
    files.need(path, "./fuse.sh copies the one that the adapter was trained with")
    return prompt.load(path)


def read_template(folder: Path) -> str:
    """The model's own chat template (Jinja)."""
    path = folder / "chat_template.jinja"
    if path.exists():
        template = files.text_of(files.read(path), path, AGAIN)
    else:
        template = read_json(folder / "tokenizer_config.json", TokenizerConfig, FUSE).chat_template
    if not isinstance(template, str) or not template.strip():
        remedy = "fuse from an instruction-tuned model, such as gemma-3-1b-it"
        raise UserError(f"{path}: no chat template; {remedy}")
    return template


def need_unquantised(config: Path) -> None:
    """Raises UserError for a quantised model: with an adapter in it, it would be rounded anew, by
    nearly as much as the adapter changes."""
    found = read_json(config, Quantised, FUSE)
    if found.quantization or found.quantization_config:
        raise UserError(f"{config}: the model is quantised; fuse it with ./fuse.sh --dequantize")


def read_config(folder: Path, dequantize: bool = False) -> ModelArgs:
    """config.json as mlx_lm reads it.

    A quantised model's passes where it is going to be dequantised.
    Raises UserError for a model that llama.cpp would compute otherwise.
    """
    path = folder / "config.json"
    settings = read_json(path, ConfigJson, FUSE)
    if settings.model_type != "gemma3_text":
        what = "only text models (gemma3_text) can be exported, such as gemma-3-1b-it"
        raise UserError(f"{path}: model_type is {settings.model_type!r}; {what}")
    if not dequantize:
        need_unquantised(path)
    values = read_json(path, dict[str, Any], FUSE)
    if values.get("rope_scaling") is None:
        values.pop("rope_scaling", None)
    try:
        args = msgspec.convert(values, ModelArgs)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: {error}; {AGAIN}") from None
    for name, value in vars(args).items():
        if isinstance(value, int | float) and not value > 0:
            raise UserError(f"{path}: {name} is {value}, not above 0; {AGAIN}")
    check_computed_alike(path, args, settings)
    return args


def check_computed_alike(path: Path, args: ModelArgs, settings: ConfigJson) -> None:
    """Raises UserError for what llama.cpp's Gemma 3 does not have."""
    layers = settings.layer_types or []
    full = [n for n, kind in enumerate(layers) if kind == "full_attention"]
    if args.sliding_window_pattern != 6 or (layers and full != list(range(5, len(layers), 6))):
        what = "llama.cpp wants every sixth layer global; this model has another pattern"
        raise UserError(f"{path}: {what}")
    scaling = args.rope_scaling or {}
    if scaling.get("rope_type", scaling.get("type", "default")) not in ("default", "linear"):
        raise UserError(f"{path}: rope_scaling {scaling} is not known here; 'linear' is")
    factor = scaling.get("factor", 1.0)
    if not isinstance(factor, int | float) or not factor > 0:
        raise UserError(f"{path}: rope_scaling has factor {factor!r}, not a number above 0")
    if settings.hidden_activation not in (GELU, None) or settings.attention_bias:
        what = f"another activation than {GELU}, or attention_bias, is no Gemma 3"
        raise UserError(f"{path}: {what}")
