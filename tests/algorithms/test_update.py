"""The update that all algorithms share: minibatches, guards, layouts of rows, sequence losses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.algorithms import update as shared_update
from rlaif_jax.algorithms.scoring import padded_view
from rlaif_jax.algorithms.update import Update, check_minibatches, count_totals
from rlaif_jax.config import UserError
from rlaif_jax.parallel import PmapRunner, ShardRunner, make_mesh
from rlaif_jax.types import Frozen
from tests.algorithms.cases import ACTOR_CRITIC, NAN, B, K, V, build, compiled_prepare, full_mask, gradients_of
from tests.helpers import assert_same_leaves, fresh, relative_distance

pytestmark = pytest.mark.slow  # as a whole: many programs to compile


# ---- Guards


def test_masked_slots_may_hold_anything(gae_case):
    """NaN, infinity and random tokens outside the masks change no bit of the update."""
    batch = gae_case.batch
    junk = type(batch.fields)(
        logprobs=NAN, sampler_logprobs=NAN, ref_logprobs=np.inf, values=NAN, advantages=NAN, returns=-np.inf,
        weights=NAN, shares=np.inf,
    )  # fmt: skip
    dirty = batch.replace(
        fields=jax.tree.map(lambda x, other: np.where(batch.mask, x, other).astype(np.float32), batch.fields, junk),
        tokens=np.where(
            full_mask(batch), batch.tokens, np.random.default_rng(5).integers(-3, 3 * V, batch.tokens.shape)
        ),
    )
    state, metrics = jax.device_get(gae_case.step(gae_case.state, dirty))
    assert_same_leaves(state, gae_case.stepped[0])
    for key, value in metrics.items():
        np.testing.assert_array_equal(value, gae_case.stepped[1][key], err_msg=key)


def test_a_loss_that_is_not_finite_changes_nothing(gae_case):
    batch = gae_case.batch
    for name in ("advantages", "returns"):
        broken = np.array(batch.fields._asdict()[name])
        broken[[0, 1, 2, 3, 5, 6, 7], 0] = np.inf
        spoilt = batch.replace(fields=batch.fields._replace(**{name: broken}))
        state, metrics = jax.device_get(gae_case.step(gae_case.state, spoilt))
        assert metrics["nonfinite"] == 4, "every minibatch of both epochs is reported"
        assert_same_leaves((state.params, state.opt_state), (gae_case.state.params, gae_case.state.opt_state))


def test_a_step_without_judgements_moves_nothing(gae_case):
    """Neither the parameters, by moments of the steps before, nor the moments."""
    state = gae_case.stepped[0]
    assert max(float(np.abs(x).max()) for x in jax.tree.leaves(state.opt_state["policy"])) > 0
    unjudged = gae_case.batch.replace(mask=np.zeros_like(gae_case.batch.mask))
    after, metrics = jax.device_get(gae_case.step(fresh(state), unjudged))
    assert_same_leaves((after.params, after.opt_state), (state.params, state.opt_state))
    assert (int(after.step), metrics["nonfinite"]) == (int(state.step) + 1, 0)


def test_minibatches_that_do_not_divide_are_refused(gae_case):
    algorithm = build(dataclasses.replace(ACTOR_CRITIC, num_minibatches=4))
    six = jax.tree.map(lambda x: x[:6], gae_case.batch)
    with pytest.raises(UserError, match=r"6 sequences .* cannot be cut into 4 minibatches over 1 devices"):
        algorithm.step(gae_case.state, Frozen(), six)
    with pytest.raises(UserError, match="cannot be cut into 2 minibatches over 8 devices"):
        check_minibatches(8, 2, 8, 1)


def test_a_minibatch_does_not_cut_what_is_compared(gae_case):
    update = gae_case.algorithm.update(gae_case.state, Frozen())
    with pytest.raises(UserError, match="a minibatch of 1 sequences cuts the 2 answers to a prompt"):
        dataclasses.replace(update, unit="group", num_minibatches=8)(gae_case.state, gae_case.batch)
    check_minibatches(8, 8, 1, 1)
    check_minibatches(8, 4, 1, 2)


def test_totals_count_what_is_valid(gae_case):
    totals = count_totals(gae_case.batch, K, None)
    assert jax.tree.map(float, totals) == (gae_case.batch.mask.sum(), B - 1, B / K)
    empty = gae_case.batch.replace(mask=np.zeros_like(gae_case.batch.mask))
    assert jax.tree.map(float, count_totals(empty, 2 * B, None)) == (1, 1, 1), "never a division by zero"


# ---- Minibatches


@pytest.fixture
def minibatches():
    """`minibatches(case, state)`: the rows and the advantages that each minibatch of an update saw; no model runs."""

    seen, original = [], Update.gradients

    def recorded(batch, rows, axis_name):
        advantages = batch[0].fields.advantages
        jax.debug.callback(lambda r, a: seen.append((np.array(r), np.array(a))), rows, advantages, ordered=True)
        return batch

    def still(update, params, batch, axis_name=None, **options):
        names = jax.eval_shape(lambda: original(update, params, batch, axis_name))[2]
        return jax.tree.map(jnp.zeros_like, params), jnp.float32(0), {name: jnp.float32(0) for name in names}

    @functools.cache
    def compiled(algorithm):
        return jax.jit(lambda state, batch: algorithm.step(state, Frozen(), batch))

    def run(case, state):
        seen.clear()
        compiled(case.algorithm)(state, case.batch)
        jax.effects_barrier()
        return np.array([rows for rows, _ in seen]), [advantages for _, advantages in seen]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_update, "global_rows", recorded)
        patch.setattr(Update, "gradients", still)
        yield run


def test_every_epoch_of_every_step_has_its_own_permutation(gae_case, minibatches):
    orders = []
    for changes in ({}, {"step": jnp.int32(1)}, {"seed": jnp.uint32(4)}, {}):
        rows, _ = minibatches(gae_case, gae_case.state.replace(**changes))
        assert rows.shape == (4, B // 2)
        epochs = rows.reshape(2, B)
        for epoch in epochs:
            assert sorted(epoch) == list(range(B)), "each sequence once an epoch"
            assert (epoch[1::2] == epoch[::2] + 1).all(), "the answers to a prompt stay together"
        orders += [tuple(epoch) for epoch in epochs]
    assert len(set(orders[:6])) == 6
    assert orders[6:] == orders[:2], "the same seed and step, the same order"


def test_advantages_are_whitened_over_the_whole_batch(gae_case, group_case, minibatches):
    batch = gae_case.batch
    _, (white, *_) = minibatches(gae_case, gae_case.state)
    raw = batch.fields.advantages[batch.mask].astype(np.float64)
    np.testing.assert_allclose(white[batch.mask], (raw - raw.mean()) / raw.std(), rtol=1e-4, atol=1e-5)
    assert not white[~batch.mask].any()
    _, (group, *_) = minibatches(group_case, group_case.state)
    np.testing.assert_array_equal(group, group_case.batch.fields.advantages)


# ---- Packed rows


@pytest.mark.parametrize("name", ["gae", "group"])
def test_packed_rows_give_the_same_numbers(request, moved, name):
    """Scores, gradient, loss and metrics with two rows at a time, on prompts that are shared, padded and left alone."""
    case = request.getfixturevalue(f"{name}_case")
    shared = 1 if name.startswith("gae") else K  # answers that are packed with their prompt
    packed = build(dataclasses.replace(case.algorithm.config, packed_rows=2, answers_per_prompt=shared))
    args = (case.state, case.frozen, case.rollout, case.rewards)
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(compiled_prepare(packed)(*args)), jax.tree.leaves(case.batch), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=2e-5, err_msg=jax.tree_util.keystr(path))
    params = {part: moved[part] for part in case.state.params}
    (grads, loss, metrics), (want, whole, parts) = (
        jax.jit(lambda p, e, a=algorithm, n=n: gradients_of(a, case.state, p, e, n))(params, case.batch)
        for algorithm, n in ((packed, shared), (case.algorithm, K))
    )
    assert relative_distance(grads, want) < 1e-5
    np.testing.assert_allclose(loss, whole, rtol=1e-5)
    assert set(metrics) == set(parts)
    for key, value in parts.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-4, atol=1e-6, err_msg=key)


# ---- Sequence losses


def pair_loss(sums, sequences, valid, totals):
    """A softplus of each pair's margin and a term of the whole minibatch, so that every answer has a say on every other."""
    pairs, both = sums.reshape(-1, 2), valid.reshape(-1, 2).all(-1)
    margin = jnp.where(both, sequences[::2] * (pairs[:, 0] - pairs[:, 1]), 0.0)
    loss = jnp.sum(jnp.where(both, jax.nn.softplus(-margin), 0.0)) / totals.groups
    loss += 0.1 * jnp.log1p(jnp.sum(jnp.where(valid, sums, 0.0) ** 2) / totals.sequences)
    return loss, {"margin": jnp.sum(margin) / totals.groups}


