"""The page in a real browser: hostile texts, a phone's width, lost replies, adjudication."""

import time
from pathlib import Path

import pytest

from rlaif_jax.feedback.people.kinds import COMMENT, COMPARE, EDIT, RANK, RATE
from rlaif_jax.feedback.people.queue import TaskQueue
from rlaif_jax.feedback.people.tasks import PersonTask
from rlaif_jax.feedback.records.forms import Comment, Correction, Ranking, Rating
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.recipes.world.crowd import PageClient
from tests.ui.page_browser import TASKS, on_screen, one, opened, settled

pytest.importorskip("fastapi", reason="the annotation page is an extra: pip install -e '.[ui]'")
pytest.importorskip("openai", reason="the page's chat talks to a served model with the package openai")
playwright = pytest.importorskip("playwright.sync_api", reason="drives the page with playwright (requirements-dev.txt)")

EVIL = (
    "<script>alert('script')</script> <img src=x onerror=\"alert('image')\"> [click](javascript:alert('link')) "
    "![pixel](http://evil.example/pixel.png) https://evil.example/ </div></body> &lt;b&gt; {{ 7 * 7 }}\n"
)
EVIL += "A long answer goes on. " * ((10_000 - len(EVIL)) // 23 + 1)


def test_hostile_and_long_texts_are_shown_as_text(browser, running):
    tasks = [
        PersonTask(kind=COMPARE, prompt=EVIL, answers=(EVIL, "short"), principle="<b>Which</b>?"),
        PersonTask(kind=RANK, prompt="e1", answers=(EVIL, "short")),
        PersonTask(kind=RATE, prompt="e2", answers=(EVIL,)),
        PersonTask(kind=EDIT, prompt="e3", answers=(EVIL,), labels=("<i>kind</i>",)),
        PersonTask(kind=COMMENT, prompt="e4", answers=(EVIL,), labels=("<i>aspect</i>",)),
    ]
    with opened(browser, running, "evil", tasks) as (page, judgements):
        for done, keys in enumerate([("b",), ("b",), ("3",), (), None]):
            settled(page, done)
            if done != 3:
                assert EVIL.strip() in [
                    text.strip() for text in page.locator("article .text, .ranking .text").all_text_contents()
                ]
            else:
                assert page.locator(".words").text_content() == EVIL
                assert page.locator("#edited").input_value() == EVIL
            assert page.locator("main script, main img, main a, main b, main i").count() == 0
            assert page.evaluate("document.documentElement.scrollWidth") <= 1280
            if keys is None:
                page.fill("#comment", EVIL)
                page.keyboard.press("Control+Enter")
            else:
                for key in (*keys, "Enter"):
                    page.keyboard.press(key)
            settled(page, done + 1)
        assert {type(j) for j in judgements()} == {Ranking, Rating, Correction, Comment}
        assert one(judgements(), Comment).text == EVIL.strip()
        for other in ("other", "evil"):  # and in what raters say about it
            page.goto(running[1][other])
            page.wait_for_selector("#begin, #done:not([hidden])")


def test_a_phone_shows_everything_without_scrolling_sideways(browser, running):
    with opened(browser, running, "phone", list(TASKS.values()), width=390) as (page, judgements):
        for done in range(len(TASKS)):
            settled(page, done)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            small = page.evaluate(
                "[...document.querySelectorAll('button, .choice')].filter(b => b.offsetParent && !b.disabled)"
                ".map(b => [b.textContent, b.getBoundingClientRect().height]).filter(([_, h]) => h < 32)"
            )
            assert small == []  # a finger needs some room
            nameless = page.evaluate(
                "[...document.querySelectorAll('textarea, input, select, button')].filter(f => !f.labels?.length && "
                "!f.getAttribute('aria-label') && !f.textContent.trim()).map(f => f.outerHTML)"
            )
            assert nameless == []
            page.click("#skip-button")
            page.wait_for_selector("#skip[open]")
            page.click("#skip-now")
            settled(page, done + 1)
        skipped = [j for j in judgements() if j.status == "abstained"]
        assert len(skipped) == len(TASKS) - 1 and {j.raw for j in skipped} == {
            "I cannot tell"
        }  # a chat leaves no record


def test_a_finger_marks_what_it_selects(browser, running):
    task = PersonTask(kind=EDIT, prompt="touched", answers=("The old mill is new.",))
    with opened(browser, running, "phone", [task], width=390, has_touch=True) as (page, judgements):
        select = """([from, to]) => getSelection().setBaseAndExtent(
            document.querySelector(".words span:nth-child(3)").firstChild, from,
            document.querySelector(".words span:nth-child(5)").firstChild, to)"""
        page.tap(".words")
        page.evaluate(select, [0, 2])  # a handle is dragged: no pointer event
        page.evaluate(select, [0, 4])
        button = page.get_by_role("button", name="Mark the selection")
        playwright.expect(button).to_be_enabled()
        assert page.evaluate("String(getSelection())") == "old mill"  # the handles are still there
        page.evaluate("getSelection().removeAllRanges()")  # as a tap elsewhere does
        page.wait_for_selector(".words .selected")
        assert "".join(page.locator(".words .selected").all_text_contents()) == "old mill"
        button.tap()
        assert page.inner_text(".marks li span") == "old mill"
        page.tap("#submit")
        settled(page, page.evaluate("document.getElementById('bar').max"))
        assert [(s.start, s.end) for s in one(judgements(), Correction).spans] == [(4, 12)]


def test_an_answer_whose_acknowledgement_is_lost_counts_once(browser, running):
    task = PersonTask(kind=RATE, prompt="lost", answers=("x",))
    with opened(browser, running, "other", [task], expected="net::ERR_FAILED") as (page, judgements):
        lost, held = [], []

        def lose(route):
            lost.append(route.request.post_data)
            if len(lost) == 3:
                return held.append(route)
            if len(lost) == 2:
                route.fetch(max_retries=3)  # arrives, but its answer does not; a connection that was idle may be closed
            route.abort()

        page.wait_for_selector("text=lost")
        page.route("**/api/answer", lose)
        page.keyboard.press("4")
        page.wait_for_selector("input[value='4']:checked")
        page.keyboard.press("Enter")
        deadline = time.monotonic() + 30
        while not held and time.monotonic() < deadline:
            page.wait_for_timeout(20)
        assert held, f"sent {len(lost)} times, not three"
        page.wait_for_selector("text=Trying again")
        held[0].continue_()
        settled(page, 1)
        assert len(lost) == 3 and len(set(lost)) == 1
        assert one(judgements(), Rating).value == 4


def test_what_was_written_survives_a_reload(browser, running):
    task = PersonTask(kind=COMMENT, prompt="draft", answers=("x",))
    with opened(browser, running, "other", [task]) as (page, _):
        page.fill("#comment", "half a thought")
        page.reload()
        page.wait_for_selector("#comment")
        assert page.input_value("#comment") == "half a thought"


def test_the_coordinator_adjudicates_stops_and_exports(browser, running):
    store, urls = running
    task = PersonTask(kind=COMPARE, prompt="dispute", answers=("yes", "no"))
    with opened(browser, running, "mouse", [task]) as (page, _):
        for rater, wanted in (("phone", "yes"), ("other", "no")):
            client = PageClient(urls[rater])
            shown = client.next()
            client.answer(shown, {"choice": ("first", "second")[shown["answers"].index(wanted)]})
        own = PageClient(urls["mouse"])  # the coordinator's own say comes before the others' are shown
        own.answer(own.next(), "cannot tell")
        page.click("text=Progress")
        page.wait_for_selector("text=Krippendorff's alpha")
        assert "0 %" in page.inner_text("#team") and "phone" in page.inner_text("#team")
        page.click("#stop")
        page.click("#yes")
        page.wait_for_selector("#stopped:not([hidden])")
        with TaskQueue(store) as queue:
            assert queue.team.stop_requested()
        page.click("#stop")  # taken back
        page.wait_for_selector("#stopped", state="hidden")
        with page.expect_download() as download:
            page.click("text=Final records")
        assert "dispute" in Path(download.value.path()).read_text()
        page.click("text=Adjudicate")
        page.wait_for_selector(".opinions")
        while "dispute" not in page.inner_text("#task"):  # disputes of the sessions before
            page.click("#later")
            page.wait_for_selector(".opinions")
        page.click(f"article >> nth={on_screen(page).index('no')}")
        page.click("#decide")
        page.wait_for_selector("#later, #none")
    with Store(store) as kept:
        (decided,) = [j for j in kept.judgements() if j.rater.name == "adjudicated by mouse"]
    assert decided.answers[decided.ranks.index(1)] == "no"
