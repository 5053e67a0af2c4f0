"""Shape of a causal decoder: settings only."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from rlaif_jax.config import check_choices, require


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pretraining context.

    Attributes:
        kind: `linear` divides every frequency by `factor` (Chen et al. 2023); `llama3` divides only the long wavelengths
            and blends between (Llama 3.1 model card).
        factor: how many times the context is stretched.
        low_freq_factor, high_freq_factor: of `llama3`, where blending begins and ends.
        original_context: tokens of the pretraining context.
    """

    kind: Literal["linear", "llama3"] = "linear"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        check_choices(self, "rope_scaling")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a causal decoder: GPT-2, Llama, Qwen2 and Qwen3 differ only in these flags.

    Attributes:
        vocab_size, num_layers, width: V, L and D.
        num_heads, num_kv_heads, head_dim: heads of queries and of keys and values, and their width h.
        mlp_width: width of the perceptron's hidden layer.
        context_length: most tokens of a sequence.
        norm, norm_eps: RMS norm or layer norm, and its epsilon.
        positions, rope_theta, rope_scaling: rotary positions with their base and stretch, or learned ones.
        mlp: `swiglu` has a gate matrix; `gelu` is GPT-2's two-layer perceptron with the tanh approximation.
        qkv_bias, output_bias, mlp_bias: which matrices have biases.
        qk_norm: RMS norm of each head's queries and keys (Qwen3).
        tie_embeddings: whether the output matrix is the embedding.
        compute_dtype: dtype of matrix products; parameters are float32.
        remat: recompute each block in the backward pass; without effect under pmap on several CPU devices.
        attention: who computes attention over whole sequences (`models/attention.py`); `auto` is the backend's fused kernel
            where it fits the shape.
    """

    vocab_size: int
    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    context_length: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    positions: Literal["rope", "learned"] = "rope"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = True
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"

    def __post_init__(self) -> None:
        check_choices(self, "DecoderConfig")
        for field in ("num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "context_length"):
            require(self.__dict__[field] >= 1, f"DecoderConfig: {field} must be >= 1, not {self.__dict__[field]}")
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"DecoderConfig: num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})",
        )
        require(
            self.positions != "rope" or self.head_dim % 2 == 0,
            f"DecoderConfig: head_dim ({self.head_dim}) must be even with rotary positions",
        )


def small_decoder(
    vocab_size: int,
    *,
    num_layers: int = 3,
    width: int = 96,
    num_heads: int = 6,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    context_length: int = 128,
    mlp_width: int | None = None,
    **flags: Any,
) -> DecoderConfig:
    """Returns a Llama-shaped decoder of a given size.

    Args:
        vocab_size: V.
        num_layers: L.
        width: D.
        num_heads: query heads.
        num_kv_heads: key-value heads; None: as many as query heads.
        head_dim: h; None: width / num_heads.
        context_length: most tokens of a sequence.
        mlp_width: of the SwiGLU; None: about 8/3 of the width.
        **flags: further fields of `DecoderConfig`.
    """
    return DecoderConfig(
        vocab_size=vocab_size,
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads or num_heads,
        head_dim=head_dim or width // max(num_heads, 1),
        mlp_width=mlp_width or (8 * width // 3 + 7) // 8 * 8,
        context_length=context_length,
        **flags,
    )
