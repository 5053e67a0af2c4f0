"""A whole run on a user's own model, prompts and rewards, with a model of a few words in a real folder."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from rlaif_jax.command_line import command_line
from rlaif_jax.config import UserError, from_json
from rlaif_jax.data.chat.config import ChatConfig
from rlaif_jax.data.tokenizers import load_tokenizer, word_level_tokenizer
from rlaif_jax.evaluate import Evaluation
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.metrics import read_metrics
from rlaif_jax.models import CausalLM
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.hf.files import load_model, save_model
from rlaif_jax.models.lora import LoRAConfig
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.recipes.rewards import read_reward
from rlaif_jax.recipes.rlaif import RlaifConfig, get_config, main
from rlaif_jax.recipes.verdicts import JUDGE, SCORE, SECOND, conclude
from rlaif_jax.run import Run
from tests.feedback.api_server import Wrong, completion, serve
from tests.feedback.people.test_source import Crowd, rank, rating
from tests.helpers import assert_same_leaves, random_params, unexplained
from tests.sinks.wandb_file import KEPT, assert_same_numbers

LETTERS = tuple("abcdefghABCDEFGHIJ")
TEMPLATE = "{% for m in messages %}user {{ m['content'] }} {% endfor %}assistant "
TOKENIZER = word_level_tokenizer(("user", "assistant", "Answer:", *LETTERS))
MODEL = CausalLM(small_decoder(TOKENIZER.vocab_size, num_layers=1, width=16, num_heads=2, context_length=512))

REWARDS = '''
def hates_a(answer):
    return -answer.count("a")


def count_a(answer):
    """The share of words that are a."""
    words = answer.split()
    return words.count("a") / len(words) if words else None


def fussy(answer):
    if "b" in answer.split():
        raise ValueError("no b, please")
    return len(answer.split())
'''


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a chat model, prompts and a file of reward functions."""
    path = tmp_path_factory.mktemp("inputs")
    tokenizer = dataclasses.replace(TOKENIZER, settings={**TOKENIZER.settings, "chat_template": TEMPLATE})
    save_model(path / "lm", MODEL, random_params(MODEL, scale=0.2), tokenizer)
    prompts = [f"{x} {y}" for x in "abcdefgh" for y in "abcdefgh"]
    (path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    (path / "rewards.py").write_text(REWARDS)
    return path


def config_of(inputs: Path, out: Path, *feedback: str, **changed) -> RlaifConfig:
    base = get_config()
    ppo = dataclasses.replace(
        base.ppo,
        answers_per_prompt=4,
        policy_optimizer=dataclasses.replace(base.ppo.policy_optimizer, learning_rate=3e-3, warmup_updates=0),
    )
    train = dataclasses.replace(base.train, steps=4, prompts_per_step=8, prompt_length=8, eval_every=2, save_every=2)
    settings = {
        "policy": str(inputs / "lm"), "prompts": str(inputs / "prompts.txt"), "held_out": 16, "out": out, "ppo": ppo,
        "feedback": tuple(read_reward(line.replace("HERE", str(inputs))) for line in feedback),
        "train": train, "sampling": SamplingConfig(max_new_tokens=6),
    }  # fmt: skip
    return dataclasses.replace(base, **settings | changed)


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def steps(folder: Path) -> list[dict]:
    return [
        {name: value for name, value in row.items() if not name.startswith("time/")}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


TWO = ("function HERE/rewards.py:count_a weight=2 name=as", "function HERE/rewards.py:fussy name=words")


def test_two_rewards_with_weights_and_a_resume_bit_for_bit(inputs, tmp_path, monkeypatch):
    (tmp_path / "chat.jinja").write_text(f"{TEMPLATE}{{{{ word }}}} ")
    chat = ChatConfig(str(tmp_path / "chat.jinja"), ("word=A",))
    whole = config_of(inputs, tmp_path / "whole", *TWO, tracking=KEPT, chat=chat)
    drawn, draw = [], Evaluation.answers
    monkeypatch.setattr(Evaluation, "answers", lambda *args, **options: drawn.append(1) or draw(*args, **options))
    metrics = main(whole)
    assert len(drawn) == 3, "before the first step, after 2 steps, after 4"
    found = summary(whole.out)
    assert found["status"] == "done" and all(found["checks"].values())
    assert metrics["verdict"] == found["verdict"]
    assert {"eval_reward_before", "eval_reward_after", "win_rate_eval_reward", "kl", "gain"} <= set(metrics)
    assert found["missing"]["words: fussy raised ValueError: no b, please"] > 0
    rows = steps(whole.out)
    assert all({"reward", "score/as", "score/words"} <= set(row) for row in rows if row["step"])
    assert any(0 < row.get("missing/words", 0) < 1 and "missing/partly_advantage" in row for row in rows)
    assert {"eval/as", "eval/words", SCORE} <= set(rows[0])
    samples = [json.loads(line) for line in (whole.out / "samples.jsonl").read_text().splitlines()]
    assert {"before", "after", "rl"} <= {sample["stage"] for sample in samples}
    assert all({"eval/as", "eval/words", "reward"} <= set(sample) for sample in samples)
    answers = [json.loads(line) for line in (whole.out / "answers.jsonl").read_text().splitlines()]
    shown = {(s["stage"], s["prompt"]): s["response"] for s in samples if s["stage"] != "rl"}
    assert len(answers) == 16 and all(row["generators"] == ["before", "after"] for row in answers)
    assert {("before", r["prompt"]): r["answers"][0] for r in answers} | {
        ("after", r["prompt"]): r["answers"][1] for r in answers
    } == shown
    after = [s for s in samples if (s["stage"], s["chosen"]) == ("after", "random")]
    assert len(after) == 16 and all("".join(text for text, _ in s["tokens"]) == s["response"] for s in after)
    shares = [sum(number for _, number in s["tokens"]) for s in after]
    assert np.mean(shares) == pytest.approx(metrics["kl"], abs=1e-3), "all held-out answers are shown"
    page = (whole.out / "report.html").read_text()
    assert "Colours after training" in page
    assert "fussy raised ValueError" in page and unexplained(whole.out) == []
    _, start = load_model(inputs / "lm")
    model, after = load_model(whole.out / "model")
    assert model.config == MODEL.config
    assert load_tokenizer(whole.out / "model").chat_text([{"role": "user", "content": "b"}]) == "user b assistant A "
    assert all(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(after), strict=True))

    part = dataclasses.replace(whole, out=tmp_path / "part", train=dataclasses.replace(whole.train, steps=2))
    main(part)
    with pytest.raises(UserError, match=r"chat\.variables was \['word=A'\] and is now \['word=B'\]"):
        main(dataclasses.replace(part, resume=True, chat=dataclasses.replace(chat, variables=("word=B",))))
    (tmp_path / "chat.jinja").write_text(f"{TEMPLATE} {{{{ word }}}}")
    with pytest.raises(
        UserError, match=r"part: the prompts are not those that this run began with .*: resume it with those"
    ):
        main(dataclasses.replace(part, resume=True))
    (tmp_path / "chat.jinja").write_text(f"{TEMPLATE}{{{{ word }}}} ")
    main(dataclasses.replace(whole, out=part.out, resume=True))
    assert json.dumps(steps(part.out)) == json.dumps(rows), "NaN is equal to NaN"
    assert_same_leaves(load_model(part.out / "model")[1], after)
    assert from_json(RlaifConfig, json.loads((part.out / "config.json").read_text())).feedback == whole.feedback
    if KEPT.wandb == "offline":
        assert_same_numbers(part.out)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["rating", "ranking"])
