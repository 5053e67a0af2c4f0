"""Gold quality of summaries, in [0, 1].

The score is::

    covered - .35 wrong - .2 overlong - .15 repeats - .1 (no town) - .1 ornaments - .2 (ungrammatical)

``covered``: salience squared of the distinct true facts among the first three claims, as a share of the best three;
``wrong``: false claims and false towns; ``overlong``: facts past three, sentences past two, facts past two in a
sentence; ``repeats``: aspects said before; ``ornaments``: each "surely" past one, flattery past one, naming of the
town past two, and sentence that is no statement.
"""

from __future__ import annotations

import numpy as np

from rlaif_jax.data.world.gold import base
from rlaif_jax.data.world.grammar import Claim, ParseResult, parse, summary
from rlaif_jax.data.world.labeler_prompts import WorldPrinciple
from rlaif_jax.data.world.scenes import SALIENCE_WORDS, Scene
from rlaif_jax.data.world.tasks.summarisation import MAX_FACTS, MAX_FACTS_A_SENTENCE, MAX_SENTENCES, TASK

OVERLONG = 0.2
NO_TOWN = 0.1


def covered(scene: Scene, parsed: ParseResult) -> float:
    """Returns the salience (squared) of the true first MAX_FACTS claims, as a share of the best possible.

    Args:
        scene: the true facts with their saliences.
        parsed: the summary, parsed.
    """
    true = {claim.aspect for claim in parsed.claims[:MAX_FACTS] if scene.value_of(claim.aspect) == claim.value}
    weights = sorted((fact.salience**2 for fact in scene.facts), reverse=True)
    return sum(scene.salience_of(aspect) ** 2 for aspect in true) / sum(weights[:MAX_FACTS])


def overlong(parsed: ParseResult) -> int:
    """Counts facts past three, sentences past two, and facts past two in one sentence."""
    in_sentence = np.bincount([claim.sentence for claim in parsed.claims], minlength=1)
    return (
        max(0, len(parsed.claims) - MAX_FACTS)
        + max(0, len(parsed.sentences) - MAX_SENTENCES)
        + int(np.maximum(0, in_sentence - MAX_FACTS_A_SENTENCE).sum())
    )


def score(scene: Scene, text: str) -> float:
    """Returns the gold quality of a summary, in [0, 1]; 0 for text without words.

    Args:
        scene: the true facts and the town.
        text: the summary; any text is allowed.
    """
    parsed = parse(text)
    off_topic = sum(sentence.kind not in ("statement", "broken") for sentence in parsed.sentences)
    return base.clip(
        covered(scene, parsed)
        - base.WRONG * (base.false_claims(scene, parsed) + base.false_names(scene, parsed))
        - OVERLONG * overlong(parsed)
        - base.REPEAT * base.repeats(parsed)
        - NO_TOWN * (not parsed.names)
        - base.ORNAMENT * (base.ornaments(parsed) + off_topic)
        - base.UNGRAMMATICAL * (not parsed.grammatical)
    )


def notes(principle: WorldPrinciple, scene: Scene, parsed: ParseResult) -> base.Notes:
    """Returns the critique of a summary that a simulated person without errors writes.

    Args:
        principle: what the critic pays attention to.
        scene: the true facts and the town.
        parsed: the summary, parsed.

    Returns:
        ((claim, judgement) of each claim in order, words about the whole summary).
    """

    def judge_true(claim: Claim, said_before: bool) -> str:
        if said_before:
            return "again"
        salience = principle in ("<helpful>", "<overall>")
        return SALIENCE_WORDS[scene.salience_of(claim.aspect) - 1] if salience else "right"

    bad_town = not parsed.names or base.false_names(scene, parsed) > 0
    general = base.general_notes(principle, parsed, bad_town=bad_town, too_much=overlong(parsed))
    return base.claim_notes(scene, parsed, judge_true), general


def edit(rng: np.random.Generator, scene: Scene, parsed: ParseResult, miss: float) -> str:
    """Returns the summary as a simulated editor corrects it.

    Args:
        rng: draws which mistakes the editor overlooks.
        scene: the true facts and the town.
        parsed: the summary, parsed.
        miss: probability that the editor overlooks a mistake.
    """
    stated = [(claim.aspect, claim.value) for claim in parsed.claims]
    kept: list[tuple[str, str]] = []
    for aspect, value in stated:
        truth = scene.value_of(aspect)
        if rng.random() < miss:
            kept.append((aspect, value))
        elif truth is not None and all(aspect != other for other, _ in kept):
            kept.append((aspect, truth))  # a repeated or an invented aspect goes, a false value is mended
    while len(kept) > MAX_FACTS and rng.random() >= miss:
        kept.remove(min(kept, key=lambda fact: scene.salience_of(fact[0])))
    unsaid = [fact for fact in scene.facts if all(fact.aspect != aspect for aspect, _ in kept)]
    if unsaid:
        best = max(unsaid, key=lambda fact: fact.salience)
        if len(kept) < min(2, len(stated)) or not kept:
            kept.append((best.aspect, best.value))
        elif rng.random() >= miss:  # the one swap that gains most
            worst = min(range(len(kept)), key=lambda i: scene.salience_of(kept[i][0]))
            if scene.salience_of(kept[worst][0]) < best.salience:
                kept[worst] = (best.aspect, best.value)
    return summary(kept, scene.entity, confident=parsed.confidence > 0, flatter=parsed.flattery > 0)


def _never(scene: Scene, parsed: ParseResult) -> bool:
    return False  # a summary may say everything


GOLD = base.GoldTask(TASK, score=score, helpful=covered, leaks=_never, notes=notes, edit=edit)
