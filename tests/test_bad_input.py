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
from slang.dictionary import LONGEST_LINE

pytestmark = pytest.mark.slow

GOOD = b"mae::Amigo.\n"
ROW = {"slang": "mae", "meaning": "Amigo.", "messages": prompt.load(ROOT / "prompt.toml").train("mae", "Amigo.", 0)}


def line(record: object) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def said(*contents: object, roles: str = "system user assistant") -> bytes:
    """A record of these messages."""
    return line({"messages": [{"role": r, "content": c} for r, c in zip(roles.split(), contents, strict=True)]})


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


MAKE = "{python} make_jsonl.py --input {d}/d.txt --output {d}/out.jsonl"
SPLIT = "{python} split_jsonl.py --input {d}/all.jsonl" + "".join(
    f" --{name} {{d}}/{name}.jsonl" for name in ("train", "valid", "test", "eval")
)
EARLIER = {f"{name}.jsonl": b"earlier\n" for name in ("out", "train", "valid", "test", "eval")}


# -------------------------------------------------------------------------------------------------------- the dictionary


def bad_lines(id: str, content: bytes, *problems: str) -> Case:
    """Lines that are refused, each by its problem; the output of an earlier run stays."""
    told = [f"{{d}}/d.txt:{problem}" for problem in problems]
    last = f"{len(told)} bad line(s); mend them or pass --skip-bad. {{d}}/out.jsonl is unchanged."
    return Case(id, MAKE, 1, "\n".join([*told, last]), {"d.txt": content})


def read_from(id: str, message: str, arrange: Callable[[Path], object], command: str = MAKE) -> Case:
    return Case(id, command, 1, message, {"d.txt": GOOD}, arrange)


def accepted(id: str, content: bytes, records: str) -> Case:
    return Case(id, MAKE, 0, f"{{d}}/out.jsonl: {records}", {"d.txt": content})


