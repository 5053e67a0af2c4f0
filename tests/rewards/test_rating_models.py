"""Rating models: likelihoods and fits against statsmodels and scipy, planted raters found, real raters who were left out
ranked better than by raw means; the same under every transform."""

import csv
import io
import json
import tarfile
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm, spearmanr

from rlaif_jax.rewards import rating_models
from rlaif_jax.rewards.rating_models import bin_values, fit_gaussian, fit_ordinal, ordinal_log_prob
from rlaif_jax.rewards.ratings import raw_mean, z_score_mean
from tests.rewards.everywhere import fit_agrees_everywhere
from tests.rewards.planted_ratings import categories, continuous

pytestmark = pytest.mark.slow  # as a whole: many programs to compile

NAN = float("nan")


SMALL = {"num_items": 22, "num_raters": 5}


FITS = {  # one program each for small data: rows are filled up to 123 with weight 0
    "gaussian": jax.jit(partial(fit_gaussian, **SMALL)),
    "ordinal": jax.jit(partial(fit_ordinal, num_categories=5, **SMALL)),
}


def filled(*columns):
    """The columns with rows of weight 0 up to 123 rows, and the weights."""
    rest = 123 - len(columns[0])
    return *(np.r_[x, np.zeros(rest, x.dtype)] for x in columns), np.r_[np.ones(len(columns[0])), np.zeros(rest)]


def r(a, b):
    return np.corrcoef(a, b)[0, 1]


def test_bins_hold_about_the_same_weight_and_keep_ties_together():
    value = np.random.default_rng(0).permutation(np.r_[np.arange(60.0), np.full(40, 100.0)]).astype(np.float32)
    bins = np.asarray(bin_values(value, num_bins=4))
    np.testing.assert_array_equal(np.bincount(bins, minlength=4), [25, 25, 10, 40])
    assert set(bins[value == 100]) == {3}
    order = np.argsort(value)
    assert (np.diff(bins[order]) >= 0).all()
    with_missing = np.asarray(bin_values(np.r_[value, NAN, 5e8].astype(np.float32), np.r_[np.ones(101), 0], num_bins=4))
    np.testing.assert_array_equal(with_missing[:100], bins)


def test_ordinal_likelihood_is_statsmodels():
    ordered = pytest.importorskip("statsmodels.miscmodels.ordinal_model")
    item, rater, category, *_ = categories(count=300, items=4, raters=3)
    rng = np.random.default_rng(1)
    utility, bias, thresholds = rng.normal(size=4), rng.normal(size=3), np.array([-1.0, -0.2, 0.3, 1.4])
    design = np.c_[np.eye(4)[item], np.eye(3)[rater]]
    model = ordered.OrderedModel(category, design[:, 1:], distr="logit", hasconst=False)
    steps = np.r_[thresholds[0], np.log(np.diff(thresholds))] - np.r_[utility[0], 0, 0, 0]
    params = np.r_[utility[1:] - utility[0], bias, steps]
    response = jnp.asarray(utility[item] + bias[rater], jnp.float32)
    ours = ordinal_log_prob(jnp.asarray(category), response, jnp.ones(300), jnp.asarray(thresholds, jnp.float32))
    np.testing.assert_allclose(ours.sum(), model.loglike(params), rtol=1e-5)
    np.testing.assert_allclose(ours, model.loglikeobs(params), rtol=1e-3, atol=1e-5)
    noisy = ordinal_log_prob(
        jnp.asarray(category), 3 * response, jnp.full(300, 3.0), 3 * jnp.asarray(thresholds, jnp.float32)
    )
    np.testing.assert_allclose(noisy, ours, rtol=1e-5)


def test_ordinal_fit_of_one_rater_is_statsmodels():
    """One unbiased rater, 300 ratings an item: the prior is worth nothing, and utilities are OrderedModel's effects."""
    ordered = pytest.importorskip("statsmodels.miscmodels.ordinal_model")
    rng = np.random.default_rng(2)
    utility = np.array([-1.2, -0.5, 0.1, 0.4, 1.3])
    item = np.repeat(np.arange(5), 300)
    category = (utility[item] + rng.logistic(size=1500) * 0.7 > np.array([-0.8, 0.0, 0.9])[:, None]).sum(0)
    model = ordered.OrderedModel(category, np.eye(5)[item][:, 1:], distr="logit", hasconst=False)
    oracle = model.fit(method="bfgs", disp=False)
    fit = jax.jit(partial(fit_ordinal, num_items=5, num_raters=1, num_categories=4, scale_std=0.0))(
        item, np.zeros(1500, int), category
    )
    assert fit.rater_scale[0] == 1
    scale = 1 / float(fit.rater_noise[0])
    np.testing.assert_allclose((fit.items.value - fit.items.value[0])[1:] * scale, oracle.params[:4], atol=0.05)
    cuts = model.transform_threshold_params(oracle.params[4:])[1:-1]
    np.testing.assert_allclose(np.diff(fit.thresholds) / fit.rater_noise[0], np.diff(cuts), rtol=0.02)
    np.testing.assert_allclose(fit.items.stderr[1:] * scale, oracle.bse[1:4].mean() / np.sqrt(2), rtol=0.15)


