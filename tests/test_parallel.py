"""One device, pmap over eight, and three meshes must take the same step."""

import dataclasses
import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from rlaif_jax.algorithms.advantages import GAE, GroupNormalised, LeaveOneOut
from rlaif_jax.algorithms.base import Algorithm
from rlaif_jax.algorithms.optimizer import OptimizerConfig
from rlaif_jax.algorithms.ppo import PPOConfig
from rlaif_jax.config import UserError
from rlaif_jax.models import CausalLM, ScalarModel, causal_lm
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import (
    BATCH,
    PmapRunner,
    Runner,
    ShardRunner,
    make_mesh,
    masked_mean,
    masked_whiten,
    pmap_step,
    state_shardings,
)
from rlaif_jax.policies.text import TextPolicy
from rlaif_jax.types import Frozen, Prompts, RewardBatch, Rollout, StepData, TrainState
from tests.helpers import fresh, relative_distance, sequences_view

pytestmark = pytest.mark.slow  # as a whole: many programs to compile

ROWS, PROMPT, RESPONSE = 16, 5, 7
DECODER = small_decoder(32, num_layers=2, width=16, num_heads=4, num_kv_heads=2)
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, schedule="constant")


@dataclasses.dataclass(frozen=True)
class Setup:
    """An algorithm with everything that its `prepare` and `step` take."""

    algorithm: Algorithm
    state: TrainState
    frozen: Frozen
    data: StepData
    rollout: Rollout
    rewards: RewardBatch

    @functools.cached_property
    def batch(self) -> Any:
        """What `prepare` makes on one device."""
        return jax.jit(self.algorithm.prepare)(self.state, self.frozen, self.data, self.rollout, self.rewards)

    @functools.cached_property
    def stepped(self) -> tuple[TrainState, dict[str, np.ndarray]]:
        """What `step` makes of the batch on one device, on the host."""
        return jax.device_get(jax.jit(self.algorithm.step)(self.state, Frozen(), self.batch))


def policy_gradient(advantage, **options) -> Setup:
    """PPO with any estimator, on two answers of unequal lengths to each of eight prompts."""
    config = PPOConfig(
        advantage=advantage,
        answers_per_prompt=2,
        num_epochs=2,
        num_minibatches=2,
        policy_optimizer=OPTIMIZER,
        value_optimizer=OPTIMIZER,
        value_coef=0.5,
        **options,
    )
    model = CausalLM(DECODER)
    policy = TextPolicy(model, SamplingConfig(max_new_tokens=RESPONSE), eos_id=2, pad_id=0)
    critic = ScalarModel(DECODER, "normal") if advantage.needs_critic else None
    algorithm = config.build(policy, critic, steps=1)
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"policy": model.init(keys[0])} | ({} if critic is None else {"value": critic.init(keys[1])})
    prompts = Prompts(
        jax.random.randint(keys[2], (ROWS // 2, PROMPT), 3, 32),
        jnp.arange(PROMPT)[None] >= jnp.arange(ROWS // 2)[:, None] % 4,
        jnp.arange(ROWS // 2, dtype=jnp.uint32),
    )
    frozen = Frozen(reference=model.init(jax.random.key(9)))
    draw = jax.jit(lambda params, frozen: policy.sample(params, frozen, prompts, keys[3], algorithm.draws))
    rollout = draw(params["policy"], frozen)
    # Unequal lengths, stronger than chance gives: row i keeps at most 1 + i % 7 tokens.
    keep = rollout.response_mask & (jnp.arange(RESPONSE)[None] <= jnp.arange(ROWS)[:, None] % RESPONSE)
    rollout = rollout.replace(response_mask=keep, logprobs=jnp.where(keep, rollout.logprobs, 0))
    rewards = RewardBatch(
        score=jnp.sin(jnp.arange(ROWS, dtype=jnp.float32)),
        valid=jnp.arange(ROWS) != 5,
        token_rewards=jnp.zeros((ROWS, RESPONSE)),
    )
    return Setup(algorithm, algorithm.init(params, np.uint32(3)), frozen, StepData(prompts), rollout, rewards)


# Every algorithm has its line here: how it is set up, and on which layouts its step is compared with that of one device.
LAYOUTS = {"8x1x1": (8, 1, 1), "2x4x1": (2, 4, 1), "2x2x2": (2, 2, 2)}
EVERY = ("pmap8", *LAYOUTS)
SOME = ("pmap8", "2x2x2")  # a device's own rows, and every axis of a mesh at once
IN_LOSS = {"kl_in": "loss"}
ALGORITHMS: dict[str, tuple[Callable[[], Setup], tuple[str, ...]]] = {
    "gae": (lambda: policy_gradient(GAE()), EVERY),
    "group": (lambda: policy_gradient(GroupNormalised(), **IN_LOSS), SOME),
    # a device packs its own rows, in turns of one: a row for a prompt with both of its answers, or a row for each
    "group_packed": (lambda: policy_gradient(GroupNormalised(), packed_rows=2, **IN_LOSS), SOME),
    "rloo": (lambda: policy_gradient(LeaveOneOut(), **IN_LOSS), EVERY),
    "rloo_packed": (lambda: policy_gradient(LeaveOneOut(), packed_rows=1, **IN_LOSS), SOME),
}
PACKED = {"group_packed": "group", "rloo_packed": "rloo"}


@functools.cache  # steps donate their state: they get a `fresh` one
def setup(name: str = "gae") -> Setup:
    return ALGORITHMS[name][0]()


def make_runner(layout: str) -> Runner:
    return PmapRunner() if layout == "pmap8" else ShardRunner(make_mesh(*LAYOUTS[layout]))


@pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for name, (_, layouts) in ALGORITHMS.items() for layout in layouts]
)
def test_every_layout_takes_the_same_step(name, layout):
    case = setup(name)
    expected, metrics = case.stepped
    got, got_metrics = make_runner(layout).step(case.algorithm.step)(fresh(case.state), Frozen(), case.batch)
    got, got_metrics = jax.device_get((got, got_metrics))
    assert relative_distance(got.params, expected.params) < 1e-5
    assert relative_distance(got.params, case.state.params) > 1e-3, "the step must have moved the parameters"
    assert set(got_metrics) == set(metrics)
    for key, value in metrics.items():
        np.testing.assert_allclose(got_metrics[key], value, rtol=1e-4, atol=2e-6, err_msg=key)
    assert int(got.step) == 1


@pytest.mark.parametrize(("packed", "padded"), PACKED.items())
def test_packed_rows_take_the_same_step(packed, padded):
    """From the rollout on: scores, advantages, and the new parameters."""
    got, expected = setup(packed), setup(padded)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got.batch), jax.tree.leaves(expected.batch), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=jax.tree_util.keystr(path))
    assert relative_distance(got.stepped[0].params, expected.stepped[0].params) < 1e-5


