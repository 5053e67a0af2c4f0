"""Which groups a step learns from: against NumPy, on every layout of devices; a missing reward has no spread."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlaif_jax.config import UserError
from rlaif_jax.parallel import JitRunner, PmapRunner, ShardRunner, make_mesh
from rlaif_jax.rewards.shaping import Normaliser, Shaping, shaped_rewards
from rlaif_jax.rewards.spread import check_oversample, group_spread, keep_groups, spread_first
from rlaif_jax.types import Feedback, RewardBatch, Rollout

K, GROUPS, T = 3, 32, 4


def rewards(score, valid=None, dense=None, **pairs):
    score = jnp.asarray(score, jnp.float32)
    valid = jnp.ones(score.shape, bool) if valid is None else jnp.asarray(valid)
    return RewardBatch(score, valid, jnp.zeros((len(score), T)) if dense is None else dense, **pairs)


def plain_spread(total, valid):
    """The rule in plain Python: two known rewards that differ."""
    groups = zip(total.reshape(-1, K).tolist(), valid.reshape(-1, K).tolist())
    return [len({x for x, known in zip(xs, knowns) if known}) > 1 for xs, knowns in groups]


def random_rewards(seed, groups=GROUPS):
    """Rewards of few levels, so that many groups have equal ones, with missing ones of any value."""
    rng = np.random.default_rng(seed)
    score = rng.integers(0, 2, groups * K).astype(np.float32)
    valid = rng.random(groups * K) < 0.7
    score[~valid] = rng.choice([np.nan, np.inf, -7.0], (~valid).sum())
    return score, valid


def test_hand_numbers():
    score = [1, 1, 1, 0, 1, 1, 0.5, np.nan, 0.5, 2, np.nan, 3, 4, 9, 9]
    valid = [1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 1, 1, 0, 0]
    found = group_spread(rewards(score, np.array(valid, bool)), K)
    assert found.tolist() == [False, True, False, True, False]
    assert spread_first(found, 2).tolist() == [1, 3]
    assert spread_first(found, 4).tolist() == [1, 3, 0, 2], "others fill up, in their order"


def test_dense_rewards_are_a_part_of_the_whole_reward():
    dense = jnp.zeros((6, T)).at[1, 2].set(0.5)
    assert group_spread(rewards([0.0] * 6, dense=dense), K).tolist() == [True, False]
    # 1 + .5 of dense rewards is what the others have.
    assert group_spread(rewards([1.5, 1.0, 1.5, 0, 0, 0], dense=dense), K).tolist() == [False, False]


def test_verdicts_on_pairs_other_than_ties_are_a_spread():
    tie = np.full((4, K, K), 0.5, np.float32)
    tie[1, 0, 2] = tie[2, 0, 2] = 0.9
    tie[3, 1, 1] = 0.0  # nobody is compared with itself
    valid = np.ones(tie.shape, bool)
    valid[2, 0, 2] = False
    found = group_spread(rewards([0.0] * 12, pairs=tie, pairs_valid=valid), K)
    assert found.tolist() == [False, True, False, False]
    assert group_spread(rewards([0.0] * 12, pairs=tie), K).tolist() == [False, True, True, False]


def test_the_weighted_sum_of_several_rewards_counts_and_a_penalty_does():
    """Two rewards that differ but cancel in the sum have no spread; an answer cut by the limit makes one."""
    values = jnp.array([[1.0, 0.5], [0.0, 1.0], [2.0, 0.0], [1, 0], [1, 0], [1, 0], [1, 0], [1, 0], [1, 0]])
    valid = jnp.ones(values.shape, bool)
    mask = jnp.ones((9, T), bool)
    finished = jnp.ones(9, bool).at[7].set(False)
    rollout = Rollout(jnp.zeros((9, T), jnp.int32), mask[:, :0], mask, jnp.zeros((9, T)), finished)
    scale = Normaliser(jnp.zeros(2), jnp.ones(2))
    found = shaped_rewards(Shaping((1.0, 2.0), missing_eos="penalty"), scale, Feedback(values, valid), rollout)
    assert group_spread(found, K).tolist() == [False, False, True]
    unequal = shaped_rewards(Shaping((1.0, 1.0)), scale, Feedback(values, valid), rollout)
    assert group_spread(unequal, K).tolist() == [True, False, False]


def layouts():
    return {
        "one device": JitRunner(),
        "pmap 8": PmapRunner(),
        "mesh 8x1x1": ShardRunner(make_mesh(8, 1, 1)),
        "mesh 2x4x1": ShardRunner(make_mesh(2, 4, 1)),
        "mesh 2x2x2": ShardRunner(make_mesh(2, 2, 2)),
    }


def keep(replicated, inputs, *, axis_name=None, oversample):
    del replicated
    rewards, tree = inputs
    return keep_groups(tree, group_spread(rewards, K), oversample, axis_name)


@pytest.mark.parametrize("oversample", [2, 4])
@pytest.mark.parametrize("layout", layouts())
def test_the_same_groups_are_kept_on_every_layout(layout, oversample):
    """Numbers with the places of prompts, answers and pairs show which rows are kept, and in which order."""
    score, valid = random_rewards(oversample)
    spread = plain_spread(score, valid)
    assert 0 < sum(spread) < GROUPS
    count = GROUPS // oversample
    groups = [*np.flatnonzero(spread), *np.flatnonzero(~np.array(spread))][:count]
    rows = [K * g + k for g in groups for k in range(K)]
    tree = {
        "prompts": np.arange(GROUPS * 2).reshape(GROUPS, 2),
        "uid": np.arange(GROUPS, dtype=np.uint32),
        "answers": np.arange(GROUPS * K * T).reshape(GROUPS * K, T),
        "score": score,
        "pairs": np.arange(GROUPS * K * K).reshape(GROUPS, K, K),
    }
    run = layouts()[layout].map(partial(keep, oversample=oversample))
    found = run(None, (rewards(score, valid), jax.tree.map(jnp.asarray, tree)))
    for name, x in tree.items():
        np.testing.assert_array_equal(found[name], x[rows if len(x) > GROUPS else groups], err_msg=name)


def test_under_vmap_and_with_a_gradient_through_what_is_kept():
    score, valid = zip(*(random_rewards(seed) for seed in range(5)))
    kept = lambda s, v: keep_groups(s, group_spread(rewards(s, v), K), 2)
    found = jax.jit(jax.vmap(kept))(jnp.stack(score), jnp.stack(valid))
    for row, s, v in zip(found, score, valid):
        np.testing.assert_array_equal(row, kept(jnp.asarray(s), jnp.asarray(v)))
    spread = np.array([False, True, True, False])
    slope = jax.grad(lambda x: keep_groups(x, jnp.asarray(spread), 2).sum())(jnp.arange(12.0))
    np.testing.assert_array_equal(slope, spread.repeat(K).astype(np.float32))


def test_arrays_split_over_devices_need_no_runner():
    score, valid = random_rewards(9)
    sharding = NamedSharding(make_mesh(), PartitionSpec("data"))
    put = lambda x: jax.device_put(jnp.asarray(x), sharding)
    found = jax.jit(lambda s, v: keep_groups((s, v), group_spread(rewards(s, v), K), 4))(put(score), put(valid))
    expected = keep_groups((score, valid), group_spread(rewards(score, valid), K), 4)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("answers, message", [(0, "answers are recorded"), (1, "each prompt gets one answer")])
def test_what_has_no_groups_is_refused(answers, message):
    check_oversample(1, answers)
    check_oversample(4, 2)
    with pytest.raises(UserError, match=f"train.oversample is 2.*{message}.*draw 2 or more"):
        check_oversample(2, answers)
