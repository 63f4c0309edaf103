"""GGUF files of the tiny model for tests: exported, and changed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from conftest import ROOT, TINY
from gguf import GGMLQuantizationType as GGML
from gguf import GGUFValueType

from slang.export.weights import quantize
from slang.export.write import export


def export_tiny(folder: Path, kinds: list[str]) -> dict[str, Path]:
    """The tiny model as a GGUF file of each type, in a new folder."""
    shutil.copytree(ROOT / TINY, folder)
    shutil.copy(ROOT / "prompt.toml", folder)
    return dict(zip(kinds, export(folder, kinds, "tiny"), strict=True))


def rewritten(
    source: Path,
    target: Path,
    change: Callable[[dict], None] = lambda metadata: None,
    leave_out: str = "",
    add: str = "",
    kind: GGML | None = None,
) -> Path:
    """A copy of a GGUF file with other metadata, or a tensor less or more.

    With `kind`, its rows of 256 values are of that type.
    """
    reader = gguf.GGUFReader(source)
    fields = [(name, f) for name, f in reader.fields.items() if not name.startswith("GGUF.")]
    values = {name: field.contents() for name, field in fields}
    change(values)
    writer = gguf.GGUFWriter(target, values.pop("general.architecture", ""))
    before = dict(fields)
    for name, value in values.items():
        outer, inner = GGUFValueType.get_type(value), None
        if name in before and type(before[name].contents()) is type(value):
            outer, inner = before[name].types[0], before[name].types[-1]
        writer.add_key_value(name, value, outer, inner if outer == GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        if tensor.name == leave_out:
            continue
        if kind and len(tensor.shape) == 2 and tensor.shape[0] == 256:
            data = quantize(np.array(tensor.data), kind)
            writer.add_tensor(tensor.name, data.reshape(len(tensor.data), -1), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    if add:
        writer.add_tensor(add, np.zeros((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def drop(key: str) -> Callable[[dict], None]:
    return lambda metadata: metadata.pop(key)


def put(key: str, value: object) -> Callable[[dict], None]:
    return lambda metadata: metadata.update({key: value})
