"""fuse.sh on the tiny model: the old folder is replaced by a whole new one, or stays as it was."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import ROOT, TINY, run
from exporting import edit, train

from slang.errors import UserError
from slang.export import command, write
from slang.export import fuse as fusing
from slang.export.fuse import name_of

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("export")]

MODEL_FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "fused.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "prompt.toml",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return train(tmp_path_factory.mktemp("fuse"))


@pytest.fixture
def variables(trained: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Those of `trained`, with a place of its own for the fused model."""
    return {**trained, "FUSED_PATH": str(tmp_path / "fused")}


def fuse(variables: dict[str, str], *flags: str, **changes: str | Path):
    changed = {name: str(value) for name, value in changes.items()}
    return run(ROOT / "fuse.sh", *flags, **{**variables, **changed})


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refused(done, message: str, code: int = 1) -> None:
    """One line beside the command that the wrapper shows."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("+ ", "usage: "))]
    assert (done.returncode, len(lines)) == (code, 1), done.stderr
    assert message in lines[0]


def spoilt_adapter(trained: dict[str, str], folder: Path) -> Path:
    """The adapter with NaN in it, as a training at too high a rate leaves one."""
    adapter = Path(shutil.copytree(trained["ADAPTER_PATH"], folder / "spoilt"))
    path = adapter / "adapters.safetensors"
    weights = {name: values + 0 for name, values in mx.load(str(path)).items()}
    name = max(weights)
    weights[name] = mx.full(weights[name].shape, float("nan"))
    mx.save_safetensors(str(path), weights)
    return adapter


def test_a_whole_folder(variables: dict[str, str]) -> None:
    done = fuse(variables)
    assert done.returncode == 0, done.stderr
    fused = Path(variables["FUSED_PATH"])
    ggufs = {f"tiny-gemma3-slang-{kind}.gguf" for kind in ("BF16", "Q4_K_M")}
    assert {path.name for path in fused.iterdir()} == MODEL_FILES | ggufs | {"Modelfile"}
    assert [path.name for path in fused.parent.iterdir()] == ["fused"]  # no part, no lock
    made_of = json.loads((fused / "fused.json").read_text(encoding="utf-8"))
    assert made_of == {"model": TINY, "adapter": variables["ADAPTER_PATH"]}
    assert "FROM ./tiny-gemma3-slang-Q4_K_M.gguf\n" in (fused / "Modelfile").read_text("utf-8")
    for name in ggufs:
        assert f"{fused / name}\n" in done.stdout
    assert "FAILED" not in done.stdout and ".part" not in done.stdout + done.stderr
    # The questions are about what the adapter was trained on: 24 slangs in 3 forms.
    assert re.search(r"chats cut into the same tokens +72 +72 ", done.stdout)


def test_the_model_is_the_one_that_mlx_lm_fuse_writes(
    variables: dict[str, str], tmp_path: Path
) -> None:
    command = Path(sys.executable).parent / "mlx_lm.fuse"
    flags = ["--model", TINY, "--adapter-path", variables["ADAPTER_PATH"]]
    theirs = run(command, *flags, "--save-path", tmp_path / "theirs", OPENBLAS_NUM_THREADS="1")
    assert theirs.returncode == 0, theirs.stderr
    python = [sys.executable, "-m", "slang.export", *flags, "--no-gguf"]
    ours = run(*python, "--fused-path", tmp_path / "ours", OPENBLAS_NUM_THREADS="1")
    assert ours.returncode == 0, ours.stderr
    written = contents(tmp_path / "ours")
    for name, content in contents(tmp_path / "theirs").items():
        assert written[name] == content, name


def test_what_an_earlier_fuse_left_is_gone(variables: dict[str, str], tmp_path: Path) -> None:
    """Its GGUF files too, which hold another adapter."""
    fused = Path(variables["FUSED_PATH"])
    assert fuse(variables, "--no-gguf").returncode == 0
    for name in ("tiny-gemma3-slang-Q4_K_M.gguf", "model-00001-of-00002.safetensors", ".DS_Store"):
        (fused / name).write_text("earlier")
    done = fuse(variables, "--no-gguf")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in fused.iterdir()} == MODEL_FILES


def test_a_link_leads_to_where_the_model_is_put(variables: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "large disk").mkdir()
    link = Path(variables["FUSED_PATH"])
    link.symlink_to(tmp_path / "large disk/fused")
    assert fuse(variables, "--no-gguf").returncode == 0
    assert link.is_symlink() and (tmp_path / "large disk/fused/fused.json").is_file()


def test_only_what_the_finder_leaves_is_no_model(variables: dict[str, str]) -> None:
    fused = Path(variables["FUSED_PATH"])
    fused.mkdir()
    (fused / ".DS_Store").write_text("")
    assert fuse(variables, "--no-gguf").returncode == 0


@pytest.mark.parametrize(("kind", "flag"), [("adapter", "--no-gguf"), ("model", "--type=q8_0")])
def test_nan_replaces_nothing(
    kind: str, flag: str, variables: dict[str, str], tmp_path: Path
) -> None:
    fused = Path(variables["FUSED_PATH"])
    fused.mkdir()
    for name in ("config.json", "prompt.toml", "model.safetensors"):
        (fused / name).write_text("earlier")
    if kind == "adapter":
        changes = {"ADAPTER_PATH": spoilt_adapter(variables, tmp_path)}
    else:
        changes = {"MODEL": shutil.copytree(ROOT / TINY, tmp_path / "tiny-gemma3")}
        path = str(tmp_path / "tiny-gemma3/model.safetensors")
        weights = {name: values + 0 for name, values in mx.load(path).items()}
        weights["model.norm.weight"] = mx.full(256, float("inf"))
        mx.save_safetensors(path, weights)
    before = contents(tmp_path)
    refused(fuse(variables, *flag.split("="), **changes), "holds NaN or infinity")
    assert contents(tmp_path) == before


def test_a_file_that_answers_otherwise_replaces_nothing(
    variables: dict[str, str], tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(write, "q_scale", lambda args: 0.5)
    fused = Path(variables["FUSED_PATH"])
    fused.mkdir()
    flags = {"--model": TINY, "--adapter-path": variables["ADAPTER_PATH"], "--type": "f32",
             "--fused-path": str(fused), "--data": variables["DATA"]}  # fmt: skip
    with pytest.raises(UserError, match=r"tiny-gemma3-slang-F32.gguf answers otherwise in llama"):
        command.main([part for pair in flags.items() for part in pair])
    assert "FAILED" in capsys.readouterr().out
    assert not list(fused.iterdir()) and [path.name for path in tmp_path.iterdir()] == ["fused"]


def test_two_at_once(variables: dict[str, str], tmp_path: Path) -> None:
    environment = {**os.environ, **variables}
    several = [
        subprocess.Popen([ROOT / "fuse.sh", "--no-gguf"], env=environment, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    told = [process.communicate()[1].decode() for process in several]
    codes = sorted(process.returncode for process in several)
    assert codes == [0, 1] or codes == [0, 0], told  # or one began when the other was done
    if codes == [0, 1]:
        assert sum("another run is fusing there; wait for it" in text for text in told) == 1
    assert {path.name for path in Path(variables["FUSED_PATH"]).iterdir()} == MODEL_FILES
    assert [path.name for path in tmp_path.iterdir()] == ["fused"]


@pytest.mark.parametrize(
    ("number", "moment", "before"),
    [
        (signal.SIGINT, "fuse_model", False),
        (signal.SIGTERM, "export", True),
        (signal.SIGINT, "check_files", True),
    ],
)
def test_stopped_at_any_moment(
    number: int, moment: str, before: bool, variables: dict[str, str], tmp_path: Path
) -> None:
    fused = Path(variables["FUSED_PATH"])
    if before:
        fused.mkdir()
        for name in ("config.json", "prompt.toml"):
            (fused / name).write_text("earlier")
    there = contents(tmp_path)
    stopping = f"""
