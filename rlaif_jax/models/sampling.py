"""Drawing a token from logits: two uniform numbers a row, exact inverse CDF."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from rlaif_jax.config import require

BLOCK = 256  # vocabularies past two blocks are drawn from in two levels: a block by its sum, then a token of it
TILE = 128  # tokens that a TPU's memory keeps side by side


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How answers are drawn.

    Attributes:
        max_new_tokens: T, most tokens of an answer.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: only the k most probable tokens may be drawn; 0: all.
        top_p: only the smallest set of most probable tokens with this mass may be drawn; 1: all.
        slots: answers decoded at a time on each device; whenever some have ended the next ones take their places, which
            is faster where answers are many and of uneven length. 0, or more than there are: all at once. The number
            changes no answer except where a matrix product of another shape rounds a draw to the other side of a bound.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    slots: int = 0

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, f"sampling.max_new_tokens must be >= 1, not {self.max_new_tokens}")
        require(self.temperature >= 0, f"sampling.temperature must be >= 0, not {self.temperature}")
        require(self.top_k >= 0, f"sampling.top_k must be >= 0 (0 = off), not {self.top_k}")
        require(0 < self.top_p <= 1, f"sampling.top_p must lie in (0, 1], not {self.top_p}")
        require(self.slots >= 0, f"sampling.slots must be >= 0 (0: all at once), not {self.slots}")


def truncate(logits: jax.Array, sampling: SamplingConfig) -> jax.Array:
    """Sets the logits of tokens outside top-k and top-p (Holtzman 2020) to -inf.

    At least one token stays. top-p keeps the smallest set of most probable tokens whose mass reaches p, after
    top-k.

    Args:
        logits: [B, V].
        sampling: its `top_k` (0: all) and `top_p` (1: all).
    """
    vocab = logits.shape[-1]
    if 0 < sampling.top_k < vocab:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if sampling.top_p < 1:
        order = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(order, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        lowest = jnp.min(jnp.where(before < sampling.top_p, order, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= lowest, logits, -jnp.inf)
    return logits


def first_above(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Returns the first index [B] whose cumulated weight exceeds uniform x total.

    `weights` are [B, N] >= 0, `uniform` [B] in [0, 1).

    Never an index of weight 0. A parallel cumulated sum may rise by a rounding where nothing is added, so the sums at
    such places are left out of the comparison, and the total is the largest of those that stay.
    """
    cumulated = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)
    return jnp.argmax(cumulated > uniform[:, None] * cumulated.max(axis=-1, keepdims=True), axis=-1)


def inverse_cdf(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Returns indices [B] drawn with probability weight / total.

    A large vocabulary is drawn from in two levels: the first number picks a block by its sum, the second a token of it.
    One level has two faults. A number of 24 bits cannot tell 152,000 tokens apart. And a rounding of the logits can
    change the draw at the bound of every token; two levels have only a few hundred bounds.

    Args:
        weights: [B, V], >= 0.
        uniform: [B, 2], in [0, 1).
    """
    rows, vocab = weights.shape
    if vocab <= 2 * BLOCK:
        return first_above(weights, uniform[:, 0])
    # Along the tiles of a TPU's memory, 8 rows by 128 tokens, and along what its tensor devices hold, the vocabulary is taken
    # apart where it lies; pads would be copies of all weights, so there are as few as can be.
    count, parts = math.gcd(rows, 8), BLOCK // TILE
    multiple = TILE * jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    tiles = jnp.pad(weights, ((0, 0), (0, -vocab % multiple))).reshape(rows // count, count, -1, TILE)
    sums = tiles.sum(axis=-1).reshape(rows, -1)
    sums = jnp.pad(sums, ((0, 0), (0, -sums.shape[1] % parts))).reshape(rows, -1, parts)
    block = first_above(sums.sum(axis=-1), uniform[:, 0])
    at = (block[:, None] * parts + jnp.arange(parts)).reshape(rows // count, count, parts, 1)
    chosen = jnp.take_along_axis(tiles, at, axis=2, mode="fill", fill_value=0).reshape(rows, BLOCK)
    return block * BLOCK + first_above(chosen, uniform[:, 1])


def sample(logits: jax.Array, uniform: jax.Array, sampling: SamplingConfig) -> tuple[jax.Array, jax.Array]:
    """Draws one token a row and returns (tokens [B] int32, logprobs [B] float32 in nats).

    `logits` are [B, V] float32, `uniform` [B, 2] random numbers in [0, 1).

    The log-prob is that of the full distribution at the sampling temperature (at temperature 1 when greedy), also
    under top-k or top-p: it is comparable with the trainer's, which knows no truncation.
    """
    scaled = logits / (sampling.temperature or 1.0)
    normaliser = jax.nn.logsumexp(scaled, axis=-1, keepdims=True)
    if sampling.temperature == 0:
        tokens = jnp.argmax(logits, axis=-1)
    else:
        tokens = inverse_cdf(jnp.exp(truncate(scaled, sampling) - normaliser), uniform)
    return tokens.astype(jnp.int32), (jnp.take_along_axis(scaled, tokens[:, None], axis=-1) - normaliser)[:, 0]
