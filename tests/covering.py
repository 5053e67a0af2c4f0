"""Covering tables: few cases that have every pair of values of two settings at least once."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence

Case = tuple[str, ...]


def pairs(case: Case) -> set[tuple[str, str]]:
    """Returns the pairs of values of a case."""
    return set(itertools.combinations(case, 2))


def one_by_one(values: Iterable[str]) -> list[Case]:
    """Returns the block of one setting: each value for itself."""
    return [(value,) for value in values]


def all_pairs(blocks: Sequence[Sequence[Case]], refused: Iterable[tuple[str, str]] = ()) -> set[tuple[str, str]]:
    """Returns every pair of values of two settings except the refused ones.

    Args:
        blocks: as `covering` takes them.
        refused: pairs of values, each in the order of the settings.
    """
    settings = [list(dict.fromkeys(values)) for block in blocks for values in zip(*block)]
    every = {pair for a, b in itertools.combinations(settings, 2) for pair in itertools.product(a, b)}
    return every - set(refused)


def covering(blocks: Sequence[Sequence[Case]], refused: Iterable[tuple[str, str]] = ()) -> list[Case]:
    """Returns cases, a value of each setting, that have every pair of values except the refused ones.

    A case takes one entry of each block. A block of one setting has its values (`one_by_one`). A block of several
    settings lists which of their values occur together: such as the few programs that all cases shall share. Entries
    may have further values at their end, which are further values of the last setting.

    Args:
        blocks: of entries; each value occurs in one setting alone.
        refused: pairs of values that no case may have, each in the order of the settings.
    """
    wanted, never = all_pairs(blocks, refused), set(refused)
    return min((_drawn(blocks, set(wanted), never, random.Random(seed)) for seed in range(8)), key=len)


def _drawn(
    blocks: Sequence[Sequence[Case]], wanted: set[tuple[str, str]], never: set[tuple[str, str]], rng: random.Random
) -> list[Case]:
    """Returns cases that have the wanted pairs: each is the best of some that are drawn."""
    cases = list[Case]()
    while wanted:
        first = set(min(wanted))  # in this case at least
        known = [first & {value for entry in block for value in entry} for block in blocks]
        entries = [[entry for entry in block if here <= set(entry)] for block, here in zip(blocks, known)]
        drawn = list[Case]()
        while len(drawn) < 200:
            case = tuple(itertools.chain.from_iterable(map(rng.choice, entries)))
            if not pairs(case) & never:
                drawn.append(case)
        cases.append(max(drawn, key=lambda case: len(pairs(case) & wanted)))
        wanted -= pairs(cases[-1])
    return cases
