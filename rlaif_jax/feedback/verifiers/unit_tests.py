"""A verifier of code: runs the record's tests on an answer's Python code, in confined processes."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from rlaif_jax.config import require
from rlaif_jax.data.prompts import Record
from rlaif_jax.feedback.sources import CountingSource, FeedbackSource, Missing
from rlaif_jax.feedback.verifiers.base import WRONG, Verdict, fenced, read_field
from rlaif_jax.feedback.verifiers.sandbox.run import run_tests
from rlaif_jax.types import Feedback, Rollout


@dataclasses.dataclass(frozen=True)
class UnitTests:
    """The share of the record's tests that the answer's Python code passes.

    The code is that of the answer's first fence (```python, or a fence without a language); without one the reward is 0.
    The tests are Python: a list of texts, each one test, or one text, in which each statement with an assert, each
    function `test...` and each method `test...` of a class is a test. They call the code in another process
    (`sandbox/tester.py`), so only plain data counts as a right value.

    Attributes:
        field: the record's field with its tests.
        allow_code_execution: must be true: an answer is code that nobody has read, and it runs on this machine.
        all_or_nothing: 1 where all tests pass, else 0.
        timeout_s: seconds for all tests of an answer; those that have not ended by then count as failed.
        memory_mb: the most memory of each of the two processes of an answer.
        workers: answers that are run at a time.
    """

    field: str = "tests"
    allow_code_execution: bool = False
    all_or_nothing: bool = False
    timeout_s: float = 5.0
    memory_mb: int = 256
    workers: int = 4

    def __post_init__(self) -> None:
        require(bool(self.field), "unit_tests.field is empty; name the record's field")
        require(0 < self.timeout_s < math.inf, f"unit_tests.timeout_s must be positive, not {self.timeout_s}")
        require(self.memory_mb >= 64, f"unit_tests.memory_mb must be at least 64, not {self.memory_mb}")
        require(self.workers >= 1, f"unit_tests.workers must be at least 1, not {self.workers}")

    def build(self) -> FeedbackSource:
        """Tries the processes once and returns the source of these rewards.

        What this system cannot confine is a warning.

        Raises:
            UserError: running code is not allowed, or the processes do not work here.
        """
        require(
            self.allow_code_execution,
            "UnitTests runs code that the model wrote on this machine, with its user's rights to Python's files, confined "
            "as far as the system can; set unit_tests.allow_code_execution to true if that is wanted",
        )
        tried = run_tests("x = 1", ["assert x == 1"], timeout_s=60.0, memory_mb=self.memory_mb)
        require(tried.passed == 1, f"unit tests cannot run here: {tried.problem or 'a test that holds did not pass'}")
        if tried.unconfined:
            print(
                f"warning: unit tests: this system cannot confine {' and '.join(tried.unconfined)}: the code of answers could "
                "read and change what this user may. Run it in a container without secrets and network",
                file=sys.stderr,
            )
        return UnitTestsSource(self)


@dataclasses.dataclass(frozen=True, eq=False)
class UnitTestsSource(CountingSource):
    """The rewards of `UnitTests`, which builds it."""

    config: UnitTests

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout | None = None) -> Feedback:
        """Returns the share of passed tests of each answer; see `FeedbackSource`."""
        with ThreadPoolExecutor(self.config.workers, "unit-tests") as pool:
            # A stop ends the iteration, which cancels what has not begun: it waits for the answers that are running alone.
            return self.feedback(list(pool.map(self._verify, records, answers)))

    def _verify(self, record: Record, answer: str) -> Verdict:
        tests = read_field(record, self.config.field)
        if isinstance(tests, Missing):
            return tests
        if isinstance(tests, tuple):
            tests = list(tests)
        if not (isinstance(tests, str) or (isinstance(tests, list) and all(isinstance(test, str) for test in tests))):
            return Missing(f"the record's {self.config.field!r} is no text and no list of texts")
        code = fenced(answer, "python", "py", "python3", "")
        if code is None or not code.strip():
            return WRONG
        try:
            results = run_tests(code, tests, timeout_s=self.config.timeout_s, memory_mb=self.config.memory_mb)
        except OSError as error:
            return Missing(f"the processes of the tests could not start: {error.strerror}")
        if results.problem:
            return Missing(f"the record's {self.config.field!r}: {results.problem}")
        share = results.passed / results.tests
        return float(share == 1) if self.config.all_or_nothing else share