def sequence_update(case, token_loss, packed_rows):
    """The case's update with a loss on whole answers, with or without its loss on tokens."""
    update = case.algorithm.update(case.state, Frozen())
    return dataclasses.replace(
        update,
        token_loss=update.token_loss if token_loss else None,
        sequence_loss=pair_loss,
        packed_rows=packed_rows,
        unit="group",
    )


def with_sequences(batch):
    """The batch with a number for every answer, equal within a pair."""
    return batch.replace(sequences=np.float32([0.5, 0.5, 2, 2, 1, 1, -1, -1]))


@pytest.fixture(scope="module")
def differentiated(group_case):
    """(gradient, loss, margin) of token and sequence loss, of the sequence loss alone: one plain `jax.grad` of all."""
    batch = with_sequences(group_case.batch)

    def whole(params, token_loss):
        update = sequence_update(group_case, token_loss, 0)
        scored, totals = update.score(params, padded_view(batch)), count_totals(batch, K, None)
        sums = jnp.where(batch.mask, scored.logprobs, 0.0).sum(-1)
        loss, metrics = update.sequence_loss(sums, batch.sequences, batch.mask.any(-1), totals)
        if token_loss:
            loss += update.token_loss(scored, batch.fields, batch.mask, totals)[0]
        return loss, metrics["margin"]

    def run(params, token_loss):
        (loss, margin), grads = jax.value_and_grad(whole, has_aux=True)(params, token_loss)
        return grads, loss, margin

    compiled = jax.jit(run, static_argnums=1)
    return {both: compiled(group_case.state.params, both) for both in (True, False)}


