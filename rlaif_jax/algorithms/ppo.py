"""Proximal policy optimisation on token sequences: one pure step, epochs x minibatches in one scan.

The same step does actor-critic PPO (advantage="gae") and GRPO (advantage="group", no value model). The numbers in
comments are the points of Huang 2024, "The N+ implementation details of RLHF with PPO", and their kin.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from rlaif_jax.algorithms.advantages import gae, group_normalised, token_rewards
from rlaif_jax.algorithms.supervised import make_optimizer
from rlaif_jax.config import PPOConfig, require
from rlaif_jax.models.heads import LanguageModel, ScalarModel, ValueHead
from rlaif_jax.parallel import global_rows, masked_mean, masked_whiten, psum
from rlaif_jax.types import PERMUTATION, Experience, Metrics, Params, RewardBatch, Rollout, TrainState, step_key


@dataclasses.dataclass(frozen=True)
class Agent:
    """What learns: a policy, and a critic on its own trunk (`ScalarModel`), on the policy's (`ValueHead`), or none."""

    policy: LanguageModel
    critic: ScalarModel | ValueHead | None
    config: PPOConfig
    temperature: float = 1.0
    updates: int = 1  # optimiser updates of the whole run, for the schedules
    answers: int = 1  # rows of a batch that stand together and answer the same prompt

    def __post_init__(self) -> None:
        require(
            (self.critic is None) == (self.config.advantage == "group"),
            "ppo.advantage='gae' needs a critic and 'group' takes none",
        )

    def optimizers(self) -> dict[str, optax.GradientTransformation]:
        """One optimiser a part, each clipping its own gradient."""
        made = {"policy": make_optimizer(self.config.policy_optimizer, self.updates)}
        if self.critic is not None:
            made["value"] = make_optimizer(self.config.value_optimizer, self.updates)
        return made

    def init(self, policy: Params, value: Params | None, seed: int) -> TrainState:
        """The state at step 0, from parameters of the policy and the critic (copied: the state is donated later)."""
        params = {"policy": policy} | ({} if value is None else {"value": value})
        params = jax.tree.map(jnp.array, params)
        opt_state = {part: tx.init(params[part]) for part, tx in self.optimizers().items()}
        return TrainState(
            params=params,
            opt_state=opt_state,
            kl_coef=jnp.float32(self.config.kl_coef),
            step=jnp.int32(0),
            seed=jnp.uint32(seed),
        )

    def forward(
        self,
        params: Params,
        tokens: jax.Array,
        prompt_mask: jax.Array,
        response_mask: jax.Array,
        answers: int = 1,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(logprobs, entropies, values), each [B, T] float32: entry t is of response token t, read where it is
        predicted, at columns P-1 .. S-2. Groups of `answers` rows share their prompt, which is then fed once."""
        rows = (tokens, prompt_mask, response_mask, answers)
        hidden = self.policy.response_hidden(params["policy"], *rows)
        targets = jnp.where(response_mask, tokens[:, prompt_mask.shape[1] :], 0)
        logprobs, entropies = self.policy.token_logprobs(
            params["policy"], hidden, targets, self.temperature, entropy=self.config.entropy_coef != 0
        )
        if self.critic is None:
            values = jnp.zeros_like(logprobs)
        elif isinstance(self.critic, ValueHead):
            values = self.critic(params["value"], hidden)
        else:
            values = self.critic.responses(params["value"], *rows)
        return logprobs, entropies, values


def reference_logprobs(
    policy: LanguageModel, params: Params, rollout: Rollout, temperature: float, answers: int = 1
) -> jax.Array:
    """Log-probs [B, T] of the rollout's responses under a frozen policy, at the sampling temperature."""
    hidden = policy.response_hidden(params, rollout.tokens, rollout.prompt_mask, rollout.response_mask, answers)
    logprobs, _ = policy.token_logprobs(
        params, hidden, jnp.where(rollout.response_mask, rollout.responses, 0), temperature
    )
    return jnp.where(rollout.response_mask, logprobs, 0.0)


def final_score(config: PPOConfig, score: jax.Array, finished: jax.Array) -> jax.Array:
    """[B] scores after the rule for answers without a stop token (`missing_eos`)."""
    if config.missing_eos == "penalty":
        return jnp.where(finished, score, score - config.missing_eos_value)
    if config.missing_eos == "constant":
        return jnp.where(finished, score, config.missing_eos_value)
    return score


def prepare(agent: Agent, state: TrainState, ref_params: Params, rollout: Rollout, rewards: RewardBatch) -> Experience:
    """Everything an update needs from a rollout and its rewards: reference log-probs, values, advantages, returns.

    Whitening of the advantages is left to `ppo_step`, which sees the global batch.
    """
    config, answers = agent.config, agent.answers
    mask = rollout.response_mask & rewards.valid.astype(bool)[:, None]
    chex.assert_equal_shape([mask, rollout.logprobs, rewards.token_rewards])
    ref_logprobs = reference_logprobs(agent.policy, ref_params, rollout, agent.temperature, answers)
    if config.behaviour == "recompute" or agent.critic is not None:
        logprobs, _, values = agent.forward(
            state.params, rollout.tokens, rollout.prompt_mask, rollout.response_mask, answers
        )
        values = jnp.where(mask, values, 0.0)
    else:
        values = jnp.zeros_like(rollout.logprobs)
    behaviour = jnp.where(rollout.response_mask, logprobs, 0.0) if config.behaviour == "recompute" else rollout.logprobs
    score = final_score(config, rewards.score.astype(jnp.float32), rollout.finished)
    if config.advantage == "group":
        # A group compares whole answers: dense rewards count by their sum.
        total = score + jnp.where(mask, rewards.token_rewards, 0.0).sum(-1)
        advantages = jnp.where(mask, group_normalised(total, rewards.valid, answers)[:, None], 0.0)
        returns = jnp.zeros_like(advantages)
    else:
        kl_coef = state.kl_coef if config.kl_in == "reward" else 0.0
        dense = token_rewards(score, rewards.token_rewards, behaviour, ref_logprobs, mask, kl_coef)
        advantages, returns = gae(dense, values, mask, gamma=config.gamma, gae_lambda=config.gae_lambda)
    return jax.lax.stop_gradient(
        Experience(
            tokens=rollout.tokens,
            prompt_mask=rollout.prompt_mask,
            response_mask=rollout.response_mask,
            mask=mask,
            logprobs=behaviour,
            sampler_logprobs=rollout.logprobs,
            ref_logprobs=ref_logprobs,
            values=values,
            advantages=advantages,
            returns=returns,
        )
    )


def policy_loss(log_ratio: jax.Array, advantages: jax.Array, clip_range: float) -> jax.Array:
    """max(-A rho, -A clip(rho, 1 - e, 1 + e)) per token (Schulman 2017, eq. 7, negated)."""
    ratio = jnp.exp(log_ratio)
    return jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 1 - clip_range, 1 + clip_range))


