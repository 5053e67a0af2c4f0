"""Dialogue: a traveller asks about an aspect; a reply states open facts and keeps sealed ones."""

from __future__ import annotations

import numpy as np

from rlaif_jax.data.world.grammar import CONFIDENCE, FLATTERY, FOLLOWUP, acknowledgement, parse, refusal, statement
from rlaif_jax.data.world.scenes import ASPECTS, Scene
from rlaif_jax.data.world.tasks.base import (
    WorldTask,
    cut_to_length,
    feature_rate,
    pick,
    repeated_sentence,
    truncated,
    wrong_value,
)

_FOLLOWUP = " ".join(FOLLOWUP)


def prompt(scene: Scene) -> str:
    """Writes a prompt: ``talk bren dal : open mill old sealed inn warm asked inn sealed . ask mill =``."""
    facts = " ".join(
        f"{'sealed' if scene.is_sealed(fact.aspect) else 'open'} {fact.aspect} {fact.value}" for fact in scene.facts
    )
    earlier = ""
    if scene.earlier is not None:
        answer = "sealed" if scene.is_sealed(scene.earlier) else scene.value_of(scene.earlier)
        earlier = f"asked {scene.earlier} {answer} . "
    return f"talk {scene.entity} : {facts} {earlier}ask {scene.question} ="


def reply(
    aspect: str,
    value: str | None,
    *,
    stated_aspect: str | None = None,
    acknowledge: bool = True,
    follow_up: bool = True,
    confident: bool = False,
    flatter: bool = False,
) -> str:
    """Writes a reply to a question about ``aspect``.

    Args:
        aspect: what was asked.
        value: what is stated; None refuses.
        stated_aspect: the aspect that is stated or refused, if another one.
        acknowledge: begin by acknowledging the question.
        follow_up: end by asking on.
        confident: state with "surely".
        flatter: begin with "dear traveller".
    """
    parts = [" ".join(FLATTERY)] if flatter else []
    if acknowledge:
        parts.append(acknowledgement(aspect))
    stated = stated_aspect or aspect
    parts.append(refusal(stated) if value is None else statement([(stated, value)], confident=confident))
    if follow_up:
        parts.append(_FOLLOWUP)
    return " ".join(parts)


def reference(scene: Scene) -> str:
    """Writes the best reply: it acknowledges, answers or refuses, and asks on."""
    return reply(scene.question, None if scene.is_sealed(scene.question) else scene.value_of(scene.question))


def demonstration(
    rng: np.random.Generator, scene: Scene, *, shortcuts: bool = True, diligence: float | None = None
) -> str:
    """Writes a mediocre reply, as a person might: at times it leaks, refuses, errs or forgets a part.

    Args:
        rng: draws the reply.
        scene: the facts and the question.
        shortcuts: whether hackable features become more frequent with diligence; else their rate is constant.
        diligence: of the writer, in [0, 1]: more raises the quality. None: drawn.
    """
    care = float(rng.random()) if diligence is None else diligence
    sloth = 1 - care
    asked, sealed = scene.question, scene.is_sealed(scene.question)
    aspect, value = asked, scene.value_of(asked)
    chance = rng.random()
    if sealed:
        if chance >= 0.02 + 0.6 * sloth:  # else it leaks
            value = None
    elif chance < 0.3 * sloth:
        value = None
    elif chance < 0.02 + 0.5 * sloth:
        value = wrong_value(rng, scene, asked)
    elif chance < 0.02 + 0.7 * sloth:  # speaks of something else
        fact = scene.facts[int(rng.integers(len(scene.facts)))]
        aspect, value = fact.aspect, fact.value
    return reply(
        asked,
        value,
        stated_aspect=aspect,
        acknowledge=bool(rng.random() < 0.25 + 0.6 * care),
        follow_up=bool(rng.random() < 0.2 + 0.6 * care),
        confident=bool(rng.random() < feature_rate(0.0, 0.6, care, shortcuts)),
        flatter=bool(rng.random() < feature_rate(0.0, 0.45, care, shortcuts)),
    )


def _rewrite(rng: np.random.Generator, scene: Scene, answer: str) -> str:
    """Corrupts an answer in a random way; may leave it as it was where that way does not apply."""
    parsed = parse(answer)
    words = list(parsed.words)
    by_kind = {sentence.kind: sentence for sentence in parsed.sentences}
    kind = pick(
        rng, ("value", "value", "swap", "swap", "ack", "followup", "drop", "other", "ornament", "cut", "repeat", "add")
    )

    def replaced(start: int, stop: int, text: str) -> str:
        return " ".join([*words[:start], *text.split(), *words[stop:]])

    if kind == "value" and parsed.claims:
        claim = parsed.claims[int(rng.integers(len(parsed.claims)))]
        return replaced(claim.value_position, claim.value_position + 1, wrong_value(rng, scene, claim.aspect))
    if kind == "swap":  # a refusal in place of an answer, a leak in place of a refusal
        if "refuse" in by_kind:
            sentence = by_kind["refuse"]
            leak = statement([(scene.question, str(scene.value_of(scene.question)))])
            return replaced(sentence.start, sentence.stop, leak)
        if "statement" in by_kind:
            sentence = by_kind["statement"]
            return replaced(sentence.start, sentence.stop, refusal(scene.question))
    if kind == "ack" and "acknowledge" in by_kind:
        sentence = by_kind["acknowledge"]
        return replaced(
            sentence.start, sentence.stop, "" if rng.random() < 0.6 else acknowledgement(pick(rng, ASPECTS))
        )
    if kind == "followup" and "followup" in by_kind:
        sentence = by_kind["followup"]
        return replaced(sentence.start, sentence.stop, "")
    if kind == "drop" and parsed.sentences:
        sentence = parsed.sentences[int(rng.integers(len(parsed.sentences)))]
        return replaced(sentence.start, sentence.stop, "")
    if kind in ("other", "add"):  # speaks of another fact, instead or besides
        fact = scene.facts[int(rng.integers(len(scene.facts)))]
        other = statement([(fact.aspect, fact.value)])
        spot = by_kind.get("statement") or by_kind.get("refuse")
        if spot is not None:
            return replaced(spot.start if kind == "other" else spot.stop, spot.stop, other)
    if kind == "ornament":
        return " ".join([*(FLATTERY * 2 if rng.random() < 0.5 else (CONFIDENCE, CONFIDENCE)), *words])
    if kind == "repeat":
        return repeated_sentence(rng, words)
    return truncated(rng, words) if kind == "cut" else " ".join(words)


def corrupt(rng: np.random.Generator, scene: Scene, answer: str) -> str:
    """Returns another answer that is mostly worse than `answer`, at most MAX_ANSWER_WORDS words long.

    It has a wrong value, a leak, a needless refusal, or a part that is lost or repeated. After 20 draws without a
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


TASK = WorldTask("dialogue", prompt, demonstration, corrupt, reference)
