"""The files of a model and an adapter, read into typed structures: JSON, and safetensors' headers.

No weight is read and no MLX imported.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypedDict, TypeVar

import msgspec

from slang.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]  # by the tensors' names
T = TypeVar("T")


class ModelConfig(msgspec.Struct):
    """What is read of any config.json. `model_file` names code of the model's own."""

    model_type: str
    model_file: object = None


class GemmaConfig(ModelConfig):
    """What is read of a gemma3_text model's; what is left out is as in mlx_lm's ModelArgs."""

    hidden_size: int = 1152
    num_hidden_layers: int = 26
    intermediate_size: int = 6912
    num_attention_heads: int = 4
    head_dim: int = 256
    num_key_value_heads: int = 1


class LoraParameters(msgspec.Struct):
    """`keys` are the layers' matrices that get an adapter; None is all of them."""

    rank: Annotated[int, msgspec.Meta(ge=1)]
    scale: float
    dropout: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    keys: list[str] | None = None


class AdapterConfig(msgspec.Struct):
    """What is read of an adapter_config.json, as mlx_lm.lora writes it."""

    num_layers: int
    lora_parameters: LoraParameters | None = None
    fine_tune_type: Literal["lora", "dora", "full"] = "lora"
    model: str | None = None


class Index(msgspec.Struct):
    """model.safetensors.index.json: the file that each tensor is in."""

    weight_map: dict[str, str]


class Source(msgspec.Struct):
    """source.json: what the person called the file that the folder was made of."""

    model: str


class Tensor(TypedDict):
    """What a safetensors file says of one tensor; the offsets are bytes after the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def read_json(path: Path, kind: type[T], remedy: str) -> T:
    """A JSON file as `kind`. Raises UserError where it is missing or something else."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: not there; {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}; {remedy}") from None


def read_object(path: Path, remedy: str) -> dict:
    """A JSON object. Raises UserError where the file is missing or something else."""
    return read_json(path, dict, remedy)


def header(path: Path, remedy: str) -> tuple[dict[str, Tensor], int]:
    """The tensors of a safetensors file by name, and the byte from which their offsets count.

    Format: huggingface.co/docs/safetensors. Raises UserError unless the file is whole.
    """
    try:
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            text = file.read(start - 8) if start <= size else b""
        if len(text) < start - 8:
            raise ValueError("it ends too early")
        entries = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
        found = {name: msgspec.json.decode(raw, type=Tensor) for name, raw in entries.items()}
        if any(start + tensor["data_offsets"][1] > size for tensor in found.values()):
            raise ValueError("it ends too early")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: not there; {remedy}") from None
    except msgspec.DecodeError as error:
        what = f"its header is broken: {error}"
        raise UserError(f"{path}: not a whole safetensors file ({what}); {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); {remedy}") from None
    return found, start


def shapes(path: Path, remedy: str) -> Shapes:
    """The shapes in a safetensors file. Raises UserError unless the file is whole."""
    return {name: tensor["shape"] for name, tensor in header(path, remedy)[0].items()}
