"""A model and an adapter that can't be used: one line each, before anything is computed."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import ROOT, TINY, run
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.gemma3_text import ModelArgs
from mlx_lm.tuner.utils import linear_to_lora_layers

from slang.errors import UserError
from slang.models import find, formats
from slang.models.load import dequantized, load

AGAIN = "copy or download the model again"
ANOTHER = "take an instruction-tuned model, such as gemma-3-1b-it"
BASE = "mlx-community/gemma-3-270m-it-bf16"
Change = Callable[[Path], object]


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as refused:
        call()
    assert "\n" not in str(refused.value)
    assert not str(refused.value).endswith("None")
    return str(refused.value)


# -------------------------------------------------------------------------------- changes to files


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


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / TINY, tmp_path / "m"))


# ------------------------------------------------------------------- models, refused before loading

CHECKED: dict[str, tuple[Change, str]] = {
    "without weights": (
        removed("model.safetensors"),
        f"{{m}}: no model*.safetensors, so no weights; {AGAIN}",
    ),
    "weights cut off": (
        cut("model.safetensors", 100_000),
        f"{{m}}/model.safetensors: not a whole safetensors file (it ends too early); {AGAIN}",
    ),
    "a shard missing": (
        in_shards,
        f"{{m}}/model-00002-of-00002.safetensors: not there; {AGAIN}",
    ),
    "index cut off": (
        lambda folder: [in_shards(folder), cut("model.safetensors.index.json", 20)(folder)],
        f"{{m}}/model.safetensors.index.json: …; {AGAIN}",
    ),
    "config is no JSON": (
        written("config.json", b"{"),
        "{m}/config.json: …; MODEL has to name a model's folder",
    ),
    "config is a list": (
        written("config.json", b"[]"),
        "{m}/config.json: …; MODEL has to name a model's folder",
    ),
    "config missing": (
        removed("config.json"),
        "{m}/config.json: not there; MODEL has to name a model's folder",
    ),
    "no model_type": (
        edited("config.json", model_type=...),
        "{m}/config.json: …`model_type`; MODEL has to name a model's folder",
    ),
    "unknown model_type": (
        edited("config.json", model_type="magic"),
        f"{{m}}/config.json: mlx_lm knows no model_type 'magic'; {ANOTHER}",
    ),
    "model_type is a path": (
        edited("config.json", model_type="../models/gemma3_text"),
        f"{{m}}/config.json: mlx_lm knows no model_type '../models/gemma3_text'; {ANOTHER}",
    ),
    "size is text": (edited("config.json", hidden_size="x"), f"{{m}}/config.json: …; {AGAIN}"),
    "size is zero": (
        edited("config.json", num_key_value_heads=0),
        f"{{m}}/config.json: …num_key_value_heads…; {AGAIN}",
    ),
    "with code": (
        edited("config.json", model_file="evil.py"),
        f"{{m}}/config.json: it wants code of its own run, which is never done; {ANOTHER}",
    ),
    "without tokenizer": (
        removed("tokenizer.json", "tokenizer.model"),
        f"{{m}}/tokenizer.json: not there; {AGAIN}",
    ),
    "without chat template": (
        removed("chat_template.jinja"),
        f"{{m}}: no chat template; {ANOTHER}",
    ),
}


def matches(message: str, pattern: str, folder: Path) -> bool:
    """Whether it is the message; `…` stands for a library's words, `{m}` for the folder."""
    parts = pattern.replace("{m}", str(folder)).split("…")
    return re.fullmatch(".+".join(map(re.escape, parts)), message) is not None


@pytest.mark.parametrize("name", CHECKED)
def test_a_model_that_is_refused_before_it_is_loaded(name: str, model: Path) -> None:
    change, message = CHECKED[name]
    change(model)
    found = refusal(lambda: find.main([str(model)]))
    assert matches(found, message, model), found


def test_what_is_no_model(tmp_path: Path) -> None:
    expected = "models/none: no such folder; MODEL=models/tiny-gemma3 is the one in this repository"
    assert refusal(lambda: find.find("models/none")) == expected
    expected = "tests/config.json: not there; MODEL has to name a model's folder"
    assert refusal(lambda: find.main(["tests"])) == expected
    model = shutil.copytree(ROOT / TINY, tmp_path / "[m]")
    expected = f"{model}: mlx_lm reads no path with [, * or ? in it; rename the folder"
    assert refusal(lambda: find.main([str(model)])) == expected


def test_remapped_model_types_are_known() -> None:
    """mistral is loaded by mlx_lm's llama.py."""
    assert find.is_known("gemma3_text")
    assert find.is_known("mistral")
    assert not find.is_known("bert")


def test_the_command_prints_what_to_load(tmp_path: Path) -> None:
    done = run(sys.executable, "-m", "slang.models", TINY)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{TINY}\n{TINY}\n", "")
    done = run(sys.executable, "-m", "slang.models", "tests")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "tests/config.json: not there; MODEL has to name a model's folder\n"


