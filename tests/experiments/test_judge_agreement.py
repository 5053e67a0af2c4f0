"""The agreement of a judge with people, on verdicts that are known."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack

import jax
import numpy as np
import pytest

from experiments.judge_agreement import AgreementConfig, agreement, drawn, main, of_people
from rlaif_jax.config import UserError
from rlaif_jax.data.tokenizers import word_level_tokenizer
from rlaif_jax.feedback.records.comparisons import Comparison
from rlaif_jax.feedback.records.forms import Ranking, Rater
from rlaif_jax.models import CausalLM
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.hf.files import save_model
from rlaif_jax.parallel import JitRunner
from rlaif_jax.recipes.judge_rewards import ApiReward, JudgeReward, Surroundings, Verdicts
from tests.feedback.api_server import right, serve
from tests.helpers import random_params


def pair(prompt: str, first: str, second: str, probability: float) -> Comparison:
    return Comparison(prompt, (first, second), probability, 0.0, 1.0)


PAIRS = [
    pair("p", "long answer", "short", 1.0),
    pair("p", "a", "long answer", 1.0),
    pair("q", "b", "longer", 0.0),
    pair("r", "same", "size", 0.75),
    pair("s", "x", "y", 1.0),
]


def known(prompts, first, second):
    assert list(prompts) == [p.prompt for p in PAIRS] and list(zip(first, second)) == [p.answers for p in PAIRS]
    return Verdicts(
        probability=np.array([0.9, 0.4, 0.2, 0.5, 0.5]),
        consistent=np.array([True, False, True, False, True]),
        first_shown=np.array([0.5, 0.9, 0.5, 0.7, 0.5]),
        valid=np.array([True, True, True, True, False]),
        mass=np.array([0.9, 0.8, 0.9, 0.8, 0.1]),
    )


def test_agreement_counts_ties_half_and_leaves_out_what_is_missing():
    found = agreement(known, PAIRS, 0)
    assert (found["pairs"], found["missing"]) == (5, pytest.approx(0.2))
    assert (found["agrees"]["pairs"], found["agrees"]["share"]) == (4, (1 + 0 + 1 + 0.5) / 4)
    assert (found["agrees_where_consistent"]["pairs"], found["agrees_where_consistent"]["share"]) == (2, 1.0)
    assert (found["order_consistency"], found["first_shown"]) == (0.5, pytest.approx(0.65))
    assert found["label_mass"] == pytest.approx((0.9 + 0.8 + 0.9 + 0.8 + 0.1) / 5), "also where it is too low"
    assert found["longer_is_preferred"]["share"] == (1 + 0 + 1 + 0.5 + 0.5) / 5
    low, high = found["agrees"]["ci95"]
    assert 0 <= low <= found["agrees"]["share"] <= high <= 1


def test_ties_of_people_are_left_out_and_the_draw_is_of_the_seed():
    pairs = [pair(str(i), "a", "b", p) for i, p in enumerate([0.5, 1.0, 0.0, 1.0, 0.5])]
    assert [p.prompt for p in drawn(pairs, 0, 0)] == ["1", "2", "3"]
    assert drawn(pairs, 2, 5) == drawn(pairs, 2, 5) and len(drawn(pairs, 2, 5)) == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, "no judge: give --judge"),
        ({"judge": "regex a"}, "compares no answers; give a judge or an api"),
        ({"judge": "judge nowhere"}, "no comparisons: give --data"),
    ],
)
def test_what_cannot_work_is_named(tmp_path, changed, message):
    with pytest.raises(UserError, match=message):
        main(AgreementConfig(out=tmp_path, **changed))


def test_a_file_of_ones_own_becomes_a_row(tmp_path, monkeypatch, capsys):
    rows = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": "bad"} for i in range(6)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def likes_good(prompts, first, second):
        likes = np.array([float(text.startswith("good")) for text in first])
        yes = np.ones(len(likes), bool)
        return Verdicts(likes, yes, np.full(len(likes), 0.5), yes, np.full(len(likes), masses.pop()))

    masses = [np.nan, 0.625]
    monkeypatch.setattr(JudgeReward, "comparer", lambda self, around: likes_good)
    config = AgreementConfig(judge="judge any", feedback=(tmp_path / "pairs.jsonl",), out=tmp_path / "out")
    [found] = main(config).values()
    out = capsys.readouterr().out
    assert found["agrees"]["share"] == 1.0 and "agree            100.0% [100.0%, 100.0%] of 6" in out
    assert found["label_mass"] == 0.625 and re.search(r"label mass +0\.62$", out, re.MULTILINE)
    assert json.loads((config.out / "agreement.json").read_text())["files"][str(tmp_path / "pairs.jsonl")] == found
    [found] = main(config).values()
    assert found["label_mass"] is None and re.search(r"label mass +-$", capsys.readouterr().out, re.MULTILINE)


def test_the_label_mass_of_a_model_is_the_probability_of_its_labels(tmp_path):
    tokenizer = word_level_tokenizer(("A", "B", "C", "Answer:", *"abcdefgh"))
    model = CausalLM(small_decoder(tokenizer.vocab_size, num_layers=1, width=16, num_heads=2, context_length=512))
    params = random_params(model, scale=0.3)
    save_model(tmp_path / "lm", model, params, tokenizer)
    judge = JudgeReward(str(tmp_path / "lm"), "ranking", min_mass=1.0, batch_size=2, max_length=200)
    with ExitStack() as opened:
        around = Surroundings(tmp_path, 0, JitRunner(), lambda: False, opened)
        found = judge.comparer(around)(["a b", "c"], ["d", "e " * 300], ["f", "g"])
        built, _ = judge._judge(around, "ranking")
    labels = [tokenizer.token_id(label) for label in "AB"]
    sums, read = [], jax.jit(model)
    for answers in (("d", "f"), ("f", "d")):
        text = built.pairwise_prompt("a b", *answers)
        ids = np.array([tokenizer.encode(text)])
        logits = np.asarray(read(params, ids, np.ones_like(ids, bool))[0, -1], np.float64)
        sums.append((np.exp(logits[labels]) / np.exp(logits).sum()).sum())
    assert found.mass[0] == pytest.approx(min(sums), rel=1e-4) and not found.valid.any()
    assert np.isnan(found.mass[1]), "a question that is too long says nothing about the labels"


@pytest.mark.parametrize("logprobs", [True, False])
def test_the_label_mass_of_a_server_needs_log_probabilities(logprobs, tmp_path):
    with serve(lambda body, number: right(body, logprobs=logprobs)) as server, ExitStack() as opened:
        around = Surroundings(tmp_path, 0, JitRunner(), lambda: False, opened)
        judge = ApiReward(server.url, "m", form="ranking")
        found = judge.comparer(around)(["p", "q"], ["quality 1.0", "quality 3.0"], ["quality 2.0", "quality 1.0"])
    assert found.valid.all()
    np.testing.assert_allclose(found.mass, 0.9 if logprobs else np.nan, rtol=1e-6)


def test_a_file_with_judgements_of_people_is_theirs_alone(tmp_path, capsys):
    """The store of a run has the judge's own verdicts next to those of people."""
    shared = {"prompt": "p", "answers": ("a", "b"), "shown": (0, 1)}
    anna, before, model = Rater("anna", "person"), Rater("ben", "person"), Rater("gpt", "ai")
    people = [Ranking(**shared, rater=anna, ranks=(1, 2)), Ranking(**shared, rater=before, ranks=(1, 2))]
    other = Ranking(**shared, rater=model, ranks=(2, 1))
    assert of_people(tmp_path, [*people, other]) == people
    assert "1 judgements that are not by people" in capsys.readouterr().out
    assert of_people(tmp_path, [other]) == [other]
