"""Proximal policy optimisation on token sequences: one pure step, epochs x minibatches in one scan.

The same step does actor-critic PPO (advantage="gae") and GRPO (advantage="group", no value model). The numbers in
comments are the points of Huang 2024, "The N+ implementation details of RLHF with PPO", and their kin.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import optax

from rlaif_jax.algorithms.advantages import gae, group_normalised, token_rewards
from rlaif_jax.algorithms.optimizer import OptimizerConfig, make_optimizer
from rlaif_jax.algorithms.packing import Packed, pack
from rlaif_jax.config import check_choices, require
from rlaif_jax.models.decoder import packed_hidden, response_hidden
from rlaif_jax.models.decoder_config import DecoderConfig
from rlaif_jax.models.heads import LanguageModel, ScalarModel, ValueHead
from rlaif_jax.parallel import global_rows, masked_mean, masked_whiten, mesh_shares, over_mesh, pmax, psum
from rlaif_jax.types import PERMUTATION, Experience, Metrics, Params, RewardBatch, Rollout, TrainState, step_key

# How the hidden states that predict the response tokens are read off a trunk, given its shape and parameters.
Read = Callable[[DecoderConfig, Params], jax.Array]


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimisation for language models (Schulman 2017; Stiennon 2020; N+ details, Huang 2024).

    advantage: `gae` needs a value model; `group` normalises the scores of the K answers to one prompt (GRPO,
      Shao 2024) and needs K >= 2 and no value model.
    kl_in: where the KL to the reference policy enters: the per-token `reward`, or the `loss` (k3 value with the
      gradient of k2), never both.
    behaviour: whose log-probs the ratio is measured against: `recompute` scores the answers once more with the
      trainer's forward pass, `sampler` takes what the sampler reported; the gap between the two is logged always.
      With `recompute` a token counts by its importance weight min(trainer's / sampler's probability, `importance_cap`),
      which is 1 up to rounding where both compute alike; with `sampler` the ratio itself corrects.
    packed_rows: 0 computes the sequences of a minibatch side by side, padded to one length. Else every device packs its
      answers into rows of prompt_length + max_new_tokens - 1 columns and adds up the gradient over so many rows at a
      time: the same gradient with less work where lengths are uneven, and in the memory of so many rows.
    missing_eos: what an answer cut by the length limit gets: its `score`, its score minus `missing_eos_value`
      (`penalty`), or the constant `missing_eos_value` instead of its score (`constant`).
    A cut answer is treated like a finished one in its last value: no bootstrap (V = 0 after the last token).
    kl_target: when set, the KL coefficient follows Ziegler 2019's controller with `kl_horizon` in sequences.
    """

    advantage: Literal["gae", "group"] = "gae"
    num_epochs: int = 4
    num_minibatches: int = 1
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    whiten_advantages: bool = True
    kl_in: Literal["reward", "loss"] = "reward"
    kl_coef: float = 0.05
    kl_target: float | None = None
    kl_horizon: float = 10_000.0
    behaviour: Literal["recompute", "sampler"] = "recompute"
    importance_cap: float = 2.0
    packed_rows: int = 0
    missing_eos: Literal["score", "penalty", "constant"] = "score"
    missing_eos_value: float = 1.0
    policy_optimizer: OptimizerConfig = OptimizerConfig()
    value_optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self) -> None:
        check_choices(self, "ppo")
        for field in ("num_epochs", "num_minibatches"):
            require(getattr(self, field) >= 1, f"ppo.{field} must be >= 1, not {getattr(self, field)}")
        require(0 <= self.gae_lambda <= 1, f"ppo.gae_lambda must lie in [0, 1], not {self.gae_lambda}")
        require(0 < self.gamma <= 1, f"ppo.gamma must lie in (0, 1], not {self.gamma}")
        require(
            self.advantage != "group" or self.kl_in == "loss" or self.kl_coef == 0,
            "ppo.kl_in='reward' has no place with ppo.advantage='group', whose advantages are of whole answers: "
            "set ppo.kl_in='loss', or ppo.kl_coef=0",
        )
        for field in ("kl_target", "kl_horizon"):
            value = getattr(self, field)
            require(value is None or value > 0, f"ppo.{field} must be > 0, not {value}")
        require(self.importance_cap >= 1, f"ppo.importance_cap must be >= 1, not {self.importance_cap}")
        require(self.packed_rows >= 0, f"ppo.packed_rows must be >= 0 (0: not packed), not {self.packed_rows}")
        require(self.clip_range > 0, f"ppo.clip_range must be > 0, not {self.clip_range}")
        require(self.kl_coef >= 0, f"ppo.kl_coef must be >= 0, not {self.kl_coef}")


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

    def optimizers(self) -> dict[str, optax.GradientTransformationExtraArgs]:
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

    def forward(self, params: Params, read: Read, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(logprobs, entropies, values) of response tokens `targets`, of its shape, float32: each read where the token is
        predicted."""
        hidden = read(self.policy.config, params["policy"]["trunk"])
        logprobs, entropies = self.policy.token_logprobs(
            params["policy"], hidden, targets, self.temperature, entropy=self.config.entropy_coef != 0
        )
        if self.critic is None:
            values = jnp.zeros_like(logprobs)
        elif isinstance(self.critic, ValueHead):
            values = self.critic(params["value"], hidden)
        else:
            values = self.critic.head(params["value"], read(self.critic.config, params["value"]["trunk"]))
        return logprobs, entropies, values


def side_by_side(batch: Rollout | Experience, answers: int = 1) -> tuple[Read, jax.Array]:
    """Padded sequences as they are: how to read them, and their targets [B, T]. Groups of `answers` rows share their prompt,
    which is then fed once."""
    targets = jnp.where(batch.response_mask, batch.tokens[:, batch.prompt_mask.shape[1] :], 0)
    read = partial(
        response_hidden,
        tokens=batch.tokens,
        prompt_mask=batch.prompt_mask,
        response_mask=batch.response_mask,
        answers=answers,
    )
    return read, targets


def in_rows(batch: Rollout | Experience, rows: Packed, answers: int) -> tuple[Read, jax.Array]:
    """Packed rows [R, C] of the sequences of `batch`, up to `answers` to a prompt: how to read them, and their targets
    [R, C]."""
    responses = batch.tokens[:, batch.prompt_mask.shape[1] :]
    read = partial(
        packed_hidden,
        tokens=batch.tokens.reshape(-1)[rows.tokens],
        positions=rows.positions,
        segments=rows.segments,
        answers=rows.answers if answers > 1 else None,
    )
    return read, taken(responses, rows)


def taken(x: jax.Array, rows: Packed) -> jax.Array:
    """What x [M, T] says of the token that each column of the packed rows [R, C] predicts; 0 or False where none."""
    return x.reshape(-1).at[rows.targets].get(mode="fill", fill_value=0)


def fold_rows(config: PPOConfig, packed: Packed, used: jax.Array, fn: Callable[[Any, Packed], Any], carry: Any) -> Any:
    """`carry` after `fn(carry, rows)` for the rows in use, `config.packed_rows` a device at a time.

    The number of turns is that of this step's tokens, the program the same for all."""
    size = config.packed_rows * mesh_shares()
    nothing = Packed(tokens=0, targets=jnp.iinfo(jnp.int32).max, positions=0, segments=0, answers=0)  # type: ignore[arg-type]

    def turn(i: jax.Array, carry: Any) -> Any:
        rows = i * size + jnp.arange(size)
        part = jax.tree.map(lambda x, fill: x.at[rows].get(mode="fill", fill_value=fill), packed, nothing)
        return fn(carry, over_mesh(part))

    return jax.lax.fori_loop(0, (used + size - 1) // size, turn, carry)


def reference_logprobs(
    policy: LanguageModel, params: Params, rollout: Rollout, temperature: float, answers: int = 1
) -> jax.Array:
    """Log-probs [B, T] of the rollout's responses under a frozen policy, at the sampling temperature."""
    read, targets = side_by_side(rollout, answers)
    logprobs, _ = policy.token_logprobs(params, read(policy.config, params["trunk"]), targets, temperature)
    return jnp.where(rollout.response_mask, logprobs, 0.0)


def scored(agent: Agent, state: TrainState, ref_params: Params, rollout: Rollout) -> dict[str, jax.Array]:
    """What an update needs of the models, each [B, T] float32 and 0 where masked: `ref_logprobs`; `logprobs` of the policy
    unless the sampler's are taken; `values` where there is a critic."""
    config = agent.config

    def score(read: Read, targets: jax.Array) -> dict[str, jax.Array]:
        frozen = read(agent.policy.config, ref_params["trunk"])
        out = {"ref_logprobs": agent.policy.token_logprobs(ref_params, frozen, targets, agent.temperature)[0]}
        logprobs, _, values = agent.forward(state.params, read, targets)
        if config.behaviour == "recompute":
            out["logprobs"] = logprobs
        if agent.critic is not None:
            out["values"] = values
        return out

    shape = rollout.logprobs.shape
    if not config.packed_rows:
        out = score(*side_by_side(rollout, agent.answers))
        return {name: jnp.where(rollout.response_mask, x, 0.0) for name, x in out.items()}
    group = jnp.arange(shape[0]) // agent.answers
    packed, used = pack(rollout.prompt_mask, rollout.response_mask, group)

    def one(carry: dict[str, jax.Array], rows: Packed) -> dict[str, jax.Array]:
        out = score(*in_rows(rollout, rows, agent.answers))
        return {name: x.at[rows.targets].set(out[name], mode="drop") for name, x in carry.items()}

    names = jax.eval_shape(lambda: score(*in_rows(rollout, packed, agent.answers)))
    flat = fold_rows(config, packed, used, one, {name: jnp.zeros(rollout.logprobs.size) for name in names})
    return {name: x.reshape(shape) for name, x in flat.items()}


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
    config = agent.config
    mask = rollout.response_mask & rewards.valid.astype(bool)[:, None]
    chex.assert_equal_shape([mask, rollout.logprobs, rewards.token_rewards])
    told = scored(agent, state, ref_params, rollout)
    ref_logprobs, behaviour = told["ref_logprobs"], told.get("logprobs", rollout.logprobs)
    values = jnp.where(mask, told["values"], 0.0) if agent.critic is not None else jnp.zeros_like(behaviour)
    score = final_score(config, rewards.score.astype(jnp.float32), rollout.finished)
    if config.advantage == "group":
        # A group compares whole answers: dense rewards count by their sum.
        total = score + jnp.where(mask, rewards.token_rewards, 0.0).sum(-1)
        advantages = jnp.where(mask, group_normalised(total, rewards.valid, agent.answers)[:, None], 0.0)
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
    agent: Agent, params: Params, read: Read, targets: jax.Array, told: Experience, kl_coef: jax.Array, count: jax.Array
) -> tuple[jax.Array, Metrics]:
    """The share of some tokens of a minibatch in its loss and in its metrics.

    `told` says of every target what the batch knows of it. The share is a sum over `count`, the number of tokens of the whole
    minibatch, so that the gradients of all shares, on whatever device and in whatever order, add up to that of the
    masked mean. Metrics add up too, but those named `*_max`, of which the greatest is the minibatch's.
    """
    config = agent.config
    logprobs, entropies, values = agent.forward(params, read, targets)
    mask = told.mask

    def share(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask, x, 0.0)) / count

    # `where` comes before `exp`: a masked slot may hold anything, and NaN x 0 is NaN.
    log_ratio = jnp.where(mask, logprobs - told.logprobs, 0.0)
    advantages = jnp.where(mask, told.advantages, 0.0)
    objective = policy_loss(log_ratio, advantages, config.clip_range)
    if config.behaviour == "recompute":
        objective = objective * importance_weights(
            jnp.where(mask, told.logprobs - told.sampler_logprobs, 0.0), config.importance_cap
        )
    pg = share(objective)
    loss = pg
    gap = jnp.where(mask, logprobs - told.sampler_logprobs, 0.0)
    weight = jnp.exp(jnp.clip(gap, -20.0, 20.0))
    metrics = {
        "policy_loss": pg,
        "approx_kl": share(kl_estimates(-log_ratio)[2]),
        "clip_fraction": share((jnp.abs(jnp.exp(log_ratio) - 1) > config.clip_range).astype(jnp.float32)),
        "ratio_error": share(jnp.abs(jnp.exp(log_ratio) - 1)),
        "sampler_gap": share(jnp.abs(gap)),
        "sampler_gap_max": jnp.max(jnp.abs(gap)),
        "sampler_weight": share(weight),
        "sampler_weight_squared": share(weight**2),
    }
    if agent.critic is not None:
        vf = share(value_loss(jnp.where(mask, values, 0.0), told.values, told.returns, config.value_clip_range))
        # The critic's own trunk has its own optimiser, on a shared one the coefficient balances the two losses.
        loss = loss + config.value_coef * vf
        metrics["value_loss"] = vf
    if config.kl_in == "loss":
        _, k2, k3 = kl_estimates(jnp.where(mask, logprobs - told.ref_logprobs, 0.0))
        # k3's value with k2's gradient: k3 differentiated is not the KL's gradient (Schulman 2020; Tang & Munos 2025).
        kl = share(jax.lax.stop_gradient(k3 - k2) + k2)
        loss = loss + kl_coef * kl
        metrics["kl_loss"] = kl
    if config.entropy_coef:
        entropy = share(entropies)
        loss = loss - config.entropy_coef * entropy
        metrics["entropy_exact"] = entropy
    return loss, jax.lax.stop_gradient(metrics)


