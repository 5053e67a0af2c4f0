"""The forms that feedback comes in: comments, ratings, corrections, rankings; one record of each, validated, as JSON.

A judgement says who judged which answers to which prompt, by which principle, and what came of it. Judgements that
could not be had are records too (`status`): unscored is not wrong and not zero, it is counted and can be asked again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from rlaif_jax.config import UserError, require

VERSION = 1
Source = Literal["ai", "rule", "person", "simulated"]
Status = Literal["ok", "tie", "unparsed", "refused", "error", "abstained", "retracted"]
ANSWERED: tuple[Status, ...] = ("ok", "tie")


def canonical(value: Any) -> str:
    """JSON in ASCII with sorted keys and no blanks: equal values give equal text. NaN and infinities are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256(value: Any) -> str:
    """Hex digest of the canonical JSON of `value`."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Rater:
    """Who judges.

    name: unique within a run ("anna", "gpt-4o", "rule/length"). source: what kind of judge. model: name and revision of
    an AI judge's weights. prompt_hash: SHA-256 of the wording of its question.
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


@dataclasses.dataclass(frozen=True)
class Call:
    """What it took to have a judgement; no part of what makes two judgements the same one.

    latency_s: seconds, of a person the time spent. prompt_tokens, completion_tokens. cost: in the budget's currency.
    """

    latency_s: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    def __post_init__(self) -> None:
        for name in ("latency_s", "prompt_tokens", "completion_tokens", "cost"):
            value = getattr(self, name)
            require(value is None or 0 <= value < math.inf, f"call.{name} is {value}; it is a number from 0 up")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """What all forms share.

    Attributes:
        prompt: the text that was answered.
        answers: the answers that were judged, in an order of no meaning; `shown` tells the one on the screen.
        rater: who judged.
        principle: by what ("" = overall quality): a name or a sentence.
        status: `ok`; `tie`; or why there is no value: `unparsed`, `refused`, `error`, `abstained`; `retracted` takes
          the record `supersedes` back.
        confidence: the rater's own, in [0, 1].
        time: when, Unix seconds; None = not known.
        shown: the order in which the answers were shown, as indices into `answers`; () = not recorded.
        probabilities: the judge's distribution over its choices or scores; () = none.
        label_mass: probability of all choice tokens together, before renormalising.
        raw: what the judge wrote.
        seed: of the judge's sampling.
        supersedes: id of the record that this one replaces.
        generators: who wrote each answer; () = not known.
        call: what it took.
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
        """What a judgement with a value must hold; UserError otherwise."""

    @property
    def answered(self) -> bool:
        """Whether there is a value."""
        return self.status in ANSWERED

    @cached_property
    def item(self) -> str:
        """What was judged: SHA-256 of the prompt and the set of answers, whatever their order."""
        return sha256([self.prompt, sorted(self.answers)])

    @cached_property
    def id(self) -> str:
        """SHA-256 of all that differs from a field's default, but `call`: the same judgement has the same id wherever it
        is read, and keeps it when a later version of this program gives the form another field."""
        defaults = {
            field.name: _plain(field.name, field.default)
            for field in dataclasses.fields(self)
            if field.default is not dataclasses.MISSING
        }
        return sha256(
            {k: v for k, v in to_json(self).items() if k != "call" and (k not in defaults or v != defaults[k])}
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comment(Judgement):
    """A remark in words on one answer. aspects: what it is about, if the rater said so. quote: the words of the answer
    that it is about; "" = all of it."""

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
    """A number for one answer on the scale low .. high."""

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
        """The value on [0, 1]."""
        return (self.value - self.low) / (self.high - self.low)


@dataclasses.dataclass(frozen=True)
class Span:
    """Characters start .. end (exclusive) of an answer. value: negative = a fault, positive = good; its size is the
    severity. category: what kind."""

    start: int
    end: int
    value: float = -1.0
    category: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Correction(Judgement):
    """One answer as it should have been (`edited`), or marked (`spans`), or both.

    An empty `edited` deletes everything; an `edited` equal to the answer says that nothing is wrong with it.
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
    """Two or more answers in order.

    Attributes:
        ranks: place of each answer, 1 = best, equal numbers are ties; None = not placed. () where `beats` is used.
        beats: (better, worse) pairs of answer indices, for orders that no list expresses. Without circles.
        strength: by how much, 1 (barely) .. 5 (far); None = not said. Of pairs.
        both_bad: of a tie: none of the answers is acceptable.
        probability: of a pair: P(answers[0] is better) where the judge gives one.
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
        require(not _circle(self.beats, count), "beats goes in a circle: no answer beats itself")
        require(
            self.probability is None or (count == 2 and 0 <= self.probability <= 1),
            f"probability is {self.probability}: it is of two answers and lies between 0 and 1",
        )
        require(
            self.strength is None or 1 <= self.strength <= 5, f"strength is {self.strength}; it lies between 1 and 5"
        )

    def pairs(self) -> Iterator[tuple[int, int, float]]:
        """(i, j, P(i is better)) of every comparison this ranking makes, i < j: 1, 0, or .5 for a tie."""
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


def _circle(pairs: Iterable[tuple[int, int]], count: int) -> bool:
    remaining = set(pairs)
    for _ in range(count):
        losers = {worse for _, worse in remaining}
        remaining = {(better, worse) for better, worse in remaining if better in losers}
    return bool(remaining)


# ---- JSON


def to_json(judgement: Judgement) -> dict[str, Any]:
    """Plain JSON types with `form` and `version`; `from_json` reads them back. Equal records give equal JSON: 7 and 7.0
    are one value where the field is a number, and NumPy's numbers are Python's."""
    fields = {field.name: getattr(judgement, field.name) for field in dataclasses.fields(judgement)}
    return {"form": judgement.form, "version": VERSION} | {name: _plain(name, value) for name, value in fields.items()}


_KINDS: dict[str, tuple[type, ...]] = {
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
_NESTED: dict[str, type] = {"rater": Rater, "call": Call}
_ONE = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_MANY = {str: "texts", int: "whole numbers", float: "numbers", type(None): "nulls"}


def _plain(name: str, value: Any) -> Any:
    """The value of a field in JSON's types."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(name, entry) for entry in value]
    if value is not None and float in _KINDS.get(name, ()):
        return float(value) + 0.0 if math.isfinite(value) else None  # + 0.0 makes -0.0 the same as 0.0
    return value if value is None or isinstance(value, (str, bool, int)) else value.item()


