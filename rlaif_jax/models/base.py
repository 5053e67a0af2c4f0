"""What the package knows of a model: its contract, and the views in which sequences are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax

from rlaif_jax.types import Frozen, Params

Rules = Mapping[tuple[str, str], tuple[str | None, str | None]]

# Megatron's column and row split: the last two names of a parameter's path -> mesh axes of its last two dimensions, None
# for one that stays whole. An adapter's matrices go with their kernel; the rank is not split.
COLUMN_AND_ROW: Rules = {
    ("embed", "embedding"): ("tensor", "fsdp"),
    ("lm_head", "kernel"): ("fsdp", "tensor"),
    **{(name, "kernel"): ("fsdp", "tensor") for name in ("q", "k", "v", "gate", "up")},
    **{(name, "lora_a"): ("fsdp", None) for name in ("q", "k", "v", "gate", "up")},
    **{(name, "lora_b"): (None, "tensor") for name in ("q", "k", "v", "gate", "up")},
    **{(name, "kernel"): ("tensor", "fsdp") for name in ("o", "down")},
    **{(name, "lora_a"): ("tensor", None) for name in ("o", "down")},
    **{(name, "lora_b"): (None, "fsdp") for name in ("o", "down")},
}


@dataclasses.dataclass(frozen=True)
class PaddedView:
    """Sequences as a rollout lays them out, one a row.

    Attributes:
        tokens: [B, P + T] int32, prompts left padded, responses right padded.
        prompt_mask: [B, P] bool.
        response_mask: [B, T] bool.
        targets: [B, T] int32, the response tokens to be scored, 0 where masked.
        answers: K consecutive rows that have the same prompt, which a model may then read once; 1 where rows are
            independent.
    """

    tokens: jax.Array
    prompt_mask: jax.Array
    response_mask: jax.Array
    targets: jax.Array
    answers: int = 1


@dataclasses.dataclass(frozen=True)
class PackedView:
    """Several prompts and answers behind one another in each row, all arrays [R, C] int32.

    Attributes:
        tokens: the token that a column feeds.
        positions: the position of that token in its own sequence.
        segments: the number of the column's prompt within the row, 0 for an empty column.
        answers: 0 for columns of the prompt, else the number of the answer; None where each prompt has one answer.
        targets: the token that a column predicts, 0 where it predicts none.
    """

    tokens: jax.Array
    positions: jax.Array
    segments: jax.Array
    answers: jax.Array | None
    targets: jax.Array


View = PaddedView | PackedView


class Prefill(NamedTuple):
    """Prompts after they were read once, before any token is drawn.

    Attributes:
        shared: pytree of arrays [B, ...] that all answers to a prompt read (its keys and values, an encoder's output).
        hidden: [B, D] hidden states that predict the first token, or None: then `first_tokens` must be fed first.
        first_tokens: [B] int32, the token to feed before the first one is drawn (the prompt's last, or a start token).
        positions: [B] int32, the position of the first token that an answer feeds.
    """

    shared: Any
    hidden: jax.Array | None
    first_tokens: jax.Array
    positions: jax.Array


class LanguageModel(Protocol):
    """A model that draws text token by token: a frozen object with pure functions of its parameters."""

    @property
    def rules(self) -> Rules:
        """Returns how matrices are split over a mesh, by the last two names of a parameter's path."""

    @property
    def vocab_size(self) -> int:
        """Returns the number of entries of the vocabulary."""

    @property
    def compute_dtype(self) -> str:
        """Returns the name of the dtype of matrix products, "float32" or "bfloat16"."""

    @property
    def reads_packed(self) -> bool:
        """Returns whether `hidden` reads rows of several sequences."""

    def check_lengths(self, prompt_length: int, max_new_tokens: int) -> None:
        """Raises UserError where the model cannot take prompts and answers of these lengths, in tokens.

        Args:
            prompt_length: P, padding included.
            max_new_tokens: T.
        """

    def init(self, key: jax.Array) -> Params:
        """Returns fresh float32 parameters."""

    def prefill(self, params: Params, tokens: jax.Array, mask: jax.Array, *, hold_last: bool) -> Prefill:
        """Reads prompts once, before any token of an answer is drawn.

        Args:
            params: parameters, matrices in the compute dtype.
            tokens: [B, P] int32, left padded.
            mask: [B, P] bool, true for real tokens.
            hold_last: the last token of each prompt is not read: `Prefill.hidden` is None, and the caller feeds
                `Prefill.first_tokens` first. A model may hold it back in any case.
        """

    def start_cache(self, rows: int, length: int) -> Any:
        """Returns empty caches for `rows` answers of `length` columns, a pytree of [rows, heads, length, h]."""

    def decode_step(
        self,
        params: Params,
        shared: Any,
        cache: Any,
        tokens: jax.Array,
        position: jax.Array,
        column: jax.Array,
        own_mask: jax.Array,
    ) -> tuple[jax.Array, Any]:
        """Feeds one token a row and returns (logits of the next one [R, V] float32, cache).

        Args:
            params: parameters, matrices in the compute dtype.
            shared: `Prefill.shared` of B prompts; R = B K rows, the K answers to a prompt in consecutive rows.
            cache: what `start_cache` or the last step returned, for R rows.
            tokens: [R] int32.
            position: [R] int32.
            column: [] int32, the column of the cache that this token's keys and values take.
            own_mask: [R or 1, length] bool, the columns of its cache that a row may read.
        """

    def hidden(self, params: Params, view: View) -> jax.Array:
        """Returns the hidden states [..., D], by the parameters `params`, that predict `view.targets`."""

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Returns logits [..., V] float32 of hidden states [..., D], by the parameters `params`."""

    def token_logprobs(
        self, params: Params, hidden: jax.Array, targets: jax.Array, temperature: float = 1.0, *, entropy: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (log-probs in nats, entropies) of the targets, each [B, T] float32.

        Args:
            params: parameters.
            hidden: [B, T, D] hidden states that predict the targets.
            targets: [B, T] int32.
            temperature: divides the logits.
            entropy: whether to compute entropies; they are 0 otherwise.
        """


class Critic(Protocol):
    """A scalar for every target of a view: a value function."""

    def values(self, params: Params, frozen: Frozen, view: View, hidden: jax.Array) -> jax.Array:
        """Returns values of the shape of `view.targets`, float32.

        Args:
            params: the critic's parameters.
            frozen: weights that do not learn.
            view: the rollout, padded or packed.
            hidden: the policy's hidden states of the same view, [..., D].
        """
