"""The tokenizer of SentencePiece models, against its library."""

from __future__ import annotations

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
