"""Evaluation of a policy and the comparison before and after, on a model of a few words."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rlaif_jax.algorithms.advantages import LeaveOneOut
from rlaif_jax.algorithms.optimizer import OptimizerConfig
from rlaif_jax.algorithms.ppo import PPOConfig
from rlaif_jax.config import UserError
from rlaif_jax.data.prompts import prompt_batches
from rlaif_jax.data.readers import jsonl_records
from rlaif_jax.data.tokenizers import word_level_tokenizer
from rlaif_jax.evaluate import Answers, Evaluation, rewards_of, token_values
from rlaif_jax.feedback.sources import FunctionSource
from rlaif_jax.metrics import MetricsWriter
from rlaif_jax.models import CausalLM
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.lora import LoRAConfig
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import JitRunner, ParallelConfig
from rlaif_jax.policies.text import TextPolicy
from rlaif_jax.recipes.improve import (
    comparison,
    fluency,
    improve,
    normaliser_of,
    token_credit,
    value_changes,
    with_critic,
    worst_prompts,
)
from rlaif_jax.run import Run
from rlaif_jax.train import TrainConfig
from rlaif_jax.types import Frozen, Rollout
from tests.builders import LENGTH, PROMPT, ppo
from tests.helpers import unexplained

TOKENIZER = word_level_tokenizer(tuple("abcdefgh"))
MODEL = CausalLM(small_decoder(TOKENIZER.vocab_size, num_layers=1, width=16, num_heads=2, context_length=12))
POLICY = TextPolicy(MODEL, SamplingConfig(max_new_tokens=4), TOKENIZER.eos_id, TOKENIZER.pad_id)
HOW = ("random", "worst")
SOURCE = FunctionSource(lambda record, answer: None if answer.startswith("b") else float(answer.count("a")))


def answers(scores, lengths):
    mask = jnp.arange(4) < jnp.array(lengths)[:, None]
    tokens = jnp.arange(len(lengths) * 4).reshape(-1, 4)
    return Answers(SimpleNamespace(response_mask=mask, responses=tokens), [], np.array(scores), None)


def test_the_comparison_is_of_pairs_with_both_scores():
    before, after = answers([1.0, 2.0, 3.0, np.nan], [1, 2, 3, 4]), answers([2.0, 2.0, 5.0, 9.0], [2, 2, 2, 2])
    found = comparison("gold", before, after, seed=0)
    assert found["win_rate_gold"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert found["gain"] == 1.0
    assert (found["gold_before"], found["gold_after"]) == (2.0, 4.5)
    assert (found["length_before"], found["length_after"]) == (2.5, 2.0)
    assert found["gain_ci95"][0] <= found["gain"] <= found["gain_ci95"][1]


def test_the_worst_prompts_are_those_that_lost_most():
    before = answers([1.0, 2.0, np.nan, 3.0, 1.0], [1] * 5)
    after = answers([0.0, 2.0, 0.0, 0.5, np.nan], [1] * 5)
    assert worst_prompts(before, after, 2) == [3, 0]
    assert worst_prompts(before, after, 9) == [3, 0, 1]


def test_the_prompts_of_samples_are_drawn_by_the_seed(records):
    prompts = next(batches(records, 16))
    evaluation = lambda seed: Evaluation(POLICY, TOKENIZER, JitRunner(), prompts, seed, source=SOURCE)
    drawn = [tuple(evaluation(seed).random_prompts(4)) for seed in range(8)]
    assert len(set(drawn)) > 4
    assert drawn[0] == tuple(evaluation(0).random_prompts(4))
    assert all(len(set(places)) == 4 and max(places) < 16 for places in drawn)
    assert evaluation(0).random_prompts(99) == list(range(16))


def test_the_normaliser_leaves_missing_rewards_out():
    normaliser = normaliser_of(np.array([1.0, np.nan, 3.0], np.float32))
    assert (float(normaliser.mean), float(normaliser.std)) == (2.0, 1.0)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{a} {b}"}) + "\n" for a in "abcd" for b in "efgh"))
    return jsonl_records(path)


def batches(records, size):
    return prompt_batches(records, TOKENIZER, batch_size=size, seed=0, prompt_length=4)


def test_an_evaluation_needs_a_score(records):
    with pytest.raises(UserError, match="a measure or a source"):
        Evaluation(POLICY, TOKENIZER, JitRunner(), next(batches(records, 4)), 0)


def test_answers_that_nobody_judged_have_no_score_that_could_be_taken_for_one(params, records):
    prompts = next(batches(records, 16))
    asked = []
    people = FunctionSource(lambda record, answer: asked.append(answer) or 1.0)
    nobody = FunctionSource(lambda record, answer: None)
    whole = Evaluation(POLICY, TOKENIZER, JitRunner(), prompts, 0, source=people, second=people)
    evaluation = dataclasses.replace(whole, during_training=(nobody, None))
    during = evaluation.answers(params, judged=False)
    assert asked == [] and np.isnan(during.scores).all() and during.second is None
    assert set(evaluation.metrics(during)) == {"eval_length", "distinct2"}
    found = comparison("gold", during, during, 0)
    assert set(found) == {"length_before", "length_after", "distinct2_before", "distinct2_after"}
    assert worst_prompts(during, during, 3) == []
    assert len(asked) == 0 and evaluation.answers(params).scores.tolist() == [1.0] * 16
    assert len(asked) == 32, "before and after training by both"


def test_a_second_opinion_has_a_mean_and_its_standard_error(params, records):
    prompts = next(batches(records, 16))
    alone = Evaluation(POLICY, TOKENIZER, JitRunner(), prompts, 0, source=SOURCE)
    assert alone.answers(params).second is None
    assert "second_opinion" not in alone.metrics(alone.answers(params))
    second = FunctionSource(lambda record, answer: None if answer.startswith("c") else float(len(answer.split())))
    evaluation = dataclasses.replace(alone, second=second)
    found = evaluation.answers(params, judged=False)
    known = np.array([len(text.split()) for text in found.texts if not text.startswith("c")], float)
    assert 2 < len(known) < 16
    metrics = evaluation.metrics(found)
    assert metrics["second_opinion"] == pytest.approx(known.mean())
    assert metrics["second_opinion_se"] == pytest.approx(known.std(ddof=1) / np.sqrt(len(known)))
    nobody = dataclasses.replace(alone, second=FunctionSource(lambda record, answer: None))
    assert np.isnan(nobody.metrics(nobody.answers(params))["second_opinion"])


def reference_logprob(params, rollout) -> float:
    """Returns the mean log-prob of the answers' tokens, by the logits of the whole texts."""
    tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.response_mask)
    whole = np.concatenate([np.asarray(rollout.prompt_mask), mask], 1)
    hidden = MODEL.sequence_hidden(params, rollout.tokens, whole)
    logprobs = np.asarray(jax.nn.log_softmax(MODEL.logits(params, hidden), axis=-1), np.float64)
    start = tokens.shape[1] - mask.shape[1]
    said = np.take_along_axis(logprobs[:, start - 1 : -1], tokens[:, start:, None], -1)[..., 0]
    return float(said[mask].mean())


