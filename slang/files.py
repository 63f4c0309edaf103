"""Files are read whole, and written whole or not at all, by one run at a time.

What is new is made beside the old under a name that nobody else has. It takes the old one's place
when it is finished. Nothing that is found in a folder is obeyed, and no link is followed.
After kill -9 a hidden .part can stay behind; nothing reads it, and it may be deleted.
"""

import codecs
import errno
import fcntl
import os
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from slang.errors import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # their OSError names no file


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C and its kin wait until the block is left: for renaming files that belong together.

    The handlers are exchanged, for a blocked signal would go to one of the threads of MLX.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs handlers in the main thread alone
        return
    received: list[int] = []
    before: dict[signal.Signals, Any] = {}
    try:
        for number in SIGNALS:
            handler = signal.getsignal(number)
            before[number] = signal.SIG_DFL if handler is None else handler
            signal.signal(number, lambda number, _frame: received.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for late in received:
        signal.raise_signal(late)


def read(path: str | Path) -> bytes:
    """A whole file. Raises UserError for a folder, a pipe or a device, OSError when it can't be."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116  Path("") would be the folder
        raise UserError(f"{path}: not a regular file; name another")
    with open(path, "rb") as file:
        return file.read()


def text_of(data: bytes, path: str | Path, remedy: str = "save the file as UTF-8") -> str:
    """The text of a file that was read, with \\n at the end of each line and no byte order mark.

    Raises UserError where it is no UTF-8.
    """
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8; {remedy}") from None


def is_utf16(data: bytes) -> bool:
    """Whether a file is UTF-16 or UTF-32: it says so, or every other byte is 0."""
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return marked or data.count(0) > len(data) / 4


def need(path: Path, remedy: str) -> None:
    """Raises UserError unless the file is there."""
    if not path.is_file():
        what = "not a regular file" if path.exists() else "not there"
        raise UserError(f"{path}: {what}; {remedy}")


def need_folder(folder: Path, remedy: str) -> None:
    """Raises UserError unless files can be put there; nothing is made yet."""
    there = folder
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: not a folder that can be written; {remedy}")


@contextmanager
def replacing(*paths: str | Path) -> Iterator[list[BinaryIO]]:
    """Open a part beside each path; when the block ends well, they take their places, else none.

    They do so one after the other, and kill -9 can come in between. A link is replaced by a file,
    and what it leads to stays. A pipe or device is written as it is.
    Raises UserError where a path is a folder or is write-protected, OSError where its folder can't
    be written or is full.
    """
    files: list[BinaryIO] = []
    parts: list[tuple[Path, Path]] = []
    try:
        for path in paths:
            if not os.path.basename(path):  # noqa: PTH119  Path("x/") would be x
                raise UserError(f"{str(path) or repr('')}: a folder; name a file")
            target = Path(path)
            if is_device(target):
                files.append(open(target, "ab"))  # noqa: SIM115
                continue
            mode = mode_of(target)
            folder_for(target)
            with undisturbed():
                number, part = _part(target)
                files.append(os.fdopen(number, "wb", 1 << 20))
                parts.append((part, target))
            os.fchmod(number, mode)
        yield files
        for file in files:
            file.flush()
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                os.fsync(file.fileno())
        with undisturbed():
            for part, target in parts:
                os.replace(part, target)
    except OSError as error:
        if error.errno in FULL and error.filename is None:
            error.filename = str(paths[0])
        raise
    finally:
        for part, _ in parts:
            part.unlink(missing_ok=True)
        for file in files:
            with suppress(OSError):
                file.close()


def is_device(path: str | Path) -> bool:
    """A pipe, a device, or /dev/stdout whatever it leads to: nothing there can be replaced."""
    target = Path(path)
    folder = target.parent.resolve()
    if folder in (Path("/dev"), Path("/dev/fd")) or Path("/proc") in folder.parents:
        return True
    return target.exists() and not target.is_file() and not target.is_dir()


def mode_of(target: Path) -> int:
    """The permissions that a new file gets: those of the old one, if there is one.

    Raises UserError where it can't take the old one's place.
    """
    if target.is_dir():
        raise UserError(f"{target}: a folder; name a file")
    if not target.exists():
        return 0o666 & ~_umask()
    mode = stat.S_IMODE(target.stat().st_mode)
    if not mode & 0o222:
        raise UserError(f"{target}: write-protected; chmod u+w it or name another")
    return mode


def _part(target: Path) -> tuple[int, Path]:
    """A new file beside the target, open for writing, and its name."""
    prefix = f".{target.name[:40]}."
    try:
        number, part = tempfile.mkstemp(dir=target.parent, prefix=prefix, suffix=".part")
    except OSError as error:  # it names the part, which nobody knows
        raise OSError(error.errno, error.strerror, str(target)) from None
    return number, Path(part)


def folder_for(path: Path) -> None:
    """Make the folder that `path` will be in. Raises UserError where that is something else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path}: {path.parent} is no folder; name another place") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def locked(folder: Path, doing: str = "") -> Iterator[None]:
    """Hold a folder's lock, and make the folder if need be.

    The system gives the lock back however the process ends.
    Waits for another run that has it. Where it says what it is `doing`, it does not wait but raises
    UserError: `adapters: another run is training there; ...`.
    """
    folder_for(folder / ".lock")
    number = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | (fcntl.LOCK_NB if doing else 0))
        except BlockingIOError:
            remedy = "wait for it or name another folder"
            raise UserError(f"{folder}: another run is {doing} there; {remedy}") from None
        yield
    finally:
        os.close(number)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new, empty folder beside `folder`, which takes its place when the block ends well.

    Else the old one stays. Raises UserError where `folder` is a file, or where one stands in it.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: not a folder; name another")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UserError(f"{folder}: the folder that this runs in; name another")
    folder_for(folder)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
    old = part.with_suffix(".old")
    try:
        part.chmod(0o777 & ~_umask())
        yield part
        with undisturbed():
            _swap(part, folder, old)
    finally:
        for left in (part, old):
            if left.is_symlink():
                left.unlink()
            shutil.rmtree(left, ignore_errors=True)


def _swap(part: Path, folder: Path, old: Path) -> None:
    """Move `folder` to `old` and `part` to `folder`; `folder` is back when that fails."""
    with suppress(FileNotFoundError):
        os.replace(folder, old)
    try:
        os.replace(part, folder)
    except OSError:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise


def overwritten(source: str | Path, targets: Iterable[str | Path]) -> str | None:
    """The first target that is the source or another target, under whatever name, or None."""
    seen = [Path(source)]
    for target in map(Path, targets):
        for other in seen:
            same = os.path.realpath(target) == os.path.realpath(other)
            if same or (target.exists() and other.exists() and target.samefile(other)):
                return str(target)
        seen.append(target)
    return None


def default(*names: str) -> str:
    """A path that starts at the project's folder, as config.sh's do; an absolute one stays."""
    return str(Path(os.path.relpath(Path(__file__).parent.parent), *names))
