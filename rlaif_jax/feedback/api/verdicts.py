"""What a judge's reply says: a server's response as a reply, a reply as a verdict, a verdict as a judgement.

A label is read from its log-probability where the server gives it, else from the words. Two judgements of a pair, one
in each order, make a preference without position bias (Lee 2023, section 2.2).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rlaif_jax.config import require
from rlaif_jax.feedback.api.templates import Asked, Question, Template
from rlaif_jax.feedback.records.forms import Call, Comment, Correction, Judgement, Ranking, Rater, Rating, Status

Debias = Literal["logit", "mean"]
Distribution = tuple[float, ...]

_CANNOT = r"(?:can(?:no|['\u2019]?)t|can not|won['\u2019]t|will not|(?:am|are) (?:unable|not able) to|must decline to)"
_REFUSAL = re.compile(
    r"\W*(?:(?:i['\u2019]?m |i am |we are )?(?:very |really )?sorry\b.{0,80}?\b(?:can(?:no|['\u2019]?)t|unable|not able)"
    rf"|(?:i|we) {_CANNOT} (?:help|assist|comply|fulfil|do that|engage|judge|evaluate|compare|rate|provide|answer)"
    r"|as an ai\b)",
    re.IGNORECASE | re.DOTALL,
)


class BadReply(ValueError):
    """A response that is no completion."""


class Token(NamedTuple):
    """One token of a reply with the most probable alternatives, (text, log-probability in nats) each."""

    text: str
    top: tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Reply:
    """A completion. tokens: where the server gave log-probabilities. finish: why it ended. usage: tokens, None = not told."""

    text: str
    tokens: tuple[Token, ...] = ()
    refusal: str = ""
    finish: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


def read_reply(body: Any) -> Reply:
    """The reply in the body of /chat/completions or /completions; BadReply if it has another shape.

    Log-probabilities are read in the chat's shape and in the older one of completions.
    """
    try:
        choice = body["choices"][0]
        refusal = ""
        if "message" in choice:
            message = choice["message"]
            text, refusal = message.get("content"), message.get("refusal") or ""
        else:
            text = choice["text"]
        finish = choice.get("finish_reason") or ""
        if finish == "content_filter":
            refusal = refusal or "stopped by the server's content filter"
        if text is None and not refusal and finish != "length":
            raise BadReply("no content")
        text = text or ""
        if not isinstance(text, str):
            raise BadReply("content that is no text")
        usage = body.get("usage") or {}
        return Reply(
            text=text,
            tokens=_read_tokens(choice.get("logprobs") or {}),
            refusal=str(refusal),
            finish=str(finish),
            prompt_tokens=_count(usage.get("prompt_tokens")),
            completion_tokens=_count(usage.get("completion_tokens")),
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise BadReply(f"the response is no completion ({type(error).__name__}: {error})") from error


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


def _read_tokens(logprobs: Mapping[str, Any]) -> tuple[Token, ...]:
    if logprobs.get("content"):
        return tuple(
            Token(
                _spelled(entry),
                tuple((_spelled(top), float(top["logprob"])) for top in entry.get("top_logprobs") or ()),
            )
            for entry in logprobs["content"]
        )
    tops = logprobs.get("top_logprobs") or [{} for _ in logprobs.get("tokens") or ()]
    return tuple(
        Token(text, tuple((t, float(p)) for t, p in (top or {}).items()))
        for text, top in zip(logprobs.get("tokens") or (), tops)
    )


def _spelled(entry: Mapping[str, Any]) -> str:
    """A token's text, from its bytes where they are given: half a character has no text of its own."""
    data = entry.get("bytes")
    return bytes(data).decode(errors="replace") if data else str(entry["token"])


# ---- choices by log-probability


