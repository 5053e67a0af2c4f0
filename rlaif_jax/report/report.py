"""The page of a run: `report.html`, one self-contained file made from the run folder.

A run in its first minute has few files; whatever is missing is left out. Samples, names and settings are
untrusted text: the template (report.html.jinja) escapes everything, plots carry no text but numbers and this
file's own labels, and the page's Content-Security-Policy forbids scripts and every request.
"""

from __future__ import annotations

import importlib.resources
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlaif_jax.config import UserError
from rlaif_jax.files import atomic_write
from rlaif_jax.metrics import RL_STAGE, read_appended, read_metrics
from rlaif_jax.report.cards import cards_so_far, duration_text, final_cards, value_text
from rlaif_jax.report.curves import Curves, is_number, number_text, stage_title, words
from rlaif_jax.report.environment import environment_here
from rlaif_jax.report.quality_section import FeedbackPage, feedback_page

MAX_PAIRS = 12
"""Sample pairs that are shown; more would bury the page."""

MAX_CHARACTERS = 4000
"""A longer sample is cut, and the page says so."""


def write_report(run_folder: Path) -> Path:
    """Writes `run_folder/report.html`, whole or not at all, and returns its path; call it early and often.

    The page shows what there is of config.json, metrics.jsonl, samples.jsonl, summary.json, environment.json and
    the quality of the judgements in feedback.sqlite.

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
    config = _read_json(folder / "config.json")
    summary = _read_json(folder / "summary.json")
    environment = _read_json(folder / "environment.json")
    rows = read_metrics(folder / "metrics.jsonl")
    samples = list(read_appended(folder / "samples.jsonl").values())
    status = str(summary.get("status", "running"))
    seed = summary.get("seed", config.get("seed"))
    numbers = summary.get("metrics")
    numbers = numbers if isinstance(numbers, dict) else {}
    wall = summary.get("wall_s", numbers.get("wall_s", rows[-1].get("time/elapsed_s") if rows else None))
    facts = [
        f"seed {seed}" if seed is not None else "",
        _progress(rows, summary),
        duration_text(wall) if is_number(wall) else "",
        f"page written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    ]
    cards, others = final_cards(numbers, wall) if numbers else (cards_so_far(rows), [])
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    curves = Curves(rows)
    pretraining = [plot for stage in stages if stage != RL_STAGE for plot in curves.main(stage)]
    made_here = not environment
    if made_here:
        environment = environment_here()
    return {
        "title": str(summary.get("experiment") or config.get("experiment") or folder.resolve().name),
        "status": status,
        "error": summary.get("error"),
        "facts": [fact for fact in facts if fact],
        "cards": cards,
        "others": others,
        "claims": _claims(summary.get("claims")),
        "warnings": [str(text) for text in summary.get("warnings") or ()],
        "missing": _rows(summary.get("missing")),
        "stages": _rows(summary.get("stages")),
        "rl": curves.main(RL_STAGE),
        "pretraining": pretraining,
        "more": [plot for stage in stages for plot in curves.others(stage)],
        "window": curves.window,
        "pairs": (pairs := _pairs(samples))[:MAX_PAIRS],
        "hidden_pairs": max(0, len(pairs) - MAX_PAIRS),
        "rl_samples": _latest(samples),
        "checks": _checks(summary.get("checks")),
        "feedback": _feedback(folder / "feedback.sqlite"),
        "settings": _flatten(config),
        "made_here": made_here,
        "environment": [
            (str(name).replace("_", " "), str(value))
            for part in ("machine", "versions")
            for name, value in (environment.get(part) or {}).items()
        ],
        "empty": not (rows or samples or numbers),
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


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: should hold one JSON object ({{...}}), got {type(value).__name__}.")
    return value


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
            row["ci95"] = " to ".join(map(value_text, ci)) if isinstance(ci, list) else ""
            shown.append(row)
    return shown


def _checks(checks: Any) -> list[tuple[str, str, str]]:
    """Returns (class, verdict, name) of each check."""
    verdicts = {True: ("ok", "ok"), False: ("failed", "failed")}
    return [
        (*(verdicts[value] if isinstance(value, bool) else ("unknown", value_text(value))), words(name))
        for name, value in (checks.items() if isinstance(checks, dict) else ())
    ]


def _pairs(samples: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns pairs of samples before and after training with the same index and prompt.

    The newest sample of each counts.
    """
    pairs: dict[tuple[Any, str], dict[str, Any]] = {}
    for sample in samples:
        stage = sample.get("stage")
        if stage in ("before", "after"):
            key = (str(sample.get("index")), str(sample.get("prompt", "")))
            pair = pairs.setdefault(key, {"prompt": _cut(key[1]), "before": None, "after": None})
            pair[stage] = _sample(sample)
    return list(pairs.values())


def _latest(samples: Iterable[Mapping[str, Any]], count: int = 8) -> list[dict[str, Any]]:
    """Returns the last few samples that were drawn during training."""
    drawn = [sample for sample in samples if sample.get("stage") == RL_STAGE][-count:]
    return [
        _sample(sample) | {"prompt": _cut(str(sample.get("prompt", ""))), "step": str(sample.get("step"))}
        for sample in drawn
    ]


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    scores = [(name, number_text(sample[name])) for name in ("reward", "gold") if is_number(sample.get(name))]
    return {"response": _cut(str(sample.get("response", ""))), "scores": scores}


def _cut(text: str) -> str:
    more = len(text) - MAX_CHARACTERS
    return text if more <= 0 else f"{text[:MAX_CHARACTERS]} … ({more:,} more characters)"


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Returns (dotted name, value) rows of settings, without secrets.

    The settings {"ppo": {"clip_range": .2}, "parts": [{"a": 9}]} give rows for "ppo.clip_range" and "parts.0.a".
    """
    flat: list[tuple[str, str]] = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        plain = value is None or isinstance(value, (bool, int, float))
        if not plain and _is_secret(str(key)):
            flat.append((name, "(hidden)"))
        elif isinstance(value, Mapping) and value:
            flat += _flatten(value, f"{name}.")
        elif isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
            flat += _flatten({str(place): item for place, item in enumerate(value)}, f"{name}.")
        else:
            flat.append(
                (
                    name,
                    re.sub(r"(?<=://)[^/@\s]+(?=@)", "(hidden)", "none" if value is None else value_text(value)),
                )
            )
    return flat


def _is_secret(name: str) -> bool:
    return bool(re.search("key|token(?!izer)|secret|password", name, re.IGNORECASE))


def _render(page: Mapping[str, Any]) -> str:
    from jinja2 import Environment, StrictUndefined

    template = importlib.resources.files("rlaif_jax.report").joinpath("report.html.jinja").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(page)
