"""The curves of a run's page: one small SVG for every stage and key of metrics.jsonl.

Numbers and keys stay text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from rlaif_jax.metrics import RL_STAGE
from rlaif_jax.report.glossary import MAIN, Label, label, main_rank
from rlaif_jax.report.numbers import number_text, share_text, texts

_LOSS_UNITS = {
    "lm": "nats per token",
    "sft": "nats per token",
    "labeler": "nats per token",
    "reward_model": "nats per pair",
}
BLUE, GREEN, GREY, RED, INK = "#4453c8", "#0b7a6f", "#5b6475", "#c0392b", "#333a56"
RUNS = (BLUE, "#d1700a", "#0b8a5f", RED, "#8a4fc0", "#7a5230", "#c2408f", GREY)  # colours of runs that are compared

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Plot:
    """A curve: its stage (or ""), label, last value as text, and an SVG element without foreign text."""

    stage: str
    label: Label
    last: str
    svg: str


class Journey(NamedTuple):
    """How a number of the loop moved from the beginning of the training to its end.

    Attributes:
        label: what it is.
        first: its value at the beginning, as text.
        last: its value at the end, as text.
        rose: whether the end is higher.
    """

    label: Label
    first: str
    last: str
    rose: bool


class JourneyFigure(NamedTuple):
    """Numbers of the loop over the same steps.

    Attributes:
        journeys: from where to where each went.
        svg: an SVG element with a panel for each.
        compared: whether there are several.
    """

    journeys: list[Journey]
    svg: str
    compared: bool


def is_main(stage: str, key: str) -> bool:
    """Returns whether a curve is one that everybody looks at first, whatever its values are.

    Args:
        stage: the stage of the run.
        key: the key in metrics.jsonl.
    """
    return main_rank(key) is not None if stage == RL_STAGE else key.endswith(("loss", "accuracy"))


def curve_label(stage: str, key: str) -> Label:
    """Returns the label of a curve, whose unit may depend on the stage.

    Args:
        stage: the stage of the run.
        key: the key in metrics.jsonl.
    """
    found = label(key)
    return found._replace(unit=_LOSS_UNITS.get(stage, "")) if key.endswith("loss") and not found.unit else found


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

    @property
    def keys(self) -> set[str]:
        """Returns the keys of all stages that have a curve."""
        return {key for _, key in self._series}

    def main(self, stage: str, *, without: Sequence[str] = ()) -> list[Plot]:
        """Returns the plots to look at first.

        These are losses and accuracies; of the stage "rl" those of `glossary.MAIN`, then other keys that change and that
        the glossary does not know.

        Args:
            stage: the stage of the run.
            without: keys that are shown elsewhere.
        """
        keys = [key for at, key in self._series if at == stage and self._is_main(stage, key) and key not in without]
        if stage != RL_STAGE:
            return [self._plot(stage, key, GREEN) for key in keys]
        keys.sort(key=lambda key: (main_rank(key) is None, main_rank(key)))
        return [self._plot(stage, key, BLUE) for key in keys]

    def others(self, stage: str) -> list[Plot]:
        """Returns the plots of all other keys of the stage."""
        return [
            self._plot(stage, key, GREY) for at, key in self._series if at == stage and not self._is_main(stage, key)
        ]

    def journey(self, keys: Sequence[str]) -> JourneyFigure | None:
        """Returns the figure of numbers of the loop over the same steps; None if none is finite.

        Each number has a panel with its own scale. A dashed line marks where it began; what lies above is blue,
        what lies below is red.

        Args:
            keys: of the loop's numbers, in the order of the panels.
        """
        journeys: list[Journey] = []
        panels: list[_Panel] = []
        for key in keys:
            steps, values = self._points(RL_STAGE, key)
            known = np.isfinite(values)
            steps, values = steps[known], values[known]
            if not len(values):
                continue
            part = max(1, len(values) // 10)
            first, last = float(values[:part].mean()), float(values[-part:].mean())
            of_key = label(key)
            shown_first, shown_last = texts([first, last], share=of_key.share)
            journeys.append(Journey(of_key, shown_first, shown_last, last >= first))
            smooth, shown = _smooth(values), _extremes(values)
            self.window |= smooth is not None
            line = values if smooth is None else smooth
            some = np.linspace(0, len(line) - 1, min(len(line), 300)).astype(int)  # a smooth line has no spikes to lose
            title = of_key.title if of_key.term else "measure"  # a plot holds no foreign text
            thin = None if smooth is None else (steps[shown], values[shown])
            panels.append(_Panel(title, steps[some], line[some], thin, first))
        if not panels:
            return None
        return JourneyFigure(journeys, _draw_journey(panels), len(panels) > 1)

    def _is_main(self, stage: str, key: str) -> bool:
        if stage != RL_STAGE or is_main(stage, key) or "/" in key or label(key).term:
            return is_main(stage, key)
        finite = [value for _, value in self._series[stage, key] if np.isfinite(value)]
        return bool(finite) and min(finite) < max(finite)

    def _points(self, stage: str, key: str) -> tuple[Floats, Floats]:
        """Returns the steps and the values of a curve, in the order of the steps."""
        points = np.asarray(sorted(self._series.get((stage, key), [])), dtype=np.float64).reshape(-1, 2)
        return points[:, 0], points[:, 1]

    def _plot(self, stage: str, key: str, color: str) -> Plot:
        steps, values = self._points(stage, key)
        finite = values[np.isfinite(values)]
        of_key = curve_label(stage, key)
        share = of_key.share and bool(np.all((finite >= 0) & (finite <= 1)))
        self._drawn += 1
        smooth = _smooth(values)
        self.window |= smooth is not None
        shown = _extremes(values)
        steps, values, smooth = steps[shown], values[shown], None if smooth is None else smooth[shown]
        if share:
            values, smooth = 100 * values, None if smooth is None else 100 * smooth
        last = (share_text if share else number_text)(float(finite[-1])) if len(finite) else "no finite value"
        unit = of_key.unit or ("%" if share else "value")
        return Plot(stage, of_key, last, _draw(steps, values, smooth, unit, color, f"plot-{self._drawn}"))


class RunLine(NamedTuple):
    """How the lines of one of several runs are drawn."""

    color: str
    style: Literal["solid", "dashed", "dotted"]


def run_line(place: int) -> RunLine:
    """Returns the line of the run at a place of a comparison; that of every 24th is the same."""
    styles: tuple[Literal["solid", "dashed", "dotted"], ...] = ("solid", "dashed", "dotted")
    return RunLine(RUNS[place % len(RUNS)], styles[place // len(RUNS) % len(styles)])


def overlay(runs: Sequence[Curves], first: Sequence[str] = ()) -> list[Plot]:
    """Returns a plot of each main number that two or more of the runs have, with a line for each of them.

    A series of 40 points or more is drawn smoothed.

    Args:
        runs: the curves of each run, whose lines are `run_line` of its place.
        first: numbers of the loop that are main ones of these runs, and come first.
    """
    loop = [(RL_STAGE, key) for key in dict.fromkeys((*first, *MAIN))]
    others = sorted((name for run in runs for name in run._series), key=lambda name: name[0] != RL_STAGE)
    main = [
        name
        for name in dict.fromkeys([*loop, *others])
        if name in loop or any(run._is_main(*name) for run in runs if name in run._series)
    ]
    plots: list[Plot] = []
    for stage, key in main:
        lines: list[tuple[RunLine, Floats, Floats]] = []
        for place, run in enumerate(runs):
            steps, values = run._points(stage, key)
            smooth = _smooth(values)
            line = values if smooth is None else smooth
            shown = _extremes(line, bins=150)
            if np.isfinite(line).any():
                lines.append((run_line(place), steps[shown], line[shown]))
        if len(lines) < 2:
            continue
        of_key = curve_label(stage, key)
        finite = np.concatenate([values[np.isfinite(values)] for _, _, values in lines])
        factor = 100 if of_key.share and bool(np.all((finite >= 0) & (finite <= 1))) else 1
        unit = of_key.unit or ("%" if factor > 1 else "value")
        svg = _figure([(partial(_draw_lines, lines, factor), unit)], "step", f"overlay-{len(plots)}")
        plots.append(Plot(stage, of_key, "", svg))
    return plots


def _draw_lines(lines: Sequence[tuple[RunLine, Floats, Floats]], factor: int, axes: Any) -> None:
    for (color, style), steps, values in lines:
        marker = "o" if len(steps) <= 25 else ""
        axes.plot(steps, factor * values, color=color, linestyle=style, linewidth=1.4, marker=marker, markersize=2.6)
    _step_axis(axes)
    axes.margins(x=0.02, y=0.1)


def _smooth(values: Floats) -> Floats | None:
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


def _extremes(values: Floats, bins: int = 500) -> np.ndarray[Any, Any]:
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
    confidence, right = 100 * confidence, 100 * right

    def plot(axes: Any) -> None:
        from matplotlib.ticker import MultipleLocator

        axes.plot([50, 100], [50, 100], color="#9aa1ad", linewidth=1, linestyle="--")
        axes.plot(confidence, right, color=BLUE, linewidth=1)
        axes.scatter(confidence, right, s=8 + 60 * count / max(count.max(initial=1), 1), color=BLUE, alpha=0.75)
        axes.set_xlim(48, 102)
        axes.set_ylim(min(45, right.min(initial=50) - 5), 105)
        axes.xaxis.set_major_locator(MultipleLocator(10))

    return _figure([(plot, "% right")], "confidence in %", name)


def _draw(steps: Any, values: Any, smooth: Any, unit: str, color: str, name: str) -> str:
    def plot(axes: Any) -> None:
        if smooth is None:
            marker = "o" if len(steps) <= 25 else ""
            axes.plot(steps, values, color=color, linewidth=1.5, marker=marker, markersize=3.2)
        else:
            axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.35)
            axes.plot(steps, smooth, color=color, linewidth=1.7)
        if not np.isfinite(values).any():
            axes.set_ylim(0, 1)
        _step_axis(axes)
        axes.margins(x=0.02, y=0.1)

    return _figure([(plot, unit)], "step", name)


class _Panel(NamedTuple):
    """A panel of a `JourneyFigure`.

    Attributes:
        title: the label of its y axis.
        steps: of the points of the line.
        line: the values, smoothed where there are many.
        thin: (steps, values) of the curve that was smoothed; None where it was not.
        first: the value that training began with.
    """

    title: str
    steps: Floats
    line: Floats
    thin: tuple[Floats, Floats] | None
    first: float


def _draw_journey(panels: Sequence[_Panel]) -> str:
    ends = np.array([(panel.steps.min(), panel.steps.max()) for panel in panels])
    begin, end = ends.min(), ends.max()
    room = 0.02 * max(end - begin, 1.0)

    def plot(panel: _Panel, axes: Any) -> None:
        axes.axhline(panel.first, color="#9aa1ad", linewidth=1, linestyle="--")
        for color, side in ((BLUE, panel.line > panel.first), (RED, panel.line < panel.first)):
            shade = {"color": color, "alpha": 0.2, "linewidth": 0}
            axes.fill_between(panel.steps, panel.line, panel.first, where=side, interpolate=True, **shade)
        if panel.thin is not None:
            axes.plot(*panel.thin, color=INK, linewidth=0.6, alpha=0.3)
        marker = "o" if len(panel.line) <= 25 else ""
        axes.plot(panel.steps, panel.line, color=INK, linewidth=1.5, marker=marker, markersize=3.2)
        _step_axis(axes)
        axes.margins(y=0.15)
        axes.set_xlim(begin - room, end + room)

    return _figure([(partial(plot, panel), panel.title) for panel in panels], "step", "journey")


def _step_axis(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))


def _figure(panels: Sequence[tuple[Callable[[Any], None], str]], xlabel: str, name: str) -> str:
    """Returns an SVG element; made without pyplot, which would share state with plots of the caller.

    Args:
        panels: (what draws on the axes, label of the y axis) of each panel, from the top.
        xlabel: label of the common x axis.
        name: keeps the ids of a page's plots apart.
    """
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
    high, below, above, gap = (1.46 if len(panels) == 1 else 1.05), 0.4, 0.14, 0.16  # inches
    height = below + above + len(panels) * high + (len(panels) - 1) * gap
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(3.7, height))
        for place, (plot, ylabel) in enumerate(reversed(panels)):
            # Placed by hand: an automatic layout measures every text first.
            axes = figure.add_axes((0.18, (below + place * (high + gap)) / height, 0.8, high / height))
            plot(axes)
            axes.yaxis.set_major_locator(MaxNLocator(4 if len(panels) == 1 else 3))
            axes.set_ylabel(ylabel, color="#6b7280", labelpad=2)
            axes.grid(axis="y", color="#e8eaee", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.spines["bottom"].set_color("#c9cdd5")
            axes.tick_params(colors="#6b7280", length=0, labelbottom=place == 0)
            axes.patch.set_visible(False)
            if place == 0:
                axes.set_xlabel(xlabel, color="#6b7280")
        buffer = io.StringIO()
        figure.patch.set_visible(False)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every plot, and nothing refers to them
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)  # implied inside HTML
    svg = re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font-size: \1px", svg)
    return re.sub(r'<svg width="[^"]*" height="[^"]*"', '<svg role="img"', svg, count=1)
