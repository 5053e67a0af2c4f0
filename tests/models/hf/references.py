"""Models of transformers to compare with, and tiny models of ours."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.models import CausalLM
from rlaif_jax.models.decoder_config import small_decoder

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
