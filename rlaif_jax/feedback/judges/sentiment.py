"""A sentiment judge, trained on labelled texts: a source of feedback, and the reader of comments.

The judge learns from any labelled texts (`Sentences`): sentences marked positive or negative, comments with a
score (soft labels), and texts with a label for each of several aspects.

The judge reads *text* with its own vocabulary, learned from its sentences: the policy's tokens are decoded
and split into words again, so any policy fits. It returns the log-odds of "positive"; a text without a known
word is *missing*, not neutral.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers as hf

from rlaif_jax.algorithms.fit import fit, minibatches
from rlaif_jax.algorithms.optimizer import OptimizerConfig, descend, make_optimizer
from rlaif_jax.config import require
from rlaif_jax.data.prompts import Record, padded
from rlaif_jax.data.tokenizers import HuggingFaceTokenizer, check_tokenizer
from rlaif_jax.feedback.judges.batching import check_batch_size
from rlaif_jax.feedback.judges.language_model import weights_hash
from rlaif_jax.feedback.judges.sentences import Sentences
from rlaif_jax.feedback.sources import FeedbackSource
from rlaif_jax.models.classifier import TextClassifier
from rlaif_jax.parallel import Runner, psum
from rlaif_jax.types import INIT, Feedback, Metrics, Params, Rollout, step_key

PAD, UNKNOWN = "<pad>", "<unk>"
Mood = Literal["happier", "sadder"]


# ---- Training


@dataclasses.dataclass(frozen=True)
class SentimentConfig:
    """Settings of a sentiment judge and its training.

    Attributes:
        updates: steps of AdamW.
        batch_size: sentences a step.
        learning_rate: the first one; it falls linearly to 0.
        weight_decay: the weight decay of AdamW.
        held_out: share of the sentences on which the judge's accuracy is measured.
        width: width of the word embeddings.
        repeats: whether a word counts as often as it occurs: right for texts of raters ("vital" said of three
            things is more than of one), wrong for texts of a policy, which would learn to repeat a word again
            and again.
        vocab_size: greatest number of known words.
        min_frequency: how often a word must occur to be known.
        max_words: known words of a text that are read; the rest is cut.
    """

    updates: int = 600
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.0
    held_out: float = 0.1
    width: int = 32
    repeats: bool = False
    vocab_size: int = 20_000
    min_frequency: int = 2
    max_words: int = 96

    def __post_init__(self) -> None:
        require(0 < self.held_out < 1, f"judge.held_out must lie between 0 and 1, not {self.held_out}")
        for field in ("updates", "batch_size", "width", "vocab_size", "min_frequency", "max_words"):
            value = vars(self)[field]
            require(value >= 1, f"judge.{field} must be >= 1, not {value}")


def word_tokenizer(texts: Sequence[str], config: SentimentConfig) -> HuggingFaceTokenizer:
    """Builds a word-level tokenizer of the texts: lower case, punctuation apart, rare words unknown.

    Args:
        texts: the texts whose words make the vocabulary.
        config: the largest vocabulary (`vocab_size`) and the frequency that a word needs (`min_frequency`).
    """
    backend = hf.Tokenizer(hf.models.WordLevel({PAD: 0, UNKNOWN: 1}, unk_token=UNKNOWN))
    backend.normalizer = hf.normalizers.Lowercase()
    backend.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    trainer = hf.trainers.WordLevelTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        show_progress=False,
        special_tokens=[PAD, UNKNOWN],
    )
    backend.train_from_iterator(texts, trainer)
    return HuggingFaceTokenizer(
        backend, pad_id=0, bos_id=None, eos_id=None, settings={"pad_token": PAD, "unk_token": UNKNOWN}
    )


def known_words(tokenizer: HuggingFaceTokenizer, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the token ids and the mask [B, length] of texts, right padded, without unknown words.

    Args:
        tokenizer: the judge's word-level tokenizer.
        texts: the B texts.
        length: at most this many known words of a text are kept, from its beginning.
    """
    unknown = tokenizer.token_id(UNKNOWN)
    ids = [[i for i in tokenizer.encode(text) if i not in (unknown, tokenizer.pad_id)][:length] for text in texts]
    return padded(ids, length, tokenizer.pad_id, "right")


