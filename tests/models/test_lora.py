"""Adapters: hand numbers, base + adapter == merged, gradients, what the update computes, what is refused by name."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlaif_jax.algorithms.fit import FitConfig, fit_model
from rlaif_jax.algorithms.reward_modeling import ranking_step, reward_step
from rlaif_jax.algorithms.scoring import policy_logprobs
from rlaif_jax.algorithms.supervised import supervised_step
from rlaif_jax.config import UserError, from_json, to_json
from rlaif_jax.models import CausalLM, ScalarModel, decoder
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.dense import Dense
from rlaif_jax.models.lora import TARGETS, LoRAConfig
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import JitRunner, ShardRunner, make_mesh
from rlaif_jax.policies.base import Draw
from rlaif_jax.policies.text import TextPolicy
from rlaif_jax.types import Frozen, Prompts, RewardBatch
from tests.builders import DECODER, adapted, ppo
from tests.helpers import assert_same_leaves, random_params, relative_distance, sequences_view

LLAMA = small_decoder(40, num_layers=2, width=16, num_heads=4, num_kv_heads=2, context_length=32)
GPT2 = dataclasses.replace(LLAMA, mlp="gelu", num_kv_heads=4, norm="layer", positions="learned", qkv_bias=True)
MODEL, LORA = CausalLM(LLAMA), LoRAConfig(rank=3, alpha=5.0)
TOKENS = np.random.default_rng(0).integers(0, 40, (3, 9)).astype(np.int32)
MASK = np.arange(9) >= np.array([[0], [2], [5]])


def random_adapter(lora: LoRAConfig, base, seed: int = 1, scale: float = 0.2):
    """An adapter whose A and B are both random."""
    rng = np.random.default_rng(seed)
    tree = jax.eval_shape(lambda: lora.init(jax.random.key(0), base))
    return jax.tree.map(lambda x: (scale * rng.standard_normal(x.shape)).astype(np.float32), tree)


@functools.cache
def parts():
    base = random_params(MODEL, 0)
    return base, random_adapter(LORA, base)


# ---- The layer


@pytest.mark.parametrize(
    ("lora", "scale"), [(LoRAConfig(4, 6.0), 1.5), (LoRAConfig(4, 6.0, rslora=True), 3.0), (LoRAConfig(), 2.0)]
)
def test_the_scale_is_alpha_over_the_rank_or_its_root(lora, scale):
    assert lora.scale == scale
    assert from_json(LoRAConfig, to_json(lora)) == lora


@pytest.mark.parametrize("rslora", [False, True])
def test_a_layer_adds_the_scaled_product(rslora):
    rng = np.random.default_rng(0)
    x, w, a, b, bias = (rng.standard_normal(shape) for shape in ((2, 3, 5), (5, 7), (5, 4), (4, 7), (7,)))
    lora = LoRAConfig(rank=4, alpha=6.0, targets=("q",), rslora=rslora)
    base = {"q": {"kernel": w.astype(np.float32), "bias": bias.astype(np.float32)}}
    joined = lora.join(base, {"q": {"lora_a": a.astype(np.float32), "lora_b": b.astype(np.float32)}})
    want = x @ w + bias + (3.0 if rslora else 1.5) * (x @ a @ b)  # float64
    got = Dense(7).apply({"params": joined["q"]}, x.astype(np.float32))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    merged = lora.merge(base, {"q": {"lora_a": a.astype(np.float32), "lora_b": b.astype(np.float32)}})
    np.testing.assert_allclose(x @ np.float64(merged["q"]["kernel"]) + bias, want, rtol=1e-5, atol=1e-5)


def test_a_fresh_adapter_is_drawn_as_peft_draws_it():
    base = {"up": {"kernel": jax.ShapeDtypeStruct((400, 30), jnp.float32), "bias": jnp.zeros(30)}}
    lora = LoRAConfig(rank=50, targets=("up",))
    made, other = (lora.init(jax.random.key(seed), base)["up"] for seed in (0, 1))
    assert {name: x.shape for name, x in made.items()} == {"lora_a": (400, 50), "lora_b": (50, 30)}
    assert not made["lora_b"].any()
    # kaiming_uniform_(a=sqrt(5)): uniform in +-sqrt(6 / (1 + 5) / 400) = +-0.05, of standard deviation .05 / sqrt(3)
    assert 0.0499 < np.abs(made["lora_a"]).max() <= 0.05
    np.testing.assert_allclose(np.std(made["lora_a"]), 0.05 / np.sqrt(3), rtol=0.02)
    assert abs(np.corrcoef(np.ravel(made["lora_a"]), np.ravel(other["lora_a"]))[0, 1]) < 0.05


def test_every_matrix_has_an_a_by_itself():
    adapter = LORA.init(jax.random.key(0), parts()[0])["trunk"]
    first = [np.ravel(adapter[f"layers_{i}"][name]["lora_a"])[:6].tobytes() for i in range(2) for name in TARGETS]
    assert len(set(first)) == len(first) == 14


# ---- Whole models


@pytest.mark.parametrize("config", [LLAMA, GPT2, dataclasses.replace(LLAMA, remat=True)])
def test_base_and_adapter_equal_the_merged_model(config):
    model, lora = CausalLM(config), LORA if config.mlp == "swiglu" else LoRAConfig(3, 5.0, ("q", "v", "o", "down"))
    base = random_params(model, 0)
    adapter = random_adapter(lora, base)
    run = jax.jit(lambda params: model(params, TOKENS, MASK))
    got, merged, alone = run(lora.join(base, adapter)), run(lora.merge(base, adapter)), run(base)
    np.testing.assert_allclose(got[MASK], merged[MASK], atol=2e-5)
    assert np.abs(got - alone)[MASK].max() > 0.5
    assert jax.tree.structure(lora.merge(base, adapter)) == jax.tree.structure(base)


def test_an_empty_adapter_is_the_base_and_a_fresh_one_changes_no_bit():
    base, _ = parts()
    assert all(x is y for x, y in zip(jax.tree.leaves(LORA.join(base, {})), jax.tree.leaves(base), strict=True))
    run = jax.jit(lambda adapter: MODEL(LORA.join(base, adapter), TOKENS, MASK))
    np.testing.assert_array_equal(run(LORA.init(jax.random.key(0), base)), run({}))


def test_gradients_equal_those_through_the_merged_model():
    base, adapter = parts()

    def loss(over, adapter):
        logits = MODEL(over(base, adapter), TOKENS, MASK)[:, :-1]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), TOKENS[:, 1:, None], -1)[..., 0]
        return -jnp.sum(jnp.where(MASK[:, :-1], chosen, 0))

    got, want = (jax.jit(jax.grad(functools.partial(loss, over)))(adapter) for over in (LORA.join, LORA.merge))
    assert relative_distance(got, want) < 1e-5
    assert min(float(np.abs(x).max()) for x in jax.tree.leaves(got)) > 1e-3


def test_blocks_in_a_loop_on_a_mesh_compute_the_same(monkeypatch):
    base, adapter = parts()

    def step(adapter, base, rows, *, axis_name=None):
        loss = lambda adapter: jnp.sum(MODEL(LORA.join(base, adapter), *rows) ** 2)
        return jax.grad(loss)(adapter), {}

    rows = (np.tile(TOKENS[:1], (8, 1)), np.ones((8, 9), bool))
    want, _ = jax.jit(step)(adapter, base, rows)
    monkeypatch.setattr(decoder, "FLAT", 0)
    runner = ShardRunner(make_mesh(2, 2, 2))
    placed = runner.place(adapter)
    spec = lambda name, part: tuple(placed["trunk"]["layers_0"][name][part].sharding.spec)
    assert (spec("q", "lora_a"), spec("q", "lora_b")) == (("fsdp", None), (None, "tensor"))
    assert (spec("o", "lora_a"), spec("o", "lora_b")) == (("tensor", None), (None, "fsdp"))
    assert relative_distance(runner.step(step)(placed, runner.place(base), rows)[0], want) < 1e-5


# ---- The policy


def policy_of(dtype: str, lora: LoRAConfig | None = LORA, **sampling) -> TextPolicy:
    model = CausalLM(dataclasses.replace(LLAMA, compute_dtype=dtype))
    return TextPolicy(model, SamplingConfig(max_new_tokens=8, **sampling), eos_id=3, pad_id=0, lora=lora)


PROMPTS = Prompts(jnp.asarray(TOKENS[:, 4:]), jnp.asarray(MASK[:, 4:]), jnp.arange(3, dtype=jnp.uint32))


@pytest.mark.parametrize(("dtype", "gap", "slots"), [("float32", 2e-5, 0), ("float32", 2e-5, 2), ("bfloat16", 5e-2, 0)])
def test_the_sampler_agrees_with_the_trainer(dtype, gap, slots):
    base, adapter = parts()
    policy, frozen = policy_of(dtype, slots=slots), Frozen(reference={}, base=base)
    draw = jax.jit(lambda params, frozen: policy.sample(params, frozen, PROMPTS, jax.random.key(0), (Draw(2),)))
    rollout = draw(adapter, frozen)
    scored = jax.jit(functools.partial(policy_logprobs, policy))(adapter, rollout, frozen=frozen)
    mask = np.asarray(rollout.response_mask)
    assert np.abs(np.asarray(scored) - np.asarray(rollout.logprobs))[mask].mean() < gap
    alone = jax.jit(functools.partial(policy_logprobs, policy))({}, rollout, frozen=frozen)
    assert np.abs(np.asarray(alone) - np.asarray(rollout.logprobs))[mask].mean() > 20 * gap


def test_the_reference_answers_by_the_base_alone():
    base, adapter = parts()
    draws = (Draw(1), Draw(1, by="reference"))
    frozen = Frozen(reference={}, base=base)
    both = jax.jit(lambda a: policy_of("float32").sample(a, frozen, PROMPTS, jax.random.key(0), draws))(adapter)
    plain = policy_of("float32", lora=None)
    alone = jax.jit(lambda params: plain.sample(params, Frozen(), PROMPTS, jax.random.key(0), (Draw(2),)).tokens)
    learned, reference = np.asarray(alone(LORA.merge(base, adapter))), np.asarray(alone(base))
    np.testing.assert_array_equal(both.tokens[0::2], learned[0::2])
    np.testing.assert_array_equal(both.tokens[1::2], reference[1::2])
    assert not np.array_equal(learned[1::2], reference[1::2])


def test_a_critic_adapts_the_policy_s_trunk_and_has_a_head_in_full():
    base, _ = parts()
    critic = ScalarModel(LLAMA, "normal", lora=LORA)
    fresh = critic.init(jax.random.key(0))
    assert jax.tree.structure(fresh["trunk"]) == jax.tree.structure(LORA.init(jax.random.key(0), base)["trunk"])
    assert fresh["head"]["scalar"]["kernel"].shape == (16, 1)
    params = {"trunk": random_adapter(LORA, base)["trunk"], "head": fresh["head"]}
    view = sequences_view(jnp.asarray(TOKENS), jnp.asarray(MASK[:, :4]), jnp.asarray(MASK[:, 4:]))
    values = lambda model, params, base: np.asarray(model.values(params, Frozen(base=base), view, jnp.zeros(())))
    merged = LORA.merge({"trunk": base["trunk"]}, params)
    got = values(critic, params, base)
    np.testing.assert_allclose(got, values(ScalarModel(LLAMA), merged, None), atol=2e-5)
    unadapted = values(ScalarModel(LLAMA), {"trunk": base["trunk"], "head": fresh["head"]}, None)
    assert np.abs(got - unadapted)[MASK[:, 4:]].max() > 0.05


# ---- What learns


def equations(jaxpr):
    """Yields all equations of a program, also those of its inner programs."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = inner.jaxpr if hasattr(inner, "jaxpr") else inner
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def made_shapes(setup) -> set[tuple[int, ...]]:
    """The shapes of all matrices that the program of an update computes."""
    algorithm = setup.algorithm
    state = jax.eval_shape(algorithm.init, setup.params, np.uint32(0))
    policy, rows = setup.policy, 8 * setup.algorithm.config.answers_per_prompt
    rollout = policy.empty_rollout(rows, 4)
    rewards = RewardBatch(jnp.zeros(rows), jnp.ones(rows, bool), jnp.zeros(rollout.response_mask.shape))
    reference = setup.params["policy"] if setup.base is None else {}
    frozen = Frozen(reference, setup.base)
    batch = jax.eval_shape(lambda s: algorithm.prepare(s, frozen, None, rollout, rewards), state)
    program = jax.make_jaxpr(algorithm.step)(state, Frozen(base=setup.base), batch)
    return {v.aval.shape for e in equations(program.jaxpr) for v in e.outvars if getattr(v.aval, "ndim", 0) == 2}


