from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.feedback.judges.sentences import Sentences, read_sentences, split_sentences
from rlaif_jax.feedback.judges.sentiment import (
    SentimentConfig,
    SentimentJudge,
    SentimentSource,
    cross_fitted,
    fit_judge,
    known_words,
    new_judge,
    train_judge,
    word_tokenizer,
)
from rlaif_jax.parallel import JitRunner, ParallelConfig, make_runner

CONFIG = SentimentConfig(updates=60, batch_size=32, learning_rate=2e-2, width=8, max_words=12)


def toy_sentences(count: int = 200) -> Sentences:
    """Two words of a mood among words that say nothing."""
    rng = np.random.default_rng(0)
    moods = {True: ("happy", "good", "warm", "kind"), False: ("sad", "bad", "cold", "mean")}
    labels = np.arange(count) % 2 == 0
    texts = []
    for label in labels:
        words = [*rng.choice(moods[bool(label)], 2), *rng.choice(["the", "dog", "tree", "saw", "a", "Park"], 5)]
        texts.append(" ".join(rng.permutation(words)) + " .")
    return Sentences(tuple(texts), labels)


def trained(runner=None, updates=CONFIG.updates) -> tuple[SentimentJudge, Sentences]:
    training, held_out = split_sentences(toy_sentences(), 0.2, seed=0)
    config = dataclasses.replace(CONFIG, updates=updates)
    judge = new_judge(training, config, 0, runner or JitRunner())
    return dataclasses.replace(judge, params=fit_judge(judge, training, config, 0)), held_out


@pytest.fixture(scope="module")
def judge() -> SentimentJudge:
    return trained()[0]


# ---- Sentences


def write(folder, positive: bytes, negative: bytes):
    (folder / "rt-polarity.pos").write_bytes(positive)
    (folder / "rt-polarity.neg").write_bytes(negative)
    return folder


def test_sentences_are_read_in_latin_1_and_in_utf_8(tmp_path):
    text = "a touching café \n\nfun\nfun\nboth\n"
    for encoding in ("latin-1", "utf-8"):
        sentences = read_sentences(write(tmp_path, text.encode(encoding), b"dull\nboth\n"))
        assert sentences.texts == ("a touching café", "fun", "dull")
        assert sentences.positive.tolist() == [True, True, False]


@pytest.mark.parametrize(
    "positive, negative, message",
    [
        (b"good\n", b"\n  \n", r"rt-polarity\.neg is empty"),
        (b"good\nPK\x03\x04\xff", b"bad\n", r"rt-polarity\.pos:2: this is no text in latin-1 or UTF-8.*0x03"),
    ],
)
def test_files_that_hold_no_sentences_are_refused(tmp_path, positive, negative, message):
    with pytest.raises(UserError, match=message):
        read_sentences(write(tmp_path, positive, negative))


def test_a_missing_file_is_named_with_where_to_get_it(tmp_path):
    (tmp_path / "rt-polarity.pos").write_text("good")
    with pytest.raises(UserError, match=r"cannot read .*rt-polarity\.neg.*Pang & Lee"):
        read_sentences(tmp_path)


def test_the_split_is_fixed_by_the_seed_disjoint_and_even_over_the_classes():
    sentences = toy_sentences()
    training, held_out = split_sentences(sentences, 0.25, seed=3)
    again = split_sentences(sentences, 0.25, seed=3)
    assert again[1].texts == held_out.texts
    assert split_sentences(sentences, 0.25, seed=4)[1].texts != held_out.texts
    assert (len(training), len(held_out)) == (150, 50)
    assert held_out.positive.sum() == 25
    labels = dict(zip(sentences.texts, sentences.positive, strict=True))
    assert all(labels[text] == label for text, label in zip(held_out.texts, held_out.positive, strict=True))
    assert sorted(training.texts + held_out.texts) == sorted(sentences.texts)


def test_too_few_sentences_to_split():
    with pytest.raises(UserError, match=r"1 negative sentences are too few to hold out 0\.1"):
        split_sentences(Sentences(tuple("abcdefghijklmnopqrstuvwxyz"), np.arange(26) < 25), 0.1, seed=0)


@pytest.mark.parametrize("field, value", [("held_out", 0.0), ("held_out", 1.0), ("updates", 0), ("max_words", 0)])
def test_settings_out_of_range(field, value):
    with pytest.raises(UserError, match=f"judge.{field}"):
        SentimentConfig(**{field: value})


# ---- Words


def test_the_judge_has_its_own_words():
    texts = ["Good dog , good !", "the dog isn't good", "the rare"]
    tokenizer = word_tokenizer(texts, SentimentConfig(min_frequency=2))
    words = [tokenizer.backend.id_to_token(i) for i in range(tokenizer.vocab_size)]
    assert words == ["<pad>", "<unk>", "good", "dog", "the"]
    # Lower case, punctuation apart; "rare" was seen once, "cat" never.
    tokens, mask = known_words(tokenizer, ["The DOG, the cat!good", "rare cat", ""], 3)
    assert tokens.tolist() == [[4, 3, 4], [0, 0, 0], [0, 0, 0]]
    assert mask.sum(-1).tolist() == [3, 0, 0]


