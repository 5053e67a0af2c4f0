"""The terminal as a sink: a bar for each stage."""

from __future__ import annotations

from rlaif_jax.progress.display import ProgressBar, ProgressDisplay
from rlaif_jax.sinks.base import Numbers


class Terminal:
    """Shows each stage as a progress bar with the values of `SHOWN`, or as plain lines.

    What only evaluations measure is shown until the next one, and each evaluation leaves a line behind.

    Args:
        display: shows the bars; None: a display that only this terminal has.
    """

    SHOWN = (
        ("reward", "reward {:.3f}"),
        ("second_opinion", "second opinion {:.3f}"),
        ("gold", "gold {:.3f}"),
        ("judge", "judge {:.3f}"),
        ("kl", "KL {:.3f}"),
        ("loss", "loss {:.4f}"),
        ("accuracy", "accuracy {:.3f}"),
        ("check", "check {:.2f}"),
        ("time/tokens_per_s", "{:,.0f} tokens/s"),
    )
    EVALUATED = ("second_opinion", "gold", "judge")

    def __init__(self, display: ProgressDisplay | None = None) -> None:
        self._display = display or ProgressDisplay()
        self._owns = display is None
        self._bars: dict[str, ProgressBar] = {}
        self._measured: dict[str, dict[str, float | int]] = {}  # stage -> what its last evaluation measured

    def start(self, stage: str, total: int | None, resume_from: int | None) -> None:
        """Shows a bar for `stage` of `total` steps (None: unknown) that begins after `resume_from`."""
        self._display.begin(stage)
        self._bars[stage] = self._display.add(stage, total, start=resume_from or 0, text="compiling")
        self._measured[stage] = {}

    def write(self, stage: str, step: int, values: Numbers) -> None:
        """Moves the bar of `stage` to `step` and shows those of the `values` that SHOWN names."""
        new = {name: value for name in self.EVALUATED if (value := values.get(name)) is not None}
        self._measured[stage] |= new
        shown = {**values, **self._measured[stage]}
        text = "  ".join(f.format(shown[name]) for name, f in self.SHOWN if shown.get(name) is not None)
        self._bars[stage].update(step, text, keep=bool(new))

    def flush(self) -> None:
        """Does nothing: the terminal shows every number at once."""

    def end(self, stage: str) -> None:
        """Closes the bar of `stage`."""
        self._bars.pop(stage).close()

    def close(self) -> None:
        """Closes the display, unless the run goes on to use it."""
        if self._owns:
            self._display.close()
