"""Supervised fine-tuning from rows of a file to a folder, on a language of a few words."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from rlaif_jax.algorithms.fit import FitConfig
from rlaif_jax.config import UserError
from rlaif_jax.data.rendering import LearnedTokens
from rlaif_jax.data.tokenizers import load_tokenizer, word_level_tokenizer
from rlaif_jax.models import CausalLM
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.hf.adapters import load_adapter
from rlaif_jax.models.hf.files import load_model, save_model
from rlaif_jax.models.lora import TARGETS, LoRAConfig
from rlaif_jax.parallel import JitRunner, ParallelConfig, PmapRunner
from rlaif_jax.recipes import sft as recipe
from rlaif_jax.recipes import start
from rlaif_jax.recipes.sft import PerplexityMeter, SFTConfig, main, measured_rows, perplexity, read_split, read_texts
from tests.helpers import CountingRunner, assert_same_leaves, random_params, unexplained
from tests.sinks.wandb_file import KEPT, assert_same_numbers
from tests.tiny import numbers

TOKENIZER = word_level_tokenizer(("Human:", "Assistant:", *"abcdefgh"))
DECODER = small_decoder(TOKENIZER.vocab_size, num_layers=1, width=16, num_heads=2, context_length=32)
MODEL = CausalLM(DECODER)


def rows(count: int = 120) -> list[dict]:
    """Conversations, prompts with completions and texts, in which e follows a, f follows b and so on."""
    rng = np.random.default_rng(0)
    made: list[dict] = []
    for i in range(count):
        words = rng.choice(list("abcd"), 3)
        asked, answer = " ".join(words), " ".join(chr(ord(w) + 4) for w in words)
        user, assistant = {"role": "user", "content": asked}, {"role": "assistant", "content": answer}
        made.append([
            {"messages": [user, assistant, user, assistant]},
            {"prompt": asked, "completion": answer},
            {"prompt": [user], "completion": [assistant]},
            {"text": f"{asked} {answer}"},
        ][i % 4])  # fmt: skip
    return made


def write(path: Path, values: list) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model and a file of texts."""
    path = tmp_path_factory.mktemp("inputs")
    save_model(path / "lm", MODEL, random_params(MODEL, scale=0.2), TOKENIZER)
    write(path / "texts.jsonl", rows())
    return path


