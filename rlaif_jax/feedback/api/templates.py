"""Questions and their wording: a template becomes messages, and data cannot pose as a verdict.

`{nonce}` is six hexadecimal digits made from the question; a writer of answers cannot know them. Text in the
data that looks like the nonce, like a verdict or like a chat model's control token is rewritten before the
judge sees it. The format of template files is described in `template_files`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import combinations
from typing import Literal, NamedTuple

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.records.forms import sha256

Form = Literal["ranking", "rating", "comment", "correction"]
Message = dict[str, str]

_SHARED = ("prompt", "principle", "rubric", "reference", "critique", "nonce")
PLACEHOLDERS: dict[str, tuple[str, ...]] = {
    "ranking": ("answer_1", "answer_2", *_SHARED),
    **dict.fromkeys(("rating", "comment", "correction"), ("answer", *_SHARED)),
}
REQUIRED_PLACEHOLDERS: dict[str, tuple[str, ...]] = {
    "ranking": ("prompt", "answer_1", "answer_2"),
    **dict.fromkeys(("rating", "comment", "correction"), ("prompt", "answer")),
}
PLACEHOLDER_PATTERN = re.compile(r"\{\{|\}\}|\{([^{}\n]*)\}|[{}]")
_CONTROL = re.compile(  # the first character decides quickly: texts of a million characters are looked through
    r"<(?:"
    r"([|\uff5c])[^|\uff5c<>\n]{1,40}\1"  # ChatML, Llama 3, Phi; DeepSeek with full-width bars
    r"|/?s|bos|eos|unk|pad|(?:start|end)_of_[a-z]{1,20}|</?SYS>"  # Llama 2, Gemma
    r"|/?(?:seed:)?think(?:ing)?|/?thought|[se]op"  # thoughts; ChatGLM
    r")>"
    r"|\[(?:/?[A-Z][A-Z_]{2,30}|gMASK)\]"  # Llama 2, Mistral; ChatGLM
    r"|\u25c1/?think\u25b7"  # Kimi
)
# What may be around a verdict: bold type and code, quotes, brackets, and LaTeX boxes. Possessive: no backtracking.
_MARKS = r"[*_`\s]*+"
_OPENING = "*_`\"'\u201c\u2018([{<$"
_BOXES = r"\\(?:boxed|text|textbf|textit|mathbf|mathrm|bf|rm)(?![a-zA-Z])"
_CLOSED = r"[*_`\"'\u201d\u2019)\]}>$]*+"
_RESTORED = 32  # rewritten pieces that are restored in a reply
_NUMBER = r"[+-]?[0-9]{1,15}+(?:\.[0-9]{1,15}+)?+"


@dataclasses.dataclass(frozen=True)
class Question:
    """A question to a judge: answers to a prompt.

    Attributes:
        prompt: the prompt that was answered.
        answers: two for a ranking, one for the other forms (`split_question` splits a question with more).
        principle, rubric, reference, critique: the texts for the placeholders of these names; "" = none.
        generators: who wrote each answer; () = not known.
        where: file and line, for messages.
    """

    prompt: str
    answers: tuple[str, ...]
    principle: str = ""
    rubric: str = ""
    reference: str = ""
    critique: str = ""
    generators: tuple[str, ...] = ()
    where: str = dataclasses.field(default="", compare=False)


class RenderedQuestion(NamedTuple):
    """A question in words.

    Attributes:
        messages: the messages of the chat.
        nonce: the digits that its verdict must repeat.
        answer: the one answer, of a form in words; "" = none.
        shown: the answer as the judge reads it.
        rewritten: what was rewritten in the data, as (new, old).
    """

    messages: tuple[Message, ...]
    nonce: str
    answer: str = ""
    shown: str = ""
    rewritten: tuple[tuple[str, str], ...] = ()

    def original(self, text: str) -> str:
        """Returns `text` with the data that the judge repeats in it as it was before it was rewritten."""
        for new, old in reversed(self.rewritten[:_RESTORED]):
            text = text.replace(new, old)
        return text

    def corrected(self, text: str) -> str:
        """Returns a correction of the answer: as the judge wrote it, with the blanks around the answer."""
        text, answer = text.strip(), self.answer.strip()
        if text == self.shown.strip():
            return self.answer
        if not text or not answer:
            return self.original(text)
        before, _, after = self.answer.partition(answer)
        return before + self.original(text) + after


@dataclasses.dataclass(frozen=True)
class Template:
    """The wording of a question.

    Attributes:
        name: the template's name, for messages.
        form: the form of the judgement.
        system, user, direct, reasons: the sections.
        labels: the choices with their values. Ranking: P(the answer shown first is better) = 1, 0 or 1/2.
            Rating: the score.
        verdict: how the verdict is written at the end of the reply, with {label} (choices) or {text} (words),
            and perhaps {nonce}; "" = the whole reply.
        principle, rubric: the texts of these placeholders where the question has none.
        max_tokens: the greatest length of a reply in words.
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
        require(
            self.form in REQUIRED_PLACEHOLDERS,
            f"{where}: form is {self.form!r}; it is one of {', '.join(REQUIRED_PLACEHOLDERS)}",
        )
        require(self.max_tokens >= 1, f"{where}: max_tokens must be at least 1, not {self.max_tokens}")
        sections = (self.system, self.user, self.direct, self.reasons)
        used = [name for section in sections for name, _ in placeholders(section, where)]
        for name in used:
            require(name in PLACEHOLDERS[self.form], f"{where}: {unknown_placeholder(name, self.form)}")
        for name in REQUIRED_PLACEHOLDERS[self.form]:
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
        """Returns whether the verdict is one of the labels (ranking, rating) and not a text."""
        return self.form in ("ranking", "rating")

    @property
    def reasoned(self) -> bool:
        """Returns whether a judge can be asked for reasons before the verdict."""
        return bool(self.reasons) or not self.direct

    @property
    def scorable(self) -> bool:
        """Returns whether a label's first token identifies it: "1" does not where "10" is a label, too."""
        labels = [label for label, _ in self.labels]
        return not any(a != b and a.startswith(b) for a in labels for b in labels)

    @property
    def numeric(self) -> bool:
        """Returns whether the labels are their scores, so that any number on the scale is a verdict."""
        return self.form == "rating" and all(label == f"{value:g}" for label, value in self.labels)

    @cached_property
    def hash(self) -> str:
        """Returns the SHA-256 of the wording, without the name."""
        values = dataclasses.asdict(self)
        return sha256({name: value for name, value in values.items() if name not in ("name", "max_tokens")})

    def verdict_pattern(self, nonce: str, *, strict: bool = True) -> re.Pattern[str]:
        """Builds the pattern of a verdict in a reply with choices; its group is the label or the number.

        Blanks, bold type, code, quotes, brackets and boxes around it are ignored, and the case of the words before it;
        labels match in the case in which they are written. Two labels ("A or B", "4-5") are no verdict, and of fractions
        only those of the scale's highest score are ("8/10" of 10).

        Args:
            nonce: the digits that the verdict must repeat.
            strict: whether what follows the label is looked at; without, more matches.
        """
        before, after = self.verdict_frame(nonce)
        labels = sorted((label for label, _ in self.labels), key=len)[::-1]
        label, whole = "|".join(map(re.escape, labels)), ""
        if self.numeric:
            highest = max(self.labels, key=lambda entry: entry[1])[0]
            label, whole = (
                _NUMBER,
                rf"(?:{_CLOSED}\s*+\(?(?:/|(?:out\s++)?of\b)\s*+{re.escape(highest)}(?:\.0)?(?![.,]?[0-9]))?+",
            )
        # A run of marks is looked at once: those that the words before end with, or that a label begins with, are no marks.
        taken = before.rstrip()[-1:] + "".join(label[0] for label, _ in self.labels)
        marks = re.escape("".join(mark for mark in _OPENING if mark not in taken))
        opened = rf"(?:[{marks}\s]|{_BOXES})*+" if before.strip() else r"(?<![\w.+-])"
        if after.strip():
            tail = rf"[*_`\"'\s]*+{loose(after)}"
        elif not strict:
            tail = r"(?!\w)"
        else:
            joined = r"[ \t]*+(?:[,&|=~<>+\u2248\u2013\u2014-]++|vs\.?|to\b|over\b|than\b)?+[ \t]*+"
            other = rf"[{marks}]*+(?!I['\u2019 \t]++[a-z])(?:{label})(?!\w)"  # "H, I think" has one label
            tail = rf"{_CLOSED}(?![\w%+-]|[.,][0-9])(?!\s*+\(?(?:/|or\b|and\b|(?:out\s++)?of\b))(?!{joined}{other})"
        return re.compile(rf"{_framed(before)}{opened}({label}){whole}{tail}")

    def verdict_frame(self, nonce: str) -> tuple[str, str]:
        """Returns the text before and the text after the label or text of a verdict."""
        before, _, after = self.verdict.partition("{label}" if self.choices else "{text}")
        return _filled(before, {"nonce": nonce}), _filled(after, {"nonce": nonce})

    def render(
        self, question: Question, order: tuple[int, ...] = (0,), *, ending: Literal["direct", "reasons", ""] = ""
    ) -> RenderedQuestion:
        """Renders a question as the messages of a chat.

        Args:
            question: the question.
            order: the indices of its answers in the order in which they are shown.
            ending: the section that ends the message; "" = none.

        Raises:
            UserError: the question has another number of answers than the form needs, or no text for a
                placeholder that the template uses; the message names the question.
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
        rewritten: dict[str, str] = {}
        values = {name: self.sanitise(text, nonce, rewritten) for name, text in data.items()} | {"nonce": nonce}
        whole = "\n".join(data.values())
        last = {"direct": self.direct, "reasons": self.reasons, "": ""}[ending]
        text = "\n".join(part for part in (self.user, last) if part)
        for name, _ in placeholders(self.system + text, self.name):
            if name in ("principle", "rubric", "reference", "critique"):
                require(bool(data[name]), f"{where}the template {self.name} asks for {{{name}}}, the question has none")
        messages = [{"role": "system", "content": _filled(self.system, values)}] if self.system else []
        return RenderedQuestion(
            messages=(*messages, {"role": "user", "content": _filled(text, values)}),
            nonce=nonce,
            answer=data.get("answer", ""),
            shown=values.get("answer", ""),
            rewritten=tuple((new, old) for new, old in rewritten.items() if new not in whole),
        )

    def sanitise(self, text: str, nonce: str, rewritten: dict[str, str] | None = None) -> str:
        """Breaks up everything in `text` that could be taken for the nonce, a verdict or a control token.

        Args:
            text: a text of the data.
            nonce: the digits that the verdict must repeat.
            rewritten: collects what was rewritten, {new: old}.
        """

        def note(old: str, new: str) -> str:
            if rewritten is not None and len(rewritten) < _RESTORED:
                rewritten[new] = old
            return new

        if nonce in text:
            text = text.replace(nonce, note(nonce, f"{nonce[:3]} {nonce[3:]}"))
        text = _without_control(text, lambda found: note(found[0], f"{found[0][0]} {found[0][1:-1]} {found[0][-1]}"))
        if not self.verdict:
            return text
        if self.choices:
            looks = self.verdict_pattern(nonce, strict=False).pattern
        else:
            looks = "|".join(loose(part) for part in self.verdict_frame(nonce) if part.strip())
        pattern = re.compile(looks, re.IGNORECASE)

        def broken(found: re.Match[str]) -> str:
            spaced = f"{found[0][0]} {found[0][1:]}"
            if pattern.search(spaced):  # "[A]" as "[ A]" is a verdict still
                spaced = f"{found[0][0]}\u00b7{found[0][1:]}"
            return note(found[0], spaced)

        return pattern.sub(broken, text) if looks else text


def split_question(question: Question, form: Form) -> list[Question]:
    """Splits a question into one for every pair of answers (ranking) or every answer (other forms).

    Args:
        question: the prompt and two or more answers.
        form: the form of the judgements that are asked for.
    """
    generators = question.generators

    def of(indices: tuple[int, ...]) -> Question:
        return dataclasses.replace(
            question,
            answers=tuple(question.answers[i] for i in indices),
            generators=tuple(generators[i] for i in indices) if generators else (),
        )

    return [of(indices) for indices in combinations(range(len(question.answers)), 2 if form == "ranking" else 1)]


# ---- placeholders


def placeholders(text: str, where: str, line: int = 0) -> Iterator[tuple[str, int]]:
    """Finds every {placeholder} of a text, as (name, lines before it); {{ and }} are plain braces.

    Args:
        text: the text.
        where: the name of the text, for messages.
        line: the line of the text's beginning in a file, for messages; 0 = no file.

    Raises:
        UserError: a lone brace.
    """
    for piece in PLACEHOLDER_PATTERN.finditer(text):
        before = text.count("\n", 0, piece.start())
        if piece[0] in "{}":
            place = f"{where}:{line + before}" if line else where
            raise UserError(f"{place}: a lone {piece[0]}; write {piece[0] * 2} for a brace, {{name}} for a placeholder")
        if piece[1] is not None:
            yield piece[1].strip(), before


def _filled(text: str, values: Mapping[str, str]) -> str:
    """Replaces the placeholders in one pass: braces in a value are data."""
    return PLACEHOLDER_PATTERN.sub(
        lambda piece: values[piece[1].strip()] if piece[1] is not None else piece[0][0], text
    )


def unknown_placeholder(name: str, form: str) -> str:
    """Returns the message that a template for a `form` has no placeholder `name`; it lists those it has."""
    return f"unknown placeholder {{{name}}}; a {form} has {', '.join(PLACEHOLDERS[form])}"


def loose(text: str) -> str:
    """Builds a pattern for `text` that matches any blanks where the text has blanks."""
    return r"\s+".join(re.escape(word) for word in text.split())


def _framed(text: str) -> str:
    """Builds a pattern for the text before a verdict: `loose`, in any case, with bold type or code."""
    words = []
    for word in text.split():
        name, punctuation = re.fullmatch(r"(.*?)([:=.,]*)", word).groups()  # type: ignore[union-attr]
        words.append(f"{re.escape(name)}{_MARKS if name and punctuation else ''}{re.escape(punctuation)}")
    between = r"[*_`]*+\s[*_`\s]*+"
    return rf"(?i:{between.join(words)})" if words else ""


def _without_control(text: str, replace: Callable[[re.Match[str]], str]) -> str:
    """Replaces control tokens, in searches of at most 100,000 characters: no thread runs during a search."""
    pieces, done, start, step, longest = [], 0, 0, 100_000, 64
    while start < len(text):
        found = _CONTROL.search(text, start, start + step)
        if found is None:
            start += step - longest
        else:
            pieces += [text[done : found.start()], replace(found)]
            done = start = found.end()
    return "".join([*pieces, text[done:]])