def classifier_step(
    model: TextClassifier,
    optimizer: optax.GradientTransformation,
    state: tuple[Params, Any],
    batch: dict[str, jax.Array],
    *,
    axis_name: str | None = None,
) -> tuple[tuple[Params, Any], Metrics]:
    """Updates a classifier once by cross-entropy; has the form that `Runner.step` compiles.

    Args:
        model: the classifier.
        optimizer: makes updates of gradients.
        state: (params, opt_state).
        batch: `tokens` and `mask` [B, S]; `labels` in 0..1 and `weights`, both [B] or [B, A]. A label of
            weight 0 is not read.
        axis_name: the device axis under pmap.

    Returns:
        The new state and the metrics `loss`, `grad_norm` and `accuracy`, which counts a label above a half as positive.
    """

    def loss_fn(params: Params) -> tuple[jax.Array, Metrics]:
        weights = batch["weights"]
        labels = jnp.where(weights > 0, batch["labels"], 0.0)
        logits = model(params, batch["tokens"], batch["mask"])
        total = psum(weights.sum(), axis_name)
        total = jnp.where(total > 0, total, 1.0)
        loss = jnp.sum(weights * optax.sigmoid_binary_cross_entropy(logits, labels)) / total
        right = jnp.sum(weights * ((logits > 0) == (labels > 0.5))) / total
        return loss, {"loss": psum(jax.lax.stop_gradient(loss), axis_name), "accuracy": psum(right, axis_name)}

    return descend(loss_fn, optimizer, state, axis_name)


def new_judge(sentences: Sentences, config: SentimentConfig, seed: int, runner: Runner) -> SentimentJudge:
    """Builds an untrained judge with the vocabulary and the aspects of `sentences`.

    Args:
        sentences: the labelled texts; labels [n, A] give a judge of A aspects.
        config: sizes of the vocabulary and of the model.
        seed: of the parameters.
        runner: the devices that run the judge.
    """
    tokenizer = word_tokenizer(sentences.texts, config)
    aspects = None if sentences.labels.ndim == 1 else sentences.labels.shape[1]
    model = TextClassifier(tokenizer.vocab_size, config.width, aspects, config.repeats)
    batch_size = -(-128 // runner.devices) * runner.devices
    return SentimentJudge(model, model.init(step_key(seed, 3, INIT)), tokenizer, runner, batch_size, config.max_words)


def fit_judge(
    judge: SentimentJudge,
    sentences: Sentences,
    config: SentimentConfig,
    seed: int,
    *,
    log: Callable[[int, dict[str, float]], None] = lambda update, values: None,
    stop: Callable[[], bool] = lambda: False,
) -> Params:
    """Trains a judge on sentences and returns its new parameters.

    Args:
        judge: the judge as it is now; not changed.
        sentences: what it learns. Fewer sentences than `config.batch_size` make one batch (a multiple of the
            devices).
        config: the settings of the training.
        seed: draws the minibatches.
        log, stop: see `fit`.

    Raises:
        UserError: fewer sentences than devices.
    """
    tokens, mask = known_words(judge.tokenizer, sentences.texts, judge.max_words)
    weights = sentences.label_weights
    labels = np.where(weights > 0, sentences.labels, 0.0).astype(np.float32)
    examples = {"tokens": tokens, "mask": mask, "labels": labels, "weights": weights}
    devices = judge.runner.devices
    require(len(sentences) >= devices, f"{len(sentences)} sentences are too few to learn from on {devices} devices")
    batch_size = min(config.batch_size, len(sentences) // devices * devices)
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=config.learning_rate, weight_decay=config.weight_decay, eps=1e-8), config.updates
    )
    state = fit(
        partial(classifier_step, judge.model, optimizer),
        (judge.params, optimizer.init(judge.params)),
        minibatches(examples, batch_size, seed),
        config.updates,
        runner=judge.runner,
        log=log,
        stop=stop,
    )
    return jax.device_get(state[0])


def train_judge(sentences: Sentences, config: SentimentConfig, seed: int, runner: Runner) -> SentimentJudge:
    """Builds a judge and trains it on `sentences`: `new_judge`, then `fit_judge`.

    Args:
        sentences: the n texts and their labels.
        config: the settings of the judge.
        seed: draws the parameters and orders the texts.
        runner: runs the judge on all devices.
    """
    judge = new_judge(sentences, config, seed, runner)
    return dataclasses.replace(judge, params=fit_judge(judge, sentences, config, seed))


class LogOdds(NamedTuple):
    """Log-odds of "positive" of some texts.

    Attributes:
        values: [n] float32, or [n, A] by aspect; 0 where missing.
        valid: [n] bool, false where the judge knows no word of a text.
    """

    values: np.ndarray
    valid: np.ndarray


