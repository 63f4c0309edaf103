"""A GGUF file of a Gemma 3 text model -> a folder that MLX can load, made once and found again.

Reads   a file that llama.cpp's tools wrote, of any tensor type that `gguf` can dequantise, or a blob of Ollama's
Writes  CACHE/models/<hash of its path>/<name>: model.safetensors, config.json, the tokenizer's files, source.json (of which
        file it was made) and origin.json (what that says of its name and licence)

A file of F32, F16 or BF16 keeps its type. A quantised one becomes bfloat16 for a GPU and float32 for a CPU, where MLX
multiplies bfloat16 matrices about 18 times slower. Norms are stored as 1 + weight in a GGUF file, as weight in MLX. The folder
appears when it is whole; a changed file makes it anew.

Run as: python -m slang.models gemma-3-1b-it-Q4_K_M.gguf
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GGML
from gguf import TokenType
from tqdm import tqdm

from slang.errors import UserError
from slang.models import tokenizer
from slang.models.layout import EVERY_SIXTH, Config, attention_scalar, expected_shapes, gguf_names

CACHE = Path(".cache")
SOURCE = "source.json"  # which file the folder was made of
ORIGIN = "origin.json"  # what the file says of its name and licence; a model fused from this one keeps it
FORMAT = 1  # of the folder; another number makes every folder anew
CHUNK = 1 << 22  # values that are dequantised at a time
STOPS = ("<eos>", "<end_of_turn>")
NEEDED_PIECES = ("<pad>", "<bos>", "<unk>", "<start_of_turn>", *STOPS)
LOCAL_ROPE_BASE = 1e4  # llama.cpp's own value for Gemma 3, which older files leave out
ANOTHER = "take a GGUF file of a Gemma 3 text model"


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF file does, whatever it is called."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


# ------------------------------------------------------------------------------------------------- reading


def open_gguf(path: Path) -> tuple[dict[str, object], dict[str, gguf.ReaderTensor]]:
    """Metadata and tensors by their names; the tensors' bytes are mapped, not read.

    Raises UserError for a file that is no GGUF file or is cut off.
    """
    if not is_gguf(path):
        raise UserError(f"{path}: not a GGUF file; MODEL is a model's folder, a .gguf file or a name on Hugging Face")
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the reader has no error of its own: what it trips over depends on the byte
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise UserError(f"{path}: a GGUF file that is broken or cut off ({what}); copy or download it again") from None
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def check_kind(path: Path, metadata: dict[str, object], tensors: dict) -> None:
    """Raises UserError unless the file holds one whole Gemma 3 text model."""
    architecture = metadata.get("general.architecture")
    kind = metadata.get("general.type", "model")
    if architecture == "clip" or kind == "mmproj":
        raise UserError(f"{path}: a vision projector, which goes beside a model; {ANOTHER}")
    if kind != "model":
        raise UserError(f"{path}: not a model but of type {kind!r}; {ANOTHER}")
    if architecture != "gemma3":
        raise UserError(f"{path}: its architecture is {architecture!r}, not 'gemma3'; {ANOTHER}")
    parts = metadata.get("split.count", 1)
    if parts > 1:
        raise UserError(f"{path}: one of {parts} parts; join them with llama-gguf-split --merge")
    if "gemma3.vision.block_count" in metadata or any(name.startswith(("v.", "mm.")) for name in tensors):
        raise UserError(f"{path}: a model that sees pictures too; {ANOTHER}")


def number(path: Path, metadata: dict[str, object], key: str, default: float | None = None) -> int | float:
    """A positive number of the metadata. Raises UserError where it is missing or something else."""
    value = metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise UserError(f"{path}: {key} is {value!r}; copy or download the file again")
    return value


def read_config(path: Path, metadata: dict[str, object], vocab_size: int) -> Config:
    """The model's sizes. Raises UserError for a variant that mlx_lm would compute otherwise."""
    head_dim = number(path, metadata, "gemma3.attention.key_length", 256)
    if number(path, metadata, "gemma3.attention.value_length", head_dim) != head_dim:
        raise UserError(f"{path}: keys and values of different length, which Gemma 3 does not have; {ANOTHER}")
    pattern = metadata.get("gemma3.attention.sliding_window_pattern", EVERY_SIXTH)
    layers = number(path, metadata, "gemma3.block_count")
    local = [bool((n + 1) % EVERY_SIXTH) for n in range(layers)]
    if pattern not in (EVERY_SIXTH, local):
        raise UserError(f"{path}: sliding_window_pattern is {pattern}; in Gemma 3 every sixth layer is global")
    scaling = metadata.get("gemma3.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise UserError(f"{path}: rope scaling of type {scaling!r} is not known here; 'linear' is")
    factor = number(path, metadata, "gemma3.rope.scaling.factor", 1.0)
    hidden = number(path, metadata, "gemma3.embedding_length")
    heads = number(path, metadata, "gemma3.attention.head_count")
    local_base = metadata.get("gemma3.rope.local.freq_base", LOCAL_ROPE_BASE)  # Ollama's key
    return Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=number(path, metadata, "gemma3.feed_forward_length"),
        num_attention_heads=heads,
        head_dim=head_dim,
        rms_norm_eps=as_written(number(path, metadata, "gemma3.attention.layer_norm_rms_epsilon", 1e-6)),
        vocab_size=vocab_size,
        num_key_value_heads=number(path, metadata, "gemma3.attention.head_count_kv"),
        rope_theta=number(path, metadata, "gemma3.rope.freq_base", 1e6),
        rope_local_base_freq=number(path, metadata, "gemma3.rope.freq_base_swa", local_base),
        query_pre_attn_scalar=attention_scalar(hidden, heads, head_dim, layers),
        sliding_window=number(path, metadata, "gemma3.attention.sliding_window"),
        max_position_embeddings=number(path, metadata, "gemma3.context_length"),
        rope_scaling={"rope_type": "linear", "factor": factor} if scaling == "linear" else None,
    )


