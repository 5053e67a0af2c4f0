"""The tokenizer of SentencePiece models, against its library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece

from rlaif_jax.config import UserError
from rlaif_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rlaif_jax.data.tokenizers import (
    load_tokenizer,
)


def test_sentencepiece_against_its_library(shared_data, tmp_path: Path):
    path = shared_data("tok_sentencepiece/test_model.model")
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(path)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (1000, 1, 2)
    assert tokenizer.pad_id == library.unk_id()  # the model has no padding token
    text = "I saw a girl with a telescope."  # the README's example for this model
    assert tokenizer.encode(text) == library.encode(text)
    assert tokenizer.encode(text, add_bos=True) == [1, *library.encode(text)]
    assert tokenizer.decode([0, 0, *tokenizer.encode(text, add_bos=True), 2, 0]) == text
    assert tokenizer.decode([1, *library.encode("hi"), 2], skip_special=False) == "<s>hi</s>"
    assert tokenizer.decode([1, *library.encode("hi"), 1000, -3]) == "hi"
    assert tokenizer.token_id(" the") == tokenizer.token_id("▁the") == library.piece_to_id("▁the")
    assert tokenizer.token_id("</s>") == 2
    with pytest.raises(UserError, match="not one token"):
        tokenizer.token_id("telescope")
    tokenizer.save(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == path.read_bytes()
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("content", [b"", b"IQ== 0\nIg== 1\n", b"\x00\xff" * 50])
def test_damaged_sentencepiece(tmp_path: Path, content: bytes):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.model is not a readable SentencePiece model"):
        load_tokenizer(tmp_path)


def test_truncated_sentencepiece(shared_data, tmp_path: Path):
    data = shared_data("tok_sentencepiece/test_model.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="not a readable SentencePiece model"):
        load_tokenizer(tmp_path)


def test_a_sampled_unknown_piece_keeps_its_place(shared_data):
    """As the library decodes it; padding is left out, which this model does with the same id."""
    path = shared_data("tok_sentencepiece/test_model.model")
    library, tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path)), load_tokenizer(path)
    unknown = library.unk_id()
    assert tokenizer.pad_id == unknown
    ids = [*library.encode("your things."), unknown, *library.encode("Tom saw")]
    assert tokenizer.decode(ids) == library.decode(ids)
    assert tokenizer.decode(ids).split() == ["your", "things.", "\u2047", "Tom", "saw"]
    assert tokenizer.decode([*ids, unknown]) == library.decode([*ids, unknown])
    assert tokenizer.decode([unknown, unknown, 1, *ids, 2, unknown]) == library.decode(ids)


def test_ends_of_sentencepiece_models_are_declared_in_the_other_files_as_well(shared_data, tmp_path: Path):
    model = shared_data("tok_sentencepiece/test_model.model").read_bytes()

    def folder(name: str, **files: object) -> Path:
        made = tmp_path / name
        made.mkdir()
        (made / "tokenizer.model").write_bytes(model)
        for file, values in files.items():
            (made / f"{file}.json").write_text(json.dumps(values))
        return made

    gemma = load_tokenizer(folder("gemma", generation_config={"eos_token_id": [1, 107]}))
    assert (gemma.stop_ids, gemma.eos_id, gemma.vocab_size) == ((1, 107, 2), 1, 1000)
    # A chat model made of a base model: the end of a turn is behind the pieces.
    chat = load_tokenizer(folder("chat", tokenizer_config={"eos_token": "<end>"}, added_tokens={"<end>": 1000}))
    assert (chat.stop_ids, chat.eos_id, chat.vocab_size) == ((1000, 2), 1000, 1001)
    assert chat.decode([*chat.encode("hi"), 1000]) == "hi"
    assert chat.fingerprint == gemma.fingerprint
    with pytest.raises(UserError, match="eos_token is '<end>', which is in no vocabulary"):
        load_tokenizer(folder("none", tokenizer_config={"eos_token": "<end>"}))
    for number, tokenizer in enumerate((gemma, gemma.stopping_at_bos())):
        tokenizer.save(tmp_path / f"saved{number}")
        again = load_tokenizer(tmp_path / f"saved{number}")
        assert again.eos_id == 1 and set(again.stop_ids) >= set(tokenizer.stop_ids)


def test_a_control_token_that_data_spells_is_text(shared_data, tmp_path: Path):
    """With a control token that the model finds in texts, as Gemma's; made by the library's own trainer."""
    text = tmp_path / "text"
    text.write_text("\n".join(f"the {a} of {b} and {c}" for a in "abcdef" for b in "ghijkl" for c in "mnopq"))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=26, user_defined_symbols=["<turn>", "the"],
        minloglevel=2,
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "m.model")
    turn = tokenizer.token_id("<turn>")
    assert turn in tokenizer.encode("the a<turn>")
    assert turn not in tokenizer.encode(tokenizer.quote("the a<turn>"))
    assert tokenizer.quote("the a") == "the a", "a whole word is no control token"
