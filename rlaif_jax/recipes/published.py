"""Published feedback of real people and judges, as this package's readers and models see it."""

from __future__ import annotations

import glob
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.feedback.api.replies import Reply
from rlaif_jax.feedback.api.templates import RenderedQuestion, Template
from rlaif_jax.feedback.api.verdicts import read_verdict
from rlaif_jax.feedback.judges.sentences import Sentences, read_sentences
from rlaif_jax.feedback.judges.sentiment import SentimentConfig, cross_fitted, train_judge
from rlaif_jax.feedback.records.formats.judges import read_llmbar, read_llmbar_judge, read_pandalm, read_prometheus
from rlaif_jax.feedback.records.formats.rows import chosen
from rlaif_jax.feedback.records.formats.texts import read_mlqe_post_edits, read_mlqe_ratings, read_squality
from rlaif_jax.feedback.records.formats.tools import read_get_another_label
from rlaif_jax.feedback.records.forms import Comment, Correction, Judgement, Ranking, Rating
from rlaif_jax.parallel import ParallelConfig, make_runner
from rlaif_jax.quality.intervals import Jackknife, percentile_interval, resampled_rows, share_interval
from rlaif_jax.quality.statistics import (
    cohen_kappa,
    interval_alpha,
    interval_moments,
    lowest_interval_alpha,
    lowest_kappa,
    spearman,
)
from rlaif_jax.quality.values import sum_by_group
from rlaif_jax.recipes.findings import Finding, Findings, finding_of, index, readable, spearman_interval
from rlaif_jax.rewards.comments import pool_comments, valence
from rlaif_jax.rewards.corrections import edit_reward, levenshtein
from rlaif_jax.rewards.raters import dawid_skene, hierarchical_dawid_skene, majority_vote
from rlaif_jax.rewards.rating_models import fit_gaussian
from rlaif_jax.rewards.ratings import raw_mean, z_score_mean

# ---- Who is right: labels of a crowd


def crowd_labels(labels: Path, gold: Path) -> Findings:
    """Measures how often 83 workers together are right about 1,000 items of two classes.

    Args:
        labels: the workers' labels, a file of Get-Another-Label.
        gold: the true labels.
    """
    records = readable(read_get_another_label(labels, gold=gold))
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
        yield Finding(name, *share_interval(right), reference, "accuracy")


# ---- What was wrong: post-edits


def post_edits(archive: Path, *, seed: int) -> Findings:
    """Compares a word edit rate with the HTER that the file gives (TER with block shifts).

    The edit rate is word edits over the words of the post-edit.

    Args:
        archive: MLQE-PE's post-edits.
        seed: of the bootstrap.
    """
    records = readable(read_mlqe_post_edits(archive))
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
    """Ranks translations by many raters and checks the ranks by raters who were left out.

    Args:
        archives: MLQE-PE's files of ratings, each a .tar.gz or a folder.
        seed: of the random parts.
    """
    for archive in archives:
        records = [j for j in readable(read_mlqe_ratings(archive)) if isinstance(j, Rating)]
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
        yield from compare_models({name: scores[judged] for name, scores in utilities.items()}, truth, seed, note)
        # One rating of each item left out, whoever gave it.
        order = np.lexsort((np.random.default_rng(seed).random(len(item)), item))
        out = np.zeros(len(item), bool)
        out[order[np.r_[True, np.diff(item[order]) > 0]]] = True
        utilities = ranked(item, rater, value, ~out, len(items), len(raters))
        note = f"{split}: one rating of each item"
        yield from compare_models(
            {name: scores[item[out]] for name, scores in utilities.items()}, value[out], seed, note
        )
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


def compare_models(utilities: dict[str, np.ndarray], truth: np.ndarray, seed: int, note: str) -> Findings:
    """Correlates each model's utilities with ratings that the model did not see (Spearman).

    The last finding is the gain of the rating model over raw means. Items that only the left-out raters rated
    have no utility and are not compared.

    Args:
        utilities: name of the model -> utilities [n], among them "raw means" and "rating model".
        truth: [n], the left-out ratings.
        seed: of the bootstrap.
        note: how it was measured, for the table.
    """
    rated = np.isfinite(utilities["raw means"])
    utilities, truth = {name: scores[rated] for name, scores in utilities.items()}, truth[rated]
    for name, scores in utilities.items():
        yield Finding(f"{name}, Spearman", spearman(scores, truth), *spearman_interval(scores, truth, seed), "", note)
    raw, model = utilities["raw means"], utilities["rating model"]
    rows_of = resampled_rows(np.arange(len(truth)), seed=seed, resamples=400)
    gains = [spearman(model[rows], truth[rows]) - spearman(raw[rows], truth[rows]) for rows in rows_of]
    gain = spearman(model, truth) - spearman(raw, truth)
    yield Finding("gain of the model", gain, *percentile_interval(gains, 0.95), "> 0 asked", note)


