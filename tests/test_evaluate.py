"""evaluate.sh and slang/evaluate/command.py: whole runs of the tiny model, and what stops one."""

import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY, run
from evaluated import SPLITS, flags, make_adapter, make_data, rows
from mlx_lm.tuner.datasets import CacheDataset, load_local_dataset
from mlx_lm.tuner.trainer import evaluate
from mlx_lm.utils import load, quantize_model, save

from slang.errors import UserError
from slang.evaluate import command, quiz, results, statistics, stock


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {kind: make_adapter(folder / kind, kind) for kind in ("random", "zero", "nan")}


def wrapper(adapter, data, folder, *arguments, **more):
    """evaluate.sh, as from a terminal."""
    places = {"DATA": str(data), "ADAPTER_PATH": str(adapter), "RESULTS": str(folder / "results")}
    return run(ROOT / "evaluate.sh", *arguments, **{"MODEL": TINY, **places, **more})


def only_json(folder) -> dict:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)


# -------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_figures_that_can_not_be_written_are_printed(adapters, data, tmp_path):
    """bash lets a file have a kilobyte, as a full disk does."""
    arguments = [*flags(adapters["random"], data), "--output", str(tmp_path / "x.json")]
    evaluated = shlex.join([sys.executable, "-m", "slang.evaluate", *arguments])
    done = run("bash", "-c", f"ulimit -f 1; {evaluated}")
    assert done.returncode == 1 and "choice accuracy, new wording" in done.stdout
    assert done.stderr.splitlines()[-1] == f"{tmp_path}/x.json: File too large"
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "zero"])
def test_a_whole_run(adapters, kind, data, tmp_path, capsys):
    """Into --output; the recomputed test loss is mlx_lm.lora's to the fourth decimal."""
    output = tmp_path / "results/x.json"
    more = ["--output", str(output), "--note", "a note", "--ask", "pura vida", "--fail-if-worse"]
    status = command.main([*flags(adapters[kind], data), *more])
    printed, errors = capsys.readouterr()
    assert errors == ""
    written = sorted(path.name for path in output.parent.iterdir())
    assert written == [".lock", "LOG.md", "x.html", "x.json"]
    saved = only_json(output.parent)
    assert printed.splitlines()[-3].startswith(f"{saved['verdict']}: {saved['because']}")
    assert "| x | a note | " in (output.parent / "LOG.md").read_text(encoding="utf-8")
    n = {row["figure"]: row["n"] for row in saved["figures"]}
    trained = {f"{statistics.CHOICE}{name}": 8 for name in (quiz.TRAINED, quiz.TRAINED_CLOSE)}
    new = {f"{statistics.CHOICE}{name}, unseen slangs": 5 for name in (quiz.NEW, quiz.NEW_CLOSE)}
    answers = dict.fromkeys(statistics.SCORES, 8)
    answers |= {f"{name}, unseen slangs": 5 for name in statistics.SCORES}
    losses = {"answer loss, test.jsonl": 5, "answer loss, eval.jsonl": 8, "control loss": 64}
    assert n == losses | trained | new | answers

    if kind == "zero":
        assert (status, saved["because"]) == (0, statistics.NOTHING_LEARNT)
    else:
        assert saved["because"] != statistics.NOTHING_LEARNT
    for who, path in (("baseline", None), ("adapted", str(adapters[kind]))):
        model, tokenizer = load(str(ROOT / TINY), adapter_path=path)
        *_, test = load_local_dataset(data, tokenizer, SimpleNamespace(mask_prompt=True))
        theirs = evaluate(model, CacheDataset(test), batch_size=1, num_batches=-1)
        assert saved["test"][who]["recomputed"] == pytest.approx(theirs, abs=5e-5)


