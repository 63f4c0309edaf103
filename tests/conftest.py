"""What the test files share: running scripts as a person does, and a dictionary to run them on."""

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings

# Behind nohup, or as a job in the background, these are ignored; what a test starts would ignore
# them too.
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, signal.SIG_DFL)

ROOT = Path(__file__).parent.parent
TINY = "models/tiny-gemma3"

DICTIONARY = """\
# Three slangs, the first with two senses.
pura vida::Saludo con que la gente se desea lo mejor.
pura vida::Respuesta de quien está bien y contento
pura vida::Manera de dar las gracias o de despedirse.
mae::Amigo o conocido al que se le habla con confianza.
mae::Palabra con que los jóvenes se llaman entre sí.
tuanis::Que es muy bueno o agradable.
tuanis::Así se aprueba lo que a uno le gusta mucho.
"""


def run(
    *command: str | Path, cwd: Path = ROOT, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess:
    """Run a script as from a terminal, with stdout and stderr as text and the variables added."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def script(name: str, *arguments: str | Path, **options) -> subprocess.CompletedProcess:
    """Run one of the Python scripts at the top level."""
    return run(sys.executable, ROOT / name, *arguments, **options)


# A random test that fails says how to run it again with what it drew.
settings.register_profile("reproducible", print_blob=True)
settings.load_profile("reproducible")


@pytest.fixture
def seed() -> int:
    """A number for random.Random, printed so that a test that fails shows it; SEED sets it."""
    number = int(os.environ.get("SEED") or random.randrange(10**6))
    print(f"SEED={number} before the command draws the same again")
    return number


@pytest.fixture(scope="module")
def no_waiting_for_the_disk():
    """For tests that write hundreds of files, whose time is that of os.fsync."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


def pytest_terminal_summary(terminalreporter):
    """Add up what tests counted with record_property: cases, examples, interruptions."""
    totals = Counter()
    for report in terminalreporter.getreports("passed"):
        totals.update(dict(report.user_properties))
    if totals:
        terminalreporter.write_line(
            "counted: " + ", ".join(f"{n} {name}" for name, n in sorted(totals.items()))
        )


@pytest.fixture
def dictionary(tmp_path: Path) -> Path:
    """A dictionary file of 7 lines and 3 slangs."""
    path = tmp_path / "source.txt"
    path.write_text(DICTIONARY, encoding="utf-8")
    return path
