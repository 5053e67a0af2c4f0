"""Recorded answers: pairs for offline preference methods, demonstrations for inverse RL."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlaif_jax.config import require
from rlaif_jax.data.prompts import PromptBatch, PromptIterator, padded
from rlaif_jax.data.tokenizers import Tokenizer
from rlaif_jax.types import Rollout


def as_rollout(batch: PromptBatch, answers: Sequence[Sequence[str]], tokenizer: Tokenizer, length: int) -> Rollout:
    """Returns recorded texts as a rollout with K rows for each prompt.

    Log-probabilities are 0; every answer ends with the stop token.

    Args:
        batch: G prompts.
        answers: the K texts of each prompt.
        tokenizer: encodes the texts; its stop token is added where it has one.
        length: T, the most tokens of an answer.

    Raises:
        UserError: an answer has no token or more than `length`; the message shows it.
    """
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    rows = [tokenizer.encode(text) + end for texts in answers for text in texts]
    for row, text in zip(rows, (text for texts in answers for text in texts)):
        require(
            0 < len(row) <= length,
            f"the recorded answer {text[:60]!r} has {len(row)} tokens with its stop token; it must have 1 to {length}",
        )
    tokens, mask = padded(rows, length, tokenizer.pad_id, "right")
    count = len(answers[0])
    fields: dict[str, Any] = {
        "tokens": np.concatenate([batch.tokens.repeat(count, axis=0), tokens], axis=1),
        "prompt_mask": batch.mask.repeat(count, axis=0),
        "response_mask": mask,
        "logprobs": np.zeros(tokens.shape, np.float32),
        "finished": np.full(len(rows), bool(end)),
    }
    return Rollout(**fields)


class WithRecorded(PromptIterator):
    """A prompt iterator whose batches bring answers from fields of their records.

    Args:
        prompts: yields the prompts.
        tokenizer: encodes the answers.
        length: T, the most tokens of an answer.
        pair: two fields, the answers of a recorded pair (`PromptBatch.recorded`), the preferred one first; or none.
        demonstration: the field of an answer to imitate (`PromptBatch.demonstrations`); "" for none.
    """

    def __init__(
        self,
        prompts: PromptIterator,
        tokenizer: Tokenizer,
        length: int,
        *,
        pair: tuple[str, str] | None = None,
        demonstration: str = "",
    ) -> None:
        self._prompts, self._tokenizer, self._length = prompts, tokenizer, length
        self.batches = prompts.batches
        self._pair, self._demonstration = pair, demonstration

    def __next__(self) -> PromptBatch:
        batch = next(self._prompts)
        if self._pair is not None:
            batch = dataclasses.replace(batch, recorded=self._rollout(batch, self._pair))
        if self._demonstration:
            batch = dataclasses.replace(batch, demonstrations=self._rollout(batch, (self._demonstration,)))
        return batch

    def _rollout(self, batch: PromptBatch, fields: Sequence[str]) -> Rollout:
        for record in batch.records:
            lacking = [field for field in fields if not isinstance(record.get(field), str)]
            require(not lacking, f"a record has no text in {', '.join(lacking)}: {str(record)[:80]}")
            halves = [
                field for field in fields if any("\ud800" <= character <= "\udfff" for character in record[field])
            ]
            require(not halves, f"a record has half of a surrogate pair in {', '.join(halves)}: {str(record)[:80]!a}")
        texts = [[record[field] for field in fields] for record in batch.records]
        return as_rollout(batch, texts, self._tokenizer, self._length)

    def get_state(self) -> Any:
        """Returns the position of the prompts."""
        return self._prompts.get_state()

    def set_state(self, state: Any) -> None:
        """Continues from a position of the prompts, as `get_state` returned it."""
        self._prompts.set_state(state)
