"""Changes to the files of a model or an adapter, and the one line that refuses them."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from slang.errors import UserError

Change = Callable[[Path], object]


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as refused:
        call()
    assert "\n" not in str(refused.value)
    assert not str(refused.value).endswith("None")
    return str(refused.value)


def removed(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def written(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, length: int) -> Change:
    def change(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:length])

    return change


def edited(name: str, **changes: object) -> Change:
    """A JSON file with other values; `...` takes a key out."""

    def change(folder: Path) -> None:
        values = json.loads((folder / name).read_text(encoding="utf-8")) | changes
        left = {key: value for key, value in values.items() if value is not ...}
        (folder / name).write_text(json.dumps(left), encoding="utf-8")

    return change


def tensors(name: str, edit: Callable[[dict], object]) -> Change:
    """A safetensors file with other tensors."""

    def change(folder: Path) -> None:
        weights = dict(mx.load(str(folder / name)))
        edit(weights)
        mx.eval(weights)
        mx.save_safetensors(str(folder / name), weights)

    return change


def in_shards(folder: Path) -> None:
    """The first of two shards, with an index that names both."""
    whole = folder / "model.safetensors"
    weights = mx.load(str(whole))
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    order = sorted(weights)
    mx.save_safetensors(str(folder / names[0]), {name: weights[name] for name in order[:40]})
    index = {"weight_map": {name: names[n >= 40] for n, name in enumerate(order)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    whole.unlink()


def put(name: str, value: mx.array) -> Callable[[dict], None]:
    return lambda weights: weights.update({name: value})


def drop(name: str) -> Callable[[dict], object]:
    return lambda weights: weights.pop(name)


def matches(message: str, pattern: str, folder: Path) -> bool:
    """Whether it is the message; `…` stands for a library's words, `{m}` for the folder."""
    parts = pattern.replace("{m}", str(folder)).split("…")
    return re.fullmatch(".+".join(map(re.escape, parts)), message) is not None
