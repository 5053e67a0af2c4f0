"""The calibration error without the part of chance."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_jax.quality.calibration import debiased_calibration_error
from rlaif_jax.quality.statistics import calibration_columns, calibration_error
from rlaif_jax.quality.values import sum_by_group


def drawn(rng, n, sure):
    confidence = rng.uniform(0.5, 1, n)
    return confidence, (rng.random(n) < 0.5 + (confidence - 0.5) * sure).astype(float)


@pytest.mark.parametrize("sure, truth", [(1.0, 0.0), (0.5, 0.125)])
def test_a_calibrated_judges_interval_reaches_0_and_contains_its_own_value(sure, truth):
    """The percentile interval of the plain error reached below .005 in 0 of 60, and 8 of 60 were above their value."""
    plain, values, covered = [], [], 0
    for seed in range(60):
        columns = calibration_columns(*drawn(np.random.default_rng(seed), 400, sure))
        found = debiased_calibration_error(columns)
        assert found["plain"] == pytest.approx(float(calibration_error(columns.sum(0))))
        assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1 and found["value"] <= found["plain"]
        covered += found["low"] <= truth <= found["high"]
        plain.append(found["plain"])
        values.append(found["value"])
    assert covered >= 52
    assert abs(np.mean(values) - truth) < 0.5 * (np.mean(plain) - truth)


def test_many_predictions_have_the_plain_error():
    columns = calibration_columns(*drawn(np.random.default_rng(0), 200_000, 0.5))
    found = debiased_calibration_error(columns)
    assert found["value"] == pytest.approx(found["plain"], abs=1e-4) == pytest.approx(0.125, abs=0.005)
    assert found["high"] - found["low"] < 0.01


def test_predictions_of_one_prompt_are_not_independent():
    columns = calibration_columns(*drawn(np.random.default_rng(1), 200, 0.5))
    alone = debiased_calibration_error(columns)
    together = debiased_calibration_error(sum_by_group(np.repeat(columns, 4, axis=0), np.arange(200).repeat(4), 200))
    assert [together[k] for k in ("value", "low", "high")] == pytest.approx(
        [alone[k] for k in ("value", "low", "high")]
    )
    blind = debiased_calibration_error(np.repeat(columns, 4, axis=0))
    assert blind["high"] - blind["low"] < 0.7 * (alone["high"] - alone["low"])


def test_few_errors_are_said():
    sure = calibration_columns(np.full(50, 0.99), np.ones(50))
    assert "fewer than 10" in debiased_calibration_error(sure)["note"]
    assert "note" not in debiased_calibration_error(calibration_columns(*drawn(np.random.default_rng(2), 400, 1)))


def test_no_predictions_no_number():
    assert debiased_calibration_error(np.zeros((4, 31)))["value"] is None
    one = np.zeros((4, 31))
    one[1] = calibration_columns([0.9], [1.0])[0]
    found = debiased_calibration_error(one)
    assert (found["value"], found["low"], found["reason"]) == (pytest.approx(0.1), None, "one prompt has no interval")


@given(st.lists(st.tuples(st.floats(0.5, 1), st.sampled_from([0.0, 0.5, 1.0])), min_size=2, max_size=40))
@settings(max_examples=150, deadline=None)
def test_the_value_is_always_in_its_interval_and_at_most_the_plain_error(pairs):
    found = debiased_calibration_error(calibration_columns(*np.array(pairs).T))
    assert 0 <= found["low"] <= found["value"] + 1e-9 <= found["high"] + 2e-9 <= 1 + 3e-9
    assert found["value"] <= found["plain"] + 1e-9
