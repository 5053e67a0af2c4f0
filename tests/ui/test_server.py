"""The page over HTTP, in a process of its own: who is let in, what a post needs, what is on disk when it is acknowledged."""

import asyncio
import dataclasses
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the annotation page is an extra: pip install 'rlaif-jax[ui]'")
pytest.importorskip("uvicorn", reason="the annotation page is an extra: pip install 'rlaif-jax[ui]'")

from rlaif_jax.config import UserError
from rlaif_jax.feedback.people.kinds import COMPARE, EDIT, RATE
from rlaif_jax.feedback.people.queue import TaskQueue
from rlaif_jax.feedback.people.tasks import PersonTask
from rlaif_jax.feedback.records.forms import Ranking, Rater, Rating
from rlaif_jax.feedback.records.parsing import from_json
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.recipes.crowd import PageClient, _printed_urls, answer_through_page, running_page
from rlaif_jax.ui.annotate import AnnotateConfig, read_check
from rlaif_jax.ui.tokens import csrf_token, rater_tokens, token_file

PAIRS = [PersonTask(kind=COMPARE, prompt=f"p{i}", answers=(f"good {i}", f"bad {i}")) for i in range(4)]
SUGGESTED = PersonTask(
    kind=COMPARE,
    prompt="suggested",
    answers=("one", "two"),
    suggestion=Ranking(
        prompt="suggested", answers=("one", "two"), rater=Rater("judge", "ai", "secret-model"), ranks=(1, 2)
    ),
    generators=("writer-one", "writer-two"),
)
RATED = [PersonTask(kind=RATE, prompt=f"q{i}", answers=(f"a{i}",), high=10) for i in range(3)]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
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


def put(store, tasks, **more):
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


def empty_app(**more):
    from rlaif_jax.ui.server import create_app

    class Nothing:
        store = type("S", (), {"path": Path("x")})

    return create_app(Nothing(), {}, instructions="", **more)


def routes():
    app = empty_app()
    return [(method, route.path) for route in app.routes if hasattr(route, "methods") for method in route.methods]


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
    assert (
        raw(urls["anna"], "/progress?token=" + urls["anna"].partition("token=")[2])[0] == 401
    )  # only the door takes it


def test_under_another_name_nothing_is_served(page):
    _, urls = page
    token = urls["anna"].partition("token=")[2]
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
    base, _, token = urls["anna"].partition("/?token=")
    headers = {
        "Authorization": f"Bearer {token}",
        "Origin": base,
        "X-CSRF-Token": csrf_token(token),
        "Content-Type": "application/json",
    }
    headers = {name: value for name, value in (headers | change).items() if value is not None}
    for path in [path for method, path in ROUTES if method == "POST"] if status != 200 else ["/api/next"]:
        found = raw(urls["anna"], path, method="POST", body=b"{}", **headers)
        assert found[0] == status, (path, found)


def test_anothers_csrf_token_is_of_no_use(fresh):
    _, urls = fresh
    base, _, token = urls["anna"].partition("/?token=")
    other = csrf_token(urls["ben"].partition("token=")[2])
    headers = {
        "Authorization": f"Bearer {token}",
        "Origin": base,
        "X-CSRF-Token": other,
        "Content-Type": "application/json",
    }
    assert raw(urls["anna"], "/api/next", method="POST", body=b"{}", **headers)[0] == 403


def test_the_view_is_blind_and_the_suggestion_comes_after(fresh):
    store, urls = fresh
    put(store, [SUGGESTED])
    client = PageClient(urls["anna"])
    task = client.next()
    seen = json.dumps(task) + raw(urls["anna"], "/", Authorization="Bearer " + urls["anna"].partition("token=")[2])[2]
    assert "writer-" not in seen and "secret-model" not in seen and "suggestion" not in seen
    told = client.answer(task, {"choice": "first"}, 3.0)
    better = task["answers"].index("one")
    assert told["suggestion"] == {"judge": "secret-model", "says": f"the {('first', 'second')[better]} is better"}
    client.undo()
    again = client.answer(task, {"choice": "second"})
    with Store(store) as kept:
        (record,) = [j for j in kept.judgements() if j.id in again["recorded"]]
    assert record.raw == "[after seeing the suggestion]" and record.generators == ("writer-one", "writer-two")


