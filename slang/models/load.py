"""A model and its adapter, loaded by mlx_lm. What goes wrong is one line that a person can mend."""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import msgspec
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import dequantize_model

from slang.errors import UserError
from slang.models import find
from slang.models.formats import one_line

SAMPLE = [
    {"role": "system", "content": "Sos de Costa Rica."},
    {"role": "user", "content": "Qué es un mae?"},
    {"role": "assistant", "content": "Un amigo."},
]


def load(model: str, adapter: str | None = None) -> tuple[nn.Module, TokenizerWrapper]:
    """A model with its adapter, if one is named, and its tokenizer.

    `model` is a folder, a .gguf file, gemma-3-270m or a name on Hugging Face; `adapter` is a folder
    with adapters.safetensors and adapter_config.json. Raises UserError where one can't be used.
    """
    source, _ = find.check(model, adapter)
    with one_line(f"{source}: mlx_lm can't load it", find.AGAIN):
        net, tokenizer = mlx_lm.load(source)
    check_finite(dict(tree_flatten(net.parameters())), source, find.AGAIN)
    check_template(tokenizer, source)
    if adapter is not None:
        add_adapter(net, Path(adapter), model)
    return net, tokenizer


def check_finite(weights: Mapping[str, mx.array], place: str, remedy: str) -> None:
    """Raises UserError where a weight is NaN or infinite."""
    for name, array in weights.items():
        if not mx.issubdtype(array.dtype, mx.floating) or mx.isfinite(array.sum()):
            continue  # a sum is six times as fast as looking at each
        if not mx.isfinite(array).all():
            raise UserError(f"{place}: {name} holds NaN or infinity; {remedy}")


def check_template(tokenizer: TokenizerWrapper, source: str) -> None:
    """Raises UserError where the chat template breaks, refuses a chat or leaves a part out."""
    with one_line(f"{source}: its chat template can't be used", find.ANOTHER):
        text = tokenizer.apply_chat_template(SAMPLE, tokenize=False)
        tokenizer.apply_chat_template(SAMPLE[:2], add_generation_prompt=True)
        if "\ufeff" in text:
            raise ValueError("it begins with a byte order mark, which the model would read")
        for message in SAMPLE:
            if message["content"] not in text:
                raise ValueError(f"it leaves out what the {message['role']} says")


def add_layers(net: nn.Module, kind: str, num_layers: int, lora: dict) -> None:
    """Freeze a model but for what an adapter changes in its last layers, in all where it is -1.

    kind  lora or dora: matrices beside those that `lora` names; full: the layers themselves
    """
    net.freeze()
    if kind == "full":
        for layer in net.layers[-max(num_layers, 0) :]:
            layer.unfreeze()
    else:
        linear_to_lora_layers(net, num_layers, lora, use_dora=kind == "dora")


def add_adapter(net: nn.Module, adapter: Path, model: str) -> None:
    """Give a model its adapter, as mlx_lm.tuner.utils.load_adapters, which is content with a part.

    Raises UserError where a tensor is missing, one too many, of another shape, NaN or infinite.
    """
    about = find.read_adapter_config(adapter)
    path = adapter / "adapters.safetensors"
    with one_line(f"{path}: mlx_lm can't load it", find.TRAIN_AGAIN):
        lora = msgspec.to_builtins(about.lora_parameters)
        add_layers(net, about.fine_tune_type, about.num_layers, lora)
        expected = {name: array.shape for name, array in tree_flatten(net.trainable_parameters())}
        find.check_tensors(path, model, about, expected)
        weights = mx.load(str(path))
        check_finite(weights, str(path), "train again with a smaller --learning-rate")
        net.load_weights(list(weights.items()), strict=False)
        net.eval()
        mx.eval(net.parameters())


def dequantized(model: nn.Module) -> nn.Module:
    """Turn quantised matrices into float32 ones, in place; everything else becomes float32 too.

    So an adapter can be merged into them: LoRALinear.fuse() of a quantised matrix quantises the
    sum anew, and the result is another model. The model takes 4 bytes a parameter then.
    """
    model.set_dtype(mx.float32)  # the scales too, so that nothing is rounded to bfloat16
    dequantize_model(model)
    model.set_dtype(mx.float32)  # what was of another kind of quantisation
    mx.eval(model.parameters())
    return model
