"""Fused Gemma 3 -> GGUF for llama.cpp, Ollama and LM Studio, and the check that it answers there as it does in MLX.

Reads   a folder that mlx_lm.fuse wrote (config.json, tokenizer.json, model*.safetensors) and the adapter's prompt.toml in it
Writes  <name>-<TYPE>.gguf for each --type and a Modelfile for the last of them, beside the model

The trained system prompt goes into the file's chat template (for a chat that brings none of its own) and into the Modelfile.

Run as: python -m slang.gguf fused_model --type bf16 q4_k_m
        python -m slang.gguf --check fused_model/fused_model-Q4_K_M.gguf
        python -m slang.gguf --ask fused_model/fused_model-Q4_K_M.gguf 'Qué significa en Costa Rica "pura vida"?'
"""

import argparse
import ctypes
import gc
import json
import re
import shutil
import signal
import struct
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import GGMLQuantizationType as GGML
from gguf import GGUFValueType, LlamaFileType, TokenType
from tqdm import tqdm

from slang import dictionary, model_files, prompt
from slang.errors import UserError, told
from slang.files import replacing
from slang.models.layout import Config, attention_scalar, expected_shapes, gguf_names
from slang.models.tokenizer import IMAGE_TOKEN, SPACE

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
# Where a row is no multiple of a K-quant's 256 values, as in the 1B model's 1152 (llama.cpp, tensor_type_fallback).
FALLBACK = {GGML.Q4_K: GGML.Q5_0, GGML.Q5_K: GGML.Q5_1, GGML.Q6_K: GGML.Q8_0}
STORED = {"F32": (GGML.F32, np.float32), "F16": (GGML.F16, np.float16), "BF16": (GGML.BF16, np.uint16)}  # safetensors dtypes
ALIGNMENT = 32  # bytes, GGUF's default
CHUNK = 1 << 19  # values at a time; with eight times as many the kernel spends 5 s on a 2 GB file instead of 0.7
END_OF_TURN = "<end_of_turn>"
GEMMA_NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}


class ExportError(UserError):
    """The model can't be exported, or not checked; one line that says why and what to do."""


# -------------------------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True)
class Tensor:
    """A tensor in a safetensors file; `shape` is rows by columns, or the length of a norm's vector."""

    path: Path
    type: GGML
    dtype: type
    shape: tuple[int, ...]
    offset: int

    def map(self) -> np.ndarray:
        """The values on disk, bf16 as uint16; nothing is read before it is used."""
        return np.asarray(np.memmap(self.path, self.dtype, "r", self.offset, self.shape))


def read_json(path: Path) -> dict:
    """A JSON object. Raises UserError where the file is missing or something else."""
    return model_files.read_object(path, "run ./fuse.sh, which writes the whole folder")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of model*.safetensors by its MLX name."""
    tensors = {}
    for path in sorted(folder.glob("model*.safetensors")):
        entries, start = model_files.header(path, "run ./fuse.sh again")
        for name, entry in entries.items():
            if entry["dtype"] not in STORED:
                raise ExportError(f"{path}: {name} is {entry['dtype']}; a quantised model is fused with ./fuse.sh --dequantize")
            tensors[name] = Tensor(path, *STORED[entry["dtype"]], entry["shape"], start + entry["data_offsets"][0])
    if not tensors:
        raise ExportError(f"{folder}: no model*.safetensors; run ./fuse.sh, which writes the whole folder")
    return tensors


def float32(values: np.ndarray) -> np.ndarray:
    """Stored values as float32; uint16 holds bf16, the upper half of a float32."""
    return (values.astype(np.uint32) << 16).view(np.float32) if values.dtype == np.uint16 else values.astype(np.float32)


@cache
def ggml() -> ctypes.CDLL:
    """llama.cpp's tensor library, in the shared object of the xllamacpp package."""
    import xllamacpp

    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return library


def quantize(values: np.ndarray, type: GGML) -> np.ndarray:
    """float32 (rows, columns) as bytes of a ggml type (ggml.h, ggml_quantize_chunk without an importance matrix)."""
    values = np.ascontiguousarray(values, np.float32)
    rows, columns = values.shape
    out = np.empty(n_bytes(values.shape, type), np.uint8)
    if ggml().ggml_quantize_chunk(int(type), values.ctypes.data, out.ctypes.data, 0, rows, columns, None) != out.size:
        raise ExportError(f"xllamacpp wrote another size for {type.name} than gguf expects; update both packages")
    return out


def n_bytes(shape: tuple[int, ...], type: GGML) -> int:
    """Size in a GGUF file."""
    block, size = gguf.GGML_QUANT_SIZES[type]
    return int(np.prod(shape)) // block * size


# ------------------------------------------------------------------------------------------------ what goes into the file


