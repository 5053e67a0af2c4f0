"""A sentiment judge, trained on labelled sentences, as a source of feedback.

The judge reads *text* with a vocabulary of its own, learned from its sentences: the policy's tokens are decoded and
split into words again, so any policy fits. What it returns is the log-odds of "positive"; a text without a single
word that it knows is *missing*, not neutral.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers as hf

from rlaif_jax.algorithms.fit import fit, minibatches
from rlaif_jax.algorithms.supervised import make_optimizer
from rlaif_jax.config import OptimizerConfig, UserError, require
from rlaif_jax.data.prompts import Record, padded
from rlaif_jax.data.tokenizers import HuggingFaceTokenizer, check_tokenizer
from rlaif_jax.feedback.judge import weights_hash
from rlaif_jax.feedback.sources import Feedback
from rlaif_jax.models.classifier import TextClassifier
from rlaif_jax.parallel import Runner, psum
from rlaif_jax.types import INIT, Metrics, Params, Rollout, step_key

PAD, UNKNOWN = "<pad>", "<unk>"
POSITIVE_FILE, NEGATIVE_FILE = "rt-polarity.pos", "rt-polarity.neg"
SOURCE = (
    "the sentence polarity data set of Pang & Lee 2005, rt-polaritydata at "
    "https://www.cs.cornell.edu/people/pabo/movie-review-data/"
)

Mood = Literal["happier", "sadder"]


# ---- Sentences


@dataclasses.dataclass(frozen=True, eq=False)
class Sentences:
    """Labelled sentences: texts [n], positive [n] bool."""

    texts: tuple[str, ...]
    positive: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)


def read_sentences(folder: Path) -> Sentences:
    """The distinct sentences of `rt-polarity.pos` and `rt-polarity.neg`, one a line, in latin-1 or UTF-8.

    A sentence that stands in both files has no label and is left out.

    Raises:
        UserError: a file is missing, is no text, or has no sentences.
    """
    positive, negative = (_lines(Path(folder) / name) for name in (POSITIVE_FILE, NEGATIVE_FILE))
    both = set(positive) & set(negative)
    kept = [[text for text in lines if text not in both] for lines in (positive, negative)]
    return Sentences((*kept[0], *kept[1]), np.arange(len(kept[0]) + len(kept[1])) < len(kept[0]))


def _lines(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror or error}. It should hold one sentence a line; "
            f"{POSITIVE_FILE} and {NEGATIVE_FILE} are {SOURCE}"
        ) from error
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = data.decode("latin-1")  # any byte is a character here: the check below finds what is no text
    control = next((c for c in text if ord(c) < 32 and c not in "\t\n\r\f"), None)
    if control is not None:
        line = text[: text.index(control)].count("\n") + 1
        raise UserError(
            f"{path}:{line}: this is no text in latin-1 or UTF-8: it holds the control character "
            f"0x{ord(control):02x}; expected one sentence a line"
        )
    lines = list(dict.fromkeys(line.strip() for line in text.split("\n") if line.strip()))
    require(bool(lines), f"{path} is empty: expected one sentence a line")
    return lines


def split_sentences(sentences: Sentences, held_out: float, seed: int) -> tuple[Sentences, Sentences]:
    """(training, held-out) sentences; the share `held_out` is drawn by `seed` alone, from each class alike."""
    generator = np.random.default_rng(seed)
    held = np.zeros(len(sentences), bool)
    for label in (True, False):
        rows = generator.permutation(np.flatnonzero(sentences.positive == label))
        held[rows[: round(held_out * len(rows))]] = True
        require(
            0 < held[rows].sum() < len(rows),
            f"{len(rows)} {'positive' if label else 'negative'} sentences are too few to hold out {held_out:g} of them",
        )

    def chosen(rows: np.ndarray) -> Sentences:
        return Sentences(tuple(sentences.texts[i] for i in np.flatnonzero(rows)), sentences.positive[rows])

    return chosen(~held), chosen(held)


# ---- Training


@dataclasses.dataclass(frozen=True)
class SentimentConfig:
    """How the judge is trained.

    Attributes:
        updates: steps of AdamW.
        batch_size: sentences a step.
        learning_rate: falls linearly to 0.
        weight_decay: of AdamW.
        held_out: share of the sentences on which its accuracy is measured.
        width: of its word embeddings.
        vocab_size: words that it knows, at most.
        min_frequency: how often a word must occur to be known.
        max_words: known words of a text that are read; the rest is not.
    """

    updates: int = 600
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.0
    held_out: float = 0.1
    width: int = 32
    vocab_size: int = 20_000
    min_frequency: int = 2
    max_words: int = 96

    def __post_init__(self) -> None:
        require(0 < self.held_out < 1, f"judge.held_out must lie between 0 and 1, not {self.held_out}")
        for field in ("updates", "batch_size", "width", "vocab_size", "min_frequency", "max_words"):
            require(getattr(self, field) >= 1, f"judge.{field} must be >= 1, not {getattr(self, field)}")


def word_tokenizer(texts: Sequence[str], config: SentimentConfig) -> HuggingFaceTokenizer:
    """A word-level tokenizer of the texts: lower case, punctuation apart, rare words unknown."""
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
    """tokens, mask [B, length]: the first `length` known words of each text, right padded."""
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
    """One update of (params, opt_state) by cross-entropy on `tokens`, `mask` [B, S] and `labels` [B] in 0..1."""
    params, opt_state = state

    def loss_fn(params: Params) -> tuple[jax.Array, Metrics]:
        labels = batch["labels"]
        logits = model(params, batch["tokens"], batch["mask"])
        count = psum(jnp.float32(labels.shape[0]), axis_name)
        loss = jnp.sum(optax.sigmoid_binary_cross_entropy(logits, labels)) / count
        right = jnp.sum((logits > 0) == (labels > 0.5)) / count
        return loss, {"loss": psum(jax.lax.stop_gradient(loss), axis_name), "accuracy": psum(right, axis_name)}

    grads, metrics = jax.grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optimizer.update(psum(grads, axis_name), opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), metrics


def new_judge(sentences: Sentences, config: SentimentConfig, seed: int, runner: Runner) -> SentimentJudge:
    """A judge that knows the words of `sentences` and nothing about them yet."""
    tokenizer = word_tokenizer(sentences.texts, config)
    model = TextClassifier(tokenizer.vocab_size, config.width)
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
    """The judge's parameters after it has learned `sentences`; `log` and `stop` as in `fit`."""
    tokens, mask = known_words(judge.tokenizer, sentences.texts, judge.max_words)
    examples = {"tokens": tokens, "mask": mask, "labels": sentences.positive.astype(np.float32)}
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=config.learning_rate, weight_decay=config.weight_decay, eps=1e-8), config.updates
    )
    state = fit(
        partial(classifier_step, judge.model, optimizer),
        (judge.params, optimizer.init(judge.params)),
        minibatches(examples, config.batch_size, seed),
        config.updates,
        runner=judge.runner,
        log=log,
        stop=stop,
    )
    return jax.device_get(state[0])


