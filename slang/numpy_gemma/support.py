"""Which models the package can compute, and how one is made ready for it."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear


def to_float32(model: nn.Module) -> None:
    """Convert one module after the other: the 270M model then takes 1.2 GB at most on the way, not
    1.6.
    """
    for _, module in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module):
        module.set_dtype(mx.float32)
        mx.eval(module.parameters())
    model.set_dtype(mx.float32)  # an adapter's own weights
    mx.clear_cache()


def why_not(model: nn.Module) -> str | None:
    """Why this package can't compute the model, or None."""
    if model.model_type not in ("gemma3_text", "gemma3"):
        return f"{model.model_type} is not Gemma 3"
    text = getattr(model, "language_model", model)
    body = text.model
    head = text.get("lm_head", {})
    weights = [module for _, module in model.named_modules() if "weight" in module]
    adapters = [module for _, module in model.named_modules() if "lora_a" in module]
    if any(type(module) is not LoRALinear for module in adapters):
        return "an adapter that is not plain LoRA on a linear layer"
    if "lora_a" in body.embed_tokens or "lora_a" in head:
        return "an adapter on the embedding or the head"
    if any(module.dropout._p_1 < 1 for module in adapters):
        return "dropout"
    if any("bias" in module or "scales" in module for module in weights):
        return "quantised weights, or weights with a bias"
    if any(a.dtype != mx.float32 for _, a in tree_flatten(model.parameters())):
        return "weights that are not float32"
    return None
