"""Requests to a running annotation page: tasks for it, and raw HTTP."""

import urllib.error
import urllib.request

from rlaif_jax.feedback.people.queue import TaskQueue
from rlaif_jax.ui.tokens import csrf_token


def put(store, tasks, **more):
    """Puts tasks on the page of a store."""
    with TaskQueue(store) as queue:
        queue.put(tasks, **more)


def raw(url, path, *, method="GET", body=None, **headers):
    """(status, headers, text) of one request with exactly these headers."""
    request = urllib.request.Request(url.split("/?")[0] + path, body, headers, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as response:
            return response.status, response.headers, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read().decode()


def token_of(url):
    """The token in a rater's address."""
    return url.partition("token=")[2]


def post_headers(url, **changes):
    """Headers with which a rater's post is let in; a change to None leaves a header out."""
    token = token_of(url)
    headers = {
        "Authorization": f"Bearer {token}",
        "Origin": url.split("/?")[0],
        "X-CSRF-Token": csrf_token(token),
        "Content-Type": "application/json",
    }
    return {name: value for name, value in (headers | changes).items() if value is not None}
