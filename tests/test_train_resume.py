"""slang/train: nothing is lost when it stops: killed, interrupted, resumed."""

import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import ROOT, run
from training import contents, flags, losses, make_data, trained

from slang.errors import Stopped, UserError
from slang.train import command
from slang.train.stopping import Interrupt

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("train")]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """The adapter of an uninterrupted run."""
    adapter = tmp_path_factory.mktemp("whole") / "adapters"
    trained(data, adapter)
    return adapter


def stopped(data: Path, adapter: Path, after: int, **more) -> str:
    """A run that is asked to stop for the n-th time that it looks; what it says."""
    looks = []

    def check(_interrupt):
        looks.append(1)
        if len(looks) == after:
            raise Stopped("Stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Interrupt, "check", check)
        with pytest.raises(Stopped) as error:
            command.main(flags(data, adapter, **more))
    return str(error.value)


READ = """
import sys
from pathlib import Path
from slang.train.checkpoint import read_state
path = Path(sys.argv[1])
read_state(path, path.read_bytes())
sys.exit(1)
"""


def test_a_state_that_is_read_in_vain_does_not_abort_the_process(whole):
    """A thread of MLX outlived Python with the state's file in its hands, in four of ten runs."""
    for _ in range(12):
        done = run(sys.executable, "-c", READ, whole / "resume.safetensors")
        assert (done.returncode, done.stderr) == (1, "")


def with_dropout(folder: Path) -> Path:
    path = folder / "lora.yaml"
    path.write_text("lora_parameters: {rank: 4, dropout: 0.1, scale: 10.0}\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "more",
    [{}, {"grad_accumulation_steps": 3}, {"optimizer": "adafactor"}, {"optimizer": "muon"}],
    ids=str,
)
def test_resumed_is_equal_byte_for_byte(data, tmp_path, more):
    more["config"] = with_dropout(tmp_path)
    trained(data, tmp_path / "whole", **more)
    for after in (4, 5, 4):  # in a step, and in a validation
        stopped(data, tmp_path / "parts", after, resume=True, **more)
    trained(data, tmp_path / "parts", resume=True, **more)
    parts, whole = contents(tmp_path / "parts"), contents(tmp_path / "whole")
    for name in (
        "adapters.safetensors",
        "adapters_best.safetensors",
        "0000012_adapters.safetensors",
    ):
        assert parts[name] == whole[name]
    assert losses(tmp_path / "parts", "val_loss") == losses(tmp_path / "whole", "val_loss")


KILLED = textwrap.dedent("""
    import os, signal, sys
    import mlx.core as mx
    from slang.train import command
    from slang.train.numpy_network import NumpyNetwork

    place, left = sys.argv[1], int(sys.argv[2])
    places = {"write": (mx, "save_safetensors"), "replace": (os, "replace")}
    owner, name = places.get(place, (NumpyNetwork, "batch"))
    real = getattr(owner, name)

    def killing(*arguments, **named):
        global left
        left -= 1
        if left < 0:
            if place == "write":
                arguments[0].write(b"half a file")
                arguments[0].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)

    setattr(owner, name, killing)
    sys.exit(command.main(sys.argv[3:]))
""")


def test_killed_at_random_moments_and_resumed_is_equal_byte_for_byte(data, whole, tmp_path, seed):
    adapter, drawn = tmp_path / "adapters", random.Random(seed)
    moments = [
        ("write", drawn.randrange(8)),
        ("step", drawn.randrange(12)),
        ("replace", drawn.randrange(12)),
        ("time", drawn.uniform(1, 4)),
        ("write", drawn.randrange(4)),
        ("replace", drawn.randrange(4)),
    ]
    killed = 0
    for place, when in moments:
        where = [place, str(when)] if place != "time" else ["step", "99"]
        program = [sys.executable, "-c", KILLED, *where, *flags(data, adapter, resume=True)]
        process = subprocess.Popen(program, cwd=ROOT, stdout=subprocess.DEVNULL)
        if place == "time":
            time.sleep(when)
            process.kill()
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 3, moments
    trained(data, adapter, resume=True)
    expected, found = contents(whole), contents(adapter)
    for name in expected:
        if name.endswith("adapters.safetensors"):
            assert found[name] == expected[name], (name, moments)


def started(data: Path, adapter: Path, **more) -> subprocess.Popen:
    program = [sys.executable, "-m", "slang.train", *flags(data, adapter, iters=100_000, **more)]

    def interruptible() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # not so in a shell's background

    return subprocess.Popen(
        program,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=interruptible,
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "code", "by"),
    [
        (signal.SIGINT, 130, ""),
        (signal.SIGTERM, 143, " by SIGTERM"),
        (signal.SIGHUP, 129, " by SIGHUP"),
    ],
)
def test_a_signal_saves_and_says_how_to_go_on(data, tmp_path, number, code, by):
    process = started(data, tmp_path / "a")
    wait_for(tmp_path / "a/0000003_adapters.safetensors", process)
    process.send_signal(number)
    _, errors = process.communicate()
    assert errors == (
        f"Stopped{by}, and saved in {tmp_path}/a; "
        "the same command with --resume goes on from there\n"
    )
    assert process.returncode == code
    assert (tmp_path / "a/resume.safetensors").exists()


