"""The page in a real browser: every form by mouse and by keyboard alone, hostile texts, a phone's width."""

import json
import shutil
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rlaif_jax.feedback.people.kinds import CHAT, COMMENT, COMPARE, EDIT, RANK, RATE
from rlaif_jax.feedback.people.queue import TaskQueue
from rlaif_jax.feedback.people.tasks import PersonTask
from rlaif_jax.feedback.records.forms import Comment, Correction, Ranking, Rater, Rating, Span
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.recipes.crowd import PageClient, running_page

pytest.importorskip("fastapi", reason="the annotation page is an extra: pip install 'rlaif-jax[ui]'")
pytest.importorskip("openai", reason="the page's chat talks to a served model with the package openai")
playwright = pytest.importorskip("playwright.sync_api", reason="drives the page with playwright (requirements-dev.txt)")

EVIL = (
    "<script>alert('script')</script> <img src=x onerror=\"alert('image')\"> [click](javascript:alert('link')) "
    "![pixel](http://evil.example/pixel.png) https://evil.example/ </div></body> &lt;b&gt; {{ 7 * 7 }}\n"
)
EVIL += "A long answer goes on. " * ((10_000 - len(EVIL)) // 23 + 1)
SUGGESTION = Ranking(prompt="Which?", answers=("yes", "no"), rater=Rater("judge", "ai", "gpt"), ranks=(1, 2))
TASKS = {
    "compare": PersonTask(kind=COMPARE, prompt="Which?", answers=("yes", "no"), suggestion=SUGGESTION),
    "rank": PersonTask(kind=RANK, prompt="Order!", answers=("alpha", "beta", "gamma")),
    "rate": PersonTask(kind=RATE, prompt="How?", answers=("so",), low=1, high=10, principle="How kind is it?"),
    "edit": PersonTask(kind=EDIT, prompt="Mend!", answers=("The mill 🎉 is new.",), labels=("fact", "style")),
    "comment": PersonTask(kind=COMMENT, prompt="Say!", answers=("something",), labels=("tone", "facts")),
    "chat": PersonTask(kind=CHAT, prompt="Talk about mills."),
}


class Model(BaseHTTPRequestHandler):
    """An OpenAI-compatible server of few words."""

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


RATERS = ("mouse", "keys", "phone", "evil", "other")


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    store = tmp_path_factory.mktemp("page") / "feedback.sqlite"
    with model_server() as url, running_page(store, RATERS, "--model", url) as page:
        yield store, page.urls


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if path is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip("needs Chromium: install it, or run `playwright install chromium`")
        found = driver.chromium.launch(executable_path=path)
        yield found
        found.close()


@contextmanager
def opened(browser, running, rater, tasks, *, width=1280, check=True, expected="nothing", **more):
    """(the page in the browser, a function that gives the rater's standing judgements); asserts that nothing went wrong."""
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
    """Wait for what comes after so many tasks."""
    page.wait_for_selector(f'body[data-done="{done}"]')


def one(records, form):
    found = [record for record in records if isinstance(record, form)]
    assert len(found) == 1, found
    return found[0]


@pytest.mark.slow
def test_a_session_of_every_form_by_mouse(browser, running):
    with opened(browser, running, "mouse", list(TASKS.values()), check=False) as (page, judgements):
        page.click("#begin")  # nothing answered yet
        assert "every question" in page.inner_text("#notice")
        page.click("label[for=check-0-0]")
        page.click("label[for=check-1-2]")
        page.click("#begin")
        page.wait_for_selector("text=Not quite")
        page.click("label[for=check-0-1]")
        page.click("#begin")

        page.wait_for_selector("text=Which?")  # compare: by the card itself
        answers = on_screen(page)
        assert "gpt" not in page.content()
        page.click("#submit")
        assert "Choose first" in page.inner_text("#notice")
        page.click(f"article >> nth={answers.index('no')}")
        page.click("label[for=margin-3]")
        page.fill("#note", "shorter")
        page.click("#submit")
        page.wait_for_selector("#reveal")
        place = ("first", "second")[answers.index("yes")]
        assert f"gpt: the {place} is better" in page.inner_text("#reveal")
        compared = one(judgements(), Ranking)
        assert compared.answers[compared.ranks.index(1)] == "no"
        assert (compared.strength, compared.raw, compared.rater.source) == (3.0, "shorter", "person")
        assert [compared.answers[i] for i in compared.shown] == answers
        page.click("#submit")

        page.wait_for_selector(".ranking")  # rank: by drag, the last one to the top
        last = on_screen(page)[-1]
        handle = page.locator(".rail >> nth=2").bounding_box()
        top = page.locator(".ranking .card >> nth=0").bounding_box()
        page.mouse.move(handle["x"] + 10, handle["y"] + 20)
        page.mouse.down()
        page.mouse.move(handle["x"] + 10, top["y"] + 4, steps=8)
        page.mouse.up()
        order = on_screen(page)
        assert order[0] == last
        page.click(".ranking .card >> nth=2 >> [aria-label='As good as the one above']")
        page.click("#submit")
        settled(page, 2)
        ranked = next(j for j in judgements() if j.prompt == "Order!")
        assert [ranked.ranks[ranked.answers.index(text)] for text in order] == [1, 2, 2]

        page.wait_for_selector("text=How kind is it?")
        page.click("label[for=value-10]")
        page.click("#submit")
        settled(page, 3)
        assert one(judgements(), Rating).value == 10

        page.wait_for_selector("#edited")  # edit, and mark a word
        page.fill("#edited", "The mill 🎉 is old.")
        page.wait_for_selector(".diff ins")
        assert (page.inner_text(".diff del"), page.inner_text(".diff ins")) == ("new", "old")
        page.select_option("#severity", "-2")
        page.select_option("#kind", "fact")
        page.dblclick(".words span:text-is('new')")
        page.click("text=Mark the selection")
        assert page.inner_text(".marks li span") == "new"
        page.click("#submit")
        settled(page, 4)
        edited = one(judgements(), Correction)
        start = edited.answers[0].index("new")
        assert edited.edited == "The mill 🎉 is old." and edited.spans == (Span(start, start + 3, -2.0, "fact"),)

        page.wait_for_selector("#comment")
        page.fill("#comment", "too short")
        page.click("label[for=aspect-1]")
        page.click("#submit")
        settled(page, 5)
        comment = one(judgements(), Comment)
        assert (comment.text, comment.aspects) == ("too short", ("facts",))

        page.wait_for_selector("#message")  # chat
        page.fill("#message", "hello")
        page.click("button:text-is('Send')")
        page.wait_for_selector("text=<b>You said</b> hello (2 messages)")
        page.fill("#message", "more")
        page.click("button:text-is('Send')")
        page.wait_for_selector("text=<b>You said</b> more (4 messages)")
        page.click("label[for=turn-1-4]")
        page.fill("#comment-1", "repeats me")
        page.click("#submit")
        page.wait_for_selector("text=Nothing to do for now")
        turn = next(j for j in judgements() if isinstance(j, Rating) and "Human:" in j.prompt)
        assert turn.value == 4 and turn.answers == ("<b>You said</b> more (4 messages)",)
        assert turn.prompt.endswith("Human: more\n\nAssistant:")
        assert any(isinstance(j, Comment) and j.text == "repeats me" for j in judgements())

        page.click("#undo")  # back to the chat, as it was left
        page.wait_for_selector("text=Taken back")
        assert page.is_checked("#turn-1-4") and not [j for j in judgements() if "Human:" in j.prompt]
        page.click("#skip-button")
        page.click("label:has-text('Other')")
        page.fill("#why", "tired")
        page.click("#skip-now")
        page.wait_for_selector("text=Nothing to do for now")
        assert all(record.call.latency_s is not None for record in judgements())


@pytest.mark.slow
def test_a_session_of_every_form_by_keyboard_alone(browser, running):
    with opened(browser, running, "keys", list(TASKS.values()), check=False) as (page, judgements):
        press = page.keyboard.press

        def tab_to(selector):
            for _ in range(40):
                if page.evaluate(f"document.activeElement.matches({json.dumps(selector)})"):
                    return
                press("Tab")
            raise AssertionError(f"{selector} is not reached by Tab")

        page.wait_for_selector("#begin")
        tab_to("#check-0-0, [name=check-0]")
        press("Space")
        press("ArrowDown")
        tab_to("[name=check-1]")
        press("Space")
        press("ArrowDown")
        press("ArrowDown")
        tab_to("#begin")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"  # the focus is seen
        press("Enter")

        page.wait_for_selector("text=Which?")
        answers = on_screen(page)
        press("t")
        press("ArrowRight")
        press("5")
        press("Enter")
        page.wait_for_selector("#reveal")
        press("u")  # seen otherwise: both are bad
        page.wait_for_selector("text=Taken back")
        press("b")
        press("Enter")
        page.wait_for_selector("#reveal")
        compared = one(judgements(), Ranking)
        assert compared.both_bad and compared.status == "tie" and compared.raw == "[after seeing the suggestion]"
        with Store(running[0]) as kept:
            mine = [e.judgement for e in kept.read(superseded=True) if e.judgement.rater.name == "keys"]
        assert [j.status for j in mine] == ["ok", "retracted", "tie"]
        assert mine[0].ranks[mine[0].answers.index(answers[1])] == 1 and mine[0].strength == 5
        press("Enter")

        page.wait_for_selector(".ranking")
        shown = on_screen(page)
        press("Enter")  # the order as shown is asked about first
        assert "order in which they were shown" in page.inner_text("#notice")
        press("ArrowDown")  # the first
        press("ArrowDown")
        press("Shift+ArrowUp")
        press("ArrowDown")
        press("3")
        assert on_screen(page) == [shown[1], shown[2], shown[0]]
        press("x")
        press("Enter")
        settled(page, 2)
        ranked = next(j for j in judgements() if j.prompt == "Order!")
        assert [ranked.ranks[ranked.answers.index(text)] for text in shown] == [None, 1, 2]

        page.wait_for_selector("text=How kind is it?")
        press("?")
        page.wait_for_selector("#help[open]")
        assert "the score; 0 is 10" in page.inner_text("#help")
        press("Escape")
        press("0")
        press("Enter")
        settled(page, 3)
        assert one(judgements(), Rating).value == 10

        page.wait_for_selector("#edited")
        tab_to("#edited")
        press("Control+End")
        page.keyboard.type(" Indeed.")
        press("Escape")
        tab_to(".words")
        for key in ("ArrowRight", "ArrowRight", "Shift+ArrowRight", "m"):  # mill [🎉 is]
            press(key)
        press("Control+Enter")
        settled(page, 4)
        edited = one(judgements(), Correction)
        assert edited.edited == "The mill 🎉 is new. Indeed."
        assert [edited.answers[0][s.start : s.end] for s in edited.spans] == ["🎉 is"]

        page.wait_for_selector("#comment")
        press("1")
        tab_to("#comment")
        page.keyboard.type("said with keys: t b s u ?")
        press("Control+Enter")
        settled(page, 5)
        comment = one(judgements(), Comment)
        assert (comment.text, comment.aspects) == ("said with keys: t b s u ?", ("tone",))

        page.wait_for_selector("#message")
        tab_to("#message")
        page.keyboard.type("hello")
        press("Enter")
        page.wait_for_selector("text=(2 messages)")
        press("Escape")
        press("2")
        press("Control+Enter")
        page.wait_for_selector("text=Nothing to do for now")
        assert next(j for j in judgements() if isinstance(j, Rating) and "Human:" in j.prompt).value == 2
        press("u")
        page.wait_for_selector("text=Taken back")
        press("s")
        press("3")
        press("Enter")
        page.wait_for_selector("text=1 of them skipped")


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
                route.fetch()  # arrives, but its answer does not
            route.abort()

        page.wait_for_selector("text=lost")
        page.route("**/api/answer", lose)
        page.keyboard.press("4")
        page.keyboard.press("Enter")
        while not held:
            page.wait_for_timeout(20)
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
