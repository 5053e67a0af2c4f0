"""Labelled texts for the sentiment judge, and the reader of the sentence polarity data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from rlaif_jax.config import UserError, require
from rlaif_jax.files import read_bytes

POSITIVE_FILE, NEGATIVE_FILE = "rt-polarity.pos", "rt-polarity.neg"
SOURCE = (
    "the sentence polarity data set of Pang & Lee 2005, rt-polaritydata at "
    "https://www.cs.cornell.edu/people/pabo/movie-review-data/"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Sentences:
    """Labelled texts.

    Attributes:
        texts: the n texts.
        labels: how positive each text is, [n] in 0..1 or bool; a score on a scale becomes (score - low) /
            (high - low). [n, A] for a label in each of A aspects.
        weights: how much each label counts, shaped as `labels`; 0 = not labelled. None = all labels count 1.
    """

    texts: tuple[str, ...]
    labels: np.ndarray
    weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        shape = np.shape(self.labels)
        require(
            len(shape) in (1, 2) and shape[0] == len(self.texts),
            f"labels of shape {shape} for {len(self.texts)} texts: expected one a text, or one a text and aspect",
        )
        weights = self.label_weights
        require(weights.shape == shape, f"weights of shape {weights.shape} for labels of shape {shape}")
        require(bool(np.all(np.isfinite(weights) & (weights >= 0))), "weights must be finite and not negative")
        used = self.labels[weights > 0]
        require(bool(np.all((used >= 0) & (used <= 1))), "labels must lie between 0 and 1")

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def positive(self) -> np.ndarray:
        """Returns a bool array in the shape of `labels`: whether each label is above 0.5."""
        return self.labels > 0.5

    @property
    def label_weights(self) -> np.ndarray:
        """Returns the weights as float32, shaped as `labels`; ones where `weights` is None."""
        return np.ones(self.labels.shape, np.float32) if self.weights is None else self.weights.astype(np.float32)

    def rows(self, chosen: np.ndarray) -> Sentences:
        """Returns the sentences, with labels and weights, where `chosen` [n] bool is true."""
        weights = None if self.weights is None else self.weights[chosen]
        return Sentences(tuple(self.texts[i] for i in np.flatnonzero(chosen)), self.labels[chosen], weights)


def read_sentences(folder: Path) -> Sentences:
    """Reads the distinct sentences of `rt-polarity.pos` and `rt-polarity.neg`, one a line.

    The files are in latin-1 or UTF-8. A sentence that occurs in both files has no label and is left out.

    Raises:
        UserError: a file is missing, is no text, or has no sentences.
    """
    positive, negative = (_lines(Path(folder) / name) for name in (POSITIVE_FILE, NEGATIVE_FILE))
    both = set(positive) & set(negative)
    kept = [[text for text in lines if text not in both] for lines in (positive, negative)]
    return Sentences((*kept[0], *kept[1]), np.arange(len(kept[0]) + len(kept[1])) < len(kept[0]))


def _lines(path: Path) -> list[str]:
    """Reads the distinct lines of a file, without blank lines."""
    try:
        data = read_bytes(path)
    except UserError as error:
        hint = f"It should hold one sentence a line; {POSITIVE_FILE} and {NEGATIVE_FILE} are {SOURCE}"
        raise UserError(f"{error}. {hint}") from error
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
    """Splits sentences into (training, held-out).

    The share `held_out` of each class is drawn by `seed` alone.

    Raises:
        UserError: a class has too few sentences, or a text has more than one label.
    """
    require(sentences.labels.ndim == 1, "texts with labels by aspect have no two classes to split evenly")
    generator = np.random.default_rng(seed)
    held = np.zeros(len(sentences), bool)
    for label in (True, False):
        rows = generator.permutation(np.flatnonzero(sentences.positive == label))
        held[rows[: round(held_out * len(rows))]] = True
        require(
            0 < held[rows].sum() < len(rows),
            f"{len(rows)} {'positive' if label else 'negative'} sentences are too few to hold out {held_out:g} of them",
        )
    return sentences.rows(~held), sentences.rows(held)
