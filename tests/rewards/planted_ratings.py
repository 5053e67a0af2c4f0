"""Ratings of simulated raters whose bias, scale and noise are known."""

import numpy as np


def planted(seed: int, items: int, raters: int, count: int):
    """item, rater, response without noise, utility, bias, scale, noise of simulated raters."""
    rng = np.random.default_rng(seed)
    utility, bias = rng.normal(size=items), 0.8 * rng.normal(size=raters)
    scale, noise = np.exp(0.3 * rng.normal(size=raters)), np.exp(0.4 * rng.normal(size=raters) - 0.5)
    item, rater = rng.integers(0, items, count), rng.integers(0, raters, count)
    return rng, item, rater, bias[rater] + scale[rater] * utility[item], utility, bias, scale, noise


def continuous(seed=0, items=150, raters=15, count=1500):
    rng, item, rater, response, utility, bias, scale, noise = planted(seed, items, raters, count)
    value = 50 + 12 * (response + noise[rater] * rng.normal(size=count))
    return item, rater, value.astype(np.float32), utility, bias, scale, noise


def categories(seed=0, items=150, raters=15, count=1500, thresholds=(-1.5, -0.5, 0.5, 1.5)):
    rng, item, rater, response, utility, bias, scale, noise = planted(seed, items, raters, count)
    felt = response + noise[rater] * rng.logistic(size=count)
    return item, rater, (felt > np.array(thresholds)[:, None]).sum(0), utility, bias, scale, noise