def test_ordinal_evidence_is_the_integral():
    item, rater, category, *_ = categories(items=6, raters=2, count=30)
    fit = FITS["ordinal"](*filled(item, rater, category.astype(np.float32)))
    cuts = np.r_[-np.inf, fit.thresholds, np.inf]
    cdf = lambda x: 1 / (1 + np.exp(-x))

    def density(s, i):
        p = norm.pdf(s)
        for k, c in zip(rater[item == i], category[item == i]):
            response = fit.rater_bias[k] + fit.rater_scale[k] * s
            p *= cdf((cuts[c + 1] - response) / fit.rater_noise[k]) - cdf((cuts[c] - response) / fit.rater_noise[k])
        return p

    with np.errstate(over="ignore"):
        total = [quad(density, -8, 8, (i,))[0] for i in range(6)]
        mean = [quad(lambda s, i=i: s * density(s, i), -8, 8)[0] / total[i] for i in range(6)]
        square = [quad(lambda s, i=i: s * s * density(s, i), -8, 8)[0] / total[i] for i in range(6)]
    np.testing.assert_allclose(fit.log_likelihood, np.log(total).sum(), rtol=1e-4)
    np.testing.assert_allclose(fit.items.value[:6], mean, atol=2e-3)
    np.testing.assert_allclose(fit.items.stderr[:6], np.sqrt(np.subtract(square, np.square(mean))), atol=2e-3)


def test_gaussian_evidence_and_posterior_are_the_multivariate_normal():
    item, rater, value, *_ = continuous(items=7, raters=3, count=40)
    fit = FITS["gaussian"](*filled(item, rater, value))
    loading, noise = float(fit.unit) * np.asarray(fit.rater_scale)[rater], float(fit.unit) * fit.rater_noise[rater]
    centre = float(fit.centre) + float(fit.unit) * np.asarray(fit.rater_bias)[rater]
    same = item[:, None] == item
    covariance = same * loading[:, None] * loading + np.diag(np.square(noise))
    residual = np.linalg.solve(covariance, value - centre)
    evidence = -0.5 * ((value - centre) @ residual + np.linalg.slogdet(2 * np.pi * covariance)[1])
    np.testing.assert_allclose(fit.log_likelihood, evidence, rtol=1e-4)
    np.testing.assert_allclose(
        fit.items.value[:7], [(loading * residual)[item == i].sum() for i in range(7)], rtol=2e-3, atol=1e-3
    )


@pytest.mark.parametrize("model", ["gaussian", "ordinal"])
def test_the_fit_is_a_maximum_of_the_posterior(model, monkeypatch):
    """The gradient that Fisher's identity gives is that of the value, by finite differences in float64."""
    calls = []

    def spy(objective, start, scale, **_):
        calls.append((objective, start))
        return start, jnp.int32(0), jnp.zeros(())

    monkeypatch.setattr(rating_models, "lbfgs", spy)
    monkeypatch.setattr(jax.lax, "fori_loop", lambda a, b, f, x: [x := f(i, x) for i in range(a, b)][-1])
    with jax.enable_x64(True):
        if model == "gaussian":
            item, rater, value, *_ = continuous(items=5, raters=3, count=25)
            fit_gaussian(item, rater, value.astype(float), num_items=5, num_raters=3)
        else:
            item, rater, value, *_ = categories(items=5, raters=3, count=25)
            fit_ordinal(item, rater, value.astype(float), num_items=5, num_raters=3, num_categories=5, num_nodes=61)
        objective, start = calls[0]
        rng = np.random.default_rng(0)
        point = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape), start)
        gradient = objective(point)[1]
        direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), start)
        at = lambda h: float(objective(jax.tree.map(lambda x, d: x + h * d, point, direction))[0])
        slope = sum(float(jnp.vdot(g, d)) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction)))
        np.testing.assert_allclose(slope, (at(1e-5) - at(-1e-5)) / 2e-5, rtol=1e-6)


