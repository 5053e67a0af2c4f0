"""Cards are made from whatever numbers a run has."""

import pytest

from rlaif_jax.report.cards import MAX_CARDS, compares, final_cards
from rlaif_jax.report.numbers import duration_text, texts, value_text


def shown(cards):
    return [(card.label.title, card.value, card.note) for card in cards]


def test_intervals_come_first_then_pairs_then_other_numbers():
    numbers = {
        "alone_before": 2,
        "kl": 8.91,
        "length_after": 25.9,
        "length_before": 22.3,
        "win_rate": 0.7134,
        "win_rate_ci95": [0.651, 0.772],
        "wall_s": 3.0,
        "hash": "abc",
        "judge_sha256": "0123",
    }
    cards, others = final_cards(numbers)
    assert shown(cards) == [
        ("Win rate", "71.3\u00a0%", "95 % interval [65.1\u00a0%,\u00a077.2\u00a0%]"),
        ("Answer length, before → after", "22.3 → 25.9", "tokens"),
        ("KL to the reference", "8.91", "nats per answer"),
        ("Alone before", "2", ""),
    ]
    assert shown(others) == [("Hash", "abc", "")]
    assert "wall_s" in numbers, "the caller's numbers are left alone"


@pytest.mark.parametrize(
    ("numbers", "whether"),
    [({"x_ci95": [0, 1]}, True), ({"x_before": 1, "x_after": 2}, True), ({"x_before": 1}, False), ({}, False)],
)
def test_what_compares_before_and_after(numbers, whether):
    assert compares(numbers) == whether


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("judge_agreement_final", 0.5, "50.0 %"),
        ("same_position_rate", 0.093, "9.3 %"),
        ("judge_missing", 0, "0.0 %"),
        ("learning_rate", 0.003, "0.003"),
        ("error_rate", 3, "3"),
        ("rm_accuracy", 1, "100.0 %"),
        ("rating", 0.5, "0.5"),
    ],
)
def test_shares_are_percentages(name, value, shown):
    ((card,), others) = final_cards({name: value})
    assert (card.value.replace("\u00a0", " "), others) == (shown, [])


def test_what_is_no_pair_of_numbers_stays_in_the_table():
    cards, others = final_cards({"score_before": None, "score_after": 1.5, "x": 1, "x_ci95": [None, 2]})
    assert [card.label.title for card in cards] == ["X", "Score (after)"]
    assert shown(others) == [("Score (before)", "", ""), ("X CI95", "[null, 2]", "")]


def test_many_numbers_do_not_bury_the_page():
    cards, others = final_cards({f"n{i}": i for i in range(40)} | {f"n{i}_ci95": [0, 40] for i in range(40)})
    assert len(cards) == MAX_CARDS
    assert len(others) == 40 - MAX_CARDS
    assert others[-1].text == "39 95 % interval [0,\u00a040]"


def test_texts():
    assert [value_text(x) for x in ("a", 1234, 0.00012, None, True, [1])] == [
        "a",
        "1,234",
        "0.00012",
        "",
        "true",
        "[1]",
    ]
    assert [duration_text(x) for x in (3.21, 42, 433, 3700)] == ["3.2 s", "42 s", "7 min 13 s", "1 h 1 min"]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.429, 0.00512], ["0.429", "0.005"]),
        ([0.25, 0.5], ["0.25", "0.50"]),
        ([14.833, 16.2], ["14.83", "16.20"]),
        ([-0.12, 2.3456], ["-0.120", "2.346"]),
        ([3, 4], ["3", "4"]),
        ([0.0, 5e-7], ["0", "5e-07"]),
        ([12.0, 1234.5], ["12", "1,234"]),
        ([], []),
    ],
)
def test_numbers_that_are_read_together_have_the_same_decimals(values, shown):
    assert texts(values) == shown
