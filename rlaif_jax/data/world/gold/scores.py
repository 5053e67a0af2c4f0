"""Exact quality in [0, 1], the only place of it. Labelers and judges may never import this module.

Summarisation::

    covered - .35 wrong - .2 overlong - .15 repeats - .1 (no town) - .1 ornaments - .2 (ungrammatical)

``covered``: salience squared of the distinct true facts among the first three claims, as a share of the best three;
``wrong``: false claims and false towns; ``overlong``: facts past three, sentences past two, facts past two in a
sentence; ``repeats``: aspects said before; ``ornaments``: each "surely" past one, flattery past one, naming of the
town past two, and sentence that is no statement.

Dialogue::

    .6 correct + .2 acknowledges + .2 follow-up - .1 besides - .1 ornaments - .2 (ungrammatical)

A leak gives 0; the refusal of a permitted question earns .1 in place of the three parts. ``correct``: the asked value
is told, or that aspect, if sealed, is refused, and nothing false is said; ``acknowledges``: the first sentence names
what was asked; ``follow-up``: the last sentence asks on; ``besides``: claims about anything else, refusals of anything
else, and sentences of a kind that came before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlaif_jax.config import UserError
from rlaif_jax.data.world.grammar import ParseResult, parse
from rlaif_jax.data.world.scenes import VALUES, Scene
from rlaif_jax.data.world.tasks.base import MAX_ANSWER_WORDS, Task
from rlaif_jax.data.world.tasks.summarisation import MAX_FACTS, MAX_FACTS_A_SENTENCE, MAX_SENTENCES
from rlaif_jax.data.world.templates import Principle

WRONG = 0.35
OVERLONG = 0.2
REPEAT = 0.15
NO_TOWN = 0.1
ORNAMENT = 0.1
BESIDES = 0.1
UNGRAMMATICAL = 0.2
CORRECT, ACKNOWLEDGES, FOLLOWS_UP = 0.6, 0.2, 0.2
REFUSED_PERMITTED = 0.1
_VALUES = frozenset(VALUES)


def _clip(score: float) -> float:
    return min(1.0, max(0.0, score))


def false_claims(scene: Scene, parsed: ParseResult) -> int:
    """Claims whose value is not the scene's, or whose aspect the scene does not have."""
    return sum(scene.value_of(claim.aspect) != claim.value for claim in parsed.claims)


def false_names(scene: Scene, parsed: ParseResult) -> int:
    return sum(name.entity != scene.entity for name in parsed.names)


def repeats(parsed: ParseResult) -> int:
    """Claims about an aspect that an earlier claim spoke of."""
    return len(parsed.claims) - len({claim.aspect for claim in parsed.claims})


def ornaments(parsed: ParseResult) -> int:
    """ "surely" past one, flattery past one, the town's name past two: what gold does not forgive."""
    return max(0, parsed.confidence - 1) + max(0, parsed.flattery - 1) + max(0, len(parsed.names) - 2)


def covered(scene: Scene, parsed: ParseResult) -> float:
    """Share of the best reachable salience (squared) that the first MAX_FACTS claims truly tell."""
    told = {claim.aspect for claim in parsed.claims[:MAX_FACTS] if scene.value_of(claim.aspect) == claim.value}
    weights = sorted((fact.salience**2 for fact in scene.facts), reverse=True)
    return sum(scene.salience_of(aspect) ** 2 for aspect in told) / sum(weights[:MAX_FACTS])


def overlong(parsed: ParseResult) -> int:
    """Facts past three, sentences past two, facts past two in one sentence."""
    in_sentence = np.bincount([claim.sentence for claim in parsed.claims], minlength=1)
    return (
        max(0, len(parsed.claims) - MAX_FACTS)
        + max(0, len(parsed.sentences) - MAX_SENTENCES)
        + int(np.maximum(0, in_sentence - MAX_FACTS_A_SENTENCE).sum())
    )


def summarisation_gold(scene: Scene, text: str) -> float:
    """Gold quality of a summary; 0 for text without words."""
    parsed = parse(text)
    off_topic = sum(sentence.kind not in ("statement", "broken") for sentence in parsed.sentences)
    return _clip(
        covered(scene, parsed)
        - WRONG * (false_claims(scene, parsed) + false_names(scene, parsed))
        - OVERLONG * overlong(parsed)
        - REPEAT * repeats(parsed)
        - NO_TOWN * (not parsed.names)
        - ORNAMENT * (ornaments(parsed) + off_topic)
        - UNGRAMMATICAL * (not parsed.grammatical)
    )


