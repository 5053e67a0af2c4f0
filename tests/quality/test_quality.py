"""The report on records whose truth is known: planted biases are found, nothing missing becomes a number."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.evaluate import length_controlled_win_rate
from rlaif_jax.feedback.records.forms import Call, Comment, Correction, Ranking, Rater, Rating
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.quality import quality, quality_of_store, quality_text

ANN, BOB, JUDGE = Rater("ann", "person"), Rater("bob", "person"), Rater("judge", "ai")
LESS = {"resamples": 200, "reliability": False}


def verdict(prompt, answers, rater, winner, **more):
    """winner 0 or 1, or None for a tie."""
    ranks = (1, 1) if winner is None else (1, 2) if winner == 0 else (2, 1)
    more.setdefault("status", "tie" if winner is None else "ok")
    return Ranking(prompt=prompt, answers=tuple(answers), rater=rater, ranks=ranks, **more)


def probable(prompt, answers, shown, p, **more):
    return Ranking(
        prompt=prompt,
        answers=answers,
        rater=JUDGE,
        ranks=(1, 2) if p > 0.5 else (2, 1),
        probability=p,
        shown=shown,
        **more,
    )


def numbers(value):
    """Every number of a report."""
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, float) else []


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def only(rows, **wanted):
    (row,) = [r for r in rows if all(r[k] == v for k, v in wanted.items())]
    return row


# ---- Little or nothing


@pytest.mark.parametrize("count", range(4))
def test_tiny_stores_work(count):
    records = [
        verdict("p", ("a", "b"), ANN, 0),
        Rating(prompt="p", answers=("a",), rater=ANN, value=3),
        Ranking(prompt="p", answers=("a", "b"), rater=JUDGE, status="refused"),
    ][:count]
    report = quality(records)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert quality_text(report).startswith(f"Feedback: {count} of {count} records")


def test_forms_without_a_verdict_are_counted():
    records = [
        Comment(prompt="p", answers=("a",), rater=ANN, text="good"),
        Correction(prompt="p", answers=("a",), rater=BOB, edited="b"),
        Ranking(prompt="p", answers=("a", "a"), rater=BOB, ranks=(1, 2)),  # two equal answers: no pair
    ]
    report = quality(records, **LESS)
    assert [(row["form"], row["answered"]) for row in report["counts"]] == [
        ("comment", 1),
        ("correction", 1),
        ("ranking", 1),
    ]
    assert report["habits"] == report["agreement"]["comparisons"]["raters"] == []


def test_bad_arguments():
    with pytest.raises(UserError, match="items"):
        quality([verdict("p", ("a", "b"), ANN, 0)], items=["x", "y"])
    with pytest.raises(UserError, match="level"):
        quality([], level=1.5)


# ---- What counts


def test_superseded_and_retracted_records_only_cost_money():
    first = verdict("p", ("a", "b"), JUDGE, 0, call=Call(cost=1.0))
    second = dataclasses.replace(first, ranks=(2, 1), supersedes=first.id)
    third = verdict("q", ("a", "b"), JUDGE, 0, call=Call(cost=1.0))
    back = dataclasses.replace(third, status="retracted", supersedes=third.id, call=Call())
    report = quality([first, second, third, back, second], **LESS)
    assert (report["records"], report["used"]) == (5, 1)
    assert report["habits"][0]["count"] == 1
    assert report["cost"][0]["cost"] == 4.0  # the same record read twice was paid once, but who reads it twice says so


def test_a_store_is_read_whole(tmp_path):
    first = verdict("p", ("a", "b"), JUDGE, 0, call=Call(0.5, 10, 2, 0.25))
    again = dataclasses.replace(first, ranks=(2, 1), supersedes=first.id)
    with Store(tmp_path / "f.sqlite") as store:
        store.add([first, again])
    report = quality_of_store(tmp_path / "f.sqlite", **LESS)
    assert (report["records"], report["used"], report["cost"][0]["cost"]) == (2, 1, 0.5)
    with pytest.raises(UserError, match="no such feedback store"):
        quality_of_store(tmp_path / "g.sqlite")
    assert not (tmp_path / "g.sqlite").exists()


def test_the_order_in_which_answers_are_written_down_has_no_meaning():
    rng = np.random.default_rng(0)
    records, turned = [], []
    for i in range(30):
        answers = ("x" * (1 + i % 7), "y" * (1 + i % 5))
        for rater in (ANN, BOB, JUDGE):
            winner = rng.choice([0, 1, None])
            shown = (0, 1) if rng.random() < 0.5 else (1, 0)
            names = ("m", "n")
            records.append(verdict(f"p{i}", answers, rater, winner, shown=shown, generators=names))
            other = None if winner is None else 1 - winner
            turned.append(
                verdict(
                    f"p{i}", answers[::-1], rater, other, shown=(1 - shown[0], 1 - shown[1]), generators=names[::-1]
                )
            )
    mixed = [r if i % 3 else t for i, (r, t) in enumerate(zip(records, turned))]
    one, two, three = (quality(r, **LESS) for r in (records, turned, mixed))
    assert one == two == three


# ---- Agreement


def test_agreement_and_kappa_by_hand():
    """Ann and Bob on 10 pairs: 4 + 2 + 1 on the diagonal (first, second, tie); alike in orientation as "a" < "b"."""
    cells = [(0, 0)] * 4 + [(1, 1)] * 2 + [(None, None)] + [(0, 1)] * 2 + [(1, 0)]
    records = [
        verdict(f"p{i}", ("a", "bb"), rater, winner, shown=(0, 1))
        for i, pair in enumerate(cells)
        for rater, winner in zip((ANN, BOB), pair)
    ]
    report = quality(records, **LESS)["agreement"]["comparisons"]
    (row,) = report["raters"]
    chance = (6 * 5 + 3 * 4 + 1 * 1) / 100
    assert row["agreement"]["value"] == pytest.approx(0.7)
    assert row["kappa"]["value"] == pytest.approx((0.7 - chance) / (1 - chance))
    assert row["longer"]["value"] == pytest.approx(0.4)  # bob takes the longer one in 4 of 10
    assert row["first"]["value"] == pytest.approx(0.5)  # and what is shown first in 5
    assert 0.3 < row["agreement"]["low"] < 0.7 < row["agreement"]["high"] <= 1
    (sources,) = report["sources"]
    assert (sources["a"], sources["b"], sources["agreement"]["value"]) == ("person", "person", pytest.approx(0.7))
    assert [row["source"] for row in report["alpha"]] == ["person", "all"]


def test_alpha_of_comparisons_and_ratings_is_krippendorffs():
    import krippendorff

    rng = np.random.default_rng(1)
    raters = [Rater(f"r{k}", "person") for k in range(4)]
    table, marks = np.full((4, 25), np.nan), np.full((4, 25), np.nan)
    records = []
    for unit, k in itertools.product(range(25), range(4)):
        if rng.random() < 0.6:
            winner = int(rng.random() < 0.2 + 0.6 * (unit % 2))
            table[k, unit] = winner
            records.append(verdict(f"p{unit}", ("a", "b"), raters[k], winner))
            marks[k, unit] = np.clip(unit % 5 + rng.integers(-1, 2), 0, 10)
            records.append(
                Rating(prompt=f"p{unit}", answers=("a",), rater=raters[k], value=marks[k, unit], low=0, high=10)
            )
    agreement = quality(records, **LESS)["agreement"]
    found = only(agreement["comparisons"]["alpha"], source="person")["nominal"]["value"]
    assert found == pytest.approx(krippendorff.alpha(reliability_data=table, level_of_measurement="nominal"))
    for level in ("nominal", "ordinal", "interval"):
        found = only(agreement["ratings"]["alpha"], source="person")[level]["value"]
        assert found == pytest.approx(krippendorff.alpha(reliability_data=marks, level_of_measurement=level))


def test_ratings_agree_as_scikit_learn_says():
    from sklearn.metrics import cohen_kappa_score

    rng = np.random.default_rng(2)
    a = rng.integers(1, 6, 60)
    b = np.clip(a + rng.integers(-1, 2, 60), 1, 5)
    records = [
        Rating(prompt=f"p{i}", answers=("x",), rater=rater, value=float(v), low=1, high=5)
        for i, pair in enumerate(zip(a, b))
        for rater, v in zip((ANN, BOB), pair)
    ]
    (row,) = quality(records, **LESS)["agreement"]["ratings"]["raters"]
    assert row["agreement"]["value"] == pytest.approx(np.mean(a == b))
    assert row["kappa"]["value"] == pytest.approx(cohen_kappa_score(a, b, weights="quadratic"))
    assert row["correlation"]["value"] == pytest.approx(np.corrcoef(a, b)[0, 1])


def test_scales_are_compared_on_the_unit_interval_and_many_values_as_numbers():
    ten = [Rating(prompt=f"p{i}", answers=("x",), rater=ANN, value=1 + 9 * i / 4) for i in range(5)]
    five = [Rating(prompt=f"p{i}", answers=("x",), rater=BOB, value=1.0 + i, low=1, high=5) for i in range(5)]
    row = quality(ten + five, **LESS)["agreement"]["ratings"]["raters"][0]
    assert row["agreement"]["value"] == 1
    assert row["kappa"]["value"] == pytest.approx(1)
    many = [
        Rating(prompt=f"p{i}", answers=("x",), rater=rater, value=i + shift, low=0, high=100)
        for i in range(50)
        for rater, shift in ((ANN, 0), (BOB, 1))
    ]
    alpha = only(quality(many, **LESS)["agreement"]["ratings"]["alpha"], source="person")
    assert alpha["ordinal"]["value"] is None
    assert "interval" in alpha["ordinal"]["reason"]
    assert alpha["interval"]["value"] > 0.99


def test_an_order_conflict_is_half_a_vote_for_each_side_and_no_tie():
    records = []
    for i in range(8):
        records += [
            verdict(f"p{i}", ("a", "b"), JUDGE, 0, shown=(0, 1)),
            verdict(f"p{i}", ("a", "b"), JUDGE, 1, shown=(1, 0)),
        ]
        records.append(verdict(f"p{i}", ("a", "b"), ANN, i % 2))
    report = quality(records, **LESS)
    row = only(report["agreement"]["comparisons"]["sources"], a="ai", b="person")
    assert row["agreement"]["value"] == 0.5
    order = only(report["order"], rater="judge")
    assert (order["consistent"]["value"], order["same_position"]["value"]) == (0, 1)
    assert only(report["habits"], rater="judge")["ties"]["value"] == 0
    assert only(report["habits"], rater="judge")["first"]["value"] == 1


def test_models_that_wrote_the_same_texts_have_their_own_wins():
    """Judged first on behalf of m and n, then of n and m: each won once."""
    records = [
        verdict("p", ("a", "b"), JUDGE, 0, generators=("m", "n")),
        verdict("p", ("b", "a"), JUDGE, 1, generators=("m", "n")),
        verdict("p", ("a", "b"), JUDGE, 0, generators=("k", "n")),
    ]
    rows = quality(records, **LESS)["win_rates"]["rows"]
    row = only(rows, a="m", b="n")
    assert (row["count"], row["wins"], row["losses"], row["rate"]["value"]) == (2, 1, 1, 0.5)
    assert only(rows, a="k", b="n")["wins"] == 1


def test_records_without_writers_speak_of_the_only_ones():
    records = [
        verdict("p", ("a", "b"), ANN, 0),
        verdict("p", ("b", "a"), JUDGE, 1, generators=("n", "m")),
    ]
    report = quality(records, **LESS)
    assert only(report["win_rates"]["rows"], source="person", a="m", b="n")["wins"] == 1
    assert report["agreement"]["comparisons"]["raters"][0]["agreement"]["value"] == 1


def test_equal_answers_of_two_models_are_a_tie():
    records = [
        verdict("p", ("a", "b"), JUDGE, 0, generators=("m", "n")),
        verdict("q", ("c", "c"), JUDGE, 0, generators=("n", "m")),
        verdict("q", ("c", "c"), JUDGE, 1, generators=("m", "n")),  # the same again
        verdict("r", ("c", "c"), JUDGE, 0, generators=("m", "m")),  # one model's twice: no match
    ]
    report = quality(records, **LESS)
    (row,) = report["win_rates"]["rows"]
    assert (row["count"], row["wins"], row["ties"], row["losses"]) == (2, 1, 1, 0)
    assert row["rate"]["value"] == 0.75
    assert only(report["habits"], rater="judge")["count"] == 1  # a verdict on equal answers shows no habit
    (only_ties,) = quality(records[1:2], **LESS)["win_rates"]["rows"]
    assert (only_ties["ties"], only_ties["rate"]["value"]) == (1, 0.5)


def test_principles_and_prompts_are_kept_apart():
    records = [
        verdict("p", ("a", "b"), ANN, 0, principle="kind"),
        verdict("p", ("a", "b"), BOB, 1, principle="brief"),
        verdict("q", ("a", "b"), BOB, 1, principle="kind"),
    ]
    assert quality(records, **LESS)["agreement"]["comparisons"]["raters"] == []


def test_a_long_ranking_is_its_pairs():
    records = [
        Ranking(prompt="p", answers=("a", "b", "c"), rater=ANN, ranks=(1, 2, 3)),
        Ranking(prompt="p", answers=("c", "b", "a"), rater=BOB, ranks=(1, 3, 2)),
    ]
    (row,) = quality(records, **LESS)["agreement"]["comparisons"]["raters"]
    assert (row["count"], row["agreement"]["value"]) == (3, pytest.approx(1 / 3))  # they agree on a > b alone


# ---- Order, repeats, length, calibration


def test_an_order_that_was_not_recorded_is_no_order():
    """As in HH and distilabel, whose records name the better answer first."""
    records = [verdict(f"p{i}", ("b", "a"), rater, 0) for i in range(8) for rater in (ANN, BOB)]
    records += [verdict("q", ("b", "a"), ANN, 1, shown=(1, 0))]
    report = quality(records, **LESS)
    assert only(report["habits"], rater="bob")["first"]["value"] is None
    assert only(report["habits"], rater="ann")["first"]["value"] == 1  # of the one verdict whose order is known
    (row,) = report["agreement"]["comparisons"]["raters"]
    assert row["agreement"]["value"] == 1
    assert row["first"]["value"] is None
    mixed = [verdict("p", ("a", "b"), JUDGE, 0), verdict("p", ("a", "b"), JUDGE, 0, shown=(1, 0))]
    assert quality(mixed, **LESS)["order"] == []


@pytest.mark.parametrize("bias", [0.0, 0.8, -1.5])
def test_a_planted_position_bias_is_recovered_and_cancels(bias):
    rng = np.random.default_rng(3)
    records, flips = [], 0
    for i in range(150):
        margin = rng.normal(0, 1.2)
        front, back = sigmoid(margin + bias), sigmoid(margin - bias)  # P(a better) when a, when b is shown first
        flips += (front > 0.5) != (back > 0.5)
        records += [probable(f"p{i}", ("a", "b"), (0, 1), front), probable(f"p{i}", ("a", "b"), (1, 0), back)]
        records.append(verdict(f"p{i}", ("a", "b"), ANN, int(margin < 0)))
    report = quality(records, **LESS)
    row = only(report["order"], rater="judge")
    assert row["bias"]["value"] == pytest.approx(bias, abs=1e-9)
    assert row["consistent"]["value"] == pytest.approx(1 - flips / 150)
    assert row["same_position"]["value"] == pytest.approx(flips / 150)
    chance = [(r["probability"] if isinstance(r, dict) else r.probability) for r in records if r.rater is JUDGE]
    mean = np.array(chance).reshape(-1, 2).mean(1)  # both orders averaged
    right = np.array([r.ranks[0] == 1 for r in records if r.rater is ANN], float)
    assert only(report["calibration"], rater="judge")["brier"]["value"] == pytest.approx(np.mean((mean - right) ** 2))


def test_a_judge_in_words_has_no_b_but_a_same_position_rate():
    records = [
        verdict(f"p{i}", ("a", "b"), JUDGE, int(s == (1, 0)), shown=s) for i in range(5) for s in ((0, 1), (1, 0))
    ]
    row = only(quality(records, **LESS)["order"], rater="judge")
    assert row["bias"] == {"value": None, "low": None, "high": None, "reason": "the judge gives no probabilities"}
    assert row["same_position"]["value"] == 1


def test_repeats():
    records = [verdict(f"p{i}", ("a", "b"), JUDGE, w, seed=s) for i in range(4) for s, w in enumerate((0, 0, i % 2))]
    records += [
        Rating(prompt=f"p{i}", answers=("a",), rater=BOB, value=v, low=1, high=5, time=v)
        for i in range(2)
        for v in (2, 4)
    ]
    rows = quality(records, **LESS)["repeats"]
    assert only(rows, rater="judge")["same"]["value"] == pytest.approx((1 + 1 / 3) / 2)
    assert only(rows, rater="bob")["same"]["value"] == 0
    assert only(rows, rater="bob")["distance"]["value"] == pytest.approx(0.5)


def test_the_length_slope_is_the_judges_alone():
    """People do not care for length (slope 0 however long), the judge takes the longer one."""
    rng = np.random.default_rng(4)
    records, x, gap = [], [], []
    for i in range(200):
        answers = ("a" * int(rng.integers(1, 40)), "b" * int(rng.integers(1, 40)))
        longer = len(answers[0]) - len(answers[1])
        judged, person = (1 - int(longer > 0) if longer else None), int(rng.integers(2))
        records += [verdict(f"p{i}", answers, JUDGE, judged), verdict(f"p{i}", answers, ANN, person)]
        x.append(longer)
        gap.append((0.5 if judged is None else 1 - judged) - (1 - person))
    report = quality(records, **LESS)
    row = only(report["length_slope"], rater="judge")
    x = np.array(x) / np.sqrt(np.mean(np.square(x)))
    assert row["slope"]["value"] == pytest.approx(np.linalg.lstsq(x[:, None], np.array(gap), rcond=None)[0][0])
    assert row["slope"]["low"] > 0.2
    same = only(
        quality([r if r.rater is ANN else dataclasses.replace(r, ranks=(2, 1), status="ok") for r in records], **LESS)[
            "length_slope"
        ],
        rater="judge",
    )
    assert same["slope"]["low"] < 0 < same["slope"]["high"]


# ---- Missing, cost


def test_what_is_missing_is_counted_by_length_and_generator_and_is_never_a_loss():
    records = []
    for i in range(40):
        answers = ("a" * (i + 1), "b" * (i + 1))
        if i < 30:
            records.append(verdict(f"p{i}", answers, JUDGE, 0, generators=("new", "old"), call=Call(1.0, 100, 10, 0.5)))
        else:
            status = "unparsed" if i % 2 else "refused"
            records.append(
                Ranking(
                    prompt=f"p{i}",
                    answers=answers,
                    rater=JUDGE,
                    status=status,
                    generators=("new", "old"),
                    call=Call(3.0, 100, 0, 0.5),
                )
            )
    report = quality(records, **LESS)
    missing = only(report["missing"], source="ai")
    assert (missing["unanswered"]["value"], missing["unparsed"], missing["refused"]) == (0.25, 5, 5)
    assert [row["unanswered"]["value"] for row in missing["by_length"]] == [0, 0, 0, 1]
    assert [row["count"] for row in missing["by_generator"]] == [40, 40]
    win = report["win_rates"]["rows"][0]
    assert (win["count"], win["rate"]["value"]) == (30, 1.0)
    (cost,) = report["cost"]
    assert cost["failures"] == {"refused": 5, "unparsed": 5}
    assert (cost["cost"], cost["prompt_tokens"], cost["completion_tokens"], cost["median_latency_s"]) == (
        20,
        4000,
        300,
        1,
    )


# ---- Win rates


def matches(rng, n=200, labelled=60):
    """Verdicts of a judge that leans to `new`, on all; of Ann on some, who thinks they are even."""
    records = []
    for i in range(n):
        answers = ("n" * int(rng.integers(5, 30)), "o" * int(rng.integers(5, 30)))
        truth = int(rng.random() < 0.5)
        judged = truth if rng.random() < 0.85 else 0
        records.append(verdict(f"p{i}", answers, JUDGE, judged, generators=("new", "old")))
        if i < labelled:
            records.append(verdict(f"p{i}", answers, ANN, truth, generators=("new", "old")))
    return records


def test_the_three_win_rates():
    records = matches(np.random.default_rng(5))
    report = quality(records, seed=7, **LESS)
    rows = report["win_rates"]["rows"]
    judge = only(rows, source="ai")
    wins = np.array([r.ranks == (1, 2) for r in records if r.rater is JUDGE], float)
    longer = np.array([len(r.answers[0]) - len(r.answers[1]) for r in records if r.rater is JUDGE])
    assert judge["rate"]["value"] == pytest.approx(wins.mean())
    assert (judge["wins"], judge["ties"], judge["losses"]) == (wins.sum(), 0, 200 - wins.sum())
    expected = length_controlled_win_rate(wins, longer, seed=7, resamples=200)
    assert judge["length_controlled"]["value"] == pytest.approx(expected.value)
    people = only(rows, source="person")
    debiased = only(rows, source="ai, debiased")
    assert (debiased["count"], debiased["labelled"]) == (200, 60)
    assert debiased["alone"]["value"] == pytest.approx(people["rate"]["value"])
    width = lambda e: e["high"] - e["low"]
    assert width(debiased["rate"]) < width(debiased["alone"])
    assert debiased["rate"]["low"] < 0.5 < debiased["rate"]["high"] < judge["rate"]["high"]
    assert [row["labels"] for row in debiased["budget"]] == [25, 50, 100, 200]


def test_a_reference_is_the_opponent_and_ties_are_half():
    records = [
        verdict("p", ("a", "b"), ANN, 0, generators=("base", "x")),
        verdict("q", ("a", "b"), ANN, None, generators=("x", "base")),
        verdict("r", ("a", "b"), ANN, 0, generators=("x", "y")),
        verdict("s", ("a", "b"), ANN, 0, generators=("x", "x")),
    ]
    (row,) = quality(records, reference="base", **LESS)["win_rates"]["rows"]
    assert (row["a"], row["b"], row["wins"], row["ties"], row["losses"]) == ("x", "base", 0, 1, 1)
    assert row["rate"]["value"] == 0.25
    assert len(quality(records, **LESS)["win_rates"]["rows"]) == 2


def test_few_labels_debias_nothing():
    row = only(
        quality(matches(np.random.default_rng(6), labelled=4), **LESS)["win_rates"]["rows"], source="ai, debiased"
    )
    assert row["rate"]["value"] is None
    assert "4 of these pairs" in row["rate"]["reason"]


# ---- The whole


def everything(seed=0):
    rng = np.random.default_rng(seed)
    records = matches(rng)
    records += [
        Rating(prompt=f"p{i}", answers=("x",), rater=r, value=int(rng.integers(1, 11)))
        for i in range(20)
        for r in (ANN, BOB)
    ]
    records += [
        probable(f"p{i}", ("a", "b"), s, float(rng.uniform())) for i in range(20) for s in ((0, 1), (1, 0), (1, 0))
    ]
    records += [verdict(f"p{i}", ("a", "b"), Rater("sim", "simulated"), int(rng.integers(2))) for i in range(20)]
    records += [verdict(f"p{i}", ("a", "b"), ANN, int(rng.integers(2))) for i in range(20)]
    return records


def test_a_report_is_a_function_of_records_and_seed_with_intervals_around_its_values():
    one, same, other = (quality(everything(), seed=s, **LESS) for s in (1, 1, 2))
    assert one == same != other
    assert all(math.isfinite(n) for n in numbers(one))
    estimates = []

    def walk(value):
        if isinstance(value, dict):
            if set(value) == {"value", "low", "high"}:
                estimates.append(value)
            for key, v in value.items():
                if key != "ece":  # noise makes it larger, more so in resamples
                    walk(v)
        elif isinstance(value, list):
            for v in value:
                walk(v)

    walk(one)
    assert len(estimates) > 30
    assert all(e["low"] <= e["value"] <= e["high"] for e in estimates)


def test_items_say_what_is_resampled_together():
    records = matches(np.random.default_rng(8))
    wide = quality(records, items=[r.prompt[:2] for r in records], **LESS)
    assert (quality(records, **LESS)["prompts"], wide["prompts"]) == (200, 10)


def test_simulated_people_are_called_so():
    records = [verdict(f"p{i}", ("a", "b"), Rater("sim", "simulated"), i % 2) for i in range(4)]
    report = quality(records, **LESS)
    assert report["people"] == "simulated"
    assert "SIMULATED" in quality_text(report)


def test_the_text_shows_every_part_and_no_control_characters():
    records = everything()
    evil = Rater("evil\x1b[31m\nname" + "x" * 99, "ai")
    text = quality_text(quality([*records, verdict("p0", ("a", "b"), evil, 0)], **LESS))
    for title in (
        "Records", "Agreement of sources on comparisons", "Krippendorff's alpha on ratings", "Both orders", "Asked again",
        "Length", "Probabilities against people's verdicts", "Win rates", "debiased by people's labels",
        "What labels would buy", "Questions without an answer", "Cost",
    ):  # fmt: skip
        assert title in text, title
    assert "\x1b" not in text
    assert "evil?[31m?name" in text
    assert max(map(len, text.splitlines())) < 220