def test_who_has_once_seen_the_suggestion_is_informed_for_good(fresh):
    store, urls = fresh
    asked = dataclasses.replace(SUGGESTED, principle="kind?", suggestion=dataclasses.replace(SUGGESTED.suggestion))
    put(store, [asked])
    client = PageClient(urls["anna"])
    task = client.next()
    client.answer(task, "not yet")  # a skip shows nothing
    client.undo()
    blind = client.answer(task, {"choice": "first"})
    client.undo()
    client.answer(task, "cannot tell")
    client.undo()
    seeing = client.answer(task, {"choice": "first"})
    with Store(store) as kept:
        notes = {e.judgement.id: e.judgement.raw for e in kept.read(superseded=True)}
    assert notes[blind["recorded"][0]] == "" and notes[seeing["recorded"][0]] == "[after seeing the suggestion]"


def test_half_a_character_locks_nobody_out(fresh):
    store, urls = fresh
    half = "\ud83d"
    put(store, [PersonTask(kind=EDIT, prompt=half, answers=("x" + half,), labels=(half,))])
    client = PageClient(urls["anna"])
    task = client.next()
    assert (task["prompt"], task["answers"], task["labels"]) == (half, ["x" + half], [half])
    with pytest.raises(UserError, match=r"400.*unknown kind"):
        client.answer(task, {"edited": "x", "spans": [{"start": 0, "end": 1, "category": "y" + half}]})
    client.answer(task, {"edited": "x", "note": half})
    assert client.undo()["task"]["before"]["note"] == half


def test_a_post_counts_once_and_is_on_disk_before_it_is_acknowledged(fresh):
    store, urls = fresh
    put(store, RATED[:2])
    client = PageClient(urls["anna"])
    task = client.next()
    body = {"request": "a" * 16, "task": task["id"], "seconds": 9999, "payload": {"value": 7}}
    first, second = client.call("/api/answer", body), client.call("/api/answer", body)
    assert first == second
    with Store(store) as kept:
        records = [j for j in kept.judgements(form="rating") if j.prompt == task["prompt"]]
    assert [(r.id, r.value, r.rater.source) for r in records] == [(first["recorded"][0], 7.0, "person")]
    assert records[0].call.latency_s < 60  # no longer than the task was in hand
    with pytest.raises(UserError, match=r"409.*used before"):
        client.call("/api/answer", body | {"payload": {"value": 8}})
    with pytest.raises(UserError, match=r"409.*undo it first"):
        client.call("/api/answer", body | {"request": "b" * 16, "payload": {"value": 8}})
    with pytest.raises(UserError, match=r"400.*value is 11, off the scale 1 \.\. 10"):
        client.answer(client.next(), {"value": 11})


def test_undo_is_a_record(fresh):
    store, urls = fresh
    task = PersonTask(kind=RATE, prompt="undone", answers=("x",))
    put(store, [task])
    client = PageClient(urls["anna"])
    made = client.answer(client.next(), {"value": 2, "note": "hasty"})
    back = client.undo()["task"]
    assert back["id"] == task.id and back["before"] == {"value": 2, "note": "hasty"}
    with Store(store) as kept:
        assert not [j for j in kept.judgements() if j.prompt == "undone"]
        everything = [e.judgement for e in kept.read(superseded=True) if e.judgement.prompt == "undone"]
    assert [j.status for j in everything] == ["ok", "retracted"] and everything[1].supersedes == made["recorded"][0]
    assert client.next()["id"] == task.id
    with pytest.raises(UserError, match=r"400.*skip needs its reason"):
        client.answer(back, " ")
    client.answer(back, "cannot tell")
    with Store(store) as kept:
        assert [(j.status, j.raw) for j in kept.judgements() if j.prompt == "undone"] == [("abstained", "cannot tell")]


def test_a_program_answers_through_the_page_and_is_called_simulated(fresh):
    store, urls = fresh
    put(store, PAIRS)

    def better(task):
        good = [answer.startswith("good") for answer in task["answers"]]
        return {"choice": ("first", "second")[good.index(True)], "margin": 2}

    assert answer_through_page(urls["robot"], better) == len(PAIRS)
    with Store(store) as kept:
        records = [j for j in kept.judgements(source="simulated") if j.prompt.startswith("p")]
    assert len(records) == len(PAIRS)
    for record in records:
        assert record.answers[record.ranks.index(1)].startswith("good") and record.rater.name == "robot"
    assert len({record.shown for record in records}) == 2  # not always the same side


