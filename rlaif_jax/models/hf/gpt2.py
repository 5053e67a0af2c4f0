"""GPT-2 (Radford et al. 2019): learned positions, layer norm, biases everywhere."""

from __future__ import annotations

from typing import Any

from rlaif_jax.config import require
from rlaif_jax.models.decoder_config import DecoderConfig
from rlaif_jax.models.hf.base import Family, Fields, require_flags


def read_config(fields: Fields) -> DecoderConfig:
    """Returns the shape that config.json describes. Raises UserError for what is not supported."""
    fields.only("activation_function", ("gelu_new", "gelu_pytorch_tanh"), "gelu_new")
    fields.only("scale_attn_weights", (True,), True)
    fields.only("scale_attn_by_inverse_layer_idx", (False,), False)
    fields.only("add_cross_attention", (False,), False)
    width, heads = fields.size("n_embd"), fields.size("n_head")
    require(width % heads == 0, f"{fields.where}: n_embd ({width}) must be a multiple of n_head ({heads})")
    return DecoderConfig(
        vocab_size=fields.size("vocab_size"),
        num_layers=fields.size("n_layer"),
        width=width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        mlp_width=fields.size("n_inner", 4 * width),
        context_length=fields.size("n_positions"),
        norm="layer",
        norm_eps=fields.get("layer_norm_epsilon", float, 1e-5),
        positions="learned",
        mlp="gelu",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tie_embeddings=fields.get("tie_word_embeddings", bool, True),
    )


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """Returns GPT-2's own fields of config.json. Raises UserError naming a flag that does not fit."""
    require_flags(
        config,
        "GPT-2 (positions='learned')",
        norm="layer",
        mlp="gelu",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        qk_norm=False,
        num_kv_heads=config.num_heads,
        width=config.num_heads * config.head_dim,
    )
    return {
        "n_layer": config.num_layers,
        "n_embd": config.width,
        "n_head": config.num_heads,
        "n_inner": config.mlp_width,
        "n_positions": config.context_length,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new",
    }


FAMILY = Family(
    model_types=("gpt2",),
    architecture="GPT2LMHeadModel",
    read_config=read_config,
    flags={"positions": "learned"},
    write_config=write_config,
    prefix="transformer.",
    names={
        "embed": "wte",
        "position_embed": "wpe",
        "norm": "ln_f",
        "layers": "h",
        "norm1": "ln_1",
        "norm2": "ln_2",
        "q": "attn.c_attn",
        "k": "attn.c_attn",
        "v": "attn.c_attn",
        "o": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    },
    transposed=False,
)
