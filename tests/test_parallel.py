"""One device, pmap over eight, and three meshes must take the same step."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from rlaif_jax.algorithms.optimizer import OptimizerConfig
from rlaif_jax.algorithms.ppo import Agent, PPOConfig, gradients, ppo_step, prepare, scored
from rlaif_jax.config import UserError
from rlaif_jax.models import CausalLM, ScalarModel
from rlaif_jax.models.decoder import response_hidden
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import (
    BATCH,
    PmapRunner,
    ShardRunner,
    make_mesh,
    masked_mean,
    masked_whiten,
    pmap_step,
    shard_step,
    state_shardings,
)
from rlaif_jax.policies.text import generate
from rlaif_jax.types import Prompts, RewardBatch, Rollout

pytestmark = pytest.mark.slow  # as a whole: many programs to compile

ROWS, PROMPT, RESPONSE = 16, 5, 7
DECODER = small_decoder(32, num_layers=2, width=16, num_heads=4, num_kv_heads=2)
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, schedule="constant")


@functools.cache  # steps donate their state: they get a `fresh` one
def setup(advantage: str = "gae", **options):
    config = PPOConfig(
        advantage=advantage,
        num_epochs=2,
        num_minibatches=2,
        policy_optimizer=OPTIMIZER,
        value_optimizer=OPTIMIZER,
        value_coef=0.5,
        **options,
    )
    policy = CausalLM(DECODER)
    critic = ScalarModel(DECODER, "normal") if advantage == "gae" else None
    agent = Agent(policy, critic, config, answers=2)
    keys = jax.random.split(jax.random.key(0), 4)
    policy_params = policy.init(keys[0])
    state = agent.init(policy_params, critic and critic.init(keys[1]), seed=3)
    prompts = Prompts(
        jax.random.randint(keys[2], (ROWS // 2, PROMPT), 3, 32),
        jnp.arange(PROMPT)[None] >= jnp.arange(ROWS // 2)[:, None] % 4,
        jnp.arange(ROWS // 2, dtype=jnp.uint32),
    )
    sampling = SamplingConfig(max_new_tokens=RESPONSE)
    roll = functools.partial(generate, policy, sampling=sampling, answers=2, eos_id=2, pad_id=0)
    rollout = jax.jit(roll)(policy_params, prompts, keys[3])
    # Unequal lengths, stronger than chance gives: row i keeps at most 1 + i % 7 tokens.
    keep = rollout.response_mask & (jnp.arange(RESPONSE)[None] <= jnp.arange(ROWS)[:, None] % RESPONSE)
    rollout = rollout.replace(response_mask=keep, logprobs=jnp.where(keep, rollout.logprobs, 0))
    rewards = RewardBatch(
        score=jnp.sin(jnp.arange(ROWS, dtype=jnp.float32)),
        valid=jnp.arange(ROWS) != 5,
        token_rewards=jnp.zeros((ROWS, RESPONSE)),
    )
    reference = policy.init(jax.random.key(9))
    experience = jax.jit(functools.partial(prepare, agent))(state, reference, rollout, rewards)
    return agent, state, experience


def relative(a, b) -> float:
    flat = [jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(t)]) for t in (a, b)]
    return float(jnp.linalg.norm(flat[0] - flat[1]) / jnp.linalg.norm(flat[1]))


KINDS = {
    "gae": {},
    "group": {"advantage": "group", "kl_in": "loss"},
    # a device has rows of its own to pack, in turns of one
    "packed": {"advantage": "group", "kl_in": "loss", "packed_rows": 1},
}


@pytest.fixture(scope="module", params=KINDS)
def single(request):
    agent, state, experience = setup(**KINDS[request.param])
    new_state, metrics = jax.jit(functools.partial(ppo_step, agent))(state, experience)
    return agent, state, experience, jax.device_get(new_state), jax.device_get(metrics)


def fresh(tree):
    """A copy: steps donate their state."""
    return jax.tree.map(jnp.array, tree)


RUNNERS = {"pmap8": lambda fn: pmap_step(fn)} | {
    name: functools.partial(lambda shape, fn: shard_step(fn, make_mesh(*shape)), shape)
    for name, shape in {"8x1x1": (8, 1, 1), "2x4x1": (2, 4, 1), "2x2x2": (2, 2, 2)}.items()
}


SOME = ("pmap8", "2x2x2")  # a device's own rows, and every axis of a mesh at once


@pytest.mark.parametrize(
    ("single", "name"),
    [("gae", name) for name in RUNNERS] + [(kind, name) for kind in ("group", "packed") for name in SOME],
    indirect=["single"],
)
def test_every_layout_takes_the_same_step(single, name):
    agent, state, experience, expected, metrics = single
    got, got_metrics = RUNNERS[name](functools.partial(ppo_step, agent))(fresh(state), experience)
    got, got_metrics = jax.device_get((got, got_metrics))
    assert relative(got.params, expected.params) < 1e-5
    assert relative(got.params, state.params) > 1e-3, "the step must have moved the parameters"
    for key, value in metrics.items():
        np.testing.assert_allclose(got_metrics[key], value, rtol=1e-4, atol=2e-6, err_msg=key)
    assert int(got.step) == 1


@pytest.mark.parametrize("name", SOME)
def test_packed_scores_are_the_same_on_many_devices(name):
    agent, state, experience = setup(**KINDS["packed"])
    padded = dataclasses.replace(agent, config=dataclasses.replace(agent.config, packed_rows=0))
    rollout = Rollout(
        tokens=experience.tokens,
        prompt_mask=experience.prompt_mask,
        response_mask=experience.response_mask,
        logprobs=experience.sampler_logprobs,
        finished=experience.mask.any(-1),
    )
    expected = jax.jit(functools.partial(scored, padded))(state, state.params["policy"], rollout)

    def score(state, rollout, *, axis_name=None):
        return scored(agent, state, state.params["policy"], rollout)

    runner = PmapRunner() if name == "pmap8" else ShardRunner(make_mesh(2, 2, 2))
    got = runner.map(score)(runner.place(fresh(state)), rollout)
    assert set(got) == set(expected) == {"ref_logprobs", "logprobs"}
    for key, value in expected.items():
        np.testing.assert_allclose(got[key], value, atol=2e-5, err_msg=key)
        assert np.abs(value).max() > 0.1


@pytest.mark.parametrize("single", ["gae"], indirect=True)
@pytest.mark.parametrize("name", RUNNERS)
def test_every_layout_has_the_same_gradient(single, name):
    agent, state, experience, _, _ = single

    def step(params, batch, *, axis_name=None):
        grads, loss, _ = gradients(agent, params, batch, jnp.float32(0.05), axis_name)
        return grads, loss

    expected, loss = jax.jit(step)(state.params, experience)
    got, got_loss = RUNNERS[name](step)(fresh(state.params), experience)
    assert relative(jax.device_get(got), jax.device_get(expected)) < 1e-5
    np.testing.assert_allclose(jax.device_get(got_loss), loss, rtol=1e-5)


def test_activations_stay_with_their_rows_on_a_mesh():
    """Weights are gathered and gradients summed; nothing makes the devices exchange what they know of each other's rows."""
    model, mesh = CausalLM(DECODER), make_mesh(2, 2, 2)

    def loss(params, tokens, prompt_mask, response_mask):
        hidden = response_hidden(DECODER, params["trunk"], tokens, prompt_mask, response_mask, answers=2)
        return model.token_logprobs(params, hidden, tokens[:, PROMPT:])[0].sum(where=response_mask)

    params = jax.eval_shape(model.init, jax.random.key(0))
    placed = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        params,
        state_shardings(params, mesh),
    )
    rows = [
        jax.ShapeDtypeStruct((ROWS, columns), dtype, sharding=NamedSharding(mesh, BATCH))
        for columns, dtype in ((PROMPT + RESPONSE, jnp.int32), (PROMPT, bool), (RESPONSE, bool))
    ]
    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss)).lower(placed, *rows).compile().as_text()
    assert "all-gather" in program
    assert "all-reduce" in program
    assert "all-to-all" not in program


