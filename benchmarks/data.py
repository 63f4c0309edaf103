"""make_jsonl.py and split_jsonl.py against a plain script of the same job, over generated lines.

The plain script reads, `json.dumps`, `json.loads` and shuffles, as one would write it in ten
minutes: no check of a line, no duplicates dropped, a split by line number. Each command runs as a
process of its own; the operating system tells its time and its peak memory (maximum resident set).

Run as: python benchmarks/data.py [--lines 100000] [--repeat 1]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from slang.dictionary import Entry, entries  # noqa: E402

PLAIN_MAKE = """
import json, sys
system, question = sys.argv[3:]
with open(sys.argv[1], encoding="utf-8") as source, open(sys.argv[2], "w", encoding="utf-8") as out:
    for line in source:
        slang, meaning = line.strip().split("::", 1)
        messages = [{"role": "system", "content": system},
                    {"role": "user", "content": question.replace("{slang}", slang)},
                    {"role": "assistant", "content": meaning}]
        row = {"slang": slang, "meaning": meaning, "messages": messages}
        out.write(json.dumps(row, ensure_ascii=False) + "\\n")
"""
PLAIN_SPLIT = """
import json, random, sys
with open(sys.argv[1], encoding="utf-8") as source:
    rows = [json.loads(line) for line in source]
random.Random(42).shuffle(rows)
a, b = int(len(rows) * 0.8), int(len(rows) * 0.9)
parts = {"train": rows[:a], "valid": rows[a:b], "test": rows[b:], "eval": rows[: a // 10]}
for name, part in parts.items():
    with open(f"{sys.argv[2]}/{name}.jsonl", "w", encoding="utf-8") as out:
        for row in part:
            out.write(json.dumps(row, ensure_ascii=False) + "\\n")
"""


def generate(path: Path, n: int) -> None:
    """n lines, all different: the dictionary again and again, with the round's number in each."""
    found = entries(ROOT / "data/source_augmented.txt")
    lines = [item for item in found if isinstance(item, Entry)]
    with path.open("w", encoding="utf-8") as file:
        for i in range(n):
            entry, turn = lines[i % len(lines)], i // len(lines)
            number = f" {turn}" if turn else ""
            file.write(f"{entry.slang}{number}::{entry.meaning[:-1]}{number}{entry.meaning[-1]}\n")


def cost(command: list[str | Path]) -> tuple[float, float]:
    """(seconds, peak memory in MB) of a command; it must succeed."""
    start = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    return time.perf_counter() - start, usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--lines", type=int, nargs="+", default=[10_000, 100_000], help="sizes to run")
    p.add_argument("--repeat", type=int, default=1, help="runs of each; the quickest counts")
    args = p.parse_args()
    from slang import prompt

    asked = prompt.load(ROOT / "prompt.toml")
    told_and_asked = (asked.system, asked.questions[0])
    print(f"{'lines':>9}  {'':11}{'plain':>18}{'ours':>18}{'time':>8}{'memory':>8}")
    for n in args.lines:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            source, rows, plain_rows = folder / "d.txt", folder / "d.jsonl", folder / "plain.jsonl"
            generate(source, n)
            names = ("train", "valid", "test", "eval")
            outputs = [f"--{name}={folder / name}.jsonl" for name in names]
            (folder / "plain").mkdir()
            jobs = {
                "make_jsonl": (
                    [sys.executable, "-c", PLAIN_MAKE, source, plain_rows, *told_and_asked],
                    [sys.executable, "make_jsonl.py", "--input", source, "--output", rows],
                ),
                "split_jsonl": (
                    [sys.executable, "-c", PLAIN_SPLIT, rows, folder / "plain"],
                    [sys.executable, "split_jsonl.py", "--input", rows, *outputs],
                ),
            }
            for job, (plain, ours) in jobs.items():
                costs = [(cost(plain), cost(ours)) for _ in range(args.repeat)]
                (t0, m0), (t1, m1) = (min(pair[i] for pair in costs) for i in (0, 1))
                both = f"{t0:8.2f} s {m0:5.0f} MB{t1:8.2f} s {m1:5.0f} MB"
                print(f"{n:9}  {job:11}{both}{t1 / t0:7.2f}x{m1 / m0:7.2f}x", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
