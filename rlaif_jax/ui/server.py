"""The annotation page over HTTP: the application and its pages.

Nothing is served without a rater's token, and nothing is changed by a request from another site (`security.py`).
"""

from __future__ import annotations

import html
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlaif_jax.config import UserError
from rlaif_jax.feedback.people.chats import Conflict
from rlaif_jax.feedback.records.forms import sha256
from rlaif_jax.feedback.records.sqlite import Busy
from rlaif_jax.ui.routes_tasks import TooLarge, add_task_routes
from rlaif_jax.ui.routes_team import add_team_routes
from rlaif_jax.ui.security import HEADERS, LOOPBACK, AsciiJson, Guard, allowed_hosts, error_response
from rlaif_jax.ui.service import AnnotationService, Forbidden
from rlaif_jax.ui.tokens import session_cookie

HERE = Path(__file__).parent
_STATUS = {Forbidden: 403, Conflict: 409, TooLarge: 413}
_OPENING = (
    "<!doctype html><meta charset=utf-8><link rel=icon href=/static/icon.svg>"
    "<meta http-equiv=refresh content='0; url=/'><title>Opening</title>"
)
_SWITCHING = (
    "<!doctype html><meta charset=utf-8><link rel=icon href=/static/icon.svg><title>Another rater</title>"
    "<p>This browser works here as {0}. The address that you followed is that of {1}.</p>"
    "<p><a href='/?token={2}'>Go on as {1}</a> &middot; <a href='/'>Stay {0}</a></p>"
)
SESSION_S = 14 * 86_400
"""Seconds after which a browser needs the rater's address again."""


def create_app(
    service: AnnotationService,
    tokens: Mapping[str, str],
    *,
    instructions: str,
    title: str = "Annotation",
    host: str = LOOPBACK[0],
) -> FastAPI:
    """Returns the application that serves the page.

    Args:
        service: answers the requests.
        tokens: rater -> secret.
        instructions: the text that raters read before they work.
        title: the title of the page.
        host: the name, besides the loopback names, under which the page is reached.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, default_response_class=AsciiJson)
    cookie = f"annotate_{sha256(str(service.store.path.resolve()))[:12]}"  # browsers share cookies between ports
    guard = Guard(tokens, cookie, allowed_hosts(host))

    @app.middleware("http")
    async def check_request(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        try:
            response = guard.refusal(request) or await call_next(request)
        except Exception:  # a fault of ours: its response has the headers of all others, too
            logging.getLogger("uvicorn.error").exception("%s %s", request.method, request.url.path)
            response = error_response(500, "the page made a mistake; its terminal says which")
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(UserError)
    async def explain(request: Request, error: Exception) -> Response:
        if isinstance(error, Busy):
            response = error_response(503, "another program is writing into the file of this page: send it again")
            response.headers["Retry-After"] = "1"
            return response
        return error_response(
            next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 400), str(error)
        )

    _add_pages(app, service, guard, title, instructions)
    add_task_routes(app, service)
    add_team_routes(app, service)
    app.mount("/static", StaticFiles(directory=HERE / "static"))
    return app


def _add_pages(app: FastAPI, service: AnnotationService, guard: Guard, title: str, instructions: str) -> None:
    templates = Environment(loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined)

    async def page(request: Request, template: str) -> HTMLResponse:
        values = {
            "title": title,
            "me": await service.run(service.me, request.state.rater),
            "csrf": request.state.csrf,
            "instructions": instructions,
            "here": request.url.path,
        }
        return HTMLResponse(templates.get_template(template).render(values))

    @app.get("/")
    async def work(request: Request) -> Response:
        if "token" not in request.query_params:
            return await page(request, "work.html.jinja")
        rater, other = request.state.rater, guard.session_rater(request)
        if other not in (None, rater) and request.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            # A link on another site must not make somebody work under another name without noticing.
            return HTMLResponse(_SWITCHING.format(*map(html.escape, (other, rater, request.query_params["token"]))))
        response = HTMLResponse(_OPENING)  # moves on to "/", so that the token leaves the address bar
        cookie = session_cookie(guard.tokens[rater], int(time.time()) + SESSION_S)
        response.set_cookie(guard.cookie, cookie, max_age=SESSION_S, httponly=True, samesite="strict")
        return response

    @app.get("/progress")
    async def progress_page(request: Request) -> Response:
        return await page(request, "progress.html.jinja")

    @app.get("/adjudicate")
    async def adjudicate_page(request: Request) -> Response:
        if request.state.rater != service.coordinator:
            raise Forbidden(f"only the coordinator ({service.coordinator}) adjudicates")
        return await page(request, "adjudicate.html.jinja")