def choice_distribution(
    top: Sequence[tuple[str, float]], labels: Sequence[str], sampled: str = ""
) -> tuple[Distribution, float]:
    """(P(label) over `labels`, renormalised; their mass before) from the most probable tokens.

    A label's variants ("A", " A", and "Ye" where only "Yes" begins so) are summed. A label that is not among the tokens
    has a probability of at most the smallest one shown and at most what is left over (1e-7 where rounding leaves less):
    it is given that, shared among such labels, not 0. (Servers add the `sampled` token to the most probable ones, so its
    probability is no such bound.) The mass counts only what was shown; () where it is 0.
    """
    shown = [math.exp(min(logprob, 0.0)) for _, logprob in top]
    found = dict.fromkeys(labels, 0.0)
    for (text, _), probability in zip(top, shown):
        begun = text.strip(" \t\n\u2581\u0120\u010a")
        meant = [label for label in labels if begun and label.startswith(begun)]
        if len(meant) == 1:
            found[meant[0]] += probability
    mass = min(sum(found.values()), 1.0)
    if mass <= 0:
        return (), 0.0
    missing = [label for label, probability in found.items() if probability == 0]
    if missing:
        others = [probability for (text, _), probability in zip(top, shown) if text != sampled]
        bound = min(min(others or shown), max(1.0 - sum(shown), 1e-7) / len(missing))
        found |= dict.fromkeys(missing, bound)
    total = sum(found.values())
    return tuple(found[label] / total for label in labels), mass


class Reading(NamedTuple):
    """What a reply says. label: the choice. value: its meaning (Template.labels), the expectation where there are
    probabilities. text: of forms in words. label_mass: see `choice_distribution`; None = no log-probabilities."""

    status: Status
    label: str = ""
    value: float = math.nan
    probabilities: Distribution = ()
    label_mass: float | None = None
    text: str = ""


def read_verdict(reply: Reply, template: Template, asked: Asked, *, direct: bool, min_mass: float = 0.5) -> Reading:
    """The verdict of a reply.

    direct: the reply was to begin with the label. Then labels that have less than `min_mass` of the probability together
    are no answer: `abstained`, with the mass. After reasons the *last* verdict in the reply counts, and its probabilities
    are taken at its own token if the labels have that mass there.
    """
    if reply.refusal:
        return Reading("refused")
    if not template.choices:
        return _read_words(reply, template, asked)
    labels = [label for label, _ in template.labels]
    if direct and template.scorable and reply.tokens and reply.tokens[0].top:
        first = next((token for token in reply.tokens if token.text.strip()), reply.tokens[0])
        probabilities, mass = choice_distribution(first.top, labels, first.text)
        return _chosen(template, probabilities, mass) if mass >= min_mass else Reading("abstained", label_mass=mass)
    verdicts = list(template.verdict_pattern(asked.nonce).finditer(reply.text)) if template.verdict else []
    if not verdicts and direct:
        bare = reply.text.strip().strip("*_.:()[]\"'` ")
        return _said(template, bare) if bare in labels else _unread(reply)
    if not verdicts:
        return _unread(reply)
    said = _said(template, verdicts[-1][1])
    token = _token_at(reply, verdicts[-1].start(1))
    if said.status == "unparsed" or token is None or not token.top or not template.scorable:
        return said
    probabilities, mass = choice_distribution(token.top, labels, token.text)
    return _chosen(template, probabilities, mass) if mass >= min_mass else said._replace(label_mass=mass)


def _token_at(reply: Reply, position: int) -> Token | None:
    """The token that holds the character `position` of the reply; None if that cannot be told."""
    joined = "".join(token.text for token in reply.tokens)
    end = joined.rfind(reply.text)
    if not reply.text or end < 0:
        return None
    position += end
    for token in reply.tokens:
        position -= len(token.text)
        if position < 0:
            return token
    return None


def _chosen(template: Template, probabilities: Distribution, mass: float) -> Reading:
    best = max(range(len(probabilities)), key=probabilities.__getitem__)
    label = template.labels[best][0]
    value = sum(p * v for p, (_, v) in zip(probabilities, template.labels))
    tied = template.form == "ranking" and (template.labels[best][1] == 0.5 or value == 0.5)
    return Reading("tie" if tied else "ok", label, value, probabilities, mass)


def _said(template: Template, label: str) -> Reading:
    """A verdict in words, without probabilities."""
    if template.numeric:
        value = float(label)
        inside = template.labels[0][1] <= value <= template.labels[-1][1]
        return Reading("ok", label, value) if inside else Reading("unparsed")
    value = dict(template.labels)[label]
    return Reading("tie" if template.form == "ranking" and value == 0.5 else "ok", label, value)


def _unread(reply: Reply) -> Reading:
    return Reading("refused" if _REFUSAL.match(reply.text) else "unparsed")


