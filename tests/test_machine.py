"""The wrappers on a machine without a network, and with disks that are full or read-only.

Their project is a copy in a folder with an odd name, their data of odd text, and they are started
from elsewhere. Nothing of what a dictionary or a prompt holds is ever taken for shell or template.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, run
from training import contents

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("machine")]

SPLITS = ("train", "valid", "test", "eval")
ODD = ["mae $(touch x)", "`touch x`", 'it\'s "q"', "a\\b\\n", "{slang}", "pura vida"]
ODD_SYSTEM = """- Sos "de" Costa Rica: it's \\n $(touch x) `touch x` {{ x }} \\
-f otra línea "
"""
# A disk of its own at $1, mounted as $2 says; what is on it afterwards goes to stdout.
DISK = """
mount -t tmpfs -o size=1m none "$1" && echo earlier >"$1/earlier" && mount -o "remount,$2" "$1" ||
  exit 99
disk=$1; shift 2; "$@"; code=$?; cd "$disk"; find . -type f; cat earlier; exit $code
"""
PIP = "pip could not install requirements.txt; see its message above, check the connection and "


def needs_namespaces() -> None:
    """Skip where the machine gives none, such as macOS."""
    probe = ["unshare", "-rmn", "true"]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("unshare -rmn does not work here")


def on_a_disk(disk: Path, options: str, *command: str | Path, **environment: str):
    """Run a command that sees a disk of 1 MB at `disk`. Returns it as `run` does."""
    needs_namespaces()
    disk.mkdir()
    return run("unshare", "-rm", "sh", "-c", DISK, "sh", disk, options, *command, **environment)


def offline(environment: dict[str, str], script: str, *arguments: str):
    """Run a script of the clone, from / and with no network but loopback."""
    needs_namespaces()
    command = [f"{environment['ROOT']}/{script}", *arguments]
    if script.endswith(".py"):
        command.insert(0, sys.executable)
    up = 'ip link set lo up && exec "$@"'
    return run("unshare", "-rn", "sh", "-c", up, "sh", *command, cwd=Path("/"), **environment)


def step(environment: dict[str, str], script: str, *arguments: str) -> str:
    done = offline(environment, script, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> dict[str, str]:
    """The environment of a copy of the project, with blanks and accents in every name."""
    folder = tmp_path_factory.mktemp("mi clón é")
    listed = run("git", "ls-files", "-co", "--exclude-standard", "-z").stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    names = {
        "ROOT": ".",
        "DATA": "los datós",
        "ADAPTER_PATH": "adap tér",
        "FUSED_PATH": "fusionadó",
        "RESULTS": "resul tados",
        "DICTIONARY": "mis $(touch x).txt",
    }
    folders = {name: str(folder / path) for name, path in names.items()}
    return {"MODEL": TINY, "VENV": sys.prefix, "OPENBLAS_NUM_THREADS": "1", **folders}


@pytest.fixture(scope="module")
def trained(clone) -> dict[str, str]:
    """The clone with a prompt and slangs of odd text, and an adapter of two steps."""
    system = f"system = {json.dumps(ODD_SYSTEM, ensure_ascii=False)}"
    text = (ROOT / "prompt.toml").read_text(encoding="utf-8")
    text = re.sub(r"(?m)^system = .*", lambda _: system, text)
    prompt = Path(clone["ROOT"]) / "prompt.toml"
    prompt.write_text(text, encoding="utf-8")
    demo = (ROOT / "data/demo.txt").read_text(encoding="utf-8")
    meanings = re.findall("::(.*)", demo)
    lines = [f"{slang}::{meanings[4 * i + j]}\n" for i, slang in enumerate(ODD) for j in range(4)]
    Path(clone["DICTIONARY"]).write_text("".join(lines), encoding="utf-8")

    rows = f"{clone['DATA']}/all.jsonl"
    made = ["--input", clone["DICTIONARY"], "--output", rows, "--forms", "all"]
    step(clone, "make_jsonl.py", *made, "--prompt", str(prompt))
    outputs = []
    for name in SPLITS:
        outputs += [f"--{name}", f"{clone['DATA']}/{name}.jsonl"]
    shares = ["--train-ratio", "0.5", "--valid-ratio", "0.25"]
    step(clone, "split_jsonl.py", "--input", rows, *outputs, *shares)
    step(clone, "train.sh", "--iters", "2")
    return clone


def test_every_step_without_network_from_elsewhere_and_with_odd_text(trained):
    root = Path(trained["ROOT"])
    assert "Qué significa en Costa Rica" in step(trained, "evaluate.sh", "--quick")
    question = 'mae $(touch x) `touch x` "\\n\notra línea'
    assert len(step(trained, "chat.sh", question).strip()) > 1
    step(trained, "fuse.sh", "--type", "f32")

    folders = [Path(trained[name]) for name in ("ROOT", "ADAPTER_PATH", "FUSED_PATH")]
    assert len({(folder / "prompt.toml").read_bytes() for folder in folders}) == 1
    modelfile = (Path(trained["FUSED_PATH"]) / "Modelfile").read_text(encoding="utf-8")
    system = re.search(r'SYSTEM """(.*)"""\nPARAMETER', modelfile, re.DOTALL)[1]
    assert system == ODD_SYSTEM.strip()
    (report,) = Path(trained["RESULTS"]).glob("*.json")
    items = json.loads(report.read_text(encoding="utf-8"))["items"]
    assert {item["slang"] for item in items} == set(ODD)
    assert not [path for path in (*root.rglob("x"), Path("/x"), ROOT / "x") if path.exists()]


def test_a_state_that_is_cut_off_is_not_gone_on_from(trained):
    adapter = Path(trained["ADAPTER_PATH"])
    state = adapter / "resume.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    before = contents(adapter)
    done = offline(trained, "train.sh", "--iters", "3", "--resume")
    told = f"{state}: cut off, or not written by this program; leave --resume out to begin anew"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, told)
    assert contents(adapter) == before


def test_a_training_that_cannot_be_saved(trained, tmp_path):
    """The disk fills up, and nothing half written stays on it."""
    disk = tmp_path / "disk"
    environment = {**trained, "ADAPTER_PATH": f"{disk}/a"}
    done = on_a_disk(disk, "rw", f"{trained['ROOT']}/train.sh", **environment)
    told = f"{disk}/a/resume.safetensors: No space left on device; make room and run this again"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, told)
    assert not re.search(r"(?m)^\./.*safetensors", done.stdout)


@pytest.mark.parametrize(
    ("wrapper", "variable"), [("train.sh", "ADAPTER_PATH"), ("evaluate.sh", "RESULTS")]
)
def test_a_disk_that_is_read_only(trained, tmp_path, wrapper, variable):
    """It is named before anything dear."""
    disk = tmp_path / "disk"
    environment = {**trained, variable: f"{disk}/x"}
    done = on_a_disk(disk, "ro", f"{trained['ROOT']}/{wrapper}", **environment)
    told = f"{disk}/x: not a folder that can be written; set {variable} to another"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, told)
    assert (done.stdout, "Traceback" in done.stderr) == ("./earlier\nearlier\n", False)


def test_no_environment_and_no_network(clone):
    """What pip could not fill is not taken for whole: the next run begins anew."""
    venv = Path(clone["ROOT"]) / ".venv"
    environment = {**clone, "VENV": str(venv), "PIP_RETRIES": "0", "PIP_NO_CACHE_DIR": "1"}
    for _ in range(2):
        done = offline(environment, "train.sh")
        assert done.returncode == 1 and "Traceback" not in done.stderr
        first, *_, last = done.stderr.splitlines()
        assert first == f"Installing requirements.txt into {venv} (once; a minute or two) ..."
        assert last == f"{PIP}run this again"
        assert not (venv / "installed-for.txt").exists()
        assert (venv / "made-by-config.sh").exists()
