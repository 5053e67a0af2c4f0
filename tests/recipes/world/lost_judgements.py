"""`python lost_judgements.py OUT STAGES SHARE`: a small quickstart of which a share of the labeler's judgements is missing."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments import quickstart
from rlaif_jax.command_line import use_compilation_cache
from rlaif_jax.data.prompts import Record
from rlaif_jax.feedback.records.forms import sha256
from rlaif_jax.feedback.sources import CountingSource, FeedbackSource, Missing
from rlaif_jax.types import Feedback, Rollout

DEFAULT = quickstart.get_config()
# Half of the quickstart's steps with half of its prompts: gold rises by .2 instead of .3.
SMALL = dataclasses.replace(
    DEFAULT,
    eval_prompts=256,
    train=dataclasses.replace(DEFAULT.train, steps=30, prompts_per_step=64, eval_every=30, save_every=30),
)


@dataclasses.dataclass(frozen=True, eq=False)
class LosingSource(CountingSource):
    """A source of which a share of the judgements is missing whatever they say, as where calls to a server fail."""

    source: FeedbackSource
    share: float

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout) -> Feedback:
        judged = jax.device_get(self.source(records, answers, rollout))
        values: list[float | Missing] = []
        for record, answer, value, valid in zip(records, answers, judged.values[:, 0], judged.valid[:, 0]):
            lost = int(sha256([record["prompt"], answer])[:8], 16) / 2**32 < self.share
            values.append(Missing("the call failed") if lost or not valid else float(value))
        return self.feedback(values)


def improve(config: quickstart.QuickstartConfig, share: float) -> dict[str, Any]:
    """Returns the metrics of the quickstart with a share of the labeler's judgements missing."""
    whole = quickstart.make_reward

    def make_reward(*given: Any) -> quickstart.Reward:
        reward = whole(*given)
        return reward._replace(source=LosingSource(reward.source, share))

    quickstart.make_reward = make_reward
    try:
        return quickstart.main(config)
    finally:
        quickstart.make_reward = whole


if __name__ == "__main__":
    use_compilation_cache()
    improve(dataclasses.replace(SMALL, out=Path(sys.argv[1]), stages=Path(sys.argv[2])), float(sys.argv[3]))
