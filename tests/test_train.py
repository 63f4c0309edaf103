"""slang/train: what a run writes, keeps, says and refuses, on the tiny model."""

import fcntl
import json
import math
import shutil
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import mlx_lm
import pytest
from conftest import ROOT, TINY
from mlx.utils import tree_flatten
from training import chat, contents, flags, losses, make_data, mlx_lm_gradient, trained

from slang import jsonl
from slang.errors import UserError
from slang.train import command, loop
from slang.train.batches import Rows, epoch
from slang.train.checkpoint import Run
from slang.train.flags import parse
from slang.train.model import add_adapter
from slang.train.network import Network

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


def test_a_run_writes_what_mlx_lm_writes_and_its_own(whole):
    numbered = {f"{n:07d}_adapters.safetensors" for n in (3, 6, 9, 12)}
    adapters = {"adapters.safetensors", "adapters_best.safetensors", "adapter_config.json"}
    assert set(contents(whole)) == numbered | adapters | {
        "resume.safetensors",
        "log.jsonl",
        "loss.svg",
    }
    assert list(losses(whole, "train_loss")) == [2, 4, 6, 8, 10, 12, 13]
    assert list(losses(whole, "val_loss")) == [0, 5, 10, 13]
    weights = mx.load(str(whole / "adapters.safetensors"))
    assert {a.dtype for a in weights.values()} == {mx.float32}
    loaded, _ = mlx_lm.load(str(ROOT / TINY), adapter_path=str(whole))
    assert {name for name, _ in tree_flatten(loaded.parameters())} >= set(weights)


def test_the_curve_is_a_picture_of_the_log(whole):
    picture = ET.fromstring((whole / "loss.svg").read_text(encoding="utf-8"))
    lines = [e.get("points").split() for e in picture if e.tag.endswith("polyline")]
    axes, best, train, valid = lines
    assert (len(axes), len(best), len(train), len(valid)) == (3, 2, 7, 4)
    across = [float(point.split(",")[0]) for point in valid]
    assert across == sorted(across) and across[0] == 48  # iteration 0 is on the left axis


def test_accumulated_steps_have_the_mean_gradient(data, tmp_path):
    plain = {"optimizer": "sgd", "learning_rate": 0.01, "iters": 2, "grad_accumulation_steps": 2}
    trained(data, tmp_path / "a", **plain)
    net, tokenizer = mlx_lm.load(str(ROOT / TINY))
    settings = parse(flags(data, tmp_path / "a", **plain))
    add_adapter(settings, net)
    net.set_dtype(mx.float32)
    chats = jsonl.read(data / "train.jsonl")
    some = Rows(command.tokenised(settings, chats, tokenizer), 2048, "train.jsonl")
    batches = epoch(some, 4, settings.seed, 0)[:2]
    both = [mlx_lm_gradient(net, some, indices)[1] for indices in batches]
    after = mx.load(str(tmp_path / "a/adapters.safetensors"))
    for (name, a), (_, b) in zip(*map(tree_flatten, both), strict=True):
        if name.endswith("lora_b"):  # 0 at the start, when lora_a has no gradient
            expected = -0.01 * (a + b) / 2
            difference = mx.abs(after[name] - expected).max().item()
            assert difference <= 1e-4 * mx.abs(expected).max().item(), name


def test_compiled_steps_give_the_same_bytes(data, tmp_path, monkeypatch):
    """What a GPU runs, forced on this CPU: MLX's own path, steps compiled, shapes planned."""
    if not shutil.which("g++"):
        pytest.skip("no g++ here, which mx.compile needs on a CPU")
    monkeypatch.setattr(command, "network_of", Network)
    monkeypatch.setattr(loop, "compiles", lambda: True)
    monkeypatch.setattr(loop, "plan", partial(loop.plan, most=3))
    traced = []
    real = Network.loss

    def loss(self, batch):
        if self.model.training:
            traced.append(tuple(a.shape for a in batch))
        return real(self, batch)

    monkeypatch.setattr(Network, "loss", loss)
    compiled = trained(data, tmp_path / "compiled", iters=24)
    assert len(traced) == len(set(traced)) == 3
    monkeypatch.setattr(mx, "compile", lambda step, **_: step)
    assert compiled == trained(data, tmp_path / "plain", iters=24)
    assert len(traced) == 3 + 24


