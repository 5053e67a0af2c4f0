"""The report on records whose truth is known: what counts, what is missing, and the whole."""

import dataclasses
import json
import math

import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.feedback.records.forms import Call, Comment, Correction, Ranking, Rater, Rating
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.quality.quality import quality, quality_of_store
from rlaif_jax.quality.text import quality_text
from tests.quality.records import ANN, BOB, FAST, JUDGE, everything, matches, only, verdict


def numbers(value):
    """Every number of a report."""
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, float) else []


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
    report = quality(records, **FAST)
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


def test_superseded_and_retracted_records_only_cost_money():
    first = verdict("p", ("a", "b"), JUDGE, 0, call=Call(cost=1.0))
    second = dataclasses.replace(first, ranks=(2, 1), supersedes=first.id)
    third = verdict("q", ("a", "b"), JUDGE, 0, call=Call(cost=1.0))
    back = dataclasses.replace(third, status="retracted", supersedes=third.id, call=Call())
    report = quality([first, second, third, back, second], **FAST)
    assert (report["records"], report["used"]) == (5, 1)
    assert report["habits"][0]["count"] == 1
    assert report["cost"][0]["cost"] == 4.0  # the same record read twice was paid once, but who reads it twice says so


def test_a_store_is_read_whole(tmp_path):
    first = verdict("p", ("a", "b"), JUDGE, 0, call=Call(0.5, 10, 2, 0.25))
    again = dataclasses.replace(first, ranks=(2, 1), supersedes=first.id)
    with Store(tmp_path / "f.sqlite") as store:
        store.add([first, again])
    report = quality_of_store(tmp_path / "f.sqlite", **FAST)
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
    one, two, three = (quality(r, **FAST) for r in (records, turned, mixed))
    assert one == two == three


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
    report = quality(records, **FAST)
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


def test_a_report_is_a_function_of_its_records_with_intervals_around_its_values():
    one, same = (quality(everything(), **FAST) for _ in range(2))
    assert one == same
    assert all(math.isfinite(n) for n in numbers(one))
    estimates = []

    def walk(value):
        if isinstance(value, dict):
            if {"value", "low", "high"} <= set(value) and "reason" not in value:
                estimates.append(value)
            for v in value.values():
                walk(v)
        elif isinstance(value, list):
            for v in value:
                walk(v)

    walk(one)
    assert len(estimates) > 30
    assert all(e["low"] <= e["value"] <= e["high"] for e in estimates)


def test_items_say_what_is_resampled_together():
    records = matches(np.random.default_rng(8))
    wide = quality(records, items=[r.prompt[:2] for r in records], **FAST)
    assert (quality(records, **FAST)["prompts"], wide["prompts"]) == (200, 10)


def test_simulated_people_are_called_so():
    records = [verdict(f"p{i}", ("a", "b"), Rater("sim", "simulated"), i % 2) for i in range(4)]
    report = quality(records, **FAST)
    assert report["people"] == "simulated"
    assert "SIMULATED" in quality_text(report)


def test_the_text_shows_every_part_and_no_control_characters():
    records = everything()
    evil = Rater("evil\x1b[31m\nname" + "x" * 99, "ai")
    text = quality_text(quality([*records, verdict("p0", ("a", "b"), evil, 0)], **FAST))
    for title in (
        "Records", "Agreement of sources on comparisons", "Krippendorff's alpha on ratings", "Both orders", "Asked again",
        "Length", "Probabilities against people's verdicts", "Win rates", "debiased by people's labels",
        "What labels would buy", "Questions without an answer", "Cost",
    ):  # fmt: skip
        assert title in text, title
    assert "\x1b" not in text
    assert "evil?[31m?name" in text
    assert max(map(len, text.splitlines())) < 220
    rows = text.split("debiased by people's labels")[1].split("\n\n")[0]
    assert rows.count("%") == 3 * rows.count("debiased") * 2, "the win rate and that of the labels alone are shares"
