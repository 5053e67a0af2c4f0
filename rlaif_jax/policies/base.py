"""What the loop and the algorithms know of a policy: the `Policy` contract of every kind of output."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.config import check_choices, require
from rlaif_jax.data.prompts import PromptBatch
from rlaif_jax.data.tokenizers import Tokenizer
from rlaif_jax.models.base import Rules, View
from rlaif_jax.types import Frozen, Params, Prompts, Rollout


@dataclasses.dataclass(frozen=True)
class Draw:
    """Some of the answers to every prompt of a step.

    Attributes:
        count: answers to each prompt.
        by: who answers, the policy that learns or its frozen reference.
        greedy: take the most probable token instead of sampling.
    """

    count: int = 1
    by: Literal["policy", "reference"] = "policy"
    greedy: bool = False

    def __post_init__(self) -> None:
        check_choices(self, "draw")
        require(self.count >= 1, f"draw.count must be >= 1, not {self.count}")


class Scores(NamedTuple):
    """What a policy computes for every target of a view, float32.

    Attributes:
        logprobs: of the shape of the targets, in nats at the sampling temperature.
        entropies: of the shape of the targets, of the distribution that predicts the target; 0 unless asked for.
        hidden: [..., D] the policy's hidden states, for a critic on the same trunk.
    """

    logprobs: jax.Array
    entropies: jax.Array
    hidden: Any


class Policy(Protocol):
    """A kind of output on a model: how an answer is drawn, scored, read and checked. A frozen object."""

    @property
    def rules(self) -> Rules:
        """Returns how matrices are split over a mesh (`LanguageModel.rules`)."""

    @property
    def tolerance(self) -> float:
        """Returns the largest gap in nats between two computations of one log-prob that rounding explains."""

    @property
    def reads_packed(self) -> bool:
        """Returns whether `score` reads rows of several sequences (`LanguageModel.reads_packed`)."""

    def check(self, prompt_length: int, tokenizer: Tokenizer) -> None:
        """Raises UserError where the model does not fit the prompts or the tokenizer.

        Args:
            prompt_length: P in tokens, padding included.
            tokenizer: of prompts and answers.
        """

    def empty_rollout(self, rows: int, prompt_length: int) -> Rollout:
        """Returns a rollout of zeros with the shapes and dtypes of a real one.

        Args:
            rows: B, the number of answers.
            prompt_length: P in tokens.
        """

    def sample(
        self, params: Params, frozen: Frozen, prompts: Prompts, key: jax.Array, draws: tuple[Draw, ...]
    ) -> Rollout:
        """Draws answers to B prompts: B K rows, those of a prompt consecutive and in the order of `draws`.

        Args:
            params: the policy's parameters.
            frozen: weights that do not learn; its reference answers the draws by "reference".
            prompts: [B, P].
            key: one key for the whole step; an answer's random numbers depend on (key, uid, answer index) only.
            draws: who answers, how often.
        """

    def score(self, params: Params, frozen: Frozen, view: View, *, entropy: bool = False) -> Scores:
        """Returns log-probs, entropies and hidden states of every target of `view`.

        Args:
            params: the policy's parameters.
            frozen: weights that do not learn.
            view: padded or packed sequences.
            entropy: whether to compute entropies; they are 0 otherwise.

        Returns:
            Log-probs (nats, at the sampling temperature) and entropies in the layout of `view.targets`, float32.
        """

    def texts(self, rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
        """Returns the B answers of a rollout as text.

        Args:
            rollout: B answers.
            tokenizer: decodes them.
        """

    def checks(self, rollout: Rollout) -> dict[str, bool]:
        """Returns what must hold of any rollout, by name."""


def draw_count(draws: tuple[Draw, ...]) -> int:
    """Returns K, the rows of each prompt in a rollout of these draws."""
    return sum(draw.count for draw in draws)


def to_prompts(batch: PromptBatch) -> Prompts:
    """Returns the tokens, masks and uids of a host batch as JAX arrays."""
    return Prompts(tokens=jnp.asarray(batch.tokens), mask=jnp.asarray(batch.mask), uid=jnp.asarray(batch.uid))


def learned_rows(draws: tuple[Draw, ...], rows: int) -> np.ndarray:
    """Returns [B] bool, the rows that a policy learns from: its own samples, or recorded answers.

    Args:
        draws: who answers each prompt; empty for recorded answers.
        rows: B, a multiple of `draw_count(draws)`.
    """
    sampled = [draw.by == "policy" and not draw.greedy for draw in draws for _ in range(draw.count)] or [True]
    return np.tile(np.array(sampled), rows // len(sampled))