@pytest.mark.parametrize("packed_rows", [0, 2])
def test_the_update_makes_nothing_of_the_size_of_a_matrix(packed_rows):
    """No gradient of a matrix of the base, no product A B, no moment of one: 28 x 28, 28 x 80, 80 x 28, V x 28."""
    odd = small_decoder(DECODER.vocab_size, num_layers=2, width=28, num_heads=2, context_length=16)
    whole, small = ppo(odd, packed_rows=packed_rows), adapted(odd, packed_rows=packed_rows)
    full = {x.shape for x in jax.tree.leaves(small.base) if x.ndim == 2}
    assert len(full) == 4 and full <= made_shapes(whole)
    assert not full & made_shapes(small)


def test_decoding_computes_no_product_of_the_adapter():
    """Nothing in the loop over tokens has the adapter's rank as a dimension: a rollout merges it once, before."""
    lora, base = LoRAConfig(rank=11), parts()[0]
    policy, adapter = policy_of("float32", lora), random_adapter(lora, base)
    draw = lambda a: policy.sample(a, Frozen(base=base), PROMPTS, jax.random.key(0), (Draw(2),))
    program = jax.make_jaxpr(draw)(adapter).jaxpr
    dims = lambda found: {d for e in found for v in e.outvars for d in getattr(v.aval, "shape", ())}
    loops = [e for e in equations(program) if e.primitive.name in ("while", "scan")]
    assert 40 in dims(equations(SimpleNamespace(eqns=loops))), "the logits of a step"
    assert 11 not in dims(equations(SimpleNamespace(eqns=loops)))


