"""Models in GGUF files of llama.cpp: which keys and tensors hold which settings and parameters."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np

from rlaif_jax.config import UserError, require
from rlaif_jax.data.gguf.file import GgufFile, read_gguf
from rlaif_jax.models.decoder import rope_frequencies
from rlaif_jax.models.decoder_config import DecoderConfig, RopeScaling
from rlaif_jax.models.hf.base import Family, Fields
from rlaif_jax.models.hf.families import family_of
from rlaif_jax.models.hf.llama2c import half_split
from rlaif_jax.models.hf.weights import LM_HEAD, parameter_shapes, require_finite, tensors

NAMES = {
    "embed": "token_embd",
    "position_embed": "position_embd",
    "norm": "output_norm",
    "layers": "blk",
    "norm1": "attn_norm",
    "norm2": "ffn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
GPT2_NAMES = NAMES | dict.fromkeys("qkv", "attn_qkv")
EMBEDDING, OUTPUT, ROPE = "token_embd.weight", "output.weight", "rope_freqs.weight"
ARCHITECTURES = ("gpt2", "llama", "qwen2", "qwen3")
# Keys of an architecture that are read, or that change no number.
KNOWN = frozenset(
    {
        "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length", "tensor_data_layout",
        "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
        "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon", "attention.sliding_window", "attention.causal",
        "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
        "rope.scaling.original_context_length", "rope.scaling.finetuned", "expert_count", "expert_used_count",
        "use_parallel_residual",
    }
)  # fmt: skip


def read_gguf_model(path: Path) -> tuple[DecoderConfig, dict[str, Any]]:
    """Returns the shape and the parameters {path with "/": float32 array} of a GGUF file.

    Raises:
        UserError: the file is not readable (`data.gguf.file.read_gguf`), its architecture, a key or a quantisation is not
            supported, or a tensor is missing, unknown or of another shape.
    """
    file = read_gguf(path)
    try:
        config = read_config(file)
    except UserError as error:
        if str(error).startswith("DecoderConfig"):  # its own checks do not know the file
            raise UserError(f"{path}: {error}") from error
        raise
    return config, read_parameters(file, config)


def read_config(file: GgufFile) -> DecoderConfig:
    """Returns the shape that the keys of a file describe. Raises UserError for what is not supported."""
    architecture = file.metadata.get("general.architecture")
    require(
        architecture in ARCHITECTURES,
        f"{file.path}: general.architecture={architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}",
    )
    prefix = f"{architecture}."
    own = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    fields = Fields(own, f"{file.path}: {architecture}")
    for name in own:
        require(
            name in KNOWN,
            f"{fields.where}.{name}={own[name]!r} is not supported: it may change what the model computes",
        )
    fields.only("expert_count", (0, None), None)
    fields.only("attention.causal", (True, None), None)
    fields.only("use_parallel_residual", (False, None), None)
    require(EMBEDDING in file.tensors, f"{file.path}: the tensor {EMBEDDING} is missing")
    require(len(file.tensors[EMBEDDING].shape) == 2, f"{file.path}: the tensor {EMBEDDING} is no matrix")
    width, heads = fields.size("embedding_length"), fields.size("attention.head_count")
    require(
        width % heads == 0 or "attention.key_length" in own,
        f"{fields.where}.embedding_length ({width}) must be a multiple of attention.head_count ({heads})",
    )
    head_dim = fields.size("attention.key_length", width // heads)
    fields.only("attention.value_length", (head_dim, None), None)
    fields.only("rope.dimension_count", (head_dim, None), None)
    context, layers = fields.size("context_length"), fields.size("block_count")
    window = fields.get("attention.sliding_window", int, 0)
    require(
        window == 0 or window >= context,
        f"{fields.where}.attention.sliding_window={window} is not supported; 0, or at least context_length ({context}), is",
    )
    blocks = 1 + max((int(name.split(".")[1]) for name in file.tensors if re.match(r"blk\.\d+\.", name)), default=-1)
    require(
        layers == blocks, f"{fields.where}.block_count is {layers}, but the file has the tensors of {blocks} blocks"
    )
    has = lambda name: f"blk.0.{name}" in file.tensors
    shared: dict[str, Any] = {
        "vocab_size": file.tensors[EMBEDDING].shape[0],
        "num_layers": layers,
        "width": width,
        "num_heads": heads,
        "num_kv_heads": fields.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "mlp_width": fields.size("feed_forward_length"),
        "context_length": context,
        "output_bias": has("attn_output.bias"),
        "mlp_bias": has("ffn_up.bias"),
    }
    if architecture == "gpt2":
        return DecoderConfig(
            **shared,
            # llama.cpp's converter has written the embeddings twice here.
            tie_embeddings=OUTPUT not in file.tensors or np.array_equal(file.tensor(OUTPUT), file.tensor(EMBEDDING)),
            norm="layer",
            norm_eps=fields.get("attention.layer_norm_epsilon", float),
            positions="learned",
            mlp="gelu",
            qkv_bias=True,
        )
    config = DecoderConfig(
        **shared,
        tie_embeddings=OUTPUT not in file.tensors,
        norm_eps=fields.get("attention.layer_norm_rms_epsilon", float),
        rope_theta=fields.get("rope.freq_base", float, 10_000.0),
        qkv_bias=has("attn_q.bias"),
        qk_norm=has("attn_q_norm.weight"),
    )
    return dataclasses.replace(config, rope_scaling=read_scaling(file, fields, config))


def read_scaling(file: GgufFile, fields: Fields, config: DecoderConfig) -> RopeScaling | None:
    """Returns how a file stretches its rotary frequencies.

    Llama 3 is known by a tensor of one factor for each frequency, which its settings are found again from.

    Args:
        file: the file.
        fields: the keys of its architecture.
        config: the shape without scaling.

    Raises:
        UserError: the kind is not supported.
    """
    fields.only("rope.scaling.type", ("none", "linear", None), None)
    linear = fields.get("rope.scaling.factor", float, fields.get("rope.scale_linear", float, 1.0))
    linear = 1.0 if fields.values.get("rope.scaling.type") == "none" else linear
    if ROPE not in file.tensors:
        return None if linear == 1 else RopeScaling("linear", linear)
    factors = file.tensor(ROPE)
    plain = np.asarray(rope_frequencies(config.head_dim, config.rope_theta, None))
    for original in (8192, config.context_length):
        scaling = RopeScaling("llama3", float(factors.max()), original_context=original)
        wanted = plain / np.asarray(rope_frequencies(config.head_dim, config.rope_theta, scaling))
        if factors.shape == wanted.shape and linear == 1 and np.allclose(factors, wanted, rtol=1e-4):
            return scaling
    raise UserError(
        f"{file.path}: the tensor {ROPE} stretches positions in another way than Llama 3.1 (low_freq_factor 1, "
        "high_freq_factor 4, original context 8192), which is not supported"
    )


def names_of(config: DecoderConfig) -> Family:
    """Returns the family of a model with the names and the layout that its tensors have in GGUF files."""
    names = GPT2_NAMES if config.positions == "learned" else NAMES
    return dataclasses.replace(family_of(config), prefix="", names=names, transposed=True)


def read_parameters(file: GgufFile, config: DecoderConfig) -> dict[str, np.ndarray]:
    """Returns all parameters {path with "/": float32 array} of a file.

    Raises:
        UserError: a tensor is missing, unknown, of another shape, or of a quantisation that is not read.
    """
    shapes = parameter_shapes(config)
    listed = tensors(names_of(config), shapes)
    wanted = {OUTPUT if tensor.name == LM_HEAD else tensor.name: tensor for tensor in listed}
    absent = sorted(wanted.keys() - file.tensors.keys())
    more = f" (and {len(absent) - 1} more)" if absent[1:] else ""
    require(not absent, f"{file.path}: the tensor {absent[0] if absent else ''}{more} is missing")
    strange = sorted(file.tensors.keys() - wanted.keys() - {ROPE, *([OUTPUT] if config.tie_embeddings else [])})
    require(
        not strange,
        f"{file.path}: the tensor {strange[0] if strange else ''} has no place in the model that the keys describe",
    )
    # llama.cpp rotates neighbouring rows of q and k in this architecture alone.
    pairs = file.metadata["general.architecture"] == "llama"
    values: dict[str, np.ndarray] = {}
    for name, tensor in wanted.items():
        stored = file.tensors[name].shape
        require(
            stored == tensor.shape(shapes),
            f"{file.path}: the tensor {name} has shape {stored}; the keys ask for {tensor.shape(shapes)}",
        )
        array = file.tensor(name)
        require_finite(array, file.path, name)
        if pairs and (".attn_q." in name or ".attn_k." in name):
            array = half_split(array.reshape(1, array.shape[0], -1), config.head_dim).reshape(array.shape)
        values |= tensor.parts(array, shapes)
    return values
