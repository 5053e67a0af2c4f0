"""The decoder's promises: padding does not matter, the future does not leak, log-probs are exact, remat is free."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.models import CausalLM, ScalarModel, ValueHead, causal_lm, decoder, gather_last
from rlaif_jax.models.decoder import Trunk, apply, response_hidden
from rlaif_jax.models.decoder_config import DecoderConfig, small_decoder
from rlaif_jax.models.heads import ScalarHead
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import JitRunner, make_mesh
from rlaif_jax.policies.text import generate
from rlaif_jax.types import Frozen, Prompts
from tests.helpers import random_params, sequences_view

V, S = 50, 13
LLAMA = small_decoder(V, num_layers=2, width=32, num_heads=4, num_kv_heads=2, context_length=32)
GPT2 = dataclasses.replace(
    LLAMA,
    num_kv_heads=4,
    norm="layer",
    positions="learned",
    mlp="gelu",
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    tie_embeddings=False,
)


def random_model(config: DecoderConfig) -> tuple[CausalLM, dict]:
    """A model none of whose parameters is zero or one: no norm, bias or matrix can hide."""
    model = CausalLM(config)
    return model, random_params(model, scale=0.2)


def random_tokens(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, shape).astype(np.int32)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["rope", "learned"])
def test_left_padding_changes_nothing(config: DecoderConfig) -> None:
    """Rows of the same 13 tokens behind 0, 3 and 9 pads of whatever content, also ids outside the vocabulary."""
    model, params = random_model(config)
    real = random_tokens((S,))
    tokens = random_tokens((3, S + 9), seed=1)
    mask = np.zeros((3, S + 9), bool)
    tokens[0, :9], tokens[1, :9] = -1, V + 7
    for row, pads in enumerate((9, 3, 0)):
        tokens[row, pads : pads + S], mask[row, pads : pads + S] = real, True
    logits = jax.jit(model)(params, tokens, mask)
    assert np.isfinite(logits).all()  # also where a pad attends to nothing
    rows = [np.asarray(logits[row, pads : pads + S]) for row, pads in enumerate((9, 3, 0))]
    assert np.std(rows[0]) > 0.1
    np.testing.assert_allclose(rows[1], rows[0], atol=1e-5)
    np.testing.assert_allclose(rows[2], rows[0], atol=1e-5)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["rope", "learned"])
def test_the_future_does_not_leak(config: DecoderConfig) -> None:
    model, params = random_model(config)
    tokens = random_tokens((1, S)).repeat(2, axis=0)
    tokens[1, 8] = (tokens[1, 8] + 1) % V
    logits = np.asarray(jax.jit(model)(params, tokens, np.ones((2, S), bool)))
    np.testing.assert_array_equal(logits[0, :8], logits[1, :8])
    assert (np.abs(logits[0, 8:] - logits[1, 8:]).max(axis=-1) > 1e-3).all()  # and the past is heard


def test_positions_are_told_apart() -> None:
    """Two orders of the same earlier tokens give different logits: rotary positions are applied."""
    model, params = random_model(dataclasses.replace(LLAMA, num_layers=1))
    tokens = np.array([[3, 4, 5, 6], [4, 3, 5, 6]], np.int32)
    logits = np.asarray(jax.jit(model)(params, tokens, np.ones((2, 4), bool)))
    assert np.abs(logits[0, -1] - logits[1, -1]).max() > 1e-3


def explicit_logprobs(logits: np.ndarray, targets: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Log-softmax and entropy in float64, written out."""
    scaled = np.asarray(logits, np.float64) / temperature
    logprobs = (
        scaled
        - np.log(np.exp(scaled - scaled.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - scaled.max(-1, keepdims=True)
    )
    chosen = np.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    return chosen, -(np.exp(logprobs) * logprobs).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_tokens", [10_000, 5], ids=["whole", "chunked"])
def test_token_logprobs(temperature: float, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_lm, "CHUNK_ELEMENTS", chunk_tokens * V + 3)
    model, params = random_model(GPT2)
    hidden = np.random.default_rng(1).standard_normal((2, S - 1, GPT2.width)).astype(np.float32)
    targets = random_tokens((2, S - 1))
    logits = hidden @ params["lm_head"]["kernel"]
    want, entropy = explicit_logprobs(logits, targets, temperature)
    scored, plainly = (
        jax.jit(lambda p, h, e=e: model.token_logprobs(p, h, targets, temperature, entropy=e)) for e in (True, False)
    )
    got, got_entropy = scored(params, hidden)
    assert got.shape == (2, S - 1)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(got_entropy, entropy, atol=1e-5)
    plain, zeros = plainly(params, hidden)
    np.testing.assert_allclose(plain, want, atol=1e-5)
    assert not np.any(zeros)


def assert_same_gradients(got: dict, want: dict, tolerance: float) -> None:
    """Equal to `tolerance` of the largest entry of all (a key's bias has gradient zero but for rounding)."""
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(want))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["tied", "untied"])
def test_chunks_have_the_same_gradient_and_hold_no_full_logits(
    config: DecoderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, params = random_model(config)
    rng = np.random.default_rng(2)
    hidden = rng.standard_normal((2, S - 1, config.width)).astype(np.float32)
    weights = rng.standard_normal((2, 2, S - 1)).astype(np.float32)
    targets = random_tokens((2, S - 1))

    def gradients(chunk_tokens: int) -> tuple[dict, str]:
        monkeypatch.setattr(causal_lm, "CHUNK_ELEMENTS", chunk_tokens * V)

        def loss(params: dict, hidden: jax.Array) -> jax.Array:
            logprobs, entropies = model.token_logprobs(params, hidden, targets, 0.8, entropy=True)
            return jnp.sum(weights[0] * logprobs + weights[1] * entropies)

        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(params, hidden)
        return traced.lower().compile()(params, hidden), str(traced.jaxpr)

    (whole, whole_jaxpr), (chunked, chunked_jaxpr) = gradients(10_000), gradients(5)
    assert_same_gradients(chunked, whole, 1e-5)
    count = 2 * (S - 1)
    assert f"f32[{count},{V}]" in whole_jaxpr
    assert f"f32[5,{V}]" in chunked_jaxpr
    for held in (f"f32[{count},{V}]", f"f32[5,5,{V}]"):
        assert held not in chunked_jaxpr


@pytest.mark.parametrize(
    "config", [dataclasses.replace(LLAMA, qk_norm=True), dataclasses.replace(GPT2, remat=True)], ids=["rope", "learned"]
)
@pytest.mark.parametrize("prompt", [4, 1])
def test_answers_that_share_their_prompts_columns(config: DecoderConfig, prompt: int) -> None:
    """Three answers to each of two prompts: hidden states and gradients are those of six rows on their own, whatever
    padding holds; a prompt's columns are computed once."""
    params = random_model(config)[1]
    rng = np.random.default_rng(4)
    length = S - prompt
    prompt_mask = (np.arange(prompt) >= np.array([[0], [min(2, prompt - 1)]])).repeat(3, axis=0)
    response_mask = np.arange(length) < np.array([length, 1, 3, 5, length, 2])[:, None]
    tokens = random_tokens((6, S))
    tokens[:, :prompt] = tokens[::3, :prompt].repeat(3, axis=0)
    junk = np.where(np.concatenate([prompt_mask, response_mask], axis=1), tokens, rng.integers(0, V, tokens.shape))
    weights = np.where(response_mask, rng.standard_normal((6, length)), 0)[..., None]

    def loss(params: dict, tokens: np.ndarray, answers: int) -> tuple[jax.Array, jax.Array]:
        hidden = response_hidden(config, params["trunk"], sequences_view(tokens, prompt_mask, response_mask, answers))
        return jnp.sum(weights * jnp.cos(3 * hidden)), hidden

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)
    (_, alone), want = run(params, tokens, 1)
    (_, together), got = run(params, junk, 3)
    np.testing.assert_allclose(together[response_mask], alone[response_mask], atol=1e-5)
    assert_same_gradients(got, want, 1e-5)
    shared = f"2,{prompt - 1 + 3 * length},{config.width}"
    assert (shared in str(run.trace(params, tokens, 3).jaxpr)) == (prompt > 1)