def test_a_judge_and_a_second_one_with_an_adapter(inputs, tmp_path, form):
    config = config_of(
        inputs,
        tmp_path / "run",
        f"judge HERE/lm form={form} min_mass=0",
        second=f"judge {inputs}/lm min_mass=0",
        lora=True,
        adapter=LoRAConfig(rank=2),
    )
    metrics = main(config)
    found = summary(config.out)
    assert found["status"] == "done" and all(found["checks"].values())
    assert {f"win_rate_{SECOND}", f"{SECOND}_order_consistency", f"{SECOND}_first_shown", f"{SECOND}_missing"} <= set(
        metrics
    )
    assert 0 <= metrics[f"win_rate_{SECOND}"] <= 1 and metrics[f"{SECOND}_missing"] == 0
    audited = {f"win_rate_{JUDGE}", f"{JUDGE}_order_consistency", f"{JUDGE}_first_shown", f"{JUDGE}_missing"}
    assert audited <= set(metrics) and unexplained(config.out) == []
    samples = [json.loads(line) for line in (config.out / "samples.jsonl").read_text().splitlines()]
    begins = {"rating": "Expected score", "ranking": "Better than the answer before training"}[form]
    assert all(sample["reasons"].startswith(begins) for sample in samples)
    rows = steps(config.out)
    assert "second_opinion" in rows[0] and f"win_rate_{SECOND}" in rows[0]
    with Store(config.out / "feedback.sqlite") as store:
        forms = {entry.form for entry in store.judgements()}
    assert forms == {form, "rating"}
    assert (config.out / "baseline.jsonl").exists() == (form == "ranking")
    _, start = load_model(inputs / "lm")
    _, merged = load_model(config.out / "model")
    moved = jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda a, b: not np.array_equal(a, b), start, merged))
    assert {path[-2].key for path, differs in moved if differs} == {"q", "k", "v", "o", "gate", "up", "down"}


