"""Raters: Dawid-Skene is crowd-kit's, real labels, planted workers found; the same under every transform."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.rewards.raters import (
    dawid_skene,
    hierarchical_dawid_skene,
    majority_vote,
    vote_shares,
)
from tests.rewards.everywhere import fit_agrees_everywhere

pytestmark = pytest.mark.slow  # as a whole: many programs to compile


def labels(seed=0, items=120, workers=12, classes=3, count=600):
    """item, worker, label, truth, confusion of simulated workers, from guessers to near perfect ones."""
    rng = np.random.default_rng(seed)
    truth, skill = rng.integers(0, classes, items), rng.uniform(0, 0.95, workers)
    confusion = skill[:, None, None] * np.eye(classes) + (1 - skill)[:, None, None] * rng.dirichlet(
        np.ones(classes), (workers, classes)
    )
    item, worker = np.r_[np.arange(items), rng.integers(0, items, count - items)], rng.integers(0, workers, count)
    label = np.array([rng.choice(classes, p=confusion[w, truth[i]]) for i, w in zip(item, worker)])
    return item, worker, label, truth, confusion


def barzan(shared_data):
    """item, worker, label, gold of Barzan Mozafari's 5,000 labels."""
    rows = [
        line.split("\t") for line in shared_data("get_another_label/BarzanMozafari_labels.txt").read_text().split("\n")
    ]
    rows = [row for row in rows if len(row) >= 3]
    text = shared_data("get_another_label/BarzanMozafari_evaluation.txt").read_text()
    gold = dict(line.split("\t")[:2] for line in text.split("\n") if line)
    names, items = sorted({row[0] for row in rows}), sorted(gold)
    columns = zip(*[(items.index(i), names.index(w), int(label)) for w, i, label in (row[:3] for row in rows)])
    item, worker, label = map(np.array, columns)
    return item, worker, label, np.array([int(gold[i]) for i in items])


SIZES = ("num_items", "num_workers")
jitted_ds = jax.jit(dawid_skene, static_argnames=(*SIZES, "num_classes"))
jitted_pooled = jax.jit(hierarchical_dawid_skene, static_argnames=(*SIZES, "num_classes", "num_groups"))


def accuracy(posterior, truth):
    return (np.asarray(posterior).argmax(-1) == truth).mean()


# ---- votes


def test_votes_by_hand():
    item, label = [0, 0, 0, 1, 1, 3], [1, 1, 2, 0, 2, 1]
    shares, valid = vote_shares(item, label, [1, 1, 1, 1, 1, 0], num_items=4, num_classes=3)
    np.testing.assert_allclose(shares, [[0, 2 / 3, 1 / 3], [0.5, 0, 0.5], [1 / 3] * 3, [1 / 3] * 3], rtol=1e-6)
    np.testing.assert_array_equal(valid, [True, True, False, False])
    top, _ = majority_vote(item, label, [1, 1, 1, 1, 1, 0], num_items=4, num_classes=3)
    np.testing.assert_allclose(top, [[0, 1, 0], [0.5, 0, 0.5], [1 / 3] * 3, [1 / 3] * 3], rtol=1e-6)
    heavy, _ = majority_vote(item, label, [1, 1, 5, 1, 1, 0], num_items=4, num_classes=3)
    np.testing.assert_array_equal(heavy[0], [0, 0, 1])


# ---- Dawid-Skene


def crowd_kit(item, worker, label, iterations):
    """posterior, confusion [W, true, said], class prior of crowd-kit after as many steps of EM."""
    crowdkit = pytest.importorskip("crowdkit.aggregation")
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"task": item, "worker": worker, "label": label})
    found = crowdkit.DawidSkene(iterations, tol=-np.inf).fit(frame)
    classes = list(range(label.max() + 1))
    posterior = found.probas_.loc[range(item.max() + 1), classes].to_numpy()
    confusion = np.zeros((worker.max() + 1, len(classes), len(classes)))
    for (w, said), row in found.errors_.iterrows():
        confusion[w, :, said] = row[classes]
    return posterior, confusion, found.priors_[classes].to_numpy()


@pytest.mark.parametrize("iterations", [1, 25])
def test_dawid_skene_is_crowd_kits(iterations):
    item, worker, label, *_ = labels()
    ours = jitted_ds(
        item, worker, label, num_items=120, num_workers=12, num_classes=3, max_iterations=iterations, tol=0.0
    )
    posterior, confusion, prior = crowd_kit(item, worker, label, iterations)
    assert ours.iterations == iterations
    np.testing.assert_allclose(ours.posterior, posterior, atol=2e-4)
    np.testing.assert_allclose(ours.confusion, confusion, atol=2e-4)
    np.testing.assert_allclose(ours.class_prior, prior, atol=2e-5)


