"""How the page writes numbers: digits that matter, shares as percentages, durations."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, TypeGuard

SPACE = "\N{NO-BREAK SPACE}"


def is_number(value: Any) -> TypeGuard[float]:
    """Returns whether a JSON value is a finite number; true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number_text(value: float) -> str:
    """Returns a number with three or four digits that matter: 0.123, 12.35, 1,235."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.3g}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.4g}"


def share_text(value: float) -> str:
    """Returns a share as the page writes all shares: 72.5 %."""
    return f"{100 * value:.1f}{SPACE}%"


def texts(values: Sequence[float], *, share: bool = False) -> list[str]:
    """Returns numbers that are read together, with as many decimals as the largest needs: 0.429, 0.005.

    Args:
        values: finite numbers.
        share: whether they are shares.
    """
    if share:
        return [share_text(value) for value in values]
    largest = max(map(abs, values), default=0.0)
    if not 1e-3 <= largest < 1000 or all(value == int(value) for value in values):
        return [number_text(value) for value in values]
    decimals = (2 if largest < 1 else 3) - math.floor(math.log10(largest))
    shown = [f"{value:.{decimals}f}" for value in values]
    spare = min(len(text) - len(text.rstrip("0")) for text in shown)
    return [text[: len(text) - spare].rstrip(".") for text in shown]


def interval_text(low: str, high: str) -> str:
    """Returns an interval as the page writes all intervals: [69.0 %, 76.0 %]."""
    return f"[{low}, {high}]".replace(", ", f",{SPACE}")


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
