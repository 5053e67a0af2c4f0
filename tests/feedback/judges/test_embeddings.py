"""Similarities are cosines; a text without a vector has none; a language model's mean hidden state is one encoder."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.feedback.judges.embeddings import HiddenStateEncoder, similarities
from rlaif_jax.feedback.judges.sentiment import SentimentConfig, word_tokenizer
from rlaif_jax.models import CausalLM
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.parallel import JitRunner, ParallelConfig, make_runner

TEXTS = ["the dog ran home", "the cat ran home", "a warm day", "the the dog dog home home"]


@pytest.fixture(scope="module")
def encoder() -> HiddenStateEncoder:
    tokenizer = word_tokenizer(TEXTS * 2, SentimentConfig())
    model = CausalLM(small_decoder(32, num_layers=1, width=16, num_heads=2))
    return HiddenStateEncoder(model, model.init(jax.random.key(0)), tokenizer, JitRunner(), max_tokens=8, batch_size=4)


def test_similarities_are_cosines_and_none_without_a_vector():
    table = {"x": [1, 0], "same": [5, 0], "across": [0, 2], "against": [-1, 0], "between": [1, 1], "nan": [np.nan, 1]}

    def encode(texts):
        return np.array([table.get(text, [0, 0]) for text in texts], float)

    found = similarities(encode, "x", ["same", "across", "against", "between", "nan", "zero"])
    assert found == [1.0, 0.0, -1.0, pytest.approx(np.sqrt(0.5)), None, None]
    assert similarities(encode, "zero", ["x"]) == [None]
    assert similarities(encode, "x", []) == []


def test_an_encoder_that_loses_texts_is_refused():
    with pytest.raises(UserError, match=r"shape \(1, 2\) for 3 texts"):
        similarities(lambda texts: np.ones((1, 2)), "x", ["a", "b"])


def test_the_encoder_is_the_mean_hidden_state_of_the_real_tokens(encoder):
    vectors = encoder([*TEXTS, "", "unknownword"])
    assert vectors.shape == (6, encoder.model.config.width)
    ids = encoder.tokenizer.encode(TEXTS[2])
    hidden = encoder.model.sequence_hidden(encoder.params, np.array([ids]), np.ones((1, len(ids)), bool))
    np.testing.assert_allclose(vectors[2], np.asarray(hidden)[0].mean(0), rtol=1e-4, atol=1e-5)
    assert np.isnan(vectors[4]).all()
    assert encoder([]).shape == (0, encoder.model.config.width)
    long = encoder([" ".join(["dog"] * 100)])
    np.testing.assert_allclose(long, encoder([" ".join(["dog"] * 8)]), rtol=1e-5)


def test_centring_takes_the_common_direction_out(encoder):
    centred = encoder.centred([*TEXTS, ""])
    np.testing.assert_allclose(centred(TEXTS).mean(0), 0, atol=1e-5)
    assert min(similarities(centred, TEXTS[0], TEXTS[1:])) < min(similarities(encoder, TEXTS[0], TEXTS[1:]))
    assert similarities(centred, TEXTS[0], [TEXTS[0], ""]) == [pytest.approx(1.0), None]
    with pytest.raises(UserError, match="centred on texts without tokens"):
        encoder.centred(["", ""])


def test_eight_devices_encode_as_one(encoder):
    eight = dataclasses.replace(encoder, runner=make_runner(ParallelConfig()), batch_size=8)
    np.testing.assert_allclose(eight(TEXTS), encoder(TEXTS), rtol=1e-4, atol=1e-5)


def test_settings_that_do_not_fit(encoder):
    with pytest.raises(UserError, match=r"max_tokens is 100000; the model reads 1 to"):
        dataclasses.replace(encoder, max_tokens=100_000)
    with pytest.raises(UserError, match=r"batch_size \(0\) must be a multiple"):
        dataclasses.replace(encoder, batch_size=0)
    with pytest.raises(UserError, match="the encoder: this tokenizer is of another vocabulary"):
        dataclasses.replace(encoder, model=CausalLM(small_decoder(3, num_layers=1, width=16, num_heads=2)))
