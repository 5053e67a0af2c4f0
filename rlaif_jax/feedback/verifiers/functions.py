"""Rewards by a user's Python function, in two shapes: one answer a call, or TRL's lists.

One answer a call: `def reward(answer)`, with `prompt` and `record` where the function names them:

    def reward(prompt: str, answer: str, record: dict) -> float | None: ...

TRL's shape: lists of a step's prompts and completions, and of each field of the records as a further keyword:

    def reward(prompts: list, completions: list, solution: list, **kwargs) -> list[float | None]: ...

As in TRL, completions are texts where prompts are texts, and where a prompt is a list of messages a completion is
`[{"role": "assistant", "content": ...}]`; `messages` makes messages of texts as well. TRL's `completion_ids`,
`trainer_state`, `log_extra` and `log_metric` do not exist here. Both shapes may be `async def`.

A number is a reward, a bool counts as 0 or 1, and None is a missing judgement. So is all else that is no finite number,
and an exception: these are counted with their reason.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import numbers
import sys
import traceback
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from rlaif_jax.config import StopRequested, UserError, require
from rlaif_jax.data.prompts import CONVERSATIONAL, Record
from rlaif_jax.feedback.sources import CountingSource, FeedbackSource, Missing
from rlaif_jax.types import Feedback, Rollout

ONE_ANSWER = ("prompt", "answer", "record")
LISTS = ("prompts", "completions")
SHAPES = (
    "it takes an answer (and may take prompt, record), or completions (and may take prompts, fields of the records)"
)
MESSAGE_LENGTH = 120  # of an exception's message in a reason


@dataclasses.dataclass(frozen=True)
class PythonFunction:
    """A reward by a Python function of (prompt, answer, record), or of lists as in TRL.

    Attributes:
        target: "module:function", or "path/to/file.py:function".
        messages: in TRL's shape, pass prompts and completions that are texts as lists of one message, to a function that
            was written for conversations (`completion[0]["content"]`).
        concurrency: how many answers an `async def` function of one answer judges at a time.
    """

    target: str
    messages: bool = False
    concurrency: int = 16

    def __post_init__(self) -> None:
        place, _, name = self.target.rpartition(":")
        require(
            bool(place.strip() and name.strip()),
            f"function.target is {self.target!r}; it is MODULE:FUNCTION or path/file.py:FUNCTION",
        )
        require(self.concurrency >= 1, f"function.concurrency must be at least 1, not {self.concurrency}")

    def build(self) -> FeedbackSource:
        """Imports the function and returns the source of its rewards.

        Raises:
            UserError: there is no such module, file or function, the module cannot be imported, or the function's
                parameters fit neither shape.
        """
        place, _, name = self.target.rpartition(":")
        value: Any = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
        for part in name.split("."):
            try:
                value = getattr(value, part)  # user-named
            except AttributeError:
                raise UserError(f"{self.target}: {place} has no {name!r}; {_offered(value)}") from None
        require(
            callable(value) and not isinstance(value, type), f"{self.target}: {name} is {value!r:.60}, not a function"
        )
        shape = _read_shape(self.target, value)
        require(
            shape.lists or not self.messages,
            f"function.messages is for functions of completions; {self.target} takes one answer",
        )
        return PythonFunctionSource(name, value, shape, self.messages, self.concurrency)


def _offered(value: Any) -> str:
    """Returns which functions a module has, for a message about one that it has not."""
    names = [name for name, item in vars(value).items() if inspect.isfunction(item) and not name.startswith("_")]
    return f"it has the functions {', '.join(names[:8])}" if names else "it has no functions"


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UserError(f"cannot import {name}: {_raised(error)}{_place(error)}") from error
        raise UserError(f"there is no module {name}; for a file write path/file.py:FUNCTION") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"cannot import {name}: {_raised(error)}{_place(error)}") from error


def _load_file(path: Path) -> ModuleType:
    require(path.is_file(), f"there is no file {path}")
    name = f"user_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"cannot import {path}: {_raised(error)}{_place(error, path)}") from error
    return module


def _raised(error: BaseException) -> str:
    """Returns an exception as "ValueError: first line of its message"."""
    try:
        text = str(error)
    except Exception:  # its class is the user's, too
        text = ""
    line = next(iter(text.strip().splitlines()), "")
    line = line if len(line) <= MESSAGE_LENGTH else f"{line[:MESSAGE_LENGTH]}..."
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _place(error: BaseException, file: Path | None = None) -> str:
    """Returns " (FILE:LINE)" of an exception: the last line of its traceback in `file`, else of all."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if file is not None and Path(frame.filename).resolve() == file.resolve()]
    frame = next(reversed(own or frames), None)
    return "" if frame is None else f" ({frame.filename}:{frame.lineno})"


