"""The rules on series by hand: each at its bound, and what must not set it off."""

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from rlaif_jax.algorithms.ppo import PPOConfig
from rlaif_jax.config import UserError
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.rewards.shaping import Normaliser, Shaping
from rlaif_jax.train import TrainConfig
from rlaif_jax.types import Feedback, RewardBatch
from rlaif_jax.watch import rules
from rlaif_jax.watch.rules import Opinion, Past, Seen, WatchConfig
from rlaif_jax.watch.watch import Watch, reward_scale


def past(*series, first=None, config=WatchConfig(), answers=64, **opinions):
    """A past of steps with these fields, counted from 1; 64 answers a step are over 100 in two steps."""
    steps = [Seen(step, answers, **fields) for step, fields in enumerate(series, start=1)]
    return Past(config, steps[0] if first is None else Seen(1, answers, **first), steps, **opinions)


def of(name, values, **more):
    return past(*({name: value} for value in values), **more)


# ---- The KL


@pytest.mark.parametrize(
    ("values", "leaps"),
    [
        ([0, 0.5, 1, 1, 1, 1, 5.1], True),
        ([0, 0.5, 1, 1, 1, 1, 4.9], False),  # not a quarter of the limit
        ([0, 0.5, 1.2, 1.2, 1.2, 1.2, 5.1], False),  # not five times the median
        ([0, 0, 0, 0, 5.1], False),  # four steps before it are too few
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12], False),
        ([0.01 * 1.3**i for i in range(28)], False),  # steady growth
        ([None] * 6 + [9.0], False),
    ],
)
def test_a_leap_of_the_kl(values, leaps):
    text = rules.kl_leaps(of("kl", values))
    assert (text is not None) == leaps
    if text:
        assert text.startswith("step 7: the KL to the reference leapt to 5.1 nats an answer, from a median of 1 ")


@pytest.mark.parametrize(
    ("values", "leaps"),
    [
        ([0, 115.0], True),  # a character-level model at the learning rate of another; answers of 224 tokens
        ([0, 2.4], False),  # stories260K at the same rate
        ([0, 22.3], False),  # .1 nats a token
        ([0, 22.5], True),
        ([0, 5, 10, 40], True),
        ([0, 10, 20, 30], False),
        ([115.0], False),  # the first step has none before it
        ([None, 115.0], False),
    ],
)
def test_a_leap_of_the_kl_in_the_first_steps(values, leaps):
    entropic = {"entropy": 1.1, "length": 224.0}  # under the limit of the KL, which is 493 nats here
    steps = of("kl", values, first=entropic)
    steps = steps._replace(steps=[seen._replace(length=224.0) for seen in steps.steps])
    text = rules.kl_leaps(steps)
    assert (text is not None) == leaps and rules.kl_over_limit(steps) is None
    if values == [0, 115.0]:
        assert text.startswith("step 2: the KL to the reference leapt from 0 to 115 nats an answer in one step")


def test_the_limit_of_the_kl():
    assert rules.kl_over_limit(of("kl", [0.0, 20.0])) is None
    assert "is 20.1 nats an answer, more than the limit of 20:" in rules.kl_over_limit(of("kl", [0.0, 20.1]))
    long = {"entropy": 0.5, "length": 100.0}
    assert rules.kl_over_limit(of("kl", [0.0, 99.0], first=long)) is None
    assert rules.kl_over_limit(of("kl", [0.0, 101.0], first=long)) is not None
    assert rules.kl_over_limit(of("kl", [0.0, 3.1], first=long, config=WatchConfig(kl_limit=3.0))) is not None
    assert rules.kl_over_limit(of("kl", [0.0, None])) is None
    for wrong in ({"kl_limit": 0.0}, {"patience": 0}):
        with pytest.raises(UserError, match=r"train\.watch\."):
            WatchConfig(**wrong)


# ---- The answers


