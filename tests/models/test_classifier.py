from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.models.classifier import TextClassifier

MODEL = TextClassifier(vocab_size=11, width=4)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


def test_a_text_is_the_root_weighted_sum_of_its_distinct_words(params):
    tokens = jnp.array([[7, 3, 7, 9, 0]])
    mask = jnp.array([[1, 1, 1, 1, 0]], bool)
    embeddings = np.asarray(params["embed"]["embedding"], np.float64)
    hidden = (embeddings[7] + embeddings[3] + embeddings[9]) / np.sqrt(3)
    expected = hidden @ np.asarray(params["out"]["kernel"])[:, 0] + np.asarray(params["out"]["bias"])[0]
    np.testing.assert_allclose(MODEL(params, tokens, mask), [expected], rtol=1e-5)


def test_order_repetition_and_padding_change_nothing(params):
    plain = MODEL(params, jnp.array([[2, 5, 8]]), jnp.ones((1, 3), bool))
    for tokens, mask in (
        ([8, 2, 5], [1, 1, 1]),
        ([2, 2, 5, 8, 5], [1] * 5),
        ([2, 5, 8, 4, 5], [1, 1, 1, 0, 0]),
        ([5, 2, 5, 8], [0, 1, 1, 1]),
    ):
        same = MODEL(params, jnp.array([tokens]), jnp.array([mask], bool))
        np.testing.assert_allclose(same, plain, rtol=1e-6)
    other = MODEL(params, jnp.array([[2, 5, 9]]), jnp.ones((1, 3), bool))
    assert abs(float(other[0] - plain[0])) > 1e-4


def test_a_text_without_words_is_the_bias_and_has_a_finite_gradient(params):
    params = jax.tree.map(lambda x: x, params) | {"out": params["out"] | {"bias": jnp.array([0.5])}}
    tokens, mask = jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 3), bool)
    np.testing.assert_allclose(MODEL(params, tokens, mask), [0.5, 0.5])
    grads = jax.grad(lambda p: MODEL(p, tokens, mask).sum())(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    np.testing.assert_array_equal(grads["embed"]["embedding"], 0.0)
