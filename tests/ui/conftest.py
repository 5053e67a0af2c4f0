"""A running annotation page, for requests and for a real browser."""

import pytest

from rlaif_jax.feedback.people.queue import TaskQueue
from rlaif_jax.recipes.world.crowd import PageClient, running_page
from tests.ui.page_browser import RATERS, model_server


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(store, rater -> address) of a page with two people and a program."""
    store = tmp_path_factory.mktemp("page") / "feedback.sqlite"
    with running_page(
        store, ("anna", "ben", "robot"), "--simulated", "robot", "--seed", "3", "--coordinator", "ben"
    ) as running:
        yield store, running.urls


@pytest.fixture
def fresh(page):
    """The page with no open tasks and everybody past the check."""
    store, urls = page
    with TaskQueue(store) as queue:
        queue.withdraw([queued.task.id for queued in queue.tasks()])
    for url in urls.values():
        PageClient(url).call("/api/check", {"answers": [1, 2]})
    return store, urls


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """(store, rater -> address) of a page with five raters and a chat model."""
    for module in ("fastapi", "uvicorn"):
        pytest.importorskip(module, reason="the annotation page is an extra: pip install -e '.[ui]'")
    pytest.importorskip("openai", reason="the page's chat talks to a served model with the package openai")
    store = tmp_path_factory.mktemp("page") / "feedback.sqlite"
    with model_server() as url, running_page(store, RATERS, "--model", url) as page:
        yield store, page.urls