import os, signal
from slang import errors
from slang.export import fuse
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
do = fuse.{moment}
def stop(*arguments):
    do(*arguments)
    os.kill(os.getpid(), {int(number)})
fuse.{moment} = stop
errors.program("slang.export.command")
"""
    done = run(sys.executable, "-c", stopping, "--model", TINY, "--fused-path", fused, "--type",
               "q8_0", "--adapter-path", variables["ADAPTER_PATH"], "--data", variables["DATA"],
               OPENBLAS_NUM_THREADS="1")  # fmt: skip
    assert done.returncode == 128 + number
    assert done.stderr == f"Stopped; {fused} is as it was\n"
    assert contents(tmp_path) == there and fused.exists() == before


def test_ctrl_c_in_a_terminal(variables: dict[str, str], tmp_path: Path) -> None:
    """The wrapper and what it runs, in the foreground of a terminal of their own."""
    process, terminal = pty.fork()
    if process == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.execve(ROOT / "fuse.sh", ["fuse.sh"], {**os.environ, **variables})
    time.sleep(1.5)
    os.write(terminal, b"\x03")
    shown = b""
    try:
        while piece := os.read(terminal, 4096):
            shown += piece
    except OSError:  # the end of a terminal
        pass
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) in (130, -signal.SIGINT)
    assert b"Traceback" not in shown and b"Stopped" in shown
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------- refused before a weight is read


@pytest.mark.parametrize(
    "name", ["notes.txt", "mine.gguf", "photos/cat.jpg", ".env", "config.json/mine"]
)
def test_what_was_put_there_by_hand_is_not_lost(
    name: str, variables: dict[str, str], tmp_path: Path
) -> None:
    path = Path(variables["FUSED_PATH"]) / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    (path.parents[name.count("/")] / "fused.json").write_text("{}")
    before = contents(tmp_path)
    what = f"holds {name.split('/')[0]}, which fuse.sh did not write; move it away, or set"
    refused(fuse(variables), what)
    assert contents(tmp_path) == before


def test_a_name_that_mlx_lm_takes_for_a_pattern(variables: dict[str, str], tmp_path: Path) -> None:
    what = f"{tmp_path}/g[1]: mlx_lm reads no path with [, * or ? in it; set FUSED_PATH to another"
    refused(fuse(variables, FUSED_PATH=tmp_path / "g[1]"), what)


def test_no_other_model_is_replaced(variables: dict[str, str], tmp_path: Path) -> None:
    base = Path(shutil.copytree(ROOT / TINY, tmp_path / "tiny-gemma3"))
    (base / "lora.yaml").unlink()
    before = contents(tmp_path)
    what = f"{base}: holds a model that fuse.sh did not make; set FUSED_PATH to another folder"
    refused(fuse(variables, FUSED_PATH=base), what)
    shutil.copy(ROOT / "prompt.toml", base)
    what = f"{base}: the base model itself, which would be lost; set FUSED_PATH to another folder"
    refused(fuse(variables, FUSED_PATH=base, MODEL=base), what)
    (base / "prompt.toml").unlink()
    assert contents(tmp_path) == before


def test_a_quantised_model_is_refused_at_once(variables: dict[str, str], tmp_path: Path) -> None:
    base = Path(shutil.copytree(ROOT / TINY, tmp_path / "tiny-gemma3"))
    edit(base / "config.json", quantization={"group_size": 64, "bits": 4})
    for flags in ([], ["--no-gguf"]):
        done = fuse(variables, *flags, MODEL=base)
        refused(done, "the model is quantised; fuse it with ./fuse.sh --dequantize")


def test_a_quantised_model_is_fused_unquantised(variables: dict[str, str], tmp_path: Path) -> None:
    command = Path(sys.executable).parent / "mlx_lm.convert"
    flags = ["--hf-path", TINY, "-q", "--q-bits", "8", "--mlx-path", tmp_path / "tiny-gemma3"]
    made = run(command, *flags, OPENBLAS_NUM_THREADS="1")
    assert made.returncode == 0, made.stderr
    done = fuse(variables, "--dequantize", "--type", "f32", MODEL=tmp_path / "tiny-gemma3")
    assert done.returncode == 0, done.stderr
    config = json.loads((Path(variables["FUSED_PATH"]) / "config.json").read_text("utf-8"))
    assert "quantization" not in config


@pytest.mark.parametrize("place", ["file/fused", "file"])
def test_a_place_that_is_no_folder(place: str, variables: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    done = fuse(variables, FUSED_PATH=tmp_path / place)
    refused(done, f"{tmp_path / place}: not a folder that can be written; set FUSED_PATH to")
    assert contents(tmp_path) == {"file": b"mine"}


def test_data_elsewhere_is_asked_for(variables: dict[str, str], tmp_path: Path) -> None:
    what = "train.jsonl: not there; the check's questions come from it: set DATA"
    refused(fuse(variables, DATA=tmp_path), what)


def test_the_disk_has_to_hold_the_gguf_files_too(
    variables: dict[str, str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(ROOT)
    full = shutil._ntuple_diskusage(10**9, 10**9, 9_000_000)
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: full)
    monkeypatch.setattr(fusing, "fuse_model", None)
    fused = str(tmp_path / "new/fused")
    flags = ["--model", TINY, "--adapter-path", variables["ADAPTER_PATH"], "--fused-path", fused]
    with pytest.raises(UserError) as error:
        command.main([*flags, "--data", variables["DATA"], "--type", "bf16", "q4_k_m"])
    needed = "11 MB needed, 9 MB free; make room or ask for fewer types"  # 6.3, 3.2 and 1.1
    assert str(error.value) == f"{fused}: {needed}"


FUSE = "--fused-path f --model m --adapter-path a"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--type", "argument --type: expected at least one argument"),
        ("--type q3_k", "argument --type: invalid choice: 'q3_k'"),
        ("--type q8_0 Q6_K", "argument --type: invalid choice: 'Q6_K'"),
        ("--junk", "unrecognized arguments: --junk"),
        ("--export-gguf", "unrecognized arguments: --export-gguf"),
        ("--deq", "unrecognized arguments: --deq"),
        ("--answers 0", "argument --answers: '0': give a whole number from 1"),
        ("--name x", "--name: it goes with a folder to export"),
        ("folder", "give a folder to export, --fused-path"),
    ],
)
def test_usage(flags: str, message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main([*FUSE.split(), *flags.split()])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag", ["--model", "--adapter-path=x", "--fused-path", "--data", "--cache"]
)
def test_a_variable_s_flag_is_refused(flag: str, variables: dict[str, str]) -> None:
    name = flag.removesuffix("=x")
    variable = name.removeprefix("--").replace("-", "_").upper()
    what = f"fuse.sh: {name}: set {variable} in its place"
    refused(fuse(variables, flag, "x"), what, code=2)


def test_an_unknown_flag_of_the_wrapper(variables: dict[str, str]) -> None:
    refused(fuse(variables, "--junk"), "unrecognized arguments: --junk", code=2)


def test_names() -> None:
    names = {
        "mlx-community/gemma-3-1b-it-bf16": "gemma-3-1b-it-slang",
        "mlx-community/gemma-3-1b-it-4bit-DWQ": "gemma-3-1b-it-slang",
        "models/tiny-gemma3/": "tiny-gemma3-slang",
        "gemma-3-270m": "gemma-3-270m-slang",
    }
    for model, name in names.items():
        assert name_of(model, Path("hub/snapshots/1234")) == name
    file = str(ROOT / "README.md")  # stands for a .gguf file, of which a folder was made
    assert name_of(file, Path("a/gemma-3-1b-it-Q4_K_M")) == "gemma-3-1b-it-slang"