def test_optimiser_and_state_hold_adapters_alone():
    setup = adapted()
    state = jax.eval_shape(setup.algorithm.init, setup.params, np.uint32(0))
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    # rank 2, 2 layers, of q, k, v, o (16 x 16) and gate, up, down (16 x 48); the critic's head has 16 weights and a bias
    matrices = 2 * 2 * (4 * (16 + 16) + 3 * (16 + 48))
    assert count(state.params) == 2 * matrices + 17
    # Adam's two moments and its count, and the schedule's count, of each part
    assert count(state.opt_state) == 2 * (2 * matrices + 17) + 2 * 2


ROWS = {
    "tokens1": TOKENS,
    "mask1": MASK,
    "tokens2": TOKENS[::-1],
    "mask2": MASK[::-1],
    "probability": np.array([1.0, 0.0, 0.7], np.float32),
    "weight": np.ones(3, np.float32),
}
LISTS = {
    "tokens": np.stack([TOKENS, TOKENS[::-1]], 1),
    "mask": np.stack([MASK, MASK[::-1]], 1),
    "ranks": np.array([[1, 2], [2, 1], [1, 1]]),
    "weight": np.ones(3, np.float32),
}
TEXTS = {
    "tokens": TOKENS,
    "segments": np.ones_like(TOKENS),
    "positions": np.tile(np.arange(9, dtype=np.int32), (3, 1)),
    "weights": np.ones(TOKENS.shape, np.float32),
}


