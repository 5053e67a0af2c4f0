"""Verdicts: parses a judge's reply, and makes judgements and preferences of verdicts.

A label is read from its log-probability where the server gives it, and from the words elsewhere. Two
judgements of a pair, one in each order, make a preference without position bias (Lee 2023, section 2.2).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from scipy.special import expit

from rlaif_jax.config import require
from rlaif_jax.feedback.api.replies import Reply, Token
from rlaif_jax.feedback.api.templates import Question, RenderedQuestion, Template, loose
from rlaif_jax.feedback.records.forms import Call, Comment, Correction, Judgement, Ranking, Rater, Rating, Status
from rlaif_jax.rewards.log_odds import log_odds

Debias = Literal["logit", "mean"]
Distribution = tuple[float, ...]

_UNABLE = r"(?:unable|not able) to"
_CANNOT = (
    rf"(?:i|we)(?: (?:can(?:no|['\u2019]?)t|can not|won['\u2019]?t|will not|must decline to|(?:am|are) {_UNABLE})"
    rf"|['\u2019](?:m|re) {_UNABLE})"
)
_HELP = r"help|assist|comply|fulfil|do (?:that|this|it)|engage|judge|evaluate|compare|rate|provide|answer"
_MORE = (
    r"discuss|respond|review|critique|assess|generate|write|produce|complete|continue|process|share|give|offer|support"
)
_REFUSAL = re.compile(
    rf"\W*+(?:(?:i['\u2019]?m |i am |we are |my |i )?(?:very |really |so )?(?:sorry|apologi[sz]e|apologies)\b.{{0,80}}?"
    rf"\b{_CANNOT} (?:{_HELP}|{_MORE})|{_CANNOT} (?:{_HELP})"
    r"|as an? (?:ai|artificial intelligence|(?:large )?language model)\b[\w ]{0,40}?[, ] ?(?:i|we)\b)",
    re.IGNORECASE | re.DOTALL,
)
_REFUSED_WITHIN = 400  # characters from the beginning of a reply in which a refusal begins and ends


# ---- choices by log-probability


def choice_distribution(
    top: Sequence[tuple[str, float]], labels: Sequence[str], sampled: str = ""
) -> tuple[Distribution, float]:
    """Computes the distribution over labels from the most probable tokens at the verdict's place.

    A label's variants ("A", " A", and "Ye" where only "Yes" begins so) are summed. A label that is not among
    the tokens has at most the smallest probability shown and at most the probability left over (1e-7 where
    rounding leaves less): it gets this bound, shared among such labels, not 0. (Servers add the `sampled`
    token to the most probable ones, so its probability is no such bound.)

    Args:
        top: the most probable tokens, (text, log-probability in nats).
        labels: the labels of the template.
        sampled: the text of the token that was sampled.

    Returns:
        P(label) over `labels`, renormalised, () where no label was shown; and the probability of all shown
        labels together.
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


class ParsedVerdict(NamedTuple):
    """The verdict of a reply.

    Attributes:
        status: "ok", "tie", or why the verdict is missing.
        label: the chosen label; "" for forms in words.
        value: the label's value (`Template.labels`); the expected value where the probabilities are known.
        probabilities: P(label) over the template's labels; () where they are not known.
        label_mass: the probability of all labels together; None without log-probabilities.
        text: the text of a form in words.
    """

    status: Status
    label: str = ""
    value: float = math.nan
    probabilities: Distribution = ()
    label_mass: float | None = None
    text: str = ""


