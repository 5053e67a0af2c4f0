"""The pairs of raters are those that loops over things find; their number costs arrays, not loops."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_jax.quality import clusters
from rlaif_jax.quality.clusters import MAX_ROWS, SOURCES, RaterPairs
from rlaif_jax.quality.votes import Voter


def votes(sources: list[str], prompts: int):
    return SimpleNamespace(raters=[Voter(f"rater {i}", source) for i, source in enumerate(sources)], count=prompts)


@settings(deadline=None, max_examples=100)
@given(
    sources=st.lists(st.sampled_from(SOURCES), min_size=1, max_size=5),
    entries=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), unique=True, max_size=25),
    chunk=st.integers(1, 30),
)
def test_pairs_and_sums_are_those_of_loops(sources, entries, chunk):
    entries = [(thing, rater) for thing, rater in entries if rater < len(sources)]
    prompt = [thing % 2 for thing, _ in entries]
    value = np.random.default_rng(0).normal(size=(len(entries), 2))
    rows = lambda one, two: value[one, :, None] @ value[two, None, :]
    pairs = RaterPairs(votes(sources, 2), entries, prompt)
    by_names, by_sources = {}, {}
    for i, j in itertools.permutations(range(len(entries)), 2):
        (thing, a), (other, b) = entries[i], entries[j]
        rank = lambda rater: (SOURCES.index(sources[rater]), rater)
        if thing != other or rank(a) > rank(b):
            continue
        product = np.outer(value[i], value[j])
        both = (product + product.T) / 2 if sources[a] == sources[b] else product
        found = ((by_names, (f"rater {a}", f"rater {b}"), product), (by_sources, (sources[a], sources[b]), both))
        for table, key, row in found:
            count, sums = table.get(key, (0, np.zeros((2, 2, 2))))
            table[key] = (count + 1, sums + np.eye(2)[prompt[i]][:, None, None] * row)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clusters, "CHUNK", chunk)
        for groups, expected in ((pairs.raters()[0], by_names), (pairs.sources(), by_sources)):
            assert {(group.a, group.b): len(group.one) for group in groups} == {k: n for k, (n, _) in expected.items()}
            assert [len(group.one) for group in groups] == sorted((n for n, _ in expected.values()), reverse=True)
            for group in groups:
                np.testing.assert_allclose(pairs.sums(group, rows), expected[group.a, group.b][1], atol=1e-12)


def test_the_pairs_with_most_in_common_are_listed():
    raters = 12
    entries = [(thing, rater) for thing in range(20) for rater in range(raters) if rater + thing < 20]
    found, left_out = RaterPairs(votes(["person"] * raters, 20), entries, [0] * len(entries)).raters()
    assert len(found) == MAX_ROWS and left_out == raters * (raters - 1) // 2 - MAX_ROWS
    assert (found[0].a, found[0].b, len(found[0].one)) == ("rater 0", "rater 1", 19)
