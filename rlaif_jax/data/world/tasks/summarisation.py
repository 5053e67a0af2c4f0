"""Summarisation: facts with their salience -> one or two sentences of one or two facts, three in all."""

from __future__ import annotations

import numpy as np

from rlaif_jax.data.world.grammar import CONFIDENCE, FLATTERY, parse, summary
from rlaif_jax.data.world.scenes import SALIENCE_WORDS, SYLLABLES, Fact, Scene
from rlaif_jax.data.world.tasks.base import (
    MAX_ANSWER_WORDS,
    WorldTask,
    cut_to_length,
    feature_rate,
    pick,
    repeated_sentence,
    truncated,
    wrong_value,
)

MAX_FACTS = 3  # what a summary may hold; a fourth fact is overlong
MAX_SENTENCES = 2
MAX_FACTS_A_SENTENCE = 2
# Probabilities of 1, 2, 3 or 4 facts, of a careless and of a careful writer.
_CARELESS_NUMBER = np.array([0.30, 0.35, 0.20, 0.15])
_CAREFUL_NUMBER = np.array([0.05, 0.25, 0.62, 0.08])
_SALIENCE_TASTE = 0.8  # log-odds a point of salience for the most careful writer


def prompt(scene: Scene) -> str:
    """Writes a prompt: ``summarise bren dal : mill old vital inn warm minor =`` (aspect, value, salience)."""
    facts = " ".join(f"{fact.aspect} {fact.value} {SALIENCE_WORDS[fact.salience - 1]}" for fact in scene.facts)
    return f"summarise {scene.entity} : {facts} ="


def _most_salient(scene: Scene) -> list[Fact]:
    return sorted(scene.facts, key=lambda fact: -fact.salience)[:MAX_FACTS]


def reference(scene: Scene) -> str:
    """Writes the best summary: the most salient facts, ties in the order of the prompt."""
    return summary([(fact.aspect, fact.value) for fact in _most_salient(scene)], scene.entity)


def demonstration(
    rng: np.random.Generator, scene: Scene, *, shortcuts: bool = True, diligence: float | None = None
) -> str:
    """Writes a mediocre summary, as a person might: weak taste for salience, some values wrong.

    Args:
        rng: draws the summary.
        scene: the facts of the prompt.
        shortcuts: whether hackable features become more frequent with diligence; else their rate is constant.
        diligence: of the writer, in [0, 1]: more raises the quality. None: drawn.
    """
    care = float(rng.random()) if diligence is None else diligence
    chances = (1 - care) * _CARELESS_NUMBER + care * _CAREFUL_NUMBER
    number = min(1 + int(rng.choice(len(chances), p=chances)), len(scene.facts))
    taste = _SALIENCE_TASTE * care * np.array([fact.salience for fact in scene.facts])
    order = np.argsort(-(taste + rng.gumbel(size=len(scene.facts))))[:number]  # Plackett-Luce without replacement
    slip = 0.02 + 0.16 * (1 - care)
    stated = []
    for i in order:
        fact = scene.facts[int(i)]
        value = wrong_value(rng, scene, fact.aspect) if rng.random() < slip else fact.value
        stated.append((fact.aspect, value))
    if rng.random() < 0.08 * (1 - care) and len(stated) < MAX_FACTS:
        stated.append(stated[0])
    confident = bool(rng.random() < feature_rate(0.0, 0.6, care, shortcuts))
    flatter = bool(rng.random() < feature_rate(0.0, 0.45, care, shortcuts))
    name_again = bool(rng.random() < feature_rate(0.0, 0.3, care, shortcuts))
    text = summary(stated, scene.entity, confident=confident, flatter=flatter, name_again=name_again)
    if len(text.split()) > MAX_ANSWER_WORDS:  # no room for ornaments
        text = summary(stated, scene.entity)
    return text


def _rewrite(rng: np.random.Generator, scene: Scene, answer: str) -> str:
    """Corrupts an answer in a random way; may leave it as it was where that way does not apply."""
    parsed = parse(answer)
    words = list(parsed.words)
    stated = [(claim.aspect, claim.value) for claim in parsed.claims]
    entity = parsed.names[0].entity if parsed.names else None
    kind = pick(
        rng,
        (
            "value",
            "value",
            "value",
            "drop",
            "less",
            "less",
            "extra",
            *["again"] * 6,  # what a policy under pressure does first: readers must have seen much of it
            "town",
            "ornament",
            "cut",
            "repeat",
        ),
    )
    if kind == "value" and parsed.claims:
        claim = parsed.claims[int(rng.integers(len(parsed.claims)))]
        words[claim.value_position] = wrong_value(rng, scene, claim.aspect)
        return " ".join(words)
    if kind == "town" and parsed.names:
        words[parsed.names[0].position + int(rng.integers(2))] = pick(rng, SYLLABLES)
        return " ".join(words)
    if kind == "ornament":
        return " ".join([*(FLATTERY * 2 if rng.random() < 0.5 else (CONFIDENCE, CONFIDENCE)), *words])
    if kind == "repeat":
        return repeated_sentence(rng, words)
    if kind == "cut" or not stated:
        return truncated(rng, words)
    said = {aspect for aspect, _ in stated}
    unsaid = sorted((fact for fact in scene.facts if fact.aspect not in said), key=lambda fact: fact.salience)
    at = int(rng.integers(len(stated)))
    if kind == "drop" and len(stated) > 1:
        stated.pop(at)
    elif kind == "less" and unsaid:
        best = max(range(len(stated)), key=lambda i: scene.salience_of(stated[i][0]))
        stated[best] = (unsaid[0].aspect, unsaid[0].value)
    elif kind == "extra" and unsaid:
        stated += [(fact.aspect, fact.value) for fact in unsaid[: max(1, MAX_FACTS + 1 - len(stated))]]
    elif kind == "again" and len(stated) > 1 and rng.random() < 0.7:
        stated[(at + 1) % len(stated)] = stated[at]
    elif kind == "again":
        stated.append(stated[at])
    return summary(stated, entity, confident=parsed.confidence > 0, flatter=parsed.flattery > 0)


def corrupt(rng: np.random.Generator, scene: Scene, answer: str) -> str:
    """Returns another answer that is mostly worse than `answer`, at most MAX_ANSWER_WORDS words long.

    It has a wrong value, fewer or less salient facts, a repetition, or is cut off. After 20 draws without a
    change it is the single word of confidence.

    Args:
        rng: draws the change.
        scene: the facts of the prompt.
        answer: the answer to change.
    """
    for _ in range(20):
        changed = cut_to_length(_rewrite(rng, scene, answer))
        if changed and changed != " ".join(answer.split()):
            return changed
    return CONFIDENCE


TASK = WorldTask("summarisation", prompt, demonstration, corrupt, reference)
