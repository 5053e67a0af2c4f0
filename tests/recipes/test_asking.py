"""Choosing what to ask, in small: the features, the reward model, the pairs, the settings."""

import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.data.world.tasks import summarisation
from rlaif_jax.recipes import asking


def test_features_see_what_matters_in_a_summary():
    prompt = "summarise sel mor : market damp vital river narrow minor ="
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


def test_every_seed_has_held_out_towns_that_differ():
    task = summarisation.TASK
    pairs = [asking.make_pairs(np.random.default_rng(seed), task, "test_entities", 20, None) for seed in (0, 1)]
    assert not set(pairs[0].prompts) & set(pairs[1].prompts)


@pytest.mark.parametrize(
    "wrong", [{"repeats": 0}, {"start": 4}, {"growth": 1.0}, {"budget": 64}, {"ridge": 0.0}], ids=str
)
def test_bad_settings_of_asking_are_refused(wrong):
    with pytest.raises(UserError):
        asking.AskingConfig(**wrong)