def test_the_words_do_not_depend_on_the_order_of_the_sentences():
    texts = list(toy_sentences().texts)
    first, second = (word_tokenizer(t, SentimentConfig()) for t in (texts, texts[::-1]))
    assert first.fingerprint == second.fingerprint


# ---- Learning and judging


def test_separable_sentences_are_learned_and_held_out_ones_judged(judge):
    _, held_out = split_sentences(toy_sentences(), 0.2, seed=0)
    assert judge.accuracy(held_out) == 1.0
    flipped = Sentences(held_out.texts, ~held_out.positive)
    assert judge.accuracy(flipped) == 0.0
    good, bad, mixed = judge.log_odds(["a happy dog", "a sad dog", "a happy sad dog"]).values
    assert good > mixed > bad
    assert good > 1 > -1 > bad


def test_a_text_without_a_known_word_is_missing_and_wrong(judge):
    scores = judge.log_odds(["Zanzibar qwerty", "happy", "", "sad Zanzibar"])
    assert scores.valid.tolist() == [False, True, False, True]
    assert scores.values[[0, 2]].tolist() == [0.0, 0.0]
    assert judge.log_odds(["sad"]).values[0] == pytest.approx(scores.values[3], rel=1e-6)
    assert judge.accuracy(Sentences(("Zanzibar", "Zanzibar"), np.array([True, False]))) == 0.0


def test_more_texts_than_a_batch_and_none_at_all(judge):
    texts = ["happy dog", "bad tree", "cold"] * 100  # 300, batches of 128
    scores = judge.log_odds(texts)
    assert scores.values.shape == scores.valid.shape == (300,)
    three = judge.log_odds(texts[:3]).values
    np.testing.assert_allclose(scores.values.reshape(100, 3), np.tile(three, (100, 1)), rtol=1e-6)
    assert judge.log_odds([]).values.shape == (0,)


def test_sadder_is_the_other_sign(judge):
    texts = ["happy", "sad", "Zanzibar"]
    up, down = (SentimentSource(judge, mood)([{}] * 3, texts, None) for mood in ("happier", "sadder"))
    np.testing.assert_array_equal(up.values, -down.values)
    assert up.values[0] > 0 > up.values[1]
    assert up.valid.tolist() == down.valid.tolist() == [[True], [True], [False]]


def test_eight_devices_learn_and_judge_as_one(judge):
    runner = make_runner(ParallelConfig())
    assert runner.devices == 8
    other, _ = trained(runner)
    texts = ["a happy dog", "the cold park", "a good bad tree"]
    np.testing.assert_allclose(other.log_odds(texts).values, judge.log_odds(texts).values, rtol=1e-3, atol=1e-3)


def test_training_is_repeatable_and_stops_when_told(judge):
    again, _ = trained()
    assert again.hash == judge.hash
    training, _ = split_sentences(toy_sentences(), 0.2, seed=0)
    seen = []
    fit_judge(
        new_judge(training, CONFIG, 0, JitRunner()),
        training,
        CONFIG,
        0,
        log=lambda update, values: seen.append(update),
        stop=lambda: True,
    )
    assert seen == [10]


def test_a_tokenizer_of_another_vocabulary_is_refused(judge):
    many = word_tokenizer([f"word{i} word{i}" for i in range(judge.model.vocab_size)], SentimentConfig())
    with pytest.raises(UserError, match="the sentiment judge: this tokenizer is of another vocabulary"):
        dataclasses.replace(judge, tokenizer=many)


# ---- Any labels


def test_soft_labels_are_learned_as_probabilities():
    """The log-odds of a word go to those of its mean label: regression, not classification."""
    texts, labels = ("good",) * 60 + ("mixed",) * 60 + ("bad",) * 60, [0.9] * 60 + [1.0, 0.0, 0.4] * 20 + [0.2] * 60
    config = dataclasses.replace(CONFIG, updates=250, batch_size=60)
    judge = train_judge(Sentences(texts, np.array(labels)), config, 0, JitRunner())
    found = 1 / (1 + np.exp(-judge.log_odds(["good", "mixed", "bad"]).values))
    np.testing.assert_allclose(found, [0.9, 1.4 / 3, 0.2], atol=0.06)


def test_weights_say_whom_to_believe_and_weight_zero_is_not_read():
    texts, labels = ("warm",) * 80 + ("cold",) * 80, np.tile([1.0, 0.0], 80)
    labels[80:] = 1 - labels[80:]
    right = np.tile([1.0, 0.0], 80)  # every second label is a lie
    labels[1::4] = np.nan  # and some of the lies are no labels at all
    sentences = Sentences(texts, labels, right)
    judge = train_judge(sentences, CONFIG, 0, JitRunner())
    warm, cold = judge.log_odds(["warm", "cold"]).values
    assert warm > 1 > -1 > cold
    assert judge.accuracy(sentences) == 1.0


