"""Texts as arrays, by hand."""

import functools
import re
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_jax.config import UserError
from rlaif_jax.data.prompts import padded, prompt_batches
from rlaif_jax.data.text import (
    _shared_ends,
    answer_ids,
    packed_text_arrays,
    pair_arrays,
    shared_prefix,
    text_arrays,
    token_spans,
    token_texts,
)
from rlaif_jax.data.tokenizers import load_tokenizer, word_level_tokenizer
from rlaif_jax.types import Rollout

TOKENIZER = word_level_tokenizer(("a", "b", "c"))  # ids 4, 5, 6; pad 0, stop 2, unknown 3
_loaded = functools.cache(load_tokenizer)
ENDLESS = SimpleNamespace(encode=TOKENIZER.encode, eos_id=None, pad_id=0)


def test_text_arrays():
    got = text_arrays(TOKENIZER, [[("a b", 0.0), ("c", 1.0)], [("c", 0.25)]], length=5, end_weight=0.5)
    np.testing.assert_array_equal(got["tokens"], [[4, 5, 6, 2, 0], [6, 2, 0, 0, 0]])
    np.testing.assert_array_equal(got["mask"], [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(got["weights"], [[0, 0, 1, 0.5, 0], [0.25, 0.5, 0, 0, 0]])
    assert (got["tokens"].dtype, got["mask"].dtype, got["weights"].dtype) == (np.int32, np.bool_, np.float32)
    assert text_arrays(TOKENIZER, [[("a", 0.0)]], length=2)["weights"].tolist() == [[0, 1]]  # the stop is learned


def test_without_a_stop_token_nothing_is_put_at_the_end():
    got = text_arrays(ENDLESS, [[("a b", 1.0)]], length=3)
    np.testing.assert_array_equal(got["tokens"], [[4, 5, 0]])
    np.testing.assert_array_equal(got["mask"], [[1, 1, 0]])
    pair = pair_arrays(ENDLESS, ["a"], ["b"], ["c"], np.array([0.5]), np.array([True]), length=3)
    np.testing.assert_array_equal(pair["tokens1"], [[0, 4, 5]])


def test_an_example_that_is_too_long_is_named():
    with pytest.raises(UserError, match="example 1 has 4 tokens, more than 3: 'a b c'"):
        text_arrays(TOKENIZER, [[("a b", 1.0)], [("a b c", 1.0)]], length=3)


def test_texts_are_packed_behind_one_another_where_they_leave_the_least_space():
    texts = [[("a b c", 1.0)], [("a b", 0.5)], [("c", 2.0)], [("b", 0.0)]]  # 4, 3, 2 and 2 tokens with the stop token
    got = packed_text_arrays(TOKENIZER, texts, length=6, end_weight=0.25)
    # The third text fits behind the first one exactly; behind the second one it would leave a column.
    np.testing.assert_array_equal(got["tokens"], [[4, 5, 6, 2, 6, 2], [4, 5, 2, 5, 2, 0]])
    np.testing.assert_array_equal(got["segments"], [[1, 1, 1, 1, 2, 2], [1, 1, 1, 2, 2, 0]])
    np.testing.assert_array_equal(got["positions"], [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 0]])
    np.testing.assert_array_equal(got["weights"], [[1, 1, 1, 0.25, 2, 0.25], [0.5, 0.5, 0.25, 0, 0.25, 0]])
    assert [got[name].dtype for name in ("tokens", "segments", "positions", "weights")] == [np.int32] * 3 + [np.float32]


@given(st.lists(st.integers(0, 7), max_size=40))
def test_packing_keeps_every_text_and_fills_rows(lengths):
    texts = [[(" ".join("abc"[i % 3] for i in range(n)), 1.0)] for n in lengths]
    rows = packed_text_arrays(TOKENIZER, texts, length=8)
    alone = text_arrays(TOKENIZER, texts, length=8)
    packed = [
        tuple(row[segments == number])
        for row, segments in zip(rows["tokens"], rows["segments"])
        for number in range(1, segments.max(initial=0) + 1)
    ]
    assert sorted(packed) == sorted(tuple(row[mask]) for row, mask in zip(alone["tokens"], alone["mask"]))
    used = (rows["segments"] > 0).sum(axis=1)
    assert (used > 4).sum() >= len(used) - 1  # no two rows would fit into one
    assert (used > 0).all()


def test_pair_arrays():
    got = pair_arrays(
        TOKENIZER, ["a", "b b"], ["b", "c"], ["c c", ""], np.array([0.75, 0.5]), np.array([True, False]), length=5
    )
    np.testing.assert_array_equal(got["tokens1"], [[0, 0, 4, 5, 2], [0, 5, 5, 6, 2]])
    np.testing.assert_array_equal(got["tokens2"], [[0, 4, 6, 6, 2], [0, 0, 5, 5, 2]])
    np.testing.assert_array_equal(got["mask1"], [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    np.testing.assert_array_equal(got["mask2"], [[0, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    np.testing.assert_array_equal(got["probability"], [0.75, 0.5])
    np.testing.assert_array_equal(got["weight"], [1, 0])
    assert got["probability"].dtype == got["weight"].dtype == np.float32


def test_pairs_of_drawn_answers_are_the_tokens_that_will_be_scored(shared_data):
    """The rollout draws " It" (632); its text, stripped and encoded again, begins with "It" (1026)."""
    tokenizer = load_tokenizer(shared_data("tok_gpt2/gpt2_vocab.json"))
    prompt = "Question: where is the moor?\nAnswer:"
    drawn = [[*tokenizer.encode(" It lies north of here."), tokenizer.eos_id], tokenizer.encode(" It lies  n")]
    assert drawn[0][0] == 632 and tokenizer.encode("It")[0] == 1026
    for add_bos in (False, True):
        batch = next(
            prompt_batches(
                [{"prompt": prompt}], tokenizer, batch_size=1, seed=0, prompt_length=16, add_bos=add_bos
            )
        )  # fmt: skip
        tokens, mask = padded(drawn, 10, tokenizer.pad_id, "right")
        rollout = Rollout(
            tokens=np.concatenate([batch.tokens.repeat(2, axis=0), tokens], axis=1),
            prompt_mask=batch.mask.repeat(2, axis=0),
            response_mask=mask,
            logprobs=np.zeros(tokens.shape),
            finished=np.array([True, False]),
        )
        first, second = ([ids] for ids in answer_ids(rollout))
        pair = pair_arrays(
            tokenizer, [prompt], first, second, np.ones(1), np.ones(1, bool), length=40, add_bos=add_bos
        )  # fmt: skip
        whole = np.concatenate([rollout.prompt_mask, rollout.response_mask], axis=1)
        for row, name in enumerate("12"):
            learned = pair["tokens" + name][0][pair["mask" + name][0]]
            np.testing.assert_array_equal(learned, rollout.tokens[row][whole[row]])
            assert (learned[0] == tokenizer.bos_id) == add_bos


@given(st.lists(st.integers(0, 258), max_size=6), st.lists(st.integers(0, 258), max_size=6))
def test_answers_that_are_given_as_tokens_are_kept(first, second):
    """Any tokens, also such as no text is encoded to, as a policy draws them."""
    pair = pair_arrays(TOKENIZER, ["a b"], [first], [second], np.ones(1), np.ones(1, bool), length=8)
    for name, ids in (("1", first), ("2", second)):
        assert pair["tokens" + name][0][pair["mask" + name][0]].tolist() == [4, 5, *ids]


def test_bos_before_texts_and_pairs():
    """Once, with weight 0; ids: BOS 1, stop 2."""
    texts = [[("a b", 0.5), ("c", 1.0)], [("<bos> a", 1.0)]]
    got = text_arrays(TOKENIZER, texts, length=5, add_bos=True)
    np.testing.assert_array_equal(got["tokens"], [[1, 4, 5, 6, 2], [1, 4, 2, 0, 0]])
    np.testing.assert_array_equal(got["weights"], [[0, 0.5, 0.5, 1, 1], [1, 1, 1, 0, 0]])
    packed = packed_text_arrays(TOKENIZER, texts, length=8, add_bos=True)
    np.testing.assert_array_equal(packed["tokens"], [[1, 4, 5, 6, 2, 1, 4, 2]])
    pair = pair_arrays(
        TOKENIZER, ["a", "<bos> b"], ["b", "c"], ["c", "c"], np.ones(2), np.ones(2, bool), length=4, add_bos=True
    )  # fmt: skip
    np.testing.assert_array_equal(pair["tokens1"], [[1, 4, 5, 2], [1, 5, 6, 2]])


def test_a_pair_that_is_too_long_is_refused():
    with pytest.raises(UserError, match="5 tokens, more than 4"):
        pair_arrays(TOKENIZER, ["a b"], ["a b"], ["c"], np.array([0.5]), np.array([True]), length=4)


# ---- spans


def test_spans_of_words():
    ids = [*TOKENIZER.encode("a b c b"), TOKENIZER.eos_id, TOKENIZER.pad_id]
    spans = [(0, 1), (2, 3), (2, 5), (0, 7), (1, 2), (1, 3), (0, 2)]
    # "a", "b", "b c", everything (the stop token says nothing), the blank that goes with "b", " b", "a ".
    assert token_spans(TOKENIZER, ids, spans) == [(0, 1), (1, 2), (1, 3), (0, 4), (1, 2), (1, 2), (0, 1)]
    assert token_spans(TOKENIZER, ids, [(0, 1), (2, 3)], text="b c") == [(1, 2), (2, 3)]
    assert token_spans(TOKENIZER, [], []) == []


@given(data=st.data())
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("name", ["lm_stories260k/tok512.bin", "tok_gpt2/gpt2_vocab.json", "tok_sentencepiece"])
def test_the_texts_of_tokens_are_those_of_decoding_every_beginning(shared_data, name, data):
    """Any tokens: halves of characters, special tokens, unknown ones, ids without a text."""
    path = shared_data(name)
    tokenizer = _loaded(path if path.is_file() else next(path.glob("*.model")))
    few = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 1), min_size=1, max_size=6))
    ids = data.draw(st.lists(st.one_of(st.sampled_from(few), st.integers(0, tokenizer.vocab_size)), max_size=70))
    whole = tokenizer.decode(ids)
    wanted = [shared_prefix(whole, tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
    assert _shared_ends(tokenizer, ids, whole) == wanted
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == whole


def test_the_last_token_of_a_character_has_it(shared_data):
    tokenizer = _loaded(shared_data("tok_gpt2/gpt2_vocab.json"))
    ids = tokenizer.encode("a \u2603 b")
    texts = token_texts(tokenizer, ids)
    assert (texts[0], texts[-1], "".join(texts)) == ("a", " b", "a \u2603 b")
    at = next(i for i, text in enumerate(texts) if "\u2603" in text)
    assert at > 1 and not "".join(texts[1:at]).strip(), "no part of it is shown before"


def test_long_answers_are_decoded_in_linear_time():
    """Tokens that are decoded for the spans of an answer of 2,000: few for each, not all before it."""
    decoded = 0

    def decode(ids):
        nonlocal decoded
        decoded += len(ids)
        return TOKENIZER.decode(ids)

    ids = TOKENIZER.encode("a b c " * 700)[:2000]
    assert token_spans(SimpleNamespace(decode=decode), ids, [(2, 3), (3998, 3999)]) == [(1, 2), (1999, 2000)]
    assert decoded < 40 * len(ids)


def test_spans_of_another_text_are_refused():
    with pytest.raises(UserError, match="another text: 'a c'"):
        token_spans(TOKENIZER, TOKENIZER.encode("a b c"), [], text="a c")
    for span in ((0, 6), (2, 2), (-1, 1)):
        with pytest.raises(UserError, match="does not lie in the text of 5 characters"):
            token_spans(TOKENIZER, TOKENIZER.encode("a b c"), [span])


@pytest.mark.parametrize("name", ["lm_stories260k/tok512.bin", "tok_gpt2/gpt2_vocab.json", "tok_sentencepiece"])
def test_spans_of_real_tokenizers(shared_data, name):
    """Every word of a text: its tokens say the word, no token more; letters of several bytes and tokens included."""
    path = shared_data(name)
    tokenizer = load_tokenizer(path if path.is_file() else next(path.glob("*.model")))
    ids = [*tokenizer.encode("Once upon a time, the caf\u00e9 \U0001f642 was na\u00efve and old ."), tokenizer.eos_id]
    text = tokenizer.decode(ids)
    spans = [found.span() for found in re.finditer(r"\S+", text)][1:]
    found = token_spans(tokenizer, ids, spans)
    said = [tokenizer.decode(ids[start:end]).strip() for start, end in found]
    assert said[:2] == ["upon", "a"]
    assert all(a[1] <= b[0] for a, b in pairwise(found))
    assert said == text.split()[1:]
