"""The page of a run: `report.html`, one file that needs nothing else, made from what the run folder holds.

A run in its first minute has few files; whatever is missing is left out. Samples, names and settings are
untrusted text: the template (report.html.jinja) escapes everything, plots carry no text but numbers and this
file's own labels, and the page's Content-Security-Policy forbids scripts and every request.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.resources
import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlaif_jax.config import UserError
from rlaif_jax.metrics import RL_STAGE, read_appended, read_metrics
from rlaif_jax.report.curves import MAIN_CURVES, Curves, curve_title, is_number, number_text, stage_title, words
from rlaif_jax.report.quality_section import FeedbackPage, feedback_page

MAX_PAIRS = 12
"""Sample pairs that are shown; more would bury the page."""

MAX_CHARACTERS = 4000
"""A longer sample is cut, and the page says so."""

# Fixed cards, in this order; a pair of keys is "before -> after".
_CARDS: tuple[tuple[str | tuple[str, str], str, str], ...] = (
    ("win_rate_gold", "Wins against SFT by gold score", "%"),
    (("gold_sft", "gold_ppo"), "Gold score, SFT → PPO", ""),
    ("kl", "KL to the reference", "nats per answer"),
    ("judge_agreement", "Judge agrees with gold", "%"),
    ("same_position_rate", "Judge picks the same position in both orders", "%"),
    ("rm_accuracy", "Reward model, held-out accuracy", "%"),
    (("length_sft", "length_ppo"), "Answer length, SFT → PPO", "tokens"),
)
_MAX_CARDS = 16
_PACKAGES = ("rlaif_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def write_report(run_folder: Path) -> Path:
    """Writes `run_folder/report.html`, in one go; call it early and often.

    It shows what there is of config.json, metrics.jsonl, samples.jsonl, summary.json, environment.json and the quality of
    the judgements in feedback.sqlite.

    Settings whose name contains key, token, secret or password (apart from "tokenizer") are shown as
    "(hidden)" unless they are a number, true, false or null, as max_tokens is. A user name and password
    inside a URL are hidden everywhere.

    Returns:
        The path of the page.

    Raises:
        UserError: no such folder, a damaged file in it (named with its line), or no room for the page.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder; give the folder that holds a run's config.json.")
    path = folder / "report.html"
    temporary = path.with_name(path.name + ".tmp")
    page = _render(_collect(folder))
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}). Free some space or make the folder writable."
        ) from error
    return path


def save_environment(run_folder: Path) -> Path:
    """Writes `environment.json` ({"machine": ..., "versions": ...}); a run calls it once, when it starts.

    A page made later, perhaps elsewhere, then still tells what the run ran on.

    Raises:
        UserError: it cannot be written.
    """
    path = Path(run_folder) / "environment.json"
    try:
        path.write_text(json.dumps({"machine": machine(), "versions": versions()}, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}).") from error
    return path


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that numbers depend on; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str | int | float]:
    """What this process runs on: system, CPU, cores it may use, memory (GiB), JAX backend, devices.

    Starts JAX's backend when it has not started yet. Holds no name or address of the machine.
    """
    import jax

    return _host() | {
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "accelerator": ", ".join(sorted({device.device_kind for device in jax.devices()})),
        "processes": jax.process_count(),
    }


