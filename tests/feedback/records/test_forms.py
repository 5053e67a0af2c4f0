"""The forms of feedback: what each may hold, and JSON written and read back."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_jax.feedback.records.forms import (
    Call,
    Comment,
    Correction,
    Judgement,
    Ranking,
    Rater,
    Rating,
    Span,
    canonical,
    to_json,
)
from rlaif_jax.feedback.records.parsing import from_json

ANNA = Rater("anna", "person")

# ---- Any judgement

text = st.text(max_size=20)
share = st.floats(0, 1)
numbers = st.floats(-1e9, 1e9)
raters = st.builds(
    Rater, name=st.text(min_size=1).filter(str.strip), source=st.sampled_from(["ai", "rule", "person", "simulated"]),
    model=text, prompt_hash=text,
)  # fmt: skip
calls = st.builds(
    Call, latency_s=st.none() | st.floats(0, 1e6), prompt_tokens=st.integers(0, 10**9), cost=st.floats(0, 1e6)
)


@st.composite
def judgements(draw: st.DrawFn) -> Judgement:
    """Any judgement of any form, as a caller may build it."""
    form = draw(st.sampled_from([Comment, Rating, Correction, Ranking]))
    count = draw(st.integers(2, 5)) if form is Ranking else 1
    answers = tuple(draw(st.lists(text, min_size=count, max_size=count)))
    status = draw(st.sampled_from(["ok", "unparsed", "refused", "error", "abstained", "retracted"]))
    shared = {
        "prompt": draw(text),
        "answers": answers,
        "rater": draw(raters),
        "principle": draw(text),
        "status": status,
        "confidence": draw(st.none() | share),
        "time": draw(st.none() | numbers),
        "shown": tuple(draw(st.just(()) | st.permutations(range(count)))),
        "probabilities": tuple(draw(st.lists(share, max_size=3))),
        "label_mass": draw(st.none() | share),
        "raw": draw(text),
        "seed": draw(st.none() | st.integers(0, 2**63)),
        "supersedes": draw(st.text(min_size=status == "retracted", max_size=5)),
        "generators": draw(st.just(()) | st.just(tuple("m" * count))),
        "call": draw(calls),
    }
    if status != "ok":
        return form(**shared)
    if form is Comment:
        return Comment(**shared, text="x" + draw(text), aspects=tuple(draw(st.lists(text, max_size=2))))
    if form is Rating:
        low, high = sorted(draw(st.lists(numbers, min_size=2, max_size=2, unique=True)))
        return Rating(**shared, value=draw(st.floats(low, high)), low=low, high=high)
    if form is Correction:
        length = len(answers[0])
        spans = st.tuples(st.integers(0, length), st.integers(0, length)).map(sorted).filter(lambda s: s[0] < s[1])
        marks = draw(st.lists(spans, max_size=3)) if length else []
        edited = draw(st.text(max_size=20) if not marks else st.none() | text)
        return Correction(**shared, edited=edited, spans=tuple(Span(a, b, draw(numbers), "k") for a, b in marks))
    if draw(st.booleans()):
        order = draw(st.permutations(range(count)))
        beats = draw(
            st.lists(st.sampled_from([(order[i], order[j]) for j in range(count) for i in range(j)]), min_size=1)
        )
        return Ranking(**shared, beats=tuple(beats))
    ranks = draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    return Ranking(**shared, ranks=tuple(ranks), probability=draw(share) if count == 2 else None)


@given(judgements())
@settings(max_examples=150, deadline=None)
def test_json_there_and_back_is_the_same_record(judgement):
    line = json.dumps(to_json(judgement))
    again = from_json(json.loads(line))
    assert type(again) is type(judgement)
    assert canonical(to_json(again)) == canonical(to_json(judgement))
    assert again.id == judgement.id and again.item == judgement.item
    if judgement.answered:  # a rating without a value holds NaN, which equals nothing
        assert again == judgement


@given(judgements(), calls)
@settings(max_examples=50, deadline=None)
def test_what_a_call_took_is_no_part_of_the_id(judgement, call):
    assert dataclasses.replace(judgement, call=call).id == judgement.id


def test_every_other_field_is_part_of_the_id():
    first = rating()
    changed = {
        "prompt": "P", "answers": ("B",), "rater": Rater("ben", "person"), "principle": "x", "status": "abstained",
        "confidence": 0.5, "time": 1.0, "shown": (0,), "probabilities": (1.0,), "label_mass": 0.9, "raw": "r",
        "seed": 1, "supersedes": "s", "generators": ("m",), "value": 5.0, "low": 0.0, "high": 11.0,
    }  # fmt: skip
    assert set(changed) == {f.name for f in dataclasses.fields(Rating)} - {"call"}
    ids = {dataclasses.replace(first, **{name: value}).id for name, value in changed.items()}
    assert len(ids | {first.id}) == len(changed) + 1


def test_equal_records_have_equal_ids_whatever_their_number_types():
    plain = rating(value=7.0, time=2.0, low=0.0, seed=3)
    assert plain.id == rating(value=7, time=2, low=-0.0, seed=3).id
    assert plain.id == rating(value=np.float32(7), time=np.float64(2), low=np.int32(0), seed=np.int64(3)).id


def test_the_id_never_changes():
    """A changed id would make every stored record a stranger: change VERSION instead. The digest is from sha256sum."""
    record = Ranking(prompt="Which?", answers=("a", "é"), rater=ANNA, ranks=(1, 2), call=Call(cost=1.0))
    hashed = (
        '{"answers":["a","\\u00e9"],"form":"ranking","prompt":"Which?","ranks":[1,2],'
        '"rater":{"model":"","name":"anna","prompt_hash":"","source":"person"},"version":1}'
    )
    assert hashlib.sha256(hashed.encode()).hexdigest() == record.id
    assert record.id == "99ac137032fcd7d9d37f780d46f31e03d5b60f168b50fa5c6ee0282e97cf7614"


def test_an_item_is_its_prompt_and_answers_in_any_order():
    one = Ranking(prompt="p", answers=("a", "b"), rater=ANNA, ranks=(1, 2))
    assert one.item == Ranking(prompt="p", answers=("b", "a"), rater=ANNA, ranks=(1, 1)).item
    assert one.item != Ranking(prompt="q", answers=("a", "b"), rater=ANNA, ranks=(1, 2)).item
    assert one.item != Ranking(prompt="p", answers=("a", "c"), rater=ANNA, ranks=(1, 2)).item


# ---- What a ranking says


def test_pairs_of_a_list_with_ties_and_unplaced_answers():
    ranking = Ranking(prompt="p", answers=("a", "b", "c", "d"), rater=ANNA, ranks=(2, 1, None, 2))
    assert list(ranking.pairs()) == [(0, 1, 0.0), (0, 3, 0.5), (1, 3, 1.0)]


def test_pairs_of_a_partial_order_are_those_it_names():
    ranking = Ranking(prompt="p", answers=("a", "b", "c"), rater=ANNA, beats=((2, 0), (0, 1)))
    assert list(ranking.pairs()) == [(0, 1, 1.0), (0, 2, 0.0)]


def test_a_probability_is_softer_than_the_rank():
    ranking = Ranking(prompt="p", answers=("a", "b"), rater=ANNA, ranks=(1, 2), probability=0.7)
    assert list(ranking.pairs()) == [(0, 1, 0.7)]


def test_unit_scale():
    assert rating(value=4.0, low=2.0, high=6.0).unit == 0.5


def rating(**changes) -> Rating:
    return Rating(**{"prompt": "p", "answers": ("a",), "rater": ANNA, "value": 7.0} | changes)
