"""Whole sessions in a real browser: every form by mouse, and by keyboard alone."""

import json

import pytest

from rlaif_jax.feedback.records.forms import Comment, Correction, Ranking, Rating, Span
from rlaif_jax.feedback.records.store import Store
from tests.ui.page_browser import TASKS, on_screen, one, opened, settled


def pass_check_by_mouse(page):
    page.click("#begin")  # nothing answered yet
    assert "every question" in page.inner_text("#notice")
    page.click("label[for=check-0-0]")
    page.click("label[for=check-1-2]")
    page.click("#begin")
    page.wait_for_selector("text=Not quite")
    page.click("label[for=check-0-1]")
    page.click("#begin")


def compare_by_mouse(page, judgements):
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


def rank_by_mouse(page, judgements):
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


def rate_by_mouse(page, judgements):
    page.wait_for_selector("text=How kind is it?")
    page.click("label[for=value-10]")
    page.click("#submit")
    settled(page, 3)
    assert one(judgements(), Rating).value == 10


def edit_by_mouse(page, judgements):
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


def comment_by_mouse(page, judgements):
    page.wait_for_selector("#comment")
    page.fill("#comment", "too short")
    page.click("label[for=aspect-1]")
    page.click("#submit")
    settled(page, 5)
    comment = one(judgements(), Comment)
    assert (comment.text, comment.aspects) == ("too short", ("facts",))


def chat_by_mouse(page, judgements):
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


def undo_and_skip_by_mouse(page, judgements):
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
def test_a_session_of_every_form_by_mouse(browser, running):
    with opened(browser, running, "mouse", list(TASKS.values()), check=False) as (page, judgements):
        pass_check_by_mouse(page)
        compare_by_mouse(page, judgements)
        rank_by_mouse(page, judgements)
        rate_by_mouse(page, judgements)
        edit_by_mouse(page, judgements)
        comment_by_mouse(page, judgements)
        chat_by_mouse(page, judgements)
        undo_and_skip_by_mouse(page, judgements)


def tab_to(page, selector):
    for _ in range(40):
        if page.evaluate(f"document.activeElement.matches({json.dumps(selector)})"):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{selector} is not reached by Tab")


def pass_check_by_keyboard(page):
    press = page.keyboard.press
    page.wait_for_selector("#begin")
    tab_to(page, "#check-0-0, [name=check-0]")
    press("Space")
    press("ArrowDown")
    tab_to(page, "[name=check-1]")
    press("Space")
    press("ArrowDown")
    press("ArrowDown")
    tab_to(page, "#begin")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"  # the focus is seen
    press("Enter")


def compare_by_keyboard(page, judgements, store):
    press = page.keyboard.press
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
    with Store(store) as kept:
        mine = [e.judgement for e in kept.read(superseded=True) if e.judgement.rater.name == "keys"]
    assert [j.status for j in mine] == ["ok", "retracted", "tie"]
    assert mine[0].ranks[mine[0].answers.index(answers[1])] == 1 and mine[0].strength == 5
    press("Enter")


def rank_by_keyboard(page, judgements):
    press = page.keyboard.press
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


def rate_by_keyboard(page, judgements):
    press = page.keyboard.press
    page.wait_for_selector("text=How kind is it?")
    press("?")
    page.wait_for_selector("#help[open]")
    assert "the score; 0 is 10" in page.inner_text("#help")
    press("Escape")
    press("0")
    press("Enter")
    settled(page, 3)
    assert one(judgements(), Rating).value == 10


def edit_by_keyboard(page, judgements):
    press = page.keyboard.press
    page.wait_for_selector("#edited")
    tab_to(page, "#edited")
    press("Control+End")
    page.keyboard.type(" Indeed.")
    press("Escape")
    tab_to(page, ".words")
    for key in ("ArrowRight", "ArrowRight", "Shift+ArrowRight", "m"):  # mill [🎉 is]
        press(key)
    press("Control+Enter")
    settled(page, 4)
    edited = one(judgements(), Correction)
    assert edited.edited == "The mill 🎉 is new. Indeed."
    assert [edited.answers[0][s.start : s.end] for s in edited.spans] == ["🎉 is"]


def comment_by_keyboard(page, judgements):
    press = page.keyboard.press
    page.wait_for_selector("#comment")
    press("1")
    tab_to(page, "#comment")
    page.keyboard.type("said with keys: t b s u ?")
    press("Control+Enter")
    settled(page, 5)
    comment = one(judgements(), Comment)
    assert (comment.text, comment.aspects) == ("said with keys: t b s u ?", ("tone",))


def chat_undo_and_skip_by_keyboard(page, judgements):
    press = page.keyboard.press
    page.wait_for_selector("#message")
    tab_to(page, "#message")
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


@pytest.mark.slow
def test_a_session_of_every_form_by_keyboard_alone(browser, running):
    with opened(browser, running, "keys", list(TASKS.values()), check=False) as (page, judgements):
        pass_check_by_keyboard(page)
        compare_by_keyboard(page, judgements, running[0])
        rank_by_keyboard(page, judgements)
        rate_by_keyboard(page, judgements)
        edit_by_keyboard(page, judgements)
        comment_by_keyboard(page, judgements)
        chat_undo_and_skip_by_keyboard(page, judgements)
