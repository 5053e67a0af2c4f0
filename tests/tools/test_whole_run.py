"""The tools on runs that `train` itself has left."""

import json

import jax
import numpy as np
import pytest

from rlaif_jax.models.hf.files import load_model
from rlaif_jax.models.lora import LoRAConfig
from rlaif_jax.recipes.rlaif import main as train
from rlaif_jax.tools import export, generate, pages
from rlaif_jax.tools.runs import load_run_policy
from tests.helpers import assert_same_leaves
from tests.recipes.test_rlaif import TWO, config_of, inputs  # noqa: F401

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):  # noqa: F811
    """A run that trained all weights, one step off-policy, and one that trained an adapter."""
    path = tmp_path_factory.mktemp("runs")
    for name, changed in {"whole": {}, "lora": {"lora": True, "adapter": LoRAConfig(rank=2)}}.items():
        config = config_of(inputs, path / name, *TWO, **changed)
        rhythm = {"steps": 2, "eval_every": 2, "save_every": 1, "staleness": int(name == "whole")}
        train(config.__class__(**vars(config) | {"train": config.train.__class__(**vars(config.train) | rhythm)}))
    return path


@pytest.mark.parametrize("name", ["whole", "lora"])
def test_the_newest_checkpoint_is_the_model_that_the_run_left(runs, name, tmp_path):
    _, left = load_model(runs / name / "model")
    policy = load_run_policy(runs / name)
    assert policy.step == 2 and (policy.adapter is None) == (name == "whole")
    assert_same_leaves(policy.params, left)
    export.main(export.ExportConfig(str(runs / name), tmp_path / "before", step=1))
    _, before = load_model(tmp_path / "before")
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, left)
    assert any(jax.tree.leaves(moved))


def test_two_runs_answer_and_are_compared(runs, inputs, tmp_path, capsys):  # noqa: F811
    settings = {"against": str(runs / "lora"), "prompts": str(inputs / "prompts.txt"), "max_new_tokens": 6}
    generate.main(generate.GenerateConfig(str(runs / "whole"), **settings, out=tmp_path / "answers.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 64 and all(len(row["answers"]) == 2 for row in rows)
    pages.main(pages.PagesConfig((runs / "whole", runs / "lora"), tmp_path / "compare.html"))
    page = (tmp_path / "compare.html").read_text()
    assert "adapter.rank" in page and "train.staleness" in page and page.count("<svg") >= 5