def test_a_finished_adapter_survives_a_run_that_is_stopped_at_once(data, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "a")
    before = contents(tmp_path / "a")
    other = {"learning_rate": 1e-4, "save_every": 10}
    at_once = stopped(data, tmp_path / "a", 1, **other)  # in the validation before the first step
    assert at_once == "Stopped before the first step; nothing was changed"
    assert contents(tmp_path / "a") == before
    later = stopped(data, tmp_path / "a", 6, **other)
    kept = f"{tmp_path}/a/adapters.safetensors is still the earlier one"
    assert later.startswith("Stopped, and saved in ") and later.endswith(kept)
    after = contents(tmp_path / "a")
    state = before.pop("resume.safetensors")
    assert after.pop("resume.safetensors") != state and after == before
    resumed = trained(data, tmp_path / "a", resume=True, **other)
    assert resumed == trained(data, tmp_path / "b", **other)
    assert losses(tmp_path / "a", "val_loss") == losses(tmp_path / "b", "val_loss")


def test_a_report_counts_the_steps_before_a_stop_too(data, tmp_path):
    """Or --early-stop would end another run than the uninterrupted one."""
    often = {"iters": 6, "steps_per_report": 3, "steps_per_eval": 100, "val_batches": 1}
    trained(data, tmp_path / "a", **often)
    stopped(data, tmp_path / "b", 3, **often)  # the first look is in a validation
    trained(data, tmp_path / "b", resume=True, **often)
    whole, parts = (losses(tmp_path / name, "train_loss") for name in "ab")
    assert list(whole) == [3, 6] and parts == whole


def test_an_unfinished_state_is_set_aside_and_not_overwritten(data, tmp_path, capsys):
    adapter = tmp_path / "a"
    stopped(data, adapter, 3, steps_per_eval=100)  # after two batches of validation
    state = contents(adapter)["resume.safetensors"]
    capsys.readouterr()
    trained(data, adapter, iters=1)
    assert contents(adapter)["resume_before_1.safetensors"] == state
    said = "an unfinished run stood at iteration 1; its state is now resume_before_1.safetensors\n"
    assert f"{adapter}/resume.safetensors: {said}" in capsys.readouterr().out
    trained(data, adapter, iters=1)  # the finished one is
    assert contents(adapter)["resume_before_1.safetensors"] == state


def test_resuming_something_else_is_refused_with_what_differs(data, whole, tmp_path):
    before = contents(whole)
    other = tmp_path / "data"
    other.mkdir()
    for path in data.iterdir():
        text = path.read_text(encoding="utf-8").replace("agradable", "feo")
        (other / path.name).write_text(text, encoding="utf-8")
    more = {"batch_size": 2, "prompt": ROOT / "prompt.toml", "bias_correction": True}
    with pytest.raises(UserError) as refused:
        command.main(flags(other, whole, resume=True, **more))
    first, *lines, last = str(refused.value).splitlines()
    what = "saved by a run with other settings, so it can't go on from there:"
    assert first == f"{whole}/resume.safetensors: {what}"
    names = [line.split(":")[0].strip() for line in lines]
    assert names == ["train rows", "valid rows", "prompt", "batch_size", "bias_correction"]
    assert "  batch_size: 4 then, 2 now" in lines
    assert last == "Give the same again, or leave --resume out to begin anew."
    assert contents(whole) == before


def edit_state(path: Path, damage: str) -> None:
    """Make a state that can be read, and be no training's."""
    arrays, about = mx.load(str(path), return_metadata=True)
    mx.eval(arrays)
    name = next(name for name in arrays if name.startswith("adapter/"))
    if damage == "number":
        about["numbers"] = about["numbers"].replace('"iteration": 13', '"iteration": -5')
    elif damage == "log":
        about["log"] = "5"
    elif damage == "shape":
        arrays[name] = arrays[name][1:]
    else:
        arrays = {name: a for name, a in arrays.items() if not name.startswith("optimizer/")}
    mx.save_safetensors(str(path), arrays, about)


