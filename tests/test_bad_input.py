"""What people get wrong, in one table: each script and wrapper run as from a terminal, on files, flags and machines that are.

For each case: the exit code, the exact message, no traceback, and a folder whose files are byte for byte what they were.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import ROOT, TINY, run
from test_adapters import ADAPTERS
from test_models import MESSAGES

from slang import prompt

pytestmark = pytest.mark.slow

ROW = {"slang": "mae", "meaning": "Amigo.", "messages": prompt.load(ROOT / "prompt.toml").row("mae", "Amigo.", 0)}


def line(record: object) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


@dataclass
class Case:
    """`{d}` in command, message and environment is the case's folder; `files` are put there, then `arrange` has its way.

    The message is all of stderr but for the usage and the wrappers' `+ command` lines; of a case that is accepted, of stdout.
    """

    id: str
    command: str
    code: int
    message: str
    files: dict[str, bytes] = field(default_factory=dict)
    arrange: Callable[[Path], object] = lambda folder: None
    environment: dict[str, str] = field(default_factory=dict)


EARLIER = {f"{name}.jsonl": b"earlier\n" for name in ("out", "train", "valid", "test", "eval")}
PROMPT = (ROOT / "prompt.toml").read_bytes()


# --------------------------------------------------------------------------------------------------------------- flags


def usage(command: str, message: str) -> Case:
    return Case(command.replace("{python} ", "").replace("/", "-"), command, 2, message)


FLAGS = [
]  # fmt: skip


# -------------------------------------------------------------------------------------------------- models and adapters


def safetensors(**shapes: tuple[int, int]) -> bytes:
    """A whole file of float32 zeros: an adapter of six layers, its parts named by their module."""
    header, end = {}, 0
    for n in range(6):
        for name, shape in shapes.items():
            start, end = end, end + 4 * shape[0] * shape[1]
            whole = f"model.layers.{n}.{name.replace('__', '.')}"
            header[whole] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


ADAPTER = safetensors(mlp__down_proj__lora_a=(128, 8), mlp__down_proj__lora_b=(8, 256))
LORA = {"rank": 8, "scale": 4.0, "dropout": 0.0, "keys": ["mlp.down_proj"]}
ABOUT = {"model": TINY, "num_layers": -1, "lora_parameters": LORA}
DATA = {f"data/{name}.jsonl": line(ROW) for name in ("train", "valid", "test", "eval")}
OTHER_DATA = {name: content.replace(b"Sos una persona", b"Eres alguien") for name, content in DATA.items()}


def adapter(weights: bytes = ADAPTER, about: bytes = line(ABOUT)) -> dict[str, bytes]:
    return {"a/adapters.safetensors": weights, "a/adapter_config.json": about, "a/prompt.toml": PROMPT, **DATA}


def wrapper(id: str, command: str, message: str, files: dict[str, bytes] | None = None, arrange=lambda d: None, **env) -> Case:
    folders = {"ADAPTER_PATH": "{d}/a", "DATA": "{d}/data", "FUSED_PATH": "{d}/fused", "RESULTS": "{d}/results"}
    return Case(id, command, 1, message, adapter() if files is None else files, arrange, {"MODEL": TINY, **folders, **env})


NO_DATA = "{d}/data/train.jsonl: not there; run python make_jsonl.py and python split_jsonl.py first"
MODELS = [
    wrapper("no-data", "./train.sh", NO_DATA, {}),
    wrapper("empty-data", "./train.sh", "{d}/data/train.jsonl: no record in it; run make_jsonl.py and split_jsonl.py first",
            DATA | {"data/train.jsonl": b""}),
    wrapper("data-cut-off", "./train.sh",
            "{d}/data/valid.jsonl:1: not valid JSON (JSON is malformed: invalid character (byte 0)); "
            "write the file again with make_jsonl.py",
            DATA | {"data/valid.jsonl": b"mae\n"}),
    wrapper("data-of-another-prompt", "./train.sh", "{d}/data/train.jsonl:1: made with another system prompt than prompt.toml "
            "has; run make_jsonl.py and split_jsonl.py again", OTHER_DATA),
    wrapper("adapter-path-empty", "./train.sh", "ADAPTER_PATH is empty; set it to a folder", ADAPTER_PATH=""),
    wrapper("adapter-path-is-a-file", "./train.sh", "{d}/a/prompt.toml: not a folder that can be written; set ADAPTER_PATH to "
            "another", ADAPTER_PATH="{d}/a/prompt.toml"),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the machine

# A disk of its own at $1, mounted as $2 says; what is on it afterwards goes to stdout.
DISK = """mount -t tmpfs -o size=64k none "$1" && cp "$1/../out.jsonl" "$1" && mount -o "remount,$2" "$1" || exit 99
disk=$1; shift 2; "$@"; code=$?; cd "$disk"; find . -type f; cat out.jsonl; exit $code"""
FULL, READ_ONLY = (f"unshare -rm sh -c {shlex.quote(DISK)} sh {{d}}/disk {options} " for options in ("rw", "ro"))

def on_disk(id: str, kind: str, command: str, message: str, **more) -> Case:
    return Case(id, kind + command, 1, message, arrange=lambda d: (d / "disk").mkdir(), **more)


MACHINE = [
    *(on_disk(f"read-only-disk-{variable.lower()}", READ_ONLY, command,
              f"{{d}}/disk/x: not a folder that can be written; set {variable} to another", files=adapter(),
              environment={"MODEL": TINY, "ADAPTER_PATH": "{d}/a", "DATA": "{d}/data", variable: "{d}/disk/x"})
      for variable, command in (("ADAPTER_PATH", "./train.sh"), ("RESULTS", "./evaluate.sh"))),
]  # fmt: skip

CASES = [*FLAGS, *MODELS, *MACHINE]


def contents(folder: Path) -> dict[str, object]:
    """Every path below a folder, with a file's bytes (a link's are those of what it names) and what else is there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        readable = path.is_file() and os.access(path, os.R_OK)
        found[name] = (path.is_symlink(), path.read_bytes() if readable else path.stat().st_mode)
    return found


