"""Cards are made from whatever numbers a run has."""

import pytest

from rlaif_jax.report.cards import MAX_CARDS, Card, duration_text, final_cards, value_text


def test_intervals_come_first_then_pairs_then_other_numbers():
    numbers = {
        "kl": 8.91,
        "length_after": 25.9,
        "length_before": 22.3,
        "alone_before": 2,
        "win_rate": 0.7134,
        "win_rate_ci95": [0.651, 0.772],
        "wall_s": 3.0,
        "hash": "abc",
    }
    cards, others = final_cards(numbers, 7.25)
    assert cards == [
        Card("Win rate", "71.3 %", "95 % interval 65.1 to 77.2 %"),
        Card("Answer length, before → after", "22.3 → 25.9", "tokens"),
        Card("KL to the reference", "8.91", "nats per answer"),
        Card("Alone before", "2", ""),
        Card("Wall time", "7.2 s"),
    ]
    assert others == [("Hash", "abc")]
    assert "wall_s" in numbers, "the caller's numbers are left alone"


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("judge_agreement_final", 0.5, "50.0 %"),
        ("same_position_rate", 0.093, "9.3 %"),
        ("learning_rate", 0.003, "0.003"),
        ("error_rate", 3, "3"),
        ("rm_accuracy", 1, "100.0 %"),
        ("rating", 0.5, "0.5"),
    ],
)
def test_shares_are_percentages(name, value, shown):
    ((card,), others) = final_cards({name: value}, None)
    assert (card.value, others) == (shown, [])


def test_what_is_no_pair_of_numbers_stays_in_the_table():
    cards, others = final_cards({"score_before": None, "score_after": 1.5, "x": 1, "x_ci95": [None, 2]}, None)
    assert [card.title for card in cards] == ["X", "Score after"]
    assert others == [("Score before", ""), ("X CI95", "[null, 2]")]


def test_many_numbers_do_not_bury_the_page():
    cards, others = final_cards({f"n{i}": i for i in range(40)}, 5000)
    assert len(cards) == MAX_CARDS
    assert cards[-1] == Card("Wall time", "1 h 23 min")
    assert len(others) == 40 - MAX_CARDS + 1


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
