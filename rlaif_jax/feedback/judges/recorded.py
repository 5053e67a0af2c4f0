"""A local judge as a source whose judgements are recorded, each as the judge read it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlaif_jax.data.prompts import Record
from rlaif_jax.feedback.judges.language_model import LanguageModelJudge
from rlaif_jax.feedback.records.forms import Judgement, Ranking, Rater, Rating
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.feedback.sources import CountingSource, Missing, other_answer
from rlaif_jax.types import Feedback, Rollout


@dataclasses.dataclass(frozen=True, eq=False)
class RecordedJudgeSource(CountingSource):
    """Scores answers, or compares each with another one, by a judge on the same devices.

    Every judgement goes to the store, also those without a value; without a time, so that a step that a resumed run repeats
    adds nothing.

    Attributes:
        judge: the judge.
        rater: the judge as the records name it.
        store: the feedback store's file.
        principle: prompt -> the criterion of the judgements on its answers, as the judge's wording has it.
        against: the field of the record that holds the other answer; "" = answers are scored alone.
    """

    judge: LanguageModelJudge
    rater: Rater
    store: Path
    principle: Callable[[str], str] = lambda prompt: ""
    against: str = ""

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout | None = None) -> Feedback:
        others = [other_answer(record, self.against) if self.against else "" for record in records]
        judged: list[float | Missing] = [other if isinstance(other, Missing) else 0.0 for other in others]
        asked = [i for i, other in enumerate(others) if not isinstance(other, Missing)]
        if asked:
            prompts, own = [str(records[i]["prompt"]) for i in asked], [answers[i] for i in asked]
            if self.against:
                values, valid, missing = self._compare(prompts, own, [str(others[i]) for i in asked])
            else:
                values, valid, missing = self._score(prompts, own)
            for i, value, ok, why in zip(asked, values.tolist(), valid, missing, strict=True):
                judged[i] = value if ok else Missing(why)
        return self.feedback(judged)

    def _score(self, prompts: Sequence[str], answers: Sequence[str]) -> tuple[np.ndarray, np.ndarray, list[str]]:
        scores = self.judge.score(prompts, answers)
        numbers = [number for _, number in self.judge.scale]
        found: list[Judgement] = []
        for i, (prompt, answer) in enumerate(zip(prompts, answers)):
            found.append(
                Rating(
                    **self._shared(prompt, (answer,), bool(scores.valid[i]), float(scores.mass[i])),
                    value=float(np.clip(scores.expected[i], min(numbers), max(numbers)))
                    if scores.valid[i]
                    else math.nan,
                    low=min(numbers),
                    high=max(numbers),
                    raw=scores.reasons[i],
                    probabilities=tuple(scores.probabilities[i].tolist()) if scores.valid[i] else (),
                )
            )
        self._keep(found)
        return scores.expected, scores.valid, list(scores.missing)

    def _compare(
        self, prompts: Sequence[str], answers: Sequence[str], others: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray, list[str]]:
        compared = self.judge.compare(prompts, answers, others)
        found: list[Judgement] = []
        for i, pair in enumerate(zip(answers, others)):
            for order, (shown, first) in enumerate((((0, 1), compared.forward[i]), ((1, 0), 1 - compared.swapped[i]))):
                valid, first = bool(compared.valid[i]), float(np.clip(first, 0.0, 1.0))
                shared = self._shared(prompts[i], pair, valid, float(compared.mass[i]))
                tie = valid and first == 0.5
                found.append(
                    Ranking(
                        **shared | ({"status": "tie"} if tie else {}),
                        shown=shown,
                        ranks=() if not valid else (1, 1) if tie else (1, 2) if first > 0.5 else (2, 1),
                        probability=first if valid else None,
                        raw=compared.reasons[i, order],
                    )
                )
        self._keep(found)
        return compared.probability, compared.valid, list(compared.missing)

    def _shared(self, prompt: str, answers: tuple[str, ...], valid: bool, mass: float) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "answers": answers,
            "rater": self.rater,
            "principle": self.principle(prompt),
            "status": "ok" if valid else "unparsed",
            "label_mass": min(max(mass, 0.0), 1.0),
        }

    def _keep(self, found: Sequence[Judgement]) -> None:
        with Store(self.store) as store:
            store.add(found)
