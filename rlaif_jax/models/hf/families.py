"""All families of Hugging Face models, and config.json in and out.

A family of known maths is a file with its `Family` and a line in `FAMILIES`. Defaults of absent keys are those of
transformers' configuration classes. Whatever would change the numbers and is not supported is refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlaif_jax.config import UserError, require
from rlaif_jax.data.hub import folder_is
from rlaif_jax.models.decoder_config import DecoderConfig
from rlaif_jax.models.hf import gpt2, llama, qwen
from rlaif_jax.models.hf.base import Family, read_object

FAMILIES: tuple[Family, ...] = (gpt2.FAMILY, qwen.QWEN3, qwen.QWEN2, llama.FAMILY)  # Llama last: it needs no flag


def family_of(config: DecoderConfig) -> Family:
    """Returns the family that a model is written as, and whose tensor names it has."""
    return next(family for family in FAMILIES if family.flags.items() <= vars(config).items())


def read_config(path: Path) -> DecoderConfig:
    """Returns the shape that a config.json describes.

    Raises:
        UserError: no such file, not JSON, a field missing or of a wrong type, or a model that is not supported.
    """
    require(
        path.is_file(),
        f"{path.parent}: no config.json there; a model's folder holds config.json and model.safetensors"
        f"{folder_is(path.parent)}",
    )
    fields = read_object(path)
    values = fields.values
    require(
        values.get("model_type") is not None,
        f"{path}: the field model_type is missing, so this is no config.json of transformers{folder_is(path.parent)}",
    )
    model_type = fields.get("model_type", str)
    families = {name: family for family in FAMILIES for name in family.model_types}
    require(
        model_type in families,
        f"{path}: model_type={model_type!r} is not supported; supported: " + ", ".join(sorted(families)),
    )
    require(
        not (quantised := [key for key in ("quantization_config", "quantization") if values.get(key) is not None]),
        f"{path}: {quantised[0] if quantised else ''} is set, but quantised weights are not read; take the unquantised model",
    )
    try:
        return families[model_type].read_config(fields)
    except UserError as error:
        if str(error).startswith("DecoderConfig"):  # its own checks do not know the file
            raise UserError(f"{path}: {error}") from error
        raise


def write_config(config: DecoderConfig, special: dict[str, int | None]) -> dict[str, Any]:
    """Returns the config.json of a model, in the keys that transformers 4 and 5 both read.

    Args:
        config: the shape of the model.
        special: `bos_token_id`, `eos_token_id` and `pad_token_id`.

    Raises:
        UserError: no family computes what `config` describes; names the flag.
    """
    family = family_of(config)
    own = family.write_config(config)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_types[0],
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        **special,
        "torch_dtype": "float32",
        **own,
    }