class Shape(NamedTuple):
    """How a function is called.

    Attributes:
        lists: once for all answers, by TRL's convention.
        names: the keywords that it takes; None: any.
        needed: those of them without a default.
    """

    lists: bool
    names: frozenset[str] | None
    needed: frozenset[str]


def _read_shape(target: str, function: Callable[..., Any]) -> Shape:
    """Returns the shape of a function. Raises UserError where it fits neither."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        raise UserError(
            f"{target}: Python does not know the parameters of {function!r:.60}; wrap it in a def"
        ) from None
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = frozenset(p.name for p in named if p.default is p.empty)
    names = None if any(p.kind is p.VAR_KEYWORD for p in parameters) else frozenset(p.name for p in named)
    taken = {p.name for p in named}
    nameless = any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters)
    if "completions" in taken and not nameless:  # first: `answer` may be a field of the records there, as in GSM8K
        return Shape(True, names, needed)
    if "answer" in taken and needed <= set(ONE_ANSWER) and not nameless:
        return Shape(False, names, needed)
    raise UserError(
        f"{target}: a reward function with the parameters {inspect.signature(function)} fits no shape: {SHAPES}"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class PythonFunctionSource(CountingSource):
    """The rewards of a user's function; `PythonFunction` builds it.

    Attributes:
        name: of the function, for reasons and messages.
        function: the function.
        shape: how it is called.
        messages: whether texts are passed as messages.
        concurrency: answers at a time, of an `async def` function.
    """

    name: str
    function: Callable[..., Any]
    shape: Shape
    messages: bool
    concurrency: int

    @cached_property
    def _errors(self) -> list[str]:
        """The traceback of the first exception, where there was one."""
        return []

    @property
    def first_error(self) -> str:
        """Returns the traceback of the first exception of the function, "" without one."""
        return "".join(self._errors)

    @cached_property
    def _asynchronous(self) -> bool:
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(type(self.function).__call__)

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout | None = None) -> Feedback:
        """Returns the function's numbers; see `FeedbackSource`.

        Raises:
            UserError: the function raised an exception for every answer, or TRL's shape needs a field that no record has.
        """
        if not answers:
            return self.feedback([])
        results = self._of_lists(records, answers) if self.shape.lists else self._one_by_one(records, answers)
        failed = [result for result in results if isinstance(result, BaseException)]
        if failed and not self._errors:
            self._errors.append("".join(traceback.format_exception(failed[0])))
        if len(failed) == len(answers):
            path = inspect.getsourcefile(inspect.unwrap(self.function)) if inspect.isfunction(self.function) else None
            place = _place(failed[0], Path(path) if path else None)
            every = f"each of {len(answers)} answers" if len(answers) > 1 else "the only answer"
            raise UserError(f"the reward function {self.name} failed for {every}: {_raised(failed[0])}{place}")
        return self.feedback([self._number(result) for result in results])

    def _number(self, result: Any) -> float | Missing:
        """Returns a result of the function as a reward, or why it is missing."""
        if isinstance(result, Missing):
            return result
        if isinstance(result, BaseException):
            return Missing(f"{self.name} raised {_raised(result)}")
        if result is None:
            return Missing(f"{self.name} returned None")
        if isinstance(result, np.ndarray) and result.ndim == 0:
            result = result.item()
        if not isinstance(result, numbers.Real | np.bool_):
            return Missing(f"{self.name} returned {_article(result)}, not a number")
        try:
            with np.errstate(over="ignore"):
                single = np.float32(float(result))
        except OverflowError:  # a whole number beyond the floats
            single = np.float32(np.inf)
        if not np.isfinite(single):
            return Missing(f"{self.name} returned {'NaN' if np.isnan(single) else 'an infinite number'}")
        return float(single)

    def _one_by_one(self, records: Sequence[Record], answers: Sequence[str]) -> list[Any]:
        """Returns what each answer's call returned or raised."""
        calls = []
        for record, answer in zip(records, answers, strict=True):
            given = {"prompt": record.get("prompt"), "answer": answer, "record": record}
            calls.append({k: v for k, v in given.items() if self.shape.names is None or k in self.shape.names})
        if not self._asynchronous:
            return [_outcome(self.function, call) for call in calls]

        async def all_of_them() -> list[Any]:
            free = asyncio.Semaphore(self.concurrency)

            async def one(call: Mapping[str, Any]) -> Any:
                async with free:
                    try:
                        return await self.function(**call)
                    except (Exception, SystemExit) as error:
                        return error

            return await asyncio.gather(*map(one, calls))

        return _run(all_of_them())

    def _prompt(self, record: Record) -> Any:
        """Returns a prompt in TRL's shape: messages where it came as such or `messages` is set, else text."""
        prompt, messages = record.get("prompt"), record.get("messages")
        if isinstance(prompt, list | tuple) or not (self.messages or record.get(CONVERSATIONAL)):
            return prompt
        return messages if isinstance(messages, list) else [{"role": "user", "content": prompt}]

    def _of_lists(self, records: Sequence[Record], answers: Sequence[str]) -> list[Any]:
        """Returns the results of one call for all answers; an exception is that of each answer."""
        prompts = [self._prompt(record) for record in records]
        completions = [
            [{"role": "assistant", "content": answer}] if isinstance(prompt, list | tuple) else answer
            for answer, prompt in zip(answers, prompts, strict=True)
        ]
        fields = {name for record in records for name in record} - {"prompt", "completion", CONVERSATIONAL, *LISTS}
        given: dict[str, Any] = {name: [record.get(name) for record in records] for name in sorted(fields)}
        given |= {"prompts": prompts, "completions": completions}
        lacking = sorted(self.shape.needed - set(given))
        require(
            not lacking,
            f"the reward function {self.name} needs {', '.join(lacking)}; no record has a field of that name",
        )
        call = {k: v for k, v in given.items() if self.shape.names is None or k in self.shape.names}
        if self._asynchronous:
            result = _outcome(lambda: _run(self.function(**call)), {})
        else:
            result = _outcome(self.function, call)
        if isinstance(result, BaseException):
            return [result] * len(answers)
        if isinstance(result, np.ndarray) and result.ndim:
            result = list(result)
        if not isinstance(result, list | tuple):
            return [Missing(f"{self.name} returned {_article(result)}, not a list")] * len(answers)
        if len(result) != len(answers):
            return [Missing(f"{self.name} returned a list of another length than the answers")] * len(answers)
        return list(result)


def _article(value: Any) -> str:
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _outcome(function: Callable[..., Any], call: Mapping[str, Any]) -> Any:
    """Returns the function's result, or what it raised: also what is no Exception, as of `sys.exit`."""
    try:
        result = function(**call)
    except (KeyboardInterrupt, StopRequested):
        raise
    except BaseException as error:
        return error
    if inspect.iscoroutine(result):
        result.close()  # a plain function that returns one: nobody would await it
    return result


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    """Runs a coroutine to its end, also in a notebook, whose thread runs a loop already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        in_notebook = False
    else:
        in_notebook = True
    if not in_notebook:  # not in the `except`: its RuntimeError would be the context of the function's exceptions
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
