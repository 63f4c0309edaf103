"""slang/jsonl.py: what may stand in a record, and files that are replaced as a whole whatever ends the run."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from functools import cache
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from conftest import ROOT, TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.tuner.datasets import create_dataset
from mlx_lm.utils import load_tokenizer

import make_jsonl
import split_jsonl
from slang import jsonl
from slang.dictionary import Entry, entries

SPLITS = ("train", "valid", "test", "eval")
EXAMPLES = 400
many = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

# ------------------------------------------------------------------------------------------------------------------ fuzz

# Text in which what has a meaning to the parser, to JSON or to a tokenizer turns up often.
MARKS = (
    """:: : < > # start_of_turn <end_of_turn> <bos> <start_of_image> <unused7> [multimodal] \\ " { $(x) e\u0301 ñ ß …""".split()
)
MARKS += ["\n", "\r", "\t", "\0", "user\n", "\u200b", "\ufeff", "\u2028", "\ud800"]
text = st.lists(st.sampled_from(MARKS) | st.text(max_size=4), max_size=6).map("".join)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
role = st.sampled_from(["user", "assistant", "system", "model"])
messages = st.lists(st.fixed_dictionaries({"role": role, "content": text | junk}), max_size=4)


def chat(*contents: str) -> list[dict]:
    return [
        {"role": role, "content": content} for role, content in zip(jsonl.ROLES[-1][-len(contents) :], contents, strict=True)
    ]


HARMLESS = [
    mark for mark in MARKS if mark.isprintable() and mark not in ("<end_of_turn>", "<bos>", "<start_of_image>", "<unused7>")
]
said = st.lists(st.sampled_from([*HARMLESS, "[multimodal", "\u2581", " ", "🇨🇷"]) | st.text(max_size=4), max_size=6)
said = st.builds("{}{}".format, st.sampled_from("aÉñ¿3"), said.map("".join))
fair = st.fixed_dictionaries(
    {"messages": st.builds(chat, said, said) | st.builds(chat, said, said, said)}, optional={"slang": said}
)
chats = st.builds(chat, text, text) | st.builds(chat, text, text, text)
more = {"slang": text | junk, "meaning": text, "tools": junk}
rows = st.fixed_dictionaries({"messages": chats | messages | junk}, optional=more)
GOOD = [{"slang": f"s{i % 9}", "messages": chat(f"¿s{i % 9}?", f"Uso {i}.")} for i in range(40)]
TURNS = {"<bos>": 1, "<start_of_turn>": 2, "<end_of_turn>": 2}


def encoded(line: str) -> bytes:
    return line.encode("utf-8", "surrogatepass")


@cache
def tokenizer():
    return load_tokenizer(ROOT / TINY)


def as_trained(record: dict) -> str:
    """What mlx_lm makes of a record, in text, with what it looks for in a row to know its kind."""
    dataset = create_dataset([record], tokenizer(), SimpleNamespace(mask_prompt=True))
    tokens, offset = dataset.process(dataset[0])
    assert 0 < offset < len(tokens)
    assert {token: tokens.count(tokenizer().convert_tokens_to_ids(token)) for token in TURNS} == TURNS
    return tokenizer().decode(tokens)


