"""All words of the world in a fixed order; the tokens of a text are ``text.split()``."""

from __future__ import annotations

from rlaif_jax.data.world.labeler_prompts import MARKERS, NOTES, PRINCIPLES, SCORES, VERDICTS, YES_NO
from rlaif_jax.data.world.scenes import ASPECTS, SALIENCE_WORDS, SYLLABLES, VALUES

SPECIALS: tuple[str, ...] = ("<pad>", "<bos>", "<eos>", "<unk>")
FUNCTION_WORDS: tuple[str, ...] = (
    "summarise", "talk", ":", "=", ".", "?", "ask", "asked", "open", "sealed",
    "in", "the", "and", "you", "of", "will", "more", "surely", "dear", "traveller",
)  # fmt: skip

VOCABULARY: tuple[str, ...] = (
    SPECIALS
    + FUNCTION_WORDS
    + SYLLABLES
    + ASPECTS
    + VALUES
    + SALIENCE_WORDS
    + YES_NO
    + NOTES
    + PRINCIPLES
    + MARKERS
    + VERDICTS
    + SCORES
)
