"""Models in GGUF files: against transformers, with the layout of llama.cpp's converter; files that hold no such model."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.models import CausalLM
from rlaif_jax.models.hf.files import load_model, save_model
from tests.data.gguf.files import gguf, write_gguf
from tests.models.hf.references import (
    REFERENCES,
    Reference,
    assert_same_params,
    padded_batch,
    reference_logits,
)

HF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "model.layers": "blk",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "transformer.wte": "token_embd", "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm", "transformer.h": "blk", "ln_1": "attn_norm", "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows from the halves of a head to neighbouring pairs, as llama.cpp's converter orders them for Llama."""
    rows = weights.shape[0] // heads // 2
    return weights.reshape(heads, 2, rows, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def as_converted(model: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The keys and tensors that llama.cpp's converter writes for a model of transformers."""
    c = model.config.to_dict()
    kind = c["model_type"]
    tensors = {}
    for full, value in model.state_dict().items():
        name = full
        for theirs, its in HF_NAMES.items():
            name = re.sub(rf"(^|\.){re.escape(theirs)}\.", rf"\1{its}.", name)
        array = value.float().numpy()
        if kind == "llama" and "attn_q." in name:
            array = permuted(array, c["num_attention_heads"])
        if kind == "llama" and "attn_k." in name:
            array = permuted(array, c["num_key_value_heads"])
        if kind == "gpt2" and re.search(r"\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight", name):
            array = array.T
        tensors[name] = array
    if c["tie_word_embeddings"]:
        del tensors["output.weight"]
    keys: dict[str, Any] = {"general.architecture": kind}
    if kind == "gpt2":
        own = {
            "context_length": c["n_positions"], "embedding_length": c["n_embd"], "feed_forward_length": c["n_inner"],
            "block_count": c["n_layer"], "attention.head_count": c["n_head"],
            "attention.layer_norm_epsilon": c["layer_norm_epsilon"],
        }  # fmt: skip
    else:
        rope, head_dim = c["rope_parameters"], c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        own = {
            "context_length": c["max_position_embeddings"], "embedding_length": c["hidden_size"],
            "feed_forward_length": c["intermediate_size"], "block_count": c["num_hidden_layers"],
            "attention.head_count": c["num_attention_heads"], "attention.head_count_kv": c["num_key_value_heads"],
            "attention.layer_norm_rms_epsilon": c["rms_norm_eps"], "rope.freq_base": rope["rope_theta"],
            "vocab_size": c["vocab_size"],
        }  # fmt: skip
        if head_dim * c["num_attention_heads"] != c["hidden_size"]:
            own |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
        if kind == "llama":
            own["rope.dimension_count"] = head_dim
        if rope["rope_type"] == "linear":
            own |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
        if rope["rope_type"] == "llama3":
            tensors["rope_freqs.weight"] = llama3_factors(rope, head_dim)
    return keys | {f"{kind}.{key}": value for key, value in own.items()}, tensors


def llama3_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """The tensor rope_freqs of llama.cpp's converter."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (i / head_dim)
        smooth = (rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        smooth = min(max(smooth, 0), 1)
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def test_logits_are_those_of_transformers(reference: Reference, tmp_path: Path) -> None:
    keys, tensors = as_converted(reference.model)
    if "rope_freqs.weight" in tensors:  # the file has no word of the original context: 8192, or that of the model
        keys["llama.context_length"] = reference.model.config.rope_parameters["original_max_position_embeddings"]
    model, params = load_model(write_gguf(tmp_path / "m.gguf", keys, tensors))
    folder_model, folder_params = load_model(reference.folder)
    assert_same_params(params, folder_params)
    tokens, mask = padded_batch()
    got = model.logits(params, model.sequence_hidden(params, jnp.array(tokens), jnp.array(mask)))
    want = reference_logits(reference.model, tokens, mask)
    np.testing.assert_allclose(np.asarray(got)[mask], want[mask], atol=1e-4, rtol=1e-4)
    eps, theta = folder_model.config.norm_eps, folder_model.config.rope_theta  # the file holds float32
    assert (model.config.norm_eps, model.config.rope_theta) == pytest.approx((eps, theta), rel=1e-6)


def test_transformers_reads_the_same_from_the_file(tmp_path: Path) -> None:
    """The reader of another project, on the same file: the converter's layout is not only this test's."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = transformers.AutoConfig.for_model(**REFERENCES["llama-untied"])
    torch.manual_seed(0)
    keys, tensors = as_converted(transformers.AutoModelForCausalLM.from_config(config))
    # Rows of 32 values can be quantised.
    kinds = gguf.GGMLQuantizationType
    for name, kind in (
        ("blk.0.attn_q.weight", kinds.Q8_0),
        ("blk.1.ffn_up.weight", kinds.Q4_1),
        ("output.weight", kinds.BF16),
    ):
        tensors[name] = (gguf.quants.quantize(tensors[name], kind), kind)
    path = write_gguf(tmp_path / "m.gguf", keys, tensors)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", attn_implementation="eager"
    )
    model, params = load_model(path)
    tokens, mask = padded_batch()
    got = model.logits(params, model.sequence_hidden(params, jnp.array(tokens), jnp.array(mask)))
    np.testing.assert_allclose(np.asarray(got)[mask], reference_logits(theirs.eval(), tokens, mask)[mask], atol=1e-4)
    save_model(tmp_path / "folder", model, params)
    assert_same_params(load_model(tmp_path / "folder", compute_dtype="bfloat16")[1], params)


@pytest.fixture(scope="module")
def llama() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The keys and random tensors of a tiny Llama, made without transformers."""
    rng, own = np.random.default_rng(0), {
        "context_length": 32, "embedding_length": 16, "feed_forward_length": 8, "block_count": 2, "attention.head_count": 4,
        "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    shapes = {
        "attn_q": (16, 16), "attn_k": (8, 16), "attn_v": (8, 16), "attn_output": (16, 16), "ffn_gate": (8, 16),
        "ffn_up": (8, 16), "ffn_down": (16, 8), "attn_norm": (16,), "ffn_norm": (16,),
    }  # fmt: skip
    named = {f"blk.{i}.{name}.weight": shape for i in range(2) for name, shape in shapes.items()}
    named |= {"token_embd.weight": (40, 16), "output_norm.weight": (16,)}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in named.items()}
    return {"general.architecture": "llama"} | {f"llama.{key}": value for key, value in own.items()}, tensors


def test_gpt2_with_its_embeddings_written_twice(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**REFERENCES["gpt2"]))
    keys, tensors = as_converted(model)
    embedding = tensors["token_embd.weight"]
    for output, tied in ((embedding, True), (embedding + 1, False)):
        path = write_gguf(tmp_path / f"{tied}.gguf", keys, {**tensors, "output.weight": output})
        got, params = load_model(path)
        assert got.config.tie_embeddings is tied and ("lm_head" in params) is not tied


ONE = np.ones((2, 16), np.float32)
BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another architecture": (
        {"general.architecture": "mamba"},
        {},
        "general.architecture='mamba' is not supported; supported: gpt2,",
    ),
    "no architecture": ({"general.architecture": ""}, {}, "not supported"),
    "a key that changes numbers": ({"llama.logit_scale": 0.5}, {}, "llama.logit_scale=0.5 is not supported"),
    "experts": ({"llama.expert_count": 8}, {}, "expert_count=8 is not supported"),
    "a window": (
        {"llama.attention.sliding_window": 16},
        {},
        "llama.attention.sliding_window=16 is not supported; 0, or at",
    ),
    "partly rotated": ({"llama.rope.dimension_count": 2}, {}, "rope.dimension_count=2 is not supported"),
    "values of another width": ({"llama.attention.value_length": 8}, {}, "attention.value_length=8 is not supported"),
    "YaRN": ({"llama.rope.scaling.type": "yarn"}, {}, "rope.scaling.type='yarn' is not supported"),
    "other factors": (
        {},
        {"rope_freqs.weight": np.array([2, 7], np.float32)},
        "stretches positions in another way than Llama 3.1",
    ),
    "a missing key": ({"llama.embedding_length": None}, {}, "the field embedding_length is missing"),
    "a key of another type": ({"llama.block_count": "2"}, {}, "block_count must be of type int, not '2'"),
    "another number of heads": ({"llama.attention.head_count": 5}, {}, "embedding_length (16) must be a multiple of"),
    "heads that share unevenly": ({"llama.attention.head_count_kv": 3}, {}, "num_kv_heads (3)"),
    "billions of blocks": (
        {"llama.block_count": 2**31},
        {},
        "block_count is 2147483648, but the file has the tensors of 2",
    ),
    "another width": ({"llama.feed_forward_length": 9}, {}, "has shape (16, 8); the keys ask for (16, 9)"),
    "no embeddings": ({}, {"token_embd.weight": None}, "the tensor token_embd.weight is missing"),
    "embeddings in a row": ({}, {"token_embd.weight": ONE[0]}, "the tensor token_embd.weight is no matrix"),
    "a missing tensor": ({}, {"blk.1.attn_k.weight": None}, "the tensor blk.1.attn_k.weight is missing"),
    "missing tensors": (
        {},
        {f"blk.1.{n}.weight": None for n in ("attn_k", "ffn_up")},
        "blk.1.attn_k.weight (and 1 more) is missing",
    ),
    "a tensor too many": (
        {},
        {"blk.0.attn_sinks.weight": ONE},
        "the tensor blk.0.attn_sinks.weight has no place in the model",
    ),
    "a whole number": (
        {},
        {"output_norm.weight": np.arange(16)},
        "output_norm.weight is of the type I64, which the library",
    ),
    "infinity": (
        {},
        {"output_norm.weight": np.full(16, np.inf, np.float32)},
        "the tensor output_norm.weight holds NaN or",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_files_that_hold_no_such_model(bad: str, llama, tmp_path: Path) -> None:
    keys, tensors = llama
    more_keys, more_tensors, said = BAD[bad]
    without = lambda values: {name: value for name, value in values.items() if value is not None}
    path = write_gguf(tmp_path / "m.gguf", without(keys | more_keys), without(tensors | more_tensors))
    with pytest.raises(UserError, match=re.escape(said)) as error:
        load_model(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_damaged_files_are_refused_at_once(llama, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", *llama)
    assert load_model(path)[0] == CausalLM(load_model(path)[0].config)
    data, rng, said = path.read_bytes(), np.random.default_rng(0), []
    for _ in range(60):
        changed = bytearray(data)
        for at in rng.integers(4, 1500, 4):
            changed[at] = rng.integers(256)
        path.write_bytes(bytes(changed))
        try:
            load_model(path)
        except UserError as error:
            said.append(str(error))
    assert len(said) > 30 and all(str(path) in text for text in said)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(
        UserError, match=r"m\.gguf: the tensor .* is not whole: \d+ bytes of \d+; the file was cut short"
    ):
        load_model(path)


@pytest.mark.slow
def test_a_real_quantised_model(tmp_path: Path) -> None:
    file, folder = os.environ.get("RLAIF_JAX_GGUF"), os.environ.get("RLAIF_JAX_CHAT_MODEL")
    if not file or not folder:
        pytest.skip(
            "needs SmolLM2's GGUF in RLAIF_JAX_GGUF, and the folder that transformers made of it in RLAIF_JAX_CHAT_MODEL"
        )
    (model, params), (same, wanted) = load_model(file), load_model(folder)
    assert model.config == same.config
    tokens = jnp.array([np.random.default_rng(0).integers(0, 49152, 20)])
    logits = lambda m, p: m.logits(p, m.sequence_hidden(p, tokens, jnp.ones_like(tokens, bool)))
    np.testing.assert_allclose(logits(model, params), logits(same, wanted), atol=1e-4)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, wanted))
