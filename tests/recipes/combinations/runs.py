"""The runs of the covering table: their settings, and how one is killed and resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import shutil
import time
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rlaif_jax import train
from rlaif_jax.algorithms.advantages import GAE, GroupNormalised
from rlaif_jax.algorithms.optimizer import OptimizerConfig
from rlaif_jax.evaluate import Evaluation
from rlaif_jax.feedback.sources import collect_feedback
from rlaif_jax.models.lora import LoRAConfig
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import ParallelConfig
from rlaif_jax.recipes import rlaif
from rlaif_jax.recipes.rewards import read_reward
from rlaif_jax.recipes.rlaif import RlaifConfig, get_config
from rlaif_jax.train import TrainConfig
from tests.covering import Case, covering, one_by_one
from tests.feedback.people.crowd import Crowd, rating
from tests.recipes.resumed import assert_same_runs, checkpoint, summary

MESH = lambda *shape: ParallelConfig("shard", *shape)
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, schedule="constant", eps=1e-8)
FEEDBACK = {
    "judge": "judge HERE/lm min_mass=0 batch_size=2",
    "api": "api SERVER model=j",
    "model": "model HERE/rm batch_size=2 max_length=48",
    "rules": "rules HERE/rules.toml",
    "people": "people",
    "simulated": "simulated HERE/rewards.py:brevity overlap=2",
    "function": "function HERE/rewards.py:fussy",
    "exact-match": "exact-match",
    "number": "number field=number",
    "regex": "regex '^[a-z]+$'",
    "json-schema": "json-schema field=schema",
    "constraints": "constraints",
    "unit-tests": "unit-tests allow_code_execution=true",
}
PROGRAM: dict[str, dict[str, Any]] = {
    "layout": {"one device": MESH(1), "pmap 8": ParallelConfig(), "mesh 2x2x2": MESH(2, 2, 2)},
    "learns": {"all weights": False, "an adapter": True},
    "rows": {"padded": 0, "packed": 4},
    "dtype": {"float32": "float32", "bfloat16": "bfloat16"},
    "algorithm": {
        "GRPO": {"advantage": GroupNormalised()},
        "PPO": {"advantage": GAE(), "kl_in": "reward", "num_minibatches": 2},
    },
}
SECOND = {
    "no second judge": "",
    "a second judge": "judge HERE/lm form=ranking template=HERE/pair.txt min_mass=0 batch_size=2",
}
# Two rewards of one run have all its settings: half as many runs cover the kinds.
REWARDS = [("alone", kind) for kind in FEEDBACK] + [("two", *two) for two in itertools.permutations(FEEDBACK, 2)]
BLOCKS = [covering([one_by_one(values) for values in PROGRAM.values()]), one_by_one(SECOND), REWARDS]
CASES = covering(BLOCKS)
WEIGHTS = (1.0, -0.5)
STEPS = 3


def digest(text: str) -> int:
    return hashlib.sha256(text.encode()).digest()[0]


def config_of(case: Case, inputs: Path, server: str, out: Path) -> RlaifConfig:
    layout, learns, rows, dtype, algorithm, second, _, *kinds = case
    here = lambda line: line.replace("HERE", str(inputs)).replace("SERVER", server)
    base = get_config()
    return dataclasses.replace(
        base,
        policy=str(inputs / "lm"),
        prompts=str(inputs / "prompts.jsonl"),
        feedback=tuple(read_reward(f"{here(FEEDBACK[kind])} weight={weight}") for kind, weight in zip(kinds, WEIGHTS)),
        second=here(SECOND[second]),
        held_out=8,
        scale_answers=16,
        lora=PROGRAM["learns"][learns],
        adapter=LoRAConfig(rank=4) if PROGRAM["learns"][learns] else LoRAConfig(),
        dtype=PROGRAM["dtype"][dtype],
        out=out,
        train=TrainConfig(
            STEPS,
            prompts_per_step=8,
            prompt_length=12,
            parallel=PROGRAM["layout"][layout],
            eval_every=STEPS,
            save_every=1,
            keep_checkpoints=STEPS,
        ),
        sampling=SamplingConfig(max_new_tokens=16),
        ppo=dataclasses.replace(
            base.ppo,
            answers_per_prompt=4,
            packed_rows=PROGRAM["rows"][rows],
            policy_optimizer=OPTIMIZER,
            value_optimizer=OPTIMIZER,
            **PROGRAM["algorithm"][algorithm],
        ),
    )


def copy_in_step(monkeypatch: pytest.MonkeyPatch, step: int, whole: Path, part: Path) -> None:
    """Copies a run's folder when the answers of a step are about to be judged: what `kill -9` leaves at that time."""

    def judged(source: Any, records: Any, answers: Any, rollout: Any, now: int) -> Any:
        if now == step and not part.exists():
            deadline = time.monotonic() + 60
            while not (whole / "checkpoints" / str(step - 1)).exists() and time.monotonic() < deadline:
                time.sleep(0.01)  # it is being written
            shutil.copytree(whole, part)
        return collect_feedback(source, records, answers, rollout, now)

    monkeypatch.setattr(train, "collect_feedback", judged)


def weights_are_placed(monkeypatch: pytest.MonkeyPatch, devices: int) -> None:
    """Asserts that the weights that answer held-out prompts are on all devices: else each would get all of them, often."""
    compiled = Evaluation._sample.func

    def sample(self: Evaluation) -> Any:
        program = compiled(self)

        def placed(replicated: Any, prompts: Any) -> Any:
            params, frozen, _ = replicated
            assert {len(x.sharding.device_set) for x in jax.tree.leaves((params, frozen))} == {devices}
            return program(replicated, prompts)

        return placed

    checked = cached_property(sample)
    checked.__set_name__(Evaluation, "_sample")
    monkeypatch.setattr(Evaluation, "_sample", checked)


def resumed_bit_for_bit(case: Case, inputs: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the run of a case, goes on with the copy of its folder, and asserts that both end in the same bits."""
    whole = config_of(case, inputs, server, tmp_path / "whole")
    part = dataclasses.replace(whole, out=tmp_path / "part", resume=True)
    copy_in_step(monkeypatch, 2, whole.out, part.out)
    weights_are_placed(monkeypatch, 1 if "one device" in case else 8)
    for config in (whole, part):
        with ExitStack() as opened:
            if "people" in case:
                judge = lambda task, rater: rating(task, 1 + digest(task.answers[0]) % 5, rater)
                opened.enter_context(Crowd(config.out / "feedback.sqlite", judge))
            rlaif.main(config)
        if config is whole:
            assert [path.name for path in (part.out / "checkpoints").iterdir() if path.name.isdigit()] == ["1"]
    found = summary(whole.out)
    assert found["status"] == "done" and all(found["checks"].values())
    last = assert_same_runs(whole.out, part.out, STEPS)
    first, _ = checkpoint(whole.out, 1)
    leaves = zip(*(jax.tree.leaves(arrays[0]["params"]) for arrays in (first, last)), strict=True)
    assert not any(np.array_equal(before, after) for before, after in leaves), "every weight learns"
