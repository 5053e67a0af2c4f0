"""The process of the answer: runs its code and does what the tests ask for, one request a line."""

from __future__ import annotations

import json
import operator
import sys
import types
from collections.abc import Callable, Mapping
from typing import IO, Any

from rlaif_jax.feedback.verifiers.sandbox.values import decode, encode

MESSAGE_LENGTH = 1000  # of an exception


def _call(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    return function(*arguments, **keywords)


OPERATIONS: Mapping[str, Callable[..., Any]] = {
    "call": _call, "getattr": getattr, "setattr": setattr, "isinstance": isinstance,
    "len": len, "iter": iter, "next": next, "bool": bool, "str": str, "repr": repr,
    "getitem": operator.getitem, "setitem": operator.setitem, "delitem": operator.delitem, "contains": operator.contains,
    "eq": operator.eq, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "matmul": operator.matmul,
    "truediv": operator.truediv, "floordiv": operator.floordiv, "mod": operator.mod, "pow": operator.pow,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor, "neg": operator.neg, "pos": operator.pos,
    "invert": operator.invert,
}  # fmt: skip


def _changed(arguments: list[Any], before: list[Any], keep: Callable[[Any], Any]) -> dict[str, Any]:
    """Returns the containers among the arguments that a call has changed, by their place."""
    places = [i for i, item in enumerate(arguments) if isinstance(item, list | dict | set | bytearray)]
    after = {str(i): encode(arguments[i], keep) for i in places}
    return {i: item for i, item in after.items() if item != before[int(i)]}


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Answers requests until there are no more.

    The first request has the code; its reply has the names that the code defines. A further request names one of
    `OPERATIONS` and its arguments; its reply has the value and those arguments that changed, or the exception.
    """
    objects: list[Any] = []

    def keep(value: Any) -> Any:
        objects.append(value)
        return {"object": len(objects) - 1}

    module = types.ModuleType("answer")
    sys.modules["answer"] = module
    for line in requests:
        request = json.loads(line)
        reply: dict[str, Any]
        try:
            if "code" in request:
                exec(compile(request["code"], "answer.py", "exec"), vars(module))
                public = {name: value for name, value in vars(module).items() if not name.startswith("__")}
                reply = {"names": {name: encode(value, keep) for name, value in public.items()}}
            else:
                arguments = decode(request["arguments"], objects.__getitem__)
                keywords = {name: decode(item, objects.__getitem__) for name, item in request["keywords"].items()}
                value = OPERATIONS[request["name"]](*arguments, **keywords)
                reply = {"value": encode(value, keep)}
                if request["name"] == "call":
                    reply["changed"] = _changed(arguments, request["arguments"], keep)
        except BaseException as error:
            reply = {"error": type(error).__name__, "message": str(error)[:MESSAGE_LENGTH]}
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()