def as_written(value: float) -> float:
    """The shortest decimal number that is this float32: 9.999999974752427e-07 was written as 1e-06."""
    return float(str(np.float32(value)))


def select_tensors(path: Path, config: Config, tensors: dict[str, gguf.ReaderTensor]) -> dict[str, gguf.ReaderTensor]:
    """The tensors by their MLX names. Raises UserError for one too many, too few or of another shape."""
    shapes = expected_shapes(config)
    names = gguf_names(config)
    if unknown := sorted(set(tensors) - set(names.values())):
        raise UserError(f"{path}: tensor {unknown[0]} is not one of a Gemma 3 text model; {ANOTHER}")
    found = {name: tensors[theirs] for name, theirs in names.items() if theirs in tensors}
    if missing := [name for name in names if name not in found and name != "lm_head.weight"]:
        raise UserError(f"{path}: tensor {names[missing[0]]} is missing; copy or download the file again")
    for name, tensor in found.items():
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if shape != shapes[name]:
            raise UserError(f"{path}: {tensor.name} is {shape}, its metadata ask for {shapes[name]}")
    return found


# ------------------------------------------------------------------------------------------------- writing


def stored_type(tensors: dict[str, gguf.ReaderTensor]) -> GGML:
    """The type of the MLX weights: the file's own where its matrices are all F32, all F16 or all BF16."""
    types = {tensor.tensor_type for tensor in tensors.values() if len(tensor.shape) > 1}
    if types in ({GGML.F32}, {GGML.F16}, {GGML.BF16}):
        return types.pop()
    import mlx.core as mx  # not for a file that is there already: it takes as long as all the rest

    return GGML.F32 if mx.default_device() == mx.cpu else GGML.BF16


