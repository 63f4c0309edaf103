"""Run a command at a terminal, and type."""

import fcntl
import os
import pty
import select
import signal
import subprocess
import termios
import time
from pathlib import Path

from conftest import ROOT


def at_terminal(
    *command: str | Path,
    keys: list[tuple[str, str | float]],
    seconds: float = 60,
    **environment: str,
) -> tuple[int, str]:
    """Run a command at a terminal of its own. Returns its exit code and all that was shown.

    `keys` are pairs: when the first text has been shown, after all before it, the second is typed.
    "\x03" is Ctrl-C and "\x04" Ctrl-D.
    """
    ours, theirs = pty.openpty()

    def own_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it

    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=own_terminal,
    )
    os.close(theirs)
    shown, seen, waiting = "", 0, list(keys)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        while waiting and (found := shown.find(waiting[0][0], seen)) >= 0:
            seen = found + len(waiting[0][0])
            key = waiting.pop(0)[1]
            if isinstance(key, str):
                os.write(ours, key.encode())
            else:
                time.sleep(key)
        if not select.select([ours], [], [], 0.1)[0]:
            continue
        try:
            shown += os.read(ours, 1 << 16).decode(errors="replace").replace("\r\n", "\n")
        except OSError:  # the last process has closed the terminal
            break
    else:
        process.kill()
    os.close(ours)
    return process.wait(), shown
