"""Models to export: the tiny one with an adapter, one of random weights, ways to spoil them."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, TINY, run

from slang import prompt
from slang.dictionary import entries
from slang.export import vocabulary, write
from slang.export.folder import read_config
from slang.export.reference import Reference, read_answers
from slang.models.layout import expected_shapes

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
    """For a subprocess: threads only wait for each other on so small a model."""
    return {"OPENBLAS_NUM_THREADS": "1"}


def train(folder: Path) -> dict[str, str]:
    """An adapter of the tiny model that knows a few slangs, with a prompt that is hard to quote.

    The variables that fuse.sh finds it by, all below `folder`.
    """
    data, adapter = folder / "data", folder / "adapter"
    asked = folder / "prompt.toml"
    asked.write_text(PROMPT, encoding="utf-8")
    meanings: dict[str, str] = {}
    for entry in entries(ROOT / "data/source_augmented.txt"):
        if len(meanings) < N_SLANGS:
            meanings.setdefault(entry.slang, entry.meaning)
    form = prompt.load(asked)
    rows = [
        {"slang": s, "messages": [*form.ask(s), {"role": "assistant", "content": m}]}
        for s, m in meanings.items()
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data.mkdir()
    for split in ("train", "valid"):
        (data / f"{split}.jsonl").write_text(text, encoding="utf-8")
    flags = "--train --mask-prompt --num-layers -1 --iters 80 --batch-size 8 --learning-rate 1e-3"
    flags += " --val-batches 1 --steps-per-eval 1000 --steps-per-report 20"
    flags += f" -c {TINY}/lora.yaml --model {TINY} --adapter-path {adapter} --data {data}"
    command = Path(sys.executable).parent / "mlx_lm.lora"
    trained = run(command, *flags.split(), **one_thread())
    assert trained.returncode == 0, trained.stderr
    shutil.copy(asked, adapter)
    variables = {"ADAPTER_PATH": adapter, "DATA": data, "FUSED_PATH": folder / "fused_model"}
    fixed = {"MODEL": TINY, "VENV": sys.prefix, "OPENBLAS_NUM_THREADS": "1"}
    return {name: str(path) for name, path in variables.items()} | fixed


def train_and_fuse(folder: Path) -> Path:
    """The fused model of `train`."""
    variables = train(folder)
    done = run(ROOT / "fuse.sh", "--no-gguf", **variables)
    assert done.returncode == 0, done.stderr
    return Path(variables["FUSED_PATH"])


def make_reference(fused: Path, n_questions: int = 24, n_answers: int = 12) -> Reference:
    return Reference(fused, read_answers(fused.parent / "data"), n_questions, n_answers)


def copy(fused: Path, tmp_path: Path) -> Path:
    """A folder with the fused model, to be spoilt."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in fused.iterdir():
        if path.suffix != ".gguf":
            shutil.copy(path, folder)
    return folder


def random_model(folder: Path, tied: bool) -> Path:
    """Random weights in a shape that meets every rule of the mixed types.

    17 layers, rows of 256 values, of 192 and of 64.
    """
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / TINY / name, folder)
    (folder / "prompt.toml").write_text(PROMPT, encoding="utf-8")
    config = json.loads((ROOT / TINY / "config.json").read_text())
    config |= {
        "vocab_size": 2048,
        "num_hidden_layers": 17,
        "num_attention_heads": 1,
        "head_dim": 64,
        "hidden_size": 256,
    }
    config |= {"intermediate_size": 192 if tied else 256, "sliding_window_pattern": 6}
    del config["layer_types"]
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(7)
    weights = {}
    for name, shape in expected_shapes(read_config(folder)).items():
        if name != "lm_head.weight" or not tied:
            weights[name] = mx.array(rng.uniform(-0.1, 0.1, shape).astype(np.float32))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def edit(path: Path, **changes) -> None:
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8"
    )


