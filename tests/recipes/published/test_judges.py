"""Measures of published judges, on a small file: what the intervals draw."""

import numpy as np
import pytest
from rlaif_jax.evaluate import bootstrap_ci

from rlaif_jax.quality.bootstrap import Bootstrap
from rlaif_jax.quality.statistics import interval_alpha, interval_moments
from rlaif_jax.recipes.published.judges import summaries
from tests.recipes.published.squality_file import turning, upwards, write_squality


def test_workers_agreement_is_resampled_by_question(tmp_path):
    """In even questions the second worker agrees in everything, in odd ones in nothing."""
    rows = list(summaries(write_squality(tmp_path, upwards, turning), seed=0))
    alphas, alike = rows[:3], rows[3:]
    moments = [
        sum(interval_moments([90.0 - 30 * k, 90.0 - 30 * (2 - k if q % 2 else k)]) for k in range(3)) for q in range(12)
    ]
    expected = Bootstrap(12).estimate(np.array(moments), interval_alpha)
    for row in alphas:
        assert (row.value, row.low, row.high) == pytest.approx(tuple(expected[k] for k in ("value", "low", "high")))
    by_question = [float(q % 2 == 0) for q in range(12)]
    for row in alike:
        assert row.value == 0.5
        low, high = bootstrap_ci(by_question, seed=0)
        assert row.high - row.low == pytest.approx(high - low, abs=0.1)
