"""The page of a run: `report.html`, one self-contained file made from the run folder.

A run in its first minute has few files; whatever is missing is left out. Samples, names and settings are
untrusted text: the template (report.html.jinja) escapes everything, plots carry no text but numbers and this
file's own labels, and the page's Content-Security-Policy forbids scripts and every request.
"""

from __future__ import annotations

import importlib.resources
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlaif_jax.config import UserError, without_credentials, without_secrets
from rlaif_jax.files import atomic_write
from rlaif_jax.metrics import RL_STAGE, read_appended, read_metrics
from rlaif_jax.report.cards import Card, cards_so_far, compares, final_cards, is_internal
from rlaif_jax.report.curves import Curves, JourneyFigure
from rlaif_jax.report.environment import environment_here
from rlaif_jax.report.glossary import entries, label, stage_title
from rlaif_jax.report.numbers import duration_text, interval_text, is_number, value_text
from rlaif_jax.report.quality_section import FeedbackPage, feedback_page
from rlaif_jax.report.samples import sample_sections
from rlaif_jax.report.story import checks, story, verdict, warnings


def write_report(run_folder: Path) -> Path:
    """Writes `run_folder/report.html`, whole or not at all, and returns its path; call it early and often.

    The page shows what there is of config.json, metrics.jsonl, samples.jsonl, summary.json, environment.json and
    the quality of the judgements in feedback.sqlite. It begins with what was done, what came out and what went wrong,
    in words; every number leads to its explanation in the glossary (see `glossary.QUANTITIES`).

    Settings whose name contains key, token, secret or password (apart from "tokenizer") are shown as
    "(hidden)" unless they are a number, true, false or null, as max_tokens is. A user name and password
    inside a URL are hidden everywhere.

    Raises:
        UserError: no such folder, a damaged file in it (named with its line), or no room for the page.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder; give the folder that holds a run's config.json.")
    path = folder / "report.html"
    page = _render(_collect(folder))
    with atomic_write(path) as file:
        file.write(page)
    return path


# ---- What the page says


def _collect(folder: Path) -> dict[str, Any]:
    """Returns everything that the template shows, as text; the template escapes it."""
    config = read_json(folder / "config.json")
    summary = read_summary(folder / "summary.json")
    rows = read_metrics(folder / "metrics.jsonl")
    samples = list(read_appended(folder / "samples.jsonl").values())
    status = str(summary.get("status", "running"))
    numbers = summary.get("metrics")
    numbers = numbers if isinstance(numbers, dict) else {}
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    curves = Curves(rows)
    measures = measured_keys(rows, numbers)
    journey = curves.journey(measures)
    cards, others = _cards(numbers, rows, journey, measures)
    shown = sample_sections(samples)
    return {
        "title": str(summary.get("experiment") or config.get("experiment") or folder.resolve().name),
        "status": status,
        "error": summary.get("error"),
        "facts": _facts(config, summary, rows),
        "verdict": verdict(summary),
        "story": story(summary, rows, status, journey),
        "warnings": warnings(summary),
        "cards": cards,
        "others": others,
        "journey": journey,
        "claims": _claims(summary.get("claims")),
        "missing": [(name, count) for name, count in _rows(summary.get("missing")) if count != "0"],
        "rl": curves.main(RL_STAGE, without=measures),
        "pretraining": [plot for stage in stages if stage != RL_STAGE for plot in curves.main(stage)],
        "more": [plot for stage in stages for plot in curves.others(stage)],
        "window": curves.window,
        **shown,
        "checks": checks(summary),
        "fingerprints": [(key, value_text(numbers[key])) for key in numbers if is_internal(key)],
        "stages": _rows(summary.get("stages")),
        "feedback": _feedback(folder / "feedback.sqlite"),
        "settings": flatten_settings(without_secrets(config)),
        **_made_with(folder, summary),
        "glossary": entries({*numbers, *shown["sample_keys"], *curves.keys}),
        "empty": not (rows or samples or numbers),
    }


def _facts(config: Mapping[str, Any], summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the short facts under the title."""
    numbers = summary.get("metrics")
    seed = summary.get("seed", config.get("seed"))
    wall = summary.get("wall_s", numbers.get("wall_s") if isinstance(numbers, dict) else None)
    if wall is None and rows:
        wall = rows[-1].get("time/elapsed_s")
    facts = [
        f"seed {seed}" if seed is not None else "",
        _progress(rows, summary),
        duration_text(wall) if is_number(wall) else "",
        f"page written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    ]
    return [fact for fact in facts if fact]


def measured_keys(rows: Sequence[Mapping[str, Any]], numbers: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the keys that one figure compares: reward, second opinion, measures of the run.

    Besides `gold` a measure is what the summary has a win rate of.

    Args:
        rows: the rows of metrics.jsonl.
        numbers: the metrics of summary.json.
    """
    logged = {key for row in rows if row["stage"] == RL_STAGE for key in row}
    won = [key.removeprefix("win_rate_") for key in numbers if key.startswith("win_rate_")]
    return tuple(key for key in dict.fromkeys(("reward", "second_opinion", "gold", *won)) if key in logged)


def _cards(
    numbers: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    journey: JourneyFigure | None,
    measures: Sequence[str],
) -> tuple[list[Card], list[Card]]:
    """Returns (headline numbers, the others).

    Where the summary does not compare answers before and after training, the reward is the headline.
    """
    moved = [
        Card(part.label._replace(title=f"{part.label.title}, first → last"), f"{part.first} → {part.last}", "")
        for part in (journey.journeys if journey else ())
    ]
    if not any(is_number(value) and not is_internal(key) for key, value in numbers.items()):  # it has only begun
        return moved + cards_so_far(rows, measures), []
    cards, others = final_cards(numbers)
    return ([] if compares(numbers) else moved) + cards, others


def _made_with(folder: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the command, the machine and the versions of the run; where it left none, of this process."""
    environment = read_objects(folder / "environment.json", objects=("machine", "versions"))
    made_here = not environment
    if made_here:
        environment = environment_here()
    command = summary.get("command")
    return {
        "command": without_credentials(command) if isinstance(command, str) else "",
        "made_here": made_here,
        "environment": [
            (str(name).replace("_", " "), "not known: the code is in no git work tree" if value is None else str(value))
            for part in ("machine", "versions")
            for name, value in (environment.get(part) or {}).items()
        ],
    }


def _feedback(path: Path) -> FeedbackPage | None:
    """Returns what the page says about the judgements; None if there are no judgements."""
    if not path.exists():
        return None
    try:
        # The rater model runs on JAX, which a page about another process must not start.
        page = feedback_page(path, reliability="jax" in sys.modules)
    except UserError as error:  # a page without this section is better than no page
        return FeedbackPage(0, str(error), (), ())
    return page if page.records else None


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file of a run; an empty dict without the file.

    Raises:
        UserError: the file is damaged or holds something else.
    """
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: should hold one JSON object ({{...}}), got {type(value).__name__}.")
    return value


def read_objects(path: Path, *, objects: Sequence[str], lists: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the JSON object in a file of a run, as `read_json` does, and checks some of its entries.

    Args:
        path: the file.
        objects: entries that are objects or null, or are not there.
        lists: entries that are lists or null, or are not there.

    Raises:
        UserError: the file is damaged or holds something else.
    """
    values = read_json(path)
    for names, kind, called in ((objects, dict, "an object"), (lists, list, "a list")):
        for name in names:
            if not isinstance(values.get(name), kind | None):
                raise UserError(f"{path}: {name} should be {called}, not {values[name]!r:.60}.")
    return values


def read_summary(path: Path) -> dict[str, Any]:
    """Returns the summary of a run; an empty dict without the file. Raises UserError where it is damaged."""
    return read_objects(path, objects=("metrics", "checks", "missing", "stages"), lists=("warnings", "claims", "story"))


def _progress(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    if is_number(summary.get("steps")):
        return f"{summary['steps']:,} steps"
    if rows:
        return f"{stage_title(rows[-1]['stage'])}, step {rows[-1]['step']:,}"
    return ""


def _rows(values: Any) -> list[tuple[str, str]]:
    return [(str(name), value_text(value)) for name, value in values.items()] if isinstance(values, dict) else []


def _claims(claims: Any) -> list[dict[str, str]]:
    shown = []
    for claim in claims if isinstance(claims, list) else []:
        if isinstance(claim, dict):
            ci = claim.get("ci95")
            row = {key: value_text(claim.get(key)) for key in ("claim", "paper", "ours", "verdict")}
            row["ci95"] = interval_text(*map(value_text, ci)) if isinstance(ci, list) and len(ci) == 2 else ""
            shown.append(row)
    return shown


def flatten_settings(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Returns (dotted name, value) rows of settings, which hold no secrets any more.

    The settings {"ppo": {"clip_range": .2}, "parts": [{"a": 9}]} give rows for "ppo.clip_range" and "parts.0.a".
    """
    flat: list[tuple[str, str]] = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat += flatten_settings(value, f"{name}.")
        elif isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
            flat += flatten_settings({str(place): item for place, item in enumerate(value)}, f"{name}.")
        else:
            flat.append((name, "none" if value is None else value_text(value)))
    return flat


def _render(page: Mapping[str, Any]) -> str:
    from jinja2 import Environment, StrictUndefined

    template = importlib.resources.files("rlaif_jax.report").joinpath("report.html.jinja").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"stage_title": stage_title, "label": label}
    return environment.from_string(template).render(page)
