"""Measures of published labels, post-edits and ratings: how well models of raters do."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.evaluate import bootstrap_ci, spearman
from rlaif_jax.feedback.records.formats.rows import chosen
from rlaif_jax.feedback.records.formats.texts import read_mlqe_post_edits, read_mlqe_ratings
from rlaif_jax.feedback.records.formats.tools import read_get_another_label
from rlaif_jax.feedback.records.forms import Correction, Rating
from rlaif_jax.recipes.published.findings import Finding, Findings, draws, index, kept, spearman_interval
from rlaif_jax.rewards.corrections import edit_reward, levenshtein
from rlaif_jax.rewards.raters import dawid_skene, hierarchical_dawid_skene, majority_vote
from rlaif_jax.rewards.rating_models import fit_gaussian
from rlaif_jax.rewards.ratings import raw_mean, z_score_mean

# ---- Who is right: labels of a crowd


def crowd_labels(labels: Path, gold: Path, *, seed: int) -> Findings:
    """Measures how often 83 workers together are right about 1,000 items of two classes."""
    records = kept(read_get_another_label(labels, gold=gold))
    answer = {j.prompt: chosen(j) for j in records if j.rater.name == "gold"}
    given = [j for j in records if j.rater.name != "gold"]
    item, items = index(j.prompt for j in given)
    worker, workers = index(j.rater.name for j in given)
    label, truth = np.array([chosen(j) for j in given], np.int32), np.array([answer[name] for name in items])
    sizes: dict[str, Any] = {"num_items": len(items), "num_classes": len(given[0].answers)}
    by_worker = sizes | {"num_workers": len(workers)}
    models = (
        ("majority vote", majority_vote(item, label, **sizes)[0], "0.696"),
        # crowd-kit 1.4 stops after the third step, where its bound no longer moves.
        (
            "Dawid-Skene, three steps",
            dawid_skene(item, worker, label, **by_worker, max_iterations=3).posterior,
            "0.709",
        ),
        ("Dawid-Skene, converged", dawid_skene(item, worker, label, **by_worker).posterior, ""),
        ("Dawid-Skene, workers pooled", hierarchical_dawid_skene(item, worker, label, **by_worker).posterior, ""),
    )
    for name, posterior, reference in models:
        right = (np.asarray(posterior).argmax(-1) == truth).astype(float)
        yield Finding(name, float(right.mean()), *bootstrap_ci(right, seed=seed), reference, "accuracy")


# ---- What was wrong: post-edits


def post_edits(archive: Path, *, seed: int) -> Findings:
    """Compares word edits over the words of the post-edit with the file's HTER (TER with block shifts)."""
    records = kept(read_mlqe_post_edits(archive))
    edits = [j for j in records if isinstance(j, Correction)]
    hter = np.array([1 - j.value for j in records if isinstance(j, Rating)])
    answer, corrected = _word_ids([j.answers[0].split() for j in edits], [(j.edited or "").split() for j in edits])
    distance = jax.jit(levenshtein)(*answer, *corrected)
    rate = -np.asarray(edit_reward(distance, jnp.asarray(corrected[1])))
    interval = spearman_interval(rate, hter, seed)
    yield Finding("Spearman with HTER", spearman(rate, hter), *interval, ">= 0.98 asked", f"{len(edits)} post-edits")
    equal = float(np.mean(np.abs(np.minimum(rate, 1) - hter) < 1e-4))
    yield Finding("equal to HTER", equal, note="the others have block shifts, which are one edit of HTER")


