"""Every named setting: it is what the documentation lists, it trains, and a mesh gives what one device gives."""

import dataclasses
import re
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from rlaif_jax.algorithms import named
from rlaif_jax.algorithms.named import NAMED
from rlaif_jax.algorithms.ppo import PPOConfig
from rlaif_jax.command_line import _parse_arguments
from rlaif_jax.config import from_json, to_json
from rlaif_jax.feedback.sources import collect_feedback
from rlaif_jax.parallel import JitRunner, Runner, ShardRunner, make_mesh
from rlaif_jax.policies.base import draw_count, to_prompts
from rlaif_jax.programs import programs
from rlaif_jax.recipes.rlaif import NAMED_SETTINGS, get_config
from rlaif_jax.steps import step_data
from rlaif_jax.types import Frozen
from tests.builders import OPTIMIZER, TOKENIZER, ppo

PROMPTS = 8


def small(config: PPOConfig) -> PPOConfig:
    """The same settings for a step of 8 prompts, with clips that small models reach, too."""
    return dataclasses.replace(
        config,
        answers_per_prompt=max(config.advantage.min_answers, 2),
        num_minibatches=min(config.num_minibatches, 2),
        num_epochs=min(config.num_epochs, 2),
        value_warmup=0,
        policy_optimizer=OPTIMIZER,
        value_optimizer=OPTIMIZER,
    )


def test_every_setting_survives_json():
    for config in NAMED.values():
        assert from_json(PPOConfig, to_json(config)) == config


def test_every_setting_of_the_module_is_listed():
    made = [x for name, x in vars(named).items() if isinstance(x, PPOConfig) and not name.startswith("_")]
    assert len(made) == len(NAMED) and all(any(config is value for value in NAMED.values()) for config in made)
    assert len({repr(config) for config in NAMED.values()}) == len(NAMED), "two names for the same settings"


@pytest.mark.parametrize("name", NAMED)
def test_train_begins_with_a_named_setting(name, monkeypatch):
    """And options count more."""
    monkeypatch.setattr("sys.argv", ["train", "--config", name, "--ppo.answers-per-prompt", "5"])
    config = _parse_arguments(get_config(), "", named=NAMED_SETTINGS)
    assert config == dataclasses.replace(get_config(), ppo=dataclasses.replace(NAMED[name], answers_per_prompt=5))


def test_the_documentation_has_a_row_for_each():
    table = Path("docs/guides/algorithms.md").read_text().partition("\n| name |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `([a-z0-9+-]+)` \|", table, re.MULTILINE)
    assert rows == list(NAMED)


def two_steps(config: PPOConfig, runner: Runner):
    """(parameters, metrics of both steps) of the programs that the loop runs; the second step has answers of its own."""
    setup = ppo(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})
    algorithm, policy = setup.algorithm, setup.policy
    pure = programs(algorithm, policy)
    sample, prepare, step = runner.map(pure.sample), runner.map(pure.prepare), runner.step(pure.step)
    state = runner.init(algorithm.init, setup.params, np.uint32(3))
    frozen = runner.place(Frozen(setup.params["policy"]))
    stream, history = setup.prompts(PROMPTS), []
    each = draw_count(algorithm.draws)
    for _ in range(2):
        batch = next(stream)
        rollout = jax.device_get(sample((state.without_optimizer(), Frozen()), to_prompts(batch)))
        records = [record for record in batch.records for _ in range(each)]
        judged = collect_feedback(setup.feedback, records, policy.texts(rollout, TOKENIZER), rollout, 1)
        inputs = (step_data(batch), rollout, judged)
        made, _, _ = prepare((state.without_optimizer(), frozen), inputs)
        state, metrics = step(state, Frozen(), made)
        history.append(jax.device_get(metrics))
    return jax.device_get(runner.fetch(state)), history


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_two_steps_on_one_device_and_on_a_mesh(name):
    config = small(NAMED[name])
    state, history = two_steps(config, JitRunner())
    other, others = two_steps(config, ShardRunner(make_mesh(2, 2, 2)))
    chex.assert_trees_all_close(other.params, state.params, rtol=5e-4, atol=2e-5)
    for metrics, same in zip(history, others, strict=True):
        assert metrics["nonfinite"] == 0 and metrics["first/ratio_error"] < 1e-4
        for metric, value in metrics.items():
            np.testing.assert_allclose(same[metric], value, rtol=5e-3, atol=5e-5, err_msg=metric)
    start = ppo().params["policy"]
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state.params["policy"], jax.device_get(start))
    assert all(x > 0 for x in jax.tree.leaves(moved))
