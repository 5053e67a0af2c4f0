"""Chat templates of Hugging Face tokenizers: messages as the text that a chat model reads."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from rlaif_jax.config import UserError, require
from rlaif_jax.data.special_tokens import token_name
from rlaif_jax.data.tokenizer_files import read_text
from rlaif_jax.files import printable

Message = Mapping[str, str]
PROGRAM = Path(__file__).with_name("renderer.py")
GIVEN = frozenset(("messages", "tools", "documents", "add_generation_prompt", "strftime_now"))  # to every template
MOST_ENDLESS = 3  # conversations without an end, before a template is not asked any more
PATIENCE = 60.0  # seconds; the process itself ends after a few seconds of computing, so this is for a busy machine


class Renderer:
    """The process that renders templates within limits of time and memory; started when first asked.

    It is one for all templates and threads, which wait for each other.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: Any = None
        self._endless: Counter[str] = Counter()  # template -> conversations that it rendered without an end

    def ask(self, request: Mapping[str, Any]) -> dict[str, str]:
        """Returns the reply of `renderer.reply` to a request.

        A process that dies of the request, or exceeds its time, is replaced at the next one. A template that exceeds it
        again and again is not asked any more: the rows of a file would wait for it one by one.
        """
        endless, template = {"error": "it computed for seconds without an end"}, str(request["template"])
        if self._endless[template] >= MOST_ENDLESS:
            return endless
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            ready = select.poll()
            ready.register(process.stdout, select.POLLIN)
            answer = b""
            try:
                with suppress(OSError):  # it died before it read the request
                    process.stdin.write(line)
                    process.stdin.flush()
                    if ready.poll(1000 * PATIENCE):
                        answer = process.stdout.readline()
            finally:
                if not answer.endswith(b"\n"):  # also on Ctrl-C: the next request must not get the reply to this one
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(1)
                    self._stop()
                    self._process = None
        if not answer.endswith(b"\n"):
            if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):  # its own limit, or our patience
                self._endless[template] += 1
                return endless
            return {"error": f"the process that renders it ended with status {process.returncode}"}
        reply: dict[str, str] = json.loads(answer)
        return reply

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            # A notebook may have Jinja in a place that only this process knows.
            found = importlib.util.find_spec("jinja2")
            places = [
                os.environ.get("PYTHONPATH"),
                str(Path(found.origin).parents[1]) if found and found.origin else None,
            ]
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", str(PROGRAM)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))},
                    start_new_session=True,  # Ctrl-C in the terminal is for the run, which then ends the process itself
                )
            except OSError as error:
                raise UserError(
                    f"cannot start {sys.executable}, which renders chat templates: {error.strerror}"
                ) from error
            self._stop = weakref.finalize(self, end, self._process)
        return self._process


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process, and waits until it has ended."""
    process.kill()
    process.communicate()


@cache
def renderer() -> Renderer:
    """Returns the process that renders templates."""
    return Renderer()


# ------------------------------------------------------------------------------------------------------ sources


def read_templates(folder: Path, settings: Mapping[str, Any]) -> tuple[Any, str]:
    """Finds the chat template of a tokenizer's folder, as transformers does.

    chat_template.jinja and additional_chat_templates/*.jinja come before the `chat_template` of tokenizer_config.json:
    where there is one such file, those of tokenizer_config.json do not count.

    Args:
        folder: the folder.
        settings: the content of its tokenizer_config.json.

    Returns:
        (the value of `chat_template` in the settings: a text, a list of `{"name", "template"}`, or None; the file, for
        messages).
    """
    found: dict[str, str] = {}
    file = folder / "tokenizer_config.json"
    if (path := folder / "chat_template.jinja").is_file():
        found["default"], file = read_text(path), path
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = read_text(path)
        if path.stem == "default" or "default" not in found:
            file = path
    if not found:
        return settings.get("chat_template"), str(file)
    if set(found) == {"default"}:
        return found["default"], str(file)
    return [{"name": name, "template": text} for name, text in found.items()], str(file)


def named_templates(value: Any) -> dict[str, str]:
    """Returns {name: template} of the chat templates of a tokenizer; one without a name is `default`.

    Args:
        value: the `chat_template` of its settings: a text, a list of `{"name", "template"}`, an object of names and texts,
            or None.
    """
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    found = value if isinstance(value, dict) else {"default": value}
    return {str(name): template for name, template in found.items() if isinstance(template, str)}


def template_of(value: Any, where: str) -> str:
    """Returns the template that renders conversations: the only one, or that named `default`.

    Args:
        value: as `named_templates` takes it.
        where: the file, for messages.

    Raises:
        UserError: there is no template.
    """
    found = named_templates(value)
    require(
        "default" in found or not isinstance(value, (list, dict)),
        f"{where}: none of the chat templates is named default (there is {', '.join(sorted(found)) or 'none'}); choose one "
        "by chat.template",
    )
    require(
        "default" in found,
        f"{where}: this tokenizer has no chat template: a base model continues text, so give it the text itself, or take "
        "the folder of the model's chat version",
    )
    return found["default"]


def with_variables(template: str, variables: Mapping[str, Any], where: str) -> str:
    """Returns a template that begins by setting variables, unless they are given to it.

    It writes what the template writes where transformers' `apply_chat_template` is given the variables. Whoever reads the
    template from a folder, transformers included, needs to know nothing of them.

    Args:
        template: the template.
        variables: name -> JSON value.
        where: the file, for messages.

    Raises:
        UserError: the template is malformed, or takes no variable of such a name.
    """
    reply = renderer().ask({"template": template})
    require(
        "error" not in reply, f"{where}: the chat template cannot be used: {printable(reply.get('error', ''))[:300]}"
    )
    taken = [name for name in reply["text"].split() if name not in GIVEN and not name.endswith("_token")]
    unknown = [name for name in variables if name not in taken]
    require(
        not unknown,
        f"{where}: the chat template takes no variable {', '.join(unknown)} (chat.variables); it takes "
        f"{', '.join(taken) or 'none'}",
    )
    set_it = lambda name, value: f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"
    # The template after the line break is read as if nothing were before it: the break itself writes nothing.
    return "".join(set_it(*item) for item in variables.items()) + "\n" * bool(variables) + template


def _literal(value: Any) -> str:
    """Returns a JSON value as Jinja spells it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(key)}: {_literal(item)}' for key, item in value.items())}}}"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


# ---------------------------------------------------------------------------------------------------- rendering


def render(
    settings: Mapping[str, Any],
    messages: Sequence[Message],
    where: str,
    *,
    add_generation_prompt: bool = True,
    day: str = "",
) -> str:
    """Returns the text of a conversation, by default up to where the assistant's next message begins.

    The text is that of transformers' `apply_chat_template`. It is made in another process, with limits: a template that
    computes for ever ends in an error after a few seconds.

    Args:
        settings: of the tokenizer: its chat template, and the names of its special tokens, which templates use.
        messages: each with `role` and `content`.
        where: the file of the template, for messages.
        add_generation_prompt: write the beginning of the assistant's next message at the end.
        day: what templates that print the day take for it, YYYY-MM-DD; "": today.

    Raises:
        UserError: there is no template, or it is malformed, does not end, does not take these messages, or writes nothing of
            them.
    """
    template = template_of(settings.get("chat_template"), where)
    require(bool(messages), "a conversation for a chat model must have a message")
    names = {key: name for key, value in settings.items() if key.endswith("_token") and (name := token_name(value))}
    said = [dict(message) for message in messages]
    request = {"template": template, "messages": said, "names": names, "prompt": add_generation_prompt, "day": day}
    reply = renderer().ask(request)
    if "error" in reply:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise UserError(
            f"{where}: the chat template does not take a conversation of {roles}: {printable(reply['error'])[:300]}"
        )
    text = reply["text"]
    words = [max(re.findall(r"\w+", str(message.get("content"))), key=len, default="") for message in messages]
    require(
        any(word in text for word in words if word) or not any(words),
        f"{where}: the chat template wrote nothing of the messages, only {printable(text)[:80]!r}: it looks for them under "
        "other names than role and content",
    )
    return text


USER, ANSWER = "Question", "Answer"


def turn_end(settings: Mapping[str, Any], where: str, tokens: Sequence[str]) -> str | None:
    """Returns the token that a chat template writes after an assistant's message, or None.

    A chat model ends its answers with this token, also where no file of the folder declares it as an end.

    Args:
        settings: those of `render`.
        where: the file of the template.
        tokens: the special and added tokens of the vocabulary; the first of them after the message is the one.
    """
    chat = [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]
    try:
        text = render(settings, chat, where, add_generation_prompt=False)
    except UserError:  # whoever asks for the text of a conversation gets the error
        return None
    if ANSWER not in text or not tokens:
        return None
    longest_first = sorted(tokens, key=len, reverse=True)
    found = re.search("|".join(map(re.escape, longest_first)), text[text.rindex(ANSWER) + len(ANSWER) :])
    return found[0] if found else None
