"""The scripts of reward models and of supervised fine-tuning, as they are called."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from experiments import reward_model, sft
from rlaif_jax.command_line import command_line
from rlaif_jax.data.tokenizers import word_level_tokenizer
from rlaif_jax.models import CausalLM
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.hf.classifiers import load_reward_model
from rlaif_jax.models.hf.files import load_model, save_model
from tests.helpers import random_params

TOKENIZER = word_level_tokenizer(tuple("abcdefgh"))
FEW = [
    "--fit.updates",
    "2",
    "--fit.batch-size",
    "8",
    "--held-out",
    "0.3",
    "--parallel.mode",
    "shard",
    "--parallel.data",
    "1",
]


def write(path: Path, values: list[dict]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`called(script, *options)` runs a script with the options and a small model."""
    model = CausalLM(small_decoder(TOKENIZER.vocab_size, num_layers=1, width=16, num_heads=2, context_length=16))
    save_model(tmp_path / "lm", model, random_params(model), TOKENIZER)

    def call(script, *options):
        shared = ("--model", str(tmp_path / "lm"), "--out", str(tmp_path / "out"), "--max-length", "16", *FEW)
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *shared, *map(str, options)])
        return command_line(script.main, script.get_config(), script.__doc__)

    return call


def test_a_reward_model_from_the_command_line(called, tmp_path):
    answers = (("f", 4), ("g", 1))
    rows = [
        {"prompt": f"{a} {b}", "response": text, "helpfulness": rating}
        for a in "ab" for b in "cde" for text, rating in answers
    ]  # fmt: skip
    path = write(tmp_path / "rows.jsonl", rows)
    options = ("--feedback", path, "--principles", "helpfulness", "--margin", "0.5", "--fit.batch-size", "2")
    metrics = called(reward_model, *options, "format:help-steer")
    assert metrics["pairs_learned"] + metrics["pairs_heldout"] == 6
    assert load_reward_model(tmp_path / "out" / "model")[2].fingerprint == TOKENIZER.fingerprint
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["format"]["type"] == "HelpSteer"


def test_fine_tuning_from_the_command_line(called, tmp_path):
    rows = [{"prompt": a, "completion": f"{b} {c}"} for a in "abcd" for b in "efg" for c in "fgh"]
    metrics = called(sft, "--data", write(tmp_path / "rows.jsonl", rows), "--fit.batch-size", "4")
    assert metrics["texts_learned"] + metrics["texts_heldout"] == 36
    load_model(tmp_path / "out" / "model")


@pytest.mark.parametrize("script, missing", [(reward_model, "--feedback FILE"), (sft, "--data FILE")])
def test_what_is_missing_is_said_in_one_line(script, missing, called, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        called(script)
    assert left.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and missing in lines[0] and not (tmp_path / "out").exists()