def test_masked_statistics_are_global_not_means_of_means():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 6)).astype(np.float32)
    mask = np.arange(6)[None] < np.array([1, 6, 2, 3, 6, 1, 0, 4])[:, None]
    mean, var = x[mask].astype(np.float64).mean(), x[mask].astype(np.float64).var()
    spread = jax.pmap(
        lambda x, m: (masked_mean(x, m, "data"), masked_whiten(x, m, "data")), axis_name="data", out_axes=(None, 0)
    )(x[:, None], mask[:, None])
    np.testing.assert_allclose(spread[0], mean, rtol=1e-5)
    np.testing.assert_allclose(
        np.asarray(spread[1])[:, 0][mask], ((x - mean) / np.sqrt(var))[mask], rtol=1e-4, atol=1e-5
    )
    kept = masked_whiten(jnp.asarray(x), jnp.asarray(mask), shift_mean=False)
    np.testing.assert_allclose(np.asarray(kept)[mask].mean(), mean, rtol=1e-4)


def test_one_valid_item_is_whitened_to_zero():
    x, mask = jnp.array([3.0, jnp.nan]), jnp.array([True, False])
    assert jnp.array_equal(masked_whiten(x, mask), jnp.zeros(2))


def test_parameters_are_really_split():
    _, state, _ = setup()
    mesh = make_mesh(2, 2, 2)
    placed = jax.device_put(state, state_shardings(state, mesh))
    kernel = placed.params["policy"]["trunk"]["layers_0"]["q"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    moment = placed.opt_state["policy"][1][0].mu["trunk"]["layers_0"]["down"]["kernel"]
    assert moment.addressable_shards[0].data.size == moment.size // 4


def test_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="multiple of 8"):
        pmap_step(lambda s, b, axis_name: (s, b))(jnp.zeros(()), jnp.zeros((6, 2)))
    with pytest.raises(UserError, match="needs 16 devices"):
        make_mesh(4, 2, 2)


def test_eight_fake_devices():
    assert len(jax.devices()) == 8 and os.environ["JAX_PLATFORMS"] == "cpu"
