"""Nothing that judges or learns may know the world's gold score or its simulated people."""

import os
import pkgutil
import subprocess
import sys

import pytest

from rlaif_jax import algorithms, feedback, rewards

HIDDEN = ("gold.base", "gold.summarisation", "gold.dialogue", "gold.scores", "people", "corpus")
JUDGES = sorted(
    module.name
    for room in (feedback, rewards, algorithms)
    for module in pkgutil.walk_packages(room.__path__, prefix=f"{room.__name__}.")
)


def loaded(modules: list[str]) -> list[str]:
    """Which hidden modules are in memory after a fresh interpreter has imported `modules`."""
    names = [f"rlaif_jax.data.world.{name}" for name in HIDDEN]
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        f"print([name for name in {names!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return eval(done.stdout)


def test_the_judges_do_not_know_the_gold_score():
    assert {"rlaif_jax.feedback.judges.language_model", "rlaif_jax.feedback.records.formats.judges"} <= set(JUDGES)
    assert (
        loaded(
            [
                *JUDGES,
                "rlaif_jax.policies.text",
                "rlaif_jax.train",
                "rlaif_jax.evaluate",
                "rlaif_jax.quality.win_rates",
                "rlaif_jax.data.world.labeler_prompts",
            ]
        )
        == []
    )


@pytest.mark.parametrize("name", HIDDEN)
def test_the_firewall_sees_what_is_loaded(name):
    assert f"rlaif_jax.data.world.{name}" in loaded([f"rlaif_jax.data.world.{name}"])
