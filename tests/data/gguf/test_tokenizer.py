"""Tokenizers of GGUF files, against transformers, SentencePiece and the rules of published tokenizer.json files."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_jax.config import UserError
from rlaif_jax.data.tokenizers import HuggingFaceTokenizer, load_tokenizer
from tests.data.chat.styles import CHATML, talk
from tests.data.gguf.files import write_gguf

TEXT = (
    "Once upon a time, there's a LITTLE girl named Lily; she'll say: \"Let's go!\"\n\n  def f(x):\n\treturn 12345 + x\r\n"
    "Ünï → 🎈 cafe\u0301 漢字漢字 ١٢٣ ½   \u00a0 end of it  \n \n"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOKENS = st.lists(
    st.sampled_from(
        [*"aes Lt'.,12\n\t", "  ", " 1", "\r\n", "é", "e\u0301", "漢", "🎈", "\u0661", "½", "'ll", "'S", "the ", "</s>"]
    ),
    max_size=14,
).map("".join)


def trained(rules: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and merges of a byte-level BPE, learned from words that `rules` make."""
    backend = hf.Tokenizer(hf.models.BPE())
    parts = [hf.pre_tokenizers.Split(hf.Regex(rule), "isolated") for rule in rules]
    backend.pre_tokenizer = hf.pre_tokenizers.Sequence(
        [*parts, hf.pre_tokenizers.ByteLevel(False, use_regex=not rules)]
    )
    backend.train_from_iterator([TEXT] * 3, hf.trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(), special_tokens=list(SPECIAL),
        show_progress=False))  # fmt: skip
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def keys(pre: str, vocab: dict[str, int], merges: list[tuple[str, str]], **more: Any) -> dict[str, Any]:
    tokens = sorted(vocab, key=vocab.__getitem__)
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": CHATML,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


LLAMA3_RULE = (  # of Llama 3's tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_RULE = LLAMA3_RULE.replace("{1,3}", "")
TEKKEN_RULE = (  # of Mistral's tekken.json
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
PUBLISHED: dict[str, tuple[list[Any], Any, bool]] = {  # pre-tokenizers, normaliser, ignore_merges
    "gpt-2": ([hf.pre_tokenizers.ByteLevel(add_prefix_space=False)], None, False),
    "smollm": (
        [hf.pre_tokenizers.Digits(individual_digits=True), hf.pre_tokenizers.ByteLevel(add_prefix_space=False)],
        None,
        False,
    ),
    "llama-bpe": (
        [
            hf.pre_tokenizers.Split(hf.Regex(LLAMA3_RULE), "isolated"),
            hf.pre_tokenizers.ByteLevel(False, use_regex=False),
        ],
        None,
        True,
    ),
    "tekken": (
        [
            hf.pre_tokenizers.Split(hf.Regex(TEKKEN_RULE), "isolated"),
            hf.pre_tokenizers.ByteLevel(False, use_regex=False),
        ],
        None,
        True,
    ),
    "qwen2": (
        [
            hf.pre_tokenizers.Split(hf.Regex(QWEN2_RULE), "isolated"),
            hf.pre_tokenizers.ByteLevel(False, use_regex=False),
        ],
        hf.normalizers.NFC(),
        False,
    ),
}


@pytest.fixture(scope="module", params=PUBLISHED)
def pair(request: pytest.FixtureRequest, tmp_path_factory) -> tuple[HuggingFaceTokenizer, hf.Tokenizer]:
    """A tokenizer read from GGUF, and the published rules with its vocabulary."""
    pre, normaliser, ignore = PUBLISHED[request.param]
    vocab, merges = trained([] if request.param in ("gpt-2", "smollm") else [LLAMA3_RULE])
    if ignore:  # a word of the vocabulary that no merges lead to
        vocab["ĠLilyty"] = len(vocab)
    theirs = hf.Tokenizer(hf.models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore))
    theirs.pre_tokenizer = hf.pre_tokenizers.Sequence(pre)
    theirs.add_special_tokens([hf.AddedToken(name, normalized=False, special=True) for name in SPECIAL])
    if normaliser is not None:
        theirs.normalizer = normaliser
    path = write_gguf(tmp_path_factory.mktemp("pre") / "m.gguf", keys(request.param, vocab, merges), {})
    ours = load_tokenizer(path)
    assert isinstance(ours, HuggingFaceTokenizer)
    return ours, theirs


@given(text=TOKENS)
@settings(max_examples=150, deadline=None)
def test_ids_are_those_of_the_published_rules(pair, text: str):
    ours, theirs = pair
    for one in (text, TEXT + text + TEXT, f"<|im_start|>{text}<|im_end|> Lilyty"):
        assert ours.encode(one) == theirs.encode(one, add_special_tokens=False).ids


def test_what_else_the_file_says(pair, tmp_path: Path):
    ours, theirs = pair
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.stop_ids) == (1, 2, 2, (2,))
    assert ours.vocab_size == theirs.get_vocab_size()
    assert ours.decode(ours.encode(TEXT)) == (TEXT if theirs.normalizer is None else TEXT.replace("e\u0301", "é"))
    assert ours.chat_text(talk("q")) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    ours.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == ours.fingerprint and again.encode(TEXT) == ours.encode(TEXT)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT, add_special_tokens=False).input_ids == ours.encode(TEXT)
    assert theirs.apply_chat_template(talk("q"), tokenize=False, add_generation_prompt=True) == ours.chat_text(
        talk("q")
    )


