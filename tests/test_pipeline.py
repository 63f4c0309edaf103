"""The wrappers one after the other, on the tiny model."""

import json
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, run, script

from slang.dictionary import entries

QUESTION = 'Qué significa en Costa Rica "{}"?'


def some_slangs() -> dict[str, list[str]]:
    """Two wordings each of six slangs whose sentences the tiny model was pre-trained on."""
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
    source, rows = folder / "source.txt", folder / "all.jsonl"
    lines = [f"{slang}::{meaning}\n" for slang, found in SLANGS.items() for meaning in found]
    source.write_text("".join(lines), encoding="utf-8")
    made = script("make_jsonl.py", "--input", source, "--output", rows, "--forms", "all")
    assert made.returncode == 0, made.stderr
    outputs: list[str | Path] = []
    for name in ("train", "valid", "test", "eval"):
        outputs += [f"--{name}", folder / f"{name}.jsonl"]
    # Seed 1 leaves the first wording of pura vida in train.
    shares = ["--train-ratio", "0.5", "--valid-ratio", "0.25", "--seed", "1"]
    done = script("split_jsonl.py", "--input", rows, *outputs, *shares)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> dict[str, str]:
    """The environment of an adapter trained on the six slangs; `log` is what train.sh printed."""
    folder = tmp_path_factory.mktemp("run")
    environment = {
        "MODEL": TINY,
        "DATA": str(data),
        "ADAPTER_PATH": str(folder / "adapter"),
        "FUSED_PATH": str(folder / "fused"),
        "RESULTS": str(folder / "results"),
        "VENV": sys.prefix,
    }
    flags = f"-c {TINY}/lora.yaml --learning-rate 1e-3 --iters 120 --batch-size 8"
    flags += " --steps-per-report 40 --everyday"
    done = run(ROOT / "train.sh", *flags.split(), "", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "log").write_text(done.stdout, encoding="utf-8")
    return environment


@pytest.mark.slow
@pytest.mark.xdist_group("tiny")
def test_training_lowers_the_loss(trained):
    log = (Path(trained["ADAPTER_PATH"]).parent / "log").read_text(encoding="utf-8")
    log = re.sub(r"\x1b\[[0-9;]*m", "", log)
    losses = [float(n) for n in re.findall(r"^ *\d+ +(\d\.\d+)", log, re.MULTILINE)]
    assert len(losses) >= 3 and losses[-1] < losses[0] / 2


@pytest.mark.slow
@pytest.mark.xdist_group("tiny")
def test_evaluate_compares_and_logs(trained):
    done = run(ROOT / "evaluate.sh", "--note", "a note", **trained)
    assert done.returncode == 0, done.stderr
    figures = re.findall(r"Test loss ([\d.]+), Test ppl ([\d.]+)\.", done.stdout)
    assert len(figures) == 2
    results = Path(trained["RESULTS"])
    (report,) = results.glob("*.json")
    assert re.fullmatch(r"\d{8}-A", report.stem)
    saved = json.loads(report.read_text(encoding="utf-8"))
    assert saved["entries"]["slangs"] == 6 and len(saved["items"]) == 6
    for who in ("baseline", "adapted"):  # mlx_lm's own number, recomputed in our pass
        printed = float(re.search(r"loss ([\d.]+)", saved["test"][who]["printed"])[1])
        assert saved["test"][who]["recomputed"] == pytest.approx(printed, abs=6e-4)
    log = (results / "LOG.md").read_text(encoding="utf-8")
    for heading, (loss, ppl) in zip(("## Baseline", "## After fine-tuning"), figures, strict=True):
        row = f"- {report.stem}: `Test loss {loss}, Test ppl {ppl}.` (a note)"
        assert f"{heading}\n\n{row}\n" in log
    assert f"\n| {report.stem} | a note | {TINY} | 6 | " in log
    assert report.with_suffix(".html").exists()

    second = results / "again.json"
    again = run(ROOT / "evaluate.sh", "--fail-if-worse", "--output", second, **trained)
    verdict = json.loads(second.read_text(encoding="utf-8"))["verdict"]
    assert again.returncode == (3 if verdict in ("worse", "mixed") else 0), again.stderr
    same = run(ROOT / "evaluate.sh", "--compare", report.stem, "again", **trained)
    assert same.returncode == 0 and "Same data, prompt, base model and questions." in same.stdout


@pytest.mark.slow
@pytest.mark.xdist_group("tiny")
def test_chat_answers_once_as_trained_and_the_fused_model_too(trained):
    question = QUESTION.format("pura vida")
    answer = run(ROOT / "chat.sh", question, **trained)
    assert answer.returncode == 0 and len(answer.stdout.splitlines()) == 1, answer.stderr
    assert answer.stdout.strip() in SLANGS["pura vida"]
    baseline = run(ROOT / "chat.sh", "--baseline", question, **trained)
    assert baseline.returncode == 0 and baseline.stdout != answer.stdout

    piped = run(ROOT / "chat.sh", stdin="pura vida\n", **trained)
    assert (piped.returncode, piped.stdout) == (0, answer.stdout), piped.stderr

    fused = run(ROOT / "fuse.sh", **trained)
    assert fused.returncode == 0, fused.stderr
    assert (Path(trained["FUSED_PATH"]) / "prompt.toml").exists()
    environment = {**trained, "MODEL": trained["FUSED_PATH"], "ADAPTER_PATH": ""}
    again = run(ROOT / "chat.sh", question, **environment)
    assert again.stdout == answer.stdout


@pytest.mark.slow
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
    assert (
        text.count("<bos>") == 1
        and text.count("<start_of_turn>") == text.count("<end_of_turn>") == 2
    )
    assert tokenizer.decode(tokens[offset:]).startswith(train[0]["meaning"])


@pytest.mark.slow
@pytest.mark.xdist_group("tiny")
def test_a_four_bit_model_is_trained_evaluated_and_fused(data, tmp_path):
    """The path for a Mac with 8 GB of memory."""
    model = tmp_path / "tiny-4bit"
    convert = f"-m mlx_lm convert --hf-path {TINY} --mlx-path {model} -q --q-bits 4"
    done = run(sys.executable, *convert.split())
    assert done.returncode == 0, done.stderr
    environment = {
        "MODEL": str(model),
        "DATA": str(data),
        "ADAPTER_PATH": str(tmp_path / "adapter"),
        "FUSED_PATH": str(tmp_path / "fused"),
        "RESULTS": str(tmp_path / "results"),
        "VENV": sys.prefix,
    }
    small = "--batch-size 1 --grad-checkpoint --num-layers 4 --iters 4 --everyday"
    steps = [
        [ROOT / "train.sh", *small.split(), ""],
        [ROOT / "evaluate.sh", "--sample", "4"],
        [ROOT / "fuse.sh", "--dequantize", "--no-gguf"],
    ]
    refused = run(ROOT / "fuse.sh", **environment)
    assert refused.returncode == 1
    for step in steps:
        done = run(*step, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
    config = json.loads((tmp_path / "fused/config.json").read_text(encoding="utf-8"))
    assert "quantization" not in config
    talk = {**environment, "MODEL": environment["FUSED_PATH"], "ADAPTER_PATH": ""}
    answer = run(ROOT / "chat.sh", "mae", **talk)
    assert answer.returncode == 0 and answer.stdout.strip()
