"""The policy before training, where its matrices are split over devices."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from rlaif_jax.data.readers import FileRecords
from rlaif_jax.data.tokenizers import load_tokenizer, word_level_tokenizer
from rlaif_jax.feedback.joined import JoinedSource
from rlaif_jax.feedback.sources import CountingSource, Missing
from rlaif_jax.models import CausalLM
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import ParallelConfig, make_runner
from rlaif_jax.recipes import start
from rlaif_jax.recipes.rlaif import get_config
from rlaif_jax.recipes.start import LoadedPolicy, Start, day_of, keep_day, on_day_of_run, scale_of
from rlaif_jax.run import Run
from tests.data.chat.styles import CHATML, HEADERS, chat_folder
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


def test_judges_get_the_records_as_they_are_in_the_file(params):
    """Also a field `uid`, by which a function of the user may look something up."""
    records = FileRecords(tuple({"prompt": word, "uid": 11102 + i} for i, word in enumerate(WORDS)), RECORDS.places)
    policy = LoadedPolicy(MODEL, params, TOKENIZER)
    drawn = Start(policy, make_runner(ParallelConfig("shard", 1)), SamplingConfig(max_new_tokens=4), 2, 4, False, 0)
    assert [record for given, _, _ in drawn.draw(records, 5) for record in given] == list(records.records)


class Late(CountingSource):
    """Judges the records of the second half of a file alone."""

    def __call__(self, records: Any, answers: Any, rollout: Any = None) -> Any:
        return self.feedback([float(r["place"]) if r["place"] >= 32 else Missing("early") for r in records])


def test_the_scale_is_of_prompts_from_all_over_the_file(params, tmp_path):
    records = FileRecords(tuple({"prompt": WORDS[i % 8], "place": i} for i in range(64)), ("p",) * 64)
    policy = LoadedPolicy(MODEL, params, TOKENIZER)
    drawn = Start(policy, make_runner(ParallelConfig("shard", 1)), SamplingConfig(max_new_tokens=4), 2, 16, False, 0)
    source = JoinedSource((Late(),), ("late",))
    with Run(tmp_path / "run", "x", get_config(), seed=0) as run:
        scale = scale_of(run, drawn, records, source, 16)
    judged = 16 - source.missing()["late: early"]
    assert 4 <= judged <= 12 and 32 <= float(np.asarray(scale.mean).item()) <= 63


def test_a_run_keeps_to_the_day_on_which_it_began(tmp_path, monkeypatch):
    run = Run(tmp_path / "run", "x", get_config(), seed=0)
    today = day_of(run)
    assert len(today) == 10 and day_of(run) == today

    class Tomorrow(start.datetime.date):
        @classmethod
        def today(cls) -> Any:
            return cls(2999, 1, 1)

    dated = load_tokenizer(chat_folder(tmp_path / "dated", HEADERS))
    run.folder.mkdir()
    keep_day(run, on_day_of_run(dated, run.folder, resume=False))
    monkeypatch.setattr(start.datetime, "date", Tomorrow)
    assert day_of(run) == today and day_of(Run(tmp_path / "other", "x", get_config(), seed=0)) == "2999-01-01"
    assert on_day_of_run(dated, run.folder, resume=True).day == today
    assert on_day_of_run(dated, run.folder, resume=False).day == "2999-01-01"
    plain = load_tokenizer(chat_folder(tmp_path / "plain", CHATML))
    assert on_day_of_run(plain, run.folder, resume=True) is plain
