"""The language model as judge: both orders, missing is not a score, and what it was that judged."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.data.tokenizers import word_level_tokenizer
from rlaif_jax.feedback.judges import language_model as module
from rlaif_jax.feedback.judges.language_model import (
    AnswerScores,
    DirectScoreSource,
    LanguageModelJudge,
    Reasoning,
    weights_hash,
)
from rlaif_jax.feedback.judges.recorded import RecordedJudgeSource
from rlaif_jax.feedback.records.forms import Rater
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.models import CausalLM
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.parallel import JitRunner, PmapRunner

WORDS = ("1", "2", "3", "which", "rate", "or", "a", "b", "c", "d", "e", "f")
TOKENIZER = word_level_tokenizer(WORDS)
MODEL = CausalLM(small_decoder(TOKENIZER.vocab_size, num_layers=1, width=16, num_heads=2, context_length=16))
LENGTH = 10
PROMPTS, FIRST, SECOND = ["a b", "c", "d", "e f a", "b"], ["a", "b c", "d", "a", "f f"], ["b", "b", "d", "e f", "c"]


def pairwise(prompt, first, second):
    return f"{prompt} which {first} or {second}"


def rating(prompt, answer):
    return f"{prompt} rate {answer}"


def random_params(model, seed=0, scale=0.3):
    """Parameters drawn by NumPy, none zero or one; an initialiser would have to be compiled first."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return (centre + scale * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, jax.eval_shape(model.init, jax.random.key(0)))


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


@pytest.fixture(scope="module")
def make_judge(params):
    def make(**options):
        settings = {
            "runner": JitRunner(),
            "batch_size": 4,
            "max_length": LENGTH,
            "min_mass": 0.0,
            "scale": (("1", 1.0), ("2", 2.5), ("3", -4.0)),
        } | options
        return LanguageModelJudge(MODEL, params, TOKENIZER, pairwise_prompt=pairwise, score_prompt=rating, **settings)

    return make


@pytest.fixture(scope="module")
def judge(make_judge):
    """Verdicts "1" and "2" in batches of four."""
    return make_judge()


forward = jax.jit(MODEL)


def next_word(params, text, words):
    """Probabilities of `words` after `text`, normalised among themselves, and their mass: no padding, float64."""
    ids = np.array([TOKENIZER.encode(text)])
    logits = np.asarray(forward(params, ids, np.ones(ids.shape, bool)), np.float64)[0, -1]
    p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    p = p[[TOKENIZER.token_id(word) for word in words]]
    return p / p.sum(), p.sum()


def test_the_verdict_is_the_mean_of_both_orders(judge, params):
    verdict = judge.compare(PROMPTS, FIRST, SECOND)
    assert verdict.valid.all()
    for i, (p, a, b) in enumerate(zip(PROMPTS, FIRST, SECOND)):
        forward_order = next_word(params, pairwise(p, a, b), "12")[0]
        swapped_order = next_word(params, pairwise(p, b, a), "12")[0]
        np.testing.assert_allclose(verdict.forward[i], forward_order[0], atol=1e-5)
        np.testing.assert_allclose(verdict.swapped[i], swapped_order[0], atol=1e-5)
        np.testing.assert_allclose(verdict.probability[i], (forward_order[0] + swapped_order[1]) / 2, atol=1e-5)
    assert np.std(verdict.forward) > 0.01


def test_swapping_the_answers_swaps_the_verdict(judge):
    one, other = judge.compare(PROMPTS, FIRST, SECOND), judge.compare(PROMPTS, SECOND, FIRST)
    np.testing.assert_allclose(one.probability, 1 - other.probability, atol=1e-6)
    np.testing.assert_allclose(one.forward, other.swapped, atol=1e-6)
    np.testing.assert_allclose(one.probability[2], 0.5, atol=1e-6)  # equal answers tie, whatever the position bias
    assert np.abs(one.probability - 0.5).max() > 1e-3


