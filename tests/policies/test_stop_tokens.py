"""Several stop tokens: an answer ends at the first of them that is drawn, however it is decoded."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.data.tokenizers import load_tokenizer, word_level_tokenizer
from rlaif_jax.models import CausalLM
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import JitRunner
from rlaif_jax.policies.text import TextPolicy, answer_texts, generate, make_generator
from rlaif_jax.types import Prompts
from tests.data.token_folders import byte_tokenizer_folder
from tests.helpers import random_params

T, KEY = 8, jax.random.key(7)
MODEL = CausalLM(small_decoder(12, num_layers=1, width=16, num_heads=2, context_length=16))
BIASES = dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias"), True)
TURN, MANY, FIRST = {"eos_token": "<turn>"}, {"eos_token_id": [256, 257, 258]}, {"eos_token_id": 256}


def prompts(count: int) -> Prompts:
    two = jnp.ones((count, 2), jnp.int32)
    return Prompts(two, two.astype(bool), jnp.arange(count, dtype=jnp.uint32))


@pytest.mark.parametrize("slots", [0, 4])
@pytest.mark.parametrize("stops", [(3, 5, 9), (5,), (11, 0), ()])
def test_answers_are_those_without_a_stop_cut_at_the_first_one(slots, stops):
    params, sampling = random_params(MODEL), SamplingConfig(max_new_tokens=T, slots=slots)
    run = functools.partial(generate, MODEL, sampling=sampling, answers=2, pad_id=0)
    free, cut = (jax.jit(functools.partial(run, eos_id=eos))(params, prompts(8), KEY) for eos in (None, stops))
    for whole, row, mask, finished in zip(free.responses, cut.responses, cut.response_mask, cut.finished):
        at = np.flatnonzero(np.isin(whole, stops))
        length = at[0] + 1 if at.size else T
        assert finished == bool(at.size)
        assert mask.tolist() == [True] * length + [False] * (T - length)
        assert row[:length].tolist() == whole[:length].tolist()
    assert not stops or cut.finished.any()
    policy = TextPolicy(MODEL, sampling, stops, 0)
    assert policy.checks(cut) == {"eos_is_kept_in_the_mask": True}
    if stops:
        assert TextPolicy(MODEL, sampling, 10, 0).checks(cut) == {"eos_is_kept_in_the_mask": False}


@pytest.mark.parametrize(
    ("special", "files", "token"),
    [
        (("<eot>", "<eom>", "<turn>"), {"tokenizer_config": TURN, "generation_config": MANY}, 256),
        (("<eot>", "<eom>", "<turn>"), {"generation_config": MANY}, 258),
        (("<eot>", "<turn>"), {"tokenizer_config": TURN, "generation_config": FIRST, "config": FIRST}, 256),
    ],
)
def test_a_model_that_writes_one_end_token_writes_one_token(tmp_path, special, files, token):
    """A policy that writes nothing but one of the ends that the files of its folder declare."""
    tokenizer = load_tokenizer(byte_tokenizer_folder(tmp_path, *special, **files))
    model = CausalLM(
        small_decoder(
            264,
            num_layers=1,
            width=8,
            num_heads=2,
            context_length=16,
            norm="layer",
            positions="learned",
            mlp="gelu",
            **BIASES,
        )
    )
    params = model.init(jax.random.key(0))
    params["trunk"]["norm"] = {"scale": jnp.zeros(8), "bias": jnp.ones(8)}
    params["trunk"]["embed"]["embedding"] = jnp.zeros((264, 8)).at[token].set(9.0)
    generator = make_generator(JitRunner(), model, tokenizer, SamplingConfig(max_new_tokens=9))
    rollout = generator((params, KEY), prompts(2))
    assert rollout.response_mask.sum(-1).tolist() == [1, 1]
    assert rollout.finished.all()
    assert answer_texts(rollout, tokenizer) == ["", ""]


def test_a_policy_and_its_tokenizer_agree_on_every_stop():
    tokenizer = dataclasses.replace(word_level_tokenizer(tuple("abcdefgh")), other_stop_ids=(5, 6))
    sampling = SamplingConfig(max_new_tokens=T)
    TextPolicy(MODEL, sampling, (6, 2, 5), 0).check(4, tokenizer)
    with pytest.raises(
        UserError, match=r"stops at token 2 and pads with 0, the tokenizer's are 2 or 5 or 6 and 0.*stop_ids"
    ):
        TextPolicy(MODEL, sampling, tokenizer.eos_id, 0).check(4, tokenizer)
