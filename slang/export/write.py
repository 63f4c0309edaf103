"""Fused Gemma 3 -> GGUF for llama.cpp, Ollama and LM Studio.

Reads   a folder with a fused model and the prompt.toml that its adapter was trained with
Writes  <name>-<TYPE>.gguf for each type and a Modelfile for the last of them, into that folder

The trained system prompt goes into the file's chat template, for a chat that brings none of its
own, and into the Modelfile.
"""

import json
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GGML
from gguf import GGUFValueType, GGUFWriter
from gguf.gguf_writer import WriterState
from mlx_lm.models.gemma3_text import ModelArgs
from tqdm import tqdm

from slang.errors import UserError
from slang.export.folder import AGAIN, load_prompt, read_config, read_template
from slang.export.vocabulary import END_OF_TURN, read_vocabulary, special_ids
from slang.export.weights import (
    TYPES,
    Tensor,
    encode,
    file_size,
    n_bytes,
    q_scale,
    select_tensors,
    tensor_types,
)
from slang.files import replacing
from slang.models.formats import read_json

# What is kept of a base model that came as a GGUF file.
KEPT = (
    "general.basename",
    "general.size_label",
    "general.license",
    "general.languages",
    "general.tags",
)


def with_system(template: str, system: str) -> str:
    """The chat template, with `system` as the system message of a chat that has none."""
    literal = json.dumps(system, ensure_ascii=False)  # JSON's escapes are Jinja's
    message = "[{'role': 'system', 'content': " + literal + "}]"
    condition = "{%- if messages[0]['role'] != 'system' %}"
    return condition + "{% set messages = " + message + " + messages %}{% endif %}" + template


def modelfile(file: str, system: str) -> str:
    """For `ollama create`. Ollama fills TEMPLATE for each turn, with .System in the first only.

    Between triple quotes it reads everything as it stands: no escape, no variable
    (ollama/parser, unquote).
    """
    return f'''\
# ollama create slang -f Modelfile
FROM ./{file}
TEMPLATE """<start_of_turn>user
{{{{ if .System }}}}{{{{ .System }}}}

{{{{ end }}}}{{{{ .Prompt }}}}<end_of_turn>
<start_of_turn>model
{{{{ .Response }}}}<end_of_turn>
"""
SYSTEM """{system}"""
PARAMETER stop "{END_OF_TURN}"
PARAMETER temperature 0
'''


def metadata(folder: Path, args: ModelArgs, name: str, system: str) -> dict[str, Any]:
    """Everything but the tensors and the file type, by its key.

    Source: ggml/docs/gguf.md and llama.cpp's llama-arch.cpp.
    """
    values: dict[str, Any] = {
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
    scaling = args.rope_scaling or {}
    if scaling.get("factor"):  # of the global layers alone, in both
        values["gemma3.rope.scaling.type"] = "linear"
        values["gemma3.rope.scaling.factor"] = float(scaling["factor"])
    vocabulary = read_vocabulary(folder, args.vocab_size)
    values |= {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": vocabulary.pieces,
        "tokenizer.ggml.scores": vocabulary.scores,
        "tokenizer.ggml.token_type": [int(type) for type in vocabulary.types],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_sep_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": with_system(read_template(folder), system),
    }
    for task, number in special_ids(folder, vocabulary.pieces).items():
        values[f"tokenizer.ggml.{task}_token_id"] = number
    return values


def origin(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Size, licence and base model, from origin.json where the base came as a GGUF file.

    Else the size alone.
    """
    total = sum(int(np.prod(tensor.shape)) for tensor in tensors.values())
    values: dict[str, Any] = {
        "general.finetune": "slang",
        "general.size_label": gguf.size_label(total, 0, 0, 0),
    }
    path = folder / "origin.json"
    if not path.exists():
        return values
    known = read_json(path, dict[str, Any], AGAIN)
    values |= {key: value for key, value in known.items() if key.startswith(KEPT)}
    if base := known.get("general.name"):
        values |= {"general.base_model.count": 1, "general.base_model.0.name": base}
    return values


def value_type(value: object) -> GGUFValueType:
    """The type that a metadata value gets; GGUFWriter finds those of a list's items by itself."""
    if isinstance(value, bool):
        return GGUFValueType.BOOL
    if isinstance(value, int):
        return GGUFValueType.UINT32
    return GGUFValueType.get_type(value)


def write_gguf(
    file: BinaryIO,
    values: dict[str, Any],
    tensors: dict[str, Tensor],
    types: dict[str, GGML],
    q_scale: float,
    bar: tqdm,
) -> None:
    """One whole GGUF file. The tensors are written in pieces: a whole one can take a gigabyte."""
    writer = GGUFWriter(None, "gemma3")
    for key, value in values.items():
        writer.add_key_value(key, value, value_type(value))
    for name, tensor in tensors.items():
        size = n_bytes(tensor.shape, types[name])
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, types[name])
    writer.fout, writer.state = [file], WriterState.EMPTY  # it is open already
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(file, file.tell())
    for name, tensor in tensors.items():
        for piece in encode(name, tensor, types[name], q_scale):
            file.write(piece.data)
            bar.update(piece.nbytes)
        writer.write_padding(file, file.tell())


def check_room(folder: Path, shown: Path, needed: int) -> None:
    """Raises UserError where the disk of `folder` has less free than `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        what = f"{needed / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free"
        raise UserError(f"{shown}: {what}; make room or ask for fewer types")


def gguf_path(folder: Path, name: str, kind: str) -> Path:
    return folder / f"{name}-{kind.upper()}.gguf"


def check_system(folder: Path, system: str) -> None:
    """Raises UserError for a system prompt that a Modelfile cannot hold."""
    if '"""' in system:
        what = 'system holds """, which a Modelfile cannot quote; write it without'
        raise UserError(f"{folder / 'prompt.toml'}: {what}")


def export(folder: Path, kinds: list[str], name: str, shown: Path | None = None) -> list[Path]:
    """Write <name>-<TYPE>.gguf for each kind and the Modelfile: all of them, or none.

    Returns the files' paths. `shown` is what the folder is called in messages, where that is not
    its name.
    Raises UserError before a byte is written, or with nothing left behind for NaN in the weights.
    """
    shown = shown or folder
    system = load_prompt(folder).system
    check_system(folder, system)
    args = read_config(folder)
    tensors = select_tensors(folder, args)
    values = metadata(folder, args, name, system) | origin(folder, tensors)
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    needed = sum(file_size(shapes, kind, args.num_hidden_layers) for kind in kinds)
    check_room(folder, shown, needed)
    paths = [gguf_path(folder, name, kind) for kind in kinds]

    with replacing(*paths, folder / "Modelfile") as files:
        for path, file, kind in zip(paths, files, kinds, strict=False):
            start = time.perf_counter()
            types = tensor_types(shapes, kind, args.num_hidden_layers)
            stated = values | {"general.file_type": int(TYPES[kind][0])}
            with tqdm(
                total=file_size(shapes, kind, args.num_hidden_layers),
                desc=path.name,
                unit="B",
                unit_scale=True,
                leave=False,
                disable=not sys.stderr.isatty(),
            ) as bar:
                write_gguf(file, stated, tensors, types, q_scale(args), bar)
            seconds = time.perf_counter() - start
            used = Counter(types.values()).most_common()
            counts = ", ".join(f"{n} {type.name}" for type, n in used)
            print(
                f"{shown / path.name}: {file.tell() / 1e6:.1f} MB in {seconds:.1f} s ({counts})",
                flush=True,
            )
        files[-1].write(modelfile(paths[-1].name, system).encode())
    return paths
