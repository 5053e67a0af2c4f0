"""The routes of a rater's work: the check, tasks, answers, undo and chats."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request

from rlaif_jax.config import UserError
from rlaif_jax.ui.security import MAX_BODY, MAX_BRACKETS
from rlaif_jax.ui.service import AnnotationService


def add_task_routes(app: FastAPI, service: AnnotationService) -> None:
    """Adds to `app` the routes of a rater's work, such as GET /api/me; each calls a method of `service`."""

    @app.get("/api/me")
    async def me(request: Request) -> Any:
        return await service.run(service.me, request.state.rater) | {"csrf": request.state.csrf}

    @app.post("/api/check")
    async def check(request: Request) -> Any:
        answers = (await json_body(request)).get("answers")
        return await service.run(service.check, request.state.rater, answers)

    @app.post("/api/next")
    async def next_task(request: Request) -> Any:
        await json_body(request)
        return await service.run(service.next, request.state.rater)

    @app.post("/api/answer")
    async def answer(request: Request) -> Any:
        body = await json_body(request)
        return await service.run(service.answer, request.state.rater, request_id(body), body)

    @app.post("/api/undo")
    async def undo(request: Request) -> Any:
        body = await json_body(request)
        return await service.run(service.undo, request.state.rater, request_id(body), body)

    @app.post("/api/say")
    async def say(request: Request) -> Any:
        body = await json_body(request)
        return await service.say(request.state.rater, request_id(body), body)


class TooLarge(UserError):
    """A post with more bytes than the page takes."""


async def json_body(request: Request) -> dict[str, Any]:
    """Returns the body of a post. Raises UserError where it is no JSON object, or is too large."""

    def refuse_constant(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    def finite(number: str) -> float:
        if math.isinf(float(number)):
            raise ValueError(f"{number[:40]} is too large a number")
        return float(number)

    data = bytearray()
    async for part in request.stream():  # counted: what a post says of its length need not be true
        data += part
        if len(data) > MAX_BODY:
            raise TooLarge(f"a post has at most {MAX_BODY} bytes")
    if data.count(b"[") + data.count(b"{") > MAX_BRACKETS:
        raise TooLarge(f"a post has at most {MAX_BRACKETS} brackets")
    try:
        body = json.loads(data, parse_constant=refuse_constant, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the post is no valid JSON ({error})") from error
    if not isinstance(body, dict):
        raise UserError("the post must be a JSON object")
    return body


def request_id(body: Mapping[str, Any]) -> str:
    """Returns the id that the sender made for a post. Raises UserError where it is unusable."""
    identifier = body.get("request")
    if not isinstance(identifier, str) or not 8 <= len(identifier) <= 80 or not identifier.isascii():
        raise UserError("request must be an id of 8 to 80 ASCII characters that the sender makes")
    return identifier
