"""A real language model learns to tell happier (or sadder) stories from a sentiment judge.

    python experiments/stories_sentiment.py --model stories260K.bin --tokenizer tok512.bin --sentences rt-polaritydata

The policy is a pretrained storyteller: stories260K (folder stories260K of huggingface.co/karpathy/tinyllamas), or any
model that `load_model` reads. The judge learns "positive" and "negative" from real sentences of film reviews (Pang &
Lee 2005, rt-polarity.pos and rt-polarity.neg); its vocabulary is that of the reviews. PPO then raises the judge's log-odds
of the continuation of a story's beginning, and pays for the KL to the original storyteller. The storyteller itself writes
the beginnings: the first words of its stories are the prompts; 256 of them are held out.

Scores are log-odds, in nats, of the mood asked for: of "positive" for happier, of "negative" for sadder.

Expected, both moods: see experiments/RESULTS.md.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take seconds
    from rlaif_jax.progress.startup import Loading

    loading = Loading()

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from rlaif_jax.algorithms.optimizer import OptimizerConfig
from rlaif_jax.algorithms.ppo import PPOConfig
from rlaif_jax.command_line import command_line
from rlaif_jax.config import require
from rlaif_jax.data.prompts import PromptIterator, prompt_batches
from rlaif_jax.data.readers import FileRecords, jsonl_records
from rlaif_jax.evaluate import Evaluation, rewards_of
from rlaif_jax.feedback.judges.sentences import SOURCE, Sentences, read_sentences
from rlaif_jax.feedback.judges.sentiment import Mood, SentimentConfig, SentimentSource
from rlaif_jax.files import atomic_write
from rlaif_jax.metrics import MetricsWriter
from rlaif_jax.models.hf.files import save_model
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import make_runner
from rlaif_jax.policies.base import to_prompts
from rlaif_jax.policies.text import TextPolicy, answer_texts, make_generator
from rlaif_jax.progress.plan import PlannedStage
from rlaif_jax.recipes.improve import improve, normaliser_of, with_critic
from rlaif_jax.recipes.stories import Storyteller, load_storyteller, sentiment_judge, story_beginnings
from rlaif_jax.run import Run
from rlaif_jax.train import TrainConfig
from rlaif_jax.types import FEEDBACK, INIT, step_key

STAGES = (
    PlannedStage("judge", "a judge learns to tell happy sentences from sad ones", 20),
    PlannedStage(
        "beginnings", "the storyteller writes beginnings of stories, and stories whose scores are the scale", 20
    ),
    PlannedStage("rl", "the storyteller learns to please the judge", 100),
)
MODEL_SOURCE = "stories260K/stories260K.bin and stories260K/tok512.bin of https://huggingface.co/karpathy/tinyllamas"


@dataclasses.dataclass(frozen=True)
class StoriesConfig:
    """All settings.

    Attributes:
        model: a Hugging Face folder, a hub id, or a llama2.c .bin file.
        tokenizer: the tokenizer's file or folder, where the model's folder holds none.
        sentences: the folder of rt-polarity.pos and rt-polarity.neg.
        mood: what the judge should hear.
        seed: of everything random.
        out: the run's folder.
        resume: go on with the run in `out` where it stopped.
        stages: the folder of finished stages, which runs may share; None: in `out`.
        judge: the sentiment judge and its training.
        training_prompts: beginnings of stories to learn on.
        eval_prompts: beginnings of stories to measure on; none of them is learned on.
        beginning: tokens of a beginning, at most.
        train: the loop.
        sampling: how continuations are drawn.
        ppo: the algorithm.
    """

    model: str | None = None
    tokenizer: Path | None = None
    sentences: Path | None = None
    mood: Mood = "happier"
    seed: int = 0
    out: Path = Path("runs/stories_sentiment")
    resume: bool = False
    stages: Path | None = None
    judge: SentimentConfig = SentimentConfig()
    training_prompts: int = 2048
    eval_prompts: int = 256
    beginning: int = 20
    train: TrainConfig = TrainConfig(steps=24, prompts_per_step=128, prompt_length=28, eval_every=4, save_every=8)
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=64)
    ppo: PPOConfig = PPOConfig(
        num_epochs=2,
        num_minibatches=2,
        kl_coef=0.05,
        value_coef=1.0,
        policy_optimizer=OptimizerConfig(learning_rate=3e-4),
        value_optimizer=OptimizerConfig(learning_rate=1e-3),
    )

    def __post_init__(self) -> None:
        for field in ("training_prompts", "eval_prompts", "beginning"):
            require(self.__dict__[field] >= 1, f"{field} must be >= 1, not {self.__dict__[field]}")
        require(
            self.train.prompts_per_step <= self.training_prompts,
            f"train.prompts_per_step ({self.train.prompts_per_step}) must not exceed training_prompts "
            f"({self.training_prompts})",
        )
        require(
            self.beginning < self.train.prompt_length,
            f"beginning ({self.beginning}) must be less than train.prompt_length ({self.train.prompt_length}), "
            "which holds BOS as well",
        )


def get_config() -> StoriesConfig:
    """Returns the default settings."""
    return StoriesConfig()


def load(config: StoriesConfig) -> tuple[Storyteller, Sentences]:
    """Returns the model and the judge's sentences. Raises UserError where one is not given or cannot be read."""
    require(
        config.model is not None,
        "no model to train: give --model, a Hugging Face folder, a hub id or a llama2.c .bin file "
        f"(with --tokenizer where its folder has none), such as {MODEL_SOURCE}",
    )
    storyteller = load_storyteller(
        str(config.model), config.tokenizer, config.train.prompt_length, config.sampling.max_new_tokens
    )
    require(
        config.sentences is not None,
        "no sentences to train the judge on: give --sentences, the folder of rt-polarity.pos and rt-polarity.neg: "
        + SOURCE,
    )
    return storyteller, read_sentences(Path(str(config.sentences)))


