"""Rewards as lines of words, their names, and the sources that they build."""

from __future__ import annotations

import dataclasses
import re
import shutil
from contextlib import ExitStack
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.config import UserError, from_json, to_json
from rlaif_jax.data.tokenizers import word_level_tokenizer
from rlaif_jax.feedback.joined import JoinedSource
from rlaif_jax.feedback.records.forms import Rating
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.feedback.sources import FunctionSource
from rlaif_jax.feedback.verifiers.functions import PythonFunction
from rlaif_jax.feedback.verifiers.number import Number
from rlaif_jax.feedback.verifiers.texts import Regex
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.heads import ScalarModel
from rlaif_jax.models.hf.classifiers import save_reward_model
from rlaif_jax.parallel import JitRunner, PmapRunner
from rlaif_jax.recipes.judge_rewards import ApiReward, JudgeReward, Surroundings
from rlaif_jax.recipes.rewards import (
    KINDS,
    ModelReward,
    PeopleReward,
    RulesReward,
    SimulatedReward,
    WeightedReward,
    build_reward,
    people_scales,
    people_words,
    read_reward,
    reward_line,
    reward_names,
    rewards_help,
    settings_help,
    sparing,
)
from tests.helpers import random_params

CONSTITUTION = Path(__file__).resolve().parents[2] / "experiments" / "constitution.toml"