@pytest.mark.parametrize(
    ("step", "examples", "kind"),
    [(reward_step, ROWS, "reward"), (ranking_step, LISTS, "reward"), (supervised_step, TEXTS, "lm")],
)
def test_a_fitted_adapter_takes_the_step_of_the_chain_rule(step, examples, kind):
    """The gradients of A, B and the head follow from those of the merged model's matrices: dA = s dW B^T, dB = s A^T dW."""
    base, adapter = parts()
    model = ScalarModel(LLAMA, "normal") if kind == "reward" else MODEL
    head = {"head": model.init(jax.random.key(3))["head"]} if kind == "reward" else {}
    base, params = {"trunk": base["trunk"]}, adapter | head
    logs = []
    config = FitConfig(updates=1, batch_size=3, learning_rate=1e-3)
    keep = jax.tree.map(np.array, (base, params))
    fitted = fit_model(
        step, model, params, examples, config, 0,
        runner=JitRunner(), log=lambda _, values: logs.append(values), lora=LORA, base=base,
    )  # fmt: skip
    assert_same_leaves((base, params), keep)
    assert jax.tree.structure(fitted) == jax.tree.structure(params)
    sgd, whole = optax.sgd(1.0), LORA.merge(base, params)
    (plain, _), metrics = step(model, sgd, (whole, sgd.init(whole)), examples)
    slopes = jax.tree.map(lambda new, old: old - new, plain, whole)
    wanted = []
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        *where, name = (key.key for key in path)
        of = functools.reduce(lambda tree, key: tree[key], where, slopes)
        at = functools.reduce(lambda tree, key: tree[key], where, params)
        if name == "lora_a":
            wanted.append(LORA.scale * of["kernel"] @ at["lora_b"].T)
        else:
            wanted.append(LORA.scale * at["lora_a"].T @ of["kernel"] if name == "lora_b" else of[name])
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in wanted))
    assert norm > 1e-2
    np.testing.assert_allclose(logs[0]["grad_norm"], norm, rtol=1e-4)
    np.testing.assert_allclose(logs[0]["loss"], metrics["loss"], rtol=1e-5)
    for new, old, slope in zip(jax.tree.leaves(fitted), jax.tree.leaves(params), wanted, strict=True):
        sure = np.abs(slope) > 1e-4 * norm  # AdamW's first update is the sign of the gradient, by the learning rate
        np.testing.assert_allclose((new - old)[sure], -1e-3 * np.sign(slope[sure]), rtol=0.02)


