"""The policy before training: its model, its answers to compare with, and the scale of the rewards."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.checkpoint import fingerprint
from rlaif_jax.config import UserError, require
from rlaif_jax.data.chat.config import ChatConfig
from rlaif_jax.data.prompts import PromptIterator, Record, prompt_batches
from rlaif_jax.data.readers import FileRecords
from rlaif_jax.data.tokenizers import HuggingFaceTokenizer, Tokenizer
from rlaif_jax.feedback.joined import JoinedSource
from rlaif_jax.feedback.judges.batching import check_batch_size
from rlaif_jax.feedback.sources import FeedbackSource
from rlaif_jax.files import atomic_write
from rlaif_jax.models import CausalLM
from rlaif_jax.models.hf.files import load_with_tokenizer
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import ParallelConfig, Runner, make_runner
from rlaif_jax.policies.base import to_prompts
from rlaif_jax.policies.text import answer_texts, make_generator
from rlaif_jax.recipes.judge_rewards import BASELINE
from rlaif_jax.recipes.own_prompts import OwnPrompts
from rlaif_jax.report.report import read_json
from rlaif_jax.rewards.shaping import Normaliser, fit_normaliser
from rlaif_jax.run import Run
from rlaif_jax.types import FEEDBACK, SAMPLES, Params, Rollout, step_key

DAY = "chat_template_day"
MAX_LENGTH = 1024  # tokens of a row, where the model can read as many and nothing else is asked for


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedPolicy:
    """The policy before training.

    Attributes:
        model: the model.
        params: its parameters.
        tokenizer: its tokenizer.
    """

    model: CausalLM
    params: Params
    tokenizer: Tokenizer


def load_policy(
    name: str,
    tokenizer_path: Path | None,
    chat: ChatConfig = ChatConfig(),
    *,
    dtype: Literal["float32", "bfloat16"],
    remat: bool,
) -> LoadedPolicy:
    """Loads a model and its tokenizer.

    Args:
        name: a Hugging Face folder, a hub id, a .gguf file, or a llama2.c .bin file.
        tokenizer_path: the tokenizer's file or folder; None: it is with the model.
        chat: the chat template and its variables.
        dtype: of matrix products.
        remat: whether blocks are recomputed in the backward pass.

    Raises:
        UserError: one of the two cannot be read, they do not fit each other, or no token ends an answer.
    """
    require(bool(name), "no model to train: give --policy, a Hugging Face folder or a hub id")
    model, params, tokenizer = load_with_tokenizer(name, tokenizer_path, chat, compute_dtype=dtype, remat=remat)
    require(
        bool(tokenizer.stop_ids),
        f"{tokenizer_path or name}: no file declares an end token, so no answer would ever end: name it as "
        "eos_token in tokenizer_config.json",
    )
    return LoadedPolicy(model, params, tokenizer)


class ModelToFit(NamedTuple):
    """A language model that learns from a file.

    Attributes:
        model: the model.
        params: its parameters.
        tokenizer: its tokenizer.
        runner: the devices.
        max_length: most tokens of a row.
    """

    model: CausalLM
    params: Params
    tokenizer: Tokenizer
    runner: Runner
    max_length: int


def model_to_fit(
    name: str | None,
    tokenizer_path: Path | None,
    chat: ChatConfig = ChatConfig(),
    *,
    max_length: int | None,
    batch_size: int,
    dtype: Literal["float32", "bfloat16"],
    remat: bool,
    parallel: ParallelConfig,
) -> ModelToFit:
    """Loads what a supervised recipe begins with.

    Args:
        name: a Hugging Face folder, a hub id, a .gguf file or a llama2.c .bin file.
        tokenizer_path: the tokenizer's file or folder; None: it is with the model.
        chat: the chat template and its variables.
        max_length: most tokens of a row; None: `MAX_LENGTH`, or as many as the model can read.
        batch_size: rows of an update.
        dtype: of activations.
        remat: whether blocks are recomputed in the backward pass.
        parallel: how the devices are used.

    Raises:
        UserError: there is no model, it cannot be read, `max_length` is more than it can read, or a batch cannot be split
            over the devices.
    """
    if name is None:
        raise UserError("no model to begin with: give --model, a Hugging Face folder, a hub id or a .bin file")
    model, params, tokenizer = load_with_tokenizer(name, tokenizer_path, chat, compute_dtype=dtype, remat=remat)
    context = model.config.context_length
    length = min(MAX_LENGTH, context) if max_length is None else max_length
    require(length <= context, f"max_length ({length}) is more than {name} can read: {context} tokens")
    runner = make_runner(parallel, model.rules)
    check_batch_size("fit", batch_size, runner)
    return ModelToFit(model, params, tokenizer, runner, length)


def day_of(run: Run) -> str:
    """Returns the day on which a run was first started, YYYY-MM-DD: chat templates print it."""
    return str(run.metrics.setdefault(DAY, datetime.date.today().isoformat()))


def on_day_of_run(tokenizer: Tokenizer, folder: Path, *, resume: bool) -> Tokenizer:
    """Returns a tokenizer whose chat template prints the day of a run that is about to start or to go on.

    Args:
        tokenizer: the tokenizer; one whose template prints no day is returned as it is.
        folder: of the run.
        resume: whether the run goes on.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer) or not tokenizer.prints_day:
        return tokenizer
    kept = read_json(folder / "summary.json").get("metrics", {}) if resume else {}
    return tokenizer.on_day(str(kept.get(DAY, datetime.date.today().isoformat())))


