"""Who judges the world's summaries, and how: an AI labeler, rules, and simulated people, each in all four forms.

A source turns a pool of answers into records (`rlaif_jax.feedback.records.forms`). Simulated people look at exact
quality through noise and are labelled `simulated`; the labeler and the rules see the prompt and the answer only.
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
from world_models import WorldModels

from rlaif_jax.data.world import labeler_prompts
from rlaif_jax.data.world.gold import scores as gold
from rlaif_jax.data.world.grammar import parse, summary
from rlaif_jax.data.world.people import Commenter, Editor, Ranker, SimulatedRater, simulated_raters
from rlaif_jax.data.world.scenes import SALIENCE_WORDS, Scene
from rlaif_jax.data.world.tasks.base import WorldTask
from rlaif_jax.data.world.tasks.summarisation import MAX_FACTS
from rlaif_jax.feedback.constitution.constitution import load_constitution
from rlaif_jax.feedback.constitution.rule_records import rule_comments, rule_rankings, rule_rater, rule_ratings
from rlaif_jax.feedback.judges.language_model import LanguageModelJudge
from rlaif_jax.feedback.people.kinds import kind_named
from rlaif_jax.feedback.records.forms import Comment, Correction, Judgement, Ranking, Rater, Rating, Status, sha256
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.policies.text import answer_texts, generate
from rlaif_jax.recipes.crowd import answer_through_page, running_page
from rlaif_jax.types import Params, Prompts, Rollout

Form = Literal["comment", "rating", "correction", "ranking"]
FORMS: tuple[Form, ...] = get_args(Form)


SceneOf = Callable[[str], Scene]  # from a prompt to its scene: what simulated people, and nobody else, look at


class Pool(NamedTuple):
    """N prompts and the different answers to each that are judged."""

    prompts: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]

    @property
    def singles(self) -> tuple[list[str], list[str]]:
        """(prompts, answers) of all N x K answers, those of a prompt side by side."""
        return (
            [p for p, answers in zip(self.prompts, self.answers) for _ in answers],
            [a for answers in self.answers for a in answers],
        )


def pool_of(prompts: Sequence[str], answers: Sequence[str]) -> Pool:
    """The different answers to each prompt, from B prompts and answers side by side."""
    groups: dict[str, dict[str, None]] = {}
    for prompt, answer in zip(prompts, answers):
        groups.setdefault(prompt, {})[answer] = None
    return Pool(tuple(groups), tuple(tuple(group) for group in groups.values()))


def ranks_of(scores: Sequence[float]) -> tuple[int, ...]:
    """Places by falling score, 1 = best; equal scores share a place."""
    return tuple(1 + sum(other > score for other in scores) for score in scores)


# ---- Simulated people


@dataclasses.dataclass(frozen=True)
class Person:
    """One simulated annotator: a judgement of an answer (or of the answers to one prompt) in any form."""

    name: str
    task: WorldTask
    ranker: Ranker
    scale: SimulatedRater
    commenter: Commenter
    editor: Editor

    @property
    def rater(self) -> Rater:
        return Rater(self.name, "simulated", model="rlaif_jax.data.world.people")

    def judge(
        self, rng: np.random.Generator, form: Form, scene: Scene, prompt: str, answers: Sequence[str]
    ) -> Judgement:
        """Their judgement; of one answer, except for a ranking."""
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


def people(task: WorldTask, seed: int, number: int = 5) -> tuple[Person, ...]:
    """A crowd with biases, stretches and noise of their own."""
    names = ("anna", "bela", "carl", "dora", "emil", "fria", "gero", "hana")[:number]
    crowd = simulated_raters(np.random.default_rng((seed, 7)), number)
    return tuple(Person(name, task, Ranker(), rater, Commenter(0.05), Editor(0.1)) for name, rater in zip(names, crowd))


def simulated(form: Form, pool: Pool, scene_of: SceneOf, crowd: Sequence[Person], seed: int) -> list[Judgement]:
    """Each answer (each prompt, of rankings) judged by one of the crowd; chance depends on the prompt alone."""
    made = []
    for prompt, answers in zip(pool.prompts, pool.answers):
        rng = chance(seed, form, prompt)
        for group in [answers] if form == "ranking" else [(answer,) for answer in answers]:
            person = crowd[int(rng.integers(len(crowd)))]
            made.append(person.judge(rng, form, scene_of(prompt), prompt, group))
    return made


def chance(seed: int, form: Form, *words: str) -> np.random.Generator:
    """Randomness that depends on what is judged, not on when or by which process."""
    return np.random.default_rng((seed, FORMS.index(form), int(sha256(words)[:15], 16)))


@contextmanager
def crowd_at_the_page(store: Path, scene_of: SceneOf, crowd: Sequence[Person], seed: int) -> Iterator[None]:
    """The same people (simulated, and labelled so) at work on the annotation page of `store`: its own server in a process
    of its own, each of them a client that answers whatever task it is given, over HTTP, until this is left."""
    done = threading.Event()

    def answer(person: Person, task: Any) -> dict[str, Any]:
        form, prompt, answers = cast(Form, kind_named(task["kind"]).form), task["prompt"], tuple(task["answers"])
        rng = chance(seed, form, prompt, *sorted(answers))
        judged = person.judge(rng, form, scene_of(prompt), prompt, answers)
        if isinstance(judged, Ranking):
            return {"order": [[place] for place in np.argsort([rank or 0 for rank in judged.ranks]).tolist()]}
        if isinstance(judged, Rating):
            return {"value": int(judged.value)}
        return {"text": judged.text} if isinstance(judged, Comment) else {"edited": cast(Correction, judged).edited}

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


def by_labeler(form: Form, pool: Pool, judge: LanguageModelJudge, world: WorldModels) -> list[Judgement]:
    """The labeler's judgements; what it could not do is a record without a value."""
    rater = Rater("labeler", "ai", model=judge.hash)
    prompts, answers = pool.singles
    if form == "comment":
        texts, ended = judge.reasons(prompts, answers)
        return [
            Comment(prompt=p, answers=(a,), rater=rater, text=t, status="ok" if ok and t.strip() else "unparsed", raw=t)
            for p, a, t, ok in zip(prompts, answers, texts, ended)
        ]
    if form == "correction":
        revised = revisions(judge, world, prompts, answers)
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
                status="ok" if valid else "abstained",
            )
            for p, a, value, probabilities, valid in zip(prompts, answers, *scores)
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


