"""What a Hugging Face config.json means as a `DecoderConfig`, and the other way round.

Defaults of absent keys are those of transformers' configuration classes. Whatever would change the numbers and is not
supported is refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlaif_jax.config import UserError, require
from rlaif_jax.models.decoder_config import DecoderConfig, RopeScaling

MODEL_TYPES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ABSENT_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}  # Llama: as many as heads; null means that for all
REQUIRED = object()


class Fields:
    """A JSON object whose fields are read with their type checked, so that a message can name file and field."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def get(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """The field `key`, or `default` where it is absent or null."""
        value = self.values.get(key)
        if value is None:
            require(
                default is not REQUIRED,
                f"{self.where}: the field {key} is missing; it must be of type {kind.__name__}",
            )
            return default
        if kind is float and type(value) is int:
            value = float(value)
        require(type(value) is kind, f"{self.where}: {key} must be of type {kind.__name__}, not {value!r}")
        return value

    def size(self, key: str, default: Any = REQUIRED) -> int:
        """A field that counts something: an int of at least 1."""
        value: int = self.get(key, int, default)
        require(value >= 1, f"{self.where}: {key} must be at least 1, not {value}")
        return value

    def only(self, key: str, supported: tuple[Any, ...], default: Any) -> None:
        """Refuse a field with a value that would need other code."""
        value = self.values.get(key, default)
        require(
            value in supported,
            f"{self.where}: {key}={value!r} is not supported; supported: " + ", ".join(repr(s) for s in supported),
        )


def read_config(path: Path) -> DecoderConfig:
    """The shape that a config.json describes.

    Raises:
        UserError: no such file, not JSON, a field missing or of a wrong type, or a model that is not supported.
    """
    require(
        path.is_file(),
        f"{path.parent}: no config.json there; a model's folder holds config.json and model.safetensors",
    )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON's and Unicode's errors say line or byte
        raise UserError(f"{path}: not JSON ({error})") from error
    require(isinstance(values, dict), f"{path}: expected a JSON object")
    fields = Fields(values, str(path))
    model_type = fields.get("model_type", str)
    require(
        model_type in MODEL_TYPES,
        f"{path}: model_type={model_type!r} is not supported; supported: " + ", ".join(MODEL_TYPES),
    )
    require(
        values.get("quantization_config") is None,
        f"{path}: quantization_config is set, but quantised weights are not read; take the unquantised model",
    )
    try:
        return read_gpt2(fields) if model_type == "gpt2" else read_llama(fields, model_type)
    except UserError as error:
        if str(error).startswith("DecoderConfig"):  # its own checks do not know the file
            raise UserError(f"{path}: {error}") from error
        raise


def read_gpt2(fields: Fields) -> DecoderConfig:
    """GPT-2 (Radford 2019): learned positions, layer norm, biases everywhere."""
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


def read_llama(fields: Fields, model_type: str) -> DecoderConfig:
    """Llama (Touvron 2023), Mistral, Qwen2 and Qwen3: rotary positions, RMS norm, SwiGLU."""
    fields.only("hidden_act", ("silu", "swish"), "silu")
    width, heads, layers = (fields.size(k) for k in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    context = fields.size("max_position_embeddings")
    refuse_sliding_window(fields, model_type, layers, context)
    if model_type != "qwen3" and fields.get("head_dim", int, None) is None:
        require(
            width % heads == 0,
            f"{fields.where}: hidden_size ({width}) must be a multiple of num_attention_heads ({heads})",
        )
    theta, scaling = read_rope(fields, context)
    kv_heads = heads if "num_key_value_heads" in fields.values else ABSENT_KV_HEADS.get(model_type, heads)
    attention_bias = model_type in ("llama", "qwen3") and fields.get("attention_bias", bool, False)
    return DecoderConfig(
        vocab_size=fields.size("vocab_size"),
        num_layers=layers,
        width=width,
        num_heads=heads,
        num_kv_heads=fields.size("num_key_value_heads", kv_heads),
        head_dim=fields.size("head_dim", 128 if model_type == "qwen3" else width // heads),
        mlp_width=fields.size("intermediate_size"),
        context_length=context,
        norm_eps=fields.get("rms_norm_eps", float, 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=model_type == "qwen2" or attention_bias,
        output_bias=attention_bias,
        mlp_bias=model_type == "llama" and fields.get("mlp_bias", bool, False),
        qk_norm=model_type == "qwen3",
        tie_embeddings=fields.get("tie_word_embeddings", bool, False),
    )


def refuse_sliding_window(fields: Fields, model_type: str, layers: int, context: int) -> None:
    """Refuse attention that forgets within the context; a window of the whole context is none."""
    if model_type == "mistral":
        window = fields.values.get("sliding_window", 4096)
    elif model_type in ("qwen2", "qwen3") and fields.get("use_sliding_window", bool, False):
        window = fields.values.get("sliding_window", 4096)
        kinds = fields.get("layer_types", list, None)
        slides = "sliding_attention" in kinds if kinds else fields.get("max_window_layers", int, 28) < layers
        window = window if slides else None
    else:
        window = None
    require(
        window is None or (type(window) is int and window >= context),
        f"{fields.where}: sliding_window={window!r} is not supported; null, or a window of at least "
        f"max_position_embeddings ({context}), is",
    )


def read_rope(fields: Fields, context: int) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
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


def family(config: DecoderConfig) -> str:
    """The model_type that computes what `config` says.

    Raises:
        UserError: none of them does; names the flag.
    """
    c = config

    def needs(kind: str, **wanted: Any) -> None:
        for flag, value in wanted.items():
            require(
                getattr(c, flag) == value,
                f"no Hugging Face architecture fits this model: {kind} needs "
                f"{flag}={value!r}, not {getattr(c, flag)!r}",
            )

    if c.positions == "learned":
        needs(
            "GPT-2 (positions='learned')",
            norm="layer",
            mlp="gelu",
            qkv_bias=True,
            output_bias=True,
            mlp_bias=True,
            qk_norm=False,
            num_kv_heads=c.num_heads,
            width=c.num_heads * c.head_dim,
        )
        return "gpt2"
    needs("every architecture with positions='rope'", norm="rms", mlp="swiglu")
    if c.qk_norm:
        needs("Qwen3 (qk_norm=True)", mlp_bias=False, output_bias=c.qkv_bias)
        return "qwen3"
    if c.qkv_bias and not c.output_bias:
        needs("Qwen2 (qkv_bias=True, output_bias=False)", mlp_bias=False)
        return "qwen2"
    needs("Llama (qk_norm=False)", output_bias=c.qkv_bias)
    require(
        c.width % c.num_heads == 0,
        f"no Hugging Face architecture fits this model: Llama needs a width that is a multiple of num_heads, not "
        f"width={c.width} with num_heads={c.num_heads}",
    )
    return "llama"


def write_config(config: DecoderConfig, special: dict[str, int | None]) -> dict[str, Any]:
    """The config.json of a model, in the keys that transformers 4 and 5 both read; `special` are bos, eos, pad ids."""
    c, model_type = config, family(config)
    common = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "vocab_size": c.vocab_size,
        "tie_word_embeddings": c.tie_embeddings,
        **special,
        "torch_dtype": "float32",
    }
    if model_type == "gpt2":
        return {
            **common,
            "n_layer": c.num_layers,
            "n_embd": c.width,
            "n_head": c.num_heads,
            "n_inner": c.mlp_width,
            "n_positions": c.context_length,
            "layer_norm_epsilon": c.norm_eps,
            "activation_function": "gelu_new",
        }
    scaling: dict[str, Any] | None = None
    if c.rope_scaling is not None:
        s = c.rope_scaling
        scaling = {"rope_type": s.kind, "factor": s.factor}
        if s.kind == "llama3":
            scaling |= {
                "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor,
                "original_max_position_embeddings": s.original_context,
            }
    own = {
        "llama": {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias},
        "qwen2": {"use_sliding_window": False},
        "qwen3": {"use_sliding_window": False, "attention_bias": c.qkv_bias},
    }
    return {
        **common,
        "num_hidden_layers": c.num_layers,
        "hidden_size": c.width,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.mlp_width,
        "max_position_embeddings": c.context_length,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "hidden_act": "silu",
        **own[model_type],
    }