gaussian_of_150 = jax.jit(partial(fit_gaussian, num_items=150, num_raters=15))


def test_gaussian_finds_planted_raters():
    item, rater, value, utility, bias, scale, noise = continuous()
    fit = gaussian_of_150(item, rater, value)
    assert r(fit.items.value, utility) > 0.96
    assert r(fit.items.value, utility) > r(raw_mean(item, rater, value, num_items=150).value, utility) + 0.03
    assert r(fit.rater_bias, bias) > 0.97
    assert r(fit.rater_scale, scale) > 0.85
    assert r(np.log(fit.rater_noise), np.log(noise)) > 0.9
    assert fit.gradient < 1e-3
    error = (fit.items.value - utility) / fit.items.stderr
    assert 0.7 < np.mean(np.square(error)) < 1.6


def test_ordinal_finds_planted_raters():
    item, rater, category, utility, bias, _scale, noise = categories(count=3000)
    fit = jax.jit(partial(fit_ordinal, num_items=150, num_raters=15, num_categories=5))(item, rater, category)
    assert r(fit.items.value, utility) > 0.95
    assert r(fit.items.value, utility) > r(raw_mean(item, rater, category, num_items=150).value, utility) + 0.01
    assert r(fit.rater_bias, bias) > 0.97
    assert r(np.log(fit.rater_noise), np.log(noise)) > 0.9
    assert (np.diff(fit.thresholds) > 0).all()
    assert fit.gradient < 1e-3
    error = (fit.items.value - utility) / fit.items.stderr
    assert 0.7 < np.mean(np.square(error)) < 1.6


def test_a_reversed_rater_is_turned_round():
    item, rater, value, utility, *_ = continuous(raters=6)
    value = np.where(rater == 2, 100 - value, value)
    fit = gaussian_of_150(item, rater, value)
    assert fit.rater_scale[2] < -0.3
    assert (np.delete(fit.rater_scale[:6], 2) > 0.3).all()
    assert r(fit.items.value, utility) > 0.95


@pytest.mark.parametrize("model", ["gaussian", "ordinal"])
def test_missing_is_not_zero(model):
    item, rater, category, *_ = categories(items=20, raters=4, count=120)
    fit = FITS[model]
    pad = lambda x, *values: np.r_[x, values]
    clean = fit(
        pad(item, 0, 0, 0), pad(rater, 0, 0, 0), pad(category.astype(np.float32), 0, 0, 0), pad(np.ones(120), 0, 0, 0)
    )
    dirty = fit(
        pad(item, 20, 3, 99),
        pad(rater, 4, 1, 77),
        pad(category.astype(np.float32), 1e9, NAN, 3),
        pad(np.ones(120), 0, 1, 0),
    )
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty)):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(clean.items.valid, np.arange(22) < 20)
    assert np.isinf(clean.items.stderr[20:]).all()
    assert clean.rater_bias[4] == 0 and clean.rater_scale[4] == 1
    empty = fit(pad(item, 0, 0, 0), pad(rater, 0, 0, 0), pad(category.astype(np.float32), 0, 0, 0), np.zeros(123))
    assert not empty.items.valid.any()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(empty.replace(items=None)))


def test_bfloat16_input_is_computed_in_float32():
    item, rater, value, *_ = continuous(items=20, raters=4, count=120)
    rounded = jnp.asarray(value, jnp.bfloat16)
    fit = jax.jit(partial(fit_gaussian, num_items=20, num_raters=4))
    low, full = fit(item, rater, rounded), fit(item, rater, rounded.astype(jnp.float32))
    assert low.items.value.dtype == jnp.float32
    np.testing.assert_allclose(low.items.value, full.items.value, rtol=1e-5, atol=1e-5)


