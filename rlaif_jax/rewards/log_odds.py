"""The log-odds of a probability, cut in one way for verdicts, rewards and reports.

It imports no JAX.
"""

from __future__ import annotations

from scipy.special import logit

CLIP = 1e-6
"""A probability closer than this to 0 or 1 counts as that close: one certain verdict is not the whole of a mean."""


def log_odds(p: float) -> float:
    """Returns log(p / (1 - p)) in nats, of p cut to `CLIP` .. 1 - `CLIP`."""
    return float(logit(min(max(p, CLIP), 1 - CLIP)))
