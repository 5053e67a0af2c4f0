"""Learning from comparisons and rankings: NumPy in float64, and tasks that can be learned."""

import functools

import jax
import numpy as np
import optax
import pytest

from rlaif_jax.algorithms.optimizer import OptimizerConfig, make_optimizer
from rlaif_jax.algorithms.reward_modeling import members_step, ranking_step, reward_step
from rlaif_jax.models import ScalarModel
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.parallel import make_mesh, pmap_step, shard_step
from tests.helpers import random_params

V, S, B = 9, 6, 8
MODEL = ScalarModel(small_decoder(V, num_layers=1, width=16, num_heads=2, context_length=16), "normal")
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2, schedule="constant"), 1)


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL, seed=4, scale=0.2)


@pytest.fixture(scope="module")
def step():
    return jax.jit(functools.partial(reward_step, MODEL, OPTIMIZER))


def side(rng, tokens, lengths, pad_side):
    """Sequences padded with junk on one side; `tokens` [n, S] are read from their start."""
    arrays, mask = rng.integers(0, V, (len(tokens), S)).astype(np.int32), np.zeros((len(tokens), S), bool)
    for row, length in enumerate(lengths):
        where = slice(0, length) if pad_side == "right" else slice(S - length, S)
        arrays[row, where], mask[row, where] = tokens[row, :length], True
    return arrays, mask


def make_batch(rng, pad_side="left", count=B, junk=0):
    """Pairs; the one with more of token 5 is better, with a certainty that grows with the difference."""
    tokens = rng.integers(1, V, (2, count, S))
    lengths = rng.integers(2, S + 1, (2, count))
    fives = ((tokens == 5) & (np.arange(S) < lengths[..., None])).sum(-1)
    batch = {
        "probability": (1 / (1 + np.exp(-2.0 * (fives[0] - fives[1])))).astype(np.float32),
        "weight": np.ones(count, np.float32),
    }
    filler = np.random.default_rng(junk)
    for i in (0, 1):
        batch[f"tokens{i + 1}"], batch[f"mask{i + 1}"] = side(filler, tokens[i], lengths[i], pad_side)
    return batch


def numpy_metrics(params, batch):
    scores = []
    for i in (1, 2):
        per_token = np.asarray(jax.jit(MODEL)(params, batch[f"tokens{i}"], batch[f"mask{i}"]), np.float64)
        scores.append(per_token[np.arange(len(per_token)), [np.flatnonzero(m)[-1] for m in batch[f"mask{i}"]]])
    margin, p, w = scores[0] - scores[1], batch["probability"].astype(np.float64), batch["weight"]
    kept = w > 0
    each = p * np.log1p(np.exp(-margin)) + (1 - p) * np.log1p(np.exp(margin))
    decided = kept & (p != 0.5)
    return (each * w)[kept].sum() / w[kept].sum(), ((margin > 0) == (p > 0.5))[decided].mean()


@pytest.mark.parametrize("pad_side", ["left", "right"])
def test_the_reward_is_read_at_the_last_real_token(params, step, pad_side):
    batch = make_batch(np.random.default_rng(0), pad_side)
    batch["weight"] = np.float32([1, 0.5, 2, 0, 1, 1, 0, 1])
    batch["probability"][[0, 3]] = 0.5
    _, metrics = step((params, OPTIMIZER.init(params)), batch)
    loss, accuracy = numpy_metrics(params, batch)
    np.testing.assert_allclose([metrics["loss"], metrics["accuracy"]], [loss, accuracy], rtol=1e-5)
    assert 0 < accuracy < 1


def test_padding_on_either_side_teaches_the_same(params, step):
    states = [
        step((params, OPTIMIZER.init(params)), make_batch(np.random.default_rng(0), pad_side, junk=junk))
        for pad_side, junk in (("left", 1), ("right", 2))
    ]
    np.testing.assert_allclose(states[0][1]["loss"], states[1][1]["loss"], rtol=1e-5)
    np.testing.assert_allclose(states[0][1]["accuracy"], states[1][1]["accuracy"])


def test_a_missing_judgement_teaches_nothing(params, step):
    batch = make_batch(np.random.default_rng(0))
    batch["weight"][[2, 5]] = 0
    clean, _ = step((params, OPTIMIZER.init(params)), batch)
    other = {name: x.copy() for name, x in batch.items()}
    other["probability"][[2, 5]] = [np.nan, 1e6]
    other["tokens1"][[2, 5]] = 3
    dirty, metrics = step((params, OPTIMIZER.init(params)), other)
    assert np.isfinite(metrics["loss"])
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty)):
        np.testing.assert_array_equal(a, b)
    none = batch | {"weight": np.zeros(B, np.float32)}
    (still, _), metrics = step((params, OPTIMIZER.init(params)), none)
    assert metrics["loss"] == metrics["accuracy"] == 0
    for a, b in zip(jax.tree.leaves(still), jax.tree.leaves(params)):
        np.testing.assert_array_equal(a, b)


