"""A user's prompts: read, templated, left out with their reason, held out."""

from __future__ import annotations

import json

import pytest

from rlaif_jax.data.prompts import prompt_batches
from rlaif_jax.data.tokenizers import word_level_tokenizer
from rlaif_jax.recipes.own_prompts import read_prompts, read_records
from tests.data.test_rendering import chat_tokenizer

TURNS = (("user", "one"), ("assistant", "two"), ("user", "three"))
WORDS = word_level_tokenizer(("Human:", "Assistant:", *"abcdefgh"))


def read(source, tokenizer=WORDS, **changed):
    settings = {
        "eval_source": None, "held_out": 2, "multiple_of": 1, "template": "auto", "system": "", "prompt_length": 8,
        "seed": 0,
    }  # fmt: skip
    return read_prompts(str(source), tokenizer, **settings | changed)


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return chat_tokenizer(tmp_path_factory.mktemp("chat"))


def test_a_text_file_has_a_prompt_in_each_line_that_is_not_empty(tmp_path):
    found = read(write(tmp_path / "p.txt", ["a b", "", "c", "d", "e f g"]))
    prompts = [record["prompt"] for part in (found.training, found.held_out) for record in part.records]
    assert sorted(prompts) == ["a b", "c", "d", "e f g"] and len(found.held_out) == 2
    assert found.left_out == {} and found.add_bos
    assert {place.rpartition(":")[2] for place in (*found.training.places, *found.held_out.places)} == set("1345")


def test_a_line_ends_with_the_line_alone(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffa\u2028b\r\nc\x0cd\r\ne\nf\n".encode())
    assert [record["prompt"] for record in read_records(str(tmp_path / "p.txt"))] == ["a\u2028b", "c\x0cd", "e", "f"]


def test_what_is_too_long_or_there_already_is_counted(tmp_path):
    rows = [{"prompt": text} for text in ("a", "b", "a", "c", "a b c d e f g h a", "d", "b")]
    found = read(write(tmp_path / "p.jsonl", rows))
    assert len(found.training) == 2 and len(found.held_out) == 2
    assert found.left_out == {"the same prompt once more": 2, "longer than train.prompt_length (8 tokens)": 1}


def test_a_prompt_that_is_measured_on_is_not_learned(tmp_path):
    training = write(tmp_path / "p.txt", ["a", "b", "c", "d"])
    held = write(tmp_path / "q.txt", ["c", "e", "f", "g"])
    found = read(training, eval_source=str(held), held_out=3, multiple_of=2)
    assert [record["prompt"] for record in found.training.records] == ["a", "b", "c", "d"]
    assert [record["prompt"] for record in found.held_out.records] == ["e", "f"]


def test_a_chat_model_reads_the_template_and_judges_the_words(tmp_path, chat):
    rows = [
        {"prompt": "hi"},
        {"prompt": [{"role": role, "content": text} for role, text in TURNS]},
        {"prompt": "with<|im_end|>mark"},
    ]  # fmt: skip
    found = read(write(tmp_path / "p.jsonl", rows), chat, prompt_length=300)
    records = {record["prompt"]: record for part in (found.training, found.held_out) for record in part.records}
    assert set(records) == {
        "hi",
        "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:",
        "with<|im_end|>mark",
    }
    asked = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert records["hi"]["model_text"].endswith(f"<|im_end|>\n{asked}") and not found.add_bos
    batch = next(prompt_batches([records["with<|im_end|>mark"]], chat, batch_size=1, seed=0, prompt_length=300))
    assert (batch.tokens[batch.mask] == chat.token_id("<|im_end|>")).sum() == 2, "what data spells is text"
    kind = read(tmp_path / "p.jsonl", chat, prompt_length=300, system="Be kind.")
    texts = [record["model_text"] for part in (kind.training, kind.held_out) for record in part.records]
    assert f"<|im_start|>system\nBe kind.<|im_end|>\n{asked}" in texts
