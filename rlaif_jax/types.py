"""The pytrees that flow through the loop, and the legend of shape letters.

    B sequences   P prompt tokens   T response tokens   S = P + T   V vocabulary   D model width
    H heads       K answers per prompt   N devices      L layers

Masks are float32 or bool with 1 for real entries. A sequence is laid out as P left-padded prompt tokens followed by
T right-padded response tokens, so that every response starts at the same column.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Array = np.ndarray | jax.Array
Params = Any  # a plain pytree of arrays
Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class Prompts:
    """Prompts, left padded.

    Attributes:
        tokens: [B, P] int32.
        mask: [B, P] bool.
        uid: [B] uint32, the stable number of a prompt, from which the keys of its answers are derived.
    """

    tokens: jax.Array
    mask: jax.Array
    uid: jax.Array


@flax.struct.dataclass
class Rollout:
    """Answers of the behaviour policy; the K answers to one prompt are K consecutive rows.

    Attributes:
        tokens: [B, S] int32, prompt and response.
        prompt_mask: [B, P] bool.
        response_mask: [B, T] bool, true up to and including the stop token.
        logprobs: [B, T] float32, of the sampled tokens in nats, under the sampling temperature over the full
            vocabulary; 0 where masked.
        finished: [B] bool, whether the stop token came before the length limit.
    """

    tokens: jax.Array
    prompt_mask: jax.Array
    response_mask: jax.Array
    logprobs: jax.Array
    finished: jax.Array

    @property
    def responses(self) -> jax.Array:
        """Returns [B, T] int32: response tokens, pad after the end."""
        return self.tokens[:, self.prompt_mask.shape[1] :]


class Feedback(NamedTuple):
    """Judgements of B answers, at the border between host and devices.

    Attributes:
        values: [B, R] float32, R rewards of each answer.
        valid: [B, R] bool, false where a judgement is missing; a missing one is never a reward of 0.
        token_rewards: [B, T] float32 dense rewards of the response tokens, or None. Scores are normalised by the run,
            dense rewards by the source that gives them.
        pairs: [G, K, K] float32 or None: P(answer i is better than answer j) among the K answers to each prompt.
        pairs_valid: [G, K, K] bool or None, false where that verdict is missing.
    """

    values: Array
    valid: Array
    token_rewards: Array | None = None
    pairs: Array | None = None
    pairs_valid: Array | None = None

    @classmethod
    def single(cls, values: Array, valid: Array, token_rewards: Array | None = None) -> Feedback:
        """Returns the feedback of a source with one reward.

        Args:
            values: [B].
            valid: [B] bool, false where a judgement is missing.
            token_rewards: [B, T] dense rewards, or None.
        """
        return cls(values[:, None], valid[:, None], token_rewards)

    def join(self, other: Feedback) -> Feedback:
        """Returns the rewards of this feedback and of `other`, side by side as columns.

        Dense rewards are added; pairs are those of this feedback.
        """
        dense = [x for x in (self.token_rewards, other.token_rewards) if x is not None]
        return self._replace(
            values=jnp.concatenate([self.values, other.values], axis=1),
            valid=jnp.concatenate([self.valid, other.valid], axis=1),
            token_rewards=jnp.stack(dense).sum(0) if dense else None,
        )


@flax.struct.dataclass
class RewardBatch:
    """Shaped rewards of B answers: what an algorithm learns from, and what is logged.

    Attributes:
        score: [B] float32, the reward of the whole answer, which lands on its last token.
        valid: [B] bool, false where the judgement is missing: such an answer teaches nothing (it is not a reward of 0).
        token_rewards: [B, T] float32, dense rewards added where they belong.
        pairs: [G, K, K] float32 or None, P(answer i is better than answer j) among the K answers to each prompt.
        pairs_valid: [G, K, K] bool or None, false where that verdict is missing.
    """

    score: jax.Array
    valid: jax.Array
    token_rewards: jax.Array
    pairs: Array | None = None
    pairs_valid: Array | None = None

    @property
    def total(self) -> jax.Array:
        """Returns [B]: the score and all dense rewards of each answer."""
        return self.score + self.token_rewards.sum(-1)


@flax.struct.dataclass
class StepData:
    """The arrays of a step's data that an algorithm may read; the records stay on the host.

    Attributes:
        prompts: [G, P].
        demonstrations: answers to imitate, one row or more for each prompt, for inverse RL; None: the data has none.
        recorded: answers that somebody else drew, K rows for each prompt, for offline methods; their `logprobs` are 0.
            None: the policy answers.
    """

    prompts: Prompts
    demonstrations: Rollout | None = None
    recorded: Rollout | None = None


@flax.struct.dataclass
class Frozen:
    """Weights that do not learn: not donated, not in checkpoints, known by what they were loaded from.

    Attributes:
        reference: parameters of the reference policy; with a base an adapter, {} for the base alone.
        base: weights under the adapters that learn; None where the policy's own weights learn.
        rewards: one pytree of parameters for each reward that is computed on the devices (`DeviceReward`).
    """

    reference: Params = None
    base: Params = None
    rewards: tuple[Params, ...] = ()


@flax.struct.dataclass
class TrainState:
    """Everything that changes while a run learns; a resume also needs the data iterator's position.

    Attributes:
        params: a dict with the entry `policy` and, with a critic, `value`.
        opt_state: one optimiser state for each entry of `params`.
        extra: what an algorithm keeps besides (the reward normaliser, an adaptive KL coefficient, a discriminator).
        hyper: float32 scalars by name (learning rates, coefficients, clips), which a population may be vmapped over.
        step: [] int32, policy steps so far.
        seed: [] uint32.
    """

    params: Params
    opt_state: Any
    extra: dict[str, Any]
    hyper: dict[str, jax.Array]
    step: jax.Array
    seed: jax.Array

    def without_optimizer(self) -> TrainState:
        """Returns the state as rollout and scoring take it: no optimiser is sent along."""
        return self.replace(opt_state=None)  # type: ignore[attr-defined]


def step_key(seed: jax.Array | int, step: jax.Array | int, purpose: int) -> jax.Array:
    """Returns the key of (seed, step, purpose): every random number of a run comes from one of these."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), purpose)


ROLLOUT, PERMUTATION, EVALUATION, INIT, FEEDBACK, SAMPLES, CLIP_COV = range(7)  # the purposes of `step_key`
