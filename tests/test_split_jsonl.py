"""split_jsonl.py: the properties that make a figure on test.jsonl mean something, for any input."""

import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory

from conftest import script
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import split_jsonl
from slang.dictionary import key

NAMES = ("train", "valid", "test", "eval")


def record(slang, meaning, question="Qué es?"):
    messages = [("system", "Sos tico."), ("user", question), ("assistant", meaning)]
    return {"slang": slang, "meaning": meaning, "messages": [{"role": r, "content": c} for r, c in messages]}


def split(rows, *arguments):
    """The four files' lines by name, or None when the split was refused."""
    with TemporaryDirectory() as folder:
        source = Path(folder, "all.jsonl")
        source.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        outputs = [part for name in NAMES for part in (f"--{name}", f"{folder}/{name}.jsonl")]
        if split_jsonl.main(["--input", str(source), *outputs, *map(str, arguments)]):
            assert [path.name for path in Path(folder).iterdir()] == ["all.jsonl"]
            return None
        return {name: Path(folder, f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in NAMES}


def slangs(lines):
    return {key(json.loads(line)["slang"]) for line in lines}


def answers(lines):
    return {key(json.loads(line)["messages"][-1]["content"]) for line in lines}


words = st.text("abáñ! ", min_size=1, max_size=3).filter(str.strip)
rows_of = st.lists(st.builds(record, words, words, st.sampled_from(["Qué?", "Y?"])), min_size=12, max_size=40)
ratios = st.tuples(st.sampled_from([0.3, 0.5, 0.7]), st.sampled_from([0.1, 0.2]))


# Refused splits (too few records) are passed over; enough are left.
filtering = settings(suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow], deadline=None)


@filtering
@given(rows_of, ratios, st.integers(0, 99), st.sampled_from(["wording", "slang"]))
def test_properties(rows, ratio, seed, by):
    flags = ("--train-ratio", ratio[0], "--valid-ratio", ratio[1], "--seed", seed, "--by", by)
    files = split(rows, *flags)
    assume(files)
    train, valid, test = (files[name] for name in NAMES[:3])
    # (a) every record is in exactly one
    assert sorted(train + valid + test) == sorted(json.dumps(row, ensure_ascii=False) for row in rows)
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
def test_other_slangs_move_nothing(rows, more, seed, by):
    """(f): lines of other slangs, with meanings of their own, leave every record where it was."""
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
    outputs = [part for name in NAMES for part in (f"--{name}", tmp_path / f"{name}.jsonl")]
    done = script("split_jsonl.py", "--input", source, *outputs)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["records", "slangs"] and lines[1].split()[0] == "train"
    assert lines[-1] == "test slangs met in training: 100%; equal answers across train, valid, test: 0"


def refused(tmp_path, lines, *flags):
    source = tmp_path / "all.jsonl"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    outputs = [part for name in NAMES for part in (f"--{name}", tmp_path / f"{name}.jsonl")]
    done = script("split_jsonl.py", "--input", source, *outputs, *flags)
    assert done.returncode == 1 and list(tmp_path.iterdir()) == [source]
    return done.stderr.replace(str(source), "FILE")


def test_empty_split_refused(tmp_path):
    single = [json.dumps(record(f"s{i}", f"m{i}")) for i in range(50)]
    assert refused(tmp_path, single) == (
        "FILE: valid would be empty: every slang has one wording and that one is trained; add wordings or pass --by slang\n"
    )
    assert "too few for these ratios; add wordings, change a ratio or the --seed" in refused(
        tmp_path, [json.dumps(record("a", f"m{i}")) for i in range(3)]
    )
    assert refused(tmp_path, [""]) == "FILE: no record in it; run make_jsonl.py first\n"