@pytest.mark.parametrize("bias", [0.0, 0.2, -0.25])
def test_a_bias_for_a_position_cancels(make_judge, monkeypatch, bias):
    """A judge that likes the first place: P(1) = 0.5 + (quality of the first - of the second) + bias."""

    def biased(model, ids, params, batch, *, axis_name=None):
        quality = (
            jnp.zeros(TOKENIZER.vocab_size).at[TOKENIZER.token_id("a")].set(0.2).at[TOKENIZER.token_id("b")].set(0.05)
        )
        tokens = batch["tokens"]
        p = 0.5 + quality[tokens[:, -3]] - quality[tokens[:, -1]] + bias
        return {"choices": jnp.stack([p, 1 - p], axis=-1), "mass": jnp.ones(len(p))}

    monkeypatch.setattr(module, "choice_probabilities", biased)
    verdict = make_judge().compare(["c"] * 3, ["a", "b", "c"], ["b", "a", "c"])
    np.testing.assert_allclose(verdict.probability, [0.65, 0.35, 0.5], atol=1e-6)
    np.testing.assert_allclose(verdict.forward, np.array([0.65, 0.35, 0.5]) + bias, atol=1e-6)
    np.testing.assert_allclose(verdict.swapped, np.array([0.35, 0.65, 0.5]) + bias, atol=1e-6)


def test_a_bias_in_the_log_odds_never_turns_a_verdict(make_judge, monkeypatch):
    """sigmoid(m + b) in one order and sigmoid(-m + b) in the other: the mean is on m's side of 1/2 for every b, and
    equals (sigmoid(m + b) + sigmoid(m - b)) / 2."""
    margins = {"a": 1.0, "b": 0.0, "c": -0.5}

    def biased(model, ids, params, batch, *, axis_name=None):
        quality = jnp.zeros(TOKENIZER.vocab_size)
        for word, value in margins.items():
            quality = quality.at[TOKENIZER.token_id(word)].set(value)
        p = jax.nn.sigmoid(quality[batch["tokens"][:, -3]] - quality[batch["tokens"][:, -1]] + 2.0)
        return {"choices": jnp.stack([p, 1 - p], axis=-1), "mass": jnp.ones(len(p))}

    monkeypatch.setattr(module, "choice_probabilities", biased)
    first, second = ["a", "b", "c", "b", "a"], ["b", "a", "b", "c", "a"]
    verdict = make_judge().compare(["d"] * 5, first, second)
    m = np.array([margins[a] - margins[b] for a, b in zip(first, second)])
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    np.testing.assert_allclose(verdict.probability, (sigmoid(m + 2) + sigmoid(m - 2)) / 2, atol=1e-6)
    np.testing.assert_array_equal(np.sign(np.round(verdict.probability - 0.5, 6)), np.sign(m))
    assert (verdict.forward > 0.5).all(), "every single verdict says the first place"
    exact = make_judge(debias="logit").compare(["d"] * 5, first, second)
    np.testing.assert_allclose(exact.probability, sigmoid(m), atol=1e-5)


def test_the_expected_score(judge, params):
    scores = judge.score(PROMPTS, FIRST)
    expected = [next_word(params, rating(p, a), "123")[0] @ [1.0, 2.5, -4.0] for p, a in zip(PROMPTS, FIRST)]
    np.testing.assert_allclose(scores.expected, expected, atol=1e-5)
    assert scores.valid.all()
    assert np.std(scores.expected) > 0.01


def test_a_question_that_is_too_long_is_missing_and_never_a_score(judge):
    long = " ".join(["e"] * (LENGTH + 1))
    verdict = judge.compare([*PROMPTS[:2], "d"], ["a", long, "b"], ["b", "c", "c"])
    np.testing.assert_array_equal(verdict.valid, [True, False, True])
    assert (verdict.probability[1], verdict.forward[1], verdict.swapped[1]) == (0.5, 0.5, 0.5)
    alone = judge.compare([PROMPTS[0], "d"], ["a", "b"], ["b", "c"])
    np.testing.assert_allclose(verdict.probability[[0, 2]], alone.probability, atol=1e-6)
    scores = judge.score(["a", long], ["b", "c"])
    np.testing.assert_array_equal(scores.valid, [True, False])
    assert scores.expected[1] == 0
    exact = judge.score([" ".join(["e"] * (LENGTH - 2))], ["c"])  # just fits
    assert exact.valid.all()


