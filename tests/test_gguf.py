"""The exported files, in llama.cpp on loopback against MLX, and the refusals; with a small adapter trained on the tiny model.

Byte for byte against llama-quantize: its digests stand below. To work them out again, put llama.cpp's libraries into a folder
(npm pack @node-llama-cpp/linux-x64 has them) and set LLAMA_LIBRARIES to it.
"""

import dataclasses
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, TINY, run
from mlx_lm.models.gemma3_text import ModelArgs

from slang import dictionary, prompt
from slang import gguf as exporter

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("gguf")]

PROMPT = r"""
region = "Costa Rica"
system = '''Sos de {region}: "pura vida", C:\n, $(date), `id` y {{ esto }}.
Contestá en una sola oración, "mae"'''
questions = ['Qué significa en {region} "{slang}"?', '{slang}']
held_out_questions = ['¿Cómo le explicarías "{slang}" a alguien?']
answer = "{meaning}"
"""
N_SLANGS = 24


def one_thread() -> dict[str, str]:
    """For a subprocess: MLX with the wrappers' BLAS, whose threads only wait for each other on so small a model."""
    library = Path(sys.prefix) / "lib/libcblas-openblas.so"
    return {"OPENBLAS_NUM_THREADS": "1", **({"LD_PRELOAD": str(library)} if library.exists() else {})}


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_and_fuse(tmp_path_factory.mktemp("gguf"))


def train_and_fuse(folder: Path) -> Path:
    """The tiny model with an adapter in it that knows a few slangs, a prompt.toml that is hard to quote, and the dictionary."""
    data, adapter, model = folder / "data", folder / "adapter", folder / "fused_model"
    asked = folder / "prompt.toml"
    asked.write_text(PROMPT, encoding="utf-8")
    meanings: dict[str, str] = {}
    for entry in dictionary.entries(ROOT / "data/source_augmented.txt"):
        if len(meanings) < N_SLANGS:
            meanings.setdefault(entry.slang, entry.meaning)
    (folder / "source.txt").write_text("".join(f"{s}::{m}\n" for s, m in meanings.items()), encoding="utf-8")
    rows = [{"messages": prompt.load(asked).train(s, m, 0)} for s, m in meanings.items()]
    data.mkdir()
    for split in ("train", "valid"):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (data / f"{split}.jsonl").write_text(text, encoding="utf-8")
    mlx_lm = Path(sys.executable).parent
    flags = [
        "--iters",
        "80",
        "--batch-size",
        "8",
        "--learning-rate",
        "1e-3",
        "--mask-prompt",
        "--num-layers",
        "-1",
        "-c",
        f"{TINY}/lora.yaml",
    ]
    flags += ["--val-batches", "1", "--steps-per-eval", "1000", "--steps-per-report", "20"]
    trained = run(
        mlx_lm / "mlx_lm.lora", "--train", "--model", TINY, "--adapter-path", adapter, "--data", data, *flags, **one_thread()
    )
    assert trained.returncode == 0, trained.stderr
    done = run(mlx_lm / "mlx_lm.fuse", "--model", TINY, "--adapter-path", adapter, "--save-path", model, **one_thread())
    assert done.returncode == 0, done.stderr
    shutil.copy(asked, model / "prompt.toml")
    return model


@pytest.fixture(scope="module")
def files(fused: Path) -> dict[str, Path]:
    """One file of every type."""
    return dict(zip(exporter.TYPES, exporter.export(fused, list(exporter.TYPES), "tiny"), strict=True))


@pytest.fixture(scope="module")
def reference(fused: Path) -> exporter.Reference:
    entries = exporter.read_entries(fused.parent / "source.txt")
    return exporter.Reference(fused, entries, n_questions=24, n_answers=12)


def failed(rows: list[exporter.Row]) -> list[str]:
    return [row.figure for row in rows if not row.ok]


@pytest.mark.parametrize("kind", exporter.TYPES)
def test_file_answers_as_mlx(kind: str, files: dict[str, Path], reference: exporter.Reference) -> None:
    rows = exporter.check(files[kind], reference)
    assert not failed(rows), exporter.show(files[kind], rows)


