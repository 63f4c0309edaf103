"""train.sh: one owner for each setting, and a shell that becomes the training."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, run
from training import make_data

from slang import prompt

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("train")]


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """Data, an adapter's folder, and a .venv whose Python is the one that runs this."""
    make_data(tmp_path, prompt.load(ROOT / "prompt.toml").system)
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin/python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    lines += [re.sub(r"\s*#.*", "", line) for line in lines]
    (venv / "installed-for.txt").write_text("\n".join(sorted(set(lines))) + "\n", encoding="utf-8")
    names = {"VENV": venv, "DATA": tmp_path, "ADAPTER_PATH": tmp_path / "a", "MODEL": TINY}
    return {name: str(path) for name, path in names.items()} | {"OPENBLAS_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("flag", "owner"),
    [
        ("--model", "set MODEL"),
        ("--data", "set DATA"),
        ("--adapter-path", "set ADAPTER_PATH"),
        ("--prompt", "edit prompt.toml"),
        ("--engine", "set ENGINE"),
    ],
)
def test_what_has_a_variable_is_no_flag(flag, owner):
    for typed in ([flag, "x"], [f"{flag}=x"]):
        done = run(ROOT / "train.sh", "--iters", "5", *typed, VENV="/nowhere")
        assert done.returncode == 2
        assert done.stderr == f"train.sh: {flag}: {owner} in its place\n"


@pytest.mark.parametrize(
    "flag", ["--resume", "--keep=last", "--early-stop=3", "--stock-loss", "--epochs=3", "--decay"]
)
def test_mlx_lm_is_not_given_what_it_does_not_know(environment, flag):
    done = run(ROOT / "train.sh", flag, ENGINE="mlx_lm", **environment)
    name = flag.split("=")[0]
    said = f"{name}: mlx_lm.lora has no such setting; leave out the flag, or ENGINE=mlx_lm"
    assert done.returncode == 2 and done.stderr.endswith(f"error: {said}\n")
    assert not list(Path(environment["ADAPTER_PATH"]).glob("*"))


def test_a_yaml_file_wins_over_the_wrapper_and_a_flag_over_both(environment, tmp_path):
    (tmp_path / "my.yaml").write_text(
        "iters: 2\nbatch_size: 3\nsave_every: 1\nlearning_rate: 1e-5\neveryday: ''\n"
    )
    typed = ["-c", tmp_path / "my.yaml", "--learning-rate", "3e-5"]
    done = run(ROOT / "train.sh", *typed, **environment)
    assert done.returncode == 0, done.stderr
    assert "2 steps of 3 rows" in done.stdout
    assert "\x1b" not in done.stdout  # a pipe gets no colours
    config = json.loads((tmp_path / "a/adapter_config.json").read_text(encoding="utf-8"))
    found = {name: config[name] for name in ("iters", "batch_size", "learning_rate", "seed")}
    assert found == {"iters": 2, "batch_size": 3, "learning_rate": 3e-5, "seed": 42}
    assert config["bias_correction"] and config["decay"]
    (tmp_path / "my.yaml").write_text("adapter_path: elsewhere\n")
    done = run(ROOT / "train.sh", *typed, **environment)
    said = f"{tmp_path}/my.yaml: adapter_path: take it out; ADAPTER_PATH decides it"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, said)


def test_mlx_lm_trains_with_the_same_flags(environment, tmp_path):
    typed = ["--iters", "2", "--batch-size", "2", "--val-batches", "1"]
    done = run(ROOT / "train.sh", *typed, ENGINE="mlx_lm", **environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a/prompt.toml").read_bytes() == (ROOT / "prompt.toml").read_bytes()
    config = json.loads((tmp_path / "a/adapter_config.json").read_text(encoding="utf-8"))
    assert (config["iters"], config["batch_size"], config["num_layers"]) == (2, 2, -1)
    assert not [path for path in (tmp_path / "a").iterdir() if path.name.startswith(".mlx_lm")]


def test_mlx_lm_that_diverged_changes_nothing(environment, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/adapters.safetensors").write_text("good")
    typed = ["--iters", "6", "--batch-size", "2", "--val-batches", "1", "--learning-rate", "1e20"]
    done = run(ROOT / "train.sh", *typed, ENGINE="mlx_lm", **environment)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith(f"{tmp_path}/a: ")
    assert last.endswith(
        "holds NaN or infinity; the adapter there is as it was; give a lower --learning-rate"
    )
    assert (tmp_path / "a/adapters.safetensors").read_text() == "good"
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"adapters.safetensors", ".lock"}


def test_mlx_lm_wants_a_whole_batch(environment, tmp_path):
    done = run(ROOT / "train.sh", "--batch-size", "700", ENGINE="mlx_lm", **environment)
    what = "fewer than --batch-size 700; mlx_lm.lora wants a whole batch, give a smaller one"
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith(what)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_to_the_wrapper_reaches_the_training(environment, tmp_path, number, code):
    process = subprocess.Popen(
        [ROOT / "train.sh", "--iters", "100000", "--save-every", "1", "--everyday", ""],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "a/resume.safetensors").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == code
    assert f"Stopped by {number.name}, and saved in {tmp_path}/a; " in errors


# ------------------------------------------------------------------------ before the model is read


def in_data(name: str, edit):
    """Another content of a file of DATA; None takes the file away."""

    def change(folder: Path) -> None:
        path = folder / name
        content = edit(path.read_bytes())
        path.unlink()
        if content is not None:
            path.write_bytes(content)

    return change


def other_system(data: bytes) -> bytes:
    return data.replace(b"Sos una persona", b"Eres alguien")


EMPTY = "no record in it; run make_jsonl.py and split_jsonl.py first"
JUNK = (
    "not valid JSON (JSON is malformed: invalid character (byte 0)); "
    "mend it, or write the file again"
)
OTHER = (
    "made with another system prompt than prompt.toml has (and 21 more lines); run make_jsonl.py "
    "and "
)
WRONG = {
    "no data": (
        in_data("train.jsonl", lambda data: None),
        "train.jsonl: not there; run python make_jsonl.py and python split_jsonl.py first",
    ),
    "empty": (in_data("train.jsonl", lambda data: b""), f"train.jsonl: {EMPTY}"),
    "junk": (in_data("valid.jsonl", lambda data: b"mae\n"), f"valid.jsonl:1: {JUNK}"),
    "another prompt": (
        in_data("train.jsonl", other_system),
        f"train.jsonl:1: {OTHER}split_jsonl.py again",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_data_that_is_refused(environment, tmp_path, name):
    change, message = WRONG[name]
    change(tmp_path)
    before = sorted(tmp_path.iterdir())
    done = run(ROOT / "train.sh", **environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{tmp_path}/{message}\n"
    assert sorted(tmp_path.iterdir()) == before


def test_a_place_where_no_adapter_can_be_put(environment, tmp_path):
    done = run(ROOT / "train.sh", **{**environment, "ADAPTER_PATH": ""})
    assert (done.returncode, done.stderr) == (1, "ADAPTER_PATH is empty; set it to a folder\n")
    file = tmp_path / "train.jsonl"
    before = file.read_bytes()
    done = run(ROOT / "train.sh", **{**environment, "ADAPTER_PATH": str(file)})
    told = f"{file}: not a folder that can be written; set ADAPTER_PATH to another\n"
    assert (done.returncode, done.stderr) == (1, told)
    assert file.read_bytes() == before