def test_a_run_waits_for_the_page(fresh):
    from rlaif_jax.feedback.people.source import PeopleSource

    store, urls = fresh
    done = threading.Event()
    count = lambda task: {"value": len(task["answers"][0])}
    arguments = {"wait_s": 60.0, "done": done.is_set}
    robot = threading.Thread(target=answer_through_page, args=(urls["robot"], count), kwargs=arguments)
    robot.start()
    people = PeopleSource(store, low=0, high=10, timeout_s=30, poll_s=0.02)
    for step in range(3):  # the tasks come step by step
        judged = people([{"prompt": f"step {step}"}] * 3, ["x" * step, "xxxxx", "xxxxx"], None)
        assert judged.valid.all() and judged.values.tolist() == pytest.approx([step / 10, 0.5, 0.5])
    done.set()
    robot.join()


def test_disagreement_is_counted_adjudicated_and_exported(fresh):
    store, urls = fresh
    tasks = [PersonTask(kind=RATE, prompt=f"shared {i}", answers=("x",)) for i in range(3)]
    put(store, tasks, overlap=2)
    given = {"anna": [1, 3, 5], "ben": [1, 3, 4]}
    for name, values in given.items():
        client = PageClient(urls[name])
        for value in values:
            client.answer(client.next(), {"value": value})
    anna, ben = PageClient(urls["anna"]), PageClient(urls["ben"])
    (row,) = [row for row in anna.call("/api/team")["agreement"] if row["kind"] == "rate"]
    assert row["units"] == 3 and row["same"] == pytest.approx(2 / 3)
    assert row["alpha"] == pytest.approx(
        0.935064935064935, abs=1e-9
    )  # krippendorff.alpha([[1, 3, 5], [1, 3, 4]], interval)
    (dispute,) = [d for d in ben.call("/api/disputes")["disputes"] if d["task"]["prompt"].startswith("shared")]
    assert [(o["rater"], o["says"][:1]) for o in dispute["opinions"]] == [("anna", "5"), ("ben", "4")]
    ben.call("/api/adjudicate", {"request": "c" * 16, "task": dispute["task"]["id"], "payload": {"value": 5}})
    assert not [d for d in ben.call("/api/disputes")["disputes"] if d["task"]["prompt"].startswith("shared")]
    token = {"Authorization": "Bearer " + urls["ben"].partition("token=")[2]}
    everything = [from_json(json.loads(line)) for line in raw(urls["ben"], "/export.jsonl", **token)[2].splitlines()]
    final = [from_json(json.loads(line)) for line in raw(urls["ben"], "/export.jsonl?final=1", **token)[2].splitlines()]
    assert sum(isinstance(j, Rating) and j.prompt == "shared 2" for j in everything) == 3
    assert [(j.rater.name, j.value) for j in final if j.prompt == "shared 2"] == [("adjudicated by ben", 5.0)]
    assert sum(j.prompt.startswith("shared") for j in final) == 5
    for path in ("/api/disputes", "/export.jsonl"):
        with pytest.raises(UserError, match=r"403.*only the coordinator"):
            anna.call(path)
    with pytest.raises(UserError, match=r"403.*only the coordinator"):
        anna.call("/api/stop", {"stop": True})


def test_the_page_says_who_answers(page):
    store, _ = page
    with TaskQueue(store) as queue:
        assert queue.team.raters == {"anna", "ben", "robot"}


@pytest.mark.parametrize("status", ["200 OK", "400 Bad Request"])
def test_an_answer_that_breaks_off_is_asked_for_again(status):
    body = b'{"task": null}'
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            for sent in (body[:5], body):
                with listening.accept()[0] as connection:
                    connection.recv(65_536)
                    connection.sendall(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + sent)

        threading.Thread(target=serve, daemon=True).start()
        client = PageClient(f"http://127.0.0.1:{listening.getsockname()[1]}/?token=x")
        if status.startswith("200"):
            assert client.call("/api/me") == {"task": None}
        else:
            with pytest.raises(UserError, match=r'/api/me: 400 \{"task": null\}'):
                client.call("/api/me")


