"""The watch over a run: sees each step, warns once of each kind, knows whether the run has diverged."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rlaif_jax.data.prompts import Record
from rlaif_jax.rewards.shaping import Normaliser, Shaping
from rlaif_jax.types import Feedback, RewardBatch
from rlaif_jax.watch.rules import HISTORY, RULES, Opinion, Past, Seen, WatchConfig, bad_step, diverged, kl_limit


class Watch:
    """Sees each step of a run, knows what it has warned of, and whether the run has diverged.

    Args:
        config: the bounds.
        scale: [R] by what each judgement is multiplied before it counts (`reward_scale`); empty: all 1.
        staleness: steps between the policy that answers and the policy that learns.
        drawn: whether the policy draws the answers; recorded ones say nothing about it.
        stops: whether answers may end before the length limit.
    """

    def __init__(
        self,
        config: WatchConfig,
        *,
        scale: Sequence[float] = (),
        staleness: int = 0,
        drawn: bool = True,
        stops: bool = True,
    ) -> None:
        self.config = config
        self._scale, self._staleness, self._drawn, self._stops = scale, staleness, drawn, stops
        self._first: Seen | None = None
        self._steps: list[Seen] = []
        self._start: Opinion | None = None
        self._best: Opinion | None = None
        self._warned: dict[str, str] = {}  # name of the rule -> what it said
        self._diverged = False

    @property
    def diverged(self) -> bool:
        """Returns whether the last steps were all bad."""
        return self._diverged

    @property
    def healthy(self) -> bool:
        """Returns whether the present policy may replace an older checkpoint.

        It may not after a bad step, unless the run goes on whatever happens.
        """
        return not self.config.stop or not self._bad_steps()

    @property
    def healthy_step(self) -> int:
        """Returns the last step whose policy has given answers that were not bad."""
        assert self._steps
        return self._steps[-1].step - self._bad_steps() - 1 - self._staleness

    def _bad_steps(self) -> int:
        """Returns the number of bad steps in a row up to the present one."""
        if self._first is None:
            return 0
        limit = kl_limit(Past(self.config, self._first, ()))
        good = (i for i, seen in enumerate(reversed(self._steps)) if bad_step(seen, self._first, limit) is None)
        return next(good, len(self._steps))

    def evaluated(self, step: int, values: Mapping[str, float]) -> Opinion | None:
        """Takes the second opinion of an evaluation; returns it, or None if `values` have none.

        Args:
            step: the step, 0 before the first one.
            values: metrics, among them perhaps `second_opinion` and `second_opinion_se`.
        """
        second, error = _known(values.get("second_opinion")), _known(values.get("second_opinion_se"))
        if second is None or error is None:
            return None
        rewards = [(s.reward, s.reward_error) for s in self._steps[-self.config.patience :] if s.reward is not None]
        mean = statistics.fmean(reward for reward, _ in rewards) if rewards else None
        spread = math.hypot(*(e or 0.0 for _, e in rewards)) / len(rewards) if rewards else None
        opinion = Opinion(step, second, error, mean, spread)
        self._start = self._start or opinion
        return opinion

    def see(
        self,
        step: int,
        records: Sequence[Record],
        answers: Sequence[str],
        rewards: RewardBatch,
        judged: Feedback,
        values: Mapping[str, float],
    ) -> list[str]:
        """Takes the numbers of a step and returns the warnings of rules that have not warned before.

        Args:
            step: the step, counted from 1.
            records: the record of each answer's prompt.
            answers: the B texts.
            rewards: their rewards, on the host.
            judged: the judgements [B, R] behind them, on the host.
            values: the metrics of the step.
        """
        seen = self._look(step, records, answers, rewards, judged, values)
        self._first = self._first or seen
        self._steps = [*self._steps[1 - HISTORY :], seen]
        if self._start is not None and self._start.step == 0 and self._start.reward is None:
            # The first step's answers are those of the policy that was evaluated before it.
            self._start = self._start._replace(reward=seen.reward, reward_error=seen.reward_error)
        self._best = self._best or self._start
        latest = self.evaluated(step, values)
        past = Past(self.config, self._first, self._steps, self._start, self._best, latest)
        found = {rule.__name__: text for rule in RULES if (text := rule(past)) is not None}
        if latest is not None and (self._best is None or latest.second > self._best.second):
            self._best = latest
        self._diverged = diverged.__name__ in found
        new = {name: text for name, text in found.items() if name not in self._warned}
        self._warned |= new
        return list(new.values())

    def _look(
        self,
        step: int,
        records: Sequence[Record],
        answers: Sequence[str],
        rewards: RewardBatch,
        judged: Feedback,
        values: Mapping[str, float],
    ) -> Seen:
        prompts = len({str(record.get("prompt")) for record in records})
        valid = np.asarray(rewards.valid, bool)
        totals = np.asarray(rewards.total, np.float64)[valid]
        several = len(totals) > 1 and "reward" in values
        # Without a valid answer, the algorithm's means are of nothing.
        known = values if valid.any() else {}
        count = Counter(answers).most_common(1)[0][1] if self._drawn and prompts >= 4 else None
        return Seen(
            step=step,
            answers=len(answers),
            reward=_known(values.get("reward")),
            reward_error=float(totals.std(ddof=1) / math.sqrt(min(prompts, len(totals)))) if several else None,
            varies=bool(np.ptp(totals) > 1e-6 * np.abs(totals).max()) if several else None,
            missing=_missing(rewards),
            finished=_known(values.get("finished")) if self._drawn and self._stops else None,
            commonest=None if count is None else count / len(answers),
            kl=_known(known.get("kl")),
            entropy=_known(known.get("entropy")) if self._drawn else None,
            length=_known(known.get("length")),
            spans=self._spans(judged),
        )

    def _spans(self, judged: Feedback) -> list[float]:
        values, valid = np.asarray(judged.values, np.float64), np.asarray(judged.valid, bool)
        scale = self._scale or [1.0] * values.shape[1]
        columns = [values[valid[:, i], i] for i in range(values.shape[1])]
        return [abs(s) * float(np.ptp(x)) if len(x) else 0.0 for s, x in zip(scale, columns, strict=True)]

    def get_state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps, as JSON."""
        as_dict = lambda x: None if x is None else x._asdict()
        return {
            "first": as_dict(self._first),
            "steps": [seen._asdict() for seen in self._steps],
            "start": as_dict(self._start),
            "best": as_dict(self._best),
            "warned": self._warned,
        }

    def set_state(self, state: Mapping[str, Any]) -> list[str]:
        """Takes up the state of a resumed run and returns the warnings that it has given."""
        self._first = None if state["first"] is None else Seen(**state["first"])
        self._steps = [Seen(**seen) for seen in state["steps"]]
        self._start = None if state["start"] is None else Opinion(**state["start"])
        self._best = None if state["best"] is None else Opinion(**state["best"])
        self._warned = dict(state["warned"])
        return list(self._warned.values())


def reward_scale(shaping: Shaping, normaliser: Normaliser | None) -> list[float]:
    """Returns by what each judgement is multiplied on its way to a reward; empty: all by 1.

    Args:
        shaping: its weights.
        normaliser: its deviations, one or one for each judgement; None: judgements stay as they are.
    """
    std = np.atleast_1d(1.0 if normaliser is None else np.asarray(jax.device_get(normaliser.std), np.float64))
    weights = np.asarray(shaping.weights or [1.0] * len(std))
    scale = weights / std
    return [] if np.all(scale == scale[0]) else scale.tolist()


def _known(value: float | None) -> float | None:
    """Returns a metric as a float; None where it is not there or not a number."""
    return None if value is None or math.isnan(value) else float(value)


def _missing(rewards: RewardBatch) -> float:
    """Returns the share of answers without a judgement; of pairs, where the answers are compared in pairs."""
    if rewards.pairs_valid is None:
        return float(1 - np.mean(rewards.valid))
    valid = np.asarray(rewards.pairs_valid, bool)
    pairs = ~np.eye(valid.shape[-1], dtype=bool)
    return float(1 - valid[:, pairs].mean()) if pairs.any() else 0.0
