"""The experiment on a toy: a random language model of a few words, and a judge of toy sentences."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import stories_sentiment
from rlaif_jax.algorithms.optimizer import OptimizerConfig
from rlaif_jax.algorithms.ppo import PPOConfig
from rlaif_jax.command_line import command_line
from rlaif_jax.config import UserError
from rlaif_jax.data.tokenizers import load_tokenizer, word_level_tokenizer
from rlaif_jax.feedback.judges.sentiment import SentimentConfig
from rlaif_jax.models import CausalLM
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.hf.files import load_model, save_model
from rlaif_jax.models.hf.llama2c import layout
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import JitRunner, ParallelConfig
from rlaif_jax.recipes.stories import load_storyteller, story_beginnings
from rlaif_jax.train import TrainConfig

MOODS = (("happy", "good", "warm", "kind"), ("sad", "bad", "cold", "mean"))
PLAIN = ("the", "dog", "tree", "saw", "a", "park")


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A folder with a model in `model` and sentences in `sentences`."""
    folder = tmp_path_factory.mktemp("toy")
    tokenizer = word_level_tokenizer((*MOODS[0], *MOODS[1], *PLAIN))
    model = CausalLM(small_decoder(tokenizer.vocab_size, num_layers=1, width=16, num_heads=2, context_length=24))
    save_model(folder / "model", model, model.init(jax.random.key(0)), tokenizer)
    (folder / "sentences").mkdir()
    rng = np.random.default_rng(0)
    for name, words in zip(("pos", "neg"), MOODS, strict=True):
        lines = [" ".join(rng.permutation([*rng.choice(words, 2), *rng.choice(PLAIN, 4)])) for _ in range(150)]
        (folder / "sentences" / f"rt-polarity.{name}").write_text("\n".join(lines))
    return folder


def tiny(toy: Path, out: Path, **changes):
    config = stories_sentiment.StoriesConfig(
        model=str(toy / "model"),
        sentences=toy / "sentences",
        out=out,
        training_prompts=64,
        eval_prompts=32,
        beginning=6,
        judge=SentimentConfig(updates=60, batch_size=32, learning_rate=2e-2, width=8, held_out=0.2),
        train=TrainConfig(
            steps=4,
            prompts_per_step=32,
            prompt_length=8,
            parallel=ParallelConfig(mode="shard", data=1),
            eval_every=2,
            save_every=1,
        ),
        sampling=SamplingConfig(max_new_tokens=8),
        ppo=PPOConfig(
            num_epochs=4,
            num_minibatches=1,
            kl_coef=0.01,
            policy_optimizer=OptimizerConfig(learning_rate=2e-2),
            value_optimizer=OptimizerConfig(learning_rate=1e-2),
        ),
    )
    return dataclasses.replace(config, **changes)


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.slow
def test_a_whole_run_and_its_last_step_once_more(toy, tmp_path):
    config = tiny(toy, tmp_path / "run", mood="sadder")
    stories_sentiment.main(config)
    first = summary(config.out)
    metrics = first["metrics"]
    assert (first["status"], first["steps"], all(first["checks"].values())) == ("done", 4, True)
    assert metrics["judge_accuracy"] > 0.9
    # Pairs of which one is not judged count in the means alone: not quite the same number.
    gain = metrics["judge_after"] - metrics["judge_before"]
    assert metrics["gain_sd"] == pytest.approx(gain / metrics["judge_sd_before"], rel=0.2)
    assert metrics["gain_sd_ci95"][0] < metrics["gain_sd"] < metrics["gain_sd_ci95"][1]
    assert metrics["gain_sd"] > 0
    assert metrics["win_rate_judge_ci95"][0] <= metrics["win_rate_judge"] <= metrics["win_rate_judge_ci95"][1]
    assert metrics["kl"] > 0
    for name in ("distinct2_before", "distinct2_after"):
        assert 0 < metrics[name] <= 1
    for name in ("length_before", "length_after"):
        assert 1 <= metrics[name] <= 8

    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    evaluated = {line["step"]: line for line in lines if "judge" in line}
    assert sorted(evaluated) == [0, 2, 4]
    assert evaluated[0]["judge"] == pytest.approx(metrics["judge_before"], rel=1e-5)
    assert evaluated[4]["judge"] == pytest.approx(metrics["judge_after"], rel=1e-5)
    samples = [json.loads(line) for line in (config.out / "samples.jsonl").read_text().splitlines()]
    assert {s["stage"] for s in samples} == {"before", "rl", "after"}
    prompts = [json.loads(line)["prompt"] for line in (config.out / "prompts.jsonl").read_text().splitlines()]
    assert len(set(prompts)) == len(prompts) == 96
    assert {s["prompt"] for s in samples} <= set(prompts[:32])
    load_model(config.out / "model")
    assert (config.out / "report.html").stat().st_size > 1000

    # A resume goes on from the newest checkpoint, with the judge and the prompts of the folder.
    shutil.rmtree(config.out / "checkpoints" / "4")
    stories_sentiment.main(dataclasses.replace(config, resume=True))
    again = summary(config.out)
    assert again["status"] == "done"
    clock = {"wall_s"}
    assert {k: v for k, v in again["metrics"].items() if k not in clock} == {
        k: v for k, v in metrics.items() if k not in clock
    }


