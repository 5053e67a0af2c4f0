"""The time that is left of a run, from what its stages were planned to cost and what they took."""

import pytest

from rlaif_jax.progress.plan import Plan, PlannedStage

STAGES = [PlannedStage("lm", "a model", 10), PlannedStage("labels", "labels", 20), PlannedStage("rl", "PPO", 70)]


def test_the_pace_of_the_first_stage_gives_the_time_of_all():
    plan = Plan(STAGES)
    assert plan.left(0.0) is None
    assert plan.begin("lm", 5.0)
    assert plan.title() == "stage 1 of 3: a model"
    assert plan.left(6.0) is None
    # 4 s passed and 1 s left for a cost of 10: half a second a unit.
    assert plan.left(9.0, 1.0) == pytest.approx(1 + 0.5 * 90)


def test_finished_stages_give_the_pace_and_the_present_one_uses_its_share_up():
    plan = Plan(STAGES)
    plan.begin("lm", 0.0)
    plan.begin("labels", 20.0)
    assert plan.title() == "stage 2 of 3: labels"
    assert plan.left(20.0) == pytest.approx(2 * 90)
    assert plan.left(50.0) == pytest.approx(2 * 90 - 30)
    assert plan.left(80.0) == pytest.approx(2 * 70)  # it lasts longer than planned, the rest does not
    plan.begin("rl", 80.0)
    assert plan.left(80.0) == pytest.approx(80 / 30 * 70)
    assert plan.left(90.0, 5.0) == 5.0


def test_a_stage_that_was_done_before_takes_no_time_and_says_nothing_about_the_pace():
    plan = Plan(STAGES)
    plan.begin("lm", 0.0, skipped=True)
    assert plan.left(0.1) is None
    plan.begin("labels", 0.2)
    assert plan.left(10.2) is None
    plan.begin("rl", 10.2)
    assert plan.left(10.2) == pytest.approx(10 / 20 * 70)


def test_stages_begin_once_in_order_and_others_are_not_known():
    plan = Plan(STAGES)
    assert not plan.begin("sft", 0.0)
    assert plan.at == -1
    assert plan.begin("labels", 1.0)  # passes over the first
    assert not plan.begin("lm", 2.0)
    assert not plan.begin("labels", 3.0)
    assert plan.left(11.0, 10.0) == pytest.approx(10 + 70)


def test_a_name_may_come_twice():
    plan = Plan([*STAGES, PlannedStage("labels", "labels once more", 5)])
    assert [plan.begin(name, 0.0) for name in ("labels", "rl", "labels", "labels")] == [True, True, True, False]
    assert plan.title() == "stage 4 of 4: labels once more"


@pytest.mark.parametrize(("done", "expected"), [(0, 100), (99, 100), (100, 120), (200, 240), (900, 1000)])
def test_a_stage_past_its_usual_steps_is_expected_to_take_a_fifth_more(done, expected):
    assert PlannedStage("lm", "a model", 10, usual=100).expected(done, 1000) == expected
    assert PlannedStage("lm", "a model", 10).expected(done, 1000) == 1000