def test_no_answer_finishes_in_three_steps_with_a_hundred_answers():
    text = rules.no_answer_finishes(of("finished", [0.98, 0.5, 0.0, 0.0, 0.0]))
    assert "steps 3 to 5: none of 192 answers ended with its stop token (of the first step's, 98% did)" in text
    assert rules.no_answer_finishes(of("finished", [0.98, 0.5, 0.0, 0.0])) is None
    assert rules.no_answer_finishes(of("finished", [0.98, 0.0, 0.0, 0.01])) is None
    few = [0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert rules.no_answer_finishes(of("finished", few, answers=16)) is None, "96 answers may be chance"
    assert "steps 2 to 8" in rules.no_answer_finishes(of("finished", [*few, 0.0], answers=16))
    assert "steps 1 to 3" in rules.no_answer_finishes(of("finished", [0.0] * 3)), "none from the start on"
    assert rules.no_answer_finishes(of("finished", [None] * 5)) is None


def test_answers_that_are_all_alike():
    assert "at least 90% of the answers" in rules.answers_alike(of("commonest", [0.1, 0.9, 0.95, 1.0]))
    assert "all answers" in rules.answers_alike(of("commonest", [0.1, 1.0, 1.0, 1.0]))
    assert rules.answers_alike(of("commonest", [0.1, 0.89, 0.95, 1.0])) is None
    assert rules.answers_alike(of("commonest", [None] * 4)) is None


def test_an_entropy_that_is_gone():
    text = rules.entropy_gone(of("entropy", [0.4, 0.039, 0.03, 0.02]))
    assert "below 0.04 nats (it was 0.4)" in text
    assert rules.entropy_gone(of("entropy", [0.4, 0.041, 0.03, 0.02])) is None
    assert rules.entropy_gone(of("entropy", [2.6, 0.06, 0.06, 0.06])) is None, "a tenth of much is not nothing"
    assert rules.entropy_gone(of("entropy", [0.04, 0.02, 0.02, 0.02])) is None, "it was low at the start"
    assert rules.entropy_gone(of("entropy", [0.0, 0.0, 0.0, 0.0])) is None, "recorded answers"


# ---- The rewards


def test_rewards_that_never_vary():
    same, other = {"varies": False, "reward": 0.0}, {"varies": True, "reward": 0.3}
    assert "all rewards of a step are equal (0)" in rules.rewards_constant(past(same, same, same))
    assert "steps 2 to 4" in rules.rewards_constant(past(other, same, same, same))
    assert rules.rewards_constant(past(same, same, other)) is None
    solved = {"varies": False, "reward": 1.0}
    assert rules.rewards_constant(past(other, solved, solved, solved)) is None, "the task is solved"
    assert rules.rewards_constant(past(*({"varies": None, "reward": None},) * 3)) is None


def test_missing_judgements():
    assert rules.judgements_missing(of("missing", [1.0])).startswith("step 1: all judgements are missing")
    assert "steps 2 to 4: 57% of the judgements" in rules.judgements_missing(of("missing", [0.0, 0.5, 0.6, 0.6]))
    assert rules.judgements_missing(of("missing", [0.9, 0.9])) is None
    assert rules.judgements_missing(of("missing", [0.5, 0.5, 0.5])) is None


def test_one_reward_that_dwarfs_the_others():
    assert "reward 0 varies 20 times" in rules.one_reward_dwarfs(of("spans", [[20.0, 1.0], [30.0, 1.0], [20.0, 1.0]]))
    assert rules.one_reward_dwarfs(of("spans", [[20.0, 1.0], [19.0, 1.0], [20.0, 1.0]])) is None
    assert rules.one_reward_dwarfs(of("spans", [[20.0, 0.0]] * 3)) is None, "a rule that every answer keeps"
    assert rules.one_reward_dwarfs(of("spans", [[20.0, 1.0, 9.0]] * 3)) is None
    assert rules.one_reward_dwarfs(of("spans", [[20.0]] * 3)) is None
    assert rules.one_reward_dwarfs(of("spans", [[20.0, 1.0]] * 2)) is None


def test_a_weight_or_a_normaliser_brings_rewards_to_one_scale():
    assert reward_scale(Shaping(), None) == []
    assert reward_scale(Shaping(), Normaliser(np.float32(0), np.float32(4))) == []
    assert reward_scale(Shaping((1.0, 0.01)), None) == [1.0, 0.01]
    assert reward_scale(Shaping(), Normaliser(np.zeros(2), np.array([1.0, 100.0]))) == [1.0, 0.01]


# ---- The second opinion


START = Opinion(0, second=0.6, second_error=0.01, reward=0.0, reward_error=0.1)
BEST = Opinion(20, second=0.7, second_error=0.01, reward=1.0, reward_error=0.1)


@pytest.mark.parametrize(
    ("second", "reward", "since"),
    [
        (0.64, 1.5, 20),  # below the best by more than 3 x .014, the reward higher by more than 3 x .14
        (0.66, 1.5, None),  # within chance of the best
        (0.64, 1.4, None),  # the reward has not risen since the best
        (0.55, 0.9, 0),  # below the start
        (0.55, 0.4, None),
        (0.8, 3.0, None),
    ],
)
def test_the_second_opinion_falls_while_the_reward_rises(second, reward, since):
    latest = Opinion(40, second, 0.01, reward, 0.1)
    text = rules.second_opinion_falls(of("kl", [0.0], start=START, best=BEST, latest=latest))
    assert (text is not None) == (since is not None)
    if text:
        assert f"step 40: since step {since} the reward rose" in text


def test_without_a_reward_or_an_opinion_nothing_is_compared():
    assert rules.second_opinion_falls(of("kl", [0.0], start=START, best=BEST)) is None
    unknown = Opinion(40, 0.1, 0.01)
    assert rules.second_opinion_falls(of("kl", [0.0], start=START, best=BEST, latest=unknown)) is None


# ---- Divergence


@pytest.mark.parametrize(
    ("first", "bad", "why"),
    [
        ({}, {"kl": 21.0}, "over the limit of 20"),
        ({"finished": 0.5}, {"finished": 0.0}, "no answer ends with its stop token"),
        ({"commonest": 0.4}, {"commonest": 0.9}, "90% of the answers are the same text"),
        ({"finished": 0.4}, {"finished": 0.0}, None),
        ({"commonest": 0.5}, {"commonest": 1.0}, None),
        ({}, {"commonest": 1.0, "finished": 0.0, "kl": 19.0}, None),
    ],
)
def test_three_bad_steps_in_a_row_have_diverged(first, bad, why):
    assert rules.diverged(past({}, bad, bad, first=first)) is None
    text = rules.diverged(past({}, bad, bad, bad, first=first))
    assert (text is not None) == (why is not None)
    if why:
        assert text.startswith("steps 2 to 4: the run has diverged: ")
        assert why in text
        assert rules.diverged(past(bad, bad, {}, bad, first=first)) is None


def test_the_settings_that_the_warnings_name_exist():
    known = {"ppo": PPOConfig(), "train": TrainConfig(), "sampling": SamplingConfig()}
    named = set(re.findall(r"\b(ppo|train|sampling)\.([a-z_.]+[a-z])", Path(rules.__file__).read_text()))
    assert ("train", "watch.kl_limit") in named
    assert ("ppo", "policy_optimizer.learning_rate") in named
    for config, name in named:
        functools.reduce(lambda value, part: vars(value)[part], name.split("."), known[config])


# ---- The watch


def seen(watch, step, *, texts=None, reward=None, valid=None, **values):
    """Shows the watch a step of 8 answers to 8 prompts."""
    rewards = np.arange(8.0, dtype=np.float32) if reward is None else np.full(8, reward, np.float32)
    valid = np.ones(8, bool) if valid is None else np.asarray(valid)
    batch = RewardBatch(rewards, valid, np.zeros((8, 2), np.float32))
    mean = float(rewards[valid].mean()) if valid.any() else float("nan")
    return watch.see(
        step,
        [{"prompt": str(i)} for i in range(8)],
        texts or [f"answer {i}" for i in range(8)],
        batch,
        Feedback(rewards[:, None], valid[:, None]),
        {"reward": mean, "kl": 0.0, "entropy": 1.0, "length": 4.0, "finished": 1.0} | values,
    )


def test_each_kind_is_said_once():
    watch = Watch(WatchConfig())
    assert seen(watch, 1) == []
    assert [text[:7] for text in seen(watch, 2, kl=30.0)] == ["step 2:"]
    assert seen(watch, 3, kl=40.0) == []
    assert not watch.diverged
    (text,) = seen(watch, 4, kl=50.0)
    assert "the run has diverged" in text
    assert watch.diverged
    assert seen(watch, 5, kl=60.0) == []


def test_what_may_be_saved_while_steps_are_bad():
    watch = Watch(WatchConfig())
    for step, kl in enumerate((0.0, 1.0, 30.0), start=1):
        seen(watch, step, kl=kl)
        assert watch.healthy == (kl < 30)
    # The answers of step 3 are those of the policy after step 2: the last healthy one is that after step 1.
    assert watch.healthy_step == 1
    seen(watch, 4, kl=30.0)
    assert watch.healthy_step == 1
    stale = Watch(WatchConfig(), staleness=1)
    for step, kl in enumerate((0.0, 1.0, 1.0, 30.0), start=1):
        seen(stale, step, kl=kl)
    assert stale.healthy_step == 1
    going_on = Watch(WatchConfig(stop=False))
    seen(going_on, 1, kl=30.0)
    assert going_on.healthy


def test_means_over_no_valid_answer_are_not_read():
    watch = Watch(WatchConfig())
    seen(watch, 1)
    for step in range(2, 20):
        texts = seen(watch, step, valid=[False] * 8, entropy=0.0, kl=float("nan"))
        assert [text for text in texts if "missing" not in text] == []
    assert not watch.diverged


def test_answers_that_the_policy_did_not_draw_are_not_judged():
    alike = {"texts": ["a"] * 8, "finished": 0.0, "entropy": 0.0}
    recorded, endless = Watch(WatchConfig(), drawn=False), Watch(WatchConfig(), stops=False)
    for step in range(1, 20):
        assert seen(recorded, step, **alike) == []
        assert seen(endless, step, finished=0.0) == []


def test_verdicts_on_pairs_may_be_missing():
    watch = Watch(WatchConfig())
    pairs = np.full((4, 2, 2), 0.5, np.float32)
    valid = np.zeros((4, 2, 2), bool)
    none = np.zeros((8, 0), np.float32)
    batch = RewardBatch(np.zeros(8), np.ones(8, bool), np.zeros((8, 2)), pairs, valid)
    records = [{"prompt": str(i // 2)} for i in range(8)]
    (text,) = watch.see(1, records, list("abcdefgh"), batch, Feedback(none, none.astype(bool)), {"finished": 1.0})
    assert "all judgements are missing" in text


def test_the_state_goes_through_json_and_the_watch_goes_on_as_before():
    whole, parts = Watch(WatchConfig()), Watch(WatchConfig())
    opinions = {0: 0.9, 4: 0.5, 8: 0.2}
    for watch in (whole, parts):
        watch.evaluated(0, {"second_opinion": opinions[0], "second_opinion_se": 0.01})
    said = []
    for step in range(1, 12):
        more = {"second_opinion": opinions[step], "second_opinion_se": 0.01} if step in opinions else {}
        given = {"reward": float(step), "kl": 0.1 if step < 9 else 30.0, "finished": float(step < 3)} | more
        said += seen(whole, step, **given)
        seen(parts, step, **given)
        state = json.loads(json.dumps(parts.get_state()))
        parts = Watch(WatchConfig())
        assert parts.set_state(state) == said
    assert [
        part
        for text in said
        for part in ("reward rose", "has diverged", "leapt to", "more than the limit")
        if part in text
    ] == ["reward rose", "has diverged", "leapt to", "more than the limit"]
    assert parts.get_state() == json.loads(json.dumps(whole.get_state()))
