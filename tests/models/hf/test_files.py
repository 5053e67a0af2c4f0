"""Hugging Face folders in and out, against transformers as the oracle where it is installed."""

import dataclasses
import errno
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlaif_jax.config import UserError
from rlaif_jax.data.tokenizers import load_tokenizer
from rlaif_jax.models import CausalLM
from rlaif_jax.models.decoder_config import DecoderConfig, RopeScaling, small_decoder
from rlaif_jax.models.hf import files as hf
from rlaif_jax.models.hf.families import read_config
from rlaif_jax.models.hf.files import load_model, save_model
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.policies.text import decode_step, empty_caches, generate, prefill
from rlaif_jax.types import Prompts

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"
needs_stories = pytest.mark.skipif(
    not (DATA / "lm_stories260k_hf").is_dir() or not (DATA / "lm_stories260k").is_dir(),
    reason=f"the stories260K model is not in {DATA}",
)
TINY = small_decoder(40, num_layers=2, width=16, num_heads=4, num_kv_heads=2, context_length=32)

LLAMA = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-4,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
}
ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
QWEN = {**LLAMA, "use_sliding_window": False}
REFERENCES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 97,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 40,
        "n_positions": 64,
        "layer_norm_epsilon": 1e-4,
    },
    "llama-untied": LLAMA,
    "llama-tied-linear": {
        **LLAMA,
        "tie_word_embeddings": True,
        "rope_scaling": {"rope_type": "linear", "factor": 3.0},
    },
    "llama-llama3": {**LLAMA, "rope_scaling": ROPE_LLAMA3, "head_dim": 16},
    "llama-biases": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "qwen2": {**QWEN, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**QWEN, "model_type": "qwen3", "head_dim": 16},
}


@dataclasses.dataclass(frozen=True)
class Reference:
    """A transformers model and the folder that it wrote."""

    model: Any
    folder: Path


@pytest.fixture(scope="module", params=REFERENCES)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp(request.param)
    return Reference(build_reference(REFERENCES[request.param], folder), folder)


def build_reference(settings: dict[str, Any], folder: Path, **save: Any) -> Any:
    """A random transformers model, saved: norms and biases random too, none can hide behind one or zero."""
    torch = pytest.importorskip("torch", reason="torch is the oracle of these tests and is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle and is not installed")
    config = transformers.AutoConfig.for_model(**settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            norm = p.ndim == 1 and name.endswith("weight")
            p.copy_(float(norm) + (0.3 if p.ndim == 1 else 0.2) * torch.randn_like(p))
    model.save_pretrained(folder, **save)
    return model


def padded_batch() -> tuple[np.ndarray, np.ndarray]:
    """Two rows of 19 columns, one without padding, one behind 7 pads."""
    tokens = np.random.default_rng(0).integers(0, 97, (2, 19)).astype(np.int32)
    mask = np.ones((2, 19), bool)
    mask[1, :7] = False
    return tokens, mask


def reference_logits(model: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    import torch

    positions = np.maximum(np.cumsum(mask, axis=-1) - 1, 0)
    with torch.no_grad():
        return (
            model(
                input_ids=torch.tensor(tokens).long(),
                attention_mask=torch.tensor(mask).long(),
                position_ids=torch.tensor(positions).long(),
            )
            .logits.float()
            .numpy()
        )


def assert_same_params(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def random_params(model: CausalLM) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32),
        jax.eval_shape(model.init, jax.random.key(0)),
    )


# -------------------------------------------------------------------------------------------------- the oracle


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
        first = prefill(model, params, tokens, mask)
        return first, model.logits(params, first.hidden)

    first, logits = start(params, tokens[::2, :12], mask[::2, :12])
    logits = np.asarray(logits).repeat(2, axis=0)
    assert np.abs(logits - want[:, 11]).max() <= 1e-4

    @jax.jit
    def step(params: Any, caches: Any, token: jax.Array, position: jax.Array, t: jax.Array) -> Any:
        return decode_step(model, params, first, caches, token, position, t, jnp.arange(8)[None] <= t)

    caches = empty_caches(model.config, rows=4, length=8)
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


# --------------------------------------------------------------------------------------------------- bad input


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        values = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))

    return edit