def value_loss(values: jax.Array, old_values: jax.Array, returns: jax.Array, clip_range: float) -> jax.Array:
    """0.5 max((V - R)^2, (clip(V, V_old +- c) - R)^2) per token."""
    clipped = jnp.clip(values, old_values - clip_range, old_values + clip_range)
    return 0.5 * jnp.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def kl_estimates(log_ratio: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(k1, k2, k3) of KL(policy || reference) per sampled token (Schulman 2020), log_ratio = logp - ref clamped to +-20."""
    d = jnp.clip(log_ratio, -20.0, 20.0)
    return d, 0.5 * d**2, jnp.exp(-d) - 1 + d


def minibatch_loss(
    agent: Agent,
    params: Params,
    batch: Experience,
    kl_coef: jax.Array,
    axis_name: str | None,
    answers: int = 1,
) -> tuple[jax.Array, Metrics]:
    """This device's share of the loss, and metrics of the whole minibatch.

    The share is the local sum over the *global* count, so that the sum of the devices' gradients is the gradient of
    the masked mean over all tokens of the minibatch, whatever the lengths.
    """
    config = agent.config
    logprobs, entropies, values = agent.forward(params, batch.tokens, batch.prompt_mask, batch.response_mask, answers)
    mask = batch.mask
    count = jnp.maximum(psum(jnp.sum(mask.astype(jnp.float32)), axis_name), 1.0)

    def share(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask, x, 0.0)) / count

    # `where` comes before `exp`: a masked slot may hold anything, and NaN x 0 is NaN.
    log_ratio = jnp.where(mask, logprobs - batch.logprobs, 0.0)
    advantages = jnp.where(mask, batch.advantages, 0.0)
    pg = share(policy_loss(log_ratio, advantages, config.clip_range))
    loss = pg
    metrics = {
        "policy_loss": pg,
        "approx_kl": share(kl_estimates(-log_ratio)[2]),
        "clip_fraction": share((jnp.abs(jnp.exp(log_ratio) - 1) > config.clip_range).astype(jnp.float32)),
        "ratio_error": share(jnp.abs(jnp.exp(log_ratio) - 1)),
        "sampler_gap": share(jnp.abs(jnp.where(mask, logprobs - batch.sampler_logprobs, 0.0))),
    }
    if agent.critic is not None:
        vf = share(value_loss(jnp.where(mask, values, 0.0), batch.values, batch.returns, config.value_clip_range))
        # The critic's own trunk has its own optimiser, on a shared one the coefficient balances the two losses.
        loss = loss + config.value_coef * vf
        metrics["value_loss"] = vf
    if config.kl_in == "loss":
        _, k2, k3 = kl_estimates(jnp.where(mask, logprobs - batch.ref_logprobs, 0.0))
        # k3's value with k2's gradient: k3 differentiated is not the KL's gradient (Schulman 2020; Tang & Munos 2025).
        kl = share(jax.lax.stop_gradient(k3 - k2) + k2)
        loss = loss + kl_coef * kl
        metrics["kl_loss"] = kl
    if config.entropy_coef:
        entropy = share(entropies)
        loss = loss - config.entropy_coef * entropy
        metrics["entropy_exact"] = entropy
    return loss, {k: psum(jax.lax.stop_gradient(v), axis_name) for k, v in metrics.items()}


def gradients(
    agent: Agent,
    params: Params,
    batch: Experience,
    kl_coef: jax.Array,
    axis_name: str | None,
    answers: int = 1,
) -> tuple[Params, jax.Array, Metrics]:
    """(gradient, loss, metrics) of the global minibatch, in which `answers` rows in a row share their prompt."""
    (loss, metrics), grads = jax.value_and_grad(
        lambda p: minibatch_loss(agent, p, batch, kl_coef, axis_name, answers), has_aux=True
    )(params)
    return psum(grads, axis_name), psum(loss, axis_name), metrics


def ppo_step(
    agent: Agent,
    state: TrainState,
    batch: Experience,
    *,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One update of the policy (and critic): `num_epochs` passes over `num_minibatches` minibatches, in one scan.

    batch: this device's rows of the global batch. Minibatches are drawn from the global batch by a new permutation an
    epoch, from the state's (seed, step): of whole groups where they fit, so that a prompt is computed once for its
    answers, else of rows. Metrics are float32 scalars of the whole batch; `first/*` are those of the very
    first minibatch, where the ratio must be 1 (see `checks` in train.py). A minibatch with a non-finite
    loss or gradient changes nothing; `nonfinite` counts them.
    """
    config, optimizers = agent.config, agent.optimizers()
    mask = batch.mask
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    rows = mask.shape[0] * devices
    size = rows // config.num_minibatches
    require(
        size * config.num_minibatches == rows and size % devices == 0,
        f"{rows} sequences cannot be cut into {config.num_minibatches} minibatches over {devices} devices",
    )
    old = batch
    if config.whiten_advantages and config.advantage == "gae":
        batch = dataclasses.replace(batch, advantages=masked_whiten(batch.advantages, mask, axis_name))
    key = step_key(state.seed, state.step, PERMUTATION)
    group = agent.answers if size % agent.answers == 0 else 1
    order = jax.vmap(lambda k: jax.random.permutation(k, rows // group))(jax.random.split(key, config.num_epochs))
    order = order[..., None] * group + jnp.arange(group)
    shared = group if size // devices % group == 0 else 1  # a device may hold a part of a group only

    def update(carry: tuple[Params, Any], chosen: jax.Array) -> tuple[tuple[Params, Any], Metrics]:
        params, opt_state = carry
        minibatch = global_rows(batch, chosen, axis_name)
        grads, loss, metrics = gradients(agent, params, minibatch, state.kl_coef, axis_name, shared)
        norms = {f"grad_norm/{part}": optax.tree.norm(grads[part]) for part in grads}
        finite = jnp.isfinite(loss) & jnp.all(jnp.isfinite(jnp.stack(list(norms.values()))))
        new_params, new_opt = {}, {}
        for part, tx in optimizers.items():
            updates, new_opt[part] = tx.update(grads[part], opt_state[part], params[part])
            new_params[part] = optax.apply_updates(params[part], updates)
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        metrics |= norms | {"loss": loss, "nonfinite": 1.0 - finite.astype(jnp.float32)}
        return (keep(new_params, params), keep(new_opt, opt_state)), metrics

    (params, opt_state), history = jax.lax.scan(
        update, (state.params, state.opt_state), order.reshape(config.num_epochs * config.num_minibatches, size)
    )
    metrics = {name: x.mean() for name, x in history.items()}
    metrics |= {
        f"first/{name}": history[name][0] for name in ("ratio_error", "approx_kl", "clip_fraction", "sampler_gap")
    }
    # Of the later minibatches it would be the policy's own movement, not a gap.
    del metrics["sampler_gap"]
    metrics["nonfinite"] = history["nonfinite"].sum()
    metrics |= batch_metrics(agent, old, axis_name)
    judged = psum(jnp.sum(mask.any(-1)), axis_name)
    kl_coef = adapt_kl(config, state.kl_coef, metrics["kl"], judged)
    metrics["kl_coef"] = kl_coef
    return dataclasses.replace(state, params=params, opt_state=opt_state, kl_coef=kl_coef, step=state.step + 1), metrics


def batch_metrics(agent: Agent, batch: Experience, axis_name: str | None) -> Metrics:
    """What the rollout itself says: KL to the reference (sum a sequence, in nats), entropy, length, explained variance."""
    mask = batch.mask
    rows = mask.any(-1)
    log_ratio = jnp.where(mask, batch.logprobs - batch.ref_logprobs, 0.0)
    k1, _, k3 = kl_estimates(log_ratio)
    metrics = {
        "kl": masked_mean(jnp.where(mask, k1, 0.0).sum(-1), rows, axis_name),
        "kl_k3": masked_mean(jnp.where(mask, k3, 0.0).sum(-1), rows, axis_name),
        "entropy": masked_mean(-batch.logprobs, mask, axis_name),  # Monte Carlo, over the behaviour policy's own tokens
        "length": masked_mean(batch.response_mask.sum(-1).astype(jnp.float32), rows, axis_name),
    }
    if agent.critic is not None:
        error = masked_mean((batch.returns - batch.values) ** 2, mask, axis_name)
        mean = masked_mean(batch.returns, mask, axis_name)
        variance = masked_mean((batch.returns - mean) ** 2, mask, axis_name)
        metrics |= {"explained_variance": 1 - error / jnp.maximum(variance, 1e-8), "return": mean}
    return metrics


def adapt_kl(config: PPOConfig, kl_coef: jax.Array, kl: jax.Array, sequences: jax.Array | int) -> jax.Array:
    """Ziegler 2019, section 2.2: e = clip(KL / target - 1, -.2, .2), coef *= 1 + e n / horizon. Constant without a target."""
    if config.kl_target is None:
        return kl_coef
    error = jnp.clip(kl / config.kl_target - 1, -0.2, 0.2)
    return kl_coef * (1 + error * sequences / config.kl_horizon)
