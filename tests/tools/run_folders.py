"""Folders of runs with real checkpoints, written as the loop writes them, without the training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.checkpoint import Checkpointer, fingerprint
from rlaif_jax.config import save_config
from rlaif_jax.data.tokenizers import word_level_tokenizer
from rlaif_jax.models import CausalLM
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.hf.files import load_model, save_model
from rlaif_jax.models.lora import LoRAConfig
from rlaif_jax.recipes.rlaif import RlaifConfig
from rlaif_jax.types import TrainState
from tests.helpers import random_params

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}assistant "
    "{% endif %}"
)
TOKENIZER = word_level_tokenizer(("user", "assistant", "system", "Human:", "Assistant:", *"abcdefgh"))
MODEL = CausalLM(small_decoder(TOKENIZER.vocab_size, num_layers=1, width=16, num_heads=2, context_length=64))
LORA = LoRAConfig(rank=2, targets=("q", "v", "down"))


def write_lm(folder: Path, *, template: str | None = TEMPLATE, seed: int = 0) -> Path:
    """Writes a model of a few words; with a chat template it answers chats."""
    settings = TOKENIZER.settings if template is None else {**TOKENIZER.settings, "chat_template": template}
    save_model(folder, MODEL, random_params(MODEL, seed, scale=0.3), dataclasses.replace(TOKENIZER, settings=settings))
    return folder


def policy_of(step: int, lora: LoRAConfig | None = None, model: CausalLM = MODEL) -> Any:
    """Returns what the policy of a made run has learned by a step."""
    if lora is None:
        return random_params(model, seed=step, scale=0.3)
    shapes = jax.eval_shape(lora.init, jax.random.key(0), jax.eval_shape(model.init, jax.random.key(0)))
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32) / 4, shapes)


def write_run(
    folder: Path, base: Path, *, lora: LoRAConfig | None = None, steps: tuple[int, ...] = (2, 4), **settings: Any
) -> Path:
    """Writes the folder of a run of `train` that began with the model in `base`."""
    adapter = {} if lora is None else {"lora": True, "adapter": lora}
    write_folder(folder, RlaifConfig(policy=str(base), prompts="p.txt", out=folder, **adapter, **settings))
    write_checkpoints(
        folder, {step: policy_of(step, lora) for step in steps}, start=None if lora is None else load_model(base)[1]
    )
    return folder


def write_folder(folder: Path, config: Any) -> None:
    """Writes the settings and the summary of a run."""
    folder.mkdir(parents=True)
    save_config(config, folder / "config.json")
    (folder / "summary.json").write_text(json.dumps({"experiment": "rlaif", "status": "stopped"}))


def write_checkpoints(folder: Path, policies: dict[int, Any], start: Any = None) -> None:
    """Writes a checkpoint of each policy as the loop does, split over a mesh of four devices where it can be."""
    weights = {} if start is None else {"the policy to start from": fingerprint(start)}
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])

    def split(x: Any) -> jax.Array:
        names = ("fsdp",) if np.ndim(x) and np.shape(x)[0] % 4 == 0 else ()
        return jax.device_put(jnp.asarray(x), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names)))

    with Checkpointer(folder / "checkpoints", {"steps": 4}, weights=weights, keep=9) as checkpoints:
        for step, params in policies.items():
            moments = jax.tree.map(np.zeros_like, params)
            state = TrainState(
                {"policy": params, "value": {"head": np.ones(3, np.float32)}},
                {"policy": {"mu": moments, "count": np.int32(step)}},
                {"kl_coef": np.float32(0.1)},
                {"lr": np.float32(1e-3)},
                np.int32(step),
                np.uint32(0),
            )
            checkpoints.save(step, (jax.tree.map(split, state), jnp.zeros((2, 3))), {"missing": 0})
