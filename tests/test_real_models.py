"""Pretrained models through the loop, in float32 and bfloat16, on every layout of devices, with the product's checks on."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from rlaif_jax.algorithms.advantages import GroupNormalised
from rlaif_jax.algorithms.optimizer import OptimizerConfig
from rlaif_jax.algorithms.ppo import PPOConfig
from rlaif_jax.data.prompts import prompt_batches
from rlaif_jax.data.tokenizers import load_tokenizer
from rlaif_jax.feedback.sources import FunctionSource
from rlaif_jax.metrics import MetricsWriter, read_metrics
from rlaif_jax.models import CausalLM, ScalarModel
from rlaif_jax.models.hf.files import load_model
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import ParallelConfig
from rlaif_jax.policies.text import TextPolicy
from rlaif_jax.recipes.stories import load_storyteller
from rlaif_jax.run import Run
from rlaif_jax.train import TrainConfig, train

pytestmark = pytest.mark.slow

MESH = lambda *shape: ParallelConfig("shard", *shape)
GRPO: dict[str, Any] = {"advantage": GroupNormalised(), "answers_per_prompt": 4, "kl_in": "loss", "packed_rows": 2}
ALGORITHMS: dict[str, dict[str, Any]] = {"ppo": {"num_minibatches": 2}, "grpo": GRPO}
LAYOUTS = {
    "one device": MESH(1),
    "pmap": ParallelConfig(),
    "8x1x1": MESH(8),
    "2x4x1": MESH(2, 4),
    "2x2x2": MESH(2, 2, 2),
}
NAMES = ("Lily", "Tom", "Sara", "Ben", "Mia", "Max", "Anna", "Tim")
STARTS = (
    "Once upon a time,",
    "One day,",
    "There was a dog named",
    "Then",
    "The next day,",
    "In the park,",
    "Suddenly,",
    "At home,",
)
ENDS = ("", " and")
BEGINNINGS = [f"{start} {name}{end}" for name in NAMES for start in STARTS for end in ENDS]


def run(
    out: Path,
    model: CausalLM,
    params: Any,
    tokenizer: Any,
    records: list[dict[str, str]],
    reward: Callable[[Any, str], float],
    *,
    settings: dict[str, Any],
    parallel: ParallelConfig,
    steps: int,
    prompts: tuple[int, int],
    answer: int,
    learning_rate: float,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Trains and returns the metrics of every step.

    Args:
        out: the run's folder.
        model: the policy.
        params: its parameters.
        tokenizer: its tokenizer.
        records: prompts.
        reward: of a record and an answer.
        settings: of `PPOConfig`, what the algorithms differ in.
        parallel: how the devices are used.
        steps: number of steps.
        prompts: answers of a step, and the tokens that they are padded to.
        answer: most tokens of an answer.
        learning_rate: of policy and critic.
        seed: of the run.
    """
    optimizer = OptimizerConfig(learning_rate=learning_rate, schedule="constant")
    config = PPOConfig(policy_optimizer=optimizer, value_optimizer=optimizer, **settings)
    policy = TextPolicy(model, SamplingConfig(max_new_tokens=answer), tokenizer.stop_ids, tokenizer.pad_id)
    critic = ScalarModel(model.config, "zero") if config.advantage.needs_critic else None
    size = prompts[0] // config.answers_per_prompt
    loop = TrainConfig(steps, size, prompt_length=prompts[1], parallel=parallel, eval_every=steps, save_every=steps)
    stream = prompt_batches(
        records, tokenizer, batch_size=size, seed=seed, prompt_length=prompts[1], add_bos=tokenizer.bos_id is not None
    )
    with Run(out, "real", config, seed=seed) as folder, MetricsWriter(out, terminal=False, sinks=()) as writer:
        train(
            loop,
            folder,
            writer,
            algorithm=config.build(policy, critic, steps=steps),
            policy=policy,
            params={"policy": params}
            | ({} if critic is None else {"value": critic.init(jax.random.key(0), params["trunk"])}),
            tokenizer=tokenizer,
            prompts=stream,
            feedback=FunctionSource(reward),
        )
    assert folder.checks
    assert all(folder.checks.values())
    return [row for row in read_metrics(out / "metrics.jsonl") if "reward" in row]


