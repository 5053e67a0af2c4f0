"""The compiled functions of a step: what is learned from are the groups with spread, their advantages are those of all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.algorithms.advantages import GroupNormalised
from rlaif_jax.programs import programs
from rlaif_jax.types import Feedback, Frozen, Prompts, Rollout, StepData
from tests.builders import GROUP, LENGTH, PROMPT, TOKENIZER, ppo

DRAWN, K = 8, GROUP["answers_per_prompt"]
JUDGED = {2: [1, 0, 0, 1], 5: [0, 0, 1, 0], 6: [2, 1, np.nan, 0], 7: [np.nan, np.nan, 5, 5], 3: [np.nan] * 3 + [9]}


@pytest.mark.parametrize("packed_rows", [0, 2])
def test_a_step_learns_from_groups_with_spread_and_gives_back_the_rewards_of_all(packed_rows):
    setup = ppo(advantage=GroupNormalised(), packed_rows=packed_rows, **GROUP)
    rng = np.random.default_rng(0)
    rows = DRAWN * K
    lengths = rng.integers(1, LENGTH + 1, rows)
    mask = jnp.asarray(np.arange(LENGTH) < lengths[:, None])
    tokens = jnp.asarray(rng.integers(TOKENIZER.vocab_size - 8, TOKENIZER.vocab_size, (rows, PROMPT + LENGTH)))
    prompts = Prompts(tokens[::K, :PROMPT], jnp.ones((DRAWN, PROMPT), bool), jnp.arange(DRAWN, dtype=jnp.uint32))
    rollout = Rollout(
        tokens.astype(jnp.int32), jnp.ones((rows, PROMPT), bool), mask, jnp.where(mask, -1.0, 0), lengths < LENGTH
    )
    values = np.array([JUDGED.get(group, [1] * K) for group in range(DRAWN)], np.float32).ravel()
    judged = Feedback.single(jnp.asarray(values), jnp.isfinite(values))
    state = setup.algorithm.init(setup.params, np.uint32(0)).without_optimizer()
    frozen = Frozen(setup.params["policy"])

    def prepared(oversample):
        prepare = programs(setup.algorithm, setup.policy, oversample=oversample).prepare
        return jax.jit(prepare)((state, frozen), (StepData(prompts), rollout, judged))

    every, rewards, seen = prepared(1)
    batch, all_rewards, all_seen = prepared(2)
    kept = np.concatenate([np.arange(K * group, K * group + K) for group in (2, 5, 6, 0)])
    jax.tree.map(np.testing.assert_array_equal, (all_rewards, all_seen), (rewards, seen))
    for found, whole in zip(jax.tree.leaves(batch), jax.tree.leaves(every), strict=True):
        np.testing.assert_allclose(found, whole[kept], rtol=1e-5, atol=1e-6)
    advantages = np.asarray(batch.fields.advantages)
    assert (np.abs(advantages).max(-1) > 0)[: 2 * K].all()
    assert (advantages[-K:] == 0).all(), "a group that fills up teaches nothing"
