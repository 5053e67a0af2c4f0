"""Small cases of PPO, GRPO and RLOO with compiled functions, and the same numbers computed by NumPy in float64."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from rlaif_jax.algorithms.advantages import GAE, GroupNormalised, LeaveOneOut
from rlaif_jax.algorithms.optimizer import OptimizerConfig
from rlaif_jax.algorithms.ppo import PPO, PPOConfig
from rlaif_jax.algorithms.scoring import padded_view
from rlaif_jax.algorithms.surrogate import token_loss
from rlaif_jax.algorithms.update import Batch, Totals, count_totals
from rlaif_jax.models import CausalLM, ScalarModel
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.policies.text import TextPolicy
from rlaif_jax.types import Frozen, Prompts, RewardBatch, Rollout, StepData, TrainState
from tests.helpers import random_params

NAN = float("nan")
V, P, T, B, K, TEMPERATURE = 10, 4, 5, 8, 2, 0.7
DECODER = small_decoder(V, num_layers=1, width=16, num_heads=2, context_length=16)
MODEL, CRITIC = CausalLM(DECODER), ScalarModel(DECODER, "normal")
POLICY = TextPolicy(MODEL, SamplingConfig(max_new_tokens=T, temperature=TEMPERATURE), eos_id=None, pad_id=0)
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, schedule="constant")
ACTOR_CRITIC = PPOConfig(
    advantage=GAE(gamma=0.95),
    answers_per_prompt=K,
    num_epochs=2,
    num_minibatches=2,
    kl_coef=0.1,
    value_coef=0.3,
    entropy_coef=0.01,
    policy_optimizer=OPTIMIZER,
    value_optimizer=OPTIMIZER,
)
GROUP = PPOConfig(
    advantage=GroupNormalised(),
    answers_per_prompt=K,
    kl_in="loss",
    kl_coef=0.1,
    entropy_coef=0.5,
    policy_optimizer=OPTIMIZER,
)
LEAVE_ONE_OUT = dataclasses.replace(GROUP, advantage=LeaveOneOut())
DATA = StepData(
    Prompts(np.zeros((B // K, P), np.int32), np.ones((B // K, P), bool), np.arange(B // K, dtype=np.uint32))
)


def build(config: PPOConfig) -> PPO:
    """Returns the algorithm of a config on the small policy, with a critic where the advantage needs one."""
    return config.build(POLICY, CRITIC if config.advantage.needs_critic else None, steps=1)


def loss_of(
    algorithm: PPO, params: Any, batch: Batch, kl_coef: Any, totals: Totals | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns (loss, metrics) of padded sequences as one contribution."""
    config = algorithm.config
    totals = count_totals(batch, config.answers_per_prompt, None) if totals is None else totals
    scored = algorithm.score(params, Frozen(), padded_view(batch))
    return token_loss(config, kl_coef, scored, batch.fields, batch.mask, totals, entropy=config.entropy_coef != 0)


def gradients_of(algorithm: PPO, state: TrainState, params: Any, batch: Batch, shared: int = 1) -> Any:
    """Returns (gradient, loss, metrics) of a whole batch as one minibatch."""
    return algorithm.update(state, Frozen()).gradients(params, batch, shared=shared)


@dataclasses.dataclass
class Case:
    """An algorithm, its state, a reference, a rollout with rewards, and compiled functions of the algorithm."""

    algorithm: PPO
    state: TrainState
    frozen: Frozen
    rollout: Rollout
    rewards: RewardBatch

    def __post_init__(self) -> None:
        self.prepare = compiled_prepare(self.algorithm)
        self.step = jax.jit(lambda state, batch: self.algorithm.step(state, Frozen(), batch))
        self.loss = jax.jit(functools.partial(loss_of, self.algorithm))

    @functools.cached_property
    def batch(self) -> Batch:
        """What `prepare` makes of the case, on the host."""
        return jax.device_get(self.prepare(self.state, self.frozen, self.rollout, self.rewards))

    @functools.cached_property
    def stepped(self) -> tuple[TrainState, dict[str, np.ndarray]]:
        """What `step` makes of the batch, on the host."""
        return jax.device_get(self.step(self.state, self.batch))


def compiled_prepare(algorithm: PPO) -> Any:
    """Returns `prepare` of (state, frozen, rollout, rewards), compiled."""
    return jax.jit(lambda state, frozen, rollout, rewards: algorithm.prepare(state, frozen, DATA, rollout, rewards))