def read_verdict(
    reply: Reply,
    template: Template,
    rendered: RenderedQuestion,
    *,
    direct: bool,
    min_mass: float = 0.5,
    constrained: bool = False,
) -> ParsedVerdict:
    """Parses the verdict of a reply.

    Args:
        reply: the judge's reply.
        template: the template that the judge was asked with.
        rendered: the question as the judge saw it.
        direct: whether the reply should begin with the label. If not, the *last* verdict in the reply counts,
            and its probabilities are those at its token.
        min_mass: the labels need this probability together. With less, a direct label is missing
            (`abstained`, with the mass), and a verdict after reasons has no probabilities.
        constrained: whether the server made the judge choose among the labels: the text counts then, because some
            servers give log-probabilities from before the choice was made (llama.cpp).
    """
    if reply.refusal:
        return ParsedVerdict("refused")
    if not template.choices:
        return _read_words(reply, template, rendered)
    labels = [label for label, _ in template.labels]
    bare = reply.text.strip().strip("*_.:()[]<>{}$\"'` ")
    if bare not in labels or (reply.cut and not template.scorable):  # "1" may be the beginning of "10"
        bare = ""
    if direct and template.scorable and (token := _first_token(reply)) is not None and token.top:
        probabilities, mass = choice_distribution(token.top, labels, token.text)
        if mass >= min_mass:
            return _chosen(template, probabilities, mass)
        if constrained and bare:
            return _said(template, bare)._replace(label_mass=mass)
        return ParsedVerdict("abstained", label_mass=mass)
    # A server may file a whole reply under thoughts; after a cut reply the thoughts are all that there is.
    text = reply.text if reply.text.strip() or reply.cut else reply.thoughts
    verdicts = list(template.verdict_pattern(rendered.nonce).finditer(text)) if template.verdict else []
    if verdicts and reply.cut and not text[verdicts[-1].end() :].strip():
        return _unread(reply)  # what followed was cut off: " or B", "0", ".5"
    if not verdicts:
        return _said(template, bare) if direct and bare else _unread(reply)
    said = _said(template, verdicts[-1][1])
    token = _token_at(reply, verdicts[-1].start(1)) if text is reply.text else None
    if said.status == "unparsed" or token is None or not token.top or not template.scorable:
        return said
    probabilities, mass = choice_distribution(token.top, labels, token.text)
    return _chosen(template, probabilities, mass) if mass >= min_mass else said._replace(label_mass=mass)


def _first_token(reply: Reply) -> Token | None:
    """Returns the token with which the answer begins; None where the log-probabilities do not have it."""
    if reply.thoughts:
        return _token_at(reply, len(reply.text) - len(reply.text.lstrip())) if reply.text.strip() else None
    return next((token for token in reply.tokens if token.text.strip()), next(iter(reply.tokens), None))


def _token_at(reply: Reply, position: int) -> Token | None:
    """Returns the token that holds the character `position`; None if the tokens do not spell the reply."""
    joined = "".join(token.text for token in reply.tokens)
    # Turned round, as `rfind` takes the product of both lengths where the text repeats itself.
    behind = joined[::-1].find(reply.text[::-1])
    if not reply.text or behind < 0:
        return None
    position += len(joined) - len(reply.text) - behind
    for token in reply.tokens:
        position -= len(token.text)
        if position < 0:
            return token
    return None


def _chosen(template: Template, probabilities: Distribution, mass: float) -> ParsedVerdict:
    best = max(range(len(probabilities)), key=probabilities.__getitem__)
    label = template.labels[best][0]
    value = sum(p * v for p, (_, v) in zip(probabilities, template.labels))
    tied = template.form == "ranking" and (template.labels[best][1] == 0.5 or value == 0.5)
    return ParsedVerdict("tie" if tied else "ok", label, value, probabilities, mass)


def _said(template: Template, label: str) -> ParsedVerdict:
    """Returns a verdict in words, without probabilities."""
    if template.numeric:
        value = float(label)
        scores = [score for _, score in template.labels]
        inside = min(scores) <= value <= max(scores)
        return ParsedVerdict("ok", label, value) if inside else ParsedVerdict("unparsed")
    value = dict(template.labels)[label]
    return ParsedVerdict("tie" if template.form == "ranking" and value == 0.5 else "ok", label, value)


def _refused(text: str) -> bool:
    return bool(_REFUSAL.match(text.lstrip()[:_REFUSED_WITHIN]))


def _unread(reply: Reply) -> ParsedVerdict:
    return ParsedVerdict("refused" if _refused(reply.text) else "unparsed")


def _read_words(reply: Reply, template: Template, rendered: RenderedQuestion) -> ParsedVerdict:
    text: str | None = reply.text
    if template.verdict:
        text = _between(reply.text if reply.text.strip() or reply.cut else reply.thoughts, template, rendered.nonce)
    elif _refused(reply.text) or (template.form == "correction" and reply.cut):  # the end of the answer is missing
        text = None
    if text is None or not (text.strip() or (template.form == "correction" and template.verdict)):
        return _unread(reply)
    if template.form == "correction":
        return ParsedVerdict("ok", text=rendered.corrected(text))
    return ParsedVerdict("ok", text=rendered.original(text.strip()))


