"""Rankings as losses and utilities: every order enumerated in NumPy, choix, SciPy, optax, numbers by hand."""

import itertools
import math
from functools import partial

import choix
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize

from rlaif_jax.parallel import AXIS, make_mesh, pmap_step, shard_step
from rlaif_jax.rewards.rankings import (
    both_orders,
    bradley_terry,
    davidson,
    fit_bradley_terry,
    fit_davidson,
    fit_plackett_luce,
    listnet,
    mean_loss,
    plackett_luce,
)
from tests.rewards.everywhere import same_everywhere

pytestmark = pytest.mark.slow  # as a whole: many programs to compile

NAN = float("nan")
ITEMS, LISTS, K = 7, 160, 4

top = jax.jit(plackett_luce)
top_few = jax.jit(partial(plackett_luce, unplaced="below"))
fit_pairs = jax.jit(fit_bradley_terry, static_argnames="num_items")
fit_ties = jax.jit(fit_davidson, static_argnames="num_items")
fit_lists = jax.jit(fit_plackett_luce, static_argnames=("num_items", "unplaced"))


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


# ---- utilities


@pytest.fixture(scope="module")
def utilities():
    return np.linspace(-1.5, 1.5, ITEMS)[np.random.default_rng(3).permutation(ITEMS)]


@pytest.fixture(scope="module")
def pairs(utilities):
    """first, second, probability (0 or 1) of 300 comparisons, in float32."""
    rng = np.random.default_rng(4)
    first = rng.integers(0, ITEMS, 300)
    second = (first + rng.integers(1, ITEMS, 300)) % ITEMS
    won = rng.random(300) < 1 / (1 + np.exp(utilities[second] - utilities[first]))
    return first, second, won.astype(np.float32)


@pytest.fixture(scope="module")
def lists(utilities):
    """Items [LISTS, K] and their ranks; the last places of some lists are padding that holds any number."""
    rng = np.random.default_rng(5)
    items = np.stack([rng.permutation(ITEMS)[:K] for _ in range(LISTS)])
    noisy = utilities[items] + rng.gumbel(size=items.shape)
    ranks = np.argsort(np.argsort(-noisy, axis=1), axis=1) + 1
    mask = np.arange(K) < rng.integers(2, K + 1, (LISTS, 1))
    return np.where(mask, items, -77), ranks, mask


def won_pairs(pairs):
    return [(a, b) if won else (b, a) for a, b, won in zip(*pairs)]


def ordered(lists):
    return [sorted(i[m], key=dict(zip(i[m], r[m])).get) for i, r, m in zip(*lists)]


def test_bradley_terry_equals_choix(pairs):
    got = fit_pairs(*pairs, num_items=ITEMS, ridge=0.0)
    np.testing.assert_allclose(got, choix.ilsr_pairwise(ITEMS, won_pairs(pairs), tol=1e-10), atol=1e-5)
    assert abs(got.mean()) < 1e-6
    # choix's penalty is alpha |u|^2, ours ridge / 2 |u|^2
    expected = choix.opt_pairwise(ITEMS, won_pairs(pairs), alpha=1.5, tol=1e-10)
    np.testing.assert_allclose(fit_pairs(*pairs, num_items=ITEMS, ridge=3.0), expected, atol=1e-5)


def test_plackett_luce_equals_choix(lists):
    items, ranks, mask = lists
    got = fit_lists(items, ranks, None, mask, num_items=ITEMS, ridge=0.0)
    np.testing.assert_allclose(got, choix.ilsr_rankings(ITEMS, ordered(lists), tol=1e-10), atol=1e-5)
    expected = choix.opt_rankings(ITEMS, ordered(lists), alpha=1.5, tol=1e-10)
    np.testing.assert_allclose(
        fit_lists(items, ranks, None, mask, num_items=ITEMS, ridge=3.0), expected - expected.mean(), atol=1e-5
    )


