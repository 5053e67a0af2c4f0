"""The page as a parser and a person see it: complete, escaped, and in need of nothing outside itself."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rlaif_jax
from rlaif_jax.config import UserError
from rlaif_jax.feedback.records.forms import Ranking, Rater
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.metrics import MetricsWriter
from rlaif_jax.report import report
from rlaif_jax.report.environment import commit, save_environment
from rlaif_jax.report.samples import MAX_PAIRS
from tests.report.pages import ATTACK, Page, make, sample, write_json, write_samples


def test_the_page_tells_the_whole_run(run):
    page = make(run)
    for words in (
        "quickstart",
        "done",
        "seed 0 · 5 steps · 7 min 13 s",
        "71.3 % 95 % interval [65.1 %, 77.2 %]",
        "0.412 → 0.741",
        "8.91 nats per answer",
        "87.4 %",
        "9.3 %",
        "84.2 %",
        "22.3 → 25.9 tokens",
        "RLAIF beats SFT 0.71 0.713 [0.651, 0.772] reproduced",
        "✓ ok KL at step 0 is zero",
        "✗ failed Loss finite",
        "ppo.policy.lr 3e-06",
        "Reward model · Held-out accuracy",
        "Prompt change: Reward +1.75 Gold score +0.25 prompt 0",
        "Before Reward -0.25 Gold score 0.50 a cup cup After Reward 1.50 Gold score 0.75 The cook gives a cup.",
        "while it learns",
    ):
        assert words in page.text, words
    assert page.tags.count("svg") == 1 + 3 + 2 + 5  # the figure, the loop, the reward model, all other curves
    assert page.text.index("Entropy") < page.text.index("Sampler gap (first minibatch)")


def test_every_plot_has_labelled_axes_with_units(run):
    text = report.write_report(run).read_text()
    plots = re.findall(r"<figcaption><span>(.*?)</span>.*?</figcaption>\s*(<svg.*?</svg>)", text, re.DOTALL)
    plots = [(re.sub("<[^>]*>", "", title), svg) for title, svg in plots]
    units = {title: re.findall(r"<text[^>]*>\s*([^<]*?)\s*</text>", svg) for title, svg in plots}
    for title, unit in {
        "KL to the reference": "nats per answer",
        "Answer length": "tokens",
        "Entropy": "nats per token",
        "Clip fraction": "% of tokens",
        "Reward model · Loss": "nats per pair",
    }.items():
        assert {unit, "step"} <= set(units[title]), (title, units[title])


def test_the_page_needs_nothing_else(run):
    write_samples(run, sample("before", 0, ATTACK, prompt=ATTACK), sample("after", 0, ATTACK, prompt=ATTACK))
    text = report.write_report(run).read_text()
    page = Page(text)
    assert not {"script", "img", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    loads = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert loads
    assert all(value.startswith("#") for value in loads)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    styles = " ".join(re.findall(r"<style.*?</style>", text, re.DOTALL))
    styles += " ".join(value for _, name, value in page.attributes if name in ("style", "clip-path"))
    assert "@import" not in styles
    assert "@font-face" not in styles
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", styles))
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert "http" not in text.replace("http-equiv", "").replace("http://evil.example/x.png", "")


def test_ids_are_unique_and_every_reference_has_its_target(run):
    page = make(run)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for _, name, value in page.attributes if name == "xlink:href"}
    used |= {value[5:-1] for _, name, value in page.attributes if name == "clip-path"}
    used |= {value[1:] for tag, name, value in page.attributes if (tag, name) == ("a", "href")}
    assert used <= set(ids)
    assert used


def test_hostile_text_is_shown_as_text_wherever_it_comes_from(tmp_path):
    with MetricsWriter(tmp_path, terminal=False, sinks=()) as writer:
        with writer.stage("rl", 1) as stage:
            stage.write(1, {ATTACK: 1.0, "reward": 1.0, f"{ATTACK}/kl": 1.0})
        with writer.stage(ATTACK, 1) as stage:
            stage.write(1, {f"{ATTACK} loss": 1.0})
    samples = [
        sample(stage, 0, ATTACK, prompt=ATTACK, chosen=chosen, reasons=ATTACK, **{ATTACK: 1.0})
        for stage in ("before", "after", "rl")
        for chosen in ("random", "worst", ATTACK)
    ]
    write_samples(tmp_path, *samples)
    write_json(tmp_path, "config.json", {ATTACK: ATTACK, "nested": {ATTACK: [ATTACK]}})
    claim = dict.fromkeys(("claim", "paper", "ours", "verdict"), ATTACK) | {"ci95": [ATTACK]}
    numbers = {ATTACK: 1.0, "text": ATTACK, "x": {ATTACK: ATTACK}, f"{ATTACK}sha256": ATTACK}
    numbers |= {f"win_rate_{ATTACK}": 0.5, f"win_rate_{ATTACK}_ci95": [0.4, 0.6]}
    summary = dict.fromkeys(("experiment", "status", "seed", "error"), ATTACK)
    summary |= {"metrics": numbers, "checks": {ATTACK: True, "other": ATTACK}, "claims": [claim]}
    summary |= {"warnings": [f"{ATTACK} Try: {ATTACK}"], "missing": {ATTACK: 3}, "stages": {ATTACK: ATTACK}}
    summary |= {"story": [ATTACK], "verdict": ATTACK, "command": ATTACK}
    write_json(tmp_path, "summary.json", summary)
    write_json(tmp_path, "environment.json", {"machine": {ATTACK: ATTACK}, "versions": {ATTACK: ATTACK}})
    page = make(tmp_path)
    assert not {"script", "img"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert not [value for _, name, value in page.attributes if name in ("id", "href") and "script" in value]
    assert page.text.count("<script>alert(1)</script>") > 40
    assert "{{ 7 * 7 }}" in page.text
    assert " 49 " not in page.text


@pytest.mark.parametrize("count", range(6))
def test_any_part_of_a_run_makes_a_page(run, count):
    names = ["summary.json", "samples.jsonl", "config.json", "metrics.jsonl"]
    for name in names[:count]:
        (run / name).unlink()
    page = make(run)
    assert "quickstart" in page.text
    refresh = ("meta", "http-equiv", "refresh") in page.attributes
    assert refresh == (count >= 1) == ("done" not in page.text)
    assert ("has not written any numbers" in page.text) == (count >= 4)


def test_a_run_in_its_first_seconds_shows_where_it_stands(tmp_path):
    with (
        MetricsWriter(tmp_path, terminal=False, sinks=()) as writer,
        writer.stage("lm", 100) as stage,
    ):
        stage.write(1, {"loss": 6.25, "time/tokens_per_s": 12345.0})
        page = make(tmp_path)
        assert "Stage Language model step 1" in page.text
        assert "Loss 6.25 nats per token" in page.text
        assert "Speed 12,345 tokens per second" in page.text
        assert page.tags.count("svg") == 2
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "stage": "lm", "lo')
        assert "step 1" in make(tmp_path).text


def test_samples_of_one_index_and_prompt_stand_side_by_side_and_the_newest_counts(tmp_path):
    write_samples(
        tmp_path,
        sample("before", 7, "old"),
        sample("after", 7, "first try", step=5),
        sample("after", 7, "", step=10),
        sample("before", 8, "alone"),
        sample("after", 8, "another prompt", prompt="changed"),
        sample("before", 9, "x" * 5000),
    )
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 1, "stage": "bef')
    text = make(tmp_path).text
    assert "Prompt prompt 7 Before old After empty answer" in text
    assert "first try" not in text
    assert "Prompt prompt 8 Before alone After not drawn yet" in text
    assert "Prompt changed Before not drawn yet After another prompt" in text
    assert "(1,000 more characters)" in text
    write_samples(tmp_path, *(sample("before", index, "answer") for index in range(20)))
    text = make(tmp_path).text
    assert text.count("Before answer") == MAX_PAIRS
    assert f"{20 - MAX_PAIRS} more are in samples.jsonl" in text


def test_values_that_are_not_finite_leave_gaps_not_errors(tmp_path):
    with (
        MetricsWriter(tmp_path, terminal=False, sinks=()) as writer,
        writer.stage("rl", 100) as stage,
    ):
        for step in range(1, 101):
            stage.write(step, {"reward": float("nan"), "kl": float("nan") if step % 3 else step / 7})
    page = make(tmp_path)
    assert "Reward over the training" not in page.text
    assert "KL to the reference 14.14" in page.text
    assert not [value for _, name, value in page.attributes if name == "d" and "nan" in value]


def test_a_long_run_makes_a_small_page_and_keeps_its_spikes(tmp_path):
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(1, 20_001):
            value = 1e3 if step == 12_345 else (step * 7919 % 1000) / 1000
            file.write(json.dumps({"step": step, "reward": value, "grad_norm": None}) + "\n")
    assert report.write_report(tmp_path).stat().st_size < 150_000
    assert "1000" in make(tmp_path).text  # the axis reaches up to the spike


def test_whatever_a_new_algorithm_logs_and_changes_is_among_the_first_curves(tmp_path):
    with (
        MetricsWriter(tmp_path, terminal=False, sinks=()) as writer,
        writer.stage("rl", 3) as stage,
    ):
        for step in range(1, 4):
            values = {"novelty": 0.1 * step, "first/novelty": 0.1 * step, "constant": 1.0, "loss": 0.1 * step}
            stage.write(step, values | {"reward": 1.0})
    page = make(tmp_path)
    first, _, others = page.text.partition("All other curves (3)")
    assert first.index("Training loop The number next to a title") < first.index("Novelty 0.3")
    assert "Reward, first → last 1 → 1" in first
    for title in ("Constant 1", "First/novelty 0.3", "Loss 0.3"):
        assert title in others


def test_warnings_missing_judgements_and_stages_are_shown(run):
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"warnings": ["the code has changed"], "missing": {"timeout": 12}, "stages": {"lm-0123": "reused"}}
    write_json(run, "summary.json", summary)
    text = make(run).text
    for words in ("the code has changed", "by reason. timeout 12", "began with lm-0123 reused"):
        assert words in text, words


def test_unknown_numbers_of_other_experiments_are_shown_too(tmp_path):
    metrics = {"score_before": 0.25, "score_after": 0.5, "distinct_2": 0.4, "distinct_2_ci95": [0.3, 0.5]}
    metrics |= {"directions": {"happier": 1}, "note": "both", "nothing": None, "flag": True, "wall_s": 3700}
    write_json(tmp_path, "summary.json", {"status": "stopped", "metrics": metrics})
    text = make(tmp_path).text
    assert "Score, before → after 0.25 → 0.50" in text
    assert "Distinct 2 0.4 95 % interval [0.3, 0.5]" in text
    assert 'Directions {"happier": 1}' in text
    assert "Note both" in text
    assert "Flag true" in text
    assert "1 h 1 min · page written" in text
    assert "stopped" in text


def test_secrets_are_hidden_and_counts_are_not(tmp_path):
    config = {
        "judge": {
            "api_key": "sk-1",
            "AccessToken": "sk-2",
            "max_tokens": 64,
            "url": "https://me:sk-3@host/v1",
        },
        "password": ["sk-4"],
        "raters": [{"name": "ann", "secret": "sk-5"}, {"deep": [{"key": {"inner": "sk-6"}}]}],
        "tokenizer": "words.json",
        "token": None,
        "pad_token_id": 0,
    }
    write_json(tmp_path, "config.json", config)
    text = make(tmp_path).text
    assert "sk-" not in text
    assert text.count("(hidden)") == 6
    for words in ("judge.max_tokens 64", "tokenizer words.json", "raters.0.name ann", "pad_token_id 0"):
        assert words in text
    assert "https://(hidden)@host/v1" in text


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", "{", r"config\.json: cannot be read as JSON"),
        ("summary.json", "[1]", r"summary\.json: should hold one JSON object"),
        ("summary.json", '{"warnings": 3}', r"summary\.json: warnings should be a list, not 3"),
        ("summary.json", '{"missing": [1]}', r"summary\.json: missing should be an object, not \[1\]"),
        ("environment.json", '{"versions": []}', r"environment\.json: versions should be an object, not \[\]"),
        ("metrics.jsonl", '{"step": 1}\nx\n{"step": 2}\n', r"metrics\.jsonl:2"),
        ("samples.jsonl", "3\n{}\n", r"samples\.jsonl:1"),
    ],
)
def test_a_damaged_file_is_named_and_the_last_good_page_stays(run, name, content, says):
    before = report.write_report(run).read_text()
    (run / name).write_text(content)
    with pytest.raises(UserError, match=says):
        report.write_report(run)
    assert (run / "report.html").read_text() == before


def test_no_folder_is_a_message(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        report.write_report(tmp_path / "missing")


def test_a_page_that_cannot_be_written_is_a_message(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*report\.html: "):
        report.write_report(tmp_path)


def test_the_environment_of_the_run_is_kept(run):
    assert "Of the process that made this page." in make(run).text
    path = save_environment(run)
    saved = json.loads(path.read_text())
    import jax

    assert saved["versions"]["jax"] == jax.__version__
    assert saved["versions"]["rlaif_jax"] == rlaif_jax.__version__
    assert saved["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert saved["machine"]["devices"] == jax.device_count()
    assert saved["machine"]["cores"] >= 1
    saved["machine"]["cpu"] = "a machine far away"
    write_json(run, "environment.json", saved)
    text = make(run).text
    assert "Of the run." in text
    assert "a machine far away" in text
    assert os.uname().nodename not in json.dumps(saved["machine"]).split()


def git(folder, *arguments):
    identity = ("-c", "user.name=ann", "-c", "user.email=ann@example.org")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_of_the_code_is_kept(tmp_path, monkeypatch):
    package = tmp_path / "work" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    assert commit(package) is None, "no repository"
    git(tmp_path / "work", "init", "--quiet")
    assert commit(package) is None, "git does not track it, as in an environment inside a work tree"
    git(tmp_path / "work", "add", ".")
    git(tmp_path / "work", "commit", "--quiet", "-m", "first")
    head = git(tmp_path / "work", "rev-parse", "HEAD")
    assert commit(package) == head
    (package / "new.txt").write_text("not tracked")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert commit(package) == head
    (package / "__init__.py").write_text("x = 1")
    assert commit(package) == f"{head} (modified)"
    monkeypatch.setenv("PATH", "")
    assert commit(package) is None, "no git"


def test_the_commit_is_shown(run):
    save_environment(run)
    saved = json.loads((run / "environment.json").read_text())
    saved["versions"]["commit"] = "0123abcd (modified)"
    write_json(run, "environment.json", saved)
    assert "commit 0123abcd (modified)" in make(run).text
    saved["versions"]["commit"] = None
    write_json(run, "environment.json", saved)
    assert "commit not known: the code is in no git work tree" in make(run).text


def test_a_page_about_another_process_does_not_start_jax(run):
    program = (
        "import sys; from pathlib import Path; from rlaif_jax.report import report\n"
        "report.write_report(Path(sys.argv[1])); assert 'jax' not in sys.modules\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(run)], check=True, cwd=Path(__file__).parents[2])


def test_the_same_numbers_draw_the_same_plots(run):
    first, second = (re.findall("<svg.*?</svg>", report.write_report(run).read_text(), re.DOTALL) for _ in "ab")
    assert first == second


# ---- Feedback


def add_feedback(folder, count=40):
    people, judge = Rater(f"ann {ATTACK}", "person"), Rater(f"judge {ATTACK}", "ai")
    records = []
    for i in range(count):
        shared = {
            "prompt": f"{ATTACK} {i}",
            "answers": (f"a{i} {ATTACK}", f"b{i}"),
            "generators": (f"new {ATTACK}", "old"),
        }
        first = i % 3 == 0
        ranks = (1, 2) if first else (2, 1)
        records.append(Ranking(**shared, rater=people, ranks=ranks))
        for shown, p in (((0, 1), 0.9 if first else 0.3), ((1, 0), 0.7 if first else 0.1)):
            records.append(Ranking(**shared, rater=judge, ranks=ranks, probability=p, shown=shown, raw=ATTACK))
    with Store(folder / "feedback.sqlite") as store:
        store.add(records)


def test_the_quality_of_the_feedback_is_on_the_page(run):
    assert "Feedback" not in make(run).text
    before = make(run).tags.count("svg")
    add_feedback(run)
    page = make(run)
    for words in (
        "120 judgements about 40 prompts. Brackets: 95 % intervals",
        "is it as often right as it says?",
        "Agreement of sources on comparisons",
        "Both orders",
        "Win rates of the judge, debiased by people's labels",
        "100.0 % [90.7 %, 100.0 %]",  # they always agree: Wilson's interval of 40 prompts, with Student's t
    ):
        assert words in page.text, words
    assert page.tags.count("svg") == before + 1
    text = (run / "report.html").read_text()
    (svg,) = re.findall(r"as often right as it says\?.*?(<svg.*?</svg>)", text, re.DOTALL)
    labels = set(re.findall(r"<text[^>]*>\s*([^<]*?)\s*</text>", svg))
    assert {"confidence in %", "% right"} <= labels


def test_names_in_the_feedback_are_shown_as_text(run):
    add_feedback(run)
    page = make(run)
    assert not {"script", "img"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("ann <script>alert(1)") >= 2
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_a_store_that_is_empty_or_none_does_not_stop_the_page(run):
    Store(run / "feedback.sqlite").close()
    assert "Feedback" not in make(run).text
    for file in run.glob("feedback.sqlite*"):
        file.unlink()
    (run / "feedback.sqlite").write_bytes(b"this is no database" * 100)
    text = make(run).text
    assert "no feedback store can be opened here" in text
    assert "0.412 → 0.741" in text