def _read_words(reply: Reply, template: Template, asked: Asked) -> Reading:
    if not template.verdict:
        text = reply.text.strip()
        return Reading("ok", text=text) if text and not _REFUSAL.match(text) else _unread(reply)
    found = list(template.verdict_pattern(asked.nonce).finditer(reply.text))
    if not found:
        return _unread(reply)
    before = template.around(asked.nonce)[0].strip()
    text = found[-1][1].rpartition(before)[2] if before else found[-1][1]
    if template.form == "comment" and not text.strip():
        return Reading("unparsed")
    return Reading("ok", text=text.strip())


# ---- judgements


def judgement(
    question: Question,
    template: Template,
    reading: Reading,
    *,
    order: tuple[int, ...],
    rater: Rater,
    raw: str = "",
    seed: int | None = None,
    time: float | None = None,
    call: Call = Call(),
) -> Judgement:
    """The record of one reply, the missing ones too.

    Ranking: `probability` is P(answers[0] is better) whatever the order shown, None for a verdict in words;
    `probabilities` are over the template's labels, of the answers as shown.
    """
    shared: dict[str, Any] = {
        "prompt": question.prompt,
        "answers": question.answers,
        "rater": rater,
        "principle": question.principle,
        "status": reading.status,
        "time": time,
        "probabilities": reading.probabilities,
        "label_mass": reading.label_mass,
        "raw": raw,
        "seed": seed,
        "generators": question.generators,
        "call": call,
    }
    answered = reading.status in ("ok", "tie")
    if template.form == "ranking":
        first = reading.value if order == (0, 1) else 1 - reading.value  # P(answers[0] is better)
        return Ranking(
            **shared,
            shown=order,
            ranks=() if not answered else (1, 1) if reading.status == "tie" else (1, 2) if first > 0.5 else (2, 1),
            probability=first if answered and reading.probabilities else None,
        )
    if template.form == "rating":
        scores = [value for _, value in template.labels]
        return Rating(**shared, value=reading.value if answered else math.nan, low=min(scores), high=max(scores))
    if template.form == "comment":
        return Comment(**shared, text=reading.text)
    return Correction(**shared, edited=reading.text if answered else None)


class Preference(NamedTuple):
    """Both orders of a pair together.

    probability: P(answers[0] is better) without position bias. bias: (logit p12 + logit p21) / 2 of
    P(the answer shown first is better), > 0 = for the first place; None = a verdict was in words. consistent: whether
    both orders prefer the same answer (two ties are the same).
    """

    probability: float
    bias: float | None
    consistent: bool


def preference(judgements: Iterable[Judgement], *, debias: Debias = "logit") -> Preference | None:
    """The preference in the judgements of one pair, as many in each order; None where an order has no answer.

    logit: sigmoid((logit p12 - logit p21) / 2), p12 and p21 = P(the first one shown is better): a bias that is additive
    in the log-odds cancels exactly. mean: (p12 + 1 - p21) / 2 (Lee 2023, section 2.2); so also for verdicts in words,
    whose probability is 1, 0 or 1/2. Several judgements in an order are averaged first.
    """
    sides: dict[bool, list[tuple[float, bool]]] = {False: [], True: []}
    for entry in judgements:
        require(
            isinstance(entry, Ranking) and len(entry.answers) == 2, "a preference is made of rankings of two answers"
        )
        assert isinstance(entry, Ranking)
        if entry.answered:
            won = next((p for _, _, p in entry.pairs()), None)
            if won is not None:
                sides[entry.shown == (1, 0)].append((won, entry.probability is not None))
    if not sides[False] or not sides[True]:
        return None
    forward, swapped = (sum(p for p, _ in side) / len(side) for side in (sides[False], sides[True]))
    consistent = (forward > 0.5) - (forward < 0.5) == (swapped > 0.5) - (swapped < 0.5)
    if not all(soft for side in sides.values() for _, soft in side):
        return Preference((forward + swapped) / 2, None, consistent)
    first, second = logit(forward), logit(1 - swapped)  # both of the answer shown first
    probability = sigmoid((first - second) / 2) if debias == "logit" else (forward + swapped) / 2
    return Preference(probability, (first + second) / 2, consistent)


def logit(p: float) -> float:
    """Log-odds; probabilities closer than 1e-9 to 0 or 1 are taken for that close."""
    p = min(max(p, 1e-9), 1 - 1e-9)
    return math.log(p) - math.log1p(-p)


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x))."""
    return 0.5 * (1 + math.tanh(x / 2))
