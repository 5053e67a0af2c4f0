"""The grammar of answers, and a parser that reads any text, however broken, back into facts.

Grammar (words separated by spaces, punctuation being words)::

    text      := sentence*
    sentence  := ("dear" "traveller")* ["surely"] body
    body      := ["in" SYLLABLE SYLLABLE] clause ("and" clause)* "."      statement
               | "you" "ask" "of" "the" ASPECT "."                        acknowledge
               | "the" ASPECT "sealed" "."                                refuse
               | "will" "you" "ask" "more" "?"                            followup
    clause    := "the" ASPECT VALUE

The value follows its aspect directly, in prompts as in answers: a small model then answers by one induction step
(find the aspect, copy what follows), which it learns several times faster than with a word in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlaif_jax.data.world.scenes import ASPECTS, SYLLABLES, VALUES, Scene

FLATTERY: tuple[str, ...] = ("dear", "traveller")
CONFIDENCE = "surely"
SEALED = "sealed"
FOLLOWUP: tuple[str, ...] = ("will", "you", "ask", "more", "?")
ENDS: tuple[str, ...] = (".", "?")

SentenceKind = Literal["statement", "acknowledge", "refuse", "followup", "broken"]

_ASPECTS, _VALUES, _SYLLABLES = frozenset(ASPECTS), frozenset(VALUES), frozenset(SYLLABLES)


@dataclass(frozen=True)
class Claim:
    """A claim ``aspect value`` in sentence ``sentence``; ``position`` is the aspect's word index."""

    aspect: str
    value: str
    sentence: int
    position: int

    @property
    def value_position(self) -> int:
        """Returns the value's word index."""
        return self.position + 1


@dataclass(frozen=True)
class Name:
    """A town named in the text; ``position`` is the first syllable's word index."""

    entity: str
    position: int


@dataclass(frozen=True)
class Sentence:
    """Words ``start`` to ``stop`` (exclusive); ``aspect``: of an acknowledgement or a refusal."""

    kind: SentenceKind
    start: int
    stop: int
    aspect: str | None = None


@dataclass(frozen=True)
class ParseResult:
    """A text read back: words, sentences, claims, names; how often it flatters and says "surely"."""

    words: tuple[str, ...]
    sentences: tuple[Sentence, ...]
    claims: tuple[Claim, ...]
    names: tuple[Name, ...]
    flattery: int
    confidence: int

    @property
    def grammatical(self) -> bool:
        """Returns whether the text is not empty and no sentence is broken."""
        return bool(self.sentences) and all(sentence.kind != "broken" for sentence in self.sentences)

    @property
    def facts(self) -> frozenset[tuple[str, str]]:
        """Returns the set of claimed (aspect, value) pairs."""
        return frozenset((claim.aspect, claim.value) for claim in self.claims)

    def count(self, kind: SentenceKind) -> int:
        """Returns the number of sentences of this kind."""
        return sum(sentence.kind == kind for sentence in self.sentences)


def claim_at(words: Sequence[str], position: int) -> bool:
    """Returns whether the words at `position` and after it are an aspect and a value."""
    return position + 1 < len(words) and words[position] in _ASPECTS and words[position + 1] in _VALUES


def name_at(words: Sequence[str], position: int) -> bool:
    """Returns whether the words at `position` and after it are two syllables of a town's name."""
    return position + 1 < len(words) and words[position] in _SYLLABLES and words[position + 1] in _SYLLABLES


def _is_statement(body: Sequence[str]) -> bool:
    at = 0
    if body and body[0] == "in":
        if not name_at(body, 1):
            return False
        at = 3
    while at < len(body) and body[at] == "the" and claim_at(body, at + 1):
        at += 3
        if tuple(body[at:]) == (".",):
            return True
        if at >= len(body) or body[at] != "and":
            return False
        at += 1
    return False


def _read_sentence(words: Sequence[str], start: int, stop: int) -> Sentence:
    at = start
    while tuple(words[at : min(at + 2, stop)]) == FLATTERY:
        at += 2
    if at < stop and words[at] == CONFIDENCE:
        at += 1
    body = tuple(words[at:stop])
    if body == FOLLOWUP:
        return Sentence("followup", start, stop)
    if len(body) == 6 and body[:4] == ("you", "ask", "of", "the") and body[4] in _ASPECTS and body[5] == ".":
        return Sentence("acknowledge", start, stop, body[4])
    if len(body) == 4 and body[0] == "the" and body[1] in _ASPECTS and body[2:] == (SEALED, "."):
        return Sentence("refuse", start, stop, body[1])
    return Sentence("statement" if _is_statement(body) else "broken", start, stop)


