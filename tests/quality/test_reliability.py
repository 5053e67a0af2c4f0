"""One rater model of people and judges finds who was planted as what; people are its anchor."""

from functools import partial

import numpy as np
import pytest

import rlaif_jax.quality.reliability as reliability
from rlaif_jax.feedback.records.forms import Ranking, Rater
from rlaif_jax.quality.quality import quality
from rlaif_jax.quality.text import quality_text
from rlaif_jax.rewards.crowd_bt import crowd_bt
from tests.quality.records import verdict

PLANTED = {
    "ann": ("person", 0.95),
    "bob": ("person", 0.8),
    "cat": ("person", 0.85),
    "judge": ("ai", 0.7),
    "coin": ("ai", 0.5),
    "rule": ("rule", 0.85),
}


def records(count=300, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        truth = int(rng.integers(2))
        for name, (source, accuracy) in PLANTED.items():
            if rng.random() < 0.8:
                said = truth if rng.random() < accuracy else 1 - truth
                ranks = (1, 2) if said == 0 else (2, 1)
                found.append(Ranking(prompt=f"p{i}", answers=("a", "b"), rater=Rater(name, source), ranks=ranks))
    return found


def test_planted_accuracies_are_recovered_people_and_judges_alike():
    report = quality(records())
    rows = {row["rater"]: row for row in report["raters"]["rows"]}
    assert set(rows) == set(PLANTED)
    for name, (source, accuracy) in PLANTED.items():
        assert rows[name]["source"] == source
        assert rows[name]["accuracy"]["value"] == pytest.approx(accuracy, abs=0.07), name
        assert rows[name]["accuracy"]["low"] < accuracy < rows[name]["accuracy"]["high"] + 0.02, name
    by_eta = sorted(rows, key=lambda name: -rows[name]["eta"]["value"])
    assert by_eta[-2:] == ["judge", "coin"]
    assert "Reliability of raters" in quality_text(report)


@pytest.mark.slow
def test_an_interval_is_about_as_wide_as_the_error():
    errors, widths = [], []
    for seed in range(12):
        rows = {row["rater"]: row for row in quality(records(150, seed))["raters"]["rows"]}
        errors.append(rows["bob"]["accuracy"]["value"] - 0.8)
        widths.append((rows["bob"]["accuracy"]["high"] - rows["bob"]["accuracy"]["low"]) / 2 / 1.96)
    assert 0.5 < np.mean(widths) / np.sqrt(np.mean(np.square(errors))) < 2


def test_with_too_little_in_common_there_is_a_reason():
    part = quality(records(2))["raters"]
    assert part["rows"] == []
    assert "10 are needed" in part["reason"]


# ---- Anchored on people

GOLD, FINAL = Rater("gold", "person"), Rater("adjudicated by gold", "person")


def judged(judges, gold=GOLD, count=200, seed=0):
    """Verdicts of a person who is right, and of judges; `judges`: (rng, truth) -> {name: verdict}."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        truth = int(rng.integers(2))
        given = {gold: truth} | {Rater(name, "ai"): said for name, said in judges(rng, truth).items()}
        found += [verdict(f"p{i}", ("a", "b"), rater, said) for rater, said in given.items()]
    return found


BELOW = {"good": 0.8, "fair": 0.75} | {f"bad {k}": 0.2 + 0.03 * k for k in range(6)}


def six_of_eight_below_chance(rng, truth):
    return {name: truth if rng.random() < share else 1 - truth for name, share in BELOW.items()}


def eight_that_err_alike(rng, truth):
    """All look at one thing that is right in 3 of 10 pairs."""
    seen = truth if rng.random() < 0.3 else 1 - truth
    return {f"judge {k}": seen if rng.random() < 0.95 else 1 - seen for k in range(8)}


def one_below_chance(rng, truth):
    return {"bad": truth if rng.random() < 0.2 else 1 - truth}


@pytest.mark.parametrize("source", ["person", "simulated"])
def test_a_gold_label_is_not_one_vote_among_judges(source):
    gold = Rater("gold", source)
    rows = {r["rater"]: r for r in quality(judged(six_of_eight_below_chance, gold))["raters"]["rows"]}
    assert rows["gold"]["accuracy"]["value"] > 0.95
    for name, planted in BELOW.items():
        assert rows[name]["accuracy"]["value"] == pytest.approx(planted, abs=0.09), name
        assert rows[name]["accuracy"]["high"] - rows[name]["accuracy"]["low"] < 0.25
        assert (rows[name]["eta"]["value"] > 0.5) == (planted > 0.5)


@pytest.mark.parametrize(
    ("judges", "planted"), [(eight_that_err_alike, 0.3 * 0.95 + 0.7 * 0.05), (one_below_chance, 0.2)]
)
def test_judges_that_err_alike_or_alone_overrule_no_person(judges, planted):
    report = quality(judged(judges))["raters"]
    rows = {row["rater"]: row for row in report["rows"]}
    assert rows.pop("gold")["accuracy"]["value"] > 0.85
    assert all(row["accuracy"]["value"] == pytest.approx(planted, abs=0.1) for row in rows.values())
    assert all(row["eta"]["value"] < 0.45 for row in rows.values())
    assert "anchored on people" in report["note"] and "NOT" not in report["note"]


def test_without_people_what_judges_agree_on_is_believed_and_said():
    records = [r for r in judged(six_of_eight_below_chance) if r.rater.source == "ai"]
    report = quality(records)["raters"]
    assert {row["rater"]: row for row in report["rows"]}["bad 0"]["accuracy"]["value"] > 0.7
    assert "raters that err alike are believed" in report["note"]


def test_pairs_that_no_person_judged_do_not_count_unless_people_judged_too_few():
    records = judged(six_of_eight_below_chance)
    few = [r for r in records if r.rater != GOLD or int(r.prompt[1:]) < 40]
    rows = {row["rater"]: row for row in quality(few)["raters"]["rows"]}
    assert {row["count"] for row in rows.values()} == {40}
    fewer = quality([r for r in records if r.rater != GOLD or int(r.prompt[1:]) < 5])["raters"]
    assert "raters that err alike are believed" in fewer["note"]
    assert {row["count"] for row in fewer["rows"]} == {5, 200}


def test_an_adjudication_is_the_truth_of_its_pair():
    """Gold was wrong on a third of the pairs, all of which were decided against it."""
    records, final = [], []
    for record in judged(one_below_chance):
        wrong = record.rater == GOLD and int(record.prompt[1:]) % 3 == 0
        truth = record.ranks.index(1)
        records.append(verdict(record.prompt, ("a", "b"), record.rater, 1 - truth if wrong else truth))
        final += [verdict(record.prompt, ("a", "b"), FINAL, truth)] if wrong else []
    rows = {row["rater"]: row["accuracy"]["value"] for row in quality(records + final)["raters"]["rows"]}
    assert set(rows) == {"gold", "bad"}
    assert rows["gold"] == pytest.approx(2 / 3, abs=0.05)
    assert rows["bad"] == pytest.approx(0.2, abs=0.06)


# ---- Convergence


def test_a_model_that_did_not_converge_gives_no_number_and_says_so(monkeypatch):
    monkeypatch.setattr(reliability, "crowd_bt", partial(crowd_bt, max_steps=1))
    monkeypatch.setattr(reliability, "_EM_STEPS", 1)
    reliability._fit.clear_cache()
    report = quality(judged(six_of_eight_below_chance))
    reliability._fit.clear_cache()
    for row in report["raters"]["rows"]:
        for name in ("accuracy", "eta"):
            assert row[name] == {"value": None, "low": None, "high": None, "reason": "the model did not converge"}
    for model in ("Dawid-Skene", "Crowd-BT"):
        assert f"{model} did NOT converge in 11 of 11 fits" in quality_text(report)