def keep_day(run: Run, tokenizer: Tokenizer) -> None:
    """Notes the day that a tokenizer's chat template prints, for the run that resumes this one."""
    if isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.day:
        run.metrics[DAY] = tokenizer.day
        run.report()


def keep_fingerprints(run: Run, **inputs: Any) -> dict[str, str]:
    """Notes what a run learns from or measures on, and returns the fingerprints.

    Args:
        run: the run; one that is resumed must have the same inputs as before.
        **inputs: name, in the plural -> a pytree of arrays.

    Raises:
        UserError: an input has changed since the run began.
    """
    found = {name: fingerprint(arrays) for name, arrays in inputs.items()}
    for name, now in found.items():
        before = run.metrics.setdefault(f"{name}_sha256", now)
        require(
            before == now,
            f"{run.folder}: the {name.replace('_', ' ')} are not those that this run began with (fingerprint {now}, then "
            f"{before}): resume it with those, or start a new run without --resume",
        )
    return found


def as_bytes(records: FileRecords) -> np.ndarray:
    """Returns records with all their fields as bytes, for `keep_fingerprints`."""
    return np.frombuffer(json.dumps(records.records, sort_keys=True, default=str).encode(), np.uint8)


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """Draws answers of the policy before training.

    Attributes:
        policy: the policy.
        runner: the devices.
        sampling: how answers are drawn.
        prompt_length: P.
        rows: most answers of a batch.
        add_bos: whether BOS goes before each prompt.
        seed: of the order of prompts and of the answers.
    """

    policy: LoadedPolicy
    runner: Runner
    sampling: SamplingConfig
    prompt_length: int
    rows: int
    add_bos: bool
    seed: int

    def batches(self, records: FileRecords, size: int, *, shuffle: bool = True) -> PromptIterator:
        """Returns batches of `size` of the prompts in `records`, shuffled or in their order."""
        return prompt_batches(
            records,
            self.policy.tokenizer,
            batch_size=size,
            seed=self.seed,
            prompt_length=self.prompt_length,
            add_bos=self.add_bos,
            shuffle=shuffle,
        )

    @cached_property
    def _generator(self) -> Callable[..., Rollout]:
        return make_generator(self.runner, self.policy.model, self.policy.tokenizer, self.sampling)

    def draw(self, records: FileRecords, purpose: int) -> Iterator[tuple[list[Record], list[str], Rollout]]:
        """Yields (records, answers as text, as arrays) of whole batches; the last repeats records to be full."""
        size = max(min(self.rows, len(records)) // self.runner.devices, 1) * self.runner.devices
        key = step_key(self.seed, 0, purpose)
        params = self.runner.place(
            self.policy.params
        )  # as loaded it would be sent to every device, whole, by each call
        for first in range(0, len(records), size):
            rows = [(first + i) % len(records) for i in range(size)]
            chosen = FileRecords(tuple(records.records[i] for i in rows), tuple(records.places[i] for i in rows))
            # The uid of a record is its place in the whole file: an answer does not depend on its batch.
            numbered = tuple({**record, "uid": first + i} for i, record in enumerate(chosen.records))
            batch = next(self.batches(FileRecords(numbered, chosen.places), size, shuffle=False))
            rollout = self._generator((params, key), to_prompts(batch))
            yield list(chosen.records), answer_texts(rollout, self.policy.tokenizer), rollout

    def with_baseline(self, run: Run, prompts: OwnPrompts, *, training: bool) -> OwnPrompts:
        """Returns the prompts with the start's answers as `BASELINE`, kept in the run's folder.

        Args:
            run: keeps the answers, and has them when it is resumed.
            prompts: the prompts.
            training: whether those to learn on need one, too; else the held-out ones alone.
        """
        path = run.folder / "baseline.jsonl"
        parts = [prompts.training, prompts.held_out] if training else [prompts.held_out]
        count = sum(map(len, parts))
        if run.resuming and path.exists():
            texts = [json.loads(line)["baseline"] for line in path.read_text().splitlines()]
            require(len(texts) == count, f"{path} has {len(texts)} answers to {count} prompts: it is of another run")
        else:
            texts = []
            with run.interruptible(), run.display.wait("answers that the judge compares with"):
                for part in parts:
                    answers = [text for _, found, _ in self.draw(part, FEEDBACK) for text in found]
                    texts += answers[: len(part)]
            with atomic_write(path) as file:
                file.writelines(json.dumps({"baseline": text}) + "\n" for text in texts)
        left = iter(texts)
        given = [_with_field(part, left) for part in parts]
        return prompts._replace(training=given[0] if training else prompts.training, held_out=given[-1])


def _with_field(records: FileRecords, texts: Iterator[str]) -> FileRecords:
    return FileRecords(tuple(record | {BASELINE: text} for record, text in zip(records.records, texts)), records.places)


def scale_of(
    run: Run,
    start: Start,
    training: FileRecords,
    source: JoinedSource,
    count: int,
    given: Mapping[str, tuple[float, float]] = MappingProxyType({}),
) -> Normaliser:
    """Returns the scale of each reward; warns of one that does not tell answers apart.

    Args:
        run: takes the warnings.
        start: draws the answers.
        training: the prompts to learn on.
        source: judges the answers.
        count: prompts that are answered, at most; drawn by the seed.
        given: name of a reward -> its mean and deviation, where nobody is to be asked for them.

    Raises:
        UserError: no answer got any reward: nothing could be learned.
    """
    if set(given) >= set(source.names):
        mean, std = (jnp.array([given[name][i] for name in source.names]) for i in range(2))
        return Normaliser(mean, std)
    # By chance: the first lines of a file may all be of one kind.
    rows = np.random.default_rng((start.seed, 15)).permutation(len(training))[:count]
    records = FileRecords(tuple(training.records[i] for i in rows), tuple(training.places[i] for i in rows))
    with run.interruptible(), run.display.wait("answers whose rewards are the scale"):
        judged = [jax.device_get(source(*part)) for part in start.draw(records, SAMPLES)]
    values, valid = (np.concatenate([np.asarray(part[i]) for part in judged]) for i in range(2))
    for column, name in enumerate(source.names):
        if name in given:
            continue
        seen = values[valid[:, column], column]
        require(
            len(seen) > 0,
            f"the reward {name} judged none of {len(values)} answers ({most_frequent(source)}); nothing could be learned",
        )
        if len(seen) < len(values) / 2:
            run.warn(
                f'The reward "{name}" judged only {len(seen)} of {len(values)} answers. Try: read the reasons under missing '
                "judgements."
            )
        if np.unique(seen).size == 1:
            run.warn(
                f'The reward "{name}" is {seen[0]:g} for all {len(seen)} answers that it judged before training: it cannot be '
                "learned from until some answer gets another one. Try: easier prompts, or a reward with steps in between."
            )
    fitted = fit_normaliser(jnp.asarray(values), jnp.asarray(valid))
    for column, name in enumerate(source.names):
        if name in given:
            own = given[name]
            fitted = Normaliser(fitted.mean.at[column].set(own[0]), fitted.std.at[column].set(own[1]))
    return fitted


def most_frequent(source: FeedbackSource) -> str:
    """Returns why most judgements of a source are missing."""
    reasons = source.missing()
    return max(reasons, key=lambda reason: reasons[reason]) if reasons else "no reason was given"