@pytest.mark.slow
def test_a_second_opinion_that_is_no_judge_calls_the_reward_exploited(inputs, tmp_path):
    config = config_of(
        inputs, tmp_path / "run", "function HERE/rewards.py:count_a", second=f"function {inputs}/rewards.py:hates_a"
    )
    config = dataclasses.replace(config, held_out=48, train=dataclasses.replace(config.train, steps=24))
    metrics = main(config)
    assert metrics["gain_ci95"][0] > 0 and metrics[f"win_rate_{SECOND}_ci95"][1] < 0.5
    assert metrics["second_opinion_after"] < metrics["second_opinion_before"]
    found = summary(config.out)
    assert found["verdict"] == "worse" and found["story"][0].startswith("The reward was exploited")
    assert unexplained(config.out) == []


class LateCrowd(Crowd):
    """A crowd that comes when the run has begun: a folder that is not empty would be another run's."""

    def work(self) -> None:
        while not self.path.exists() and not self.done.is_set():
            time.sleep(0.05)
        super().work()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rate", "rank"])
def test_people_are_asked_only_where_it_is_worth_their_time(inputs, tmp_path, kind, capsys):
    """About training steps, and those who rate about the held-out answers before and after; not for scale or evaluations."""
    config = config_of(inputs, tmp_path / "run", f"people kind={kind} timeout_s=60")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2, eval_every=1))
    judge = rank if kind == "rank" else lambda task, who: rating(task, 1 + len(task.answers[0]) % 5, who)
    with LateCrowd(config.out / "feedback.sqlite", judge) as crowd:
        metrics = main(config)
    found = summary(config.out)
    assert found["status"] == "done" and all(found["checks"].values())
    samples = [json.loads(line) for line in (config.out / "samples.jsonl").read_text().splitlines()]
    held_out = {s["prompt"] for s in samples}
    shown = {(s["prompt"], s["response"]) for s in samples if s["stage"] in ("before", "after")}
    asked = [(task.prompt, answer) for task in crowd.seen for answer in task.answers]
    of_held_out = [pair for pair in asked if pair[0] in held_out]
    assert len(held_out) == 16 and len(asked) > len(of_held_out)
    assert all("eval_length" in row and SCORE not in row for row in steps(config.out))
    assert "People are asked about the answers of training steps" in "".join(capsys.readouterr())
    if kind == "rank":
        assert not of_held_out and "gain" not in metrics
        assert found["story"][-1].startswith("Reward on held-out prompts: nobody judged them at KL")
    else:
        assert set(of_held_out) == shown and len(of_held_out) == len(shown)
        before = len({s["response"] + s["prompt"] for s in samples if s["stage"] == "before"})
        assert all(prompt in held_out for prompt, _ in asked[:before]), "nobody was asked for the scale before"
        assert 0 <= metrics["win_rate_eval_reward"] <= 1


