"""An encoder-decoder as a `LanguageModel`: answers begin with a start token and attend to the prompt.

Both stacks use the decoder's blocks (`decoder.Block`): the encoder without the causal mask, the decoder with a
cross-attention behind each block.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlaif_jax.config import require
from rlaif_jax.models.attention import MASKED
from rlaif_jax.models.base import COLUMN_AND_ROW, PaddedView, Prefill, Rules, View
from rlaif_jax.models.causal_lm import chunked_logprobs
from rlaif_jax.models.decoder import (
    Block,
    KeyValue,
    Trunk,
    apply,
    block_params,
    positions_from_mask,
    rope_table,
    unstack_layers,
)
from rlaif_jax.models.decoder_config import DecoderConfig
from rlaif_jax.models.dense import Dense
from rlaif_jax.types import Params


class CrossAttention(nn.Module):
    """Pre-norm attention of decoder columns to an encoder's output, added to the residual stream."""

    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        dense = lambda features: Dense(features, use_bias=False, dtype=dtype)
        self.norm = nn.RMSNorm(epsilon=c.norm_eps, dtype=dtype)
        self.q, self.o = dense(c.num_heads * c.head_dim), dense(c.width)
        self.k, self.v = dense(c.num_heads * c.head_dim), dense(c.num_heads * c.head_dim)

    def keys_values(self, encoded: jax.Array) -> KeyValue:
        """Returns keys and values [B, heads, P, h] of an encoder's output [B, P, D]."""
        c = self.config
        split = lambda x: x.reshape(*x.shape[:-1], c.num_heads, c.head_dim).swapaxes(-2, -3)
        return split(self.k(encoded)), split(self.v(encoded))

    def __call__(self, x: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns x [B, S, D] with the attended values added; mask [B, P] is true on real tokens."""
        c = self.config
        q = self.q(self.norm(x)).reshape(*x.shape[:-1], c.num_heads, c.head_dim).swapaxes(-2, -3)
        attended = attend_masked(q, keys, values, mask[:, None])
        return x + self.o(attended.swapaxes(-2, -3).reshape(*x.shape[:-1], -1))

    def init_all(self, x: jax.Array) -> jax.Array:
        """Runs every part once, so that `init` makes all parameters; x [B, S, D]."""
        return self(x, *self.keys_values(x), jnp.ones(x.shape[:2], bool))


def attend_masked(q: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns attention [B, heads, S, h] of queries to keys and values [B, heads, C, h].

    `mask` is [B, S or 1, C] bool. Scores and softmax are in float32.
    """
    scores = jnp.einsum("bhsd,bhcd->bhsc", q * q.shape[-1] ** -0.5, keys, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, MASKED), axis=-1).astype(values.dtype)
    return jnp.einsum("bhsc,bhcd->bhsd", weights, values)


