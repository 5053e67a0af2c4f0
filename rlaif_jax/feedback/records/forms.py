"""The record types of feedback: comments, ratings, corrections and rankings, validated, as JSON.

A judgement records who judged which answers to which prompt, by which principle, and the result. A judgement that failed
is a record as well (`status` gives the reason): missing is neither wrong nor zero; it is counted and can be asked again.
`parsing.py` reads the records back.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

from rlaif_jax.config import require

VERSION = 1
Source = Literal["ai", "rule", "person", "simulated"]
Status = Literal["ok", "tie", "unparsed", "refused", "error", "abstained", "retracted"]
ANSWERED: tuple[Status, ...] = ("ok", "tie")


_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


def canonical(value: Any) -> str:
    """Returns `value` as ASCII JSON with sorted keys and no blanks: equal values give equal text.

    Raises ValueError for NaN and infinities.
    """
    return _encode(value)


def sha256(value: Any) -> str:
    """Returns the hex SHA-256 digest of the canonical JSON of `value`."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Rater:
    """The identity of a judge.

    Attributes:
        name: unique within a run ("anna", "gpt-4o", "rule/length").
        source: the kind of judge.
        model: name and revision of an AI judge's weights.
        prompt_hash: SHA-256 of the wording of an AI judge's template; where its question had texts of its item alone (a
            reference, a rubric), ":" and their SHA-256 follow.
    """

    name: str
    source: Source
    model: str = ""
    prompt_hash: str = ""

    def __post_init__(self) -> None:
        require(bool(self.name.strip()), "rater.name is empty")
        require(
            self.source in get_args(Source),
            f"rater.source is {self.source!r}; it is one of {', '.join(get_args(Source))}",
        )

    @property
    def wording(self) -> str:
        """Returns the part of `prompt_hash` that is the same for all items."""
        return self.prompt_hash.partition(":")[0]