def revisions(
    judge: LanguageModelJudge, world: WorldModels, prompts: Sequence[str], answers: Sequence[str], batch_size: int = 128
) -> list[str | None]:
    """Each answer as the labeler would have written it, after its critique; None where it came to no end."""
    tokenizer, model = judge.tokenizer, judge.model
    sampling, length = SamplingConfig(max_new_tokens=52, temperature=0.0), 64
    marker = f" {labeler_prompts.MARKERS[6]} "  # <revise>

    def write(params: Params, prompts: Prompts, *, axis_name: str | None = None) -> Rollout:
        key, eos = jax.random.key(0), tokenizer.eos_id
        return generate(model, params, prompts, key, sampling=sampling, eos_id=eos, pad_id=tokenizer.pad_id)

    written = world.runner.map(write)
    asked = [tokenizer.encode(labeler_prompts.critique_prompt("<overall>", p, a)) for p, a in zip(prompts, answers)]
    revised: list[str | None] = []
    for text, ended in zip(answer_texts(rollout, tokenizer), rollout.finished):
        _, found, edited = f" {text} ".partition(marker)
        revised.append(edited.strip() if ended and found and edited.strip() else None)
    return revised


# ---- Rules: they read the prompt's facts, as its reader would


def by_rules(form: Form, pool: Pool) -> Sequence[Judgement]:
    """What experiments/brindlemoor.toml says; its corrections are `mended`, for what is salient is no pattern."""
    constitution = load_constitution(Path(__file__).with_name("brindlemoor.toml"))
    prompts, answers = pool.singles
    if form == "ranking":
        return rule_rankings(constitution, pool.prompts, pool.answers)
    if form == "correction":
        rater = rule_rater(constitution)
        return [Correction(prompt=p, answers=(a,), rater=rater, edited=mended(p, a)) for p, a in zip(prompts, answers)]
    return (rule_ratings if form == "rating" else rule_comments)(constitution, prompts, answers)


def facts(prompt: str) -> dict[str, tuple[int, str]]:
    """aspect -> (salience 1 .. 3, value), as the prompt lists them."""
    words = prompt.partition(":")[2].split()
    return {
        words[i + 1]: (SALIENCE_WORDS.index(words[i]) + 1, words[i + 2])
        for i in range(0, len(words) - 2, 3)
        if words[i] in SALIENCE_WORDS
    }


def telling(prompt: str, answer: str) -> float:
    """How much of the best possible salience the first claims of the answer truly tell."""
    known = facts(prompt)
    told = {c.aspect for c in parse(answer).claims[:MAX_FACTS] if known.get(c.aspect, (0, ""))[1] == c.value}
    best = sum(sorted((salience for salience, _ in known.values()), reverse=True)[:MAX_FACTS])
    return sum(known[aspect][0] for aspect in told) / max(best, 1)


def faithful(prompt: str, answer: str) -> float:
    """1 unless a claim is not in the prompt."""
    known = facts(prompt)
    return float(all(known.get(claim.aspect, (0, ""))[1] == claim.value for claim in parse(answer).claims))


def fresh(prompt: str, answer: str) -> float:
    """1 unless something is said twice."""
    aspects = [claim.aspect for claim in parse(answer).claims]
    return float(len(set(aspects)) == len(aspects))


def town(prompt: str, answer: str) -> float:
    """1 if the prompt's town, and no other, is named."""
    named = {name.entity for name in parse(answer).names}
    return float(named == {" ".join(prompt.partition(":")[0].split()[1:])})


def mended(prompt: str, answer: str) -> str:
    """The answer with what is false or said twice taken out and its least salient claim replaced by the most salient one
    left unsaid."""
    known = facts(prompt)
    kept: list[str] = []
    for claim in parse(answer).claims:
        if claim.aspect in known and claim.aspect not in kept:
            kept.append(claim.aspect)
    kept = kept[:MAX_FACTS]
    unsaid = sorted((a for a in known if a not in kept), key=lambda a: -known[a][0])
    if unsaid and len(kept) < 2:
        kept.append(unsaid[0])
    elif unsaid:
        least = min(kept, key=lambda a: known[a][0])
        if known[least][0] < known[unsaid[0]][0]:
            kept[kept.index(least)] = unsaid[0]
    return summary([(a, known[a][1]) for a in kept], " ".join(prompt.partition(":")[0].split()[1:]))