@dataclasses.dataclass(frozen=True)
class EncoderDecoder:
    """An encoder-decoder with tied embeddings in the decoder. All methods are pure and may be jitted.

    Attributes:
        config: shape and flags of both stacks; the attention is plain `jnp`.
        start_id: the token that a decoder is fed first.
    """

    config: DecoderConfig
    start_id: int

    def __post_init__(self) -> None:
        c = self.config
        require(
            c.positions == "rope" and c.tie_embeddings and c.num_kv_heads == c.num_heads and not c.remat,
            "an encoder-decoder needs positions='rope', tie_embeddings=True, num_kv_heads == num_heads and remat=False",
        )

    @property
    def rules(self) -> Rules:
        """Returns how matrices are split over a mesh."""
        return COLUMN_AND_ROW

    @property
    def vocab_size(self) -> int:
        """Returns the number of entries of the vocabulary."""
        return self.config.vocab_size

    @property
    def compute_dtype(self) -> str:
        """Returns the name of the dtype of matrix products."""
        return self.config.compute_dtype

    @property
    def reads_packed(self) -> bool:
        """Returns False: in packed rows prompts and answers share a row, here prompts have their own stack."""
        return False

    @property
    def _plain(self) -> DecoderConfig:
        return dataclasses.replace(self.config, attention="xla")

    def check_lengths(self, prompt_length: int, max_new_tokens: int) -> None:
        """Raises UserError where the prompt or the answer is longer than the context of its stack.

        Args:
            prompt_length: P in tokens, padding included.
            max_new_tokens: T in tokens.
        """
        for name, length in (("train.prompt_length", prompt_length), ("sampling.max_new_tokens", max_new_tokens)):
            require(
                length <= self.config.context_length,
                f"{name} ({length}) is more than the policy's context of {self.config.context_length} tokens",
            )

    def init(self, key: jax.Array) -> Params:
        """Returns fresh float32 parameters: `encoder`, `decoder`, `cross`."""
        keys = jax.random.split(key, 2 + self.config.num_layers)
        one = jnp.ones((1, 1), jnp.int32)
        trunk = lambda k: unstack_layers(self.config, Trunk(self._plain).init(k, one, one.astype(bool))["params"])
        x = jnp.zeros((1, 1, self.config.width))
        cross = CrossAttention(self.config)
        layers = {f"layers_{i}": cross.init(k, x, method="init_all")["params"] for i, k in enumerate(keys[2:])}
        return {"encoder": trunk(keys[0]), "decoder": trunk(keys[1]), "cross": layers}

    def encode(self, params: Params, tokens: jax.Array, mask: jax.Array) -> tuple[KeyValue, ...]:
        """Returns the keys and values [B, heads, P, h] that each layer of the decoder reads of the prompts.

        Args:
            params: parameters.
            tokens: [B, P] int32, left padded.
            mask: [B, P] bool, true for real tokens.
        """
        config, trunk = self._plain, params["encoder"]
        positions = positions_from_mask(mask)
        x, rope = apply(Trunk(config), trunk, tokens, positions, method="embedded"), rope_table(config, positions)
        visible = jnp.broadcast_to(mask.astype(bool)[:, None], (*mask.shape, mask.shape[1]))
        for block in block_params(config, trunk):
            x, _ = apply(Block(config), block, x, rope, visible)
        encoded = apply(Trunk(config), trunk, x, method="final")
        return tuple(
            apply(CrossAttention(config), layer, encoded, method="keys_values")
            for layer in block_params(config, params["cross"])
        )

    def hidden(self, params: Params, view: View) -> jax.Array:
        """Returns the hidden states [B, T, D] that predict `view.targets`.

        Args:
            params: the parameters of encoder and decoder.
            view: the rollout, padded.
        """
        assert isinstance(view, PaddedView)
        config, trunk, each = self._plain, params["decoder"], view.answers
        shared = self.encode(params, view.tokens[::each, : view.prompt_mask.shape[1]], view.prompt_mask[::each])
        start = jnp.full((view.targets.shape[0], 1), self.start_id, view.tokens.dtype)
        tokens = jnp.concatenate([start, view.targets[:, :-1]], axis=1)
        length = tokens.shape[1]
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        x, rope = apply(Trunk(config), trunk, tokens, positions, method="embedded"), rope_table(config, positions)
        # The start token is real; a token is fed where the one before it is in the mask.
        real = jnp.concatenate([jnp.ones_like(view.response_mask[:, :1]), view.response_mask[:, :-1]], axis=1)
        causal = jnp.tril(jnp.ones((length, length), bool))[None] & real[:, None]
        for block, cross, (keys, values) in zip(
            block_params(config, trunk), block_params(config, params["cross"]), shared
        ):
            x, _ = apply(Block(config), block, x, rope, causal)
            k, v = keys.repeat(each, axis=0), values.repeat(each, axis=0)
            x = apply(CrossAttention(config), cross, x, k, v, view.prompt_mask)
        return apply(Trunk(config), trunk, x, method="final")

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Returns logits [..., V] float32 of hidden states [..., D], by the parameters `params`."""
        table = params["decoder"]["embed"]["embedding"].astype(hidden.dtype)
        return (hidden @ table.T).astype(jnp.float32)

    def token_logprobs(
        self, params: Params, hidden: jax.Array, targets: jax.Array, temperature: float = 1.0, *, entropy: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Computes (log-probs in nats, entropies) of `targets`, each [B, T] float32; see `chunked_logprobs`.

        Args:
            params: parameters.
            hidden: [B, T, D] hidden states that predict the targets.
            targets: [B, T] int32.
            temperature: divides the logits.
            entropy: whether to compute entropies; they are 0 otherwise.
        """
        head = {"decoder": {"embed": params["decoder"]["embed"]}}
        return chunked_logprobs(self.logits, head, hidden, targets, self.vocab_size, temperature, entropy=entropy)

    def prefill(self, params: Params, tokens: jax.Array, mask: jax.Array, *, hold_last: bool) -> Prefill:
        """Encodes prompts once; the first token to feed is always the start token.

        Args:
            params: parameters, matrices in the compute dtype.
            tokens: [B, P] int32, left padded.
            mask: [B, P] bool, true for real tokens.
            hold_last: not used: the start token is fed in any case.
        """
        del hold_last
        rows = tokens.shape[0]
        return Prefill(
            shared=(self.encode(params, tokens, mask), mask.astype(bool)),
            hidden=None,
            first_tokens=jnp.full(rows, self.start_id, jnp.int32),
            positions=jnp.zeros(rows, jnp.int32),
        )

    def start_cache(self, rows: int, length: int) -> tuple[KeyValue, ...]:
        """Returns zeroed caches of the decoder's self-attention [rows, heads, length, h], a pair a layer."""
        config = self.config
        zeros = jnp.zeros((rows, config.num_heads, length, config.head_dim), jnp.dtype(config.compute_dtype))
        return tuple((zeros, zeros) for _ in range(config.num_layers))

    def decode_step(
        self,
        params: Params,
        shared: Any,
        cache: tuple[KeyValue, ...],
        tokens: jax.Array,
        position: jax.Array,
        column: jax.Array,
        own_mask: jax.Array,
    ) -> tuple[jax.Array, tuple[KeyValue, ...]]:
        """Feeds one token a row and returns (logits [R, V] float32, cache).

        Args:
            params: parameters, matrices in the compute dtype.
            shared: each layer's keys and values [B, heads, P, h] of the prompts, and their mask [B, P].
            cache: keys and values of the answers' own columns, R = B K rows.
            tokens: [R] int32.
            position: [R] int32.
            column: [] int32, the column of the cache that this token takes.
            own_mask: [R or 1, length] bool, the columns of its cache that a row may read.
        """
        config, trunk = self._plain, params["decoder"]
        of_prompts, prompt_mask = shared
        x = apply(Trunk(config), trunk, tokens, position, method="embedded")
        rope = rope_table(config, position)
        groups = (prompt_mask.shape[0], -1, config.width)  # the K answers to a prompt are K queries to its encoding
        updated = []
        for block, cross, (keys, values), prompt in zip(
            block_params(config, trunk), block_params(config, params["cross"]), cache, of_prompts
        ):
            q, k, v = apply(Block(config), block, x, rope, method="qkv")
            keys = jax.lax.dynamic_update_slice_in_dim(keys, k[:, :, None], column, axis=2)
            values = jax.lax.dynamic_update_slice_in_dim(values, v[:, :, None], column, axis=2)
            attended = attend_masked(q[:, :, None], keys, values, own_mask[:, None])
            x = apply(Block(config), block, x, attended.reshape(x.shape[0], -1), method="finish")
            x = apply(CrossAttention(config), cross, x.reshape(groups), *prompt, prompt_mask).reshape(x.shape)
            updated.append((keys, values))
        return self.logits(params, apply(Trunk(config), trunk, x, method="final")), tuple(updated)
