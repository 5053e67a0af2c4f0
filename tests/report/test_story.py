"""The first lines of the page, the figure of the reward against its measures, and the samples."""

import json
import re

import pytest

from rlaif_jax.metrics import MetricsWriter
from rlaif_jax.report import report
from rlaif_jax.report.curves import RED
from rlaif_jax.report.samples import MAX_DRAWN
from tests.report.pages import make, sample, write_json, write_samples


def summary_with(run, **fields):
    write_json(run, "summary.json", json.loads((run / "summary.json").read_text()) | fields)


def own_run(folder, *, steps=40, **measured):
    """Writes the folder of a run that has nothing but the loop's numbers; `measured`: values at every 10th step."""
    with MetricsWriter(folder, terminal=False, sinks=()) as writer, writer.stage("rl", steps) as stage:
        for step in range(steps + 1):
            values = {"reward": max(0.5, 0.1 * step), "kl": 0.05 * step, "finished": 0.5} if step else {}
            if step % 10 == 0:
                values |= {name: of_step[step // 10] for name, of_step in measured.items()}
            if values:
                stage.write(step, values)
    write_json(folder, "summary.json", {"experiment": "mine", "status": "done", "steps": steps, "metrics": {}})
    return folder


def figure_of(folder):
    """Returns (the page, its figure of the reward against the measures)."""
    text = report.write_report(folder).read_text()
    return text, re.search(r'<div class="panel journey">.*?(<svg.*?</svg>)', text, re.DOTALL).group(1)


# ---- The first lines


def test_the_story_and_the_verdict_come_before_every_number(run):
    summary_with(run, story=["Two judges were asked.", "It got better."], verdict="better")
    text = make(run).text
    top = text[: text.index("Win rate by gold")]
    assert "Verdict: better Two judges were asked. It got better." in top
    assert "A policy answered prompts" not in text


@pytest.mark.parametrize(
    ("verdict", "kind"), [("better", "good"), ("no different", "even"), ("worse", "bad"), ("odd", "even")]
)
def test_a_verdict_has_its_colour(run, verdict, kind):
    summary_with(run, verdict=verdict)
    assert ("div", "class", f"verdict {kind}") in make(run).attributes


def test_warnings_are_in_the_first_lines_with_what_to_try(run):
    warnings = ["Step 40: the KL is 25 nats. Try: a higher ppo.kl_coef.", "the code has changed"]
    summary_with(run, warnings=warnings, checks={}, story=["It ran."])
    page = make(run)
    top = page.text[: page.text.index("Win rate by gold")]
    assert "done 2 warnings seed 0" in top
    assert "It ran. 2 warnings Step 40: the KL is 25 nats. Try: a higher ppo.kl_coef. the code has changed" in top
    assert ("a", "href", "#warnings") in page.attributes
    assert ("section", "id", "warnings") in page.attributes


def test_a_check_that_failed_is_a_warning(run):
    summary_with(run, status="failed", checks={"losses_are_finite": False, "kl_at_step_0_is_0": True})
    page = make(run)
    top = page.text[: page.text.index("Win rate by gold")]
    assert "This run failed after step 5" in top
    assert "A check failed: Losses are finite." in top
    assert "KL at step 0" not in top
    assert ("section", "class", "warnings failed") in page.attributes


def test_a_healthy_run_has_no_warnings(run):
    summary_with(run, checks={"losses_are_finite": True})
    page = make(run)
    assert "warning" not in page.text
    assert "section" not in page.tags


@pytest.mark.parametrize(
    ("status", "says"),
    [
        ("running", "still going on. It is at step 5 of the stage “Training loop”."),
        ("stopped", "stopped after step 5 of the training loop. The same command with --resume"),
        ("failed", "failed after step 5"),
        ("diverged", "diverged and was ended after step 5 of the training loop: do not use"),
    ],
)
def test_how_a_run_ended_is_its_first_sentence(run, status, says):
    summary_with(run, status=status, story=["It was a run."])
    text = make(run).text
    assert text.index(says) < text.index("It was a run.")
    assert ("span", "class", f"pill {status}") in make(run).attributes


# ---- A run of one's own, and the figure


def test_a_run_with_nothing_but_a_reward_has_it_as_its_headline(tmp_path):
    page = make(own_run(tmp_path))
    top = page.text[: page.text.index("Training loop")]
    assert "A policy answered prompts for 40 steps" in top
    assert "The reward went from 0.50 to 3.85. Nothing but the reward was measured" in top
    assert top.index("Reward, first → last 0.50 → 3.85") < top.index("KL to the reference 2")
    assert "Reward over the training" in top
    assert "Finished answers 50.0 %" in top


def test_a_reward_that_rises_while_the_measures_fall_is_seen(tmp_path):
    run = own_run(tmp_path, gold=[0.5, 0.6, 0.4, 0.2, 0.01], second_opinion=[6.0, 6.1, 5.0, 4.0, 3.0])
    text, figure = figure_of(run)
    page = make(run)
    assert "Does the reward mean better answers?" in page.text
    assert "Reward 0.50 3.85 Second opinion 6 3 Gold score 0.50 0.01" in page.text
    assert [value for tag, name, value in page.attributes if (tag, name) == ("td", "class")] == ["fell", "fell"]
    labels = re.findall(r"<text[^>]*>\s*([^<]*?)\s*</text>", figure)
    assert {"Reward", "Second opinion", "Gold score", "step"} <= set(labels)
    assert RED in figure, "what lies below the beginning is red"
    assert "<figcaption><span><a" in text
    for title in ("Reward", "Second opinion", "Gold score"):
        assert f">{title}</a></span><span>" not in text, "a curve is shown once"


def test_a_reward_that_only_rises_has_no_red(tmp_path):
    run = own_run(tmp_path, gold=[0.5, 0.6, 0.7, 0.8, 0.9])
    text, figure = figure_of(run)
    assert RED not in figure
    assert '"fell"' not in text


def test_a_measure_of_another_name_is_compared_too(tmp_path):
    run = own_run(tmp_path, judge=[1.0, 2.0, 3.0, 4.0, 5.0])
    write_json(run, "summary.json", {"status": "done", "metrics": {"win_rate_judge": 0.75, "win_rate_other": 0.5}})
    assert "Reward 0.50 3.85 Judge's score 1 5" in make(run).text


# ---- Samples


def test_samples_drawn_at_random_and_the_worst_are_apart_and_say_so(run):
    chosen = [
        sample(stage, index, f"{stage} {index}", chosen=how, gold=score)
        for how, index, stage, score in (
            ("random", 3, "before", 0.5),
            ("random", 3, "after", 0.6),
            ("worst", 3, "before", 0.5),
            ("worst", 3, "after", 0.6),
            ("worst", 9, "before", 0.75),
            ("worst", 9, "after", 0.25),
        )
    ]
    write_samples(run, *chosen)
    text = make(run).text
    random, _, worst = text.partition("The worst samples")
    assert "Samples Answers to the same prompts before and after training; the prompts were drawn at random." in random
    assert "after 9" not in random
    assert "Not typical: of all held-out prompts, those whose score fell most" in worst
    assert "change: Gold score -0.50 prompt 9" in worst
    assert "after 3" in random
    assert "after 3" in worst, "a prompt may be in both"


def test_samples_of_an_older_run_claim_nothing_about_chance(run):
    assert "drawn at random" not in make(run).text


def test_the_judges_reasons_are_next_to_its_sample(run):
    write_samples(
        run,
        sample("before", 0, "a mill", reasons="it says one thing ."),
        sample("after", 0, "a mill and a well", reasons="it says two things .", second_opinion=7.5),
    )
    text = make(run).text
    assert "a mill The judge's reasons it says one thing ." in text
    assert "Second opinion 7.5 a mill and a well The judge's reasons it says two things ." in text


def test_answers_drawn_while_it_learned_are_open_where_there_are_no_others(tmp_path):
    run = own_run(tmp_path)
    write_samples(run, *(sample("rl", 0, f"answer {step}", step=step, reward=0.5) for step in range(20)))
    page = make(run)
    assert (
        "Samples The last answers that were drawn during training. Prompt prompt 0 Step 12 Reward 0.5 answer 12"
        in page.text
    )
    assert page.text.count("answer 1") == MAX_DRAWN
    write_samples(run, sample("rl", 0, "learning"), sample("before", 0, "old"), sample("after", 0, "new"))
    text = report.write_report(run).read_text()
    assert text.index("The last answers drawn during training</summary>") < text.index("learning")


# ---- What made it


def test_the_command_is_shown_without_credentials(run):
    summary_with(run, command="python x.py --judge https://me:secret@host/v1")
    text = make(run).text
    assert "Command, machine and versions python x.py --judge https://(hidden)@host/v1" in text


def test_what_only_identifies_is_at_the_end(run):
    numbers = json.loads((run / "summary.json").read_text())["metrics"] | {"labeler_sha256": "0123abcd"}
    summary_with(run, metrics=numbers, stages={"lm-89ef": "made"})
    text = make(run).text
    _, _, internal = text.partition("Internal checks")
    for words in ("0123abcd", "lm-89ef", "KL at step 0 is zero"):
        assert text.count(words) == 1
        assert words in internal
