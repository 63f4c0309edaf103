"""slang/numpy_gemma against MLX, part by part, and rows that go on. Gradients: test_train_loss."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import gemma3_text

from slang import numpy_gemma
from slang.numpy_gemma import parts, vocabulary


def model(window: int, kv_heads: int) -> nn.Module:
    """A random gemma3_text model of 4 layers, every second one global."""
    mx.random.seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 48, "head_dim": 8}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": kv_heads, "query_pre_attn_scalar": 8}
    shape |= {"vocab_size": 3000, "sliding_window": window, "sliding_window_pattern": 2}
    net = gemma3_text.Model(gemma3_text.ModelArgs(model_type="gemma3_text", **shape))
    net.sanitize({})
    mx.eval(net.parameters())
    return net


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("window", [6, 512])
@pytest.mark.parametrize("prefix", [0, 5])
def test_rows_go_on_as_they_do_alone(window, kv_heads, prefix):
    net = model(window, kv_heads)
    draw = np.random.default_rng(1).integers
    head = draw(3, 3000, prefix).tolist()
    rows = [draw(3, 3000, n).tolist() for n in (9, 1, 4)]
    reading = numpy_gemma.Reading(numpy_gemma.Step(net), head, [row[:-1] for row in rows])
    whole, tokens, still = [head + row for row in rows], [row[-1] for row in rows], [0, 1, 2]
    for step in range(20):
        if step == 4:
            reading.keep([2, 0])
            still, tokens = [2, 0], [tokens[2], tokens[0]]
        tokens = reading.next(tokens).tolist()
        for i, token in zip(still, tokens, strict=True):
            assert token == mx.argmax(net(mx.array([whole[i]]))[0, -1]).item()
            whole[i].append(token)


def test_losses_are_those_of_all_logits_at_once():
    random = np.random.default_rng(0).standard_normal
    hidden = random((7, 16), dtype=np.float32)
    head = 3 * random((3 * vocabulary.CHUNK - 5, 16), dtype=np.float32)
    targets = np.arange(7) * 800
    losses, slopes = vocabulary.cross_entropy(hidden, head, targets, slope=True)

    def loss(h):
        return nn.losses.cross_entropy(h @ mx.array(head).T, mx.array(targets)).sum()

    expected, gradient = mx.value_and_grad(loss)(mx.array(hidden))
    assert losses.sum() == pytest.approx(expected.item(), rel=1e-5)
    assert np.abs(slopes - np.array(gradient)).max() < 1e-4 * np.abs(np.array(gradient)).max()
    assert (vocabulary.likeliest(hidden, head) == (hidden @ head.T).argmax(axis=1)).all()
    assert (vocabulary.likeliest(hidden * np.float32(np.nan), head) == 0).all()


def test_elementwise_parts_are_mlxs():
    gate, up = np.random.default_rng(0).standard_normal((2, 50, 4096), dtype=np.float32) * 4
    expected = np.array(nn.gelu_approx(mx.array(gate)) * mx.array(up))
    product, _, _ = parts.gelu_product(gate.copy(), up.copy())
    assert np.abs(product - expected).max() < 1e-5 * np.abs(expected).max()
    rope = nn.RoPE(16, base=100)
    x = np.random.default_rng(0).standard_normal((9, 2, 16), dtype=np.float32)
    turned = np.array(rope(mx.array(x).swapaxes(0, 1)[None])[0].swapaxes(0, 1))
    cos, sin = parts.angles(rope, 16, np.arange(9))
    assert np.abs(parts.rotated(x, cos, sin) - turned).max() < 1e-5
    assert np.abs(parts.rotated(parts.rotated(x, cos, sin), cos, -sin) - x).max() < 1e-5
