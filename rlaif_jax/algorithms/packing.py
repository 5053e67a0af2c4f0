"""Packs answers of uneven length into rows of one length, so that an update computes no padding.

A row holds prompts and their answers behind one another; attention goes by segment and answer
(`models.attention.AttentionMask`). The place of each answer is found on the device by first-fit-decreasing (Johnson 1973; for
language models Krell 2021), prompt by prompt: answers to a prompt that come into the same row share its columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Columns that a column reads at the cost of its matrix products: 6 D (Kaplan 2020), at a width of some 700.
READ = 4096


class Packed(NamedTuple):
    """The places of M sequences [M, P + T] in M rows of C columns, all [M, C] int32.

    An answer's columns are the last token of its prompt and all its tokens except the last.

    Attributes:
        tokens: index into the flat [M (P + T)] tokens.
        targets: index into the flat [M T] response tokens of the token that the column predicts; M T where it predicts none.
        positions: the token's position in its sequence.
        segments: 0 for an empty column, else the number of a prompt within its row.
        answers: 0 for the prompt's columns, else the number of the answer.
    """

    tokens: jax.Array
    targets: jax.Array
    positions: jax.Array
    segments: jax.Array
    answers: jax.Array


def row_answers(packed_rows: int, prompt: int, length: int, answers: int) -> int:
    """Returns m: packed rows of P - 1 + m T columns cost least where groups of K answers are packed.

    A longer row computes a prompt for more of its answers, and each of its columns reads more others. The `packed_rows`
    rows of P - 1 + T columns that a turn may hold bound its length.

    Args:
        packed_rows: rows of a turn.
        prompt: P.
        length: T.
        answers: K.
    """
    columns = lambda m: prompt - 1 + m * length
    fit = [m for m in range(1, answers + 1) if columns(m) <= packed_rows * columns(1)]
    return min(fit, key=lambda m: columns(m) / m * (1 + columns(m) / READ))


def pack(prompt_mask: jax.Array, mask: jax.Array, group: jax.Array, answers: int = 1) -> tuple[Packed, jax.Array]:
    """Returns (the place of every token, [] int32 number of rows used; used rows come first).

    Args:
        prompt_mask: [M, P] bool, left padded.
        mask: [M, T] bool, right padded; an answer without a true entry is left out.
        group: [M] int32, equal for answers to the same prompt.
        answers: m; a row has P - 1 + m T columns, room for a prompt and m answers of any length.
    """
    count, width = prompt_mask.shape
    length = mask.shape[1]
    columns = width - 1 + answers * length
    prompts = prompt_mask[:, :-1].astype(jnp.int32).sum(-1)  # without the last token, which each answer feeds itself
    lengths = mask.astype(jnp.int32).sum(-1)
    leader, total = _of_groups(group, lengths)
    # The groups with most to place first, within a group the longest answers.
    order = jnp.lexsort((-lengths, leader, -total))

    def place(carry: Any, item: jax.Array) -> Any:
        fill, row, segment, before = carry
        prompt, answer = prompts[item], lengths[item]
        shared = (leader[item] == before) & (fill[row] + answer <= columns)
        row = jnp.where(shared, row, jnp.argmax(fill + prompt + answer <= columns))
        segment = jnp.where(shared, segment, item + 1)
        start = fill[row] + jnp.where(shared, 0, prompt)
        # An answer without tokens takes no place, and no other answer shares the prompt that it did not bring.
        fill = jnp.where(answer > 0, fill.at[row].set(start + answer), fill)
        before = jnp.where(answer > 0, leader[item], -1)
        return (fill, row, segment, before), (row, start, segment, shared)

    empty = (jnp.zeros(count, jnp.int32), jnp.int32(0), jnp.int32(0), jnp.int32(-1))
    (fill, *_), placed = jax.lax.scan(place, empty, order)
    row, start, segment, shared = (x[jnp.argsort(order)] for x in placed)

    item = jnp.arange(count)[:, None]
    of_answer, of_prompt = jnp.arange(length)[None], jnp.arange(width - 1)[None]
    there = of_answer < lengths[:, None]
    brought = (of_prompt < prompts[:, None]) & ~shared[:, None] & (lengths > 0)[:, None]
    places = jnp.concatenate(
        [
            jnp.where(there, row[:, None] * columns + start[:, None] + of_answer, count * columns),
            jnp.where(brought, row[:, None] * columns + (start - prompts)[:, None] + of_prompt, count * columns),
        ],
        axis=1,
    )

    def put(answer: jax.Array, prompt: jax.Array, empty: int) -> jax.Array:
        """Returns [M, C] from values [M, T] of the answers' columns and [M, P - 1] of the prompts'."""
        values = jnp.concatenate(
            [jnp.broadcast_to(answer, (count, length)), jnp.broadcast_to(prompt, (count, width - 1))], axis=1
        )
        flat = jnp.full(count * columns, empty, jnp.int32).at[places].set(values, mode="drop")
        return flat.reshape(count, columns)

    whole = item * (width + length)
    return Packed(
        tokens=put(whole + width - 1 + of_answer, whole + width - 1 - prompts[:, None] + of_prompt, 0),
        targets=put(item * length + of_answer, jnp.int32(count * length), count * length),
        positions=put(prompts[:, None] + of_answer, of_prompt, 0),
        segments=put(segment[:, None], segment[:, None], 0),
        answers=put(item + 1, jnp.int32(0), 0),
    ), jnp.sum(fill > 0)


def _of_groups(group: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (the first answer of each answer's group, the tokens of its group), each [M] int32.

    By sorting: the table of which answers share a group would have M^2 entries.
    """
    count = group.shape[0]
    order = jnp.argsort(group, stable=True)  # within a group in the order of the answers
    begins = jnp.concatenate([jnp.ones(1, bool), group[order][1:] != group[order][:-1]])
    number = jnp.cumsum(begins) - 1
    leaders = order[jax.lax.cummax(jnp.where(begins, jnp.arange(count), 0))]
    totals = jax.ops.segment_sum(lengths[order], number, num_segments=count)[number]
    place = jnp.zeros(count, jnp.int32).at[order]
    return place.set(leaders.astype(jnp.int32)), place.set(totals)
