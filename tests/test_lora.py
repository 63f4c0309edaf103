"""The gradient is mlx_lm's, every row is trained, and nothing is lost: killed, resumed, refused, kept, on two machines."""

import fcntl
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from itertools import chain
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from conftest import ROOT, TINY, run
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import gemma3_text
from mlx_lm.tuner import trainer
from mlx_lm.tuner.datasets import load_dataset
from mlx_lm.tuner.utils import linear_to_lora_layers

from slang import cpu, lora

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("lora")]


class Pairs(list):
    """(tokens, start of the answer) of each row, where a dataset of mlx_lm is expected."""

    def process(self, pair):
        return pair


def rows(prefix: int, *lengths: tuple[int, int], seed: int = 1) -> lora.Rows:
    """Random rows that begin alike: (tokens of the question, tokens of the answer) each."""
    draw = np.random.default_rng(seed).integers
    head = draw(3, 200, prefix).tolist()
    pairs = [(head + draw(3, 200, question + answer).tolist(), prefix + question) for question, answer in lengths]
    return lora.Rows(Pairs(pairs), 2048, "train")


def model(num_layers: int = -1, dora: bool = False, window: int = 512, tied: bool = True, keys: tuple = (),
          dropout: float = 0.0, bits: int | None = None) -> nn.Module:  # fmt: skip
    """A random gemma3_text model of 4 layers, every second one global, with an adapter that changes what it says."""
    mx.random.seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}
    shape |= {"vocab_size": 200, "query_pre_attn_scalar": 8, "sliding_window": window, "sliding_window_pattern": 2}
    net = gemma3_text.Model(gemma3_text.ModelArgs(model_type="gemma3_text", **shape))
    if tied:
        net.sanitize({})
    if bits:
        nn.quantize(net, 32, bits, class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[1] % 32 == 0)
    net.freeze()
    parameters = {"rank": 4, "dropout": dropout, "scale": 20.0} | ({"keys": set(keys)} if keys else {})
    linear_to_lora_layers(net, num_layers, parameters, use_dora=dora)
    for _, module in net.named_modules():
        if "lora_b" in module:
            module.lora_b = mx.random.normal(module.lora_b.shape) * 0.01
    net.train()
    mx.eval(net.parameters())
    return net


def stock_gradient(net: nn.Module, some: lora.Rows, indices: list[int], pad_target: bool = False):
    """(loss, gradients) of mlx_lm's default_loss; its range of targets ends before the pad token."""
    table = np.zeros((len(indices), 1 + max(len(some.tokens[i]) for i in indices)), np.int32)
    for row, i in enumerate(indices):
        table[row, : len(some.tokens[i])] = some.tokens[i]
    lengths = mx.array([(some.starts[i], len(some.tokens[i]) - (not pad_target)) for i in indices])
    (loss, _), gradients = nn.value_and_grad(net, partial(trainer.default_loss, net))(mx.array(table), lengths)
    return loss, gradients


def assert_same(ours, theirs):
    (loss, gradients), (their_loss, their_gradients) = ours, theirs
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    for (name, a), (_, b) in zip(tree_flatten(gradients), tree_flatten(their_gradients), strict=True):
        assert mx.abs(a - b).max().item() <= 1e-4 * mx.abs(b).max().item(), name


FOUR = [(3, 5), (6, 1), (1, 9), (11, 4)]


@pytest.mark.parametrize("options", [
    {}, {"dora": True}, {"tied": False}, {"num_layers": 2}, {"num_layers": 1, "window": 16}, {"window": 16},
    {"window": 8}, {"keys": ("self_attn.q_proj", "model.embed_tokens")},
], ids=str)  # fmt: skip
@pytest.mark.parametrize(("prefix", "lengths"), [(12, FOUR), (0, FOUR), (12, [(3, 5)]), (30, [(2, 1), (2, 1)])], ids=str)
def test_the_gradient_is_that_of_mlx_lm(options, prefix, lengths):
    net, some = model(**options), rows(prefix, *lengths)
    indices = list(range(len(lengths)))
    theirs = stock_gradient(net, some, indices)
    for kind in (lora.Network, *([] if cpu.why_not(net) else [lora.CpuNetwork])):
        some.trunk = None
        network = kind(net, lora.common_prefix(some))
        assert len(network.prefix) >= prefix
        assert_same(network.value_and_grad()(*network.batch(some, indices)), theirs)
        assert network.loss(*network.batch(some, indices)).item() == pytest.approx(theirs[0].item(), rel=1e-5)
        if network.start:
            network.keep_trunk(some, 2)
            assert_same(network.value_and_grad()(*network.batch(some, indices)), theirs)


