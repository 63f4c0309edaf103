"""A model and an adapter that can't be used: one line each, before anything is computed."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from changes import (
    Change,
    cut,
    drop,
    edited,
    in_shards,
    matches,
    put,
    refusal,
    removed,
    tensors,
    written,
)
from conftest import ROOT, TINY, run

from slang.models import find
from slang.models.formats import one_line
from slang.models.load import load

AGAIN = "copy or download the model again"
ANOTHER = "take an instruction-tuned model, such as gemma-3-1b-it"


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
    "no rope": (
        edited("config.json", rope_theta=0),
        f"{{m}}/config.json: …rope_theta…; {AGAIN}",
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


@pytest.mark.parametrize("name", CHECKED)
def test_a_model_that_is_refused_before_it_is_loaded(name: str, model: Path) -> None:
    change, message = CHECKED[name]
    change(model)
    found = refusal(lambda: find.main([str(model)]))
    assert matches(found, message, model), found


def test_what_is_no_model(tmp_path: Path) -> None:
    for name in ("models/none", "none/x.gguf"):
        remedy = "check the name, or try MODEL=models/tiny-gemma3"
        expected = f"{name}: no such file or folder; {remedy}"
        assert refusal(lambda name=name: find.find(name)) == expected
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
    "template begins with a mark": (
        written("chat_template.jinja", b"\xef\xbb\xbf{{ messages }}"),
        TEMPLATE,
    ),
    "template leaves the system prompt out": (
        written("chat_template.jinja", b"{% for m in messages[1:] %}{{ m.content }}{% endfor %}"),
        TEMPLATE,
    ),
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


def test_what_is_dropped_half_read_raises_nothing() -> None:
    """As Ctrl-C leaves it: Python would print what is raised then."""
    reading = one_line("a", "b")
    reading.__enter__()
    reading.gen.close()


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
