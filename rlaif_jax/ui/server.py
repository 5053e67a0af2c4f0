"""The page over HTTP. Nothing is served without a rater's token; nothing is changed from another site.

Every answer carries a Content-Security-Policy that allows this server's own scripts and styles and no other request.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.concurrency import run_in_threadpool

from rlaif_jax.config import UserError
from rlaif_jax.feedback.people.queue import Conflict
from rlaif_jax.feedback.records.forms import canonical, sha256
from rlaif_jax.ui.agree import agreement
from rlaif_jax.ui.service import Desk, Forbidden
from rlaif_jax.ui.tokens import csrf_token

HERE = Path(__file__).parent
MAX_BODY = 2_000_000
"""Bytes of one post."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_OPENING = (
    "<!doctype html><meta charset=utf-8><link rel=icon href=/static/icon.svg>"
    "<meta http-equiv=refresh content='0; url=/'><title>Opening</title>"
)


class AsciiJson(JSONResponse):
    """JSON in ASCII: half a character (a lone surrogate), which UTF-8 cannot hold, is an escape like any other."""

    def render(self, content: Any) -> bytes:
        return canonical(content).encode()


def address(text: str) -> SplitResult:
    """The parts of an address from a request; none of one that is no address."""
    try:
        parts = urlsplit(text)
        parts.hostname  # noqa: B018  # raises like urlsplit does
    except ValueError:
        return urlsplit("")
    return parts


def names_let_in(host: str) -> tuple[str, ...]:
    """Under which names a page that listens on `host` is reached."""
    return tuple(dict.fromkeys((*LOOPBACK, host.lower())))  # as a request's Host is compared: in small letters