def edit_weights(folder: Path, change: Callable[[dict], None]) -> None:
    weights = {
        name: array + 0 for name, array in mx.load(str(folder / "model.safetensors")).items()
    }
    change(weights)
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


MUTATIONS: dict[str, tuple[Callable, str]] = {}


def mutation(figure: str) -> Callable:
    """A wrong decision of the write, and the first figure of the table that has to notice it."""

    def register(function: Callable) -> Callable:
        MUTATIONS[function.__name__] = (function, figure)
        return function

    return register


@mutation("next-token logprobs, up to")
def no_one_plus_w(patch: pytest.MonkeyPatch) -> None:
    original = write.encode

    def encode(name, tensor, type, q_scale):
        for piece in original(name, tensor, type, q_scale):
            yield (piece.view(np.float32) - 1).view(np.uint8) if len(tensor.shape) == 1 else piece

    patch.setattr(write, "encode", encode)


def wrong_config(patch: pytest.MonkeyPatch, **wrong: float) -> None:
    original = write.read_config
    patch.setattr(
        write, "read_config", lambda folder: dataclasses.replace(original(folder), **wrong)
    )


@mutation("next-token logprobs, up to")
def wrong_rope_base(patch: pytest.MonkeyPatch) -> None:
    wrong_config(patch, rope_theta=10_000.0)


@mutation("next-token logprobs, up to")
def wrong_local_rope_base(patch: pytest.MonkeyPatch) -> None:
    wrong_config(patch, rope_local_base_freq=1_000_000.0)


@mutation("next-token logprobs, beyond")
def window_off_by_one(patch: pytest.MonkeyPatch) -> None:
    wrong_config(patch, sliding_window=49)


@mutation("next-token logprobs, up to")
def wrong_attention_scale(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(write, "q_scale", lambda args: 0.9)


def as_text(patch: pytest.MonkeyPatch, token: str) -> None:
    original, normal = vocabulary.token_type, gguf.TokenType.NORMAL
    patch.setattr(
        vocabulary,
        "token_type",
        lambda piece, added: normal if piece == token else original(piece, added),
    )


@mutation("chats cut into the same tokens")
def wrong_token_type(patch: pytest.MonkeyPatch) -> None:
    as_text(patch, "<start_of_turn>")


@mutation("chats cut into the same tokens")
def scores_upside_down(patch: pytest.MonkeyPatch) -> None:
    original = write.read_vocabulary

    def read_vocabulary(folder, n_rows):
        read = original(folder, n_rows)
        read.scores = [-score for score in read.scores]
        return read

    patch.setattr(write, "read_vocabulary", read_vocabulary)


def wrong_metadata(patch: pytest.MonkeyPatch, change: Callable[[dict], None]) -> None:
    original = write.metadata

    def metadata(*arguments):
        values = original(*arguments)
        change(values)
        return values

    patch.setattr(write, "metadata", metadata)


# llama.cpp itself puts the next three right, by the name <end_of_turn>, and stops; other programs
# do as the file says.
@mutation("tokens that begin, stop and fill")
def missing_stop_token(patch: pytest.MonkeyPatch) -> None:
    wrong_metadata(patch, lambda values: values.pop("tokenizer.ggml.eot_token_id"))


@mutation("tokens that begin, stop and fill")
def wrong_stop_token(patch: pytest.MonkeyPatch) -> None:
    wrong_metadata(
        patch, lambda values: values.update({"tokenizer.ggml.eot_token_id": 10})
    )  # <start_of_turn>


@mutation("tokens that begin, stop and fill")
def stop_token_as_text(patch: pytest.MonkeyPatch) -> None:
    as_text(patch, "<end_of_turn>")


@mutation("chats with the trained system prompt")
def missing_system_prompt(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(write, "with_system", lambda template, system: template)


@mutation("chats with the trained system prompt")
def missing_modelfile_system(patch: pytest.MonkeyPatch) -> None:
    original = write.modelfile
    patch.setattr(write, "modelfile", lambda file, system: original(file, "Be brief."))