def test_any_json_is_told_of_or_split_into_what_mlx_lm_reads(tmp_path, record_property):
    """Nothing else is written than what was read, and its turns are those of the template."""
    source, outputs = tmp_path / "all.jsonl", [tmp_path / f"{split}.jsonl" for split in SPLITS]
    flags = [part for split, path in zip(SPLITS, outputs, strict=True) for part in (f"--{split}", str(path))]
    counts = Counter()

    @many
    @given(st.lists(fair.map(json.dumps), max_size=4) | st.lists((fair | rows | junk).map(json.dumps) | text, max_size=4))
    def check(lines):
        counts["all"] += 1
        good = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in GOOD)
        source.write_bytes(good.encode() + encoded("\n".join(lines)))
        found = list(jsonl.records(source))
        bad = [item for item in found if isinstance(item, jsonl.Problem)]
        for path in outputs:
            path.unlink(missing_ok=True)
        assert split_jsonl.main(["--input", str(source), *flags]) == bool(bad)
        assert set(tmp_path.iterdir()) == {source, *(() if bad else outputs)}
        if bad:
            return
        written = []
        for path in outputs[:3]:
            with open(path, encoding="utf-8") as file:  # line by line as mlx_lm reads it
                written += [json.loads(line) for line in file]
        assert sorted(map(repr, written)) == sorted(repr(item[3]) for item in found)
        for record in [row for row in written if row not in GOOD]:
            counts["other rows"] += 1
            said = [message["content"].strip() for message in record["messages"]]
            if "\u2581" in "".join(said):  # Gemma's sign for a space: the tokenizer gives a space back
                continue
            system = record["messages"][0]["content"] + "\n\n" if len(said) == 3 else ""
            assert as_trained(record) == (f"<bos><start_of_turn>user\n{system}{said[-2]}<end_of_turn>\n"
                                          f"<start_of_turn>model\n{said[-1]}<end_of_turn>\n")  # fmt: skip

    check()
    record_property("fuzz examples", counts["all"])
    assert counts["other rows"] > EXAMPLES / 4


def test_any_bytes_between_good_lines_lose_none_of_them(tmp_path, record_property):
    source, output = tmp_path / "d.txt", tmp_path / "d.jsonl"
    good = [(f"modismo {i}", f"Uso número {i} de la palabra.") for i in range(7)]
    counts = Counter()

    @many
    @given(
        st.lists(
            st.binary(max_size=30) | st.builds("{}::{}".format, said, said | text).map(encoded) | text.map(encoded), max_size=6
        )
    )
    def check(lines):
        counts["all"] += 1
        parts = [part for pair, line in zip_longest(good, lines, fillvalue=b"") for part in ("::".join(pair).encode(), line)]
        source.write_bytes(b"\n".join(parts))
        assert make_jsonl.main(["--input", str(source), "--output", str(output), "--skip-bad"]) == 0
        rows = [item[3] for item in jsonl.records(output)]  # a Problem has no [3]
        told = {(row["slang"], row["meaning"]) for row in rows}
        assert set(good) <= told == {(e.slang, e.meaning) for e in entries(source) if isinstance(e, Entry)}
        for row in rows:
            if (row["slang"], row["meaning"]) not in good and "\u2581" not in row["meaning"]:
                counts["other rows"] += 1
                assert as_trained(row).endswith(f"<start_of_turn>model\n{row['meaning']}<end_of_turn>\n")

    check()
    record_property("fuzz examples", counts["all"])
    assert counts["other rows"] > EXAMPLES / 4


# --------------------------------------------------------------------------------------------------------- broken runs

KILLED = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path
    from slang import jsonl

    left, sent, *targets = sys.argv[1:]
    real, left = os.replace, int(left)

    def killing(*pair):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), int(sent))
        return real(*pair)

    os.replace = killing
    with jsonl.replacing(*targets) as files:
        for file in files:
            file.write(b"new")
