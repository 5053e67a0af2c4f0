"""Losses on rankings: every order enumerated in NumPy, SciPy, optax, numbers by hand."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlaif_jax.parallel import AXIS, make_mesh, pmap_step, shard_step
from rlaif_jax.rewards.rankings import (
    both_orders,
    bradley_terry,
    davidson,
    listnet,
    mean_loss,
    plackett_luce,
)
from tests.rewards.everywhere import same_everywhere

pytestmark = pytest.mark.slow  # as a whole: many programs to compile

NAN = float("nan")

top = jax.jit(plackett_luce)
top_few = jax.jit(partial(plackett_luce, unplaced="below"))


def loss_of_order(scores, order):
    """-log P(order) in float64: each choice among those that are left."""
    scores = np.asarray(scores, np.float64)[list(order)]
    return sum(np.log(np.exp(scores[i:]).sum()) - scores[i] for i in range(len(order)))


def mean_over_orders(scores, ranks):
    """Mean loss over all orders in which ties could stand; items of rank 0 left out."""
    placed = [i for i, rank in enumerate(ranks) if rank > 0]
    orders = [o for o in itertools.permutations(placed) if all(ranks[a] <= ranks[b] for a, b in itertools.pairwise(o))]
    return np.mean([loss_of_order(scores, order) for order in orders])


def scores_of(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ---- pairs


def test_soft_labels_by_hand():
    first, second = jnp.array([1.0, 0.0, 2.0, -1.0]), jnp.array([0.0, 1.0, 2.0, 2.0])
    p = jnp.array([1.0, 1.0, 0.3, 0.8])
    # softplus(-1), softplus(1), log 2 whatever the label, .8 softplus(3) + .2 softplus(-3)
    np.testing.assert_allclose(
        bradley_terry(first, second, p), [0.31326169, 1.31326169, 0.69314718, 2.44858735], rtol=1e-6
    )


def test_the_optimum_is_the_label():
    slope = jax.vmap(jax.grad(lambda m, p: bradley_terry(m, 0.0, p)))
    p = jnp.array([0.1, 0.5, 0.9])
    np.testing.assert_allclose(slope(jnp.log(p / (1 - p)), p), 0, atol=1e-6)
    np.testing.assert_allclose(slope(jnp.array([200.0, -200.0]), jnp.array([0.25, 0.25])), [0.75, -0.25])


def test_both_orders_of_a_pair_cost_the_same():
    a, b, p = jnp.array([0.3]), jnp.array([-1.2]), jnp.array([0.7])
    np.testing.assert_allclose(bradley_terry(a, b, p), bradley_terry(b, a, 1 - p), rtol=1e-6)


def test_davidson_by_hand():
    # nu = 2, e^s1 = 4, e^s2 = 1: 4 : 1 : 2 sqrt(4) of 9
    first, second, log_nu = jnp.float32(math.log(4)), jnp.float32(0.0), math.log(2)
    cost = jax.vmap(lambda outcome: davidson(first, second, outcome, log_nu))(jnp.eye(3))
    np.testing.assert_allclose(np.exp(-cost), [4 / 9, 1 / 9, 4 / 9], rtol=1e-6)
    np.testing.assert_allclose(
        davidson(first, second, jnp.array([0.5, 0.25, 0.25]), log_nu), cost @ np.array([0.5, 0.25, 0.25])
    )


def test_davidson_without_ties_is_bradley_terry():
    first, second, p = scores_of(3, 20)
    p = 1 / (1 + np.exp(-p))
    outcome = np.stack([p, 1 - p, 0 * p], axis=-1)
    np.testing.assert_allclose(davidson(first, second, outcome, -60.0), bradley_terry(first, second, p), rtol=1e-5)


# ---- lists


def test_plackett_luce_is_the_product_of_choices():
    scores = scores_of(24, 4)
    orders = list(itertools.permutations(range(4)))
    ranks = np.argsort(orders, axis=1) + 1
    np.testing.assert_allclose(top(scores, ranks), list(map(loss_of_order, scores, orders)), rtol=2e-5)


def test_all_orders_together_are_certain():
    orders = np.array(list(itertools.permutations(range(1, 5))))
    np.testing.assert_allclose(np.exp(-top(np.tile(scores_of(4), (24, 1)), orders)).sum(), 1, rtol=1e-5)


def test_two_items_are_bradley_terry():
    scores = scores_of(30, 2)
    for ranks, p in (([1, 2], 1.0), ([2, 1], 0.0), ([1, 1], 0.5), ([3, 3], 0.5), ([1, 9], 1.0)):
        got = top(scores, np.tile(ranks, (30, 1)))
        np.testing.assert_allclose(got, bradley_terry(*scores.T, jnp.full(30, p)), rtol=1e-5, atol=1e-6)


def test_ties_of_two_and_three_are_the_mean_over_orders():
    ranks = [r for r in itertools.product(range(5), repeat=4) if max(map(r.count, {1, 2, 3, 4})) <= 3 and max(r) > 0]
    scores = 2 * scores_of(len(ranks), 4)
    np.testing.assert_allclose(
        top(scores, np.array(ranks)), list(map(mean_over_orders, scores, ranks)), rtol=1e-4, atol=2e-5
    )


def test_longer_ties_are_bounded_from_above():
    """Four and five tied, above one more: the middle choices take the log of the mean (Efron)."""
    for count in (4, 5):
        scores, ranks = scores_of(count + 1, seed=count), [1] * count + [2]
        strength = np.exp(scores.astype(np.float64))
        exact = mean_over_orders(scores, ranks)
        # Replace the middle choices (2 .. count - 2 tied left) of the mean by Efron's.
        expected = exact
        for left in range(2, count - 1):
            among = [
                strength[count] + strength[list(rest)].sum() for rest in itertools.combinations(range(count), left)
            ]
            expected += np.log(np.mean(among)) - np.mean(np.log(among))
        got = float(top(scores, np.array(ranks)))
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        assert exact < got < exact + 0.2


def test_tied_answers_are_drawn_together():
    slope = jax.jit(jax.grad(lambda s: plackett_luce(s, jnp.array([1, 1, 1, 1, 1]))))
    np.testing.assert_allclose(slope(jnp.full(5, 0.7)), 0, atol=1e-6)
    pull = slope(jnp.array([1.0, 0.5, 0.0, -0.5, -1.0]))
    assert pull[0] > pull[1] > 0 > pull[3] > pull[4]


def test_an_unplaced_answer_takes_no_part():
    scores, ranks = scores_of(5), jnp.array([2, 0, 1, 0, 3])
    np.testing.assert_allclose(top(scores, ranks), top(scores[[0, 2, 4]], ranks[jnp.array([0, 2, 4])]), rtol=1e-6)
    slope = jax.jit(jax.grad(plackett_luce))(jnp.asarray(scores), ranks)
    np.testing.assert_array_equal(slope[jnp.array([1, 3])], 0)
    for nothing in ([0, 0, 0, 0, 0], [0, 3, 0, 0, 0]):
        assert top(scores, jnp.array(nothing)) == pytest.approx(0, abs=1e-6)


def test_answers_below_the_placed_are_in_no_order():
    """The chance of the best two is that of all the orders which begin with them."""
    scores, ranks = scores_of(5), jnp.array([2, 0, 1, 0, 0])
    orders = [o for o in itertools.permutations(range(5)) if o[:2] == (2, 0)]
    expected = -np.log(sum(np.exp(-loss_of_order(scores, order)) for order in orders))
    np.testing.assert_allclose(top_few(scores, ranks), expected, rtol=1e-5)
    there = jnp.array([1, 1, 1, 0, 0], bool)  # padding is not below anything
    np.testing.assert_allclose(top_few(scores, ranks, there), loss_of_order(scores[[0, 1, 2]], (2, 0, 1)), rtol=1e-5)


@pytest.mark.parametrize("ranks", [[1, 2, 3, 4, 5], [1, 1, 2, 0, 2], [1, 1, 1, 1, 2]])
def test_the_gradient_is_that_of_finite_differences(ranks):
    scores, ranks = scores_of(5), jnp.array(ranks)
    slope = jax.jit(jax.grad(plackett_luce))(jnp.asarray(scores), ranks)
    step = 0.05 * np.eye(5, dtype=np.float32)
    numeric = (top(scores + step, jnp.tile(ranks, (5, 1))) - top(scores - step, jnp.tile(ranks, (5, 1)))) / 0.1
    np.testing.assert_allclose(slope, numeric, atol=1e-3)
    np.testing.assert_allclose(slope.sum(), 0, atol=1e-6)


def test_extreme_scores_stay_finite():
    scores, ranks = jnp.array([[1e4, -1e4, 0.0]] * 2), jnp.array([[3, 1, 1], [1, 1, 1]])
    value, slope = jax.jit(jax.value_and_grad(lambda s: plackett_luce(s, ranks).sum()))(scores)
    assert np.isfinite(value) and np.isfinite(slope).all()


def test_listnet_equals_optax():
    scores, relevance = scores_of(2, 6, 5)
    mask = np.random.default_rng(1).random((6, 5)) < 0.7
    mask[0], mask[1] = True, [True, False, False, False, False]
    target = np.where(mask, np.exp(relevance), 0)
    target /= target.sum(-1, keepdims=True)
    expected = optax.losses.ranking_softmax_loss(
        jnp.asarray(scores), jnp.asarray(target, jnp.float32), where=jnp.asarray(mask), reduce_fn=None
    )
    np.testing.assert_allclose(listnet(scores, np.where(mask, relevance, NAN), mask), expected, rtol=1e-5, atol=1e-6)
    assert not np.any(listnet(scores, relevance, np.zeros((6, 5), bool)))
    slope = jax.grad(lambda s: listnet(s, relevance).sum())(jnp.asarray(relevance))
    np.testing.assert_allclose(slope, 0, atol=1e-6)  # the best scores are the relevances


# ---- masks, weights, devices, dtypes


def losses(scores, batch):
    """[4, B]: the four losses of B rows, all rows of weight 0 masked."""
    seen, ranks = batch["weight"] > 0, batch["ranks"]
    there = seen[:, None] & (jnp.arange(5) < 5 - ranks[:, :1])
    return jnp.stack(
        [
            bradley_terry(scores[:, 0], scores[:, 1], batch["p"], seen),
            davidson(
                scores[:, 0],
                scores[:, 1],
                jnp.stack([batch["p"], 0.5 - batch["p"], 0.5 + 0 * batch["p"]], -1),
                0.3,
                seen,
            ),
            plackett_luce(scores, ranks, there),
            listnet(scores, -ranks.astype(scores.dtype), there),
        ]
    )


def loss_and_slope(shift, batch, *, axis_name=None):
    """(mean loss of each kind [4], the gradient of their sum with respect to a shift of the scores of each [4, 5])."""

    def mean(shift):
        rows = [losses(batch["scores"] + one.astype(batch["scores"].dtype), batch)[i] for i, one in enumerate(shift)]
        means = jnp.stack([mean_loss(row, batch["weight"], axis_name) for row in rows])
        return means.sum(), means

    slope, value = jax.grad(mean, has_aux=True)(shift)
    total = (lambda x: x) if axis_name is None else partial(jax.lax.psum, axis_name=axis_name)
    return total(value), total(slope)


def batch_of(rows=32, dtype=jnp.float32):
    rng = np.random.default_rng(2)
    batch = {
        "scores": jnp.asarray(rng.normal(size=(rows, 5)), dtype),
        "ranks": jnp.asarray(rng.integers(0, 4, (rows, 5))),
        "p": jnp.asarray(rng.random(rows) / 2, dtype),
        "weight": jnp.asarray(rng.random(rows) * (rng.random(rows) < 0.7), jnp.float32),
    }
    missing = batch["weight"] == 0
    batch["scores"] = jnp.where(missing[:, None], jnp.asarray(NAN, dtype), batch["scores"])
    batch["p"] = jnp.where(missing, jnp.asarray(NAN, dtype), batch["p"])
    return batch


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_losses_under_transforms(dtype):
    """Unequal weights over the devices: the mean is that of all rows; rows of weight 0 hold NaN and change nothing."""
    batch, shift = batch_of(dtype=dtype), jnp.zeros((4, 5))
    seen = np.flatnonzero(batch["weight"])
    value, slope = jax.jit(loss_and_slope)(shift, jax.tree.map(lambda x: x[seen], batch))
    assert value.dtype == slope.dtype == jnp.float32
    assert np.isfinite(slope).all() and (np.abs(slope).max(-1) > 0.01).all()
    runs = [
        jax.jit(loss_and_slope)(shift, batch),
        pmap_step(loss_and_slope, donate=False)(shift, batch),
        shard_step(loss_and_slope, make_mesh(), donate=False)(shift, batch),
        jax.jit(jax.vmap(partial(loss_and_slope, axis_name=AXIS), (None, 0), out_axes=None, axis_name=AXIS))(
            shift, jax.tree.map(lambda x: x.reshape(4, 8, *x.shape[1:]), batch)
        ),
    ]
    # In bfloat16 the gradient of each row is rounded before the rows are added up, in another order by each.
    tolerance = 1e-5 if dtype == jnp.float32 else 0.02
    for other in runs:
        np.testing.assert_allclose(other[0], value, rtol=1e-5)
        np.testing.assert_allclose(other[1], slope, rtol=tolerance, atol=tolerance / 10)


def test_without_weight_the_mean_is_zero():
    assert mean_loss(jnp.array([NAN, 3.0]), jnp.zeros(2)) == 0


# ---- both orders


@pytest.mark.parametrize("bias", [0.0, 0.7, -2.0])
def test_a_bias_for_a_position_cancels_in_both_orders(bias):
    rng = np.random.default_rng(0)
    margin = rng.normal(0, 1.5, (8, 5))
    forward, swapped = 1 / (1 + np.exp(-(margin + bias))), 1 / (1 + np.exp(-(bias - margin)))
    better, found = same_everywhere(both_orders, forward, swapped, atol=1e-5)
    np.testing.assert_allclose(better, 1 / (1 + np.exp(-margin)), atol=1e-5)
    np.testing.assert_allclose(found, bias, atol=1e-4)
    shift = 0.1 * np.sign(bias)
    truth = rng.uniform(0.2, 0.8, (8, 5))
    better, _ = same_everywhere(partial(both_orders, how="mean"), truth + shift, 1 - truth + shift, atol=1e-5)
    np.testing.assert_allclose(better, truth, atol=1e-6)


def test_both_orders_of_a_certain_judge_stay_finite():
    better, bias = both_orders(jnp.array([1.0, 0.0, 1.0]), jnp.array([0.0, 1.0, 1.0]))
    np.testing.assert_allclose(better, [1, 0, 0.5], atol=1e-5)
    assert np.all(np.isfinite(bias))
