"""A rater at the annotation page in a real browser, and a chat model for the page to talk to."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from rlaif_jax.feedback.people.kinds import CHAT, COMMENT, COMPARE, EDIT, RANK, RATE
from rlaif_jax.feedback.people.queue import TaskQueue
from rlaif_jax.feedback.people.tasks import PersonTask
from rlaif_jax.feedback.records.forms import Ranking, Rater
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.recipes.world.crowd import PageClient

SUGGESTION = Ranking(prompt="Which?", answers=("yes", "no"), rater=Rater("judge", "ai", "gpt"), ranks=(1, 2))


TASKS = {
    "compare": PersonTask(kind=COMPARE, prompt="Which?", answers=("yes", "no"), suggestion=SUGGESTION),
    "rank": PersonTask(kind=RANK, prompt="Order!", answers=("alpha", "beta", "gamma")),
    "rate": PersonTask(kind=RATE, prompt="How?", answers=("so",), low=1, high=10, principle="How kind is it?"),
    "edit": PersonTask(kind=EDIT, prompt="Mend!", answers=("The mill 🎉 is new.",), labels=("fact", "style")),
    "comment": PersonTask(kind=COMMENT, prompt="Say!", answers=("something",), labels=("tone", "facts")),
    "chat": PersonTask(kind=CHAT, prompt="Talk about mills."),
}


RATERS = ("mouse", "keys", "phone", "evil", "other")


class Model(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that repeats the last message."""

    def do_POST(self):
        said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
        text = f"<b>You said</b> {said[-1]['content']} ({len(said)} messages)"
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        body = json.dumps(
            {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def model_server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Model) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


@contextmanager
def opened(browser, running, rater, tasks, *, width=1280, check=True, expected="nothing", **more):
    """(the page in the browser, a function that returns the rater's judgements that were not undone).

    Asserts at the end that nothing went wrong.
    """
    store, urls = running
    with TaskQueue(store) as queue:
        queue.withdraw([queued.task.id for queued in queue.tasks()])
        queue.put(tasks, overlap=len(RATERS))
    if check:
        PageClient(urls[rater]).call("/api/check", {"answers": [1, 2]})
    context = browser.new_context(viewport={"width": width, "height": 844}, **more)
    page = context.new_page()
    page.set_default_timeout(8000)
    base, problems, asked = urls[rater].split("/?")[0], [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: (problems.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.on("pageerror", lambda error: problems.append(f"error {error}"))
    page.on("console", lambda line: problems.append(f"{line.text} {line.location}") if line.type == "error" else None)
    page.goto(urls[rater])
    page.wait_for_url(base + "/")

    def judgements():
        with Store(store) as kept:
            prompts = {task.prompt for task in tasks}
            mine = [j for j in kept.judgements() if j.rater.name == rater]
            return [j for j in mine if j.prompt in prompts or "Human:" in j.prompt]

    yield page, judgements
    assert [problem for problem in problems if expected not in problem] == []
    assert asked and all(url.startswith(base + "/") for url in asked)
    context.close()


def on_screen(page):
    """The texts of the answers in their order on the screen."""
    return page.locator("article .text, .ranking .text").all_inner_texts()


def settled(page, done):
    """Wait for the screen that follows this number of tasks."""
    page.wait_for_selector(f'body[data-done="{done}"]')


def one(records, form):
    found = [record for record in records if isinstance(record, form)]
    assert len(found) == 1, found
    return found[0]
