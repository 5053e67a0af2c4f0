"""Every algorithm under the same loop: it trains, is resumed bit for bit, and agrees on all devices and layouts."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.algorithms.scoring import padded_view
from rlaif_jax.config import UserError
from rlaif_jax.feedback.sources import RecordedPreferences, collect_feedback
from rlaif_jax.metrics import MetricsWriter, read_metrics
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.lora import LoRAConfig
from rlaif_jax.parallel import JitRunner, PmapRunner, Runner, ShardRunner, make_mesh
from rlaif_jax.policies.base import to_prompts
from rlaif_jax.programs import programs
from rlaif_jax.run import Run
from rlaif_jax.steps import step_data
from rlaif_jax.train import TrainConfig, train
from rlaif_jax.types import Frozen, step_key
from tests.builders import PROMPT, PROOFS, SETUPS, TOKENIZER, Setup, adapted, dpo, encoder_decoder, ppo

pytestmark = pytest.mark.slow
PROMPTS = 8
ADAPTED = ["adapted", "adapted_grpo", "adapted_encoder_decoder"]
RUNNERS = {
    "pmap 8": PmapRunner,
    "mesh 8x1x1": lambda: ShardRunner(make_mesh(8, 1, 1)),
    "mesh 2x4x1": lambda: ShardRunner(make_mesh(2, 4, 1)),
    "mesh 2x2x2": lambda: ShardRunner(make_mesh(2, 2, 2)),
}


@functools.cache
def step_inputs(name: str):
    """A setup, its data, answers and feedback: the same for every runner."""
    setup = SETUPS[name]()
    count = PROMPTS * setup.oversample
    batch = next(setup.prompts(count))
    rollout = batch.recorded
    if rollout is None:
        sample = jax.jit(setup.policy.sample, static_argnames="draws")
        rollout = sample(
            setup.params["policy"],
            Frozen(base=setup.base),
            to_prompts(batch),
            step_key(0, 0, 0),
            draws=setup.algorithm.draws,
        )
    each = len(rollout.tokens) // count
    records = [record for record in batch.records for _ in range(each)]
    judged = collect_feedback(setup.feedback, records, setup.policy.texts(rollout, TOKENIZER), rollout, 1)
    return setup, step_data(batch), jax.device_get(rollout), judged


def one_step(name: str, runner: Runner):
    """(state, metrics, rewards) after one step of `train`'s own programs."""
    setup, data, rollout, judged = step_inputs(name)
    pure = programs(setup.algorithm, setup.policy, oversample=setup.oversample)
    state = runner.init(setup.algorithm.init, setup.params, np.uint32(3))
    reference = jax.tree.map(lambda x: x + 0.01, setup.params["policy"])
    frozen = runner.place(Frozen(reference, setup.base))
    inputs = (data, rollout, judged)
    batch, rewards, _ = runner.map(pure.prepare)((state.without_optimizer(), frozen), inputs)
    state, metrics = runner.step(pure.step)(state, Frozen(base=frozen.base), batch)
    return jax.device_get((runner.fetch(state), metrics, rewards))


@functools.cache
def on_one_device(name: str):
    return one_step(name, JitRunner())


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", PROOFS)
def test_the_number_of_devices_changes_nothing(name, runner):
    state, metrics, rewards = on_one_device(name)
    other_state, other_metrics, other_rewards = one_step(name, RUNNERS[runner]())
    chex.assert_trees_all_close(other_state, state, rtol=2e-4, atol=1e-5)
    chex.assert_trees_all_close(other_rewards, rewards, rtol=1e-5, atol=1e-5)
    for metric, value in metrics.items():
        np.testing.assert_allclose(other_metrics[metric], value, rtol=2e-3, atol=2e-5, err_msg=metric)
    before = SETUPS[name]().params["policy"]
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state.params["policy"], jax.device_get(before))
    assert all(x > 0 for x in jax.tree.leaves(moved))


