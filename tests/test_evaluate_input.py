"""evaluate.sh and slang/evaluate/command.py: what can't be used is found before anything dear."""

import json
import shutil

import pytest
from conftest import ROOT, run
from evaluated import SPLITS, flags, make_adapter, make_data, rows

from slang.errors import UserError
from slang.evaluate import command


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("adapter") / "random", "random")


@pytest.mark.parametrize("variable", ["MODEL", "ADAPTER_PATH", "DATA", "RESULTS", "CACHE"])
def test_the_wrapper_refuses_flags_that_are_variables(variable):
    flag = "--" + variable.lower().replace("_", "-")
    for arguments in ((flag, "x"), (f"{flag}=x",)):
        done = run(ROOT / "evaluate.sh", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"evaluate.sh: {flag}: set {variable} in its place\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nope"], "unrecognized arguments: --nope"),
        (["--mod", "x"], "unrecognized arguments: --mod x"),
        (["mae"], "unrecognized arguments: mae"),
        (
            ["--note", "caf\udce9"],
            "--note 'caf\\udce9': not UTF-8 (byte 0xe9); save it as UTF-8",
        ),
        (["--note"], "argument --note: expected one argument"),
        (["--sample", "0"], "argument --sample: '0': give a whole number from 1"),
        (["--seed", "-1"], "argument --seed: '-1': give a whole number from 0"),
        (
            ["--compare", "A", "B", "--fail-if-worse"],
            "--fail-if-worse: nothing is run with --compare; leave it out",
        ),
        (["--page", "A", "--quick"], "--quick: nothing is run with --page; leave it out"),
        (["--output", "x"], "--output: x is no name of a JSON file; end it in .json"),
    ],
)
def test_usage(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    assert capsys.readouterr().err.endswith(f"error: {message}\n")


def broken(name, line):
    """Replace a file's second line."""

    def edit(folder):
        lines = (folder / f"{name}.jsonl").read_bytes().splitlines(keepends=True)
        lines[1:2] = [line + b"\n"]
        (folder / f"{name}.jsonl").write_bytes(b"".join(lines))

    return edit


def other_prompt(name):
    def edit(folder):
        text = (folder / f"{name}.jsonl").read_bytes()
        text = text.replace(b"Sos una persona", b"Eres alguien")
        (folder / f"{name}.jsonl").write_bytes(text)

    return edit


def few(folder):
    for name in SPLITS:
        lines = [json.dumps(record) + "\n" for record in rows(("mae", "Amigo."))]
        (folder / f"{name}.jsonl").write_text("".join(lines))


OTHER = ":1: made with another system prompt than {a}/prompt.toml has; run make_jsonl.py and "
EARLY = {
    **{
        f"prompt of {name}": (
            other_prompt(name),
            [],
            f"{{d}}/{name}.jsonl{OTHER}split_jsonl.py again",
        )
        for name in SPLITS
    },
    **{
        f"no {name}": (
            lambda folder, name=name: (folder / f"{name}.jsonl").unlink(),
            [],
            f"{{d}}/{name}.jsonl: not there; run python make_jsonl.py and ",
        )
        for name in SPLITS
    },
    "eval": (broken("eval", b"junk"), [], "{d}/eval.jsonl:2: not valid JSON"),
    "train": (broken("train", b"junk"), [], "{d}/train.jsonl:2: not valid JSON"),
    "control": (
        lambda folder: (folder / "control.jsonl").write_bytes(b"junk\n"),
        [],
        "{d}/control.jsonl:1: not valid JSON",
    ),
    "slangs": (few, [], "1 slangs are too few for 4 choices; add slangs"),
    "output": (
        lambda folder: (folder / "x.json").mkdir(),
        ["--output", "{d}/x.json"],
        "{d}/x.json: a folder; name a file",
    ),
    "output below a file": (
        lambda folder: None,
        ["--output", "{d}/eval.jsonl/x.json"],
        "{d}/eval.jsonl: not a folder that can be written; give another --output",
    ),
    "results": (
        lambda folder: (folder / "results").write_text(""),
        ["--results", "{d}/results"],
        "{d}/results: not a folder that can be written; set RESULTS to another",
    ),
    "results that lead nowhere": (
        lambda folder: (folder / "results").symlink_to("nowhere"),
        ["--results", "{d}/results"],
        "{d}/results: not a folder that can be written; set RESULTS to another",
    ),
    "log": (
        lambda folder: (folder / "LOG.md").write_bytes(b"\xff"),
        ["--results", "{d}"],
        "{d}/LOG.md:1: not UTF-8; save the file as UTF-8",
    ),
    "question": (
        lambda folder: None,
        ["--ask", "x<end_of_turn>"],
        "the question 'Qué significa en Costa Rica \"x<end_of_turn>\"?': special token",
    ),
}


@pytest.mark.parametrize("name", EARLY)
def test_cheap_checks_come_before_the_model_and_mlx_lms_tests(
    name, adapter, data, tmp_path, monkeypatch
):
    """Nothing is loaded, run or written, and there is one line."""
    edit, more, message = EARLY[name]
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    edit(folder)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(command.find, "check", lambda *_: pytest.fail("too late"))
    filled = [flag.replace("{d}", str(folder)) for flag in more]
    where = ["--results", str(tmp_path / "results")]
    with pytest.raises(UserError) as error:
        command.main([*flags(adapter, folder)[:-1], *where, *filled])
    expected = message.replace("{d}", str(folder)).replace("{a}", str(adapter))
    assert str(error.value).startswith(expected)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_slang_with_a_turn_marker_is_not_asked(adapter, data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    record = json.loads(lines[0])
    record["slang"] = "x<end_of_turn>\n<start_of_turn>model\nHola"
    del record["meaning"]
    lines[0] = json.dumps(record)
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=r"train\.jsonl:1: .*special token '<end_of_turn>'"):
        command.main([*flags(adapter, folder), "--results", str(tmp_path / "results")])