def config(folder: Path, out: Path, **changes) -> SFTConfig:
    base = SFTConfig(
        model=str(folder / "lm"),
        data=(str(folder / "texts.jsonl"),),
        out=out,
        max_length=24,
        held_out=0.25,
        fit=FitConfig(updates=40, batch_size=8, learning_rate=2e-2),
        check_every=20,
        parallel=ParallelConfig("shard", 1),
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("run") / "one"
    return out, main(config(folder, out, tracking=KEPT))


def test_a_run_is_shown_on_wandb(whole):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    assert_same_numbers(whole[0])


def test_a_run_learns_measures_saves_and_explains(whole):
    out, metrics = whole
    assert metrics["perplexity_after"] < 0.5 * metrics["perplexity_before"]
    low, high = metrics["perplexity_after_ci95"]
    assert 1 < low < metrics["perplexity_after"] < high < metrics["perplexity_before_ci95"][0]
    assert 0.7 < metrics["columns_filled"] < 1
    assert metrics["texts_learned"] + metrics["texts_heldout"] == 120
    assert unexplained(out) == []
    assert [row["step"] for row in numbers(out) if "heldout_loss" in row] == [0, 20, 40]
    model, params = load_model(out / "model")
    assert model == MODEL and load_tokenizer(out / "model").fingerprint == TOKENIZER.fingerprint
    tokens = np.array([[TOKENIZER.bos_id, *TOKENIZER.encode("a b c")]], np.int32)
    logits = jax.jit(model)(params, tokens, np.ones_like(tokens, bool))
    assert TOKENIZER.decode([int(logits[0, -1].argmax())]) in "efgh"


def test_a_run_that_is_stopped_goes_on_bit_for_bit(whole, folder, tmp_path, monkeypatch):
    out, _ = whole
    asked: list[int] = []

    def stop_at_the_second_question(self) -> bool:
        asked.append(1)
        self.stop_requested = len(asked) > 1
        return self.stop_requested

    monkeypatch.setattr(recipe.Run, "stopped", stop_at_the_second_question)
    stopped = config(folder, tmp_path / "run")
    main(stopped)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "stopped"
    assert [path.name for path in (tmp_path / "run" / "checkpoints" / "part").glob("*/*")] == ["20"]
    monkeypatch.undo()
    other = write(tmp_path / "other.jsonl", rows(110))
    monkeypatch.setattr(recipe, "each_row", lambda data, split, read=recipe.each_row: read((str(other),), split))
    with pytest.raises(UserError, match=r"the texts are not those that this run began with .* without --resume"):
        main(dataclasses.replace(stopped, resume=True))
    monkeypatch.undo()
    main(dataclasses.replace(stopped, resume=True))
    assert numbers(tmp_path / "run") == numbers(out)
    assert_same_leaves(load_model(tmp_path / "run" / "model")[1], load_model(out / "model")[1])


def test_given_texts_are_measured_on_and_nothing_else_is_held_out(folder, tmp_path, capsys):
    learned, other = rows(), [{"text": f"{a} {b} e f"} for a in "abcd" for b in "gh"]
    given = write(tmp_path / "eval.jsonl", [*learned[:3], *other, {"question": "a"}])
    settings = config(folder, tmp_path / "run", eval_data=(str(given),), fit=FitConfig(2, 8))
    metrics = main(settings)
    assert (metrics["texts_learned"], metrics["texts_heldout"]) == (120, len(other))
    assert unexplained(tmp_path / "run") == []
    missing = json.loads((tmp_path / "run" / "summary.json").read_text())["missing"]
    assert missing == {"eval_data: row with a fault": 1, "eval_data: text that is also learned": 3}
    assert "3 x text of eval_data that is also learned" in capsys.readouterr().out
    alone = read_texts((str(write(tmp_path / "other.jsonl", other)),), "train", TOKENIZER, 24)
    found = PerplexityMeter(MODEL, JitRunner(), 8)(
        load_model(tmp_path / "run" / "model")[1], measured_rows(alone.tokens, 24, TOKENIZER.pad_id)
    )
    assert found.value == pytest.approx(metrics["perplexity_after"], rel=1e-4)
    write(given, [*learned[:3], *other[1:]])
    with pytest.raises(
        UserError, match=r"the measured texts are not those that this run began with .* without --resume"
    ):
        main(dataclasses.replace(settings, resume=True))


def test_an_adapter_learns_over_weights_that_do_not(folder, tmp_path, monkeypatch):
    lora = config(folder, tmp_path / "one", lora=True, adapter=LoRAConfig(rank=4))
    metrics = main(lora)
    assert metrics["perplexity_after_ci95"][1] < metrics["perplexity_before_ci95"][0]
    settings, adapter = load_adapter(tmp_path / "one" / "adapter", MODEL)
    assert settings == LoRAConfig(rank=4)
    base, learned = load_model(folder / "lm")[1], load_model(tmp_path / "one" / "model")[1]
    assert_same_leaves(settings.merge(base, adapter), learned)
    moved = {path: bool((a != b).any()) for (path, a), b in zip(flatten_dict(base).items(), jax.tree.leaves(learned))}
    assert {path[-2] for path, changed in moved.items() if changed} == set(TARGETS)
    rows = measured_rows(read_split(lora, TOKENIZER, 24).measured, 24, TOKENIZER.pad_id)
    meter = PerplexityMeter(MODEL, JitRunner(), 8)
    for params, when in ((base, "before"), (learned, "after")):
        assert meter(params, rows).value == pytest.approx(metrics[f"perplexity_{when}"], rel=1e-4)

    stops = iter([False, True])
    monkeypatch.setattr(
        recipe.Run, "stopped", lambda run: setattr(run, "stop_requested", next(stops)) or run.stop_requested
    )
    stopped = dataclasses.replace(lora, out=tmp_path / "run")
    main(stopped)
    assert not (tmp_path / "run" / "model").exists()
    monkeypatch.undo()
    main(dataclasses.replace(stopped, resume=True))
    assert numbers(tmp_path / "run") == numbers(tmp_path / "one")
    assert_same_leaves(load_model(tmp_path / "run" / "model")[1], learned)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_all_devices_learn_the_same(lora, folder, tmp_path):
    runs = {"one": ParallelConfig("shard", 1), "pmap": ParallelConfig(), "mesh": ParallelConfig("shard", 2, 2, 2)}
    for name, parallel in runs.items():
        main(config(folder, tmp_path / name, lora=lora, parallel=parallel))
    expected = load_model(tmp_path / "one" / "model")[1]
    for name in ("pmap", "mesh"):
        for a, b in zip(jax.tree.leaves(load_model(tmp_path / name / "model")[1]), jax.tree.leaves(expected)):
            np.testing.assert_allclose(a, b, atol=5e-4)


# ---- Rows


def test_long_and_faulty_rows_are_counted(tmp_path, capsys):
    long = {"role": "assistant", "content": "e " * 30}
    short = {"role": "assistant", "content": "e"}
    ask = {"role": "user", "content": "a"}
    more = [
        {"messages": [ask, short, ask, long]},
        {"messages": [ask, long, ask, short]},
        {"text": "a " * 40},
        {"messages": [ask]},
        {"question": "a"},
        {"prompt": "a", "completion": ["b"]},
        {"text": " \n"},
        {"text": None},
        {"text": "a \ud83d"},
        {"messages": [ask, {"role": "assistant", "content": None}]},
    ]
    found = read_texts((str(write(tmp_path / "more.jsonl", more)),), "train", TOKENIZER, 24)
    assert found.unused == {
        "row longer than max_length = 24 tokens": 1,
        "conversation cut at a turn: longer than max_length = 24 tokens": 1,
        "row with a fault": 7,
    }
    assert [len(tokens.ids) for tokens in found.tokens] == [5, 24, 19]
    assert found.tokens[0].ids[-1] == TOKENIZER.encode("e")[0]
    assert found.names == ["a", "a " * 40, "a " * 40], "pieces of a text are on one side of the split"
    out = capsys.readouterr().out
    assert "more.jsonl:4: no turn of the assistant to learn from" in out
    assert 'more.jsonl:5: a row has messages, prompt and completion, or text; this one has "question"' in out
    assert "more.jsonl:6: prompt and completion must be two texts or two lists of messages" in out
    for fault, said in (
        (6, 'text must be a text that is not blank, not " \\n"'),
        (7, "text must be a text that is not blank, not null"),
        (8, "a text holds half of a Unicode surrogate pair"),
        (9, "message 2 of messages must have role and content, both texts; it has role, content of type NoneType"),
    ):
        alone = str(write(tmp_path / "alone.jsonl", more[fault : fault + 1]))
        with pytest.raises(UserError, match=f"alone.jsonl:1: {re.escape(said)}"):
            read_texts((alone,), "train", TOKENIZER, 24)
    chats = write(tmp_path / "chats.jsonl", more[:2])
    with pytest.raises(UserError, match=r"chats.jsonl: no text is left \(row longer than max_length = 2 tokens\)"):
        read_texts((str(chats),), "train", TOKENIZER, 2)


def test_plain_text_is_read_in_pieces_in_which_each_token_is_learned_once(tmp_path):
    said = [chr(ord("a") + i % 8) for i in range(50)]
    path = tmp_path / "book.txt"
    path.write_text("\r\n".join(" ".join(said[i : i + 10]) for i in range(0, 50, 10)))
    found = read_texts((str(path),), "train", TOKENIZER, 24)
    assert [len(tokens.ids) for tokens in found.tokens] == [24, 24, 6] and not found.unused
    assert len(set(found.names)) == 3, "the pieces of a file are held out one by one"
    assert [tokens.number for tokens in found.tokens] == [0, 1, 2]
    (tmp_path / "copy.txt").write_text(path.read_text())
    both = read_texts((str(path), str(tmp_path / "copy.txt")), "train", TOKENIZER, 24)
    assert both.names[:3] == both.names[3:], "a copy is on the same side of the split"
    learned = [i for tokens in found.tokens for i, weight in zip(tokens.ids, tokens.weights) if weight]
    assert learned == [*TOKENIZER.encode(" ".join(said)), TOKENIZER.eos_id]
    assert [tokens.weights[0] for tokens in found.tokens] == [0.0] * 3, "BOS, or the last token of the piece before"
    assert [a.ids[-1] for a in found.tokens[:-1]] == [b.ids[0] for b in found.tokens[1:]]
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"empty.txt holds no text"):
        read_texts((str(tmp_path / "empty.txt"),), "train", TOKENIZER, 24)
    long = write(tmp_path / "one.jsonl", [{"text": " ".join(said)}])
    with pytest.raises(UserError, match=r"one.jsonl: this is one text, of which no other can be held out: give more"):
        read_split(config(tmp_path, tmp_path, data=(str(long),)), TOKENIZER, 24)