def test_it_learns_what_separates_the_pairs(params, step):
    rng = np.random.default_rng(1)
    state, accuracies = (params, OPTIMIZER.init(params)), []
    for _ in range(60):
        state, metrics = step(state, make_batch(rng, count=64))
        accuracies.append(float(metrics["accuracy"]))
    assert np.mean(accuracies[:3]) < 0.75
    assert np.mean(accuracies[-5:]) > 0.9, accuracies


def numpy_scores(params, batch):
    """Scores (first, second) of a batch's pairs, at the last real tokens."""
    found = []
    for i in (1, 2):
        per_token = np.asarray(jax.jit(MODEL)(params, batch[f"tokens{i}"], batch[f"mask{i}"]), np.float64)
        found.append(per_token[np.arange(len(per_token)), [np.flatnonzero(m)[-1] for m in batch[f"mask{i}"]]])
    return found


def test_margin_and_centring_are_those_of_llama_2_and_trl(params):
    """TRL's RewardTrainer: -logsigmoid(chosen - rejected - margin).mean() + c * mean((chosen + rejected)^2)."""
    batch = make_batch(np.random.default_rng(0))
    batch["probability"] = np.float32([1, 0, 1, 0, 1, 0, 1, 1])
    batch["margin"] = np.float32([0, 0, 1, 3, 0.5, 1 / 3, 2, 0])
    centred = jax.jit(functools.partial(reward_step, MODEL, OPTIMIZER, center_coef=0.3))
    (new, _), metrics = centred((params, OPTIMIZER.init(params)), batch)
    first, second = numpy_scores(params, batch)
    chosen = np.where(batch["probability"] == 1, first, second)
    rejected = first + second - chosen
    losses = np.log1p(np.exp(-(chosen - rejected - batch["margin"].astype(np.float64))))
    np.testing.assert_allclose(metrics["loss"], losses.mean() + 0.3 * ((chosen + rejected) ** 2).mean(), rtol=1e-5)
    assert not np.allclose(new["head"]["scalar"]["kernel"], params["head"]["scalar"]["kernel"])


def test_a_missing_judgement_has_no_margin_and_no_centre(params):
    batch = make_batch(np.random.default_rng(0)) | {"margin": np.zeros(B, np.float32)}
    batch["weight"][3] = 0
    centred = jax.jit(functools.partial(reward_step, MODEL, OPTIMIZER, center_coef=0.3))
    clean, _ = centred((params, OPTIMIZER.init(params)), batch)
    batch["margin"], batch["tokens1"] = batch["margin"].copy(), batch["tokens1"].copy()
    batch["margin"][3], batch["tokens1"][3] = np.nan, 3
    dirty, _ = centred((params, OPTIMIZER.init(params)), batch)
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty)):
        np.testing.assert_array_equal(a, b)


def test_members_learn_what_each_would_learn_alone():
    """Three models of other weights and batches in one program, on one device and on eight."""
    members = [random_params(MODEL, seed=k, scale=0.2) for k in range(3)]
    batches = [make_batch(np.random.default_rng(k), count=16) for k in range(3)]
    tx = optax.sgd(0.1)
    alone = [jax.jit(functools.partial(reward_step, MODEL, tx))((p, tx.init(p)), b) for p, b in zip(members, batches)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *members)
    together = {name: np.stack([batch[name] for batch in batches], axis=1) for name in batches[0]}
    step = functools.partial(members_step, reward_step, MODEL, tx)
    state = stacked, jax.vmap(tx.init)(stacked)
    for run in (jax.jit(step), pmap_step(step, donate=False), shard_step(step, make_mesh(2, 2, 2), donate=False)):
        (params, _), metrics = run(state, together)
        for k, ((expected, _), own) in enumerate(alone):
            np.testing.assert_allclose(metrics[f"member_{k}/loss"], own["loss"], rtol=1e-5)
            np.testing.assert_allclose(metrics[f"member_{k}/accuracy"], own["accuracy"], rtol=1e-6)
            for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected)):
                np.testing.assert_allclose(a[k], b, atol=1e-6)
        np.testing.assert_allclose(metrics["loss"], np.mean([own["loss"] for _, own in alone]), rtol=1e-5)


def test_one_member_is_the_step_itself(params, step):
    batch = make_batch(np.random.default_rng(2))
    state = params, OPTIMIZER.init(params)
    expected, metrics = step(state, batch)
    lone = jax.jit(functools.partial(members_step, reward_step, MODEL, OPTIMIZER))
    got, own = lone(jax.tree.map(lambda x: x[None], state), {name: x[:, None] for name, x in batch.items()})
    assert own.keys() == metrics.keys() and own["loss"] == metrics["loss"]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        np.testing.assert_array_equal(a[0], b)


# ---- rankings

K = 4


@pytest.fixture(scope="module")
def rank():
    return jax.jit(functools.partial(ranking_step, MODEL, OPTIMIZER))


