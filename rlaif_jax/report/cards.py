"""The headline numbers of a run's page: cards made from whatever numbers the run has."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlaif_jax.report.curves import curve_title, is_main, is_number, number_text, quantity, stage_title, words

MAX_CARDS = 16
"""Numbers that are shown as cards; the others are in a table."""

_SHARE = re.compile(r"(?<!learning)_(rate|accuracy|agreement)(_|$)")


@dataclass(frozen=True)
class Card:
    """A number of the page: its title, its value as text, and a note such as its unit or interval."""

    title: str
    value: str
    note: str = ""


def final_cards(numbers: Mapping[str, Any], wall_s: Any) -> tuple[list[Card], list[tuple[str, str]]]:
    """Returns (cards, a table of what is left) of the metrics in summary.json.

    First come the numbers with a 95 % interval (a key `NAME_ci95` next to `NAME`), then the pairs `NAME_before` and
    `NAME_after`, then all other numbers; each in the order of the summary.

    Args:
        numbers: the metrics by name.
        wall_s: the wall time of the run in seconds, shown on the last card; no card for anything but a number.
    """
    left = {key: value for key, value in numbers.items() if key != "wall_s"}
    last = [Card("Wall time", duration_text(wall_s))] if is_number(wall_s) else []
    cards: list[Card] = []
    for key in sorted(left, key=lambda key: (f"{key}_ci95" not in numbers, _partner(key) not in numbers)):
        if key in left and len(cards) + len(last) < MAX_CARDS:
            names = (key, _partner(key)) if is_number(left.get(_partner(key))) else (key,)
            if all(is_number(left.get(name)) for name in names):
                cards.append(_card(names, left))
    return cards + last, [(words(key), value_text(value)) for key, value in left.items()]


def _partner(key: str) -> str:
    """Returns the key of the same number after training."""
    return f"{key.removesuffix('_before')}_after" if key.endswith("_before") else ""


def _card(names: Sequence[str], left: dict[str, Any]) -> Card:
    """Takes the numbers of a card out of `left`."""
    key = names[0]
    title, unit = quantity(key.removesuffix("_before") if len(names) > 1 else key)
    values = [left.pop(name) for name in names]
    show = number_text
    if _SHARE.search(key) and all(0 <= value <= 1 for value in values):
        show, unit = _percent, ""
    interval = left.get(f"{key}_ci95")
    if len(names) == 1 and isinstance(interval, list) and len(interval) == 2 and all(map(is_number, interval)):
        low, high = map(show, left.pop(f"{key}_ci95"))
        unit = f"95 % interval {low.removesuffix(' %')} to {high}"
    return Card(f"{title}, before → after" if len(names) > 1 else title, " → ".join(map(show, values)), unit)


def cards_so_far(rows: Sequence[Mapping[str, Any]]) -> list[Card]:
    """Returns the newest numbers of the stage that a run is in, for a page without a summary.

    Args:
        rows: the rows of metrics.jsonl, in their order; no rows give no cards.
    """
    if not rows:
        return []
    stage = rows[-1]["stage"]
    latest: dict[str, Any] = {}
    for row in rows:
        if row["stage"] == stage:
            latest |= row
    cards = [Card("Stage", stage_title(stage), f"step {latest['step']:,}")]
    for key, value in latest.items():
        if is_main(stage, key) and is_number(value) and len(cards) < MAX_CARDS - 1:
            title, unit = curve_title(stage, key)
            cards.append(Card(title, number_text(value), unit))
    speed = latest.get("time/tokens_per_s")
    if is_number(speed):
        cards.append(Card("Speed", number_text(speed), "tokens per second"))
    return cards


def value_text(value: Any) -> str:
    """Returns a value of the summary or of the settings as text."""
    if isinstance(value, str):
        return value
    if is_number(value):
        return number_text(value) if isinstance(value, int) or abs(value) >= 1e-3 else f"{value:g}"
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def duration_text(seconds: float) -> str:
    """Returns seconds as 3.2 s, 7 min 13 s or 1 h 1 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