def edit_weights(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return edit


def edit_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return edit


def shard(then: Callable[[Path], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        save_model(folder, *load_model(folder), max_shard_bytes=4000)
        then(folder)

    return edit


def move_tensor(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


Q = "model.layers.1.self_attn.q_proj.weight"
BAD = {
    "no config.json": (lambda f: (f / "config.json").unlink(), ["no config.json"]),
    "malformed config.json": (
        lambda f: (f / "config.json").write_text('{\n"model_type": }'),
        ["config.json", "line 2"],
    ),
    "config.json is a list": (lambda f: (f / "config.json").write_text("[]"), ["config.json", "object"]),
    "unknown model_type": (edit_config(model_type="mamba"), ["config.json", "model_type='mamba'", "llama"]),
    "no model_type": (edit_config(model_type="absent"), ["config.json", "model_type"]),
    "a size is missing": (edit_config(hidden_size="absent"), ["config.json", "hidden_size"]),
    "a size is text": (edit_config(hidden_size="16"), ["config.json", "hidden_size", "'16'"]),
    "a size is zero": (edit_config(num_hidden_layers=0), ["config.json", "num_hidden_layers"]),
    "heads do not divide": (edit_config(num_key_value_heads=3), ["config.json", "num_kv_heads"]),
    "another activation": (edit_config(hidden_act="gelu"), ["config.json", "hidden_act='gelu'", "silu"]),
    "quantised by config": (
        edit_config(quantization_config={"bits": 4}),
        ["config.json", "quantization_config"],
    ),
    "sliding window": (
        edit_config(model_type="mistral", sliding_window=8),
        ["config.json", "sliding_window=8"],
    ),
    "sliding window by default": (
        edit_config(model_type="mistral", max_position_embeddings=9999),
        ["config.json", "sliding_window=4096"],
    ),
    "sliding window of qwen": (
        edit_config(model_type="qwen3", use_sliding_window=True, max_window_layers=1, sliding_window=8),
        ["config.json", "sliding_window=8"],
    ),
    "unknown rope": (
        edit_config(rope_scaling={"rope_type": "yarn", "factor": 2.0}),
        ["config.json", "rope_scaling", "rope_type='yarn'"],
    ),
    "rope without a factor": (
        edit_config(rope_parameters={"rope_type": "linear"}),
        ["config.json", "rope_parameters", "factor"],
    ),
    "rope for each kind of layer": (
        edit_config(rope_parameters={"full_attention": {"rope_type": "default"}}),
        ["config.json", "rope_parameters", "full_attention"],
    ),
    "partial rotary": (edit_config(partial_rotary_factor=0.5), ["config.json", "partial_rotary_factor=0.5"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors", "pickle"]),
    "missing tensor": (edit_weights(lambda w: w.pop(Q)), [Q, "model.safetensors"]),
    "missing tensors": (edit_config(num_hidden_layers=3), ["model.layers.2.", "and 8 more"]),
    "missing output matrix": (
        edit_config(tie_word_embeddings=False),
        ["lm_head.weight", "tie_word_embeddings=true"],
    ),
    "output matrix is not the embeddings": (
        edit_weights(lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1})),
        ["lm_head.weight", "tie_word_embeddings=true"],
    ),
    "a tensor too many": (
        edit_config(num_hidden_layers=1),
        ["model.layers.1.", "model.safetensors", "1 layers"],
    ),
    "wrong shape": (edit_weights(lambda w: w.update({Q: w[Q][:-1].copy()})), [Q, "(15, 16)", "(16, 16)"]),
    "another width": (edit_config(intermediate_size=44), ["model.safetensors", "mlp.", "(16, 44)"]),
    "integers": (edit_weights(lambda w: w.update({Q: w[Q].astype(np.int8)})), [Q, "I8", "quantised"]),
    "empty file": (edit_bytes(lambda d: b""), ["model.safetensors", "0 bytes"]),
    "half a header": (edit_bytes(lambda d: d[:100]), ["model.safetensors", "100 bytes"]),
    "half a tensor": (edit_bytes(lambda d: d[:-40]), ["model.safetensors", "is not whole", "bytes of"]),
    "bytes behind the end": (edit_bytes(lambda d: d + b"more"), ["model.safetensors", "bytes of"]),
    "a web page": (edit_bytes(lambda d: b"<!doctype html>" * 99), ["model.safetensors", "whole header"]),
    "missing shard": (
        shard(lambda f: next(f.glob("model-00002-of-*")).unlink()),
        ["model-00002-of-", "missing"],
    ),
    "malformed index": (
        shard(lambda f: (f / "model.safetensors.index.json").write_text("{}")),
        ["model.safetensors.index.json", "weight_map"],
    ),
    "index names another shard": (shard(move_tensor), ["model.norm.weight", "model-00001-of-"]),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_folders_are_refused_by_name(bad: str, tmp_path: Path) -> None:
    spoil, named = BAD[bad]
    model = CausalLM(TINY)
    folder = tmp_path / "model"
    save_model(folder, model, random_params(model))
    spoil(folder)
    with pytest.raises(UserError) as error:
        load_model(folder)
    for part in (str(tmp_path), *named):
        assert part in str(error.value)


def test_names_that_are_neither_a_folder_nor_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        load_model(tmp_path / "nothing")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="give the folder"):
        load_model(tmp_path / "model.safetensors")

    def offline(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match=r"some-org/some-model.*hub.*no route to host"):
        load_model("some-org/some-model")


def test_a_hub_id_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CausalLM(TINY)
    params = random_params(model)
    save_model(tmp_path / "snapshot", model, params)
    asked: dict[str, Any] = {}

    def snapshot(hub_id: str, allow_patterns: list[str]) -> str:
        asked[hub_id] = allow_patterns
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    got, got_params = load_model("some-org/some-model", compute_dtype="bfloat16", remat=True)
    assert got.config == dataclasses.replace(TINY, compute_dtype="bfloat16", remat=True)
    assert_same_params(got_params, params)
    assert not any(".bin" in pattern or pattern == "*" for pattern in asked["some-org/some-model"])


# ----------------------------------------------------------------------------------------------------- writing


def test_shards_of_ours(tmp_path: Path) -> None:
    model = CausalLM(dataclasses.replace(TINY, tie_embeddings=False))
    params = random_params(model)
    save_model(tmp_path / "model", model, params, max_shard_bytes=4000)
    files = sorted(p.name for p in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    again, params_again = load_model(tmp_path / "model")
    assert again == model
    assert_same_params(params_again, params)


def test_a_model_replaces_an_older_one_whole(tmp_path: Path) -> None:
    model = CausalLM(TINY)
    params = random_params(model)
    save_model(tmp_path / "model", model, jax.tree.map(jnp.zeros_like, params), max_shard_bytes=4000)
    save_model(tmp_path / "model", model, params)
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert_same_params(load_model(tmp_path / "model")[1], params)


def test_other_peoples_files_are_not_replaced(tmp_path: Path) -> None:
    model = CausalLM(TINY)
    (tmp_path / "metrics.jsonl").write_text("dear\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        save_model(tmp_path, model, random_params(model))
    with pytest.raises(UserError, match="is a file"):
        save_model(tmp_path / "metrics.jsonl", model, random_params(model))
    assert (tmp_path / "metrics.jsonl").read_text() == "dear\n"


def test_a_full_disk_leaves_the_old_model_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CausalLM(TINY)
    params = random_params(model)
    save_model(tmp_path / "model", model, params)

    def full(tensors: Any, path: Path, **kwargs: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hf, "save_file", full)
    for name in ("model", "new"):
        with pytest.raises(UserError, match=f"{name}.*No space left on device"):
            save_model(tmp_path / name, model, jax.tree.map(jnp.zeros_like, params))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert_same_params(load_model(tmp_path / "model")[1], params)


def test_an_interrupt_between_the_renames_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CausalLM(TINY)
    params = random_params(model)
    save_model(tmp_path / "model", model, params)
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name.endswith(".new"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(tmp_path / "model", model, jax.tree.map(jnp.zeros_like, params))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert_same_params(load_model(tmp_path / "model")[1], params)


def test_parameters_and_tokenizer_of_another_model_are_not_written(tmp_path: Path) -> None:
    model = CausalLM(TINY)
    other = CausalLM(dataclasses.replace(TINY, mlp_width=8))
    with pytest.raises(UserError, match="trunk/layers_0/"):
        save_model(tmp_path / "model", model, random_params(other))

    class Large:
        vocab_size, bos_id, eos_id, pad_id = 41, 0, 1, 2

    with pytest.raises(UserError, match="41 ids, the model only 40"):
        save_model(tmp_path / "model", model, random_params(model), Large())  # type: ignore[arg-type]
    assert not (tmp_path / "model").exists()


# -------------------------------------------------------------------------------------------------- stories260K


@needs_stories
def test_stories260k_is_the_same_from_the_binary_and_the_folder() -> None:
    model, params = load_model(DATA / "lm_stories260k" / "stories260K.bin")
    other, others = load_model(DATA / "lm_stories260k_hf")
    assert model == other
    assert_same_params(params, others)


@needs_stories
def test_stories260k_tells_the_reference_story(tmp_path: Path) -> None:
    """Greedy text equals the published one; through the cache, and every token is the argmax of one whole pass."""
    page = (DATA / "lm_stories260k" / "stories260K.md").read_text()
    story = page.split("tok512.bin -t 0.0\n")[1].split("\n```")[0]
    assert story.startswith("Once upon a time")
    assert len(story) > 500
    tokenizer = load_tokenizer(DATA / "lm_stories260k" / "tok512.bin")
    save_model(tmp_path / "saved", *load_model(DATA / "lm_stories260k" / "stories260K.bin"), tokenizer)
    model, params = load_model(tmp_path / "saved")
    tokenizer = load_tokenizer(tmp_path / "saved")
    start = Prompts(tokens=jnp.array([[tokenizer.bos_id]]), mask=jnp.ones((1, 1), bool), uid=jnp.zeros(1, jnp.uint32))
    told = jax.jit(
        lambda p: generate(
            model,
            p,
            start,
            jax.random.key(0),
            sampling=SamplingConfig(256, temperature=0.0),
            eos_id=tokenizer.bos_id,
            pad_id=0,
        )
    )(params)
    assert tokenizer.decode(np.asarray(told.tokens[0]).tolist()).strip().startswith(story)
    logits = jax.jit(model)(params, told.tokens, np.ones(told.tokens.shape, bool))
    np.testing.assert_array_equal(np.argmax(logits[0, :-1], axis=-1), told.tokens[0, 1:])


@needs_stories
def test_stories260k_in_transformers(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is the oracle of this test and is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle and is not installed")
    model, params = load_model(DATA / "lm_stories260k" / "stories260K.bin")
    save_model(tmp_path / "saved", model, params, load_tokenizer(DATA / "lm_stories260k" / "tok512.bin"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager").eval()
    assert theirs.config.bos_token_id == 1
    tokens, mask = padded_batch()
    want = reference_logits(theirs, tokens, mask)
    got = np.asarray(jax.jit(model)(params, tokens, mask))
    assert np.abs(got - want)[mask].max() <= 1e-4


@needs_stories
@pytest.mark.parametrize(
    "spoil, named",
    [
        (lambda data: data[:-4], "cut short"),
        (lambda data: data + b"0000", "header asks for"),
        (lambda data: data[:20], "too few"),
        (lambda data: b"24ka" + data[4:], "version 1 or 2"),
        (lambda data: b"PK\x03\x04" + data[4:], "no shape of a model"),
    ],
)
def test_bad_llama2c_files(spoil: Callable[[bytes], bytes], named: str, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(spoil((DATA / "lm_stories260k" / "stories260K.bin").read_bytes()))
    with pytest.raises(UserError, match=rf"model\.bin.*{named}"):
        load_model(path)


def test_untied_llama2c_file(tmp_path: Path) -> None:
    """A file written out by hand: the sign of the vocabulary, the order of the matrices, the pairs of rows."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    depth, width, hidden, heads, groups, vocab, context, h = 2, 8, 6, 2, 1, 5, 3, 4
    embedding, norm1, q, k, v = (
        draw(vocab, width),
        draw(depth, width),
        draw(depth, width, width),
        draw(depth, groups * h, width),
        draw(depth, groups * h, width),
    )
    o, norm2, gate = draw(depth, width, width), draw(depth, width), draw(depth, hidden, width)
    down, up, norm, head = (
        draw(depth, width, hidden),
        draw(depth, hidden, width),
        draw(width),
        draw(vocab, width),
    )
    header = np.array([width, hidden, depth, heads, groups, -vocab, context], np.int32)
    tensors = [embedding, norm1, q, k, v, o, norm2, gate, down, up, norm, draw(context, h), head]
    (tmp_path / "model.bin").write_bytes(b"".join(x.tobytes() for x in (header, *tensors)))
    model, params = load_model(tmp_path / "model.bin")
    assert not model.config.tie_embeddings
    order = [0, 2, 1, 3]
    for i in range(depth):
        block = params["trunk"][f"layers_{i}"]
        np.testing.assert_array_equal(block["q"]["kernel"].T, q[i][[*order, *(4 + i for i in order)]])
        np.testing.assert_array_equal(block["k"]["kernel"].T, k[i][order])
        for name, want in {"v": v, "o": o, "gate": gate, "up": up, "down": down}.items():
            np.testing.assert_array_equal(block[name]["kernel"], want[i].T, err_msg=name)
        np.testing.assert_array_equal(block["norm2"]["scale"], norm2[i])
    np.testing.assert_array_equal(params["trunk"]["norm"]["scale"], norm)
    np.testing.assert_array_equal(params["lm_head"]["kernel"], head.T)
