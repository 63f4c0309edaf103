"""Base model and adapter -> one folder: the fused model, its GGUF files, and a check of both.

The whole folder is built beside the old one. It takes the old one's place when it is finished and
its files answer in llama.cpp as the model does in MLX; until then the old one stays as it is.

Reads   the base model, the adapter with its prompt.toml, and train.jsonl for the check's questions
Writes  what mlx_lm.fuse writes; prompt.toml, tokenizer.model and origin.json, copied; fused.json,
        by which a fused model is known; <name>-<TYPE>.gguf for each type, and a Modelfile
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import msgspec
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import dequantize_model, load_config, save

from slang import files, prompt
from slang.errors import Stopped, UserError
from slang.export.check import differing
from slang.export.folder import need_unquantised, read_config
from slang.export.reference import Reference, read_answers
from slang.export.weights import TYPES, file_size, gguf_shapes
from slang.export.write import check_room, check_system, export, metadata
from slang.files import locked, replacing_folder
from slang.models import find
from slang.models.load import check_finite, load

ANOTHER = "set FUSED_PATH to another folder"
# What is in a folder that was fused. Everything else was put there by hand.
WRITTEN = {
    "README.md",
    "Modelfile",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "fused.json",
    "generation_config.json",
    "merges.txt",
    "model.safetensors.index.json",
    "origin.json",
    "prompt.toml",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
}
NUMBERED = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
UNSEEN = re.compile(r"\.DS_Store|\._.*|\.lock|\.part")  # of macOS, or of a run that was killed
COPIED = ("tokenizer.model", "origin.json")  # the tokens' scores; licence and name of a GGUF file
# The end of a base model's name that says its type: -bf16, -4bit, -Q4_K_M.
TYPE_IN_NAME = re.compile(r"[-.]([bB]?[fF](16|32)|fp16|\d+bit.*|[qQ]\d_\w+)$")


@dataclass
class Task:
    """What is wanted. `kinds` are types of GGUF files; without one only the MLX model is made."""

    model: str
    adapter: Path
    fused: Path
    kinds: list[str]
    data: Path
    dequantize: bool
    n_questions: int
    n_answers: int
    cache: Path


def name_of(model: str, folder: Path) -> str:
    """gemma-3-1b-it-slang of mlx-community/gemma-3-1b-it-bf16 or gemma-3-1b-it-Q4_K_M.gguf."""
    name = folder.name if Path(model).is_file() else Path(model).absolute().name
    return TYPE_IN_NAME.sub("", name) + "-slang"


def is_written(name: str, folder: Path) -> bool:
    """Whether a file of this name is one that a fuse writes into the folder."""
    ends = "|".join(kind.upper() for kind in TYPES)
    exported = re.fullmatch(rf"(.+-slang|{re.escape(folder.name)})-({ends})\.gguf", name)
    return name in WRITTEN or bool(exported or NUMBERED.fullmatch(name))


def check_place(fused: Path) -> None:
    """Raises UserError unless a fused model can be put there, and nothing else is lost by it."""
    remedy = "set FUSED_PATH to another"
    place = Path(os.path.realpath(fused))
    for folder in (place, place.parent):
        files.need_folder(folder, remedy)
    find.check_name(place, remedy)
    paths = list(fused.iterdir()) if fused.exists() else []
    held = {path.name for path in paths if not UNSEEN.fullmatch(path.name)}
    folders = {path.name for path in paths if path.is_dir()}
    foreign = sorted(name for name in held if name in folders or not is_written(name, fused))
    if foreign:
        what = f"holds {foreign[0]}, which fuse.sh did not write"
        raise UserError(f"{fused}: {what}; move it away, or {ANOTHER}")
    if held and not held & {find.FUSED, "prompt.toml"}:
        raise UserError(f"{fused}: holds a model that fuse.sh did not make; {ANOTHER}")


def check_export(task: Task, folder: Path, name: str, system: str) -> None:
    """Raises UserError for a base model of which no GGUF file can be made. No weight is read."""
    check_system(task.adapter, system)
    config = read_config(folder, task.dequantize)
    if (folder / "tokenizer.json").exists():  # of one that is not downloaded, it is not there yet
        metadata(folder, config, name, system)


def bytes_needed(task: Task, folder: Path) -> int:
    """What the fused model and the GGUF files take, but for vocabularies.

    A model that is not downloaded yet, or is dequantised, has two bytes a parameter.
    """
    stored = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
    if not task.kinds:
        return stored
    config = read_config(folder, task.dequantize)
    shapes = gguf_shapes(config)
    if task.dequantize or not stored:
        stored = 2 * sum(int(np.prod(shape)) for shape in shapes.values())
    layers = config.num_hidden_layers
    return stored + sum(file_size(shapes, kind, layers) for kind in task.kinds)


def fuse_model(task: Task, source: str, folder: Path, part: Path) -> None:
    """The fused model, as mlx_lm.fuse writes it. Raises UserError for NaN and infinity."""
    net, tokenizer = load(source, str(task.adapter))
    fused = [
        (name, module.fuse(dequantize=task.dequantize))
        for name, module in net.named_modules()
        if hasattr(module, "fuse")
    ]
    net.update_modules(tree_unflatten(fused))
    config = load_config(folder)
    if task.dequantize:
        net = dequantize_model(net)
        config.pop("quantization", None)
        config.pop("quantization_config", None)
    remedy = "train again with a smaller --learning-rate, or copy the model again"
    fused_weights = dict(tree_flatten(net.parameters()))
    check_finite(fused_weights, f"{task.model} with {task.adapter}", remedy)
    save(part, str(folder), net, tokenizer, config, donate_model=False)


def copy_beside(task: Task, folder: Path, part: Path) -> None:
    """What belongs to a fused model and mlx_lm does not write."""
    shutil.copyfile(task.adapter / "prompt.toml", part / "prompt.toml")
    for name in COPIED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, part / name)
    made_of = {"model": task.model, "adapter": str(task.adapter)}
    (part / find.FUSED).write_bytes(msgspec.json.format(msgspec.json.encode(made_of)) + b"\n")


def check_files(task: Task, paths: list[Path], answers: dict[str, list[str]]) -> None:
    """Print each file's table. Raises UserError where llama.cpp answers otherwise than MLX."""
    reference = Reference(paths[0].parent, answers, task.n_questions, task.n_answers)
    if failed := differing(paths, reference, task.fused):
        what = f"{failed[0].name} answers otherwise in llama.cpp than in MLX, see FAILED"
        raise UserError(f"{task.fused}: {what}; it was not replaced")


