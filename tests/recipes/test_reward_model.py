"""A reward model from files of feedback to a folder: measurements by hand, whole runs on a language of a few words."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from rlaif_jax.algorithms.fit import FitConfig
from rlaif_jax.config import UserError
from rlaif_jax.data.prompts import prompt_batches
from rlaif_jax.data.text import held_out_mask
from rlaif_jax.data.tokenizers import word_level_tokenizer
from rlaif_jax.feedback.judges.reward_model import RewardModel, Scorer
from rlaif_jax.feedback.judges.reward_pairs import Pairs, bucket_widths, conversation_of, tokenize, training_buckets
from rlaif_jax.feedback.records.comparisons import Comparison, Comparisons
from rlaif_jax.feedback.records.exchange import Detected
from rlaif_jax.feedback.records.formats.rows import pair
from rlaif_jax.feedback.records.forms import Rater, Rating
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.models import CausalLM, ScalarModel
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.hf.classifiers import load_reward_model
from rlaif_jax.models.hf.files import load_model, save_model
from rlaif_jax.models.lora import TARGETS, LoRAConfig
from rlaif_jax.parallel import JitRunner, ParallelConfig, PmapRunner
from rlaif_jax.recipes import reward_model as recipe
from rlaif_jax.recipes.reward_model import RewardModelConfig, main, measure, read_comparisons, running_check
from rlaif_jax.types import Rollout
from tests.helpers import CountingRunner, assert_same_leaves, random_params, unexplained
from tests.sinks.wandb_file import KEPT, assert_same_numbers
from tests.tiny import numbers

WORDS = tuple("abcdefghijkl")
TOKENIZER = word_level_tokenizer(WORDS)
DECODER = small_decoder(TOKENIZER.vocab_size, num_layers=1, width=16, num_heads=2, context_length=32)
ANNA = Rater("anna", "person")
START = "\n\nHuman: {}\n\nAssistant:"


def drawn_pairs(count: int = 160, seed: int = 0) -> list:
    """Pairs of answers of which the one with more a is better; prompts come twice."""
    rng = np.random.default_rng(seed)
    made = []
    while len(made) < count:
        prompt = " ".join(rng.choice(list("ijkl"), 3))
        answers = [" ".join(rng.choice(list("abc"), rng.integers(2, 9))) for _ in range(2)]
        counts = [answer.count("a") for answer in answers]
        if answers[0] != answers[1]:
            made.append(pair(prompt, answers, None if counts[0] == counts[1] else int(counts[1] > counts[0]), ANNA))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model, a store of pairs, and pairs and ratings as a file of a tool."""
    path = tmp_path_factory.mktemp("inputs")
    model = CausalLM(DECODER)
    save_model(path / "lm", model, random_params(model, scale=0.2), TOKENIZER)
    with Store(path / "pairs.sqlite") as store:
        store.add(drawn_pairs())
    return path


