"""How a run ends before its time, and what a resumed one finds."""

import contextlib
import dataclasses
import gc
import json
import os
import shutil
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_jax.algorithms.advantages import GroupNormalised
from rlaif_jax.algorithms.optimizer import OptimizerConfig
from rlaif_jax.checkpoint import Checkpointer, fingerprint
from rlaif_jax.config import CheckFailed, UserError
from rlaif_jax.feedback.sources import FunctionSource
from rlaif_jax.models import CausalLM
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.hf.files import save_model
from rlaif_jax.parallel import JitRunner, make_mesh
from rlaif_jax.policies.text import TextPolicy
from rlaif_jax.train import train
from rlaif_jax.types import Feedback
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
        gc.collect()  # Flax's tracing of the models' first weights leaves copies of them in cycles
        held.append(in_use() - before)
        return restore(self, like)

    monkeypatch.setattr(Checkpointer, "save", saved)
    monkeypatch.setattr(Checkpointer, "restore", restored)
    tiny.main(config)
    gc.collect()
    before = in_use()
    tiny.main(dataclasses.replace(config, resume=True))
    # The policy to start from, its reference and the critic without their moments are half of it; a state is all of it.
    assert held[0] < 0.6 * whole[0]


def constant(config: tiny.TinyConfig, steps: int, **train) -> tiny.TinyConfig:
    """The settings with constant learning rates, so that more steps change nothing of the first ones."""
    rate = OptimizerConfig(learning_rate=1e-2, schedule="constant")
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=steps, save_every=2, **train),
        ppo=dataclasses.replace(config.ppo, policy_optimizer=rate, value_optimizer=rate),
    )


