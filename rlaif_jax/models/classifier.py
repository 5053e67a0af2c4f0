"""A small classifier of texts: which words occur, each counted once."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlaif_jax.types import Params


class WordSet(nn.Module):
    """Embeddings of a text's distinct words, summed over the root of their number, under one linear unit.

    A word counts once however often it occurs: Pang, Lee & Vaithyanathan 2002 ("Thumbs up?", section 6.1) found
    presence better than frequency for sentiment, and a policy cannot earn more by saying one word again and again.
    The root keeps texts of different length comparable: one word among many says less, many words say more.
    """

    vocab_size: int
    width: int

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """tokens, mask [B, S] -> [B] float32; 0 words give the bias alone."""
        length = tokens.shape[1]
        mask = mask.astype(bool)
        seen_before = jnp.tril(jnp.ones((length, length), bool), -1) & mask[:, None, :]
        repeated = jnp.any((tokens[:, :, None] == tokens[:, None, :]) & seen_before, axis=-1)
        counted = (mask & ~repeated).astype(jnp.float32)
        embed = nn.Embed(self.vocab_size, self.width, embedding_init=nn.initializers.normal(0.1), name="embed")
        total = jnp.einsum("bsd,bs->bd", embed(tokens), counted)
        return nn.Dense(1, name="out")(total / jnp.sqrt(jnp.maximum(counted.sum(-1), 1.0))[:, None])[:, 0]


@dataclasses.dataclass(frozen=True)
class TextClassifier:
    """Log-odds of a text being of the positive class, from its words. Pure: may be jitted.

    Tokens must be ids below `vocab_size` also where masked.
    """

    vocab_size: int
    width: int = 32

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters."""
        one = jnp.zeros((1, 1), jnp.int32)
        return WordSet(self.vocab_size, self.width).init(key, one, one.astype(bool))["params"]

    def __call__(self, params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """tokens, mask [B, S] -> log-odds [B] float32, in nats; the order and the repetition of words do not matter."""
        logits: Any = WordSet(self.vocab_size, self.width).apply({"params": params}, tokens, mask)
        return logits
