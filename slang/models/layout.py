"""The tensors of a Gemma 3 text model: their MLX names, their shapes, their names in a GGUF file.

Shared by the export to GGUF, the import from it and the check of an adapter. Needs no MLX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_lm.models.gemma3_text import ModelArgs

    from slang.models.formats import GemmaConfig

EVERY_SIXTH = 6  # layer is a global one, in llama.cpp always


def attention_scalar(hidden_size: int, n_heads: int, head_dim: int, n_layers: int) -> int:
    """What llama.cpp divides attention scores by, squared.

    The 27B model, of 62 layers, has another than the rest (llama.cpp, llama-model.cpp).
    """
    return hidden_size // n_heads if n_layers == 62 else head_dim


def expected_shapes(config: ModelArgs | GemmaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of mlx_lm's gemma3_text by its name: (rows, columns), or a vector's length."""
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "pre_feedforward_layernorm": (hidden,),
        "post_feedforward_layernorm": (hidden,),
    }
    vocabulary = (config.vocab_size, hidden)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": vocabulary,
        "lm_head.weight": vocabulary,
    }
    for n in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{n}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (hidden,)}


def misfit(name: str, have: tuple[int, ...] | None, want: tuple[int, ...] | None) -> str:
    """What is wrong with a tensor of one shape, or none, where another is wanted, or none."""
    if have is None:
        return f"{name} is missing"
    if want is None:
        return f"{name} is one too many"
    there, wanted = (" x ".join(map(str, shape)) or "one number" for shape in (have, want))
    return f"{name} is {there} in place of {wanted}"


def gguf_names(config: ModelArgs) -> dict[str, str]:
    """The name in a GGUF file of each tensor, by its MLX name; in llama.cpp's order."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    return {name: names.get_name(name, (".weight",)) for name in expected_shapes(config)}