def test_bias_correction_is_adams_as_it_was_published(data, tmp_path, monkeypatch):
    made = []
    real = optim.Adam.__init__

    def init(self, *arguments, **named):
        made.append(named.get("bias_correction", False))
        real(self, *arguments, **named)

    monkeypatch.setattr(optim.Adam, "__init__", init)
    plain = trained(data, tmp_path / "plain", iters=2)
    corrected = trained(data, tmp_path / "corrected", iters=2, bias_correction=True)
    assert made == [False, True] and plain != corrected


def scores(*values: float):
    """Stands for loop.evaluate and gives these losses, one after the other."""
    following = iter(values)
    return lambda *_: next(following)


def test_the_best_is_kept_and_the_last_beside_it(data, tmp_path, capsys, monkeypatch):
    for keep in ("best", "last"):
        monkeypatch.setattr(loop, "evaluate", scores(3.0, 1.0, 2.0, 1.0))
        trained(data, tmp_path / keep, keep=keep, save_every=5)
        held = f"{tmp_path}/{keep}/adapters.safetensors holds the {keep} one"
        said = f"Best iteration 5 (valid loss 1.000), last 13 (1.000); {held};"
        assert said in capsys.readouterr().out
    best, last = contents(tmp_path / "best"), contents(tmp_path / "last")
    assert best["adapters.safetensors"] == best["0000005_adapters.safetensors"]
    assert last["adapters_best.safetensors"] == best["adapters.safetensors"]
    assert last["adapters.safetensors"] == best["adapters_last.safetensors"]
    assert last["adapters.safetensors"] != best["adapters.safetensors"]


def test_before_the_first_step_there_is_nothing_to_keep(data, tmp_path, monkeypatch):
    """However low the loss of the untrained adapter is: it is an adapter that does nothing."""
    monkeypatch.setattr(loop, "evaluate", scores(0.5, 2.0, 3.0, 4.0))
    kept = trained(data, tmp_path / "a", keep="best", save_every=5)
    assert kept == contents(tmp_path / "a")["0000005_adapters.safetensors"]


def test_epochs_are_counted_in_rows(data, tmp_path, capsys):
    for batch_size, steps in ((1, 11), (4, 3), (7, 2), (5000, 1)):
        adapter = tmp_path / str(batch_size)
        trained(data, adapter, iters=None, epochs=0.5, batch_size=batch_size)
        assert max(losses(adapter, "val_loss")) == steps
        what = {1: "11 steps of 1 row", 4: "3 steps of 4 rows", 7: "2 steps of 7 rows"}
        said = what.get(batch_size, "1 step of 22 rows")
        passes = steps / math.ceil(22 / batch_size)
        assert f"{said}: {passes:.1f} epochs of the 22 rows\n" in capsys.readouterr().out
    trained(data, tmp_path / "iters", iters=3, epochs=5)  # steps win
    assert max(losses(tmp_path / "iters", "val_loss")) == 3


def test_the_rate_rises_and_falls(data, tmp_path):
    decay = {"decay": True, "learning_rate": 1e-3, "steps_per_report": 1}
    trained(data, tmp_path / "a", iters=40, **decay)
    rates = losses(tmp_path / "a", "learning_rate")
    assert rates[1] == pytest.approx(5e-5)
    assert max(rates.values()) == rates[3] == pytest.approx(1e-3)
    assert rates[40] == pytest.approx(5e-5, rel=0.1)
    with pytest.raises(UserError, match="decay over steps: 40 then, 50 now"):
        command.main(flags(data, tmp_path / "a", iters=50, resume=True, **decay))
    # Where an update takes four steps there are ten of them, and the rate falls as far.
    trained(data, tmp_path / "b", iters=40, grad_accumulation_steps=4, **decay)
    assert losses(tmp_path / "b", "learning_rate")[40] < 1e-4


