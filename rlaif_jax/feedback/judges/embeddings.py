"""Texts as vectors, and how alike two texts are.

An encoder is any function of texts to vectors; `HiddenStateEncoder` makes one of any language model. A row that holds a
NaN, or nothing but zeros, is a text without a vector: its similarities are missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.config import require
from rlaif_jax.data.prompts import padded
from rlaif_jax.data.tokenizers import Tokenizer, check_tokenizer
from rlaif_jax.models.causal_lm import CausalLM
from rlaif_jax.parallel import Runner
from rlaif_jax.types import Params

Encoder: TypeAlias = Callable[[Sequence[str]], np.ndarray]  # B texts -> [B, D] float


def similarities(encoder: Encoder, exemplar: str, texts: Sequence[str]) -> list[float | None]:
    """The cosine in [-1, 1] of each text's vector with the exemplar's; None where either has no vector.

    Raises:
        UserError: the encoder gave another number of vectors than it was given texts.
    """
    vectors = np.asarray(encoder([exemplar, *texts]), np.float64)
    require(
        vectors.ndim == 2 and len(vectors) == len(texts) + 1,
        f"the encoder gave an array of shape {vectors.shape} for {len(texts) + 1} texts: expected one row a text",
    )
    size = np.linalg.norm(vectors, axis=-1)
    known = np.isfinite(size) & (size > 0)
    unit = np.where(known[:, None], vectors, 0.0) / np.where(known, size, 1.0)[:, None]
    cosines = np.clip(unit[1:] @ unit[0], -1.0, 1.0)
    return [float(c) if ok and known[0] else None for c, ok in zip(cosines, known[1:])]


def mean_hidden(
    model: CausalLM, params: Params, batch: tuple[jax.Array, jax.Array], *, axis_name: str | None = None
) -> jax.Array:
    """The mean hidden state [B, D] float32 over the real tokens of (tokens, mask) [B, S]; zeros where there are none."""
    del axis_name
    tokens, mask = batch
    hidden = model.sequence_hidden(params, tokens, mask).astype(jnp.float32)
    real = mask.astype(jnp.float32)[..., None]
    return jnp.where(real > 0, hidden, 0.0).sum(1) / jnp.maximum(real.sum(1), 1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class HiddenStateEncoder:
    """The mean hidden state of a language model over a text's tokens, less `centre`.

    Hidden states of a language model share a large common direction, so that any two texts look alike: `centred` takes
    it out. Texts are encoded `batch_size` at a time, each by its first `max_tokens` tokens: one compiled shape.
    """

    model: CausalLM
    params: Params
    tokenizer: Tokenizer
    runner: Runner
    max_tokens: int = 128
    batch_size: int = 32
    centre: np.ndarray | None = None

    def __post_init__(self) -> None:
        check_tokenizer(self.tokenizer, self.model.config.vocab_size, "the encoder")
        require(
            1 <= self.max_tokens <= self.model.config.context_length,
            f"encoder.max_tokens is {self.max_tokens}; the model reads 1 to {self.model.config.context_length}",
        )
        require(
            self.batch_size >= 1 and self.batch_size % self.runner.devices == 0,
            f"encoder.batch_size ({self.batch_size}) must be a multiple of the {self.runner.devices} devices",
        )

    @cached_property
    def _encode(self) -> Any:
        def run(params: Params, batch: tuple[jax.Array, jax.Array], *, axis_name: str | None = None) -> jax.Array:
            return mean_hidden(self.model, params, batch, axis_name=axis_name)

        return self.runner.map(run)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """B texts -> [B, D] float32; NaN where a text has no tokens."""
        ids = [self.tokenizer.encode(text)[: self.max_tokens] for text in texts]
        tokens, mask = padded(ids, self.max_tokens, self.tokenizer.pad_id, "right")
        some = np.asarray(mask.any(-1))
        fill = ((0, -len(texts) % self.batch_size), (0, 0))
        tokens, mask = np.pad(tokens, fill), np.pad(mask, fill)
        parts = [
            self._encode(self.params, (tokens[i : i + self.batch_size], mask[i : i + self.batch_size]))
            for i in range(0, len(tokens), self.batch_size)
        ]
        vectors = np.concatenate([np.zeros((0, self.model.config.width), np.float32), *jax.device_get(parts)])
        vectors = vectors[: len(texts)] - (0.0 if self.centre is None else self.centre)
        return np.where(some[:, None], vectors, np.nan)

    def centred(self, texts: Sequence[str]) -> HiddenStateEncoder:
        """The same encoder less the mean vector of `texts`, such as the reference policy's answers.

        Raises:
            UserError: none of the texts has a token.
        """
        vectors = dataclasses.replace(self, centre=None)(texts)
        known = np.isfinite(vectors).all(-1)
        require(bool(known.any()), "an encoder cannot be centred on texts without tokens")
        return dataclasses.replace(self, centre=vectors[known].mean(0))
