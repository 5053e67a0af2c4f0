"""Edited answers and marked spans as rewards: RapidFuzz, replayed edits, numbers by hand, the world's error mask."""

import io
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rapidfuzz.distance import Levenshtein
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from rlaif_jax.data.world.grammar import parse, wrong_tokens
from rlaif_jax.data.world.people import Editor
from rlaif_jax.data.world.scenes import ASPECTS, SYLLABLES, sample_scene
from rlaif_jax.data.world.tasks import dialogue, summarisation
from rlaif_jax.data.world.tasks.base import wrong_value
from rlaif_jax.parallel import make_mesh, shard_step
from rlaif_jax.rewards.corrections import (
    DELETED,
    KEPT,
    MASKED,
    SUBSTITUTED,
    align,
    correction_rewards,
    edit_reward,
    levenshtein,
    span_rewards,
    token_blame,
)

PAIRS, T, U = 10_000, 14, 11
NAN = float("nan")
WEIGHTS = {"kept": 0.25, "substituted": -1.0, "deleted": -2.0, "insertion": -4.0}


def padded(rows, width, fill=0):
    """Lists of ids -> int32 [B, width] and mask, right padded with ids that also occur."""
    tokens, mask = np.full((len(rows), width), fill, np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    return tokens, mask


def texts(*pairs):
    """Pairs of strings of up to 8 characters -> the four arrays, a character a token; two pairs or more of one shape."""
    answers, corrections = zip(*pairs, *[("", "")] * (2 - len(pairs)))
    return *padded([list(map(ord, a)) for a in answers], 8), *padded([list(map(ord, c)) for c in corrections], 8)


@jax.jit
def rewarded(arrays, valid=(True, True)):
    """Score 2 x the edit reward, token rewards .5 x the blame."""
    return correction_rewards(*arrays, jnp.asarray(valid), sequence=2.0, dense=0.5, **WEIGHTS)


def blame_of(answer, corrected):
    return 2 * rewarded(texts((answer, corrected))).token_rewards[0, : len(answer)]


def aligned_text(answer, corrected):
    return jax.tree.map(lambda x: np.asarray(x[0]), jax.jit(align)(*texts((answer, corrected))))


@pytest.fixture(scope="module")
def random_pairs():
    """Every length from 0 to the full width, padding anywhere, few and many kinds of tokens; half nearly equal."""
    rng = np.random.default_rng(0)
    kinds = rng.choice([2, 4, 30], (PAIRS, 1))
    answer, corrected = rng.integers(0, kinds, (PAIRS, T)), rng.integers(0, kinds, (PAIRS, U))
    near = np.arange(PAIRS) % 2 == 0
    corrected[near] = np.where(rng.random((near.sum(), U)) < 0.2, corrected[near], answer[near, 1 : U + 1])
    masks = [rng.random((PAIRS, width)) < rng.choice([0, 0.3, 0.7, 0.95, 1], (PAIRS, 1)) for width in (T, U)]
    return answer.astype(np.int32), masks[0], corrected.astype(np.int32), masks[1]


@pytest.fixture(scope="module")
def aligned(random_pairs):
    return jax.tree.map(np.asarray, jax.jit(align)(*random_pairs))


def real(arrays):
    """The four arrays -> pairs of lists of the real tokens."""
    answer, answer_mask, corrected, corrected_mask = arrays
    return [(a[m].tolist(), c[n].tolist()) for a, m, c, n in zip(answer, answer_mask, corrected, corrected_mask)]


# ---- alignment


def test_distances_equal_rapidfuzz(random_pairs, aligned):
    expected = [Levenshtein.distance(a, c) for a, c in real(random_pairs)]
    np.testing.assert_array_equal(aligned.distance, expected)
    np.testing.assert_array_equal(jax.jit(levenshtein)(*random_pairs), expected)
    assert len(set(expected)) == max(expected) + 1 > 10


def test_the_edits_replay_to_the_correction(random_pairs, aligned):
    masks = random_pairs[1]
    for i, (answer, corrected) in enumerate(real(random_pairs)):
        operations = aligned.operations[i][masks[i]].tolist()
        put_in = [*aligned.inserted[i][:-1][masks[i]].tolist(), int(aligned.inserted[i][-1])]
        made, edits = [], sum(put_in)
        for token, operation, before in zip(answer, operations, put_in):
            made += corrected[len(made) : len(made) + before]
            if operation == KEPT:
                made.append(token)
            elif operation == SUBSTITUTED:
                assert token != corrected[len(made)]
                made.append(corrected[len(made)])
            edits += operation != KEPT
        made += corrected[len(made) : len(made) + put_in[-1]]
        assert made == corrected
        assert edits == aligned.distance[i]
    assert (aligned.operations[~masks] == MASKED).all()
    assert (aligned.inserted[:, :-1][~masks] == 0).all()


def most_kept(answer, corrected):
    """Most tokens kept by an alignment of the fewest edits: the table in plain Python, (edits, -kept) in order."""
    row = [(j, 0) for j in range(len(corrected) + 1)]
    for i, a in enumerate(answer):
        above, row = row, [(i + 1, 0)]
        for j, c in enumerate(corrected):
            diagonal = (above[j][0] + (a != c), above[j][1] - (a == c))
            row.append(min(diagonal, (above[j + 1][0] + 1, above[j + 1][1]), (row[j][0] + 1, row[j][1])))
    return -row[-1][1]


def test_of_the_shortest_edits_it_keeps_the_most_tokens(random_pairs, aligned):
    kept = (aligned.operations == KEPT).sum(-1)
    for i, pair in enumerate(real(random_pairs)[:500]):
        assert kept[i] == most_kept(*pair)
    operations = aligned_text("ab", "ba").operations[:2]
    assert sorted(operations) == [KEPT, DELETED]  # "ab" -> "ba": not two substitutions, which are as many edits


def test_where_the_padding_is_does_not_matter():
    answer, corrected = [5, 6, 7, 8], [6, 7, 9, 8, 1]
    rows = [([*answer, 9, 9, 9], [1, 1, 1, 1, 0, 0, 0]), ([9, 9, 9, *answer], [0, 0, 0, 1, 1, 1, 1])]
    rows += [([5, 9, 6, 7, 9, 9, 8], [1, 0, 1, 1, 0, 0, 1])]
    for tokens, mask in rows:
        mask = np.array([mask], bool)
        other = np.array([[*corrected, 0, 0]]), np.arange(7)[None] < 5
        got = jax.jit(align)(np.array([tokens]), mask, *other)
        assert got.distance[0] == 3
        assert got.operations[0][mask[0]].tolist() == [DELETED, KEPT, KEPT, KEPT]
        assert got.inserted[0][:-1][mask[0]].tolist() == [0, 0, 0, 1]
        assert got.inserted[0, -1] == 1


@pytest.mark.parametrize(
    "answer, corrected, distance", [("", "", 0), ("abc", "", 3), ("", "abc", 3), ("abc", "abc", 0)]
)
def test_nothing_and_everything(answer, corrected, distance):
    got = aligned_text(answer, corrected)
    assert got.distance == distance
    assert got.inserted.sum() == got.inserted[-1] == (0 if answer else distance)
    assert np.isfinite(rewarded(texts((answer, corrected))).score).all()


def test_arrays_without_width():
    none = np.zeros((2, 0), np.int32), np.zeros((2, 0), bool)
    some = np.ones((2, 3), np.int32), np.ones((2, 3), bool)
    assert align(*none, *some).inserted.tolist() == [[3], [3]]
    assert align(*some, *none).operations.tolist() == [[DELETED] * 3] * 2
    assert levenshtein(*none, *none).tolist() == [0, 0]


# ---- rewards


def test_edit_reward_is_edits_over_the_length_of_the_correction():
    first = rewarded(texts(("kitten", "sitting"), ("same", "same"))).score
    second = rewarded(texts(("abc", ""), ("aaaa", "b"))).score
    np.testing.assert_allclose([*first, *second], [2 * -3 / 7, 0, 2 * -3, 2 * -4])


def test_blame_by_hand():
    # k i t t e n . -> s i t t i n g . : substituted k and e, g put in before the stop
    np.testing.assert_allclose(blame_of("kitten.", "sitting."), [-1, 0.25, 0.25, 0.25, -1, 0.25, 0.25 - 4])
    np.testing.assert_allclose(blame_of("abcd", "ad"), [0.25, -2, -2, 0.25])
    # Three tokens put in at one place cost once, and at the token that was written instead of them.
    np.testing.assert_allclose(blame_of("abc", "axyzbc"), [0.25, 0.25 - 4, 0.25])
    # Behind the end: the last token; in front of it and behind it: still once.
    np.testing.assert_allclose(blame_of("ab", "abz"), [0.25, 0.25 - 4])
    np.testing.assert_allclose(blame_of("ab", "azbz"), [0.25, 0.25 - 4])
    np.testing.assert_allclose(blame_of("b", "zbz"), [0.25 - 4])
    assert blame_of("", "abc").shape == (0,)


def test_blame_adds_up_to_the_distance(random_pairs, aligned):
    """With weight -1 an edit the blame is -(substituted + deleted), the distance less what was put in."""
    blame = token_blame(aligned, random_pairs[1], kept=0.0, substituted=-1.0, deleted=-1.0, insertion=0.0)
    np.testing.assert_array_equal(-blame.sum(-1), aligned.distance - aligned.inserted.sum(-1))


def test_a_missing_correction_gives_no_reward():
    arrays = texts(("kitten.", "sitting."), ("abc", "xyz"))
    got = rewarded(arrays, (True, False))
    np.testing.assert_allclose(got.score, [-6 / 8, 0])
    np.testing.assert_array_equal(got.valid, [True, False])
    np.testing.assert_allclose(got.token_rewards[0, :7], 0.5 * blame_of("kitten.", "sitting."))
    assert not np.any(got.token_rewards[1])
    assert got.score.dtype == got.token_rewards.dtype == jnp.float32
    assert np.any(rewarded(arrays).token_rewards[1])


def test_the_gradient_of_blame_counts_the_operations():
    arrays = texts(("kitten.", "sitting."), ("abcd", "ad"))
    alignment = jax.jit(align)(*arrays)
    slope = jax.grad(lambda w: token_blame(alignment, arrays[1], **w).sum())(WEIGHTS)
    assert {name: float(x) for name, x in slope.items()} == {
        "kept": 5 + 2,
        "substituted": 2,
        "deleted": 2,
        "insertion": 1,
    }


# ---- spans


def spans_by_hand():
    """Two answers of 4 and 5 tokens (the second left padded by one), four spans each."""
    answer_mask = np.array([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]], bool)
    starts = np.array([[0, 1, 3, 4], [0, 2, 9, 3]])
    ends = np.array([[2, 2, 9, 6], [1, 3, 3, 3]])
    values = np.array([[-1.0, -0.5, 2.0, 7.0], [5.0, 1.0, NAN, 3.0]], np.float32)
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 1]], bool)
    # 0..2 and 1..2 end at token 1; 3..9 is cut at the last token 3; 4..6 has no real token. In the second answer 0..1 is
    # padding, 2..3 pays at token 2, the third is masked, 3..3 is empty.
    rewards = np.array([[0, -1.5, 0, 2, 0, 0], [0, 0, 1, 0, 0, 0]], np.float32)
    return (starts, ends, values, mask, answer_mask), rewards