def make_case(config: PPOConfig) -> Case:
    """Returns eight answers of unequal lengths to four prompts, one of them without a judgement."""
    algorithm = build(config)
    parts = {"policy": random_params(MODEL, 0), "value": random_params(CRITIC, 1)}
    state = algorithm.init({part: parts[part] for part in algorithm.optimizers}, np.uint32(3))
    rng = np.random.default_rng(0)
    lengths = np.array([5, 1, 3, 5, 2, 4, 1, 5])
    mask = np.arange(T) < lengths[:, None]
    tokens = rng.integers(0, V, (B, P + T)).astype(np.int32)
    tokens[1::2, :P] = tokens[::2, :P]
    prompt_mask = np.arange(P) >= np.array([0, 0, 2, 2, 1, 1, 3, 3])[:, None]
    full = np.concatenate([prompt_mask, mask], axis=1)
    logprobs = np.where(mask, numpy_logprobs(parts["policy"], tokens, full)[0], 0).astype(np.float32)
    rollout = Rollout(
        tokens=tokens, prompt_mask=prompt_mask, response_mask=mask, logprobs=logprobs, finished=lengths < T
    )
    rewards = RewardBatch(
        score=np.float32([1, -0.5, 0.7, 0.2, NAN, 2, -1, 0.3]),
        valid=np.arange(B) != 4,
        token_rewards=(0.1 * rng.normal(size=(B, T))).astype(np.float32),
    )
    return Case(algorithm, state, Frozen(reference=random_params(MODEL, 2)), rollout, rewards)


# ---- The same in NumPy

forward = jax.jit(lambda params, tokens, mask: MODEL(params, tokens, mask))
critic_values = jax.jit(lambda params, tokens, mask: CRITIC(params, tokens, mask)[:, P - 1 : -1])


def full_mask(batch: Batch) -> np.ndarray:
    """Returns the mask [B, P + T] of real tokens."""
    return np.concatenate([batch.prompt_mask, batch.response_mask], axis=1)


def numpy_logprobs(params: Any, tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (logprobs, entropies) [B, T] at the temperature, float64, from the logits of columns P - 1 .. S - 2."""
    logits = np.asarray(forward(params, tokens, mask), np.float64)[:, P - 1 : -1] / TEMPERATURE
    logprobs = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    return np.take_along_axis(logprobs, tokens[:, P:, None], -1)[..., 0], -(np.exp(logprobs) * logprobs).sum(-1)


def numpy_gae(rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """Returns advantages [B, T] by the recursion, row by row."""
    out = np.zeros(rewards.shape)
    for row in range(B):
        advantage, value = 0.0, 0.0
        for t in np.flatnonzero(mask[row])[::-1]:
            advantage = rewards[row, t] + gamma * value - values[row, t] + gamma * lam * advantage
            value, out[row, t] = values[row, t], advantage
    return out


def numpy_loss(
    batch: Batch,
    logprobs: np.ndarray,
    entropies: np.ndarray,
    values: np.ndarray | None,
    config: PPOConfig,
    rows: Any = slice(None),
) -> tuple[float, dict[str, float]]:
    """Returns the loss and metrics written out: one sum over all tokens of `rows`, one count."""
    m = batch.mask[rows]
    f = jax.tree.map(lambda x: x[rows][m].astype(np.float64), batch.fields)
    new, old, adv = logprobs[rows][m], f.logprobs, f.advantages
    ratio = np.exp(new - old)
    out = {
        "policy_loss": np.maximum(-adv * ratio, -adv * ratio.clip(0.8, 1.2)).mean(),
        "approx_kl": (ratio - 1 - (new - old)).mean(),
        "clip_fraction": (np.abs(ratio - 1) > 0.2).mean(),
        "ratio_error": np.abs(ratio - 1).mean(),
        "sampler_gap": np.abs(new - f.sampler_logprobs).mean(),
        "sampler_gap_max": np.abs(new - f.sampler_logprobs).max(),
        "sampler_weight": np.exp(new - f.sampler_logprobs).mean(),
        "sampler_weight_squared": np.exp(2 * (new - f.sampler_logprobs)).mean(),
        "entropy_exact": entropies[rows][m].mean(),
    }
    loss = out["policy_loss"] - config.entropy_coef * out["entropy_exact"]
    if values is not None:
        v = values[rows][m]
        clipped = v.clip(f.values - 0.2, f.values + 0.2)
        out["value_loss"] = 0.5 * np.maximum((v - f.returns) ** 2, (clipped - f.returns) ** 2).mean()
        loss += config.value_coef * out["value_loss"]
    if config.kl_in == "loss":
        d = new - f.ref_logprobs
        out["kl_loss"] = (np.exp(-d) - 1 + d).mean()
        loss += 0.1 * out["kl_loss"]
    return loss, out
