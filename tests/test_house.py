"""The rooms of slang/: small files, and imports that only go downward."""

import ast
import sys
from pathlib import Path

from conftest import ROOT

# Each room imports from those above it in this list, and from itself.
FLOORS = [
    {"errors", "flags"},
    {"files", "text"},
    {"dictionary"},
    {"jsonl", "lint"},
    {"prompt"},
    {"models", "numpy_gemma"},
    {"train", "evaluate"},
    {"export"},
    {"chat"},
]
LIGHT = {
    "errors",
    "flags",
    "files",
    "text",
    "dictionary",
    "jsonl",
    "lint",
    "prompt",
}  # start at once
HEAVY = {"mlx", "mlx_lm", "numpy", "transformers", "huggingface_hub", "gguf"}


def imports() -> list[tuple[Path, str]]:
    """(file, imported module) of everything in slang/, also where it is imported late."""
    found = []
    for path in (ROOT / "slang").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found += [(path, name) for name in names]
            elif isinstance(node, ast.Import):
                found += [(path, alias.name) for alias in node.names]
    return found


def room(path: Path) -> str:
    return path.relative_to(ROOT / "slang").parts[0].removesuffix(".py")


def test_imports_go_downward():
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    wrong = []
    for path, module in imports():
        parts = module.split(".")
        here = room(path)
        if parts[0] != "slang" or here == "__init__" or parts[1] == here:
            continue
        if floor[parts[1]] >= floor[here]:
            wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong


def test_the_data_scripts_need_no_model():
    wrong = [
        f"{path.name} imports {module}"
        for path, module in imports()
        if room(path) in LIGHT and module.split(".")[0] in HEAVY
    ]
    assert not wrong


def test_files_are_small_and_no_module_hides_a_package():
    long = []
    ours = [*ROOT.glob("*.sh"), *(ROOT / "slang").rglob("*.py")]
    for folder in (".", "benchmarks", "docs", "tests"):
        ours += (ROOT / folder).glob("*.py")
    for path in ours:
        lines = path.read_bytes().splitlines()
        if len(lines) > 400 or max(map(len, lines), default=0) > 100:
            long.append(str(path.relative_to(ROOT)))
    assert not long
    outside = {module.split(".")[0] for _, module in imports()} | set(sys.stdlib_module_names)
    for path in (ROOT / "slang").glob("*"):
        name = path.stem
        assert name not in outside, f"slang/{name} has the name of a package that is imported"
