"""slang/train: the gradient is mlx_lm's, every row is trained once an epoch, shapes are few."""

from itertools import chain
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from training import assert_same, mlx_lm_gradient, model, rows

from slang import numpy_gemma
from slang.train import network as network_module
from slang.train.batches import Rows, epoch, fixed_batches, prefix_before_answers, training_batches
from slang.train.loop import evaluate
from slang.train.network import Network, PlainNetwork
from slang.train.numpy_network import NumpyNetwork, network_of
from slang.train.shapes import Sizes, Work, plan, survey

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("train")]
FOUR = [(3, 5), (6, 1), (1, 9), (11, 4)]


def gradient(network: PlainNetwork, some: Rows, indices: list[int], answer_tokens=None):
    return network.value_and_grad()(network.batch(some, indices, answer_tokens))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dora": True},
        {"tied": False},
        {"num_layers": 2},
        {"num_layers": 1, "window": 16},
        {"window": 16},
        {"window": 8},
        {"keys": ("self_attn.q_proj", "model.embed_tokens")},
        {"keys": ("lm_head",), "tied": False},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("prefix", "lengths"),
    [(12, FOUR), (0, FOUR), (12, [(3, 5)]), (30, [(2, 1), (2, 1)])],
    ids=str,
)
def test_the_gradient_is_that_of_mlx_lm(options, prefix, lengths):
    net, some = model(**options), rows(prefix, *lengths)
    indices = list(range(len(lengths)))
    theirs = mlx_lm_gradient(net, some, indices)
    for kind in (Network, *([] if numpy_gemma.why_not(net) else [NumpyNetwork])):
        some.frozen = some.frozen_starts = None
        network = kind(net, prefix_before_answers([some]))
        assert len(network.prefix) >= prefix
        assert_same(gradient(network, some, indices), theirs)
        loss = network.loss(network.batch(some, indices)).item()
        assert loss == pytest.approx(theirs[0].item(), rel=1e-5)
        if network.start:
            network.keep_frozen(some, 2)
            assert_same(gradient(network, some, indices), theirs)


NOT_LORA = "an adapter that is not plain LoRA on a linear layer"


@pytest.mark.parametrize(
    ("options", "more", "why"),
    [
        ({}, {}, None),
        ({"num_layers": 2, "window": 8}, {}, None),
        ({"dora": True}, {}, NOT_LORA),
        ({"keys": ("model.embed_tokens",)}, {}, NOT_LORA),
        ({"dropout": 0.1}, {}, "dropout"),
        ({"bits": 8}, {}, "quantised weights, or weights with a bias"),
        ({}, {"checkpoint": True}, "--grad-checkpoint"),
    ],
    ids=str,
)
def test_what_numpy_can_not_compute_is_left_to_mlx(options, more, why, capsys):
    network = network_of(model(**options), [5, 6], **more)
    assert type(network) is (Network if why else NumpyNetwork)
    slower = "Computing with MLX's own kernels, which are slower on a CPU"
    assert capsys.readouterr().out == (f"{slower}: {why}\n" if why else "")
    assert np.isfinite(network.loss(network.batch(rows(2, *FOUR), [0, 1])).item())


def test_logits_in_parts_and_gradient_checkpointing_change_nothing(monkeypatch):
    net, some = model(), rows(12, *FOUR)
    expected = mlx_lm_gradient(net, some, [0, 1, 2, 3])
    monkeypatch.setattr(network_module, "LOGITS_AT_A_TIME", 3 * 200)
    network = Network(net, prefix_before_answers([some]), checkpoint=True)
    assert_same(gradient(network, some, [0, 1, 2, 3]), expected)


def test_where_all_is_computed_the_gradient_is_the_same():
    net, some = model(), rows(12, *FOUR)
    ours = gradient(PlainNetwork(net), some, [0, 1, 2, 3])
    assert_same(ours, mlx_lm_gradient(net, some, [0, 1, 2, 3]))


def test_a_batch_shared_by_machines_has_the_gradient_of_the_whole():
    net, some = model(), rows(12, *FOUR)
    count = some.answer_tokens(range(4))
    for kind in (Network, NumpyNetwork):
        network = kind(net, prefix_before_answers([some]))
        shares = [gradient(network, some, part, count) for part in ([0, 2, 3], [1], [])]
        assert shares[2][0].item() == 0
        loss = sum(share[0] for share in shares)
        summed = tree_map(lambda *g: sum(g), *(share[1] for share in shares))
        assert_same((loss, summed), mlx_lm_gradient(net, some, [0, 1, 2, 3]))


def test_mlx_lms_number_has_the_pad_token_as_a_target():
    net, some = model(), rows(12, *FOUR)
    padded = Rows(zip(some.tokens, some.starts, strict=True), 2048, "valid.jsonl", pad=True)
    network = Network(net, prefix_before_answers([padded]))
    theirs = mlx_lm_gradient(net, some, [0, 1, 2, 3], pad_target=True)[0]
    assert evaluate(network, padded, 3, -1) == pytest.approx(theirs.item(), rel=1e-5)


