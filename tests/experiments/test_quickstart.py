"""The quickstart, small enough for a test: every stage, the summary that was promised, a page that needs no network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import unexplained

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--models.num-layers=1",
    "--models.base.updates=20",
    "--models.base.examples=700",
    "--models.labeler.updates=20",
    "--models.labeler.examples=700",
    "--models.sft.updates=20",
    "--models.sft.examples=700",
    "--reward-model.updates=10",
    "--pair-prompts=60",
    "--train.steps=2",
    "--train.prompts-per-step=16",
    "--eval-prompts=32",
)


@pytest.mark.slow
def test_every_stage_runs_and_leaves_what_was_promised(tmp_path):
    """On dialogues; the test of feedback_forms.py goes through summarisation."""
    out = tmp_path / "run"
    script = str(ROOT / "experiments" / "quickstart.py")
    command = [sys.executable, script, "--out", str(out), "--task", "dialogue", *SMALL]
    environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"}
    subprocess.run(command, env=environment, check=True, timeout=300)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "done"
    assert all(summary["checks"].values())
    promised = {
        "win_rate_gold", "win_rate_gold_ci95", "gold_before", "gold_after", "judge_agreement", "same_position_rate",
        "rm_accuracy", "kl", "length_before", "length_after", "wall_s",
    }  # fmt: skip
    assert promised <= set(summary["metrics"])
    assert unexplained(out) == []
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert 'src="http' not in page
    stages = {json.loads(line)["stage"] for line in (out / "metrics.jsonl").read_text().splitlines()}
    assert stages == {"lm", "labeler", "sft", "reward_model", "rl"}
    # A finished run that is resumed has nothing left to do and says the same.
    subprocess.run([*command, "--resume"], env=environment, check=True, timeout=300)
    again = json.loads((out / "summary.json").read_text())["metrics"]
    assert {k: v for k, v in again.items() if k != "wall_s"} == {
        k: v for k, v in summary["metrics"].items() if k != "wall_s"
    }
