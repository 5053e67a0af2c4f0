"""The pytrees that flow through the loop, and the legend of shape letters.

    B sequences   P prompt tokens   T response tokens   S = P + T   V vocabulary   D model width
    H heads       K answers per prompt   N devices      L layers

Masks are float32 or bool with 1 for real entries. A sequence is laid out as P left-padded prompt tokens followed by
T right-padded response tokens, so that every response starts at the same column.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax

Params = Any  # a plain pytree of arrays
Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class Prompts:
    """Prompts, left padded.

    tokens [B, P] int32; mask [B, P] bool; uid [B] uint32, the stable number of a prompt from which the keys of its
    answers are derived.
    """

    tokens: jax.Array
    mask: jax.Array
    uid: jax.Array


@flax.struct.dataclass
class Rollout:
    """Answers of the behaviour policy.

    tokens [B, S] int32, prompt and response; prompt_mask [B, P] bool; response_mask [B, T] bool, true up to and with
    the stop token; logprobs [B, T] float32, of the sampled tokens under the sampling temperature over the full
    vocabulary, in nats, 0 where masked; finished [B] bool, whether the stop token came before the length limit. The K
    answers of one prompt are K rows in a row.
    """

    tokens: jax.Array
    prompt_mask: jax.Array
    response_mask: jax.Array
    logprobs: jax.Array
    finished: jax.Array

    @property
    def responses(self) -> jax.Array:
        """[B, T] int32 response tokens, pad after the end."""
        return self.tokens[:, self.prompt_mask.shape[1] :]


@flax.struct.dataclass
class RewardBatch:
    """What feedback was worth.

    score [B] float32, lands on the last response token; valid [B] bool, false where no judgement could be had (such a
    sequence teaches nothing: it is not a reward of zero); token_rewards [B, T] float32, dense rewards added where they
    belong.
    """

    score: jax.Array
    valid: jax.Array
    token_rewards: jax.Array


@flax.struct.dataclass
class Experience:
    """All that an update of the policy reads. Letters as in `Rollout`; everything float32 but tokens and masks.

    mask [B, T] is the response mask with invalid sequences taken out.
    """

    tokens: jax.Array
    prompt_mask: jax.Array
    response_mask: jax.Array
    mask: jax.Array
    logprobs: jax.Array
    sampler_logprobs: jax.Array
    ref_logprobs: jax.Array
    values: jax.Array
    advantages: jax.Array
    returns: jax.Array


@flax.struct.dataclass
class TrainState:
    """Everything that changes while a run learns; with the data iterator it is all that a resume needs.

    params and opt_state are dicts with the entry `policy` and, with a critic, `value`; kl_coef [] float32; step []
    int32 counts policy steps; seed [] uint32.
    """

    params: Params
    opt_state: Any
    kl_coef: jax.Array
    step: jax.Array
    seed: jax.Array


def step_key(seed: jax.Array | int, step: jax.Array | int, purpose: int) -> jax.Array:
    """The key of (seed, step, purpose): every random number of a run comes from one of these."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), purpose)


ROLLOUT, PERMUTATION, EVALUATION, INIT, FEEDBACK = range(5)  # the purposes of `step_key`
