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


def test_words_may_count_as_often_as_they_occur(params):
    model = TextClassifier(vocab_size=11, width=4, repeats=True)
    embeddings = np.asarray(params["embed"]["embedding"], np.float64)
    hidden = 2 * embeddings[7] + embeddings[3]
    expected = hidden @ np.asarray(params["out"]["kernel"])[:, 0] + np.asarray(params["out"]["bias"])[0]
    tokens, mask = jnp.array([[7, 3, 7, 9]]), jnp.array([[1, 1, 1, 0]], bool)
    np.testing.assert_allclose(model(params, tokens, mask), [expected], rtol=1e-5)


def test_a_text_without_words_is_the_bias_and_has_a_finite_gradient(params):
    params = jax.tree.map(lambda x: x, params) | {"out": params["out"] | {"bias": jnp.array([0.5])}}
    tokens, mask = jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 3), bool)
    np.testing.assert_allclose(MODEL(params, tokens, mask), [0.5, 0.5])
    grads = jax.grad(lambda p: MODEL(p, tokens, mask).sum())(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    np.testing.assert_array_equal(grads["embed"]["embedding"], 0.0)


def test_an_output_for_each_aspect_with_weights_of_its_own(params):
    model = TextClassifier(vocab_size=11, width=4, aspects=3)
    by_aspect = model.init(jax.random.key(1))
    tokens, mask = jnp.array([[7, 3, 0], [2, 2, 5]]), jnp.array([[1, 1, 0], [1, 1, 1]], bool)
    got = model(by_aspect, tokens, mask)
    assert got.shape == (2, 3)
    for aspect in range(3):
        kernel, bias = by_aspect["out"]["kernel"][:, aspect : aspect + 1], by_aspect["out"]["bias"][aspect : aspect + 1]
        alone = {"embed": by_aspect["embed"], "out": {"kernel": kernel, "bias": bias}}
        np.testing.assert_allclose(got[:, aspect], MODEL(alone, tokens, mask), rtol=1e-5)
    assert MODEL(params, tokens, mask).shape == (2,)