def read_config(folder: Path) -> Config:
    """config.json as mlx_lm reads it. Raises ExportError for a model that llama.cpp would compute otherwise."""
    path = folder / "config.json"
    config = read_json(path)
    kind = config.get("model_type")
    if kind == "gemma3":
        raise ExportError(
            f"{path}: a multimodal Gemma 3; only text models (gemma3_text) can be exported, such as gemma-3-1b-it"
        )
    if kind != "gemma3_text":
        raise ExportError(f"{path}: model_type is {kind!r}; only gemma3_text can be exported")
    if config.get("quantization") or config.get("quantization_config"):
        raise ExportError(f"{path}: the model is quantised; fuse it with ./fuse.sh --dequantize")
    args = Config(**{field.name: config[field.name] for field in fields(Config) if field.name in config})
    layers = config.get("layer_types") or []
    full = [n for n, kind in enumerate(layers) if kind == "full_attention"]
    if args.sliding_window_pattern != 6 or (layers and full != list(range(5, len(layers), 6))):
        raise ExportError(f"{path}: llama.cpp wants every sixth layer global; this model has another pattern")
    scaling = args.rope_scaling or {}
    if scaling.get("rope_type", scaling.get("type", "default")) not in ("default", "linear"):
        raise ExportError(f"{path}: rope_scaling {scaling} is not known here; 'linear' is")
    if config.get("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh" or config.get("attention_bias"):
        raise ExportError(f"{path}: another activation than gelu_pytorch_tanh, or attention_bias, is no Gemma 3")
    return args


def same_values(a: Tensor, b: Tensor) -> bool:
    """Are two tensors equal, bit for bit?"""
    a_rows, b_rows, step = a.map(), b.map(), max(1, CHUNK // a.shape[-1])
    return a.type == b.type and all(
        np.array_equal(a_rows[n : n + step], b_rows[n : n + step]) for n in range(0, len(a_rows), step)
    )


def select_tensors(folder: Path, args: Config) -> dict[str, Tensor]:
    """The tensors of the file by their GGUF names, in llama.cpp's order. Raises ExportError for one too many, few or large."""
    tensors, shapes = read_tensors(folder), expected_shapes(args)
    if unknown := sorted(set(tensors) - set(shapes)):
        remedy = "; fuse a quantised model with ./fuse.sh --dequantize" if unknown[0].endswith(("scales", "biases")) else ""
        raise ExportError(f"{folder}: tensor {unknown[0]} is not one of gemma3_text{remedy}")
    if missing := sorted(set(shapes) - set(tensors) - {"lm_head.weight"}):
        raise ExportError(f"{folder}: tensor {missing[0]} is missing; run ./fuse.sh again")
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise ExportError(f"{folder}: {name} is {tensor.shape}, config.json asks for {shapes[name]}")
        if tensor.shape[-1] % 32:
            raise ExportError(f"{folder}: {name} has rows of {tensor.shape[-1]} values; llama.cpp quantises blocks of 32")
    if "lm_head.weight" in tensors and same_values(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]):
        del tensors["lm_head.weight"]  # llama.cpp uses the embedding where there is no output.weight
    return {theirs: tensors[name] for name, theirs in gguf_names(args).items() if name in tensors}


def tensor_type(name: str, shape: tuple[int, ...], kind: str, n_layers: int, tied: bool) -> GGML:
    """The type of one tensor, as llama-quantize chooses it without an importance matrix (llama-quant.cpp)."""
    if len(shape) == 1:
        return GGML.F32
    type = TYPES[kind][1]
    if type in (GGML.F32, GGML.F16, GGML.BF16):
        return type
    if name == ("token_embd.weight" if tied else "output.weight"):
        type = GGML.Q8_0 if type == GGML.Q8_0 or shape[-1] % gguf.GGML_QUANT_SIZES[type][0] else GGML.Q6_K
    elif kind in ("q4_k_m", "q5_k_m") and re.search(r"attn_v|ffn_down", name):
        n, eighth = int(name.split(".")[1]), n_layers // 8
        if n < eighth or n >= 7 * n_layers // 8 or (n - eighth) % 3 == 2:
            type = GGML.Q6_K
    return FALLBACK[type] if shape[-1] % gguf.GGML_QUANT_SIZES[type][0] else type


def encode(name: str, tensor: Tensor, type: GGML, q_scale: float) -> Iterator[np.ndarray]:
    """A tensor's bytes as the file holds them, in pieces. Raises ExportError for NaN or infinity."""
    stored = tensor.map()
    if len(tensor.shape) == 1:
        # mlx holds w of Gemma's RMSNorm, llama.cpp multiplies by the tensor itself.
        norm = 1 + float32(stored)
        stored = (norm * q_scale if name.endswith("attn_q_norm.weight") else norm).astype(np.float32)[None]
    step = max(1, CHUNK // tensor.shape[-1])
    for start in range(0, len(stored), step):
        piece = stored[start : start + step]
        # bf16 as an integer: all bits of the exponent are set in NaN and infinity alone.
        finite = (piece & 0x7F80).max() < 0x7F80 if piece.dtype == np.uint16 else np.isfinite(piece).all()
        values = piece if tensor.type == type else float32(piece)
        if not finite or (type == GGML.F16 and np.abs(values).max() > 65504):
            raise ExportError(
                f"{tensor.path}: {name} holds NaN, infinity or more than {type.name} can; train with a lower rate"
            )
        yield piece if tensor.type == type else quantize(values, type)


def q_scale(args: Config) -> float:
    """What q_norm is multiplied by: mlx_lm scales by query_pre_attn_scalar, llama.cpp by a number of its own."""
    theirs = attention_scalar(args.hidden_size, args.num_attention_heads, args.head_dim, args.num_hidden_layers)
    return (theirs / args.query_pre_attn_scalar) ** 0.5


def read_vocabulary(folder: Path, n_rows: int) -> tuple[list[str], list[float], list[TokenType]]:
    """Pieces, scores and types of the `n_rows` tokens, as SentencePiece would have them, from tokenizer.json.

    llama.cpp merges the pair whose piece scores highest. The scores are in tokenizer.model; where there is none, a piece's is
    minus the rank of the first merge that makes it, which puts them in the same order.
    """
    path = folder / "tokenizer.json"
    tokenizer = read_json(path)
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE" or not model.get("byte_fallback") or tokenizer.get("normalizer") != GEMMA_NORMALIZER:
        raise ExportError(f"{path}: not Gemma's tokenizer (BPE with byte fallback, spaces as U+2581)")
    added = {token["id"]: token for token in tokenizer.get("added_tokens", []) if token["content"] != IMAGE_TOKEN}
    by_id = {n: piece for piece, n in model["vocab"].items() if piece != IMAGE_TOKEN}
    by_id |= {n: token["content"] for n, token in added.items()}
    if (last := max(by_id)) >= n_rows:
        raise ExportError(f"{path}: token {by_id[last]!r} has id {last}, but the embedding has only {n_rows} rows")
    scores = sentencepiece_scores(folder / "tokenizer.model") or merge_ranks(model["merges"])
    types = [token_type(by_id.get(n), added.get(n)) for n in range(n_rows)]
    pieces = [by_id.get(n, f"[PAD{n}]") for n in range(n_rows)]
    lowest = min(scores.values(), default=0.0)
    for n, type in enumerate(types):
        if type == TokenType.USER_DEFINED:
            pieces[n] = pieces[n].replace(SPACE, " ")
    merged = (TokenType.NORMAL, TokenType.BYTE)
    listed = [scores.get(piece, lowest) if type in merged else -1000.0 for piece, type in zip(pieces, types, strict=True)]
    return pieces, listed, types


def merge_ranks(merges: list) -> dict[str, float]:
    """Minus the rank of the first merge that makes a piece, by the piece."""
    made = [merge.replace(" ", "") if isinstance(merge, str) else "".join(merge) for merge in merges]
    return dict(zip(reversed(made), (-np.arange(len(made), dtype=float)[::-1]).tolist(), strict=True))  # the first rank stays


def sentencepiece_scores(path: Path) -> dict[str, float]:
    """The score of every piece of a tokenizer.model; none where there is no such file. Raises ExportError for a broken one."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    if not path.exists():
        return {}
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise ExportError(f"{path}: not a SentencePiece model; copy the base model's again, or delete it") from None
    return {piece.piece: piece.score for piece in model.pieces}


def token_type(piece: str | None, added: dict | None) -> TokenType:
    """Added tokens are found in a text before it is split; a CONTROL one only where the caller allows it."""
    if piece is None:
        return TokenType.UNUSED
    if added:
        control = added.get("special") or re.fullmatch(r"<pad>|<mask>|<unused\d+>", piece)
        return TokenType.CONTROL if control else TokenType.USER_DEFINED
    return TokenType.BYTE if piece.startswith("<0x") and len(piece) == 6 else TokenType.NORMAL


def read_template(folder: Path) -> str:
    """The model's own chat template (Jinja)."""
    path = folder / "chat_template.jinja"
    template = path.read_text("utf-8") if path.exists() else read_json(folder / "tokenizer_config.json").get("chat_template")
    if not isinstance(template, str) or not template.strip():
        raise ExportError(f"{path}: no chat template; fuse from an instruction-tuned model, such as gemma-3-1b-it")
    return template


def with_system(template: str, system: str) -> str:
    """The chat template, with `system` as the system message of a chat that has none."""
    literal = json.dumps(system, ensure_ascii=False)  # JSON's escapes are Jinja's
    message = "[{'role': 'system', 'content': " + literal + "}]"
    return "{%- if messages[0]['role'] != 'system' %}{% set messages = " + message + " + messages %}{% endif %}" + template


def modelfile(file: str, system: str) -> str:
    """For `ollama create`. Ollama fills TEMPLATE anew for each turn, with .System in the first only.

    Between triple quotes it reads everything as it stands: no escape, no variable (ollama/parser, unquote).
    """
    return (
        f"# ollama create slang -f Modelfile\nFROM ./{file}\n"
        'TEMPLATE """<start_of_turn>user\n{{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }}<end_of_turn>\n'
        '<start_of_turn>model\n{{ .Response }}<end_of_turn>\n"""\n'
        f'SYSTEM """{system}"""\nPARAMETER stop "{END_OF_TURN}"\nPARAMETER temperature 0\n'
    )


def origin(folder: Path, tensors: dict[str, Tensor]) -> dict[str, object]:
    """Size, licence and base model: from origin.json where the base came as a GGUF file, else the size alone."""
    total = sum(int(np.prod(tensor.shape)) for tensor in tensors.values())
    values: dict[str, object] = {"general.finetune": "slang", "general.size_label": gguf.size_label(total, 0, 0, 0)}
    path = folder / "origin.json"
    if not path.exists():
        return values
    known = read_json(path)
    kept = ("general.basename", "general.size_label", "general.license", "general.languages", "general.tags")
    values |= {key: value for key, value in known.items() if key.startswith(kept)}
    if base := known.get("general.name"):
        values |= {"general.base_model.count": 1, "general.base_model.0.name": base}
    return values


def metadata(folder: Path, args: Config, name: str, system: str) -> dict[str, object]:
    """Everything but the tensors and the file type, by its key (ggml/docs/gguf.md, llama.cpp's llama-arch.cpp)."""
    pieces, scores, types = read_vocabulary(folder, args.vocab_size)
    scaling = args.rope_scaling or {}
    values = {
        "general.architecture": "gemma3",
        "general.type": "model",
        "general.name": name,
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "gemma3.context_length": args.max_position_embeddings,
        "gemma3.embedding_length": args.hidden_size,
        "gemma3.block_count": args.num_hidden_layers,
        "gemma3.feed_forward_length": args.intermediate_size,
        "gemma3.attention.head_count": args.num_attention_heads,
        "gemma3.attention.head_count_kv": args.num_key_value_heads,
        "gemma3.attention.key_length": args.head_dim,
        "gemma3.attention.value_length": args.head_dim,
        "gemma3.attention.sliding_window": args.sliding_window,
        "gemma3.attention.layer_norm_rms_epsilon": float(args.rms_norm_eps),
        "gemma3.rope.freq_base": float(args.rope_theta),
        "gemma3.rope.freq_base_swa": float(args.rope_local_base_freq),
    }
    if scaling.get("factor"):  # of the global layers alone, in both
        values |= {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": float(scaling["factor"])}
    values |= {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_sep_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": with_system(read_template(folder), system),
    }
    names = read_json(folder / "tokenizer_config.json") | {"eot_token": END_OF_TURN}
    for ours, theirs in {"bos": "bos", "eos": "eos", "eot": "eot", "unk": "unknown", "pad": "padding"}.items():
        token = names.get(f"{ours}_token")
        token = token["content"] if isinstance(token, dict) else token
        if token not in pieces:
            raise ExportError(f"{folder / 'tokenizer_config.json'}: {ours}_token {token!r} is not in tokenizer.json")
        values[f"tokenizer.ggml.{theirs}_token_id"] = pieces.index(token)
    return values


def pack_text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def pack(value: object) -> bytes:
    """A metadata value with its type in front: bool, int (uint32), float (float32), str, list of str, 1-D array."""
    if isinstance(value, bool):
        return struct.pack("<IB", GGUFValueType.BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", GGUFValueType.UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", GGUFValueType.FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", GGUFValueType.STRING) + pack_text(value)
    if isinstance(value, list):
        items = b"".join(map(pack_text, value))
        return struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.STRING, len(value)) + items
    kind = GGUFValueType.FLOAT32 if value.dtype == np.float32 else GGUFValueType.INT32
    return struct.pack("<IIQ", GGUFValueType.ARRAY, kind, len(value)) + value.tobytes()


def pad(n: int) -> int:
    """How many bytes are missing to the next multiple of ALIGNMENT."""
    return -n % ALIGNMENT


def pack_header(values: dict[str, object], tensors: dict[str, Tensor], types: dict[str, GGML]) -> tuple[bytes, int]:
    """What stands before the tensors in the file, and the size of the whole file, both in bytes (ggml/docs/gguf.md)."""
    parts = [struct.pack("<4sIQQ", b"GGUF", gguf.GGUF_VERSION, len(tensors), len(values))]
    parts += [pack_text(key) + pack(value) for key, value in values.items()]
    offset = 0
    for name, tensor in tensors.items():
        shape, size = tensor.shape[::-1], n_bytes(tensor.shape, types[name])
        parts.append(pack_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, types[name], offset))
        offset += size + pad(size)
    header = b"".join(parts)
    header += bytes(pad(len(header)))
    return header, len(header) + offset


def load_prompt(folder: Path) -> prompt.Prompt:
    """The prompt that the adapter was trained with."""
    try:
        return prompt.load(folder / "prompt.toml")
    except FileNotFoundError:
        raise ExportError(
            f"{folder / 'prompt.toml'}: not there; ./fuse.sh copies the one that the adapter was trained with"
        ) from None


def export(folder: Path, kinds: list[str], name: str) -> list[Path]:
    """Write <name>-<TYPE>.gguf for each kind and the Modelfile; all appear together, or none. The files' paths.

    Raises ExportError before a byte is written, or with nothing left behind where the weights hold NaN.
    """
    system = load_prompt(folder).system
    if '"""' in system:
        raise ExportError(f'{folder / "prompt.toml"}: system holds """, which a Modelfile cannot quote; write it without')
    args = read_config(folder)
    tensors = select_tensors(folder, args)
    values = metadata(folder, args, name, system) | origin(folder, tensors)
    tied = "output.weight" not in tensors
    plans = []
    for kind in kinds:
        types = {n: tensor_type(n, t.shape, kind, args.num_hidden_layers, tied) for n, t in tensors.items()}
        plans.append((types, *pack_header(values | {"general.file_type": int(TYPES[kind][0])}, tensors, types)))
    needed = sum(size for *_, size in plans)
    if needed > (free := shutil.disk_usage(folder).free):
        raise ExportError(
            f"{folder}: {needed / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free; make room or ask for fewer types"
        )
    paths = [folder / f"{name}-{kind.upper()}.gguf" for kind in kinds]

    with replacing(*paths, folder / "Modelfile") as files:
        for path, file, (types, header, size) in zip(paths, files, plans, strict=False):
            start = time.perf_counter()
            file.write(header)
            with tqdm(
                total=size, desc=path.name, unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty()
            ) as bar:
                for n, type in types.items():
                    for piece in encode(n, tensors[n], type, q_scale(args)):
                        file.write(piece.data)
                        bar.update(piece.nbytes)
                    file.write(bytes(pad(file.tell())))
            used = ", ".join(f"{n} {t.name}" for t, n in Counter(types.values()).most_common())
            print(f"{path}: {file.tell() / 1e6:.1f} MB in {time.perf_counter() - start:.1f} s ({used})")
        files[-1].write(modelfile(paths[-1].name, system).encode())
    return paths


# ---------------------------------------------------------------------------------------------- does it answer as in MLX?

# What --check asks: enough to find every mistake that was tried (benchmarks/export.md). Tokens cost next to nothing.
QUESTIONS, ANSWERS = 200, 12
MAX_TOKENS = 64  # of an answer
N_PROBS = 256  # likeliest next tokens compared; the others count as one in the KL
SLOTS = 4  # requests that llama.cpp works on at a time
SMALL = 1 << 26  # bytes of a file whose model spends its time waiting for the other threads
# Between float32 and float32, where the smallest mistake tried, a wrong rope base in a short chat, makes 0.8. What is left is
# llama.cpp's GELU, a table of f16 values: in a float64 reference that table alone moved the logits of two adapters by 0.003 and
# 0.005; llama.cpp was as far off, MLX 0.00002. Its defaults round more, cache and flash attention, to 0.007 and 0.014.
LOGIT_LIMIT = 0.02
# Mean over the contexts, in nats. An adapted Gemma 3 270M lost 0.095 as Q4_K_M, the tiny model and a 1B model a fifth of that.
KL_LIMIT = {"f32": 1e-4, "f16": 1e-3, "bf16": 1e-3, "q8_0": 0.01, "q6_k": 0.03, "q5_k_m": 0.1, "q4_k_m": 0.25, "q4_0": 0.4}
# Of the mean log-probability of a meaning's token.
SCORE_LIMIT = {"f32": 0.01, "f16": 0.05, "bf16": 0.05, "q8_0": 0.1, "q6_k": 0.1, "q5_k_m": 0.2, "q4_k_m": 0.4, "q4_0": 0.6}


def progress(items: Iterable, what: str, total: int) -> Iterable:
    return tqdm(items, what, total, leave=False, disable=not sys.stderr.isatty())


def need_file(path: Path) -> None:
    if not path.is_file():
        raise ExportError(f"{path}: not there; run ./fuse.sh, which writes it")


def read_fields(path: Path) -> tuple[str, dict[str, gguf.ReaderField]]:
    """A file's type, one of TYPES, and its metadata. Raises ExportError for another file."""
    try:
        fields = gguf.GGUFReader(path).fields
        file_type = fields["general.file_type"].contents()
        return next(kind for kind, (number, _) in TYPES.items() if number == file_type), fields
    except (ValueError, LookupError, StopIteration):
        raise ExportError(f"{path}: not a whole GGUF file of type {', '.join(TYPES)}; export it again with ./fuse.sh") from None


class LlamaCpp:
    """llama.cpp's own server with one file, on loopback, through the xllamacpp package."""

    def __init__(self, path: Path, n_ctx: int = 4096, slots: int = 1, gpu: bool = True, exact: bool = False):
        import xllamacpp

        need_file(path)
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(path), n_ctx * slots, slots
        params.verbosity, params.warmup, params.n_gpu_layers = -1, False, -1 if gpu else 0
        if exact:  # nothing rounded to f16 on the way, whatever it costs
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if path.stat().st_size < SMALL:
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        try:
            self.server = xllamacpp.Server(params)
            urllib.request.urlopen(self.server.listening_address + "/health").close()  # torn down before it serves, it hangs
        except RuntimeError as error:
            raise ExportError(f"{path}: llama.cpp can't load it ({error}); export it again with ./fuse.sh") from None

    def post(self, route: str, **body) -> dict:
        """One request and its answer."""
        request = urllib.request.Request(
            self.server.listening_address + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise ExportError(f"llama.cpp, {route}: {error.read().decode(errors='replace')}") from None

    def posts(self, route: str, bodies: list[dict]) -> list[dict]:
        """Many requests, SLOTS at a time; the answers in the same order."""
        with ThreadPoolExecutor(SLOTS) as pool:
            replies = pool.map(lambda body: self.post(route, **body), bodies)
            return list(progress(replies, f"llama.cpp {route}", len(bodies)))

    def ask(self, question: str) -> str:
        """The greedy answer to a user's message, in a chat without a system message."""
        return self.post("/v1/chat/completions", **greedy(question))["choices"][0]["message"]["content"].strip()


def greedy(question: str) -> dict:
    return {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": MAX_TOKENS}


class Embedding(nn.Module):
    """Token embeddings as llama.cpp scales them: by sqrt(hidden size), which mlx_lm rounds to bf16 (1B: 33.94 to 34, tiny: 16).

    Without it a 1B model differs by this alone, and a mistake of the exporter as large would go unseen.
    """

    def __init__(self, embedding: nn.Embedding, factor: float):
        super().__init__()
        self.embedding, self.factor, self.as_linear = embedding, factor, embedding.as_linear

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.embedding(tokens) * self.factor


def scale_as_llama_cpp(net: nn.Module) -> None:
    """Let a model multiply its embeddings by what llama.cpp multiplies them by."""
    factor = net.args.hidden_size**0.5
    net.model.embed_tokens = Embedding(net.model.embed_tokens, factor / mx.array(factor, mx.bfloat16).item())


def logits_from(net: nn.Module, rows: mx.array, start: int) -> mx.array:
    """Logits at the positions from `start` on, (rows, positions, vocabulary); at all of them they would take gigabytes."""
    hidden = net.model(rows)[:, start:]
    return net.model.embed_tokens.as_linear(hidden) if net.tie_word_embeddings else net.lm_head(hidden)


def next_logits(net: nn.Module, tokens: list[int]) -> np.ndarray:
    """Log-probabilities of the next token, (vocabulary,); logits but for a constant that no one sees."""
    logits = logits_from(net, mx.array([tokens]), len(tokens) - 1)[0, 0]
    return np.array(logits - mx.logsumexp(logits))


class Reference:
    """What MLX says in float32: worked out once, then compared with any number of files."""

    def __init__(
        self,
        folder: Path,
        entries: list[dictionary.Entry],
        n_questions: int,
        n_answers: int,
        seed: int = 42,
    ):
        import mlx_lm  # 1.5 s, which --ask and an export do without

        self.asked = load_prompt(folder)
        self.net, self.tokenizer = mlx_lm.load(str(folder))
        self.net.set_dtype(mx.float32)
        scale_as_llama_cpp(self.net)
        rng = np.random.default_rng(seed)
        meanings: dict[str, list[str]] = {}
        for entry in entries:
            meanings.setdefault(entry.slang, []).append(entry.meaning)
        slangs = sorted(meanings)

        forms = [*self.asked.questions, *self.asked.held_out_questions]
        pairs = rng.permutation(len(slangs) * len(forms))[:n_questions]
        names = [slangs[n // len(forms)] for n in pairs]
        self.questions = [forms[n % len(forms)].replace("{slang}", name) for n, name in zip(pairs, names, strict=True)]
        self.chats = [self.tokens(self.asked.chat(question)) for question in self.questions]
        self.texts = self.contexts([m for slang in slangs for m in meanings[slang]])
        self.answered = self.questions[:n_answers]
        prompts = self.chats[:n_answers]
        self.continued = prompts + self.texts
        self.logits = [next_logits(self.net, tokens) for tokens in progress(self.continued, "MLX logits", len(self.continued))]
        reply = mlx_lm.batch_generate(self.net, self.tokenizer, prompts, max_tokens=MAX_TOKENS, return_token_ids=True)
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in reply.token_ids]
        self.answers = list(zip(texts, [len(t) < MAX_TOKENS for t in reply.token_ids], strict=True))

        # A meaning of the slang behind each question, and its mean log-probability per token.
        said = [str(rng.choice(meanings[name])) for name in names[:n_answers]]
        pairs = [(chat, self.answer_tokens(q, text)) for chat, q, text in zip(prompts, self.answered, said, strict=True)]
        # llama.cpp's server gives no probability for a part of a character, which a byte token is.
        self.meanings = [(chat, answer) for chat, answer in pairs if not self.has_bytes(answer)]
        if not self.meanings:
            raise ExportError("each meaning has a character that the tokenizer cuts into bytes; name another --dictionary")
        self.scores = np.array([self.score(*pair) for pair in self.meanings])

    @property
    def window(self) -> int:
        return self.net.args.sliding_window

    @property
    def special(self) -> dict[str, int]:
        """The ids of the tokens with a task, by their GGUF names."""
        t, end = self.tokenizer, self.tokenizer.convert_tokens_to_ids(END_OF_TURN)
        return {"bos": t.bos_token_id, "eos": t.eos_token_id, "eot": end, "unknown": t.unk_token_id, "padding": t.pad_token_id}

    def render(self, messages: prompt.Messages) -> str:
        """The chat as text, up to where the model's turn begins; without <bos>, which both add as a token."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text.removeprefix(self.tokenizer.bos_token)

    def tokens(self, messages: prompt.Messages) -> list[int]:
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    def answer_tokens(self, question: str, meaning: str) -> list[int]:
        """The tokens of an answer and of the end of its turn."""
        chat = self.asked.chat(question)
        answer = {"role": "assistant", "content": self.asked.answer.replace("{meaning}", meaning)}
        rest = self.tokenizer.apply_chat_template([*chat, answer], return_dict=False)[len(self.tokens(chat)) :]
        return rest[: rest.index(self.tokenizer.convert_tokens_to_ids(END_OF_TURN)) + 1]

    def has_bytes(self, tokens: list[int]) -> bool:
        return any(piece.startswith("<0x") for piece in self.tokenizer.convert_ids_to_tokens(tokens))

    def contexts(self, texts: list[str]) -> list[list[int]]:
        """Running text of lengths around the sliding window and far beyond it."""
        # Text by text: a single one of more tokens than the model's context makes transformers warn.
        tokens = [token for text in texts[:1000] for token in self.tokenizer.encode(f" {text}", add_special_tokens=False)]
        tokens *= 1 + 8 * self.window // len(tokens)
        lengths = [self.window + n for n in (-1, 0, 1, self.window // 2, self.window)]
        return [[self.tokenizer.bos_token_id, *tokens[9 * n : 9 * n + length - 1]] for n, length in enumerate(lengths)]

    def score(self, chat: list[int], answer: list[int]) -> float:
        """Mean log-probability per token of an answer."""
        logits = logits_from(self.net, mx.array([chat + answer[:-1]]), len(chat) - 1)
        return -nn.losses.cross_entropy(logits[0], mx.array(answer)).mean().item()


@dataclass
class Row:
    """A line of the parity table."""

    figure: str
    mlx: str
    llama_cpp: str
    ok: bool
    limit: str = ""


def all_equal(figure: str, equal: int, of: int) -> Row:
    return Row(figure, str(of), str(equal), equal == of, "all")


def next_tokens(llama_cpp: LlamaCpp, contexts: list[list[int]], n_probs: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """llama.cpp's likeliest next tokens behind each context, and their log-probabilities."""
    body = {"n_predict": 1, "temperature": 0, "n_probs": n_probs}
    found = []
    for reply in llama_cpp.posts("/completion", [{"prompt": tokens, **body} for tokens in contexts]):
        top = reply["completion_probabilities"][0]["top_logprobs"]
        found.append((np.array([token["id"] for token in top]), np.array([token["logprob"] for token in top])))
    return found


def compare_next(theirs: list[tuple[np.ndarray, np.ndarray]], ours: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(largest difference of a log-probability, KL of our next token from theirs in nats) for each context.

    `ours` has the log-probability of every token of the vocabulary, `theirs` of the likeliest; the rest counts as one token.
    """
    differences, kls = [], []
    for (ids, logprobs), every in zip(theirs, ours, strict=True):
        mine = every[ids].astype(np.float64)
        seen = (logprobs > -60) & np.isfinite(mine)  # below it a float32 probability ends
        mine, logprobs = mine[seen], logprobs[seen]
        p, q = np.exp(mine), np.exp(logprobs)
        rest_p, rest_q = max(1 - p.sum(), 1e-12), max(1 - q.sum(), 1e-12)
        differences.append(np.abs(mine - logprobs).max())
        kls.append(float((p * (mine - logprobs)).sum() + rest_p * np.log(rest_p / rest_q)))
    return np.array(differences), np.array(kls)


def scores(llama_cpp: LlamaCpp, meanings: list[tuple[list[int], list[int]]]) -> np.ndarray:
    """Mean log-probability per token of each answer in llama.cpp, (answers,).

    The server tells the probability of the token that it chooses: a bias makes it choose the answer's, and is left out of what
    it tells. A grammar would do too, but takes 0.3 s a token to look through 262,144 of them.
    """
    bodies = [
        {
            "prompt": chat + answer[:n],
            "logit_bias": [[token, 1000.0]],
            "n_predict": 1,
            "n_probs": 1,
            "temperature": 0,
        }
        for chat, answer in meanings
        for n, token in enumerate(answer)
    ]
    replies = llama_cpp.posts("/completion", bodies)
    told = iter([reply["completion_probabilities"][0]["logprob"] for reply in replies])
    return np.array([np.mean([next(told) for _ in answer]) for _, answer in meanings])


def equal_system_prompts(llama_cpp: LlamaCpp, reference: Reference, path: Path) -> tuple[int, int]:
    """(equal, all): chats rendered by llama.cpp as MLX was trained on them, and the Modelfile's SYSTEM."""
    asked, question = reference.asked, reference.questions[0]
    user = {"role": "user", "content": question}
    turns = [{"role": "assistant", "content": "Sí."}, {"role": "user", "content": "¿Y cómo se usa?"}]
    other = {"role": "system", "content": 'Sé "breve".'}
    pairs = [([{"role": "user", "content": q}], asked.chat(q)) for q in reference.questions]
    pairs += [([user, *turns], [*asked.chat(question), *turns]), (asked.chat(question), asked.chat(question))]
    pairs += [([other, user], [other, user])]
    rendered = llama_cpp.posts("/apply-template", [{"messages": sent} for sent, _ in pairs])
    equal = [reply["prompt"] == reference.render(meant) for reply, (_, meant) in zip(rendered, pairs, strict=True)]
    if (beside := path.with_name("Modelfile")).exists():
        equal.append(f'SYSTEM """{asked.system}"""\n' in beside.read_text(encoding="utf-8"))
    return sum(equal), len(equal)


def check(path: Path, reference: Reference) -> list[Row]:
    """Compare a GGUF file in llama.cpp with the model that it was made from in MLX."""
    longest = max(
        len(tokens) for tokens in [*reference.chats, *reference.texts, *(chat + answer for chat, answer in reference.meanings)]
    )
    kind, stated = read_fields(path)
    exact = kind == "f32"  # with f16 and bf16 weights llama.cpp rounds the activations too
    llama_cpp = LlamaCpp(path, n_ctx=longest + MAX_TOKENS + 32, slots=SLOTS, gpu=False, exact=exact)

    equal, types = 0, stated["tokenizer.ggml.token_type"]
    for name, token in reference.special.items():
        field = stated.get(f"tokenizer.ggml.{name}_token_id")
        equal += field is not None and field.contents() == token and types.contents(token) == TokenType.CONTROL
    rows = [all_equal("tokens that begin, stop and fill", equal, len(reference.special))]
    texts = [reference.render(reference.asked.chat(question)) for question in reference.questions]
    replies = llama_cpp.posts("/tokenize", [{"content": text, "add_special": True, "parse_special": True} for text in texts])
    equal = sum(reply["tokens"] == tokens for reply, tokens in zip(replies, reference.chats, strict=True))
    rows.append(all_equal("chats cut into the same tokens", equal, len(texts)))
    rows.append(all_equal("chats with the trained system prompt", *equal_system_prompts(llama_cpp, reference, path)))

    likeliest = next_tokens(llama_cpp, reference.continued, min(N_PROBS, len(reference.logits[0])))
    differences, kls = compare_next(likeliest, reference.logits)
    beyond = np.array([len(tokens) > reference.window for tokens in reference.continued])
    for where, chosen in (("up to", ~beyond), ("beyond", beyond)):
        figure = f"next-token logits, {where} {reference.window} tokens ({chosen.sum()})"
        most = differences[chosen].max(initial=0)
        ok = not exact or most <= LOGIT_LIMIT
        rows.append(Row(figure, "", f"{most:.4f} off", ok, f"{LOGIT_LIMIT}" if exact else ""))
    kl_limit = KL_LIMIT[kind]
    n_chats = len(reference.answered)
    # Apart: a window that is off by one shows in the long texts, and is lost in a mean over all.
    for what, some in (("chats", kls[:n_chats]), ("long texts", kls[n_chats:])):
        figure = f"next-token KL, mean of {len(some)} {what}"
        rows.append(Row(figure, "", f"{some.mean():.5f}", some.mean() <= kl_limit, f"{kl_limit}"))

    replies = llama_cpp.posts("/v1/chat/completions", [greedy(question) for question in reference.answered])
    theirs = [(r["choices"][0]["message"]["content"], r["choices"][0]["finish_reason"] == "stop") for r in replies]
    share = np.mean([a[0].strip() == b[0].strip() for a, b in zip(reference.answers, theirs, strict=True)])
    figure, ok = f"equal greedy answers ({len(theirs)})", not exact or share >= 0.95
    rows.append(Row(figure, "", f"{share:.3f}", ok, "0.95" if exact else ""))
    ours, stops = sum(stop for _, stop in reference.answers), sum(stop for _, stop in theirs)
    rows.append(Row("answers that stop by themselves", str(ours), str(stops), stops >= 0.9 * ours, "0.9 of MLX's"))

    theirs = scores(llama_cpp, reference.meanings)
    figure = f"log-probability of a meaning's token ({len(theirs)})"
    off = abs(theirs.mean() - reference.scores.mean())
    limit = SCORE_LIMIT[kind]
    rows.append(Row(figure, f"{reference.scores.mean():.3f}", f"{theirs.mean():.3f}", off <= limit, f"{limit} off"))
    return rows


def show(path: Path, rows: list[Row]) -> str:
    """The parity table as text."""
    lines = [f"{path}", f"{'':46}{'MLX':>10}{'llama.cpp':>14}{'limit':>14}"]
    lines += [f"{r.figure:46}{r.mlx:>10}{r.llama_cpp:>14}{r.limit:>14}  {'ok' if r.ok else 'FAILED'}" for r in rows]
    return "\n".join(lines)


def read_entries(path: str) -> list[dictionary.Entry]:
    """The dictionary's good lines; the bad ones are make_jsonl.py's business."""
    entries = [entry for entry in dictionary.entries(path) if isinstance(entry, dictionary.Entry)]
    if not entries:
        raise ExportError(f"{path}: no slang in it to ask about; name another --dictionary")
    return entries


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m slang.gguf", description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("folder", type=Path, nargs="?", help="what mlx_lm.fuse wrote, with the adapter's prompt.toml")
    p.add_argument(
        "--type", nargs="+", choices=TYPES, default=["bf16", "q4_k_m"], metavar="TYPE", help=f"of {', '.join(TYPES)}"
    )
    p.add_argument("--name", help="file names begin with it; the folder's name when left out")
    p.add_argument(
        "--check", nargs="+", type=Path, metavar="FILE", help="compare GGUF files in llama.cpp with the model in MLX"
    )
    p.add_argument("--model", type=Path, help="the fused model to compare with; FILE's folder when left out")
    p.add_argument("--dictionary", default="data/source_augmented.txt", help="slang::meaning lines to ask about in --check")
    p.add_argument("--questions", type=int, default=QUESTIONS, help="cut into tokens in --check")
    p.add_argument("--answers", type=int, default=ANSWERS, help="of them answered in --check")
    p.add_argument("--ask", nargs=2, metavar=("FILE", "QUESTION"), help="one greedy answer of a GGUF file on stdout")
    args = p.parse_args(argv)
    if (args.folder is not None) + bool(args.check) + bool(args.ask) != 1:
        p.error("give a folder to export, or --check FILE, or --ask FILE QUESTION")
    if min(args.questions, args.answers) < 1:
        p.error("--questions and --answers have to be 1 or more")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # half a file of 2 GB goes away then too, as with Ctrl-C
    try:
        if args.ask:
            print(LlamaCpp(Path(args.ask[0])).ask(args.ask[1]))
        elif args.check:
            for path in args.check:
                need_file(path)
            reference = Reference(
                args.model or args.check[0].parent,
                read_entries(args.dictionary),
                args.questions,
                args.answers,
            )
            tables = {}
            for path in args.check:
                tables[path] = check(path, reference)
                print(show(path, tables[path]), flush=True)
            return int(not all(row.ok for rows in tables.values() for row in rows))
        else:
            gc.disable()  # half a million merges are lists, and to look among them for garbage doubles the time to read them
            export(args.folder, list(dict.fromkeys(args.type)), args.name or args.folder.resolve().name)
        return 0
    except UserError as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(told(error), file=sys.stderr)
    except KeyboardInterrupt:
        print("Stopped; no file was written or changed", file=sys.stderr)
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