def test_a_file_that_may_not_be_read(model: Path) -> None:
    path = model / "tokenizer.json"
    code = "import sys; from slang.models.load import load; load(sys.argv[1])"
    path.chmod(0)
    command = [sys.executable, "-c", code, str(model)]
    if subprocess.run(["test", "-r", path]).returncode == 0:  # root
        if not shutil.which("setpriv"):
            pytest.skip("root reads every file")
        command = ["setpriv", "--bounding-set=-all", *command]
    done = run(*command)
    expected = f"{path}: Permission denied; change its permissions or name another"
    assert expected in done.stderr.splitlines()[-1]


# --------------------------------------------------------------------- models, refused when loaded

CANT = "{m}: mlx_lm can't load it (…); " + AGAIN
TEMPLATE = "{m}: its chat template can't be used (…); " + ANOTHER
LOADED: dict[str, tuple[Change, str]] = {
    "half of the tensors": (
        lambda folder: [in_shards(folder), removed("model.safetensors.index.json")(folder)],
        CANT,
    ),
    "a tensor too many": (tensors("model.safetensors", put("evil", mx.zeros(2))), CANT),
    "a tensor too few": (tensors("model.safetensors", drop("model.norm.weight")), CANT),
    "a tensor of another shape": (
        tensors("model.safetensors", put("model.norm.weight", mx.zeros(3))),
        CANT,
    ),
    "NaN": (
        tensors("model.safetensors", put("model.norm.weight", mx.full((256,), float("nan")))),
        f"{{m}}: model.norm.weight holds NaN or infinity; {AGAIN}",
    ),
    "another model's config": (edited("config.json", model_type="llama"), CANT),
    "a module that is no model": (edited("config.json", model_type="cache"), CANT),
    "more layers": (edited("config.json", num_hidden_layers=12), CANT),
    "wider": (edited("config.json", hidden_size=512), CANT),
    "odd rope_scaling": (edited("config.json", rope_scaling="x"), CANT),
    "no epsilon": (edited("config.json", rms_norm_eps=None), CANT),
    "odd quantization": (edited("config.json", quantization={"bits": 4}), CANT),
    "generation_config is a list": (written("generation_config.json", b"[]"), CANT),
    "tokenizer cut off": (cut("tokenizer.json", 50_000), CANT),
    "tokenizer empty": (written("tokenizer.json", b""), CANT),
    "tokenizer is something else": (written("tokenizer.json", b"[]"), CANT),
    "tokenizer_config broken": (written("tokenizer_config.json", b"{"), CANT),
    "tokenizer_config is a list": (written("tokenizer_config.json", b"[]"), CANT),
    "template is no UTF-8": (written("chat_template.jinja", b"\xff{{"), CANT),
    "template broken": (written("chat_template.jinja", b"{% if %}"), TEMPLATE),
    "template refuses": (
        written("chat_template.jinja", b"{{ raise_exception('no system role') }}"),
        TEMPLATE,
    ),
    "template says nothing": (written("chat_template.jinja", b"hola"), TEMPLATE),
}


@pytest.mark.parametrize("name", LOADED)
def test_a_model_that_loading_refuses(name: str, model: Path) -> None:
    change, message = LOADED[name]
    change(model)
    found = refusal(lambda: load(str(model)))
    assert matches(found, message, model), found


@pytest.mark.parametrize("error", [OSError("what"), OSError(), KeyError(), RuntimeError("a\nb")])
def test_an_error_of_whatever_kind_is_one_line(error: Exception, monkeypatch) -> None:
    def fail(*_, **__) -> None:
        raise error

    monkeypatch.setattr("mlx_lm.load", fail)
    found = refusal(lambda: load(TINY))
    assert found.startswith(f"{TINY}: mlx_lm can't load it ({type(error).__name__}")
    assert found.endswith(f"); {AGAIN}")


def test_ctrl_c_is_not_taken_for_an_error(monkeypatch) -> None:
    def stop(*_, **__) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_lm.load", stop)
    with pytest.raises(KeyboardInterrupt):
        load(TINY)


# ---------------------------------------------------------------------------------------- adapters


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
    f"{{m}}/adapters.safetensors: trained on another model than {TINY} ({DOWN} is 2048 x 8); "
    f"set MODEL={BASE}, as its adapter_config.json says"
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
    "weights empty": (written("adapters.safetensors", b""), CUT.replace("…", "it ends too early")),
    "weights are text": (written("adapters.safetensors", b"\4" + bytes(7) + b"{mae"), CUT),
    "a header of another form": (
        written("adapters.safetensors", b"\x0c" + bytes(7) + b'{"a": [1, 2]'[:11] + b"}"),
        CUT,
    ),
    "no tensors": (adapters(dict.clear), f"{FIT}({MISSING}){FIT_REMEDY}"),
    "half of the layers": (adapters(half), f"{FIT}({MISSING}){FIT_REMEDY}"),
    "of another rank": (lora(rank=16), f"{FIT}({DOWN} is 128 x 8, not 128 x 16){FIT_REMEDY}"),
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
    "a vector": (adapters(put(DOWN, mx.zeros(8))), f"{FIT}({DOWN} is 8, not 128 x 8){FIT_REMEDY}"),
    "of another model": (of_270m, OTHER),
    "config missing": (removed("adapter_config.json"), CONFIG.replace("…", "not there")),
    "config is no JSON": (written("adapter_config.json", b"{"), CONFIG),
    "config is of something else": (written("adapter_config.json", b"{}"), CONFIG),
    "an unknown fine_tune_type": (edited("adapter_config.json", fine_tune_type="magic"), CONFIG),
    "num_layers is text": (edited("adapter_config.json", num_layers="all"), CONFIG),
    "rank is text": (lora(rank="8"), CONFIG),
    "rank is zero": (lora(rank=0), CONFIG),
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


