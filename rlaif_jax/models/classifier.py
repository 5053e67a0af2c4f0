"""A small classifier of texts by the words that occur in them."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlaif_jax.types import Params


class WordSet(nn.Module):
    """Linear units on the sum of the embeddings of a text's words.

    Attributes:
        vocab_size: number of token ids.
        width: of an embedding.
        outputs: number of linear units.
        repeats: True counts a word as often as it occurs, and leaves the sum a sum: logistic regression on word counts.
            False counts a word once: Pang, Lee & Vaithyanathan 2002 ("Thumbs up?", section 6.1) found presence better
            than frequency for sentiment, and a policy cannot earn more by saying one word again and again. The sum is
            then divided by the root of the number of words, which keeps texts of different length comparable.
    """

    vocab_size: int
    width: int
    outputs: int
    repeats: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns [B, outputs] float32 of tokens, mask [B, S]; 0 words give the bias alone."""
        counted = mask.astype(bool)
        if not self.repeats:
            length = tokens.shape[1]
            seen_before = jnp.tril(jnp.ones((length, length), bool), -1) & counted[:, None, :]
            counted &= ~jnp.any((tokens[:, :, None] == tokens[:, None, :]) & seen_before, axis=-1)
        count = counted.astype(jnp.float32)
        embed = nn.Embed(self.vocab_size, self.width, embedding_init=nn.initializers.normal(0.1), name="embed")
        total = jnp.einsum("bsd,bs->bd", embed(tokens), count)
        if not self.repeats:
            total /= jnp.sqrt(jnp.maximum(count.sum(-1), 1.0))[:, None]
        return nn.Dense(self.outputs, name="out")(total)


@dataclasses.dataclass(frozen=True)
class TextClassifier:
    """Log-odds of a text being of the positive class, or of each of several classes, from its words.

    Attributes:
        vocab_size: number of token ids; tokens must be below it also where they are masked.
        width: of an embedding.
        aspects: number of classes; None is one class, whose log-odds have no axis for it.
        repeats: whether a word counts as often as it occurs.
    """

    vocab_size: int
    width: int = 32
    aspects: int | None = None
    repeats: bool = False

    @property
    def _module(self) -> WordSet:
        return WordSet(self.vocab_size, self.width, 1 if self.aspects is None else self.aspects, self.repeats)

    def init(self, key: jax.Array) -> Params:
        """Returns fresh float32 parameters."""
        one = jnp.zeros((1, 1), jnp.int32)
        return self._module.init(key, one, one.astype(bool))["params"]

    def __call__(self, params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns log-odds [B] or [B, aspects] float32, in nats, of tokens, mask [B, S] in any order."""
        logits: Any = self._module.apply({"params": params}, tokens, mask)
        return logits[:, 0] if self.aspects is None else logits