@pytest.mark.parametrize("layout", SOME)
@pytest.mark.parametrize("name", ["gae", "rloo", *PACKED])
def test_every_layout_prepares_the_same_batch(name, layout):
    """Scores in either layout of the rows, advantages, and all that is only handed on."""
    case = setup(name)

    def prepare(replicated, inputs, *, axis_name=None):
        return case.algorithm.prepare(*replicated, *inputs, axis_name=axis_name)

    runner = make_runner(layout)
    replicated = runner.place(fresh((case.state, case.frozen)))
    got = runner.map(prepare)(replicated, (case.data, case.rollout, case.rewards))
    expected = setup(PACKED.get(name, name)).batch
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=jax.tree_util.keystr(path))
    for scores in (expected.fields.logprobs, expected.fields.ref_logprobs, expected.fields.advantages):
        assert np.abs(scores).max() > 0.1


@pytest.mark.parametrize("layout", EVERY)
def test_every_layout_has_the_same_gradient(layout):
    case = setup("gae")
    update = case.algorithm.update(case.state, Frozen())

    def step(params, batch, *, axis_name=None):
        grads, loss, _ = update.gradients(params, batch, axis_name)
        return grads, loss

    expected, loss = jax.jit(step)(case.state.params, case.batch)
    got, got_loss = make_runner(layout).step(step)(fresh(case.state.params), case.batch)
    assert relative_distance(got, expected) < 1e-5
    np.testing.assert_allclose(jax.device_get(got_loss), loss, rtol=1e-5)


def test_activations_stay_with_their_rows_on_a_mesh():
    """Weights are gathered and gradients summed; nothing makes the devices exchange what they know of each other's rows."""
    model, mesh = CausalLM(DECODER), make_mesh(2, 2, 2)

    def loss(params, tokens, prompt_mask, response_mask):
        view = sequences_view(tokens, prompt_mask, response_mask, answers=2)
        return model.token_logprobs(params, model.hidden(params, view), view.targets)[0].sum(where=response_mask)

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


