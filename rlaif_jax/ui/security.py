"""Decides which requests the annotation page answers: with a rater's token, from the page itself."""

from __future__ import annotations

import dataclasses
import hmac
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

from fastapi import Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from rlaif_jax.feedback.records.forms import canonical
from rlaif_jax.ui.tokens import csrf_token, is_session

MAX_BODY = 2_000_000
"""The largest number of bytes of one post."""
MAX_BRACKETS = 100_000
"""The largest number of brackets in one post: making a million lists would hold up all other requests."""

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
"""Headers of every response: the browser runs this server's scripts and styles and makes no other request."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class AsciiJson(JSONResponse):
    """JSON in ASCII: a lone surrogate, which UTF-8 cannot hold, is written as an escape."""

    def render(self, content: Any) -> bytes:
        """Returns the bytes of the response: `content`, made of JSON types, in canonical ASCII JSON."""
        return canonical(content).encode()


def error_response(status: int, message: str, *, text: bool = False) -> Response:
    """Returns the HTTP response for an error with this status and message.

    It is JSON, {"error": message}, or with `text` plain text.
    """
    return PlainTextResponse(message + "\n", status) if text else AsciiJson({"error": message}, status)


def allowed_hosts(host: str) -> tuple[str, ...]:
    """Returns the names under which a page that listens on `host` is reached."""
    return tuple(dict.fromkeys((*LOOPBACK, host.lower())))  # lower case, as the Host of a request is compared


def parse_address(text: str) -> SplitResult:
    """Returns the parts of an address from a request; empty parts for text that is no address."""
    try:
        parts = urlsplit(text)
        parts.hostname  # noqa: B018  # raises like urlsplit does
    except ValueError:
        return urlsplit("")
    return parts


@dataclasses.dataclass(frozen=True)
class Guard:
    """The rules by which requests are let in.

    Attributes:
        tokens: rater -> secret.
        cookie: the name of the cookie of a rater's session.
        hosts: the names under which the page is reached.
    """

    tokens: Mapping[str, str]
    cookie: str
    hosts: tuple[str, ...]

    def refusal(self, request: Request) -> Response | None:
        """Returns the response to a request that is refused; None for one that is let in.

        A request that is let in gets `request.state.rater` and `request.state.csrf`.
        """
        own = parse_address(f"//{request.headers.get('host', '')}")
        if own.hostname not in self.hosts:  # another name that points here: DNS rebinding
            return error_response(403, "this page is not reached under that name: start it with --host NAME")
        header = request.headers.get("authorization", "")
        if request.url.path == "/" and "token" in request.query_params:
            rater = self._rater(request.query_params["token"])
        elif header.startswith("Bearer "):
            rater = self._rater(header.removeprefix("Bearer "))
        else:
            rater = self.session_rater(request)
        if rater is None:
            return error_response(401, "This page opens with the address that holds your token; ask for it.", text=True)
        request.state.rater, request.state.csrf = rater, csrf_token(self.tokens[rater])
        return None if request.method in ("GET", "HEAD") else self._post_refusal(request, own)

    def session_rater(self, request: Request) -> str | None:
        """Returns the rater whose session's cookie the request has; None without one that holds."""
        cookie = request.cookies.get(self.cookie, "").encode(errors="replace").decode()
        return next((r for r, secret in self.tokens.items() if is_session(cookie, secret, time.time())), None)

    def _rater(self, token: str) -> str | None:
        """Returns the rater with this secret; takes the same time for every wrong one."""
        given = token.encode(errors="replace")
        found = None
        for rater, secret in self.tokens.items():
            if hmac.compare_digest(given, secret.encode()):
                found = rater
        return found

    def _post_refusal(self, request: Request, own: SplitResult) -> Response | None:
        if request.method != "POST":
            return error_response(405, "only GET and POST")
        origin = parse_address(request.headers.get("origin", ""))
        if origin.scheme not in ("http", "https") or origin.netloc != own.netloc:
            return error_response(403, "a post from another site is refused (Origin)")
        if not hmac.compare_digest(request.headers.get("x-csrf-token", "").encode(), request.state.csrf.encode()):
            return error_response(403, "a post needs this page's X-CSRF-Token")
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            return error_response(415, "a post is application/json")
        if not request.headers.get("content-length", "").isdigit():
            return error_response(411, "a post says its Content-Length")
        if int(request.headers["content-length"]) > MAX_BODY:
            return error_response(413, f"a post has at most {MAX_BODY} bytes")
        return None