def test_the_change_of_fluency_has_an_interval_over_prompts():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 9, (300, 2))
    each = rng.normal(0, 1, (300, 1)) + np.array([0.0, 0.5]) + rng.normal(0, 0.1, (300, 2))
    found = fluency(each * tokens, tokens)
    # By the delta method: a mean is sum(w x) / sum(w), and what a prompt moves it by is w (x - mean) / sum(w).
    means = (each * tokens).sum(0) / tokens.sum(0)
    moved = np.diff(tokens * (each - means) / tokens.mean(0), axis=1)[:, 0]
    half = stats.t.ppf(0.975, 299) * stats.sem(moved)
    assert found.pop("reference_logprob_change_ci95") == pytest.approx(
        [means[1] - means[0] - half, means[1] - means[0] + half], rel=1e-3
    )
    assert found == pytest.approx(
        {
            "reference_logprob_before": means[0],
            "reference_logprob_after": means[1],
            "reference_logprob_change": means[1] - means[0],
        }
    )
    assert "reference_logprob_change_ci95" not in fluency(each[:1], tokens[:1])


def test_before_train_after(params, records, tmp_path):
    prompts = next(batches(records, 16))
    gold = lambda records, texts: np.array([len(text.split()) for text in texts], np.float32)
    reasons = lambda records, texts: [f"{record['prompt']}: {text}" for record, text in zip(records, texts)]
    evaluation = Evaluation(POLICY, TOKENIZER, JitRunner(), prompts, 0, measure=gold, source=SOURCE, reasons=reasons)
    before = evaluation.answers(params)
    again = evaluation.answers(params, judged=False)
    assert (again.texts, again.rewards) == (before.texts, None)
    np.testing.assert_array_equal(before.rewards, rewards_of(SOURCE, prompts.records, before.texts, before.rollout))
    np.testing.assert_allclose(evaluation.log_ratio(params, before), 0, atol=1e-5)
    config = TrainConfig(steps=2, prompts_per_step=16, prompt_length=4, parallel=ParallelConfig(mode="shard", data=1))
    ppo = PPOConfig(num_epochs=1)
    critic, parts = with_critic(ppo, MODEL, params, params["trunk"], jax.random.key(1))
    with (
        Run(tmp_path / "run", "tiny", config, seed=0) as run,
        MetricsWriter(tmp_path / "run", terminal=False) as writer,
    ):
        found = improve(
            config,
            run,
            writer,
            algorithm=ppo.build(POLICY, critic, steps=2),
            evaluation=evaluation,
            params=parts,
            prompts=batches(records, 16),
            feedback=SOURCE,
            normaliser=normaliser_of(before.rewards),
            before=before,
        )
    assert found.before is before
    assert len(found.after.texts) == 16
    log_ratio = evaluation.log_ratio(params, found.after)
    assert run.metrics["kl"] == float(log_ratio.sum(-1).mean())
    mask, own = (np.asarray(x) for x in (found.after.rollout.response_mask, found.after.rollout.logprobs))
    logprob = run.metrics["reference_logprob_after"]
    assert logprob == pytest.approx(reference_logprob(params, found.after.rollout), abs=1e-5)
    assert run.metrics["kl"] == pytest.approx((own[mask].mean() - logprob) * mask.sum() / len(mask), abs=1e-5)
    assert run.metrics["reference_logprob_before"] == pytest.approx(reference_logprob(params, before.rollout), abs=1e-5)
    low, high = run.metrics["reference_logprob_change_ci95"]
    change = run.metrics["reference_logprob_change"]
    assert change == pytest.approx(logprob - run.metrics["reference_logprob_before"]) and low < change < high
    samples = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    assert {(s["stage"], s["step"]) for s in samples} == {("before", 0), ("rl", 0), ("rl", 2), ("after", 2)}
    assert all(s["reward"] is None for s in samples if s["stage"] == "rl")
    assert any(s["reward"] is not None for s in samples if s["stage"] == "before")
    assert all(s["reasons"] == f"{s['prompt']}: {s['response']}" for s in samples)
    for stage, answers in (("before", before), ("after", found.after)):
        written = {how: [s["index"] for s in samples if (s["stage"], s["chosen"]) == (stage, how)] for how in HOW}
        assert written == {"random": list(range(16)), "worst": worst_prompts(before, found.after, 6)}
        for s in samples:
            if s["stage"] == stage:
                assert (s["prompt"], s["response"]) == (
                    prompts.records[s["index"]]["prompt"],
                    answers.texts[s["index"]],
                )
    assert unexplained(run.folder) == []
    assert {s.get("credit") for s in samples if s["stage"] == "after"} == {"value_change"}
    assert not any("tokens" in s for s in samples if s["stage"] != "after")
    for s in samples:
        if s["stage"] == "after":
            texts, numbers = zip(*s["tokens"])
            assert "".join(texts) == s["response"]
            assert numbers[-1] is None and None not in numbers[:-1], "the reward decides about the last token alone"
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["gold"] == run.metrics["gold_before"]
    assert lines[-1]["gold"] == run.metrics["gold_after"]


