"""The command: its settings, its check, and a page that is killed and started again."""

import json
import os
import signal
import stat
import subprocess
import sys

import pytest

pytest.importorskip("fastapi", reason="the annotation page is an extra: pip install -e '.[ui]'")
pytest.importorskip("uvicorn", reason="the annotation page is an extra: pip install -e '.[ui]'")

from rlaif_jax.config import UserError
from rlaif_jax.feedback.people.kinds import RATE
from rlaif_jax.feedback.people.queue import TaskQueue
from rlaif_jax.feedback.people.tasks import PersonTask
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.recipes.world.crowd import PageClient, running_page
from rlaif_jax.ui.annotate import AnnotateConfig, read_check
from rlaif_jax.ui.tokens import rater_tokens, token_file
from tests.ui.page_requests import put

RATED = [PersonTask(kind=RATE, prompt=f"q{i}", answers=(f"a{i}",), high=10) for i in range(3)]


def test_the_page_says_who_answers(page):
    store, _ = page
    with TaskQueue(store) as queue:
        assert queue.team.raters == {"anna", "ben", "robot"}


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


def test_settings_that_cannot_be(tmp_path):
    for wrong, words in [
        ({"raters": ("a", "a")}, "two raters"),
        ({"raters": ("a", "\udcff")}, "no UTF-8 text"),
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
    assert "(import of fastapi halted; None in sys.modules): pip install -e '.[ui]' in" in done.stdout, done.stderr
