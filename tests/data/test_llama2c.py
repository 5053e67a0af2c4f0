"""The tokenizer of llama2.c, against a transcription of its run.c."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import pytest
import sentencepiece
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_jax.config import UserError
from rlaif_jax.data.conversations import Turn
from rlaif_jax.data.llama2c import Llama2cTokenizer
from rlaif_jax.data.rendering import conversation_tokens
from rlaif_jax.data.tokenizers import Tokenizer, load_tokenizer
from tests.data.llama2c_vocabulary import llama2c, to_tokenizer_json

TEXT = 'Once upon a time, there was a little girl named Lily. She said, "Let\'s go!"\n\nÜnï → 🎈 the end'


def run_c_encode(pieces: tuple[bytes, ...], scores: tuple[float, ...], text: str) -> list[int]:
    """A literal transcription of `encode` in llama2.c's run.c: rescan the whole text for every merge."""

    def lookup(piece: bytes) -> int:
        return pieces.index(piece) if piece in pieces else -1

    ids = [] if text == "" else [lookup(b" ")]
    raw, buffer = text.encode(), b""
    for position, byte in enumerate(raw):
        if byte & 0xC0 != 0x80:
            buffer = b""
        buffer += bytes([byte])
        following = raw[position + 1] if position + 1 < len(raw) else 0
        if following & 0xC0 == 0x80 and len(buffer) < 4:
            continue
        found = lookup(buffer)
        ids += [found] if found != -1 else [b + 3 for b in buffer]
        buffer = b""
    while True:
        best_score, best_id, best_at = -1e10, -1, -1
        for i in range(len(ids) - 1):
            found = lookup(pieces[ids[i]] + pieces[ids[i + 1]])
            if found != -1 and scores[found] > best_score:
                best_score, best_id, best_at = scores[found], found, i
        if best_at == -1:
            return ids
        ids[best_at : best_at + 2] = [best_id]


def test_llama2c_merges_by_hand():
    #                  259   260   261   262   263    264    265
    tokenizer = llama2c(b" ", b"a", b"b", b"c", b"bc", b"ab", b" a")
    # " abc": b+c (score -4) goes before a+b (-5), and then " "+a (-6).
    assert tokenizer.encode("abc") == [265, 263]
    # "aab": of " a" and "ab" the higher score, "ab", goes first; then " "+"a".
    assert tokenizer.encode("aab") == [265, 264]
    assert tokenizer.encode("") == []
    assert tokenizer.encode("", add_bos=True) == [1]
    # "é" is C3 A9 and not in the vocabulary: byte tokens are the byte + 3.
    assert tokenizer.encode("é", add_bos=True) == [1, 259, 0xC3 + 3, 0xA9 + 3]


def test_llama2c_equal_merges_go_from_the_left():
    tokenizer = llama2c(b" ", b"a", b"aa", b"aaaa")
    assert tokenizer.encode("aaaaa") == [259, 262, 260]
    assert tokenizer.encode("aaa") == [259, 261, 260]


@given(st.text(alphabet="abc é🎈\n", max_size=24))
@settings(max_examples=200, deadline=None)
def test_llama2c_encode_equals_run_c_on_a_tiny_vocabulary(text: str):
    tokenizer = llama2c(b" ", b"a", b"b", b"c", b"bc", b"ab", b" a", b"aa", b"abc", b"cab", b" b", b"bcab")
    assert tokenizer.encode(text) == run_c_encode(tokenizer.pieces, tokenizer.scores, text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, add_bos=True)) == text


def as_huggingface(tokenizer: Llama2cTokenizer, folder: Path) -> Tokenizer:
    to_tokenizer_json(tokenizer).save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["llama2c", "tokenizer.json", "sentencepiece"])
