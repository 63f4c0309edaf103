"""What ends a program: an error that a person can mend, and the one place that prints it.

Every program of the project is started by `program`, so that its imports are inside too.

Run as: python -m slang.errors mlx_lm.fuse --help    a program of mlx_lm, which then ends as ours do
"""

from __future__ import annotations  # an older Python reads this far, and is told

import errno
import importlib
import io
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

REMEDIES = {
    errno.ENOENT: "check the name",
    errno.ENOTDIR: "check the name",
    errno.EEXIST: "check the name",
    errno.EACCES: "change its permissions or name another",
    errno.EPERM: "change its permissions or name another",
    errno.EROFS: "name a folder that can be written",
    errno.ENOSPC: "make room and run this again",
    errno.EISDIR: "name a file",
    errno.ELOOP: "take the link away or name another",
    errno.EBUSY: "wait for it or name another",
}
POSTPONED = 0.05  # seconds until a signal that came at a bad moment comes again
MOST_LISTED = 20  # problems of one file that are printed; the others are counted
T = TypeVar("T")


class UserError(Exception):
    """`str()` is the whole message: `data/train.jsonl: not there; run make_jsonl.py first`."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C or a signal ends the program. `str()` says what was saved, if there is something."""


@dataclass(frozen=True)
class Problem:
    """A line that can't be used as it stands; `str()` gives `FILE:LINE: what; what to do`."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


def parted(items: Iterable[T | Problem]) -> tuple[list[T], list[Problem]]:
    """(what can be used, the problems) of what was read."""
    good: list[T] = []
    problems: list[Problem] = []
    for item in items:
        if isinstance(item, Problem):
            problems.append(item)
        else:
            good.append(item)
    return good, problems


def listed(problems: Sequence[object]) -> str:
    """The first of the problems, one a line, and how many more there are."""
    lines = [str(problem) for problem in problems[:MOST_LISTED]]
    if more := len(problems) - len(lines):
        lines.append(f"... and {more} more like these")
    return "\n".join(lines)


def told(error: OSError) -> str:
    """What went wrong with a file, in one line: its name, the reason and, if known, the remedy."""
    reason = error.strerror or first_line(error)
    name = "" if error.filename is None else f"{error.filename or repr('')}: "
    remedy = REMEDIES.get(error.errno or 0)
    return f"{name}{reason}" + (f"; {remedy}" if remedy else "")


def first_line(error: BaseException) -> str:
    """The first line of another library's message, at most 200 characters of it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else lines[0][:200] + "…"


def program(module: str) -> None:
    """Import `module`, run its `main()` and leave with its exit code, or that of argparse.

    1  with one line on stderr: a UserError, an OSError or what nobody expected
    130, 143 or 129 after Ctrl-C, SIGTERM or SIGHUP
    """
    _need_new_python()
    _open_what_is_closed()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that its encoding has not
    received = _listen()
    try:
        try:
            code = importlib.import_module(module).main()
        except SystemExit as end:
            code = end.code
        if sys.stdout:  # None when the shell closed it
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except KeyboardInterrupt as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is ending
        print(str(error) or "Stopped", file=sys.stderr)
        code = 128 + (received[-1] if received else signal.SIGINT)
    except Exception as error:
        if os.environ.get("TRACEBACK"):
            raise
        print(_in_one_line(error), file=sys.stderr)
        code = 1
    if signal.setitimer(signal.ITIMER_REAL, 0)[0]:  # a signal is still to come again
        print(stopped_by(received[-1]), file=sys.stderr)
        code = 128 + received[-1]
    for number in (signal.SIGINT, signal.SIGALRM):  # the end of Python takes a moment
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def _need_new_python() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036
        print("Python 3.11 or newer is needed; source .venv/bin/activate first", file=sys.stderr)
        sys.exit(1)


def _open_what_is_closed() -> None:
    """Or a file that is opened next would be taken for stdin, stdout or stderr."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _listen() -> list[int]:
    """Raise Stopped when a signal comes. Returns a list to which its number is added then."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if _importing(frame):
            signal.setitimer(signal.ITIMER_REAL, POSTPONED)
            return
        raise Stopped(stopped_by(number))

    def stop_again(_number: int, _frame: FrameType | None) -> None:
        signal.raise_signal(received[-1])  # for whoever listens by now

    def unraisable(lost: Any) -> None:
        """Python drops what is raised in a destructor: the signal once more, a moment after it."""
        if issubclass(lost.exc_type, KeyboardInterrupt) and received:
            signal.setitimer(signal.ITIMER_REAL, POSTPONED)
        else:
            sys.__unraisablehook__(lost)

    # The wrappers let Python start with Ctrl-C ignored: its own start would end in a traceback.
    signal.signal(signal.SIGINT, stop)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, stop)
    signal.signal(signal.SIGALRM, stop_again)
    sys.unraisablehook = unraisable
    return received


def stopped_by(number: int) -> str:
    """What is said when a signal ends a program: `Stopped` or `Stopped by SIGTERM`."""
    return "Stopped" if number == signal.SIGINT else f"Stopped by {signal.Signals(number).name}"


def _importing(frame: FrameType | None) -> bool:
    """Is a module being loaded? MLX crashes when an exception comes while its own is."""
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


def _in_one_line(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return told(error)
    if isinstance(error, ModuleNotFoundError) and error.name and "." not in error.name:
        return f"{error.name}: not installed in this Python; source .venv/bin/activate first"
    what = f"unexpected {type(error).__name__}: {first_line(error)}"
    return f"{what}; TRACEBACK=1 before the command shows where"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        print("python -m slang.errors MODULE [flags]: name a module to run", file=sys.stderr)
        sys.exit(2)
    del sys.argv[0]
    # From the module that the others import: UserError has to be the same class.
    importlib.import_module("slang.errors").program(sys.argv[0])
