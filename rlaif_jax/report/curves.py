"""The curves of a run's page: one small SVG for every stage and key of metrics.jsonl.

Numbers and keys stay text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from rlaif_jax.metrics import RL_STAGE

# Quantities with a title and a unit, in the order of the page: last part of the key -> (title, unit). Any other key is
# shown by its words.
QUANTITIES = {
    "reward": ("Reward", "score"),
    "gold": ("Gold score", "score"),
    "kl": ("KL to the reference", "nats per answer"),
    "length": ("Answer length", "tokens"),
    "entropy": ("Entropy", "nats per token"),
    "clip_fraction": ("Clip fraction", "share of tokens"),
    "sampler_gap": ("Sampler gap", "nats per token"),
}
_STAGE_TITLES = {
    "lm": "Language model",
    "sft": "Supervised fine-tuning",
    "labeler": "Labeler",
    "reward_model": "Reward model",
    RL_STAGE: "Training loop",
}
_LOSS_UNITS = {
    "lm": "nats per token",
    "sft": "nats per token",
    "labeler": "nats per token",
    "reward_model": "nats per pair",
}
_ABBREVIATIONS = {"kl", "ppo", "grpo", "sft", "rl", "rm", "eos", "lm", "ece", "lc", "ci95", "ai"}


@dataclass(frozen=True)
class Plot:
    """A curve: its title, its last finite value as text, and an SVG element that holds no foreign text."""

    title: str
    last: str
    svg: str


def is_number(value: Any) -> TypeGuard[float]:
    """Returns whether a JSON value is a finite number; true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))


def number_text(value: float) -> str:
    """Returns a number with three or four digits that matter: 0.123, 12.35, 1,235."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.3g}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.4g}"


def words(key: str) -> str:
    """Returns a key as words: first_kl_zero -> First KL zero."""
    text = " ".join(word.upper() if word in _ABBREVIATIONS else word for word in key.split("_") if word)
    return text[:1].upper() + text[1:]


def stage_title(stage: str) -> str:
    """Returns the name of a stage for people: reward_model -> Reward model."""
    return _STAGE_TITLES.get(stage) or words(str(stage))


def quantity(name: str) -> tuple[str, str]:
    """Returns (title, unit) of a number; the unit is empty if it is not known."""
    return QUANTITIES.get(name) or (words(name), "")


def is_main(stage: str, key: str) -> bool:
    """Returns whether a curve is one that everybody looks at first, whatever its values are.

    Args:
        stage: the stage of the run.
        key: the key in metrics.jsonl.
    """
    name = key.split("/")[-1]
    return name in QUANTITIES if stage == RL_STAGE else name.endswith(("loss", "accuracy"))


def curve_title(stage: str, key: str) -> tuple[str, str]:
    """Returns (title, unit) of a curve; the unit is empty if it is not known.

    Args:
        stage: the stage of the run; the unit of a loss depends on it.
        key: the key in metrics.jsonl.
    """
    name = key.split("/")[-1]
    if stage == RL_STAGE and name in QUANTITIES:
        title, unit = quantity(name)
        return (title if "/" not in key else f"{title} ({key.rsplit('/', 1)[0]})"), unit
    if key == "time/tokens_per_s":
        return "Speed", "tokens per second"
    if name.endswith("accuracy"):
        return words(key), "share correct"
    return words(key), _LOSS_UNITS.get(stage, "nats") if name.endswith("loss") and stage != RL_STAGE else ""


class Curves:
    """Draws the lines of `read_metrics`.

    Args:
        rows: the lines, of all stages.

    Attributes:
        window: whether one of the curves that were drawn is smoothed.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._series: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for row in rows:
            for key, value in row.items():
                if key in ("step", "stage") or (key.startswith("time/") and key != "time/tokens_per_s"):
                    continue
                if value is None or isinstance(value, (int, float)):
                    point = (row["step"], float("nan") if value is None else float(value))
                    self._series.setdefault((row["stage"], key), []).append(point)
        self._drawn = 0
        self.window = False

    def main(self, stage: str) -> list[Plot]:
        """Returns the plots to look at first.

        These are losses and accuracies; of the stage "rl" the keys of `QUANTITIES`, then the other keys that change.
        """
        keys = [key for at, key in self._series if at == stage and self._is_main(stage, key)]
        if stage == RL_STAGE:
            place = {name: i for i, name in enumerate(QUANTITIES)}
            keys.sort(key=lambda key: place.get(key.split("/")[-1], len(place)))
            return [self._plot(stage, key, "#4453c8") for key in keys]
        return [self._plot(stage, key, "#0b7a6f", stage_title(stage)) for key in keys]

    def others(self, stage: str) -> list[Plot]:
        """Returns the plots of all other keys of the stage."""
        keys = [key for at, key in self._series if at == stage and not self._is_main(stage, key)]
        prefix = "Loop" if stage == RL_STAGE else stage_title(stage)
        return [self._plot(stage, key, "#5b6475", prefix) for key in keys]

    def _is_main(self, stage: str, key: str) -> bool:
        if stage != RL_STAGE or is_main(stage, key) or "/" in key:
            return is_main(stage, key)
        finite = [value for _, value in self._series[stage, key] if np.isfinite(value)]
        return bool(finite) and min(finite) < max(finite)

    def _plot(self, stage: str, key: str, color: str, prefix: str = "") -> Plot:
        points = np.asarray(sorted(self._series[stage, key]), dtype=np.float64)
        steps, values = points[:, 0], points[:, 1]
        finite = values[np.isfinite(values)]
        title, unit = curve_title(stage, key)
        self._drawn += 1
        smooth = _smooth(values)
        self.window |= smooth is not None
        shown = _extremes(values)
        steps, values, smooth = steps[shown], values[shown], None if smooth is None else smooth[shown]
        return Plot(
            title=f"{prefix} · {title}" if prefix else title,
            last=number_text(float(finite[-1])) if len(finite) else "no finite value",
            svg=_draw(steps, values, smooth, unit or "value", color, f"plot-{self._drawn}"),
        )


