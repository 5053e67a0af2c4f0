"""One page that compares runs: numbers, learning curves, settings that differ, warnings.

As on a run's own page all text from outside is escaped, and the page neither runs scripts nor loads anything.
"""

from __future__ import annotations

import importlib.resources
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from rlaif_jax.config import require, without_secrets
from rlaif_jax.files import atomic_write
from rlaif_jax.metrics import read_metrics
from rlaif_jax.report.cards import Card, cards_so_far, final_cards, is_internal
from rlaif_jax.report.curves import Curves, RunLine, overlay, run_line
from rlaif_jax.report.glossary import Label, entries, label, stage_title
from rlaif_jax.report.numbers import duration_text, is_number, value_text
from rlaif_jax.report.report import flatten_settings, measured_keys, read_json, read_summary
from rlaif_jax.report.story import Warned, verdict, warnings

ALWAYS = (
    label("kl").title,
    f"{label('length').title}, before → after",
)  # rows, also where cards of others push them out
PLACES = ("out", "resume", "stages")  # settings that say only where a run's files are


class RunSide(NamedTuple):
    """A run of the comparison.

    Attributes:
        name: its folder's name, or its path where another run has the same name.
        link: to its own page, relative to the comparison; "" where it has none.
        line: how its curves are drawn.
        status: of the run.
        verdict: (class, text); two empty texts without one.
        warnings: what went wrong.
        error: why it failed, or "".
        facts: row -> value, such as the seed.
        cards: the headline numbers.
        settings: dotted name -> value.
        keys: of all its numbers, for the glossary.
        measures: keys of the reward and of what measures the answers, in the order of their plots.
        curves: of its metrics.
    """

    name: str
    link: str
    line: RunLine
    status: str
    verdict: tuple[str, str]
    warnings: list[Warned]
    error: str
    facts: dict[str, str]
    cards: list[Card]
    settings: dict[str, str]
    keys: set[str]
    measures: tuple[str, ...]
    curves: Curves


class NumberRow(NamedTuple):
    """A number of the table: its label, and its card of each run, None where a run has none."""

    label: Label
    cells: list[Card | None]


def write_comparison(run_folders: Sequence[Path], out: Path) -> Path:
    """Writes a page that compares runs, whole or not at all, and returns its path.

    Args:
        run_folders: two runs or more, in the order of the columns; each may be going on.
        out: the file to write. Its links to the runs' own pages are relative to it.

    Raises:
        UserError: fewer than two runs, a run that is given twice, a damaged file of a run, or no room for the page.
    """
    folders = [Path(folder) for folder in run_folders]
    require(len(folders) > 1, "a comparison needs two runs or more")
    seen: set[Path] = set()
    for folder in folders:
        require(folder.resolve() not in seen, f"{folder} is given twice; a run is compared with others")
        seen.add(folder.resolve())
    page = _render(_collect(folders, out))
    with atomic_write(out) as file:
        file.write(page)
    return out


def _collect(folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """Returns everything that the template shows, as text; the template escapes it."""
    names = [folder.resolve().name for folder in folders]
    runs = [
        _read(folder, name if names.count(name) == 1 else str(folder), out, place)
        for place, (folder, name) in enumerate(zip(folders, names))
    ]
    first = tuple(dict.fromkeys(key for run in runs for key in run.measures))
    plots = overlay([run.curves for run in runs], first)
    numbers = number_rows([run.cards for run in runs])
    shown = {row.label.term for row in numbers} | {plot.label.term for plot in plots}
    return {
        "title": f"{len(runs)} runs compared",
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "runs": runs,
        "facts": [(name, [run.facts[name] for run in runs]) for name in runs[0].facts],
        "numbers": numbers,
        "plots": plots,
        "settings": differing_settings([run.settings for run in runs]),
        "glossary": [entry for entry in entries(set().union(*(run.keys for run in runs))) if entry[0] in shown],
    }


def _read(folder: Path, name: str, out: Path, place: int) -> RunSide:
    config, summary = read_json(folder / "config.json"), read_summary(folder / "summary.json")
    rows = read_metrics(folder / "metrics.jsonl")
    numbers = summary.get("metrics")
    numbers = numbers if isinstance(numbers, dict) else {}
    curves = Curves(rows)
    wall, missing = summary.get("wall_s"), summary.get("missing")
    facts = {
        "Experiment": value_text(summary.get("experiment")),
        "Seed": value_text(summary.get("seed", config.get("seed"))),
        "Steps": value_text(summary.get("steps", rows[-1]["step"] if rows else None)),
        "Time": duration_text(wall) if is_number(wall) else "",
        "Missing or not used": value_text(
            sum(filter(is_number, missing.values())) if isinstance(missing, dict) else None
        ),
    }
    page = folder / "report.html"
    relative = Path(os.path.relpath(page.resolve(), out.resolve().parent)).as_posix()
    error = summary.get("error")
    return RunSide(
        name,
        f"./{urllib.parse.quote(relative)}" if page.is_file() else "",
        run_line(place),
        str(summary.get("status", "running")),
        verdict(summary),
        warnings(summary),
        str(error) if error else "",
        facts,
        headline(numbers, rows),
        dict(flatten_settings(without_secrets({key: value for key, value in config.items() if key not in PLACES}))),
        {*numbers, *curves.keys},
        measured_keys(rows, numbers),
        curves,
    )


def headline(numbers: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Card]:
    """Returns the headline numbers of a run; while it has no summary's numbers, the newest of its stage.

    Args:
        numbers: the metrics of summary.json.
        rows: the rows of metrics.jsonl.
    """
    if not any(is_number(value) and not is_internal(key) for key, value in numbers.items()):  # it has only begun
        return cards_so_far(rows)
    cards, others = final_cards(numbers)
    return cards + [card for card in others if card.label.title in ALWAYS]


def number_rows(cards: Sequence[Sequence[Card]]) -> list[NumberRow]:
    """Returns a row for each number of several runs, in the order in which they first occur.

    Args:
        cards: of each run.
    """
    labels = {card.label.title: card.label for of_run in cards for card in reversed(of_run)}
    order = dict.fromkeys(card.label.title for of_run in cards for card in of_run)
    by_title = [{card.label.title: card for card in of_run} for of_run in cards]
    return [NumberRow(labels[title], [of_run.get(title) for of_run in by_title]) for title in order]


def differing_settings(settings: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str | None]]]:
    """Returns (name, the value of each run) of the settings that are not all equal.

    A value is None where the run has no such setting.

    Args:
        settings: dotted name -> value of each run.
    """
    names = dict.fromkeys(name for of_run in settings for name in of_run)
    rows = [(name, [of_run.get(name) for of_run in settings]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _render(page: Mapping[str, Any]) -> str:
    from jinja2 import Environment, StrictUndefined

    template = importlib.resources.files("rlaif_jax.report").joinpath("compare.html.jinja").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"stage_title": stage_title}
    return environment.from_string(template).render(page)
