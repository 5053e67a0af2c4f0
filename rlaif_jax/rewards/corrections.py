"""Corrections to rewards: an edited answer is aligned with the original, a span pays at its end.

All is pure jnp.

The alignment is the dynamic programme of Wagner and Fischer (1974, "The string-to-string correction problem") on token
ids: one `lax.scan` over the rows, each row a cumulative minimum, so that T + 1 steps of vector work align a whole batch.
Of the alignments with the fewest edits it takes one that keeps the most tokens, and of those one that edits late.

Masks may have their real tokens anywhere (left or right padded). Give both sequences their stop token or neither.
Each row is computed independently: any leading dimensions, under jit, vmap, pmap, or split over devices.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlaif_jax.types import RewardBatch

KEPT, SUBSTITUTED, DELETED, MASKED = 0, 1, 2, -1  # what became of a token of the original


class Alignment(NamedTuple):
    """The edits that turn an answer into its correction.

    Attributes:
        distance: [...] int32, Levenshtein distance in tokens: substitutions + deletions + insertions.
        operations: [..., T] int8, of each token of the answer: KEPT, SUBSTITUTED, DELETED; MASKED for padding.
        inserted: [..., T + 1] int32, number of tokens that were inserted right before each token of the answer; the last
            entry counts those after its last token.
    """

    distance: jax.Array
    operations: jax.Array
    inserted: jax.Array


def _left_justified(tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (tokens with the real ones first, the place that each came from, the number of real ones)."""
    order = jnp.argsort(~mask, stable=True)
    return tokens[order], order, jnp.sum(mask, dtype=jnp.int32)


