"""Adapters that can't be used, fused models, and a quantised base."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from changes import Change, cut, edited, matches, put, refusal, removed, tensors, written
from conftest import ROOT, TINY
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.gemma3_text import ModelArgs
from mlx_lm.tuner.utils import linear_to_lora_layers

from slang.models import find, formats
from slang.models.load import dequantized, load

BASE = "mlx-community/gemma-3-270m-it-bf16"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / TINY, tmp_path / "m"))


def write_adapter(folder: Path, kind: str = "lora", **changes: object) -> Path:
    """An adapter of the tiny model, as training begins with it: lora_b is zero."""
    lora = {"rank": 8, "scale": 4.0, "dropout": 0.0}
    about = {"model": TINY, "num_layers": -1, "lora_parameters": lora, "fine_tune_type": kind}
    about |= changes
    net, _ = load(TINY)
    net.freeze()
    if kind == "full":
        net.layers[-1].unfreeze()
    else:
        linear_to_lora_layers(net, about["num_layers"], lora, use_dora=kind == "dora")
    folder.mkdir()
    weights = dict(tree_flatten(net.trainable_parameters()))
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    (folder / "adapter_config.json").write_text(json.dumps(about))
    shutil.copy(ROOT / "prompt.toml", folder)
    return folder


@pytest.fixture(scope="module")
def whole_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "a")


@pytest.fixture
def adapter(whole_adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_adapter, tmp_path / "a"))


DOWN = "model.layers.0.mlp.down_proj.lora_a"
CONFIG = "{m}/adapter_config.json: …; run ./train.sh again: the adapter's folder is not whole"
FIT = "{m}/adapters.safetensors: does not fit models/tiny-gemma3 and its adapter_config.json "
FIT_REMEDY = "; set MODEL to the one it was trained on, or run ./train.sh again"
CUT = (
    "{m}/adapters.safetensors: not a whole safetensors file (…); "
    "copy one of the numbered checkpoints over it, or run ./train.sh again"
)
OTHER = (
    f"{{m}}/adapters.safetensors: trained on another model than {TINY} ({DOWN} is 2048 x 8 "
    f"in place of 128 x 8); set MODEL={BASE}, as its adapter_config.json says"
)


def lora(**changes: object) -> Change:
    parameters = {"rank": 8, "scale": 4.0, "dropout": 0.0} | changes
    return edited("adapter_config.json", lora_parameters=parameters)


def adapters(edit: Callable[[dict], object]) -> Change:
    return tensors("adapters.safetensors", edit)


def half(weights: dict) -> None:
    """As of a training of the last three layers."""
    for name in list(weights):
        if int(name.split(".")[2]) < 3:
            del weights[name]


def in_header(edit: Callable[[dict], None]) -> Change:
    """adapters.safetensors with another header before the same bytes."""

    def change(folder: Path) -> None:
        path = folder / "adapters.safetensors"
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        edit(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])

    return change


@in_header
def overlapping(header: dict) -> None:
    """Every lora_a is the first one."""
    for name, tensor in header.items():
        if name.endswith("down_proj.lora_a"):
            tensor["data_offsets"] = header[DOWN]["data_offsets"]


@in_header
def longer(header: dict) -> None:
    header[DOWN]["shape"] = [64, 8]


def of_270m(folder: Path) -> None:
    edited("adapter_config.json", model=BASE)(folder)
    adapters(put(DOWN, mx.zeros((2048, 8))))(folder)


MISSING = "model.layers.0.mlp.down_proj.lora_a is missing"
ADAPTERS: dict[str, tuple[Change, str]] = {
    "weights missing": (
        removed("adapters.safetensors"),
        "{m}/adapters.safetensors: not there; "
        "run ./train.sh first, or set ADAPTER_PATH to an adapter's folder",
    ),
    "prompt missing": (
        removed("prompt.toml"),
        "{m}/prompt.toml: not there; "
        "copy the prompt.toml that the adapter was trained with into its folder",
    ),
    "weights cut off": (
        cut("adapters.safetensors", 9000),
        CUT.replace("…", "it ends too early"),
    ),
    "weights empty": (
        written("adapters.safetensors", b""),
        CUT.replace("…", "it ends too early"),
    ),
    "weights are text": (written("adapters.safetensors", b"\4" + bytes(7) + b"{mae"), CUT),
    "a header of another form": (
        written("adapters.safetensors", b"\x0c" + bytes(7) + b'{"a": [1, 2]'[:11] + b"}"),
        CUT,
    ),
    "tensors that overlap": (overlapping, CUT.replace("…", "… is not where it belongs")),
    "a tensor that is longer than its shape": (
        longer,
        CUT.replace("…", "… is not where it belongs"),
    ),
    "no tensors": (adapters(dict.clear), f"{FIT}({MISSING}){FIT_REMEDY}"),
    "half of the layers": (adapters(half), f"{FIT}({MISSING}){FIT_REMEDY}"),
    "of another rank": (
        lora(rank=16),
        f"{FIT}({DOWN} is 128 x 8 in place of 128 x 16){FIT_REMEDY}",
    ),
    "of fewer layers": (
        edited("adapter_config.json", num_layers=2),
        f"{FIT}({DOWN} is one too many){FIT_REMEDY}",
    ),
    "of fewer matrices": (
        lora(keys=["self_attn.q_proj"]),
        f"{FIT}({DOWN} is one too many){FIT_REMEDY}",
    ),
    "of DoRA, with the weights of LoRA": (
        edited("adapter_config.json", fine_tune_type="dora"),
        f"{FIT}(model.layers.0.mlp.down_proj.m is missing){FIT_REMEDY}",
    ),
    "of more layers than the model has": (
        adapters(put("model.layers.9.mlp.down_proj.lora_a", mx.zeros((128, 8)))),
        f"{FIT}(model.layers.9.mlp.down_proj.lora_a is one too many){FIT_REMEDY}",
    ),
    "a vector": (
        adapters(put(DOWN, mx.zeros(8))),
        f"{FIT}({DOWN} is 8 in place of 128 x 8){FIT_REMEDY}",
    ),
    "a number": (
        adapters(put(DOWN, mx.array(8.0))),
        f"{FIT}({DOWN} is one number in place of 128 x 8){FIT_REMEDY}",
    ),
    "of another model": (of_270m, OTHER),
    "config missing": (removed("adapter_config.json"), CONFIG.replace("…", "not there")),
    "config is no JSON": (written("adapter_config.json", b"{"), CONFIG),
    "config is of something else": (written("adapter_config.json", b"{}"), CONFIG),
    "an unknown fine_tune_type": (edited("adapter_config.json", fine_tune_type="magic"), CONFIG),
    "num_layers is text": (edited("adapter_config.json", num_layers="all"), CONFIG),
    "rank is text": (lora(rank="8"), CONFIG),
    "rank is zero": (lora(rank=0), CONFIG),
    "scale is zero": (lora(scale=0), CONFIG),
    "scale is more than a float32 holds": (lora(scale=1e308), CONFIG),
    "whole numbers": (
        adapters(put(DOWN, mx.zeros((128, 8), mx.int32))),
        "{m}/adapters.safetensors: " + DOWN + " holds I32, no weights; copy one of the numbered "
        "checkpoints over it, or run ./train.sh again",
    ),
    "no scale": (edited("adapter_config.json", lora_parameters={"rank": 8}), CONFIG),
    "keys is text": (lora(keys="self_attn.q_proj"), CONFIG),
    "no lora_parameters": (
        edited("adapter_config.json", lora_parameters=None),
        CONFIG.replace("…", "no lora_parameters in it"),
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_is_refused_before_it_is_loaded(name: str, adapter: Path) -> None:
    change, message = ADAPTERS[name]
    change(adapter)
    found = refusal(lambda: find.main([TINY, str(adapter)]))
    assert matches(found, message, adapter), found


NOT_FINITE = "{m}/adapters.safetensors: … holds NaN or infinity; train again with a smaller "
LOADED_ADAPTERS: dict[str, tuple[Change, str]] = {
    "NaN": (adapters(put(DOWN, mx.full((128, 8), float("nan")))), NOT_FINITE + "--learning-rate"),
    "infinity": (
        adapters(put(DOWN, mx.full((128, 8), float("inf")))),
        NOT_FINITE + "--learning-rate",
    ),
    "of fine_tune_type full, with the weights of LoRA": (
        edited("adapter_config.json", fine_tune_type="full"),
        f"{FIT}(…){FIT_REMEDY}",
    ),
    "of no matrix of the model": (lora(keys=["nope"]), f"{FIT}(…){FIT_REMEDY}"),
}


@pytest.mark.parametrize("name", LOADED_ADAPTERS)
def test_an_adapter_that_loading_refuses(name: str, adapter: Path) -> None:
    change, message = LOADED_ADAPTERS[name]
    change(adapter)
    found = refusal(lambda: load(TINY, str(adapter)))
    assert matches(found, message, adapter), found


def test_a_shape_is_compared_for_a_model_that_only_loading_knows(
    adapter: Path, monkeypatch
) -> None:
    """Another kind of model than Gemma 3 is known by its modules alone."""
    monkeypatch.setattr(find, "expected_adapter", lambda about, config: None)
    adapters(half)(adapter)
    found = refusal(lambda: load(TINY, str(adapter)))
    assert matches(found, f"{FIT}({MISSING}){FIT_REMEDY}", adapter), found


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_a_whole_adapter_is_loaded(kind: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", kind, num_layers=1)
    assert find.main([TINY, str(adapter)]) == 0
    net, tokenizer = load(TINY, str(adapter))
    tokens = mx.array([tokenizer.encode("pura vida")])
    base, _ = load(TINY)
    assert mx.allclose(net(tokens), base(tokens), atol=1e-4)
    weights = mx.load(str(adapter / "adapters.safetensors"))
    loaded = dict(tree_flatten(net.parameters()))
    assert all(mx.array_equal(loaded[name], array) for name, array in weights.items())


def test_the_sizes_left_out_are_those_of_mlx_lm() -> None:
    ours, theirs = formats.GemmaConfig("gemma3_text"), ModelArgs("gemma3_text")
    names = set(formats.GemmaConfig.__struct_fields__) - {"model_file"}
    assert {getattr(ours, name) == getattr(theirs, name) for name in names} == {True}


def test_another_model_of_the_same_shapes_is_told_once(adapter: Path, capsys) -> None:
    edited("adapter_config.json", model="mlx-community/gemma-3-4bit")(adapter)
    load(TINY, str(adapter))
    load(TINY, str(adapter))
    what = f"trained on mlx-community/gemma-3-4bit, and used with {TINY}"
    remedy = "set MODEL=mlx-community/gemma-3-4bit, unless that is meant"
    assert capsys.readouterr().err == f"{adapter}: {what}; {remedy}\n"


@pytest.mark.parametrize("trained_on", [TINY, str(ROOT / TINY), "/elsewhere/tiny-gemma3", None])
def test_the_same_model_by_another_path_is_not(trained_on, adapter: Path, capsys) -> None:
    edited("adapter_config.json", model=trained_on)(adapter)
    load(TINY, str(adapter))
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------ a fused model


def test_a_fused_model_refuses_the_adapter_that_is_in_it(model: Path, adapter: Path) -> None:
    about = {"model": TINY, "adapter": str(adapter)}
    (model / "fused.json").write_text(json.dumps(about))
    expected = f"{model}: has its adapter in it already; set ADAPTER_PATH= for it"
    assert refusal(lambda: find.main([str(model), str(adapter)])) == expected
    assert refusal(lambda: load(str(model), str(adapter))) == expected
    assert find.main([str(model)]) == 0


def test_a_fused_model_takes_an_adapter_that_was_trained_on_it(model: Path, adapter: Path) -> None:
    (model / "fused.json").write_text("{}")
    edited("adapter_config.json", model=str(model))(adapter)
    assert find.main([str(model), str(adapter)]) == 0


def test_so_does_the_folder_of_a_fused_model_s_gguf_file(model: Path, adapter: Path) -> None:
    (model / "origin.json").write_text('{"general.finetune": "slang", "general.name": "x"}')
    expected = f"{model}: has its adapter in it already; set ADAPTER_PATH= for it"
    assert refusal(lambda: find.main([str(model), str(adapter)])) == expected
    (model / "origin.json").write_text('{"general.finetune": "it"}')
    assert find.main([str(model), str(adapter)]) == 0


# --------------------------------------------------------------------------------- a quantised base


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in 4 bits and bfloat16, as people download it."""
    from mlx_lm import convert

    folder = tmp_path_factory.mktemp("quantised") / "m"
    convert(str(ROOT / TINY), str(folder), quantize=True, q_bits=4, dtype="bfloat16")
    return folder


def test_a_zero_adapter_changes_nothing_in_a_quantised_model(
    quantised: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "a", model=str(quantised))
    net, tokenizer = load(str(quantised))
    tokens = mx.array([tokenizer.encode("¿Qué significa pura vida en Costa Rica?")])
    base = dequantized(net)(tokens)
    adapted = dequantized(load(str(quantised), str(adapter))[0])
    assert mx.array_equal(adapted(tokens), base)
    fused = [(name, m.fuse()) for name, m in adapted.named_modules() if hasattr(m, "fuse")]
    adapted.update_modules(tree_unflatten(fused))
    assert len(fused) == 42
    assert mx.array_equal(adapted(tokens), base)


def test_dequantised_is_float32_and_computes_the_same(quantised: Path) -> None:
    net, tokenizer = load(str(quantised))
    net.set_dtype(mx.float32)
    tokens = mx.array([tokenizer.encode("¿Qué significa pura vida en Costa Rica?")])
    before = net(tokens)
    assert {array.dtype for _, array in tree_flatten(net.parameters())} == {mx.uint32, mx.float32}
    dequantized(net)
    assert {array.dtype for _, array in tree_flatten(net.parameters())} == {mx.float32}
    assert mx.abs(net(tokens) - before).max() < 1e-4
