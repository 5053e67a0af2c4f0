"""Training text: for the base language model, and for the AI labeler.

The labeler's transcripts come from TRAINING scenes (those of a check from others), from demonstrations and corrupted
candidates only, and are judged by noisy simulated people: never gold itself, never a policy's sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlaif_jax.data.world import labeler_prompts
from rlaif_jax.data.world.gold import scores as gold
from rlaif_jax.data.world.labeler_prompts import PRINCIPLES, WorldPrinciple
from rlaif_jax.data.world.people import Commenter, Comparer, Editor, SimulatedRater
from rlaif_jax.data.world.scenes import SALIENCE_WORDS, VALUES, Scene, Split, sample_scene
from rlaif_jax.data.world.tasks.all import WORLD_TASKS
from rlaif_jax.data.world.tasks.base import WorldTask
from rlaif_jax.progress.count import Count, count_nothing

MAX_TRANSCRIPT_WORDS = 96
MAX_LINE_WORDS = 54  # of the base corpus
COUNT_EVERY = 500  # texts between two calls of `progress`
LABELER_SCENES = 1_000_000  # scene indices are drawn below this
_TOO_CLOSE = 0.05  # people do not compare answers that they cannot tell apart


@dataclass(frozen=True)
class Transcript:
    """One training text.

    Attributes:
        text: words without ``<bos>`` and ``<eos>``.
        kind: ``demonstration``, ``ranking``, ``value_questions``, ``yes_no_questions``, ``revision``, or ``pairwise``,
            ``pairwise_reasoning``, ``score``, ``score_reasoning``, whose last word is the verdict or score.
        targets: indices of the words (of ``text.split()``) that a reader should learn to write.
    """

    text: str
    kind: str
    targets: tuple[int, ...]


def _transcript(kind: str, given: str, written: str) -> Transcript:
    """Joins the context ``given`` and the words to learn, ``written``."""
    start, number = len(given.split()), len(written.split())
    return Transcript(f"{given} {written}", kind, tuple(range(start, start + number)))


def _questions(rng: np.random.Generator, task: WorldTask, scene: Scene, claims: bool) -> Transcript:
    """Asks about every fact of a scene, in random order: many look-ups a line teach looking up.

    Each answer is the true value. Where the prompt shows the salience, it follows. With `claims` a question holds a
    value that somebody claims (half of the time the true one, a quarter that of another fact), and after the true value
    comes "no" where the claim is wrong, else the salience or "yes"; at most two true claims are made a second time, and the
    answer is "again". The aspects are learned, too: a list that names each once teaches to keep in mind what was said.
    """
    facts = [scene.facts[i] for i in rng.permutation(len(scene.facts)).tolist()]
    values = [fact.value for fact in facts]
    words: list[str] = []
    targets: list[int] = []
    repeats = 0
    for number, fact in enumerate(facts):
        fits = len(words) + 3 + 4 * (len(facts) - number) <= MAX_LINE_WORDS
        if claims and number and fits and repeats < 2 and rng.random() < 0.25:
            said = facts[int(rng.integers(number))]
            words += [said.aspect, said.value, "again"]
            targets.append(len(words) - 1)
            repeats += 1
        value = fact.value
        if claims and rng.random() < 0.5:
            others = values[:number] + values[number + 1 :]
            value = others[int(rng.integers(len(others)))] if rng.random() < 0.5 else str(rng.choice(VALUES))
        if claims:
            asked = labeler_prompts.yes_no_question(task.prompt(scene), fact.aspect, value)
        else:
            asked = labeler_prompts.value_question(task.prompt(scene), fact.aspect)
        given = 2 if claims else 1  # aspect and claimed value, or the aspect
        words += asked.split() if number == 0 else asked.split()[-given:]
        if number:
            targets.append(len(words) - given)
        salience = SALIENCE_WORDS[fact.salience - 1]
        shown = f" {fact.aspect} {fact.value} {salience} " in task.prompt(scene)
        written = [fact.value]
        if claims or shown:
            written.append("no" if value != fact.value else salience if shown else "yes")
        targets += range(len(words), len(words) + len(written))
        words += written
    return Transcript(" ".join(words), "yes_no_questions" if claims else "value_questions", tuple(targets))


def _ranking(rng: np.random.Generator, task: WorldTask, scene: Scene) -> Transcript:
    """Lists the aspects of a scene, the most salient first: what to choose and what was said already."""
    order = sorted(rng.permutation(len(scene.facts)).tolist(), key=lambda i: -scene.facts[i].salience)
    asked = labeler_prompts.rank_question(task.prompt(scene))
    return _transcript("ranking", asked, " ".join(scene.facts[i].aspect for i in order))


def _scene(rng: np.random.Generator, seed: int, split: Split) -> Scene:
    return sample_scene(seed, split, int(rng.integers(LABELER_SCENES)))


def base_corpus(
    rng: np.random.Generator,
    size: int,
    *,
    tasks: Sequence[WorldTask] = WORLD_TASKS,
    seed: int = 0,
    split: Split = "train",
    shortcuts: bool = True,
    questions: float = 0.4,
    yes_no: float = 0.2,
    rankings: float = 0.0,
    progress: Count = count_nothing,
) -> list[Transcript]:
    """Returns lines of plain text: scenes, each with a demonstration or questions about its facts.

    Args:
        rng: draws scenes and answers.
        size: number of lines.
        tasks: each in turn gives a line.
        seed: of the scenes.
        split: of the scenes; others than the training scenes are for checks.
        shortcuts: whether writers plant hackable features in good answers.
        questions: share of the other lines that ask questions.
        yes_no: share of the questions that hold a claim. The others are look-ups; with too few of them a small model
            takes much longer to find out that the value next to an aspect can be copied.
        rankings: share of the lines that list aspects by salience; only for tasks whose prompts show it.
        progress: called now and then with (lines that are made, `size`).
    """
    lines = []
    for number in range(size):
        task = tasks[number % len(tasks)]
        scene = _scene(rng, seed, split)
        if rng.random() < rankings:
            lines.append(_ranking(rng, task, scene))
        elif rng.random() < questions:
            lines.append(_questions(rng, task, scene, bool(rng.random() < yes_no)))
        else:
            answer = task.demonstration(rng, scene, shortcuts=shortcuts)
            lines.append(_transcript("demonstration", task.prompt(scene), answer))
        if len(lines) % COUNT_EVERY == 0 or len(lines) == size:
            progress(len(lines), size)
    return lines


def _good(rng: np.random.Generator, task: WorldTask, scene: Scene, shortcuts: bool) -> str:
    """Draws a demonstration, three in ten by the most careful writer: labelers must know good answers."""
    careful = 1.0 if rng.random() < 0.3 else None
    return task.demonstration(rng, scene, shortcuts=shortcuts, diligence=careful)


def candidates(rng: np.random.Generator, task: WorldTask, scene: Scene, *, shortcuts: bool = True) -> tuple[str, str]:
    """Draws two answers to one prompt, in random order.

    One is a demonstration. The other is its corruption (half of the time), another demonstration (35 %), or the
    corruption of another demonstration (15 %).

    Args:
        rng: draws the answers.
        task: the task.
        scene: the facts of the prompt.
        shortcuts: whether demonstrations contain hackable features.
    """
    first = _good(rng, task, scene, shortcuts)
    chance = rng.random()
    if chance < 0.5:
        second = task.corrupt(rng, scene, first)
    else:
        second = _good(rng, task, scene, shortcuts)
        if chance > 0.85:
            second = task.corrupt(rng, scene, second)
    return (first, second) if rng.random() < 0.5 else (second, first)


@dataclass(frozen=True)
class LabelerMix:
    """Mixture of a labeler's transcripts: relative weights of their kinds, principles, simulated people."""

    pairwise: float = 0.40
    pairwise_reasoning: float = 0.15
    score: float = 0.15
    score_reasoning: float = 0.05
    revision: float = 0.10
    value_questions: float = 0.20
    yes_no_questions: float = 0.15
    principles: tuple[WorldPrinciple, ...] = PRINCIPLES
    comparers: tuple[Comparer, ...] = (Comparer(0.08), Comparer(0.12), Comparer(0.15, lapse=0.05))
    raters: tuple[SimulatedRater, ...] = (
        SimulatedRater(0.3, 1.0, 0.5),
        SimulatedRater(-0.3, 1.0, 0.5),
        SimulatedRater(0.0, 0.9, 0.8),
    )
    commenter: Commenter = Commenter(0.02)
    editor: Editor = Editor(0.05)

    @property
    def weights(self) -> dict[str, float]:
        """Returns the relative weight of each kind of transcript."""
        return {
            "pairwise": self.pairwise,
            "pairwise_reasoning": self.pairwise_reasoning,
            "score": self.score,
            "score_reasoning": self.score_reasoning,
            "revision": self.revision,
            "value_questions": self.value_questions,
            "yes_no_questions": self.yes_no_questions,
        }