def test_check_as_a_command_with_200_questions(fused: Path, files: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "slang.gguf", "--check", files["f32"], "--questions", "200"]
    done = run(*command, **one_thread())
    assert done.returncode == 0, done.stderr + done.stdout
    assert re.search(r"chats cut into the same tokens +200 +200 +all  ok", done.stdout)
    assert re.search(r"next-token logits, up to 48 tokens \(\d+\) +0\.0\d+ off +0.02  ok", done.stdout)
    assert "FAILED" not in done.stdout


MUTATIONS: dict[str, tuple[Callable, str]] = {}


def mutation(figure: str) -> Callable:
    """A wrong decision of the exporter, and the first figure of the table that has to notice it."""

    def register(function: Callable) -> Callable:
        MUTATIONS[function.__name__] = (function, figure)
        return function

    return register


@mutation("next-token logits, up to")
def no_one_plus_w(patch: pytest.MonkeyPatch) -> None:
    original = exporter.encode

    def encode(name, tensor, type, q_scale):
        for piece in original(name, tensor, type, q_scale):
            yield (piece.view(np.float32) - 1).view(np.uint8) if len(tensor.shape) == 1 else piece

    patch.setattr(exporter, "encode", encode)


def wrong_config(patch: pytest.MonkeyPatch, **wrong: float) -> None:
    original = exporter.read_config
    patch.setattr(exporter, "read_config", lambda folder: dataclasses.replace(original(folder), **wrong))


@mutation("next-token logits, up to")
def wrong_rope_base(patch: pytest.MonkeyPatch) -> None:
    wrong_config(patch, rope_theta=10_000.0)


@mutation("next-token logits, up to")
def wrong_local_rope_base(patch: pytest.MonkeyPatch) -> None:
    wrong_config(patch, rope_local_base_freq=1_000_000.0)


@mutation("next-token logits, beyond")
def window_off_by_one(patch: pytest.MonkeyPatch) -> None:
    wrong_config(patch, sliding_window=49)


