"""The colours of an answer's tokens on a run's page: what each token did for the reward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlaif_jax.report.numbers import is_number

LEVELS = 4
"""Shades of each of the two colours."""

DARK = 0.1  # nats; a token becomes a tenth more or less probable
_MEANINGS = {
    "log_ratio": "how much more (blue) or less (red) probable the token is than before training, in nats; over an answer they "
    "add up to its KL",
    "value_change": "by how much the token raised (blue) or lowered (red) the reward that the critic expects",
}


class Token(NamedTuple):
    """A token on the page.

    Attributes:
        text: its text; "" for the end of the answer.
        shade: -LEVELS (red) .. LEVELS (blue); 0 without a colour.
        value: its number as text, or "".
    """

    text: str
    shade: int
    value: str


class Legend(NamedTuple):
    """What the colours mean.

    Attributes:
        meaning: of a token's number.
        most: the number, as text, from which on the colour is darkest.
    """

    meaning: str
    most: str


class Palette(NamedTuple):
    """The colours of one page.

    Attributes:
        most: the number from which on the colour is darkest.
        legend: for the reader; None where no sample has numbers.
    """

    most: float
    legend: Legend | None

    def tokens(self, sample: Mapping[str, Any], limit: int) -> list[Token]:
        """Returns the tokens of a sample's answer; [] where it has no numbers, or they are not of its answer.

        Args:
            sample: a line of samples.jsonl, which may hold anything.
            limit: characters that are shown.
        """
        found, shown, waiting = [], 0, 0.0
        numbers = () if self.legend is None else _numbers(sample)
        for place, (text, number) in enumerate(numbers):
            waiting += number or 0.0
            if not text and place < len(numbers) - 1:
                continue  # a part of a character, or a token that the text does not show
            value = None if number is None and not waiting else waiting
            found.append(Token(text[: limit - shown], self._shade(value), "" if value is None else f"{value:+.2f}"))
            shown, waiting = shown + len(text), 0.0
            if shown > limit:
                found.append(Token(f" … ({sum(len(text) for text, _ in numbers) - limit:,} more characters)", 0, ""))
                break
        return found

    def _shade(self, value: float | None) -> int:
        return 0 if value is None else int(np.rint(LEVELS * np.clip(value / self.most, -1, 1)))


def palette(samples: Iterable[Mapping[str, Any]]) -> Palette:
    """Returns the colours for the answers of a page: a twentieth of the tokens has the darkest ones.

    A policy that has hardly changed is hardly coloured: log-ratios are dark from `DARK` nats on.

    Args:
        samples: lines of samples.jsonl.
    """
    known = [sample for sample in samples if _numbers(sample)]
    sizes = [abs(number) for sample in known for _, number in _numbers(sample) if number is not None]
    most = float(np.quantile(sizes, 0.95)) if sizes else 0.0
    if not most > 0:
        return Palette(1.0, None)
    kind = known[0]["credit"]
    most = max(most, DARK) if kind == "log_ratio" else most
    return Palette(most, Legend(_MEANINGS[kind], f"{most:.2g}"))


def _numbers(sample: Mapping[str, Any]) -> Sequence[tuple[str, float | None]]:
    """Returns (text, number or None) of the tokens of a sample; () where they are not those of its answer."""
    tokens = sample.get("tokens")
    if sample.get("credit") not in list(_MEANINGS) or not isinstance(tokens, list):
        return ()
    pairs = [token for token in tokens if isinstance(token, list) and len(token) == 2 and isinstance(token[0], str)]
    found = [(text, number) for text, number in pairs if number is None or is_number(number)]
    if len(found) != len(tokens) or "".join(text for text, _ in found) != sample.get("response"):
        return ()
    return found
