"""A model's weights as a GGUF file holds them: which type each tensor gets, and its bytes.

The types are those that llama-quantize chooses without an importance matrix. llama.cpp's own code
quantises, in the xllamacpp package.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GGML
from gguf import LlamaFileType

from slang.errors import UserError
from slang.models.formats import header
from slang.models.layout import attention_scalar, expected_shapes, gguf_names, misfit

if TYPE_CHECKING:  # its import takes 1.5 s
    from mlx_lm.models.gemma3_text import ModelArgs

# --type: what the file says it is, and the type of most of its tensors.
TYPES = {
    "f32": (LlamaFileType.ALL_F32, GGML.F32),
    "f16": (LlamaFileType.MOSTLY_F16, GGML.F16),
    "bf16": (LlamaFileType.MOSTLY_BF16, GGML.BF16),
    "q8_0": (LlamaFileType.MOSTLY_Q8_0, GGML.Q8_0),
    "q4_0": (LlamaFileType.MOSTLY_Q4_0, GGML.Q4_0),
    "q4_k_m": (LlamaFileType.MOSTLY_Q4_K_M, GGML.Q4_K),
    "q5_k_m": (LlamaFileType.MOSTLY_Q5_K_M, GGML.Q5_K),
    "q6_k": (LlamaFileType.MOSTLY_Q6_K, GGML.Q6_K),
}
# Where a row is no multiple of a K-quant's 256 values, as in the 1B model's 1152.
# (llama.cpp, tensor_type_fallback)
FALLBACK = {GGML.Q4_K: GGML.Q5_0, GGML.Q5_K: GGML.Q5_1, GGML.Q6_K: GGML.Q8_0}
# safetensors dtypes; numpy has no bf16
STORED = {
    "F32": (GGML.F32, np.float32),
    "F16": (GGML.F16, np.float16),
    "BF16": (GGML.BF16, np.uint16),
}
# Values at a time. With eight times as many the kernel spends 5 s on a 2 GB file instead of 0.7.
CHUNK = 1 << 19


@dataclass(frozen=True)
class Tensor:
    """A tensor in a safetensors file; `shape` is (rows, columns), or (values,) of a norm."""

    path: Path
    type: GGML
    dtype: type
    shape: tuple[int, ...]
    offset: int

    def map(self) -> np.ndarray:
        """The values on disk, bf16 as uint16; nothing is read before it is used."""
        return np.asarray(np.memmap(self.path, self.dtype, "r", self.offset, self.shape))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of model*.safetensors by its MLX name."""
    tensors = {}
    for path in sorted(folder.glob("model*.safetensors")):
        entries, start = header(path, "run ./fuse.sh again")
        for name, entry in entries.items():
            if entry["dtype"] not in STORED:
                remedy = "a quantised model is fused with ./fuse.sh --dequantize"
                raise UserError(f"{path}: {name} is {entry['dtype']}; {remedy}")
            begin = start + entry["data_offsets"][0]
            tensors[name] = Tensor(path, *STORED[entry["dtype"]], entry["shape"], begin)
    if not tensors:
        remedy = "run ./fuse.sh, which writes the whole folder"
        raise UserError(f"{folder}: no model*.safetensors; {remedy}")
    return tensors


def select_tensors(folder: Path, args: ModelArgs) -> dict[str, Tensor]:
    """The tensors of the file by their GGUF names, in llama.cpp's order.

    Raises UserError for one too many, too few or of another shape.
    """
    tensors = read_tensors(folder)
    wanted = expected_shapes(args)
    if "lm_head.weight" not in tensors:
        del wanted["lm_head.weight"]
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for name in sorted(shapes.keys() | wanted.keys()):
        have, want = shapes.get(name), wanted.get(name)
        if have != want:
            what = f"does not fit its config.json ({misfit(name, have, want)})"
            raise UserError(f"{folder}: {what}; run ./fuse.sh again")
    for name, tensor in tensors.items():
        if tensor.shape[-1] % 32:
            what = f"{name} has rows of {tensor.shape[-1]} values"
            raise UserError(f"{folder}: {what}; llama.cpp quantises blocks of 32")
    head, embedding = tensors.get("lm_head.weight"), tensors["model.embed_tokens.weight"]
    if head and same_values(head, embedding):
        # llama.cpp uses the embedding where there is no output.weight.
        del tensors["lm_head.weight"]
    return {theirs: tensors[name] for name, theirs in gguf_names(args).items() if name in tensors}