def make_lists(rng, pad_side="left", count=B, junk=0):
    """Lists of answers, ordered by how many tokens 5 they hold, equal numbers tied; some answers not placed or absent."""
    tokens, lengths = rng.integers(1, V, (count * K, S)), rng.integers(2, S + 1, count * K)
    fives = ((tokens == 5) & (np.arange(S) < lengths[:, None])).sum(-1).reshape(count, K)
    ranks = 1 + (fives[:, :, None] < fives[:, None, :]).sum(-1)
    ranks[rng.random(ranks.shape) < 0.1] = 0
    tokens, mask = side(np.random.default_rng(junk), tokens, lengths, pad_side)
    mask = mask.reshape(count, K, S)
    absent = rng.random(ranks.shape) < 0.1
    ranks[absent], mask[absent] = 0, False
    return {
        "tokens": tokens.reshape(count, K, S),
        "mask": mask,
        "ranks": ranks.astype(np.int32),
        "weight": np.ones(count, np.float32),
    }


@pytest.mark.parametrize("pad_side", ["left", "right"])
def test_a_list_costs_what_its_choices_cost(params, rank, pad_side):
    batch = make_lists(np.random.default_rng(0), pad_side)
    batch["ranks"] = np.where(batch["mask"].any(-1), np.tile([3, 1, 0, 7], (B, 1)), 0).astype(np.int32)  # no ties
    batch["weight"] = np.float32([1, 0.5, 2, 0, 1, 1, 0, 1])
    (new, _), metrics = rank((params, OPTIMIZER.init(params)), batch)
    flat = batch["tokens"].reshape(-1, S), batch["mask"].reshape(-1, S)
    per_token = np.asarray(jax.jit(MODEL)(params, *flat), np.float64)
    last = [np.flatnonzero(m)[-1] if m.any() else 0 for m in flat[1]]
    scores = per_token[np.arange(B * K), last].reshape(B, K)
    total, right, decided = 0.0, 0, 0
    for row, ranks, weight in zip(scores, batch["ranks"], batch["weight"]):
        order = [row[i] for i in np.argsort(ranks) if ranks[i] > 0]
        total += weight * sum(np.log(np.exp(order[i:]).sum()) - order[i] for i in range(len(order)))
        if weight > 0:
            pairs = [order[i] > order[j] for i in range(len(order)) for j in range(i + 1, len(order))]
            right, decided = right + sum(pairs), decided + len(pairs)
    np.testing.assert_allclose(metrics["loss"], total / batch["weight"].sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], right / decided, rtol=1e-6)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(new))


def test_a_list_of_two_is_a_pair(params, step, rank):
    pair = make_batch(np.random.default_rng(3))
    pair["probability"] = np.float32([1, 0, 0.5, 1, 0, 0.5, 1, 0])
    lists = {
        "tokens": np.stack([pair["tokens1"], pair["tokens2"]], axis=1),
        "mask": np.stack([pair["mask1"], pair["mask2"]], axis=1),
        "ranks": np.stack([1 + (pair["probability"] < 0.5), 1 + (pair["probability"] > 0.5)], axis=1),
        "weight": pair["weight"],
    }
    (a, _), one = step((params, OPTIMIZER.init(params)), pair)
    (b, _), two = rank((params, OPTIMIZER.init(params)), lists)
    np.testing.assert_allclose([one["loss"], one["accuracy"]], [two["loss"], two["accuracy"]], rtol=1e-5)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_allclose(x, y, atol=2e-4)  # Adam's first step: the sign of a gradient near zero


def test_a_missing_ranking_teaches_nothing(params, rank):
    batch = make_lists(np.random.default_rng(0))
    batch["weight"][[2, 5]] = 0
    clean, _ = rank((params, OPTIMIZER.init(params)), batch)
    other = {name: x.copy() for name, x in batch.items()}
    other["ranks"][[2, 5]] = [9, -3, 0, 1]
    other["tokens"][[2, 5]] = 3
    dirty, metrics = rank((params, OPTIMIZER.init(params)), other)
    assert np.isfinite(metrics["loss"])
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty)):
        np.testing.assert_array_equal(a, b)


def test_a_ranking_step_is_the_same_on_eight_devices(params, rank):
    batch = make_lists(np.random.default_rng(4), count=16)
    batch["weight"] = np.random.default_rng(5).random(16).astype(np.float32)
    one = functools.partial(ranking_step, MODEL, optax.sgd(0.1))
    state = params, optax.sgd(0.1).init(params)
    expected = jax.jit(one)(state, batch)
    for wrapped in (pmap_step(one, donate=False), shard_step(one, make_mesh(2, 2, 2), donate=False)):
        got = wrapped(state, batch)
        np.testing.assert_allclose(got[1]["loss"], expected[1]["loss"], rtol=1e-5)
        np.testing.assert_allclose(got[1]["accuracy"], expected[1]["accuracy"], rtol=1e-6)
        for a, b in zip(jax.tree.leaves(got[0][0]), jax.tree.leaves(expected[0][0])):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_it_learns_what_orders_the_lists(params, rank):
    rng = np.random.default_rng(1)
    state, accuracies = (params, OPTIMIZER.init(params)), []
    for _ in range(60):
        state, metrics = rank(state, make_lists(rng, count=32))
        accuracies.append(float(metrics["accuracy"]))
    assert np.mean(accuracies[:3]) < 0.75
    assert np.mean(accuracies[-5:]) > 0.9, accuracies
