"""How many chats does fuse.sh's check need? Each wrong decision that the tests know, looked for with fewer and more of them.

Prints a Markdown table: for each type of file and number of chats, which mistakes the check misses.

Run as: OPENBLAS_NUM_THREADS=1 LD_PRELOAD=.venv/lib/libcblas-openblas.so .venv/bin/python benchmarks/check.py
"""

import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import test_gguf  # noqa: E402

from slang import gguf as exporter  # noqa: E402

COUNTS = (1, 4, 12, 24)
TYPES = ("f32", "bf16", "q8_0", "q4_k_m")


def export_wrongly(fused: Path, folder: Path, mistake: str, kind: str) -> Path:
    """A file of one type, made with one of the tests' mistakes."""
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        test_gguf.MUTATIONS[mistake][0](patch)
        (path,) = exporter.export(test_gguf.copy(fused, folder), [kind], "wrong")
    return path


def main() -> int:
    with tempfile.TemporaryDirectory() as place:
        fused = test_gguf.train_and_fuse(Path(place))
        entries = exporter.read_entries(fused.parent / "source.txt")
        references = [exporter.Reference(fused, entries, n_questions=n, n_answers=n) for n in COUNTS]
        print(f"| file | {' | '.join(f'missed with {n}' for n in COUNTS)} |")
        print(f"| --- |{' --- |' * len(COUNTS)}")
        for kind in TYPES:
            missed: list[list[str]] = [[] for _ in COUNTS]
            for mistake in test_gguf.MUTATIONS:
                path = export_wrongly(fused, Path(place) / f"{kind}-{mistake}", mistake, kind)
                for names, reference in zip(missed, references, strict=True):
                    if not test_gguf.failed(exporter.check(path, reference)):
                        names.append(mistake)
            cells = [", ".join(names) or "none" for names in missed]
            print(f"| {kind} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