@pytest.mark.slow
def test_an_adapter_is_trained_and_evaluated_over_its_base(tmp_path, params, records):
    """The answers and the KL of an adapter are those of the merged policy."""
    lora, prompts = LoRAConfig(rank=2, alpha=8.0), next(batches(records, 16))
    whole = Evaluation(POLICY, TOKENIZER, JitRunner(), prompts, 0, source=SOURCE)
    policy = dataclasses.replace(POLICY, lora=lora)
    evaluation = dataclasses.replace(whole, policy=policy, frozen=Frozen(base=params))
    config = TrainConfig(steps=2, prompts_per_step=16, prompt_length=4, parallel=ParallelConfig(mode="shard", data=1))
    rate = OptimizerConfig(learning_rate=3e-2, schedule="constant")
    ppo = PPOConfig(advantage=LeaveOneOut(), answers_per_prompt=2, kl_in="loss", policy_optimizer=rate)
    with (
        Run(tmp_path / "run", "tiny", config, seed=0) as run,
        MetricsWriter(tmp_path / "run", terminal=False) as writer,
    ):
        found = improve(
            config,
            run,
            writer,
            algorithm=ppo.build(policy, None, steps=2),
            evaluation=evaluation,
            params={"policy": lora.init(jax.random.key(0), params)},
            prompts=batches(records, 16),
            feedback=SOURCE,
        )
    merged = lora.merge(params, found.params)
    after = whole.answers(merged)
    assert after.texts == found.after.texts
    np.testing.assert_array_equal(found.before.rollout.tokens, whole.answers(params).rollout.tokens)
    assert run.metrics["kl"] == pytest.approx(whole.log_ratio(params, after).sum(-1).mean(), abs=1e-4)
    assert run.metrics["kl"] > 1e-3


