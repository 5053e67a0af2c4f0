"""The log-odds of a probability, cut in one way for verdicts, rewards and reports.

It imports no JAX.
"""

from __future__ import annotations

import math

CLIP = 1e-7
"""A probability closer than this to 0 or 1 counts as that close, which float32 can still tell from 1."""


def log_odds(p: float) -> float:
    """Returns log(p / (1 - p)) in nats, with p and 1 - p each at least `CLIP`."""
    return math.log(max(p, CLIP)) - math.log(max(1 - p, CLIP))
