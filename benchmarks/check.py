"""How many chats does fuse.sh's check need?

Each wrong decision that the tests know is looked for with fewer and more of them.

Prints a Markdown table: for each type of file and number of chats, which mistakes the check misses.

Run as: export OPENBLAS_NUM_THREADS=1
        .venv/bin/python benchmarks/check.py
"""

import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from exporting import MUTATIONS, copy, make_reference, train_and_fuse  # noqa: E402

from slang.export.check import check  # noqa: E402
from slang.export.write import export  # noqa: E402

COUNTS = (1, 4, 12, 24)
TYPES = ("f32", "bf16", "q8_0", "q4_k_m")


def export_wrongly(fused: Path, folder: Path, mistake: str, kind: str) -> Path:
    """A file of one type, made with one of the tests' mistakes."""
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        MUTATIONS[mistake][0](patch)
        (path,) = export(copy(fused, folder), [kind], "wrong")
    return path


def main() -> int:
    with tempfile.TemporaryDirectory() as place:
        fused = train_and_fuse(Path(place))
        references = [make_reference(fused, n, n) for n in COUNTS]
        print(f"| file | {' | '.join(f'missed with {n}' for n in COUNTS)} |")
        print(f"| --- |{' --- |' * len(COUNTS)}")
        for kind in TYPES:
            missed: list[list[str]] = [[] for _ in COUNTS]
            for mistake in MUTATIONS:
                path = export_wrongly(fused, Path(place) / f"{kind}-{mistake}", mistake, kind)
                for names, reference in zip(missed, references, strict=True):
                    if all(row.ok for row in check(path, reference)):
                        names.append(mistake)
            cells = [", ".join(names) or "none" for names in missed]
            print(f"| {kind} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