@pytest.mark.slow
def test_a_quantised_base_is_evaluated_unquantised_and_the_adapter_is_not_rounded(
    adapters, data, tmp_path
):
    """On a CPU. With a zero adapter both models are one; another changes what it should."""
    net, tokenizer = load(str(ROOT / TINY))
    config = json.loads((ROOT / TINY / "config.json").read_text(encoding="utf-8"))
    net, config = quantize_model(net, config, group_size=32, bits=4)
    save(tmp_path / "4bit", ROOT / TINY, net, tokenizer, config)
    for kind in ("zero", "random"):
        output = tmp_path / kind / "x.json"
        more = ["--output", str(output)]
        assert command.main([*flags(adapters[kind], data, tmp_path / "4bit"), *more]) == 0
        saved = only_json(output.parent)
        figures = [(row["difference"], row["low"], row["high"]) for row in saved["figures"]]
        if kind == "zero":
            assert set(figures) == {(0.0, 0.0, 0.0)}
            assert saved["because"] == statistics.NOTHING_LEARNT
        else:
            assert saved["because"] != statistics.NOTHING_LEARNT
        for who, path in (("baseline", None), ("adapted", str(adapters[kind]))):
            model, tokenizer = load(str(tmp_path / "4bit"), adapter_path=path)
            *_, test = load_local_dataset(data, tokenizer, SimpleNamespace(mask_prompt=True))
            theirs = evaluate(model, CacheDataset(test), batch_size=1, num_batches=-1)
            assert saved["test"][who]["recomputed"] == pytest.approx(theirs, abs=0.02)


def test_an_adapter_that_is_not_a_number_is_refused(adapters, data, tmp_path):
    where = ["--results", str(tmp_path / "results")]
    with pytest.raises(UserError, match=r"nan/adapters\.safetensors: .* holds NaN or infinity; "):
        command.main([*flags(adapters["nan"], data), *where])
    assert list(tmp_path.iterdir()) == []


def test_a_sample_says_so_in_every_figure(adapters, data, tmp_path, capsys):
    """The same slangs again, and the same figures of them as in the whole run."""
    for name, more in (("whole", []), ("few", ["--sample", "6"]), ("again", ["--sample", "6"])):
        output = ["--output", str(tmp_path / name / "x.json")]
        assert command.main([*flags(adapters["random"], data), *more, *output]) == 0
    printed = capsys.readouterr().out
    whole, few, again = (only_json(tmp_path / name) for name in ("whole", "few", "again"))
    assert few["sample"] == "a sample of 6 of 13 slangs" and whole["sample"] is None
    assert printed.count("a sample of 6 of 13 slangs\n") == 2
    log = (tmp_path / "few/LOG.md").read_text(encoding="utf-8")
    assert " | 6 of 13 | " in log and log.count("(a sample of 6 of 13 slangs)") == 2
    page = (tmp_path / "few/x.html").read_text(encoding="utf-8")
    assert "a sample of 6 of 13 slangs" in page
    assert few["items"] == again["items"] and few["figures"] == again["figures"]
    assert all(row["n"] <= 6 for row in few["figures"])
    by_slang = {item["slang"]: item for item in whole["items"]}
    for item in few["items"]:
        for who in results.MODELS:
            for name, gains in item[who]["gains"].items():
                expected = by_slang[item["slang"]][who]["gains"][name]
                assert gains == pytest.approx(expected, abs=5e-3)


@pytest.mark.slow
def test_two_at_once_get_a_label_each(adapters, data, tmp_path):
    """Also beside a run of the earlier form of labels; LOG.md has a row of each."""
    folder = tmp_path / "results"
    commands = [
        [sys.executable, "-m", "slang.evaluate", *flags(adapters["random"], data), "--sample", "5",
         "--results", folder, "--note", f"note {n}"]
        for n in range(3)
    ]  # fmt: skip
    started = [subprocess.Popen([str(part) for part in parts], cwd=ROOT) for parts in commands]
    assert [process.wait() for process in started] == [0, 0, 0]
    names = sorted(path.stem for path in folder.glob("*.json"))
    assert [re.sub(r"\d{8}-", "", name) for name in names] == ["A", "B", "C"]
    log = (folder / "LOG.md").read_text(encoding="utf-8")
    for name in names:
        note = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["note"]
        assert f"| {name} | {note} |" in log
        assert log.count(f"- {name}: ") == 2
        assert f"{name} · {note}</h1>" in (folder / f"{name}.html").read_text(encoding="utf-8")


