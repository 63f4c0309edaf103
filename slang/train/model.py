"""The model with its adapter, and the optimizer, as mlx_lm.lora makes them from the settings."""

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm.cli_ui import rprint
from mlx_lm.tuner.utils import build_schedule

from slang.errors import UserError, first_line
from slang.models import formats
from slang.models.load import add_layers
from slang.train.checkpoint import goes_on
from slang.train.settings import Settings

OPTIMIZERS = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "muon": optim.Muon,
    "sgd": optim.SGD,
    "adafactor": optim.Adafactor,
}


def fingerprint(model: nn.Module) -> str:
    """Of the beginning of every weight: another model has another, and the same after training."""
    digest = hashlib.sha256()
    for name, weight in tree_flatten(model.parameters()):
        start = weight.reshape(-1)[:256]
        about = f"{name} {weight.shape} {weight.dtype}".encode()
        digest.update(about + bytes(memoryview(start.view(mx.uint8))))
    return digest.hexdigest()[:16]


def add_adapter(settings: Settings, model: nn.Module) -> dict[str, mx.Dtype]:
    """Freeze the model and give it its adapter; returns the dtype of each array that is trained.

    Raises UserError where the model has no such layers, or the adapter to begin with has others.
    """
    mx.random.seed(settings.seed)
    n = settings.num_layers
    if n > len(model.layers):
        raise UserError(f"--num-layers {n}: the model has {len(model.layers)}; -1 is all of them")
    parameters = settings.builtins()["lora_parameters"] or {}
    if settings.fine_tune_type != "full":
        need_keys(model, parameters.get("keys", ()))
    try:
        add_layers(model, settings.fine_tune_type, n, parameters)
    except ValueError as error:
        raise UserError(f"lora_parameters.keys: {first_line(error)}; name linear layers") from None
    if not tree_flatten(model.trainable_parameters()):
        raise UserError("lora_parameters.keys: no layer gets an adapter; name linear layers")
    if settings.resume_adapter_file and not goes_on(settings):
        load_weights(model, Path(settings.resume_adapter_file))
    return {name: a.dtype for name, a in tree_flatten(model.trainable_parameters())}


def need_keys(model: nn.Module, keys: Sequence[str]) -> None:
    """Raises UserError for a key of lora_parameters that is no layer's name."""
    names = {name for name, _ in model.named_modules()}
    for layer in model.layers:
        names |= {name for name, _ in layer.named_modules()}
    for key in keys:
        if key not in names or not key:
            raise UserError(
                f"lora_parameters.keys: the model has no layer {key}; name those such as "
                "self_attn.q_proj"
            )


def load_weights(model: nn.Module, path: Path) -> None:
    """Begin with the weights of another adapter. Raises UserError unless it has the same arrays."""
    rprint(f"Loading fine-tuned weights from {path}")
    there = formats.weight_shapes(path, "name an adapters.safetensors")
    wanted = {name: a.shape for name, a in tree_flatten(model.trainable_parameters())}
    if {name: tuple(shape) for name, shape in there.items()} != wanted:
        remedy = "give those that it was trained with"
        raise UserError(f"{path}: not an adapter of this model and these settings; {remedy}")
    model.load_weights(str(path), strict=False)


def learning_rate(settings: Settings, updates: int) -> float | Callable:
    """The learning rate, or what it is at each update, by lr_schedule or --decay."""
    rate = settings.learning_rate
    if settings.lr_schedule:
        try:
            schedule = build_schedule(settings.builtins()["lr_schedule"])
            schedule(mx.array(0))
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(
                f"{settings.config}: lr_schedule.arguments: {first_line(error)}; see "
                f"mlx.optimizers.{settings.lr_schedule.name}"
            ) from None
        return schedule
    if not settings.decay:
        return rate
    warm = max(1, updates // 20)
    lowest = rate / 20
    up = optim.linear_schedule(lowest, rate, warm)
    down = optim.cosine_decay(rate, max(1, updates - warm), lowest)
    return optim.join_schedules([up, down], [warm])


def make_optimizer(settings: Settings, model: nn.Module, iters: int) -> optim.Optimizer:
    options = settings.optimizer_options()
    rate = learning_rate(settings, iters // settings.grad_accumulation_steps)
    try:
        optimizer = OPTIMIZERS[settings.optimizer](learning_rate=rate, **options)
    except ValueError as error:
        where = f"{settings.config}: optimizer_config.{settings.optimizer}"
        raise UserError(f"{where}: {first_line(error)}; see mlx.optimizers") from None
    optimizer.init(model.trainable_parameters())
    return optimizer


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