def create_app(
    desk: Desk, tokens: Mapping[str, str], *, instructions: str, title: str = "Annotation", host: str = LOOPBACK[0]
) -> FastAPI:
    """The application. tokens: rater -> secret. host: the name, beside the loopback ones, under which it is reached."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, default_response_class=AsciiJson)
    pages = Environment(loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined)
    cookie = f"annotate_{sha256(str(desk.store.path.resolve()))[:12]}"  # cookies do not know ports
    hosts = names_let_in(host)

    def rater_of(token: str | None) -> str | None:
        given = (token or "").encode()
        found = None
        for rater, secret in tokens.items():
            if hmac.compare_digest(given, secret.encode()):
                found = rater
        return found

    def refusal(request: Request) -> Response | None:
        """Why a request is not let in, before anything looks at it."""
        own = address(f"//{request.headers.get('host', '')}")
        if own.hostname not in hosts:  # another name that points here: DNS rebinding
            return _error(403, "this page is not reached under that name: start it with --host NAME")
        header = request.headers.get("authorization", "")
        token = header.removeprefix("Bearer ") if header.startswith("Bearer ") else request.cookies.get(cookie)
        if request.url.path == "/" and "token" in request.query_params:
            token = request.query_params["token"]
        rater = rater_of(token)
        if rater is None:
            return _error(401, "This page opens with the address that holds your token; ask for it.", text=True)
        request.state.rater, request.state.csrf = rater, csrf_token(tokens[rater])
        if request.method in ("GET", "HEAD"):
            return None
        if request.method != "POST":
            return _error(405, "only GET and POST")
        origin = address(request.headers.get("origin", ""))
        if origin.scheme not in ("http", "https") or origin.netloc != own.netloc:
            return _error(403, "a post from another site is refused (Origin)")
        if not hmac.compare_digest(request.headers.get("x-csrf-token", "").encode(), request.state.csrf.encode()):
            return _error(403, "a post needs this page's X-CSRF-Token")
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            return _error(415, "a post is application/json")
        if not request.headers.get("content-length", "").isdigit():
            return _error(411, "a post says its Content-Length")
        if int(request.headers["content-length"]) > MAX_BODY:
            return _error(413, f"a post has at most {MAX_BODY} bytes")
        return None

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = refusal(request) or await call_next(request)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(UserError)
    async def refuse(request: Request, error: Exception) -> Response:
        status = 403 if isinstance(error, Forbidden) else 409 if isinstance(error, Conflict) else 400
        return _error(status, str(error))

    def page(request: Request, template: str) -> HTMLResponse:
        me = desk.me(request.state.rater)
        values = {
            "title": title,
            "me": me,
            "csrf": request.state.csrf,
            "instructions": instructions,
            "here": request.url.path,
        }
        return HTMLResponse(pages.get_template(template).render(values))

    # The handlers are coroutines that never wait with a transaction open: one thread, one connection, no locks.

    @app.get("/")
    async def work(request: Request) -> Response:
        if "token" not in request.query_params:
            return page(request, "work.html.jinja")
        response = HTMLResponse(_OPENING)  # moves on to "/", so that the token leaves the address bar
        secret = tokens[request.state.rater]
        response.set_cookie(cookie, secret, max_age=30 * 86_400, httponly=True, samesite="strict")
        return response

    @app.get("/progress")
    async def progress_page(request: Request) -> Response:
        return page(request, "progress.html.jinja")

    @app.get("/adjudicate")
    async def adjudicate_page(request: Request) -> Response:
        if request.state.rater != desk.coordinator:
            raise Forbidden(f"only the coordinator ({desk.coordinator}) adjudicates")
        return page(request, "adjudicate.html.jinja")

    @app.get("/api/me")
    async def me(request: Request) -> Any:
        return desk.me(request.state.rater) | {"csrf": request.state.csrf}

    @app.get("/api/team")
    async def team(request: Request) -> Any:
        rows = desk.queue.tasks(only_open=False)
        posts = [post for post in desk.queue.posts(acts=("answer",)) if post.records]
        kinds = {waiting.task.id: waiting.task.kind for waiting in rows}
        return desk.team() | {"agreement": await run_in_threadpool(agreement, posts, kinds)}

    @app.get("/api/disputes")
    async def disputes(request: Request) -> Any:
        return desk.disputes(request.state.rater)

    @app.get("/export.jsonl")
    async def export(request: Request) -> Response:
        final = request.query_params.get("final") == "1"
        lines = [canonical(record) + "\n" for record in desk.export(request.state.rater, final)]
        name = "feedback-final.jsonl" if final else "feedback.jsonl"
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return PlainTextResponse("".join(lines), media_type="application/x-ndjson", headers=headers)

    @app.post("/api/check")
    async def check(request: Request) -> Any:
        return desk.check(request.state.rater, (await _body(request)).get("answers"))

    @app.post("/api/next")
    async def next_task(request: Request) -> Any:
        await _body(request)
        return desk.next(request.state.rater)

    @app.post("/api/answer")
    async def answer(request: Request) -> Any:
        body = await _body(request)
        return desk.answer(request.state.rater, _request_id(body), body)

    @app.post("/api/undo")
    async def undo(request: Request) -> Any:
        body = await _body(request)
        return desk.undo(request.state.rater, _request_id(body), body)

    @app.post("/api/say")
    async def say(request: Request) -> Any:
        body = await _body(request)
        return await desk.say(request.state.rater, _request_id(body), body)

    @app.post("/api/adjudicate")
    async def adjudicate(request: Request) -> Any:
        body = await _body(request)
        return desk.adjudicate(request.state.rater, _request_id(body), body)

    @app.post("/api/stop")
    async def stop(request: Request) -> Any:
        return desk.stop(request.state.rater, (await _body(request)).get("stop"))

    app.mount("/static", StaticFiles(directory=HERE / "static"))
    return app


async def _body(request: Request) -> dict[str, Any]:
    """The post as a JSON object; UserError for anything else."""

    def no_constant(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    try:
        found = json.loads(await request.body(), parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the post is no valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError("the post must be a JSON object")
    return found


def _request_id(body: Mapping[str, Any]) -> str:
    found = body.get("request")
    if not isinstance(found, str) or not 8 <= len(found) <= 80 or not found.isascii():
        raise UserError("request must be an id of 8 to 80 ASCII characters that the sender makes")
    return found


def _error(status: int, message: str, *, text: bool = False) -> Response:
    return PlainTextResponse(message + "\n", status) if text else AsciiJson({"error": message}, status)
