"""Qwen2 (biases of q, k and v) and Qwen3 (norms of q and k): Yang et al. 2024 and 2025."""

from __future__ import annotations

import dataclasses
from typing import Any

from rlaif_jax.models.decoder_config import DecoderConfig
from rlaif_jax.models.hf.base import Family, Fields, require_flags
from rlaif_jax.models.hf.rotary import NAMES, PREFIX, read_rotary, write_rotary

ABSENT_KV_HEADS = 32


def read_window(fields: Fields) -> Any:
    """Returns the number of tokens that the sliding layers look back; None where no layer slides.

    `fields` are those of config.json. Raises UserError for a field of a wrong type.
    """
    if not fields.get("use_sliding_window", bool, False):
        return None
    kinds = fields.get("layer_types", list, None)
    if kinds:
        slides = "sliding_attention" in kinds
    else:
        slides = fields.get("max_window_layers", int, 28) < fields.size("num_hidden_layers")
    return fields.values.get("sliding_window", 4096) if slides else None


def read_qwen2(fields: Fields) -> DecoderConfig:
    """Returns the shape that config.json describes. Raises UserError for what is not supported."""
    return read_rotary(fields, window=read_window(fields), absent_kv_heads=ABSENT_KV_HEADS, qkv_bias=True)


def read_qwen3(fields: Fields) -> DecoderConfig:
    """Returns the shape that config.json describes. Raises UserError for what is not supported."""
    bias = fields.get("attention_bias", bool, False)
    return read_rotary(
        fields,
        window=read_window(fields),
        absent_kv_heads=ABSENT_KV_HEADS,
        default_head_dim=128,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
    )


def write_qwen2(config: DecoderConfig) -> dict[str, Any]:
    """Returns the fields of config.json. Raises UserError naming a flag that does not fit."""
    shared = write_rotary(config)
    require_flags(config, "Qwen2 (qkv_bias=True, output_bias=False)", mlp_bias=False)
    return {**shared, "use_sliding_window": False}


def write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    """Returns the fields of config.json. Raises UserError naming a flag that does not fit."""
    shared = write_rotary(config)
    require_flags(config, "Qwen3 (qk_norm=True)", mlp_bias=False, output_bias=config.qkv_bias)
    return {**shared, "use_sliding_window": False, "attention_bias": config.qkv_bias}


QWEN2 = Family(
    model_types=("qwen2",),
    architecture="Qwen2ForCausalLM",
    read_config=read_qwen2,
    flags={"qkv_bias": True, "output_bias": False},
    write_config=write_qwen2,
    prefix=PREFIX,
    names=NAMES,
    transposed=True,
)
QWEN3 = dataclasses.replace(
    QWEN2,
    model_types=("qwen3",),
    architecture="Qwen3ForCausalLM",
    read_config=read_qwen3,
    flags={"qk_norm": True},
    write_config=write_qwen3,
)
