"""Measures of published judges: both orders, agreement with people, remarks, rated summaries."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlaif_jax.evaluate import bootstrap_ci, spearman
from rlaif_jax.feedback.api.templates import RenderedQuestion, Template
from rlaif_jax.feedback.api.verdicts import Reply, read_verdict
from rlaif_jax.feedback.judges.sentiment import Sentences, SentimentConfig, cross_fitted, read_sentences, train_judge
from rlaif_jax.feedback.records.formats.judges import read_llmbar, read_llmbar_judge, read_pandalm, read_prometheus
from rlaif_jax.feedback.records.formats.rows import chosen
from rlaif_jax.feedback.records.formats.texts import read_squality
from rlaif_jax.feedback.records.forms import Comment, Judgement, Ranking, Rating
from rlaif_jax.parallel import ParallelConfig, make_runner
from rlaif_jax.quality.bootstrap import Bootstrap
from rlaif_jax.quality.statistics import cohen_kappa, interval_alpha, interval_moments
from rlaif_jax.quality.values import sum_by_group
from rlaif_jax.recipes.published.findings import Finding, Findings, index, kept, spearman_interval
from rlaif_jax.rewards.comments import pool_comments, valence

# ---- Judges in both orders

WAYS = {"Vanilla": "Output ({label})", "CoT": "Output ({label}) is better"}


def both_orders(gold: Path, folder: Path, *, seed: int) -> Findings:
    """Measures how often a judge prefers the same answer of a pair in both orders, on 100 pairs."""
    truth = {j.item: j.answers[chosen(j) or 0] for j in kept(read_llmbar(gold))}
    for file in sorted(folder.glob("Natural.*.*.json")):
        _, model, way = file.stem.split(".")
        if way not in WAYS:
            continue
        plain = kept(read_llmbar_judge(file, model))
        read = kept(read_llmbar_judge(file, model, partial(verdict, way)))
        same = np.array(_agreements(plain), float)
        reread = np.mean([chosen(a) == chosen(b) for a, b in zip(plain, read)])
        right = np.mean([j.answered and j.answers[chosen(j) or 0] == truth[j.item] for j in plain])
        first = np.mean([chosen(j) == j.shown[0] for j in plain if j.answered])
        reference = {"GPT-4.Vanilla": "0.95", "Falcon.CoT": "0.14"}.get(f"{model}.{way}", "")
        note = f"right {right:.2f}, first shown {first:.2f}, re-read alike {reread:.3f}, agree re-read "
        yield Finding(
            f"{model} {way}: both orders agree", float(same.mean()), *bootstrap_ci(same, seed=seed), reference,
            note + f"{np.mean(_agreements(read)):.2f}",
        )  # fmt: skip


def verdict(way: str, raw: str) -> int | None:
    """Returns the output that a reply's last verdict prefers, 0 = the first; None: no verdict."""
    template = Template(
        "LLMBar", "ranking", "{prompt}{answer_1}{answer_2}", labels=(("a", 1.0), ("b", 0.0)), verdict=WAYS[way]
    )
    reading = read_verdict(Reply(raw), template, RenderedQuestion((), ""), direct=False)
    return None if reading.status != "ok" else int(reading.value == 0)


def _agreements(records: Sequence[Judgement]) -> list[bool]:
    """Returns for each pair whether both orders prefer the same answer."""
    found: dict[str, list[str | None]] = defaultdict(list)
    for record in records:
        best = chosen(record)
        found[record.item].append(None if best is None else record.answers[best])
    return [len(set(answers)) == 1 for answers in found.values()]


# ---- People and judges on the same pairs


def people_and_judges(pairs: Path, *judges: Path, seed: int) -> Findings:
    """Computes Cohen's kappa among three people, and of AI judges with the people's majority."""
    records = kept(read_pandalm(pairs, judges))
    votes: dict[str, dict[int, int]] = defaultdict(dict)
    row, rows = index((j.prompt, j.answers, j.generators) for j in records)
    home, prompts = index(prompt for prompt, _, _ in rows)
    for j, number in zip(records, row.tolist()):
        if j.answered:
            best = chosen(j)
            votes[j.rater.name][number] = 2 if best is None else best
    people = sorted(name for name in votes if name.startswith("annotator"))
    bootstrap = Bootstrap(len(prompts), seed=seed)

    def kappa(a: dict[int, int], b: dict[int, int]) -> tuple[dict[str, Any], str]:
        shared = [item for item in a if item in b]
        cells = np.zeros((len(shared), 3, 3))
        cells[np.arange(len(shared)), [a[i] for i in shared], [b[i] for i in shared]] = 1
        agree = np.mean([a[i] == b[i] for i in shared])
        sums = sum_by_group(cells, home[shared], len(prompts))
        return bootstrap.estimate(sums, cohen_kappa), f"agree on {agree:.3f} of {len(shared)} pairs"

    for a, b in itertools.combinations(people, 2):
        estimate, note = kappa(votes[a], votes[b])
        yield Finding(f"kappa of {a} and {b}", **estimate, note=note)
    counted = {item: Counter(votes[name][item] for name in people) for item in votes[people[0]]}
    majority = {item: count.most_common(1)[0][0] for item, count in counted.items() if max(count.values()) >= 2}
    for name in sorted(set(votes) - set(people)):
        estimate, note = kappa(votes[name], majority)
        unread = sum(j.status == "unparsed" for j in records if j.rater.name == name)
        yield Finding(
            f"kappa of {name} and the majority", **estimate, note=f"{note}; {unread} replies without a verdict"
        )


# ---- Comments


def remarks(graded: Path, *, seed: int, sentiment: SentimentConfig, reviews: Path) -> Findings:
    """Compares the sentiment of a judge's remarks with the score that the judge gave with each.

    Args:
        graded: the file of the remarks.
        seed: of fit and bootstrap.
        sentiment: training of the reader of sentiment.
        reviews: folder of film reviews, from which a second reader learns if the folder exists.
    """
    records = kept(read_prometheus(graded))
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


def summaries(responses: Path, *, seed: int) -> Findings:
    """Measures how far SQuALITY's workers agree; the intervals resample whole questions."""
    records = kept(read_squality(responses))
    number, questions = index(j.prompt for j in records)
    question = {j.item: n for j, n in zip(records, number.tolist())}
    for name in ("correctness", "selection", "overall"):
        given: dict[str, dict[str, float]] = defaultdict(dict)
        for j in records:
            if isinstance(j, Rating) and j.principle == name:
                given[j.item][j.rater.name] = j.value
        moments = np.array([interval_moments(list(by_rater.values())) for by_rater in given.values()])
        sums = sum_by_group(moments, [question[item] for item in given], len(questions))
        estimate = Bootstrap(len(questions), seed=seed).estimate(sums, interval_alpha)
        note = f"{name}: {sum(map(len, given.values()))} ratings of {len(given)} answers"
        yield Finding("Krippendorff's alpha (interval)", **estimate, note=note)
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
        interval = bootstrap_ci(agree, seed=seed, groups=asked)
        yield Finding("two workers rank a pair alike", float(np.mean(agree)), *interval, "", note)
