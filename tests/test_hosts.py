"""slang/train on several machines: two processes that talk over a ring, as two machines do."""

import math
import random
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run
from training import flags, losses, make_data, trained

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("train")]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def one_machine(data, tmp_path_factory) -> Path:
    """The adapter that one machine trains."""
    adapter = tmp_path_factory.mktemp("one") / "adapters"
    trained(data, adapter)
    return adapter


def on_two_machines(program: list, *arguments: str) -> str:
    """What both print."""
    launch = Path(sys.executable).parent / "mlx.launch"
    port = str(random.randrange(20_000, 60_000))
    done = run(launch, "-n", "2", "--backend", "ring", "-p", port, *program, *arguments)
    return done.stdout + done.stderr  # mlx.launch ends with 0 whatever happened


@pytest.mark.parametrize(("ends", "code"), [(0, 0), (3, 1)])
def test_a_machine_that_failed_is_told_by_the_exit_code(tmp_path, ends, code):
    host = '{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}'
    (tmp_path / "hosts.json").write_text(f"[{host}, {host}]", encoding="utf-8")
    launch = [sys.executable, "-m", "slang.train.hosts", tmp_path / "hosts.json"]
    done = run(*launch, sys.executable, "-c", f"raise SystemExit({ends})")
    assert done.returncode == code, done.stderr


@pytest.mark.parametrize("content", ["[]", "{}", '[{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}]'])
def test_a_file_of_hosts_that_can_not_be(tmp_path, content):
    path = tmp_path / "hosts.json"
    path.write_text(content, encoding="utf-8")
    done = run(sys.executable, "-m", "slang.train.hosts", path, "python", "-c", "1")
    assert done.returncode == 1 and done.stderr.startswith(f"{path}: ")
    assert len(done.stderr.splitlines()) == 1


def test_two_machines_have_the_loss_curve_of_one(data, one_machine, tmp_path):
    """22 rows in batches of 4: the last batch of an epoch has one row for each, validation's last
    one row for two."""
    program = [sys.executable, "-m", "slang.train"]
    said = on_two_machines(program, *flags(data, tmp_path / "a"))
    assert "Best iteration" in said, said
    for name in ("train_loss", "val_loss"):
        assert losses(tmp_path / "a", name) == pytest.approx(losses(one_machine, name), rel=1e-4)


OTHER_ROWS = """
import os, sys
from slang.train import command
place = sys.argv.index("--data") + 1
sys.argv[place] += os.environ["MLX_RANK"]
sys.exit(command.main())
"""


def test_machines_with_different_rows_are_told_before_the_first_step(data, tmp_path, monkeypatch):
    for rank in (0, 1):
        shutil.copytree(data, tmp_path / f"d{rank}")
    (tmp_path / "d1/valid.jsonl").unlink()
    script = tmp_path / "other.py"
    script.write_text(OTHER_ROWS, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    said = on_two_machines([sys.executable, script], *flags(tmp_path / "d", tmp_path / "a"))
    assert said.count("the machines have different rows there; copy the folder to each") == 2
    assert not (tmp_path / "a/adapters.safetensors").exists()


APART = """
import os, sys
from slang.train import command
place = sys.argv.index("--adapter-path") + 1
sys.argv[place] += os.environ["MLX_RANK"]
sys.exit(command.main())
"""


def test_two_machines_without_a_shared_disk_resume_together(
    data, one_machine, tmp_path, monkeypatch
):
    script = tmp_path / "apart.py"
    script.write_text(APART, encoding="utf-8")
    adapter = tmp_path / "a"
    program = [sys.executable, script]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    first = flags(data, adapter, iters=6)
    on_two_machines(program, *first)
    assert losses(tmp_path / "a0", "train_loss") and not (tmp_path / "a1").exists()
    said = on_two_machines(program, *flags(data, adapter, resume=True))
    assert "Going on from iteration 6 of 13" in said, said
    ours, theirs = (losses(folder, "train_loss") for folder in (tmp_path / "a0", one_machine))
    assert ours == pytest.approx(theirs, rel=1e-4) and math.isfinite(ours[13])
