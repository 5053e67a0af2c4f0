"""The agreement of a judge with people, on verdicts that are known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments.judge_agreement import AgreementConfig, agreement, drawn, main, of_people
from rlaif_jax.config import UserError
from rlaif_jax.feedback.records.comparisons import Comparison
from rlaif_jax.feedback.records.forms import Ranking, Rater
from rlaif_jax.recipes.judge_rewards import JudgeReward, Verdicts


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
    )


def test_agreement_counts_ties_half_and_leaves_out_what_is_missing():
    found = agreement(known, PAIRS, 0)
    assert (found["pairs"], found["missing"]) == (5, pytest.approx(0.2))
    assert (found["agrees"]["pairs"], found["agrees"]["share"]) == (4, (1 + 0 + 1 + 0.5) / 4)
    assert (found["agrees_where_consistent"]["pairs"], found["agrees_where_consistent"]["share"]) == (2, 1.0)
    assert (found["order_consistency"], found["first_shown"]) == (0.5, pytest.approx(0.65))
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
        return Verdicts(likes, yes, np.full(len(likes), 0.5), yes)

    monkeypatch.setattr(JudgeReward, "comparer", lambda self, around: likes_good)
    config = AgreementConfig(judge="judge any", feedback=(tmp_path / "pairs.jsonl",), out=tmp_path / "out")
    [found] = main(config).values()
    assert (
        found["agrees"]["share"] == 1.0 and "agree            100.0% [100.0%, 100.0%] of 6" in capsys.readouterr().out
    )
    assert json.loads((config.out / "agreement.json").read_text())["files"][str(tmp_path / "pairs.jsonl")] == found


def test_a_file_with_judgements_of_people_is_theirs_alone(tmp_path, capsys):
    """The store of a run has the judge's own verdicts next to those of people."""
    shared = {"prompt": "p", "answers": ("a", "b"), "shown": (0, 1)}
    anna, before, model = Rater("anna", "person"), Rater("ben", "person"), Rater("gpt", "ai")
    people = [Ranking(**shared, rater=anna, ranks=(1, 2)), Ranking(**shared, rater=before, ranks=(1, 2))]
    other = Ranking(**shared, rater=model, ranks=(2, 1))
    assert of_people(tmp_path, [*people, other]) == people
    assert "1 judgements that are not by people" in capsys.readouterr().out
    assert of_people(tmp_path, [other]) == [other]
