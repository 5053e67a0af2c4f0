"""The quickstart, small enough for a test: every stage, the summary that was promised, a page that needs no network."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from experiments.quickstart import QuickstartConfig, labeler_mix, main, random_score, tell
from rlaif_jax.command_line import ended_worse
from rlaif_jax.config import UserError
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.recipes.world.models import ANSWER_LENGTH
from rlaif_jax.tools.runs import load_run_policy
from tests.helpers import unexplained

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--models.num-layers=1",
    "--models.base.updates=20",
    "--models.base.check-every=10",
    "--models.base.cooldown=10",
    "--models.labeler.updates=20",
    "--models.labeler.check-every=10",
    "--models.labeler.cooldown=10",
    "--models.sft.updates=20",
    "--models.sft.examples=700",
    "--reward-model.updates=10",
    "--pair-prompts=60",
    "--train.steps=2",
    "--train.prompts-per-step=16",
    "--eval-prompts=32",
)
PROMISED = {
    "win_rate_gold", "win_rate_gold_ci95", "gold_before", "gold_after", "judge_win_rate", "judge_agreement_final", "kl",
    "length_before", "length_after", "labeler_sha256", "wall_s", "base_check_values", "base_check_unsaid",
}  # fmt: skip


def run_small(out: Path, *options: str) -> dict[str, Any]:
    """Runs the script in a process with one device, checks what holds for every run, and returns its summary."""
    script = str(ROOT / "experiments" / "quickstart.py")
    command = [sys.executable, script, "--out", str(out), *SMALL, *options]
    environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"}
    ended = subprocess.run(command, env=environment, timeout=300)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "done"
    assert ended.returncode == (1 if summary["verdict"] == "worse" else 0)
    assert all(summary["checks"].values())
    assert set(summary["metrics"]) >= PROMISED
    assert summary["verdict"] in ("better", "no different", "worse")
    assert len(summary["story"]) == 3
    assert any("base model has not learned" in warning for warning in summary["warnings"]), "twenty updates are too few"
    assert unexplained(out) == []
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert 'src="http' not in page
    return summary


def stages_of(out: Path) -> set[str]:
    return {json.loads(line)["stage"] for line in (out / "metrics.jsonl").read_text().splitlines()}


@pytest.mark.slow
def test_every_stage_runs_and_leaves_what_was_promised(tmp_path):
    out, stages = tmp_path / "judge", tmp_path / "stages"
    summary = run_small(out, "--stages", str(stages))
    assert stages_of(out) == {"lm", "labeler", "sft", "rl"}
    assert "an AI labeler's scores" in summary["story"][0]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert all("second_opinion" in sample and "reasons" in sample for sample in samples if sample["stage"] != "rl")
    # A finished run that is resumed has nothing left to do and says the same.
    again = run_small(out, "--stages", str(stages), "--resume")
    timeless = lambda metrics: {key: value for key, value in metrics.items() if key != "wall_s"}
    assert timeless(again["metrics"]) == timeless(summary["metrics"])
    # A reward model is two stages more; the others are shared.
    out = tmp_path / "reward_model"
    learned = run_small(out, "--stages", str(stages), "--reward", "reward_model")
    assert stages_of(out) == {"reward_model", "rl"}
    assert set(learned["metrics"]) >= {"rm_accuracy", "judge_agreement", "judge_missing"}
    assert learned["metrics"]["labeler_sha256"] == summary["metrics"]["labeler_sha256"]
    assert learned["metrics"]["gold_before"] == summary["metrics"]["gold_before"]
    assert sorted(learned["stages"].values()) == ["made", "made", "reused", "reused", "reused"]


@pytest.mark.slow
def test_a_control_arm_on_dialogues(tmp_path):
    summary = run_small(tmp_path / "random", "--task", "dialogue", "--reward", "random")
    assert stages_of(tmp_path / "random") == {"lm", "labeler", "sft", "rl"}
    assert "random scores (control arm)" in summary["story"][0]
    policy = load_run_policy(tmp_path / "random")
    assert policy.step == 2 and policy.model.config.num_layers == 1


# ---- Without a model


def test_random_scores_are_uniform_and_know_nothing():
    records = [{"prompt": f"prompt {i}"} for i in range(40)]
    answers = ["a " * length for length in range(50)]
    scores = np.array([[random_score(0, record, answer) for answer in answers] for record in records])
    assert stats.kstest(scores.ravel(), "uniform").pvalue > 0.01
    assert len(np.unique(scores)) == scores.size, "each depends on prompt and answer"
    # Neither a prompt, nor an answer, nor its length has a mean that 2000 uniform numbers would not have.
    for axis, count in ((0, 40), (1, 50)):
        assert abs(scores.mean(axis) - 0.5).max() < 4 / np.sqrt(12 * count)
    assert abs(stats.pearsonr(np.tile(np.arange(50), 40), scores.ravel()).statistic) < 0.07
    assert random_score(0, records[3], "x") == random_score(0, {"prompt": "prompt 3", "more": 1}, "x")
    assert random_score(0, records[3], "x") != random_score(1, records[3], "x")


def run_after_tell(
    low: float, high: float, kind: str = "judge", judge: float | None = 0.75, shortcuts: bool = False
) -> SimpleNamespace:
    """Returns a run after `tell`, with this interval of the win rate."""
    metrics = {
        "win_rate_gold": (low + high) / 2,
        "win_rate_gold_ci95": [low, high],
        "gold_before": 0.5,
        "gold_after": 0.625,
        "judge_win_rate": judge,
    }
    run = SimpleNamespace(metrics=metrics, story=[], verdict=None, steps_done=60, seed=4)
    tell(run, kind, shortcuts)  # type: ignore[arg-type]
    return run


@pytest.mark.parametrize(
    "low, high, verdict, fails",
    [(0.51, 0.6, "better", False), (0.49, 0.6, "no different", False), (0.3, 0.49, "worse", True)],
)
def test_the_verdict_comes_from_the_interval(low, high, verdict, fails):
    run = run_after_tell(low, high)
    assert run.verdict == verdict
    assert ended_worse({"verdict": run.verdict}) == fails
    happened, measure, following = run.story
    assert f"became {verdict}" in happened
    assert "for 60 steps" in happened
    assert f"(95 % interval [{100 * low:.1f} %, {100 * high:.1f} %])" in happened.replace("\N{NO-BREAK SPACE}", " ")
    assert "from 0.500 to 0.625; the labeler prefers the new answers in 75.0\N{NO-BREAK SPACE}%." in measure
    assert following.startswith("Next:")


def test_the_story_names_the_reward_and_no_number_that_is_missing():
    for kind, words in {
        "judge": "AI labeler's scores",
        "reward_model": "reward model of an AI labeler's judgements",
        "oracle": "gold score itself (control arm)",
        "random": "random scores (control arm)",
    }.items():
        assert words in run_after_tell(0.5, 0.6, kind).story[0]
    assert run_after_tell(0.5, 0.6, judge=None).story[1].endswith("to 0.625.")


def test_the_story_ends_with_what_to_try_next():
    assert "(--seed 5) or a world with planted habits and few labels (--shortcuts)" in run_after_tell(0.5, 0.6).story[2]
    exploited = run_after_tell(0.1, 0.2, "reward_model", shortcuts=True).story[2]
    assert "the labeler's own scores in the same world (--shortcuts --reward judge)" in exploited


def test_the_labeler_learns_reasons_only_from_people_who_slip_at_times():
    mix = labeler_mix("<helpful>")
    assert [kind for kind, weight in mix.weights.items() if weight] == ["score_reasoning"]
    assert mix.principles == ("<helpful>",)
    assert 0 < mix.commenter.error_rate < 0.05
    at_first_sight = labeler_mix("<helpful>", reasons=False)
    assert [kind for kind, weight in at_first_sight.weights.items() if weight] == ["score"]


@pytest.mark.parametrize(
    "wrong, message", [({"pair_prompts": 19}, "pair_prompts"), ({"eval_prompts": 7}, "eval_prompts")]
)
def test_too_few_prompts_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        QuickstartConfig(**wrong)


def test_a_policy_that_cannot_learn_is_refused_before_any_stage(tmp_path):
    config = QuickstartConfig(out=tmp_path / "run", sampling=SamplingConfig(ANSWER_LENGTH, top_k=5))
    with pytest.raises(UserError, match=r"sampling\.top_k is 5"):
        main(config)
    assert not config.out.exists()
