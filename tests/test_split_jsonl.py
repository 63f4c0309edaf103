"""split_jsonl.py: the properties that make a figure on test.jsonl mean something, for any input."""

import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from conftest import script
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import split_jsonl
from slang.dictionary import normalized
from slang.errors import UserError

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")
NAMES = ("train", "valid", "test", "eval")


def record(slang, meaning, question="Qué es?"):
    messages = [("system", "Sos tico."), ("user", question), ("assistant", meaning)]
    return {
        "slang": slang,
        "meaning": meaning,
        "messages": [{"role": r, "content": c} for r, c in messages],
    }


def split(rows, *arguments):
    """The four files' lines by name, or None when the split was refused."""
    with TemporaryDirectory() as folder:
        source = Path(folder, "all.jsonl")
        source.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
        outputs = [part for name in NAMES for part in (f"--{name}", f"{folder}/{name}.jsonl")]
        try:
            split_jsonl.main(["--input", str(source), *outputs, *map(str, arguments)])
        except UserError:
            assert [path.name for path in Path(folder).iterdir()] == ["all.jsonl"]
            return None
        return {
            name: Path(folder, f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
            for name in NAMES
        }


def to(folder, source):
    """The flags that name an input and the four outputs in a folder."""
    outputs = [part for name in NAMES for part in (f"--{name}", folder / f"{name}.jsonl")]
    return ["--input", source, *outputs]


def slangs(lines):
    return {normalized(json.loads(line)["slang"]) for line in lines}


def answers(lines):
    return {normalized(json.loads(line)["messages"][-1]["content"]) for line in lines}


words = st.builds("{}{}".format, st.sampled_from("abáñ"), st.text("abáñ! ", max_size=2))
rows_of = st.lists(
    st.builds(record, words, words, st.sampled_from(["Qué?", "Y?"])), min_size=12, max_size=40
)
ratios = st.tuples(st.sampled_from([0.3, 0.5, 0.7]), st.sampled_from([0.1, 0.2]))


# Refused splits (too few records) are passed over; enough are left.
filtering = settings(
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow], deadline=None
)


@filtering
@given(rows_of, ratios, st.integers(0, 99), st.sampled_from(["wording", "slang"]))
def test_properties(rows, ratio, seed, by):
    flags = ("--train-ratio", ratio[0], "--valid-ratio", ratio[1], "--seed", seed, "--by", by)
    files = split(rows, *flags)
    assume(files)
    train, valid, test = (files[name] for name in NAMES[:3])
    # (a) every record is in exactly one
    assert sorted(train + valid + test) == sorted(
        json.dumps(row, ensure_ascii=False) for row in rows
    )
    # (b) no answer is in two
    for one, other in ((train, valid), (train, test), (valid, test)):
        assert not answers(one) & answers(other)
        if by == "slang":  # (d) nor a slang
            assert not slangs(one) & slangs(other)
    if by == "wording":  # (c) nothing is asked that was never met
        assert slangs(valid) | slangs(test) <= slangs(train)
    # (g) eval is a tenth of train
    assert set(files["eval"]) <= set(train) and len(files["eval"]) == max(1, round(len(train) / 10))
    # (e) a function of content and seed, not of the order
    shuffled = random.Random(seed).sample(rows, len(rows))
    assert split(shuffled, *flags) == files


@filtering
@given(rows_of, rows_of, st.integers(0, 99), st.sampled_from(["wording", "slang"]))
def test_slangs_with_answers_of_their_own_move_nothing(rows, more, seed, by):
    """(f): they leave every record where it was, which a shared answer would not."""
    more = [record("x" + row["slang"], "x" + row["meaning"]) for row in more]
    flags = ("--train-ratio", 0.5, "--valid-ratio", 0.2, "--seed", seed, "--by", by)
    before, after = split(rows, *flags), split(rows + more, *flags)
    assume(before and after)
    for name in NAMES[:3]:
        assert set(before[name]) <= set(after[name])


COUNTS = [233, 31, 36, 23]
FIRST_TEST = "Sentido 250 de la palabra."


def shipped_like(n=300):
    return [record(f"slang {i // 4}", f"Sentido {i} de la palabra.") for i in range(n)]


