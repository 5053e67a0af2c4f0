"""How a judge is asked: a readable text file with placeholders becomes messages, and data cannot pose as a verdict.

A template file has `name: value` lines, then sections. Lines that begin with # before the first section are comments:

    form: ranking
    labels: A = first, B = second, C = tie
    verdict: Verdict {nonce}: {label}

    [system]
    You are a fair judge.
    [user]
    {prompt} ... {answer_1} ... {answer_2}
    [direct]
    Reply with one letter, A or B.
    [reasons]
    Give your reasons. Then end with the line "Verdict {nonce}: " and A, B or C.

`[direct]` ends a question whose reply begins with a label: that label's log-probability is read. `[reasons]` ends one
whose reply ends with the verdict. A template has one of them or both; forms in words (comment, correction) need none.

`{nonce}` is six digits made from the question; a writer of answers cannot know it. Whatever in the data looks like the
nonce, like a verdict or like a chat model's control token is rewritten before the judge sees it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.records.forms import sha256

Form = Literal["ranking", "rating", "comment", "correction"]
Message = dict[str, str]

_SECTIONS = ("system", "user", "direct", "reasons")
_SHARED = ("prompt", "principle", "rubric", "reference", "critique", "nonce")
_PLACEHOLDERS: dict[str, tuple[str, ...]] = {
    "ranking": ("answer_1", "answer_2", *_SHARED),
    **dict.fromkeys(("rating", "comment", "correction"), ("answer", *_SHARED)),
}
_NEEDED: dict[str, tuple[str, ...]] = {
    "ranking": ("prompt", "answer_1", "answer_2"),
    **dict.fromkeys(("rating", "comment", "correction"), ("prompt", "answer")),
}
_FIRST = {"first": 1.0, "second": 0.0, "tie": 0.5}
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}\n]*)\}|[{}]")
_CONTROL = re.compile(
    r"<([|\uff5c])[^|\uff5c<>\n]{1,40}\1>"  # ChatML, Llama 3, Phi; DeepSeek with full-width bars
    r"|<(?:/?s|bos|eos|unk|pad|(?:start|end)_of_[a-z]{1,20})>"  # Llama 2, Gemma
    r"|<</?SYS>>|\[/?[A-Z][A-Z_]{2,30}\]"  # Llama 2, Mistral
)


@dataclasses.dataclass(frozen=True)
class Question:
    """What a judge is asked about: answers to a prompt.

    answers: two for a ranking, one for the other forms (`single` splits what has more). principle, rubric, reference,
    critique: for the placeholders of these names. where: file and line, for messages.
    """

    prompt: str
    answers: tuple[str, ...]
    principle: str = ""
    rubric: str = ""
    reference: str = ""
    critique: str = ""
    generators: tuple[str, ...] = ()
    where: str = dataclasses.field(default="", compare=False)


class Asked(NamedTuple):
    """A question in words: the messages of the chat, and the nonce of its verdict."""

    messages: tuple[Message, ...]
    nonce: str


@dataclasses.dataclass(frozen=True)
class Template:
    """The wording of a question.

    Attributes:
        name: for messages.
        form: of the judgement that comes out.
        system, user, direct, reasons: the sections.
        labels: the choices with their values. Ranking: P(the answer shown first is better) = 1, 0 or 1/2. Rating: the score.
        verdict: how the verdict is written at the end of the reply, with {label} (choices) or {text} (words), and perhaps
          {nonce}; "" = the whole reply.
        principle, rubric: what these placeholders say where the question says nothing.
        max_tokens: of a reply in words.
    """

    name: str
    form: Form
    user: str
    system: str = ""
    direct: str = ""
    reasons: str = ""
    labels: tuple[tuple[str, float], ...] = ()
    verdict: str = ""
    principle: str = ""
    rubric: str = ""
    max_tokens: int = 512

    def __post_init__(self) -> None:
        where = f"template {self.name}"
        require(self.form in _NEEDED, f"{where}: form is {self.form!r}; it is one of {', '.join(_NEEDED)}")
        require(self.max_tokens >= 1, f"{where}: max_tokens must be at least 1, not {self.max_tokens}")
        used = [name for section in _SECTIONS for name, _ in placeholders(getattr(self, section), where)]
        for name in used:
            require(name in _PLACEHOLDERS[self.form], f"{where}: {_unknown(name, self.form)}")
        for name in _NEEDED[self.form]:
            require(name in used, f"{where}: the placeholder {{{name}}} is missing; without it the judge cannot judge")
        wanted = "label" if self.choices else "text"
        names = [name for name, _ in placeholders(self.verdict, f"{where}: verdict")]
        require(
            not self.verdict or (names.count(wanted) == 1 and set(names) <= {wanted, "nonce"}),
            f"{where}: verdict is {self.verdict!r}; it holds {{{wanted}}} once, and {{nonce}} if it likes",
        )
        if not self.choices:
            require(not self.labels, f"{where}: a {self.form} is given in words, it has no labels")
            return
        require(len(self.labels) >= 2, f"{where}: labels names {len(self.labels)} choices; a judge needs two or more")
        require(len(dict(self.labels)) == len(self.labels), f"{where}: labels names a choice twice")
        require(
            bool(self.direct or self.verdict),
            f"{where}: it needs a [direct] section, or a verdict at the end of reasons",
        )
        require(
            not self.reasons or bool(self.verdict), f"{where}: with [reasons], verdict says how the verdict is written"
        )
        values = set(dict(self.labels).values())
        if self.form == "ranking":
            require({0.0, 1.0} <= values <= {0.0, 0.5, 1.0}, f"{where}: labels must name first, second and perhaps tie")
        else:
            require(len(values) >= 2, f"{where}: all labels have the same score")

    @property
    def choices(self) -> bool:
        """Whether the verdict is one of some labels (ranking, rating) and not words."""
        return self.form in ("ranking", "rating")

    @property
    def reasoned(self) -> bool:
        """Whether it can be asked for reasons first."""
        return bool(self.reasons) or not self.direct

    @property
    def scorable(self) -> bool:
        """Whether a label's first token tells which it is: "1" does not where "10" is another."""
        labels = [label for label, _ in self.labels]
        return not any(a != b and a.startswith(b) for a in labels for b in labels)

    @property
    def numeric(self) -> bool:
        """Whether the labels are numbers themselves, so that any number on the scale is a verdict."""
        return self.form == "rating" and all(label == f"{value:g}" for label, value in self.labels)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the wording, whatever the name."""
        values = dataclasses.asdict(self)
        return sha256({name: value for name, value in values.items() if name not in ("name", "max_tokens")})

    def verdict_pattern(self, nonce: str) -> re.Pattern[str]:
        """What a verdict in a reply looks like; the group is the label, the number or the text.

        Blanks may be any blanks and bold type is overlooked; labels are read as they are written.
        """
        if not self.choices:
            content = r"(.*?)"
        elif self.numeric:
            content = r"[*_\"'(]*(-?\d+(?:\.\d+)?)"
        else:
            content = (
                r"[*_\"'(]*(" + "|".join(sorted((re.escape(label) for label, _ in self.labels), key=len)[::-1]) + ")"
            )
        before, after = self.around(nonce)
        if after.strip():
            tail = r"\s*" + _loose(after)
        else:  # "A or B" is no verdict
            tail = r"(?![\w-])(?!\s*(?:/|or\b|and\b))" if self.choices else r"\s*\Z"
        return re.compile(rf"(?:{_loose(before)})\s*{content}{tail}", re.DOTALL if not self.choices else 0)

    def around(self, nonce: str) -> tuple[str, str]:
        """What stands before and after the label or text of a verdict."""
        before, _, after = self.verdict.partition("{label}" if self.choices else "{text}")
        return _filled(before, {"nonce": nonce}), _filled(after, {"nonce": nonce})

    def ask(
        self, question: Question, order: tuple[int, ...] = (0,), *, ending: Literal["direct", "reasons", ""] = ""
    ) -> Asked:
        """The messages that show the question's answers in `order`.

        UserError, naming the question, where a placeholder that the template uses has no value.
        """
        count = 2 if self.form == "ranking" else 1
        where = f"{question.where}: " if question.where else ""
        require(
            len(question.answers) == count,
            f"{where}a {self.form} is of {count} answer{'s' * (count > 1)}, not {len(question.answers)}",
        )
        content = [question.prompt, sorted(question.answers), question.principle, question.rubric, question.reference]
        nonce = sha256([self.hash, *content, question.critique])[:6]
        shown = [question.answers[i] for i in order]
        data = {
            "prompt": question.prompt,
            **({"answer_1": shown[0], "answer_2": shown[1]} if count == 2 else {"answer": shown[0]}),
            "principle": question.principle or self.principle,
            "rubric": question.rubric or self.rubric,
            "reference": question.reference,
            "critique": question.critique,
        }
        values = {name: self.harmless(text, nonce) for name, text in data.items()} | {"nonce": nonce}
        text = "\n".join(part for part in (self.user, getattr(self, ending) if ending else "") if part)
        for name, _ in placeholders(self.system + text, self.name):
            if name in ("principle", "rubric", "reference", "critique"):
                require(bool(data[name]), f"{where}the template {self.name} asks for {{{name}}}, the question has none")
        messages = [{"role": "system", "content": _filled(self.system, values)}] if self.system else []
        return Asked((*messages, {"role": "user", "content": _filled(text, values)}), nonce)

    def harmless(self, text: str, nonce: str) -> str:
        """`text` with everything broken up that could be taken for the nonce, a verdict or a control token."""
        text = text.replace(nonce, f"{nonce[:3]} {nonce[3:]}")
        text = _CONTROL.sub(lambda found: f"{found[0][0]} {found[0][1:-1]} {found[0][-1]}", text)
        if not self.verdict:
            return text
        if self.choices:
            looks = self.verdict_pattern(nonce).pattern
        else:
            looks = "|".join(_loose(part) for part in self.around(nonce) if part.strip())
        return (
            re.sub(looks, lambda found: f"{found[0][0]} {found[0][1:]}", text, flags=re.IGNORECASE) if looks else text
        )


def single(question: Question, form: Form) -> list[Question]:
    """The questions that a judge can be asked: every pair of the answers for a ranking, else every answer alone."""
    generators = question.generators

    def of(indices: tuple[int, ...]) -> Question:
        return dataclasses.replace(
            question,
            answers=tuple(question.answers[i] for i in indices),
            generators=tuple(generators[i] for i in indices) if generators else (),
        )

    return [of(indices) for indices in combinations(range(len(question.answers)), 2 if form == "ranking" else 1)]


# ---- files


def read_template(path: Path) -> Template:
    """The template in a file; UserError with file and line where it is wrong.

    FILE.jsonl#NAME reads the template NAME of a FastChat file of judge prompts (types pairwise and single).
    """
    file, _, name = str(path).partition("#")
    try:
        text = Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the template {file}: {getattr(error, 'strerror', None) or error}") from error
    if Path(file).suffix == ".jsonl":
        return _read_fastchat(text, file, name)
    return parse_template(text, Path(file).stem, file)


def parse_template(text: str, name: str, where: str = "") -> Template:
    """A template from a file's text; `where` is the file's name for messages."""
    where = where or f"template {name}"
    sections: dict[str, list[str]] = {}
    starts: dict[str, int] = {}
    head: dict[str, str] = {}
    current: str | None = None
    for number, line in enumerate(text.splitlines(), 1):
        title = line.strip()
        if title.startswith("[") and title.endswith("]") and title[1:-1] in _SECTIONS:
            current = title[1:-1]
            require(current not in sections, f"{where}:{number}: the section {title} is there twice")
            sections[current], starts[current] = [], number + 1
        elif current is not None:
            sections[current].append(line)
        elif title and not title.startswith("#"):
            key, colon, value = title.partition(":")
            known = ("form", "labels", "verdict", "principle", "rubric", "max_tokens")
            require(
                bool(colon) and key.strip() in known,
                f"{where}:{number}: {title[:60]!r} is no setting and in no section; settings are {', '.join(known)}, "
                f"sections {', '.join(f'[{s}]' for s in _SECTIONS)}",
            )
            head[key.strip()] = value.strip()
            starts[key.strip()] = number
    require("form" in head, f"{where}: the line `form: {'|'.join(_NEEDED)}` is missing")
    form = head.pop("form")
    require(form in _NEEDED, f"{where}:{starts['form']}: form is {form!r}; it is one of {', '.join(_NEEDED)}")
    require("user" in sections, f"{where}: the section [user] is missing")
    for section, lines in sections.items():
        for found, offset in placeholders("\n".join(lines), where, starts[section]):
            require(found in _PLACEHOLDERS[form], f"{where}:{starts[section] + offset}: {_unknown(found, form)}")
    values: dict[str, Any] = {section: "\n".join(lines).strip("\n") for section, lines in sections.items()}
    values |= {key: value for key, value in head.items() if key not in ("labels", "max_tokens")}
    if "labels" in head:
        values["labels"] = _labels(head["labels"], form, f"{where}:{starts['labels']}")
    if "max_tokens" in head:
        number_text = head["max_tokens"]
        require(number_text.isdigit(), f"{where}:{starts['max_tokens']}: max_tokens is {number_text!r}, not a number")
        values["max_tokens"] = int(number_text)
    try:
        return Template(name=name, form=form, **values)  # type: ignore[arg-type]
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix(f'template {name}: ')}") from error


def _labels(text: str, form: str, where: str) -> tuple[tuple[str, float], ...]:
    """`A = first, B = second`, `A = 1, B = 2`, or `1 .. 10`."""
    if numbers := re.fullmatch(r"(\d+)\s*\.\.\s*(\d+)", text):
        low, high = int(numbers[1]), int(numbers[2])
        require(form == "rating" and low < high, f"{where}: a scale like 1 .. 10 rises, and is for ratings")
        return tuple((str(i), float(i)) for i in range(low, high + 1))
    found = []
    for entry in text.split(","):
        label, equals, value = (part.strip() for part in entry.partition("="))
        right = bool(label and equals) and (
            value in _FIRST if form == "ranking" else re.fullmatch(r"-?\d+(\.\d+)?", value)
        )
        meaning = "first, second or tie" if form == "ranking" else "a number"
        require(bool(right), f"{where}: {entry.strip()!r} is no label; write LABEL = {meaning}")
        found.append((label, _FIRST[value] if form == "ranking" else float(value)))
    return tuple(found)


_FASTCHAT = {
    "question": "prompt",
    "answer_a": "answer_1",
    "answer_b": "answer_2",
    "answer": "answer",
    "ref_answer_1": "reference",
    "ref_answer": "reference",
}


def _read_fastchat(text: str, where: str, name: str) -> Template:
    names = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}:{number}: no valid JSON ({error})") from error
        require(
            isinstance(entry, dict) and "name" in entry, f"{where}:{number}: a judge prompt is an object with a name"
        )
        names.append(entry["name"])
        if entry["name"] != name:
            continue
        kind = entry.get("type")
        require(kind in ("pairwise", "single"), f"{where}:{number}: type is {kind!r}; types are pairwise and single")
        user = str(entry.get("prompt_template", ""))
        for found, _ in placeholders(user, f"{where}:{number}"):
            require(
                found in _FASTCHAT, f"{where}:{number}: unknown placeholder {{{found}}}; known: {', '.join(_FASTCHAT)}"
            )
        user = _PIECE.sub(lambda piece: f"{{{_FASTCHAT[piece[1]]}}}" if piece[1] else piece[0], user)
        system = re.sub(r"([{}])", r"\1\1", str(entry.get("system_prompt", "")))
        pair = kind == "pairwise"
        if str(entry.get("output_format")) not in ("[[A]]", "[[rating]]"):
            raise UserError(
                f"{where}:{number}: output_format is {entry.get('output_format')!r}; [[A]] and [[rating]] are read"
            )
        labels = (("A", 1.0), ("B", 0.0), ("C", 0.5)) if pair else tuple((str(i), float(i)) for i in range(1, 11))
        return Template(
            name=name,
            form="ranking" if pair else "rating",
            user=user,
            system=system,
            labels=labels,
            verdict="[[{label}]]",
        )
    raise UserError(f"{where}: there is no judge prompt {name!r}; write FILE#NAME with one of {', '.join(names)}")


# ---- placeholders


def placeholders(text: str, where: str, line: int = 0) -> Iterator[tuple[str, int]]:
    """(name, lines before it) of each {placeholder}; {{ and }} are plain braces. UserError for a lone brace."""
    for piece in _PIECE.finditer(text):
        before = text.count("\n", 0, piece.start())
        if piece[0] in "{}":
            place = f"{where}:{line + before}" if line else where
            raise UserError(f"{place}: a lone {piece[0]}; write {piece[0] * 2} for a brace, {{name}} for a placeholder")
        if piece[1] is not None:
            yield piece[1].strip(), before


def _filled(text: str, values: Mapping[str, str]) -> str:
    """The placeholders replaced in one pass: what a value contains is never looked at again."""
    return _PIECE.sub(lambda piece: values[piece[1].strip()] if piece[1] is not None else piece[0][0], text)


def _unknown(name: str, form: str) -> str:
    return f"unknown placeholder {{{name}}}; a {form} has {', '.join(_PLACEHOLDERS[form])}"


def _loose(text: str) -> str:
    """A pattern for `text` with any blanks where it has blanks."""
    return r"\s+".join(re.escape(word) for word in text.split())
