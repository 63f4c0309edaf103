"""A GGUF file as the base model: the same tensors and tokens, and nothing half made."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, TINY, run
from gguf import GGMLQuantizationType as GGML
from gguf_files import export_tiny, rewritten
from mlx_lm.models.gemma3_text import ModelArgs
from mlx_lm.utils import load
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from slang.export.weights import TYPES
from slang.export.write import export
from slang.models import from_gguf
from slang.models.find import check_model, typed

pytestmark = pytest.mark.xdist_group("from_gguf")

# What llama.cpp writes for Gemma 3, beside the types that the exporter itself can write.
OTHER_TYPES = [GGML.Q4_1, GGML.Q5_0, GGML.Q5_1, GGML.Q2_K, GGML.Q3_K]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model as a GGUF file of every type that the exporter writes."""
    return export_tiny(tmp_path_factory.mktemp("exported") / "model", list(TYPES))


def original() -> dict[str, mx.array]:
    return mx.load(str(ROOT / TINY / "model.safetensors"))


def imported(path: Path, cache: Path) -> tuple[Path, dict[str, mx.array]]:
    folder = from_gguf.folder_of(path, cache)
    return folder, mx.load(str(folder / "model.safetensors"))


def test_f32_gives_back_the_same_tensors(exported: dict[str, Path], tmp_path: Path) -> None:
    _, weights = imported(exported["f32"], tmp_path)
    assert set(weights) == set(original())
    for name, array in original().items():
        # A file holds 1 + w of a norm, whose last bits are lost where w is small.
        expected = (1 + array) - 1 if "norm" in name else array
        assert weights[name].dtype == mx.float32
        assert mx.array_equal(weights[name], expected), name


def test_bf16_gives_back_the_same_tensors(tmp_path: Path) -> None:
    """A model stored in bfloat16, as Gemma is: norms come back bit for bit too."""
    folder = tmp_path / "model"
    shutil.copytree(ROOT / TINY, folder)
    shutil.copy(ROOT / "prompt.toml", folder)
    stored = {name: array.astype(mx.bfloat16) for name, array in original().items()}
    mx.save_safetensors(str(folder / "model.safetensors"), stored)
    (path,) = export(folder, ["bf16"], "tiny")
    _, weights = imported(path, tmp_path / "cache")
    for name, array in stored.items():
        kept = mx.array_equal((1 + array.astype(mx.float32)) - 1, array)
        if kept or "norm" not in name:
            assert mx.array_equal(weights[name].view(mx.uint16), array.view(mx.uint16)), name


@pytest.mark.parametrize("kind", TYPES)
def test_exported_types(kind: str, exported: dict[str, Path], tmp_path: Path) -> None:
    folder, weights = imported(exported[kind], tmp_path)
    check_values(exported[kind], weights)
    model, _ = load(str(folder))
    assert model.args.sliding_window == 48


@pytest.mark.parametrize("kind", OTHER_TYPES, ids=lambda kind: kind.name)
def test_other_types(kind: GGML, exported: dict[str, Path], tmp_path: Path) -> None:
    path = rewritten(exported["f32"], tmp_path / "other.gguf", kind=kind)
    assert kind in {tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}
    check_values(path, imported(path, tmp_path)[1])


def check_values(path: Path, weights: dict[str, mx.array]) -> None:
    """Each tensor is what `gguf` makes of the file's bytes, rounded to its own dtype."""
    config = ModelArgs.from_dict(json.loads((ROOT / TINY / "config.json").read_text()))
    names = {theirs: ours for ours, theirs in from_gguf.gguf_names(config).items()}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        values = values - 1 if values.ndim == 1 else values
        array = weights[names[tensor.name]]
        assert mx.array_equal(array, mx.array(values).astype(array.dtype)), tensor.name


def test_same_tokens_and_scores(exported: dict[str, Path], tmp_path: Path) -> None:
    folder, _ = imported(exported["f32"], tmp_path)
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs = Tokenizer.from_file(str(ROOT / TINY / "tokenizer.json"))
    texts = [
        (ROOT / "data/demo.txt").read_text(encoding="utf-8"),
        "<start_of_turn>user\n¿Qué  es   mae?<end_of_turn>\n",
        "\t\t x\n\n\n🙂 ñandú 12345",
        "<bos><unused1>",
    ]
    for text in texts:
        assert ours.encode(text).ids == theirs.encode(text).ids
    before = SentencePieceProcessor(model_file=str(ROOT / TINY / "tokenizer.model"))
    after = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    learnt = [n for n in range(before.vocab_size()) if before.get_score(n) < 0]
    scores = [after.get_score(n) for n in learnt]
    assert scores == sorted(scores, reverse=True)


def test_exported_again_it_is_the_same_file(exported: dict[str, Path], tmp_path: Path) -> None:
    folder, _ = imported(exported["f32"], tmp_path)
    shutil.copy(ROOT / "prompt.toml", folder)
    (again,) = export(folder, ["f32"], "tiny")
    first, second = gguf.GGUFReader(exported["f32"]), gguf.GGUFReader(again)
    for a, b in zip(first.tensors, second.tensors, strict=True):
        assert (a.name, a.tensor_type) == (b.name, b.tensor_type)
        assert np.array_equal(a.data, b.data), a.name
    changed = {
        name
        for name in first.fields.keys() | second.fields.keys()
        if name not in first.fields
        or first.fields[name].contents() != second.fields[name].contents()
    }
    # The file's own template already has the system prompt; the base model is named.
    assert changed <= {
        "tokenizer.chat_template",
        "tokenizer.ggml.scores",
        "general.base_model.count",
        "general.base_model.0.name",
        "GGUF.kv_count",
    }


