"""The experiment on a real chat model: what is held out, and what its numbers are."""

from __future__ import annotations

import json

import pytest

from experiments import instruct
from experiments.instruct import (
    HELD_OUT,
    NEW,
    TRAINED,
    InstructConfig,
    curve,
    draw_curves,
    is_finished,
    is_held_out,
    prompt_rows,
    questions,
    result,
    row,
    run_config,
)
from rlaif_jax.config import Diverged, UserError, to_json
from rlaif_jax.feedback.verifiers.constraints import ListItems, MaxWords, read_constraints

ASKED = [f"What is the number {i}?" for i in range(2000)]


def test_held_out_questions_and_constraints_are_never_trained():
    training, held_out = prompt_rows(ASKED)
    assert len(held_out) == HELD_OUT * (len(TRAINED) + len(NEW)) == 330
    instructions = [{r["prompt"].partition("\n")[2] for r in rows} for rows in (training, held_out)]
    assert not instructions[0] & instructions[1]
    asked = [[r["prompt"].partition("\n")[0] for r in rows] for rows in (training, held_out)]
    assert not set(asked[0]) & set(asked[1]) and all(len(set(part)) == len(part) for part in asked)
    assert {r["kind"] for r in training} == set(TRAINED)
    assert {kind: sum(r["kind"] == kind for r in held_out) for kind in {**TRAINED, **NEW}} == dict.fromkeys(
        {**TRAINED, **NEW}, HELD_OUT
    )
    assert 0.15 < sum(map(is_held_out, ASKED)) / len(ASKED) < 0.25
    [constraint] = read_constraints(training[0]["constraints"], "constraints")
    assert training[0]["prompt"].endswith(constraint.text())


def test_too_few_questions_are_refused():
    with pytest.raises(UserError, match="330 are needed: give --dialogues"):
        prompt_rows(ASKED[:50])


def test_questions_are_those_of_both_files_once_and_short(tmp_path):
    task = {"instruction": "Name three colours.", "instances": [{"input": "for a wall"}]}
    long = {"instruction": "x" * 200, "instances": [{"input": ""}]}
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, (task, task, long))))
    said = "\n\nHuman: How do I boil an egg?\n\nAssistant: Slowly.\n\nHuman: How long?\n\nAssistant: A day."
    (tmp_path / "hh.jsonl").write_text(json.dumps({"chosen": said, "rejected": said}))
    config = InstructConfig(tasks=tmp_path / "tasks.jsonl", dialogues=tmp_path / "hh.jsonl")
    assert questions(config) == ["Name three colours.\nfor a wall", "How do I boil an egg?"]
    with pytest.raises(UserError, match="give --tasks"):
        questions(InstructConfig())


def test_the_numbers_of_a_run(tmp_path):
    rows = [
        row("One?", "max_words", MaxWords(2)),
        row("Two?", "max_words", MaxWords(2)),
        row("Three?", "paragraphs", ListItems(1)),
    ]
    answers = [("a b c", "a b"), ("a", "a"), ("- x", "no list")]
    with open(tmp_path / "answers.jsonl", "w") as file:
        for record, pair in zip(reversed(rows), reversed(answers)):
            file.write(json.dumps({"prompt": record["prompt"], "answers": pair}) + "\n")
    numbers = {"kl": 3.0, "reference_logprob_change": 0.5, "reference_logprob_change_ci95": [0.4, 0.6], "wall_s": 1.0}
    numbers |= {f"length_{when}": 4.0 for when in ("before", "after")}
    (tmp_path / "summary.json").write_text(json.dumps({"metrics": numbers}))
    found = result(tmp_path, rows)
    assert {name: (kept["before"], kept["after"], kept["gain"]) for name, kept in found["kept"].items()} == {
        "new values": (0.5, 1.0, 0.5),
        "max_words": (0.5, 1.0, 0.5),
        "new kinds": (1.0, 0.0, -1.0),
        "paragraphs": (1.0, 0.0, -1.0),
    }
    assert (found["fluency_change"], found["fluency_change_ci95"]) == (0.5, [0.4, 0.6])