# ------------------------------------------------------------------------------------ Hugging Face

FORBIDDEN = (
    "no folder here, not downloaded yet, and HF_HUB_OFFLINE forbids it; "
    "unset that, or try MODEL=models/tiny-gemma3"
)


def in_cache(folder: Path, *names: str) -> dict[str, str]:
    """Some of the tiny model's files as a/b in Hugging Face's cache, and the variables for it."""
    snapshot = folder / "models--a--b/snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    for name in names:
        shutil.copy(ROOT / TINY / name, snapshot)
    (folder / "models--a--b/refs").mkdir()
    (folder / "models--a--b/refs/main").write_text("1" * 40)
    return {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder)}


@pytest.mark.parametrize("names", [[], ["config.json"], ["config.json", "model.safetensors"]])
def test_a_model_that_is_not_wholly_downloaded(names: list[str], tmp_path: Path) -> None:
    done = run(sys.executable, "-m", "slang.models", "a/b", **in_cache(tmp_path, *names))
    assert (done.returncode, done.stderr) == (1, f"a/b: {FORBIDDEN}\n")


def test_a_model_that_is_downloaded(tmp_path: Path) -> None:
    names = [path.name for path in (ROOT / TINY).iterdir()]
    done = run(sys.executable, "-m", "slang.models", "a/b", **in_cache(tmp_path, *names))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("a/b\n")


NOT_GIVEN = "google/none: no folder here, not downloaded yet, and Hugging Face did not give it "
HUB = {
    "GatedRepoError": f"{NOT_GIVEN}(GatedRepoError); accept its licence on huggingface.co and run "
    "hf auth login, or try MODEL=models/tiny-gemma3",
    "ConnectError": f"{NOT_GIVEN}(ConnectError); check the name and the connection, "
    "or try MODEL=models/tiny-gemma3",
}


@pytest.mark.parametrize("name", HUB)
def test_what_the_hub_does_not_give(name: str, monkeypatch) -> None:
    def refuse(model: str) -> None:
        raise type(name, (Exception,), {})

    monkeypatch.setattr("huggingface_hub.model_info", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert refusal(lambda: find.find("google/none")) == HUB[name]


# What the README's table of messages may show.
MESSAGES = [message for _, message in [*CHECKED.values(), *ADAPTERS.values()]] + list(HUB.values())


# -------------------------------------------------------------------------------------------- trust


def test_no_code_of_a_model_is_run(model: Path, tmp_path: Path) -> None:
    """A pickle and Python files beside good weights, and a config.json that asks for them."""
    edited("config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})(
        model
    )
    edited("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})(model)
    ran = tmp_path / "ran"
    (model / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    pickled = b"cbuiltins\nopen\n(V%b\nVw\ntR." % str(ran).encode()
    (model / "pytorch_model.bin").write_bytes(pickled)
    unpickle = "import evil, pickle; pickle.load(open('pytorch_model.bin', 'rb'))"
    run(sys.executable, "-c", unpickle, cwd=model)
    assert ran.exists()  # so they would, if they were
    ran.unlink()
    load(str(model))
    assert not ran.exists()


def test_the_sources_load_no_pickle_and_trust_no_remote_code() -> None:
    loads = r"pickle|torch\.load|joblib|allow_pickle|remote.code\W+True|--trust"
    for path in [*ROOT.glob("*.sh"), *ROOT.glob("*.py"), *ROOT.glob("slang/**/*.py")]:
        assert not re.search(loads, path.read_text(encoding="utf-8")), path


# --------------------------------------------------------------------------------------- the steps


@pytest.mark.slow
@pytest.mark.parametrize("command", ["./chat.sh mae", "./fuse.sh"])
def test_every_step_says_that_there_is_no_adapter(command: str, tmp_path: Path) -> None:
    """And leaves nothing behind."""
    places = {"ADAPTER_PATH": f"{tmp_path}/a", "FUSED_PATH": f"{tmp_path}/fused"}
    done = run(*command.split(), MODEL=TINY, VENV=sys.prefix, **places)
    last = done.stderr.splitlines()[-1]
    expected = "not there; run ./train.sh first, or set ADAPTER_PATH to an adapter's folder"
    assert (done.returncode, last) == (1, f"{tmp_path}/a/adapters.safetensors: {expected}")
    assert not list(tmp_path.iterdir())
