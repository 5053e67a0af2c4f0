"""The ways to compute attention agree with one written out in NumPy, forward and backward, alone and on a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.models.attention import (
    AttentionMask,
    SharedPrefixMask,
    attend,
    attend_groups,
    attend_library,
    attend_splash,
    build_mask,
    implementation,
)
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.parallel import make_mesh

B, S, C, HEADS, KV, H = 4, 5, 7, 4, 2, 8
CONFIG = dataclasses.replace(
    small_decoder(8, num_layers=1, width=HEADS * H, num_heads=HEADS, num_kv_heads=KV), attention="xla"
)


def drawn() -> tuple[np.ndarray, ...]:
    """Queries, keys, values and segments: left pads, two segments in a row, right pads."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((B, S, HEADS, H)).astype(np.float32)
    k, v = rng.standard_normal((2, B, KV, C, H)).astype(np.float32)
    keys = np.int32([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 2, 2, 0]])
    return q, k, v, keys[:, C - S :], keys


def written_out(q, k, v, seen):
    """[B, S, heads * h] in float64 for seen [B, S, C]."""
    out = np.zeros((B, S, HEADS, H))
    for b, s, head in np.ndindex(B, S, HEADS):
        where = np.flatnonzero(seen[b, s])
        group = head // (HEADS // KV)
        scores = k[b, group, where].astype(np.float64) @ q[b, s, head] / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        out[b, s, head] = weights @ v[b, group, where] / weights.sum()
    return out.reshape(B, S, -1)


def looped(queries, keys):
    seen = np.zeros((B, S, C), bool)
    for b, s, c in np.ndindex(B, S, C):
        seen[b, s, c] = queries[b, s] == keys[b, c] and c <= s + C - S
    return seen


WAYS = {
    "xla": lambda q, k, v, visible: attend(CONFIG, q, k, v, visible.dense()),
    "library": lambda q, k, v, visible: attend_library(q, k, v, visible.dense(), "xla"),
    "splash": attend_splash,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_the_formula(way: str) -> None:
    q, k, v, queries, keys = drawn()
    seen = looped(queries, keys)
    np.testing.assert_array_equal(AttentionMask(queries, keys).dense(), seen)
    got = jax.jit(WAYS[way])(q, k, v, AttentionMask(queries, keys))
    np.testing.assert_allclose(got, written_out(q, k, v, seen), atol=2e-6)


def test_the_library_kernel_is_given_even_lengths() -> None:
    """As cuDNN wants them: odd ones are padded and what was padded is seen by nobody."""
    q, k, v, queries, keys = drawn()
    shapes = []

    def spy(q, k, v, **options):
        shapes.append((q.shape[1], k.shape[1], options["mask"].shape))
        return library(q, k, v, **options)

    library = jax.nn.dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.nn, "dot_product_attention", spy)
        got = attend_library(q, k, v, AttentionMask(queries, keys).dense(), "xla")
    assert shapes == [(S + 1, C + 1, (B, 1, S + 1, C + 1))]
    np.testing.assert_allclose(got, written_out(q, k, v, looped(queries, keys)), atol=2e-6)


@pytest.mark.parametrize("way", ["library", "splash"])
def test_gradients_agree(way: str) -> None:
    q, k, v, queries, keys = drawn()
    direction = np.random.default_rng(1).standard_normal((B, S, HEADS * H)).astype(np.float32)

    def gradient(fn):
        return jax.jit(jax.grad(lambda x: jnp.vdot(fn(*x, AttentionMask(queries, keys)), direction)))((q, k, v))

    for got, want in zip(gradient(WAYS[way]), gradient(WAYS["xla"])):
        assert jnp.linalg.norm(got - want) < 1e-5 * jnp.linalg.norm(want)


def test_answers_see_their_prompt_and_themselves() -> None:
    segments = np.int32([[1, 1, 1, 1, 1, 2, 2]])
    answers = np.int32([[0, 0, 1, 2, 2, 0, 3]])
    seen = AttentionMask(segments, segments, answers, answers).dense()[0]
    assert ["".join("x" if one else "." for one in row) for row in np.asarray(seen)] == [
        "x......",
        "xx.....",
        "xxx....",
        "xx.x...",
        "xx.xx..",
        ".....x.",
        ".....xx",
    ]


def test_splash_on_a_mesh_splits_rows_and_heads() -> None:
    q, k, v, queries, keys = drawn()
    with jax.set_mesh(make_mesh(2, 2, 2)):
        got = jax.jit(attend_splash)(q, k, v, AttentionMask(queries, keys))
    np.testing.assert_allclose(got, written_out(q, k, v, looped(queries, keys)), atol=2e-6)


def test_what_auto_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = dataclasses.replace(CONFIG, attention="auto")
    wide = dataclasses.replace(auto, head_dim=128, compute_dtype="bfloat16")
    for backend, small, large in (("cpu", "xla", "xla"), ("gpu", "xla", "cudnn"), ("tpu", "xla", "splash")):
        monkeypatch.setattr(jax, "default_backend", functools.partial(str, backend))
        assert (implementation(auto), implementation(wide)) == (small, large)
    segments = np.ones((1, 2), np.int32)
    assert isinstance(build_mask(wide, AttentionMask(segments, segments)), AttentionMask)
    # a prompt shared within a row is no matter of segments alone
    assert not isinstance(build_mask(wide, AttentionMask(segments, segments, segments, segments)), AttentionMask)


def test_cudnn_without_a_gpu_is_refused() -> None:
    q, k, v, queries, keys = drawn()
    cudnn = dataclasses.replace(CONFIG, attention="cudnn")
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        attend(cudnn, q, k, v, AttentionMask(queries, keys).dense())


@pytest.mark.parametrize("length", [3, 128])
def test_answers_beside_their_prompt(length: int) -> None:
    """The grouped form against one row with a mask, forward and backward; at 128 columns copies of the prompt's keys for every
    answer crash YNNPACK in jaxlib 0.10.2."""
    groups, answers, prompt = 2, 4, 5
    columns = prompt + answers * length
    rng = np.random.default_rng(2)
    q = rng.standard_normal((groups, columns, HEADS, H)).astype(np.float32)
    k, v = rng.standard_normal((2, groups, KV, columns, H)).astype(np.float32)
    of_prompt = np.int32([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    real = np.int32(np.arange(length) < np.arange(1, groups * answers + 1)[:, None] * length // 8)
    visible = SharedPrefixMask(
        AttentionMask(of_prompt, of_prompt),
        AttentionMask(real, np.concatenate([of_prompt.repeat(answers, 0), real], axis=1)),
    )
    segments = np.concatenate([of_prompt, real.reshape(groups, -1)], axis=1)
    answer = np.concatenate(
        [np.zeros_like(of_prompt), np.tile(np.arange(answers).repeat(length) + 1, (groups, 1))], axis=1
    )
    whole = AttentionMask(segments, segments, answer, answer)
    weight = segments[..., None]  # what pads see is nobody's business

    def value_and_gradients(attention, seen):
        made = build_mask(CONFIG, seen)
        fn = lambda q, k, v: jnp.sum(jnp.sin(attention(CONFIG, q, k, v, made)) * weight)
        return jax.jit(jax.value_and_grad(fn, (0, 1, 2)))(q, k, v)

    got, want = value_and_gradients(attend_groups, visible), value_and_gradients(attend, whole)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-4)
    for one, other in zip(got[1], want[1]):
        assert jnp.linalg.norm(one - other) < 1e-5 * jnp.linalg.norm(other)
