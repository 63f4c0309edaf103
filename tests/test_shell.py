"""The wrappers: which commands they build (a stub in place of mlx_lm), and the real mlx_lm on models/tiny-gemma3."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, run, script

from slang import prompt
from slang.dictionary import entries

pytestmark = pytest.mark.slow

WRAPPERS = ["train.sh", "evaluate.sh", "chat.sh", "fuse.sh"]
QUESTION = 'Qué significa en Costa Rica "{}"?'


def some_slangs() -> dict[str, list[str]]:
    """Two wordings each of pura vida and of five other slangs whose sentences the tiny model was pre-trained on."""
    found: dict[str, list[str]] = {"pura vida": []}
    for entry in entries(ROOT / "data/demo.txt"):
        if entry.slang in found or len(found) < 6:
            found.setdefault(entry.slang, []).append(entry.meaning)
    return {slang: meanings[:2] for slang, meanings in found.items()}


SLANGS = some_slangs()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with the four splits of six slangs, two wordings each in several question forms."""
    folder = tmp_path_factory.mktemp("data")
    text = "".join(f"{slang}::{meaning}\n" for slang, meanings in SLANGS.items() for meaning in meanings)
    (folder / "source.txt").write_text(text, encoding="utf-8")
    made = script("make_jsonl.py", "--input", folder / "source.txt", "--output", folder / "all.jsonl", "--forms", "all")
    assert made.returncode == 0, made.stderr
    outputs = [part for name in ("train", "valid", "test", "eval") for part in (f"--{name}", folder / f"{name}.jsonl")]
    # Seed 1 leaves the first wording of pura vida in train.
    done = script(
        "split_jsonl.py",
        "--input",
        folder / "all.jsonl",
        *outputs,
        "--train-ratio",
        "0.5",
        "--valid-ratio",
        "0.25",
        "--seed",
        "1",
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def stub(tmp_path) -> Path:
    """A .venv whose mlx_lm commands print their arguments, one a line, and do nothing else."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    commands = dict.fromkeys(("mlx_lm.lora", "mlx_lm.generate", "mlx_lm.fuse"), 'printf "%s\\n" "$0" "$@"; cat')
    python = f'case "$2" in slang.chat) printf "%s\\n" "$@" ;; *) exec "{sys.executable}" "$@" ;; esac'
    for name, body in {**commands, "python": python}.items():
        command = venv / "bin" / name
        command.write_text(f"#!/bin/sh\n{body}\n")
        command.chmod(0o755)
    lines = sorted(set((ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()))
    (venv / "installed-for.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return venv


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A folder that looks like an adapter's, with a prompt of its own."""
    folder = tmp_path / "an adapter"
    folder.mkdir()
    (folder / "adapters.safetensors").write_bytes(b"\2" + bytes(7) + b"{}")
    (folder / "adapter_config.json").write_text('{"num_layers": -1, "lora_parameters": {}}')
    text = (ROOT / "prompt.toml").read_text(encoding="utf-8").replace("Sos una persona", 'Sos $(touch x) `y` \\\\ \\"z\\"')
    (folder / "prompt.toml").write_text(text, encoding="utf-8")
    return folder


def flags_of(stdout: str) -> dict[str, str]:
    """The command line that a stub printed: the last value of each flag."""
    parts = stdout.splitlines()
    pairs = [(a, b) if "=" not in a else a.split("=", 1) for a, b in zip(parts, [*parts[1:], ""], strict=True)]
    return {a: b for a, b in pairs if a.startswith("--")}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_help_is_the_header(wrapper):
    done = run(ROOT / wrapper, "--help", cwd=Path("/"), VENV="/nowhere")
    assert done.returncode == 0 and f"./{wrapper}" in done.stdout and done.stderr == ""


def test_train_command(stub, data, tmp_path):
    done = run(ROOT / "train.sh", "--iters", "7", "--batch-size", "2", cwd=tmp_path, ENGINE="mlx_lm",
               VENV=str(stub), MODEL=TINY, DATA=str(data), ADAPTER_PATH=str(tmp_path / "out"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    flags = flags_of(done.stdout)
    assert done.stdout.splitlines()[1] == "--train" and "--mask-prompt" in flags
    assert (flags["--iters"], flags["--batch-size"]) == ("7", "2")  # the last one wins
    assert (flags["--steps-per-eval"], flags["--save-every"], flags["--model"]) == ("40", "50", TINY)
    assert (tmp_path / "out" / "prompt.toml").read_bytes() == (ROOT / "prompt.toml").read_bytes()


def test_chat_asks_with_the_adapters_prompt(stub, adapter):
    done = run(ROOT / "chat.sh", "pura vida", VENV=str(stub), MODEL=TINY, ADAPTER_PATH=str(adapter))
    assert done.returncode == 0, done.stderr
    flags = flags_of(done.stdout)
    assert "/mlx_lm.generate" in done.stdout and flags["--adapter-path"] == str(adapter)
    assert flags["--system-prompt"] == prompt.load(adapter / "prompt.toml").system
    assert done.stdout.splitlines()[-1] == QUESTION.format("pura vida")
    assert not (ROOT / "x").exists()


def test_chat_question_baseline_flags_and_conversation(stub, adapter):
    def chat(*arguments):
        done = run(ROOT / "chat.sh", *arguments, VENV=str(stub), MODEL=TINY, ADAPTER_PATH=str(adapter))
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert chat("¿Qué es \\n un mae?").endswith("¿Qué es \\n un mae?")
    baseline = chat("--baseline", "mae", "--temp", "0.7")
    assert "--adapter-path" not in baseline and flags_of(baseline)["--temp"] == "0.7"
    assert chat().startswith("-m\nslang.chat\n") and "--prompt" not in flags_of(chat())


@pytest.mark.skipif(sys.platform != "linux", reason="MLX has its own BLAS elsewhere")
def test_openblas_is_the_blas_in_use():
    code = """
import ctypes, re
address = ctypes.cast(ctypes.CDLL(None).cblas_sgemm, ctypes.c_void_p).value
for line in open("/proc/self/maps"):
    low, high = (int(n, 16) for n in re.match("(.*?)-(.*?) ", line).groups())
    if low <= address < high:
        print(line.split()[-1])
"""
    done = run("bash", "-c", '. ./config.sh; need_venv; project python -c "$0"', code)
    assert done.returncode == 0 and done.stdout.strip().endswith("/libcblas-openblas.so"), done.stderr


# ------------------------------------------------------------------------------------------ the real mlx_lm, tiny model


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> dict[str, str]:
    """The environment of an adapter trained on the six slangs, with what train.sh printed under "log"."""
    folder = tmp_path_factory.mktemp("run")
    environment = {"MODEL": TINY, "DATA": str(data), "ADAPTER_PATH": str(folder / "adapter"),
                   "FUSED_PATH": str(folder / "fused"), "RESULTS": str(folder / "results")}  # fmt: skip
    done = run(ROOT / "train.sh", "-c", f"{TINY}/lora.yaml", "--learning-rate", "1e-3", "--iters", "120", "--batch-size", "8",
               "--everyday", "", "--steps-per-report", "40", **environment)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "log").write_text(done.stdout, encoding="utf-8")
    return environment


@pytest.mark.xdist_group("tiny")
def test_training_lowers_the_loss(trained):
    log = (Path(trained["ADAPTER_PATH"]).parent / "log").read_text(encoding="utf-8")
    losses = [float(n) for n in re.findall(r"^ *\d+ +(\d\.\d+)", re.sub(r"\x1b\[[0-9;]*m", "", log), re.MULTILINE)]
    assert len(losses) >= 3 and losses[-1] < losses[0] / 2


@pytest.mark.xdist_group("tiny")
def test_evaluate_compares_and_logs(trained):
    done = run(ROOT / "evaluate.sh", "--note", "a note", **trained)
    assert done.returncode == 0, done.stderr
    figures = re.findall(r"Test loss ([\d.]+), Test ppl ([\d.]+)\.", done.stdout)
    assert len(figures) == 2
    results = Path(trained["RESULTS"])
    (report,) = results.glob("*.json")
    assert re.fullmatch(r"\d{8}\[A\]", report.stem)
    saved = json.loads(report.read_text(encoding="utf-8"))
    assert saved["entries"]["slangs"] == 6 and len(saved["items"]) == 6
    for who in ("baseline", "adapted"):  # mlx_lm's own number, recomputed in our pass
        printed = float(re.search(r"loss ([\d.]+)", saved["test"][who]["printed"])[1])
        assert saved["test"][who]["recomputed"] == pytest.approx(printed, abs=6e-4)
    log = (results / "LOG.md").read_text(encoding="utf-8")
    for heading, (loss, ppl) in zip(("## Baseline", "## After fine-tuning"), figures, strict=True):
        assert f"{heading}\n\n- {report.stem}: `Test loss {loss}, Test ppl {ppl}.` (a note)\n" in log
    assert f"\n| {report.stem} | a note | {TINY} | 6 | " in log and report.with_suffix(".html").exists()

    again = run(ROOT / "evaluate.sh", "--fail-if-worse", "--output", results / "again.json", **trained)
    verdict = json.loads((results / "again.json").read_text(encoding="utf-8"))["verdict"]
    assert again.returncode == (3 if verdict in ("worse", "mixed") else 0), again.stderr
    same = run(ROOT / "evaluate.sh", "--compare", report.stem.replace("[", "").replace("]", ""), "again", **trained)
    assert same.returncode == 0 and "Same data, prompt, base model and questions." in same.stdout


@pytest.mark.xdist_group("tiny")
def test_chat_answers_once_as_trained_and_the_fused_model_too(trained):
    question = QUESTION.format("pura vida")
    answer = run(ROOT / "chat.sh", question, **trained)
    assert answer.returncode == 0 and len(answer.stdout.splitlines()) == 1, answer.stderr
    assert answer.stdout.strip() in SLANGS["pura vida"]
    baseline = run(ROOT / "chat.sh", "--baseline", question, **trained)
    assert baseline.returncode == 0 and baseline.stdout != answer.stdout

    left = run(ROOT / "chat.sh", stdin="pura vida\n", **trained)  # what follows is the end of the input, as by Ctrl-D
    assert left.returncode == 0 and "Traceback" not in left.stderr, left.stderr

    fused = run(ROOT / "fuse.sh", **trained)
    assert fused.returncode == 0, fused.stderr
    assert (Path(trained["FUSED_PATH"]) / "prompt.toml").exists()
    again = run(ROOT / "chat.sh", question, MODEL=trained["FUSED_PATH"], ADAPTER_PATH="")
    assert again.stdout == answer.stdout


@pytest.mark.xdist_group("tiny")
def test_data_is_what_mlx_lm_reads(data):
    from types import SimpleNamespace

    from mlx_lm.tuner.datasets import load_local_dataset
    from mlx_lm.utils import load

    _, tokenizer = load(str(ROOT / TINY))
    train, valid, test = load_local_dataset(data, tokenizer, SimpleNamespace(mask_prompt=True))
    assert len(train) and len(valid) and len(test)
    tokens, offset = train.process(train[0])
    text = tokenizer.decode(tokens)
    assert text.count("<bos>") == 1 and text.count("<start_of_turn>") == text.count("<end_of_turn>") == 2
    assert tokenizer.decode(tokens[offset:]).startswith(train[0]["meaning"])


def test_wrappers_run_under_bash_3_2():
    """macOS ships bash 3.2 and BSD tools."""
    for path in [*ROOT.glob("*.sh"), ROOT / ".ci" / "run"]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\b(mapfile|readarray|declare -A|readlink -f|grep -[a-zA-Z]*P)\b|\$\{\w+(,,|\^\^)\}", text), path
    assert shutil.which("bash")