def needs(command: str) -> None:
    """Skip where the machine gives no namespaces or no setpriv, such as macOS."""
    tool = command.split()[0]
    if tool in ("unshare", "setpriv"):
        probe = {"unshare": ["unshare", "-rmn", "true"], "setpriv": ["setpriv", "--bounding-set=-all", "true"]}[tool]
        if not shutil.which(tool) or subprocess.run(probe, capture_output=True).returncode:
            pytest.skip(f"{' '.join(probe)} does not work here")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_case(case: Case, tmp_path: Path, record_property) -> None:
    def filled(text: str) -> str:
        return text.replace("{d}", str(tmp_path)).replace("{python}", sys.executable)

    needs(case.command)
    for name, content in {**EARLIER, **case.files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    case.arrange(tmp_path)
    before = contents(tmp_path)
    environment = {"VENV": sys.prefix} | {name: filled(value) for name, value in case.environment.items()}
    done = run(*shlex.split(filled(case.command)), **environment)

    noise = re.compile(r"\+ |usage: |  ")
    told = [text for text in done.stderr.splitlines() if not noise.match(text)]
    assert done.returncode == case.code, done.stderr
    assert (told if case.code else done.stdout.splitlines()) == filled(case.message).splitlines()
    assert "Traceback" not in done.stdout + done.stderr
    if " sh -c " in case.command:
        assert done.stdout == "./out.jsonl\nearlier\n"
    if not case.code:
        before["out.jsonl"] = (False, (tmp_path / "out.jsonl").read_bytes())
    assert contents(tmp_path) == before
    record_property("wrong inputs", 1)


# What a dictionary, a prompt and a question may hold without a shell, a template or a Modelfile ever taking it for its own.
ODD = ["mae $(touch x)", "`touch x`", 'it\'s "q"', "a\\b\\n", "{slang}", "pura vida"]
ODD_SYSTEM = """- Sos "de" Costa Rica: it's \\n $(touch x) `touch x` {{ x }} \\
-f otra línea "
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> dict[str, str]:
    """The environment of a copy of the repository in a folder with a space and accents in its name, made through `git`."""
    folder = tmp_path_factory.mktemp("mi clón é")
    listed = run("git", "ls-files", "-co", "--exclude-standard", "-z").stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    names = {"ROOT": ".", "DATA": "los datós", "ADAPTER_PATH": "adap tér", "FUSED_PATH": "fusionadó", "RESULTS": "resul tados",
             "DICTIONARY": "mis $(touch x).txt"}  # fmt: skip
    folders = {name: str(folder / path) for name, path in names.items()}
    return {"MODEL": TINY, "VENV": sys.prefix, "OPENBLAS_NUM_THREADS": "1", **folders}


def offline(environment: dict[str, str], wrapper: str, *arguments: str) -> subprocess.CompletedProcess:
    """A script of the clone, run from another directory in a network namespace with nothing but loopback."""
    needs("unshare")
    command = [f"{environment['ROOT']}/{wrapper}", *arguments]
    if wrapper.endswith(".py"):
        command.insert(0, sys.executable)
    return run("unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command, cwd=Path("/"), **environment)


def step(environment: dict[str, str], wrapper: str, *arguments: str) -> str:
    done = offline(environment, wrapper, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(clone: dict[str, str]) -> dict[str, str]:
    """The clone with a prompt and slangs of odd text, and an adapter of two steps."""
    text = re.sub(r"(?m)^system = .*", lambda _: f"system = {json.dumps(ODD_SYSTEM, ensure_ascii=False)}", PROMPT.decode())
    (Path(clone["ROOT"]) / "prompt.toml").write_text(text, encoding="utf-8")
    meanings = re.findall("::(.*)", (ROOT / "data/demo.txt").read_text(encoding="utf-8"))
    lines = [f"{slang}::{meanings[4 * i + j]}\n" for i, slang in enumerate(ODD) for j in range(4)]
    Path(clone["DICTIONARY"]).write_text("".join(lines), encoding="utf-8")
    data = clone["DATA"]
    step(clone, "make_jsonl.py", "--input", clone["DICTIONARY"], "--output", f"{data}/all.jsonl", "--forms", "all",
         "--prompt", f"{clone['ROOT']}/prompt.toml")  # fmt: skip
    outputs = [part for name in ("train", "valid", "test", "eval") for part in (f"--{name}", f"{data}/{name}.jsonl")]
    step(clone, "split_jsonl.py", "--input", f"{data}/all.jsonl", *outputs, "--train-ratio", "0.5", "--valid-ratio", "0.25")
    step(clone, "train.sh", "--iters", "2")
    return clone


@pytest.mark.xdist_group("clone")
def test_every_step_without_network_from_elsewhere_and_with_odd_text(trained: dict[str, str]) -> None:
    root = Path(trained["ROOT"])
    assert "Qué significa en Costa Rica" in step(trained, "evaluate.sh", "--quick")
    assert len(step(trained, "chat.sh", 'mae $(touch x) `touch x` "\\n\notra línea').strip()) > 1
    step(trained, "fuse.sh", "--type", "f32")

    prompts = {Path(trained[name], "prompt.toml").read_bytes() for name in ("ROOT", "ADAPTER_PATH", "FUSED_PATH")}
    modelfile = (Path(trained["FUSED_PATH"]) / "Modelfile").read_text(encoding="utf-8")
    (report,) = Path(trained["RESULTS"]).glob("*.json")
    assert len(prompts) == 1
    assert re.search(r'SYSTEM """(.*)"""\nPARAMETER', modelfile, re.DOTALL)[1] == ODD_SYSTEM.strip()
    assert {item["slang"] for item in json.loads(report.read_text(encoding="utf-8"))["items"]} == set(ODD)
    assert not [path for path in (*root.rglob("x"), Path("/x"), ROOT / "x") if path.exists()]


@pytest.mark.xdist_group("clone")
def test_training_that_cannot_go_on_or_be_saved(trained: dict[str, str], tmp_path: Path) -> None:
    """A state that is cut off, and a disk that fills up."""
    adapter = Path(trained["ADAPTER_PATH"])
    state = adapter / "resume.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    before = contents(adapter)
    done = offline(trained, "train.sh", "--iters", "3", "--resume")
    told = f"{state}: cut off, or not written by this program; leave --resume out to begin anew"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, told) and contents(adapter) == before

    (tmp_path / "disk").mkdir()
    (tmp_path / "out.jsonl").write_text("earlier\n")
    on_a_disk = ["unshare", "-rm", "sh", "-c", DISK.replace("64k", "1m"), "sh", tmp_path / "disk", "rw"]
    done = run(*on_a_disk, f"{trained['ROOT']}/train.sh", **{**trained, "ADAPTER_PATH": f"{tmp_path}/disk/a"})
    told = f"{tmp_path}/disk/a/resume.safetensors: No space left on device; make room and run this again"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, told)
    assert not re.search(r"(?m)^\./.*safetensors", done.stdout)


PIP = "pip could not install requirements.txt; see its message above, check the connection and run this again"


@pytest.mark.xdist_group("clone")
def test_no_environment_and_no_network(clone: dict[str, str]) -> None:
    """What pip could not fill is not taken for whole: the next run begins anew."""
    venv = Path(clone["ROOT"]) / ".venv"
    for _ in range(2):
        done = offline({**clone, "VENV": str(venv), "PIP_RETRIES": "0", "PIP_NO_CACHE_DIR": "1"}, "train.sh")
        assert done.returncode == 1 and "Traceback" not in done.stderr
        first, *_, last = done.stderr.splitlines()
        assert first == f"Installing requirements.txt into {venv} (once; a minute or two) ..."
        assert last == PIP
        assert not (venv / "installed-for.txt").exists() and (venv / "made-by-config.sh").exists()


# ----------------------------------------------------------------------------------------------------------------- README


def test_readme_shows_what_is_printed() -> None:
    """Each error of the README's table, but for its file and line, is the message of a case above."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## When something goes wrong")[1].split("\n## ")[0]
    shown = re.findall(r"^\| `+ ?(.*?) ?`+ \|", section, re.MULTILINE)
    told = [case.message for case in CASES] + [PIP, *MESSAGES]
    told += [message for _, message in ADAPTERS.values()]
    assert len(shown) == 10
    assert not [text for text in shown if not any(text in message for message in told)]