def _table(
    source: jax.Array, count: jax.Array, target: jax.Array, *, trace: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Computes the table of least costs of turning prefixes of `source` into prefixes of `target`.

    An edit costs U + 2, a kept token -1: fewest edits first, then most kept tokens; a distance is the cost over U + 2,
    rounded up.

    Args:
        source: [T] int, real tokens first.
        count: [], number of real tokens of the source.
        target: [U] int, real tokens first.
        trace: also return how each cell of each row was reached.

    Returns:
        (last row [U + 1] of the table, trace or None). The trace is (origin [T, U + 1]: the column where the run of
        insertions that ends in this cell began; diagonal [T, U + 1]: whether that cell was reached by keeping or
        substituting rather than by deleting).
    """
    edit = target.shape[0] + 2
    columns = jnp.arange(target.shape[0] + 1, dtype=jnp.int32)
    insertions = columns * edit

    def step(
        above: jax.Array, inputs: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        token, real = inputs
        deleted = above + edit
        replaced = above[:-1] + jnp.where(token == target, -1, edit)
        best = deleted.at[1:].min(replaced)  # without an insertion
        # row[j] = min(best[j], row[j - 1] + edit) = j edit + min over k <= j of (best[k] - k edit)
        row = jax.lax.cummin(best - insertions) + insertions
        if not trace:
            return jnp.where(real, row, above), None
        origin = jax.lax.cummax(jnp.where(best == row, columns, 0))
        diagonal = jnp.concatenate([jnp.zeros(1, bool), replaced <= deleted[1:]])
        return jnp.where(real, row, above), (origin, diagonal)

    real = jnp.arange(source.shape[0]) < count
    return jax.lax.scan(step, insertions, (source, real))


def _distance(last: jax.Array, length: jax.Array) -> jax.Array:
    """Returns the distance [] from the last row [U + 1] of the table.

    `length` [] is the number of real target tokens.
    """
    edit = last.shape[0] + 1
    return (last[length] + edit - 1) // edit


def _pair_distance(source: jax.Array, source_mask: jax.Array, target: jax.Array, target_mask: jax.Array) -> jax.Array:
    source, _, count = _left_justified(source, source_mask)
    target, _, length = _left_justified(target, target_mask)
    return _distance(_table(source, count, target, trace=False)[0], length)


def _pair_alignment(
    source: jax.Array, source_mask: jax.Array, target: jax.Array, target_mask: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    size = source.shape[0]
    source, order, count = _left_justified(source, source_mask)
    target, _, length = _left_justified(target, target_mask)
    last, table = _table(source, count, target, trace=True)
    assert table is not None
    reached = jnp.pad(target, (1, 0))  # the token that a column of the table ends with

    def step(
        column: jax.Array, inputs: tuple[jax.Array, jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        origins, diagonals, token, real = inputs
        origin = origins[column]
        diagonal = diagonals[origin]
        same = token == reached[origin]
        operation = jnp.where(diagonal, jnp.where(same, KEPT, SUBSTITUTED), DELETED)
        behind = jnp.where(real, column - origin, 0)
        return jnp.where(real, origin - diagonal, column), (jnp.where(real, operation, MASKED), behind)

    real = jnp.arange(size) < count
    first, (operations, behind) = jax.lax.scan(step, length, (*table, source, real), reverse=True)
    before = jnp.concatenate([first[None], behind])  # entry i: in front of the i-th real token
    inserted = jnp.zeros(size + 1, jnp.int32).at[order].set(jnp.where(real, before[:size], 0))
    return (
        _distance(last, length),
        jnp.zeros(size, jnp.int8).at[order].set(operations.astype(jnp.int8)),
        inserted.at[size].set(before[count]),
    )


def _checked(
    answer: jax.Array, answer_mask: jax.Array, corrected: jax.Array, corrected_mask: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the arguments with Boolean masks, after checks of their shapes and types."""
    chex.assert_equal_shape([answer, answer_mask])
    chex.assert_equal_shape([corrected, corrected_mask])
    chex.assert_equal_shape_prefix([answer, corrected], jnp.ndim(answer) - 1)
    chex.assert_type([answer, corrected], int)
    return answer, jnp.asarray(answer_mask, bool), corrected, jnp.asarray(corrected_mask, bool)


def levenshtein(
    answer: jax.Array, answer_mask: jax.Array, corrected: jax.Array, corrected_mask: jax.Array
) -> jax.Array:
    """Computes Levenshtein distances between answers and corrections, in tokens.

    Memory: one row of U + 1 numbers a pair; T, U up to 20,000 fit in int32.

    Args:
        answer: [..., T] int, token ids.
        answer_mask: [..., T] bool, true for real tokens.
        corrected: [..., U] int, token ids.
        corrected_mask: [..., U] bool, true for real tokens.

    Returns:
        [...] int32.

    Raises:
        AssertionError: a shape or type is wrong.
    """
    return jnp.vectorize(_pair_distance, signature="(t),(t),(u),(u)->()")(
        *_checked(answer, answer_mask, corrected, corrected_mask)
    )


def align(answer: jax.Array, answer_mask: jax.Array, corrected: jax.Array, corrected_mask: jax.Array) -> Alignment:
    """Finds the edits that turn answers into corrections. Memory: 5 T (U + 1) bytes a pair.

    Args:
        answer: [..., T] int, token ids.
        answer_mask: [..., T] bool, true for real tokens.
        corrected: [..., U] int, token ids.
        corrected_mask: [..., U] bool, true for real tokens.

    Raises:
        AssertionError: a shape or type is wrong.
    """
    return Alignment(
        *jnp.vectorize(_pair_alignment, signature="(t),(t),(u),(u)->(),(t),(s)")(
            *_checked(answer, answer_mask, corrected, corrected_mask)
        )
    )


def edit_reward(distance: jax.Array, corrected_mask: jax.Array) -> jax.Array:
    """Computes -distance / number of tokens of the correction, [...] float32.

    This is minus the human-targeted edit rate.

    HTER (Snover 2006), without its block shifts. 0 is an answer that needed no edit; below -1 is one that was longer
    than its correction. A correction that deletes everything counts as one token long.

    Args:
        distance: [...] int32, from `levenshtein` or `align`.
        corrected_mask: [..., U] bool.
    """
    length = jnp.sum(jnp.asarray(corrected_mask, bool), axis=-1)
    return -distance.astype(jnp.float32) / jnp.maximum(length, 1)


def token_blame(
    alignment: Alignment,
    answer_mask: jax.Array,
    *,
    kept: float | jax.Array = 0.1,
    substituted: float | jax.Array = -1.0,
    deleted: float | jax.Array = -1.0,
    insertion: float | jax.Array = -0.5,
) -> jax.Array:
    """Computes dense rewards [..., T] float32 from what a correction did to each token of the answer.

    Rewards are 0 where the answer is masked.

    PRELUDE (Gao 2024) learns from the edit distance; RLMEC (Chen 2024) from the tokens of a minimal edit, as here.

    Args:
        alignment: of the answers and their corrections.
        answer_mask: [..., T] bool.
        kept: reward of a kept token. Above 0 longer answers earn more, so keep it small compared with the faults.
        substituted: reward of a substituted token.
        deleted: reward of a deleted token.
        insertion: added for a place where tokens were inserted, however many. It goes to the token after that place (at
            the end: the last token), which was written instead of them.
    """
    mask = jnp.asarray(answer_mask, bool)
    chex.assert_equal_shape([alignment.operations, mask])
    weights = (
        (KEPT, jnp.float32(kept)),
        (SUBSTITUTED, jnp.float32(substituted)),
        (DELETED, jnp.float32(deleted)),
    )
    blame = sum(((alignment.operations == operation) * weight for operation, weight in weights), jnp.float32(0.0))
    at_end = _last(mask) & (alignment.inserted[..., -1:] > 0)
    points = (alignment.inserted[..., :-1] > 0).astype(jnp.float32) + at_end
    return jnp.where(mask, blame + jnp.minimum(points, 1.0) * jnp.float32(insertion), 0.0)


def _last(mask: jax.Array) -> jax.Array:
    """Returns [..., T] bool, true at each row's last real token."""
    behind = jnp.cumsum(mask[..., ::-1].astype(jnp.int32), axis=-1)[..., ::-1]
    return mask & (behind == 1)


def correction_rewards(
    answer: jax.Array,
    answer_mask: jax.Array,
    corrected: jax.Array,
    corrected_mask: jax.Array,
    valid: jax.Array,
    *,
    sequence: float | jax.Array = 1.0,
    dense: float | jax.Array = 0.0,
    kept: float | jax.Array = 0.1,
    substituted: float | jax.Array = -1.0,
    deleted: float | jax.Array = -1.0,
    insertion: float | jax.Array = -0.5,
) -> RewardBatch:
    """Turns corrected answers into rewards: `edit_reward` as score and `token_blame` as token rewards.

    Args:
        answer: [B, T] int, token ids.
        answer_mask: [B, T] bool.
        corrected: [B, U] int, token ids.
        corrected_mask: [B, U] bool.
        valid: [B] bool, false where the correction is missing; such a row gives 0 and stays invalid.
        sequence: weight of `edit_reward`.
        dense: weight of `token_blame`.
        kept: as in `token_blame`.
        substituted: as in `token_blame`.
        deleted: as in `token_blame`.
        insertion: as in `token_blame`.
    """
    alignment = align(answer, answer_mask, corrected, corrected_mask)
    valid = jnp.asarray(valid, bool)
    blame = token_blame(
        alignment, answer_mask, kept=kept, substituted=substituted, deleted=deleted, insertion=insertion
    )
    return RewardBatch(
        score=jnp.where(valid, jnp.float32(sequence) * edit_reward(alignment.distance, corrected_mask), 0.0),
        valid=valid,
        token_rewards=jnp.where(valid[..., None], jnp.float32(dense) * blame, 0.0),
    )


def span_rewards(
    starts: jax.Array, ends: jax.Array, values: jax.Array, span_mask: jax.Array, answer_mask: jax.Array
) -> jax.Array:
    """Returns each span's value as a reward at its last token: [..., T] float32.

    Wu 2023, fine-grained rewards.

    Values of spans that end together add up. A span that runs past the answer's real tokens pays at the last one inside
    it; a span without a real token pays nothing.

    Args:
        starts: [..., M] int, number of the first token.
        ends: [..., M] int, number of the last token plus 1.
        values: [..., M], in the units of the reward.
        span_mask: [..., M] bool, false for padding, whatever it holds.
        answer_mask: [..., T] bool.
    """
    chex.assert_equal_shape([starts, ends, values, span_mask])
    mask = jnp.asarray(answer_mask, bool)
    chex.assert_equal_shape_prefix([starts, mask], mask.ndim - 1)
    size = mask.shape[-1]
    newest = jax.lax.cummax(jnp.where(mask, jnp.arange(size), -1), axis=mask.ndim - 1)  # last real token up to here
    wanted = jnp.asarray(span_mask, bool) & (ends > jnp.maximum(starts, 0))
    last = jnp.take_along_axis(newest, jnp.clip(ends - 1, 0, size - 1), axis=-1)
    paid = jnp.where(wanted & (last >= starts) & (last >= 0), last, size)  # `size` is no token
    rewards = jnp.where(wanted, values.astype(jnp.float32), 0.0)
    return jnp.sum(jnp.where(paid[..., None] == jnp.arange(size), rewards[..., None], 0.0), axis=-2)
