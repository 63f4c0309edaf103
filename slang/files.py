"""Files are written whole or not at all, and by one run at a time.

What is new is made beside the old under a name that nobody else has, and takes its place when it is finished. Nothing that is
found in a folder is obeyed, and no link is followed.
"""

import fcntl
import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from slang.errors import UserError

SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C and its kin wait until the block is left: for renaming files that belong together."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def replacing(*paths: str | Path) -> Iterator[list[BinaryIO]]:
    """Open a part beside each path; when the block ends well, all take their places, else none does.

    A link is replaced by a file, and what it leads to stays. A pipe or a device is written as it is.
    Raises UserError where a path is a folder or is write-protected, OSError where the folder can't be written.
    """
    files: list[BinaryIO] = []
    parts: list[tuple[Path, Path]] = []
    try:
        for target in map(Path, paths):
            if target.is_dir():
                raise UserError(f"{target}: a folder; name a file")
            if target.exists() and not target.is_file():
                files.append(open(target, "wb"))  # noqa: SIM115
                continue
            mode = 0o666 & ~_umask()
            if target.exists():
                mode = stat.S_IMODE(target.stat().st_mode)
                if not mode & 0o222:
                    raise UserError(f"{target}: write-protected; chmod u+w it or name another")
            folder_for(target)
            number, part = tempfile.mkstemp(
                dir=target.parent, prefix=f".{target.name[:100]}.", suffix=".part"
            )
            parts.append((Path(part), target))
            files.append(os.fdopen(number, "wb", 1 << 20))
            os.fchmod(number, mode)
        yield files
        for file in files:
            file.flush()
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                os.fsync(file.fileno())
        with undisturbed():
            for part, target in parts:
                os.replace(part, target)
    finally:
        for part, _ in parts:
            part.unlink(missing_ok=True)
        for file in files:
            with suppress(OSError):
                file.close()


def folder_for(path: Path) -> None:
    """Make the folder that `path` will be in. Raises UserError where something else is in its place."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path}: {path.parent} is no folder; name another place") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """Hold a folder's lock, and make the folder if need be; the system gives it back however the process ends.

    Raises UserError when another run has it: `adapters: another run is training there; ...`.
    """
    folder_for(folder / ".lock")
    number = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(number)
        raise UserError(
            f"{folder}: another run is {doing} there; wait for it or name another folder"
        ) from None
    try:
        yield
    finally:
        os.close(number)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new, empty folder beside `folder`, which takes its place when the block ends well; else the old one stays."""
    folder_for(folder)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
    part.chmod(0o777 & ~_umask())
    old = part.with_name(part.name.removesuffix(".part") + ".old")
    try:
        yield part
        with undisturbed():
            if folder.exists():
                os.rename(folder, old)
            os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def overwritten(source: str | Path, targets: Iterable[str | Path]) -> str | None:
    """The first target that is the source, or another target, under whatever name; None when all are apart."""
    seen = [Path(source)]
    for target in map(Path, targets):
        for other in seen:
            same = os.path.realpath(target) == os.path.realpath(other)
            if same or (target.exists() and other.exists() and os.path.samefile(target, other)):
                return str(target)
        seen.append(target)
    return None
