"""Time, memory and size of a GGUF export at the shape of Gemma 3 1B, beside copying the file.

Writes a model of random bf16 weights (2 GB) and a vocabulary of 262144 pieces into a temporary
folder, exports it to each type on one core in a process of its own, and prints a Markdown table:
the least time of three rounds, in which the tasks take turns, and the most memory. Copy and exports
end when the file is on the disk (fsync). Needs 6 GB of disk and about five minutes.

Run as: python benchmarks/export.py            every type
        python benchmarks/export.py bf16 q8_0  some
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from slang.export.folder import read_config  # noqa: E402
from slang.export.weights import TYPES  # noqa: E402
from slang.models.layout import expected_shapes  # noqa: E402

TINY = ROOT / "models/tiny-gemma3"
ROUNDS = 3
COPY = """
import os, shutil, sys
shutil.copyfile(*sys.argv[1:])
os.fsync(os.open(sys.argv[2], os.O_RDONLY))
"""
VOCABULARY = """
import sys
from pathlib import Path
from slang.export.vocabulary import read_vocabulary
read_vocabulary(Path(sys.argv[1]), 262144)
"""


def write_model(folder: Path) -> Path:
    """The weights' file of a model of gemma-3-1b-it's shape.

    That is what mlx_lm takes where config.json says nothing.
    """
    config = {"model_type": "gemma3_text", "vocab_size": 262144}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / name, folder)
    shutil.copy(ROOT / "prompt.toml", folder)
    tokenizer = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    for n in range(len(vocabulary), config["vocab_size"]):
        vocabulary[f"\u2581p{n}"] = n
        merges += [["\u2581p", str(n)], [f"\u2581p{n // 10}", str(n % 10)]]
    (folder / "tokenizer.json").write_text(
        json.dumps(tokenizer, ensure_ascii=False, indent=2), encoding="utf-8"
    )
    rng = np.random.default_rng(0)
    weights = {}
    for name, shape in expected_shapes(read_config(folder)).items():
        if name != "lm_head.weight":
            weights[name] = (mx.array(rng.standard_normal(shape, np.float32)) * 0.03).astype(
                mx.bfloat16
            )
            mx.eval(weights[name])
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder / "model.safetensors"


def measure(command: list[str]) -> tuple[float, float, float]:
    """Seconds, seconds of CPU, and peak MB of memory beside mapped files of a command on one core.

    Linux alone counts the memory.
    """
    pinned = ["taskset", "-c", "0"] if shutil.which("taskset") else []
    start, peak, before = time.perf_counter(), 0, os.times()
    process = subprocess.Popen(
        [*pinned, *command],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        if status.exists():
            lines = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
            peak = max([peak, *(int(line.split()[1]) for line in lines)])
        time.sleep(0.02)
    after = os.times()
    if process.returncode:
        sys.exit(process.returncode)
    cpu = (
        after.children_user + after.children_system - before.children_user - before.children_system
    )
    return time.perf_counter() - start, cpu, peak / 1e3


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("types", nargs="*", help=f"of {', '.join(TYPES)}; all when none is named")
    kinds = p.parse_args().types or list(TYPES)
    with tempfile.TemporaryDirectory(dir=ROOT) as temporary:
        folder = Path(temporary)
        source = write_model(folder)
        python = [sys.executable, "-c"]
        tasks = {
            "copy of the bf16 file": (
                [*python, COPY, str(source), str(folder / "copy")],
                folder / "copy",
            ),
            "start and vocabulary alone": ([*python, VOCABULARY, str(folder)], None),
        }
        for kind in kinds:
            exporter = [sys.executable, "-m", "slang.export"]
            command = [*exporter, str(folder), "--name", "random", "--type", kind]
            tasks[kind] = (command, folder / f"random-{kind.upper()}.gguf")
        measured: dict[str, list[tuple[float, float, float]]] = {name: [] for name in tasks}
        sizes = dict.fromkeys(tasks, 0.0)
        for _ in range(ROUNDS):
            for name, (command, out) in tasks.items():
                os.sync()  # what the last task left to write is not this one's
                measured[name].append(measure(command))
                if out:
                    sizes[name] = out.stat().st_size / 1e6
                    out.unlink()
    least = min(cpu for _, cpu, _ in measured["copy of the bf16 file"])
    print("| task | seconds | CPU seconds | times the copy's | memory, MB | file, MB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, rounds in measured.items():
        seconds, cpu, memory = zip(*rounds, strict=True)
        size = f"{sizes[name]:.0f}" if sizes[name] else ""
        times = f"{min(seconds):.1f} | {min(cpu):.1f} | {min(cpu) / least:.1f}"
        print(f"| {name} | {times} | {max(memory):.0f} | {size} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
