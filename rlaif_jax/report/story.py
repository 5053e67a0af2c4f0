"""The first lines of a run's page: what was done, what came out and what went wrong, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlaif_jax.metrics import RL_STAGE
from rlaif_jax.report.curves import JourneyFigure
from rlaif_jax.report.glossary import stage_title, words
from rlaif_jax.report.numbers import is_number, value_text

VERDICTS = {"better": "good", "no different": "even", "worse": "bad"}
"""A run's verdicts, and the class of each on the page."""

CHECKS = {
    "kl_at_step_0_is_0": "Before the first update the policy gives its answers the reference's probabilities.",
    "first_minibatch_ratio_is_1": "Before the first update of a step the trainer's probabilities are the sampler's.",
    "first_minibatch_clip_fraction_is_0": "Before the first update of a step no token is clipped.",
    "first_minibatch_approx_kl_is_0": "Before the first update of a step the policy is the one that answered.",
    "first_margin_is_0": "Before the first update the policy prefers no answer more than the reference does.",
    "sampler_and_trainer_logprobs_agree": "Generation and training compute the same log-probs up to rounding.",
    "losses_are_finite": "No update was left out because its loss or gradient was not finite.",
    "discriminator_loss_is_finite": "The loss of the discriminator was always finite.",
    "eos_is_kept_in_the_mask": "The stop token of a finished answer is part of what is learned.",
    "labeler_weights_unchanged": "The AI labeler after training is bit for bit the one before.",
}
"""What the checks of a run verify, by name."""


class Warned(NamedTuple):
    """A warning.

    Attributes:
        what: what happened.
        remedy: what to try, or "".
    """

    what: str
    remedy: str = ""


class Check(NamedTuple):
    """A check of the run.

    Attributes:
        kind: ok, failed or unknown.
        verdict: the same as text.
        name: as words.
        meaning: what it verifies, or "".
    """

    kind: str
    verdict: str
    name: str
    meaning: str


def story(
    summary: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    status: str,
    journey: JourneyFigure | None,
) -> list[str]:
    """Returns the sentences at the top of the page: how the run ended, what was done, what came out.

    The run's own sentences (`story` in summary.json) are taken where it has some.

    Args:
        summary: the content of summary.json.
        rows: the rows of metrics.jsonl.
        status: of the run.
        journey: the reward over the training, and what else is compared with it; None without a reward.
    """
    own = summary.get("story")
    own = [str(sentence) for sentence in own] if isinstance(own, list) else []
    return [*_ending(summary, rows, status), *(own or _plain_story(summary, rows, journey))]


def _ending(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], status: str) -> list[str]:
    """Returns a sentence about the state of a run that is not done."""
    at = rows[-1] if rows else None
    steps = summary.get("steps")
    reached = f"after step {steps:,} of the training loop" if is_number(steps) and steps else "before its training loop"
    where = f" It is at step {at['step']:,} of the stage “{stage_title(at['stage'])}”." if at else ""
    known = {
        "running": f"This run is still going on.{where} The page reloads itself.",
        "stopped": f"This run was stopped {reached}. The same command with --resume goes on from its last checkpoint.",
        "failed": f"This run failed {reached}. What the page shows is of before.",
        "diverged": f"The training diverged and was ended {reached}: do not use the policy of that step. The newest "
        "checkpoint is of the last step that was sound.",
    }
    return [known[status]] if status in known else []


def _plain_story(
    summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], journey: JourneyFigure | None
) -> list[str]:
    steps = max((row["step"] for row in rows if row["stage"] == RL_STAGE), default=0)
    if not steps:
        return []
    said = [
        f"A policy answered prompts for {steps:,} steps, its answers were judged, and it learned from the judgements."
    ]
    if journey is None:
        return said
    moved = [f"{part.label.title.lower()} went from {part.first} to {part.last}" for part in journey.journeys]
    said.append(f"The {', the '.join(moved)}.")
    if not journey.compared and not summary.get("metrics"):
        said.append(
            "Nothing but the reward was measured, and a reward can rise while the answers become worse: read them."
        )
    return said


def verdict(summary: Mapping[str, Any]) -> tuple[str, str]:
    """Returns (class, text) of the verdict in summary.json; two empty texts without one."""
    text = summary.get("verdict")
    return (VERDICTS.get(text, "even"), text) if isinstance(text, str) and text else ("", "")


def warnings(summary: Mapping[str, Any]) -> list[Warned]:
    """Returns the warnings of the run; each check that failed is one of them."""
    found = [
        Warned(f"A check failed: {check.name}.", f"Read what it verifies: {check.meaning}" if check.meaning else "")
        for check in checks(summary)
        if check.kind == "failed"
    ]
    for text in summary.get("warnings") or ():
        what, _, remedy = str(text).partition("Try: ")
        found.append(Warned(what.strip(), remedy.strip()))
    return found


def checks(summary: Mapping[str, Any]) -> list[Check]:
    """Returns the checks of the run with what each verifies."""
    given = summary.get("checks")
    verdicts = {True: ("ok", "ok"), False: ("failed", "failed")}
    return [
        Check(
            *(verdicts[value] if isinstance(value, bool) else ("unknown", value_text(value))),
            words(name),
            CHECKS.get(name, ""),
        )
        for name, value in (given.items() if isinstance(given, dict) else ())
    ]