def test_spans_pay_at_their_last_token():
    arrays, expected = spans_by_hand()
    np.testing.assert_array_equal(span_rewards(*arrays), expected)
    low = [x.astype(jnp.bfloat16) if x.dtype == np.float32 else x for x in arrays]
    np.testing.assert_array_equal(span_rewards(*low), expected)
    assert span_rewards(*low).dtype == jnp.float32


def test_each_span_that_pays_has_gradient_one():
    (starts, ends, values, mask, answer_mask), _ = spans_by_hand()
    slope = jax.grad(lambda v: span_rewards(starts, ends, v, mask, answer_mask).sum())(values)
    np.testing.assert_array_equal(slope, [[1, 1, 1, 0], [0, 1, 0, 0]])


# ---- everywhere


def everything(weights, batch, *, axis_name=None):
    del axis_name
    answer, answer_mask, corrected, corrected_mask, valid, starts, ends, values = batch
    rewards = correction_rewards(answer, answer_mask, corrected, corrected_mask, valid, dense=1.0, **weights)
    return rewards, span_rewards(starts, ends, values, values > -1, answer_mask)


@pytest.mark.parametrize("transform", ["jit", "vmap", "pmap", "shard"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_under_transforms(random_pairs, transform, dtype):
    rng = np.random.default_rng(1)
    rows = 32
    starts = rng.integers(0, T, (rows, 3))
    batch = tuple(x[:rows] for x in random_pairs)
    batch += (rng.random(rows) < 0.8, starts, starts + rng.integers(0, 5, starts.shape))
    batch += (jnp.asarray(rng.normal(size=starts.shape), dtype),)
    weights = {name: jnp.asarray(weight, dtype) for name, weight in WEIGHTS.items()}  # exact in bfloat16, too
    expected = jax.jit(everything)(weights, batch)
    if transform == "shard":
        got = shard_step(everything, make_mesh(), out="split", donate=False)(weights, batch)
        assert len(got[1].sharding.device_set) == 8
    elif transform == "jit":
        singles = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(3)]
        got = jax.tree.map(lambda *x: jnp.concatenate(x), *[jax.jit(everything)(weights, row) for row in singles])
        expected = jax.tree.map(lambda x: x[:3], expected)
    else:
        split = jax.tree.map(lambda x: x.reshape(8, 4, *x.shape[1:]), batch)
        mapped = {"vmap": jax.vmap, "pmap": jax.pmap}[transform](everything, in_axes=(None, 0))
        mapped = (jax.jit(mapped) if transform == "vmap" else mapped)(weights, split)
        got = jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), mapped)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got)):
        assert a.dtype == b.dtype in (jnp.float32, jnp.bool_)
        np.testing.assert_allclose(a, b, rtol=1e-6)