@pytest.mark.parametrize(
    "damage", ["cut", "of another program", "empty", "number", "log", "shape", "part"]
)
def test_a_state_that_is_not_whole_is_refused(data, whole, tmp_path, damage):
    shutil.copytree(whole, tmp_path / "a")
    path = tmp_path / "a/resume.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "of another program":
        shutil.copy(whole / "adapters.safetensors", path)
    else:
        edit_state(path, damage)
    before = contents(tmp_path / "a")
    said = f"{path}: cut off, or not written by this program; leave --resume out to begin anew"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        command.main(flags(data, tmp_path / "a", resume=True))
    assert contents(tmp_path / "a") == before


def test_a_state_that_is_older_than_the_reports_in_it(data, tmp_path):
    stopped(data, tmp_path / "a", 3, steps_per_eval=100)
    path = tmp_path / "a/resume.safetensors"
    arrays, about = mx.load(str(path), return_metadata=True)
    mx.eval(arrays)
    del about["window"]
    mx.save_safetensors(str(path), arrays, about)
    trained(data, tmp_path / "b", steps_per_eval=100)
    trained(data, tmp_path / "a", resume=True, steps_per_eval=100)
    same = "adapters.safetensors"
    assert contents(tmp_path / "a")[same] == contents(tmp_path / "b")[same]


def test_a_refused_resume_ends_in_words(data, whole):
    """MLX aborted a process that ended with arrays still to be read."""
    program = [sys.executable, "-m", "slang.train"]
    command = [*program, *flags(data, whole, resume=True, learning_rate=1e-5)]
    for _ in range(3):
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
        assert done.returncode == 1 and "learning_rate: " in done.stderr
        assert done.stderr.endswith("or leave --resume out to begin anew.\n")


def test_what_may_change_between_a_run_and_its_resume(data, tmp_path, monkeypatch):
    """Memory, reports, validations, saves, and how a path is written."""
    expected = trained(data, tmp_path / "whole")
    stopped(data, tmp_path / "a", 8)
    monkeypatch.chdir(tmp_path)
    other = {
        "steps_per_report": 1,
        "steps_per_eval": 4,
        "save_every": 2,
        "model": f"{ROOT}/models/",
    }
    other["model"] += "../models/tiny-gemma3/"
    assert trained(data, Path("a/"), resume=True, **other) == expected
    stopped(data, tmp_path / "b", 8)
    trained(data, tmp_path / "b", resume=True, grad_checkpoint=True)
    assert losses(tmp_path / "b", "val_loss")[13] == pytest.approx(
        losses(tmp_path / "whole", "val_loss")[13], rel=1e-4
    )


def test_resuming_a_finished_run_leaves_its_bytes(data, whole, tmp_path):
    """The best adapter comes back from a file, which gives its arrays in another order."""
    shutil.copytree(whole, tmp_path / "again")
    trained(data, tmp_path / "again", resume=True)
    before, after = contents(whole), contents(tmp_path / "again")
    assert before.keys() == after.keys()
    for name in before:
        if "adapters" in name:
            assert before[name] == after[name]


def test_a_finished_run_goes_on_with_more_iters(data, whole, tmp_path):
    # The last adapter: the shorter run validated once more, at its end, and may have found its
    # best there.
    shutil.copytree(whole, tmp_path / "longer")
    longer = trained(data, tmp_path / "longer", resume=True, iters=16)
    assert longer == trained(data, tmp_path / "whole", iters=16)


def test_an_adapter_to_begin_with(data, whole, tmp_path):
    """--resume-adapter-file: the loss begins where that adapter's ended; one of other shapes, or
    cut off, is refused."""
    begin = {"resume_adapter_file": whole / "adapters.safetensors", "iters": 1}
    trained(data, tmp_path / "a", **begin)
    first = losses(tmp_path / "a", "val_loss")[0]
    assert first == pytest.approx(losses(whole, "val_loss")[13], abs=1e-5)
    # Stopped after it had replaced the file that it began with.
    begin = {"resume_adapter_file": tmp_path / "a/adapters.safetensors"}
    trained(data, tmp_path / "a", iters=2, **begin)
    trained(data, tmp_path / "a", iters=3, resume=True, **begin)
    assert 3 in losses(tmp_path / "a", "train_loss")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((whole / "adapters.safetensors").read_bytes()[:-1])
    begin = {"resume_adapter_file": whole / "adapters.safetensors", "num_layers": 1}
    with pytest.raises(UserError, match="not an adapter of this model and these settings; give"):
        command.main(flags(data, tmp_path / "b", **begin))
    with pytest.raises(UserError, match=f"^{cut}: not a whole safetensors file"):
        command.main(flags(data, tmp_path / "b", resume_adapter_file=cut))