# ---- Judges in both orders

_PUBLISHED_ORDERS = {"Natural.GPT-4.Vanilla": "0.95", "Natural.Falcon.CoT": "0.14"}
WAYS = {"Vanilla": "Output ({label})", "CoT": "Output ({label}) is better"}


def judge_in_both_orders(gold: Path, folder: Path) -> Findings:
    """Measures how often a judge prefers the same answer of a pair in both orders.

    A reply without a verdict is missing: it agrees with nothing, and not with another one either. Pairs with such a reply
    are left out and counted.

    Args:
        gold: LLMBar's pairs with the better answer, a file LLMBar_SUBSET.json.
        folder: the judges' published replies, SUBSET.MODEL.WAY.json; those of the subset are read.
    """
    subset = gold.name.removesuffix(".gz").removesuffix(".json").removeprefix("LLMBar_")
    truth = {j.item: best for j in readable(read_llmbar(gold)) if (best := _best_answer(j)) is not None}
    for file in sorted(folder.glob(f"{glob.escape(subset)}.*.json")):
        model, _, way = file.stem.removeprefix(f"{subset}.").rpartition(".")
        if way not in WAYS:
            continue
        plain = readable(read_llmbar_judge(file, model))
        read = readable(read_llmbar_judge(file, model, partial(preferred_output, way)))
        same, unread = order_agreement(plain)
        again, _ = order_agreement(read)
        either = [(a, b) for a, b in zip(plain, read) if a.answered or b.answered]
        decided = [(j, best) for j in plain if (best := _best_answer(j)) is not None]
        shares = {
            "right": [best == truth[j.item] for j, best in decided if j.item in truth],
            "first shown": [best == j.answers[j.shown[0]] for j, best in decided],
            "re-read alike": [a.answered == b.answered and chosen(a) == chosen(b) for a, b in either],
            "agree re-read": again,
        }
        notes = [f"{name} {np.mean(values):.3f}" for name, values in shares.items() if values]
        notes += [f"{unread} of {len(same) + unread} pairs with an unread reply are left out"] if unread else []
        name, reference = f"{model} {way}: both orders agree", _PUBLISHED_ORDERS.get(file.stem, "")
        if same:
            yield Finding(name, *share_interval(np.array(same, float)), reference, ", ".join(notes))


def preferred_output(way: str, raw: str) -> int | None:
    """Returns which output the last verdict in a reply of LLMBar prefers: 0 the first, 1 the second.

    None: the reply has no verdict. `way` is a key of WAYS, the way in which the judge was prompted; `raw` is the
    reply.
    """
    template = Template(
        "LLMBar", "ranking", "{prompt}{answer_1}{answer_2}", labels=(("a", 1.0), ("b", 0.0)), verdict=WAYS[way]
    )
    reading = read_verdict(Reply(raw), template, RenderedQuestion((), ""), direct=False)
    return None if reading.status != "ok" else int(reading.value == 0)


def order_agreement(records: Sequence[Judgement]) -> tuple[list[bool], int]:
    """Returns whether both orders of each pair have the same verdict, and the number of pairs left out.

    Left out are pairs with a reply that has no verdict, or with one order alone; two ties are the same verdict.

    Args:
        records: comparisons with the order in which the answers were shown.
    """
    found: dict[str, list[Judgement]] = defaultdict(list)
    for record in records:
        found[record.item].append(record)
    whole = [
        pair
        for pair in found.values()
        if all(record.answered for record in pair)
        and len({tuple(record.answers[i] for i in record.shown) for record in pair}) > 1
    ]
    return [len({_best_answer(record) for record in pair}) == 1 for pair in whole], len(found) - len(whole)


def _best_answer(record: Judgement) -> str | None:
    """Returns the single best answer of a comparison; None for a tie or no verdict."""
    best = chosen(record)
    return None if best is None else record.answers[best]


# ---- People and judges on the same pairs


