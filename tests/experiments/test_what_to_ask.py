"""The experiment on choosing: a whole run, in small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.what_to_ask import AskConfig
from rlaif_jax.config import UserError
from rlaif_jax.recipes.asking import AskingConfig
from rlaif_jax.recipes.label_curves import labels_to_reach, saved_share, smoothed

ROOT = Path(__file__).resolve().parents[2]


def test_bad_settings_are_refused():
    with pytest.raises(UserError, match="seeds must be >= 2 for an interval, not 1"):
        AskConfig(seeds=1)
    with pytest.raises(UserError, match=r"budget must be <= half of the pool's 9000 pairs: raise prompts"):
        AskConfig(asking=AskingConfig(budget=5000))


def test_a_whole_small_run(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "experiments" / "what_to_ask.py"), "--out", str(out), "--seeds", "2"]
    command += ["--prompts", "60", "--test-prompts", "40", "--asking.start", "16", "--asking.budget", "64"]
    command += ["--asking.growth", "2", "--asking.models", "3", "--asking.repeats", "2"]
    done = subprocess.run(
        command,
        env=os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"},
        check=True,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert "fewer [" in done.stdout
    result = json.loads((out / "what_to_ask.json").read_text())
    assert result["labels"] == [16, 32, 64]
    curves = {order: np.array(found) for order, found in result["accuracy"].items()}
    assert all(found.shape == (2, 2, 3) for found in curves.values())  # seeds, repeats, budgets
    for found in curves.values():
        np.testing.assert_array_equal(found[..., 0], curves["random"][..., 0])  # all begin with the same labels
    for number in range(2):
        target, needed = smoothed(result["accuracy"]["random"][number])[-1], result["labels_needed"]
        ensemble = labels_to_reach(target, result["labels"], smoothed(result["accuracy"]["ensemble"][number]))
        assert needed["ensemble"][number] == ensemble
        assert result["saved"]["ensemble"][number] == saved_share(ensemble, needed["random"][number], 64)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "done"
    assert summary["claims"][0]["ci95"][0] <= summary["claims"][0]["ours"] <= summary["claims"][0]["ci95"][1]