@pytest.mark.parametrize("answers", [1, 3])
def test_blocks_in_a_loop_and_one_by_one(answers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers in a loop, which a mesh takes; one by one, the last block is computed for the columns that are read."""
    config, prompt = dataclasses.replace(LLAMA, qk_norm=True), 6
    params = random_model(config)[1]
    tokens, mask = random_tokens((6, S)), np.ones((6, S), bool)
    mask[3:, :2] = False

    def loss(params: dict) -> tuple[jax.Array, jax.Array]:
        view = sequences_view(tokens, mask[:, :prompt], mask[:, prompt:], answers)
        hidden = response_hidden(config, params["trunk"], view)
        return jnp.sum(jnp.cos(3 * hidden)), hidden

    def run(*shape: int) -> tuple[tuple[jax.Array, dict], str]:
        with jax.set_mesh(make_mesh(*shape)):
            traced = jax.jit(jax.value_and_grad(loss, has_aux=True)).trace(params)
            ((_, hidden), gradient) = traced.lower().compile()(params)
        return jax.device_get((hidden, gradient)), str(traced.jaxpr)

    (got, gradient), one_by_one = run(2, 1, 2)
    monkeypatch.setattr(decoder, "FLAT", 0)
    (want, in_loop), loop = run(1, 2, 2)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert_same_gradients(gradient, in_loop, 1e-5)
    assert ("scan[" in loop, "scan[" in one_by_one) == (True, False)
    every = 6 * (S - 1) if answers == 1 else 2 * (prompt - 1 + 3 * (S - prompt))
    products = lambda rows: one_by_one.count(f"f32[{rows},{config.mlp_width}] = dot_general")
    assert (products(every), products(6 * (S - prompt))) == (3, 3), (
        "up, gate and the gradient through down of either block"
    )


def test_the_splash_kernel_for_the_columns_that_are_read() -> None:
    plain, prompt = LLAMA, 6
    params = random_model(plain)[1]
    tokens, mask = random_tokens((2, S)), np.ones((2, S), bool)
    mask[1, :2] = False
    view = sequences_view(tokens, mask[:, :prompt], mask[:, prompt:])
    hidden = lambda config: response_hidden(config, params["trunk"], view)
    got = jax.jit(hidden, static_argnums=0)(dataclasses.replace(plain, attention="splash"))
    np.testing.assert_allclose(got, jax.jit(hidden, static_argnums=0)(plain), atol=1e-5)


def test_remat_gives_the_same_gradients_in_less_memory() -> None:
    tokens, mask = random_tokens((64, S)), np.ones((64, S), bool)
    plain, params = random_model(dataclasses.replace(LLAMA, num_layers=5))
    remat = CausalLM(dataclasses.replace(plain.config, remat=True))

    def gradients(model: CausalLM) -> tuple[dict, int]:
        loss = lambda p: jnp.mean(model.sequence_hidden(p, tokens, mask) ** 2)
        compiled = JitRunner().map(lambda p, _, axis_name: jax.grad(loss)(p)).lower(params, None).compile()
        return compiled(params, None), compiled.memory_analysis().temp_size_in_bytes

    (want, plain_bytes), (got, remat_bytes) = gradients(plain), gradients(remat)
    assert_same_gradients(got, want, 1e-5)
    assert remat_bytes < 0.5 * plain_bytes
    caches = [
        jax.jit(lambda p, c=model.config: apply(Trunk(c), p["trunk"], tokens, mask)[1])(params)
        for model in (plain, remat)
    ]
    assert len(caches[0]) == 5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *caches)


def test_no_pass_of_a_deep_model_holds_a_second_copy_of_its_weights() -> None:
    """Neither a forward pass, nor a rollout, nor a gradient beyond the gradient itself: a stack of the blocks would be one."""
    model = CausalLM(dataclasses.replace(LLAMA, num_layers=14, width=128))
    params = jax.eval_shape(model.init, jax.random.key(0))
    weights = sum(4 * x.size for x in jax.tree.leaves(params))
    tokens, mask = random_tokens((1, 8)), np.ones((1, 8), bool)

    def answers(params: dict, _: None, axis_name: None) -> jax.Array:
        sampling = SamplingConfig(max_new_tokens=4)
        prompts = Prompts(tokens, mask, np.arange(1, dtype=np.uint32))
        return generate(model, params, prompts, jax.random.key(0), sampling=sampling, eos_id=1, pad_id=0).tokens

    loss = lambda params: jnp.mean(model.sequence_hidden(params, tokens, mask) ** 2)
    passes = (lambda params, _, axis_name: loss(params), answers, lambda params, _, axis_name: jax.grad(loss)(params))
    for fn in passes:
        compiled = JitRunner().map(fn).lower(params, None).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 0.3 * weights


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["rope", "learned"])
def test_bfloat16_computes_over_float32_parameters(config: DecoderConfig) -> None:
    exact, params = random_model(config)
    rough = CausalLM(dataclasses.replace(config, compute_dtype="bfloat16"))
    tokens, mask = random_tokens((2, S)), np.ones((2, S), bool)
    assert jax.eval_shape(rough.sequence_hidden, params, tokens, mask).dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(jax.eval_shape(rough.init, jax.random.key(0))))
    want, got = jax.jit(exact)(params, tokens, mask), jax.jit(rough)(params, tokens, mask)
    assert got.dtype == jnp.float32
    error = float(np.abs(got - want).max() / np.abs(want).max())
    assert 1e-5 < error < 0.03  # eight bits of mantissa: 2^-8 a rounding


def test_last_real() -> None:
    values = np.arange(20, dtype=np.float32).reshape(4, 5)
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 0, 0]], bool)
    np.testing.assert_array_equal(gather_last(values, mask), [4, 7, 14, 16])


def test_scalar_head_starts_at_zero_or_with_the_stated_spread() -> None:
    width = 4095
    reward = ScalarHead("normal").init(jax.random.key(0), jnp.zeros((1, width)))["params"]["scalar"]
    assert np.std(reward["kernel"]) == pytest.approx((width + 1) ** -0.5, rel=0.05)
    assert not np.any(reward["bias"])
    value = ScalarModel(LLAMA).init(jax.random.key(0), random_model(LLAMA)[1]["trunk"])
    tokens, mask = random_tokens((2, S)), np.ones((2, S), bool)
    scores = jax.jit(ScalarModel(LLAMA))(value, tokens, mask)
    assert scores.shape == (2, S)
    assert scores.dtype == jnp.float32
    assert not np.any(scores)
    shared, view = ValueHead(LLAMA.width), sequences_view(tokens, mask[:, :4], mask[:, 4:])
    assert not np.any(shared.values(shared.init(jax.random.key(0)), Frozen(), view, jnp.ones((2, S - 4, LLAMA.width))))


def test_scalar_model_starts_from_a_copy_of_another_trunk() -> None:
    model, params = random_model(LLAMA)
    params = jax.tree.map(jnp.asarray, params)
    reward = ScalarModel(LLAMA, "normal")
    own = reward.init(jax.random.key(1), params["trunk"])
    tokens, mask = random_tokens((2, S)), np.ones((2, S), bool)
    kernel, hidden = own["head"]["scalar"]["kernel"], jax.jit(model.sequence_hidden)(params, tokens, mask)
    np.testing.assert_allclose(jax.jit(reward)(own, tokens, mask), (hidden @ kernel)[..., 0], atol=1e-5)
    jax.tree.map(lambda x: x.delete(), own)  # as a donated state's buffers are
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("flags, named", [({"num_kv_heads": 3}, "num_kv_heads"), ({"head_dim": 7}, "head_dim")])
def test_impossible_shapes_are_refused(flags: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        dataclasses.replace(LLAMA, **flags)