@pytest.mark.parametrize(
    "options, message",
    [
        (["--ppo.shaping.overlong-from", "128"], "shaping.overlong_from is 128, but answers end at 128 tokens"),
        (["--train.oversample", "2", "--ppo.answers-per-prompt", "1", "ppo.advantage:gae"], "train.oversample is 2"),
    ],
)
def test_options_that_do_not_fit_each_other_are_refused_before_anything_is_read(options, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", *options])
    with pytest.raises(SystemExit) as stopped:
        command_line(main, get_config())
    assert stopped.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


# ---- What a run concludes


def concluded(folder: Path, judge: str | None = None, **numbers) -> Run:
    run = Run(folder, "rlaif", get_config(), seed=0)
    run.metrics = {
        f"{SCORE}_before": 0.0, f"{SCORE}_after": 1.0, "gain_ci95": [0.5, 1.5], "kl": 2.0, "length_before": 40.0,
        "length_after": 42.0, f"win_rate_{SCORE}": 0.8, f"win_rate_{SCORE}_ci95": [0.7, 0.9],
        f"win_rate_{SCORE}_length_controlled": 0.78, f"win_rate_{SCORE}_length_controlled_ci95": [0.66, 0.87],
    } | numbers  # fmt: skip
    conclude(run, judge)
    return run


def second(low, high, consistency=0.8):
    return {
        f"win_rate_{SECOND}": (low + high) / 2, f"win_rate_{SECOND}_ci95": [low, high],
        f"{SECOND}_order_consistency": consistency,
    }  # fmt: skip


def test_a_judge_that_chooses_by_position_has_no_say(tmp_path):
    run = concluded(tmp_path / "run", SECOND, **second(0.2, 0.4, consistency=0.3))
    assert run.verdict == "better" and len(run.story) == 1, "by the reward alone"
    assert run.warnings[0].startswith(
        "The judge that compares the answers prefers the same one in both orders in only 30%"
    )


def test_a_judge_that_compared_nothing_is_named(tmp_path):
    run = concluded(tmp_path / "run", SECOND, **{f"{SECOND}_missing": 1.0})
    assert run.verdict == "better" and len(run.story) == 1, "by the reward alone"
    assert run.warnings[0].startswith("The second judge compared hardly any of the answers before and after training")


def test_a_better_policy_is_called_better(tmp_path):
    run = concluded(tmp_path / "run", SECOND, **second(0.55, 0.75))
    assert run.verdict == "better" and not run.warnings
    assert "0.00 -> 1.00 at KL 2.0" in run.story[0] and "win 65% [55%, 75%]" in run.story[1]


def test_a_reward_that_a_second_judge_does_not_share_is_called_exploited_first(tmp_path):
    run = concluded(tmp_path / "run", SECOND, **second(0.2, 0.4))
    assert run.verdict == "worse" and run.story[0].startswith("The reward was exploited: it rose, but the second judge")
    assert run.warnings and run.warnings[0].startswith(run.story[0]) and "Try: " in run.warnings[0]


def test_a_reward_that_rises_with_length_alone_is_called_out_first(tmp_path):
    longer = {"length_after": 90.0, f"win_rate_{SCORE}_length_controlled_ci95": [0.4, 0.7]}
    run = concluded(tmp_path / "run", **longer)
    assert run.story[0].startswith("The reward may be exploited by length: the answers became 2.2 times as long")
    assert len(run.warnings) == 1 and run.verdict == "no different", "at equal lengths"
    judged = concluded(tmp_path / "f", SECOND, **longer, **second(0.55, 0.75))
    assert judged.verdict == "better" and "exploited by length" in judged.story[0], "another judge read the answers"
    shorter = concluded(tmp_path / "b", **longer | {"length_after": 20.0})
    assert "(shorter)" in shorter.story[0]
    honest = concluded(tmp_path / "c", length_after=90.0)
    assert not honest.warnings and "exploited" not in "".join(honest.story)
    unknown = concluded(tmp_path / "e", **longer | {f"win_rate_{SCORE}_length_controlled_ci95": [float("nan")] * 2})
    assert not unknown.warnings, "without a win rate at equal lengths nothing is concluded"
    fell = concluded(tmp_path / "d", **longer | {"gain_ci95": [-1.0, 1.0]})
    assert not fell.warnings, "a reward that did not rise was not exploited"


def test_where_nobody_judged_held_out_answers_another_judge_decides_or_nobody(tmp_path):
    unjudged = ("kl", "length_before", "length_after")
    alone, other = concluded(tmp_path / "a"), concluded(tmp_path / "b")
    for run in (alone, other):
        run.metrics = {name: run.metrics[name] for name in unjudged}
        run.story.clear()
        run.verdict = ""
    other.metrics |= second(0.55, 0.75)
    conclude(alone, None)
    conclude(other, SECOND)
    assert alone.verdict == "" and "nobody judged them" in alone.story[0] and len(alone.story) == 1
    assert other.verdict == "better" and "nobody judged them" in other.story[0] and not other.warnings


def test_without_another_judge_the_reward_itself_is_the_verdict(tmp_path):
    assert concluded(tmp_path / "a").verdict == "better"
    assert concluded(tmp_path / "b", **{f"win_rate_{SCORE}_ci95": [0.4, 0.6]}).verdict == "no different"
    assert concluded(tmp_path / "c", **{f"win_rate_{SCORE}_ci95": [0.1, 0.3]}).verdict == "worse"


# ---- A judge behind a server

TAGGED = re.compile(r"<request-(\w+)>\n(.*)\n</request-\w+>\n<answer-\w+>\n(.*)\n</answer-\w+>", re.DOTALL)
SCORES = """
import hashlib

def digest(prompt, answer):
    return int(hashlib.sha256(f"{prompt}|{answer.strip()}".encode()).hexdigest(), 16)

def score(prompt, answer):
    number = digest(prompt, answer)
    return None if number % 10 < 3 else number // 10 % 10 + 1
"""


def asked(body: dict) -> tuple[str, str, str] | None:
    """Returns the nonce, the prompt and the answer of a question about one answer."""
    found = TAGGED.search(body["messages"][-1]["content"])
    return (found[1], found[2], found[3].replace("< unk >", "<unk>")) if found else None  # data is no control token


@pytest.mark.slow
def test_failed_calls_are_masked_and_stops_pay_for_nothing_twice(inputs, tmp_path, monkeypatch):
    """With 30 % of the calls failing the run is, bit for bit, that of a function that gives no reward for the same ones."""
    namespace: dict = {}
    exec(SCORES, namespace)
    (tmp_path / "scores.py").write_text(SCORES)
    stops = [30, 75]

    def reply(body, number):
        if stops and len(server.requests) >= stops[0]:
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)
        if asked(body) is None:  # about two answers, or what the server can do
            shown = re.search("<request-(.*?)>", str(body))
            return completion(f"Verdict {shown[1]}: A" if shown else "A")
        nonce, *about = asked(body)
        value = namespace["score"](*about)
        return Wrong(400) if value is None else completion(f"Well.\nScore {nonce}: {'ABCDEFGHIJ'[int(value) - 1]}")

    with serve(reply) as server:
        line = f"api {server.url} model=j reading=reasons attempts=1 name=score"
        config = config_of(inputs, tmp_path / "api", line)
        statuses = []
        while not statuses or statuses[-1] == "stopped":
            main(dataclasses.replace(config, resume=bool(statuses)))
            statuses.append(summary(config.out)["status"])
        questions = [(json.dumps(body), asked(body)) for body in server.requests]
        answered = Counter(
            text for text, about in questions if about is None or namespace["score"](*about[1:]) is not None
        )
    assert statuses == ["stopped", "stopped", "done"] and set(answered.values()) == {1}
    masked = config_of(inputs, tmp_path / "function", f"function {tmp_path}/scores.py:score name=score")
    main(masked)
    assert summary(masked.out)["missing"]["judgements of a step"] > 20
    skip = {"feedback_missing", "win_rate_judge"}
    rows = [[{k: v for k, v in row.items() if k not in skip} for row in steps(run.out)] for run in (config, masked)]
    assert json.dumps(rows[0]) == json.dumps(rows[1])
    assert_same_leaves(load_model(config.out / "model")[1], load_model(masked.out / "model")[1])


