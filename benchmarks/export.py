"""Time, memory and size of a GGUF export at the shape of Gemma 3 1B, beside copying the file.

Writes a model of random bf16 weights (2 GB) and a vocabulary of 262144 pieces into a temporary folder, exports it once per type
on one core in a process of its own, and prints a Markdown table. Needs 6 GB of disk and about three minutes.

Run as: python benchmarks/export.py            every type
        python benchmarks/export.py bf16 q8_0  some
"""

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
from mlx_lm.models.gemma3_text import ModelArgs

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from slang import gguf as exporter  # noqa: E402

TINY = ROOT / "models/tiny-gemma3"


def write_model(folder: Path) -> Path:
    """gemma-3-1b-it's shape, which is what mlx_lm takes where config.json says nothing; the weights' file."""
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
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2), encoding="utf-8")
    rng = np.random.default_rng(0)
    weights = {}
    for name, shape in exporter.expected_shapes(ModelArgs.from_dict(config)).items():
        if name != "lm_head.weight":
            weights[name] = (mx.array(rng.standard_normal(shape, np.float32)) * 0.03).astype(mx.bfloat16)
            mx.eval(weights[name])
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder / "model.safetensors"


def measure(command: list[str]) -> tuple[float, float, float]:
    """(seconds, seconds of CPU, peak MB of memory beside mapped files) of a command on one core; Linux counts the last."""
    pinned = ["taskset", "-c", "0"] if shutil.which("taskset") else []
    start, peak, before = time.perf_counter(), 0, os.times()
    process = subprocess.Popen(
        [*pinned, *command], cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"}
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
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, cpu, peak / 1e3


def main() -> int:
    kinds = sys.argv[1:] or list(exporter.TYPES)
    with tempfile.TemporaryDirectory(dir=ROOT) as temporary:
        folder = Path(temporary)
        source = write_model(folder)
        copy = "import os, shutil, sys; shutil.copyfile(*sys.argv[1:]); os.fsync(os.open(sys.argv[2], os.O_RDONLY))"
        print("| type | seconds | CPU seconds | memory, MB | file, MB |\n| --- | ---: | ---: | ---: | ---: |")
        tasks = {"copy of the bf16 file": ([sys.executable, "-c", copy, str(source), str(folder / "copy")], folder / "copy")}
        for kind in kinds:
            command = [sys.executable, "-m", "slang.gguf", str(folder), "--name", "random", "--type", kind]
            tasks[kind] = (command, folder / f"random-{kind.upper()}.gguf")
        for name, (command, out) in tasks.items():
            seconds, cpu, memory = measure(command)
            print(f"| {name} | {seconds:.1f} | {cpu:.1f} | {memory:.0f} | {out.stat().st_size / 1e6:.0f} |", flush=True)
            out.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
