"""The real Gemma 3 270M, as it is imported, beside llama.cpp on the original file.

`./test.sh --quick` leaves this out.
"""

import os
import shutil
import sys
from pathlib import Path

import mlx_lm
import numpy as np
import pytest
from conftest import ROOT, run
from tokenizers import Tokenizer

from slang.errors import UserError
from slang.export.check import KL_LIMIT, LOGIT_LIMIT, compare_next, next_tokens
from slang.export.llama import SLOTS, LlamaCpp
from slang.models import from_gguf, gemma_270m

sys.path.insert(0, str(ROOT / "benchmarks"))
import real_gemma

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("real")]

MAY_DIFFER = {
    "general.name",  # gemma-3-270m, as the folder is called
    "general.finetune",
    "general.base_model.count",
    "general.base_model.0.name",
    "gemma3.rope.freq_base_swa",  # the original leaves it to llama.cpp
    "tokenizer.chat_template",  # the original has none
    "tokenizer.ggml.eot_token_id",
}


@pytest.fixture(scope="module")
def original() -> Path:
    try:
        return gemma_270m.gguf_file(ROOT / ".cache")
    except UserError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def folder(original: Path) -> Path:
    return gemma_270m.folder(ROOT / ".cache")


@pytest.fixture(scope="module")
def llama_cpp(original: Path) -> LlamaCpp:
    return LlamaCpp(original, n_ctx=1024, slots=SLOTS, gpu=False)


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    kinds = ["f32", "bf16", "q4_k_m"]
    place = tmp_path_factory.mktemp("real")
    yield dict(zip(kinds, real_gemma.export(folder, place / "model", kinds), strict=True))
    shutil.rmtree(place)  # 3 GB


def test_tokens_are_those_of_llama_cpp(folder: Path, llama_cpp: LlamaCpp) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    _, wrapped = mlx_lm.load(str(folder), lazy=True)
    kinds = real_gemma.texts(sorted(tokenizer.get_vocab())) | {
        "whole chats": real_gemma.chats(wrapped)
    }
    assert sum(map(len, kinds.values())) >= 20_000
    equal = {
        kind: real_gemma.tokens_equal(llama_cpp, tokenizer, some) for kind, some in kinds.items()
    }
    assert equal == {kind: len(some) for kind, some in kinds.items()}


def test_next_token_is_that_of_llama_cpp(
    folder: Path, llama_cpp: LlamaCpp, exported: dict[str, Path]
) -> None:
    """Of the original file but for what llama.cpp rounds; of an F32 file of it exactly."""
    _, wrapped = mlx_lm.load(str(folder), lazy=True)
    some = real_gemma.contexts(wrapped)
    ours = real_gemma.logprobs(folder, some)
    _, kls = compare_next(next_tokens(llama_cpp, some, 256), ours)
    assert kls.mean() < 0.02
    exact = LlamaCpp(exported["f32"], n_ctx=1024, slots=SLOTS, gpu=False, exact=True)
    differences, kls = compare_next(next_tokens(exact, some, 256), ours)
    in_chats, _ = KL_LIMIT["f32"]
    assert np.abs(kls).mean() < in_chats
    assert differences.max() < LOGIT_LIMIT


def test_export_is_the_original(original: Path, exported: dict[str, Path]) -> None:
    n_tensors, alike, same = real_gemma.equal_tensors(original, exported["q4_k_m"])
    assert n_tensors == alike == 236
    assert same >= 200
    different = {key for key, *_ in real_gemma.different_metadata(original, exported["q4_k_m"])}
    assert different <= MAY_DIFFER


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_exported_and_imported_again(
    kind: str, folder: Path, exported: dict[str, Path], tmp_path: Path
) -> None:
    again = from_gguf.folder_of(exported[kind], tmp_path)
    n_tensors, equal = real_gemma.same_weights(folder, again)
    assert n_tensors == equal == 236


def test_it_writes_spanish(folder: Path) -> None:
    options = {"MODEL": "gemma-3-270m", "VENV": sys.prefix}
    done = run("./chat.sh", "--baseline", "--max-tokens", "20", "¿Qué es Costa Rica?", **options)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.lower().split()) & {"de", "la", "que", "el", "en", "una"}