def _word_ids(*sides: Sequence[Sequence[str]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns (ids, mask), right padded, of each side's texts."""
    words: dict[str, int] = {}
    arrays = []
    for texts in sides:
        shape = (len(texts), max(1, *map(len, texts)))
        ids, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = [words.setdefault(word, len(words)) for word in text]
            mask[row, : len(text)] = True
        arrays.append((ids, mask))
    return arrays


# ---- How good: ratings


def ratings(*archives: Path, seed: int) -> Findings:
    """Ranks translations by many raters and checks the ranks by raters who were left out."""
    for archive in archives:
        records = [j for j in kept(read_mlqe_ratings(archive)) if isinstance(j, Rating)]
        item, items = index(j.item for j in records)
        rater, raters = index(j.rater.name for j in records)
        value = np.array([j.value for j in records], np.float32)
        split = raters[0].split("/")[0]
        count = np.bincount(rater)
        # Three people rated the same items, all of them (dev) or a part (train); the others each a share of all.
        together = Counter(count.tolist())
        most = max(size for size, people in together.items() if people == 3)
        out = np.isin(rater, np.flatnonzero(count == most))
        target = raw_mean(item, rater, value, out, num_items=len(items))
        judged = np.flatnonzero(np.asarray(target.valid))
        utilities = ranked(item, rater, value, ~out, len(items), len(raters))
        truth = np.asarray(target.value)[judged]
        note = f"{split}: mean of the 3 who rated {most}, by the {len(raters) - 3} others"
        yield from compared({name: scores[judged] for name, scores in utilities.items()}, truth, seed, note)
        # One rating of each item left out, whoever gave it.
        order = np.lexsort((np.random.default_rng(seed).random(len(item)), item))
        out = np.zeros(len(item), bool)
        out[order[np.r_[True, np.diff(item[order]) > 0]]] = True
        utilities = ranked(item, rater, value, ~out, len(items), len(raters))
        note = f"{split}: one rating of each item"
        yield from compared({name: scores[item[out]] for name, scores in utilities.items()}, value[out], seed, note)
        # Each rater left out in turn, and the items that this one rated. Here a mean that mixes all camps is hard to beat:
        # the model follows the raters who agree with each other, and those left out may be of another camp.
        large = np.flatnonzero(count >= 50)
        each: dict[str, list[float]] = defaultdict(list)
        for person in large:
            utilities = ranked(item, rater, value, rater != person, len(items), len(raters))
            mine = (rater == person) & np.isfinite(utilities["raw means"][item])
            for name, scores in utilities.items():
                each[name].append(spearman(scores[item[mine]], value[mine]))
        for name, correlations in each.items():
            mean = float(np.average(correlations, weights=count[large]))
            yield Finding(
                f"{name}, Spearman", mean, note=f"{split}: {len(large)} raters in turn, each on the items rated"
            )


@partial(jax.jit, static_argnames=("items", "raters"))
def _utilities(item: Any, rater: Any, value: Any, weight: Any, items: int, raters: int) -> dict[str, jax.Array]:
    given = (item, rater, value, weight)
    return {
        "raw means": raw_mean(*given, num_items=items).value,
        "z-scores": z_score_mean(*given, num_items=items, num_raters=raters).value,
        "rating model": fit_gaussian(*given, num_items=items, num_raters=raters).items.value,
    }


def ranked(
    item: np.ndarray, rater: np.ndarray, value: np.ndarray, weight: np.ndarray, items: int, raters: int
) -> dict[str, np.ndarray]:
    """Returns the utility of each item by each model; NaN for an item without a rating of positive weight.

    Args:
        item: [n] number of the rated item.
        rater: [n] number of the rater.
        value: [n] the ratings.
        weight: [n] their weights.
        items: number of items.
        raters: number of raters.
    """
    found = _utilities(item, rater, value, weight.astype(np.float32), items, raters)
    rated = np.bincount(item, weight, items) > 0
    return {name: np.where(rated, found[name], np.nan) for name in ("raw means", "z-scores", "rating model")}


def compared(utilities: dict[str, np.ndarray], truth: np.ndarray, seed: int, note: str) -> Findings:
    """Compares each ranking with the left-out ratings by Spearman's correlation.

    The last finding is the gain of the model over raw means.

    Items that only the left-out raters rated have no utility and are not compared.
    """
    rated = np.isfinite(utilities["raw means"])
    utilities, truth = {name: scores[rated] for name, scores in utilities.items()}, truth[rated]
    for name, scores in utilities.items():
        yield Finding(f"{name}, Spearman", spearman(scores, truth), *spearman_interval(scores, truth, seed), "", note)
    raw, model = utilities["raw means"], utilities["rating model"]
    gains = [spearman(model[rows], truth[rows]) - spearman(raw[rows], truth[rows]) for rows in draws(len(truth), seed)]
    low, high = np.quantile(gains, [0.025, 0.975])
    gain = spearman(model, truth) - spearman(raw, truth)
    yield Finding("gain of the model", gain, float(low), float(high), "> 0 asked", note)
