"""Scalars per token: `ScalarModel` with its own trunk, `ValueHead` on the policy's hidden states."""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlaif_jax.models.base import View
from rlaif_jax.models.decoder import Trunk, apply, unstack_layers, view_hidden
from rlaif_jax.models.decoder_config import DecoderConfig
from rlaif_jax.models.lora import LoRAConfig, joined
from rlaif_jax.types import Frozen, Params


class ScalarHead(nn.Module):
    """Maps hidden states [..., D] to scalars [...] float32.

    Attributes:
        initial: weights at the start: zero for a value, N(0, 1 / (D + 1)) for a reward (Stiennon 2020).
        bias: whether a constant is added.
    """

    initial: Literal["zero", "normal"]
    bias: bool = True

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        init = (
            nn.initializers.zeros if self.initial == "zero" else nn.initializers.normal((hidden.shape[-1] + 1) ** -0.5)
        )
        dense = nn.Dense(1, self.bias, kernel_init=init, dtype=jnp.float32, name="scalar")
        return dense(hidden.astype(jnp.float32))[..., 0]


@dataclasses.dataclass(frozen=True)
class ScalarModel:
    """A value (`initial="zero"`) or reward (`initial="normal"`) model: its own trunk under a scalar head.

    Attributes:
        config: shape of the trunk.
        initial: weights of the head at the start.
        bias: whether the head adds a constant; Hugging Face's classifiers have none, and no comparison depends on it.
        lora: None: trunk and head learn. Else an adapter and the head do, over the trunk of `Frozen.base`, which a critic
            shares with its policy.
    """

    config: DecoderConfig
    initial: Literal["zero", "normal"] = "zero"
    bias: bool = True
    lora: LoRAConfig | None = None

    def init(self, key: jax.Array, trunk: Params | None = None) -> Params:
        """Returns fresh parameters, drawn with `key`.

        Args:
            key: the random key.
            trunk: another model's `params["trunk"]`, which is copied; None: the trunk is drawn too. With `lora` it is a
                trained adapter of the trunk, and None draws a fresh one.

        Raises:
            UserError: the trunk's blocks lack a target of `lora`.
        """
        trunk_key, head_key = jax.random.split(key)
        one = jnp.ones((1, 1), jnp.int32)
        if trunk is None:
            whole = lambda k: unstack_layers(self.config, Trunk(self.config).init(k, one, one.astype(bool))["params"])
            trunk = (
                whole(trunk_key) if self.lora is None else self.lora.init(trunk_key, jax.eval_shape(whole, trunk_key))
            )
        head = ScalarHead(self.initial, self.bias).init(head_key, jnp.zeros((1, self.config.width)))["params"]
        return {"trunk": jax.tree.map(jnp.array, trunk), "head": head}

    def __call__(self, params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns a scalar for each of tokens, mask [B, S], float32; entry s has read tokens 0 .. s.

        Args:
            params: trunk and head; with `lora` joined or merged with the base.
            tokens: [B, S] int32.
            mask: [B, S] bool, true for real tokens.
        """
        return self.head(params, apply(Trunk(self.config), params["trunk"], tokens, mask)[0])

    def values(self, params: Params, frozen: Frozen, view: View, hidden: jax.Array) -> jax.Array:
        """Computes a scalar for every target of a view, float32 in the layout of its targets.

        Args:
            params: parameters of this model, which has its own trunk.
            frozen: its base has the trunk under the adapter; not used without `lora`.
            view: padded or packed sequences.
            hidden: the policy's hidden states; not used.
        """
        del hidden
        params = joined(self.lora, frozen.base, params)
        return self.head(params, view_hidden(self.config, params["trunk"], view))

    def head(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Returns the scalars [...] float32 of hidden states [..., D] of this model's own trunk.

        Args:
            params: the parameters of trunk and head; only the head is read.
            hidden: the hidden states.
        """
        return apply(ScalarHead(self.initial, self.bias), params["head"], hidden)


@dataclasses.dataclass(frozen=True)
class ValueHead:
    """A value read off the policy's hidden states: the critic of a shared trunk.

    Attributes:
        width: D of the policy.
    """

    width: int

    def init(self, key: jax.Array) -> Params:
        """Returns zero weights."""
        return {"head": ScalarHead("zero").init(key, jnp.zeros((1, self.width)))["params"]}

    def values(self, params: Params, frozen: Frozen, view: View, hidden: jax.Array) -> jax.Array:
        """Computes the values [...] float32 of hidden states.

        Args:
            params: the head's parameters.
            frozen: not used.
            view: not used: the head reads the policy's hidden states.
            hidden: [..., D], of the policy.
        """
        del frozen, view
        return apply(ScalarHead("zero"), params["head"], hidden)


def gather_last(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns, for each row of values [B, S], the value at the row's last real token: [B].

    `mask` [B, S] is true for real tokens; the padding may be on either side.
    """
    last = mask.shape[1] - 1 - jnp.argmax(mask.astype(bool)[:, ::-1], axis=1)
    return jnp.take_along_axis(values, last[:, None], axis=1)[:, 0]