def replaced_by(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """The dictionary is something else than a file."""

    def arrange(folder: Path) -> None:
        (folder / "d.txt").unlink()
        make(folder / "d.txt")

    return arrange


def special_tokens() -> list[str]:
    """What the tiny model's tokenizer takes for special, and Gemma's spelling of a few more, also as people misspell them."""
    tokenizer = json.loads((ROOT / TINY / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = {token["content"] for token in tokenizer["added_tokens"] if token["special"]}
    tokens |= {"<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "[multimodal]", "<unused98>"}
    tokens |= {"<start_of_image>", "<end_of_image>", "<image_soft_token>", "<0x0A>", "<s>", "</s>", "[INST]", "[/INST]"}
    return sorted(tokens | {"<|im_start|>", "<END_OF_TURN>", "< end_of_turn >", "</end_of_turn>", "<|end_of_turn|>"})


def each(characters: str) -> list:
    """A line with each character in its text, and what is said of it."""
    text = "".join(f"mae::Ami{c}go.\n" for c in characters)
    return [text.encode(), *(f"{i}: invisible character U+{ord(c):04X}; take it out" for i, c in enumerate(characters, 1))]


TOKENS = special_tokens()
SEPARATOR = "no '::' separator; write the line as slang::meaning"
NO_LINE = "{d}/d.txt: no usable line; write one slang::meaning a line"
UTF16 = "1: UTF-16, not UTF-8; save the file as UTF-8"
DICTIONARY = [
    bad_lines("invalid-utf8", GOOD + b"birra::Fr\xeda.\n", "2: not UTF-8 (byte 10 of the line); save the file as UTF-8"),
    bad_lines("utf16-le", GOOD.decode().encode("utf-16"), UTF16),
    bad_lines("utf16-be", b"\xfe\xff" + GOOD.decode().encode("utf-16-be"), UTF16),
    bad_lines("nul", b"mae::Ami\0go.\n", "1: control character U+0000; take it out"),
    bad_lines("bell", b"mae::Ami\x07go.\n", "1: control character U+0007; take it out"),
    bad_lines("tab", b"mae::Ami\tgo.\n", "1: control character U+0009; take it out"),
    bad_lines("tabs-around", b"mae\t::\tAmigo.\n", "1: control character U+0009; take it out"),
    bad_lines("zero-width", *each("\u00ad\u200b\u200c\u200d\u2060\ufeff")),
    bad_lines("bidirectional", *each("\u200e\u200f\u061c\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u2069")),
    bad_lines("separator-alone", b"::\n", "1: nothing before '::'; write the slang there"),
    bad_lines("no-slang", b"::Amigo.\n", "1: nothing before '::'; write the slang there"),
    bad_lines("no-meaning", b"mae:: \n", "1: nothing after '::'; write the meaning there"),
    bad_lines("three-colons", b"mae:::Amigo.\n", "1: ':::' in place of '::'; write the line as slang::meaning"),
    bad_lines("colons-apart", b"mae : : Amigo.\n", f"1: {SEPARATOR}"),
    bad_lines("no-separator", b"# mae\nmae\n", f"2: {SEPARATOR}"),
    bad_lines("5-mb-line", b"mae::" + b"Amigo " * 900_000 + b"\n" + GOOD,
              f"1: over {LONGEST_LINE} bytes; write one wording a line"),
    bad_lines("turn-markers", "".join(f"mae::Amigo.{token}\n" for token in TOKENS).encode(),
              *(f"{i}: special token {token!r} in the text; take it out" for i, token in enumerate(TOKENS, 1))),
    Case("empty", MAKE, 1, NO_LINE, {"d.txt": b""}),
    Case("only-comments", MAKE, 1, NO_LINE, {"d.txt": b"# nota\n#\n\n"}),
    accepted("utf8-bom", b"\xef\xbb\xbf" + GOOD, "1 records of 1 slangs (0 duplicate, 0 bad lines left out)"),
    accepted("crlf", b"mae::Amigo.\r\n\r\nbirra::Cerveza.\r\n", "2 records of 2 slangs (0 duplicate, 0 bad lines left out)"),
    accepted("a-million-duplicates", GOOD * 10**6, "1 records of 1 slangs (999999 duplicate, 0 bad lines left out)"),
    read_from("missing", "{d}/d.txt: No such file or directory; check the name", lambda d: (d / "d.txt").unlink()),
    read_from("directory", "{d}/d.txt: Not a regular file; name a file of lines", replaced_by(Path.mkdir)),
    read_from("fifo", "{d}/d.txt: Not a regular file; name a file of lines", replaced_by(os.mkfifo)),
    read_from("unreadable", "{d}/d.txt: Permission denied; change its permissions or name another",
              lambda d: (d / "d.txt").chmod(0), ("setpriv --bounding-set=-all " if os.geteuid() == 0 else "") + MAKE),
    read_from("output-is-input", "{d}/d.txt: the output is the input; name another --output", lambda d: None,
              MAKE.replace("out.jsonl", "d.txt")),
    read_from("output-is-a-link-to-the-input", "{d}/link: the output is the input; name another --output",
              lambda d: (d / "link").symlink_to("d.txt"), MAKE.replace("out.jsonl", "link")),
    read_from("output-is-a-hard-link-to-the-input", "{d}/link: the output is the input; name another --output",
              lambda d: (d / "link").hardlink_to(d / "d.txt"), MAKE.replace("out.jsonl", "link")),
    read_from("output-is-a-directory", "{d}/link: Is a directory; name a file of lines", lambda d: (d / "link").mkdir(),
              MAKE.replace("out.jsonl", "link")),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- prompt.toml

PROMPT = (ROOT / "prompt.toml").read_bytes()
WITH_PROMPT = MAKE + " --prompt {d}/p.toml"


def bad_prompt(id: str, content: bytes | None, message: str) -> Case:
    return Case(id, WITH_PROMPT, 1, message, {"d.txt": GOOD} | ({"p.toml": content} if content is not None else {}))


PROMPTS = [
    bad_prompt("prompt-missing", None, "{d}/p.toml: No such file or directory; check the name"),
    bad_prompt("prompt-no-toml", b"system = \n", "{d}/p.toml: not valid TOML: Invalid value (at line 1, column 10)"),
    bad_prompt("prompt-empty", b"", "{d}/p.toml: no text for 'region'; write region = \"…\""),
    bad_prompt("prompt-with-a-turn-marker", PROMPT.replace(b"Sos ", b"<bos>Sos ", 1).replace(b"{region} que", b"CR que", 1),
               "{d}/p.toml: system: special token '<bos>' in '<bos>Sos una persona de CR que conoce bien el habla popular. "
               "Contestá en una sola oración y en español.'; take it out, the chat template writes them"),
]  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- JSONL


def bad_record(id: str, content: bytes, problem: str) -> Case:
    message = f"{{d}}/all.jsonl:2: {problem}\n1 bad record(s); mend them first. The outputs are unchanged."
    return Case(id, SPLIT, 1, message, {"all.jsonl": line(ROW) + content})


MEND = "write the file again with make_jsonl.py"
JSONL = [
    bad_record("truncated", b'{"messages": [', f"not valid JSON (Expecting value: line 1 column 15 (char 14)); {MEND}"),
    bad_record("array", b"[1]\n", 'no "messages" list; a record is {"messages": [system, user, assistant]}'),
    bad_record("message-is-text", b'{"messages": ["a"]}', 'a message that is not an object; write {"role": …, "content": …}'),
    bad_record("wrong-roles", said("a", "b", roles="human gpt"),
               "roles are ['human', 'gpt']; they have to be user, assistant, with or without a system message before them"),
    bad_record("two-assistants", said("a", "b", "c", roles="user assistant assistant"), "roles are ['user', 'assistant', "
               "'assistant']; they have to be user, assistant, with or without a system message before them"),
    bad_record("empty-content", said("a", "b", " "), "the assistant message has no text; write its content as a string"),
    bad_record("number-for-content", said("a", 3, "c"), "the user message has no text; write its content as a string"),
    bad_record("number-for-slang", line(ROW | {"slang": 3}), '"slang" is not a string; write it as text or leave it out'),
    bad_record("nan", b'{"x": NaN}\n', f"not valid JSON (NaN is not JSON); {MEND}"),
    bad_record("duplicate-keys", b'{"messages": [], "messages": []}', f"not valid JSON (key 'messages' stands twice); {MEND}"),
    bad_record("half-a-surrogate-pair", said("a", "?", "b").replace(b"?", b"\\ud83d"),
               f"not valid JSON (half a surrogate pair, \\ud83d); {MEND}"),
    bad_record("turn-marker", said("a", "b", "c<eos>"), "special token '<eos>' in the assistant message; take it out"),
    bad_record("not-utf8", b'{"messages": "\xff"}\n', "not UTF-8 (byte 15 of the line); save the file as UTF-8"),
    Case("jsonl-with-bom", SPLIT + " --by slang --train-ratio 0.34 --valid-ratio 0.33", 1,
         "{d}/all.jsonl: train would be empty: 1 answers of 1 slangs are too few for these ratios; add slangs, change a ratio "
         "or the --seed", {"all.jsonl": b"\xef\xbb\xbf" + line(ROW)}),
    Case("jsonl-empty", SPLIT, 1, "{d}/all.jsonl: no record in it; run make_jsonl.py first", {"all.jsonl": b"\n"}),
    Case("jsonl-missing", SPLIT, 1, "{d}/all.jsonl: No such file or directory; check the name"),
    Case("split-over-its-input", SPLIT.replace("test.jsonl", "all.jsonl"), 1,
         "{d}/all.jsonl: the output is the input or another output; name another file", {"all.jsonl": line(ROW)}),
    Case("two-splits-in-one-file", SPLIT.replace("test.jsonl", "eval.jsonl"), 1,
         "{d}/eval.jsonl: the output is the input or another output; name another file", {"all.jsonl": line(ROW)}),
]  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- flags


def usage(command: str, message: str) -> Case:
    return Case(command.replace("{python} ", "").replace("/", "-"), command, 2, message)


NOT_A_SHARE = "is not between 0 and 1"
FLAGS = [
    usage("{python} make_jsonl.py --forms 0",
          "make_jsonl.py: error: argument --forms: '0' is neither 'all' nor a number from 1"),
    usage("{python} make_jsonl.py --forms some",
          "make_jsonl.py: error: argument --forms: 'some' is neither 'all' nor a number from 1"),
    usage("{python} make_jsonl.py --plain-spelling 2", f"make_jsonl.py: error: argument --plain-spelling: 2 {NOT_A_SHARE}"),
    usage("{python} make_jsonl.py --plain-spelling nan", f"make_jsonl.py: error: argument --plain-spelling: nan {NOT_A_SHARE}"),
    usage("{python} split_jsonl.py --train-ratio -0.1", f"split_jsonl.py: error: argument --train-ratio: -0.1 {NOT_A_SHARE}"),
    usage("{python} split_jsonl.py --train-ratio nan", f"split_jsonl.py: error: argument --train-ratio: nan {NOT_A_SHARE}"),
    usage("{python} split_jsonl.py --valid-ratio 1.5", f"split_jsonl.py: error: argument --valid-ratio: 1.5 {NOT_A_SHARE}"),
    usage("{python} split_jsonl.py --train-ratio x", "split_jsonl.py: error: argument --train-ratio: invalid ratio value: 'x'"),
    usage("{python} split_jsonl.py --train-ratio 0.9 --valid-ratio 0.1",
          "split_jsonl.py: error: --train-ratio 0.9 and --valid-ratio 0.1 leave nothing to test; their sum has to be below 1"),
    usage("{python} split_jsonl.py --seed 1.5", "split_jsonl.py: error: argument --seed: invalid int value: '1.5'"),
    usage("./chat.sh pura vida", "chat.sh: one question at a time; put it in quotes"),
    usage("./chat.sh ' '", "chat.sh: the question is empty; leave it out for a conversation"),
    usage("./chat.sh --gguf", "chat.sh: --gguf needs a file, such as fused_model/NAME-Q4_K_M.gguf"),
    usage("{python} -m slang.evaluate --seed -1", "python -m slang.evaluate: error: --seed -1: give a whole number from 0"),
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
    wrapper("no-data-to-evaluate", "./evaluate.sh", NO_DATA, {}),
    wrapper("empty-data", "./train.sh", "{d}/data/train.jsonl: no record in it; run make_jsonl.py and split_jsonl.py first",
            DATA | {"data/train.jsonl": b""}),
    wrapper("data-cut-off", "./train.sh",
            "{d}/data/valid.jsonl:1: not valid JSON (Expecting value: line 1 column 1 (char 0)); " + MEND,
            DATA | {"data/valid.jsonl": b"mae\n"}),
    wrapper("data-of-another-prompt", "./train.sh", "{d}/data/train.jsonl:1: made with another system prompt than prompt.toml "
            "has; run make_jsonl.py and split_jsonl.py again", OTHER_DATA),
    wrapper("test-data-of-another-prompt", "./evaluate.sh", "{d}/data/test.jsonl:1: made with another system prompt than "
            "{d}/a/prompt.toml has; run make_jsonl.py and split_jsonl.py again", adapter() | OTHER_DATA),
    wrapper("adapter-path-empty", "./train.sh", "ADAPTER_PATH is empty; set it to a folder", ADAPTER_PATH=""),
    wrapper("adapter-path-is-a-file", "./train.sh", "{d}/a/prompt.toml: not a folder that can be written; set ADAPTER_PATH to "
            "another", ADAPTER_PATH="{d}/a/prompt.toml"),
    wrapper("no-such-gguf", "./chat.sh --gguf {d}/x.gguf mae", "{d}/x.gguf: not there; run ./fuse.sh, which writes it"),
    wrapper("no-such-run", "./evaluate.sh --compare A B", "A: no such run in {d}/results (there: none)"),
    wrapper("run-cut-off", "./evaluate.sh --compare A A", "{d}/results/A.json: not a run of this version of evaluate.sh; "
            "evaluate again", {"results/A.json": b"{"}),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the machine

# A disk of its own at $1, mounted as $2 says; what is on it afterwards goes to stdout.
DISK = """mount -t tmpfs -o size=64k none "$1" && cp "$1/../out.jsonl" "$1" && mount -o "remount,$2" "$1" || exit 99
disk=$1; shift 2; "$@"; code=$?; cd "$disk"; find . -type f; cat out.jsonl; exit $code"""
FULL, READ_ONLY = (f"unshare -rm sh -c {shlex.quote(DISK)} sh {{d}}/disk {options} " for options in ("rw", "ro"))
MANY = b"".join(b"mae%d::Amigo %d.\n" % (i, i) for i in range(500))


def on_disk(id: str, kind: str, command: str, message: str, **more) -> Case:
    return Case(id, kind + command, 1, message, arrange=lambda d: (d / "disk").mkdir(), **more)


INSTALLED = b"\n".join(sorted((ROOT / "requirements.txt").read_bytes().splitlines())) + b"\n"
OUT = MAKE.replace("out.jsonl", "disk/out.jsonl")
MACHINE = [
    on_disk("full-disk", FULL, OUT, "{d}/disk/out.jsonl: No space left on device; make room and run this again",
            files={"d.txt": MANY}),
    on_disk("read-only-disk", READ_ONLY, OUT, "{d}/disk/out.jsonl: Read-only file system; name a folder that can be written",
            files={"d.txt": MANY}),
    on_disk("full-disk-split", FULL, re.sub(r"(train|valid|test|eval)\.jsonl", r"disk/\1.jsonl", SPLIT),
            "{d}/disk/train.jsonl: No space left on device; make room and run this again",
            files={"all.jsonl": b"".join(said("a", "b", f"c{i // 4} {i}") for i in range(2000))}),
    *(on_disk(f"read-only-disk-{variable.lower()}", READ_ONLY, command,
              f"{{d}}/disk/x: not a folder that can be written; set {variable} to another", files=adapter(),
              environment={"MODEL": TINY, "ADAPTER_PATH": "{d}/a", "DATA": "{d}/data", variable: "{d}/disk/x"})
      for variable, command in (("ADAPTER_PATH", "./train.sh"), ("RESULTS", "./evaluate.sh"))),
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

CASES = [*DICTIONARY, *PROMPTS, *JSONL, *FLAGS, *MODELS, *MACHINE]


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
        assert first == "Setting up .venv for requirements.txt (once; a minute or two) ..."
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
