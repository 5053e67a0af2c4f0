"""A reward model and counted words learn the same pairs; numbers by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from experiments import reward_baseline
from experiments.reward_baseline import (
    FILES,
    BaselineConfig,
    compare,
    line_of,
    main,
    run_config,
    words_differ,
    write_pairs,
)
from rlaif_jax.config import UserError
from rlaif_jax.data.tokenizers import word_level_tokenizer
from rlaif_jax.feedback.judges.reward_pairs import Pairs
from rlaif_jax.models import CausalLM
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.hf.files import save_model
from rlaif_jax.quality.intervals import share_interval
from tests.helpers import random_params

TOKENIZER = word_level_tokenizer(tuple("abcdefghijkl"))


def pairs_of(answers: list[tuple[str, str]], probability: list[float], conversation: list[str]) -> Pairs:
    ids = [tuple(TOKENIZER.encode(f"l {answer}") for answer in both) for both in answers]
    lengths = np.array([[len(answer.split()) for answer in both] for both in answers])
    ones = np.ones(len(answers))
    return Pairs(ids, lengths, np.array(probability), 0 * ones, ones, conversation)  # type: ignore[arg-type]


def drawn(count: int, seed: int) -> Pairs:
    """Pairs of which the answer that has a "b" after an "a" is better; the words alone say nothing."""
    rng = np.random.default_rng(seed)
    answers, better = [], []
    for _ in range(count):
        rest = " ".join(rng.choice(list("cdef"), 3))
        both, first = [f"a b {rest}", f"b a {rest}"], bool(rng.random() < 0.5)
        answers.append(tuple(both if first else both[::-1]))
        better.append(float(first))
    return pairs_of(answers, better, [str(i // 2) for i in range(count)])


def test_words_and_their_neighbours_are_learned_and_the_prompt_is_not_read():
    training, measured = drawn(80, 0), drawn(40, 1)
    gap = words_differ(TOKENIZER, training, measured, 0)
    assert ((gap > 0) == (measured.probability > 0.5)).all()
    swapped = measured._replace(
        ids=[(b, a) for a, b in measured.ids], lengths=measured.lengths[:, ::-1], probability=1 - measured.probability
    )
    np.testing.assert_allclose(words_differ(TOKENIZER, training, swapped, 0), -gap, rtol=1e-6)
    noise = training._replace(probability=np.random.default_rng(2).integers(0, 2, 80).astype(float))
    assert np.abs(words_differ(TOKENIZER, noise, measured, 0)).max() < 0.2 * np.abs(gap).max()


def test_the_numbers_by_hand():
    pairs = pairs_of([("a", "b c")] * 4, [1.0, 1.0, 0.0, 0.0], list("pqrs"))
    gaps = {
        "model": np.array([1.0, -1.0, -2.0, 0.0]),
        "words": np.array([1.0, 1.0, 1.0, 1.0]),
        "longer": np.full(4, -1),
    }
    found = compare(pairs, gaps, 0)
    assert [found[name]["value"] for name in gaps] == [2.5 / 4, 0.5, 0.5]
    assert found["model"] == share_interval(np.array([1, 0, 1, 0.5]), groups=np.arange(4))._asdict()
    assert found["difference"]["value"] == 0.125 and found["difference"]["low"] < 0.125 < found["difference"]["high"]
    assert found["pairs"] == 4


@pytest.fixture
def config(tmp_path: Path) -> BaselineConfig:
    """Settings of runs on a small language, whose files have a tie and longer pairs."""
    rng = np.random.default_rng(0)
    model = CausalLM(small_decoder(TOKENIZER.vocab_size, num_layers=1, width=16, num_heads=2, context_length=32))
    save_model(tmp_path / "lm", model, random_params(model, scale=0.2), TOKENIZER)
    said = lambda count: " ".join(rng.choice(list("cdef"), count))
    turn = "\n\nHuman: {}\n\nAssistant: {}".format
    rows = []
    for i in range(60):
        asked = said(3)
        rows.append({"chosen": turn(asked, f"a {said(3)}"), "rejected": turn(asked, f"b {said(20 if i < 2 else 3)}")})
    (tmp_path / "hh_harmless").mkdir()
    (tmp_path / FILES[0]).write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "prometheus").mkdir()
    auto_j = [
        {"scenario": "s", "label": i % 3, "prompt": said(3), "response 1": f"a {said(3)}", "response 2": f"b {said(3)}"}
        for i in range(60)
    ]
    (tmp_path / FILES[1]).write_text("\n".join(map(json.dumps, auto_j)))
    return BaselineConfig(
        str(tmp_path / "lm"), tmp_path, passes=3, batch_size=8, learning_rate=1e-2, max_length=20, out=tmp_path / "runs"
    )


@pytest.mark.slow
def test_both_learn_the_same_pairs_and_finished_runs_are_only_read(config, capsys, monkeypatch):
    found = main(config)
    assert set(found) == set(FILES)
    harmless, auto_j = found.values()
    assert (harmless["learned"] + harmless["pairs"], auto_j["learned"] + auto_j["pairs"]) == (58, 40)
    assert harmless["TF-IDF"]["value"] == 1.0 and harmless["reward model"]["value"] > 0.8
    assert auto_j["TF-IDF"]["value"] < 0.9, "its labels are in turns and say nothing about the words"
    assert json.loads((config.out / "results.json").read_text()) == found
    assert capsys.readouterr().out.splitlines()[-1] == line_of(FILES[1], auto_j)
    monkeypatch.setattr(reward_baseline.reward_model, "main", lambda config: pytest.fail("it is finished"))
    assert main(config) == found
    for other in ({"seed": 1}, {"passes": 1}):
        with pytest.raises(UserError, match="holds a run with other settings: give another --out"):
            main(dataclasses.replace(config, **other))
    rows = (config.data / FILES[0]).read_text().splitlines()
    (config.data / FILES[0]).write_text("\n".join(rows[1:]))
    with pytest.raises(UserError, match="holds a run that learned other pairs"):
        main(config)


def test_ties_are_left_out_and_the_better_answer_is_chosen(config):
    path = write_pairs(config, FILES[1], config.out)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 40 and {row["chosen"][0] for row in rows} == {"a", "b"}
    assert run_config(config, path, 32).fit.updates == 3 * 32 // 8


def test_what_is_missing_is_named(config):
    with pytest.raises(UserError, match="give --data"):
        main(BaselineConfig())
    with pytest.raises(UserError, match=r"files names mine.jsonl; known are .*hh_harmless"):
        BaselineConfig(files=("mine.jsonl",))