@pytest.mark.parametrize(("options", "more", "why"), [
    ({}, {}, None),
    ({"num_layers": 2, "window": 8}, {}, None),
    ({"dora": True}, {}, "an adapter that is not plain LoRA on a linear layer"),
    ({"keys": ("model.embed_tokens",)}, {}, "an adapter that is not plain LoRA on a linear layer"),
    ({"dropout": 0.1}, {}, "dropout"),
    ({"bits": 8}, {}, "quantised weights, or weights with a bias"),
    ({}, {"checkpoint": True}, "--grad-checkpoint"),
], ids=str)  # fmt: skip
def test_what_numpy_can_not_compute_is_left_to_mlx(options, more, why, capsys):
    network = lora.network_of(model(**options), [5, 6], **more)
    assert type(network) is (lora.Network if why else lora.CpuNetwork)
    said = capsys.readouterr().out
    assert said == (f"Computing with MLX's own kernels, which are slower on a CPU: {why}\n" if why else "")
    assert np.isfinite(network.loss(*network.batch(rows(2, *FOUR), [0, 1])).item())


def test_logits_in_parts_and_gradient_checkpointing_change_nothing(monkeypatch):
    net, some = model(), rows(12, *FOUR)
    expected = stock_gradient(net, some, [0, 1, 2, 3])
    monkeypatch.setattr(lora, "LOGITS", 3 * 200)
    network = lora.Network(net, lora.common_prefix(some), checkpoint=True)
    assert_same(nn.value_and_grad(net, network.loss)(*network.batch(some, [0, 1, 2, 3])), expected)


def test_where_all_is_computed_the_gradient_is_the_same():
    net, some = model(), rows(12, *FOUR)
    network = lora.Network(net, lora.common_prefix(some), why_all="because")
    ours = nn.value_and_grad(net, network.loss)(*network.batch(some, [0, 1, 2, 3]))
    assert_same(ours, stock_gradient(net, some, [0, 1, 2, 3]))


def test_a_batch_shared_by_machines_has_the_gradient_of_the_whole():
    net, some = model(), rows(12, *FOUR)
    network = lora.Network(net, lora.common_prefix(some))
    count = some.answer_tokens(range(4))
    for kind in (lora.Network, lora.CpuNetwork):
        network = kind(net, network.prefix)
        shares = [network.value_and_grad()(*network.batch(some, part, tokens=count)) for part in ([0, 2, 3], [1], [])]
        assert shares[2][0].item() == 0
        summed = sum(s[0] for s in shares), tree_map(lambda *g: sum(g), *(s[1] for s in shares))
        assert_same(summed, stock_gradient(net, some, [0, 1, 2, 3]))


def test_stocks_number_has_the_pad_token_as_a_target():
    net, pairs = model(), Pairs(zip(rows(12, *FOUR).tokens, rows(12, *FOUR).starts, strict=True))
    padded = lora.Rows(pairs, 2048, "valid", pad=True)
    network = lora.Network(net, lora.common_prefix(padded))
    theirs = stock_gradient(net, rows(12, *FOUR), [0, 1, 2, 3], pad_target=True)[0]
    assert lora.evaluate(network, padded, 3, -1) == pytest.approx(theirs.item(), rel=1e-5)


def test_rows_are_cut_at_max_seq_length_and_dropped_without_an_answer(capsys):
    pairs = Pairs([([1, 2, 3, 4, 5, 6], 3), ([1, 2, 3, 4, 5, 6], 5), ([7], 0)])
    some = lora.Rows(pairs, 5, "train")
    assert (some.tokens, some.starts) == ([[1, 2, 3, 4, 5]], [3])
    assert capsys.readouterr().out == "2 rows of train.jsonl have no answer within --max-seq-length 5\n"