def test_everyday_rows_are_trained_too_and_share_the_prefix(data, tmp_path, capsys):
    everyday = tmp_path / "everyday.jsonl"
    everyday.write_text(chat("¿Qué hora es?", "Son las tres.") * 9, encoding="utf-8")
    more = {"iters": 2, "everyday": everyday, "prompt": ROOT / "prompt.toml"}
    for share, rows in ((None, 3), (0.25, 6), (0.5, 11)):
        trained(data, tmp_path / "a", everyday_share=share, **more)
        said = f"epochs of the {22 + rows} rows, {rows} of them everyday language"
        if rows > 9:
            said += f" (the 9 rows of {everyday}, again and again)"
        assert said in capsys.readouterr().out
    everyday.write_text("{}\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"^{everyday}:1: "):
        command.main(flags(data, tmp_path / "b", iters=2, everyday=everyday))


def test_early_stop_below_a_training_loss(data, tmp_path, capsys):
    often = {"iters": 100, "steps_per_report": 1, "steps_per_eval": 50}
    trained(data, tmp_path / "a", early_stop=2.5, **often)
    log = losses(tmp_path / "a", "train_loss")
    *before, last = log.values()
    assert last < 2.5 <= min(before) and len(log) < 50
    assert list(losses(tmp_path / "a", "val_loss")) == [0, len(log)]  # of the adapter that is kept
    said = f"Training loss {last:.3f} is below --early-stop 2.5: stopped at iteration {len(log)}\n"
    assert said in capsys.readouterr().out
    kept = contents(tmp_path / "a")
    again = trained(data, tmp_path / "a", early_stop=2.5, resume=True, **often)
    assert again == kept["adapters.safetensors"]


def test_without_a_validation_set_there_is_a_warning(data, tmp_path, capsys):
    (tmp_path / "train.jsonl").write_bytes((data / "train.jsonl").read_bytes())
    trained(tmp_path, tmp_path / "a", iters=2)
    said = "No validation set: the last adapter is kept, and whether it is good is not known\n"
    assert said in capsys.readouterr().out
    assert not list((tmp_path / "a").glob("adapters_*"))


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"fine_tune_type": "full"}, "with --fine-tune-type full"),
        ({"mask_prompt": False}, "without --mask-prompt, every token is a target"),
    ],
)
def test_what_cannot_be_shared_is_computed_and_said(data, tmp_path, capsys, more, why):
    trained(data, tmp_path / "a", iters=2, test=True, stock_loss=True, **more)
    said = capsys.readouterr().out
    assert f"Computing all positions: {why}\n" in said
    assert said.count("Test loss") == 2
    assert "(a pad token counted in each row)" in said