def config(folder: Path, out: Path, **changes) -> RewardModelConfig:
    base = RewardModelConfig(
        model=str(folder / "lm"),
        feedback=(folder / "pairs.sqlite",),
        out=out,
        max_length=16,
        held_out=0.25,
        fit=FitConfig(updates=30, batch_size=16, learning_rate=1e-2),
        check_every=10,
        parallel=ParallelConfig("shard", 1),
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A run and its metrics."""
    out = tmp_path_factory.mktemp("run") / "one"
    return out, main(config(folder, out, seed=5, tracking=KEPT))


def test_a_run_is_shown_on_wandb(whole):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    assert_same_numbers(whole[0])


def test_a_run_learns_measures_saves_and_explains(whole):
    out, metrics = whole
    low, high = metrics["heldout_accuracy_ci95"]
    assert 0.6 < low < metrics["heldout_accuracy"] < high
    assert metrics["longer_accuracy"] < metrics["heldout_accuracy"]
    assert metrics["pairs_learned"] + metrics["pairs_heldout"] <= 160
    assert 0.5 < metrics["columns_filled"] <= 1
    assert unexplained(out) == []
    rows = numbers(out)
    checks = [(row["step"], row["heldout_loss"]) for row in rows if "heldout_loss" in row]
    assert [step for step, _ in checks] == [0, 10, 20, 30] and checks[-1][1] < checks[0][1]
    summary = json.loads((out / "summary.json").read_text())
    assert "higher score" in summary["story"][0]
    passes = 30 * 16 / metrics["pairs_learned"]
    assert (
        f"are {passes:.1f} passes over the" in summary["warnings"][0]
        and "Try: --fit.updates 8" in summary["warnings"][0]
    )
    assert (out / "report.html").exists()


def test_the_saved_model_scores_rollouts_as_measured(whole, folder):
    """What is learned, measured, saved and used as a reward in training are the same tokens and scores."""
    out, _ = whole
    model, params, tokenizer = load_reward_model(out / "model")
    texts = [("i j", "a b a"), ("k", "c c c c b")]
    found = Comparisons([Comparison(p, (a, "b"), 1.0, 0.0, 1.0) for p, a in texts], Counter())
    pairs = tokenize(found, tokenizer, max_length=16, add_bos=True, unused=Counter())
    scores = Scorer(model, JitRunner(), 4, tokenizer.pad_id)(jax.tree.map(lambda x: x[None], params), pairs.ids)
    batch = next(prompt_batches(
        [{"prompt": p} for p, _ in texts], tokenizer, batch_size=2, seed=0, prompt_length=5, add_bos=True, shuffle=False
    ))  # fmt: skip
    responses, mask = np.full((2, 8), tokenizer.pad_id, np.int32), np.zeros((2, 8), bool)
    for row, (_, answer) in enumerate(texts):
        ids = [*tokenizer.encode(answer), tokenizer.eos_id]
        responses[row, : len(ids)], mask[row, : len(ids)] = ids, True
    rollout = Rollout(
        np.concatenate([batch.tokens, responses], 1), batch.mask, mask, np.zeros((2, 8), np.float32), np.ones(2, bool)
    )
    reward = jax.jit(RewardModel(model))(params, rollout)
    np.testing.assert_allclose(np.asarray(reward.values)[:, 0], scores[:, 0, 0], atol=1e-5)
    assert np.ptp(scores) > 0.1


def test_members_are_the_single_runs_of_their_seeds(whole, folder, tmp_path):
    out, _ = whole
    metrics = main(config(folder, tmp_path / "two", seed=4, members=2))
    assert unexplained(tmp_path / "two") == []
    ours, params, _ = load_reward_model(tmp_path / "two" / "model_1")
    model, alone, _ = load_reward_model(out / "model")
    assert ours == model
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)
    losses = {row["step"]: row for row in numbers(tmp_path / "two") if "member_1/loss" in row}
    for row in numbers(out):
        if "loss" in row:
            np.testing.assert_allclose(losses[row["step"]]["member_1/loss"], row["loss"], rtol=1e-3)
    assert metrics.keys() >= {"member_0/heldout_accuracy", "member_1/heldout_loss", "heldout_accuracy"}
    assert not (tmp_path / "two" / "model").exists()
    assert metrics["member_0/heldout_loss"] != metrics["member_1/heldout_loss"]


def test_a_run_that_is_stopped_goes_on_bit_for_bit(whole, folder, tmp_path, monkeypatch):
    out, _ = whole
    asked: list[int] = []

    def stop_at_the_second_question(self) -> bool:
        asked.append(1)
        self.stop_requested = len(asked) > 1
        return self.stop_requested

    monkeypatch.setattr(recipe.Run, "stopped", stop_at_the_second_question)
    stopped = config(folder, tmp_path / "run", seed=5)
    main(stopped)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "stopped" and not (tmp_path / "run" / "model").exists()
    assert [path.name for path in (tmp_path / "run" / "checkpoints" / "part").glob("*/*")] == ["20"]
    monkeypatch.undo()
    main(dataclasses.replace(stopped, resume=True))
    assert numbers(tmp_path / "run") == numbers(out)
    assert_same_leaves(load_reward_model(tmp_path / "run" / "model")[1], load_reward_model(out / "model")[1])


def test_given_pairs_are_measured_on_and_nothing_else_is_held_out(folder, tmp_path, capsys):
    swapped = dataclasses.replace(first := drawn_pairs(1)[0], answers=first.answers[::-1])
    with Store(tmp_path / "eval.sqlite") as store:
        store.add([swapped, *drawn_pairs(30, seed=1), pair("i", ("a " * 30, "b"), 0, ANNA)])
    settings = config(folder, tmp_path / "run", eval_feedback=(tmp_path / "eval.sqlite",), fit=FitConfig(2, 16))
    metrics = main(settings)
    learned, given = (
        tokenize(read_comparisons((path,), Detected(), ()), TOKENIZER, max_length=16, add_bos=True, unused=Counter())
        for path in (folder / "pairs.sqlite", tmp_path / "eval.sqlite")
    )
    known = [set(map(tuple, ids)) for ids in learned.ids]
    new = given.chosen([i for i, ids in enumerate(given.ids) if set(map(tuple, ids)) not in known])
    assert (metrics["pairs_learned"], metrics["pairs_heldout"]) == (len(known), len(new.ids))
    assert unexplained(tmp_path / "run") == [] and 20 < len(new.ids) < len(given.ids)
    missing = json.loads((tmp_path / "run" / "summary.json").read_text())["missing"]
    assert missing["eval_feedback: pair of more than max_length = 16 tokens"] == 1
    assert missing["eval_feedback: pair that is also learned"] == len(given.ids) - len(new.ids)
    assert "x eval_feedback: pair that is also learned" in capsys.readouterr().out
    model, params, _ = load_reward_model(tmp_path / "run" / "model")
    scores = Scorer(model, JitRunner(), 16, TOKENIZER.pad_id)(jax.tree.map(lambda x: x[None], params), new.ids)
    assert running_check(scores, new)["heldout_accuracy"] == pytest.approx(metrics["heldout_accuracy"], abs=1e-6)
    with Store(tmp_path / "eval.sqlite") as store:
        store.add(drawn_pairs(2, seed=2))
    with pytest.raises(
        UserError, match=r"the measured pairs are not those that this run began with .* without --resume"
    ):
        main(dataclasses.replace(settings, resume=True))


def test_adapters_learn_over_weights_that_do_not(folder, tmp_path):
    lora = {"lora": True, "adapter": LoRAConfig(rank=4)}
    metrics = main(config(folder, tmp_path / "one", seed=5, **lora))
    assert metrics["heldout_accuracy_ci95"][0] > 0.6
    model, learned, tokenizer = load_reward_model(tmp_path / "one" / "model")
    assert model.lora is None
    base = load_model(folder / "lm")[1]["trunk"]
    flat = flatten_dict(learned["trunk"])
    moved = {path for path, x in flatten_dict(base).items() if (x != flat[path]).any()}
    assert {path[-2] for path in moved} == set(TARGETS)
    # The scores of the folder are those that were measured.
    found = read_comparisons((folder / "pairs.sqlite",), Detected(), ())
    pairs = tokenize(found, tokenizer, max_length=16, add_bos=True, unused=Counter())
    held_out = pairs.chosen(np.flatnonzero(held_out_mask(pairs.conversation, 0.25, 0)))
    scores = Scorer(model, JitRunner(), 16, tokenizer.pad_id)(jax.tree.map(lambda x: x[None], learned), held_out.ids)
    assert running_check(scores, held_out)["heldout_accuracy"] == pytest.approx(metrics["heldout_accuracy"], abs=1e-6)
    assert numbers(tmp_path / "one")[-1]["heldout_loss"] == pytest.approx(
        running_check(scores, held_out)["heldout_loss"], abs=1e-4
    )


@pytest.mark.slow
def test_adapters_of_an_ensemble_go_on_bit_for_bit(folder, tmp_path, monkeypatch):
    lora = {"lora": True, "adapter": LoRAConfig(rank=4)}
    main(config(folder, tmp_path / "one", seed=5, **lora))
    alone = load_reward_model(tmp_path / "one" / "model")[1]
    stops = iter([False, True])
    monkeypatch.setattr(
        recipe.Run, "stopped", lambda run: setattr(run, "stop_requested", next(stops)) or run.stop_requested
    )
    two = config(folder, tmp_path / "two", seed=4, members=2, **lora)
    main(two)
    assert not (tmp_path / "two" / "model_0").exists()
    monkeypatch.undo()
    main(dataclasses.replace(two, resume=True))
    for a, b in zip(jax.tree.leaves(load_reward_model(tmp_path / "two" / "model_1")[1]), jax.tree.leaves(alone)):
        np.testing.assert_allclose(a, b, atol=5e-4)
    whole = dataclasses.replace(two, out=tmp_path / "whole")
    main(whole)
    assert numbers(tmp_path / "two") == numbers(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_all_devices_learn_the_same(lora, folder, tmp_path):
    main(config(folder, tmp_path / "one", seed=5, lora=lora))
    expected = load_reward_model(tmp_path / "one" / "model")[1]
    for name, parallel in {"pmap": ParallelConfig(), "mesh": ParallelConfig("shard", 2, 2, 2)}.items():
        main(config(folder, tmp_path / name, seed=5, lora=lora, parallel=parallel))
        for a, b in zip(jax.tree.leaves(load_reward_model(tmp_path / name / "model")[1]), jax.tree.leaves(expected)):
            np.testing.assert_allclose(a, b, atol=5e-4)


BAD = {
    "no model": ({"model": None}, "no model to begin with: give --model"),
    "no feedback": ({"feedback": ()}, "no feedback to learn from: give --feedback"),
    "no file": ({"feedback": (Path("nothing.jsonl"),)}, "nothing.jsonl: there is no such file of feedback"),
    "no file to measure on": (
        {"eval_feedback": (Path("nothing.jsonl"),)},
        "eval_feedback: nothing.jsonl: there is no such file of feedback",
    ),
    "nothing new to measure on": (
        {"eval_feedback": (Path("PAIRS"),)},
        r"eval_feedback: none of its \d+ pairs is left to measure on",
    ),
    "too long": ({"max_length": 64}, r"max_length \(64\) is more than .* can read: 32 tokens"),
    "too short": ({"max_length": 3}, r"no comparison .* left .*\(\d+ x pair of more than max_length = 3 tokens\)"),
    "criteria": ({"principles": ("wit",)}, "no comparison of two answers is left"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_learned_from_is_named_and_leaves_no_run(bad, folder, tmp_path):
    changes = {
        name: (folder / "pairs.sqlite",) if value == (Path("PAIRS"),) else value for name, value in BAD[bad][0].items()
    }
    with pytest.raises(UserError, match=BAD[bad][1]):
        main(config(folder, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"members": 0}, "members must be >= 1, not 0"),
        ({"max_length": 0}, "max_length must be >= 1"),
        ({"check_every": 0}, "check_every must be >= 1"),
        ({"margin": -1.0}, "margin must be >= 0 and finite, not -1"),
        ({"center_coef": -0.1}, "center_coef must be >= 0"),
        ({"split_seed": -1}, "split_seed must be >= 0, not -1"),
        ({"held_out": 1.0}, "held_out must lie between 0 and 1, not 1"),
    ],
)
def test_bad_settings_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        RewardModelConfig(**wrong)


def test_reasons_for_unused_rows_are_printed(folder, tmp_path, capsys):
    with Store(tmp_path / "more.sqlite") as store:
        records = drawn_pairs(40)
        long = pair("i", ("a " * 30, "b"), 0, ANNA)
        store.add([*records, long, Rating(prompt="x", answers=("a",), rater=ANNA, value=3)])
    main(config(folder, tmp_path / "run", feedback=(tmp_path / "more.sqlite",), fit=FitConfig(2, 8), margin=1.0))
    out = capsys.readouterr().out
    assert "not used: 1 x pair of more than max_length = 16 tokens" in out
    assert "not used: 1 x rating that no other of its judge" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert sum(summary["missing"].values()) == 2
    assert summary["warnings"] == []


# ---- Data


def test_parts_of_one_conversation_are_one():
    first, later = START.format("hi"), START.format("hi") + " hello" + START.format("why")
    assert conversation_of(first) == conversation_of(later) == "hi"
    assert conversation_of("plain") == "plain"
    assert conversation_of("Be kind." + first) != conversation_of(first)


def test_buckets_hold_every_pair_once_and_little_padding():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 300, (100, 2))
    ids = [tuple([i + 1] * n for n in both) for i, both in enumerate(lengths)]
    pairs = Pairs(ids, lengths, rng.random(100), rng.random(100), rng.random(100), [""] * 100)
    buckets, filled = training_buckets(pairs, 0, margin=2.0)
    assert len(buckets) == 4 and [len(b["weight"]) for b in buckets] == pytest.approx([25] * 4, abs=8)
    seen = np.concatenate([b["tokens1"][:, -1] for b in buckets]) - 1
    assert sorted(seen) == list(range(100))
    for bucket in buckets:
        which = bucket["tokens2"][:, -1] - 1
        for name, values in (
            ("probability", pairs.probability),
            ("weight", pairs.weight),
            ("margin", 2 * pairs.degree),
        ):
            np.testing.assert_allclose(bucket[name], values[which], rtol=1e-6)
        np.testing.assert_array_equal(bucket["mask1"].sum(1), lengths[which, 0])
        assert bucket["tokens1"].shape[1] % 16 == 0
    assert filled == pytest.approx(lengths.sum() / sum(b["mask1"].size + b["mask2"].size for b in buckets))
    assert filled > lengths.sum() / (200 * 304)
    assert bucket_widths(np.array([3, 3, 3])) == [16]


@pytest.mark.parametrize("runner", [JitRunner, PmapRunner])
def test_scores_are_in_the_order_of_the_pairs(runner):
    model = ScalarModel(DECODER, "normal", bias=False)
    members = [random_params(model, seed=k) for k in range(2)]
    rng = np.random.default_rng(0)
    ids = [tuple(rng.integers(4, 16, rng.integers(1, 30)).tolist() for _ in range(2)) for _ in range(11)]
    scores = Scorer(model, runner(), 8, 0)(jax.tree.map(lambda *x: np.stack(x), *members), ids)
    assert scores.shape == (11, 2, 2)
    score = jax.jit(model)
    for i, side, k in ((0, 0, 0), (3, 1, 1), (10, 0, 1)):
        row = np.zeros((1, 32), np.int32)
        row[0, : len(ids[i][side])] = ids[i][side]
        expected = score(members[k], row, np.arange(32)[None] < len(ids[i][side]))[0, len(ids[i][side]) - 1]
        np.testing.assert_allclose(scores[i, side, k], expected, atol=1e-5)


def test_scores_share_a_program():
    model = ScalarModel(DECODER, "normal", bias=False)
    scorer = Scorer(model, CountingRunner(), 4, 0)
    members = [jax.tree.map(lambda x: x[None], random_params(model, seed=k)) for k in range(2)]
    first, second = (scorer(params, [([4, 5], [6])]) for params in members)
    assert (first != second).all() and scorer.runner.compiled == 1


# ---- Measurements


def measured(scores, probability, lengths=None, conversation=None, weight=None) -> Pairs:
    n = len(scores)
    ones = np.ones(n)
    lengths = np.array(lengths if lengths is not None else [[1, 2]] * n)
    return Pairs([([], [])] * n, lengths, np.array(probability), ones, ones if weight is None else np.array(weight),
                 conversation or [str(i) for i in range(n)])  # fmt: skip


def test_the_measures_by_hand():
    scores = np.array([[2.0, 0.0], [1.0, 3.0], [0.0, 1.0], [1.0, 1.0], [5.0, 0.0]])
    pairs = measured(scores, [1, 0, 1, 1, 0.5], [[3, 1], [2, 2], [1, 4], [9, 1], [1, 1]])
    found = measure(scores, pairs, 0)
    assert found["heldout_accuracy"] == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert found["longer_accuracy"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert found["heldout_margin"] == pytest.approx((2 + 2 - 1 + 0) / 4)
    low, high = found["heldout_accuracy_ci95"]
    assert 0 < low < found["heldout_accuracy"] < high < 1
    assert running_check(scores[..., None], pairs)["heldout_accuracy"] == 0.5, "equal scores order no pair"


def test_the_loss_weighs_pairs_and_members():
    rng = np.random.default_rng(0)
    scores, p, weight = rng.normal(size=(6, 2, 3)), rng.random(6), rng.random(6)
    expected = 0.0
    for k in range(3):
        gap = scores[:, 0, k] - scores[:, 1, k]
        losses = -p * np.log(1 / (1 + np.exp(-gap))) - (1 - p) * np.log(1 / (1 + np.exp(gap)))
        expected += (losses * weight).sum() / weight.sum() / 3
    assert running_check(scores, measured(scores, p, weight=weight))["heldout_loss"] == pytest.approx(expected)


def test_pairs_of_one_conversation_widen_the_interval():
    rng = np.random.default_rng(1)
    gap = np.repeat(rng.normal(0.7, 1.0, 40), 5)  # all pairs of a conversation are right or wrong together
    scores, fives = np.stack([gap, np.zeros(200)], axis=1), [str(i // 5) for i in range(200)]
    alone = measure(scores, measured(scores, np.ones(200)), 0)
    together = measure(scores, measured(scores, np.ones(200), conversation=fives), 0)
    width = lambda found: np.ptp(found["heldout_accuracy_ci95"])
    assert together["heldout_accuracy"] == alone["heldout_accuracy"]
    assert width(together) > 1.7 * width(alone)


def test_calibrated_scores_have_no_calibration_error_and_confident_ones_have():
    rng = np.random.default_rng(2)
    gap = rng.normal(0, 1.5, 3000)
    p = (rng.random(3000) < 1 / (1 + np.exp(-gap))).astype(float)
    errors = []
    for factor in (1, 4):
        scores = factor * np.stack([gap, np.zeros(3000)], axis=1)
        errors.append(measure(scores, measured(scores, p), 0)["heldout_ece"])
    assert errors[0] < 0.02 and errors[1] > 0.08


def test_a_score_by_length_is_seen():
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 99, (80, 2))
    found = measure(np.sqrt(lengths), measured(lengths, rng.integers(0, 2, 80), lengths), 0)
    assert found["length_correlation"] == pytest.approx(1)
    assert found["heldout_accuracy"] == found["longer_accuracy"]
    free = measure(rng.normal(size=(80, 2)), measured(lengths, rng.integers(0, 2, 80), lengths), 0)
    low, high = free["length_correlation_ci95"]
    assert low < free["length_correlation"] < high and abs(free["length_correlation"]) < 0.3


def test_ties_alone_have_no_accuracy():
    scores = np.random.default_rng(0).normal(size=(5, 2))
    found = measure(scores, measured(scores, [0.5] * 5), 0)
    assert "heldout_accuracy" not in found and "heldout_ece" in found
    assert "heldout_accuracy" not in running_check(scores[..., None], measured(scores, [0.5] * 5))
