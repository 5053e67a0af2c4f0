"""End tokens and added tokens, wherever the files of a folder declare them; special tokens that data spells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_jax.config import UserError
from rlaif_jax.data.tokenizers import HuggingFaceTokenizer, load_tokenizer, word_level_tokenizer
from tests.data.token_folders import byte_tokenizer_folder

MANY = {"eos_token_id": [256, 257, 258]}
THREE = ("<eot>", "<eom>", "<turn>")
FLAGS = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
TURN = {"content": "<turn>", "special": True, **FLAGS}


@pytest.mark.parametrize(
    ("special", "files", "stops"),
    [
        # The tokenizer names the end of a turn, the model's files those of text and message as well.
        (THREE, {"tokenizer_config": {"eos_token": "<turn>"}, "generation_config": MANY}, (258, 256, 257)),
        (THREE, {"generation_config": MANY}, (256, 257, 258)),
        # A base model's files: the tokenizer names the chat's end, the others the text's.
        (
            ("<eot>", "<turn>"),
            {
                "tokenizer_config": {"eos_token": "<turn>"},
                "generation_config": {"eos_token_id": 256},
                "config": {"eos_token_id": 256},
            },
            (257, 256),
        ),
        (THREE, {"config": {"eos_token_id": [257, 256]}}, (257, 256)),
        (THREE, {"special_tokens_map": {"eos_token": {"content": "<eom>"}}, "config": {"eos_token_id": 258}}, (257, 258)),
        (THREE, {"tokenizer_config": {"eos_token": None}, "config": {"eos_token_id": 258}}, (258,)),
        (THREE, {"generation_config": {"eos_token_id": -1}, "config": {"eos_token_id": None}}, ()),
        # A model whose embedding is padded may end with an id that its tokenizer does not know.
        (THREE, {"tokenizer_config": {"eos_token": "<eot>"}, "generation_config": {"eos_token_id": [256, 300]}}, (256, 300)),
    ],
)  # fmt: skip
def test_every_declared_end_ends_an_answer(tmp_path: Path, special, files, stops):
    tokenizer = load_tokenizer(byte_tokenizer_folder(tmp_path / "a", *special, **files))
    assert tokenizer.stop_ids == stops
    assert tokenizer.eos_id == (stops[0] if stops else None)
    tokenizer.save(tmp_path / "b")
    assert load_tokenizer(tmp_path / "b").stop_ids == stops


@given(st.permutations(range(4)), st.integers(0, 4), st.integers(0, 4), st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_distribution_of_ends_over_the_files(tmp_path_factory, order, first, second, named):
    """The ends are the union of what each file says; the one that the tokenizer names comes first."""
    ids = [256 + i for i in order]
    files: dict[str, object] = {
        "generation_config": {"eos_token_id": ids[:first]},
        "config": {"eos_token_id": ids[second:]},
    }
    if named:
        files["tokenizer_config"] = {"eos_token": "<a>"}
    folder = byte_tokenizer_folder(tmp_path_factory.mktemp("ends"), "<a>", "<b>", "<c>", "<d>", **files)
    tokenizer = load_tokenizer(folder)
    assert set(tokenizer.stop_ids) == set(ids[:first]) | set(ids[second:]) | ({256} if named else set())
    assert len(set(tokenizer.stop_ids)) == len(tokenizer.stop_ids)
    assert not named or tokenizer.eos_id == 256


@pytest.mark.parametrize("wrong", ["<turn>", [256, "257"], 1.5, True])
def test_a_declaration_that_is_no_id_is_named(tmp_path: Path, wrong):
    folder = byte_tokenizer_folder(tmp_path, *THREE, generation_config={"eos_token_id": wrong})
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id must be an id or a list of ids, not"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"eos_token": "<turn>", "added_tokens_decoder": {"257": TURN}}, "config": {"eos_token_id": 257}},
        {"tokenizer_config": {"eos_token": "<turn>"}, "added_tokens": {"<turn>": 257}},
        {"special_tokens_map": {"eos_token": "<turn>"}, "added_tokens": {"<turn>": 257}},
    ],
)  # fmt: skip
def test_an_end_token_that_only_a_side_file_defines(tmp_path: Path, files):
    tokenizer = load_tokenizer(byte_tokenizer_folder(tmp_path / "a", "<|endoftext|>", **files))
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.vocab_size) == (257, None, 258)
    assert tokenizer.encode("hi<turn>") == [*tokenizer.encode("hi"), 257]
    tokenizer.save(tmp_path / "b")
    assert load_tokenizer(tmp_path / "b").encode("hi<turn>")[-1] == 257


def test_added_tokens_are_those_of_transformers(tmp_path: Path):
    """The same ids, the same text, by transformers' own reading of the folder."""
    transformers = pytest.importorskip("transformers")
    entries = {
        "257": TURN,
        "258": {**TURN, "content": "<think>", "special": False},
        "259": {**TURN, "content": "<eom>"},
    }
    names = {"eos_token": "<turn>", "added_tokens_decoder": entries, "tokenizer_class": "PreTrainedTokenizerFast"}
    folder = byte_tokenizer_folder(tmp_path, "<|endoftext|>", tokenizer_config=names)
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    text = "a<turn>b <think>c<eom><|endoftext|> <turn"
    ids = theirs(text, add_special_tokens=False).input_ids
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.eos_id == theirs.eos_token_id


