"""How a run ends before its time, and what a resumed one finds."""

import contextlib
import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from rlaif_jax.checkpoint import Checkpointer
from rlaif_jax.config import CheckFailed, UserError
from rlaif_jax.feedback.sources import FunctionSource
from rlaif_jax.policies.text import TextPolicy
from tests import tiny
from tests.tiny import leaves, numbers


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    return tiny.write_prompts(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_stop_ends_the_wait_for_a_judge_and_nothing_is_learned_from_what_is_missing(
    prompts, tmp_path, monkeypatch, staleness
):
    """SIGTERM in the judgement of step 4: the checkpoint is of step 3, and the resumed run is the one without a stop."""
    train = dataclasses.replace(tiny.TinyConfig().train, steps=6, save_every=2, staleness=staleness)
    config = tiny.TinyConfig(prompts=prompts, out=tmp_path / "stopped", train=train)

    class Slow(FunctionSource):
        def __call__(self, records, answers, rollout):
            calls.append(answers)
            if len(calls) == 4:
                signalled.append(time.monotonic())
                os.kill(os.getpid(), signal.SIGTERM)
                with contextlib.suppress(Exception):  # a careless source
                    time.sleep(60)
            return super().__call__(records, answers, rollout)

    calls: list = []
    signalled: list[float] = []
    with monkeypatch.context() as patch:
        patch.setattr(tiny, "FunctionSource", Slow)
        tiny.main(config)
    assert time.monotonic() - signalled[0] < 30, "the judge takes 60 s"
    summary = json.loads((config.out / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("stopped", 3)
    assert sorted(path.name for path in (config.out / "checkpoints").iterdir()) == ["2", "3"]
    tiny.main(dataclasses.replace(config, resume=True))
    tiny.main(dataclasses.replace(config, out=tmp_path / "whole"))
    assert numbers(config.out) == numbers(tmp_path / "whole")
    assert all(np.array_equal(a, b) for a, b in zip(leaves(config.out), leaves(tmp_path / "whole")))


def test_judgements_are_kept_when_the_first_step_fails(prompts, tmp_path, monkeypatch):
    """NaN is bad input, but the other judgements of the step may have cost money: the folder is kept."""
    config = tiny.TinyConfig(prompts=prompts, out=tmp_path / "run", nan_reward=True)

    class Paid(FunctionSource):
        def __call__(self, records, answers, rollout):
            (config.out / "feedback.sqlite").write_text("paid for")
            return super().__call__(records, answers, rollout)

    monkeypatch.setattr(tiny, "FunctionSource", Paid)
    with pytest.raises(UserError, match="step 1: the reward of answer 0 is nan"):
        tiny.main(config)
    assert (config.out / "feedback.sqlite").read_text() == "paid for"
    assert json.loads((config.out / "summary.json").read_text())["status"] == "failed"


def test_a_check_that_failed_before_the_first_checkpoint_is_tried_again(prompts, tmp_path, monkeypatch):
    train = dataclasses.replace(tiny.TinyConfig().train, steps=2)
    config = tiny.TinyConfig(prompts=prompts, out=tmp_path / "run", train=train)
    with monkeypatch.context() as patch:
        patch.setattr(TextPolicy, "checks", lambda self, rollout: {"eos_is_kept_in_the_mask": False})
        with pytest.raises(CheckFailed):
            tiny.main(config)
    tiny.main(dataclasses.replace(config, resume=True))
    summary = json.loads((config.out / "summary.json").read_text())
    assert summary["status"] == "done"
    assert all(summary["checks"].values())


def test_a_state_that_is_read_back_is_made_only_once(prompts, tmp_path, monkeypatch):
    """While the checkpoint is read, the devices hold no other state."""
    config = tiny.TinyConfig(
        prompts=prompts, out=tmp_path / "run", width=64, train=dataclasses.replace(tiny.TinyConfig().train, steps=2)
    )
    whole, held = [], []
    in_use = lambda: sum(array.nbytes for array in jax.live_arrays())
    restore, save = Checkpointer.restore, Checkpointer.save

    def saved(self, step, arrays, host):
        whole.append(sum(x.nbytes for x in jax.tree.leaves(arrays)))
        save(self, step, arrays, host)

    def restored(self, like):
        held.append(in_use() - before)
        return restore(self, like)

    monkeypatch.setattr(Checkpointer, "save", saved)
    monkeypatch.setattr(Checkpointer, "restore", restored)
    tiny.main(config)
    before = in_use()
    tiny.main(dataclasses.replace(config, resume=True))
    assert held[0] < 0.5 * whole[0], "the policy to start from, its reference and the critic, without their moments"
