"""What a sink is: a place outside metrics.jsonl that shows a run's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from rlaif_jax.config import UserError

Numbers = Mapping[str, float | int | None]  # None: not a finite number


class Sink(Protocol):
    """Shows a run's numbers somewhere: the methods that a tracker implements.

    `metrics.jsonl` does not depend on a sink.
    """

    def start(self, stage: str, total: int | None, resume_from: int | None) -> None:
        """Begins a stage.

        Args:
            stage: its name.
            total: the number of its steps; None if unknown.
            resume_from: the step after which it goes on; later steps that the sink holds are void. None: all steps are.
        """

    def write(self, stage: str, step: int, values: Numbers) -> None:
        """Takes the numbers of one step of a stage.

        Args:
            stage: the name of a stage that was started.
            step: the step.
            values: the numbers by name; None for a number that is not finite.
        """

    def flush(self) -> None:
        """Makes everything permanent; called with every checkpoint."""

    def end(self, stage: str) -> None:
        """Ends a stage."""

    def close(self) -> None:
        """Ends the run; a second call does nothing."""


def unwritable(path: Path, error: OSError) -> UserError:
    """Returns the message that a file of numbers cannot be written."""
    return UserError(
        f"{path}: cannot be written ({error.strerror or error}). Free some space or give a run folder that "
        "can be written to; what is already in the file stays valid."
    )