def test_rows_are_cut_at_max_seq_length_and_dropped_without_an_answer(capsys):
    pairs = [([1, 2, 3, 4, 5, 6], 3), ([1, 2, 3, 4, 5, 6], 5), ([7], 0), ([1, 2, 3], 2)]
    some = Rows(pairs, 5, "train.jsonl")
    assert (some.tokens, some.starts) == ([[1, 2, 3, 4, 5], [1, 2, 3]], [3, 2])
    limit = "--max-seq-length 5"
    assert capsys.readouterr().out.splitlines() == [
        f"1 of 4 rows of train.jsonl is longer than {limit}: its answer is trained cut off",
        f"2 of 4 rows of train.jsonl have no answer within {limit}: they are left out",
    ]


@pytest.mark.parametrize("most", [1, 5, 32])
def test_planned_shapes_hold_every_batch_and_are_few(most):
    some = rows(6, *[(1 + i * 7 % 23, 1 + i * 5 % 31) for i in range(200)])
    found = survey(some, 6, 4, 42, 250)
    planned = plan(found, 6, Work(100, 1000, 1), most)
    assert sum(found.values()) == 250 and planned.keys() == found.keys()
    distinct = {sizes.rounded(6) for sizes in found}
    assert len(set(planned.values())) == min(most, len(distinct))
    for exact, shape in planned.items():
        assert all(a <= b for a, b in zip(exact, shape, strict=True))


def test_everyday_rows_are_drawn_from_the_whole_file_by_the_seed():
    def drawn(count: int, seed: int) -> list[int]:
        some, sorted_file = rows(2, (3, 5)), rows(2, *[(1, 1)] * 300)
        sorted_file.tokens = [[n, n] for n in range(300)]
        some.add(sorted_file, count, seed)
        return [tokens[0] for tokens in some.tokens[1:]]

    assert len(set(drawn(67, 42))) == 67 and max(drawn(67, 42)) > 200
    assert drawn(67, 42) == drawn(67, 42) != drawn(67, 43)
    assert sorted(drawn(600, 42)) == sorted([*range(300)] * 2)


def test_a_quantised_model_has_as_much_work_as_the_same_in_floats():
    whole = model(keys=("self_attn.q_proj",))
    assert Work.of(model(keys=("self_attn.q_proj",), bits=8)) == Work.of(whole)
    layer = 2 * 32 * 32 + 2 * 32 * 8 + 3 * 32 * 48  # q and o; k and v; the MLP
    assert Work.of(whole).token == 4 * layer and Work.of(whole).answer == 200 * 32


def test_a_machine_without_a_row_has_a_place_behind_the_prefix():
    """The grid of an empty share points there."""
    some = rows(6, *[(3, 5)] * 5)
    found = survey(some, 6, 4, 42, 2, slice(1, None, 2))
    empty = Sizes(0, 1, 6, 0)
    assert empty in found and plan(found, 6, Work(100, 1000, 1))[empty].packed > 6


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (3, 4), (1, 1), (300, 4)])
def test_every_row_is_trained_once_an_epoch(n, batch_size):
    some = rows(2, *[(1 + i % 7, 1 + i % 5) for i in range(n)])
    first, second = (epoch(some, batch_size, 42, number) for number in (0, 1))
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(n))
    assert first != second or len(first) == 1
    assert all(len(batch) == batch_size for batch in first) or n % batch_size
    at = 2 * len(first) + 1  # the second batch of the third epoch
    following = training_batches(some, batch_size, 42, at)
    third_on = epoch(some, batch_size, 42, 2) + epoch(some, batch_size, 42, 3)
    assert next(following) == third_on[1]
    assert sorted(chain(*fixed_batches(some, batch_size, -1))) == list(range(n))


def test_a_packed_batch_is_as_its_docstring_draws_it():
    some = Rows([([1, 1, 2, 3, 4, 5], 4), ([1, 1, 6, 7, 8, 9, 10], 3)], 99, "train.jsonl")
    network = SimpleNamespace(model=None, prefix=[1, 1], shapes={})
    batch = PlainNetwork.batch(network, some, [0, 1])
    assert batch.tokens.tolist() == [1, 1, 2, 3, 4, 6, 7, 8, 9] + [0] * 7
    assert batch.grid.tolist() == [[2, 3, 4] + [2] * 5, [5, 6, 7, 8] + [2] * 4]
    assert batch.cells[:7].tolist() == [0, 1, 2, 8, 9, 10, 11]
    assert batch.answers[:6].tolist() == [3, 4, 5, 6, 7, 8]
    assert batch.targets[:6].tolist() == [4, 5, 7, 8, 9, 10]
    assert mx.allclose(batch.weights, mx.array([1 / 6] * 6 + [0, 0])).item()
    assert batch.frozen.size == 0
