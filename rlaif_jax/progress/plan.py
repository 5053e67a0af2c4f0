"""The stages that a run will have, and the time that is left of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class PlannedStage(NamedTuple):
    """A stage that a run will have.

    Attributes:
        name: the name by which it begins: of `Run.stage`, `MetricsWriter.stage` or `ProgressDisplay.begin`.
        words: what happens in it, in plain words.
        cost: the time that it takes, in any unit that all stages share, such as seconds on some machine.
        usual: the steps after which it usually ends, where it ends as soon as a check holds; None: it takes all its steps.
    """

    name: str
    words: str
    cost: float
    usual: int | None = None

    def expected(self, done: int, total: int) -> int:
        """Returns the number of steps that the stage is expected to take in all.

        Args:
            done: steps that are done.
            total: the largest number of steps.
        """
        if self.usual is None:
            return total
        return min(total, self.usual if done < self.usual else done + done // 5)


class Plan:
    """How far the stages of a run are, and from it the time that is left.

    A stage lasts until the next one begins. A stage that is passed over counts as done.

    Args:
        stages: in the order in which they begin.
    """

    def __init__(self, stages: Sequence[PlannedStage]) -> None:
        self.stages = tuple(stages)
        self.at = -1  # index of the present stage
        self._since = math.nan
        self._skipped = False
        self._seconds = 0.0  # of measured stages, and what they were planned to cost
        self._cost = 0.0

    def begin(self, name: str, now: float, *, skipped: bool = False) -> bool:
        """Begins the stage `name`; returns False where no later stage has this name.

        Args:
            name: of the stage.
            now: the clock, in seconds.
            skipped: the stage is done already, and its time says nothing.
        """
        later = [i for i, stage in enumerate(self.stages) if i > self.at and stage.name == name]
        if not later:
            return False
        if self.at >= 0 and not self._skipped:
            self._seconds += now - self._since
            self._cost += self.stages[self.at].cost
        self.at, self._since, self._skipped = later[0], now, skipped
        return True

    def title(self) -> str:
        """Returns the present stage as "stage 2 of 5: the labeler compares answers"."""
        return f"stage {self.at + 1} of {len(self.stages)}: {self.stages[self.at].words}"

    def left(self, now: float, stage_left: float | None = None) -> float | None:
        """Returns the seconds that are left of all stages, or None while no stage has shown its speed.

        Args:
            now: the clock, in seconds.
            stage_left: seconds that are left of the present stage; None if unknown.
        """
        passed = 0.0 if self._skipped else now - self._since
        present = 0.0 if self._skipped else self.stages[self.at].cost
        seconds, cost = self._seconds, self._cost
        if stage_left is not None:
            seconds, cost = seconds + passed + stage_left, cost + present
        if cost <= 0:
            return None
        pace = seconds / cost
        if stage_left is None:
            stage_left = max(0.0, present * pace - passed)
        return stage_left + pace * sum(stage.cost for stage in self.stages[self.at + 1 :])