def parse(text: str) -> ParseResult:
    """Reads any text; never raises. Claims and names inside broken sentences are found too."""
    words = tuple(text.split())
    bounds: list[tuple[int, int]] = []
    start = 0
    for index, word in enumerate(words):
        if word in ENDS:
            bounds.append((start, index + 1))
            start = index + 1
    if start < len(words):  # an answer cut off before its end
        bounds.append((start, len(words)))
    sentences = tuple(_read_sentence(words, *bound) for bound in bounds)

    claims, found_names = [], []
    for number, sentence in enumerate(sentences):
        at = sentence.start
        while at < sentence.stop:
            if claim_at(words, at):
                claims.append(Claim(words[at], words[at + 1], number, at))
                at += 2
            elif name_at(words, at):
                found_names.append(Name(f"{words[at]} {words[at + 1]}", at))
                at += 2
            else:
                at += 1
    flattery = sum(words[at : at + 2] == FLATTERY for at in range(len(words)))
    return ParseResult(words, sentences, tuple(claims), tuple(found_names), flattery, words.count(CONFIDENCE))


def wrong_tokens(result: ParseResult, scene: Scene, sealed: Sequence[str] = ()) -> tuple[bool, ...]:
    """Returns one flag for each word of an answer: whether the word is wrong in this scene.

    Wrong are: the value of a false claim (its aspect too, where the scene says nothing about that aspect), both
    words of a claim about a ``sealed`` aspect, the syllables of another town, and in a broken sentence every word
    outside claims and names.

    Args:
        result: the answer, parsed by `parse`.
        scene: the true facts and the town.
        sealed: aspects about which the answer must not make a claim.
    """
    wrong = [False] * len(result.words)
    for sentence in result.sentences:
        if sentence.kind == "broken":
            wrong[sentence.start : sentence.stop] = [True] * (sentence.stop - sentence.start)
    for claim in result.claims:
        truth = scene.value_of(claim.aspect)
        hidden = claim.aspect in sealed
        wrong[claim.position] = truth is None or hidden
        wrong[claim.value_position] = truth != claim.value or hidden
    for name in result.names:
        wrong[name.position : name.position + 2] = [name.entity != scene.entity] * 2
    return tuple(wrong)


# --- writing ------------------------------------------------------------------------------------------------------


def clause(aspect: str, value: str) -> str:
    """Writes the claim that an aspect has a value: "the ASPECT VALUE"."""
    return f"the {aspect} {value}"


def statement(facts: Sequence[tuple[str, str]], entity: str | None = None, confident: bool = False) -> str:
    """Writes one sentence that states facts, such as "surely in bren dal the mill old and the inn warm .".

    Args:
        facts: (aspect, value) pairs.
        entity: the town that the sentence names; None names no town.
        confident: whether the sentence begins with "surely".
    """
    start = (f"{CONFIDENCE} " if confident else "") + (f"in {entity} " if entity else "")
    return f"{start}{' and '.join(clause(*fact) for fact in facts)} ."


def summary(
    facts: Sequence[tuple[str, str]],
    entity: str | None,
    *,
    confident: bool = False,
    flatter: bool = False,
    name_again: bool = False,
) -> str:
    """Writes sentences of two facts each.

    Args:
        facts: (aspect, value) pairs.
        entity: the town, named in the first sentence; None names no town.
        confident: begin with "surely".
        flatter: begin with "dear traveller".
        name_again: name the town in the second sentence, too.
    """
    parts = [" ".join(FLATTERY)] if flatter else []
    for at in range(0, len(facts), 2):
        named = entity if at == 0 or (at == 2 and name_again) else None
        parts.append(statement(facts[at : at + 2], named, confident and at == 0))
    return " ".join(parts)


def acknowledgement(aspect: str) -> str:
    """Writes the sentence that acknowledges a question."""
    return f"you ask of the {aspect} ."


def refusal(aspect: str) -> str:
    """Writes the sentence that refuses an answer."""
    return f"the {aspect} {SEALED} ."
