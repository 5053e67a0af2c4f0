"""Who is let in, and what a post needs."""

import asyncio
import contextlib
import json
import socket
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the annotation page is an extra: pip install -e '.[ui]'")
pytest.importorskip("uvicorn", reason="the annotation page is an extra: pip install -e '.[ui]'")

from rlaif_jax.recipes.world.crowd import running_page
from rlaif_jax.ui.security import MAX_BODY, MAX_BRACKETS
from rlaif_jax.ui.tokens import csrf_token, is_session, session_cookie
from tests.ui.page_requests import post_headers, raw, token_of


def empty_app(tokens=(), **more):
    from rlaif_jax.ui.server import create_app

    class Nothing:
        store = type("S", (), {"path": Path("x")})

    return create_app(Nothing(), dict(tokens), instructions="", **more)


def routes():
    from fastapi.routing import APIRoute

    app = empty_app()
    return [(method, route.path) for route in app.routes if isinstance(route, APIRoute) for method in route.methods]


ROUTES = routes()


OTHERS = [
    ("GET", "/static/work.js"),
    ("GET", "/static/page.css"),
    ("GET", "/nothing"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
]


def test_without_a_token_nothing_is_served(page):
    _, urls = page
    assert len(ROUTES) == 14
    for method, path in ROUTES + OTHERS:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Cookie": "annotate_x=wrong"}):
            status, sent, text = raw(
                urls["anna"], path, method=method, body=b"{}" if method == "POST" else None, **headers
            )
            assert status == 401, (method, path, status)
            assert "token" in text and "anna" not in text and "set-cookie" not in sent
    assert raw(urls["anna"], "/?token=wrong")[0] == 401
    assert raw(urls["anna"], "/progress?token=" + token_of(urls["anna"]))[0] == 401  # only the door takes it


def test_under_another_name_nothing_is_served(page):
    _, urls = page
    token = token_of(urls["anna"])
    assert raw(urls["anna"], "/api/me", Authorization=f"Bearer {token}")[0] == 200
    assert raw(urls["anna"], "/api/me", Authorization=f"Bearer {token}", Host="evil.example")[0] == 403


def test_it_is_reached_under_the_name_of_its_host_in_any_case():
    def status(app, name):
        sent = []

        async def receive():
            return {"type": "http.request", "body": b""}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": [(b"host", name)]}
        asyncio.run(app(scope, receive, send))
        return sent[0]["status"]

    app = empty_app(host="MyBox.example")
    assert [status(app, name) for name in (b"mybox.example:80", b"MYBOX.example", b"localhost")] == [401] * 3
    assert status(app, b"example") == 403


def test_a_page_on_the_network_says_under_which_names_it_is_reached(tmp_path, capfd):
    with running_page(tmp_path / "f.sqlite", ("anna",), "--host", "0.0.0.0") as running:
        base = running.urls["anna"].replace("0.0.0.0", "127.0.0.1")
        status, _, text = raw(base, "/", Host="mybox")
    assert status == 403 and "--host NAME" in text
    assert (
        "these names only: 127.0.0.1, localhost, ::1, 0.0.0.0; under another with --host NAME" in capfd.readouterr().err
    )


def test_the_door_takes_the_token_out_of_the_address(page):
    _, urls = page
    status, headers, text = raw(urls["anna"], "/?" + urls["anna"].partition("?")[2])
    cookie = headers["set-cookie"]
    assert status == 200 and "url=/" in text and "token" not in text
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie
    status, headers, text = raw(urls["anna"], "/", Cookie=cookie.split(";")[0])
    assert status == 200 and "Instructions" in text
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy and "form-action 'none'" in policy
    assert headers["referrer-policy"] == "same-origin" and headers["cache-control"] == "no-store"
    assert "<script>" not in text and 'style="' not in text and "http://" not in text and "https://" not in text


def test_the_cookie_is_not_the_token_and_ends(page):
    _, urls = page
    token = token_of(urls["anna"])
    _, headers, _ = raw(urls["anna"], "/?token=" + token)
    name, _, value = headers["set-cookie"].split(";")[0].partition("=")
    assert token not in headers["set-cookie"] and f"Max-Age={14 * 86_400}" in headers["set-cookie"]
    assert raw(urls["anna"], "/api/me", Cookie=f"{name}={value}")[0] == 200
    later = int(value.split(".")[0])
    assert is_session(value, token, later - 1) and not is_session(value, token, later)
    assert session_cookie(token, later) == value
    over = session_cookie(token, int(time.time()) - 1)
    longer = f"{later + 9}.{value.split('.')[1]}"
    for wrong in (
        token,
        over,
        longer,
        session_cookie("other", later),
        "",
        ".",
        "1e9.x",
        "9" * 5000 + ".x",
        "\u0663.x",
        '"\udc80"',
    ):
        assert not is_session(wrong.encode(errors="replace").decode(), token, 0 if wrong != over else time.time())
    for wrong in (token, over, longer):
        assert raw(urls["anna"], "/api/me", Cookie=f"{name}={wrong}")[0] == 401
    assert raw(urls["anna"], "/api/me", Authorization=f"Bearer {value}")[0] == 401  # and opens nothing elsewhere


def test_a_link_of_another_site_changes_no_rater_unasked(page):
    _, urls = page
    cookie = raw(urls["anna"], "/?token=" + token_of(urls["anna"]))[1]["set-cookie"].split(";")[0]
    door = "/?token=" + token_of(urls["ben"])
    status, headers, text = raw(urls["ben"], door, Cookie=cookie, **{"Sec-Fetch-Site": "cross-site"})
    assert status == 200 and "set-cookie" not in headers and "works here as anna" in text and "Go on as ben" in text
    for more in (
        {"Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
        {},
    ):  # that page's link; an address typed in
        assert "set-cookie" in raw(urls["ben"], door, Cookie=cookie, **more)[1]
    assert "set-cookie" in raw(urls["ben"], door, **{"Sec-Fetch-Site": "cross-site"})[1]  # nobody works here yet


@pytest.mark.parametrize(
    "change, status",
    [
        ({}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": None}, 403),
        ({"X-CSRF-Token": None}, 403),
        ({"X-CSRF-Token": "0" * 64}, 403),
        ({"X-CSRF-Token": "é"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Origin": "http://[::1"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),  # a name that was pointed at this machine
        ({"Host": "localhost:8888", "Origin": "http://localhost:8888"}, 200),  # through a tunnel
    ],
)
def test_posts_from_elsewhere_are_refused(fresh, change, status):
    _, urls = fresh
    headers = post_headers(urls["anna"], **change)
    for path in [path for method, path in ROUTES if method == "POST"] if status != 200 else ["/api/next"]:
        found = raw(urls["anna"], path, method="POST", body=b"{}", **headers)
        assert found[0] == status, (path, found)


def test_the_csrf_token_of_another_rater_is_of_no_use(fresh):
    _, urls = fresh
    headers = post_headers(urls["anna"], **{"X-CSRF-Token": csrf_token(token_of(urls["ben"]))})
    assert raw(urls["anna"], "/api/next", method="POST", body=b"{}", **headers)[0] == 403


def socket_reply(url, head, body):
    """The status line of the reply to a post written byte by byte: `head` are further header lines."""
    host, port = url.split("/?")[0].removeprefix("http://").split(":")
    lines = [f"{name}: {value}" for name, value in post_headers(url).items()] + [f"Host: {host}:{port}", *head]
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall("\r\n".join(["POST /api/next HTTP/1.1", *lines, "Connection: close", "", ""]).encode())
        with contextlib.suppress(OSError):  # refused before all of it was sent
            connection.sendall(body)
        return connection.recv(100).decode().splitlines()[0]


def test_the_bytes_of_a_post_are_counted_whatever_it_says_of_its_length(fresh):
    _, urls = fresh
    chunk = b"fffff\r\n" + b" " * 0xFFFFF + b"\r\n"
    small, large = b"2\r\n{}\r\n0\r\n\r\n", chunk * 3 + b"2\r\n{}\r\n0\r\n\r\n"
    for head, codes in (
        (["Transfer-Encoding: chunked", "Content-Length: 2"], ["200", "413"]),
        (["Transfer-Encoding: chunked"], ["411", "411"]),
    ):
        assert [socket_reply(urls["anna"], head, body).split()[1] for body in (small, large)] == codes
    assert socket_reply(urls["anna"], ["Content-Length: 2"], b"{}").split()[1] == "200"
    assert socket_reply(urls["anna"], [f"Content-Length: {MAX_BODY + 1}"], b"{}").split()[1] == "413"


def test_a_post_of_very_many_lists_is_refused_unread(fresh):
    """While `json` makes a million lists, the page's only thread answers nobody."""
    _, urls = fresh
    body = b'{"x": [' + b"[]," * MAX_BRACKETS + b"1]}"
    found = raw(urls["anna"], "/api/next", method="POST", body=body, **post_headers(urls["anna"]))
    assert found[0] == 413 and f"at most {MAX_BRACKETS} brackets" in json.loads(found[2])["error"]
    body = json.dumps({"x": "[{" * (MAX_BRACKETS // 2 - 2)}).encode()
    assert raw(urls["anna"], "/api/next", method="POST", body=body, **post_headers(urls["anna"]))[0] == 200


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" + 400 * "0" + ".0", "NaN", "Infinity"])
def test_a_number_that_is_none_is_a_bad_post(fresh, number):
    _, urls = fresh
    for path in [path for method, path in ROUTES if method == "POST"]:
        body = f'{{"request": "12345678", "task": "x", "seconds": {number}, "payload": {{"value": {number}}}}}'.encode()
        found = raw(urls["ben"], path, method="POST", body=body, **post_headers(urls["ben"]))
        assert found[0] == 400 and "no valid JSON" in json.loads(found[2])["error"], (path, found)


def test_a_fault_of_the_page_has_the_headers_of_all_responses(monkeypatch, caplog):
    """Whatever goes wrong: JSON, the content-security policy, and the reason in the terminal, not in the browser."""
    from starlette.testclient import TestClient

    app = empty_app(tokens={"anna": "secret"})  # without a service, every request for one fails
    client = TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=True)
    found = client.get("/api/me", headers={"Authorization": "Bearer secret"})
    assert found.status_code == 500 and found.json() == {"error": "the page made a mistake; its terminal says which"}
    assert "default-src 'none'" in found.headers["content-security-policy"] and "AttributeError" in caplog.text


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"task": NaN}', b'{"request": "short", "task": "x"}', b"[" * 100_000])
def test_bad_posts_are_answered_with_what_is_wrong(fresh, body):
    _, urls = fresh
    status, _, text = raw(urls["anna"], "/api/answer", method="POST", body=body, **post_headers(urls["anna"]))
    assert status == 400 and json.loads(text)["error"]