def main(config: StoriesConfig) -> dict[str, Any]:
    """Trains the storyteller, writes the new one to OUT/model and returns the run's metrics."""
    storyteller, sentences = load(config)
    model, original, tokenizer = storyteller.model, storyteller.params, storyteller.tokenizer
    length, seed = config.train.prompt_length, config.seed
    with (
        Run(config.out, "stories_sentiment", config, seed=seed, resume=config.resume, stages=config.stages) as run,
        MetricsWriter(config.out, display=run.display) as writer,
    ):
        run.display.plan(STAGES)
        runner = make_runner(config.train.parallel)
        config.train.check(config.ppo, runner.devices)
        source = SentimentSource(sentiment_judge(sentences, config.judge, runner, run, writer), config.mood)
        run.report()

        # ---- Beginnings of stories
        run.display.begin("beginnings")
        path = run.folder / "prompts.jsonl"
        if not (run.resuming and path.exists()):
            count = config.training_prompts + config.eval_prompts
            beginnings = story_beginnings(
                storyteller, runner, count=count, tokens=config.beginning, prompt_length=length, seed=seed
            )
            with atomic_write(path) as file:
                file.writelines(json.dumps({"prompt": text}) + "\n" for text in beginnings)
        stories = jsonl_records(path)
        held_out, training = (
            FileRecords(stories.records[part], stories.places[part])
            for part in (slice(config.eval_prompts), slice(config.eval_prompts, None))
        )

        def batches(records: FileRecords, size: int, shuffle: bool = True) -> PromptIterator:
            return prompt_batches(
                records, tokenizer, batch_size=size, seed=seed, prompt_length=length, add_bos=True, shuffle=shuffle
            )

        # ---- The judge's scores of the original stories, which define the scale of rewards
        size = min(len(training), 512) // runner.devices * runner.devices
        sample = next(batches(training, size))
        generator = make_generator(runner, model, tokenizer, config.sampling)
        rollout = generator((original, step_key(seed, 0, FEEDBACK)), to_prompts(sample))
        scores = rewards_of(source, list(sample.records), answer_texts(rollout, tokenizer), rollout)
        require(
            np.unique(scores[np.isfinite(scores)]).size > 1,
            f"the judge cannot tell the stories of {config.model} apart: it knows {np.isfinite(scores).sum()} of "
            f"{len(scores)}, and gives them all the same score. Are they in the language of {config.sentences}?",
        )

        # ---- PPO, and the judge's scores before and after, on beginnings that it has not learned on
        policy = TextPolicy(model, config.sampling, tokenizer.stop_ids, tokenizer.pad_id)
        prompts = next(batches(held_out, config.eval_prompts, shuffle=False))
        critic, params = with_critic(config.ppo, model, original, original["trunk"], step_key(seed, 0, INIT))
        found = improve(
            config.train,
            run,
            writer,
            algorithm=config.ppo.build(policy, critic, steps=config.train.steps),
            evaluation=Evaluation(policy, tokenizer, runner, prompts, seed, source=source, name="judge"),
            params=params,
            prompts=batches(training, config.train.prompts_drawn),
            feedback=source,
            normaliser=normaliser_of(scores),
        )
        spread = float(np.nanstd(found.before.scores))
        run.metrics |= {
            "judge_sd_before": spread,
            "gain_sd": run.metrics["gain"] / spread,
            "gain_sd_ci95": [bound / spread for bound in run.metrics["gain_ci95"]],
            "judge_missing": float(np.isnan(found.after.scores).mean()),
            "wall_s": round(run.wall_s, 1),
        }
        save_model(run.folder / "model", model, found.params, tokenizer)
        before, after, kl = (run.metrics[name] for name in ("judge_before", "judge_after", "kl"))
        run.story.append(f"{config.mood}: judge score {before:.2f} -> {after:.2f} at KL {kl:.1f}")
    return run.metrics


if __name__ == "__main__":
    command_line(main, get_config(), __doc__, loading=loading)
