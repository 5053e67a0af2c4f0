"""Llama (Touvron et al. 2023), and Mistral without a sliding window, which computes the same."""

from __future__ import annotations

from typing import Any

from rlaif_jax.config import require
from rlaif_jax.models.decoder_config import DecoderConfig
from rlaif_jax.models.hf.base import Family, Fields, require_flags
from rlaif_jax.models.hf.rotary import NAMES, PREFIX, read_rotary, write_rotary


def read_config(fields: Fields) -> DecoderConfig:
    """Returns the shape that config.json describes. Raises UserError for what is not supported."""
    if fields.get("model_type", str) == "mistral":
        return read_rotary(fields, window=fields.values.get("sliding_window", 4096), absent_kv_heads=8)
    bias = fields.get("attention_bias", bool, False)
    return read_rotary(fields, qkv_bias=bias, output_bias=bias, mlp_bias=fields.get("mlp_bias", bool, False))


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """Returns the fields of config.json. Raises UserError naming a flag that does not fit."""
    shared = write_rotary(config)
    require_flags(config, "Llama (qk_norm=False)", output_bias=config.qkv_bias)
    require(
        config.width % config.num_heads == 0,
        f"no Hugging Face architecture fits this model: Llama needs a width that is a multiple of num_heads, not "
        f"width={config.width} with num_heads={config.num_heads}",
    )
    return {**shared, "attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


FAMILY = Family(
    model_types=("llama", "mistral"),
    architecture="LlamaForCausalLM",
    read_config=read_config,
    flags={},
    write_config=write_config,
    prefix=PREFIX,
    names=NAMES,
    transposed=True,
)
