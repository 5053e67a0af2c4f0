"""The check of the instructions that raters pass before they work."""

from __future__ import annotations

import dataclasses

from rlaif_jax.config import require


@dataclasses.dataclass(frozen=True)
class CheckQuestion:
    """A question of the check that raters pass before they work.

    Attributes:
        question: the question.
        options: the answers to choose from.
        answer: the index of the right option.
        why: why that option is right; shown after a wrong choice.
    """

    question: str
    options: tuple[str, ...]
    answer: int
    why: str = ""

    def __post_init__(self) -> None:
        require(
            0 <= self.answer < len(self.options),
            f"the check's question {self.question[:60]!r}: answer is {self.answer}; options has {len(self.options)} entries",
        )
