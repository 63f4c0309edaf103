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

from slang import model_files, prompt

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
    usage("./chat.sh pura vida", "chat.sh: one question at a time; put it in quotes"),
    usage("./chat.sh ' '", "chat.sh: the question is empty; leave it out for a conversation"),
    usage("./chat.sh --gguf", "chat.sh: --gguf needs a file, such as fused_model/NAME-Q4_K_M.gguf"),
    usage("./fuse.sh --save-path x", "fuse.sh: --save-path: set MODEL, ADAPTER_PATH or FUSED_PATH in its place"),
    usage("{python} -m slang.gguf --check x --questions 0",
          "python -m slang.gguf: error: --questions and --answers have to be 1 or more"),
    usage("{python} -m slang.evaluate --seed -1", "python -m slang.evaluate: error: --seed -1: give a whole number from 0"),
]  # fmt: skip


# -------------------------------------------------------------------------------------------------- models and adapters


def safetensors(**shapes: tuple[int, int]) -> bytes:
    """A whole file of float32 zeros: an adapter of the first layer, its parts named by their module."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * shape[0] * shape[1]
        whole = f"model.layers.0.{name.replace('__', '.')}"
        header[whole] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


ADAPTER = safetensors(mlp__down_proj__lora_a=(128, 8), mlp__down_proj__lora_b=(8, 256))
OF_270M = safetensors(mlp__down_proj__lora_a=(2048, 8), mlp__down_proj__lora_b=(8, 640))
ABOUT = {"model": "mlx-community/gemma-3-270m-it-bf16", "num_layers": -1, "lora_parameters": {"rank": 8}}
DATA = {f"data/{name}.jsonl": line(ROW) for name in ("train", "valid", "test", "eval")}
OTHER_DATA = {name: content.replace(b"Sos una persona", b"Eres alguien") for name, content in DATA.items()}


def adapter(weights: bytes = ADAPTER, about: bytes = line(ABOUT)) -> dict[str, bytes]:
    return {"a/adapters.safetensors": weights, "a/adapter_config.json": about, "a/prompt.toml": PROMPT, **DATA}


def model(**changes: bytes | None) -> Callable[[Path], None]:
    """The tiny model as {d}/m, with JSON files, or the `weights`, replaced or (None) left out."""

    def arrange(folder: Path) -> None:
        (folder / "m").mkdir()
        for path in (ROOT / TINY).iterdir():
            (folder / "m" / path.name).symlink_to(path)
        for name, content in changes.items():
            path = folder / "m" / {"weights": "model.safetensors"}.get(name, f"{name}.json")
            path.unlink()
            if content is not None:
                path.write_bytes(content)

    return arrange


def wrapper(id: str, command: str, message: str, files: dict[str, bytes] | None = None, arrange=lambda d: None, **env) -> Case:
    folders = {"ADAPTER_PATH": "{d}/a", "DATA": "{d}/data", "FUSED_PATH": "{d}/fused", "RESULTS": "{d}/results"}
    return Case(id, command, 1, message, adapter() if files is None else files, arrange, {"MODEL": TINY, **folders, **env})


def base(id: str, message: str, arrange: Callable[[Path], None]) -> Case:
    return wrapper(id, "./chat.sh --baseline mae", message, {}, arrange, MODEL="{d}/m")


def edited(name: str, **changes: object) -> bytes:
    return line(json.loads((ROOT / TINY / name).read_text(encoding="utf-8")) | changes)


NO_ADAPTER = "{d}/a/adapters.safetensors: not there; run ./train.sh first, or set ADAPTER_PATH to an adapter's folder"
CUT = (
    "{d}/a/adapters.safetensors: not a whole safetensors file (it ends too early); "
    "copy one of the numbered checkpoints over it, or run ./train.sh again"
)
OTHER = (
    "{d}/a/adapters.safetensors: trained on another model than models/tiny-gemma3 (model.layers.0.mlp.down_proj.lora_a is "
    "2048 x 8); set MODEL=mlx-community/gemma-3-270m-it-bf16, as its adapter_config.json says"
)
AGAIN = "copy or download the model again"
SEVERAL = ("./chat.sh mae", "./evaluate.sh", "./fuse.sh")
NO_DATA = "{d}/data/train.jsonl: not there; run python make_jsonl.py and python split_jsonl.py first"
FORBIDDEN = "no folder here, not downloaded yet, and HF_HUB_OFFLINE forbids it; unset that, or try MODEL=models/tiny-gemma3"
MODELS = [
    wrapper("no-data", "./train.sh", NO_DATA, {}),
    wrapper("no-data-to-evaluate", "./evaluate.sh", NO_DATA, {}),
    wrapper("empty-data", "./train.sh", "{d}/data/train.jsonl: no record in it; run make_jsonl.py and split_jsonl.py first",
            DATA | {"data/train.jsonl": b""}),
    wrapper("data-cut-off", "./train.sh",
            "{d}/data/valid.jsonl:1: not valid JSON (JSON is malformed: invalid character (byte 0)); "
            "write the file again with make_jsonl.py",
            DATA | {"data/valid.jsonl": b"mae\n"}),
    wrapper("data-of-another-prompt", "./train.sh", "\n".join(f"{{d}}/data/{name}.jsonl:1: made with another system prompt "
            "than prompt.toml has; run make_jsonl.py and split_jsonl.py again" for name in ("train", "valid")), OTHER_DATA),
    wrapper("test-data-of-another-prompt", "./evaluate.sh", "{d}/data/test.jsonl:1: made with another system prompt than "
            "{d}/a/prompt.toml has; run make_jsonl.py and split_jsonl.py again", adapter() | OTHER_DATA),
    *(wrapper(f"no-adapter-{c.split()[0][2:-3]}", c, NO_ADAPTER, DATA) for c in SEVERAL),
    *(wrapper(f"adapter-cut-off-{c.split()[0][2:-3]}", c, CUT, adapter(ADAPTER[:-1])) for c in SEVERAL),
    *(wrapper(f"adapter-of-another-model-{c.split()[0][2:-3]}", c, OTHER, adapter(OF_270M)) for c in SEVERAL),
    wrapper("adapter-no-longer-a-file", "./chat.sh mae", CUT, adapter(b"")),
    wrapper("adapter-is-text", "./chat.sh mae", CUT.replace("it ends too early", "its header is no JSON"),
            adapter(b"\x04" + bytes(7) + b"{mae")),
    wrapper("adapter-of-another-model-of-no-name", "./chat.sh mae", OTHER.split("; set ")[0] + "; set MODEL to the one it was "
            "trained on", adapter(OF_270M, line({**ABOUT, "model": TINY}))),
    wrapper("adapter-of-more-layers", "./chat.sh mae", OTHER.replace("0.mlp", "9.mlp").replace("2048 x 8", "128 x 8"),
            adapter(ADAPTER.replace(b"layers.0.", b"layers.9."))),
    wrapper("adapter-config-no-json", "./chat.sh mae",
            "{d}/a/adapter_config.json: not a JSON object; run ./train.sh again: the adapter's folder is not whole",
            adapter(about=b"{")),
    wrapper("adapter-config-of-something-else", "./chat.sh mae",
            "{d}/a/adapter_config.json: no num_layers or lora_parameters in it; run ./train.sh again", adapter(about=b"{}")),
    wrapper("adapter-without-prompt", "./chat.sh mae",
            "{d}/a/prompt.toml: not there; copy the prompt.toml that the adapter was trained with into its folder",
            arrange=lambda d: (d / "a/prompt.toml").unlink()),
    wrapper("adapter-path-empty", "./train.sh", "ADAPTER_PATH is empty; set it to a folder", ADAPTER_PATH=""),
    wrapper("adapter-path-is-a-file", "./train.sh", "{d}/a/prompt.toml: not a folder that can be written; set ADAPTER_PATH to "
            "another", ADAPTER_PATH="{d}/a/prompt.toml"),
    wrapper("fused-path-holds-something-else", "./fuse.sh", "{d}/data: holds something that is not a model; set FUSED_PATH to "
            "another folder", FUSED_PATH="{d}/data"),
    wrapper("no-such-model", "./chat.sh --baseline mae",
            "models/none: no such folder; MODEL=models/tiny-gemma3 is the one in this repository", MODEL="models/none"),
    wrapper("model-not-downloaded", "./chat.sh --baseline mae", f"mlx-community/none: {FORBIDDEN}", MODEL="mlx-community/none",
            HF_HUB_OFFLINE="1"),
    wrapper("model-half-downloaded", "./chat.sh --baseline mae", f"a/b: {FORBIDDEN}",
            {"hub/models--a--b/refs/main": b"1" * 40, f"hub/models--a--b/snapshots/{'1' * 40}/config.json": b"{}"},
            MODEL="a/b", HF_HUB_OFFLINE="1", HF_HUB_CACHE="{d}/hub"),
    wrapper("hub-not-reached", "unshare -rn ./chat.sh --baseline mae", "mlx-community/none: no folder here, not downloaded "
            "yet, and Hugging Face did not give it (ConnectError); check the name and the connection, or try "
            "MODEL=models/tiny-gemma3", MODEL="mlx-community/none", HF_HUB_OFFLINE="0"),
    wrapper("no-model-folder", "./fuse.sh", "tests/config.json: not there; MODEL has to name a model's folder", MODEL="tests"),
    base("model-without-weights", "{d}/m: no model*.safetensors; the folder holds no weights, " + AGAIN, model(weights=None)),
    base("model-cut-off", "{d}/m/model.safetensors: not a whole safetensors file (it ends too early); " + AGAIN,
         model(weights=(ROOT / TINY / "model.safetensors").read_bytes()[:100_000])),
    base("model-config-no-json", "{d}/m/config.json: not a JSON object; MODEL has to name a model's folder",
         model(config=b"{")),
    base("model-without-tokenizer", "{d}/m/tokenizer.json: not there; " + AGAIN,
         lambda d: [model(tokenizer=None)(d), (d / "m/tokenizer.model").unlink()]),
    base("model-without-chat-template", "{d}/m: no chat template; take an instruction-tuned model, such as gemma-3-1b-it",
         lambda d: [model()(d), (d / "m/chat_template.jinja").unlink()]),
    base("model-with-code", "{d}/m/config.json: the model wants code of its own run, which is never done; take another",
         model(config=edited("config.json", model_file="evil.py"))),
    wrapper("no-such-gguf", "./chat.sh --gguf {d}/x.gguf mae", "{d}/x.gguf: not there; run ./fuse.sh, which writes it"),
    wrapper("gguf-cut-off", "./chat.sh --gguf {d}/x.gguf mae", "{d}/x.gguf: llama.cpp can't load it (Failed to init server, "
            "please check the input params.); export it again with ./fuse.sh", {"x.gguf": b"GGUF"}),
    wrapper("no-such-run", "./evaluate.sh --compare A B", "A: no such run in {d}/results (there: none)"),
    wrapper("run-cut-off", "./evaluate.sh --compare A A", "{d}/results/A.json: not a run of this version of evaluate.sh; "
            "evaluate again", {"results/A.json": b"{"}),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the machine

# A disk of its own at $1, mounted as $2 says; what is on it afterwards goes to stdout.
DISK = """mount -t tmpfs -o size=64k none "$1" && cp "$1/../out.jsonl" "$1" && mount -o "remount,$2" "$1" || exit 99
disk=$1; shift 2; "$@"; code=$?; cd "$disk"; find . -type f; cat out.jsonl; exit $code"""
FULL, READ_ONLY = (f"unshare -rm sh -c {shlex.quote(DISK)} sh {{d}}/disk {options} " for options in ("rw", "ro"))

def on_disk(id: str, kind: str, command: str, message: str, **more) -> Case:
    return Case(id, kind + command, 1, message, arrange=lambda d: (d / "disk").mkdir(), **more)


INSTALLED = b"\n".join(sorted((ROOT / "requirements.txt").read_bytes().splitlines())) + b"\n"
MACHINE = [
    *(on_disk(f"read-only-disk-{variable.lower()}", READ_ONLY, command,
              f"{{d}}/disk/x: not a folder that can be written; set {variable} to another", files=adapter(),
              environment={"MODEL": TINY, "ADAPTER_PATH": "{d}/a", "DATA": "{d}/data", variable: "{d}/disk/x"})
      for variable, command in (("ADAPTER_PATH", "./train.sh"), ("RESULTS", "./evaluate.sh"), ("FUSED_PATH", "./fuse.sh"))),
    on_disk("full-disk-fuse", FULL, "./fuse.sh", "{d}/disk/x: 6 MB needed, 0 MB free; make room", files=adapter(),
            environment={"MODEL": TINY, "ADAPTER_PATH": "{d}/a", "FUSED_PATH": "{d}/disk/x"}),
    Case("python-too-old", "./chat.sh", 1, "{d}/old: Python 3.11 or newer is needed; install it and set PYTHON, for instance "
         "PYTHON=python3.12 ./chat.sh", {"old": b"#!/bin/sh\nexit 1\n"}, lambda d: (d / "old").chmod(0o755),
         {"PYTHON": "{d}/old", "VENV": "{d}/venv"}),
    Case("python-updated-away", "./chat.sh", 1, "{d}/old: Python 3.11 or newer is needed; install it and set PYTHON, for "
         "instance PYTHON=python3.12 ./chat.sh", {"old": b"#!/bin/sh\nexit 1\n", "venv/installed-for.txt": INSTALLED},
         lambda d: (d / "old").chmod(0o755), {"PYTHON": "{d}/old", "VENV": "{d}/venv"}),
    Case("python-without-venv", "./chat.sh", 1, "{d}/bare: its venv module is missing; on Debian or Ubuntu: apt install "
         "python3-venv", {"bare": b'#!/bin/sh\ncase "$2" in *version*) exit 0 ;; esac\nexit 1\n'},
         lambda d: (d / "bare").chmod(0o755), {"PYTHON": "{d}/bare", "VENV": "{d}/venv"}),
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


# ------------------------------------------------------------------------------------------ what one run of mlx_lm is for


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        *((f"--{name} 0", f"--{name} 0: give a whole number from 1") for name in (
            "batch-size", "iters", "grad-accumulation-steps", "max-seq-length", "save-every", "steps-per-eval",
            "steps-per-report")),
        *((f"--{name} 0", f"--{name} 0: give a whole number from 1, or -1 for all")
          for name in ("num-layers", "val-batches", "test-batches")),
        ("--num-layers -2", "--num-layers -2: give a whole number from 1, or -1 for all"),
        ("--early-stop -1", "--early-stop -1: give a whole number from 0"),
        ("--seed -1", "--seed -1: give a whole number from 0"),
        ("--iters 1e3", "argument --iters: invalid int value: '1e3'"),
        ("--learning-rate nan", "--learning-rate nan: give a number above 0, such as 1e-4"),
        ("--learning-rate=-1e-4", "--learning-rate -0.0001: give a number above 0, such as 1e-4"),
        ("-c {d}/rank.yaml", "lora_parameters {'rank': 0, 'scale': 1, 'dropout': 0}: "
         "give rank (from 1), scale and dropout (from 0, below 1)"),
        ("-c {d}/no.yaml", "{d}/no.yaml: No such file or directory; check the name"),
        ("-c {d}/cut.yaml", "{d}/cut.yaml:2: not valid YAML; mend the line"),
        ("-c {d}/list.yaml", "{d}/list.yaml: no settings in it; write one a line, such as iters: 100"),
    ],
)  # fmt: skip
def test_training_flag(flags: str, message: str, tmp_path: Path, capsys, record_property) -> None:
    """In this process: mlx_lm takes two seconds to import."""
    from slang import lora

    (tmp_path / "rank.yaml").write_text("lora_parameters: {rank: 0, scale: 1, dropout: 0}\n")
    (tmp_path / "cut.yaml").write_text("iters: 10\n\tbatch_size: 8\n")
    (tmp_path / "list.yaml").write_text("- iters\n")
    before = contents(tmp_path)
    try:
        code = lora.main(["--train", "--model", TINY, "--adapter-path", f"{tmp_path}/a", *flags.format(d=tmp_path).split()])
    except SystemExit as stopped:
        code = stopped.code
    in_file = message.startswith("{d}")
    assert code == (1 if in_file else 2) and contents(tmp_path) == before
    told = ("" if in_file else "python -m slang.lora: error: ") + message.replace("{d}", str(tmp_path))
    assert capsys.readouterr().err.splitlines()[-1] == told
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
    told = f"{tmp_path}/disk/a: No space left on device; make room and run this again"
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
        assert first == "Setting up .venv for requirements.txt (once; a minute or two) ..."
        assert last == PIP
        assert not (venv / "installed-for.txt").exists() and (venv / "made-by-config.sh").exists()


def test_a_model_whose_licence_is_not_accepted(monkeypatch) -> None:
    def refuse(name: str) -> None:
        raise type("GatedRepoError", (Exception,), {})

    monkeypatch.setattr("huggingface_hub.model_info", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(model_files.Unusable) as error:
        model_files.find("google/none")
    assert str(error.value) == (
        "google/none: no folder here, not downloaded yet, and Hugging Face did not give it (GatedRepoError); accept its "
        "licence on huggingface.co and run hf auth login, or try MODEL=models/tiny-gemma3"
    )


# ------------------------------------------------------------------------------------------------------------------ trust


def test_no_code_of_a_model_is_run(tmp_path: Path) -> None:
    """A pickle and Python files beside good weights, and a config.json that asks for them."""
    config = edited("config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    tokenizer_config = edited("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    model(config=config, tokenizer_config=tokenizer_config)(tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "m/evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    (tmp_path / "m/pytorch_model.bin").write_bytes(b"cbuiltins\nopen\n(V%b\nVw\ntR." % str(ran).encode())
    run(sys.executable, "-c", "import evil, pickle; pickle.load(open('pytorch_model.bin', 'rb'))", cwd=tmp_path / "m")
    assert ran.exists()  # so they would, if they were
    ran.unlink()
    done = run("./chat.sh", "--baseline", "mae", MODEL=f"{tmp_path}/m", VENV=sys.prefix)
    assert (done.returncode, bool(done.stdout.strip()), ran.exists()) == (0, True, False), done.stderr


def test_the_sources_load_no_pickle_and_trust_no_remote_code() -> None:
    for path in [*ROOT.glob("*.sh"), *ROOT.glob("*.py"), *ROOT.glob("slang/*.py")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"pickle|torch\.load|joblib|allow_pickle|remote.code\W+True|--trust", text), path