def importance_weights(log_weight: jax.Array, cap: float) -> jax.Array:
    """min(pi_old / pi_sampler, cap) per token, a constant to the gradient.

    It corrects for tokens that another policy has drawn than the one the ratio is measured against: the same weights in the
    sampler's own arithmetic (Yao 2025, truncated importance sampling), or older ones (the decoupled objective of
    Hilton 2022, eq. 5, with pi_old as the proximal policy).
    """
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(jnp.clip(log_weight, -20.0, 20.0)), cap))


def gradients(
    agent: Agent,
    params: Params,
    batch: Experience,
    kl_coef: jax.Array,
    axis_name: str | None,
    answers: int = 1,
    group: jax.Array | None = None,
) -> tuple[Params, jax.Array, Metrics]:
    """(gradient, loss, metrics) of the global minibatch, in which `answers` rows in a row share their prompt.

    With `packed_rows`, rows of the same number in `group` [B] do, and the gradient is summed up over so many rows at a time.
    """
    config = agent.config
    count = jnp.maximum(psum(jnp.sum(batch.mask.astype(jnp.float32)), axis_name), 1.0)

    def shares(read: Read, targets: jax.Array, told: Experience) -> tuple[tuple[jax.Array, Metrics], Params]:
        return jax.value_and_grad(
            lambda p: minibatch_loss(agent, p, read, targets, told, kl_coef, count), has_aux=True
        )(params)

    def added(a: Any, b: Any) -> Any:
        ((loss, metrics), grads), ((more, others), further) = a, b
        add = lambda name, x, y: jnp.maximum(x, y) if name.endswith("_max") else x + y
        together = {name: add(name, x, others[name]) for name, x in metrics.items()}
        return (loss + more, together), jax.tree.map(jnp.add, grads, further)

    if not config.packed_rows:
        (loss, metrics), grads = shares(*side_by_side(batch, answers), batch)
    else:
        if group is None:
            group = jnp.arange(batch.mask.shape[0]) // answers
        packed, used = pack(batch.prompt_mask, batch.mask, group)

        def part(rows: Packed) -> tuple[tuple[jax.Array, Metrics], Params]:
            fields = ("mask", "logprobs", "sampler_logprobs", "ref_logprobs", "values", "advantages", "returns")
            told = dataclasses.replace(batch, **{name: taken(getattr(batch, name), rows) for name in fields})
            return shares(*in_rows(batch, rows, agent.answers), told)

        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, packed))
        (loss, metrics), grads = fold_rows(config, packed, used, lambda sums, rows: added(sums, part(rows)), zero)
    metrics = {name: (pmax if name.endswith("_max") else psum)(x, axis_name) for name, x in metrics.items()}
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
    above = 0 if axis_name is None else jax.lax.axis_index(axis_name) * mask.shape[0]
    prompt = (above + jnp.arange(mask.shape[0])) // agent.answers

    def update(carry: tuple[Params, Any], chosen: jax.Array) -> tuple[tuple[Params, Any], Metrics]:
        params, opt_state = carry
        minibatch, of_prompt = global_rows((batch, prompt), chosen, axis_name)
        grads, loss, metrics = gradients(agent, params, minibatch, state.kl_coef, axis_name, shared, of_prompt)
        norms = {f"grad_norm/{part}": optax.tree.norm(grads[part]) for part in grads}
        finite = jnp.isfinite(loss) & jnp.all(jnp.isfinite(jnp.stack(list(norms.values()))))

        def learn(carry: tuple[Params, Any]) -> tuple[Params, Any]:
            new_params, new_opt = {}, {}
            for part, tx in optimizers.items():
                norm = norms[f"grad_norm/{part}"]
                updates, new_opt[part] = tx.update(grads[part], carry[1][part], carry[0][part], norm=norm)
                new_params[part] = optax.apply_updates(carry[0][part], updates)
            return new_params, new_opt

        metrics |= norms | {"loss": loss, "nonfinite": 1.0 - finite.astype(jnp.float32)}
        # A branch works in place; choosing between old and new numbers one by one would hold both.
        return jax.lax.cond(finite, learn, lambda carry: carry, (params, opt_state)), metrics

    (params, opt_state), history = jax.lax.scan(
        update, (state.params, state.opt_state), order.reshape(config.num_epochs * config.num_minibatches, size)
    )
    # What the sampler said is compared with what the trainer says before it has moved: later it would be no gap.
    metrics = {name: x.mean() for name, x in history.items() if not name.startswith("sampler_")}
    first = {name: x[0] for name, x in history.items()}
    metrics |= {
        f"first/{name}": first[name]
        for name in ("ratio_error", "approx_kl", "clip_fraction", "sampler_gap", "sampler_gap_max")
    }
    metrics["first/effective_sample_size"] = first["sampler_weight"] ** 2 / jnp.maximum(
        first["sampler_weight_squared"], 1e-8
    )
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
