"""The page that compares runs: the numbers, curves, settings and warnings of each, escaped, in need of nothing outside."""

import json
import re

import pytest

from rlaif_jax.config import UserError
from rlaif_jax.metrics import MetricsWriter
from rlaif_jax.report import report
from rlaif_jax.report.compare import differing_settings, headline, number_rows, write_comparison
from rlaif_jax.report.curves import RUNS, Curves, overlay, run_line
from tests.report.pages import ATTACK, Page, finished_run, write_json


def change(folder, name, **values):
    write_json(folder, name, json.loads((folder / name).read_text()) | values)


@pytest.fixture
def runs(tmp_path):
    """Two finished runs; the second has another seed, other settings and other results."""
    first, second = finished_run(tmp_path / "first"), finished_run(tmp_path / "second & last")
    metrics = json.loads((second / "summary.json").read_text())["metrics"]
    metrics |= {"win_rate_gold": 0.4, "win_rate_gold_ci95": [0.31, 0.48], "kl": 3.25, "length_after": 70.0}
    change(second, "summary.json", metrics=metrics, seed=8, status="diverged", verdict="worse", steps=1234)
    change(second, "summary.json", error="step 5: the run has diverged", missing={"timeout": 3, "no score": 4})
    change(second, "summary.json", warnings=["The answers became long. Try: a penalty"], checks={})
    change(second, "config.json", out="elsewhere", ppo={"clip_range": 0.3, "policy": {"lr": 3e-6}}, judge="best")
    report.write_report(second)
    return first, second


def compared(*folders, out=None):
    return Page(write_comparison(folders, out or folders[0].parent / "compare.html").read_text(encoding="utf-8"))


def test_each_run_is_a_column(runs):
    page = compared(*runs)
    for words in (
        "2 runs compared",
        "first second & last Status done diverged Verdict - worse Warnings 1 1",  # of the first, a check that failed
        "Experiment quickstart quickstart Seed 0 8 Steps 5 1,234 Time 7 min 13 s 7 min 13 s Missing or not used - 7",
        "Win rate by gold 71.3 % 95 % interval [65.1 %, 77.2 %] 40.0 % 95 % interval [31.0 %, 48.0 %]",
        "KL to the reference 8.91 nats per answer 3.25 nats per answer",
        "Answer length, before → after 22.3 → 25.9 tokens 22.3 → 70.0 tokens",
        "ppo.clip_range 0.2 0.3 judge - best",
        "first A check failed: Loss finite.",
        "second & last step 5: the run has diverged The answers became long. Try: a penalty",
    ):
        assert words in page.text.replace("\N{NO-BREAK SPACE}", " ").replace("\N{EN DASH}", "-"), words
    terms = {value for tag, name, value in page.attributes if (tag, name) == ("div", "id")}
    links = {value[1:] for tag, name, value in page.attributes if (tag, name) == ("a", "href") and "#term" in value}
    assert terms == links and "term-kl" in terms and "term-wall-s" not in terms
    settings = page.text[page.text.index("Settings that differ") : page.text.index("A check failed")]
    assert "elsewhere" not in settings and "ppo.policy.lr" not in settings and "seed" not in settings


def test_links_lead_to_the_pages_that_there_are(runs):
    first, second = runs
    page = compared(first, second)
    links = [value for tag, name, value in page.attributes if (tag, name) == ("a", "href") and "report" in value]
    assert links == ["./second%20%26%20last/report.html"], "the first has no page yet"
    (second.parent / "pages").mkdir()
    page = compared(first, second, out=second.parent / "pages/compare.html")
    assert ("a", "href", "./../second%20%26%20last/report.html") in page.attributes


def test_the_same_name_twice_is_told_apart_by_the_path(tmp_path):
    folders = [finished_run(tmp_path / "a/run"), finished_run(tmp_path / "b/run"), finished_run(tmp_path / "c")]
    text = compared(*folders, out=tmp_path / "compare.html").text
    assert str(folders[0]) in text and str(folders[1]) in text and str(folders[2]) not in text


