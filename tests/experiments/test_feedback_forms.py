"""Forms of feedback through the whole loop, small enough for a test; the page's server and its clients are real."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.feedback_forms import FormsConfig
from rlaif_jax.config import UserError
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.recipes.world.models import ModelsConfig

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
    "--calibration-prompts=24",
    "--eval-prompts=16",
    "--train.steps=1",
    "--train.prompts-per-step=8",
)


@pytest.mark.slow
def test_what_the_page_collects_reaches_the_policy(tmp_path):
    pytest.importorskip("fastapi", reason="the annotation page needs the extra `ui`")
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "experiments" / "feedback_forms.py"), "--out", str(out), *SMALL]
    # The other forms are read off the page in the same way: tests/feedback/people/test_source.py and
    # tests/feedback/test_record_rewards.py.
    forms = ("correction",)
    options = ("--origins", "page", "--forms", *forms)
    subprocess.run(
        [*command, *options],
        env=os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"},
        check=True,
        timeout=300,
    )
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "done"
    assert set(summary["metrics"]["results"]) == {f"{form}-page" for form in forms}
    for form in forms:
        with Store(out / f"{form}-page" / "feedback.sqlite") as store:
            told = store.judgements(form=form)
        assert len(told) >= 8
        assert {judgement.rater.source for judgement in told} == {"simulated"}
        assert all(judgement.time is not None for judgement in told), "the page writes down when"
        assert json.loads((out / f"{form}-page" / "summary.json").read_text())["status"] == "done"
        assert "Feedback" in (out / f"{form}-page" / "report.html").read_text()


def test_a_labeler_without_reasons_is_refused():
    with pytest.raises(UserError, match=r"models\.reasons must be True"):
        FormsConfig(models=ModelsConfig(reasons=False))
