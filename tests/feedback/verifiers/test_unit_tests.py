"""Unit tests as a reward: shares, answers without code, records without tests, and the permission."""

import threading
import time

import pytest

from rlaif_jax.config import StopRequested, UserError, from_json, to_json
from rlaif_jax.feedback.verifiers import unit_tests
from rlaif_jax.feedback.verifiers.sandbox.run import Results
from rlaif_jax.feedback.verifiers.unit_tests import UnitTests

TESTS = ["assert double(1) == 2", "assert double(0) == 0", "assert double(-3) == -6", "assert double('a') == 'aa'"]
ANSWERS = {
    "So:\n```python\ndef double(x):\n    return 2 * x\n```\nDone.": 4,
    "```python\ndef double(x):\n    return x + x\n```\n```python\nraise ValueError\n```": 4,
    "```py\ndouble = lambda x: x * 2\n```": 4,
    "```\ndef double(x): return 2 * x\n```": 4,
    "```python\ndef double(x): return abs(2 * x)\n```": 2,
    "```python\ndef double(x): return 0\n```": 1,
    "```python\ndef double(x) return 2 * x\n```": 0,
    "```text\nnothing\n```": 0,
    "```python\ndef double(x): return 2 * x": 0,
    "```python\n\n```": 0,
    "def double(x): return 2 * x": 0,
    "": 0,
}


@pytest.fixture(scope="module")
def source():
    return UnitTests(allow_code_execution=True).build()


def test_the_reward_is_the_share_of_the_tests(source):
    feedback = source([{"tests": TESTS}] * len(ANSWERS), list(ANSWERS))
    assert feedback.valid.all() and feedback.values[:, 0].tolist() == [passed / 4 for passed in ANSWERS.values()]


def test_all_or_nothing():
    source = UnitTests("checks", allow_code_execution=True, all_or_nothing=True).build()
    answers = [answer for answer, passed in ANSWERS.items() if passed in (1, 2)] + [next(iter(ANSWERS))]
    assert source([{"checks": tuple(TESTS)}] * 3, answers).values[:, 0].tolist() == [0, 0, 1]


def test_records_without_tests_have_no_verdict(source):
    records = [
        {},
        {"tests": []},
        {"tests": "x ="},
        {"tests": "x = 1"},
        {"tests": [1]},
        {"tests": {"a": 1}},
        {"tests": TESTS},
    ]
    before = source.missing()
    assert before == {}
    feedback = source(records, [next(iter(ANSWERS))] * 7)
    assert feedback.valid[:, 0].tolist() == [False] * 6 + [True] and feedback.values[-1, 0] == 1
    assert source.missing() == {
        "the record has no 'tests'": 2,
        "the record's 'tests': the tests are no Python (SyntaxError)": 1,
        "the record's 'tests': the tests have no assert": 1,
        "the record's 'tests' is no text and no list of texts": 2,
    }


def test_answers_run_at_a_time_and_in_their_order():
    """Four answers that sleep take the time of one with four workers, and of four with one."""
    sleep = "```python\nimport time\ntime.sleep(0.3)\ndef f(): return {}\n```"
    answers, records = [sleep.format(i) for i in range(4)], [{"tests": [f"assert f() == {i}"]} for i in (0, 1, 5, 3)]
    seconds = {}
    for workers in (1, 4):
        source = UnitTests(allow_code_execution=True, workers=workers).build()
        started = time.monotonic()
        assert source(records, answers).values[:, 0].tolist() == [1, 1, 0, 1]
        seconds[workers] = time.monotonic() - started
    assert seconds[1] > 1.2 and seconds[4] < seconds[1] - 0.4


def test_a_stop_does_not_wait_for_answers_that_have_not_begun(source, monkeypatch):
    begun = []

    def stopped(*unused, **limits):
        begun.append(threading.current_thread())
        time.sleep(0.05)
        raise StopRequested

    monkeypatch.setattr(unit_tests, "run_tests", stopped)
    with pytest.raises(StopRequested):
        source([{"tests": TESTS}] * 100, [next(iter(ANSWERS))] * 100)
    assert len(begun) < 20 and not any(thread.is_alive() for thread in begun)


def test_processes_that_cannot_start_are_a_missing_judgement(monkeypatch):
    source = UnitTests(allow_code_execution=True).build()

    def broken(*unused, **limits):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(unit_tests, "run_tests", broken)
    assert not source([{"tests": TESTS}], [next(iter(ANSWERS))]).valid.any()
    assert source.missing() == {"the processes of the tests could not start: Resource temporarily unavailable": 1}


def test_what_is_not_confined_is_a_warning(monkeypatch, capsys):
    monkeypatch.setattr(unit_tests, "run_tests", lambda *a, **k: Results(1, 1, "", ("files", "system calls")))
    UnitTests(allow_code_execution=True).build()
    assert "warning: unit tests: this system cannot confine files and system calls" in capsys.readouterr().err
    monkeypatch.setattr(unit_tests, "run_tests", lambda *a, **k: Results(0, 0, "the processes could not start"))
    with pytest.raises(UserError, match="unit tests cannot run here: the processes could not start"):
        UnitTests(allow_code_execution=True).build()


def test_code_runs_with_permission_alone():
    with pytest.raises(
        UserError, match=r"runs code that the model wrote .* set unit_tests\.allow_code_execution to true"
    ):
        UnitTests().build()


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"field": ""}, r"unit_tests\.field is empty"),
        ({"timeout_s": 0.0}, r"unit_tests\.timeout_s must be positive, not 0\.0"),
        ({"timeout_s": float("inf")}, r"unit_tests\.timeout_s must be positive, not inf"),
        ({"memory_mb": 1}, r"unit_tests\.memory_mb must be at least 64, not 1"),
        ({"workers": 0}, r"unit_tests\.workers must be at least 1, not 0"),
    ],
)
def test_settings_that_are_not_right(settings, words):
    with pytest.raises(UserError, match=words):
        UnitTests(**settings)


def test_settings_as_json():
    config = UnitTests("x", True, True, 1.5, 128, 2)
    assert from_json(UnitTests, to_json(config)) == config
