"""A pretrained storyteller, beginnings of stories for it to continue, and a judge of their mood."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from rlaif_jax.config import UserError, require
from rlaif_jax.data.tokenizers import Tokenizer
from rlaif_jax.feedback.judges.sentences import Sentences, split_sentences
from rlaif_jax.feedback.judges.sentiment import SentimentConfig, SentimentJudge, fit_judge, new_judge
from rlaif_jax.feedback.records.forms import sha256
from rlaif_jax.metrics import MetricsWriter
from rlaif_jax.models import CausalLM
from rlaif_jax.models.hf.files import load_with_tokenizer
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import Runner
from rlaif_jax.policies.text import answer_texts, make_generator
from rlaif_jax.run import Run
from rlaif_jax.types import INIT, Params, Prompts, step_key


class Storyteller(NamedTuple):
    """A pretrained model.

    Attributes:
        name: what it was loaded from.
        model: the model.
        params: its parameters.
        tokenizer: its tokenizer; `eos_id` is the token that really ends the model's stories.
    """

    name: str
    model: CausalLM
    params: Params
    tokenizer: Tokenizer


def load_storyteller(name: str, tokenizer_path: Path | None, prompt_length: int, max_new_tokens: int) -> Storyteller:
    """Loads a model and its tokenizer.

    Args:
        name: a Hugging Face folder, a hub id or a llama2.c .bin file.
        tokenizer_path: the tokenizer's file or folder; None: it is next to the model.
        prompt_length: P.
        max_new_tokens: T.

    Raises:
        UserError: one of the files is missing, they do not fit each other, or the model cannot read P + T tokens.
    """
    model, params, tokenizer = load_with_tokenizer(name, tokenizer_path)
    require(
        tokenizer.bos_id is not None,
        f"{tokenizer_path or name}: this tokenizer has no BOS token to begin a story with",
    )
    longest = prompt_length + max_new_tokens
    require(
        longest <= model.config.context_length,
        f"train.prompt_length ({prompt_length}) + sampling.max_new_tokens "
        f"({max_new_tokens}) = {longest} is more than {name} can read: "
        f"{model.config.context_length} tokens",
    )
    return Storyteller(name, model, params, tokenizer)


def story_beginnings(
    storyteller: Storyteller, runner: Runner, *, count: int, tokens: int, prompt_length: int, seed: int
) -> list[str]:
    """Returns different beginnings of stories in whole words, written by the model itself.

    Args:
        storyteller: the model.
        runner: the devices.
        count: number of beginnings.
        tokens: most tokens of a beginning as it is drawn.
        prompt_length: most tokens of a beginning with BOS.
        seed: of the draws.

    Raises:
        UserError: four times as many stories as needed have too few different beginnings.
    """
    tokenizer = storyteller.tokenizer
    batch = 512 // runner.devices * runner.devices
    generator = make_generator(runner, storyteller.model, tokenizer, SamplingConfig(max_new_tokens=tokens))
    found: dict[str, None] = {}
    rounds = 4 * -(-count // batch)
    for i in range(rounds):
        prompts = Prompts(
            tokens=jnp.array([tokenizer.encode("", add_bos=True)] * batch, jnp.int32),
            mask=jnp.ones((batch, 1), bool),
            uid=jnp.arange(batch, dtype=jnp.uint32),
        )
        rollout = generator((storyteller.params, step_key(seed, i, INIT)), prompts)
        for text, ended in zip(answer_texts(rollout, tokenizer), np.asarray(rollout.finished)):
            # The last word may be half a word, and a story that has ended has no continuation.
            beginning = text.rpartition(" ")[0]
            if not ended and beginning and len(tokenizer.encode(beginning, add_bos=True)) <= prompt_length:
                found[beginning] = None
        if len(found) >= count:
            return list(found)[:count]
    raise UserError(
        f"{storyteller.name}: {rounds * batch} stories have only {len(found)} different beginnings of {tokens} tokens, "
        f"{count} are needed: raise `beginning` or lower `training_prompts`"
    )


def sentiment_judge(
    sentences: Sentences, settings: SentimentConfig, runner: Runner, run: Run, writer: MetricsWriter
) -> SentimentJudge:
    """Returns the judge, a stage of the run; its accuracy on held-out sentences is one of the metrics.

    Args:
        sentences: to learn from, and a part to measure on.
        settings: of the judge and its training.
        runner: the devices.
        run: keeps the judge.
        writer: takes the metrics of the fit.
    """
    training, held_out = split_sentences(sentences, settings.held_out, run.seed)
    judge = new_judge(training, settings, run.seed, runner)

    def learn() -> Params:
        run.settled()
        with writer.stage("judge", settings.updates) as log:
            return fit_judge(judge, training, settings, run.seed, log=log.write, stop=run.stopped)

    stage_settings = {"judge": settings, "sentences": sha256([training.texts, np.asarray(training.labels).tolist()])}
    stage = run.stage("judge", judge.params, learn, settings=stage_settings)
    judge = dataclasses.replace(judge, params=stage.params)
    run.metrics |= {"judge_accuracy": judge.accuracy(held_out), "judge_sha256": judge.hash}
    return judge
