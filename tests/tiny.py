"""A whole experiment, small enough for a test: prompts from JSONL, a model from a folder or fresh, a rule as feedback.

python -m tests.tiny --prompts prompts.jsonl --out runs/tiny
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlaif_jax.algorithms.optimizer import OptimizerConfig
from rlaif_jax.algorithms.ppo import PPOConfig
from rlaif_jax.command_line import command_line
from rlaif_jax.data.prompts import prompt_batches
from rlaif_jax.data.readers import jsonl_records
from rlaif_jax.data.tokenizers import load_tokenizer, word_level_tokenizer
from rlaif_jax.feedback.sources import FunctionSource
from rlaif_jax.metrics import MetricsWriter, read_metrics, without_time
from rlaif_jax.models import CausalLM, ScalarModel
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.hf.files import load_model
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.policies.text import TextPolicy
from rlaif_jax.run import Run
from rlaif_jax.train import TrainConfig, train

WORDS = tuple("abcdefghijklmnopqrstuvwxyz")
PROMPTS = [{"prompt": f"{a} {b} {c}"} for a in "bcde" for b in "fgh" for c in "ijk"]


def write_prompts(folder: Path) -> Path:
    """Writes the prompts of the tests' runs and returns the file."""
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    return path


def numbers(folder: Path) -> list[dict[str, Any]]:
    """Returns the metrics of a run without those that depend on the clock."""
    return [without_time(line) for line in read_metrics(folder / "metrics.jsonl")]


def leaves(folder: Path) -> list[np.ndarray]:
    """Returns the final parameters of a run."""
    return list(np.load(folder / "final.npz").values())


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    """Settings of the tiny experiment."""

    prompts: Path = Path("prompts.jsonl")
    model: Path | None = None
    tokenizer: Path | None = None
    out: Path = Path("runs/tiny")
    seed: int = 0
    epochs: int | None = None
    resume: bool = False
    nan_reward: bool = False
    width: int = 16
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=6)
    train: TrainConfig = TrainConfig(steps=20, prompts_per_step=16, prompt_length=6, save_every=5, eval_every=5)
    ppo: PPOConfig = PPOConfig(
        num_epochs=2,
        num_minibatches=2,
        kl_target=1.0,
        kl_horizon=100.0,
        policy_optimizer=OptimizerConfig(learning_rate=1e-2),
        value_optimizer=OptimizerConfig(learning_rate=1e-2),
    )


def reward(config: TinyConfig, record: Any, answer: str) -> float | None:
    """Counts a and punishes b."""
    if config.nan_reward:
        return float("nan")
    return answer.split().count("a") - 0.1 * answer.split().count("b")


def main(config: TinyConfig) -> None:
    """Trains and writes the final parameters."""
    records = jsonl_records(config.prompts)
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else word_level_tokenizer(WORDS)
    if config.model:
        model, params = load_model(config.model)
    else:
        model = CausalLM(
            small_decoder(tokenizer.vocab_size, num_layers=1, width=config.width, num_heads=2, context_length=16)
        )
        params = model.init(jax.random.key(config.seed))
    policy = TextPolicy(model, config.sampling, tokenizer.eos_id, tokenizer.pad_id)
    stream = prompt_batches(
        records,
        tokenizer,
        batch_size=config.train.prompts_drawn,
        seed=config.seed,
        prompt_length=config.train.prompt_length,
        epochs=config.epochs,
    )
    critic = ScalarModel(model.config, "zero") if config.ppo.advantage.needs_critic else None
    settings = dataclasses.replace(config, resume=False)
    with (
        Run(config.out, "tiny", settings, seed=config.seed, resume=config.resume) as run,
        MetricsWriter(config.out, terminal=False, sinks=()) as writer,
    ):
        final = train(
            config.train,
            run,
            writer,
            algorithm=config.ppo.build(policy, critic, steps=config.train.steps),
            policy=policy,
            params={"policy": params} | ({} if critic is None else {"value": critic.init(jax.random.key(1))}),
            tokenizer=tokenizer,
            prompts=stream,
            feedback=FunctionSource(lambda record, answer: reward(config, record, answer)),
        )["policy"]
        np.savez(config.out / "final.npz", *[np.asarray(x) for x in jax.tree.leaves(final)])


if __name__ == "__main__":
    command_line(main, TinyConfig())