def test_results_are_written_before_they_are_printed(adapters, data, tmp_path, monkeypatch):
    """A terminal that goes away costs nothing."""

    def gone(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", gone)
    output = ["--output", str(tmp_path / "x.json"), "--sample", "4"]
    with pytest.raises(BrokenPipeError):
        command.main([*flags(adapters["random"], data), *output])
    assert len(only_json(tmp_path)["items"]) == 4


# ------------------------------------------------------------------ what mlx_lm.lora --test says


def test_mlx_lm_tests_the_records_and_not_the_file(adapters, data, tmp_path, capfd):
    """A BOM and blank lines, which mlx_lm does not read; and files that --test does not need."""
    odd = tmp_path / "data"
    shutil.copytree(data, odd)
    for name in SPLITS:
        path = odd / f"{name}.jsonl"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\n\n")
    done = wrapper(adapters["random"], odd, tmp_path, "--note", "x")
    assert done.returncode == 0, done.stderr
    saved = only_json(tmp_path / "results")
    for who in results.MODELS:
        test = saved["test"][who]
        printed = re.fullmatch(r"Test loss ([\d.]+), Test ppl [\d.]+\.", test["printed"])
        assert float(printed[1]) == pytest.approx(test["recomputed"], abs=6e-4)
    assert saved["test"]["baseline"] != saved["test"]["adapted"]
    assert done.stderr.count("+ mlx_lm.lora --test ") == 2
    with pytest.raises(UserError, match="--test failed, see above; --quick does"):
        stock.test_loss("nothere", "", rows(("a", "b")))
    assert "Traceback" not in capfd.readouterr().err


# ------------------------------------------------------------------------------------------ Ctrl-C


def read(terminal: int) -> bytes:
    """What is shown next, b"" when nobody writes to the terminal any more."""
    try:
        return os.read(terminal, 1000)
    except OSError:
        return b""


def interrupted(adapter, data, folder, until: list[bytes], *arguments):
    """evaluate.sh on a terminal, with Ctrl-C each time that it has shown one of these."""
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(stderr, (24, 80))  # tqdm draws nothing where a terminal has no columns
    places = {"DATA": str(data), "ADAPTER_PATH": str(adapter), "RESULTS": str(folder / "results")}
    process = subprocess.Popen(
        [ROOT / "evaluate.sh", *arguments],
        env={**os.environ, "MODEL": TINY, **places},
        stdout=subprocess.PIPE,
        stderr=stderr,
        start_new_session=True,
    )
    os.close(stderr)
    shown = b""
    for text in until:
        while text not in shown and (more := read(terminal)):
            shown += more
        if text in shown:
            os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    while more := read(terminal):
        shown += more
    return subprocess.CompletedProcess(process.args, process.returncode, printed, shown)


@pytest.mark.parametrize(
    ("until", "arguments"),
    [
        # While Python starts, which may miss it: whoever sees no end presses it again.
        ([b"+ python", b"question"], ["--quick"]),
        ([b"question"], ["--quick"]),  # the bar
        ([b"+ mlx_lm.lora"], []),  # while it starts
        ([b"Calculating loss"], []),
    ],
)
def test_ctrl_c_leaves_nothing_half_written_and_no_traceback(
    until, arguments, adapters, data, tmp_path
):
    done = interrupted(adapters["random"], data, tmp_path, until, *arguments)
    assert done.stdout == b"" and b"Traceback" not in done.stderr, done.stderr.decode()
    assert done.returncode in (-signal.SIGINT, 130), done.stderr.decode()
    assert list(tmp_path.iterdir()) == []