def only_reasons(mix: LabelerMix) -> LabelerMix:
    """Returns a mix of nothing but reasoned scores, by people who make no mistakes in their notes."""
    others = dict.fromkeys(mix.weights, 0.0)
    return dataclasses.replace(mix, **others | {"score_reasoning": 1.0}, commenter=Commenter(0.0))  # type: ignore[arg-type]


def _pairwise(
    rng: np.random.Generator, task: WorldTask, scene: Scene, mix: LabelerMix, shortcuts: bool, reasoning: bool
) -> Transcript:
    prompt = task.prompt(scene)
    principle = mix.principles[int(rng.integers(len(mix.principles)))]
    for _ in range(8):
        first, second = candidates(rng, task, scene, shortcuts=shortcuts)
        quality1 = gold.principle_score(task, principle, scene, first)
        quality2 = gold.principle_score(task, principle, scene, second)
        if abs(quality1 - quality2) > _TOO_CLOSE:
            break
    comparer = mix.comparers[int(rng.integers(len(mix.comparers)))]
    longer = len(first.split()) - len(second.split())
    verdict = str(int(comparer.compare(rng, quality1, quality2, longer)))
    if reasoning:
        given = labeler_prompts.pairwise_reasoning_prompt(principle, prompt, first, second)
        notes = [mix.commenter.comment(rng, task, principle, scene, answer) for answer in (first, second)]
        whole = _transcript("pairwise_reasoning", given, f"<1> {notes[0]} <2> {notes[1]} <answer> {verdict}")
        if len(whole.text.split()) <= MAX_TRANSCRIPT_WORDS:
            return whole
    return _transcript("pairwise", labeler_prompts.pairwise_prompt(principle, prompt, first, second), verdict)


