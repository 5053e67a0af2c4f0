"""Judges of the world's answers in all four forms: an AI labeler, rules, simulated people.

Each turns a pool of answers into records (`rlaif_jax.feedback.records.forms`). Simulated people see the exact quality
through noise and are labelled `simulated`; the labeler and the rules see the prompt and the answer only.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import jax
import numpy as np

from rlaif_jax.data.prompts import padded
from rlaif_jax.data.world import labeler_prompts, people
from rlaif_jax.data.world.gold import scores as gold
from rlaif_jax.data.world.people import Commenter, Editor, Ranker
from rlaif_jax.data.world.scenes import Scene
from rlaif_jax.data.world.tasks.base import WorldTask
from rlaif_jax.feedback.constitution.constitution import Constitution
from rlaif_jax.feedback.constitution.rule_records import rule_comments, rule_rankings, rule_rater, rule_ratings
from rlaif_jax.feedback.judges.batching import in_batches
from rlaif_jax.feedback.judges.language_model import LanguageModelJudge
from rlaif_jax.feedback.people.kinds import kind_named
from rlaif_jax.feedback.records.forms import Comment, Correction, Judgement, Ranking, Rater, Rating, Status, sha256
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.policies.text import answer_texts, generate
from rlaif_jax.recipes.world.crowd import answer_through_page, running_page
from rlaif_jax.recipes.world.rules import mended
from rlaif_jax.types import Params, Prompts, Rollout

Form = Literal["comment", "rating", "correction", "ranking"]
FORMS: tuple[Form, ...] = get_args(Form)

SceneOf = Callable[[str], Scene]
"""From a prompt to its scene; only simulated people may look at it."""


class Pool(NamedTuple):
    """Answers to be judged.

    Attributes:
        prompts: N prompts.
        answers: the different answers to each.
    """

    prompts: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]

    @property
    def singles(self) -> tuple[list[str], list[str]]:
        """Returns (prompts, answers) of all answers, one prompt an answer; answers to one prompt are adjacent."""
        return (
            [p for p, answers in zip(self.prompts, self.answers) for _ in answers],
            [a for answers in self.answers for a in answers],
        )


def pool_of(prompts: Sequence[str], answers: Sequence[str]) -> Pool:
    """Returns the different answers to each prompt, made from `answers`, the B answers to the B `prompts`."""
    groups: dict[str, dict[str, None]] = {}
    for prompt, answer in zip(prompts, answers):
        groups.setdefault(prompt, {})[answer] = None
    return Pool(tuple(groups), tuple(tuple(group) for group in groups.values()))


def ranks_of(scores: Sequence[float]) -> tuple[int, ...]:
    """Returns places by falling score, 1 = best; equal scores share a place."""
    return tuple(1 + sum(other > score for other in scores) for score in scores)


# ---- Simulated people


@dataclasses.dataclass(frozen=True)
class Person:
    """A simulated annotator who judges in any form.

    Attributes:
        name: of the rater in records.
        task: the world's task.
        ranker, scale, commenter, editor: how the person ranks, rates, comments and corrects.
    """

    name: str
    task: WorldTask
    ranker: Ranker
    scale: people.SimulatedRater
    commenter: Commenter
    editor: Editor

    @property
    def rater(self) -> Rater:
        """Returns the person as records name it."""
        return Rater(self.name, "simulated", model="rlaif_jax.data.world.people")

    def judge(
        self, rng: np.random.Generator, form: Form, scene: Scene, prompt: str, answers: Sequence[str]
    ) -> Judgement:
        """Returns the person's judgement.

        Args:
            rng: for the person's noise.
            form: of the judgement.
            scene: the truth about the prompt.
            prompt: the prompt.
            answers: one answer; for a ranking two or more.
        """
        shared = {"prompt": prompt, "answers": tuple(answers), "rater": self.rater}
        if form == "comment":
            text = self.commenter.comment(rng, self.task, "<overall>", scene, answers[0])
            return Comment(**shared, text=text)  # type: ignore[arg-type]
        if form == "correction":
            return Correction(**shared, edited=self.editor.edit(rng, self.task, scene, answers[0]))  # type: ignore[arg-type]
        quality = [gold.gold_scores(self.task, [scene], [answer])[0] for answer in answers]
        if form == "rating":
            return Rating(**shared, value=float(self.scale.rate(rng, quality[0])))  # type: ignore[arg-type]
        best_first = self.ranker.rank(rng, quality)
        return Ranking(**shared, ranks=tuple(int(r) for r in np.argsort(best_first) + 1))  # type: ignore[arg-type]


def make_crowd(task: WorldTask, seed: int, number: int = 5) -> tuple[Person, ...]:
    """Returns simulated people who differ in bias, spread and noise of their ratings.

    Args:
        task: the task that they judge.
        seed: of the differences.
        number: number of people, at most 8.
    """
    names = ("anna", "bela", "carl", "dora", "emil", "fria", "gero", "hana")[:number]
    scales = people.simulated_raters(np.random.default_rng((seed, 7)), number)
    return tuple(
        Person(name, task, Ranker(), scale, Commenter(0.05), Editor(0.1)) for name, scale in zip(names, scales)
    )


def by_crowd(form: Form, pool: Pool, scene_of: SceneOf, crowd: Sequence[Person], seed: int) -> list[Judgement]:
    """Lets one of the crowd judge each answer (of rankings: the answers to each prompt).

    Args:
        form: of the judgements.
        pool: the answers.
        scene_of: prompt -> its scene, which holds the true facts.
        crowd: the people.
        seed: of the choice of person and of their noise, which depend on the seed, the form and the prompt alone.
    """
    made = []
    for prompt, answers in zip(pool.prompts, pool.answers):
        rng = prompt_rng(seed, form, prompt)
        for group in [answers] if form == "ranking" else [(answer,) for answer in answers]:
            person = crowd[int(rng.integers(len(crowd)))]
            made.append(person.judge(rng, form, scene_of(prompt), prompt, group))
    return made


def prompt_rng(seed: int, form: Form, *words: str) -> np.random.Generator:
    """Returns a generator that depends on what is judged, not on when or by which process.

    Args:
        seed: of the run.
        form: the form of the judgements.
        *words: the texts that are judged.
    """
    return np.random.default_rng((seed, FORMS.index(form), int(sha256(words)[:15], 16)))


@contextmanager
def crowd_at_the_page(store: Path, scene_of: SceneOf, crowd: Sequence[Person], seed: int) -> Iterator[None]:
    """Lets simulated people work at the annotation page of a store while the block runs.

    The page's server runs in another process. Each person is a client that answers every task over HTTP.

    Args:
        store: the feedback store.
        scene_of: the truth about a prompt.
        crowd: the people.
        seed: of their noise.
    """
    done = threading.Event()

    def answer(person: Person, task: Any) -> dict[str, Any]:
        form, prompt, answers = cast(Form, kind_named(task["kind"]).form), task["prompt"], tuple(task["answers"])
        rng = prompt_rng(seed, form, prompt, *sorted(answers))
        judged = person.judge(rng, form, scene_of(prompt), prompt, answers)
        if isinstance(judged, Ranking):
            return {"order": [[place] for place in np.argsort([rank or 0 for rank in judged.ranks]).tolist()]}
        if isinstance(judged, Rating):
            return {"value": int(judged.value)}
        if isinstance(judged, Comment):
            return {"text": judged.text}
        assert isinstance(judged, Correction)
        return {"edited": judged.edited}

    names = [person.name for person in crowd]
    with running_page(store, names, "--simulated", *names) as page, ThreadPoolExecutor(len(crowd)) as threads:
        working = [
            threads.submit(
                answer_through_page, page.urls[p.name], partial(answer, p), wait_s=math.inf, done=done.is_set
            )
            for p in crowd
        ]
        try:
            yield
        finally:
            done.set()
        for work in working:
            work.result()


# ---- The AI labeler


def by_labeler(form: Form, pool: Pool, judge: LanguageModelJudge) -> list[Judgement]:
    """Returns the AI labeler's judgements of a pool; one that it could not make has no value.

    Args:
        form: "rating", "ranking", "comment" or "correction".
        pool: prompts and their answers.
        judge: the labeler; comments need a judge with a `reasoning`.
    """
    rater = Rater("labeler", "ai", model=judge.hash)
    prompts, answers = pool.singles
    if form == "comment":
        texts, ended = judge.reasons(prompts, answers)
        return [
            Comment(prompt=p, answers=(a,), rater=rater, text=t, status="ok" if ok and t.strip() else "unparsed", raw=t)
            for p, a, t, ok in zip(prompts, answers, texts, ended)
        ]
    if form == "correction":
        revised = revise_answers(judge, prompts, answers)
        return [
            Correction(prompt=p, answers=(a,), rater=rater, edited=e, status="unparsed" if e is None else "ok")
            for p, a, e in zip(prompts, answers, revised)
        ]
    scores = judge.score(prompts, answers)
    if form == "rating":
        return [
            Rating(
                prompt=p,
                answers=(a,),
                rater=rater,
                value=float(np.clip(value, 1, 10)),
                probabilities=tuple(float(x) for x in np.clip(probabilities, 0, 1)),
                label_mass=float(np.clip(mass, 0, 1)),
                status="ok" if valid else "abstained",
            )
            for p, a, value, probabilities, valid, mass in zip(prompts, answers, *scores)
        ]
    starts = np.cumsum([0] + [len(group) for group in pool.answers])
    made: list[Judgement] = []
    for prompt, group, at in zip(pool.prompts, pool.answers, starts):
        rows = slice(at, at + len(group))
        valid = scores.valid[rows]
        ranks = ranks_of(np.where(valid, scores.expected[rows], -np.inf).tolist())
        placed = tuple(rank if ok else None for rank, ok in zip(ranks, valid))
        status: Status = "ok" if valid.sum() >= 2 else "abstained"
        made.append(Ranking(prompt=prompt, answers=group, rater=rater, ranks=placed, status=status))
    return made


def revise_answers(
    judge: LanguageModelJudge, prompts: Sequence[str], answers: Sequence[str], batch_size: int = 128
) -> list[str | None]:
    """Lets the labeler criticise and rewrite each answer, without sampling (temperature 0).

    Args:
        judge: the labeler.
        prompts: the B prompts.
        answers: the B answers.
        batch_size: answers of one compiled call.

    Returns:
        The B revised answers; None where the labeler finishes no revision.
    """
    tokenizer, model = judge.tokenizer, judge.model
    sampling, length = SamplingConfig(max_new_tokens=52, temperature=0.0), 64
    marker = f" {labeler_prompts.MARKERS[6]} "  # <revise>

    def write(params: Params, prompts: Prompts, *, axis_name: str | None = None) -> Rollout:
        key, eos = jax.random.key(0), tokenizer.stop_ids
        return generate(model, params, prompts, key, sampling=sampling, eos_id=eos, pad_id=tokenizer.pad_id)

    data = zip(map(tokenizer.quote, prompts), map(tokenizer.quote, answers))
    questions = [tokenizer.encode(labeler_prompts.critique_prompt("<overall>", p, a)) for p, a in data]
    tokens, mask = padded(questions, length, tokenizer.pad_id, "left")
    rows = Prompts(tokens, mask, np.zeros(len(questions), np.uint32))  # type: ignore[arg-type]
    rollout = in_batches(partial(judge.runner.map(write), judge.params), rows, batch_size)
    revised: list[str | None] = []
    for text, ended in zip(answer_texts(rollout, tokenizer), rollout.finished):
        _, found, edited = f" {text} ".partition(marker)
        revised.append(edited.strip() if ended and found and edited.strip() else None)
    return revised


# ---- Rules


def by_rules(form: Form, pool: Pool, constitution: Constitution) -> Sequence[Judgement]:
    """Returns a constitution's judgements of a pool.

    Corrections are those of `mended`, because no pattern knows salience.

    Args:
        form: "rating", "ranking", "comment" or "correction".
        pool: prompts and their answers.
        constitution: the rules.
    """
    prompts, answers = pool.singles
    if form == "ranking":
        return rule_rankings(constitution, pool.prompts, pool.answers)
    if form == "correction":
        rater = rule_rater(constitution)
        return [Correction(prompt=p, answers=(a,), rater=rater, edited=mended(p, a)) for p, a in zip(prompts, answers)]
    return (rule_ratings if form == "rating" else rule_comments)(constitution, prompts, answers)