def _host() -> dict[str, str | int | float]:
    host: dict[str, str | int | float] = {"system": f"{platform.system()} {platform.machine()}"}
    name = platform.processor()
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = match.group(1) if match else name
    except OSError:
        pass
    if name:
        host["cpu"] = name
    affinity = getattr(os, "sched_getaffinity", None)
    host["cores"] = len(affinity(0)) if affinity else os.cpu_count() or 1
    with contextlib.suppress(ValueError, OSError, AttributeError):
        host["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return host


# -- what the page says ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Card:
    title: str
    value: str
    note: str = ""


def _collect(folder: Path) -> dict[str, Any]:
    """Everything the template shows, as text; escaping is the template's."""
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
        _duration(wall) if is_number(wall) else "",
        f"page written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    ]
    cards, others = _cards(numbers, wall) if numbers else (_cards_so_far(rows), [])
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    curves = Curves(rows)
    pretraining = [plot for stage in stages if stage != RL_STAGE for plot in curves.main(stage)]
    made_here = not environment
    if made_here:  # asking JAX would start a backend, which a page about another process must not do
        started = "jax" in sys.modules
        environment = {"machine": machine() if started else _host(), "versions": versions()}
    return {
        "title": str(summary.get("experiment") or config.get("experiment") or folder.resolve().name),
        "status": status,
        "error": summary.get("error"),
        "facts": [fact for fact in facts if fact],
        "cards": cards,
        "others": others,
        "claims": _claims(summary.get("claims")),
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
    """What the page says about the judgements; nothing where there are none."""
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


def _cards(numbers: Mapping[str, Any], wall: Any) -> tuple[list[_Card], list[tuple[str, str]]]:
    """The headline numbers, known ones first, and a table of what is left."""
    left = dict(numbers)
    cards = []

    def take(key: str | tuple[str, str], title: str, unit: str) -> None:
        keys = (key,) if isinstance(key, str) else key
        if not all(is_number(left.get(name)) for name in keys):
            return
        value = " → ".join(_with_unit(left.pop(name), unit) for name in keys)
        ci = left.get(f"{keys[0]}_ci95")
        note = "" if unit == "%" else unit
        if len(keys) == 1 and isinstance(ci, list) and len(ci) == 2 and all(map(is_number, ci)):
            del left[f"{keys[0]}_ci95"]
            low = _with_unit(ci[0], unit).removesuffix(" %")
            note = f"95 % interval {low} to {_with_unit(ci[1], unit)}"
        cards.append(_Card(title, value, note))

    for key, title, unit in _CARDS:
        take(key, title, unit)
    left.pop("wall_s", None)
    for key in list(left):
        for before, after, arrow in (("_sft", "_ppo", "SFT → PPO"), ("_before", "_after", "before → after")):
            if key.endswith(before):
                stem = key.removesuffix(before)
                take((key, stem + after), f"{words(stem)}, {arrow}", "")
        if key in left and len(cards) < _MAX_CARDS - 1:
            take(key, words(key), "")
    if is_number(wall):
        cards.append(_Card("Wall time", _duration(wall)))
    return cards, [(words(key), _text(value)) for key, value in left.items()]


def _cards_so_far(rows: Sequence[Mapping[str, Any]]) -> list[_Card]:
    """Before there is a summary: where the last stage of the run stands."""
    if not rows:
        return []
    stage = rows[-1]["stage"]
    latest: dict[str, Any] = {}
    for row in rows:
        if row["stage"] == stage:
            latest |= row
    cards = [_Card("Stage", stage_title(stage), f"step {latest['step']:,}")]
    names = [*MAIN_CURVES] if stage == RL_STAGE else ["loss", "accuracy"]
    for key, value in latest.items():
        if key.split("/")[-1] in names and is_number(value):
            title, unit = curve_title(stage, key)
            cards.append(_Card(title, number_text(value), unit))
    speed = latest.get("time/tokens_per_s")
    if is_number(speed):
        cards.append(_Card("Speed", number_text(speed), "tokens per second"))
    return cards


def _claims(claims: Any) -> list[dict[str, str]]:
    shown = []
    for claim in claims if isinstance(claims, list) else []:
        if isinstance(claim, dict):
            ci = claim.get("ci95")
            row = {key: _text(claim.get(key)) for key in ("claim", "paper", "ours", "verdict")}
            row["ci95"] = " to ".join(map(_text, ci)) if isinstance(ci, list) else ""
            shown.append(row)
    return shown


def _checks(checks: Any) -> list[tuple[str, str, str]]:
    """(class, verdict, name) of each check."""
    verdicts = {True: ("ok", "ok"), False: ("failed", "failed")}
    return [
        (*(verdicts[value] if isinstance(value, bool) else ("unknown", _text(value))), words(name))
        for name, value in (checks.items() if isinstance(checks, dict) else ())
    ]


def _pairs(samples: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Samples before and after, side by side: the same index and prompt; the newest of each counts."""
    pairs: dict[tuple[Any, str], dict[str, Any]] = {}
    for sample in samples:
        stage = sample.get("stage")
        if stage in ("before", "after"):
            key = (str(sample.get("index")), str(sample.get("prompt", "")))
            pair = pairs.setdefault(key, {"prompt": _cut(key[1]), "before": None, "after": None})
            pair[stage] = _sample(sample)
    return list(pairs.values())


def _latest(samples: Iterable[Mapping[str, Any]], count: int = 8) -> list[dict[str, Any]]:
    """The last few samples that were drawn during training."""
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
    """{"ppo": {"clip_range": .2}, "stages": [{"steps": 9}]} -> ppo.clip_range, stages.0.steps; no secrets."""
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
                    re.sub(r"(?<=://)[^/@\s]+(?=@)", "(hidden)", "none" if value is None else _text(value)),
                )
            )
    return flat


def _is_secret(name: str) -> bool:
    return bool(re.search("key|token(?!izer)|secret|password", name, re.IGNORECASE))


def _with_unit(value: float, unit: str) -> str:
    return f"{100 * value:.1f} %" if unit == "%" else number_text(value)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if is_number(value):
        return number_text(value) if isinstance(value, int) or abs(value) >= 1e-3 else f"{value:g}"
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"


def _render(page: Mapping[str, Any]) -> str:
    from jinja2 import Environment, StrictUndefined

    template = importlib.resources.files("rlaif_jax.report").joinpath("report.html.jinja").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(page)