def test_a_finished_run_goes_on_where_it_is_given_more_steps_and_repeats_no_sample(prompts, tmp_path):
    config = tiny.TinyConfig(prompts=prompts, out=tmp_path / "run")
    samples = config.out / "samples.jsonl"
    whole = dataclasses.replace(constant(config, 5), out=tmp_path / "whole")
    tiny.main(whole)
    tiny.main(constant(config, 3))
    tiny.main(dataclasses.replace(constant(config, 5), resume=True))
    summary = json.loads((config.out / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("done", 5)
    assert numbers(config.out) == numbers(whole.out)
    assert all(np.array_equal(a, b) for a, b in zip(leaves(config.out), leaves(whole.out)))
    drawn = [json.loads(line)["step"] for line in samples.read_text().splitlines()]
    assert drawn == [1] * 4 + [3] * 4 + [5] * 4, "of the first step, every evaluation and the last step"

    before = samples.read_text()
    shutil.rmtree(config.out / "checkpoints" / "5")  # as if the run had been killed after the last samples
    with samples.open("a") as file:
        file.write('{"step": 5, "sta')
    tiny.main(dataclasses.replace(constant(config, 5), resume=True))
    assert samples.read_text() == before
    tiny.main(dataclasses.replace(constant(config, 5), resume=True))
    assert samples.read_text() == before
    assert numbers(config.out) == numbers(whole.out)


def test_a_finished_stale_run_goes_on_with_answers_of_the_policy(prompts, tmp_path):
    """It has no rollout on its way: the zeros in its place in the checkpoint are not taken for answers."""
    config = tiny.TinyConfig(prompts=prompts, out=tmp_path / "run")
    tiny.main(constant(config, 2, staleness=1))
    tiny.main(dataclasses.replace(constant(config, 4, staleness=1), resume=True))
    lines = numbers(config.out)
    assert [line["staleness"] for line in lines] == [0, 1, 0, 1]
    assert all(line["length"] > 0 for line in lines)


def oversampled(prompts: Path, out: Path, **train) -> tiny.TinyConfig:
    ppo = dataclasses.replace(
        tiny.TinyConfig().ppo, advantage=GroupNormalised(), answers_per_prompt=2, kl_in="loss", num_minibatches=1,
        kl_target=None, packed_rows=2,
    )  # fmt: skip
    config = tiny.TinyConfig(prompts=prompts, out=out, ppo=ppo)
    size = {"prompts_per_step": 4, "oversample": 3, "rollout_parts": 2, "staleness": 1}
    return constant(config, **{"steps": 4} | size | train)


def test_more_prompts_are_drawn_than_learned_from_and_resumed_bit_for_bit(prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("rlaif_jax.train.make_runner", lambda parallel, rules: JitRunner())
    asked = []
    monkeypatch.setattr(tiny, "reward", lambda config, record, answer: asked.append(answer) or rare(answer))
    whole = oversampled(prompts, tmp_path / "whole")
    tiny.main(whole)
    assert len(asked) == 4 * 3 * 4 * 2, "all that are drawn are judged"
    lines = numbers(whole.out)
    for line, answers in zip(lines, np.array(asked).reshape(4, 12, 2), strict=True):
        spread = [{rare(a), rare(b)} == {0.0, 1.0} for a, b in answers]
        assert line["spread/drawn"] == sum(spread) / 12
        assert line["spread/kept"] == min(sum(spread) / 4, 1)
    assert any(line["spread/drawn"] < line["spread/kept"] for line in lines)
    final = leaves(whole.out)
    (whole.out / "final.npz").unlink()
    shutil.rmtree(whole.out / "checkpoints" / "4")  # that of step 2 holds the answers that were drawn ahead for step 3
    tiny.main(dataclasses.replace(whole, resume=True))
    assert numbers(whole.out) == lines
    assert all(np.array_equal(a, b) for a, b in zip(final, leaves(whole.out), strict=True))


def rare(answer: str) -> float | None:
    """Returns 1 for an answer with an a, None for one with a z."""
    words = answer.split()
    return None if "z" in words else float("a" in words)


def test_prompts_of_another_batch_size_are_refused(prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("rlaif_jax.train.make_runner", lambda parallel, rules: JitRunner())
    make = tiny.prompt_batches
    monkeypatch.setattr(tiny, "prompt_batches", lambda *args, **settings: make(*args, **settings | {"batch_size": 4}))
    with pytest.raises(UserError, match="batches of 4, but a step draws 12"):
        tiny.main(oversampled(prompts, tmp_path / "run"))


@pytest.mark.parametrize("part", ["policy", "rewards"])
def test_a_run_is_not_resumed_with_other_weights(part, prompts, tmp_path, monkeypatch):
    """The folder or hub name of a model leads to other weights: the reference of the KL would be another one."""
    folder, scale = tmp_path / "model", [jnp.float32(2)]
    model = CausalLM(small_decoder(30, num_layers=1, width=16, num_heads=2, context_length=16))
    params = model.init(jax.random.key(0))
    save_model(folder, model, params)
    config = tiny.TinyConfig(prompts=prompts, out=tmp_path / "run", model=folder)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))
    monkeypatch.setattr("rlaif_jax.train.make_runner", lambda parallel, rules: JitRunner())
    length = lambda scale, rollout, *, axis_name=None: Feedback.single(
        scale * rollout.response_mask.sum(-1).astype(jnp.float32), rollout.response_mask.any(-1)
    )
    monkeypatch.setattr(
        tiny,
        "train",
        lambda *a, **named: train(*a, **named | {"feedback": None, "device_rewards": [(length, scale[0])]}),
    )
    tiny.main(config)
    tiny.main(dataclasses.replace(config, resume=True))
    host = config.out / "checkpoints" / "2" / "host" / "metadata"
    saved = json.loads(host.read_text())
    if part == "policy":
        save_model(folder, model, jax.tree.map(lambda x: x.at[(0,) * x.ndim].add(1e-3), params))
    else:
        scale[0] = jnp.float32(3)
    named = {"policy": "the policy to start from", "rewards": "the rewards"}[part]
    with pytest.raises(UserError, match=rf"checkpoints/2: this run began with other weights \({named}\)"):
        tiny.main(dataclasses.replace(config, resume=True))
    for name in ("weights", "evaluated"):  # a checkpoint of an earlier version has neither
        del saved[name]
    host.write_text(json.dumps(saved))
    tiny.main(dataclasses.replace(config, resume=True))


def test_a_write_that_fails_does_not_replace_the_first_error(prompts, tmp_path, monkeypatch):
    """A check fails, and then the last checkpoint cannot be written: the check is what counts."""
    train_config = dataclasses.replace(tiny.TinyConfig().train, steps=4, save_every=1)
    config = tiny.TinyConfig(prompts=prompts, out=tmp_path / "run", train=train_config)

    def full(self):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    def checked(self, rollout):
        monkeypatch.setattr("orbax.checkpoint.CheckpointManager.wait_until_finished", full)
        return {"eos_is_kept_in_the_mask": False}

    monkeypatch.setattr(TextPolicy, "checks", checked)
    with pytest.raises(CheckFailed, match="eos_is_kept"):
        tiny.main(config)
    summary = json.loads((config.out / "summary.json").read_text())
    assert "eos_is_kept" in summary["error"]


@pytest.mark.parametrize("change", [np.negative, np.flip, np.transpose, lambda x: 2 * x])
def test_a_fingerprint_sees_a_change_that_is_the_same_for_all_numbers(change):
    x = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    assert fingerprint({"a": jnp.array(x)}) != fingerprint({"a": jnp.array(change(x))})


@settings(deadline=None, max_examples=30)
@given(
    shape=st.sampled_from([(), (3, 4), (8, 2, 3)]),  # a program each, with each dtype
    dtype=st.sampled_from([np.float32, jnp.bfloat16, np.uint8, np.bool_]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_a_fingerprint_changes_with_any_number_and_with_no_layout(shape, dtype, seed, data):
    x = np.asarray(np.random.default_rng(seed).integers(0, 2, shape), dtype)
    place = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    other = x.copy()
    other[place] = 1 - int(x[place])
    assert fingerprint({"a": x}) == fingerprint({"a": jax.device_put(x)}) != fingerprint({"a": other})
    assert fingerprint({"a": x}) != fingerprint({"b": x})
    if shape and shape[0] == 8:
        split = jax.sharding.NamedSharding(make_mesh(), jax.sharding.PartitionSpec("data"))
        assert fingerprint({"a": jax.device_put(x, split)}) == fingerprint({"a": x})