def dequantized(path: Path, tensor: gguf.ReaderTensor, start: int, stop: int) -> np.ndarray:
    """Rows start..stop-1 as float32; a norm without the 1 that GGUF adds."""
    try:
        values = gguf.dequantize(tensor.data[start:stop], tensor.tensor_type)
    except NotImplementedError:
        kind = tensor.tensor_type.name
        raise UserError(f"{path}: {tensor.name} is {kind}, which can't be read here; take another type") from None
    return values - 1 if len(tensor.shape) == 1 else values


def write_weights(path: Path, tensors: dict[str, gguf.ReaderTensor], target: Path) -> int:
    """model.safetensors, a piece at a time so that memory stays small; the number of values in it."""
    kind = stored_type(tensors)
    width = gguf.GGML_QUANT_SIZES[kind][1]
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.n_elements * width
        shape = [int(n) for n in reversed(tensor.shape)]
        header[name] = {"dtype": kind.name, "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    hidden_bar = not sys.stderr.isatty()
    with target.open("wb") as file, tqdm(total=end, unit="B", unit_scale=True, disable=hidden_bar, leave=False) as bar:
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors.values():
            rows = max(1, CHUNK // int(tensor.shape[0])) if len(tensor.shape) > 1 else len(tensor.data)
            for start in range(0, len(tensor.data), rows):
                values = dequantized(path, tensor, start, start + rows)
                if not np.isfinite(values).all():
                    raise UserError(f"{path}: {tensor.name} holds NaN or infinity; copy or download the file again")
                data = gguf.quantize(np.ascontiguousarray(values), kind).tobytes()
                file.write(data)
                bar.update(len(data))
        os.fsync(file.fileno())
    return end // width


def write_tokenizer(path: Path, metadata: dict[str, object], config: Config, folder: Path) -> None:
    """The tokenizer's files, from the file's pieces, scores and types. Raises UserError where they are not Gemma's."""
    keys = [f"tokenizer.ggml.{name}" for name in ("model", "tokens", "scores", "token_type")]
    model, pieces, scores, types = (metadata.get(key) for key in keys)
    lists = isinstance(pieces, list) and isinstance(scores, list) and isinstance(types, list)
    if model != "llama" or not lists or not len(pieces) == len(scores) == len(types) == config.vocab_size:
        raise UserError(f"{path}: no SentencePiece vocabulary of {config.vocab_size} pieces with scores and types; {ANOTHER}")
    ids = {piece: n for n, piece in enumerate(pieces) if types[n] != TokenType.UNUSED}
    if missing := [piece for piece in NEEDED_PIECES if piece not in ids]:
        raise UserError(f"{path}: no {missing[0]} among its tokens, so not Gemma's tokenizer; {ANOTHER}")

    normal = [n for n, kind in enumerate(types) if kind == TokenType.NORMAL]
    normal.sort(key=lambda n: (-scores[n], n))
    merged = tokenizer.merges((pieces[n] for n in normal), ids)
    apart = [n for n, kind in enumerate(types) if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)]
    added = [tokenizer.Added(n, pieces[n], types[n] == TokenType.CONTROL) for n in apart if pieces[n] in ids]
    template = metadata.get("tokenizer.chat_template")
    tokenizer.write_files(
        folder,
        tokenizer.tokenizer_json(ids, added, merged),
        tokenizer.tokenizer_config(added, config.max_position_embeddings),
        sentencepiece(pieces, scores, types),
        template if isinstance(template, str) and template.strip() else tokenizer.CHAT_TEMPLATE,
    )


def sentencepiece(pieces: list[str], scores: list[float], types: list[int]) -> bytes:
    """A tokenizer.model, which keeps the scores: tokenizer.json has only their order."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        text = piece.replace(" ", tokenizer.SPACE) if kind == TokenType.USER_DEFINED else piece
        model.pieces.add(piece=text, score=score, type=kind)
    model.pieces[pieces.index("<unk>")].type = proto.ModelProto.SentencePiece.UNKNOWN
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


def write_config(config: Config, tied: bool, pieces: list[str], dtype: str, folder: Path) -> None:
    """config.json and generation_config.json, as mlx_lm reads them."""
    kinds = ["full_attention" if (n + 1) % EVERY_SIXTH == 0 else "sliding_attention" for n in range(config.num_hidden_layers)]
    ids = {
        "bos_token_id": pieces.index("<bos>"),
        "eos_token_id": [pieces.index(piece) for piece in STOPS],
        "pad_token_id": pieces.index("<pad>"),
    }
    about = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **vars(config),
        "layer_types": kinds,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": tied,
        **ids,
        "torch_dtype": dtype,
    }
    tokenizer.write_json(folder / "config.json", about)
    tokenizer.write_json(folder / "generation_config.json", {**ids, "do_sample": False})


def convert(path: Path, folder: Path) -> tuple[int, dict[str, object]]:
    """Write the MLX folder of a GGUF file; the number of parameters, and what the file says of its origin.

    Raises UserError where the file can't be used.
    """
    metadata, tensors = open_gguf(path)
    check_kind(path, metadata, tensors)
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path}: tensor token_embd.weight is missing; copy or download the file again")
    config = read_config(path, metadata, int(tensors["token_embd.weight"].shape[-1]))
    chosen = select_tensors(path, config, tensors)
    print(f"{path}: making an MLX folder of it, once ...", file=sys.stderr)
    write_tokenizer(path, metadata, config, folder)
    dtype = {GGML.F32: "float32", GGML.F16: "float16", GGML.BF16: "bfloat16"}[stored_type(chosen)]
    write_config(config, "lm_head.weight" not in chosen, metadata["tokenizer.ggml.tokens"], dtype, folder)
    parameters = write_weights(path, chosen, folder / "model.safetensors")
    return parameters, {key: value for key, value in metadata.items() if key.startswith("general.")}


# ------------------------------------------------------------------------------------------- the folder, once


def name_of(path: Path, origin: dict[str, object]) -> str:
    """What a model is called after its file; a blob of Ollama's, which has only a hash, after the model in it."""
    if path.suffix == ".gguf":
        return path.stem
    title = str(origin.get("general.name", "model"))
    return re.sub(r"[^\w.]+", "-", title.lower()).strip("-.") or "model"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder and hold its lock; a second run waits, and finds what the first has made."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def folder_of(path: Path, cache: Path = CACHE, model: str = "") -> Path:
    """The MLX folder of a GGUF file, made now if it is not there or the file has changed since.

    `model` is what the person calls it, the file's path where it is left out. Raises UserError where the file can't be used,
    OSError where the folder can't be written.
    """
    stat = path.stat()
    source = {"file": str(path.resolve()), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "format": FORMAT}
    home = cache / "models" / (model or hashlib.sha256(source["file"].encode()).hexdigest()[:8])
    with locked(home):
        for about in home.glob(f"*/{SOURCE}"):
            if json.loads(about.read_text(encoding="utf-8"))["source"] == source:
                return about.parent
        return make(path, {"model": model or str(path), "source": source}, home)


def make(path: Path, about: dict[str, object], home: Path) -> Path:
    """Convert into a folder of its own, then let it take its place. Call it with the lock of `home` held."""
    for left in home.iterdir():  # of an earlier state of the file, or of a run that was killed
        if left.is_dir():
            shutil.rmtree(left)
    part = home / ".part"
    part.mkdir()
    start = time.perf_counter()
    try:
        parameters, origin = convert(path, part)
        tokenizer.write_json(part / SOURCE, about)
        tokenizer.write_json(part / ORIGIN, origin)
        target = home / name_of(path, origin)
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    seconds = time.perf_counter() - start
    print(f"{target}: {parameters:,} parameters, in {seconds:.0f} s", file=sys.stderr)
    return target