def _smooth(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, Any] | None:
    """Returns the centred mean over a twentieth of the points; None for short series.

    Missing points are left out.
    """
    if len(values) < 40:
        return None
    window = np.ones(max(3, len(values) // 20) // 2 * 2 + 1)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), window, mode="same")
    count = np.convolve(known.astype(np.float64), window, mode="same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _extremes(values: np.ndarray[Any, np.dtype[np.float64]], bins: int = 500) -> np.ndarray[Any, Any]:
    """Returns the indices of the points to draw: all, or the lowest and highest of each bin.

    Bins are for long series; spikes stay visible.
    """
    if len(values) <= 2 * bins:
        return np.arange(len(values))
    kept = {0, len(values) - 1}
    for part in np.array_split(np.arange(len(values)), bins):
        known = part[np.isfinite(values[part])]
        if len(known):
            kept |= {int(known[np.argmin(values[known])]), int(known[np.argmax(values[known])])}
    return np.array(sorted(kept))


def draw_reliability(bins: Sequence[tuple[float, float, float]], name: str) -> str:
    """Returns an SVG element: how often a judge is right, against how confident it is.

    Larger bins have larger dots.

    On the diagonal a judge is as often right as it says.

    Args:
        bins: (mean confidence, share right, number of verdicts) of each bin.
        name: keeps the ids of a page's plots apart.
    """
    confidence, right, count = np.array(bins, np.float64).reshape(-1, 3).T

    def plot(axes: Any) -> None:
        from matplotlib.ticker import MultipleLocator

        axes.plot([0.5, 1], [0.5, 1], color="#9aa1ad", linewidth=1, linestyle="--")
        axes.plot(confidence, right, color="#4453c8", linewidth=1)
        axes.scatter(confidence, right, s=8 + 60 * count / max(count.max(initial=1), 1), color="#4453c8", alpha=0.75)
        axes.set_xlim(0.48, 1.02)
        axes.set_ylim(min(0.45, right.min(initial=0.5) - 0.05), 1.05)
        axes.xaxis.set_major_locator(MultipleLocator(0.1))

    return _figure(plot, "confidence", "share right", name)


def _draw(steps: Any, values: Any, smooth: Any, unit: str, color: str, name: str) -> str:
    def plot(axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        if smooth is None:
            marker = "o" if len(steps) <= 25 else ""
            axes.plot(steps, values, color=color, linewidth=1.5, marker=marker, markersize=3.2)
        else:
            axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.35)
            axes.plot(steps, smooth, color=color, linewidth=1.7)
        if not np.isfinite(values).any():
            axes.set_ylim(0, 1)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.margins(x=0.02, y=0.1)

    return _figure(plot, "step", unit, name)


def _figure(plot: Callable[[Any], None], xlabel: str, ylabel: str, name: str) -> str:
    """Returns an SVG element; made without pyplot, which would share state with plots of the caller."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    style: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text, in the page's font
        "svg.hashsalt": name,  # ids inside differ from those of the other plots of the page
        "font.size": 8.0,
        "axes.formatter.useoffset": False,
        "axes.formatter.limits": (-4, 6),
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(3.7, 2.0))
        axes = figure.add_axes((0.18, 0.2, 0.8, 0.73))  # an automatic layout measures every text first
        plot(axes)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel(xlabel, color="#6b7280")
        axes.set_ylabel(ylabel, color="#6b7280", labelpad=2)
        axes.grid(axis="y", color="#e8eaee", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color("#c9cdd5")
        axes.tick_params(colors="#6b7280", length=0)
        buffer = io.StringIO()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every plot, and nothing refers to them
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)  # implied inside HTML
    svg = re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font-size: \1px", svg)
    return re.sub(r'<svg width="[^"]*" height="[^"]*"', '<svg role="img"', svg, count=1)