def cross_fitted(
    sentences: Sentences,
    config: SentimentConfig,
    seed: int,
    runner: Runner,
    *,
    folds: int = 5,
    groups: Sequence[Hashable] | None = None,
) -> LogOdds:
    """Computes the log-odds of every text by a judge that was trained on the other folds (cross-fitting).

    Compared with the labels, they show how good a sentiment judge is on these data.

    Args:
        sentences: the n texts and their labels.
        config: the settings of each judge.
        seed: draws the folds and trains the judges.
        runner: runs the judges on all devices.
        folds: how many judges are trained.
        groups: the group of each text [n]; texts of one group (comments on the same answer, or by the same
            rater) stay in one fold. None = every text is a group.

    Returns:
        LogOdds with values [n] or [n, A], shaped as the labels.

    Raises:
        UserError: fewer groups than folds.
    """
    names: dict[Hashable, int] = {}
    group = np.array([names.setdefault(name, len(names)) for name in (groups or range(len(sentences)))], int)
    require(len(group) == len(sentences), f"{len(group)} groups for {len(sentences)} texts: expected one a text")
    require(2 <= folds <= len(names), f"{folds} folds of {len(names)} groups of texts: expected 2 to {len(names)}")
    fold = (np.random.default_rng(seed).permutation(len(names)) % folds)[group]
    values, valid = np.zeros(sentences.labels.shape, np.float32), np.zeros(len(sentences), bool)
    for number in range(folds):
        held = fold == number
        judge = train_judge(sentences.rows(~held), config, seed, runner)
        scores = judge.log_odds(sentences.rows(held).texts)
        values[held], valid[held] = scores.values, scores.valid
    return LogOdds(values, valid)


# ---- Judging


@dataclasses.dataclass(frozen=True, eq=False)
class SentimentJudge:
    """A frozen classifier of texts with its own tokenizer.

    Attributes:
        model, params, tokenizer: the judge's own.
        runner: runs the compiled function on all devices.
        batch_size: texts of one compiled call.
        max_words: known words of a text that are read; the rest is cut.
    """

    model: TextClassifier
    params: Params
    tokenizer: HuggingFaceTokenizer
    runner: Runner
    batch_size: int = 128
    max_words: int = 96

    def __post_init__(self) -> None:
        check_tokenizer(self.tokenizer, self.model.vocab_size, "the sentiment judge")
        check_batch_size("judge", self.batch_size, self.runner)

    @cached_property
    def hash(self) -> str:
        """Returns the hash of the judge's parameters, hexadecimal text that identifies the judge in records."""
        return weights_hash(self.params)

    @cached_property
    def _score(self) -> Any:
        return self.runner.map(lambda params, batch, *, axis_name: self.model(params, *batch))

    def log_odds(self, texts: Sequence[str]) -> LogOdds:
        """Computes the log-odds of "positive" of each text, in nats.

        Returns:
            LogOdds with values [B], or [B, A] by aspect, and valid [B]: false (value 0) where no word of a
            text is known.
        """
        tokens, mask = known_words(self.tokenizer, texts, self.max_words)
        valid = np.asarray(mask.any(-1))
        fill = ((0, -len(texts) % self.batch_size), (0, 0))
        tokens, mask = np.pad(tokens, fill), np.pad(mask, fill)
        parts = [
            self._score(self.params, (tokens[i : i + self.batch_size], mask[i : i + self.batch_size]))
            for i in range(0, len(tokens), self.batch_size)
        ]  # dispatched before any is waited for
        aspects = () if self.model.aspects is None else (self.model.aspects,)
        values = np.concatenate([np.zeros((0, *aspects), np.float32), *jax.device_get(parts)])[: len(texts)]
        return LogOdds(np.where(valid.reshape(-1, *[1] * len(aspects)), values, 0.0), valid)

    def accuracy(self, sentences: Sentences) -> float:
        """Computes the weighted share of labels that the judge predicts.

        The labels of a text without a known word count as wrong.
        """
        scores = self.log_odds(sentences.texts)
        found = (np.asarray(scores.values) > 0) == sentences.positive
        found &= np.asarray(scores.valid).reshape(-1, *[1] * (found.ndim - 1))
        return float(np.average(found, weights=sentences.label_weights))


@dataclasses.dataclass(frozen=True, eq=False)
class SentimentSource(FeedbackSource):
    """Gives the judge's log-odds of each answer, without its prompt, as feedback.

    The log-odds are negated where sadder is better.
    """

    judge: SentimentJudge
    mood: Mood = "happier"

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout) -> Feedback:
        scores = self.judge.log_odds(answers)
        return Feedback.single(scores.values if self.mood == "happier" else -scores.values, scores.valid)