def test_a_second_run_in_the_same_folder_is_refused(data, tmp_path):
    with open(tmp_path / ".lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for engine in ("slang", "mlx_lm"):
            with pytest.raises(UserError, match=f"^{tmp_path}: another run is training there; "):
                command.main(flags(data, tmp_path, engine=engine))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_data_that_can_not_be_read_is_named(data, tmp_path):
    def refused(folder: Path) -> str:
        with pytest.raises((UserError, OSError)) as error:
            command.main(flags(folder, tmp_path / "a"))
        return str(error.value)

    assert refused(tmp_path / "none") == (
        f"{tmp_path}/none: no such folder; name one with train.jsonl in it"
    )
    assert f"{tmp_path}/train.jsonl" in refused(tmp_path)
    for name in ("train", "valid"):
        shutil.copytree(data, tmp_path / name)
        path = tmp_path / name / f"{name}.jsonl"
        path.write_text(path.read_text(encoding="utf-8") + "junk\n", encoding="utf-8")
        n = len(path.read_text(encoding="utf-8").splitlines())
        assert refused(tmp_path / name).startswith(f"{path}:{n}: not valid JSON")
    (tmp_path / "train/train.jsonl").write_text("\n", encoding="utf-8")
    assert "/train.jsonl: no record in it; run make_jsonl.py" in refused(tmp_path / "train")


def test_blank_lines_and_a_byte_order_mark_do_no_harm(data, whole, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    path = tmp_path / "data/train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\n\n")
    adapter = trained(tmp_path / "data", tmp_path / "a")
    assert adapter == (whole / "adapters.safetensors").read_bytes()


# ---------------------------------------------------------------------- losses that are no numbers


def test_a_diverged_training_stops_and_keeps_the_adapter(data, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "a")
    before = contents(tmp_path / "a")
    diverging = flags(data, tmp_path / "a", learning_rate=1e30, steps_per_eval=100, save_every=100)
    with pytest.raises(UserError, match=r"the training diverged, and .* is as it was; give a") as e:
        command.main(diverging)
    assert "--learning-rate below 1e+30" in str(e.value)
    assert contents(tmp_path / "a") == before


def test_an_adapter_of_no_numbers_is_never_saved(data, tmp_path):
    """The step that ruins it still had a loss."""
    diverging = flags(data, tmp_path / "a", learning_rate=1e38, iters=1, steps_per_eval=100)
    real = Run.adapter

    def ruined(run: Run) -> dict[str, mx.array]:
        return {name: a * math.nan for name, a in real(run).items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "adapter", ruined)
        patch.setattr(loop, "evaluate", lambda *_: 1.0)
        with pytest.raises(UserError, match="weights that are no numbers at iteration 1"):
            command.main(diverging)
    assert contents(tmp_path / "a") == {}


@pytest.mark.parametrize("validated", [True, False])
def test_a_model_of_no_numbers_is_named(data, tmp_path, validated):
    shutil.copytree(ROOT / TINY, tmp_path / "m")
    weights = mx.load(str(tmp_path / "m/model.safetensors"))
    name = "model.norm.weight"
    weights[name] = weights[name] * math.nan
    mx.save_safetensors(str(tmp_path / "m/model.safetensors"), weights, {"format": "mlx"})
    folder = data
    if not validated:
        folder = tmp_path / "data"
        folder.mkdir()
        shutil.copy(data / "train.jsonl", folder)
    with pytest.raises(
        UserError, match=f"^{tmp_path}/m: model.norm.weight holds NaN or infinity; "
    ):
        command.main(flags(folder, tmp_path / "a", model=tmp_path / "m"))
    assert contents(tmp_path / "a") == {}


# ----------------------------------------------------------------------------------- mlx_lm itself


def test_mlx_lm_takes_the_place_of_an_earlier_run(data, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "a")
    more = {"iters": 4, "save_every": 2, "val_batches": 1, "prompt": ROOT / "prompt.toml"}
    trained(data, tmp_path / "a", engine="mlx_lm", **more)
    left = contents(tmp_path / "a")
    assert not {"resume.safetensors", "log.jsonl", "loss.svg", "adapters_best.safetensors"} & set(
        left
    )
    assert left["prompt.toml"] == (ROOT / "prompt.toml").read_bytes()
    assert json.loads(left["adapter_config.json"])["adapter_path"] == str(tmp_path / "a")
    mlx_lm.load(str(ROOT / TINY), adapter_path=str(tmp_path / "a"))


def test_mlx_lm_stopped_at_once_changes_nothing(data, whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "a")
    before = contents(tmp_path / "a")

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_lm.lora.train", stop)
    with pytest.raises(KeyboardInterrupt):
        command.main(flags(data, tmp_path / "a", engine="mlx_lm"))
    assert contents(tmp_path / "a") == before
