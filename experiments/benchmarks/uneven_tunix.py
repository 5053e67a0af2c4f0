"""Takes the steps of `uneven.py` by Tunix's GRPOLearner.

`uneven.py` starts this script in an environment with google-tunix. Tunix has no model with learned positions,
which carry the probabilities of a stop here. `GPT2` below is such a model with the interface of Tunix's own
models, written like its Llama3 (einsums, a cache of fixed size, full attention with a mask), on the weights
in `folder`. So Tunix's sampler, learner and trainer use the same policy as the other systems; its
log-probabilities are checked against `expected.npz` in that folder. Tunix does not count the stop token as
part of an answer, and trains on one token less.

`--budget` turns on Tunix's own packing of sequences into rows of that number of tokens
(`max_seq_token_per_tpu`). Each row is then an update: there are as many AdamW steps as rows instead of one.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import logging
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import load_file
from tunix.rl import common, rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout import base_rollout
from tunix.utils import compat

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", help="weights")
for option in ("prompts", "prompt", "cap", "vocab", "group", "warmup", "steps"):
    parser.add_argument(f"--{option}", type=int, required=True)
parser.add_argument("--budget", type=int, help="tokens of a packed row")
o = parser.parse_args()
logging.disable(logging.WARNING)
PAD, STOP, MASKED = 0, 1, -2.3819763e38
HEADS = json.loads((Path(o.folder) / "config.json").read_text())["n_head"]
Cache = dict[str, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape that Tunix's sampler needs to make its cache."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


class Linear(nnx.Module):
    def __init__(self, weights: dict[str, np.ndarray], name: str) -> None:
        self.w, self.b = (nnx.Param(jnp.asarray(weights[f"{name}.{part}"])) for part in ("weight", "bias"))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.einsum("BTD,DF->BTF", x, self.w[...]) + self.b[...]


class LayerNorm(nnx.Module):
    def __init__(self, weights: dict[str, np.ndarray], name: str) -> None:
        self.w, self.b = (nnx.Param(jnp.asarray(weights[f"{name}.{part}"])) for part in ("weight", "bias"))

    def __call__(self, x: jax.Array) -> jax.Array:
        centred = x - x.mean(-1, keepdims=True)
        return self.w[...] * centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) + self.b[...]


class Block(nnx.Module):
    def __init__(self, weights: dict[str, np.ndarray], name: str) -> None:
        self.norm1, self.norm2 = (LayerNorm(weights, f"{name}.ln_{i}") for i in (1, 2))
        self.qkv, self.out = (Linear(weights, f"{name}.attn.{part}") for part in ("c_attn", "c_proj"))
        self.up, self.down = (Linear(weights, f"{name}.mlp.{part}") for part in ("c_fc", "c_proj"))

    def __call__(self, x: jax.Array, cache: Any, mask: jax.Array) -> tuple[Any, jax.Array]:
        split = (*x.shape[:2], HEADS, x.shape[-1] // HEADS)
        q, k, v = (part.reshape(split) for part in jnp.split(self.qkv(self.norm1(x)), 3, axis=-1))
        if cache is not None:
            at = (0, cache["end_index"][0], 0, 0)
            k, v = (jax.lax.dynamic_update_slice(cache[name], new, at) for name, new in (("k", k), ("v", v)))
            cache = {"k": k, "v": v, "end_index": cache["end_index"] + x.shape[1]}
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, MASKED), axis=-1)
        x = x + self.out(jnp.einsum("BNTS,BSNH->BTNH", weights, v).reshape(x.shape))
        return cache, x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class GPT2(nnx.Module):
    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        layers = sum(name.endswith("ln_1.weight") for name in weights)
        self.config = Shape(layers, HEADS, weights["transformer.wte.weight"].shape[-1] // HEADS)
        self.words = nnx.Param(jnp.asarray(weights["transformer.wte.weight"]))
        self.places = nnx.Param(jnp.asarray(weights["transformer.wpe.weight"]))
        self.blocks = compat.ModuleList([Block(weights, f"transformer.h.{i}") for i in range(layers)])
        self.norm = LayerNorm(weights, "transformer.ln_f")
        self.head = nnx.Param(jnp.asarray(weights["lm_head.weight"].T))

    def __call__(
        self,
        input_tokens: jax.Array,
        positions: jax.Array,
        cache: Cache | None,
        attention_mask: jax.Array | None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        if attention_mask is None:  # packed rows
            assert segment_ids is not None
            columns = jnp.arange(input_tokens.shape[1])
            attention_mask = (segment_ids[:, :, None] == segment_ids[:, None]) & (columns[:, None] >= columns)
        x = self.words[...][input_tokens] + self.places[...][positions]
        new: Cache | None = None if cache is None else {}
        for i, block in enumerate(self.blocks):
            layer, x = block(x, None if cache is None else cache[f"layer_{i}"], attention_mask)
            if new is not None:
                new[f"layer_{i}"] = layer
        return jnp.einsum("BTD,DV->BTV", self.norm(x), self.head[...]), new


class Words:
    """Word i is `t<i>`."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(f"t{int(i)}" for i in ids)

    bos_id = staticmethod(lambda: None)
    pad_id = staticmethod(lambda: PAD)
    eos_id = staticmethod(lambda: STOP)


