"""Packing: every token once and in its place, rows that nobody overfills, and few of them."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_jax.algorithms.packing import _of_groups, pack, row_answers

P, T = 4, 6
PACK, GROUPS = jax.jit(pack, static_argnums=3), jax.jit(_of_groups)


def masks(prompts, lengths):
    return np.arange(P) >= P - np.array(prompts)[:, None], np.arange(T) < np.array(lengths)[:, None]


def test_by_hand():
    """Two answers to one prompt share its columns; a third answer, to another prompt, comes behind them."""
    prompt_mask, mask = masks([3, 3, 2], [2, 3, 1])
    packed, used = PACK(prompt_mask, mask, np.int32([0, 0, 1]))
    assert used == 1
    token = lambda item, column: item * (P + T) + column
    # prompt 1 without its last token, answer 1, answer 0; prompt 2, answer 2
    assert packed.tokens[0].tolist() == [
        *(token(1, 1), token(1, 2)),
        *(token(1, 3), token(1, 4), token(1, 5)),
        *(token(0, 3), token(0, 4)),
        *(token(2, 2), token(2, 3)),
    ]
    assert packed.targets[0].tolist() == [18, 18, 6, 7, 8, 0, 1, 18, 12]
    assert packed.positions[0].tolist() == [0, 1, 2, 3, 4, 2, 3, 0, 1]
    assert packed.segments[0].tolist() == [2, 2, 2, 2, 2, 2, 2, 3, 3]
    assert packed.answers[0].tolist() == [0, 0, 2, 2, 2, 1, 1, 0, 3]
    assert (np.asarray(packed.targets)[1:] == 18).all()
    assert not np.asarray(packed.segments)[1:].any()


@pytest.mark.parametrize(
    ("packed_rows", "prompt", "length", "answers", "best"),
    [
        (4, 96, 48, 8, 8),  # 479 columns for 8 answers, 59.9 a column and answer; four rows of 143 have 572
        (2, 96, 48, 8, 3),  # two rows of 143 columns leave room for a prompt and 3 answers
        (1, 96, 48, 8, 1),  # the memory of one row
        (8, 2, 2048, 8, 1),  # almost nothing to share, and columns that read ever more others
        (8, 512, 512, 1, 1),  # one answer to each prompt
    ],
)
def test_a_row_has_room_for_as_many_answers_as_cost_least(packed_rows, prompt, length, answers, best):
    assert row_answers(packed_rows, prompt, length, answers) == best


def test_long_rows_compute_a_prompt_once():
    """Two prompts with four full answers each: two rows of 3 + 24 columns, where rows of 3 + 6 would be eight."""
    prompt_mask, mask = masks([P] * 8, [T] * 8)
    group = np.arange(8, dtype=np.int32) // 4
    packed, used = PACK(prompt_mask, mask, group, 4)
    assert (packed.tokens.shape, int(used)) == ((8, P - 1 + 4 * T), 2)
    assert PACK(prompt_mask, mask, group, 1)[1] == 8


@pytest.mark.parametrize("row", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_everything_is_somewhere_once(seed, row):
    rng = np.random.default_rng(seed)
    count = 24
    group = rng.permutation(count) // [1, 2, 4, 24][seed]
    prompts = rng.integers(1, P + 1, count)[group]
    lengths = rng.integers(0, T + 1, count)
    prompt_mask, mask = masks(prompts, lengths)
    packed, used = PACK(prompt_mask, mask, group.astype(np.int32), row)
    assert packed.tokens.shape == (count, P - 1 + row * T)
    tokens, targets, positions, segments, answers = (np.asarray(x) for x in packed)
    there = segments > 0
    assert sorted(targets[targets < count * T]) == list(np.flatnonzero(mask)), "every response token is predicted once"
    assert (there.any(-1) == (np.arange(count) < used)).all(), "the rows in use are the first"
    for row in range(int(used)):
        for segment in np.unique(segments[row][there[row]]):
            columns = np.flatnonzero(segments[row] == segment)
            assert (np.diff(columns) == 1).all(), "a segment is contiguous"
            items = tokens[row, columns] // (P + T)
            assert len(set(group[items])) == 1
            prompt = columns[answers[row, columns] == 0]
            shown = prompts[items[0]] - 1
            assert prompt.tolist() == columns[:shown].tolist(), "a prompt comes once, before its answers"
            assert positions[row, prompt].tolist() == list(range(shown))
            for answer in set(answers[row, columns]) - {0}:
                own = columns[answers[row, columns] == answer]
                item = answer - 1
                assert len(own) == lengths[item]
                assert (tokens[row, own] == item * (P + T) + P - 1 + np.arange(len(own))).all()
                assert (targets[row, own] == item * T + np.arange(len(own))).all()
                assert (positions[row, own] == shown + np.arange(len(own))).all()


def test_first_fit_decreasing_fills_the_rows():
    """Prompts of one token, lengths 5, 4, 4, 3, 2 in rows of nine: 5 + 4 and 4 + 3 + 2 fit, one row more would be waste."""
    prompt_mask, mask = masks([1] * 5, [3, 4, 5, 2, 4])
    packed, used = PACK(prompt_mask, mask, np.arange(5, dtype=np.int32))
    assert used == 2
    rows = [sorted(set(row[row > 0] - 1)) for row in np.asarray(packed.answers)]
    assert rows[:2] == [[1, 2], [0, 3, 4]]


def test_nothing_to_pack():
    prompt_mask, mask = masks([2, 3], [0, 0])
    assert PACK(prompt_mask, mask, np.int32([0, 1]))[1] == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-2, 5), st.integers(0, T)), min_size=12, max_size=12))
def test_groups_by_sorting_are_those_of_the_table(answers):
    group, lengths = (np.array(column, np.int32) for column in zip(*answers))
    same = group[:, None] == group[None, :]
    leader, total = GROUPS(group, lengths)
    assert leader.tolist() == np.argmax(same, axis=1).tolist()
    assert total.tolist() == (same * lengths[None, :]).sum(-1).tolist()


def test_the_memory_of_packing_grows_with_the_minibatch_and_not_with_its_square():
    shapes = lambda count: (np.ones((count, P), bool), np.ones((count, T), bool), np.zeros(count, np.int32))
    used = [PACK.lower(*shapes(count)).compile().memory_analysis().temp_size_in_bytes for count in (1024, 8192)]
    assert used[1] <= 10 * used[0] and used[1] < 8 * 2**20, used  # the table of groups alone has 64 MiB
