"""One rater model of people and judges finds who was planted as what."""

import numpy as np
import pytest

from rlaif_jax.feedback.records.forms import Ranking, Rater
from rlaif_jax.quality.quality import quality
from rlaif_jax.quality.text import quality_text

PLANTED = {
    "ann": ("person", 0.95),
    "bob": ("person", 0.8),
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
