"""Scores of a rollout: padded and packed give the same numbers, which are those of NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.algorithms.packing import Packed, pack
from rlaif_jax.algorithms.scoring import (
    fold_rows,
    gather_targets,
    packed_view,
    padded_view,
    policy_logprobs,
    score_rollout,
)
from rlaif_jax.types import Frozen
from tests.algorithms.cases import POLICY, B, K, P, T, critic_values, full_mask, numpy_logprobs

pytestmark = pytest.mark.slow  # as a whole: many programs to compile


def test_padded_targets_are_the_responses(gae_case):
    view = padded_view(gae_case.rollout, K)
    mask = gae_case.rollout.response_mask
    np.testing.assert_array_equal(view.targets, np.where(mask, gae_case.rollout.tokens[:, P:], 0))
    assert view.answers == K


@pytest.mark.parametrize("answers", [1, K])
def test_a_packed_row_feeds_each_token_and_predicts_the_next(gae_case, answers):
    rollout = gae_case.rollout
    group = np.arange(B) // answers
    packed, used = jax.jit(pack)(rollout.prompt_mask, rollout.response_mask, group)
    view = packed_view(jax.tree.map(jnp.asarray, rollout), packed, answers)
    assert (view.answers is None) == (answers == 1), "segments alone separate prompts of one answer"
    place = jnp.arange(B * T).reshape(B, T)
    found = np.asarray(gather_targets(place + 1, packed)) - 1  # -1: a column without a target
    assert sorted(found[found >= 0]) == list(np.flatnonzero(rollout.response_mask))
    tokens, targets = np.asarray(view.tokens), np.asarray(view.targets)
    for at in np.argwhere(found >= 0):
        row, column = divmod(found[tuple(at)], T)
        assert targets[tuple(at)] == rollout.tokens[row, P + column]
        assert tokens[tuple(at)] == rollout.tokens[row, P + column - 1]
    assert not targets[found < 0].any()
    taken = gather_targets(jnp.asarray(rollout.response_mask), packed)
    assert taken.dtype == bool
    np.testing.assert_array_equal(taken, found >= 0)
    assert not taken[int(used) :].any()


@pytest.mark.parametrize("size", [1, 3, 8])
def test_fold_rows_takes_every_row_in_use_once(size):
    """Five rows in use of eight; the last turn is filled up with empty rows."""
    rows = jnp.arange(8)[:, None]
    packed = Packed(tokens=rows, targets=10 + rows, positions=rows, segments=1 + rows, answers=rows)

    def fn(carry, part):
        turns, tokens, segments, targets = carry
        real = part.segments > 0
        inside = part.targets < 100
        return turns + 1, tokens + part.tokens.sum(), segments + real.sum(), targets + jnp.sum(part.targets * inside)

    zero = (jnp.int32(0),) * 4
    turns, tokens, segments, targets = jax.jit(lambda used: fold_rows(size, packed, used, fn, zero))(jnp.int32(5))
    assert turns == -(-5 // size)
    taken = min(size * int(turns), 8)
    assert tokens == np.sum(range(taken))
    assert segments == taken
    assert targets == sum(range(10, 10 + taken))


def scores_of(case, answers, packed_rows):
    """Log-probs, entropies and values of the case's rollout by name."""
    params = case.state.params
    scored = lambda view: case.algorithm.score(params, Frozen(), view)._asdict()
    return jax.jit(lambda rollout: score_rollout(scored, rollout, answers=answers, packed_rows=packed_rows))(
        case.rollout
    )


@pytest.mark.parametrize(("answers", "packed_rows"), [(1, 0), (K, 0), (1, 2), (K, 1), (K, 8)])
def test_scores_are_the_same_in_every_layout(gae_case, answers, packed_rows):
    """Alone, with the prompt shared, and packed in turns of one, two and all rows."""
    got = scores_of(gae_case, answers, packed_rows)
    assert set(got) == {"logprobs", "entropies", "values"}
    rollout, params = gae_case.rollout, gae_case.state.params
    full, mask = full_mask(gae_case.batch), rollout.response_mask
    logprobs, entropies = numpy_logprobs(params["policy"], rollout.tokens, full)
    expected = {
        "logprobs": logprobs,
        "entropies": entropies,
        "values": critic_values(params["value"], rollout.tokens, full),
    }
    for name, want in expected.items():
        np.testing.assert_allclose(got[name], np.where(mask, want, 0), atol=2e-5, err_msg=name)
        assert got[name].dtype == jnp.float32


def test_policy_logprobs_are_at_the_sampling_temperature(gae_case):
    rollout, params = gae_case.rollout, gae_case.frozen.reference
    logprobs, _ = numpy_logprobs(params, rollout.tokens, full_mask(gae_case.batch))
    expected = np.where(rollout.response_mask, logprobs, 0)
    for answers in (1, K):
        got = jax.jit(lambda p, r, answers=answers: policy_logprobs(POLICY, p, r, answers=answers))(params, rollout)
        np.testing.assert_allclose(got, expected, atol=2e-5)