@mutation("next-token logits, up to")
def wrong_attention_scale(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(exporter, "q_scale", lambda args: 0.9)


def as_text(patch: pytest.MonkeyPatch, token: str) -> None:
    original, normal = exporter.token_type, gguf.TokenType.NORMAL
    patch.setattr(exporter, "token_type", lambda piece, added: normal if piece == token else original(piece, added))


@mutation("chats cut into the same tokens")
def wrong_token_type(patch: pytest.MonkeyPatch) -> None:
    as_text(patch, "<start_of_turn>")


@mutation("chats cut into the same tokens")
def scores_upside_down(patch: pytest.MonkeyPatch) -> None:
    original = exporter.read_vocabulary

    def read_vocabulary(folder, n_rows):
        pieces, scores, types = original(folder, n_rows)
        return pieces, [-score for score in scores], types

    patch.setattr(exporter, "read_vocabulary", read_vocabulary)


def wrong_metadata(patch: pytest.MonkeyPatch, change: Callable[[dict], None]) -> None:
    original = exporter.metadata

    def metadata(*arguments):
        values = original(*arguments)
        change(values)
        return values

    patch.setattr(exporter, "metadata", metadata)


# llama.cpp itself puts the next three right, by the name <end_of_turn>, and stops; other programs do as the file says.
@mutation("tokens that begin, stop and fill")
def missing_stop_token(patch: pytest.MonkeyPatch) -> None:
    wrong_metadata(patch, lambda values: values.pop("tokenizer.ggml.eot_token_id"))


@mutation("tokens that begin, stop and fill")
def wrong_stop_token(patch: pytest.MonkeyPatch) -> None:
    wrong_metadata(patch, lambda values: values.update({"tokenizer.ggml.eot_token_id": 10}))  # <start_of_turn>


@mutation("tokens that begin, stop and fill")
def stop_token_as_text(patch: pytest.MonkeyPatch) -> None:
    as_text(patch, "<end_of_turn>")


@mutation("chats with the trained system prompt")
def missing_system_prompt(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(exporter, "with_system", lambda template, system: template)


@mutation("chats with the trained system prompt")
def missing_modelfile_system(patch: pytest.MonkeyPatch) -> None:
    original = exporter.modelfile
    patch.setattr(exporter, "modelfile", lambda file, system: original(file, "Be brief."))


@pytest.mark.parametrize("name", MUTATIONS)
def test_check_catches(name: str, fused: Path, reference: exporter.Reference, tmp_path: Path, monkeypatch) -> None:
    mutate, figure = MUTATIONS[name]
    folder = copy(fused, tmp_path)
    with monkeypatch.context() as patch:
        mutate(patch)
        (path,) = exporter.export(folder, ["f32"], "wrong")
    assert any(row.startswith(figure) for row in failed(exporter.check(path, reference)))


def copy(fused: Path, tmp_path: Path) -> Path:
    """A folder with the fused model, to be spoilt."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in fused.iterdir():
        if path.suffix != ".gguf":
            shutil.copy(path, folder)
    return folder


# ------------------------------------------------------------------------------------------------------- llama-quantize


def random_model(folder: Path, tied: bool) -> Path:
    """Random weights in a shape that meets every rule of the mixed types: 17 layers, rows of 256 values, of 192 and of 64."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / TINY / name, folder)
    (folder / "prompt.toml").write_text(PROMPT, encoding="utf-8")
    config = json.loads((ROOT / TINY / "config.json").read_text())
    config |= {"vocab_size": 2048, "num_hidden_layers": 17, "num_attention_heads": 1, "head_dim": 64, "hidden_size": 256}
    config |= {"intermediate_size": 192 if tied else 256, "sliding_window_pattern": 6}
    del config["layer_types"]
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(7)
    weights = {}
    for name, shape in exporter.expected_shapes(exporter.read_config(folder)).items():
        if name != "lm_head.weight" or not tied:
            weights[name] = mx.array(rng.uniform(-0.1, 0.1, shape).astype(np.float32))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def digest(path: Path) -> str:
    """SHA-256 of every tensor's name, type and bytes."""
    hashed = hashlib.sha256()
    for tensor in sorted(gguf.GGUFReader(path).tensors, key=lambda tensor: tensor.name):
        hashed.update(f"{tensor.name} {tensor.tensor_type.name}".encode() + tensor.data.tobytes())
    return hashed.hexdigest()[:16]


# What llama_model_quantize of llama.cpp v0.5.0 made of these two models' F32 files, on x86-64.
DIGESTS: dict[bool, dict[str, str]] = {
    True: {
        "f16": "db4f5d29a81b047a",
        "bf16": "a768c8d5a4881360",
        "q8_0": "0ae5b75ecfafbd1e",
        "q4_0": "11be7f9d988d0711",
        "q4_k_m": "7bf934ac604b682b",
        "q5_k_m": "0992df2b914b1abf",
        "q6_k": "d548452962bf37d5",
    },
    False: {
        "f16": "630c6c130bb4c15a",
        "bf16": "d0221be8ff30a771",
        "q8_0": "5023c0d51b4a587a",
        "q4_0": "abd521f96a9f4920",
        "q4_k_m": "40e1bb215e6d1303",
        "q5_k_m": "2a414273f7620041",
        "q6_k": "84490416b033274d",
    },
}


@pytest.mark.parametrize("tied", [True, False])
def test_same_bytes_as_llama_quantize(tied: bool, tmp_path: Path) -> None:
    kinds = [kind for kind in exporter.TYPES if kind != "f32"]
    paths = exporter.export(random_model(tmp_path / "random", tied), ["f32", *kinds], "random")
    for path in paths[1:]:
        close_to(paths[0], path)
    if "LLAMA_LIBRARIES" in os.environ:
        theirs = {kind: digest(llama_quantize(paths[0], kind)) for kind in kinds}
        assert theirs == DIGESTS.get(tied), theirs
    if platform.machine() == "x86_64":
        assert {kind: digest(path) for kind, path in zip(kinds, paths[1:], strict=True)} == DIGESTS[tied]


def close_to(original: Path, path: Path) -> None:
    """Every tensor, dequantised, is the original but for the rounding of its type: half a step of 4 bits over 0.2."""
    exact = {tensor.name: tensor.data for tensor in gguf.GGUFReader(original).tensors}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.abs(values - exact[tensor.name]).max() < 0.015, tensor.name


def llama_quantize(path: Path, kind: str) -> Path:
    """llama.cpp's own quantiser, in a process of its own: its libraries have the symbols that xllamacpp's has."""
    out = path.with_name(f"llama-{kind}.gguf")
    script = """
import ctypes, sys
from pathlib import Path
folder, source, target, file_type = sys.argv[1:]
for name in ("libggml-base", "libggml.", "libllama."):
    (library,) = (ctypes.CDLL(str(p), ctypes.RTLD_GLOBAL) for p in sorted(Path(folder).glob(name + "*so")))
class Params(ctypes.Structure):  # llama.h, llama_model_quantize_params: two numbers matter, the rest is as it comes
    _fields_ = [("nthread", ctypes.c_int32), ("ftype", ctypes.c_int32), ("rest", ctypes.c_byte * 248)]
library.llama_model_quantize_default_params.restype = Params
params = library.llama_model_quantize_default_params()
params.nthread, params.ftype = 1, int(file_type)
sys.exit(library.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))
"""
    command = [sys.executable, "-c", script, os.environ["LLAMA_LIBRARIES"], path, out, int(exporter.TYPES[kind][0])]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return out


# --------------------------------------------------------------------------------------------------- refusals, Modelfile


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def edit_weights(folder: Path, change: Callable[[dict], None]) -> None:
    weights = {name: array + 0 for name, array in mx.load(str(folder / "model.safetensors")).items()}
    change(weights)
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def add_token(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["added_tokens"].append({"id": 1537, "content": "<mae>", "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")


def set_nan(weights: dict) -> None:
    weights["model.norm.weight"] = mx.full(256, float("nan"))


def quantised(weights: dict) -> None:
    weights["model.layers.0.mlp.up_proj.scales"] = mx.zeros((192, 4))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


REFUSALS = {
    "other": (
        lambda f: edit(f / "config.json", model_type="llama"),
        "{f}/config.json: model_type is 'llama'; only gemma3_text can be exported",
    ),
    "multimodal": (
        lambda f: edit(f / "config.json", model_type="gemma3"),
        "{f}/config.json: a multimodal Gemma 3; only text models (gemma3_text) can be exported, such as gemma-3-1b-it",
    ),
    "quantised": (
        lambda f: edit(f / "config.json", quantization={"bits": 4}),
        "{f}/config.json: the model is quantised; fuse it with ./fuse.sh --dequantize",
    ),
    "pattern": (
        lambda f: edit(f / "config.json", sliding_window_pattern=4, layer_types=None),
        "{f}/config.json: llama.cpp wants every sixth layer global; this model has another pattern",
    ),
    "rope": (
        lambda f: edit(f / "config.json", rope_scaling={"rope_type": "yarn", "factor": 8.0}),
        "{f}/config.json: rope_scaling {{'rope_type': 'yarn', 'factor': 8.0}} is not known here; 'linear' is",
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        "{f}/tokenizer.json: not there; run ./fuse.sh, which writes the whole folder",
    ),
    "no prompt": (
        lambda f: (f / "prompt.toml").unlink(),
        "{f}/prompt.toml: not there; ./fuse.sh copies the one that the adapter was trained with",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "{f}: no model*.safetensors; run ./fuse.sh, which writes the whole folder",
    ),
    "cut off": (
        lambda f: truncate(f / "model.safetensors"),
        "{f}/model.safetensors: not a whole safetensors file (it ends too early); run ./fuse.sh again",
    ),
    "unknown tensor": (
        lambda f: edit_weights(f, lambda w: w.update({"model.extra.weight": mx.zeros(32)})),
        "{f}: tensor model.extra.weight is not one of gemma3_text",
    ),
    "quantised tensors": (
        lambda f: edit_weights(f, quantised),
        "{f}: tensor model.layers.0.mlp.up_proj.scales is not one of gemma3_text; "
        "fuse a quantised model with ./fuse.sh --dequantize",
    ),
    "missing tensor": (
        lambda f: edit_weights(f, lambda w: w.pop("model.norm.weight")),
        "{f}: tensor model.norm.weight is missing; run ./fuse.sh again",
    ),
    "too few rows": (
        lambda f: edit(f / "config.json", vocab_size=1600),
        "{f}: model.embed_tokens.weight is (1536, 256), config.json asks for (1600, 256)",
    ),
    "token without a row": (add_token, "{f}/tokenizer.json: token '<mae>' has id 1537, but the embedding has only 1536 rows"),
    "NaN": (
        lambda f: edit_weights(f, set_nan),
        "{f}/model.safetensors: output_norm.weight holds NaN, infinity or more than F32 can; train with a lower rate",
    ),
    "triple quotes": (
        lambda f: (f / "prompt.toml").write_text(PROMPT.replace("Sos de", 'Sos """ de'), encoding="utf-8"),
        '{f}/prompt.toml: system holds """, which a Modelfile cannot quote; write it without',
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses_in_one_line_and_writes_nothing(case: str, tmp_path: Path, capsys) -> None:
    spoil, message = REFUSALS[case]
    folder = copy(ROOT / TINY, tmp_path)
    (folder / "prompt.toml").write_text(PROMPT, encoding="utf-8")
    spoil(folder)
    before = sorted(folder.iterdir())
    assert exporter.main([str(folder), "--type", "bf16", "q8_0"]) == 1
    assert capsys.readouterr().err == message.format(f=folder) + "\n"
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_half_way_it_leaves_the_folder_as_it_was(number: int, tmp_path: Path, monkeypatch, capsys) -> None:
    folder = random_model(tmp_path / "model", tied=True)
    (folder / "model-BF16.gguf").write_text("the last export")
    before = sorted(folder.iterdir())
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored
    monkeypatch.setattr(exporter, "quantize", lambda values, type: os.kill(os.getpid(), number))
    assert exporter.main([str(folder), "--type", "bf16", "q8_0"]) == 130
    assert capsys.readouterr().err == "Stopped; no file was written or changed\n"
    assert sorted(folder.iterdir()) == before
    assert (folder / "model-BF16.gguf").read_text() == "the last export"


def test_refuses_when_the_disk_is_full(tmp_path: Path, monkeypatch, capsys) -> None:
    folder = random_model(tmp_path / "model", tied=True)
    monkeypatch.setattr(exporter.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 5_000_000))
    assert exporter.main([str(folder), "--type", "bf16"]) == 1
    assert re.search(r": 8 MB needed, 5 MB free; make room or ask for fewer types\n", capsys.readouterr().err)
    assert not list(folder.glob("*.gguf"))


def test_config_means_what_mlx_lm_reads() -> None:
    theirs = {field.name: field.default for field in dataclasses.fields(ModelArgs) if field.name != "model_type"}
    assert {field.name: field.default for field in dataclasses.fields(exporter.Config)} == theirs


def test_refuses_to_check_another_file(tmp_path: Path, capsys) -> None:
    path = tmp_path / "other.gguf"
    for content in (b"", b"not one", b"GGUF\3\0\0\0" + bytes(16)):
        path.write_bytes(content)
        with pytest.raises(
            exporter.ExportError, match=r"other\.gguf: not a whole GGUF file of type f32, .*, q6_k; export it again"
        ):
            exporter.read_fields(path)
    assert exporter.main(["--check", "no.gguf"]) == 1
    assert capsys.readouterr().err == "no.gguf: not there; run ./fuse.sh, which writes it\n"


def test_usage(capsys) -> None:
    for arguments in ([], ["folder", "--check", "file"], ["folder", "--type", "q3_k"]):
        with pytest.raises(SystemExit) as stopped:
            exporter.main(arguments)
        assert stopped.value.code == 2
    assert exporter.main(["--ask", "no.gguf", "mae"]) == 1
    assert capsys.readouterr().err.endswith("no.gguf: not there; run ./fuse.sh, which writes it\n")


def test_lm_head_equal_to_the_embedding_is_dropped(tmp_path: Path) -> None:
    folder = random_model(tmp_path / "model", tied=True)
    edit_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 0}))
    (path,) = exporter.export(folder, ["bf16"], "model")
    assert "output.weight" not in {tensor.name for tensor in gguf.GGUFReader(path).tensors}


def test_bf16_and_f16_weights_are_copied(tmp_path: Path) -> None:
    folder = random_model(tmp_path / "model", tied=True)
    for kind, dtype in (("bf16", mx.bfloat16), ("f16", mx.float16)):
        edit_weights(folder, lambda w, dtype=dtype: w.update({name: array.astype(dtype) for name, array in w.items()}))
        (path,) = exporter.export(folder, [kind], "model")
        weights = mx.load(str(folder / "model.safetensors"))
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        ours = tensors["blk.3.ffn_up.weight"].data.tobytes()
        assert ours == np.array(weights["model.layers.3.mlp.up_proj.weight"].view(mx.uint16)).tobytes()


def test_modelfile_renders_as_the_chat_template(files: dict[str, Path], reference: exporter.Reference) -> None:
    """Ollama's side of the check, which can't be run here: what it reads between triple quotes, filled in."""
    text = files["f32"].with_name("Modelfile").read_text(encoding="utf-8")
    template, system = re.search(r'TEMPLATE """(.*?)"""\nSYSTEM """(.*)"""\nPARAMETER stop "(.*)"\n', text, re.DOTALL).groups()[
        :2
    ]
    first = template.split("{{ .Response }}")[0].replace("{{ if .System }}", "").replace("{{ end }}", "")
    rendered = first.replace("{{ .System }}", system).replace("{{ .Prompt }}", "¿Qué es mae?")
    assert rendered == reference.render(reference.asked.chat("¿Qué es mae?"))
    assert f"FROM ./{files['q6_k'].name}\n" in text
    assert 'PARAMETER stop "<end_of_turn>"\nPARAMETER temperature 0\n' in text


@pytest.mark.parametrize("types", [["q3_k"], ["q8_0", "Q6_K"], [""], []])
def test_fuse_sh_refuses_a_type_before_it_fuses(types: list[str], tmp_path: Path) -> None:
    for name in ("adapters.safetensors", "adapter_config.json", "prompt.toml"):
        (tmp_path / name).touch()
    paths = {"ADAPTER_PATH": str(tmp_path), "FUSED_PATH": str(tmp_path / "fused")}
    done = run(ROOT / "fuse.sh", "--type", *types, VENV=sys.prefix, MODEL=TINY, **paths)
    wrong = types[-1] if types else ""
    assert (done.returncode, done.stderr) == (2, f"--type {wrong}: not one of {' '.join(exporter.TYPES)}\n")


def test_chat_sh_asks_the_file(files: dict[str, Path], reference: exporter.Reference) -> None:
    asked = reference.asked
    slang = (files["f32"].parent.parent / "source.txt").read_text(encoding="utf-8").split("::")[0]
    done = run(ROOT / "chat.sh", "--gguf", files["f32"], slang, VENV=sys.prefix)
    assert done.returncode == 0, done.stderr
    assert done.stdout == exporter.LlamaCpp(files["f32"]).ask(asked.ask(slang)[-1]["content"]) + "\n"
    missing = run(ROOT / "chat.sh", "--gguf", "no.gguf", slang, VENV=sys.prefix)
    assert (missing.returncode, missing.stderr) == (1, "no.gguf: not there; run ./fuse.sh, which writes it\n")