# ---- Judging


@dataclasses.dataclass(frozen=True, eq=False)
class SentimentJudge:
    """A frozen classifier of texts with its own tokenizer.

    Texts are judged `batch_size` at a time, each by its first `max_words` known words: one compiled shape.
    """

    model: TextClassifier
    params: Params
    tokenizer: HuggingFaceTokenizer
    runner: Runner
    batch_size: int = 128
    max_words: int = 96

    def __post_init__(self) -> None:
        check_tokenizer(self.tokenizer, self.model.vocab_size, "the sentiment judge")
        require(
            self.batch_size % self.runner.devices == 0,
            f"judge.batch_size ({self.batch_size}) must be a multiple of the {self.runner.devices} devices",
        )

    @cached_property
    def hash(self) -> str:
        """Hash of the weights."""
        return weights_hash(self.params)

    @cached_property
    def _score(self) -> Any:
        def run(params: Params, batch: tuple[jax.Array, jax.Array], *, axis_name: str | None = None) -> jax.Array:
            return self.model(params, *batch)

        return self.runner.map(run)

    def log_odds(self, texts: Sequence[str]) -> Feedback:
        """Log-odds of "positive" of each text, in nats; not valid (and 0) where no word of it is known."""
        tokens, mask = known_words(self.tokenizer, texts, self.max_words)
        valid = np.asarray(mask.any(-1))
        fill = ((0, -len(texts) % self.batch_size), (0, 0))
        tokens, mask = np.pad(tokens, fill), np.pad(mask, fill)
        parts = [
            self._score(self.params, (tokens[i : i + self.batch_size], mask[i : i + self.batch_size]))
            for i in range(0, len(tokens), self.batch_size)
        ]  # dispatched before any is waited for
        values = np.concatenate([np.zeros(0, np.float32), *jax.device_get(parts)])[: len(texts)]
        return Feedback(np.where(valid, values, 0.0), valid)

    def accuracy(self, sentences: Sentences) -> float:
        """Share of sentences whose label it finds; one without a known word counts as wrong."""
        scores = self.log_odds(sentences.texts)
        return float(np.mean(scores.valid & ((scores.values > 0) == sentences.positive)))


@dataclasses.dataclass(frozen=True, eq=False)
class SentimentSource:
    """The judge's log-odds of each answer (without its prompt) as feedback, negated where sadder is better."""

    judge: SentimentJudge
    mood: Mood = "happier"

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout) -> Feedback:
        scores = self.judge.log_odds(answers)
        return Feedback(scores.values if self.mood == "happier" else -scores.values, scores.valid)