def test_a_text_that_continues_another_has_no_blank_before_it(kind: str, tmp_path: Path):
    """SFT encodes a conversation in parts; a blank before each part would be learned, and written."""
    if kind == "sentencepiece":
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a bc a b: Human Assistant c"] * 20),
            model_writer=model,
            vocab_size=290,
            byte_fallback=True,
            model_type="bpe",
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
        (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
        tokenizer = load_tokenizer(tmp_path)
    else:
        own = llama2c(b" ", b"a", b"b", b"c", b"bc", b" a", b":", b" b")
        tokenizer = own if kind == "llama2c" else as_huggingface(own, tmp_path)
    for before, after in (("ab:", " a b"), ("a", "bc"), ("a b", " a"), ("b", "")):
        ids = [*tokenizer.encode(before), *tokenizer.encode(after, continues=True)]
        assert tokenizer.decode(ids) == before + after
        assert tokenizer.encode(after, continues=True) != tokenizer.encode(after) or not after
    turns = [Turn("user", "a b"), Turn("assistant", "b a"), Turn("user", "c"), Turn("assistant", "a")]
    found = conversation_tokens(tokenizer, turns)
    assert tokenizer.decode(found.ids) == "\n\nHuman: a b\n\nAssistant: b a\n\nHuman: c\n\nAssistant: a"
    learned = [i for i, weight in zip(found.ids, found.weights) if weight]
    said = [*tokenizer.encode(" b a", continues=True), *tokenizer.encode(" a", continues=True)]
    assert learned == said + [tokenizer.eos_id] * (tokenizer.eos_id is not None)


def test_a_vocabulary_without_a_blank_before_texts_needs_none_taken_away(tmp_path: Path):
    backend = hf.Tokenizer(hf.models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("a b", continues=True) == [0, 1]


def test_llama2c_decode_strips_one_space_after_bos_and_at_the_start_only():
    tokenizer = llama2c(b" ", b"a", b"b", b" a")
    assert tokenizer.decode([1, 262, 262, 261]) == "a ab"
    assert tokenizer.decode([0, 0, 1, 259, 262]) == " a"
    assert tokenizer.decode([262, 1, 262]) == "aa"
    assert tokenizer.decode([1, 262, 2, 0], skip_special=False) == "\n<s>\na\n</s>\n<unk>"
    assert tokenizer.decode([1, 262, 0, 262]) == "a<unk> a", "a sampled <unk> is no padding"
    # Half a character, and ids that a padded embedding could sample.
    assert tokenizer.decode([0xC3 + 3, 260, 263, 5000, -1]) == "\ufffda"


def test_llama2c_can_stop_where_the_next_text_begins(tmp_path: Path):
    tokenizer = llama2c(b" ", b"a", b" a")
    stopping = tokenizer.stopping_at_bos()
    assert (tokenizer.eos_id, stopping.eos_id, stopping.bos_id) == (2, 1, 1)
    assert stopping.encode("a a", add_bos=True) == tokenizer.encode("a a", add_bos=True) == [1, 261, 261]
    assert stopping.decode([1, 261, 261, 1]) == "a a"
    assert stopping.fingerprint == tokenizer.fingerprint
    stopping.save(tmp_path)
    assert load_tokenizer(tmp_path).stop_ids == stopping.stop_ids == (1,)


def test_llama2c_real_file_round_trip_and_run_c(shared_data):
    tokenizer = load_tokenizer(shared_data("lm_stories260k/tok512.bin"))
    assert isinstance(tokenizer, Llama2cTokenizer)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (512, 1, 2, 0)
    page = shared_data("lm_stories260k/stories260K.md").read_text()
    for story in page.split("```")[3::4]:
        story = story.split("\n", 2)[2]
        assert len(story) > 400
        ids = tokenizer.encode(story, add_bos=True)
        assert tokenizer.decode(ids) == story
        assert len(ids) < len(story) / 2  # merges happened
    for text in (TEXT, page[:700]):
        assert tokenizer.encode(text) == run_c_encode(tokenizer.pieces, tokenizer.scores, text)
    assert tokenizer.token_id(" the") == 265
    assert tokenizer.token_id("\n") == 10 + 3
    assert tokenizer.token_id("<s>") == 1


def test_llama2c_as_tokenizer_json(shared_data, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(shared_data("lm_stories260k/tok512.bin"))
    assert isinstance(tokenizer, Llama2cTokenizer)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}')
    to_tokenizer_json(tokenizer).save(str(tmp_path / "tokenizer.json"))
    converted = load_tokenizer(tmp_path)
    assert (converted.vocab_size, converted.bos_id, converted.eos_id) == (512, 1, 2)
    converted.save(tmp_path)  # adds the settings by which transformers finds the right class
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    page = shared_data("lm_stories260k/stories260K.md").read_text()
    sentences = shared_data("sentiment").glob("rt-polarity.*")
    lines = [line for path in sentences for line in path.read_text(errors="ignore").split("\n")[:100]]
    for text in (TEXT, page, *lines):
        if not text:
            continue
        ids = tokenizer.encode(text)
        assert converted.encode(text) == ids
        assert theirs(text, add_special_tokens=False).input_ids == ids
        assert converted.decode(ids) == text
    assert converted.token_id(" the") == tokenizer.token_id(" the")
    assert converted.token_id("\n") == 13


def test_llama2c_file_is_saved_byte_for_byte(shared_data, tmp_path: Path):
    original = shared_data("lm_stories260k/tok512.bin")
    load_tokenizer(original).save(tmp_path)
    assert (tmp_path / "tokenizer.bin").read_bytes() == original.read_bytes()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:3], "too few for its header"),
        (lambda data: data[:-1], "ends within token 260"),
        (lambda data: data[: -(1 + 5)], "ends within the header of token 260"),
        (lambda data: data[: 4 + 8 + 5 + 8 + 5], "ids 3 to 258 should be the bytes"),
        (lambda data: data[:8] + struct.pack("<i", 10**6) + data[12:], "token 0 claims 1000000 bytes"),
        (lambda data: data[:8] + struct.pack("<i", -1) + data[12:], "token 0 claims -1 bytes"),
        (lambda data: b"", "too few for its header"),
    ],
)
def test_llama2c_damaged_file(tmp_path: Path, damage, said: str):
    llama2c(b" ", b"a").save(tmp_path)
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=said) as error:
        load_tokenizer(tmp_path)
    assert str(path) in str(error.value)
