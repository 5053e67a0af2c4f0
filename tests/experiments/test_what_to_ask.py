"""The experiment on choosing, in small: its reward model, its reading of curves, and a whole run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.what_to_ask import AskConfig
from rlaif_jax.config import UserError
from rlaif_jax.data.world.tasks import summarisation
from rlaif_jax.quality.label_curves import labels_to_reach, saved_share, smoothed, t_interval
from rlaif_jax.recipes import asking

ROOT = Path(__file__).resolve().parents[2]


def test_features_see_what_matters_in_a_summary():
    prompt = "summarise sel mor : vital market damp minor river narrow ="
    names = {word: asking._WORD[word] for word in ("vital", "minor", "market")}
    size = len(asking.VOCABULARY)
    x = asking.features(prompt, "in sel mor the market damp and the market damp .")
    assert x[names["market"]] == 2
    assert x[size + names["vital"]] == 1  # once, though it is said twice
    assert x[size + names["minor"]] == 0
    assert x[2 * size] == 11
    assert x[2 * size + 2] == 1  # "market damp" again
    assert x[2 * size + 6] == 1
    assert not asking.features(prompt, "").any()


def test_the_reward_model_is_scikit_learns_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 5)).astype(np.float32)
    wins = (rng.random(80) < 1 / (1 + np.exp(-2 * x[:, 0]))).astype(np.float32)
    weights = rng.exponential(size=(2, 80)).astype(np.float32)
    found = np.asarray(asking.fit_rewards(x, wins, weights, 3.0))
    for w, c in zip(weights, found):
        oracle = LogisticRegression(C=1 / 3.0, fit_intercept=False, tol=1e-10).fit(x, wins, sample_weight=w)
        np.testing.assert_allclose(c, oracle.coef_[0], atol=1e-4)


@pytest.mark.parametrize(
    "accuracies, expected",
    [
        ([0.5, 0.7, 0.9], 200.0),
        ([0.5, 0.6, 0.8], 282.8427),  # half-way between 200 and 400, in the logarithm
        ([0.5, 0.8, 0.6], None),  # it fell below again
        ([0.8, 0.6, 0.8], 282.8427),
        ([0.7, 0.7, 0.7], 100.0),
    ],
)
def test_labels_to_reach(accuracies, expected):
    found = labels_to_reach(0.7, [100, 200, 400], accuracies)
    assert found == (None if expected is None else pytest.approx(expected))


def test_an_order_that_is_the_random_one_saves_nothing():
    labels, level = [100, 200, 400], [0.5, 0.7, 0.7]  # at its end 200 labels early
    needed = labels_to_reach(level[-1], labels, level)
    assert saved_share(needed, needed, 400) == 0
    assert saved_share(100, 200, 400) == 0.5
    assert saved_share(None, 200, 400) == -1.0  # at least the whole budget


def test_a_late_dip_decides_nothing():
    labels = [100, 200, 400, 800]
    curves = [[0.5, 0.8, 0.8, 0.79], [0.5, 0.8, 0.8, 0.79]]
    smooth = smoothed(curves)
    assert smooth == pytest.approx([0.5, 2.39 / 3, 2.39 / 3, 2.39 / 3])
    assert labels_to_reach(0.795, labels, smooth) < 200
    assert labels_to_reach(0.795, labels, curves[0]) is None


def test_every_seed_has_held_out_towns_of_its_own():
    task = summarisation.TASK
    pairs = [asking.make_pairs(np.random.default_rng(seed), task, "test_entities", 20, None) for seed in (0, 1)]
    assert not set(pairs[0].prompts) & set(pairs[1].prompts)


def test_the_interval_is_students():
    from scipy.stats import ttest_1samp

    values = [0.3, 0.5, 0.4, 0.45, 0.6]
    interval = ttest_1samp(values, 0).confidence_interval()
    assert t_interval(values) == pytest.approx((np.mean(values), interval.low, interval.high))


@pytest.mark.parametrize(
    "wrong", [{"repeats": 0}, {"start": 4}, {"growth": 1.0}, {"budget": 5000}, {"ridge": 0.0}], ids=str
)
def test_bad_settings_of_asking_are_refused(wrong):
    with pytest.raises(UserError):
        AskConfig(asking=asking.AskingConfig(**wrong))


def test_a_single_seed_is_refused():
    with pytest.raises(UserError, match="seeds must be >= 2 for an interval, not 1"):
        AskConfig(seeds=1)


def test_a_whole_small_run(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "experiments" / "what_to_ask.py"), "--out", str(out), "--seeds", "2"]
    command += ["--prompts", "60", "--test-prompts", "40", "--asking.start", "16", "--asking.budget", "64"]
    command += ["--asking.growth", "2", "--asking.models", "3", "--asking.repeats", "2"]
    done = subprocess.run(
        command,
        env=os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"},
        check=True,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert "fewer [" in done.stdout
    result = json.loads((out / "what_to_ask.json").read_text())
    assert result["labels"] == [16, 32, 64]
    curves = {order: np.array(found) for order, found in result["accuracy"].items()}
    assert all(found.shape == (2, 2, 3) for found in curves.values())  # seeds, repeats, budgets
    for found in curves.values():
        np.testing.assert_array_equal(found[..., 0], curves["random"][..., 0])  # all begin with the same labels
    for number in range(2):
        target, needed = smoothed(result["accuracy"]["random"][number])[-1], result["labels_needed"]
        ensemble = labels_to_reach(target, result["labels"], smoothed(result["accuracy"]["ensemble"][number]))
        assert needed["ensemble"][number] == ensemble
        assert result["saved"]["ensemble"][number] == saved_share(ensemble, needed["random"][number], 64)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "done"
    assert summary["claims"][0]["ci95"][0] <= summary["claims"][0]["ours"] <= summary["claims"][0]["ci95"][1]