def mean_reward(rows: list[dict[str, Any]]) -> float:
    """Returns the mean reward of the last five steps."""
    return statistics.mean(row["reward"] for row in rows[-5:])


def assert_as_in_float32(name: str, got: list[dict[str, Any]], exact: list[list[dict[str, Any]]]) -> None:
    """Asserts that bfloat16 samples and trains alike, and learns what runs in float32 with several seeds learn.

    Args:
        name: of the run.
        got: the metrics of its steps.
        exact: of the runs in float32.
    """
    assert max(row["first/sampler_gap"] for row in got) < 5e-2, name
    assert min(row["first/effective_sample_size"] for row in got) > 0.9, name
    rewards = [mean_reward(rows) for rows in exact]
    error = statistics.stdev(rewards) * math.sqrt(
        1 + 1 / len(rewards)
    )  # of the difference of one run and the mean of these
    assert abs(mean_reward(got) - statistics.mean(rewards)) < 3 * error, name


def he(record: Any, answer: str) -> float:
    """Returns five times the share of an answer's words that are "he"."""
    words = answer.lower().split()
    return 5 * words.count("he") / max(len(words), 1)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_stories260k_learns_in_bfloat16_on_every_layout(algorithm, shared_data, tmp_path):
    story = load_storyteller(str(shared_data("lm_stories260k/stories260K.bin")), None, 16, 16)

    def learn(name: str, dtype: str, layout: str, seed: int) -> list[dict[str, Any]]:
        return run(
            tmp_path / name,
            CausalLM(dataclasses.replace(story.model.config, compute_dtype=dtype)),
            story.params,
            story.tokenizer,
            [{"prompt": text} for text in BEGINNINGS],
            he,
            settings=ALGORITHMS[algorithm],
            parallel=LAYOUTS[layout],
            steps=20,
            prompts=(64, 16),
            answer=16,
            learning_rate=2e-4,
            seed=seed,
        )

    exact = [learn(f"float32 {seed}", "float32", "one device", seed) for seed in range(5)]
    assert min(map(mean_reward, exact)) > 10 * exact[0][0]["reward"], "there is something to learn"
    for layout in LAYOUTS:
        assert_as_in_float32(layout, learn(layout, "bfloat16", layout, 0), exact)


QUESTIONS = (
    "What is the capital of France?",
    "Name a colour of the rainbow.",
    "Why do cats purr?",
    "How do I boil an egg?",
    "What is a noun?",
    "Who wrote Hamlet?",
    "What is 7 times 8?",
    "Give a synonym of happy.",
)


def short(record: Any, answer: str) -> float:
    """Returns 1 for an answer of one sentence of at most twelve words."""
    return float(answer.endswith(".") and answer.count(".") == 1 and len(answer.split()) <= 12)


def test_a_chat_model_of_thirty_blocks_learns_in_bfloat16(tmp_path):
    """SmolLM2-135M-Instruct, on one device and with its matrices split over two."""
    folder = os.environ.get("RLAIF_JAX_CHAT_MODEL")
    if not folder:
        pytest.skip(
            "needs a chat model of half a gigabyte: set RLAIF_JAX_CHAT_MODEL to the folder of SmolLM2-135M-Instruct"
        )
    tokenizer = load_tokenizer(folder)
    asked = [f"{question} Answer in one short sentence." for question in QUESTIONS]
    records = [{"prompt": tokenizer.chat_text([{"role": "user", "content": text}])} for text in asked]

    def learn(name: str, dtype: str, parallel: ParallelConfig, seed: int) -> list[dict[str, Any]]:
        model, params = load_model(folder, compute_dtype=dtype)
        return run(
            tmp_path / name,
            model,
            params,
            tokenizer,
            records,
            short,
            settings=GRPO | {"packed_rows": 4},
            parallel=parallel,
            steps=5,
            prompts=(32, 56),
            answer=24,
            learning_rate=1e-5,
            seed=seed,
        )

    exact = [learn(f"float32 {seed}", "float32", MESH(1), seed) for seed in range(5)]
    for dtype, parallel in itertools.product(("float32", "bfloat16"), (MESH(1), MESH(1, 2, 1))):
        name = f"{dtype}, {parallel}"
        assert_as_in_float32(name, learn(name, dtype, parallel, 0), exact)
