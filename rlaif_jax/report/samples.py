"""The answers on a run's page: before and after training, the worst, and while it learned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlaif_jax.metrics import RL_STAGE
from rlaif_jax.report.credit import Palette, palette
from rlaif_jax.report.glossary import label
from rlaif_jax.report.numbers import is_number, number_text, texts

MAX_PAIRS = 8
"""Sample pairs of a section that are shown; more would bury the page."""

MAX_DRAWN = 8
"""Answers drawn while it learned that are shown, the newest."""

MAX_CHARACTERS = 4000
"""A longer sample is cut, and the page says so."""

_NO_SCORE = ("step", "index")


def sample_sections(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what the page shows of samples.jsonl, as text.

    Args:
        samples: the lines, in their order.

    Returns:
        `pairs` and `worst`: answers before and after training to the same prompts, with `hidden_pairs` and
        `hidden_worst`, the number of those left out; `at_random`: whether all of `pairs` were drawn at random; `drawn`:
        the last answers drawn while it learned; `sample_keys`: the names of all scores, for the glossary; `legend`: what
        the colours of tokens mean, None without any.
    """
    compared = [sample for sample in samples if sample.get("stage") in ("before", "after")]
    usual = [sample for sample in compared if sample.get("chosen") != "worst"]
    colours = palette(compared)
    pairs = _pairs(usual, colours)
    worst = _pairs((sample for sample in compared if sample.get("chosen") == "worst"), colours)
    return {
        "pairs": pairs[:MAX_PAIRS],
        "hidden_pairs": max(0, len(pairs) - MAX_PAIRS),
        "at_random": all(sample.get("chosen") == "random" for sample in usual),
        "worst": worst[:MAX_PAIRS],
        "hidden_worst": max(0, len(worst) - MAX_PAIRS),
        "drawn": _drawn(samples, colours),
        "legend": colours.legend,
        "sample_keys": {key for sample in samples for key in _scores(sample)},
    }


def _pairs(samples: Iterable[Mapping[str, Any]], colours: Palette) -> list[dict[str, Any]]:
    """Returns pairs of samples before and after training with the same index and prompt.

    The newest sample of each counts.
    """
    found: dict[tuple[Any, str], dict[str, Mapping[str, Any]]] = {}
    for sample in samples:
        key = (str(sample.get("index")), str(sample.get("prompt", "")))
        found.setdefault(key, {})[sample["stage"]] = sample
    return [_pair(prompt, sides, colours) for (_, prompt), sides in found.items()]


def _pair(prompt: str, sides: Mapping[str, Mapping[str, Any]], colours: Palette) -> dict[str, Any]:
    scores = {stage: _scores(side) for stage, side in sides.items()}
    shown: dict[str, dict[str, str]] = {stage: {} for stage in sides}
    changes = []
    for key in dict.fromkeys(key for values in scores.values() for key in values):
        values = {stage: found[key] for stage, found in scores.items() if key in found}
        change = [values["after"] - values["before"]] if len(values) == 2 else []
        together = texts([*values.values(), *change])  # read together: as many decimals
        for stage, text in zip(values, together):
            shown[stage][key] = text
        if change:
            changes.append((label(key), f"+{together[-1]}" if change[0] > 0 else together[-1]))
    return {
        "prompt": _cut(prompt),
        "changes": changes,
        **{
            stage: _sample(sides[stage], shown[stage], colours) if stage in sides else None
            for stage in ("before", "after")
        },
    }


def _drawn(samples: Sequence[Mapping[str, Any]], colours: Palette) -> list[dict[str, Any]]:
    drawn = [sample for sample in samples if sample.get("stage") == RL_STAGE][-MAX_DRAWN:]
    return [
        _sample(sample, {key: number_text(value) for key, value in _scores(sample).items()}, colours)
        | {"prompt": _cut(str(sample.get("prompt", ""))), "step": str(sample.get("step"))}
        for sample in drawn
    ]


def _scores(sample: Mapping[str, Any]) -> dict[str, float]:
    return {str(key): value for key, value in sample.items() if key not in _NO_SCORE and is_number(value)}


def _sample(sample: Mapping[str, Any], scores: Mapping[str, str], colours: Palette) -> dict[str, Any]:
    reasons = sample.get("reasons")
    return {
        "response": _cut(str(sample.get("response", ""))),
        "tokens": colours.tokens(sample, MAX_CHARACTERS),
        "scores": [(label(key), text) for key, text in scores.items()],
        "reasons": _cut(reasons) if isinstance(reasons, str) else "",
    }


def _cut(text: str) -> str:
    more = len(text) - MAX_CHARACTERS
    return text if more <= 0 else f"{text[:MAX_CHARACTERS]} … ({more:,} more characters)"
