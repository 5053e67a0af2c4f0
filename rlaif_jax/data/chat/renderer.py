"""Renders chat templates: the program of a process with limits, which `template.py` starts and asks.

A template comes with the weights of a stranger. The sandbox keeps it from everything outside it, but it may still compute
for ever, or make a text that fills the memory. No count of loops or sizes in the same process bounds all ways to do so (a
list that holds each list twice, forty times over, is one); limits of the system on a process do.

Requests and replies are lines of JSON, `{"template", "messages", "names", "prompt", "day"}` and `{"text"}` or `{"error"}`. A
request without messages asks for the names that the template takes from outside, separated by blanks. The file is run by its
path and imports nothing of this package, so that the process starts in a tenth of a second.
"""

from __future__ import annotations

import datetime
import json
import resource
import sys
import time
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.meta
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 1  # at least, of one rendering; a template of a published model takes milliseconds
MEMORY = 2**30  # bytes of address space of the process
TEXT = 2**25  # characters of a rendered conversation


class _Generation(Extension):
    """`{% generation %}` marks the words of the assistant for training; the text is that of its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own attribute

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call with the body, as in transformers: what the body sets is unknown after it.
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return str(caller())


def fail(message: str) -> None:
    """Raises the error that a template states: `raise_exception` of templates."""
    raise jinja2.TemplateError(message)


def to_json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Returns `x` as JSON, without the escapes of Jinja's own filter `tojson`.

    Args:
        x: a value of the template.
        ensure_ascii, indent, separators, sort_keys: those of `json.dumps`.
    """
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=1)
def environment() -> jinja2.Environment:
    """Returns an environment like that of transformers."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = fail
    return made


@lru_cache(maxsize=64)
def compiled(template: str) -> jinja2.Template:
    """Returns a template. Raises jinja2.TemplateError where it is malformed."""
    return environment().from_string(template)


def render(request: dict[str, Any]) -> str:
    """Returns the text of a request. Raises the errors of Python and Jinja for what a template does wrong."""
    if "messages" not in request:
        return " ".join(sorted(jinja2.meta.find_undeclared_variables(environment().parse(request["template"]))))
    pieces: list[str] = []
    length = 0
    now = datetime.datetime.fromisoformat(request["day"]) if request.get("day") else datetime.datetime.now()
    for piece in compiled(request["template"]).generate(
        messages=request["messages"],
        tools=None,
        documents=None,
        add_generation_prompt=request["prompt"],
        strftime_now=lambda form: now.strftime(form),  # templates print the day
        **request["names"],
    ):
        pieces.append(piece)
        length += len(piece)
        if length > TEXT:
            raise MemoryError
    return "".join(pieces)


def reply(request: dict[str, Any]) -> dict[str, str]:
    """Returns the reply to a request: its text, or the error that prevents one."""
    try:
        return {"text": render(request)}
    except MemoryError:
        return {"error": f"it makes a text of more than {TEXT} characters, or needs more than {MEMORY >> 20} MiB"}
    except RecursionError:
        return {"error": "it calls itself without end, or nests too deeply"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"it is malformed: line {error.lineno}: {error.message}"}
    except Exception as error:  # a template may raise what Python raises: of types, sizes, keys
        if "no loader" in str(error):
            return {"error": "it includes or imports another file, which a chat template cannot"}
        return {"error": str(error).strip() or type(error).__name__}


def limit(kind: int, value: int) -> None:
    """Sets the soft limit of this process on a resource, where the system has such a limit."""
    hard = resource.getrlimit(kind)[1]
    try:
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
    except (ValueError, OSError):  # macOS refuses some; the others, and the patience of the asking process, hold
        return


def main() -> None:
    """Answers requests until the asking process ends."""
    limit(resource.RLIMIT_AS, MEMORY)
    limit(resource.RLIMIT_CORE, 0)
    for line in sys.stdin.buffer:
        # The system counts whole seconds, over the life of the process.
        limit(resource.RLIMIT_CPU, int(time.process_time()) + CPU_SECONDS + 1)
        sys.stdout.buffer.write(json.dumps(reply(json.loads(line))).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
