"""The kernel of decoding, interpreted, against plain `jnp`: odd lengths, masks, shared heads, many answers, a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.models import attention_cached
from rlaif_jax.models.attention_cached import attend_cached, blocks, pack_heads
from rlaif_jax.parallel import make_mesh, on_own_rows


def drawn(batch, answers, groups, side, each, h, prompt, length, shared):
    """Arguments of `attend_cached` for `each` query heads a key-value head, all of whose masks see something."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    rows, width = batch * answers, side * h
    seen, own_seen = rng.uniform(size=(batch, prompt)) < 0.6, rng.uniform(size=(1 if shared else rows, length)) < 0.6
    own_seen[:, -1] = True
    return (
        normal(rows, groups * side * each, h),
        (normal(batch, groups, prompt, width), normal(batch, groups, prompt, width)),
        seen,
        (normal(rows, groups, length, width), normal(rows, groups, length, width)),
        own_seen,
    )


@pytest.fixture
def both(monkeypatch):
    """A function's results as on a TPU and as elsewhere, compiled; `attend_cached` is what it calls."""

    def run(fn, *args):
        plain = jax.jit(lambda *args: fn(*args))(*args)
        monkeypatch.setattr(attention_cached, "lanes", lambda: 128)
        monkeypatch.delattr(attention_cached, "attend_plain")
        return jax.jit(lambda *args: fn(*args))(*args), plain

    return run


@pytest.mark.parametrize(
    ("shape", "taken"),
    [
        ((2, 3, 2, 2, 2, 8, 5, 7, True), (3, 2)),
        ((2, 1, 2, 1, 3, 8, 129, 130, False), (1, 2)),
        ((3, 4, 3, 4, 1, 16, 128, 1, False), (4, 3)),
        ((1, 8, 2, 1, 16, 8, 128, 300, True), (4, 2)),  # 8 answers would score more than is worked on at a time
    ],
    ids=str,
)
def test_the_kernel_is_the_plain_way(both, shape, taken):
    args = drawn(*shape)
    rows, heads = args[0].shape[:2]
    assert blocks(rows, heads // shape[2], args[1], args[3]) == taken
    kernel, plain = both(attend_cached, *args)
    np.testing.assert_allclose(kernel, plain, atol=2e-6)
    assert np.abs(plain).std() > 0.02


def test_bfloat16_and_a_population(both):
    """vmap over two members, as a population of runs has it."""
    args = drawn(2, 2, 1, 2, 2, 8, 5, 7, True)
    half = lambda x: jnp.stack([x, 1 - x]).astype(jnp.bfloat16) if x.dtype == np.float32 else x
    axes = jax.tree.map(lambda x: 0 if x.dtype == np.float32 else None, args)
    kernel, plain = both(jax.vmap(attend_cached, axes), *jax.tree.map(half, args))
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_allclose(kernel.astype(np.float32), plain.astype(np.float32), atol=0.02)


@pytest.mark.parametrize("groups", [1, 2], ids=["whole", "over tensor"])
def test_on_a_mesh(both, groups):
    """Rows over data and fsdp, as a rollout's are, and heads over tensor where they divide."""
    q, prompt, seen, own, own_seen = drawn(8, 2, groups, 2, 2, 8, 5, 7, True)
    alone = attend_cached(q, prompt, seen, own, own_seen)
    on_mesh = lambda batch, own_seen: on_own_rows(lambda mask, x: attend_cached(*x, mask), own_seen, batch)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        kernel, plain = both(on_mesh, (q, prompt, seen, own), own_seen)
    np.testing.assert_allclose(plain, alone, atol=2e-6)
    np.testing.assert_allclose(kernel, alone, atol=2e-6)


def test_heads_beside_each_other():
    x = np.arange(2 * 4 * 3 * 5).reshape(2, 4, 3, 5)
    np.testing.assert_array_equal(pack_heads(jnp.asarray(x), 1), x)
    np.testing.assert_array_equal(pack_heads(jnp.asarray(x), 2)[1, 1, 2], np.concatenate([x[1, 2, 2], x[1, 3, 2]]))


def test_what_fits():
    cache = lambda rows, columns: (jax.ShapeDtypeStruct((rows, 4, columns, 128), jnp.bfloat16),) * 2
    taken = lambda answers, prompt, own: blocks(answers, 4, cache(1, prompt), cache(answers, own))
    assert taken(4, 256, 511) == (4, 2)
    assert taken(16, 512, 1024) == (4, 1)
    assert taken(2, 4096, 4000) == (1, 1)
    assert taken(2, 4096, 4097) is None