def test_compiled_steps_give_the_same_bytes(data, tmp_path, monkeypatch):
    """What a GPU runs, forced on this CPU: MLX's own path, steps compiled, shapes planned."""
    if not shutil.which("g++"):
        pytest.skip("no g++ here, which mx.compile needs on a CPU")
    monkeypatch.setattr(lora, "network_of", lora.Network)
    monkeypatch.setattr(lora, "compiles", lambda: True)
    monkeypatch.setattr(lora, "plan", partial(lora.plan, most=3))
    traced = []
    real = lora.Network.loss

    def loss(self, *arrays):
        if self.model.training:
            traced.append(tuple(a.shape for a in arrays))
        return real(self, *arrays)

    monkeypatch.setattr(lora.Network, "loss", loss)
    compiled = trained(data, tmp_path / "compiled", iters=24)
    assert len(traced) == len(set(traced)) == 3
    monkeypatch.setattr(mx, "compile", lambda step, **_: step)
    assert compiled == trained(data, tmp_path / "plain", iters=24)
    assert len(traced) == 3 + 24


@pytest.mark.parametrize("most", [1, 5, 32])
def test_planned_shapes_hold_every_batch_and_are_few(most):
    some = rows(6, *[(1 + i * 7 % 23, 1 + i * 5 % 31) for i in range(200)])
    found = lora.survey(some, 6, 4, 42, 250)
    planned = lora.plan(found, (100, 1000, 1), most)
    assert sum(found.values()) == 250 and planned.keys() == found.keys()
    assert len(set(planned.values())) == min(most, len(found))
    assert all(a <= b for exact, shape in planned.items() for a, b in zip(exact, shape, strict=True))


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (3, 4), (1, 1), (300, 4)])
def test_every_row_is_trained_once_an_epoch(n, batch_size):
    some = rows(2, *[(1 + i % 7, 1 + i % 5) for i in range(n)])
    first, second = (lora.epoch(some, batch_size, 42, number) for number in (0, 1))
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(n))
    assert first != second or len(first) == 1
    assert all(len(batch) == batch_size for batch in first) or n % batch_size
    at = 2 * len(first) + 1  # the second batch of the third epoch
    following = lora.training_batches(some, batch_size, 42, at)
    assert next(following) == (lora.epoch(some, batch_size, 42, 2) + lora.epoch(some, batch_size, 42, 3))[1]
    assert sorted(chain(*lora.fixed_batches(some, batch_size, -1))) == list(range(n))


# ------------------------------------------------------------------------------------------------- runs from a terminal


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """22 rows to train, 5 to validate and 3 to test, of which no number is a multiple of the batch size."""
    folder, number = tmp_path_factory.mktemp("data"), 0
    for name, count in (("train", 22), ("valid", 5), ("test", 3)):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for number in range(number, number + count):  # noqa: B020
                asked = f"Sos de Costa Rica. ¿Qué significa {'muy ' * (number % 4)}tuanis {number}?"
                told = {"role": "assistant", "content": "Que es bueno o agradable. " * (1 + number % 3)}
                file.write(json.dumps({"messages": [{"role": "user", "content": asked}, told]}) + "\n")
    return folder


def flags(data: Path, adapter: Path, **more) -> list[str]:
    every = {"model": ROOT / TINY, "data": data, "adapter_path": adapter, "iters": 13, "batch_size": 4, "num_layers": 2,
             "steps_per_eval": 5, "steps_per_report": 2, "save_every": 3, "val_batches": -1, "learning_rate": 1e-3,
             "mask_prompt": True, "train": True, **more}  # fmt: skip
    found = []
    for name, value in every.items():
        if value is not None and value is not False:
            found += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return found


def trained(data: Path, adapter: Path, **more) -> bytes:
    assert lora.main(flags(data, adapter, **more)) == 0
    return (adapter / "adapters.safetensors").read_bytes()