@pytest.mark.slow
@pytest.mark.parametrize("loves", ["length", "a"])
def test_a_judge_that_loves_length_is_called_out_and_another_is_not(inputs, tmp_path, loves):
    """The answers of both runs get higher scores from their judge, a server; what they became is said first."""

    def level(words: list[str]) -> int:
        return min(len(words) // 5, 9) if loves == "length" else round(9 * words.count("a") / max(len(words), 1))

    def reply(body, number):
        text = str(body)
        if asked(body) is None:
            shown = re.search("<request-(.*?)>", text)
            return completion(f"Verdict {shown[1]}: A" if shown else "A")
        nonce, _, answer = asked(body)
        return completion(f"Score {nonce}: {'ABCDEFGHIJ'[level(answer.split())]}")

    with serve(reply) as server:
        config = config_of(
            inputs,
            tmp_path / "run",
            f"api {server.url} model=j reading=reasons",
            sampling=SamplingConfig(max_new_tokens=48),
        )
        rate = dataclasses.replace(config.ppo.policy_optimizer, learning_rate=1e-2)
        ppo = dataclasses.replace(config.ppo, policy_optimizer=rate, kl_coef=0.0)
        train = dataclasses.replace(config.train, steps=12, eval_every=12, save_every=12)
        metrics = main(dataclasses.replace(config, ppo=ppo, train=train, held_out=32))
    found = summary(config.out)
    assert metrics["gain_ci95"][0] > 0
    called_out = "may be exploited by length" in found["story"][0]
    assert called_out == (loves == "length")
    assert any("exploited" in warning for warning in found["warnings"]) == called_out
