"""Conversations and preference pairs of published data sets, as a prompt and answers in text.

The text of a conversation is that of Anthropic's HH: `\\n\\nHuman: ...\\n\\nAssistant: ...`, with a system message in front of
the first turn. A conversation of one question and nothing else is the question alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rlaif_jax.config import UserError, require

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
ANSWERED = "a prompt ends where the assistant is to answer; leave that message out"
_MARKS = {"system": "\n\nSystem:", "user": HUMAN, "assistant": ASSISTANT}
_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system", "user": "user", "human": "user", "prompter": "user", "assistant": "assistant",
}  # fmt: skip
_SIDES = ("chosen", "rejected")
_RATINGS = frozenset(
    {"rating", "ratings", "score", "scores", "reward", "rewards", "grade", "grades", "stars", "points", "overall",
     "quality", "helpfulness"}
)  # fmt: skip


class Turn(NamedTuple):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    text: str


class Pair(NamedTuple):
    """Two answers to one prompt, the preferred one first.

    Attributes:
        prompt: everything that was said before the answers.
        answers: the chosen and the rejected answer.
        unused: what the row has and the pair has not, such as a field `prompt` with another text.
    """

    prompt: str
    answers: tuple[str, str]
    unused: tuple[str, ...] = ()


def role_of(name: Any) -> Literal["system", "user", "assistant"]:
    """Returns the role that a data set calls `name`. Raises UserError for an unknown one."""
    role = name.lower() if isinstance(name, str) else ""
    require(role in _ROLES, f"the role {name!r}; a message is by {', '.join(_ROLES)}")
    return _ROLES[role]


def read_turns(value: Any, name: str) -> list[Turn]:
    """Returns the turns of a list of messages `{"role": ..., "content": ...}`.

    A content may be a list of parts `{"type": "text", "text": ...}`, whose texts are joined.

    Args:
        value: the list.
        name: what messages call it.

    Raises:
        UserError: the value is no list, is empty, or a message has an unknown role, calls a tool, or has no text or
            something other than text.
    """
    require(isinstance(value, list) and bool(value), f"{name} must be a list of messages, not {str(value)[:40]!r}")
    turns = []
    for number, message in enumerate(value, 1):
        where = f"message {number} of {name}"
        require(isinstance(message, Mapping), f"{where} must be an object, not {str(message)[:40]!r}")
        require(not message.get("tool_calls"), f"{where} has tool_calls; only messages of text are read")
        content = _joined(message.get("content"), where)
        require(
            "role" in message and isinstance(content, str),
            f"{where} must have role and content, both texts; it has {_kinds(message)}",
        )
        try:
            turns.append(Turn(role_of(message["role"]), content))
        except UserError as error:
            raise UserError(f"{where} has {error}") from error
    return turns


def _kinds(message: Mapping[Any, Any]) -> str:
    """Returns the fields of a message, with the type of a role or content that is no text."""
    odd = lambda name, value: name in ("role", "content") and not isinstance(value, str)
    return ", ".join(f"{n} of type {type(x).__name__}" if odd(n, x) else str(n) for n, x in message.items())


def _joined(content: Any, where: str) -> Any:
    """Returns the text of a list of parts, any other content as it is."""
    if not isinstance(content, list):
        return content
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        require(
            kind == "text" and isinstance(part.get("text"), str),
            f"{where} has a part of type {str(kind)[:40]!r} in its content; only parts of type 'text' are read",
        )
    return "".join(part["text"] for part in content)


def conversation_prompt(turns: Iterable[Turn]) -> str:
    """Returns a conversation as one prompt: system messages in front, its end where the assistant speaks."""
    said = list(turns)
    start = next((i for i, turn in enumerate(said) if turn.role != "system"), len(said))
    head = "\n\n".join(turn.text for turn in said[:start])
    return head + "".join(f"{_MARKS[turn.role]} {turn.text}" for turn in said[start:]) + ASSISTANT


def prompt_text(turns: Sequence[Turn]) -> str:
    """Returns the turns as a prompt: the text of a single question, else `conversation_prompt`."""
    said = [turn for turn in turns if turn.role != "system" or turn.text.strip()]
    if len(said) == 1 and said[0].role == "user":
        return said[0].text
    return conversation_prompt(said)


def prompt_turns(prompt: str) -> list[Turn]:
    """Returns the turns of a prompt: those of a dialogue in HH's text, else one turn of the user.

    `conversation_prompt` of a dialogue's turns is the prompt again, to the letter.
    """
    pieces = re.split(rf"({'|'.join(map(re.escape, _MARKS.values()))})", prompt)
    of_mark = {mark: role for role, mark in _MARKS.items()}
    turns = [Turn("system", pieces[0])] if pieces[0] else []
    turns += [Turn(_ROLES[of_mark[mark]], text[1:]) for mark, text in zip(pieces[1::2], pieces[2::2])][:-1]
    is_dialogue = prompt.endswith(ASSISTANT) and any(turn.role == "user" and turn.text for turn in turns)
    return turns if is_dialogue and conversation_prompt(turns) == prompt else [Turn("user", prompt)]


def read_prompt(row: Mapping[str, Any]) -> list[Turn]:
    """Returns what a row asks.

    That is its `prompt` (a text or messages), `instruction` with `input`, `input` or `question`.
    A `system` or `system_prompt` that is not blank comes in front. A row that asks nothing gives no turns.

    Raises:
        UserError: a field is neither a text nor a list of messages.
    """
    given = row.get("prompt")
    turns = read_turns(given, "prompt") if isinstance(given, list) else []
    if not turns:
        asked = [_text(row, "prompt")] if given else [_text(row, "instruction"), _text(row, "input")]
        text = "\n\n".join(filter(None, asked)) or _text(row, "question")
        turns = [Turn("user", text)] if text else []
    return _with_system(row, turns)


def _with_system(row: Mapping[str, Any], turns: list[Turn]) -> list[Turn]:
    system = _text(row, "system") or _text(row, "system_prompt")
    if not system.strip() or any(turn.role == "system" for turn in turns):
        return turns
    return [Turn("system", system), *turns]


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    require(value is None or isinstance(value, str), f"{name} must be text, not {str(value)[:40]!r}")
    return value or ""


def read_pair(row: Mapping[str, Any]) -> Pair:
    """Returns the pair of a row with `chosen` and `rejected`, each a text or a list of messages.

    The last message of a conversation is the answer, and all that was said before it is the prompt, also where a field
    `prompt` holds a part of that. Where only the answer is there, the prompt is `read_prompt` of the row (TRL's form).

    Raises:
        UserError: a side is missing or is no answer, the sides are equal or answer different conversations, or there is
            no prompt.
    """
    asked, given = read_prompt(row), row.get("prompt")
    sides = [_side(row, name) for name in _SIDES]
    answers = (sides[0][1], sides[1][1])
    require(answers[0] != answers[1], "chosen and rejected are the same text")
    befores = [_whole(row, before, asked) for before, _ in sides]
    require(
        befores[0] == befores[1] or [] in (sides[0][0], sides[1][0]),
        "chosen and rejected differ before their last message: they do not answer the same prompt",
    )
    before = max(befores, key=len)
    require(
        any(turn.role == "user" and turn.text for turn in before),
        "no prompt: expected a text or messages in prompt, instruction, input or question, or before the last message "
        "of chosen",
    )
    if isinstance(given, str) and given == conversation_prompt(before):
        return Pair(given, answers)
    prompt = prompt_text(before)
    lost = isinstance(given, str) and given.strip() not in prompt
    return Pair(prompt, answers, ("field prompt: not what the conversation says",) if lost else ())


def _side(row: Mapping[str, Any], name: str) -> tuple[list[Turn], str]:
    """Returns (the turns before the answer, the answer) of `chosen` or `rejected`."""
    require(name in row, f"no field {name!r}; the fields are {', '.join(map(str, row))}"[:300])
    value = row[name]
    require(isinstance(value, (str, list)), f"{name} must be text or a list of messages, not {str(value)[:40]!r}")
    if isinstance(value, str):
        return [], value
    turns = read_turns(value, name)
    last = turns[-1].role
    require(last == "assistant", f"the last message of {name} is by the {last}; it must be the assistant's answer")
    return turns[:-1], turns[-1].text


def _whole(row: Mapping[str, Any], before: list[Turn], asked: list[Turn]) -> list[Turn]:
    """Returns the conversation before an answer: `before`, with what the row's own prompt adds in front."""
    if isinstance(row.get("prompt"), list):
        shared = next(k for k in range(len(asked), -1, -1) if asked[len(asked) - k :] == before[:k])
        return [*asked, *before[shared:]]
    said = [turn for turn in before if turn.role != "system"]
    question = [turn for turn in asked if turn.role != "system"]
    if (said and said[0].role == "user") or any(turn in said for turn in question):
        return _with_system(row, before)
    system = [turn for turn in before if turn.role == "system"] or [turn for turn in asked if turn.role == "system"]
    return [*system, *question, *said]  # `chosen` begins with an answer: to the row's own prompt


def rating_columns(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns the names of the two columns that rate `chosen` and `rejected`; None where a row has none.

    Read are all names of one of the two words and a word such as rating or score, in either order: `chosen_rating`,
    `chosen-rating`, `rating_chosen`, `score_chosen`, `chosenScore`. Of several pairs of columns, `rating` comes first.
    """
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for name in row:
        words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", str(name))]
        sides = [word for word in words if word in _SIDES]
        rest = tuple(word for word in words if word not in _SIDES)
        if len(sides) == 1 and _RATINGS & set(rest):
            found.setdefault(rest, {})[sides[0]] = name
    whole = sorted((rest != ("rating",), number, names) for number, (rest, names) in enumerate(found.items())
                   if len(names) == 2)  # fmt: skip
    return (whole[0][2]["chosen"], whole[0][2]["rejected"]) if whole else None


def read_ratings(row: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Returns the ratings of `chosen` and `rejected`; None for one that is absent or NaN.

    Raises:
        UserError: a rating is no number.
    """
    columns = rating_columns(row)
    return (None, None) if columns is None else (_number(row, columns[0]), _number(row, columns[1]))


def _number(row: Mapping[str, Any], name: str) -> float | None:
    value = row[name]
    if value is None or value == "":
        return None
    try:
        require(not isinstance(value, bool), "true and false are no numbers")
        number = float(value)
    except (UserError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{name} must be a number, not {str(value)[:40]!r}") from error
    return None if math.isnan(number) else number