@dataclasses.dataclass(frozen=True)
class Call:
    """The expense of one judgement. It is not part of the judgement's id.

    Attributes:
        latency_s: seconds until the reply; for a person, the time spent; None where unknown.
        prompt_tokens: tokens that the judge read.
        completion_tokens: tokens that the judge wrote.
        cost: money, in the budget's currency.
    """

    latency_s: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            is_unknown = value is None and name == "latency_s"
            require(
                is_unknown or (value is not None and 0 <= value < math.inf),
                f"call.{name} is {value}; it is a number from 0 up",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """One judgement: the fields that all forms share.

    Attributes:
        form: name of the record type, as written in JSON.
        prompt: the text that was answered.
        answers: the judged answers; their order carries no meaning (`shown` records the order on the screen).
        rater: the judge.
        principle: the criterion, a name or a sentence; "" means overall quality.
        status: `ok` or `tie`; `unparsed`, `refused`, `error` or `abstained` where the record has no value; `retracted`
            withdraws the record that `supersedes` names.
        confidence: the rater's confidence in [0, 1]; None where not given.
        time: Unix seconds; None where unknown.
        shown: the order in which the answers were shown, as indices into `answers`; () where not recorded.
        probabilities: the judge's distribution over its choices or scores; () where not given.
        label_mass: the total probability of all choice tokens before renormalising; None where not given.
        raw: the text that the judge wrote.
        seed: the seed of the judge's sampling; None where not given.
        supersedes: the id of the record that this one replaces; "" where it replaces nothing.
        generators: the name of the writer of each answer; () where unknown.
        call: the expense of the judgement.

    Raises:
        UserError: a field holds a value that is not allowed; the message names the field.
    """

    form: ClassVar[str]
    prompt: str
    answers: tuple[str, ...]
    rater: Rater
    principle: str = ""
    status: Status = "ok"
    confidence: float | None = None
    time: float | None = None
    shown: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    label_mass: float | None = None
    raw: str = ""
    seed: int | None = None
    supersedes: str = ""
    generators: tuple[str, ...] = ()
    call: Call = Call()

    def __post_init__(self) -> None:
        require(
            self.status in get_args(Status), f"status is {self.status!r}; it is one of {', '.join(get_args(Status))}"
        )
        require(len(self.answers) >= 1, "answers is empty: a judgement is of at least one answer")
        require(
            self.confidence is None or 0 <= self.confidence <= 1,
            f"confidence is {self.confidence}; it lies between 0 and 1",
        )
        require(
            self.label_mass is None or -1e-6 <= self.label_mass <= 1 + 1e-6,
            f"label_mass is {self.label_mass}; it lies between 0 and 1",
        )
        require(self.time is None or math.isfinite(self.time), f"time is {self.time}; it is in Unix seconds")
        require(
            not self.shown or sorted(self.shown) == list(range(len(self.answers))),
            f"shown is {list(self.shown)}; it orders the {len(self.answers)} answers 0 .. {len(self.answers) - 1}",
        )
        require(
            not self.generators or len(self.generators) == len(self.answers),
            f"generators names {len(self.generators)} writers of {len(self.answers)} answers",
        )
        require(
            all(math.isfinite(p) and -1e-6 <= p <= 1 + 1e-6 for p in self.probabilities),
            f"probabilities holds {list(self.probabilities)}; each lies between 0 and 1",
        )
        require(
            self.status != "retracted" or bool(self.supersedes),
            "a retracted judgement names what it takes back: supersedes",
        )
        if self.answered:
            self._check()

    def _check(self) -> None:
        """Raises UserError unless the fields of a judgement that has a value are consistent."""

    @property
    def answered(self) -> bool:
        """Returns whether the record has a value."""
        return self.status in ANSWERED

    @cached_property
    def item(self) -> str:
        """Returns the SHA-256 of the prompt and the answers in any order, equal for all judgements of them."""
        return sha256([self.prompt, sorted(self.answers)])

    @cached_property
    def id(self) -> str:
        """Returns the content hash over the non-default fields except `call`.

        A later field with a default therefore keeps the ids of old records.
        """
        return record_id(to_json(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comment(Judgement):
    """A remark in words on one answer.

    Attributes:
        text: the remark.
        aspects: what the remark is about, where the rater named it.
        quote: the words of the answer that the remark is about; "" means the whole answer.
    """

    form: ClassVar[str] = "comment"
    text: str = ""
    aspects: tuple[str, ...] = ()
    quote: str = ""

    def _check(self) -> None:
        require(len(self.answers) == 1, f"a comment is on one answer, not {len(self.answers)}")
        require(bool(self.text.strip()), "text is empty: a comment says something (or has another status)")
        require(self.quote in self.answers[0], f"quote {self.quote[:60]!r} does not occur in the answer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rating(Judgement):
    """A number for one answer.

    Attributes:
        value: the number, from `low` to `high`; NaN in a record without a value.
        low: the lowest number of the scale.
        high: the highest number of the scale.
    """

    form: ClassVar[str] = "rating"
    value: float = math.nan
    low: float = 1.0
    high: float = 10.0

    def __post_init__(self) -> None:
        require(
            -math.inf < self.low < self.high < math.inf,
            f"the scale runs from low = {self.low} to high = {self.high}: low must be less, and both finite",
        )
        super().__post_init__()

    def _check(self) -> None:
        require(len(self.answers) == 1, f"a rating is of one answer, not {len(self.answers)}")
        require(
            self.low <= self.value <= self.high, f"value is {self.value}, off the scale {self.low:g} .. {self.high:g}"
        )

    @property
    def unit(self) -> float:
        """Returns the value rescaled to [0, 1]."""
        return (self.value - self.low) / (self.high - self.low)


@dataclasses.dataclass(frozen=True)
class Span:
    """A marked passage of an answer.

    Attributes:
        start: index of the first character.
        end: index after the last character.
        value: negative for a fault, positive for a good passage; the magnitude is the severity.
        category: the kind of fault; "" where not given.
    """

    start: int
    end: int
    value: float = -1.0
    category: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Correction(Judgement):
    """An improved version of one answer (`edited`), or marked passages (`spans`), or both.

    Attributes:
        edited: the answer as it should be. "" deletes everything; text equal to the answer says that it is right as it is;
            None means that no version was written.
        spans: the marked passages.
    """

    form: ClassVar[str] = "correction"
    edited: str | None = None
    spans: tuple[Span, ...] = ()

    def _check(self) -> None:
        require(len(self.answers) == 1, f"a correction is of one answer, not {len(self.answers)}")
        require(
            self.edited is not None or bool(self.spans),
            "a correction needs the edited answer or marked spans",
        )
        length = len(self.answers[0])
        for span in self.spans:
            require(
                0 <= span.start < span.end <= length,
                f"span {span.start} .. {span.end} does not lie in the answer of {length} characters",
            )
            require(math.isfinite(span.value), f"the value of span {span.start} .. {span.end} is {span.value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking(Judgement):
    """An order of two or more answers.

    Attributes:
        ranks: the place of each answer, 1 = best; equal numbers are ties, None = not placed; () where `beats` is used.
        beats: (better, worse) pairs of answer indices, for partial orders that no list expresses; without circles.
        strength: for two answers, how much better the winner is, 1 (barely) .. 5 (far); None where not given.
        both_bad: for a tie, that no answer is acceptable.
        probability: for two answers, P(answers[0] is better) where the judge gives one.
    """

    form: ClassVar[str] = "ranking"
    ranks: tuple[int | None, ...] = ()
    beats: tuple[tuple[int, int], ...] = ()
    strength: float | None = None
    both_bad: bool = False
    probability: float | None = None

    def _check(self) -> None:
        count = len(self.answers)
        require(count >= 2, "a ranking is of two or more answers")
        require(bool(self.ranks) != bool(self.beats), "a ranking has either ranks or beats")
        if self.ranks:
            require(len(self.ranks) == count, f"ranks places {len(self.ranks)} of {count} answers (null = not placed)")
            placed = [rank for rank in self.ranks if rank is not None]
            require(len(placed) >= 2, "ranks places fewer than two answers")
            require(min(placed) >= 1, f"rank {min(placed)}: places begin at 1")
        require(
            self.status != "tie" or len({rank for rank in self.ranks if rank is not None}) == 1,
            f"the status is tie, but ranks is {list(self.ranks)}: those of a tie are equal",
        )
        for pair in self.beats:
            require(len(pair) == 2 and pair[0] != pair[1], f"beats has {list(pair)}; a pair is (better, worse)")
            for index in pair:
                require(0 <= index < count, f"beats names the unknown answer {index}; there are 0 .. {count - 1}")
        require(not _has_circle(self.beats, count), "beats goes in a circle: no answer beats itself")
        require(
            self.probability is None or (count == 2 and 0 <= self.probability <= 1),
            f"probability is {self.probability}: it is of two answers and lies between 0 and 1",
        )
        require(
            self.strength is None or 1 <= self.strength <= 5, f"strength is {self.strength}; it lies between 1 and 5"
        )

    def pairs(self) -> Iterator[tuple[int, int, float]]:
        """Yields (i, j, P(answer i is better)), i < j, of every comparison in the record.

        The probability is the record's own where it has one; else it is 1, 0, or .5 for a tie.
        """
        if self.probability is not None:
            yield 0, 1, self.probability
            return
        for i in range(len(self.answers)):
            for j in range(i + 1, len(self.answers)):
                if self.beats:
                    if (i, j) in self.beats or (j, i) in self.beats:
                        yield i, j, float((i, j) in self.beats)
                    continue
                first, second = self.ranks[i], self.ranks[j]
                if first is not None and second is not None:
                    yield i, j, 0.5 if first == second else float(first < second)


FORMS: dict[str, type[Judgement]] = {cls.form: cls for cls in (Comment, Rating, Correction, Ranking)}


def _has_circle(pairs: Iterable[tuple[int, int]], count: int) -> bool:
    """Returns whether (better, worse) pairs among `count` answers form a circle."""
    remaining = set(pairs)
    for _ in range(count):
        losers = {worse for _, worse in remaining}
        remaining = {(better, worse) for better, worse in remaining if better in losers}
    return bool(remaining)


# ---- JSON


FIELD_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("prompt", "principle", "status", "raw", "supersedes", "text", "quote", "edited"), (str,)),
    **dict.fromkeys(("name", "source", "model", "prompt_hash", "category"), (str,)),
    **dict.fromkeys(("confidence", "time", "label_mass", "value", "low", "high", "strength", "probability"), (float,)),
    **dict.fromkeys(("latency_s", "cost"), (float,)),
    **dict.fromkeys(("seed", "start", "end", "prompt_tokens", "completion_tokens"), (int,)),
    **dict.fromkeys(("answers", "generators", "aspects"), (list, str)),
    "shown": (list, int),
    "probabilities": (list, float),
    "ranks": (list, int, type(None)),
    "both_bad": (bool,),
}
"""Field name -> (its JSON type,), or (list, the types of its elements)."""
_FLOATS = frozenset(name for name, types in FIELD_TYPES.items() if float in types)


@functools.cache
def field_names(cls: type) -> tuple[str, ...]:
    """Returns the names of the fields of a record type, Rater, Call or Span."""
    return tuple(field.name for field in dataclasses.fields(cls))


def to_json(judgement: Judgement) -> dict[str, Any]:
    """Returns the record as JSON types, with `form` and `version`; `parsing.from_json` reads it back.

    Equal records give equal JSON: where a field is a number, 7 and 7.0 are the same value, and NumPy numbers become
    Python numbers.
    """
    return {"form": judgement.form, "version": VERSION, **_plain("", judgement)}


def record_id(values: Mapping[str, Any]) -> str:
    """Returns the `id` of the record that `to_json` wrote as `values`."""
    defaults = _defaults(values["form"])
    return sha256({k: v for k, v in values.items() if k != "call" and (k not in defaults or v != defaults[k])})


@functools.cache
def _defaults(form: str) -> dict[str, Any]:
    """Returns the defaults of the fields of a form, in plain JSON types."""
    return {
        field.name: _plain(field.name, field.default)
        for field in dataclasses.fields(FORMS[form])
        if field.default is not dataclasses.MISSING
    }


def _plain(name: str, value: Any) -> Any:
    """Returns the value of the field `name` in plain JSON types."""
    if value is None or isinstance(
        value, str
    ):  # the commonest first: a record has 25 fields, a store a million records
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(name, entry) for entry in value]
    if name in _FLOATS:
        return float(value) + 0.0 if math.isfinite(value) else None  # + 0.0 makes -0.0 the same as 0.0
    if isinstance(value, (bool, int)):
        return value
    if dataclasses.is_dataclass(value):
        held = vars(value)
        return {field: _plain(field, held[field]) for field in field_names(type(value))}  # type: ignore[arg-type]
    return value.item()