def gguf_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors by their GGUF names, where the embedding is the head too."""
    shapes = expected_shapes(args)
    names = gguf_names(args)
    return {names[name]: shape for name, shape in shapes.items() if name != "lm_head.weight"}


def same_values(a: Tensor, b: Tensor) -> bool:
    """Are two tensors equal, bit for bit?"""
    if a.type != b.type:
        return False
    a_rows, b_rows = a.map(), b.map()
    step = max(1, CHUNK // a.shape[-1])
    return all(
        np.array_equal(a_rows[start : start + step], b_rows[start : start + step])
        for start in range(0, len(a_rows), step)
    )


def tensor_types(shapes: dict[str, tuple[int, ...]], kind: str, n_layers: int) -> dict[str, GGML]:
    """The type of each tensor of a file of one kind, by its GGUF name."""
    tied = "output.weight" not in shapes
    return {name: tensor_type(name, shape, kind, n_layers, tied) for name, shape in shapes.items()}


def tensor_type(name: str, shape: tuple[int, ...], kind: str, n_layers: int, tied: bool) -> GGML:
    """The type of one tensor, as llama-quantize chooses it (llama-quant.cpp)."""
    if len(shape) == 1:
        return GGML.F32
    type = TYPES[kind][1]
    if type in (GGML.F32, GGML.F16, GGML.BF16):
        return type
    whole_blocks = shape[-1] % gguf.GGML_QUANT_SIZES[type][0] == 0
    if name == ("token_embd.weight" if tied else "output.weight"):
        type = GGML.Q8_0 if type == GGML.Q8_0 or not whole_blocks else GGML.Q6_K
    elif kind in ("q4_k_m", "q5_k_m") and re.search(r"attn_v|ffn_down", name):
        n, eighth = int(name.split(".")[1]), n_layers // 8
        if n < eighth or n >= 7 * n_layers // 8 or (n - eighth) % 3 == 2:
            type = GGML.Q6_K
    if shape[-1] % gguf.GGML_QUANT_SIZES[type][0]:
        return FALLBACK[type]
    return type


def n_bytes(shape: tuple[int, ...], type: GGML) -> int:
    """A tensor's size in a GGUF file."""
    block, size = gguf.GGML_QUANT_SIZES[type]
    return int(np.prod(shape)) // block * size


def file_size(shapes: dict[str, tuple[int, ...]], kind: str, n_layers: int) -> int:
    """The size of a file's tensors, which is all of it but the vocabulary."""
    types = tensor_types(shapes, kind, n_layers)
    return sum(n_bytes(shapes[name], type) for name, type in types.items())


@cache
def ggml() -> ctypes.CDLL:
    """llama.cpp's tensor library, in the shared object of the xllamacpp package."""
    import xllamacpp

    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return library


def quantize(values: np.ndarray, type: GGML) -> np.ndarray:
    """float32 (rows, columns) as bytes of a ggml type (ggml.h, ggml_quantize_chunk)."""
    values = np.ascontiguousarray(values, np.float32)
    rows, columns = values.shape
    out = np.empty(n_bytes(values.shape, type), np.uint8)
    written = ggml().ggml_quantize_chunk(
        int(type), values.ctypes.data, out.ctypes.data, 0, rows, columns, None
    )
    if written != out.size:
        what = f"xllamacpp wrote another size for {type.name} than gguf expects"
        raise UserError(f"{what}; update both packages")
    return out


def float32(values: np.ndarray) -> np.ndarray:
    """Stored values as float32; uint16 holds bf16, the upper half of a float32."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def q_scale(args: ModelArgs) -> float:
    """What q_norm is multiplied by.

    mlx_lm scales by query_pre_attn_scalar ** -0.5, llama.cpp by a number of its own.
    """
    theirs = attention_scalar(
        args.hidden_size, args.num_attention_heads, args.head_dim, args.num_hidden_layers
    )
    return (theirs / args.query_pre_attn_scalar) ** 0.5


def encode(name: str, tensor: Tensor, type: GGML, q_scale: float) -> Iterator[np.ndarray]:
    """A tensor's bytes as the file holds them, in pieces. Raises UserError for NaN or infinity."""
    stored = tensor.map()
    if len(tensor.shape) == 1:
        # mlx holds w of Gemma's RMSNorm, llama.cpp multiplies by the tensor itself.
        norm = 1 + float32(stored)
        if name.endswith("attn_q_norm.weight"):
            norm = norm * q_scale
        stored = norm.astype(np.float32)[None]
    step = max(1, CHUNK // tensor.shape[-1])
    for start in range(0, len(stored), step):
        piece = stored[start : start + step]
        if piece.dtype == np.uint16:
            # bf16 as an integer: all bits of the exponent are set in NaN and infinity alone.
            finite = (piece & 0x7F80).max() < 0x7F80
        else:
            finite = np.isfinite(piece).all()
        values = piece if tensor.type == type else float32(piece)
        if not finite or (type == GGML.F16 and np.abs(values).max() > 65504):
            what = f"{name} holds NaN, infinity or more than {type.name} can"
            raise UserError(f"{tensor.path}: {what}; train with a lower rate")
        yield piece if tensor.type == type else quantize(values, type)
