"""What ends a program: one error a person can mend, and the one place that prints how it ended.

Every program of the project is started by `program`, so that its imports are inside too.

Run as: python -m slang.errors mlx_lm.fuse --help      one of mlx_lm's programs, which then ends as ours do
"""

import errno
import importlib
import os
import signal
import sys

REMEDIES = {
    errno.ENOENT: "check the name",
    errno.ENOTDIR: "check the name",
    errno.EEXIST: "check the name",
    errno.EACCES: "change its permissions or name another",
    errno.EPERM: "change its permissions or name another",
    errno.EROFS: "name a folder that can be written",
    errno.ENOSPC: "make room and run this again",
    errno.EISDIR: "name a file",
    errno.ELOOP: "this link leads back to itself; name a file",
    errno.EBUSY: "wait for it or name another",
}


class UserError(Exception):
    """`str()` is the whole message, such as `data/train.jsonl: not there; run make_jsonl.py first`."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C, or a signal that ends a program. `str()` says what was saved, where there is something to say."""


def told(error: OSError) -> str:
    """What went wrong with a file, in one line: its name, the reason, and the remedy where there is one."""
    reason = error.strerror or str(error) or type(error).__name__
    name = f"{error.filename}: " if error.filename not in (None, "") else ""
    remedy = REMEDIES.get(error.errno)
    return f"{name}{reason}" + (f"; {remedy}" if remedy else "")


def first_line(error: BaseException) -> str:
    """The first line of another library's message, cut to one that a terminal can hold."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else lines[0][:200] + "…"


def _stop(number: int, _frame) -> None:
    raise Stopped(f"Stopped by {signal.Signals(number).name}")


def program(module: str, function: str = "main") -> None:
    """Import `module`, run its `main()` and leave with its exit code. SystemExit, of argparse for one, passes.

    1  with one line on stderr, for what a person can mend and for what nobody expected
    130, 143 or 129 after Ctrl-C, SIGTERM or SIGHUP
    """
    # The wrappers let Python start with Ctrl-C ignored: its own start would end in a traceback.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    try:
        code = getattr(importlib.import_module(module), function)()
        sys.stdout.flush()
    except KeyboardInterrupt as error:
        print(str(error) or "Stopped", file=sys.stderr)
        code = 130
        for number in (signal.SIGTERM, signal.SIGHUP):
            if str(error).endswith(number.name):
                code = 128 + number
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        code = 1
        if os.environ.get("TRACEBACK"):
            raise
        if isinstance(error, UserError):
            print(error, file=sys.stderr)
        elif isinstance(error, OSError):
            print(told(error), file=sys.stderr)
        else:
            what = f"unexpected {type(error).__name__}: {first_line(error)}"
            print(f"{what}; TRACEBACK=1 before the command shows where", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("python -m slang.errors MODULE [flags]: name one of mlx_lm's programs")
    del sys.argv[0]
    program(sys.argv[0])