# ---- What cannot work is refused by name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"lora.rank must be >= 1, not 0"),
        ({"rank": -3}, r"lora.rank must be >= 1, not -3"),
        ({"alpha": 0.0}, r"lora.alpha must be > 0 and finite, not 0.0"),
        ({"targets": ("q", "q_proj")}, r"lora.targets names q_proj; known are q, k, v, o, gate, up, down"),
        ({"targets": ("q", "q")}, r"each once, not q, q"),
        ({"targets": ()}, r"one matrix or more, each once, not none"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        LoRAConfig(**settings)


def no_layer(adapter):
    return {"trunk": {"layers_2": adapter["trunk"]["layers_0"]}}


NARROW = CausalLM(dataclasses.replace(LLAMA, mlp_width=24))
NO_GATE = "names gate, which the blocks of this model do not have: give --adapter.targets q k v o up down"
RANK_4 = r"down have the shapes \(48, 3\) and \(3, 16\); its base and lora.rank=4 ask for \(48, 4\) and \(4, 16\)"


def fit_without_base(adapter):
    return fit_model(
        reward_step, ScalarModel(LLAMA), adapter, ROWS, FitConfig(1, 3), 0, runner=JitRunner(), log=print, lora=LORA
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b, a: LORA.init(jax.random.key(0), random_params(CausalLM(GPT2))), NO_GATE),
        (lambda b, a: ScalarModel(GPT2, lora=LORA).init(jax.random.key(0)), NO_GATE),
        (lambda b, a: LORA.join(b, no_layer(a)), "at trunk/layers_2/down, where its base has none"),
        (lambda b, a: LoRAConfig(4, 5.0).join(b, a), RANK_4),
        (lambda b, a: LORA.merge(random_params(NARROW), a), r"down have the shapes .*ask for \(24, 3\) and \(3, 16\)"),
        (lambda b, a: policy_of("float32").weights(a, Frozen(reference=b)), "no weights under it: give them as `base`"),
        (lambda b, a: policy_of("float32", lora=None).weights(b, Frozen(base=b)), "the policy has no adapter"),
        (lambda b, a: fit_without_base(a), "needs both `lora`"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call(*parts())
