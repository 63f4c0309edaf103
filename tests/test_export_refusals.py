"""What the export refuses: one line that says where and what to do, and nothing written."""

import json
import shutil
import signal
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import ROOT, TINY, run
from exporting import PROMPT, copy, edit, edit_weights, random_model

from slang.errors import UserError
from slang.export import command, weights, write
from slang.export.check import read_fields

pytestmark = pytest.mark.slow


def rewrite(path: Path, old: str, new: str) -> None:
    """Replace a text in a file, which has to be there."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def edit_merges(folder: Path, merges: object) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["merges"] = merges
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")


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
        "{f}/config.json: model_type is 'llama'; only text models (gemma3_text) can be "
        "exported, such as gemma-3-1b-it",
    ),
    "multimodal": (
        lambda f: edit(f / "config.json", model_type="gemma3"),
        "{f}/config.json: model_type is 'gemma3'; only text models (gemma3_text) can be "
        "exported, such as gemma-3-1b-it",
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
        "{f}/config.json: rope_scaling {{'rope_type': 'yarn', 'factor': 8.0}} is not known "
        "here; 'linear' is",
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
        "{f}/model.safetensors: not a whole safetensors file (it ends too early); "
        "run ./fuse.sh again",
    ),
    "unknown tensor": (
        lambda f: edit_weights(f, lambda w: w.update({"model.extra.weight": mx.zeros(32)})),
        "{f}: does not fit its config.json (model.extra.weight is one too many); "
        "run ./fuse.sh again",
    ),
    "quantised tensors": (
        lambda f: edit_weights(f, quantised),
        "{f}: does not fit its config.json (model.layers.0.mlp.up_proj.scales is one too many); "
        "run ./fuse.sh again",
    ),
    "missing tensor": (
        lambda f: edit_weights(f, lambda w: w.pop("model.norm.weight")),
        "{f}: does not fit its config.json (model.norm.weight is missing); run ./fuse.sh again",
    ),
    "too few rows": (
        lambda f: edit(f / "config.json", vocab_size=1600),
        "{f}: does not fit its config.json (model.embed_tokens.weight is 1536 x 256 in "
        "place of 1600 x 256); run ./fuse.sh again",
    ),
    "token without a row": (
        add_token,
        "{f}/tokenizer.json: token '<mae>' has id 1537, but the embedding has only 1536 rows",
    ),
    "scaling is text": (
        lambda f: edit(f / "config.json", rope_scaling="x"),
        "{f}/config.json: ... `$.rope_scaling`",
    ),
    "factor is text": (
        lambda f: edit(f / "config.json", rope_scaling={"rope_type": "linear", "factor": "x"}),
        "{f}/config.json: rope_scaling has factor 'x', not a number above 0",
    ),
    "epsilon is null": (
        lambda f: edit(f / "config.json", rms_norm_eps=None),
        "{f}/config.json: ... `$.rms_norm_eps`",
    ),
    "window below 0": (
        lambda f: edit(f / "config.json", sliding_window=-1),
        "{f}/config.json: sliding_window is -1, not above 0; copy the model again",
    ),
    "heads are text": (
        lambda f: edit(f / "config.json", num_attention_heads="2"),
        "{f}/config.json: ... `$.num_attention_heads`",
    ),
    "config is a list": (
        lambda f: (f / "config.json").write_text("[]"),
        "{f}/config.json: ... ",
    ),
    "merges null": (
        lambda f: edit_merges(f, None),
        "{f}/tokenizer.json: ... `$.model.merges`",
    ),
    "merges of three": (
        lambda f: edit_merges(f, [["a", "b", "c"]]),
        "{f}/tokenizer.json: ... `$.model.merges[0]`",
    ),
    "tokenizer cut off": (
        lambda f: truncate(f / "tokenizer.json"),
        "{f}/tokenizer.json: ... ; run ./fuse.sh",
    ),
    "template not UTF-8": (
        lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"),
        "{f}/chat_template.jinja:1: not UTF-8; copy the model again",
    ),
    "no such token": (
        lambda f: edit(f / "tokenizer_config.json", bos_token=["<bos>"]),
        "{f}/tokenizer_config.json: the bos token ['<bos>'] is not in tokenizer.json",
    ),
    "NaN": (
        lambda f: edit_weights(f, set_nan),
        "{f}/model.safetensors: output_norm.weight holds NaN, infinity or more than F32 "
        "can; train with a lower rate",
    ),
    "triple quotes": (
        lambda f: rewrite(f / "prompt.toml", "Sos de", 'Sos """ de'),
        '{f}/prompt.toml: system holds """, which a Modelfile cannot quote; write it without',
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses_in_one_line_and_writes_nothing(case: str, tmp_path: Path) -> None:
    spoil, message = REFUSALS[case]
    folder = copy(ROOT / TINY, tmp_path)
    (folder / "prompt.toml").write_text(PROMPT, encoding="utf-8")
    spoil(folder)
    before = sorted(folder.iterdir())
    with pytest.raises(UserError) as error:
        command.main([str(folder), "--type", "bf16", "q8_0"])
    start, _, within = message.format(f=folder).partition(" ... ")  # other words are msgspec's
    assert str(error.value).startswith(start) and within in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_half_way_it_leaves_the_folder_as_it_was(number: int, tmp_path: Path) -> None:
    folder = random_model(tmp_path / "model", tied=True)
    (folder / "model-BF16.gguf").write_text("the last export")
    before = sorted(folder.iterdir())
    stopping = """
import os, signal, sys
from slang import errors
from slang.export import write
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
number = int(sys.argv.pop())
encode = write.encode
def stop(name, *rest):
    if "blk.3" in name:
        os.kill(os.getpid(), number)
    yield from encode(name, *rest)
write.encode = stop
errors.program("slang.export.command")
"""
    done = run(sys.executable, "-c", stopping, folder, "--type", "q8_0", "bf16", str(int(number)))
    assert (done.returncode, done.stderr.count("\n")) == (128 + number, 1), done.stderr
    assert done.stderr.startswith("Stopped")
    assert sorted(folder.iterdir()) == before
    assert (folder / "model-BF16.gguf").read_text() == "the last export"


