"""Text encoders and cosine similarities.

An encoder is any function from texts to vectors; `HiddenStateEncoder` makes an encoder of a language model. A
row that holds a NaN, or zeros only, means that the text has no vector: its similarities are missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.config import require
from rlaif_jax.data.prompts import padded
from rlaif_jax.data.tokenizers import Tokenizer, check_tokenizer
from rlaif_jax.feedback.judges.batching import check_batch_size, in_batches
from rlaif_jax.models.causal_lm import CausalLM
from rlaif_jax.parallel import Runner
from rlaif_jax.types import Params

Encoder: TypeAlias = Callable[[Sequence[str]], np.ndarray]  # B texts -> [B, D] float


def similarities(encoder: Encoder, exemplar: str, texts: Sequence[str]) -> list[float | None]:
    """Computes the cosine of each text's vector with the exemplar's; None where a vector is missing.

    Raises:
        UserError: the encoder did not return one vector for each text.
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
    """Computes the mean hidden state [B, D] float32 over the real tokens of each text.

    A row without real tokens becomes zeros.

    Args:
        model: the language model.
        params: its parameters.
        batch: (tokens [B, S] int32, mask [B, S] bool).
        axis_name: not used; `Runner.map` passes it.
    """
    del axis_name
    tokens, mask = batch
    hidden = model.sequence_hidden(params, tokens, mask).astype(jnp.float32)
    real = mask.astype(jnp.float32)[..., None]
    return jnp.where(real > 0, hidden, 0.0).sum(1) / jnp.maximum(real.sum(1), 1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class HiddenStateEncoder:
    """An encoder: the mean hidden state of a language model over a text's tokens, minus `centre`.

    Hidden states of a language model share a large common direction, which makes any two texts look alike:
    `centred` removes this direction.

    Attributes:
        model, params, tokenizer: the language model's own.
        runner: runs the compiled function on all devices.
        max_tokens: tokens of a text that are read; the rest is cut.
        batch_size: texts of one compiled call.
        centre: the vector [D] that is subtracted; None = zero.
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
        check_batch_size("encoder", self.batch_size, self.runner)

    @cached_property
    def _encode(self) -> Any:
        return self.runner.map(partial(mean_hidden, self.model))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Encodes B texts as [B, D] float32; NaN where a text has no tokens."""
        ids = [self.tokenizer.encode(text)[: self.max_tokens] for text in texts]
        tokens, mask = padded(ids, self.max_tokens, self.tokenizer.pad_id, "right")
        vectors = in_batches(partial(self._encode, self.params), (tokens, mask), self.batch_size)
        vectors = vectors - (0.0 if self.centre is None else self.centre)
        return np.where(np.asarray(mask.any(-1))[:, None], vectors, np.nan)

    def centred(self, texts: Sequence[str]) -> HiddenStateEncoder:
        """Returns this encoder with the mean vector of `texts` as its centre.

        The reference policy's answers are good texts for this.

        Raises:
            UserError: no text has a token.
        """
        vectors = dataclasses.replace(self, centre=None)(texts)
        known = np.isfinite(vectors).all(-1)
        require(bool(known.any()), "an encoder cannot be centred on texts without tokens")
        return dataclasses.replace(self, centre=vectors[known].mean(0))