def test_real_labels(shared_data):
    item, worker, label, gold = barzan(shared_data)
    sizes = {"num_items": 1000, "num_workers": 83, "num_classes": 2}
    assert len(label) == 5000
    vote, _ = majority_vote(item, label, num_items=1000, num_classes=2)
    assert accuracy(vote, gold) == pytest.approx(0.696)
    # crowd-kit's default tolerance stops after three steps.
    three = jitted_ds(item, worker, label, max_iterations=3, tol=0.0, **sizes)
    posterior, *_ = crowd_kit(item, worker, label, 3)
    np.testing.assert_allclose(three.posterior, posterior, atol=1e-4)
    assert accuracy(three.posterior, gold) == pytest.approx(0.709)
    assert accuracy(jitted_ds(item, worker, label, **sizes).posterior, gold) == pytest.approx(0.712, abs=1e-3)
    pooled = jitted_pooled(item, worker, label, **sizes)
    assert accuracy(pooled.posterior, gold) >= 0.711
    assert pooled.iterations < 100


def test_pooling_predicts_labels_left_out(shared_data):
    """What chose the pooled model: the likelihood of labels that it has not seen, gold not used."""
    item, worker, label, _ = barzan(shared_data)
    sizes = {"num_items": 1000, "num_workers": 83, "num_classes": 2}
    fold = np.random.default_rng(0).integers(0, 10, 5000)
    scores = []
    for method in (dawid_skene, hierarchical_dawid_skene):
        fit, score = jax.jit(partial(method, **sizes)), np.zeros(5000)
        for k in range(10):
            found = fit(item, worker, label, (fold != k).astype(np.float32))
            predicted = (found.posterior[item] * found.confusion[worker, :, label]).sum(-1)
            score = np.where(fold == k, np.log(np.maximum(predicted, 1e-3)), score)
        scores.append(score)
    gain = scores[1] - scores[0]
    print(f"log likelihood of a left-out label: Dawid-Skene {scores[0].mean():.4f}, pooled {scores[1].mean():.4f}")
    assert gain.mean() > 3 * gain.std() / np.sqrt(5000)


def test_likelihood_never_falls():
    item, worker, label, *_ = labels(seed=3)
    fit = partial(jitted_ds, item, worker, label, num_items=120, num_workers=12, num_classes=3, tol=0.0)
    values = [float(fit(max_iterations=n).log_likelihood) for n in (1, 2, 4, 8, 16)]
    assert (np.diff(values) > -1e-3).all(), values