@pytest.mark.parametrize(
    "padded, packed",
    [("rloo", "rloo_packed"), ("gspo", "gspo_packed"), ("dpo", "dpo_packed"), ("adapted", "adapted_packed")],
)
def test_packed_rows_change_nothing(padded, packed):
    state, metrics, _ = on_one_device(padded)
    other, other_metrics, _ = on_one_device(packed)
    chex.assert_trees_all_close(other.params, state.params, rtol=2e-4, atol=1e-5)
    for metric, value in metrics.items():
        np.testing.assert_allclose(other_metrics[metric], value, rtol=2e-3, atol=2e-5, err_msg=metric)


def run_train(setup: Setup, folder, *, resume=False, stop_after=None, staleness=0):
    config = TrainConfig(
        steps=4,
        prompts_per_step=PROMPTS,
        oversample=setup.oversample,
        prompt_length=PROMPT,
        save_every=1,
        staleness=staleness,
    )
    with (
        Run(folder, "everywhere", config, seed=0, resume=resume) as run,
        MetricsWriter(folder, terminal=False, sinks=()) as writer,
    ):
        return train(
            config,
            run,
            writer,
            algorithm=setup.algorithm,
            policy=setup.policy,
            params=setup.params,
            base=setup.base,
            tokenizer=TOKENIZER,
            prompts=setup.prompts(config.prompts_drawn),
            feedback=setup.feedback,
            enough=lambda: run.steps_done == stop_after,
        )["policy"]


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr("rlaif_jax.train.make_runner", lambda parallel, rules: JitRunner())


@pytest.mark.parametrize("name", ["rloo", "reinforce", "dpo", "dpo_policy", "encoder_decoder", "adversarial", *ADAPTED])
def test_train_is_resumed_bit_for_bit(name, tmp_path, one_device):
    setup = SETUPS[name]()
    whole = run_train(setup, tmp_path / "whole")
    run_train(setup, tmp_path / "parts", stop_after=2)
    parts = run_train(setup, tmp_path / "parts", resume=True)
    chex.assert_trees_all_equal(whole, parts)
    lines, others = (read_metrics(tmp_path / part / "metrics.jsonl") for part in ("whole", "parts"))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    timeless = lambda line: {k: v for k, v in line.items() if not k.startswith("time/")}
    assert list(map(timeless, lines)) == list(map(timeless, others))
    assert not np.array_equal(jax.tree.leaves(whole)[0], jax.tree.leaves(jax.device_get(setup.params["policy"]))[0]), (
        "the policy did not move"
    )
    if name == "adversarial":
        assert lines[-1]["discriminator/loss"] < lines[0]["discriminator/loss"]
    if name == "dpo":
        assert lines[0]["loss"] == pytest.approx(np.log(2), rel=0.2), "a mean over pairs of the first steps"
        assert lines[-1]["accuracy"] > 0.8


def test_a_run_of_adapters_keeps_adapters_alone(tmp_path, one_device):
    """The KL of the first step is 0 to the bit; a checkpoint has a share of the base's bytes; another base is refused."""
    wide = small_decoder(TOKENIZER.vocab_size, num_layers=2, width=192, num_heads=2, context_length=16)
    setup = adapted(wide, lora=LoRAConfig(1, 2.0), answers_per_prompt=2)
    keep = jax.device_get(setup.base)
    run_train(setup, tmp_path, stop_after=2)
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["kl"] == 0
    chex.assert_trees_all_equal(jax.device_get(setup.base), keep)
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    written = sum(path.stat().st_size for path in (tmp_path / "checkpoints" / "2").rglob("*") if path.is_file())
    assert 3 * size(setup.params) < written < size(setup.base) / 4  # whole states would be 6 times the base's bytes
    other = dataclasses.replace(setup, base=setup.policy.model.init(jax.random.key(5)))
    with pytest.raises(UserError, match="the policy to start from"):
        run_train(other, tmp_path, resume=True)


# ---- The sequence loss


