"""GGUF files that can't be used as a base model: one line each, and nothing half made."""

import errno
from pathlib import Path

import numpy as np
import pytest
from gguf import TokenType
from gguf_files import drop, export_tiny, put, rewritten

from slang.errors import UserError
from slang.models import from_gguf
from slang.models.find import typed

pytestmark = pytest.mark.xdist_group("from_gguf")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model as a GGUF file of two types."""
    return export_tiny(tmp_path_factory.mktemp("exported") / "model", ["f32", "q8_0"])


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
    "adapter": (
        {"change": put("general.type", "adapter")},
        f"not a model but of type 'adapter'; {WANTED}",
    ),
    "split": (
        {"change": put("split.count", 3)},
        "one of 3 parts; join them with llama-gguf-split --merge",
    ),
    "vision": ({"add": "v.patch_embd.weight"}, f"a model that sees pictures too; {WANTED}"),
    "too many": (
        {"add": "blk.0.attn_bias.weight"},
        f"tensor blk.0.attn_bias.weight is not one of a Gemma 3 text model; {WANTED}",
    ),
    "too few": (
        {"leave_out": "blk.3.ffn_up.weight"},
        f"tensor blk.3.ffn_up.weight is missing; {AGAIN}",
    ),
    "no embedding": (
        {"leave_out": "token_embd.weight"},
        f"tensor token_embd.weight is missing; {AGAIN}",
    ),
    "no sizes": ({"change": drop("gemma3.block_count")}, f"gemma3.block_count is None; {AGAIN}"),
    "a size that is no number": (
        {"change": put("gemma3.attention.head_count", "2")},
        f"gemma3.attention.head_count is '2'; {AGAIN}",
    ),
    "a size that is not whole": (
        {"change": put("gemma3.block_count", 6.5)},
        f"gemma3.block_count is 6.5; {AGAIN}",
    ),
    "more layers than any file has": (
        {"change": put("gemma3.block_count", 2**31 - 1)},
        f"gemma3.block_count is 2147483647, of 80 tensors; {AGAIN}",
    ),
    "infinity": (
        {"change": put("gemma3.rope.freq_base", float("inf"))},
        f"gemma3.rope.freq_base is inf; {AGAIN}",
    ),
    "shape": (
        {"change": put("gemma3.feed_forward_length", 64)},
        f"blk.0.ffn_gate.weight is (128, 256), its metadata ask for (64, 256); {AGAIN}",
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


def test_a_merged_file_is_whole(exported: dict[str, Path], tmp_path: Path) -> None:
    """llama-gguf-split --merge writes that it has 0 parts."""
    path = rewritten(exported["f32"], tmp_path / "m.gguf", put("split.count", 0))
    assert from_gguf.folder_of(path, tmp_path).name == "m"


def test_an_unknown_type_of_token_is_one_line(exported: dict[str, Path], tmp_path: Path) -> None:
    def change(metadata: dict) -> None:
        metadata["tokenizer.ggml.token_type"][900] = 99

    path = rewritten(exported["f32"], tmp_path / "m.gguf", change)
    with pytest.raises(UserError) as refused:
        from_gguf.folder_of(path, tmp_path)
    assert str(refused.value).startswith(f"{path}: a GGUF file that is broken (ValueError")
    assert not list(tmp_path.glob("models/*/[!.]*"))


def test_a_disk_that_is_full_is_not_a_broken_file(
    exported: dict[str, Path], tmp_path: Path, monkeypatch
) -> None:
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(from_gguf, "write_weights", full)
    with pytest.raises(UserError) as refused:
        from_gguf.folder_of(exported["f32"], tmp_path)
    assert str(refused.value) == "No space left on device; make room and run this again"


def test_a_folder_whose_source_is_not_known_is_made_anew(
    exported: dict[str, Path], tmp_path: Path
) -> None:
    """A power cut can leave an empty file."""
    folder = from_gguf.folder_of(exported["f32"], tmp_path)
    (folder / "source.json").write_bytes(b"")
    assert from_gguf.folder_of(exported["f32"], tmp_path) == folder
    assert typed(folder) == str(exported["f32"])


def test_what_a_killed_run_left_is_not_taken_for_the_model(
    exported: dict[str, Path], tmp_path: Path
) -> None:
    folder = from_gguf.folder_of(exported["f32"], tmp_path)
    folder.rename(folder.with_name(f".{folder.name}.x.part"))
    assert from_gguf.folder_of(exported["f32"], tmp_path) == folder


@pytest.mark.parametrize("length", [3, 4, 20, 100, 5000, 60_000, 1_000_000])
def test_a_file_that_is_cut_off(length: int, exported: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(exported["f32"].read_bytes()[:length])
    with pytest.raises(UserError, match=r"not a GGUF file|broken or cut off"):
        from_gguf.folder_of(path, tmp_path)


def test_damaged_bytes_never_end_in_a_traceback(
    exported: dict[str, Path], tmp_path: Path, seed: int
) -> None:
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
