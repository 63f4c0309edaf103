"""The exported files, in llama.cpp on loopback against MLX, with a small adapter of the tiny model.

Byte for byte against llama-quantize: its digests stand below. To work them out again, put
llama.cpp's libraries into a folder (npm pack @node-llama-cpp/linux-x64 has them) and set
LLAMA_LIBRARIES to it.
"""

import hashlib
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, run
from exporting import (
    MUTATIONS,
    copy,
    edit_weights,
    make_reference,
    one_thread,
    random_model,
    train_and_fuse,
)

from slang.export.check import Comparison, check, table
from slang.export.llama import LlamaCpp, greedy_chat
from slang.export.reference import Reference
from slang.export.weights import TYPES
from slang.export.write import export

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("export")]


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_and_fuse(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def files(fused: Path) -> dict[str, Path]:
    """One file of every type."""
    return dict(zip(TYPES, export(fused, list(TYPES), "tiny"), strict=True))


@pytest.fixture(scope="module")
def reference(fused: Path) -> Reference:
    return make_reference(fused)


def failed(rows: list[Comparison]) -> list[str]:
    return [row.figure for row in rows if not row.ok]


@pytest.mark.parametrize("kind", TYPES)
def test_file_answers_as_mlx(kind: str, files: dict[str, Path], reference: Reference) -> None:
    rows = check(files[kind], reference)
    assert not failed(rows), table(files[kind], rows)


def test_check_as_a_command_through_a_proxy_that_is_not_there(
    fused: Path, files: dict[str, Path]
) -> None:
    command = [sys.executable, "-m", "slang.export", "--check", files["f32"]]
    data = fused.parent / "data"
    proxy = {"http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    done = run(*command, "--data", data, **one_thread(), **proxy)
    assert done.returncode == 0, done.stderr + done.stdout
    assert re.search(r"chats cut into the same tokens +(\d+) +\1 +all  ok", done.stdout)
    figure = r"next-token logprobs, up to 48 tokens \(\d+\) +0\.0\d+ off +0.02  ok"
    assert re.search(figure, done.stdout)
    assert "FAILED" not in done.stdout


@pytest.mark.parametrize("name", MUTATIONS)
def test_check_catches(
    name: str, fused: Path, reference: Reference, tmp_path: Path, monkeypatch
) -> None:
    mutate, figure = MUTATIONS[name]
    folder = copy(fused, tmp_path)
    with monkeypatch.context() as patch:
        mutate(patch)
        (path,) = export(folder, ["f32"], "wrong")
    assert any(row.startswith(figure) for row in failed(check(path, reference)))


# ------------------------------------------------------------------------------- llama-quantize


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
    kinds = [kind for kind in TYPES if kind != "f32"]
    paths = export(random_model(tmp_path / "random", tied), ["f32", *kinds], "random")
    for path in paths[1:]:
        close_to(paths[0], path)
    if "LLAMA_LIBRARIES" in os.environ:
        theirs = {kind: digest(llama_quantize(paths[0], kind)) for kind in kinds}
        assert theirs == DIGESTS.get(tied), theirs
    if platform.machine() == "x86_64":
        assert {kind: digest(path) for kind, path in zip(kinds, paths[1:], strict=True)} == DIGESTS[
            tied
        ]


def close_to(original: Path, path: Path) -> None:
    """Every tensor, dequantised, is the original but for half a step of 4 bits over 0.2."""
    exact = {tensor.name: tensor.data for tensor in gguf.GGUFReader(original).tensors}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.abs(values - exact[tensor.name]).max() < 0.015, tensor.name


def llama_quantize(path: Path, kind: str) -> Path:
    """llama.cpp's own quantiser, in a process: its libraries have the symbols of xllamacpp's."""
    out = path.with_name(f"llama-{kind}.gguf")
    script = """
import ctypes, sys
from pathlib import Path
folder, source, target, file_type = sys.argv[1:]
for name in ("libggml-base", "libggml.", "libllama."):
    (path,) = Path(folder).glob(name + "*so")
    library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
class Params(ctypes.Structure):  # llama.h, llama_model_quantize_params: two numbers matter
    _fields_ = [("nthread", ctypes.c_int32), ("ftype", ctypes.c_int32),
                ("rest", ctypes.c_byte * 248)]
library.llama_model_quantize_default_params.restype = Params
params = library.llama_model_quantize_default_params()
params.nthread, params.ftype = 1, int(file_type)
sys.exit(library.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))
"""
    command = [
        sys.executable,
        "-c",
        script,
        os.environ["LLAMA_LIBRARIES"],
        path,
        out,
        int(TYPES[kind][0]),
    ]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return out


# ------------------------------------------------------------------------------------- the files


def test_lm_head_equal_to_the_embedding_is_dropped(tmp_path: Path) -> None:
    folder = random_model(tmp_path / "model", tied=True)
    edit_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 0}))
    (path,) = export(folder, ["bf16"], "model")
    assert "output.weight" not in {tensor.name for tensor in gguf.GGUFReader(path).tensors}


def test_bf16_and_f16_weights_are_copied(tmp_path: Path) -> None:
    folder = random_model(tmp_path / "model", tied=True)
    for kind, dtype in (("bf16", mx.bfloat16), ("f16", mx.float16)):
        edit_weights(
            folder,
            lambda w, dtype=dtype: w.update(
                {name: array.astype(dtype) for name, array in w.items()}
            ),
        )
        (path,) = export(folder, [kind], "model")
        weights = mx.load(str(folder / "model.safetensors"))
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        ours = tensors["blk.3.ffn_up.weight"].data.tobytes()
        assert (
            ours == np.array(weights["model.layers.3.mlp.up_proj.weight"].view(mx.uint16)).tobytes()
        )


def test_modelfile_renders_as_the_chat_template(
    files: dict[str, Path], reference: Reference
) -> None:
    """What Ollama, which can't be run here, reads between triple quotes, filled in."""
    text = files["f32"].with_name("Modelfile").read_text(encoding="utf-8")
    template, system = re.search(
        r'TEMPLATE """(.*?)"""\nSYSTEM """(.*)"""\nPARAMETER stop "(.*)"\n', text, re.DOTALL
    ).groups()[:2]
    first = (
        template.split("{{ .Response }}")[0]
        .replace("{{ if .System }}", "")
        .replace("{{ end }}", "")
    )
    rendered = first.replace("{{ .System }}", system).replace("{{ .Prompt }}", "¿Qué es mae?")
    assert rendered == reference.render(reference.prompt.chat("¿Qué es mae?"))
    assert f"FROM ./{files['q6_k'].name}\n" in text
    assert 'PARAMETER stop "<end_of_turn>"\nPARAMETER temperature 0\n' in text


def test_chat_sh_asks_the_file(fused: Path, files: dict[str, Path], reference: Reference) -> None:
    asked = reference.prompt
    question = asked.questions[0].replace("{slang}", "mae")
    done = run(ROOT / "chat.sh", "--gguf", files["f32"], "mae", VENV=sys.prefix)
    assert done.returncode == 0, done.stderr
    reply = LlamaCpp(files["f32"]).request("/v1/chat/completions", greedy_chat(question))
    assert done.stdout == reply["choices"][0]["message"]["content"].strip() + "\n"
