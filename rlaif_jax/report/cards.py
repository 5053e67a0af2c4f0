"""The headline numbers of a run's page: cards made from whatever numbers the run has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlaif_jax.metrics import RL_STAGE
from rlaif_jax.report.curves import curve_label, is_main
from rlaif_jax.report.glossary import Label, label, rank, stage_title
from rlaif_jax.report.numbers import interval_text, is_number, number_text, texts, value_text

MAX_CARDS = 8
"""Numbers that are shown as cards; the others are in a table."""


@dataclass(frozen=True)
class Card:
    """A number of the page: its label, its value as text, and a note such as its unit or interval."""

    label: Label
    value: str
    note: str = ""

    @property
    def text(self) -> str:
        """Returns the value and the note in one line."""
        return f"{self.value} {self.note}".rstrip()


def is_internal(key: str) -> bool:
    """Returns whether a value of the summary only identifies something, such as the hash of weights."""
    return key.endswith("sha256")


def final_cards(numbers: Mapping[str, Any]) -> tuple[list[Card], list[Card]]:
    """Returns (cards, what is left for a table) of the metrics in summary.json.

    First come the numbers with a 95 % interval (a key `NAME_ci95` next to `NAME`), then the pairs `NAME_before` and
    `NAME_after`, then all other numbers; each in the order of the glossary. The wall time, which the page has in its
    first lines, and what is internal are left out.

    Args:
        numbers: the metrics by name.
    """
    left = {key: value for key, value in numbers.items() if key != "wall_s" and not is_internal(key)}
    cards: list[Card] = []
    for key in sorted(left, key=lambda key: (f"{key}_ci95" not in numbers, _partner(key) not in numbers, rank(key))):
        if key in left:
            names = (key, _partner(key)) if is_number(left.get(_partner(key))) else (key,)
            if all(is_number(left.get(name)) for name in names):
                cards.append(_card(names, left))
    others = [Card(label(key), value_text(value)) for key, value in left.items()]
    return cards[:MAX_CARDS], cards[MAX_CARDS:] + others


def compares(numbers: Mapping[str, Any]) -> bool:
    """Returns whether the metrics compare the answers before and after training."""
    return any(key.endswith("_ci95") or _partner(key) in numbers for key in numbers)


def _partner(key: str) -> str:
    """Returns the key of the same number after training."""
    return f"{key.removesuffix('_before')}_after" if key.endswith("_before") else ""


def _card(names: Sequence[str], left: dict[str, Any]) -> Card:
    """Takes the numbers of a card out of `left`."""
    key = names[0]
    of_key = label(key.removesuffix("_before") if len(names) > 1 else key)
    values = [left.pop(name) for name in names]
    share = of_key.share and all(0 <= value <= 1 for value in values)
    note = "" if share else of_key.unit
    interval = left.get(f"{key}_ci95")
    if len(names) == 1 and isinstance(interval, list) and len(interval) == 2 and all(map(is_number, interval)):
        value, low, high = texts([*values, *left.pop(f"{key}_ci95")], share=share)
        return Card(of_key, value, f"95 % interval {interval_text(low, high)}")
    if len(names) > 1:
        of_key = of_key._replace(title=f"{of_key.title}, before → after")
    return Card(of_key, " → ".join(texts(values, share=share)), note)


def cards_so_far(rows: Sequence[Mapping[str, Any]], without: Sequence[str] = ()) -> list[Card]:
    """Returns the newest numbers of the stage that a run is in, for a summary without numbers.

    Args:
        rows: the rows of metrics.jsonl, in their order; no rows give no cards.
        without: keys that are shown elsewhere.
    """
    if not rows:
        return []
    stage = rows[-1]["stage"]
    latest: dict[str, Any] = {}
    for row in rows:
        if row["stage"] == stage:
            latest |= row
    cards = [] if stage == RL_STAGE else [Card(Label("Stage"), stage_title(stage), f"step {latest['step']:,}")]
    for key in (*latest, "time/tokens_per_s"):
        value = latest.get(key)
        if (is_main(stage, key) or key == "time/tokens_per_s") and is_number(value) and key not in without:
            of_key = curve_label(stage, key)
            share = of_key.share and 0 <= value <= 1
            (shown,) = texts([value], share=share) if share else [number_text(value)]
            card = Card(of_key, shown, "" if share else of_key.unit)
            if card not in cards and len(cards) < MAX_CARDS:
                cards.append(card)
    return cards