def test_answers_to_other_questions_are_named(tmp_path):
    (tmp_path / "answers.jsonl").write_text(json.dumps({"prompt": "Four?", "answers": ["a", "b"]}))
    with pytest.raises(UserError, match="answered other held-out questions: move it away"):
        result(tmp_path, [row("One?", "max_words", MaxWords(2))])


def test_curves_have_the_seconds_of_training_alone(tmp_path):
    ours, trl = tmp_path / "grpo-lora-0", tmp_path / "trl-lora-0"
    parts = {"time/rollout_s": 2.0, "time/feedback_s": 0.5, "time/update_s": 1.5}
    for folder, rows in (
        (ours, [{"step": 0, "eval_reward": 0.1}, *({"score": x, "time/elapsed_s": 99.0} | parts for x in (0.0, 0.5))]),
        (trl, [{"score": 0.25, "time/elapsed_s": 5.0}, {"score": 0.75, "time/elapsed_s": 9.0}]),
    ):
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [x.tolist() for x in curve(ours)] == [[4.0, 8.0], [0.0, 0.5]]
    assert [x.tolist() for x in curve(trl)] == [[5.0, 9.0], [0.25, 0.75]]
    drawn = draw_curves(InstructConfig(out=tmp_path), ["grpo-lora-0", "trl-lora-0"]).read_text()
    assert "<!-- grpo-lora -->" in drawn and "<!-- trl-lora -->" in drawn


def test_a_run_that_diverges_leaves_the_others(tmp_path, monkeypatch, capsys):
    task = [{"instruction": f"What is the number {i}?", "instances": [{"input": ""}]} for i in range(2000)]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, task)))
    config = InstructConfig(
        tasks=tmp_path / "tasks.jsonl", out=tmp_path / "runs", arms=("grpo-lora", "grpo-full"), seeds=(0,)
    )

    def train(given):
        status = "done" if given.lora else "diverged"
        for folder in (given.out, given.out / "checkpoints"):
            folder.mkdir()
        numbers = {"kl": 1.0, "reference_logprob_change": 0.0, "reference_logprob_change_ci95": [0, 0], "wall_s": 1.0}
        (given.out / "summary.json").write_text(json.dumps({"status": status, "metrics": numbers}))
        (given.out / "config.json").write_text(json.dumps(to_json(given)))
        (given.out / "metrics.jsonl").write_text(
            json.dumps({"step": 1, "stage": "rl", "score": 1.0, "time/elapsed_s": 1.0})
        )
        if status == "diverged":
            raise Diverged("the KL")
        held_out = [json.loads(line) for line in (tmp_path / "runs" / "held_out.jsonl").read_text().splitlines()]
        answers = [json.dumps({"prompt": r["prompt"], "answers": ["a", "b"]}) for r in held_out]
        (given.out / "answers.jsonl").write_text("\n".join(answers))

    monkeypatch.setattr(instruct.rlaif, "main", train)
    for _ in range(2):  # the second time all is only read
        assert set(instruct.main(config)) == {"grpo-lora-0"}
        assert "grpo-full-0 has diverged" in capsys.readouterr().out
    assert set(json.loads((config.out / "results.json").read_text())) == {"grpo-lora-0"}


def test_each_arm_is_a_run_of_its_own(tmp_path):
    config = InstructConfig(out=tmp_path, steps=10)
    lora, full, ppo = (run_config(config, arm, 7) for arm in ("grpo-lora", "grpo-full", "ppo-full"))
    assert (lora.lora, full.lora, ppo.lora) == (True, False, False)
    assert (lora.ppo.policy_optimizer.learning_rate, full.ppo.policy_optimizer.learning_rate) == (2e-4, 1e-5)
    assert not lora.ppo.advantage.needs_critic and ppo.ppo.advantage.needs_critic
    assert (ppo.ppo.value_optimizer.learning_rate, ppo.ppo.advantage.gae_lambda) == (pytest.approx(3e-5), 1.0)
    assert len({run.out for run in (lora, full, ppo)}) == 3 and lora.seed == 7 and lora.train.steps == 10
    assert not is_finished(lora)
