"""slang/errors.py: how a program ends, whatever happens in it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run

from slang.errors import MOST_LISTED, first_line, listed, told

START = "from slang.errors import program; program('room')"


def ended(folder: Path, code: str, **options) -> subprocess.CompletedProcess:
    """A program whose module `room` holds this code."""
    (folder / "room.py").write_text("import os, signal, sys\n" + code, encoding="utf-8")
    options.setdefault("stdout", subprocess.PIPE)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-c", START], env=environment, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        ("__import__('slang.errors').errors.UserError('x: no; do y')", "x: no; do y"),
        ("FileNotFoundError(2, 'No such file', 'x')", "x: No such file; check the name"),
        ("FileNotFoundError(2, 'No such file', '')", "'': No such file; check the name"),
        ("OSError('We couldn\\'t connect\\nto the hub')", "We couldn't connect"),
        ("OSError()", "OSError"),
        ("KeyError('x')", "unexpected KeyError: 'x'; TRACEBACK=1 before the command shows where"),
        (
            "ValueError()",
            "unexpected ValueError: ValueError; TRACEBACK=1 before the command shows where",
        ),
    ],
)
def test_an_error_is_one_line(tmp_path, raised, line):
    done = ended(tmp_path, f"def main(): raise {raised}")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line + "\n")


def test_an_error_of_an_import_is_one_line(tmp_path):
    done = ended(tmp_path, "import slang.nothing")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("unexpected ModuleNotFoundError: No module named 'slang.nothing'")


def test_a_python_that_lacks_the_packages_is_the_wrong_one(tmp_path):
    done = ended(tmp_path, "import nothing_of_this_name")
    said = "nothing_of_this_name: not installed in this Python; source .venv/bin/activate first\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_a_file_that_is_opened_is_not_taken_for_stdin(tmp_path):
    code = "def main(): sys.exit(open('/dev/null').fileno() < 3)"
    assert ended(tmp_path, code, preexec_fn=lambda: os.close(0)).returncode == 0
    child = (
        "import subprocess\ndef main(): return subprocess.call([sys.executable, '-c', 'open(0)'])"
    )
    assert ended(tmp_path, child, preexec_fn=lambda: os.close(0)).returncode == 0


def test_the_traceback_is_shown_when_asked_for(tmp_path):
    done = ended(tmp_path, "def main(): raise KeyError('x')", env={"TRACEBACK": "1"})
    assert done.returncode == 1 and done.stderr.startswith("Traceback")


@pytest.mark.parametrize("code", [0, 2, 3])
def test_the_exit_code_is_that_of_main_or_of_argparse(tmp_path, code):
    assert ended(tmp_path, f"def main(): return {code}").returncode == code
    assert ended(tmp_path, f"def main(): raise SystemExit({code})").returncode == code


@pytest.mark.parametrize(
    ("name", "code", "line"),
    [
        ("SIGINT", 130, "Stopped"),
        ("SIGTERM", 143, "Stopped by SIGTERM"),
        ("SIGHUP", 129, "Stopped by SIGHUP"),
    ],
)
def test_a_signal_ends_it_in_words(tmp_path, name, code, line):
    kill = f"os.kill(os.getpid(), signal.{name})"
    done = ended(tmp_path, f"def main(): {kill}")
    assert (done.returncode, done.stderr) == (code, line + "\n")


def test_a_signal_waits_until_an_import_has_ended(tmp_path):
    """MLX crashes when its import is interrupted, and Python 3.11 wraps what comes in a class."""
    code = """
class Named:
    def __set_name__(self, owner, name):
        os.kill(os.getpid(), signal.SIGINT)
class Owner:
    named = Named()
print("imported")
def main():
    signal.pause()
"""
    done = ended(tmp_path, code, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (130, "imported\n", "Stopped\n")


def test_a_signal_in_an_import_ends_a_program_that_is_done_at_once(tmp_path):
    code = "os.kill(os.getpid(), signal.SIGTERM)\ndef main(): print('done')"
    done = ended(tmp_path, code)
    assert (done.returncode, done.stdout, done.stderr) == (143, "done\n", "Stopped by SIGTERM\n")


def test_a_signal_in_a_destructor_is_not_lost(tmp_path):
    code = """
import time
class Dropped:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
def main():
    Dropped()
    time.sleep(60)
"""
    done = ended(tmp_path, code, timeout=30)
    assert (done.returncode, done.stderr) == (143, "Stopped by SIGTERM\n")


def test_what_was_saved_is_said_and_the_code_is_still_that_of_the_signal(tmp_path):
    code = """
from slang.errors import Stopped
def main():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        raise Stopped("Stopped, and saved in x")
"""
    done = ended(tmp_path, code)
    assert (done.returncode, done.stderr) == (143, "Stopped, and saved in x\n")


def test_nohup_is_respected(tmp_path):
    code = "def main(): os.kill(os.getpid(), signal.SIGHUP); print('went on')"
    done = ended(tmp_path, code, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert (done.returncode, done.stdout) == (0, "went on\n")


def test_a_reader_who_has_seen_enough_is_no_error(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    for code in ("def main(): print('x' * 10**6)", "def main(): print('x'); raise SystemExit(0)"):
        done = ended(tmp_path, code, stdout=writing)
        assert (done.returncode, done.stderr) == (1, "")
    os.close(writing)


def test_what_the_terminal_cannot_show_is_no_error(tmp_path):
    done = ended(tmp_path, "def main(): print('\\u52a0')", env={"PYTHONIOENCODING": "latin-1"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\u52a0\n", "")


def test_a_closed_stdout_is_no_error(tmp_path):
    done = ended(tmp_path, "def main(): print('x')", preexec_fn=lambda: os.close(1), stdout=None)
    assert (done.returncode, done.stderr) == (0, "")


def test_any_module_is_run_with_the_same_end():
    done = run(sys.executable, "-m", "slang.errors", "slang.lint", "slang")
    assert (done.returncode, done.stderr) == (1, "slang: not a regular file; name another\n")
    assert run(sys.executable, "-m", "slang.errors").returncode == 2


def test_many_problems_are_counted():
    assert listed(["a", "b"]) == "a\nb"
    lines = listed(range(100_000)).splitlines()
    assert lines[-1] == f"... and {100_000 - MOST_LISTED} more like these"
    assert len(lines) == MOST_LISTED + 1


def test_the_remedy_stands_behind_the_reason():
    error = IsADirectoryError(21, "Is a directory", "data")
    assert told(error) == "data: Is a directory; name a file"
    assert told(OSError(5, "Input/output error")) == "Input/output error"
    assert first_line(ValueError("a" * 300)) == "a" * 200 + "…"