def people_and_judges(pairs: Path, *judges: Path) -> Findings:
    """Computes Cohen's kappa among three people, and of AI judges with the people's majority.

    Args:
        pairs: PandaLM's test set.
        *judges: files of AI judges on the same pairs.
    """
    records = readable(read_pandalm(pairs, judges))
    votes: dict[str, dict[int, int]] = defaultdict(dict)
    row, rows = index((j.prompt, j.answers, j.generators) for j in records)
    home, prompts = index(prompt for prompt, _, _ in rows)
    for j, number in zip(records, row.tolist()):
        if j.answered:
            best = chosen(j)
            votes[j.rater.name][number] = 2 if best is None else best
    people = sorted(name for name in votes if name.startswith("annotator"))

    def kappa(a: dict[int, int], b: dict[int, int]) -> tuple[dict[str, Any], str]:
        shared = [item for item in a if item in b]
        cells = np.zeros((len(shared), 3, 3))
        cells[np.arange(len(shared)), [a[i] for i in shared], [b[i] for i in shared]] = 1
        agree = np.mean([a[i] == b[i] for i in shared])
        sums = sum_by_group(cells, home[shared], len(prompts))
        estimate = Jackknife().estimate(sums, cohen_kappa, lowest=lowest_kappa)
        return estimate, f"agree on {agree:.3f} of {len(shared)} pairs"

    for a, b in itertools.combinations(people, 2):
        estimate, note = kappa(votes[a], votes[b])
        yield finding_of(f"kappa of {a} and {b}", estimate, note)
    counted = {item: Counter(votes[name][item] for name in people) for item in votes[people[0]]}
    majority = {item: count.most_common(1)[0][0] for item, count in counted.items() if max(count.values()) >= 2}
    for name in sorted(set(votes) - set(people)):
        estimate, note = kappa(votes[name], majority)
        unread = sum(j.status == "unparsed" for j in records if j.rater.name == name)
        note = f"{note}; {unread} replies without a verdict"
        yield finding_of(f"kappa of {name} and the majority", estimate, note)


# ---- Comments


def remarks(graded: Path, *, seed: int, sentiment: SentimentConfig, reviews: Path) -> Findings:
    """Compares the sentiment of a judge's remarks with the score that the judge gave with each.

    Args:
        graded: the file of the remarks.
        seed: of fit and bootstrap.
        sentiment: training of the reader of sentiment.
        reviews: folder of film reviews, from which a second reader learns if the folder exists.
    """
    records = readable(read_prometheus(graded))
    given = [j for j in records if isinstance(j, Comment)]
    score = {(j.item, j.principle, j.seed): j.unit for j in records if isinstance(j, Rating)}
    unit = np.array([score[j.item, j.principle, j.seed] for j in given], np.float32)
    answer, answers = index(j.item for j in given)
    texts = tuple(j.text for j in given)
    runner = make_runner(ParallelConfig())
    readers = {
        "learned from the other answers' remarks": cross_fitted(
            Sentences(texts, unit), sentiment, seed, runner, groups=answer.tolist()
        )
    }
    if reviews.is_dir():
        critic = train_judge(read_sentences(reviews), sentiment, seed, runner)
        readers["learned from film reviews"] = critic.log_odds(texts)
    for name, log_odds in readers.items():
        heard = valence(jnp.asarray(log_odds.values), jnp.asarray(log_odds.valid))
        said = np.asarray(heard.values)
        interval = spearman_interval(said, unit, seed, answer)
        yield Finding(f"Spearman, {name}", spearman(said, unit), *interval, "", f"{len(texts)} remarks")
        pooled = np.asarray(pool_comments(heard.values, heard.valid, jnp.asarray(answer), len(answers)).values)
        mean = np.bincount(answer, unit) / np.bincount(answer)
        interval = spearman_interval(pooled, mean, seed)
        yield Finding("  means of an answer's three", spearman(pooled, mean), *interval, "", f"{len(answers)} answers")


# ---- Summaries of stories


def summaries(responses: Path) -> Findings:
    """Measures how far SQuALITY's workers agree; the intervals resample whole questions.

    Args:
        responses: SQuALITY's file of ratings and rankings.
    """
    records = readable(read_squality(responses))
    number, questions = index(j.prompt for j in records)
    question = {j.item: n for j, n in zip(records, number.tolist())}
    for name in ("correctness", "selection", "overall"):
        given: dict[str, dict[str, float]] = defaultdict(dict)
        for j in records:
            if isinstance(j, Rating) and j.principle == name:
                given[j.item][j.rater.name] = j.unit
        moments = np.array([interval_moments(list(by_rater.values())) for by_rater in given.values()])
        sums = sum_by_group(moments, [question[item] for item in given], len(questions))
        estimate = Jackknife().estimate(sums, interval_alpha, lowest=lowest_interval_alpha)
        note = f"{name}: {sum(map(len, given.values()))} ratings of {len(given)} answers"
        yield finding_of("Krippendorff's alpha (interval)", estimate, note)
    for name in ("correctness", "selection", "overall"):
        agree, asked, pairs = [], [], Counter[tuple[str, int, int, bool]]()
        for j in records:
            if isinstance(j, Ranking) and j.principle == name:
                pairs.update((j.item, a, b, p > 0.5) for a, b, p in j.pairs() if p != 0.5)
        for item, a, b in sorted({key[:3] for key in pairs}):
            yes, no = pairs[item, a, b, True], pairs[item, a, b, False]
            if yes + no >= 2:
                asked.append(question[item])
                agree.append((math.comb(yes, 2) + math.comb(no, 2)) / math.comb(yes + no, 2))
        note = f"{name}: {len(agree)} pairs of answers"
        yield Finding("two workers rank a pair alike", *share_interval(agree, groups=asked), "", note)
