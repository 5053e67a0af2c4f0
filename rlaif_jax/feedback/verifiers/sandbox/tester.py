"""The process of the tests: starts that of the answer, confines both, runs and reports the tests.

The answer's code never runs here, so it cannot change a test, read one, or report a result. Tests call it through
`Remote` objects.
"""

from __future__ import annotations

import ast
import builtins
import json
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

from rlaif_jax.feedback.verifiers.sandbox.answer_side import serve
from rlaif_jax.feedback.verifiers.sandbox.confine import confine, die_with_parent, limit_resources
from rlaif_jax.feedback.verifiers.sandbox.values import CannotPass, decode, encode

LONGEST_REPLY = 4 << 20  # bytes
PASSED, FAILED, UNCHECKED = "passed", "failed", "unchecked"


class AnswerError(Exception):
    """An exception of the answer's code that Python does not have, or the end of its process."""


class Connection:
    """Requests to the process of the answer."""

    def __init__(self, requests: IO[bytes], replies: IO[bytes]) -> None:
        self._requests, self._replies = requests, replies

    def ask(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the reply to a request.

        Raises:
            AnswerError: the process has ended or its reply is no reply; or the exception that the reply names.
        """
        try:
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()
            line = self._replies.readline(LONGEST_REPLY)
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            raise AnswerError("the answer's process ended" if len(line) < LONGEST_REPLY else "too much data")
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise AnswerError("no reply")
        if "error" in reply:
            name, message = str(reply["error"]), str(reply.get("message"))
            kind = vars(builtins).get(name)
            if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError):
                raise kind(message)
            raise AnswerError(f"{name}: {message}")
        return reply

    def operate(self, name: str, *arguments: Any, **keywords: Any) -> Any:
        """Returns the value of an operation in the process of the answer.

        Raises:
            CannotPass: an argument cannot be handed over.
            Exception: what the answer's code raised.
        """
        given = [encode(item, _number) for item in arguments]
        named = {key: encode(item, _number) for key, item in keywords.items()}
        reply = self.ask({"name": name, "arguments": given, "keywords": named})
        try:
            for index, new in dict(reply.get("changed") or {}).items():
                _replace(arguments[int(index)], decode(new, self.known))
            return decode(reply["value"], self.known)
        except (LookupError, TypeError, ValueError, ArithmeticError, ImportError) as error:
            raise AnswerError(f"no reply: {error}") from None

    def known(self, number: int) -> Remote:
        """Returns the object of the answer with a number."""
        return Remote(self, number)


def _number(value: Any) -> Any:
    if type(value) is Remote:
        return {"object": value._number}
    raise CannotPass(f"the tests hand a {type(value).__name__} to the answer's code")


def _replace(old: Any, new: Any) -> None:
    """Changes a container in place, as the answer's code has changed its copy."""
    if type(old) is type(new) and isinstance(old, list | bytearray):
        old[:] = new
    elif type(old) is type(new) and isinstance(old, dict | set):
        old.clear()
        old.update(new)


class Remote:
    """An object of the answer, of which the tests have the number alone.

    It never equals plain data and has no order with it; and what it computes with plain data is an object of the answer
    again. Else an object that claims to equal everything, or whose difference from everything is 0, would pass tests.
    """

    def __init__(self, connection: Connection, number: int) -> None:
        self.__dict__.update(_connection=connection, _number=number)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._connection.operate("call", self, *arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        return self._connection.operate("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._connection.operate("setattr", self, name, value)

    def __instancecheck__(self, instance: Any) -> bool:
        return type(instance) is Remote and bool(self._connection.operate("isinstance", instance, self))

    def __iter__(self) -> Iterator[Any]:
        items = self._connection.operate("iter", self)
        while True:
            try:
                yield self._connection.operate("next", items)
            except StopIteration:
                return

    def __eq__(self, other: object) -> bool:
        return type(other) is Remote and bool(self._connection.operate("eq", self, other))

    def __hash__(self) -> int:
        return hash(("an object of the answer", self._number))

    def __bool__(self) -> bool:
        return bool(self._connection.operate("bool", self))

    def __len__(self) -> int:
        return int(self._connection.operate("len", self))

    def __str__(self) -> str:
        return str(self._connection.operate("str", self))

    def __repr__(self) -> str:
        return str(self._connection.operate("repr", self))


def _forward(name: str) -> Callable[..., Any]:
    return lambda self, *arguments: self._connection.operate(name, self, *arguments)


def _compare(name: str) -> Callable[..., Any]:
    def compare(self: Remote, other: Any) -> Any:
        return self._connection.operate(name, self, other) if type(other) is Remote else NotImplemented

    return compare


def _compute(name: str, swapped: bool = False) -> Callable[..., Any]:
    def compute(self: Remote, *others: Any) -> Any:
        values = (*others, self) if swapped else (self, *others)
        result = self._connection.operate(name, *values)
        if type(result) is not Remote and any(type(other) is not Remote for other in others):
            raise TypeError("an object of the answer and plain data make no plain data")
        return result

    return compute


for _name in ("getitem", "setitem", "delitem", "contains", "next"):
    setattr(Remote, f"__{_name}__", _forward(_name))
for _name in ("lt", "le", "gt", "ge"):
    setattr(Remote, f"__{_name}__", _compare(_name))
for _name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"):
    setattr(Remote, f"__{_name}__", _compute(_name))
    setattr(Remote, f"__r{_name}__", _compute(_name, swapped=True))
for _name in ("neg", "pos", "invert"):
    setattr(Remote, f"__{_name}__", _forward(_name))


# --- the tests


class Part(NamedTuple):
    """A statement of the tests, with what counts in it.

    Attributes:
        code: the statement.
        tests: after the statement ran, each of these is one test; None: the statement itself is one test.
    """

    code: ast.Module
    tests: tuple[Callable[[dict[str, Any]], Any], ...] | None


def _has_assert(node: ast.AST) -> bool:
    return any(isinstance(inner, ast.Assert) for inner in ast.walk(node))


def _method(kind: str, name: str, namespace: dict[str, Any]) -> None:
    """Runs a method of a class of tests, of unittest's or a plain one."""
    import unittest

    made = namespace[kind]
    if issubclass(made, unittest.TestCase):
        made(name).debug()
    else:
        getattr(made(), name)()  # user-named


def read_tests(tests: str | list[str]) -> list[Part]:
    """Returns the tests: each text of a list, or the statements of one text.

    In one text each statement with an assert is a test, each function `test...`, and each method `test...` of a class. A
    call of a function that the text defines and that has an assert (`check(candidate)`) is a test as well.

    Raises:
        SyntaxError: the tests are no Python.
    """
    if isinstance(tests, list):
        modules = [ast.parse(text) for text in tests]
        return [Part(module, None) for module in modules if module.body]
    parts: list[Part] = []
    checks: set[str] = set()
    for node in ast.parse(tests).body:
        counted: tuple[Callable[[dict[str, Any]], Any], ...] | None = ()
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            counted = (partial(lambda name, namespace: namespace[name](), node.name),)
        elif isinstance(node, ast.FunctionDef):
            checks |= {node.name} if _has_assert(node) else set()
        elif isinstance(node, ast.ClassDef):
            methods = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
            counted = tuple(partial(_method, node.name, name) for name in methods if name.startswith("test"))
        elif _has_assert(node) or (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Call)
            and isinstance(node.value.func, ast.Name)
            and node.value.func.id in checks
        ):
            counted = None
        parts.append(Part(ast.Module([node], []), counted))
    return parts


def count_tests(parts: list[Part]) -> int:
    """Returns the number of tests."""
    return sum(1 if part.tests is None else len(part.tests) for part in parts)


def run_tests(parts: list[Part], namespace: dict[str, Any]) -> Iterator[str]:
    """Runs the tests in their order and yields the result of each."""

    def result(test: Callable[[], Any]) -> str:
        try:
            test()
        except CannotPass:
            return UNCHECKED
        except BaseException:  # also SystemExit: an end is no pass
            return FAILED
        return PASSED

    for part in parts:
        outcome = result(partial(exec, compile(part.code, "tests.py", "exec"), namespace))
        if part.tests is None:
            yield outcome
        else:
            for test in part.tests:
                yield result(partial(test, namespace))


def names_for_tests(names: Mapping[str, Any], parts: list[Part]) -> dict[str, Any]:
    """Returns those of the answer's names that the tests may see.

    A name of Python's (a builtin, a module of the library) is the answer's only where the tests use none of its other
    names: then it is what they test. Else an answer could replace `abs` or `math` for them.
    """
    used = {node.id for part in parts for node in ast.walk(part.code) if isinstance(node, ast.Name)}
    pythons = set(vars(builtins)) | set(sys.stdlib_module_names)
    others = used & set(names) - pythons
    is_module = lambda value: isinstance(value, type(sys))
    return {name: value for name, value in names.items() if name not in pythons or is_module(value) or not others}


def main(settings: str) -> None:
    """Runs one job of standard input and writes a line for each result; the program of the process.

    Args:
        settings: JSON with timeout_s and memory_mb; the present folder is the one to write.
    """
    die_with_parent()
    limits = json.loads(settings)
    folder = Path.cwd()
    limit_resources(math.ceil(limits["timeout_s"]) + 1, limits["memory_mb"])
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        _answer_process(theirs, folder)
    theirs.close()
    # The job is read after the fork: nothing of it is in the memory of the answer's process.
    job = json.loads(sys.stdin.buffer.readline())
    report = os.fdopen(os.dup(1), "w", buffering=1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    write = lambda *words: report.write(" ".join([job["nonce"], *map(str, words)]) + "\n")
    failed = confine(folder)
    try:
        parts = read_tests(job["tests"])
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        write("no-tests", type(error).__name__)
        return
    write("tests", count_tests(parts), ",".join(failed).replace(" ", "-") or "-")
    connection = Connection(ours.makefile("wb"), ours.makefile("rb"))
    try:
        reply = connection.ask({"code": job["code"]})
        names = {}
        for name, value in dict(reply["names"]).items():
            try:
                if name.isidentifier() and not name.startswith("__"):  # `__builtins__` would be that of the tests
                    names[name] = decode(value, connection.known)
            except ImportError:
                continue
    except Exception:
        return  # the code does not run: no test passes
    namespace = {**names_for_tests(names, parts), "__name__": "tests"}
    for number, outcome in enumerate(run_tests(parts, namespace)):
        write(outcome, number)


def _answer_process(channel: socket.socket, folder: Path) -> NoReturn:
    """Becomes the process of the answer: without other open files, confined, until the channel closes."""
    status = 1
    try:
        die_with_parent()
        kept = os.dup2(channel.fileno(), 3)
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nothing, standard)
        channel.detach()
        os.closerange(4, 1024)
        alone = socket.socket(fileno=kept)
        confine(folder)
        serve(alone.makefile("rb"), alone.makefile("wb"))
        status = 0
    finally:
        os._exit(status)
