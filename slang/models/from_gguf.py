"""A GGUF file of a Gemma 3 text model -> a folder that MLX can load, made once and found again.

Reads   a file that llama.cpp's tools wrote, of any tensor type that `gguf` can dequantise, or a
        blob of Ollama's
Writes  CACHE/models/<hash of its path>/<name>: model.safetensors, config.json, the tokenizer's
        files, source.json (of which file it was made) and origin.json (its name and licence)

A file of F32, F16 or BF16 keeps its type. A quantised one becomes bfloat16 for a GPU, and float32
for a CPU, where MLX multiplies bfloat16 matrices about 18 times slower. A GGUF file holds a norm as
1 + weight, MLX as weight. The folder appears when it is whole. A changed file makes it anew.

Run as: python -m slang.models gemma-3-1b-it-Q4_K_M.gguf
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import gguf
import msgspec
import numpy as np
from gguf import GGMLQuantizationType as GGML
from gguf import TokenType
from tqdm import tqdm

from slang import files
from slang.errors import UserError
from slang.models import tokenizer
from slang.models.find import CACHE, ORIGIN, SOURCE
from slang.models.formats import Source, one_line
from slang.models.layout import EVERY_SIXTH, attention_scalar, expected_shapes, gguf_names

if TYPE_CHECKING:
    from mlx_lm.models.gemma3_text import ModelArgs

FORMAT = 1  # of the folder; another number makes every folder anew
CHUNK = 1 << 22  # values that are dequantised at a time
DTYPES = {GGML.F32: "float32", GGML.F16: "float16", GGML.BF16: "bfloat16"}
STOPS = ("<eos>", "<end_of_turn>")
NEEDED_PIECES = ("<pad>", "<bos>", "<unk>", "<start_of_turn>", *STOPS)
LOCAL_ROPE_BASE = 1e4  # llama.cpp's own value for Gemma 3, which older files leave out
EMBEDDING = "token_embd.weight"
ANOTHER = "take a GGUF file of a Gemma 3 text model"
AGAIN = "copy or download the file again"

Metadata = dict[str, Any]  # what the file says, of whatever type
Tensors = dict[str, gguf.ReaderTensor]  # by their names


def refuse(path: Path, what: str, remedy: str) -> NoReturn:
    raise UserError(f"{path}: {what}; {remedy}")


# ---------------------------------------------------------------------------------------- reading


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF file does, whatever it is called."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def open_gguf(path: Path) -> tuple[Metadata, Tensors]:
    """Metadata and tensors by their names; the tensors' bytes are mapped, not read.

    Raises UserError for a file that is no GGUF file or is cut off.
    """
    if not is_gguf(path):
        kinds = "a model's folder, a .gguf file or a name on Hugging Face"
        refuse(path, "not a GGUF file", f"MODEL is {kinds}")
    # The reader has no error of its own: what it trips over depends on the byte.
    with one_line(f"{path}: a GGUF file that is broken or cut off", AGAIN):
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        return metadata, {tensor.name: tensor for tensor in reader.tensors}


def check_kind(path: Path, metadata: Metadata, tensors: Tensors) -> None:
    """Raises UserError unless the file holds one whole Gemma 3 text model."""
    architecture = metadata.get("general.architecture")
    kind = metadata.get("general.type", "model")
    if architecture == "clip" or kind == "mmproj":
        refuse(path, "a vision projector, which goes beside a model", ANOTHER)
    if kind != "model":
        refuse(path, f"not a model but of type {kind!r}", ANOTHER)
    if architecture != "gemma3":
        refuse(path, f"its architecture is {architecture!r}, not 'gemma3'", ANOTHER)
    parts = metadata.get("split.count", 1)  # llama-gguf-split --merge writes 0
    if isinstance(parts, int) and parts > 1:
        refuse(path, f"one of {parts} parts", "join them with llama-gguf-split --merge")
    sees = any(name.startswith(("v.", "mm.")) for name in tensors)
    if sees or "gemma3.vision.block_count" in metadata:
        refuse(path, "a model that sees pictures too", ANOTHER)
    if EMBEDDING not in tensors:
        refuse(path, f"tensor {EMBEDDING} is missing", AGAIN)


def number(path: Path, metadata: Metadata, key: str, default: float | None = None) -> float:
    """A positive number of the metadata. Raises UserError where it is something else."""
    value: Any = metadata.get(key, default)
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        refuse(path, f"{key} is {value!r}", AGAIN)
    return value


def whole_number(path: Path, metadata: Metadata, key: str, default: int | None = None) -> int:
    """A whole number from 1 of the metadata. Raises UserError where it is something else."""
    value = number(path, metadata, key, default)
    if not isinstance(value, int):
        refuse(path, f"{key} is {value!r}", AGAIN)
    return value


def read_config(path: Path, metadata: Metadata, tensors: Tensors) -> ModelArgs:
    """The model's sizes. Raises UserError for a variant that mlx_lm would compute otherwise."""
    from mlx_lm.models.gemma3_text import ModelArgs  # takes 2 s, and a folder may be there already

    def size(key: str, default: int | None = None) -> int:
        return whole_number(path, metadata, f"gemma3.{key}", default)

    def real(key: str, default: float | None = None) -> float:
        return number(path, metadata, f"gemma3.{key}", default)

    head_dim = size("attention.key_length", 256)
    if size("attention.value_length", head_dim) != head_dim:
        refuse(path, "keys and values of different length, which Gemma 3 does not have", ANOTHER)
    layers = size("block_count")
    if layers > len(tensors):
        refuse(path, f"gemma3.block_count is {layers}, of {len(tensors)} tensors", AGAIN)
    pattern = metadata.get("gemma3.attention.sliding_window_pattern", EVERY_SIXTH)
    local = [bool((n + 1) % EVERY_SIXTH) for n in range(layers)]
    if pattern not in (EVERY_SIXTH, local):
        what = f"sliding_window_pattern is {pattern}"
        refuse(path, what, "in Gemma 3 every sixth layer is global")
    scaling = metadata.get("gemma3.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        refuse(path, f"rope scaling of type {scaling!r} is not known here", "'linear' is")
    factor = real("rope.scaling.factor", 1.0)
    hidden = size("embedding_length")
    heads = size("attention.head_count")
    local_base = metadata.get("gemma3.rope.local.freq_base", LOCAL_ROPE_BASE)  # Ollama's key
    return ModelArgs(
        model_type="gemma3_text",
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=size("feed_forward_length"),
        num_attention_heads=heads,
        head_dim=head_dim,
        rms_norm_eps=as_written(real("attention.layer_norm_rms_epsilon", 1e-6)),
        vocab_size=int(tensors[EMBEDDING].shape[-1]),
        num_key_value_heads=size("attention.head_count_kv"),
        rope_theta=real("rope.freq_base", 1e6),
        rope_local_base_freq=real("rope.freq_base_swa", local_base),
        query_pre_attn_scalar=attention_scalar(hidden, heads, head_dim, layers),
        sliding_window=size("attention.sliding_window"),
        sliding_window_pattern=EVERY_SIXTH,
        max_position_embeddings=size("context_length"),
        rope_scaling={"rope_type": "linear", "factor": factor} if scaling == "linear" else None,
    )


def as_written(value: float) -> float:
    """The shortest decimal that is this float32: 9.999999974752427e-07 was written as 1e-06."""
    return float(str(np.float32(value)))


def select_tensors(path: Path, config: ModelArgs, tensors: Tensors) -> Tensors:
    """The tensors by their MLX names.

    Raises UserError for one too many, one too few or one of another shape.
    """
    shapes = expected_shapes(config)
    names = gguf_names(config)
    if unknown := sorted(set(tensors) - set(names.values())):
        refuse(path, f"tensor {unknown[0]} is not one of a Gemma 3 text model", ANOTHER)
    found = {name: tensors[theirs] for name, theirs in names.items() if theirs in tensors}
    if missing := [name for name in names if name not in found and name != "lm_head.weight"]:
        refuse(path, f"tensor {names[missing[0]]} is missing", AGAIN)
    for name, tensor in found.items():
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if shape != shapes[name]:
            refuse(path, f"{tensor.name} is {shape}, its metadata ask for {shapes[name]}", AGAIN)
    return found


# ---------------------------------------------------------------------------------------- writing


def stored_type(tensors: Tensors) -> GGML:
    """The type of the MLX weights: the file's own where all its matrices are F32, F16 or BF16."""
    types = {tensor.tensor_type for tensor in tensors.values() if len(tensor.shape) > 1}
    if len(types) == 1 and types <= set(DTYPES):
        return types.pop()
    import mlx.core as mx

    return GGML.F32 if mx.default_device() == mx.cpu else GGML.BF16


def dequantized(path: Path, tensor: gguf.ReaderTensor, start: int, stop: int) -> np.ndarray:
    """Rows start..stop-1 as float32; a norm without the 1 that GGUF adds.

    Raises UserError where they can't be read, or hold NaN or infinity.
    """
    try:
        values = gguf.dequantize(tensor.data[start:stop], tensor.tensor_type)
    except NotImplementedError:
        what = f"{tensor.name} is {tensor.tensor_type.name}, which can't be read here"
        refuse(path, what, "take another type")
    if not np.isfinite(values).all():
        refuse(path, f"{tensor.name} holds NaN or infinity", AGAIN)
    return values - 1 if len(tensor.shape) == 1 else values


def write_weights(path: Path, tensors: Tensors, target: Path) -> int:
    """model.safetensors, a piece at a time so that memory stays small; the number of values."""
    kind = stored_type(tensors)
    width = gguf.GGML_QUANT_SIZES[kind][1]
    entries: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.n_elements * width
        shape = [int(n) for n in reversed(tensor.shape)]
        entries[name] = {"dtype": kind.name, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    bar = tqdm(total=end, unit="B", unit_scale=True, disable=None, leave=False)
    with target.open("wb") as file, bar:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            n_rows = len(tensor.data)
            step = max(1, CHUNK // int(tensor.shape[0])) if len(tensor.shape) > 1 else n_rows
            for start in range(0, n_rows, step):
                values = dequantized(path, tensor, start, start + step)
                data = gguf.quantize(np.ascontiguousarray(values), kind).tobytes()
                file.write(data)
                bar.update(len(data))
        os.fsync(file.fileno())
    return end // width


def write_tokenizer(path: Path, metadata: Metadata, config: ModelArgs, folder: Path) -> None:
    """The tokenizer's files, from the file's pieces, scores and types.

    Raises UserError where they are not Gemma's.
    """
    keys = [f"tokenizer.ggml.{name}" for name in ("model", "tokens", "scores", "token_type")]
    found: list[Any] = [metadata.get(key) for key in keys]
    model, pieces, scores, types = found
    size = config.vocab_size
    lists = all(isinstance(some, list) and len(some) == size for some in (pieces, scores, types))
    if model != "llama" or not lists:
        refuse(path, f"no SentencePiece vocabulary of {size} pieces with scores and types", ANOTHER)
    ids = {piece: n for n, piece in enumerate(pieces) if types[n] != TokenType.UNUSED}
    if missing := [piece for piece in NEEDED_PIECES if piece not in ids]:
        refuse(path, f"no {missing[0]} among its tokens, so not Gemma's tokenizer", ANOTHER)

    normal = [n for n, kind in enumerate(types) if kind == TokenType.NORMAL]
    normal.sort(key=lambda n: (-scores[n], n))
    merged = tokenizer.merges((pieces[n] for n in normal), ids)
    added = []
    for n, (piece, kind) in enumerate(zip(pieces, types, strict=True)):
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED) and piece in ids:
            added.append(tokenizer.Added(n, piece, special=kind == TokenType.CONTROL))
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str) or not template.strip():
        template = tokenizer.CHAT_TEMPLATE
    tokenizer.write_files(
        folder,
        tokenizer.tokenizer_json(ids, added, merged),
        tokenizer.tokenizer_config(added, config.max_position_embeddings),
        tokenizer.sentencepiece_model(pieces, scores, types),
        template,
    )


def write_config(config: ModelArgs, metadata: Metadata, tensors: Tensors, folder: Path) -> None:
    """config.json and generation_config.json, as mlx_lm reads them."""
    kinds = []
    for n in range(config.num_hidden_layers):
        is_global = (n + 1) % EVERY_SIXTH == 0
        kinds.append("full_attention" if is_global else "sliding_attention")
    pieces = metadata["tokenizer.ggml.tokens"]
    ids = {
        "bos_token_id": pieces.index("<bos>"),
        "eos_token_id": [pieces.index(piece) for piece in STOPS],
        "pad_token_id": pieces.index("<pad>"),
    }
    about = {
        "architectures": ["Gemma3ForCausalLM"],
        **vars(config),
        "layer_types": kinds,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        **ids,
        "torch_dtype": DTYPES[stored_type(tensors)],
    }
    tokenizer.write_json(folder / "config.json", about)
    tokenizer.write_json(folder / "generation_config.json", {**ids, "do_sample": False})


def convert(path: Path, metadata: Metadata, tensors: Tensors, folder: Path) -> int:
    """Write the MLX folder of a GGUF file; the number of parameters.

    Raises UserError where the file can't be used.
    """
    check_kind(path, metadata, tensors)
    config = read_config(path, metadata, tensors)
    chosen = select_tensors(path, config, tensors)
    print(f"{path}: making an MLX folder of it, once ...", file=sys.stderr)
    write_tokenizer(path, metadata, config, folder)
    write_config(config, metadata, chosen, folder)
    general = {key: value for key, value in metadata.items() if key.startswith("general.")}
    tokenizer.write_json(folder / ORIGIN, general)
    return write_weights(path, chosen, folder / "model.safetensors")


# ------------------------------------------------------------------------------- the folder, once


def name_of(path: Path, metadata: Metadata) -> str:
    """What a model is called after its file.

    A blob of Ollama's has only a hash for a name, so it is called after the model in it.
    """
    if path.suffix == ".gguf":
        return re.sub(r"[\[*?]", "-", path.stem)  # which mlx_lm takes for a pattern
    title = str(metadata.get("general.name", "model"))
    return re.sub(r"[^\w.]+", "-", title.lower()).strip("-.") or "model"


def folder_of(path: Path, cache: Path = CACHE, model: str = "") -> Path:
    """The MLX folder of a GGUF file, made now if it is not there or the file has changed since.

    `model` is what the person calls it, the file's path where it is left out. Raises UserError
    where the file can't be used, OSError where the folder can't be written.
    """
    stat = path.stat()
    file = str(path.resolve())
    source: dict[str, str | int] = {
        "file": file,
        "bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "format": FORMAT,
    }
    about = Source(model or str(path), source)
    home = cache / "models" / (model or hashlib.sha256(file.encode()).hexdigest()[:8])
    with files.locked(home):
        return made_of(source, home) or make(path, about, home)


def made_of(source: dict[str, str | int], home: Path) -> Path | None:
    """The folder that was made of this state of a file, or None."""
    for about in home.glob(f"[!.]*/{SOURCE}"):  # a killed run leaves .name.part
        try:
            if msgspec.json.decode(about.read_bytes(), type=Source).source == source:
                return about.parent
        except ValueError:
            continue  # broken, and made anew
    return None


def make(path: Path, about: Source, home: Path) -> Path:
    """Convert a GGUF file into a folder. Call it with the lock of `home` held."""
    start = time.perf_counter()
    metadata, tensors = open_gguf(path)
    for left in home.iterdir():  # of an earlier state of the file, or of a run that was killed
        if left.is_dir():
            shutil.rmtree(left)
    target = home / name_of(path, metadata)
    broken = f"{path}: a GGUF file that is broken"
    with files.replacing_folder(target) as folder, one_line(broken, AGAIN):
        parameters = convert(path, metadata, tensors, folder)
        tokenizer.write_json(folder / SOURCE, msgspec.to_builtins(about))
    seconds = time.perf_counter() - start
    print(f"{target}: {parameters:,} parameters, in {seconds:.0f} s", file=sys.stderr)
    return target