weights = load_file(Path(o.folder) / "model.safetensors")
policy, reference = GPT2(weights), GPT2(weights)
expected = np.load(Path(o.folder) / "expected.npz")
graph, params = nnx.split(policy)
ours = common.compute_per_token_logps(
    graph, params, expected["tokens"][:, : o.prompt], expected["tokens"][:, o.prompt :], pad_id=PAD, eos_id=STOP
)
np.testing.assert_allclose(ours, expected["logprobs"], atol=1e-3, err_msg="this is not the policy of the others")

mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
rollout = base_rollout.RolloutConfig(
    max_tokens_to_generate=o.cap,
    max_prompt_length=o.prompt,
    temperature=1.0,
    top_p=1.0,
    top_k=None,
    kv_cache_size=o.prompt + o.cap,
)
cluster = rl_cluster.RLCluster(
    actor=policy,
    reference=reference,
    tokenizer=Words(),
    cluster_config=rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys((rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT), mesh),
        rollout_engine="vanilla",
        offload_to_cpu=False,
        rollout_config=rollout,
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=optax.adamw(1e-6),
            eval_every_n_steps=10**9,
            max_steps=10**6,
            max_seq_token_per_tpu=o.budget,
        ),
    ),
)
total = o.warmup + o.steps
lengths: list[list[int]] = []
starts: list[float] = []  # of a step
drawn: list[float] = []
updating: list[list[float]] = []  # of a step's updates


def lower_half(prompts: Any, completions: list[str], **_: Any) -> list[float]:
    answers = [[int(word[1:]) for word in text.split()] for text in completions]
    return [sum(i < o.vocab // 2 for i in ids) / max(len(ids), 1) for ids in answers]


learner = GRPOLearner(
    rl_cluster=cluster,
    reward_fns=lower_half,
    algo_config=GRPOConfig(num_generations=o.group, num_iterations=1, beta=0.05, epsilon=0.2),
)
plain_generate, plain_update, plain_score = cluster.generate, cluster.update_actor, cluster.get_ref_per_token_logps


def generate(*arguments: Any, **options: Any) -> Any:
    rollout.seed = jax.random.key(len(drawn))  # else every step reuses one
    out = plain_generate(*arguments, **options)
    drawn.append(time.perf_counter())
    lengths.append([min(len(tokens) + 1, o.cap) for tokens in out.tokens])  # the stop is not among them
    updating.append([])
    return out


def update(*arguments: Any, **options: Any) -> None:
    updating[-1].append(time.perf_counter())
    plain_update(*arguments, **options)
    jax.block_until_ready(nnx.state(cluster.actor_trainer.model, nnx.Param))


cluster.generate, cluster.update_actor = generate, update
cluster.get_ref_per_token_logps = lambda *a, **k: jax.block_until_ready(plain_score(*a, **k))
rng = np.random.default_rng(0)


def batches() -> Any:  # the next batch is requested when a step is done
    for _ in range(total):
        starts.append(time.perf_counter())
        ids = rng.integers(2, o.vocab, (o.prompts, o.prompt))
        yield {"prompts": np.array([" ".join(f"t{i}" for i in row) for row in ids])}
    starts.append(time.perf_counter())


learner.train(batches())
rows = [len(x) for x in updating]
assert len(drawn) == total and all(rows), f"{len(drawn)} rollouts, {rows} updates in {total} steps"
moved = nnx.state(cluster.actor_trainer.model, nnx.Param)
assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x != y).any()), moved, nnx.state(reference, nnx.Param))))
phases: dict[str, list[float]] = {"step": [], "gen": [], "score": [], "update": []}
for begun, got, learning, end in list(zip(starts, drawn, updating, starts[1:], strict=False))[o.warmup :]:
    for name, seconds in zip(phases, (end - begun, got - begun, learning[0] - got, end - learning[0]), strict=True):
        phases[name].append(seconds)
print(
    json.dumps(
        {
            "times": phases,
            "lengths": [n for step in lengths[o.warmup :] for n in step],
            "version": f"google-tunix {importlib.metadata.version('google-tunix')}, jax {jax.__version__}",
            "updates": rows[o.warmup :],
        }
    )
)
