"""What a Gemma 3 text model is made of: its sizes, its tensors by their MLX names, and their names in a GGUF file.

Shared by the export to GGUF and the import from it. No MLX is needed to know this.
"""

from dataclasses import dataclass

import gguf

EVERY_SIXTH = 6  # layer is a global one, in llama.cpp always


@dataclass(frozen=True)
class Config:
    """What counts of config.json, with mlx_lm's values where it says nothing.

    They are those of mlx_lm.models.gemma3_text.ModelArgs, whose import takes 1.5 s: as long as copying the 1B model.
    """

    hidden_size: int = 1152
    num_hidden_layers: int = 26
    intermediate_size: int = 6912
    num_attention_heads: int = 4
    head_dim: int = 256
    rms_norm_eps: float = 1e-6
    vocab_size: int = 262144
    num_key_value_heads: int = 1
    rope_theta: float = 1e6
    rope_local_base_freq: float = 1e4
    query_pre_attn_scalar: float = 256
    sliding_window: int = 512
    sliding_window_pattern: int = EVERY_SIXTH
    max_position_embeddings: int = 32768
    rope_scaling: dict | None = None


def attention_scalar(hidden_size: int, n_heads: int, head_dim: int, n_layers: int) -> int:
    """What llama.cpp divides attention scores by, squared; the 27B model, of 62 layers, has another than the rest."""
    return hidden_size // n_heads if n_layers == 62 else head_dim


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of mlx_lm's gemma3_text by its name: (rows, columns), or the length of a norm's vector."""
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    layer = {
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
    shapes = {"model.embed_tokens.weight": vocabulary, "lm_head.weight": vocabulary}
    for n in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{n}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (hidden,)}


def gguf_names(config: Config) -> dict[str, str]:
    """The name in a GGUF file of each tensor, by its MLX name; in llama.cpp's order."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    return {name: names.get_name(name, (".weight",)) for name in expected_shapes(config)}
