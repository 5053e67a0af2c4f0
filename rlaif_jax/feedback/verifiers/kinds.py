"""The rewards that users bring, as one union of settings; each has `build() -> FeedbackSource`."""

from __future__ import annotations

from rlaif_jax.feedback.verifiers.constraints import Constraints
from rlaif_jax.feedback.verifiers.functions import PythonFunction
from rlaif_jax.feedback.verifiers.json_schema import JsonSchema
from rlaif_jax.feedback.verifiers.number import Number
from rlaif_jax.feedback.verifiers.texts import ExactMatch, Regex
from rlaif_jax.feedback.verifiers.unit_tests import UnitTests

UserReward = PythonFunction | ExactMatch | Number | Regex | JsonSchema | Constraints | UnitTests
