"""Chat templates of Hugging Face tokenizers: messages as the text that a chat model reads."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlaif_jax.config import UserError

Message = Mapping[str, str]


class _Generation(Extension):
    """`{% generation %}` marks the words of the assistant for training; the text is that of its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own attribute

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _fail(message: str) -> None:
    raise jinja2.TemplateError(message)


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    # A template comes with the weights of a stranger: it may not reach anything.
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation], undefined=jinja2.Undefined
    )
    made.filters["tojson"] = lambda x, indent=None, **options: json.dumps(x, ensure_ascii=False, indent=indent)
    made.globals["raise_exception"] = _fail
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)  # templates print the day
    return made


def template_of(settings: Mapping[str, Any]) -> str | None:
    """Returns the chat template of a tokenizer's settings, or None; of several the one named `default`."""
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def render(settings: Mapping[str, Any], messages: Sequence[Message]) -> str:
    """Returns the text of a conversation, up to where the assistant's next message begins.

    Args:
        settings: of the tokenizer: its chat template, and the names of its special tokens, which templates use.
        messages: each with `role` and `content`.

    Raises:
        UserError: there is no template, it is malformed, or it does not take these messages.
    """
    template = template_of(settings)
    if template is None:
        raise UserError(
            "this tokenizer has no chat template: a base model continues text, so give it the text itself, or take "
            "the folder of the model's chat version"
        )
    names = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in settings.items()
        if key.endswith("_token") and isinstance(value, str | dict) and value
    }
    try:
        made = _environment().from_string(template)
        return made.render(messages=list(messages), add_generation_prompt=True, tools=None, documents=None, **names)
    except jinja2.TemplateError as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise UserError(f"the chat template does not take a conversation of {roles}: {error}") from error
