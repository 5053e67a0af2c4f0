"""Families of Hugging Face models, against transformers as the oracle where it is installed; config.json."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from rlaif_jax.config import UserError
from rlaif_jax.models import CausalLM
from rlaif_jax.models.decoder_config import DecoderConfig, RopeScaling
from rlaif_jax.models.hf.families import FAMILIES, read_config
from rlaif_jax.models.hf.files import load_model, save_model
from tests.models.hf.references import (
    LLAMA,
    REFERENCES,
    ROPE_LLAMA3,
    TINY,
    Reference,
    assert_same_params,
    build_reference,
    padded_batch,
    random_params,
    reference_logits,
)

# -------------------------------------------------------------------------------------------------- the oracle


def test_every_family_is_compared() -> None:
    assert {family.model_types[0] for family in FAMILIES} == {row["model_type"] for row in REFERENCES.values()}


def test_logits_equal_transformers(reference: Reference) -> None:
    tokens, mask = padded_batch()
    model, params = load_model(reference.folder)
    want = reference_logits(reference.model, tokens, mask)
    assert want.std() > 0.3  # else 1e-4 would say little
    got = np.asarray(jax.jit(model)(params, tokens, mask))
    assert np.abs(got - want)[mask].max() <= 1e-4


def test_logits_equal_transformers_token_by_token_through_the_cache(reference: Reference) -> None:
    """Twelve columns prefilled (none or 7 of them pads) and shared by two answers, then one token at a time."""
    tokens, mask = padded_batch()
    model, params = load_model(reference.folder)
    tokens, mask = np.stack([tokens[0], tokens[0], tokens[1], tokens[1]]), mask.repeat(2, axis=0)
    tokens[1::2, 12:] = tokens[::2, 12:][:, ::-1]  # the second answer to the same prompt
    want = reference_logits(reference.model, tokens, mask)

    @jax.jit
    def start(params: Any, tokens: jax.Array, mask: jax.Array) -> Any:
        first = model.prefill(params, tokens, mask, hold_last=False)
        return first, model.logits(params, first.hidden)

    first, logits = start(params, tokens[::2, :12], mask[::2, :12])
    logits = np.asarray(logits).repeat(2, axis=0)
    assert np.abs(logits - want[:, 11]).max() <= 1e-4

    @jax.jit
    def step(params: Any, caches: Any, token: jax.Array, position: jax.Array, t: jax.Array) -> Any:
        return model.decode_step(params, first.shared, caches, token, position, t, jnp.arange(8)[None] <= t)

    caches = model.start_cache(rows=4, length=8)
    for t in range(7):
        position = mask[:, : 12 + t].sum(-1).astype(np.int32)
        logits, caches = step(params, caches, tokens[:, 12 + t], position, jnp.int32(t))
        assert np.abs(logits - want[:, 12 + t]).max() <= 1e-4, f"token {t}"


def test_transformers_reads_what_we_write(reference: Reference, tmp_path: Path) -> None:
    """Same tensors bit for bit, none missing or left over, same logits; and `load_model` reads it back."""
    import transformers

    model, params = load_model(reference.folder)
    save_model(tmp_path / "ours", model, params)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for (name, got), want in zip(again.state_dict().items(), reference.model.state_dict().values(), strict=True):
        np.testing.assert_array_equal(got.numpy(), want.numpy(), err_msg=name)
    tokens, mask = padded_batch()
    difference = reference_logits(again, tokens, mask) - reference_logits(reference.model, tokens, mask)
    assert np.abs(difference)[mask].max() <= 1e-4
    model_again, params_again = load_model(tmp_path / "ours")
    assert model_again == model
    assert_same_params(params_again, params)


def test_mistral_is_a_llama(tmp_path: Path) -> None:
    reference = build_reference({**LLAMA, "model_type": "mistral", "sliding_window": None}, tmp_path)
    tokens, mask = padded_batch()
    model, params = load_model(tmp_path)
    difference = np.asarray(jax.jit(model)(params, tokens, mask)) - reference_logits(reference, tokens, mask)
    assert np.abs(difference)[mask].max() <= 1e-4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights_are_read_exactly(dtype: str, tmp_path: Path) -> None:
    model = build_reference(REFERENCES["llama-biases"], tmp_path / "whole")
    model.to(dtype=getattr(pytest.importorskip("torch"), dtype)).save_pretrained(tmp_path / "half")
    model.float().save_pretrained(tmp_path / "rounded")  # the rounded values, in float32
    (_, half), (_, rounded) = load_model(tmp_path / "half"), load_model(tmp_path / "rounded")
    assert_same_params(half, rounded)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(half))


def test_shards_of_transformers(tmp_path: Path) -> None:
    model = build_reference(REFERENCES["llama-untied"], tmp_path / "single")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_same_params(load_model(tmp_path / "shards")[1], load_model(tmp_path / "single")[1])


@pytest.mark.parametrize("name", ["gpt2", "llama-tied-linear"])
def test_names_without_the_prefix(name: str, tmp_path: Path) -> None:
    model = build_reference(REFERENCES[name], tmp_path / "whole")
    model.base_model.save_pretrained(tmp_path / "bare")
    assert not any(n.startswith(("model.", "transformer.")) for n in load_file(tmp_path / "bare" / "model.safetensors"))
    assert_same_params(load_model(tmp_path / "bare")[1], load_model(tmp_path / "whole")[1])


# ---------------------------------------------------------------------------------------------- config.json


def read(tmp_path: Path, **settings: Any) -> DecoderConfig:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return read_config(tmp_path / "config.json")


def test_absent_keys_have_the_defaults_of_transformers(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 10,
        "hidden_size": 256,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
        "max_position_embeddings": 16,
    }
    llama = read(tmp_path, model_type="llama", **sizes)
    assert not llama.tie_embeddings
    assert llama.rope_theta == 10_000
    assert llama.norm_eps == 1e-6
    assert llama.num_kv_heads == 32
    assert llama.head_dim == 8
    assert not llama.qkv_bias
    assert not llama.mlp_bias
    qwen2 = read(tmp_path, model_type="qwen2", **sizes)
    assert qwen2.qkv_bias
    assert not qwen2.output_bias
    assert not qwen2.qk_norm
    assert not qwen2.tie_embeddings
    qwen3 = read(tmp_path, model_type="qwen3", **sizes)
    assert qwen3.head_dim == 128
    assert qwen3.qk_norm
    assert not qwen3.qkv_bias
    assert read(tmp_path, model_type="mistral", **sizes, sliding_window=None).num_kv_heads == 8
    gpt2 = read(tmp_path, model_type="gpt2", vocab_size=10, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    assert gpt2.tie_embeddings
    assert gpt2.mlp_width == 32
    assert gpt2.qkv_bias
    assert gpt2.output_bias
    assert gpt2.mlp_bias


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 500.0, "rope_scaling": ROPE_LLAMA3},
        {
            "rope_theta": 500,
            "rope_scaling": {**{k: v for k, v in ROPE_LLAMA3.items() if k != "rope_type"}, "type": "llama3"},
        },
        {"rope_parameters": {**ROPE_LLAMA3, "rope_theta": 500.0}},
    ],
    ids=["transformers 4", "the oldest", "transformers 5"],
)
def test_three_ways_to_write_rope_scaling(keys: dict[str, Any], tmp_path: Path) -> None:
    settings = {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    config = read(tmp_path, **settings, **keys)
    assert config.rope_theta == 500.0
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 32)


def test_a_window_of_the_whole_context_is_no_window(tmp_path: Path) -> None:
    assert read(tmp_path, **{**LLAMA, "model_type": "mistral"}, sliding_window=64).context_length == 64
    settings = {**LLAMA, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}
    assert read(tmp_path, **settings, max_window_layers=2).num_layers == 2  # no layer is past the second


@pytest.mark.parametrize(
    "flags, named",
    [
        ({"norm": "layer"}, "norm='rms'"),
        ({"mlp": "gelu"}, "mlp='swiglu'"),
        ({"output_bias": True}, "output_bias=False"),
        ({"qkv_bias": True, "mlp_bias": True}, "mlp_bias=False"),
        ({"qk_norm": True, "mlp_bias": True}, "mlp_bias=False"),
        ({"positions": "learned"}, "norm='layer'"),
        ({"num_heads": 6, "num_kv_heads": 2}, "num_heads"),
    ],
)
def test_a_shape_that_no_architecture_has_is_not_written(flags: dict[str, Any], named: str, tmp_path: Path) -> None:
    model = CausalLM(dataclasses.replace(TINY, **flags))
    with pytest.raises(UserError, match=re.escape(named)):
        save_model(tmp_path / "model", model, random_params(model))
    assert not list(tmp_path.iterdir())