def assert_gradient(got, want):
    (grads, loss, metrics), (expected, whole, margin) = got, want
    assert relative_distance(grads, expected) < 1e-5
    np.testing.assert_allclose(loss, whole, rtol=1e-5)
    np.testing.assert_allclose(metrics["margin"], margin, rtol=1e-5)


@pytest.mark.parametrize("token_loss", [True, False], ids=["and_tokens", "alone"])
@pytest.mark.parametrize("packed_rows", [0, 1, 2])
def test_a_sequence_loss_is_differentiated_exactly(group_case, differentiated, token_loss, packed_rows):
    """Padded with shared prompts, and packed, where the answers of a pair may come in different turns."""
    update = sequence_update(group_case, token_loss, packed_rows)
    run = jax.jit(lambda params, batch: update.gradients(params, batch, shared=K))
    assert_gradient(run(group_case.state.params, with_sequences(group_case.batch)), differentiated[token_loss])


@pytest.mark.parametrize("packed_rows", [0, 1])
@pytest.mark.parametrize("layout", ["pmap8", "2x2x2"])
def test_a_sequence_loss_is_the_same_on_many_devices(group_case, differentiated, layout, packed_rows):
    """Eight devices with one answer each: every pair is cut."""
    update = sequence_update(group_case, True, packed_rows)
    runner = PmapRunner() if layout == "pmap8" else ShardRunner(make_mesh(2, 2, 2))

    def step(params, batch, *, axis_name=None):
        grads, loss, metrics = update.gradients(params, batch, axis_name)
        return grads, (loss, metrics)

    params = runner.place(fresh(group_case.state.params))
    grads, (loss, metrics) = runner.step(step)(params, with_sequences(group_case.batch))
    assert_gradient(jax.device_get((grads, loss, metrics)), differentiated[True])