# ---- the world and real post-edits


def plant(rng, scene, answer):
    """`answer` with up to two errors of fact: a wrong value, another town, an invented aspect."""
    words, parsed = answer.split(), parse(answer)
    spots = [claim.value_position for claim in parsed.claims] + [name.position for name in parsed.names]
    for at in rng.permutation(spots)[: rng.integers(3)]:
        claim = next((claim for claim in parsed.claims if claim.value_position == at), None)
        if claim is None:
            words[at : at + 2] = [w for w in rng.permutation(SYLLABLES) if w not in words[at : at + 2]][:2]
        elif rng.random() < 0.8:
            words[at] = wrong_value(rng, scene, claim.aspect)
        else:
            words[at - 1] = next(a for a in rng.permutation(ASPECTS) if scene.value_of(a) is None)
            words[at] = wrong_value(rng, scene, claim.aspect)
    return " ".join(words)


@pytest.mark.parametrize("miss, least", [(0.0, 0.98), (0.1, 0.9)])
def test_blame_finds_the_wrong_tokens_of_the_world(miss, least):
    """Good answers with planted errors of fact, mended by the simulated editor, who misses some."""
    rng = np.random.default_rng(0)
    numbers: dict[str, int] = {}
    answers, edits, wrong = [], [], []

    def ids(text):
        return [numbers.setdefault(word, len(numbers)) for word in text.split()]

    for i in range(400):
        task, scene = (summarisation.TASK, dialogue.TASK)[i % 2], sample_scene(0, "train", i)
        answer = plant(rng, scene, task.reference(scene))
        answers.append(ids(answer))
        edits.append(ids(Editor(miss).edit(rng, task, scene, answer)))
        wrong.append(list(wrong_tokens(parse(answer), scene)))
    answer, mask = padded(answers, 32)
    alignment = jax.jit(align)(answer, mask, *padded(edits, 32))
    blame = np.asarray(token_blame(alignment, mask))
    truth = padded(wrong, 32)[0][mask]
    assert 0.02 < truth.mean() < 0.2
    assert roc_auc_score(truth, -blame[mask]) >= least


def test_real_post_edits_agree_with_their_hter(shared_data):
    """Word edits over the length of the post-edit, compared with the TER of the data's authors, which may also shift blocks."""
    with tarfile.open(shared_data("mlqe_pe/pe.en-de-dev.tar.gz")) as archive:
        files = {member.name.rsplit(".", 1)[-1]: member for member in archive.getmembers() if member.isfile()}

        def lines(kind):
            return io.TextIOWrapper(archive.extractfile(files[kind]), "utf-8").read().splitlines()[:300]

        translated, edited, hter = lines("mt"), lines("pe"), [float(x) for x in lines("hter")]
    numbers: dict[str, int] = {}
    rows = [[[numbers.setdefault(w, len(numbers)) for w in s.split()] for s in side] for side in (translated, edited)]
    (answer, mask), (corrected, corrected_mask) = (padded(side, max(map(len, side))) for side in rows)
    ours = edit_reward(jax.jit(levenshtein)(answer, mask, corrected, corrected_mask), corrected_mask)
    assert spearmanr(-ours, hter).statistic >= 0.98
