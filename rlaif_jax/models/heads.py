"""Models as the rest of the package sees them: pure functions of a plain pytree of parameters.

`LanguageModel` is the policy head on a trunk; `ScalarModel` (value, reward) a scalar per token on a trunk of its own;
`ValueHead` a scalar per token on the hidden states of the policy (a shared trunk).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlaif_jax.models.decoder import Decoder, Trunk, apply, blocks_apart
from rlaif_jax.models.decoder_config import DecoderConfig
from rlaif_jax.types import Params

CHUNK_ELEMENTS = 2**25  # logits of more elements than this (128 MiB in float32) are computed chunk by chunk


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A causal language model of the given shape. All methods are pure and may be jitted."""

    config: DecoderConfig

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters."""
        one = jnp.ones((1, 1), jnp.int32)
        params = Decoder(self.config).init(key, one, one.astype(bool))["params"]
        return params | {"trunk": blocks_apart(self.config, params["trunk"])}

    def hidden(self, params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """tokens, mask [B, S] -> hidden states [B, S, D]."""
        return apply(Trunk(self.config), params["trunk"], tokens, mask)[0]

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> logits [..., V] float32."""
        return apply(Decoder(self.config), params, hidden, method="logits")

    def __call__(self, params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """tokens, mask [B, S] -> logits [B, S, V] float32: entry s predicts token s + 1."""
        return self.logits(params, self.hidden(params, tokens, mask))

    def token_logprobs(
        self, params: Params, hidden: jax.Array, targets: jax.Array, temperature: float = 1.0, *, entropy: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities in nats of `targets` [B, T] given hidden states [B, T, D] at the positions before them.

        Returns (logprobs [B, T], entropies [B, T]) in float32; entropies are zeros unless asked for. Logits are
        divided by `temperature` first. Where B x T x V is large the tokens are taken in chunks whose logits are
        recomputed in the backward pass, so that no [B, T, V] array is ever held.
        """
        shape, width = targets.shape, hidden.shape[-1]

        def score(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = self.logits(params, hidden) / temperature
            normaliser = jax.nn.logsumexp(logits, axis=-1)
            chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
            if not entropy:
                return chosen - normaliser, jnp.zeros_like(normaliser)
            mean = jnp.sum(jax.nn.softmax(logits, axis=-1) * logits, axis=-1)
            return chosen - normaliser, normaliser - mean

        flat, ids = hidden.reshape(-1, width), targets.reshape(-1)
        count = ids.shape[0]
        turns = -(-count // max(1, CHUNK_ELEMENTS // self.config.vocab_size))
        if turns <= 1:
            logprobs, entropies = score(flat, ids)
        else:
            size = -(-count // turns)  # even chunks: a last one of pads is work for nothing
            pad = turns * size - count
            chunks = (
                jnp.pad(flat, ((0, pad), (0, 0))).reshape(-1, size, width),
                jnp.pad(ids, (0, pad)).reshape(-1, size),
            )
            logprobs, entropies = jax.lax.map(jax.checkpoint(lambda c: score(*c)), chunks)
            logprobs, entropies = logprobs.reshape(-1)[:count], entropies.reshape(-1)[:count]
        return logprobs.reshape(shape), entropies.reshape(shape)


class ScalarHead(nn.Module):
    """hidden [..., D] -> [...] float32. Zero for a value, N(0, 1/(D+1)) for a reward (CORRECTNESS: heads; Stiennon 2020)."""

    initial: Literal["zero", "normal"]

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        init = (
            nn.initializers.zeros if self.initial == "zero" else nn.initializers.normal((hidden.shape[-1] + 1) ** -0.5)
        )
        return nn.Dense(1, kernel_init=init, dtype=jnp.float32, name="scalar")(hidden.astype(jnp.float32))[..., 0]


@dataclasses.dataclass(frozen=True)
class ScalarModel:
    """A value (`initial="zero"`) or reward (`initial="normal"`) model: a trunk of its own under a scalar head."""

    config: DecoderConfig
    initial: Literal["zero", "normal"] = "zero"

    def init(self, key: jax.Array, trunk: Params | None = None) -> Params:
        """Fresh parameters; `trunk` (another model's `params["trunk"]`) starts it from that model's weights."""
        trunk_key, head_key = jax.random.split(key)
        one = jnp.ones((1, 1), jnp.int32)
        if trunk is None:
            trunk = blocks_apart(self.config, Trunk(self.config).init(trunk_key, one, one.astype(bool))["params"])
        head = ScalarHead(self.initial).init(head_key, jnp.zeros((1, self.config.width)))["params"]
        return {"trunk": jax.tree.map(jnp.array, trunk), "head": head}

    def __call__(self, params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """tokens, mask [B, S] -> one scalar a token [B, S] float32; entry s has seen tokens 0..s."""
        return self.head(params, apply(Trunk(self.config), params["trunk"], tokens, mask)[0])

    def head(self, params: Params, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] of this model's own trunk -> scalars [...] float32."""
        return apply(ScalarHead(self.initial), params["head"], hidden)


@dataclasses.dataclass(frozen=True)
class ValueHead:
    """A value read off the policy's own hidden states: the shared-trunk critic."""

    width: int

    def init(self, key: jax.Array) -> Params:
        """Zero weights."""
        return {"head": ScalarHead("zero").init(key, jnp.zeros((1, self.width)))["params"]}

    def __call__(self, params: Params, hidden: jax.Array) -> jax.Array:
        """hidden [B, S, D] -> [B, S] float32."""
        return apply(ScalarHead("zero"), params["head"], hidden)


def last_real(values: jax.Array, mask: jax.Array) -> jax.Array:
    """values, mask [B, S] -> the value at each row's last real token [B], wherever padding stands."""
    last = mask.shape[1] - 1 - jnp.argmax(mask.astype(bool)[:, ::-1], axis=1)
    return jnp.take_along_axis(values, last[:, None], axis=1)[:, 0]