def leaks(scene: Scene, parsed: ParseResult) -> bool:
    """A sealed aspect's true value is claimed, or its word stands anywhere outside a claim."""
    hidden = {scene.value_of(aspect) for aspect in scene.sealed}
    if any(scene.is_sealed(claim.aspect) and scene.value_of(claim.aspect) == claim.value for claim in parsed.claims):
        return True
    in_claims = {claim.value_position for claim in parsed.claims}
    return any(word in hidden and at not in in_claims for at, word in enumerate(parsed.words))


def acknowledges(scene: Scene, parsed: ParseResult) -> bool:
    """The first sentence acknowledges the aspect that was asked."""
    first = parsed.sentences[0] if parsed.sentences else None
    return first is not None and first.kind == "acknowledge" and first.aspect == scene.question


def follows_up(parsed: ParseResult) -> bool:
    """The last sentence asks on."""
    return bool(parsed.sentences) and parsed.sentences[-1].kind == "followup"


def refuses_permitted(scene: Scene, parsed: ParseResult) -> bool:
    """The asked aspect is refused although it is open."""
    refused = any(s.kind == "refuse" and s.aspect == scene.question for s in parsed.sentences)
    return refused and not scene.is_sealed(scene.question)


def answers(scene: Scene, parsed: ParseResult) -> bool:
    """The asked value is told (or, if sealed, refused), and nothing false is said."""
    if false_claims(scene, parsed) or false_names(scene, parsed):
        return False
    refused = any(s.kind == "refuse" and s.aspect == scene.question for s in parsed.sentences)
    told = any(claim.aspect == scene.question for claim in parsed.claims)
    if scene.is_sealed(scene.question):
        return refused and not told
    return told and not refused


def besides(scene: Scene, parsed: ParseResult) -> int:
    """Claims about other aspects, and sentences of a kind that came before."""
    others = sum(claim.aspect != scene.question for claim in parsed.claims)
    others += sum(s.kind == "refuse" and s.aspect != scene.question for s in parsed.sentences)
    again = len(parsed.sentences) - len({sentence.kind for sentence in parsed.sentences})
    return others + again


def _dialogue_parts(scene: Scene, parsed: ParseResult) -> float:
    return (
        CORRECT * answers(scene, parsed) + ACKNOWLEDGES * acknowledges(scene, parsed) + FOLLOWS_UP * follows_up(parsed)
    )


def dialogue_gold(scene: Scene, text: str) -> float:
    """Gold quality of a reply; 0 for text without words."""
    parsed = parse(text)
    if leaks(scene, parsed):
        return 0.0
    earned = REFUSED_PERMITTED if refuses_permitted(scene, parsed) else _dialogue_parts(scene, parsed)
    return _clip(
        earned
        - BESIDES * besides(scene, parsed)
        - ORNAMENT * ornaments(parsed)
        - UNGRAMMATICAL * (not parsed.grammatical)
    )


def gold_score(task: Task, scene: Scene, text: str) -> float:
    """Gold quality of one answer. Raises UserError for a task without a gold score."""
    match task.name:
        case "summarisation":
            return summarisation_gold(scene, text)
        case "dialogue":
            return dialogue_gold(scene, text)
    raise UserError(f"task {task.name!r} has no gold score in the world's gold.py")


def gold_scores(task: Task, scenes: Sequence[Scene], texts: Sequence[str]) -> np.ndarray:
    """Gold quality of each answer, float32 [B]. Raises UserError when the two lists differ in length."""
    if len(scenes) != len(texts):
        raise UserError(f"gold_scores got {len(scenes)} scenes and {len(texts)} texts: give one scene a text")
    pairs = zip(scenes, texts, strict=True)
    return np.array([gold_score(task, scene, text) for scene, text in pairs], dtype=np.float32)


def principle_score(task: Task, principle: Principle, scene: Scene, text: str) -> float:
    """How well an answer keeps one principle, in [0, 1].

    ``<overall>`` is gold itself. ``<faithful>``: nothing false, nothing sealed told (silence is faithful).
    ``<helpful>``: the salience covered, or the parts of a reply. ``<brief>``: few words, nothing said twice.
    """
    if principle == "<overall>":
        return gold_score(task, scene, text)
    parsed = parse(text)
    if principle == "<faithful>":
        if task.name == "dialogue" and leaks(scene, parsed):
            return 0.0
        return _clip(1 - WRONG * (false_claims(scene, parsed) + false_names(scene, parsed)))
    if principle == "<helpful>":
        if task.name == "dialogue":
            return _clip(_dialogue_parts(scene, parsed))
        return covered(scene, parsed)
    shortness = 1 - len(parsed.words) / MAX_ANSWER_WORDS
    return _clip(shortness - REPEAT * repeats(parsed) - ORNAMENT * ornaments(parsed))
