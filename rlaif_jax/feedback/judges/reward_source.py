"""Reward models as a source that reads texts, for a policy with another tokenizer or chat template."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np

from rlaif_jax.config import require
from rlaif_jax.data.prompts import Record, padded
from rlaif_jax.data.rendering import answer_tokens, learned_with_bos
from rlaif_jax.data.tokenizers import Tokenizer
from rlaif_jax.feedback.judges.batching import check_batch_size, in_batches
from rlaif_jax.feedback.judges.reward_model import Combine, score_ensemble
from rlaif_jax.feedback.sources import CountingSource, Missing
from rlaif_jax.models.heads import ScalarModel
from rlaif_jax.parallel import Runner
from rlaif_jax.types import Feedback, Params, Rollout


@dataclasses.dataclass(frozen=True, eq=False)
class RewardModelSource(CountingSource):
    """Reward models that read texts with their own tokenizer and chat template, whatever the policy's are.

    An answer that was cut by the length limit is scored with a stop token, as the reward models have learned. A text longer
    than `max_length` is missing.

    Attributes:
        model, tokenizer: the reward models' own.
        params: of the N members of the ensemble, each array with a first axis N; one reward model is one member.
        runner: runs the compiled function on all devices.
        batch_size: texts of one compiled call.
        max_length: tokens of prompt and answer at most.
        combine: how the members' scores become one.
        coef: weight of their variance, where they are combined cautiously.
    """

    model: ScalarModel
    params: Params
    tokenizer: Tokenizer
    runner: Runner
    batch_size: int
    max_length: int
    combine: Combine = "mean"
    coef: float = 0.0

    def __post_init__(self) -> None:
        check_batch_size("reward model", self.batch_size, self.runner)
        context = self.model.config.context_length
        require(
            1 <= self.max_length <= context,
            f"max_length is {self.max_length}; the reward model reads 1 to {context} tokens",
        )

    @cached_property
    def _placed(self) -> Params:
        """The parameters on the devices of the runner, moved once."""
        return self.runner.place(self.params)

    @cached_property
    def _score(self) -> Any:
        return self.runner.map(partial(score_ensemble, self.model, self.combine, self.coef))

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout | None = None) -> Feedback:
        """Returns the score of each answer; see `FeedbackSource`."""
        bos = learned_with_bos(self.tokenizer)
        prompts = [str(record["prompt"]) for record in records]
        ids = [answer_tokens(self.tokenizer, *texts, add_bos=bos)[0] for texts in zip(prompts, answers, strict=True)]
        fits = [len(sequence) <= self.max_length for sequence in ids]
        shown = [sequence if fit else sequence[:1] for sequence, fit in zip(ids, fits)]
        length = min(self.max_length, 1 << (max(map(len, shown)) - 1).bit_length())
        batch = padded(shown, length, self.tokenizer.pad_id, "right")
        scores = np.asarray(in_batches(partial(self._score, self._placed), batch, self.batch_size), np.float32)
        missing = Missing(f"prompt and answer are longer than {self.max_length} tokens")
        return self.feedback([value if fit else missing for value, fit in zip(scores.tolist(), fits)])