def test_found_again_and_made_anew(exported: dict[str, Path], tmp_path: Path, capsys) -> None:
    path = shutil.copy(exported["q8_0"], tmp_path / "m.gguf")
    first = from_gguf.folder_of(path, tmp_path)
    assert "making an MLX folder of it, once" in capsys.readouterr().err
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert from_gguf.folder_of(path, tmp_path) == first
    assert capsys.readouterr().err == ""
    assert (first / "model.safetensors").stat().st_mtime_ns == made
    shutil.copy(exported["f32"], path)
    assert from_gguf.folder_of(path, tmp_path) == first
    assert mx.load(str(first / "model.safetensors"))["model.norm.weight"].dtype == mx.float32
    assert typed(first) == str(path)


@pytest.mark.slow
def test_no_half_made_folder(exported: dict[str, Path], tmp_path: Path) -> None:
    """Killed at whatever moment, the next run makes it whole."""
    path = exported["f32"]
    command = [sys.executable, "-m", "slang.models", str(path), "--cache", str(tmp_path)]
    for seconds in (0.3, 0.6, 0.9, 1.2):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        time.sleep(seconds)
        process.kill()
        process.wait()
        for config in tmp_path.glob("models/*/tiny*/config.json"):
            check_model(config.parent)
    check_model(from_gguf.folder_of(path, tmp_path))
    assert not list(tmp_path.glob("models/*/.*.part"))


def test_two_at_once_make_it_once(exported: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "slang.models", str(exported["f32"]), "--cache", str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    both = [subprocess.Popen(command, cwd=ROOT, text=True, **pipes) for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert outputs[0][0] == outputs[1][0] != ""
    assert sum("once ..." in err for _, err in outputs) == 1


def test_a_blob_without_a_suffix(exported: dict[str, Path], tmp_path: Path) -> None:
    blob = tmp_path / "sha256-7cd4618c"
    rewritten(exported["f32"], blob, lambda m: m.update({"general.name": "Gemma 3 / Tiny!"}))
    assert from_gguf.folder_of(blob, tmp_path).name == "gemma-3-tiny"


# ------------------------------------------------------------------------------------ the wrappers


@pytest.mark.slow
def test_every_step_takes_a_gguf_file(exported: dict[str, Path], tmp_path: Path) -> None:
    """Train, evaluate, talk, fuse and export, with MODEL=FILE.gguf.

    What comes out says where it comes from.
    """
    licensed = {"general.license": "gemma", "general.name": "Tiny Gemma"}
    path = tmp_path / "tiny-base-BF16.gguf"
    model = rewritten(exported["bf16"], path, lambda metadata: metadata.update(licensed))
    data = tmp_path / "data"
    source = data / "source.jsonl"
    outputs: list[str | Path] = []
    for name in ("train", "valid", "test", "eval"):
        outputs += [f"--{name}", data / f"{name}.jsonl"]
    make = ["make_jsonl.py", "--input", "data/demo.txt", "--output", source]
    assert run(sys.executable, *make).returncode == 0
    assert run(sys.executable, "split_jsonl.py", "--input", source, *outputs).returncode == 0
    places = {
        "MODEL": str(model),
        "DATA": str(data),
        "ADAPTER_PATH": str(tmp_path / "adapter"),
        "FUSED_PATH": str(tmp_path / "fused"),
        "RESULTS": str(tmp_path / "results"),
        "CACHE": str(tmp_path / "cache"),
        "DICTIONARY": "data/demo.txt",
        "VENV": sys.prefix,
        "OPENBLAS_NUM_THREADS": "1",
    }
    trained = run("./train.sh", "--iters", "2", "--val-batches", "1", **places)
    assert trained.returncode == 0, trained.stderr
    answered = run("./chat.sh", "--baseline", "pura vida", **places)
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.strip()
    evaluated = run("./evaluate.sh", "--quick", **places)
    assert evaluated.returncode == 0, evaluated.stderr
    (result,) = (tmp_path / "results").glob("*.json")
    assert json.loads(result.read_text(encoding="utf-8"))["model"] == str(model)
    fused = run("./fuse.sh", "--type", "f32", **places)
    assert fused.returncode == 0, fused.stderr + fused.stdout
    fields = gguf.GGUFReader(tmp_path / "fused/tiny-base-slang-F32.gguf").fields
    assert fields["general.license"].contents() == "gemma"
    assert fields["general.base_model.0.name"].contents() == "Tiny Gemma"


def test_not_a_model_at_all() -> None:
    done = run("./chat.sh", "--baseline", "mae", MODEL="README.md", VENV=sys.prefix)
    assert done.returncode == 1
    kinds = "a model's folder, a .gguf file or a name on Hugging Face"
    command, told = done.stderr.splitlines()
    assert command.startswith("+ python -m slang.chat ")
    assert told == f"README.md: not a GGUF file; MODEL is {kinds}"