""")


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moves", range(6))
def test_stopped_between_two_moves_all_are_old_or_all_are_new(tmp_path, moves, sent):
    """The first move is the journal's, the other four are the files'."""
    targets = [tmp_path / f"{name}.jsonl" for name in SPLITS]
    for target in targets:
        target.write_bytes(b"old")
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(moves), str(int(sent)), *targets], cwd=ROOT, capture_output=True
    )
    assert (process.returncode == 0) == (moves == 5), process.stderr
    list(jsonl.records(__file__))  # reading elsewhere changes nothing here
    list(jsonl.records(targets[0]))  # any reader finishes first
    assert {target.read_bytes() for target in targets} == {b"old" if moves == 0 else b"new"}
    with jsonl.replacing(*targets) as files:
        for file in files:
            file.write(b"next")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {target.name: b"next" for target in targets}


def test_two_at_once_and_what_a_killed_run_left(tmp_path):
    target = tmp_path / "x.jsonl"
    (tmp_path / ".x.jsonl.part").write_text("half a line of a killed run, longer than what is written now")
    with jsonl.replacing(target) as (file,):
        file.write(b"first")
        with pytest.raises(OSError, match="another run is writing it"), jsonl.replacing(target):
            pass
    assert target.read_bytes() == b"first" and list(tmp_path.iterdir()) == [target]


OUTPUTS = {
    "make": ["all.jsonl"],
    "split": [f"{name}.jsonl" for name in SPLITS],
    "train": ["adapters/adapters.safetensors"],
    "evaluate": ["results/LOG.md", "results/x.json", "results/x.html"],
    "export": ["model/model-F32.gguf", "model/model-Q8_0.gguf", "model/Modelfile"],
}


def command(name: str, folder: Path, which: int) -> list:
    """One of two commands that write the same files with other contents."""
    splits = [part for split in SPLITS for part in (f"--{split}", folder / f"{split}.jsonl")]
    model, adapter = ("--model", TINY), ("--adapter-path", folder / "adapters")
    return [sys.executable, *{
        "make": ["make_jsonl.py", "--input", "data/demo.txt", "--output", folder / "all.jsonl", "--forms", 4 + which],
        "split": ["split_jsonl.py", "--input", folder / "all.jsonl", *splits, "--seed", which],
        "train": ["-m", "slang.train", "--train", *model, *adapter, "--data", folder, "--num-layers", 1, "--iters", 8 + which,
                  "--batch-size", 2, "--save-every", 1, "--val-batches", 1, "--seed", which, "--mask-prompt"],
        "evaluate": ["-m", "slang.evaluate", *model, *adapter, "--data", folder, "--output", folder / "results/x.json",
                     "--note", which],
        "export": ["-m", "slang.export", folder / "model", "--type", *("f32", "q8_0")[:: 1 - 2 * which]],
    }[name]]  # fmt: skip


def run_whole(name: str, folder: Path, which: int) -> dict[str, bytes]:
    done = subprocess.run([str(part) for part in command(name, folder, which)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return contents(name, folder)


def contents(name: str, folder: Path) -> dict[str, bytes]:
    return {path: (folder / path).read_bytes() for path in OUTPUTS[name] if (folder / path).exists()}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with records, splits, an adapter and a model to export."""
    folder = tmp_path_factory.mktemp("work")
    for name in ("make", "split"):
        run_whole(name, folder, 0)
    for split in SPLITS:  # a few are enough to train on
        lines = (folder / f"{split}.jsonl").read_bytes().splitlines(keepends=True)
        (folder / f"{split}.jsonl").write_bytes(b"".join(lines[:12]))
    run_whole("train", folder, 0)
    shutil.copytree(ROOT / TINY, folder / "model")
    shutil.copy(ROOT / "prompt.toml", folder / "adapters")
    shutil.copy(ROOT / "prompt.toml", folder / "model")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "times"), [("make", 80), ("split", 80), ("export", 20), ("train", 10), ("evaluate", 10)])
def test_interrupted_at_random_moments(work, tmp_path, name, times, record_property):
    """After each of them the files are those of one run or of the other, whole; and the next run succeeds."""
    folder = tmp_path if name in ("make", "split") else work
    if name == "split":
        run_whole("make", folder, 0)
    started = time.monotonic()
    whole = [run_whole(name, folder, 0), run_whole(name, folder, 1)]
    seconds, drawn, ended = (time.monotonic() - started) / 2, random.Random(), Counter()
    for n in range(times):
        sent = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)[n % 3]
        parts = [str(part) for part in command(name, folder, n // 3 % 2)]
        process = subprocess.Popen(parts, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(drawn.uniform(0, seconds))
        process.send_signal(sent)
        ended[process.wait()] += 1
        jsonl.finish(folder)  # as any reader does
        now = contents(name, folder)
        if name in ("make", "split", "export"):
            assert now in whole, (n, sent)
        elif name == "train":
            assert mx.load(str(folder / OUTPUTS[name][0])).keys()  # whole, of whichever step
        else:
            log, results, page = (now[path].decode() for path in OUTPUTS[name])
            note = json.loads(results)["note"]
            assert f" · {note}</h1>" in page and re.findall(r"\| x \| (\d) \|", log)[-1] == note
    record_property("interruptions", times)
    assert run_whole(name, folder, 1) == whole[1] or name in ("train", "evaluate")
    assert not list(folder.rglob(".*.part")) + list(folder.rglob(".*.commit"))
    assert sum(count for code, count in ended.items() if code) > times / 3, ended
