"""The policy before training, where its matrices are split over devices."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from rlaif_jax.data.readers import FileRecords
from rlaif_jax.data.tokenizers import word_level_tokenizer
from rlaif_jax.models import CausalLM
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import ParallelConfig, make_runner
from rlaif_jax.recipes import start
from rlaif_jax.recipes.start import LoadedPolicy, Start
from tests.helpers import random_params

WORDS = tuple("abcdefgh")
TOKENIZER = word_level_tokenizer(WORDS)
MODEL = CausalLM(small_decoder(TOKENIZER.vocab_size, num_layers=1, width=16, num_heads=2, context_length=16))
RECORDS = FileRecords(tuple({"prompt": word} for word in WORDS), tuple(f"p:{i}" for i in range(8)))


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jax.numpy.asarray, random_params(MODEL))


def answers(params: Any, parallel: ParallelConfig) -> list[str]:
    drawn = Start(
        LoadedPolicy(MODEL, params, TOKENIZER), make_runner(parallel), SamplingConfig(max_new_tokens=4), 2, 4, False, 0
    )
    return [text for _, found, _ in drawn.draw(RECORDS, 5) for text in found]


def test_no_device_holds_a_whole_matrix_of_a_split_policy(params, monkeypatch):
    """A model that only fits when it is split answers before training, too."""
    given: list[Any] = []
    made = start.make_generator

    def make(*settings: Any) -> Any:
        generator = made(*settings)
        return lambda replicated, prompts: given.append(replicated[0]) or generator(replicated, prompts)

    monkeypatch.setattr(start, "make_generator", make)
    split = answers(params, ParallelConfig("shard", 2, 2, 2))
    assert split == answers(params, ParallelConfig("shard", 1)), "the number of devices changes no answer"
    matrix = given[0]["trunk"]["layers_0"]["q"]["kernel"]
    assert matrix.addressable_shards[0].data.size * 4 == matrix.size
    assert given[0] is given[1], "the weights are sent once"