def _between(reply: str, template: Template, nonce: str) -> str | None:
    """Returns the text in the last pair of tags around a verdict in words; None without one."""
    before, after = (loose(part) for part in template.verdict_frame(nonce))
    ends = [found.start() for found in re.finditer(after, reply)] if after else [len(reply)]
    starts = [found.end() for found in re.finditer(before, reply)] if before else [0]
    start = next((start for start in reversed(starts) if ends and start <= ends[-1]), None)
    return None if start is None else reply[start : next(end for end in ends if end >= start)]


# ---- judgements


def make_judgement(
    question: Question,
    template: Template,
    verdict: ParsedVerdict,
    *,
    order: tuple[int, ...],
    rater: Rater,
    raw: str = "",
    seed: int | None = None,
    time: float | None = None,
    call: Call = Call(),
) -> Judgement:
    """Builds the record of one verdict, also of a missing one.

    The `probability` of a ranking is P(answers[0] is better) in either order, and None for a verdict
    in words; its `probabilities` are over the template's labels, of the answers as shown.

    Args:
        question: the question that was asked.
        template: the template that it was asked with.
        verdict: the parsed verdict.
        order: the indices of the answers in the order shown.
        rater: who judged.
        raw: the reply, or the reason why it is missing.
        seed: the seed of the judge's sampling.
        time: when the reply came, in Unix seconds.
        call: what the reply took.
    """
    shared: dict[str, Any] = {
        "prompt": question.prompt,
        "answers": question.answers,
        "rater": rater,
        "principle": question.principle,
        "status": verdict.status,
        "time": time,
        "probabilities": verdict.probabilities,
        "label_mass": verdict.label_mass,
        "raw": raw,
        "seed": seed,
        "generators": question.generators,
        "call": call,
    }
    answered = verdict.status in ("ok", "tie")
    if template.form == "ranking":
        first = verdict.value if order == (0, 1) else 1 - verdict.value  # P(answers[0] is better)
        return Ranking(
            **shared,
            shown=order,
            ranks=() if not answered else (1, 1) if verdict.status == "tie" else (1, 2) if first > 0.5 else (2, 1),
            probability=first if answered and verdict.probabilities else None,
        )
    if template.form == "rating":
        scores = [value for _, value in template.labels]
        return Rating(**shared, value=verdict.value if answered else math.nan, low=min(scores), high=max(scores))
    if template.form == "comment":
        return Comment(**shared, text=verdict.text)
    return Correction(**shared, edited=verdict.text if answered else None)


class Preference(NamedTuple):
    """Both orders of a pair together.

    Attributes:
        probability: P(answers[0] is better) without position bias.
        bias: (logit p12 + logit p21) / 2 of P(the answer shown first is better), above 0 where the judge
            prefers the first place; None where a verdict was in words.
        consistent: whether both orders prefer the same answer, or both are ties.
    """

    probability: float
    bias: float | None
    consistent: bool


def preference(judgements: Iterable[Judgement], *, debias: Debias = "logit") -> Preference | None:
    """Combines the judgements of one pair in both orders; None where an order has no answer.

    Several judgements in an order are averaged first. With p12 and p21 = P(the answer shown first is better):

    - logit: sigmoid((logit p12 - logit p21) / 2); a bias that is additive in the log-odds cancels exactly.
    - mean: (p12 + 1 - p21) / 2 (Lee 2023, section 2.2); also used for verdicts in words, which are 1, 0 or
      1/2.

    Args:
        judgements: rankings of the same two answers, each with the order in which the judge read them.
        debias: "logit" or "mean".

    Raises:
        UserError: a judgement is not a ranking of two answers.
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
    first, second = log_odds(forward), log_odds(1 - swapped)  # both of the answer shown first
    probability = float(expit((first - second) / 2)) if debias == "logit" else (forward + swapped) / 2
    return Preference(probability, (first + second) / 2, consistent)