def test_all_that_runs_share_is_drawn_and_nothing_else(runs):
    with MetricsWriter(runs[0], terminal=False, sinks=()) as writer, writer.stage("rl", 6, resume_from=5) as stage:
        stage.write(6, {"reward": 0.2, "kl": 1.0, "distinct2": 0.5})
    page = compared(*runs)
    titles = re.findall(
        r"<figcaption>(.*?)</figcaption>", (runs[0].parent / "compare.html").read_text(), flags=re.DOTALL
    )
    titles = [re.sub(r"<[^>]*>", "", title).strip() for title in titles]
    assert titles[:4] == ["Reward", "Gold score", "KL to the reference", "Answer length"]
    assert "Distinct token pairs" not in titles and "Reward model · Loss" in titles
    assert page.tags.count("svg") == len(titles)
    assert "Entropy" in titles and "Clip fraction" not in titles, "only what everybody looks at first"


def rows(values, key="reward", stage="rl"):
    return [{"stage": stage, "step": step, key: value} for step, value in enumerate(values, 1)]


def heights(svg, color):
    """The y coordinates of the line of a colour, from the top of the plot."""
    path = re.search(rf'<path d="([^"]*)"[^>]*style="[^"]*stroke: {color}', svg)
    return [float(y) for y in re.findall(r"[ML] \S+ (\S+)", path[1])]


def test_lines_are_at_the_values_of_each_run_in_its_colour():
    runs = [Curves(rows([0.0, 2.0])), Curves(rows([1.0, 1.0])), Curves(rows([2.0, 0.0, 1.0]))]
    (plot,) = overlay(runs)
    low, high = heights(plot.svg, RUNS[0])
    assert low > high
    assert heights(plot.svg, RUNS[1]) == pytest.approx([(low + high) / 2] * 2, abs=1e-3)
    assert heights(plot.svg, RUNS[2]) == pytest.approx([high, low, (low + high) / 2], abs=1e-3)
    assert plot.label.title == "Reward" and plot.stage == "rl"