@pytest.mark.parametrize("vocabulary", [32_000, 152_000])
@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2)], ids=str)
def test_the_output_matrix_works_on_the_rows_of_each_device(shape, vocabulary):
    """In chunks: no device computes logits of the others' tokens, none sends hidden states, none adds up logits."""
    width, rows, columns = 64, 32, 64
    model = CausalLM(small_decoder(vocabulary, num_layers=1, width=width, num_heads=4, context_length=128))
    mesh = make_mesh(*shape)

    def loss(params, hidden, targets):
        return model.token_logprobs(params, hidden, targets)[0].sum()

    params = jax.eval_shape(model.init, jax.random.key(0))
    placed = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        params,
        state_shardings(params, mesh),
    )
    split = NamedSharding(mesh, BATCH)
    hidden = jax.ShapeDtypeStruct((rows, columns, width), jnp.float32, sharding=split)
    targets = jax.ShapeDtypeStruct((rows, columns), jnp.int32, sharding=split)
    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(placed, hidden, targets).compile().as_text()
    tokens = rows * columns // (mesh.shape["data"] * mesh.shape["fsdp"])
    turns = -(-tokens * vocabulary // causal_lm.CHUNK_ELEMENTS)
    own, share = -(-tokens // turns), vocabulary // mesh.shape["tensor"]
    widest = [int(n) for n in re.findall(rf"f32\[(\d+),{share}\]", program) if int(n) != width]
    assert max(widest) == own, "logits of one chunk of this device's tokens"
    reduced = re.findall(r"= (?:\()?(f32\[[\d,]*\]).* all-reduce\(", program)
    assert not [x for x in reduced if x.endswith(f"{share}]") and not x.startswith(f"f32[{width},")]
    gathered = re.findall(r"= (?:\()?f32\[([\d,]*)\].* all-gather\(", program)
    assert all(str(share) in dims.split(",") for dims in gathered), "weights alone"


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


def test_one_valid_item_is_whitened_to_zero():
    x, mask = jnp.array([3.0, jnp.nan]), jnp.array([True, False])
    assert jnp.array_equal(masked_whiten(x, mask), jnp.zeros(2))


def test_parameters_are_really_split():
    state, mesh = setup().state, make_mesh(2, 2, 2)
    placed = jax.device_put(state, state_shardings(state, mesh))
    kernel = placed.params["policy"]["trunk"]["layers_0"]["q"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    moment = placed.opt_state["policy"][1].mu["trunk"]["layers_0"]["down"]["kernel"]
    assert moment.addressable_shards[0].data.size == moment.size // 4


def test_pmap_moves_what_is_replicated_once():
    """What is placed is on every device, comes back so from a step, and is then used without being moved."""
    runner = PmapRunner()
    placed = runner.place({"w": np.arange(64.0)})
    assert len(placed["w"].sharding.device_set) == 8
    assert placed["w"].sharding.is_fully_replicated
    made = runner.init(lambda x: {"w": x + 1}, np.arange(64.0))
    assert made["w"].sharding == placed["w"].sharding
    scale = runner.map(lambda weights, rows, *, axis_name=None: rows * weights["w"][2])
    step = runner.step(lambda state, rows, *, axis_name=None: (jax.tree.map(lambda w: w + 1, state), {"n": rows.sum()}))
    rows = jax.device_put(np.ones((8, 2)), NamedSharding(make_mesh(8), BATCH))
    state, _ = step(made, rows)
    np.testing.assert_array_equal(state["w"], np.arange(64.0) + 2)
    scale(placed, rows), scale(state, rows)  # compiled
    with jax.transfer_guard_device_to_device("disallow"):
        np.testing.assert_array_equal(jax.device_get(scale(placed, rows)), 2 * np.ones((8, 2)))
        np.testing.assert_array_equal(jax.device_get(scale(state, rows)), 4 * np.ones((8, 2)))


def test_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="multiple of 8"):
        pmap_step(lambda s, b, axis_name: (s, b))(jnp.zeros(()), jnp.zeros((6, 2)))
    with pytest.raises(UserError, match="needs 16 devices"):
        make_mesh(4, 2, 2)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh asks of a chip of a TPU v4."""

    id: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    core_on_chip: int = 0
    process_index: int = 0
    slice_index: int = 0


def test_a_mesh_goes_by_the_torus_of_a_tpu():
    """32 chips of 4 x 4 x 2, in any order: each four that share matrix products are one ring of the torus."""
    places = [(x, y, z) for z in range(2) for y in range(4) for x in range(4)]
    order = np.random.default_rng(0).permutation(32)
    grid = make_mesh(2, 4, 4, devices=[Chip(int(i), places[i]) for i in order]).devices  # type: ignore[list-item]
    assert len({chip.id for chip in grid.flat}) == 32
    for ring in grid.reshape(-1, 4):
        moving = [axis for axis in range(3) if len({chip.coords[axis] for chip in ring}) > 1]
        assert len(moving) == 1, [chip.coords for chip in ring]


def test_eight_fake_devices():
    assert len(jax.devices()) == 8 and os.environ["JAX_PLATFORMS"] == "cpu"


MANY = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from rlaif_jax.checkpoint import fingerprint
from rlaif_jax.parallel import ShardRunner, make_mesh

mesh, batch = make_mesh(2, 2, 2), np.ones((64, 64))

def score(weights, batch, *, axis_name):
    kernel = weights["q"]["kernel"]  # split over fsdp and tensor: two sums over devices, in different groups
    return batch * jnp.sum(jnp.sum(kernel, 0)) + jnp.sum(batch @ kernel)

for _ in range(10):
    if sys.argv[1] == "weights":
        split = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
        fingerprint([jax.device_put(jnp.ones((16, 16)), split) for _ in range(200)])
    else:
        runner = ShardRunner(mesh)
        program, weights = runner.map(score), runner.place({"q": {"kernel": jnp.zeros((64, 64))}})
        jax.block_until_ready([program(weights, batch) for _ in range(200)])
"""


@pytest.mark.parametrize("what", ["map", "weights"])
def test_more_programs_in_a_row_than_xla_holds_end(what):
    """XLA aborts a process whose devices wait for each other: each case is a process, and waits 5 instead of 40 s."""
    flags = "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=5"
    done = subprocess.run(
        [sys.executable, "-c", MANY, what], env=os.environ | {"XLA_FLAGS": flags}, capture_output=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
