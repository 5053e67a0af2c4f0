"""What the families with rotary positions share: Llama's names, and the fields of its config.json.

The decoder of all of them has RMS norm and SwiGLU; they differ in biases, norms of q and k, and defaults.
"""

from __future__ import annotations

from typing import Any

from rlaif_jax.config import require
from rlaif_jax.models.decoder_config import DecoderConfig, RopeScaling
from rlaif_jax.models.hf.base import Fields, require_flags

PREFIX = "model."
NAMES = {
    "embed": "embed_tokens",
    "norm": "norm",
    "layers": "layers",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def read_rotary(
    fields: Fields,
    *,
    window: Any = None,
    absent_kv_heads: int | None = None,
    default_head_dim: int | None = None,
    **flags: Any,
) -> DecoderConfig:
    """Returns the settings of the decoder that a config.json describes.

    Args:
        fields: the fields of config.json.
        window: tokens that attention looks back. The decoder attends to the whole context: None or a window of at
            least the context is accepted.
        absent_kv_heads: number of key and value heads where the key `num_key_value_heads` is absent; None: as
            many as query heads. A null in the file means as many as query heads, whatever this is.
        default_head_dim: size of a head where `head_dim` is absent; None: hidden_size / num_attention_heads.
        **flags: the family's own flags of `DecoderConfig`.

    Raises:
        UserError: a field is missing, of a wrong type or not supported.
    """
    fields.only("hidden_act", ("silu", "swish"), "silu")
    width, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    context = fields.size("max_position_embeddings")
    require(
        window is None or (type(window) is int and window >= context),
        f"{fields.where}: sliding_window={window!r} is not supported; null, or a window of at least "
        f"max_position_embeddings ({context}), is",
    )
    if default_head_dim is None and fields.get("head_dim", int, None) is None:
        require(
            width % heads == 0,
            f"{fields.where}: hidden_size ({width}) must be a multiple of num_attention_heads ({heads})",
        )
    theta, scaling = read_rope(fields, context)
    kv_heads = heads if "num_key_value_heads" in fields.values else absent_kv_heads or heads
    return DecoderConfig(
        vocab_size=fields.size("vocab_size"),
        num_layers=fields.size("num_hidden_layers"),
        width=width,
        num_heads=heads,
        num_kv_heads=fields.size("num_key_value_heads", kv_heads),
        head_dim=fields.size("head_dim", default_head_dim or width // heads),
        mlp_width=fields.size("intermediate_size"),
        context_length=context,
        norm_eps=fields.get("rms_norm_eps", float, 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=fields.get("tie_word_embeddings", bool, False),
        **flags,
    )


def read_rope(fields: Fields, context: int) -> tuple[float, RopeScaling | None]:
    """Reads the rotary embedding from config.json.

    It is in `rope_parameters` (transformers 5), or in `rope_theta` and `rope_scaling`.

    Args:
        fields: the fields of config.json.
        context: longest sequence of the model, the default of the original context of the kind "llama3".

    Returns:
        (theta, 10,000 by default; scaling, None for the kind "default").

    Raises:
        UserError: a field is of a wrong type, or of a kind that is not supported.
    """
    fields.only("partial_rotary_factor", (1, None), None)
    key = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    rope = Fields(fields.get(key, dict, {}), f"{fields.where}: {key}")
    rope.only("partial_rotary_factor", (1, None), None)
    nested = [name for name, value in rope.values.items() if isinstance(value, dict)]
    require(not nested, f"{rope.where}: settings for each kind of layer ({', '.join(nested)}) are not supported")
    theta = rope.get("rope_theta", float, fields.get("rope_theta", float, 10_000.0))
    kind_key = "rope_type" if "rope_type" in rope.values else "type"
    rope.only(kind_key, ("default", "linear", "llama3"), "default")
    kind = rope.get(kind_key, str, "default")
    if kind == "default":
        return theta, None
    factor = rope.get("factor", float)
    if kind == "linear":
        return theta, RopeScaling("linear", factor)
    return theta, RopeScaling(
        "llama3",
        factor,
        rope.get("low_freq_factor", float),
        rope.get("high_freq_factor", float),
        rope.size("original_max_position_embeddings", context),
    )


def write_rotary(config: DecoderConfig) -> dict[str, Any]:
    """Returns the shared fields of config.json. Raises UserError naming a flag that does not fit."""
    require_flags(config, "every architecture with positions='rope'", norm="rms", mlp="swiglu")
    scaling: dict[str, Any] | None = None
    if config.rope_scaling is not None:
        rope = config.rope_scaling
        scaling = {"rope_type": rope.kind, "factor": rope.factor}
        if rope.kind == "llama3":
            scaling |= {
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
                "original_max_position_embeddings": rope.original_context,
            }
    return {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.width,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "hidden_act": "silu",
    }