def test_lists_of_two_fit_like_pairs(pairs):
    first, second, won = pairs
    ranks = np.stack([2 - won, 1 + won], axis=1).astype(int)
    ranks[::9] = 1
    soft = np.where(np.arange(len(won)) % 9 == 0, 0.5, won)
    got = fit_lists(np.stack([first, second], axis=1), ranks, num_items=ITEMS)
    np.testing.assert_allclose(got, fit_pairs(first, second, soft, num_items=ITEMS), atol=1e-5)


def test_the_best_of_a_list_equals_choix(lists):
    """Of each list only the best is known: Luce's choice axiom."""
    items, ranks, mask = lists
    best = np.where(ranks == np.where(mask, ranks, 9).min(1, keepdims=True), 1, 0)
    data = [(row[0], row[1:]) for row in ordered(lists)]
    got = fit_lists(items, best, None, mask, num_items=ITEMS, ridge=0.02, unplaced="below")
    np.testing.assert_allclose(got, choix.opt_top1(ITEMS, data, alpha=0.01, tol=1e-10), atol=1e-5)


def test_davidson_equals_scipy_and_finds_the_tie(utilities):
    rng = np.random.default_rng(6)
    first = rng.integers(0, ITEMS, 3000)
    second = (first + rng.integers(1, ITEMS, 3000)) % ITEMS
    half = (utilities[first] - utilities[second]) / 2
    chance = np.exp(np.stack([half, -half, np.full(3000, math.log(0.8))], 1))
    outcome = np.eye(3)[(chance.cumsum(1) / chance.sum(1, keepdims=True) < rng.random((3000, 1))).sum(1)]

    def objective(x):
        half = (x[first] - x[second]) / 2
        logits = np.stack([half, -half, np.full(3000, x[-1])], 1)
        return (np.log(np.exp(logits).sum(1)) - (outcome * logits).sum(1)).sum() + 0.5 * (x**2).sum()

    expected = minimize(objective, np.zeros(ITEMS + 1), method="BFGS", options={"gtol": 1e-4}).x
    got, log_tie = fit_ties(first, second, outcome, num_items=ITEMS, ridge=1.0)
    np.testing.assert_allclose([*got, log_tie], expected, atol=1e-4)
    assert math.exp(log_tie) == pytest.approx(0.8, rel=0.1)
    np.testing.assert_allclose(got, utilities, atol=0.2)
    # Nobody tied, everybody tied: the ridge keeps it finite.
    for each in (0, 2):
        got, log_tie = fit_ties(first, second, np.tile(np.eye(3)[each], (3000, 1)), num_items=ITEMS, ridge=1.0)
        assert np.isfinite(got).all() and abs(log_tie) > 2


def test_items_that_won_everything_or_nothing_or_never_met_stay_finite():
    first, second = np.array([0] * 40 + [1] * 40), np.array([1] * 40 + [2] * 40)
    got = fit_pairs(first, second, np.ones(80, np.float32), num_items=4, ridge=0.01)
    assert got[0] > got[1] > got[2] and np.abs(got).max() < 12
    assert abs(got[3]) < 1e-4  # the prior alone
    bare = fit_pairs(first, second, np.ones(80, np.float32), num_items=4, ridge=0.0)
    assert np.isfinite(bare).all() and bare[0] > bare[1] > bare[2]


def test_weights_count_and_soft_labels_are_shares(pairs):
    first, second, won = pairs
    twice = [np.concatenate([x, x[:50]]) for x in pairs]
    weight = np.where(np.arange(300) < 50, 2.0, 1.0)
    got = fit_pairs(first, second, won, weight, num_items=ITEMS)
    np.testing.assert_allclose(got, fit_pairs(*twice, num_items=ITEMS), atol=1e-5)
    dirty = np.concatenate([won, [NAN, 0]]).astype(np.float32), np.concatenate([weight, [0, NAN]])
    again = fit_pairs(np.append(first, [3, 3]), np.append(second, [5, 5]), *dirty, num_items=ITEMS)
    np.testing.assert_allclose(again, got, atol=1e-6)
    three_of_four = fit_pairs(np.zeros(4, int), np.ones(4, int), np.float32([1, 1, 1, 0]), num_items=2)
    share = fit_pairs(np.array([0]), np.array([1]), np.float32([0.75]), np.array([4.0]), num_items=2)
    np.testing.assert_allclose(share, three_of_four, atol=1e-6)


