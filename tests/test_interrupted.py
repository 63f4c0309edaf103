"""Runs that are stopped at random moments: what they were writing is whole all the same."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import ROOT, TINY

SPLITS = ("train", "valid", "test", "eval")
OUTPUTS = {
    "make": ["all.jsonl"],
    "split": [f"{name}.jsonl" for name in SPLITS],
    "train": ["adapters/adapters.safetensors"],
    "evaluate": ["results/LOG.md", "results/x.json", "results/x.html"],
    "export": ["model/model-F32.gguf", "model/model-Q8_0.gguf", "model/Modelfile"],
}


def command(name: str, folder: Path, which: int) -> list[str]:
    """One of two commands that write the same files with other contents."""
    adapter = folder / "adapters"
    files = [f"--{split}={folder / f'{split}.jsonl'}" for split in SPLITS]
    commands = {
        "make": f"make_jsonl.py --input data/demo.txt --output {folder}/all.jsonl "
        f"--forms {4 + which}",
        "split": f"split_jsonl.py --input {folder}/all.jsonl --seed {which} {' '.join(files)}",
        "train": f"-m slang.train --train --model {TINY} --adapter-path {adapter} --data {folder} "
        f"--num-layers 1 --iters {8 + which} --batch-size 2 --save-every 1 --val-batches 1 "
        f"--seed {which} --mask-prompt",
        "evaluate": f"-m slang.evaluate --model {TINY} --adapter-path {adapter} --data {folder} "
        f"--quick --output {folder}/results/x.json --note {which}",
        "export": f"-m slang.export {folder}/model --type {('f32 q8_0', 'q8_0 f32')[which]}",
    }
    return [sys.executable, *commands[name].split()]


def run_whole(name: str, folder: Path, which: int) -> dict[str, bytes]:
    done = subprocess.run(command(name, folder, which), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return contents(name, folder)


def contents(name: str, folder: Path) -> dict[str, bytes]:
    paths = [path for path in OUTPUTS[name] if (folder / path).exists()]
    return {path: (folder / path).read_bytes() for path in paths}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with records, splits, an adapter and a model to export."""
    folder = tmp_path_factory.mktemp("work")
    for name in ("make", "split"):
        run_whole(name, folder, 0)
    for split in SPLITS:  # a few are enough to train on
        lines = (folder / f"{split}.jsonl").read_bytes().splitlines(keepends=True)
        (folder / f"{split}.jsonl").write_bytes(b"".join(lines[:12]))
    run_whole("train", folder, 0)
    shutil.copytree(ROOT / TINY, folder / "model")
    shutil.copy(ROOT / "prompt.toml", folder / "adapters")
    shutil.copy(ROOT / "prompt.toml", folder / "model")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "times"),
    [("make", 80), ("split", 80), ("export", 20), ("train", 10), ("evaluate", 10)],
)
def test_interrupted_at_random_moments(work, tmp_path, name, times, seed, record_property):
    """After each of them the files are those of one run or of the other, whole.

    Nothing is left behind, but a part after kill -9; and the next run succeeds.
    """
    folder = tmp_path if name in ("make", "split") else work
    if name == "split":
        run_whole("make", folder, 0)
    started = time.monotonic()
    whole = [run_whole(name, folder, 0), run_whole(name, folder, 1)]
    seconds = (time.monotonic() - started) / 2
    draw = random.Random(seed)
    ended = Counter()
    for n in range(times):
        sent = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)[n % 3]
        before = set(folder.rglob(".*.part"))
        process = subprocess.Popen(
            command(name, folder, n // 3 % 2),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(draw.uniform(0, seconds))
        process.send_signal(sent)
        ended[process.wait()] += 1
        now = contents(name, folder)
        if name in ("make", "split", "export"):
            assert now in whole, (n, sent)
        elif name == "train":
            assert mx.load(str(folder / OUTPUTS[name][0])).keys()  # whole, of whichever step
        else:
            log, results, page = (now[path].decode() for path in OUTPUTS[name])
            note = json.loads(results)["note"]
            assert f" · {note}</h1>" in page and re.findall(r"\| x \| (\d) \|", log)[-1] == note
        assert sent == signal.SIGKILL or set(folder.rglob(".*.part")) <= before
    record_property("interruptions", times)
    assert run_whole(name, folder, 1) == whole[1] or name in ("train", "evaluate")
    assert sum(count for code, count in ended.items() if code) > times / 3, ended