@contextmanager
def building(fused: Path) -> Iterator[Path]:
    """A new folder that takes the place of `fused` when all goes well; else that is as it was."""
    folder = Path(os.path.realpath(fused))  # a link may lead to a larger disk
    existed = folder.exists()
    with locked(folder, "fusing"):
        try:
            with replacing_folder(folder) as part:
                yield part
        except BaseException as error:
            (folder / ".lock").unlink(missing_ok=True)
            if not existed:
                with suppress(OSError):
                    folder.rmdir()
            if isinstance(error, KeyboardInterrupt):
                raise Stopped(f"Stopped; {fused} is as it was") from None
            raise


def fuse(task: Task) -> None:
    """Build, check and swap. All that is cheap is checked before the model is read."""
    find.need_files(task.adapter)
    system = prompt.load(task.adapter / "prompt.toml").system
    check_place(task.fused)
    answers = read_answers(task.data) if task.kinds else {}
    source, folder = find.check(task.model, str(task.adapter), task.cache)
    if task.fused.exists() and task.fused.samefile(folder):
        raise UserError(f"{task.fused}: the base model itself, which would be lost; {ANOTHER}")
    name = name_of(task.model, folder)
    if not task.dequantize:
        need_unquantised(folder / "config.json")
    if task.kinds:
        check_export(task, folder, name, system)
    with building(task.fused) as part:
        check_room(part, task.fused, bytes_needed(task, folder))
        fuse_model(task, source, folder, part)
        mx.clear_cache()
        copy_beside(task, folder, part)
        if task.kinds:
            paths = export(part, task.kinds, name, task.fused)
            check_files(task, paths, answers)
        check_place(task.fused)  # once more: an hour may have passed
    talk = f'MODEL={task.fused} ADAPTER_PATH= ./chat.sh "pura vida"'
    print(f"Fused into {task.fused}. Talk to it: {talk}", file=sys.stderr)