METHODS = {
    "raw": lambda item, rater, value, **kw: raw_mean(item, rater, value, num_items=12, **kw),
    "z": lambda item, rater, value, **kw: z_score_mean(item, rater, value, num_items=12, num_raters=4, **kw),
    "gaussian": lambda item, rater, value, **kw: fit_gaussian(
        item, rater, value, num_items=12, num_raters=4, max_steps=15, **kw
    ),
    "ordinal": lambda item, rater, value, **kw: fit_ordinal(
        item, rater, value, num_items=12, num_raters=4, num_categories=5, max_steps=10, num_nodes=9, **kw
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_one_device_vmap_pmap_and_eight_shards_agree(method):
    data = [categories(seed, items=12, raters=4, count=64)[:3] for seed in (0, 1)]
    with jax.enable_x64(True):
        problems = [(item, rater, value.astype(float)) for item, rater, value in data]
        fit_agrees_everywhere(METHODS[method], problems, rtol=1e-6, atol=1e-8)


def mlqe(path):
    """item, rater, value of mlqe's direct assessments.

    The columns are no raters: scores of many people stand in them. But each z-score is (score - rater's mean) /
    rater's standard deviation, so the points (score, z) of one rater lie on one line, and of two raters on two.
    """
    csv.field_size_limit(10**8)
    with tarfile.open(path) as tar:
        name = next(n for n in tar.getnames() if n.endswith(".df.short.tsv"))
        text = io.TextIOWrapper(tar.extractfile(name), "utf-8")
        rows = list(csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE))
    scores = [json.loads(row["scores"]) for row in rows]
    item = np.repeat(np.arange(len(rows)), [len(s) for s in scores])
    value, z = np.concatenate(scores), np.concatenate([json.loads(row["z_scores"]) for row in rows])
    rater, left = np.full(len(value), -1), np.unique(np.c_[value, z.round(9)], axis=0)
    for number in range(100):
        i, j = np.triu_indices(len(left), 1)
        i, j = i[left[i, 0] != left[j, 0]], j[left[i, 0] != left[j, 0]]
        if not len(i):
            break
        slope = (left[j, 1] - left[i, 1]) / (left[j, 0] - left[i, 0])
        _, index, counts = np.unique(
            slope.round(6) + 1j * (left[i, 1] - slope * left[i, 0]).round(5), return_inverse=True, return_counts=True
        )
        on = index == counts.argmax()
        slope, at = np.median(slope[on]), np.median((left[i, 1] - slope * left[i, 0])[on])
        rater[(np.abs(z - slope * value - at) < 1e-5) & (rater < 0)] = number
        left = left[np.abs(left[:, 1] - slope * left[:, 0] - at) >= 1e-5]
    assert (rater >= 0).all()
    return item, rater, value.astype(np.float32)


def left_out_gain(a, b, target, draws=400):
    """Spearman of a and of b with the target, and a 95 % interval of the difference: bootstrap over paired items."""
    rng = np.random.default_rng(0)
    gains = []
    for _ in range(draws):
        rows = rng.integers(0, len(target), len(target))
        gains.append(spearmanr(a[rows], target[rows])[0] - spearmanr(b[rows], target[rows])[0])
    return spearmanr(a, target)[0], spearmanr(b, target)[0], np.percentile(gains, [2.5, 97.5])


def test_ranks_real_translations_better_than_raw_means(shared_data):
    item, rater, value = mlqe(shared_data("mlqe_pe/da.en-de-dev.tar.gz"))
    items, raters = item.max() + 1, rater.max() + 1
    assert (items, raters) == (1000, 22)
    fit = jax.jit(partial(fit_gaussian, num_items=items, num_raters=raters))

    # Three people rated everything: leave all three out, rank by the 19 who rated some, and compare with their mean.
    experts = np.flatnonzero(np.bincount(rater) == 1000)
    assert len(experts) == 3
    out = np.isin(rater, experts)
    target = raw_mean(item, rater, value, out, num_items=items).value
    model, raw = fit(item, rater, value, ~out).items.value, raw_mean(item, rater, value, ~out, num_items=items).value
    ours, theirs, interval = left_out_gain(*(np.asarray(x) for x in (model, raw, target)))
    print(f"left-out experts: model {ours:.3f}, raw means {theirs:.3f}, gain {interval}")
    assert ours > 0.25 and interval[0] > 0

    # One rating of each item left out, whoever gave it.
    order = np.lexsort((np.random.default_rng(0).random(len(item)), item))
    out = np.zeros(len(item), bool)
    out[order[np.r_[True, np.diff(item[order]) > 0]]] = True
    model, raw = fit(item, rater, value, ~out).items.value, raw_mean(item, rater, value, ~out, num_items=items).value
    ours, theirs, interval = left_out_gain(np.asarray(model), np.asarray(raw), value[out])
    print(f"left-out ratings: model {ours:.3f}, raw means {theirs:.3f}, gain {interval}")
    assert ours > 0.5 and interval[0] > 0.03