def _checked(name: str, value: Any) -> Any:
    """`value` of a field as its type; UserError if it is another."""
    kinds = _KINDS[name]
    if kinds[0] is list:
        right = isinstance(value, (list, tuple)) and all(_is(entry, kinds[1:]) for entry in value)
        require(right, f"{name} must be a list of {' or '.join(_MANY[k] for k in kinds[1:])}, not {_shown(value)}")
        return tuple(_number(name, entry) if float in kinds else entry for entry in value)
    require(_is(value, kinds), f"{name} must be {_ONE[kinds[0]]}, not {_shown(value)}")
    return _number(name, value) if float in kinds else value


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))


def _number(name: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise UserError(f"{name} is beyond all numbers: {_shown(value)}") from error


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _built(cls: type, values: Any, name: str) -> Any:
    """One of the small records from its JSON object; UserError if a field is missing, unknown or of another type."""
    require(isinstance(values, Mapping), f"{name} must be an object, not {_shown(values)}")
    fields = dataclasses.fields(cls)
    unknown = sorted(set(values) - {field.name for field in fields})
    require(
        not unknown, f"{name} has no field {', '.join(unknown)}; it has {', '.join(sorted(f.name for f in fields))}"
    )
    built = {key: _checked(key, value) for key, value in values.items() if value is not None}
    for field in fields:
        require(field.name in built or field.default is not dataclasses.MISSING, f"{name} needs {field.name}")
    return cls(**built)


def _pairs(value: Any) -> tuple[tuple[int, int], ...]:
    right = isinstance(value, (list, tuple)) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(_is(index, (int,)) for index in pair)
        for pair in value
    )
    require(right, f"beats must be a list of (better, worse) pairs of answer numbers, not {_shown(value)}")
    return tuple((better, worse) for better, worse in value)


def from_json(values: Any, where: str = "") -> Judgement:
    """A judgement from `to_json`'s shape. UserError, beginning with `where`, for an unknown form, another version, a
    missing or unknown field, a wrong type, a value that cannot be."""
    try:
        require(isinstance(values, Mapping), f"a judgement is a JSON object, not {_shown(values)}")
        form = values.get("form")
        require(
            isinstance(form, str) and form in FORMS, f"unknown form {_shown(form)}; the forms are {', '.join(FORMS)}"
        )
        version = values.get("version", VERSION)
        require(version == VERSION, f"version {_shown(version)} of the record; this program reads version {VERSION}")
        cls = FORMS[form]
        fields = [field.name for field in dataclasses.fields(cls)]
        given = {k: v for k, v in values.items() if k not in ("form", "version")}
        unknown = sorted(set(given) - set(fields))
        require(not unknown, f"a {form} has no field {', '.join(unknown)}; it has {', '.join(fields)}")
        built: dict[str, Any] = {}
        for name, value in given.items():
            if value is None:
                continue
            if name in _NESTED:
                built[name] = _built(_NESTED[name], value, name)
            elif name == "spans":
                require(isinstance(value, (list, tuple)), f"spans must be a list of objects, not {_shown(value)}")
                built[name] = tuple(_built(Span, entry, "a span") for entry in value)
            elif name == "beats":
                built[name] = _pairs(value)
            else:
                built[name] = _checked(name, value)
        for name in ("prompt", "answers", "rater"):
            require(name in built, f"a {form} needs {name}")
        return cls(**built)
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from error


def belongs(judgement: Judgement, known: Mapping[str, Collection[str]]) -> None:
    """UserError unless the judgement is of a known prompt and of answers to that prompt. known: prompt -> its answers."""
    answers = known.get(judgement.prompt)
    if answers is None:
        raise UserError(
            f"a {judgement.form} of another prompt: {_shown(judgement.prompt)} is none of the {len(known)} asked"
        )
    for answer in judgement.answers:
        require(
            answer in answers,
            f"a {judgement.form} of an unknown answer to {_shown(judgement.prompt)}: {_shown(answer)}",
        )


def read_jsonl(path: Path, known: Mapping[str, Collection[str]] | None = None) -> tuple[list[Judgement], list[str]]:
    """(the good judgements of a JSONL file, one message with file and line for each bad line).

    A line that a crash cut short is one bad line; the rest is kept. Where `known` gives the answers to each prompt,
    judgements of others are bad, too. UserError only if the file cannot be read.
    """
    try:
        data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    good: list[Judgement] = []
    bad: list[str] = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            judgement = from_json(json.loads(line.decode()))
            if known is not None:
                belongs(judgement, known)
            good.append(judgement)
        except UserError as error:
            bad.append(f"{where}: {error}")
        except (ValueError, RecursionError) as error:
            bad.append(f"{where}: no valid JSON ({error})")
    return good, bad
