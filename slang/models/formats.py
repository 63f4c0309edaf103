"""The files of a model and an adapter, read into typed structures: JSON, and safetensors' headers.

No weight is read and no MLX imported.
"""

import math
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, TypedDict, TypeVar

import msgspec

from slang import files
from slang.errors import UserError, told

Shapes = Mapping[str, tuple[int, ...]]  # by the tensors' names
WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "F16": 2, "BF16": 2, "U16": 2, "I16": 2}  # bytes a value
WIDTHS |= {"F32": 4, "U32": 4, "I32": 4, "F64": 8, "U64": 8, "I64": 8}
FLOATS = ("F32", "F16", "BF16")  # what weights are
Size = Annotated[int, msgspec.Meta(ge=1)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
T = TypeVar("T")


class ModelConfig(msgspec.Struct):
    """What is read of any config.json. `model_file` names code of the model's own."""

    model_type: str
    model_file: object = None


class GemmaConfig(ModelConfig):
    """The sizes of a gemma3_text model. What is left out is as in mlx_lm's ModelArgs."""

    hidden_size: Size = 1152
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 26
    intermediate_size: Size = 6912
    num_attention_heads: Size = 4
    head_dim: Size = 256
    num_key_value_heads: Size = 1
    sliding_window: Size = 512
    sliding_window_pattern: Size = 6
    vocab_size: Size = 262144
    max_position_embeddings: Size = 32768
    rope_theta: Positive = 1e6
    rope_local_base_freq: Positive = 1e4
    query_pre_attn_scalar: Positive = 256.0
    rms_norm_eps: Positive = 1e-6


class LoraParameters(msgspec.Struct):
    """`keys` are the layers' matrices that get an adapter; None is all of them."""

    rank: Size
    scale: Annotated[float, msgspec.Meta(gt=0, le=3.4e38)]  # what a float32 holds
    dropout: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    keys: list[str] | None = None


class AdapterConfig(msgspec.Struct):
    """adapter_config.json, as mlx_lm.lora writes it. `model` is what it was trained on."""

    num_layers: int
    lora_parameters: LoraParameters | None = None
    fine_tune_type: Literal["lora", "dora", "full"] = "lora"
    model: str | None = None


class Index(msgspec.Struct):
    """model.safetensors.index.json: the file that each tensor is in."""

    weight_map: dict[str, str]


class Source(msgspec.Struct):
    """source.json of a folder that was made of a GGUF file: what the person calls that."""

    model: str
    source: dict[str, str | int]


class Origin(msgspec.Struct):
    """origin.json beside it: the file's own `general.` metadata. We write "slang" as finetune."""

    finetune: object = msgspec.field(default=None, name="general.finetune")


class Tensor(TypedDict):
    """What a safetensors file says of one tensor; the offsets are bytes after the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@contextmanager
def one_line(problem: str, remedy: str) -> Iterator[None]:
    """Whatever another library raises becomes a UserError: `problem (what it said); remedy`."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        if isinstance(error, OSError) and error.errno:
            raise UserError(told(error)) from error
        said = textwrap.shorten(str(error), 200, placeholder="…")
        what = f"{type(error).__name__}: {said}" if said else type(error).__name__
        raise UserError(f"{problem} ({what}); {remedy}") from error


def read_json(path: Path, kind: type[T], remedy: str) -> T:
    """A JSON file as `kind`. Raises UserError where it is missing or something else."""
    files.need(path, remedy)
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}; {remedy}") from None


def check_layout(tensors: Mapping[str, Tensor], n_bytes: int) -> None:
    """Raises ValueError unless the tensors lie end to end within `n_bytes`, as their shapes ask."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = tensor["data_offsets"]
        width = WIDTHS.get(tensor["dtype"])
        if start != end or (width and stop - start != width * math.prod(tensor["shape"])):
            raise ValueError(f"{name} is not where it belongs")
        end = stop
    if end > n_bytes:
        raise ValueError("it ends too early")


def header(path: Path, remedy: str) -> tuple[dict[str, Tensor], int]:
    """The tensors of a safetensors file by name, and the byte from which their offsets count.

    Format: huggingface.co/docs/safetensors. Raises UserError unless the file is whole.
    """
    files.need(path, remedy)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            start = 8 + int.from_bytes(file.read(8), "little")
            if start > size:
                raise ValueError("it ends too early")
            entries = msgspec.json.decode(file.read(start - 8), type=dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
        found = {name: msgspec.json.decode(entry, type=Tensor) for name, entry in entries.items()}
        check_layout(found, size - start)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); {remedy}") from None
    return found, start


def weight_shapes(path: Path, remedy: str) -> Shapes:
    """The shapes in an adapter's file. Raises UserError unless it is whole and holds fractions."""
    tensors, _ = header(path, remedy)
    for name, tensor in tensors.items():
        if tensor["dtype"] not in FLOATS:
            raise UserError(f"{path}: {name} holds {tensor['dtype']}, no weights; {remedy}")
    return {name: tensor["shape"] for name, tensor in tensors.items()}
