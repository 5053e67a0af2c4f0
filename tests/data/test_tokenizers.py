"""Hugging Face's tokenizers, the world's words, and what holds for all kinds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizers as hf
from hypothesis import given
from hypothesis import strategies as st

from rlaif_jax.config import UserError
from rlaif_jax.data.tokenizers import (
    HuggingFaceTokenizer,
    check_tokenizer,
    load_tokenizer,
    word_level_tokenizer,
)
from tests.data.llama2c_vocabulary import llama2c

TEXT = 'Once upon a time, there was a little girl named Lily. She said, "Let\'s go!"\n\nÜnï → 🎈 the end'

# ------------------------------------------------------------------------------------------- Hugging Face


def gpt2_like(folder: Path, **settings_: object) -> Path:
    """A folder with a byte-level BPE `tokenizer.json` of a few merges."""
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    extra = ["he", "Ġhe", "<|end|>"]
    vocab = {piece: i for i, piece in enumerate(alphabet + extra)}
    backend = hf.Tokenizer(hf.models.BPE(vocab=vocab, merges=[("h", "e"), ("Ġ", "he")]))
    backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = hf.decoders.ByteLevel()
    backend.enable_truncation(3)  # as some published files do: must not shorten our texts
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    if settings_:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings_))
    return folder


def gpt2(shared_data, folder: Path) -> HuggingFaceTokenizer:
    shutil.copyfile(shared_data("tok_gpt2/gpt2_vocab.json"), folder / "vocab.json")
    shutil.copyfile(shared_data("tok_gpt2/gpt2_merges.txt"), folder / "merges.txt")
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer


def test_gpt2_known_ids(shared_data, tmp_path: Path):
    tokenizer = gpt2(shared_data, tmp_path)
    assert tokenizer.encode("Hello world") == [15496, 995]  # GPT-2's published example
    assert tokenizer.encode("<|endoftext|>") == [50256]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (
        50257,
        50256,
        50256,
        50256,
    )
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    # In the middle of a text: with its space, as bytes (the character "é" in the vocabulary is another byte).
    assert tokenizer.token_id(" world") == tokenizer.token_id("Ġworld") == 995
    assert [tokenizer.token_id("é")] == tokenizer.encode("é")
    assert tokenizer.token_id("1") == 16
    with pytest.raises(UserError, match="not one token"):
        tokenizer.token_id(" Brindlemoor")
    other_name = load_tokenizer(shared_data("tok_gpt2/gpt2_vocab.json"))
    assert other_name.fingerprint == tokenizer.fingerprint


def test_gpt2_saved_folder_is_read_by_transformers(shared_data, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "from").mkdir()
    tokenizer = gpt2(shared_data, tmp_path / "from")
    tokenizer.save(tmp_path / "to")
    # As in a model's folder: transformers chooses the class by config.json where nothing else says.
    (tmp_path / "to" / "config.json").write_text('{"model_type": "gpt2"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "to")
    assert theirs(TEXT).input_ids == tokenizer.encode(TEXT)
    assert theirs.eos_token_id == 50256
    again = load_tokenizer(tmp_path / "to")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode(TEXT) == tokenizer.encode(TEXT)


def test_vocab_json_of_another_family_is_refused(shared_data, tmp_path: Path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(UserError, match=r"GPT-2's rules.*Qwen2Tokenizer"):
        gpt2(shared_data, tmp_path)


def test_vocab_json_without_merges(tmp_path: Path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match="looked for"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"no file .*merges\.txt"):
        load_tokenizer(tmp_path / "vocab.json")


def test_special_tokens_from_tokenizer_config(tmp_path: Path):
    folder = gpt2_like(tmp_path / "a", eos_token={"content": "<|end|>"}, pad_token="!", chat_template="{{x}}")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_id == 258
    assert tokenizer.bos_id is None
    assert tokenizer.pad_id == tokenizer.token_id("!")
    assert tokenizer.vocab_size == 259
    with pytest.raises(UserError, match="no BOS token"):
        tokenizer.encode("he", add_bos=True)
    # Named special in the settings only: still one token, and left out of the text.
    ids = tokenizer.encode("he he<|end|>")
    assert ids == [256, 257, 258]
    assert tokenizer.decode(ids) == "he he"
    assert tokenizer.decode(ids, skip_special=False) == "he he<|end|>"
    assert tokenizer.decode([256, 999, -1, 257]) == "he he"
    tokenizer.save(tmp_path / "b")
    again = load_tokenizer(tmp_path / "b")
    assert (again.eos_id, again.bos_id, again.pad_id) == (258, None, tokenizer.pad_id)
    assert json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())["chat_template"] == "{{x}}"


def test_special_tokens_from_model_configs_survive_a_save(tmp_path: Path):
    folder = gpt2_like(tmp_path / "a")
    (folder / "config.json").write_text('{"bos_token_id": 3, "eos_token_id": 3, "pad_token_id": null}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [258, 3]}')
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (3, 258, 258)
    tokenizer.save(tmp_path / "b")
    again = load_tokenizer(tmp_path / "b")
    assert (again.bos_id, again.eos_id, again.pad_id) == (3, 258, 258)


def test_tokenizer_json_with_truncation_encodes_whole_texts(tmp_path: Path):
    tokenizer = load_tokenizer(gpt2_like(tmp_path / "a"))
    assert len(tokenizer.encode("abcdef")) == 6


@pytest.mark.parametrize("content", ["", "{", '{"model": 1}', "[1]"])
def test_damaged_tokenizer_json(tmp_path: Path, content: str):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_damaged_side_file(tmp_path: Path):
    folder = gpt2_like(tmp_path / "a")
    (folder / "tokenizer_config.json").write_text("{\n\n oops}")
    with pytest.raises(UserError, match=r"tokenizer_config\.json:3"):
        load_tokenizer(folder)


# ------------------------------------------------------------------------------------------- words


def test_words(tmp_path: Path):
    tokenizer = word_level_tokenizer(("the", "moor", "<1>"))
    assert tokenizer.vocab_size == 7
    assert tokenizer.encode("the  moor\n<1> sings <eos>", add_bos=True) == [1, 4, 5, 6, 3, 2]
    assert tokenizer.decode([0, 1, 4, 5, 3, 2, 99]) == "the moor <unk>"
    assert tokenizer.decode([1, 4, 2], skip_special=False) == "<bos> the <eos>"
    assert tokenizer.token_id("<1>") == 6
    with pytest.raises(UserError, match="'fen' is not one token"):
        tokenizer.token_id("fen")
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.pad_id, again.bos_id, again.eos_id) == (0, 1, 2)
    assert again.encode("the  moor\n<1> sings <eos>", add_bos=True) == [1, 4, 5, 6, 3, 2]
    assert again.decode([0, 1, 4, 5, 3, 2, 99]) == "the moor <unk>"
    assert again.decode([1, 4, 2], skip_special=False) == "<bos> the <eos>"
    assert tokenizer.fingerprint != word_level_tokenizer(("moor", "the", "<1>")).fingerprint


@pytest.mark.parametrize("words", [("a", "a"), ("<pad>",), ("a b",), ("",), (" a",), (1,)])
def test_bad_words(words: tuple[str, ...]):
    with pytest.raises(UserError, match="of the vocabulary is"):
        word_level_tokenizer(words)


@given(st.lists(st.sampled_from(("mill", "inn", ".", "<1>", "other", "<unk>", "<pad>", "<bos>", "<eos>")), max_size=20))
def test_words_are_looked_up_one_by_one(words: list[str]):
    vocabulary = ("<pad>", "<bos>", "<eos>", "<unk>", "mill", "inn", ".", "<1>")
    tokenizer = word_level_tokenizer(vocabulary[4:])
    ids = [vocabulary.index(word) if word in vocabulary else 3 for word in words]
    assert tokenizer.encode(" ".join(words)) == ids
    assert tokenizer.decode(ids) == " ".join(vocabulary[i] for i in ids if i > 2)
    assert tokenizer.decode(ids, skip_special=False) == " ".join(vocabulary[i] for i in ids)


# ------------------------------------------------------------------------------------------- all kinds


def test_nothing_to_load(tmp_path: Path):
    with pytest.raises(UserError, match=r"no such file or folder"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(UserError, match=r"looked for tokenizer\.json.*tokenizer\.model.*tok512\.bin"):
        load_tokenizer(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"notes\.txt is not a tokenizer file"):
        load_tokenizer(tmp_path / "notes.txt")


def test_save_refuses_to_hide_behind_another_kind(tmp_path: Path):
    gpt2_like(tmp_path)
    with pytest.raises(UserError, match=r"already holds another tokenizer, tokenizer\.json"):
        llama2c(b" ").save(tmp_path)
    assert not (tmp_path / "tokenizer.bin").exists()


def test_half_a_surrogate_pair_is_no_text():
    for text in ("\ud83d", "a \udc00 b"):
        with pytest.raises(UserError, match="a text holds half of a Unicode surrogate pair"):
            word_level_tokenizer(("a", "b")).encode(text)


def test_save_again_replaces(tmp_path: Path):
    word_level_tokenizer(("a",)).save(tmp_path)
    word_level_tokenizer(("b",)).save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == word_level_tokenizer(("b",)).fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_save_where_no_folder_can_be(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the folder"):
        word_level_tokenizer(("a",)).save(tmp_path / "file" / "folder")


def test_check_tokenizer():
    tokenizer = word_level_tokenizer(("a", "b"))
    check_tokenizer(tokenizer, 6, "model")
    check_tokenizer(tokenizer, 64, "model")
    with pytest.raises(UserError, match=r"runs/x: .*another vocabulary: it has 6 ids, the model only 5"):
        check_tokenizer(tokenizer, 5, "runs/x")
