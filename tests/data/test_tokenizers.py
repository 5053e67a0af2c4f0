from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import sentencepiece
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_jax.config import UserError
from rlaif_jax.data.llama2c import Llama2cTokenizer
from rlaif_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rlaif_jax.data.tokenizers import (
    HuggingFaceTokenizer,
    check_tokenizer,
    load_tokenizer,
    word_level_tokenizer,
)
from tests.data.llama2c_json import to_tokenizer_json

TEXT = 'Once upon a time, there was a little girl named Lily. She said, "Let\'s go!"\n\nÜnï → 🎈 the end'

# ------------------------------------------------------------------------------------------- llama2.c

BYTES = [f"<0x{b:02X}>".encode() for b in range(256)]


def llama2c(*pieces: bytes) -> Llama2cTokenizer:
    """A tiny llama2.c vocabulary: earlier pieces merge first, as in the files of its trainer."""
    every = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *BYTES, *pieces]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]
    return Llama2cTokenizer(tuple(every), tuple(scores), max(map(len, every)))


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


def test_llama2c_decode_strips_one_space_after_bos_and_at_the_start_only():
    tokenizer = llama2c(b" ", b"a", b"b", b" a")
    assert tokenizer.decode([1, 262, 262, 261]) == "a ab"
    assert tokenizer.decode([0, 0, 1, 259, 262]) == " a"
    assert tokenizer.decode([262, 1, 262]) == "aa"
    assert tokenizer.decode([1, 262, 2, 0], skip_special=False) == "\n<s>\na\n</s>\n<unk>"
    # Half a character, and ids that a padded embedding could sample.
    assert tokenizer.decode([0xC3 + 3, 260, 263, 5000, -1]) == "\ufffda"


def test_llama2c_can_stop_where_the_next_text_begins():
    tokenizer = llama2c(b" ", b"a", b" a")
    stopping = tokenizer.stopping_at_bos()
    assert (tokenizer.eos_id, stopping.eos_id, stopping.bos_id) == (2, 1, 1)
    assert stopping.encode("a a", add_bos=True) == tokenizer.encode("a a", add_bos=True) == [1, 261, 261]
    assert stopping.decode([1, 261, 261, 1]) == "a a"
    assert stopping.fingerprint == tokenizer.fingerprint


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


# ------------------------------------------------------------------------------------------- SentencePiece


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