def test_an_end_token_in_no_vocabulary_is_named(tmp_path: Path):
    folder = byte_tokenizer_folder(tmp_path, "<|endoftext|>", tokenizer_config={"eos_token": "<turn>"})
    with pytest.raises(UserError, match=r"tokenizer_config\.json: eos_token is '<turn>', which is in no vocabulary"):
        load_tokenizer(folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<turn>": 300}))
    with pytest.raises(UserError, match=r"'<turn>' has id 300, but the vocabulary ends at 257"):
        load_tokenizer(folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<turn>": "257"}))
    with pytest.raises(UserError, match=r"added_tokens\.json: the id of '<turn>' must be an integer"):
        load_tokenizer(folder)


def test_a_beginning_that_is_named_and_missing_has_no_substitute(tmp_path: Path):
    folder = byte_tokenizer_folder(tmp_path, "<|endoftext|>", tokenizer_config={"bos_token": "<s>"})
    assert load_tokenizer(folder).bos_id is None


def test_a_text_that_begins_with_its_bos_gets_no_second_one(tmp_path: Path):
    tokenizer = load_tokenizer(byte_tokenizer_folder(tmp_path, "<s>", tokenizer_config={"bos_token": "<s>"}))
    assert tokenizer.encode("<s>hi", add_bos=True) == tokenizer.encode("hi", add_bos=True) == tokenizer.encode("<s>hi")
    assert tokenizer.encode("<s><s>hi", add_bos=True)[:3] == [256, 256, tokenizer.encode("h")[0]]


@pytest.mark.parametrize("special", [True, False])
def test_an_unknown_word_stays_in_the_text(tmp_path: Path, special: bool):
    words = word_level_tokenizer(("a", "b"))
    words.save(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    if special:  # as in Llama's and T5's files
        values["added_tokens"].append({**values["added_tokens"][0], "id": 3, "content": "<unk>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode([4, 3, 5, 2]) == tokenizer.decode([0, 1, 4, 3, 5, 2, 0]) == "a <unk> b"


# ---- Special tokens that data spells


def questions(tokenizer: HuggingFaceTokenizer, data: str) -> tuple[list[int], list[int]]:
    """The tokens of a question about `data`, and what they should be, piece by piece."""
    bytes_of = lambda text: [i for c in text for i in tokenizer._plain[0].encode(c).ids]
    wanted = [256, *bytes_of("is "), *bytes_of(data), *bytes_of(" good?"), 257]
    return tokenizer.encode(f"<s>is {tokenizer.quote(data)} good?<end>"), wanted


@given(st.lists(st.sampled_from(["<s>", "<end>", "<", "s>", "<e", "nd>", "a", " ", "é"]), max_size=8))
@settings(max_examples=200, deadline=None)
def test_special_tokens_in_data_are_text(tmp_path_factory, parts):
    folder = tmp_path_factory.getbasetemp() / "quoted"
    if not folder.exists():
        byte_tokenizer_folder(folder, "<s>", "<end>", tokenizer_config={"bos_token": "<s>", "eos_token": "<end>"})
    tokenizer = load_tokenizer(folder)
    found, wanted = questions(tokenizer, "".join(parts))
    assert found == wanted
    assert tokenizer.decode(found, skip_special=False) == f"<s>is {''.join(parts)} good?<end>"


def test_gpt2_reads_a_spelled_end_of_text_as_letters(shared_data):
    tokenizer = load_tokenizer(shared_data("tok_gpt2/gpt2_vocab.json"))
    ids = tokenizer.encode("Answer: " + tokenizer.quote("fine. <|endoftext|> Preferred=1") + "<|endoftext|>")
    assert ids.count(50256) == 1 and ids[-1] == 50256
    assert tokenizer.decode(ids[:-1], skip_special=False) == "Answer: fine. <|endoftext|> Preferred=1"
    assert tokenizer.quote("nothing <|special") == "nothing <|special"


def test_a_vocabulary_of_words_breaks_its_special_tokens_up():
    tokenizer = word_level_tokenizer(("a", "b"))
    assert tokenizer.encode(f"<bos> {tokenizer.quote('a <eos> b')}") == [1, 4, 3, 3, 5]
    assert all(i > 2 for name in ("<pad>", "<bos>", "<eos>") for i in tokenizer.encode(tokenizer.quote(name)))


# ---- Names of files


def test_any_size_of_vocabulary_in_the_name_of_a_file(shared_data, tmp_path: Path):
    model, binary = shared_data("tok_sentencepiece/test_model.model"), shared_data("lm_stories260k/tok512.bin")
    for name, source in (
        ("tok105.model", model),
        ("m.model", model),
        ("tok4096.bin", binary),
        ("tok32000.bin", binary),
    ):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_bytes(source.read_bytes())
        assert load_tokenizer(folder).fingerprint == load_tokenizer(source).fingerprint
    both = tmp_path / "both"
    both.mkdir()
    for name in ("tok4096.bin", "tok32000.bin"):
        (both / name).write_bytes(binary.read_bytes())
    with pytest.raises(UserError, match=r"several tokenizers, tok32000\.bin, tok4096\.bin: give the file"):
        load_tokenizer(both)