def test_refuses_when_the_disk_is_full(tmp_path: Path, monkeypatch) -> None:
    folder = random_model(tmp_path / "model", tied=True)
    full = shutil._ntuple_diskusage(10**9, 10**9, 5_000_000)
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: full)
    with pytest.raises(UserError, match=r": 8 MB needed, 5 MB free; make room or ask for fewer"):
        command.main([str(folder), "--type", "bf16"])
    assert not list(folder.glob("*.gguf"))


# -------------------------------------------------------------------------------------- --check


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An F32 file of the tiny model, without an adapter."""
    folder = copy(ROOT / TINY, tmp_path_factory.mktemp("asked"))
    (folder / "prompt.toml").write_text(PROMPT, encoding="utf-8")
    (path,) = write.export(folder, ["f32"], "tiny")
    return path


WHOLE = "not a whole GGUF file of type f32, f16, bf16, q8_0, q4_0, q4_k_m, q5_k_m, q6_k"
WRONG_FILES = {
    "none": (None, "not there; run ./fuse.sh, which writes it"),
    "text": (b"# mae\n", "not a GGUF file; name one"),
    "empty": (b"", "not a GGUF file; name one"),
    "half": (0.5, WHOLE),
    "head": (16, WHOLE),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_another_file_is_refused_before_mlx_computes(
    case: str, exported: Path, tmp_path: Path, monkeypatch
) -> None:
    content, message = WRONG_FILES[case]
    path = tmp_path / "x.gguf"
    if isinstance(content, float):
        content = int(content * exported.stat().st_size)
    if isinstance(content, int):
        content = exported.read_bytes()[:content]
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr("slang.export.reference.Reference", None)
    with pytest.raises(UserError) as error:
        command.main(["--check", str(path)])
    assert str(error.value).startswith(f"{path}: {message}")


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        command.main(["--check", str(tmp_path)])
    assert str(error.value) == f"{tmp_path}: a folder; name one of the .gguf files in it"


def test_a_file_without_its_model_names_the_flag(exported: Path, tmp_path: Path) -> None:
    path = shutil.copy(exported, tmp_path / "x.gguf")
    with pytest.raises(UserError, match=r"no model there; name the fused model .* with --model"):
        command.main(["--check", str(path)])


def test_usage(capsys) -> None:
    for arguments in (
        [],
        ["folder", "--check", "file"],
        ["folder", "--type", "q3_k"],
        ["--fused-path", "folder"],
        ["--check", "file", "--questions", "0"],
    ):
        with pytest.raises(SystemExit) as stopped:
            command.main(arguments)
        assert stopped.value.code == 2


def test_what_the_reader_trips_over_is_one_line(exported: Path, tmp_path: Path) -> None:
    """Each of the first bytes set to 255, one at a time."""
    whole = bytearray(exported.read_bytes()[:2000])
    for n in range(4, 100):
        path = tmp_path / "x.gguf"
        path.write_bytes(whole[:n] + b"\xff" + whole[n + 1 :])
        with pytest.raises(UserError, match=WHOLE):
            read_fields(path)


def test_a_row_that_is_no_whole_block_has_a_type_to_fall_back_to() -> None:
    for kind, (_, type) in weights.TYPES.items():
        found = weights.tensor_type("blk.0.attn_k.weight", (256, 1152), kind, 26, True)
        assert found == weights.FALLBACK.get(type, type)