def test_a_page_that_says_nothing_is_not_waited_for():
    started = time.monotonic()
    command = [sys.executable, "-c", "import time; time.sleep(20)"]
    words = pytest.raises(UserError, match=r"did not start within 0\.2 s")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as silent, words:
        _printed_urls(silent, ("anna",), 0.2)
    assert time.monotonic() - started < 15


def test_the_check_is_asked_first_and_explained(tmp_path):
    check = tmp_path / "check.json"
    check.write_text(json.dumps([{"question": "2 + 2?", "options": ["3", "4"], "answer": 1, "why": "Count."}]))
    with running_page(tmp_path / "f.sqlite", ("anna",), "--check", str(check)) as running:
        client = PageClient(running.urls["anna"])
        assert client.call("/api/me")["check"] == [{"question": "2 + 2?", "options": ["3", "4"]}]
        with pytest.raises(UserError, match=r"403.*pass the check"):
            client.next()
        assert client.call("/api/check", {"answers": [0]}) == {
            "passed": False,
            "wrong": [{"index": 0, "why": "Count."}],
        }
        assert client.call("/api/check", {"answers": [1]})["passed"] and client.next() is None


def test_a_killed_page_comes_back_with_its_records_and_the_same_addresses(tmp_path):
    store = tmp_path / "f.sqlite"
    put(store, RATED)
    with running_page(store, ("anna",)) as running:
        client = PageClient(running.urls["anna"])
        client.call("/api/check", {"answers": [1, 2]})
        made = client.answer(client.next(), {"value": 7})
        os.kill(running.process.pid, signal.SIGKILL)
        token = running.urls["anna"].partition("token=")[2]
    with Store(store) as kept:
        assert made["recorded"][0] in kept
    with running_page(store, ("anna",)) as running:
        assert running.urls["anna"].endswith(token)
        assert PageClient(running.urls["anna"]).call("/api/me")["progress"] == {"answered": 1, "skipped": 0, "left": 2}
    assert token.encode() not in store.read_bytes()
    assert stat.S_IMODE(token_file(store).stat().st_mode) == 0o600


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"task": NaN}', b'{"request": "short", "task": "x"}', b"[" * 100_000])
def test_bad_posts_are_told_what_is_wrong(fresh, body):
    _, urls = fresh
    base, _, token = urls["anna"].partition("/?token=")
    headers = {
        "Authorization": f"Bearer {token}",
        "Origin": base,
        "X-CSRF-Token": csrf_token(token),
        "Content-Type": "application/json",
    }
    status, _, text = raw(urls["anna"], "/api/answer", method="POST", body=body, **headers)
    assert status == 400 and json.loads(text)["error"]


def test_settings_that_cannot_be(tmp_path):
    for wrong, words in [
        ({"raters": ("a", "a")}, "two raters"),
        ({"overlap": 2}, "overlap is 2"),
        ({"coordinator": "x"}, "not among the raters"),
        ({"port": 70_000}, "port must lie"),
        ({"lease_minutes": 0}, "must be positive"),
    ]:
        with pytest.raises(UserError, match=words):
            AnnotateConfig(**wrong)
    bad = tmp_path / "check.json"
    for text, words in [("[]", "list of questions"), ("{", "check.json"), ('[{"question": "q"}]', "options")]:
        bad.write_text(text)
        with pytest.raises(UserError, match=words):
            read_check(bad)
    bad.write_text('[{"question": "q", "options": ["a"], "answer": 1}]')
    with pytest.raises(UserError, match=r"check.json: .*answer is 1; options has 1"):
        read_check(bad)
    token_file(tmp_path / "f").write_text("{")
    with pytest.raises(UserError, match="delete it"):
        rater_tokens(tmp_path / "f", ("a",))


def test_without_the_extra_the_message_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['fastapi'] = None\n"
        "from rlaif_jax.config import UserError\n"
        "from rlaif_jax.ui.annotate import AnnotateConfig, main\n"
        "try: main(AnnotateConfig())\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "pip install 'rlaif-jax[ui]'" in done.stdout, done.stderr
