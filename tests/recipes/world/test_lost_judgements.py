"""The quickstart's policy learns as well from a labeler of which 30 % of the judgements are missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes.world.lost_judgements import SMALL

ROOT = Path(__file__).resolve().parents[3]
JUDGED = SMALL.train.steps * SMALL.train.prompts_per_step


def small(out: Path, stages: Path, share: float) -> dict:
    """Returns the summary of a run in a process, whose programs are optimised, unlike those of other tests."""
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": ""}
    script = Path(__file__).with_name("lost_judgements.py")
    subprocess.run([sys.executable, str(script), str(out), str(stages), str(share)], env=environment, check=True)
    return json.loads((out / "summary.json").read_text())


@pytest.mark.slow
def test_gold_ends_where_it_ends_without_failures(tmp_path: Path):
    whole, lossy = (small(tmp_path / f"lost-{share}", tmp_path / "stages", share) for share in (0.0, 0.3))
    lost = [run["missing"]["judgements of a step"] for run in (whole, lossy)]
    assert lost[0] < 0.02 * JUDGED and lost[1] > 0.2 * JUDGED, lost
    before, without, with_failures = (
        whole["metrics"]["gold_before"], whole["metrics"]["gold_after"], lossy["metrics"]["gold_after"]
    )  # fmt: skip
    assert without - before > 0.1 and abs(with_failures - without) < 0.05, (before, without, with_failures)