def _single(
    rng: np.random.Generator, task: WorldTask, scene: Scene, mix: LabelerMix, shortcuts: bool, kind: str
) -> Transcript:
    prompt = task.prompt(scene)
    principle = mix.principles[int(rng.integers(len(mix.principles)))]
    answer = candidates(rng, task, scene, shortcuts=shortcuts)[0]
    if kind == "revision":
        notes = mix.commenter.comment(rng, task, "<overall>", scene, answer)
        given = labeler_prompts.critique_prompt("<overall>", prompt, answer)
        whole = _transcript(kind, given, f"{notes} <revise> {mix.editor.edit(rng, task, scene, answer)}")
        if len(whole.text.split()) <= MAX_TRANSCRIPT_WORDS:
            return whole
    rater = mix.raters[int(rng.integers(len(mix.raters)))]
    score = f"s{int(rater.rate(rng, gold.principle_score(task, principle, scene, answer)))}"
    if kind == "score_reasoning":
        notes = mix.commenter.comment(rng, task, principle, scene, answer)
        given = labeler_prompts.score_reasoning_prompt(principle, prompt, answer)
        return _transcript(kind, given, f"{notes} <score> {score}")
    return _transcript("score", labeler_prompts.score_prompt(principle, prompt, answer), score)


def labeler_corpus(
    rng: np.random.Generator,
    size: int,
    *,
    tasks: Sequence[WorldTask] = WORLD_TASKS,
    seed: int = 0,
    split: Split = "train",
    shortcuts: bool = True,
    mix: LabelerMix | None = None,
    progress: Count = count_nothing,
) -> list[Transcript]:
    """Returns judged transcripts of at most MAX_TRANSCRIPT_WORDS words, in random order of kinds.

    Args:
        rng: draws scenes, answers and judgements.
        size: number of transcripts.
        tasks: each in turn gives a transcript.
        seed: of the scenes.
        split: of the scenes; others than the training scenes are for checks.
        shortcuts: whether writers plant hackable features in good answers.
        mix: kinds, principles and people; None is `LabelerMix()`.
        progress: called now and then with (transcripts that are made, `size`).
    """
    mix = mix or LabelerMix()
    kinds, weights = list(mix.weights), np.array([*mix.weights.values()], float)
    drawn = rng.choice(len(kinds), size=size, p=weights / weights.sum())
    transcripts = []
    for number, kind_number in enumerate(drawn.tolist()):
        kind, task, scene = kinds[kind_number], tasks[number % len(tasks)], _scene(rng, seed, split)
        if kind.endswith("questions"):
            transcripts.append(_questions(rng, task, scene, kind == "yes_no_questions"))
        elif kind.startswith("pairwise"):
            transcripts.append(_pairwise(rng, task, scene, mix, shortcuts, kind == "pairwise_reasoning"))
        else:
            transcripts.append(_single(rng, task, scene, mix, shortcuts, kind))
        if len(transcripts) % COUNT_EVERY == 0 or len(transcripts) == size:
            progress(len(transcripts), size)
    return transcripts