def test_same_bytes_on_every_platform():
    """Recorded once; a change of the hash would move every user's test rows into train."""
    files = split(shipped_like(), "--seed", 42)
    assert [len(files[name]) for name in NAMES] == COUNTS
    assert json.loads(files["test"][0])["meaning"] == FIRST_TEST


def test_table(tmp_path):
    source = tmp_path / "all.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in shipped_like()))
    done = script("split_jsonl.py", *to(tmp_path, source))
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["records", "slangs"] and lines[1].split()[0] == "train"
    assert (
        lines[-1] == "test slangs met in training: 100%; equal answers across train, valid, test: 0"
    )


def refused(tmp_path, lines, *flags):
    source = tmp_path / "all.jsonl"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = script("split_jsonl.py", *to(tmp_path, source), *flags)
    assert done.returncode == 1 and list(tmp_path.iterdir()) == [source]
    return done.stderr.replace(str(source), "FILE")


def test_empty_split_refused(tmp_path):
    single = [json.dumps(record(f"s{i}", f"m{i}")) for i in range(50)]
    assert refused(tmp_path, single) == (
        "FILE: valid would be empty: every slang has one wording and that one is trained; "
        "add wordings or pass --by slang\n"
    )
    assert "too few for these ratios; add wordings, change a ratio or the --seed" in refused(
        tmp_path, [json.dumps(record("a", f"m{i}")) for i in range(3)]
    )
    assert refused(tmp_path, [""]) == "FILE: no record in it; run make_jsonl.py first\n"


def test_bad_records_are_named_and_nothing_is_written(tmp_path):
    good = json.dumps(record("a", "b"))
    said = refused(tmp_path, [good, "[1]", good, "mae"]).splitlines()
    assert said[0].startswith("FILE:2: not a chat record (")
    assert said[1].startswith("FILE:4: not valid JSON (")
    assert said[2] == "2 bad record(s); mend them first. The outputs are unchanged."
    (tmp_path / "all.jsonl").unlink()
    assert len(refused(tmp_path, ["mae"] * 1000).splitlines()) == 22


def test_a_byte_order_mark_and_blank_lines_do_not_reach_mlx_lm(tmp_path):
    source = tmp_path / "all.jsonl"
    lines = [json.dumps(row) for row in shipped_like(40)]
    source.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    done = script("split_jsonl.py", *to(tmp_path, source))
    assert done.returncode == 0, done.stderr
    written = [(tmp_path / f"{name}.jsonl").read_bytes() for name in NAMES[:3]]
    assert sorted(b"".join(written).decode().split("\n")) == sorted([*lines, ""])


def test_an_output_that_is_another_file_too(tmp_path):
    source = tmp_path / "all.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in shipped_like()))
    before = source.read_bytes()
    for name, flags in (("all", "--test"), ("eval", "--test"), ("train", "--valid")):
        path = tmp_path / f"{name}.jsonl"
        done = script("split_jsonl.py", *to(tmp_path, source), flags, path)
        what = "the output is the input or another output; name another file"
        assert (done.returncode, done.stderr.split(": ", 1)[1]) == (1, what + "\n")
    assert source.read_bytes() == before and list(tmp_path.iterdir()) == [source]


def test_a_file_that_is_not_there(tmp_path):
    done = script("split_jsonl.py", "--input", tmp_path / "x", *to(tmp_path, tmp_path / "x"))
    reason = "not there; run python make_jsonl.py first, which writes it"
    assert (done.returncode, done.stderr) == (1, f"{tmp_path}/x: {reason}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--train-ratio -0.1", "argument --train-ratio: '-0.1': give a number from 0 to 1"),
        ("--train-ratio nan", "argument --train-ratio: 'nan': give a number from 0 to 1"),
        ("--valid-ratio 1.5", "argument --valid-ratio: '1.5': give a number from 0 to 1"),
        ("--train-ratio x", "argument --train-ratio: 'x': give a number from 0 to 1"),
        ("--valid-ratio 0", "--valid-ratio 0: valid would be empty; give a share above 0"),
        ("--seed 1.5", "argument --seed: invalid int value: '1.5'"),
        (
            "--train-ratio 0.9 --valid-ratio 0.1",
            "--train-ratio 0.9 and --valid-ratio 0.1 leave nothing to test; "
            "their sum has to be below 1",
        ),
    ],
)
def test_a_flag_of_another_value(arguments, message):
    done = script("split_jsonl.py", *arguments.split())
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"split_jsonl.py: error: {message}"