def test_one_order_that_is_missing_makes_the_pair_missing(make_judge, monkeypatch):
    def half(model, ids, params, batch, *, axis_name=None):
        shown_first = batch["tokens"][:, -3] == TOKENIZER.token_id("a")
        return {
            "choices": jnp.where(shown_first[:, None], jnp.nan, jnp.full((len(shown_first), 2), 0.5)),
            "mass": jnp.ones(len(shown_first)),
        }

    monkeypatch.setattr(module, "choice_probabilities", half)
    verdict = make_judge().compare(["c", "c", "c"], ["a", "b", "b"], ["b", "a", "c"])
    np.testing.assert_array_equal(verdict.valid, [False, False, True])
    assert np.isfinite(verdict.probability).all()


def test_little_mass_on_the_choices_is_no_answer(make_judge, params):
    masses = [
        min(next_word(params, pairwise(p, *pair), "12")[1] for pair in ((a, b), (b, a)))
        for p, a, b in zip(PROMPTS, FIRST, SECOND)
    ]
    threshold = float(np.sort(masses)[2]) + 1e-4
    verdict = make_judge(min_mass=threshold).compare(PROMPTS, FIRST, SECOND)
    np.testing.assert_array_equal(verdict.valid, np.array(masses) >= threshold)
    assert 0 < verdict.valid.sum() < len(PROMPTS)
    assert (verdict.probability[~verdict.valid] == 0.5).all()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_batches_of_any_size(judge, count):
    """The padding rows of the last batch are nobody's."""
    prompts, first, second = ((x * 2)[:count] for x in (PROMPTS, FIRST, SECOND))
    verdict, all_of_them = judge.compare(prompts, first, second), judge.compare(PROMPTS, FIRST, SECOND)
    assert verdict.probability.shape == verdict.valid.shape == (count,)
    np.testing.assert_allclose(verdict.probability, np.resize(all_of_them.probability, count), atol=1e-6)
    assert judge.score(prompts, first).expected.shape == (count,)


def test_progress_counts_every_question_of_a_call(make_judge):
    judge = make_judge(reasoning=Reasoning(lambda prompt, answer: f"{answer} rate", "3", max_tokens=2))
    counted = []
    progress = lambda done, total: counted.append((done, total))
    judge.compare(PROMPTS, FIRST, SECOND, progress=progress)
    assert counted == [(4, 10), (8, 10), (10, 10)]
    counted.clear()
    judge.score(PROMPTS, FIRST, progress=progress)
    assert counted == [(4, 10), (5, 10), (9, 10), (10, 10)]
    counted.clear()
    judge.reasons(PROMPTS, FIRST, progress=progress)
    assert counted == [(4, 5), (5, 5)]
    counted.clear()
    make_judge().score(PROMPTS, FIRST, progress=progress)
    assert counted == [(4, 5), (5, 5)]


def test_nothing_to_judge(judge):
    assert judge.compare([], [], []).probability.shape == (0,)
    assert judge.score([], []).expected.shape == (0,)


def test_many_devices_judge_the_same(make_judge, judge):
    spread = make_judge(runner=PmapRunner(), batch_size=8).compare(PROMPTS, FIRST, SECOND)
    np.testing.assert_allclose(spread.probability, judge.compare(PROMPTS, FIRST, SECOND).probability, atol=1e-6)