def aspect_sentences(count: int = 160) -> Sentences:
    """Two aspects, each with its own words; half of the labels of the second are missing."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (count, 2))
    words = np.array([["dull", "funny"], ["rude", "kind"]])
    texts = tuple(" ".join(rng.permutation([words[a, row[a]] for a in (0, 1)] + ["the"])) for row in labels)
    weights = np.ones((count, 2))
    weights[::2, 1] = 0
    return Sentences(texts, np.where(weights > 0, labels, 1 - labels).astype(float), weights)


def test_an_output_for_each_aspect():
    sentences = aspect_sentences()
    judge = train_judge(sentences, CONFIG, 0, JitRunner())
    scores = judge.log_odds(["funny", "rude", "dull kind", "Zanzibar"])
    assert scores.values.shape == (4, 2)
    assert scores.valid.tolist() == [True, True, True, False]
    assert scores.values[0, 0] > 1
    assert scores.values[1, 1] < -1
    assert scores.values[2, 0] < -1 < 1 < scores.values[2, 1]
    np.testing.assert_array_equal(scores.values[3], 0)
    assert judge.accuracy(sentences) == 1.0
    assert judge.log_odds([]).values.shape == (0, 2)
    with pytest.raises(UserError, match="labels by aspect"):
        split_sentences(sentences, 0.2, 0)


def test_fewer_texts_than_a_batch_are_one_batch():
    few = toy_sentences(12)
    judge = train_judge(few, dataclasses.replace(CONFIG, min_frequency=1), 0, JitRunner())
    assert judge.accuracy(few) == 1.0
    with pytest.raises(UserError, match="7 sentences are too few to learn from on 8 devices"):
        train_judge(toy_sentences(7), CONFIG, 0, make_runner(ParallelConfig()))


def test_cross_fitting_never_judges_what_it_learned():
    """Labels drawn at random, each text ten times: whoever has seen a text knows its label, others must guess."""
    texts = tuple(f"word{i // 10}a word{i // 10}b" for i in range(200))
    labels = np.repeat(np.random.default_rng(0).integers(0, 2, 20), 10)
    sentences = Sentences(texts, labels.astype(float))
    config = dataclasses.replace(CONFIG, updates=40)
    seen = cross_fitted(sentences, config, 0, JitRunner(), folds=2)
    assert np.mean((seen.values > 0) == labels) == 1.0
    unseen = cross_fitted(sentences, config, 0, JitRunner(), folds=2, groups=[i // 10 for i in range(200)])
    assert not unseen.valid.any()  # no word of a text was ever read
    with pytest.raises(UserError, match="3 folds of 2 groups"):
        cross_fitted(sentences, config, 0, JitRunner(), folds=3, groups=[i % 2 for i in range(200)])
    with pytest.raises(UserError, match="2 groups for 200 texts"):
        cross_fitted(sentences, config, 0, JitRunner(), groups=[0, 1])


@pytest.mark.parametrize(
    "labels, weights, message",
    [
        ([0.5], None, r"labels of shape \(1,\) for 2 texts"),
        ([0.5, 1.5], None, "labels must lie between 0 and 1"),
        ([0.5, np.nan], None, "labels must lie between 0 and 1"),
        ([0.5, 0.5], [1.0], r"weights of shape \(1,\) for labels of shape \(2,\)"),
        ([0.5, 0.5], [1.0, -1.0], "weights must be finite and not negative"),
        ([0.5, 0.5], [1.0, np.inf], "weights must be finite and not negative"),
    ],
)
def test_labels_that_are_none(labels, weights, message):
    with pytest.raises(UserError, match=message):
        Sentences(("a", "b"), np.array(labels), None if weights is None else np.array(weights))


@pytest.mark.slow
def test_comments_with_a_score_beside_them_rank_new_ones(shared_data):
    """Comments on answers with GPT-4's scores 1..5: judges of the other questions' comments rank them."""
    scipy = pytest.importorskip("scipy.stats")
    rows = json.loads(shared_data("prometheus/vicuna_eval.json").read_text())
    found = [(t, s, row["idx"]) for row in rows for t, s in zip(row["gpt4_feedback"], row["gpt4_score"], strict=True)]
    texts, scores, questions = zip(*found, strict=True)
    sentences = Sentences(texts, (np.array(scores, float) - 1) / 4)
    config = SentimentConfig(updates=150)
    predicted = cross_fitted(sentences, config, 0, JitRunner(), groups=questions)
    assert predicted.valid.all()
    assert scipy.spearmanr(predicted.values, scores).statistic > 0.6


@pytest.mark.slow
def test_real_film_reviews_are_told_apart(shared_data):
    sentences = read_sentences(shared_data("sentiment"))
    assert len(sentences) > 10_000
    config = SentimentConfig()
    training, held_out = split_sentences(sentences, config.held_out, seed=1)
    judge = new_judge(training, config, 1, JitRunner())
    judge = dataclasses.replace(judge, params=fit_judge(judge, training, config, 1))
    assert judge.accuracy(held_out) > 0.74