def test_one_list_says_more_than_one_pair(utilities):
    """Recovery from equally many judgements: lists of four against pairs, mean over ten draws."""
    rng = np.random.default_rng(7)
    items = np.stack([rng.permutation(ITEMS)[:K] for _ in range(10 * 30)]).reshape(10, 30, K)
    noisy = utilities[items] + rng.gumbel(size=items.shape)
    ranks = np.argsort(np.argsort(-noisy, axis=-1), axis=-1) + 1
    by_list = jax.vmap(partial(fit_lists, num_items=ITEMS, ridge=0.3))(items, ranks)
    better = (ranks[..., 0] < ranks[..., 1]).astype(np.float32)
    by_pair = jax.vmap(partial(fit_pairs, num_items=ITEMS, ridge=0.3))(items[..., 0], items[..., 1], better)
    error = [np.sqrt(((np.asarray(x) - utilities) ** 2).mean()) for x in (by_list, by_pair)]
    assert error[0] < 0.75 * error[1]


def test_the_fit_has_the_gradient_of_its_optimum(pairs):
    first, second, won = pairs
    soft = jnp.asarray(0.1 + 0.8 * won)
    weight = jnp.ones(300)

    def spread(p, weight, ridge):
        return fit_bradley_terry(first, second, p, weight, num_items=ITEMS, ridge=ridge) @ jnp.arange(ITEMS)

    slopes = jax.jit(jax.grad(spread, argnums=(0, 1, 2)))(soft, weight, 0.5)
    value, one = jax.jit(spread), jnp.zeros(300).at[11].set(1.0)
    numeric = [
        (value(soft + 0.3 * one, weight, 0.5) - value(soft - 0.3 * one, weight, 0.5)) / 0.6,
        (value(soft, weight + 0.3 * one, 0.5) - value(soft, weight - 0.3 * one, 0.5)) / 0.6,
        (value(soft, weight, 0.6) - value(soft, weight, 0.4)) / 0.2,
    ]
    np.testing.assert_allclose([slopes[0][11], slopes[1][11], slopes[2]], numeric, rtol=0.01, atol=1e-4)


def test_fits_under_transforms(pairs, lists):
    """The comparisons split over eight devices, by pmap and on a mesh, and several problems at once by vmap; labels and weights
    in bfloat16, which has these numbers exactly."""
    dtype = jnp.bfloat16
    first, second, won = (x[:296] for x in pairs)
    batch = {"pair": (first, second, jnp.asarray(won, dtype), jnp.ones(296, dtype))}
    items, ranks, mask = (x[:, :3] for x in lists)
    weight = jnp.asarray(np.arange(LISTS) % 3, dtype)
    batch["list"] = (items, ranks, weight, mask)

    def fit(state, batch, *, axis_name=None):
        pair = fit_bradley_terry(*batch["pair"], num_items=ITEMS, axis_name=axis_name)
        return state, (pair, fit_plackett_luce(*batch["list"], num_items=ITEMS, axis_name=axis_name))

    expected = (
        fit_pairs(first, second, won, num_items=ITEMS),
        fit_lists(items, ranks, np.arange(LISTS) % 3 * 1.0, mask, num_items=ITEMS),
    )
    state = jnp.zeros(())
    several = jax.jit(jax.vmap(fit, (None, 0)))(state, jax.tree.map(lambda x: jnp.stack([x, x]), batch))[1]
    runs = [
        pmap_step(fit, donate=False)(state, batch)[1],
        shard_step(fit, make_mesh(), donate=False)(state, batch)[1],
        jax.tree.map(lambda x: x[1], several),
    ]
    for got in runs:
        for a, b in zip(expected, got):
            assert b.dtype == jnp.float32
            np.testing.assert_allclose(b, a, atol=1e-5)


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