@pytest.mark.parametrize("fit", [dawid_skene, hierarchical_dawid_skene])
def test_planted_workers_are_found(fit):
    item, worker, label, truth, confusion = labels(seed=5, items=300, count=2000)
    found = jax.jit(partial(fit, num_items=300, num_workers=12, num_classes=3))(item, worker, label)
    vote, _ = majority_vote(item, label, num_items=300, num_classes=3)
    assert accuracy(found.posterior, truth) > accuracy(vote, truth) + 0.01
    planted = np.einsum("wkk,k->w", confusion, np.bincount(truth) / 300)
    assert np.corrcoef(found.accuracy, planted)[0, 1] > 0.9
    np.testing.assert_allclose(found.posterior.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(found.confusion.sum(-1), 1, rtol=1e-5)


def test_a_stranger_is_taken_for_a_typical_worker_of_its_kind():
    """People right in 9 of 10, AI judges right in 6: a new judge with one label is no expert, a new person nearly is."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 300)
    item, worker = np.repeat(np.arange(300), 6), np.tile(np.arange(12).reshape(2, 6), (150, 1)).ravel()
    right = rng.random(1800) < np.where(worker % 6 < 4, 0.9, 0.6)  # of each six, four people and two judges
    label = np.where(right, truth[item], 1 - truth[item])
    item, worker, label = (np.r_[x, y] for x, y in ((item, [0, 1]), (worker, [12, 13]), (label, [0, 1])))
    group = np.r_[(np.arange(12) % 6 >= 4).astype(int), 0, 1]
    found = jitted_pooled(item, worker, label, num_items=300, num_workers=14, num_classes=2, group=group, num_groups=2)
    assert accuracy(found.posterior, truth) > 0.93
    assert found.accuracy[12] > 0.8
    assert 0.5 < found.accuracy[13] < 0.75
    alone = jitted_ds(item, worker, label, num_items=300, num_workers=14, num_classes=2)
    assert abs(alone.accuracy[13] - 0.6) > abs(found.accuracy[13] - 0.6)


@pytest.mark.parametrize("fit", [dawid_skene, hierarchical_dawid_skene])
def test_missing_labels_are_masked(fit):
    item, worker, label, *_ = labels(items=30, workers=5, count=150)
    fit = jax.jit(partial(fit, num_items=32, num_workers=6, num_classes=3))
    clean = fit(np.r_[item, 0, 0], np.r_[worker, 0, 0], np.r_[label, 0, 0], np.r_[np.ones(150), 0, 0])
    dirty = fit(np.r_[item, 31, 2], np.r_[worker, 5, 3], np.r_[label, 1, -1], np.r_[np.ones(150), 0, 1])
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty)):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(clean.valid, np.arange(32) < 30)
    np.testing.assert_allclose(clean.posterior[31], clean.class_prior, rtol=1e-6)
    empty = fit(np.r_[item, 0, 0], np.r_[worker, 0, 0], np.r_[label, 0, 0], np.zeros(152))
    assert not empty.valid.any()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(empty.replace(log_likelihood=0)))
    np.testing.assert_allclose(empty.posterior, 1 / 3, rtol=1e-6)


def test_soft_labels_and_weights():
    """A sure soft label is a hard one, a label of weight 2 is two labels; bfloat16 in, float32 out."""
    item, worker, label, *_ = labels(items=30, workers=5, count=150)
    sizes = {"num_items": 30, "num_workers": 5, "num_classes": 3, "max_iterations": 10, "tol": 0.0}
    hard = jitted_ds(item, worker, label, **sizes)
    soft = jitted_ds(item, worker, jax.nn.one_hot(label, 3, dtype=jnp.bfloat16), **sizes)
    assert soft.posterior.dtype == jnp.float32
    np.testing.assert_allclose(soft.posterior, hard.posterior, atol=1e-5)
    weight = np.r_[np.full(50, 2), np.ones(100)]
    twice = jitted_ds(*(np.repeat(x, weight.astype(int)) for x in (item, worker, label)), **sizes)
    np.testing.assert_allclose(jitted_ds(item, worker, label, weight, **sizes).posterior, twice.posterior, atol=1e-4)
    even = jitted_ds(item, worker, np.full((150, 3), 1 / 3, np.float32), **sizes)
    np.testing.assert_allclose(even.posterior, 1 / 3, atol=1e-5)


# ---- transforms


LABELS = {"num_items": 20, "num_classes": 3}
METHODS = {
    "majority": lambda i, w, y, **kw: majority_vote(i, y, **LABELS, **kw),
    "dawid_skene": partial(dawid_skene, num_workers=5, max_iterations=8, tol=0.0, **LABELS),
    "pooled": partial(hierarchical_dawid_skene, num_workers=5, max_iterations=8, tol=0.0, **LABELS),
}


@pytest.mark.parametrize("method", METHODS)
def test_one_device_vmap_pmap_and_eight_shards_agree(method):
    problems = [labels(seed, items=20, workers=5, count=64)[:3] for seed in (0, 1)]
    fit_agrees_everywhere(METHODS[method], problems, rtol=2e-3, atol=2e-3)


def test_a_label_without_evidence_is_judged_by_the_others_and_moves_nothing():
    """The last worker says the opposite of all; with no voice nobody's confusion changes, and its own is the opposite."""
    item, worker, label, *_ = labels(workers=8, count=800)
    fit = partial(hierarchical_dawid_skene, num_items=120, num_workers=9, num_classes=3)
    alone = fit(item, worker, label, evidence=np.ones(len(item), np.float32))
    truth = np.asarray(alone.posterior).argmax(-1)
    more = np.flatnonzero(np.asarray(alone.valid))
    joined = fit(
        np.r_[item, more],
        np.r_[worker, np.full(len(more), 8)].astype(np.int32),
        np.r_[label, (truth[more] + 1) % 3].astype(np.int32),
        evidence=np.r_[np.ones(len(item)), np.zeros(len(more))].astype(np.float32),
        group=np.r_[np.zeros(8), 1].astype(np.int32),
        num_groups=2,
    )
    np.testing.assert_allclose(joined.posterior[more], alone.posterior[more], atol=2e-3)
    np.testing.assert_allclose(joined.accuracy[:8], alone.accuracy[:8], atol=2e-3)
    assert joined.accuracy[8] < 0.1
