"""Settings and questions that the tests of the API judge share."""

from __future__ import annotations

import random
from typing import Any

from rlaif_jax.feedback.api.config import ApiConfig
from rlaif_jax.feedback.api.templates import Question
from tests.feedback.api_server import completion, right

PAIR = Question("Say something.", ("quality 2.0", "quality 1.2"))
ONE = Question("Say something.", ("quality 7",))


def config(url: str, **settings: Any) -> ApiConfig:
    return ApiConfig(**({"server": url, "model": "judge", "timeout_s": 5.0} | settings))


def ones(count: int) -> list[Question]:
    return [Question(f"{i}", ("quality 7",)) for i in range(count)]


def pairs(count: int) -> list[Question]:
    rng = random.Random(0)
    return [Question(f"prompt {i}", tuple(f"quality {rng.uniform(0, 3):.2f}" for _ in range(2))) for i in range(count)]


def low_mass(body: dict[str, Any], number: int) -> Any:
    if "structured_outputs" in body:
        return completion("A", top=[("A", 0.6), ("B", 0.4)])
    if "quality" in body["messages"][-1]["content"]:
        return completion("Well", top=[("Well", 0.9), ("A", 0.06), ("B", 0.04)])
    return right(body)