def whole_sequence_gradient(setup: Setup, data, rollout, reference):
    """DPO written out: one forward pass of all answers, one mean over pairs; no part of the update's machinery."""
    policy, beta = setup.policy, setup.algorithm.config.beta
    ref = jnp.where(rollout.response_mask, policy.score(reference, Frozen(), padded_view(rollout)).logprobs, 0).sum(-1)
    label = np.array([r["probability"] for r in data], np.float32)

    def loss(params):
        logprobs = policy.score(params, Frozen(), padded_view(rollout)).logprobs
        h = beta * (jnp.where(rollout.response_mask, logprobs, 0).sum(-1) - ref)
        margin = h[0::2] - h[1::2]
        return jnp.mean(label * jnp.logaddexp(0, -margin) + (1 - label) * jnp.logaddexp(0, margin))

    return jax.value_and_grad(loss)(setup.params["policy"])


@pytest.mark.parametrize("packed_rows", [0, 1, 3])
@pytest.mark.parametrize("devices", [1, 8])
def test_dpo_equals_whole_sequences_however_its_pairs_are_cut(packed_rows, devices):
    """16 answers over 8 devices are 2 a device, of which one row is packed at a time; a shuffle cuts pairs over devices."""
    setup = dpo(packed_rows=packed_rows)
    batch = next(setup.prompts(PROMPTS))
    rollout, records = batch.recorded, batch.records
    reference = jax.tree.map(lambda x: x * 1.1, setup.params["policy"])
    loss, grads = jax.jit(lambda: whole_sequence_gradient(setup, records, rollout, reference))()
    judged = RecordedPreferences()([r for r in records for _ in range(2)], [""] * 16, rollout)
    algorithm = setup.algorithm
    state = jax.jit(algorithm.init)(setup.params, np.uint32(0))
    frozen = Frozen(reference)

    def gradients(state, frozen, inputs, *, axis_name=None):
        rollout, judged = inputs
        rewards = algorithm.rewards(state, frozen, None, rollout, judged)
        prepared = algorithm.prepare(state, frozen, None, rollout, rewards)
        found, loss, metrics = algorithm.update(state, frozen).gradients(
            state.params, prepared, axis_name, shared=1 if devices == 8 else 2
        )
        return found, metrics | {"total": loss}

    if devices == 1:
        found, metrics = jax.jit(gradients)(state, frozen, (rollout, judged))
    else:
        found, metrics = PmapRunner().step(gradients)(state, frozen, (rollout, judged))
    np.testing.assert_allclose(metrics["total"], loss, rtol=1e-5)
    chex.assert_trees_all_close(found["policy"], grads, rtol=1e-4, atol=1e-5)


def test_dpo_one_row_a_device_cuts_every_pair():
    """Minibatches of 8 answers on 8 devices: each device holds half of a pair."""
    config = {"num_minibatches": 2, "packed_rows": 1}
    assert dpo(**config).algorithm.config.num_minibatches == 2
    SETUPS["cut"] = lambda: dpo(**config)
    try:
        state, _, _ = one_step("cut", JitRunner())
        other, _, _ = one_step("cut", PmapRunner())
    finally:
        del SETUPS["cut"]
    chex.assert_trees_all_close(other.params, state.params, rtol=2e-4, atol=1e-5)


# ---- What cannot work is refused by name


def test_what_is_not_supported_is_refused(tmp_path, one_device):
    cases = [
        (lambda: dpo(num_minibatches=16), "cuts the 2 answers"),
        (lambda: encoder_decoder(packed_rows=1), "padded rows only"),
        (lambda: dataclasses.replace(SETUPS["adversarial"](), bring={}), "needs demonstrations"),
        (lambda: dataclasses.replace(dpo(), bring={}), "recorded answers"),
        (lambda: dataclasses.replace(adapted(), base=None), "no weights under it"),
        (lambda: dataclasses.replace(dpo(answers="policy"), base=adapted().base), "the policy has no adapter"),
    ]
    for i, (make, message) in enumerate(cases):
        with pytest.raises(UserError, match=message):
            run_train(make(), tmp_path / str(i))
    with pytest.raises(UserError, match="staleness"):
        run_train(dpo(), tmp_path / "stale", staleness=1)
    with pytest.raises(UserError, match="recompute"):
        run_train(ppo(behaviour="sampler"), tmp_path / "sampler", staleness=1)
