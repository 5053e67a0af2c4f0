"""A real language model learns to tell happier (or sadder) stories from a sentiment judge.

    python experiments/stories_sentiment.py --model stories260K.bin --tokenizer tok512.bin --sentences rt-polaritydata

The policy is a pretrained storyteller: stories260K (folder stories260K of huggingface.co/karpathy/tinyllamas), or any
model that `load_model` reads. The judge learns "positive" and "negative" from real sentences of film reviews (Pang &
Lee 2005, rt-polarity.pos and rt-polarity.neg) with a vocabulary of its own. PPO then raises the judge's log-odds of the
continuation of a story's beginning, and pays for the KL to the original storyteller. The beginnings are the
storyteller's own: it is asked for stories, and their first words are the prompts; 256 of them are held out.

Scores are log-odds, in nats, of the mood asked for: of "positive" for happier, of "negative" for sadder.

Expected, both moods: see experiments/RESULTS.md.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.algorithms.optimizer import OptimizerConfig
from rlaif_jax.algorithms.ppo import PPOConfig, reference_logprobs
from rlaif_jax.config import UserError, require
from rlaif_jax.data.llama2c import Llama2cTokenizer
from rlaif_jax.data.prompts import PromptBatch, prompt_batches
from rlaif_jax.data.readers import FileRecords, jsonl_records
from rlaif_jax.data.tokenizers import Tokenizer, check_tokenizer, load_tokenizer
from rlaif_jax.feedback.judges.sentiment import (
    SOURCE,
    Mood,
    Sentences,
    SentimentConfig,
    SentimentJudge,
    SentimentSource,
    fit_judge,
    new_judge,
    read_sentences,
    split_sentences,
)
from rlaif_jax.feedback.records.forms import sha256
from rlaif_jax.metrics import MetricsWriter
from rlaif_jax.models import CausalLM, ScalarModel
from rlaif_jax.models.hf.files import download, load_model, save_model
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import Runner, make_runner
from rlaif_jax.policies.text import answer_texts, make_generator, to_prompts
from rlaif_jax.quality.bootstrap import bootstrap_ci
from rlaif_jax.quality.statistics import distinct_n
from rlaif_jax.quality.win_rates import win_rate_ci
from rlaif_jax.rewards.shaping import fit_normaliser
from rlaif_jax.run import Run, StopRequested, command_line
from rlaif_jax.train import TrainConfig, train
from rlaif_jax.types import EVALUATION, FEEDBACK, INIT, Params, Prompts, Rollout, step_key

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
        training_prompts: beginnings of stories to learn on.
        eval_prompts: beginnings of stories to measure on; none of them is learned on.
        beginning: tokens of a beginning, at most.
    """

    model: str | None = None
    tokenizer: Path | None = None
    sentences: Path | None = None
    mood: Mood = "happier"
    seed: int = 0
    out: Path = Path("runs/stories_sentiment")
    resume: bool = False
    judge: SentimentConfig = SentimentConfig()
    training_prompts: int = 2048
    eval_prompts: int = 256
    beginning: int = 20
    train: TrainConfig = TrainConfig(
        steps=24,
        prompts_per_step=128,
        prompt_length=28,
        sampling=SamplingConfig(max_new_tokens=64),
        ppo=PPOConfig(
            num_epochs=2,
            num_minibatches=2,
            kl_coef=0.05,
            value_coef=1.0,
            policy_optimizer=OptimizerConfig(learning_rate=3e-4),
            value_optimizer=OptimizerConfig(learning_rate=1e-3),
        ),
        eval_every=4,
        save_every=8,
    )

    def __post_init__(self) -> None:
        for field in ("training_prompts", "eval_prompts", "beginning"):
            require(getattr(self, field) >= 1, f"{field} must be >= 1, not {getattr(self, field)}")
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
    """The default settings."""
    return StoriesConfig()


class Storyteller(NamedTuple):
    """A pretrained model, its parameters and its tokenizer, whose `eos_id` is what really ends its stories."""

    model: CausalLM
    params: Params
    tokenizer: Tokenizer


def load_storyteller(config: StoriesConfig) -> Storyteller:
    """The model and the tokenizer that the settings name; UserError when one is missing or they do not fit."""
    require(
        config.model is not None,
        "no model to train: give --model, a Hugging Face folder, a hub id or a llama2.c .bin file "
        f"(with --tokenizer where its folder has none), such as {MODEL_SOURCE}",
    )
    name = str(config.model)
    model, params = load_model(name)
    beside = Path(name).parent if Path(name).is_file() else Path(name) if Path(name).is_dir() else download(name)
    tokenizer = load_tokenizer(config.tokenizer or beside)
    check_tokenizer(tokenizer, model.config.vocab_size, name)
    if isinstance(tokenizer, Llama2cTokenizer):
        tokenizer = tokenizer.stopping_at_bos()
    require(
        tokenizer.bos_id is not None,
        f"{config.tokenizer or beside}: this tokenizer has no BOS token to begin a story with",
    )
    longest = config.train.prompt_length + config.train.sampling.max_new_tokens
    require(
        longest <= model.config.context_length,
        f"train.prompt_length ({config.train.prompt_length}) + train.sampling.max_new_tokens "
        f"({config.train.sampling.max_new_tokens}) = {longest} is more than {name} can read: "
        f"{model.config.context_length} tokens",
    )
    return Storyteller(model, params, tokenizer)