def losses(adapter: Path, name: str) -> dict[int, float]:
    table = [json.loads(line) for line in (adapter / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["iteration"]: row[name] for row in table if name in row}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """The adapter of an uninterrupted run."""
    adapter = tmp_path_factory.mktemp("whole") / "adapters"
    trained(data, adapter)
    return adapter


def test_a_run_writes_what_mlx_lm_writes_and_its_own(whole, capsys):
    names = {path.name for path in whole.iterdir()}
    numbered = {f"{n:07d}_adapters.safetensors" for n in (3, 6, 9, 12)}
    best = {"adapters.safetensors", "adapters_best.safetensors"}
    assert names == numbered | best | {"adapter_config.json", "resume.safetensors", "log.jsonl", "loss.svg", ".lock"}
    assert list(losses(whole, "train_loss")) == [2, 4, 6, 8, 10, 12, 13]
    assert list(losses(whole, "val_loss")) == [0, 5, 10, 13]
    assert (whole / "loss.svg").read_text(encoding="utf-8").startswith("<?xml")
    weights = mx.load(str(whole / "adapters.safetensors"))
    assert {a.dtype for a in weights.values()} == {mx.float32}
    loaded, _ = mlx_lm.load(str(ROOT / TINY), adapter_path=str(whole))
    assert {name for name, _ in tree_flatten(loaded.parameters())} >= set(weights)


@pytest.mark.parametrize("more", [{}, {"grad_accumulation_steps": 3}, {"optimizer": "adafactor"}, {"optimizer": "muon"}],
                         ids=str)  # fmt: skip
def test_resumed_is_equal_byte_for_byte(data, tmp_path, monkeypatch, more):
    expected = trained(data, tmp_path / "whole", config=dropout(tmp_path), **more)
    asked = []

    def stop(interrupt):
        asked.append(1)
        if len(asked) in (4, 9, 13):  # in a step, and in a validation
            raise lora.Stopped

    monkeypatch.setattr(lora.Interrupt, "check", stop)
    parted = flags(data, tmp_path / "parts", config=dropout(tmp_path), **more)
    assert [lora.main([*parted, "--resume"]) for _ in range(4)] == [130, 130, 130, 0]
    for name in ("adapters.safetensors", "adapters_best.safetensors", "0000012_adapters.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (tmp_path / "parts/adapters.safetensors").read_bytes() == expected
    assert losses(tmp_path / "parts", "val_loss") == losses(tmp_path / "whole", "val_loss")


def test_accumulated_steps_have_the_mean_gradient(data, tmp_path):
    plain = {"optimizer": "sgd", "learning_rate": 0.01, "iters": 2, "grad_accumulation_steps": 2, "keep": "last"}
    trained(data, tmp_path / "a", **plain)
    net, tokenizer = mlx_lm.load(str(ROOT / TINY))
    args = lora.parse(flags(data, tmp_path / "a", **plain))
    lora.build(args, net)
    net.set_dtype(mx.float32)
    some = lora.Rows(load_dataset(args, tokenizer)[0], 2048, "train")
    both = [stock_gradient(net, some, indices)[1] for indices in lora.epoch(some, 4, args.seed, 0)[:2]]
    after = mx.load(str(tmp_path / "a/adapters.safetensors"))
    for (name, a), (_, b) in zip(*map(tree_flatten, both), strict=True):
        if name.endswith("lora_b"):  # 0 at the start, when lora_a has no gradient
            expected = -0.01 * (a + b) / 2
            assert mx.abs(after[name] - expected).max().item() <= 1e-4 * mx.abs(expected).max().item(), name


def dropout(folder: Path) -> Path:
    path = folder / "lora.yaml"
    path.write_text("lora_parameters: {rank: 4, dropout: 0.1, scale: 10.0}\n", encoding="utf-8")
    return path


KILLED = textwrap.dedent("""
    import os, signal, sys
    import mlx.core as mx
    from slang import lora

    place, left = sys.argv[1], int(sys.argv[2])
    owner, name = {"write": (mx, "save_safetensors"), "replace": (os, "replace"), "step": (lora.Network, "batch")}[place]
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
    sys.exit(lora.main(sys.argv[3:]))
""")


def test_killed_at_random_moments_and_resumed_is_equal_byte_for_byte(data, whole, tmp_path):
    adapter, drawn = tmp_path / "adapters", random.Random()
    moments = [("write", drawn.randrange(8)), ("step", drawn.randrange(12)), ("replace", drawn.randrange(12)),
               ("time", drawn.uniform(1, 4)), ("write", drawn.randrange(4)), ("replace", drawn.randrange(4))]  # fmt: skip
    killed = 0
    for place, when in moments:
        command = [sys.executable, "-c", KILLED, place if place != "time" else "step", str(when if place != "time" else 99)]
        process = subprocess.Popen([*command, *flags(data, adapter, resume=True)], cwd=ROOT, stdout=subprocess.DEVNULL)
        if place == "time":
            time.sleep(when)
            process.kill()
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 3, moments
    assert trained(data, adapter, resume=True) == (whole / "adapters.safetensors").read_bytes(), moments
    for path in whole.glob("*_adapters.safetensors"):
        assert (adapter / path.name).read_bytes() == path.read_bytes(), moments
    assert not list(adapter.glob(".*.safetensors.*"))


def test_an_adapter_to_begin_with(data, whole, tmp_path, capsys):
    """--resume-adapter-file: the loss begins where that adapter's ended; one of other shapes, or cut off, is refused."""
    begin = {"resume_adapter_file": whole / "adapters.safetensors", "iters": 1}
    trained(data, tmp_path / "a", **begin)
    assert losses(tmp_path / "a", "val_loss")[0] == pytest.approx(losses(whole, "val_loss")[13], abs=1e-5)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((whole / "adapters.safetensors").read_bytes()[:-1])
    for more, told in (
        (
            {"num_layers": 1},
            f"{begin['resume_adapter_file']}: not an adapter of this model and these settings; give those that",
        ),
        (
            {"resume_adapter_file": cut},
            f"{cut}: not a whole safetensors file (it ends too early); name an adapters.safetensors",
        ),
    ):
        assert lora.main(flags(data, tmp_path / "b", **{**begin, **more})) == 1
        assert told in capsys.readouterr().err


def test_ctrl_c_saves_and_says_how_to_go_on(data, tmp_path):
    command = [sys.executable, "-m", "slang.lora", *flags(data, tmp_path / "a", iters=100_000)]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (tmp_path / "a/0000003_adapters.safetensors").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert f"Stopped, and saved in {tmp_path}/a; the same command with --resume goes on from there" in errors


def test_resuming_something_else_is_refused_with_what_differs(data, whole, tmp_path, capsys):
    before = {path: path.read_bytes() for path in whole.iterdir()}
    other = tmp_path / "data"
    other.mkdir()
    for path in data.iterdir():
        (other / path.name).write_text(path.read_text(encoding="utf-8").replace("agradable", "feo"), encoding="utf-8")
    assert lora.main(flags(other, whole, resume=True, batch_size=2, prompt=ROOT / "prompt.toml")) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"{whole}/resume.safetensors: saved by a run with other settings, so it can't go on from there:\n")
    assert [line.split(":")[0].strip() for line in error.splitlines()[1:-1]] == [
        "train rows", "valid rows", "prompt", "batch_size"
    ]  # fmt: skip
    assert "  batch_size: 4 then, 2 now\n" in error
    assert error.endswith("Give the same again, or leave --resume out to begin anew.\n")
    assert {path: path.read_bytes() for path in whole.iterdir()} == before


def test_resuming_a_finished_run_leaves_its_bytes(data, whole, tmp_path):
    """The best adapter comes back from a file, which gives its arrays in another order."""
    shutil.copytree(whole, tmp_path / "again")
    before = {path.name: path.read_bytes() for path in whole.glob("*adapters*.safetensors")}
    trained(data, tmp_path / "again", resume=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").glob("*adapters*.safetensors")} == before


def test_a_finished_run_goes_on_with_more_iters(data, whole, tmp_path):
    # The last adapter: the shorter run validated once more, at its end, and may have found its best there.
    subprocess.run(["cp", "-R", whole, tmp_path / "longer"], check=True)
    longer = trained(data, tmp_path / "longer", resume=True, iters=16, keep="last")
    assert longer == trained(data, tmp_path / "whole", iters=16, keep="last")


def test_an_unfinished_state_is_not_overwritten(data, whole, tmp_path, capsys, monkeypatch):
    adapter = tmp_path / "a"
    monkeypatch.setattr(lora.Interrupt, "check", lambda _: (_ for _ in ()).throw(lora.Stopped))
    assert lora.main(flags(data, adapter, steps_per_eval=100, iters=4)) == 130
    monkeypatch.undo()
    lora.main(flags(data, adapter, iters=1))
    assert (adapter / "resume_before.safetensors").exists() == ("resume_before.safetensors" in capsys.readouterr().out)


def scores(*values: float):
    """Stands for lora.evaluate and gives these losses, one after the other."""
    following = iter(values)
    return lambda *_: next(following)


def test_the_best_is_kept_and_the_last_beside_it(data, tmp_path, capsys, monkeypatch):
    for keep in ("best", "last"):
        monkeypatch.setattr(lora, "evaluate", scores(3.0, 1.0, 2.0, 1.0))
        trained(data, tmp_path / keep, keep=keep, save_every=5)
        held = f"{tmp_path}/{keep}/adapters.safetensors holds the {keep} one"
        said = f"Best iteration 5 (valid loss 1.000), last 13 (1.000); {held};"
        assert said in capsys.readouterr().out
    best = (tmp_path / "best/0000005_adapters.safetensors").read_bytes()
    assert (tmp_path / "best/adapters.safetensors").read_bytes() == best
    assert (tmp_path / "last/adapters_best.safetensors").read_bytes() == best
    last = (tmp_path / "last/adapters.safetensors").read_bytes()
    assert (tmp_path / "best/adapters_last.safetensors").read_bytes() == last != best


def test_before_the_first_step_there_is_nothing_to_keep(data, tmp_path, monkeypatch):
    """However low the loss of the untrained adapter is: it is an adapter that does nothing."""
    monkeypatch.setattr(lora, "evaluate", scores(0.5, 2.0, 3.0, 4.0))
    trained(data, tmp_path / "a", keep="best", save_every=5)
    kept = (tmp_path / "a/adapters.safetensors").read_bytes()
    assert kept == (tmp_path / "a/0000005_adapters.safetensors").read_bytes()


def test_epochs_are_counted_in_rows(data, tmp_path, capsys):
    rows = len((data / "train.jsonl").read_text(encoding="utf-8").splitlines())
    for batch_size in (1, 4, 7):
        trained(data, tmp_path / str(batch_size), iters=None, epochs=0.5, batch_size=batch_size)
        steps = math.ceil(0.5 * rows / batch_size)
        assert max(losses(tmp_path / str(batch_size), "val_loss")) == steps
        assert f"{steps} steps of {batch_size} rows: 0." in capsys.readouterr().out
    trained(data, tmp_path / "iters", iters=3, epochs=5)  # steps win
    assert max(losses(tmp_path / "iters", "val_loss")) == 3


def test_the_rate_rises_and_falls(data, tmp_path):
    trained(data, tmp_path / "a", iters=40, decay=True, learning_rate=1e-3, steps_per_report=1)
    rates = losses(tmp_path / "a", "learning_rate")
    assert rates[1] == pytest.approx(5e-5) and max(rates.values()) == rates[3] == pytest.approx(1e-3)
    assert rates[40] == pytest.approx(5e-5, rel=0.1)
    assert lora.main(flags(data, tmp_path / "a", iters=50, decay=True, learning_rate=1e-3, resume=True)) == 1


def test_everyday_rows_are_trained_too_and_share_the_prefix(data, tmp_path, capsys):
    everyday = tmp_path / "everyday.jsonl"
    chat = [{"role": "user", "content": "¿Qué hora es?"}, {"role": "assistant", "content": "Son las tres."}]
    everyday.write_text(json.dumps({"messages": chat}) + "\n", encoding="utf-8")
    trained(data, tmp_path / "a", iters=2, everyday=everyday, prompt=ROOT / "prompt.toml")
    rows = len((data / "train.jsonl").read_text(encoding="utf-8").splitlines())
    assert f"epochs of the {rows + 1} rows, 1 of them everyday language" in capsys.readouterr().out
    everyday.write_text("{}\n", encoding="utf-8")
    assert lora.main(flags(data, tmp_path / "b", iters=2, everyday=everyday)) == 1
    assert f'{everyday}:1: no "messages" list;' in capsys.readouterr().err


def test_early_stop_after_validations_without_gain(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lora, "evaluate", scores(3.0, 2.0, 2.5, 1.0, 1.0, 2.0))
    trained(data, tmp_path / "a", iters=100, steps_per_eval=1, early_stop=2)
    assert list(losses(tmp_path / "a", "val_loss")) == [0, 1, 2, 3, 4, 5]
    assert "No better valid loss in 2 validations, stopped at iteration 5\n" in capsys.readouterr().out


def test_without_a_validation_set_there_is_a_warning(data, tmp_path, capsys):
    (tmp_path / "train.jsonl").write_bytes((data / "train.jsonl").read_bytes())
    trained(tmp_path, tmp_path / "a", iters=2)
    said = capsys.readouterr().out
    assert "No validation set: the last adapter is kept, and whether it is a good one is not known" in said
    assert not list((tmp_path / "a").glob("adapters_*"))


@pytest.mark.parametrize(("more", "why"), [
    ({"fine_tune_type": "full"}, "with --fine-tune-type full"),
    ({"mask_prompt": False}, "without --mask-prompt, every token is a target"),
])  # fmt: skip
def test_what_cannot_be_shared_is_computed_and_said(data, tmp_path, capsys, more, why):
    trained(data, tmp_path / "a", iters=2, test=True, stock_loss=True, **more)
    said = capsys.readouterr().out
    assert f"Computing all positions: {why}\n" in said
    assert said.count("Test loss") == 2
    assert "(a pad token counted in each row)" in said


def test_a_second_run_in_the_same_folder_is_refused(data, tmp_path, capsys):
    with open(tmp_path / ".lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert lora.main(flags(data, tmp_path)) == 1
    remedy = "another run is training there; wait for it or choose another --adapter-path"
    assert capsys.readouterr().err == f"{tmp_path}: {remedy}\n"
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_without_training_rows_the_folder_is_named(tmp_path, capsys):
    assert lora.main(flags(tmp_path, tmp_path / "a")) == 1
    error = "Training set not found or empty. Must provide training set for fine-tuning."
    assert capsys.readouterr().err == f"{tmp_path}: {error}\n"


@pytest.mark.parametrize("flag", ["--resume", "--keep", "--early-stop=3", "--stock-loss", "--prompt", "--epochs=3", "--decay"])
def test_train_sh_does_not_give_our_flags_to_mlx_lm(flag):
    done = run("bash", "train.sh", "--iters", "5", flag, ENGINE="mlx_lm")
    assert done.returncode == 1
    assert done.stderr == f"{flag}: mlx_lm.lora has no such flag; leave out the flag, or ENGINE=mlx_lm\n"


def test_two_machines_have_the_loss_curve_of_one(data, whole, tmp_path):
    """22 rows in batches of 4: the last batch of an epoch has one row for each, validation's last one row for two."""
    launch = Path(sys.executable).parent / "mlx.launch"
    port = random.randrange(20_000, 60_000)
    command = [launch, "-n", "2", "--backend", "ring", "-p", str(port), sys.executable, "-m", "slang.lora"]
    done = run(*command, *flags(data, tmp_path / "a"))
    assert "Best iteration" in done.stdout, done.stdout + done.stderr  # mlx.launch ends with 0 whatever happened
    for name in ("train_loss", "val_loss"):
        assert losses(tmp_path / "a", name) == pytest.approx(losses(whole, name), rel=1e-4)