def test_beginnings_are_distinct_whole_words_and_repeatable(toy):
    storyteller = load_storyteller(str(toy / "model"), None, 8, 8)
    wanted = {"count": 96, "tokens": 6, "prompt_length": 8, "seed": 0}
    found = story_beginnings(storyteller, JitRunner(), **wanted)
    assert len(set(found)) == len(found) == 96
    assert all(1 <= len(text.split()) <= 5 for text in found)
    assert story_beginnings(storyteller, JitRunner(), **wanted) == found
    with pytest.raises(UserError, match=r"model: .* stories have only .* different beginnings of 2 tokens"):
        story_beginnings(storyteller, JitRunner(), **(wanted | {"tokens": 2}))


def test_stories260k_stops_where_the_next_story_begins(shared_data):
    storyteller = load_storyteller(str(shared_data("lm_stories260k/stories260K.bin")), None, 28, 64)
    # tok512.bin is found in the same folder
    assert (storyteller.tokenizer.vocab_size, storyteller.tokenizer.bos_id, storyteller.tokenizer.eos_id) == (512, 1, 1)


@pytest.mark.parametrize("kind", ["SentencePiece", "Hugging Face"])
def test_a_llama2c_model_stops_at_bos_whatever_its_tokenizer_is_in(shared_data, tmp_path, kind):
    """The models of llama2.c saw no end token, so a vocabulary with one does not say where their stories end."""
    if kind == "SentencePiece":
        tokenizer, size = shared_data("tok_sentencepiece/test_model.model"), 1000
    else:
        word_level_tokenizer(PLAIN).save(tmp_path / "words")
        tokenizer, size = tmp_path / "words", len(PLAIN) + 4
    values = np.array([16, 32, 1, 2, 2, size, 32], "<i4").tobytes()
    config = small_decoder(size, num_layers=1, width=16, num_heads=2, mlp_width=32, context_length=32)
    count = sum(math.prod(shape) for _, shape in layout(config))
    path = tmp_path / "stories.bin"
    path.write_bytes(values + np.random.default_rng(0).normal(size=count).astype("<f4").tobytes())
    storyteller = load_storyteller(str(path), tokenizer, 8, 8)
    bos = storyteller.tokenizer.bos_id
    assert load_tokenizer(tokenizer).eos_id != bos
    assert storyteller.tokenizer.stop_ids == (bos,)
    save_model(tmp_path / "saved", storyteller.model, storyteller.params, storyteller.tokenizer)
    assert load_tokenizer(tmp_path / "saved").eos_id == bos, "the model that training leaves ends its stories as well"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": None}, "no model to train: give --model.*karpathy/tinyllamas"),
        ({"model": "nowhere/at all"}, "no model at nowhere/at all"),
        ({"sentences": None}, r"no sentences to train the judge on: give --sentences.*rt-polarity\.pos.*Pang & Lee"),
        ({"sentences": "model"}, r"cannot read .*model/rt-polarity\.pos: No such file"),
        ({"tokenizer": "other"}, "another vocabulary: it has 104 ids, the model only 18"),
        ({"tokenizer": "sentences"}, "no tokenizer in the folder .*sentences"),
        ({"sampling.max-new-tokens": "17"}, r"= 25 is more than .* can read: 24 tokens"),
        ({"train.prompts-per-step": "65"}, "must not exceed training_prompts"),
        ({"beginning": "8"}, "which holds BOS as well"),
        ({"eval-prompts": "0"}, "eval_prompts must be >= 1"),
        ({"resume": True}, "there is no run to resume here"),
    ],
)
def test_bad_input_is_named_and_leaves_no_run(toy, tmp_path, monkeypatch, capsys, options, message):
    word_level_tokenizer(tuple(f"word{i}" for i in range(100))).save(toy / "other")
    default = tiny(toy, tmp_path / "run")
    named = {"model": default.model, "sentences": default.sentences} | options
    arguments: list[str] = []
    for name, value in named.items():
        if value is not None:
            path = toy / value if name in ("tokenizer", "sentences") else value
            arguments += [f"--{name}"] if value is True else [f"--{name}", str(path)]
    monkeypatch.setattr(sys, "argv", ["stories_sentiment.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        command_line(
            stories_sentiment.main, dataclasses.replace(default, model=None, sentences=None), stories_sentiment.__doc__
        )
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert re.search(message, " ".join(error.split())), error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_judge_of_another_language_is_refused(toy, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name, word in (("pos", "schoen"), ("neg", "traurig")):
        (foreign / f"rt-polarity.{name}").write_text("\n".join(f"{word} {word} Satz{i} Satz{i}" for i in range(60)))
    with pytest.raises(UserError, match=r"the judge cannot tell the stories of .* apart: it knows 0 of 64"):
        stories_sentiment.main(tiny(toy, tmp_path / "run", sentences=foreign))