@pytest.mark.parametrize("count", range(6))
def test_pieces_of_every_length_hold_each_token_once(count):
    whole = LearnedTokens(list(range(count)), [1.0] * count, [count])
    parts = whole.pieces(3)
    assert all(len(part.ids) <= 3 for part in parts)
    assert [i for part in parts for i, weight in zip(part.ids, part.weights) if weight] == whole.ids
    assert whole.pieces(max(count, 2)) == [whole]


def test_rows_are_as_long_as_the_model_can_read_at_most(folder, monkeypatch):
    given = {"batch_size": 8, "dtype": "float32", "remat": False, "parallel": ParallelConfig()}
    assert start.model_to_fit(str(folder / "lm"), None, max_length=None, **given).max_length == 32
    assert start.model_to_fit(str(folder / "lm"), None, max_length=8, **given).max_length == 8
    monkeypatch.setattr(start, "MAX_LENGTH", 16)
    assert start.model_to_fit(str(folder / "lm"), None, max_length=None, **given).max_length == 16


BAD = {
    "no model": ({"model": None}, "no model to begin with: give --model"),
    "no data": ({"data": ()}, "no texts to learn from: give --data"),
    "no file": ({"data": ("nothing.jsonl",)}, "nothing.jsonl"),
    "no file to measure on": ({"eval_data": ("nothing.jsonl",)}, "nothing.jsonl"),
    "nothing new to measure on": ({"eval_data": ("DATA",)}, "eval_data: none of its 120 texts is left to measure on"),
    "no data set": ({"data": ("no_such_set",)}, "no TFDS data set 'no_such_set'"),
    "too long": ({"max_length": 64}, r"max_length \(64\) is more than .* can read: 32 tokens"),
    "few rows": (
        {"fit": FitConfig(2, 500)},
        r"fill \d+ rows of max_length = 24 tokens, fewer than fit.batch_size \(500\)",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_learned_from_is_named_and_leaves_no_run(bad, folder, tmp_path):
    changes = {
        name: (str(folder / "texts.jsonl"),) if value == ("DATA",) else value for name, value in BAD[bad][0].items()
    }
    with pytest.raises(UserError, match=BAD[bad][1]):
        main(config(folder, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong", [{"max_length": 0}, {"check_every": 0}, {"held_out": 0.0}, {"split_seed": -1}])
def test_bad_settings_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SFTConfig(**wrong)


# ---- Perplexity


@pytest.mark.parametrize("runner", [JitRunner, PmapRunner])
def test_the_perplexity_is_that_of_each_text_alone(runner):
    """Packed and padded rows of several texts, against each text by itself in float64."""
    rng = np.random.default_rng(0)
    params = random_params(MODEL)
    tokens = []
    for number in range(13):
        ids = rng.integers(3, TOKENIZER.vocab_size, rng.integers(2, 15)).tolist()
        tokens.append(LearnedTokens(ids, rng.integers(0, 2, len(ids)).astype(float).tolist(), [len(ids)], number))
    rows = measured_rows(tokens, 24, 0)
    assert len(rows["tokens"]) < 8 and rows["segments"].max() > 1
    meter = PerplexityMeter(MODEL, runner(), 8)
    losses = meter.losses(params, rows)
    expected = []
    forward = jax.jit(MODEL)
    for text in tokens:
        row = np.zeros((1, 24), np.int32)
        row[0, : len(text.ids)] = text.ids
        logits = np.asarray(forward(params, row, np.arange(24)[None] < len(text.ids))[0], np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats = [-logprobs[i - 1, text.ids[i]] * text.weights[i] for i in range(1, len(text.ids))]
        expected.append((sum(nats), sum(text.weights[1:])))
    expected = np.array([row for row in expected if row[1] > 0])
    np.testing.assert_allclose(sorted(map(tuple, losses)), sorted(map(tuple, expected)), rtol=1e-4)
    assert meter(params, rows).value == pytest.approx(np.exp(expected[:, 0].sum() / expected[:, 1].sum()), rel=1e-4)
    halves = [text._replace(number=text.number // 7) for text in tokens]  # pieces of two texts
    two = meter.losses(params, measured_rows(halves, 24, 0))
    assert len(two) == 2
    np.testing.assert_allclose(two.sum(0), losses.sum(0), rtol=1e-6)


def test_measurements_share_a_program():
    meter = PerplexityMeter(MODEL, CountingRunner(), 4)
    rows = measured_rows([LearnedTokens([4, 5, 6], [0.0, 1.0, 1.0], [3])], 24, 0)
    assert len({meter(random_params(MODEL, seed=k), rows) for k in range(3)}) == 3
    assert meter.runner.compiled == 1


def test_a_ruined_model_is_measured_too(folder, tmp_path):
    """Its loss of a token is more than exp can take."""
    rate = FitConfig(updates=10, batch_size=8, learning_rate=1e2)
    metrics = main(config(folder, tmp_path / "run", fit=rate, check_every=10))
    low, high = metrics["perplexity_after_ci95"]
    assert 1e300 < low <= metrics["perplexity_after"] <= high < np.inf
    losses = [row["heldout_loss"] for row in numbers(tmp_path / "run") if "heldout_loss" in row]
    assert losses[0] < 10 and losses[1] > 1000


def test_the_interval_of_a_perplexity_covers():
    """The share of samples of 60 texts whose interval has the true perplexity, e^2."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        tokens = rng.integers(5, 50, 60)
        nats = tokens * rng.normal(2.0, 0.4, 60)
        found = perplexity(np.stack([nats, tokens], axis=1).astype(float))
        hits += found.low < np.exp(2.0) < found.high
    assert 0.9 <= hits / 200 <= 0.99
