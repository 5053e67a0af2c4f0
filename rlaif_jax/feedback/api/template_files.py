"""Files of templates: the project's own readable format, and FastChat's files of judge prompts.

A template file has `name: value` lines, then sections. Lines that begin with # before the first section are
comments:

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

`[direct]` ends a question whose reply begins with a label: that label's log-probability is read. `[reasons]`
ends one whose reply ends with the verdict. A template has one of them or both; forms in words (comment,
correction) need none.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.api.templates import (
    PLACEHOLDER_PATTERN,
    PLACEHOLDERS,
    REQUIRED_PLACEHOLDERS,
    Form,
    Template,
    placeholders,
    unknown_placeholder,
)
from rlaif_jax.files import read_bytes, read_json_lines

_SECTIONS = ("system", "user", "direct", "reasons")
_FIRST = {"first": 1.0, "second": 0.0, "tie": 0.5}
_FASTCHAT = {
    "question": "prompt",
    "answer_a": "answer_1",
    "answer_b": "answer_2",
    "answer": "answer",
    "ref_answer_1": "reference",
    "ref_answer": "reference",
}


def read_template(path: Path) -> Template:
    """Reads the template in a file; FILE.jsonl#NAME is the judge prompt NAME of a FastChat file.

    Raises:
        UserError: the file cannot be read, or it is no template; with file and line.
    """
    file, _, name = str(path).rpartition("#") if ".jsonl#" in str(path) else (str(path), "", "")
    if Path(file).suffix == ".jsonl":
        return _read_fastchat(file, name)
    try:
        return parse_template(read_bytes(file).decode(), Path(file).stem, file)
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read the template {file}: {error}") from error


def parse_template(text: str, name: str, where: str = "") -> Template:
    """Parses the text of a template file.

    Args:
        text: the text.
        name: the template's name.
        where: the file's name, for messages; "" = `name`.

    Raises:
        UserError: the text is no template; with file and line.
    """
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
    require("form" in head, f"{where}: the line `form: {'|'.join(REQUIRED_PLACEHOLDERS)}` is missing")
    form = head.pop("form")
    require(
        form in REQUIRED_PLACEHOLDERS,
        f"{where}:{starts['form']}: form is {form!r}; it is one of {', '.join(REQUIRED_PLACEHOLDERS)}",
    )
    require("user" in sections, f"{where}: the section [user] is missing")
    for section, lines in sections.items():
        for found, offset in placeholders("\n".join(lines), where, starts[section]):
            require(
                found in PLACEHOLDERS[form], f"{where}:{starts[section] + offset}: {unknown_placeholder(found, form)}"
            )
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
    """Parses labels with their values: `A = first, B = second`, `A = 1, B = 2`, or `1 .. 10`."""
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


def _read_fastchat(file: str, name: str) -> Template:
    """Reads the judge prompt `name` of a FastChat file (types pairwise and single)."""
    prompts, bad = read_json_lines(file, _fastchat_prompt)
    require(not bad, next(iter(bad), ""))
    names = [prompt["name"] for prompt, _ in prompts]
    require(name in names, f"{file}: there is no judge prompt {name!r}; write FILE#NAME with one of {', '.join(names)}")
    prompt, where = prompts[names.index(name)]
    kind, verdict = prompt.get("type"), prompt.get("output_format")
    require(kind in ("pairwise", "single"), f"{where}: type is {kind!r}; types are pairwise and single")
    user = str(prompt.get("prompt_template", ""))
    for found, _ in placeholders(user, where):
        require(found in _FASTCHAT, f"{where}: unknown placeholder {{{found}}}; known: {', '.join(_FASTCHAT)}")
    user = PLACEHOLDER_PATTERN.sub(lambda piece: f"{{{_FASTCHAT[piece[1]]}}}" if piece[1] else piece[0], user)
    system = re.sub(r"([{}])", r"\1\1", str(prompt.get("system_prompt", "")))
    require(verdict in ("[[A]]", "[[rating]]"), f"{where}: output_format is {verdict!r}; [[A]] and [[rating]] are read")
    pair = kind == "pairwise"
    labels = (("A", 1.0), ("B", 0.0), ("C", 0.5)) if pair else tuple((str(i), float(i)) for i in range(1, 11))
    form: Form = "ranking" if pair else "rating"
    return Template(name, form, user, system=system, labels=labels, verdict="[[{label}]]")


def _fastchat_prompt(value: Any, where: str) -> tuple[dict[str, Any], str]:
    """Returns a line of a FastChat file with its place."""
    require(isinstance(value, dict) and "name" in value, f"{where}: a judge prompt is an object with a name")
    return value, where
