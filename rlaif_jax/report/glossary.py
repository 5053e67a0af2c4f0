"""What the numbers of a run are called on its page, and what they mean."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from rlaif_jax.metrics import RL_STAGE
from rlaif_jax.report.quantities import QUANTITIES

MAIN = (
    "reward", "second_opinion", "gold", "judge", "kl", "length", "finished", "entropy", "distinct2", "margin",
    "accuracy",
)  # fmt: skip
"""The curves of the training loop that everybody looks at first, in this order."""

_STAGE_TITLES = {
    "lm": "Language model",
    "sft": "Supervised fine-tuning",
    "labeler": "Labeler",
    "reward_model": "Reward model",
    RL_STAGE: "Training loop",
}
_MATCHED = {"eval_reward": "the reward"}  # words of a name where it fills a place of a title
_ABBREVIATIONS = {"kl", "ppo", "grpo", "sft", "rl", "rm", "eos", "lm", "ece", "lc", "ci95", "ai", "dpo"}
_SHARE = re.compile(r"(?<!learning)_(rate|accuracy|agreement)(_|$)")


class Label(NamedTuple):
    """What the page writes at a number.

    Attributes:
        title: its name.
        unit: its unit, or "".
        share: whether numbers between 0 and 1 are written as percentages.
        term: the id of its entry in the glossary; "" where it has no entry.
        meaning: that entry's sentence, or "".
    """

    title: str
    unit: str = ""
    share: bool = False
    term: str = ""
    meaning: str = ""


def words(key: str) -> str:
    """Returns a key as words: first_kl_zero -> First KL zero."""
    text = " ".join(word.upper() if word in _ABBREVIATIONS else word for word in key.split("_") if word)
    return text[:1].upper() + text[1:]


def stage_title(stage: str) -> str:
    """Returns the name of a stage for people: reward_model -> Reward model."""
    return _STAGE_TITLES.get(stage) or words(str(stage))


def label(key: str) -> Label:
    """Returns the label of a number; of one that is not in the table, its words.

    Args:
        key: in metrics.jsonl or summary.json.
    """
    stem = key.removesuffix("_ci95")
    when = next((suffix for suffix in ("_before", "_after") if stem.endswith(suffix)), "")
    where, _, last = stem.rpartition("/")
    for name, detail in (
        (stem, ""),
        (stem.removesuffix(when), when[1:]),
        (last, where.replace("first", "first minibatch")),
    ):
        entry = _entry(name)
        if entry is not None:
            quantity = QUANTITIES[entry]
            place = entry.find("*")
            matched = name[place : len(name) - (len(entry) - place - 1)] if place >= 0 else ""
            title = quantity.title.format(_MATCHED.get(matched, words(matched).lower())) + (
                f" ({detail})" if detail else ""
            )
            return Label(title, quantity.unit, quantity.unit.startswith("%"), _id(entry), quantity.meaning)
    return Label(words(key), share=bool(_SHARE.search(key)))


def main_rank(key: str) -> int | None:
    """Returns the place of a curve of the loop among those to look at first; None for any other."""
    return MAIN.index(key) if key in MAIN else None


def rank(key: str) -> int:
    """Returns the place of a number in the table; that of a number that is not in it is the last."""
    term = label(key).term
    return next((place for place, name in enumerate(QUANTITIES) if _id(name) == term), len(QUANTITIES))


def entries(keys: Iterable[str]) -> list[tuple[str, str, str, str]]:
    """Returns (id, title, unit, meaning) of what the keys need in a glossary, in the table's order.

    Args:
        keys: of the numbers that the page shows; those that are not in the table have no entry.
    """
    used = {label(key).term for key in keys}
    return [
        (_id(key), quantity.title.replace("{}", "…"), quantity.unit, quantity.meaning)
        for key, quantity in QUANTITIES.items()
        if _id(key) in used
    ]


def _entry(name: str) -> str | None:
    if name in QUANTITIES:
        return name
    matches = [key for key in QUANTITIES if "*" in key and fnmatchcase(name, key)]
    return max(matches, key=len, default=None)


def _id(key: str) -> str:
    return "term-" + re.sub("[^a-z0-9]+", "-", key)