def test_the_hash_knows_every_weight(params, judge):
    assert judge.hash == weights_hash(params)
    assert weights_hash(jax.tree.map(jnp.array, params)) == judge.hash
    leaves, tree = jax.tree.flatten(jax.device_get(params))
    hashes = {judge.hash}
    for i, leaf in enumerate(leaves):
        changed = leaf.copy()
        changed.flat[leaf.size // 2] = np.nextafter(changed.flat[leaf.size // 2], np.float32(9))
        hashes.add(weights_hash(tree.unflatten([*leaves[:i], changed, *leaves[i + 1 :]])))
    assert len(hashes) == len(leaves) + 1
    assert weights_hash({"a": np.zeros(2), "b": np.zeros(0)}) != weights_hash({"a": np.zeros(0), "b": np.zeros(2)})
    assert weights_hash({"a": np.zeros((2, 3))}) != weights_hash({"a": np.zeros((3, 2))})


def test_settings_that_cannot_work_are_refused(make_judge, params):
    with pytest.raises(UserError, match="maybe"):
        make_judge(verdicts=("1", "maybe so")).compare(["a"], ["b"], ["c"])
    with pytest.raises(UserError, match="apart"):
        make_judge(verdicts=("1", "1")).compare(["a"], ["b"], ["c"])
    with pytest.raises(UserError, match=r"max_length \(17\).*context \(16\)"):
        make_judge(max_length=17)
    with pytest.raises(UserError, match="multiple of the 8 devices"):
        make_judge(runner=PmapRunner(), batch_size=12)
    larger = word_level_tokenizer((*WORDS, "more"))
    with pytest.raises(UserError, match="the judge"):
        LanguageModelJudge(MODEL, params, larger, JitRunner(), pairwise, rating)


def test_the_judge_reads_text_with_its_own_tokenizer(make_judge, monkeypatch):
    """What reaches the model: the question's tokens, left padded to one length."""
    seen = []

    def looking(model, ids, params, batch, *, axis_name=None):
        jax.debug.callback(lambda t, m: seen.append((np.array(t), np.array(m))), batch["tokens"], batch["mask"])
        return {"choices": jnp.full((len(batch["tokens"]), len(ids)), 0.5), "mass": jnp.ones(len(batch["tokens"]))}

    monkeypatch.setattr(module, "choice_probabilities", looking)
    make_judge(batch_size=2).compare(["a b"], ["c"], ["d e"])
    jax.effects_barrier()
    ((tokens, mask),) = seen
    assert tokens.shape == (2, 8)  # the questions have seven tokens: the next power of two, not the judge's context
    for row, text in enumerate(("a b which c or d e", "a b which d e or c")):
        assert tokens[row][mask[row]].tolist() == TOKENIZER.encode(text)
        assert mask[row].tolist() == sorted(mask[row].tolist())
    assert functools.reduce(np.logical_and, mask)[-1]


def test_direct_scores_are_the_judges_expectations_and_its_gaps():
    records, answers = [{"prompt": f"prompt {i}"} for i in range(3)], ["one", "two", "three"]
    asked = []

    def score(prompts, answers):
        asked.append((list(prompts), list(answers)))
        return AnswerScores(np.array([7.5, 0.0, 2.0]), np.zeros((3, 10)), np.array([True, False, True]), np.ones(3))

    feedback = DirectScoreSource(SimpleNamespace(score=score))(records, answers, None)
    assert asked == [(["prompt 0", "prompt 1", "prompt 2"], answers)]
    np.testing.assert_array_equal(feedback.values[:, 0], [7.5, 0, 2])
    np.testing.assert_array_equal(feedback.valid[:, 0], [True, False, True])


def test_why_a_direct_score_is_missing_is_counted(make_judge, params):
    records = [{"prompt": p} for p in PROMPTS]
    masses = [next_word(params, rating(p, a), "123")[1] for p, a in zip(PROMPTS, FIRST)]
    threshold = float(np.sort(masses)[1]) + 1e-4
    low = sum(mass < threshold for mass in masses)
    source = DirectScoreSource(make_judge(min_mass=threshold))
    source([*records, records[0]], [*FIRST, "a " * 40], None)
    little = f"the judge gave its labels less probability together than min_mass = {threshold:g}"
    assert source.missing() == {"the question is too long for the judge": 1, little: low} and 0 < low < len(PROMPTS)
    unending = make_judge(reasoning=Reasoning(lambda prompt, answer: f"{answer} rate", "3", max_tokens=2))
    _, ended = unending.reasons(PROMPTS, FIRST)
    source = DirectScoreSource(unending)
    judged = source(records, FIRST, None)
    assert judged.valid[:, 0].tolist() == ended.tolist() and not ended.all()
    assert source.missing() == {"the judge's reasons did not fit or did not end": int((~ended).sum())}


def greedy(params, text, most):
    """The words that the model writes after `text`, the most probable ones, without a cache."""
    asked, written = TOKENIZER.encode(text), []
    while len(written) < most:
        count = len(asked) + len(written)
        ids = np.pad([*asked, *written], (0, 16 - count))[None]  # one length: compiled once
        written.append(int(np.argmax(np.asarray(forward(params, ids, np.arange(16)[None] < count))[0, count - 1])))
        if written[-1] in TOKENIZER.stop_ids:
            written.pop()
            break
    return TOKENIZER.decode(written)


def test_a_verdict_follows_the_judges_reasons_in_each_order(make_judge, params):
    """Reasons that are cut count as well; half of a tie is for either answer; a question without room is missing."""
    before = lambda data, reasons: f"{reasons} rate {data[1]}"
    reasoning = Reasoning(pairwise, "", 3, before)
    counted = []
    found, spread = (
        make_judge(
            runner=runner, batch_size=8, max_length=12, verdicts=("1", "2", "3"), pairwise_reasoning=reasoning
        ).compare([*PROMPTS, "a"], [*FIRST, "b"], [*SECOND, "c " * 9], progress=lambda *now: counted.append(now))
        for runner in (JitRunner(), PmapRunner())
    )
    assert counted[-1] == (24, 24)
    assert found.valid.tolist() == [True] * 5 + [False]
    assert set(found.missing[:5]) == {""} and found.reasons[5].tolist() == ["", ""]
    assert found.missing[5] == "the judge's reasons did not fit or did not end"
    for i, (p, a, b) in enumerate(zip(PROMPTS, FIRST, SECOND)):
        for order, (one, two) in enumerate(((a, b), (b, a))):
            reasons = greedy(params, pairwise(p, one, two), 3)
            assert found.reasons[i, order] == reasons
            shares = next_word(params, before((p, one, two), reasons), "123")[0]
            shown_first = (found.forward, found.swapped)[order][i]
            np.testing.assert_allclose(shown_first, shares[0] + shares[2] / 2, atol=1e-5)
    assert {len(text.split()) for text in found.reasons[:5].ravel()} == {0, 3}, (
        "a stop token ends some, the limit others"
    )
    assert (spread.reasons == found.reasons).all() and (spread.missing == found.missing).all()
    np.testing.assert_allclose(spread.probability, found.probability, atol=1e-5)


def test_reasons_that_leave_no_room_are_refused(make_judge):
    with pytest.raises(
        UserError, match="reasons of 9 tokens leave no room for a question within the judge's 10 tokens"
    ):
        make_judge(pairwise_reasoning=Reasoning(pairwise, "", 9))


def test_recorded_judgements_are_those_that_are_rewarded(make_judge, tmp_path):
    """Scores and comparisons with another answer: the judge's own numbers, each as it was read, missing ones counted."""
    records = [{"prompt": p, "other": other} for p, other in zip(PROMPTS, SECOND)]
    judge, rater = make_judge(), Rater("tiny", "ai")
    for against, store in (("", tmp_path / "scores.sqlite"), ("other", tmp_path / "pairs.sqlite")):
        source = RecordedJudgeSource(judge, rater, store, against=against)
        judged = source([*records, records[0]], [*FIRST, "a " * 40])
        expected = (
            judge.compare(PROMPTS, FIRST, SECOND).probability if against else judge.score(PROMPTS, FIRST).expected
        )
        np.testing.assert_allclose(judged.values[:-1, 0], expected, rtol=1e-5)
        assert judged.valid[:, 0].tolist() == [True] * len(PROMPTS) + [False]
        assert source.missing() == {"the question is too long for the judge": 1}
        source([*records, records[0]], [*FIRST, "a " * 40])  # a resumed run repeats the step
        with Store(store) as kept:
            found = kept.judgements()
        assert len(found) == (2 if against else 1) * (len(PROMPTS) + 1)
        assert {entry.status for entry in found} <= {"ok", "tie", "unparsed"}
        for i, (prompt, first) in enumerate(zip(PROMPTS, FIRST)):
            mine = [entry for entry in found if entry.prompt == prompt and entry.answers[0] == first and entry.answered]
            if against:
                assert {entry.shown for entry in mine} == {(0, 1), (1, 0)}
                assert np.mean([entry.probability for entry in mine]) == pytest.approx(expected[i], rel=1e-5)
            else:
                assert mine[0].value == pytest.approx(expected[i], rel=1e-5)
    partly = [records[0], {"prompt": "c"}, *records[2:]]
    source = RecordedJudgeSource(judge, rater, tmp_path / "a.sqlite", against="other")
    judged = source(partly, FIRST)
    assert judged.valid[:, 0].tolist() == [True, False, *[True] * (len(FIRST) - 2)]
    expected = judge.compare(PROMPTS, FIRST, SECOND).probability
    np.testing.assert_allclose(judged.values[2:, 0], expected[2:], rtol=1e-5)
    assert source.missing() == {"the record has no text in its field 'other' to compare with": 1}
    assert not source(partly[1:2], FIRST[:1]).valid.any(), "nothing is asked"
