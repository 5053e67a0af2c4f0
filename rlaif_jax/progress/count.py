"""How far a long computation is: the optional argument `progress` of what makes people wait."""

from __future__ import annotations

from collections.abc import Callable

Count = Callable[[int, int], None]
"""Takes how many units are done, and how many there are."""


def count_nothing(done: int, total: int) -> None:
    """Shows nothing: the default, where nobody watches."""