# ---- What each token did

LETTERS = word_level_tokenizer(("a", "b", "c"))  # ids 4, 5, 6; stop 2, unknown 3
NAN = float("nan")


def test_value_changes_by_hand():
    """The last token of an answer has none; values behind the answer are not read."""
    values = np.array([[1.0, 1.5, 0.5, 9.0], [2.0, 9.0, 9.0, 9.0], [0.0, 1.0, 3.0, 6.0]])
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], bool)
    expected = [[0.5, -1.0, NAN, NAN], [NAN] * 4, [1.0, 2.0, 3.0, NAN]]
    np.testing.assert_array_equal(value_changes(values, mask), expected)


def test_credit_is_by_the_critic_where_there_is_one():
    """Against the critic applied to whole sequences: the value before a token is at the column before it."""
    setup = ppo()
    rng = np.random.default_rng(0)
    rows = 6
    mask = np.arange(LENGTH) < rng.integers(1, LENGTH + 1, rows)[:, None]
    tokens = rng.integers(4, 12, (rows, PROMPT + LENGTH)).astype(np.int32)
    drawn = Rollout(tokens, np.ones((rows, PROMPT), bool), mask, np.zeros(mask.shape), mask.sum(1) < LENGTH)
    answers = Answers(drawn, [""] * rows, np.zeros(rows), None)
    log_ratio = rng.normal(size=mask.shape)
    found = token_credit(setup.algorithm, setup.params, Frozen(), answers, log_ratio)
    every = np.concatenate([np.ones((rows, PROMPT), bool), mask], axis=1)
    values = np.asarray(setup.algorithm.critic(setup.params["value"], tokens, every))[:, PROMPT - 1 :]
    expected = np.where(mask[:, 1:], values[:, 1:LENGTH] - values[:, : LENGTH - 1], NAN)
    assert found.kind == "value_change" and np.nanmax(np.abs(expected)) > 0.01
    np.testing.assert_allclose(found.values[:, :-1], expected, atol=1e-5)
    without = ppo(advantage=LeaveOneOut(), answers_per_prompt=2, kl_in="loss").algorithm
    assert token_credit(without, setup.params, Frozen(), answers, log_ratio) == ("log_ratio", log_ratio)


def rollout(*ids, finished):
    tokens = np.zeros((1, 1 + 6), np.int32)
    tokens[0, 1 : 1 + len(ids)] = ids
    mask = np.arange(6)[None] < len(ids)
    return Rollout(tokens, np.ones((1, 1), bool), mask, np.zeros((1, 6)), jnp.array([finished]))


@pytest.mark.parametrize(
    "ids, finished, answer, expected",
    [
        ((4, 5, 2), True, "a b", [("a", 0.5), (" b", -1.0), ("", 0.1235)]),
        ((4, 5), False, "a b", [("a", 0.5), (" b", -1.0)]),
        ((2,), True, "", [("", 0.5)]),
        ((4, 5, 6, 5), False, "b c", [("", 0.5), ("b", -1.0), (" c", 0.1235), ("", None)]),
        ((4, 5, 2), True, "b a", None),
    ],
)
def test_the_texts_of_a_samples_tokens_are_its_answer(ids, finished, answer, expected):
    """The stop token has no text; without blanks at its ends an answer is a part of the tokens' text."""
    values = np.array([0.5, -1.0, 0.12345, NAN, 7.0, 7.0])
    assert token_values(LETTERS, rollout(*ids, finished=finished), 0, answer, values) == expected
