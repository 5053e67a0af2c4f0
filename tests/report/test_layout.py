"""The page in a real browser, as wide as a screen and as narrow as a phone."""

import json

import pytest

from rlaif_jax.report import report
from rlaif_jax.report.environment import save_environment
from tests.report.pages import sample, write_json, write_samples
from tests.report.test_report import add_feedback

LONG = "an_unbroken_word_" * 40


def whole_page(run):
    """Writes a page with every section, and with words that no screen is wide enough for."""
    add_feedback(run)
    save_environment(run)
    write_samples(
        run,
        *(
            sample(
                stage,
                i,
                LONG,
                chosen=how,
                prompt=LONG,
                reward=0.5,
                gold=0.25,
                second_opinion=-7.25,
                reasons=LONG,
                credit="log_ratio",
                tokens=[[LONG, 1.0]],
            )
            for stage in ("before", "after", "rl")
            for how in ("random", "worst")
            for i in range(3)
        ),
    )
    summary = json.loads((run / "summary.json").read_text())
    metrics = summary["metrics"] | {LONG: 1.0, f"{LONG}_text": LONG, "labeler_sha256": "89ef" * 16}
    summary |= {"metrics": metrics, "story": [LONG, "It got better."], "verdict": "better", "command": LONG}
    summary |= {"warnings": [f"{LONG} Try: {LONG}"], "missing": {LONG: 3}, "stages": {LONG: "made"}, "seed": LONG}
    summary["checks"] |= {LONG: False}
    summary["claims"][0]["claim"] = LONG
    write_json(run, "config.json", {LONG: {LONG: LONG}})
    write_json(run, "summary.json", summary)
    return report.write_report(run)


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_screen(run, browser, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(whole_page(run).as_uri())
    page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.eval_on_selector_all(
        ".panel, .card b, .warnings, figure svg", "all => all.map(x => [x.className, x.getBoundingClientRect().right])"
    )
    assert len(boxes) > 30
    assert all(right <= width for _, right in boxes)
    if width == 390:  # tables become lists, so that nobody has to scroll sideways inside a panel either
        wider = page.eval_on_selector_all(".panel", "all => all.filter(x => x.scrollWidth > x.clientWidth).length")
        assert wider == 0
    page.close()


def test_a_title_leads_to_its_entry_in_the_glossary(run, browser):
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(report.write_report(run).as_uri())
    link = page.locator(".card a", has_text="KL to the reference")
    link.focus()
    page.keyboard.press("Enter")
    entry = page.locator("#term-kl")
    assert entry.evaluate("entry => entry.matches(':target')")
    box = entry.bounding_box()
    assert 0 <= box["y"] < 800
    page.close()


def test_the_warnings_are_on_the_first_screen_of_a_phone(run, browser):
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"status": "diverged", "warnings": ["Step 40: it went wrong. Try: less."], "verdict": "worse"}
    write_json(run, "summary.json", summary | {"checks": {}})
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(report.write_report(run).as_uri())
    box = page.locator("#warnings").bounding_box()
    assert box["y"] + box["height"] < 800
    page.close()