def load_sentences(config: StoriesConfig) -> Sentences:
    """The judge's sentences; UserError when there are none."""
    require(
        config.sentences is not None,
        "no sentences to train the judge on: give --sentences, the folder of rt-polarity.pos and rt-polarity.neg: "
        + SOURCE,
    )
    return read_sentences(Path(str(config.sentences)))


def beginnings(storyteller: Storyteller, runner: Runner, config: StoriesConfig) -> list[str]:
    """Distinct beginnings of stories in whole words, as many as the settings ask for, told by the model itself.

    UserError when it does not come up with enough.
    """
    tokenizer = storyteller.tokenizer
    count, batch = config.training_prompts + config.eval_prompts, 512 // runner.devices * runner.devices
    generator = make_generator(runner, storyteller.model, tokenizer, SamplingConfig(max_new_tokens=config.beginning))
    found: dict[str, None] = {}
    rounds = 4 * -(-count // batch)
    for i in range(rounds):
        prompts = Prompts(
            tokens=jnp.array([tokenizer.encode("", add_bos=True)] * batch, jnp.int32),
            mask=jnp.ones((batch, 1), bool),
            uid=jnp.arange(batch, dtype=jnp.uint32),
        )
        rollout = generator((storyteller.params, step_key(config.seed, i, INIT)), prompts)
        for text, ended in zip(answer_texts(rollout, tokenizer), np.asarray(rollout.finished)):
            # The last word may be half a word, and a story that has ended has no continuation.
            beginning = text.rpartition(" ")[0]
            if not ended and beginning and len(tokenizer.encode(beginning, add_bos=True)) <= config.train.prompt_length:
                found[beginning] = None
        if len(found) >= count:
            return list(found)[:count]
    raise UserError(
        f"{config.model}: {rounds * batch} stories have only {len(found)} different beginnings of "
        f"{config.beginning} tokens, {count} are needed: raise `beginning` or lower `training_prompts`"
    )


class Told(NamedTuple):
    """Continuations of the held-out beginnings: scores [B] by the judge in the mood asked for, NaN where missing."""

    rollout: Rollout
    texts: list[str]
    scores: np.ndarray

    @property
    def distinct2(self) -> float:
        """Different token pairs over all token pairs."""
        tokens, mask = np.asarray(self.rollout.responses), np.asarray(self.rollout.response_mask)
        return distinct_n([row[real].tolist() for row, real in zip(tokens, mask)], 2)

    @property
    def length(self) -> float:
        """Mean number of tokens."""
        return float(np.asarray(self.rollout.response_mask).sum(-1).mean())


def main(config: StoriesConfig) -> None:
    storyteller, sentences = load_storyteller(config), load_sentences(config)
    with (
        Run(
            config.out,
            "stories_sentiment",
            dataclasses.replace(config, resume=False),
            seed=config.seed,
            resume=config.resume,
        ) as run,
        MetricsWriter(config.out) as writer,
    ):
        stories_sentiment(config, storyteller, sentences, run, writer)


def trained_judge(
    config: StoriesConfig, sentences: Sentences, runner: Runner, run: Run, writer: MetricsWriter
) -> SentimentJudge:
    """The judge, from the run's folder or trained now; its accuracy on held-out sentences goes to the run's metrics."""
    training, held_out = split_sentences(sentences, config.judge.held_out, config.seed)
    judge = new_judge(training, config.judge, config.seed, runner)

    def learn() -> Params:
        run.settled()
        with writer.stage("judge", config.judge.updates) as log:
            return fit_judge(judge, training, config.judge, config.seed, log=log.write, stop=run.stopped)

    settings = {"judge": config.judge, "sentences": sha256([training.texts, np.asarray(training.labels).tolist()])}
    judge = dataclasses.replace(judge, params=run.stage("judge", judge.params, learn, settings=settings).params)
    run.metrics |= {"judge_accuracy": judge.accuracy(held_out), "judge_sha256": judge.hash}
    return judge


def stories_sentiment(
    config: StoriesConfig, storyteller: Storyteller, sentences: Sentences, run: Run, writer: MetricsWriter
) -> None:
    seed = config.seed
    runner = make_runner(config.train.parallel)
    model, original, tokenizer = storyteller

    # ---- The judge of moods
    source = SentimentSource(trained_judge(config, sentences, runner, run, writer), config.mood)
    run.report()

    # ---- Beginnings of stories
    path = run.folder / "prompts.jsonl"
    if not (run.resuming and path.exists()):
        told_first = beginnings(storyteller, runner, config)
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in told_first))
    stories = jsonl_records(path)
    held_out, training = (
        FileRecords(stories.records[part], stories.places[part])
        for part in (slice(config.eval_prompts), slice(config.eval_prompts, None))
    )
    stream = prompt_batches(
        training,
        tokenizer,
        batch_size=config.train.prompts_per_step,
        seed=seed,
        prompt_length=config.train.prompt_length,
        add_bos=True,
    )
    prompts = next(
        prompt_batches(
            held_out,
            tokenizer,
            batch_size=config.eval_prompts,
            seed=seed,
            shuffle=False,
            prompt_length=config.train.prompt_length,
            add_bos=True,
        )
    )
    generator = make_generator(runner, model, tokenizer, config.train.sampling)

    def tell(params: Params, prompts: PromptBatch, purpose: int) -> Told:
        rollout = generator((params, step_key(seed, 0, purpose)), to_prompts(prompts))
        texts = answer_texts(rollout, tokenizer)
        judged = source(prompts.records, texts, rollout)
        return Told(rollout, texts, np.where(judged.valid, judged.values, np.nan))

    def evaluate(params: Params, step: int) -> dict[str, float]:
        told = tell(params, prompts, EVALUATION)
        for i in range(min(4, config.eval_prompts)):
            run.sample(
                step=step,
                stage="rl",
                index=i,
                prompt=prompts.records[i]["prompt"],
                response=told.texts[i],
                reward=number(told.scores[i]),
            )
        return {"judge_score": float(np.nanmean(told.scores)), "distinct2": told.distinct2, "eval_length": told.length}

    # ---- PPO
    size = min(len(training), 512) // runner.devices * runner.devices
    sample = next(
        prompt_batches(
            training, tokenizer, batch_size=size, seed=seed, add_bos=True, prompt_length=config.train.prompt_length
        )
    )
    scores = tell(original, sample, FEEDBACK).scores
    require(
        np.unique(scores[np.isfinite(scores)]).size > 1,
        f"the judge cannot tell the stories of {config.model} apart: it knows {np.isfinite(scores).sum()} of "
        f"{len(scores)}, and gives them all the same score. Are they in the language of {config.sentences}?",
    )
    normaliser = fit_normaliser(jnp.asarray(scores, jnp.float32), jnp.asarray(np.isfinite(scores)))
    before = tell(original, prompts, EVALUATION)
    critic = ScalarModel(model.config, "zero")
    value = critic.init(step_key(seed, 0, INIT), trunk=original["trunk"])
    policy = train(
        config.train,
        run,
        writer,
        tokenizer=tokenizer,
        policy=model,
        policy_params=original,
        critic=critic,
        value_params=value,
        prompts=stream,
        feedback=source,
        normaliser=normaliser,
        evaluate=evaluate,
    )
    if run.stop_requested:
        raise StopRequested

    # ---- What changed, on beginnings that it has not learned on
    after = tell(policy, prompts, EVALUATION)
    logprobs = jax.jit(partial(reference_logprobs, model, temperature=config.train.sampling.temperature))
    divergence = (np.asarray(after.rollout.logprobs) - np.asarray(logprobs(original, after.rollout))).sum(-1)
    spread = float(np.nanstd(before.scores))
    gained = bootstrap_ci(after.scores - before.scores, seed=seed)
    won = win_rate_ci(after.scores, before.scores, seed=seed)
    for name, told in (("before", before), ("after", after)):
        for i in range(min(24, config.eval_prompts)):
            run.sample(
                step=0 if name == "before" else config.train.steps,
                stage=name,
                index=i,
                prompt=prompts.records[i]["prompt"],
                response=told.texts[i],
                reward=number(told.scores[i]),
            )
    run.metrics |= {
        "score_before": float(np.nanmean(before.scores)),
        "score_after": float(np.nanmean(after.scores)),
        "score_sd_before": spread,
        "gain_sd": float(np.nanmean(after.scores - before.scores)) / spread,
        "gain_sd_ci95": [bound / spread for bound in gained],
        "win_rate_judge": won.value,
        "win_rate_judge_ci95": [won.low, won.high],
        "kl": float(divergence.mean()),
        "distinct2_before": before.distinct2,
        "distinct2_after": after.distinct2,
        "length_before": before.length,
        "length_after": after.length,
        "judge_missing": float(np.isnan(after.scores).mean()),
        "wall_s": round(run.wall_s, 1),
    }
    save_model(run.folder / "model", model, policy, tokenizer)
    print(
        f"{config.mood}: judge score {np.nanmean(before.scores):.2f} -> {np.nanmean(after.scores):.2f} "
        f"({run.metrics['gain_sd']:+.2f} standard deviations) at KL {divergence.mean():.1f}; "
        f"{config.out / 'report.html'}"
    )


def number(score: float) -> float | None:
    """A score for samples.jsonl, which knows no NaN."""
    return float(score) if np.isfinite(score) else None


if __name__ == "__main__":
    command_line(main, get_config(), __doc__)
