"""The decoder as a `LanguageModel`: GPT-2, Llama, Qwen2 and Qwen3 by the flags of `DecoderConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlaif_jax.config import require
from rlaif_jax.models.attention_cached import attend_cached, heads_per_lane, pack_heads
from rlaif_jax.models.base import COLUMN_AND_ROW, Prefill, Rules, View
from rlaif_jax.models.decoder import (
    Block,
    Decoder,
    KeyValue,
    Trunk,
    apply,
    block_params,
    in_own_rows,
    rope_table,
    unstack_layers,
    view_hidden,
)
from rlaif_jax.models.decoder_config import DecoderConfig
from rlaif_jax.types import Params

CHUNK_ELEMENTS = 2**25  # logits of more elements than this (128 MiB in float32) are computed chunk by chunk


@dataclasses.dataclass(frozen=True)
class CausalLM:
    """A causal decoder with its output matrix. All methods are pure and may be jitted.

    Attributes:
        config: shape and flags of the decoder.
    """

    config: DecoderConfig

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
        """Returns True: segments separate the sequences of a row."""
        return True

    def check_lengths(self, prompt_length: int, max_new_tokens: int) -> None:
        """Raises UserError where prompt and answer together are longer than the context.

        Args:
            prompt_length: P in tokens, padding included.
            max_new_tokens: T in tokens.
        """
        require(
            prompt_length + max_new_tokens <= self.config.context_length,
            f"train.prompt_length ({prompt_length}) + sampling.max_new_tokens ({max_new_tokens}) "
            f"= {prompt_length + max_new_tokens} is more than the policy's context of {self.config.context_length} tokens",
        )

    def init(self, key: jax.Array) -> Params:
        """Returns fresh float32 parameters."""
        one = jnp.ones((1, 1), jnp.int32)
        params = Decoder(self.config).init(key, one, one.astype(bool))["params"]
        return params | {"trunk": unstack_layers(self.config, params["trunk"])}

    def sequence_hidden(self, params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns hidden states [B, S, D] of whole sequences.

        Args:
            params: the model's parameters.
            tokens: [B, S] int32.
            mask: [B, S] bool, false for padding.
        """
        return apply(Trunk(self.config), params["trunk"], tokens, mask)[0]

    def hidden(self, params: Params, view: View) -> jax.Array:
        """Returns the hidden states [..., D], by the parameters `params`, that predict `view.targets`."""
        return view_hidden(self.config, params["trunk"], view)

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Returns logits [..., V] float32 of hidden states [..., D], by the parameters `params`."""
        return apply(Decoder(self.config), params, hidden, method="logits")

    def __call__(self, params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns logits [B, S, V] float32 of tokens, mask [B, S]: entry s predicts token s + 1."""
        return self.logits(params, self.sequence_hidden(params, tokens, mask))

    def token_logprobs(
        self, params: Params, hidden: jax.Array, targets: jax.Array, temperature: float = 1.0, *, entropy: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (log-probs, entropies) of `targets`; see `chunked_logprobs`.

        Args:
            params: parameters.
            hidden: [B, T, D] hidden states that predict the targets.
            targets: [B, T] int32.
            temperature: divides the logits.
            entropy: whether to compute entropies.
        """
        head = (
            {"trunk": {"embed": params["trunk"]["embed"]}}
            if self.config.tie_embeddings
            else {"lm_head": params["lm_head"]}
        )
        return chunked_logprobs(self.logits, head, hidden, targets, self.vocab_size, temperature, entropy=entropy)

    def prefill(self, params: Params, tokens: jax.Array, mask: jax.Array, *, hold_last: bool) -> Prefill:
        """Reads prompts once, before any token of an answer is drawn.

        Args:
            params: parameters, matrices in the compute dtype.
            tokens: [B, P] int32, left padded.
            mask: [B, P] bool, true for real tokens.
            hold_last: read all tokens but the last, which the caller feeds to `decode_step` first.
        """
        last_tokens = tokens[:, -1]
        if hold_last:
            if tokens.shape[1] == 1:  # at least one column is prefilled
                tokens, mask = (jnp.pad(x, ((0, 0), (1, 0))) for x in (tokens, mask))
            tokens, mask = tokens[:, :-1], mask[:, :-1]
        hidden, caches = apply(Trunk(self.config), params["trunk"], tokens, mask, 1, method="last")
        side = heads_per_lane(self.config)
        caches = tuple((pack_heads(keys, side), pack_heads(values, side)) for keys, values in caches)
        return Prefill(
            shared=(caches, mask.astype(bool)),
            hidden=None if hold_last else hidden[:, -1],
            first_tokens=last_tokens,
            positions=mask.astype(jnp.int32).sum(-1),
        )

    def start_cache(self, rows: int, length: int) -> tuple[KeyValue, ...]:
        """Returns zeroed caches [rows, kv_heads / side, length, side * h], keys and values of each layer."""
        config, side = self.config, heads_per_lane(self.config)
        shape = (rows, config.num_kv_heads // side, length, side * config.head_dim)
        zeros = jnp.zeros(shape, jnp.dtype(config.compute_dtype))
        return tuple((zeros, zeros) for _ in range(config.num_layers))

    def decode_step(
        self,
        params: Params,
        shared: tuple[tuple[KeyValue, ...], jax.Array],
        cache: tuple[KeyValue, ...],
        tokens: jax.Array,
        position: jax.Array,
        column: jax.Array,
        own_mask: jax.Array,
    ) -> tuple[jax.Array, tuple[KeyValue, ...]]:
        """Feeds one token a row and returns (logits [R, V] float32, cache).

        Args:
            params: parameters, matrices in the compute dtype.
            shared: keys and values [B, ...] of the prompts, a pair a layer, and their mask [B, P].
            cache: keys and values of the answers' own columns, R = B K rows.
            tokens: [R] int32.
            position: [R] int32.
            column: [] int32, the column of the cache that this token takes.
            own_mask: [R or 1, length] bool, the columns of its cache that a row may read.
        """
        config = self.config
        x = apply(Trunk(config), params["trunk"], tokens, position, method="embedded")
        rope = rope_table(config, position)
        prompt_caches, prompt_mask = shared
        updated = []
        for block, prompt, (keys, values) in zip(block_params(config, params["trunk"]), prompt_caches, cache):
            q, k, v = apply(Block(config), block, x, rope, method="qkv")
            one = (*keys.shape[:2], 1, keys.shape[3])
            keys = jax.lax.dynamic_update_slice_in_dim(keys, k.reshape(one), column, axis=2)
            values = jax.lax.dynamic_update_slice_in_dim(values, v.reshape(one), column, axis=2)
            attended = attend_cached(q, prompt, prompt_mask, (keys, values), own_mask)
            x = apply(Block(config), block, x, attended, method="finish")
            updated.append((keys, values))
        hidden = apply(Trunk(config), params["trunk"], x, method="final")
        return self.logits(params, hidden), tuple(updated)


def chunked_logprobs(
    logits_of: Callable[[Params, jax.Array], jax.Array],
    head: Params,
    hidden: jax.Array,
    targets: jax.Array,
    vocab_size: int,
    temperature: float = 1.0,
    *,
    entropy: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns (log-probs in nats, entropies) of target tokens, each [B, T] float32.

    Where B x T x V is large the tokens are taken in chunks whose logits are recomputed in the backward pass, so that
    no [B, T, V] array is ever held. On a mesh each device takes its own rows' tokens.

    Args:
        logits_of: (head, hidden states [..., D]) -> logits [..., V] float32.
        head: the parameters that `logits_of` reads.
        hidden: [B, T, D] hidden states that predict the targets.
        targets: [B, T] int32.
        vocab_size: V.
        temperature: divides the logits.
        entropy: whether to compute entropies; they are 0 otherwise.
    """

    def score(head: Params, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = logits_of(head, hidden) / temperature
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        if not entropy:
            return chosen - normaliser, jnp.zeros_like(normaliser)
        mean = jnp.sum(jax.nn.softmax(logits, axis=-1) * logits, axis=-1)
        return chosen - normaliser, normaliser - mean

    def of_rows(head: Params, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        flat, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        count = ids.shape[0]
        turns = -(-count // max(1, CHUNK_ELEMENTS // vocab_size))
        if turns <= 1:
            logprobs, entropies = score(head, flat, ids)
        else:
            size = -(-count // turns)  # even chunks: a last one of pads is work for nothing
            pad = turns * size - count
            chunks = (
                jnp.pad(flat, ((0, pad), (0, 0))).reshape(-1, size, flat.shape[-1]),
                jnp.pad(ids, (0, pad)).reshape(-1, size),
            )
            logprobs, entropies = jax.lax.map(jax.checkpoint(lambda c: score(head, *c)), chunks)
            logprobs, entropies = logprobs.reshape(-1)[:count], entropies.reshape(-1)[:count]
        return logprobs.reshape(targets.shape), entropies.reshape(targets.shape)

    return in_own_rows(of_rows, head, hidden, targets)