LINES = {
    "judge models/smollm2": WeightedReward(JudgeReward("models/smollm2")),
    "judge m form=ranking against=answer 'principle=Be brief.' weight=0.5": WeightedReward(
        JudgeReward("m", "ranking", "answer", "Be brief."), 0.5
    ),
    "api http://127.0.0.1:8000/v1 model=qwen budget_usd=2 usd_per_million_prompt=1 name=critic": WeightedReward(
        ApiReward("http://127.0.0.1:8000/v1", "qwen", budget_usd=2.0, usd_per_million_prompt=1.0), name="critic"
    ),
    "rules a.toml": WeightedReward(RulesReward(Path("a.toml"))),
    "people rank overlap=2 limit=9": WeightedReward(PeopleReward("rank", overlap=2, limit=9)),
    "simulated taste.py:quality raters=3": WeightedReward(SimulatedReward("taste.py:quality", 3)),
    "function rewards.py:brevity weight=-1": WeightedReward(PythonFunction("rewards.py:brevity"), -1.0),
    "number field=result": WeightedReward(Number(field="result")),
    "regex '^a=b'": WeightedReward(Regex("^a=b")),
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_a_reward_and_comes_back(line):
    reward = read_reward(line)
    assert reward == LINES[line]
    assert read_reward(reward_line(reward)) == reward
    assert from_json(WeightedReward, to_json(reward)) == reward


def test_every_reward_has_a_name_of_its_kind_or_a_given_one():
    lines = ["judge a", "function x:y", "judge b", "function x:z name=brevity", "judge c name=judge"]
    assert reward_names([read_reward(line) for line in lines]) == ("judge", "function", "judge_2", "brevity", "judge_3")


def test_help_names_every_kind_with_its_settings(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = rewards_help()
    assert all(f"\n  {word}: " in f"\n{text}" for word in KINDS)
    assert {"form=rating,", "budget_usd=None,", "requests_per_minute=None,"} <= set(text.split())
    assert max(map(len, text.splitlines())) <= 100 and len(text.splitlines()) < 60


@pytest.mark.parametrize("width", [60, 132])
def test_further_help_explains_each_setting_of_each_kind(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    text = settings_help()
    assert all(len(line) <= width for line in text.splitlines())
    for word, kind in [("Of every kind", WeightedReward), *KINDS.items()]:
        part = text.partition(f"\n\n{word}:")[2].partition("\n\n")[0]
        settings = re.findall(r"^  (\w+)(?:=\S*)?\s+(\S+ \S+)", part, re.MULTILINE)
        assert [name for name, _ in settings] == [f.name for f in dataclasses.fields(kind) if f.name != "reward"]


def test_explanations_name_defaults_choices_and_what_is_inherited(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    lines = [" ".join(line.split()) for line in settings_help().splitlines()]
    assert "budget_usd=None stop before more is spent; None = no limit." in lines
    assert "dtype=float32 of the judge's matrix products (float32, bfloat16)." in lines
    assert "field=answer the record's field: a text or number, or a list of those that are right." in lines


# ---- Sources


@pytest.fixture
def around(tmp_path):
    with ExitStack() as opened:
        yield Surroundings(tmp_path, 3, JitRunner(), lambda: False, opened)


def judged(source, answers):
    records = [{"prompt": f"Question {i}?"} for i in range(len(answers))]
    return source(records, answers, None)


def test_rules_are_a_constitution_without_a_model(around):
    source = build_reward(RulesReward(CONSTITUTION), around)
    found = judged(source, ["I do not know, perhaps.", "You idiot."])
    assert found.valid.all() and found.values[0, 0] > found.values[1, 0]


def test_a_simulated_crowd_rates_by_the_quality_and_its_ratings_are_kept(around, tmp_path):
    (tmp_path / "taste.py").write_text("def quality(answer):\n    return min(len(answer) / 20, 1.0)\n")
    config = SimulatedReward(f"{tmp_path}/taste.py:quality", overlap=3)
    source = build_reward(config, around)
    answers = ["", "a" * 5, "a" * 10, "a" * 15, "a" * 20] * 8
    found = judged(source, answers)
    means = found.values[:, 0].reshape(8, 5).mean(0)
    assert found.valid.all() and (np.diff(means) > 0).all()
    assert np.array_equal(judged(source, answers).values, found.values), "the noise depends on what is judged alone"
    with Store(around.store) as store:
        kept = list(store.judgements())
    assert len(kept) == 3 * len(answers) and all(isinstance(entry, Rating) for entry in kept)
    assert {entry.rater.source for entry in kept} == {"simulated"} and len({entry.rater.name for entry in kept}) == 5


LETTERS = word_level_tokenizer(tuple("abcdefgh"))
SCORER = ScalarModel(
    small_decoder(LETTERS.vocab_size, num_layers=1, width=16, num_heads=2, context_length=16), "normal", bias=False
)
TEXTS = [("a b", "c"), ("d", "e f g h"), ("h", ""), ("a", "b c d e f g h")]


def own_scores(params):
    """The scores of the texts that fit into 8 tokens, each alone and without padding."""
    scores = []
    for prompt, answer in TEXTS[:3]:
        ids = jnp.array([[*LETTERS.encode(f"{prompt} {answer}", add_bos=True), LETTERS.eos_id]])
        scores.append(float(SCORER(params, ids, jnp.ones_like(ids, bool))[0, -1]))
    return scores


@pytest.mark.parametrize("name", ["rm", "run"])
def test_a_reward_model_scores_what_it_has_learned_to_read(around, tmp_path, name):
    """Named by its own folder, or by that of the run that wrote it."""
    params = random_params(SCORER)
    save_reward_model(tmp_path / {"rm": "rm", "run": "run/model"}[name], SCORER, params, LETTERS)
    source = build_reward(ModelReward(str(tmp_path / name), batch_size=2, max_length=8), around)
    found = source([{"prompt": prompt} for prompt, _ in TEXTS], [answer for _, answer in TEXTS])
    assert found.valid[:, 0].tolist() == [True, True, True, False]
    assert source.missing() == {"prompt and answer are longer than 8 tokens": 1}
    np.testing.assert_allclose(found.values[:3, 0], own_scores(params), atol=1e-5)


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    """The folder of a run with three members, and their own scores [3 members, 3 texts]."""
    run = tmp_path_factory.mktemp("ensemble")
    members = [random_params(SCORER, seed) for seed in range(3)]
    for number, params in enumerate(members):
        save_reward_model(run / f"model_{number}", SCORER, params, LETTERS)
    return run, np.array([own_scores(params) for params in members])


COMBINED = {
    "": lambda scores: scores.mean(0),
    "combine=worst": lambda scores: scores.min(0),
    "combine=cautious coef=2": lambda scores: scores.mean(0) - 2 * scores.var(0),
}


@pytest.mark.parametrize("runner", [JitRunner, PmapRunner])
@pytest.mark.parametrize("combine", COMBINED)
def test_the_members_of_an_ensemble_make_one_score(around, ensemble, runner, combine):
    run, scores = ensemble
    around = dataclasses.replace(around, runner=runner())
    source = build_reward(read_reward(f"model {run} max_length=8 batch_size=2 {combine}").reward, around)
    found = source([{"prompt": prompt} for prompt, _ in TEXTS], [answer for _, answer in TEXTS])
    assert found.valid[:, 0].tolist() == [True, True, True, False]
    np.testing.assert_allclose(found.values[:3, 0], COMBINED[combine](scores), atol=1e-5)
    assert np.ptp(scores, axis=0).min() > 0.01, "the members differ"


def test_an_ensemble_has_a_score_where_each_member_has_one(around, ensemble):
    """What is no number ends a run, as with one reward model: it is no reward of the others."""
    run, _ = ensemble
    source = build_reward(ModelReward(str(run), "worst", max_length=8, batch_size=2), around)
    jax.tree.leaves(source.params)[0][1] = np.nan
    assert np.isnan(source([{"prompt": "a"}], ["b"]).values).all()


def test_members_that_do_not_go_together_are_refused(around, ensemble, tmp_path):
    run, _ = ensemble
    for number in (0, 1):
        shutil.copytree(run / f"model_{number}", tmp_path / f"model_{number}")

    def refused(message, **settings):
        with pytest.raises(UserError, match=message):
            build_reward(ModelReward(str(tmp_path), **settings), around)

    wider = ScalarModel(dataclasses.replace(SCORER.config, mlp_width=40), "normal", bias=False)
    save_reward_model(tmp_path / "model_2", wider, random_params(wider), LETTERS)
    refused("model_2: this member of the ensemble has another shape than .*model_0")
    save_reward_model(tmp_path / "model_2", SCORER, random_params(SCORER), word_level_tokenizer(tuple("hgfedcba")))
    refused("model_2: this member of the ensemble has another tokenizer or chat template than .*model_0")
    (tmp_path / "model_2").rename(tmp_path / "model_3")
    refused("an ensemble of reward models is model_0, model_1 ...; here are model_0, model_1, model_3")
    shutil.copytree(run / "model_0", tmp_path / "model")
    refused("it holds `model` and `model_0`; name one of them")
    for number in (0, 1, 3):
        shutil.rmtree(tmp_path / f"model_{number}")
    refused("combine=worst is for several members .* here is one", combine="worst")
    with pytest.raises(UserError, match="'model x coef=-1': coef must be a number from 0 up, not -1"):
        read_reward("model x coef=-1")
    with pytest.raises(UserError, match="coef=2 is for combine=cautious; combine=worst has no coefficient"):
        read_reward("model x combine=worst coef=2")
    assert read_reward("model x combine=cautious coef=2").reward.coef == 2


@pytest.mark.parametrize(
    ("line", "record", "answers", "values"),
    [
        ("number", {"answer": "12"}, ["so 12", "3", "none"], [1, 0, 0]),
        ("exact-match field=gold", {"gold": ["yes", "Yes, it is"]}, ["Yes", "no", "yes, it is."], [1, 0, 1]),
        ("regex '^[ab]+$'", {}, ["abba", "c", "a"], [1, 0, 1]),
        (
            "constraints",
            {"constraints": [{"type": "max_words", "count": 2}, {"type": "without_word", "word": "no"}]},
            ["one two", "no", "one two three no"],
            [1, 0.5, 0],
        ),
        (
            "unit-tests allow_code_execution=true",
            {"tests": ["assert f(1) == 2", "assert f(2) == 3"]},
            ["```python\ndef f(x):\n    return x + 1\n```", "```python\ndef f(x):\n    return 2\n```", "no code"],
            [1, 0.5, 0],
        ),
    ],
)
def test_a_verifier_is_a_line_too(around, line, record, answers, values):
    source = build_reward(read_reward(line).reward, around)
    found = source([{"prompt": "?", **record}] * len(answers), answers, None)
    assert found.valid.all() and found.values[:, 0].tolist() == values


def test_people_are_asked_at_the_runs_own_store(around):
    source = build_reward(PeopleReward("rank", timeout_s=1), around)
    assert source.store == around.folder / "feedback.sqlite" and source.kind.name == "rank"


def test_people_are_left_out_where_their_time_would_be_wasted():
    """Who ranks is never asked about the one answer to a held-out prompt; nobody is asked for a scale."""
    rewards = [PeopleReward("rank"), PythonFunction("builtins:len"), PeopleReward("rate")]
    score = FunctionSource(lambda record, answer: float(len(answer)))
    source = JoinedSource((score, score, score), ("order", "length", "marks"))
    none, held_out = (sparing(source, rewards, held_out=held_out) for held_out in (False, True))
    assert (none.names, held_out.names) == (source.names, source.names)
    assert judged(none, ["a", "bb"]).valid.tolist() == [[False, True, False]] * 2
    assert judged(held_out, ["a", "bb"]).valid.tolist() == [[False, True, True]] * 2
    assert judged(held_out, ["a", "bb"]).values[:, 2].tolist() == [1, 2]
    assert not any(none.missing().values()), "what nobody was asked for is not counted"
    scales = people_scales(source.names, rewards)
    spread = np.linspace(0, 1, 100_001)
    assert set(scales) == {"order", "marks"}
    np.testing.assert_allclose(scales["order"], [spread.mean(), spread.std()], rtol=1e-4)


@pytest.mark.parametrize(
    "kinds, words",
    [
        ((), ""),
        (("rank", "compare"), "training steps alone; evaluations in between do not wait"),
        (
            ("rank", "rate"),
            "training steps, and who rates also about the held-out answers before and after it; evaluations",
        ),
    ],
)
def test_what_people_are_asked_is_said(kinds, words):
    found = people_words([PythonFunction("builtins:len"), *map(PeopleReward, kinds)])
    assert words in found and bool(found) == bool(kinds)