def test_transformers_reads_the_same_from_the_file(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    vocab, merges = trained([])
    path = write_gguf(tmp_path / "m.gguf", {
        **keys("gpt-2", vocab, merges), "llama.context_length": 8, "llama.embedding_length": 4, "llama.block_count": 1,
        "llama.attention.head_count": 1, "llama.attention.head_count_kv": 1, "llama.feed_forward_length": 4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.vocab_size": len(vocab),
    }, {})  # fmt: skip
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf"), load_tokenizer(path)
    for text in (TEXT, "<|im_start|>a<|im_end|>\n", "a <|endoftext|> b"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)


def test_ends_of_turns_and_tokens_of_the_users_own(tmp_path: Path):
    vocab, merges = trained([])
    vocab |= {"<think>": len(vocab), "<tool call>": len(vocab) + 1}
    made = keys("gpt-2", vocab, merges, eos_token_id=0, eot_token_id=2, eom_token_id=1)
    made["tokenizer.ggml.token_type"][-2:] = [4, 4]
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", made, {}))
    assert tokenizer.stop_ids == (0, 2, 1)
    ids = tokenizer.encode("<think>a<tool call><|im_end|>")
    assert ids == [vocab["<think>"], vocab["a"], vocab["<tool call>"], 2]
    assert tokenizer.decode(ids) == "<think>a<tool call>", "they are no special tokens, so they are text"
    del made["tokenizer.chat_template"]
    bare = load_tokenizer(write_gguf(tmp_path / "bare.gguf", made, {}))
    with pytest.raises(
        UserError, match=r"bare\.gguf \(tokenizer\.chat_template\): this tokenizer has no chat template"
    ):
        bare.chat_text(talk("q"))


# ------------------------------------------------------------------------------------------- SentencePiece


@pytest.fixture(scope="module", params=[True, False], ids=["space in front", "as it is"])
def spm(request: pytest.FixtureRequest, tmp_path_factory) -> tuple[HuggingFaceTokenizer, Any, dict[str, Any]]:
    """A SentencePiece BPE model with byte fallback, and the same in a GGUF file."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(re.findall(r".+", TEXT) * 4), model_writer=made, vocab_size=400, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=request.param, minloglevel=2,
    )  # fmt: skip
    theirs = sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())
    ids = range(theirs.get_piece_size())
    kinds = [2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6 if theirs.is_byte(i) else 1 for i in ids]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [theirs.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [theirs.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": request.param,
    }
    if request.param:  # the default
        del metadata["tokenizer.ggml.add_space_prefix"]
    ours = load_tokenizer(write_gguf(tmp_path_factory.mktemp("spm") / "m.gguf", metadata, {}))
    assert isinstance(ours, HuggingFaceTokenizer)
    return ours, theirs, metadata


@given(text=TOKENS.filter(lambda text: "</s>" not in text))
@settings(max_examples=150, deadline=None)
def test_ids_are_those_of_sentencepiece(spm, text: str):
    ours, theirs, _ = spm
    for one in (text, TEXT + text, text + " z Ω \x01"):
        assert ours.encode(one) == theirs.encode(one)
        assert ours.decode(ours.encode(one)) == theirs.decode(theirs.encode(one))


def test_special_tokens_of_sentencepiece(spm):
    ours, theirs, _ = spm
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.stop_ids) == (1, 2, 0, (2,))
    assert ours.encode("<s>a</s>", add_bos=True) == [1, *theirs.encode("a"), 2]
    assert 2 not in ours.encode(ours.quote("a</s>"))


# ------------------------------------------------------------------------------------------------- bad files


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model='bert' is not supported; supported: 'gpt2', 'llama'"),
        ({"model": None}, "tokenizer.ggml.model must be of type str, not None: without it the file holds no tokenizer"),
        ({"tokens": None}, "tokenizer.ggml.tokens must be of type list"),
        ({"tokens": [1, 2]}, "tokens and token_type must be as many texts and numbers, not 2 and"),
        ({"token_type": [1]}, "and 1"),
        (
            {"pre": "deepseek-llm"},
            "tokenizer.ggml.pre='deepseek-llm', the rule that splits texts into words, is not supp",
        ),
        ({"pre": None}, "tokenizer.ggml.pre=None"),
        ({"merges": None}, "tokenizer.ggml.merges must be of type list"),
        ({"merges": ["a"]}, "tokenizer.ggml.merges has ('a',), which is no pair of tokens"),
        ({"merges": ["a absent"]}, "tokenizer.ggml.tokens and merges are of no tokenizer"),
        ({"eos_token_id": 10**6}, "tokenizer.ggml.eos_token_id must be an id below"),
        ({"eot_token_id": "x"}, "tokenizer.ggml.eot_token_id must be an id below"),
        ({"model": "llama"}, "tokenizer.ggml.scores must be of type list"),
        ({"model": "llama", "scores": [0.5]}, "tokenizer.ggml.scores and tokens must be as many, not 1 and"),
    ],
)
def test_what_is_no_tokenizer(tmp_path: Path, change: dict[str, Any], said: str):
    made = keys("gpt-2", *trained([]))
    for key, value in change.items():
        made[f"tokenizer.ggml.{key}"] = value
    path = write_gguf(tmp_path / "m.gguf", {key: value for key, value in made.items() if value is not None}, {})
    with pytest.raises(UserError, match=re.escape(said)) as error:
        load_tokenizer(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------- a real one


def test_the_tokenizer_of_smollm2(shared_data):
    """transformers does not know this rule and splits as GPT-2, so where white space is before a number its ids differ."""
    file, folder = os.environ.get("RLAIF_JAX_GGUF"), os.environ.get("RLAIF_JAX_CHAT_MODEL")
    if not file or not folder:
        pytest.skip(
            "needs SmolLM2's GGUF in RLAIF_JAX_GGUF, and the folder that transformers made of it in RLAIF_JAX_CHAT_MODEL"
        )
    ours, theirs = load_tokenizer(file), load_tokenizer(folder)
    assert isinstance(ours, HuggingFaceTokenizer) and isinstance(theirs, HuggingFaceTokenizer)
    assert ours.fingerprint == theirs.fingerprint
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.stop_ids) == (theirs.bos_id, 2, theirs.pad_id, theirs.stop_ids)
    published = hf.Tokenizer.from_str(theirs.backend.to_str())
    published.pre_tokenizer = hf.pre_tokenizers.Sequence(PUBLISHED["smollm"][0])
    code = [path.read_text() for path in sorted(Path(__file__).parents[2].glob("data/*.py"))]
    prose = shared_data("gsm8k/train.jsonl").read_text()[:300_000]
    corpus = [*code, *prose.splitlines(), TEXT, "<|im_start|>user\n漢 <repo_name>x<|im_end|>", "  12", "x \u0661"]
    same = 0
    for text in corpus:
        ids = ours.encode(text)
        assert ids == published.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids, skip_special=False) == text
        if not re.search(r"\s\s\d|\s[^\x00-\x7f]", text):
            same += 1
            assert ids == theirs.encode(text), text
    assert same > 100
    assert ours.encode("  12") != theirs.encode("  12")
    for messages in (talk("q"), talk("q", "a", "漢", system="s")):
        assert ours.chat_text(messages) == theirs.chat_text(messages)
