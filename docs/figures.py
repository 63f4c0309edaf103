"""The figures of the pages: each block between <!-- figures: NAME --> and <!-- end -->.

`split` is what make_jsonl.py and split_jsonl.py print of the shipped dictionary. `answers`,
`knowledge` and `table` are of the newest run in results/demo, as ./demo.sh leaves it. They are kept
in docs/demo.json, with a hash of each file on which they depend. `recipe` is the table of
benchmarks/recipe.py.

Run as: ./demo.sh && .venv/bin/python docs/figures.py   writes all blocks; without a run of the
                                                        demo, the other ones
        .venv/bin/python docs/figures.py --check        exit code 1 and the name of what is old
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "docs/demo.json"
PAGES = [
    ROOT / "README.md",
    ROOT / "benchmarks/recipe.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
# What decides the demo's figures: of scripts the lines with flags, of the rest every line. Not the
# other code: a change of that which changes them is a bug.
DECIDES = (
    "demo.sh",
    "train.sh",
    "prompt.toml",
    "data/demo.txt",
    "data/everyday.jsonl",
    "data/control.jsonl",
)
KNOWLEDGE = (
    "choice accuracy, trained wording",
    "choice accuracy, new wording",
    "right answers",
    "whole sentences",
    "control loss",
)


def digests() -> dict[str, str]:
    """The beginning of each deciding file's SHA-256; comments and blank lines do not count."""
    found = {}
    for name in DECIDES:
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        said = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if name.endswith(".sh"):
            said = [line for line in said if "--" in line]
        found[name] = hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]
    return found


def demo(path: Path) -> dict:
    """What the pages show of a run of the demo."""
    from slang.evaluate import page, results

    run = results.read(path)
    answers = []
    for spoken in run.spoken:
        both = [page.one_line(text) for text in (spoken.baseline, spoken.adapted)]
        before, after = (text if len(text) < 90 else text[:89] + "…" for text in both)
        answers += [spoken.question, f"  before  {before}", f"  after   {after}"]
    figures = {row.figure: row for row in run.figures}
    knowledge = []
    for name in KNOWLEDGE:
        row = figures[name]
        told = "" if row.ceiling is None else f"{row.ceiling:.2f}"
        knowledge.append([name, f"{row.baseline:.2f}", f"{row.adapted:.2f}", told, str(row.n)])
    return {
        "decided by": digests(),
        "model": run.model,
        "answers": answers,
        "knowledge": knowledge,
        "table": page.run_text(run).splitlines(),
    }


def run(*command: str) -> str:
    """What a script prints."""
    python = [sys.executable, *command]
    done = subprocess.run(python, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def split() -> list[str]:
    """What the data scripts print of the shipped dictionary."""
    with tempfile.TemporaryDirectory() as folder:
        source = f"{folder}/source_augmented.jsonl"
        names = ("train", "valid", "test", "eval")
        outputs = [part for name in names for part in (f"--{name}", f"{folder}/{name}.jsonl")]
        commands = (
            ["make_jsonl.py", "--output", source],
            ["split_jsonl.py", "--input", source, *outputs],
        )
        lines = []
        for command in commands:
            printed = run(*command).replace(folder, "data")
            lines += [f"$ python {command[0]}", *printed.splitlines()]
    return lines


def blocks(kept: dict) -> dict[str, str]:
    """The text of every block by its name."""
    rows = ["| | before | after | told | n |", "| --- | ---: | ---: | ---: | ---: |"]
    rows += [f"| {' | '.join(row)} |" for row in kept["knowledge"]]
    texts = {"split": split(), "answers": kept["answers"], "table": kept["table"]}
    made = {}
    for name, lines in texts.items():
        made[name] = "\n".join(f"    {line}".rstrip() for line in lines)
    made["recipe"] = run("benchmarks/recipe.py", "--table").strip()
    return {**made, "knowledge": "\n".join(rows)}


def filled(text: str, made: dict[str, str]) -> str:
    """A page with its blocks as they should be."""
    parts = text.split("<!-- figures: ")
    for i, part in enumerate(parts[1:], 1):
        name, rest = part.split(" -->", 1)
        _, after = rest.split("<!-- end -->", 1)
        parts[i] = f"{name} -->\n\n{made[name]}\n\n<!-- end -->{after}"
    return "<!-- figures: ".join(parts)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--check", action="store_true", help="say what is old, write nothing")
    args = p.parse_args()
    sys.path.insert(0, str(ROOT))
    old = []
    runs = sorted((ROOT / "results/demo").glob("*.json"), key=lambda path: path.stat().st_mtime)
    if runs and not args.check:
        text = json.dumps(demo(runs[-1]), ensure_ascii=False, indent=1)
        KEPT.write_text(text + "\n", encoding="utf-8")
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    if kept["decided by"] != digests():
        changed = [name for name, digest in digests().items() if kept["decided by"][name] != digest]
        old.append(f"docs/demo.json: {', '.join(changed)} changed; run ./demo.sh and this again")
    made = blocks(kept)
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        new = filled(text, made)
        if new != text and args.check:
            old.append(f"{path.relative_to(ROOT)}: figures are old; run docs/figures.py")
        if new != text and not args.check:
            path.write_text(new, encoding="utf-8")
    print("\n".join(old), end="\n" if old else "", file=sys.stderr)
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main())