def test_a_share_is_drawn_in_percent_in_all_runs_and_gaps_are_gaps():
    (plot,) = overlay([Curves(rows([0.25, 0.5], "finished")), Curves(rows([0.75, None], "finished"))])
    ticks = {text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", plot.svg)}
    assert {"30", "60"} <= ticks and any("%" in tick for tick in ticks)
    assert overlay([Curves(rows([0.25])), Curves(rows([None]))]) == []
    assert overlay([Curves(rows([0.25])), Curves(rows([0.5], "kl"))]) == []


def test_a_long_series_is_drawn_as_its_running_mean():
    spiky = [0.0, 1.0] * 50
    (plot,) = overlay([Curves(rows(spiky)), Curves(rows([0.0] * 50 + [1.0] * 50))])
    middle = heights(plot.svg, RUNS[0])[20:-20]
    low, high = max(heights(plot.svg, RUNS[1])), min(heights(plot.svg, RUNS[1]))
    assert max(middle) - min(middle) < 0.3 * (low - high)


def test_measures_of_the_runs_come_first():
    rows_of = [*rows([1.0, 2.0]), *rows([0.0, 1.0], "eval_reward"), *rows([0.0, 1.0], "kl")]
    plots = overlay([Curves(rows_of)] * 2, ("reward", "eval_reward"))
    assert [plot.label.title for plot in plots] == ["Reward", "Reward on held-out prompts", "KL to the reference"]


def test_more_runs_than_colours_have_other_lines():
    lines = [run_line(place) for place in range(3 * len(RUNS))]
    assert len(set(lines)) == len(lines) and {line.style for line in lines} == {"solid", "dashed", "dotted"}


def test_rows_and_settings_by_hand():
    assert differing_settings([{"a": "1", "b": "2"}, {"a": "1", "b": "3"}, {"a": "1", "c": "4"}]) == [
        ("b", ["2", "3", None]),
        ("c", [None, None, "4"]),
    ]
    assert number_rows([[], []]) == []


def test_kl_and_length_are_shown_whatever_else_is(runs):
    metrics = json.loads((runs[0] / "summary.json").read_text())["metrics"]
    many = {f"win_rate_{i}": 0.5 for i in range(9)} | {f"win_rate_{i}_ci95": [0.4, 0.6] for i in range(9)}
    change(runs[0], "summary.json", metrics=metrics | many)
    text = compared(*runs).text
    assert "KL to the reference 8.91" in text and "Answer length, before → after 22.3" in text


def test_the_colour_of_a_run_is_that_of_its_lines(runs):
    with MetricsWriter(runs[1], terminal=False, sinks=()) as writer, writer.stage("rl", 7, resume_from=5) as stage:
        for step in (6, 7):
            stage.write(step, {"reward": 0.2})
    page = write_comparison(runs, runs[0].parent / "compare.html").read_text()
    heads = re.findall(r'border-top: 3px (\w+) (#\w+)"></span>(?:<a [^>]*>)?([^<]+)<', page)
    assert heads[:2] == [("solid", RUNS[0], "first"), ("solid", RUNS[1], "second &amp; last")]
    svg = page[page.index("<svg") : page.index("</svg>")]
    assert [len(heights(svg, color)) for color in RUNS[:2]] == [5, 7]


def test_a_run_in_its_first_minute_has_a_column(runs, tmp_path):
    (tmp_path / "new").mkdir()
    write_json(tmp_path / "new", "config.json", {"seed": 3, "resume": True, "stages": "x"})
    page = compared(runs[0], tmp_path / "new")
    assert "Status done running" in page.text and "Seed 0 3" in page.text
    assert "No two of the runs have written the same number." in page.text


def test_fingerprints_alone_are_no_headline():
    """A run notes the fingerprint of its policy before its first step."""
    rows = [{"step": 1, "stage": "rl", "reward": 0.5, "kl": 0.1}]
    shown = [card.label.title for card in headline({}, rows)]
    assert shown and [card.label.title for card in headline({"policy_sha256": "39cf"}, rows)] == shown
    assert headline({"policy_sha256": "39cf", "gain": 0.2}, rows) != headline({}, rows)


def test_nothing_of_a_run_can_act_on_the_page(tmp_path):
    folders = [finished_run(tmp_path / name) for name in ("a", "<img src=x onerror=alert(1)>")]
    for folder in folders:
        change(
            folder, "config.json", **{ATTACK: ATTACK + folder.name, "api_key": "sk-" + folder.name, "list": [ATTACK]}
        )
        values = {"status": ATTACK, "verdict": ATTACK, "error": ATTACK, "warnings": [ATTACK], "experiment": ATTACK}
        change(folder, "summary.json", **values, seed=ATTACK, metrics={ATTACK: 1.0, f"{ATTACK}_ci95": [0.0, 2.0]})
        with MetricsWriter(folder, terminal=False, sinks=()) as writer, writer.stage(ATTACK, 2) as stage:
            stage.write(1, {f"{ATTACK} loss": 1.0})
    page = compared(*folders)
    assert not {"script", "img", "iframe", "form"} & set(page.tags)
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    sources = [value for _, name, value in page.attributes if name in ("src", "href", "action", "srcset")]
    assert all(value.startswith(("#", "./")) for value in sources)
    assert page.text.count("<script>alert(1)</script>") > 10 and "{{ 7 * 7 }}" in page.text
    assert "sk-" not in page.text and "49" not in page.text
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda first, second: [first], "a comparison needs two runs or more"),
        (lambda first, second: [first, second, first / "../first"], "is given twice"),
        (
            lambda first, second: [first, (second / "summary.json").write_text("{") and second],
            "summary.json: cannot be read",
        ),
        (lambda first, second: [first, (second / "metrics.jsonl").write_text("{}\n") and second], "metrics.jsonl"),
    ],
)
def test_what_cannot_be_compared_is_one_line(runs, break_it, message, tmp_path):
    with pytest.raises(UserError) as error:
        write_comparison(break_it(*runs), tmp_path / "out.html")
    assert message in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out.html").exists()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_not_wider_than_the_screen(runs, browser, width):
    word = "an_unbroken_word_" * 30
    for folder in runs:
        change(folder, "config.json", **{word: word + folder.name})
        change(folder, "summary.json", warnings=[word], error=word)
    path = write_comparison(runs, runs[0].parent / "compare.html")
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    rights = page.eval_on_selector_all(".panel, .warnings, svg", "all => all.map(x => x.getBoundingClientRect().right)")
    assert len(rights) > 10 and all(right <= width for right in rights)
