"""Records as votes: who is one rater, what is adjudicated, what is a label."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_jax.feedback.records.forms import Ranking, Rater, Rating
from rlaif_jax.quality.quality import quality
from rlaif_jax.quality.text import quality_text
from rlaif_jax.quality.votes import current, rater_key, rater_labels, read_votes
from tests.quality.records import ANN, BOB, FAST, JUDGE, only, verdict

FINAL, OTHER_FINAL = Rater("adjudicated by ann", "person"), Rater("adjudicated by bob", "person")

# ---- Raters


def two_judges(one, two, count=100):
    """Two judges on the same pairs; one always prefers the first answer, the other the second."""
    return [
        Ranking(prompt=f"p{k}", answers=(f"a{k}", f"b{k}"), rater=rater, ranks=ranks, shown=(0, 1), seed=0)
        for k in range(count)
        for rater, ranks in ((one, (1, 2)), (two, (2, 1)))
    ]


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (Rater("gpt", "ai", model="gpt@1", prompt_hash="h1"), Rater("gpt", "ai", model="gpt@2", prompt_hash="h2")),
        (Rater("gpt", "ai", model="gpt", prompt_hash="h1"), Rater("gpt", "ai", model="gpt", prompt_hash="h2")),
        (Rater("gpt", "ai", model="gpt@1", prompt_hash="h"), Rater("gpt", "ai", model="gpt@2", prompt_hash="h")),
        (Rater("gpt", "ai"), Rater("gpt", "ai", prompt_hash="h")),
        (Rater("rule/x", "rule", prompt_hash="a" * 64), Rater("rule/x", "rule", prompt_hash="a" * 63 + "b")),
    ],
)
def test_two_wordings_or_revisions_under_one_name_are_two_judges(one, two):
    report = quality(two_judges(one, two), **FAST)
    names = [row["rater"] for row in report["habits"]]
    assert len(set(names)) == 2 and all(name.startswith(one.name) for name in names)
    assert report["repeats"] == []  # no question was asked a judge twice
    (row,) = report["agreement"]["comparisons"]["raters"]
    assert (row["count"], row["agreement"]["value"], row["kappa"]["value"]) == (100, 0, 0)
    assert {row["a"], row["b"]} == set(names)
    assert [row["raters"] for row in report["counts"]] == [2]
    assert {row["rater"] for row in report["cost"]} == set(names)
    shown = quality_text(report)
    table = shown.partition("Verdicts of each rater\n")[2].splitlines()
    assert len({line.partition("  ")[0] for line in table[3:5]}) == 2  # different on the page, too


def test_a_name_alone_is_a_name():
    rows = quality(two_judges(Rater("gpt", "ai", model="gpt@1", prompt_hash="h"), ANN), **FAST)["habits"]
    assert {row["rater"] for row in rows} == {"gpt", "ann"}


def test_long_names_of_two_revisions_differ_where_they_are_cut():
    model = "meta-llama/Llama-3.1-70B-Instruct-Turbo"
    one, two = (Rater(model, "ai", model=model, prompt_hash=c * 64) for c in "ab")
    rows = quality_text(quality(two_judges(one, two), **FAST)).splitlines()
    assert any(row.startswith("meta-llama/Llama-3.1-7") and "(prompt aaaaaaaa)" in row for row in rows)
    assert any(row.startswith("meta-llama/Llama-3.1-7") and "(prompt bbbbbbbb)" in row for row in rows)


def test_what_an_item_adds_to_the_question_makes_no_other_judge():
    """A reference or a rubric of the item is part of the question, not of the template's wording."""
    records = [
        Rating(
            prompt=f"p{k}",
            answers=("a",),
            rater=Rater("gpt", "ai", model="gpt", prompt_hash=f"t:{k}"),
            value=k + 1,
            high=5,
        )
        for k in range(5)
    ]
    report = quality(records, **FAST)
    assert [(row["raters"], row["records"]) for row in report["counts"]] == [(1, 5)]
    assert [row["rater"] for row in report["cost"]] == ["gpt"]


_TEXTS = st.sampled_from(["", "x", "y", "x (ai)", "gpt (prompt x)", "0" * 9 + "x", "0" * 9 + "y"])


@settings(deadline=None)
@given(st.lists(st.builds(Rater, _TEXTS.filter(bool), st.sampled_from(["ai", "person"]), _TEXTS, _TEXTS)))
def test_every_rater_has_a_label_that_no_other_has(raters):
    labels = rater_labels(raters)
    assert set(labels) == set(map(rater_key, raters))
    assert len(set(labels.values())) == len(labels)
    names = [key.name for key in labels]
    for key, label in labels.items():
        assert label.startswith(key.name)
        assert label == key.name or names.count(key.name) > 1  # a suffix only where a name is ambiguous


# ---- Adjudication


def disputed(count=60):
    """Ann and Bob differ on every third pair and the judge is right on every other one."""
    return [
        verdict(f"p{k}", ("a" * 5, "b" * (4 + k % 4)), rater, winner, generators=("m", "n"), shown=(0, 1))
        for k in range(count)
        for rater, winner in ((ANN, 0), (BOB, int(k % 3 == 0)), (JUDGE, k % 2))
    ]


def decided(count=60, rater=FINAL, winner=1, **more):
    return [
        verdict(f"p{k}", ("a" * 5, "b" * (4 + k % 4)), rater, winner, generators=("m", "n"), **more)
        for k in range(0, count, 3)
    ]


@pytest.mark.parametrize("source", ["person", "simulated"])
def test_an_adjudication_is_the_truth_and_no_opinion(source):
    as_source = lambda records: [
        dataclasses.replace(r, rater=dataclasses.replace(r.rater, source=source)) if r.rater.source == "person" else r
        for r in records
    ]
    before = quality(as_source(disputed()), **FAST)
    after = quality(as_source(disputed() + decided()), **FAST)
    for part in ("sources", "raters", "alpha"):  # the opinions are those that they were
        assert after["agreement"]["comparisons"][part] == before["agreement"]["comparisons"][part]
    for part in ("habits", "repeats", "order", "missing"):
        assert after[part] == before[part]
    (counted,) = [row for row in after["counts"] if row["source"] == source]
    assert (counted["raters"], counted["records"], counted["adjudicated"]) == (2, 140, 20)
    # Of 60 pairs people say "m" on 40 and were overruled on 20, where their own votes were a tie.
    rate = lambda report: only(report["win_rates"]["rows"], source=source)
    assert (rate(before)["wins"], rate(before)["losses"], rate(before)["rate"]["value"]) == (50, 10, 50 / 60)
    assert (rate(after)["wins"], rate(after)["losses"], rate(after)["ties"]) == (40, 20, 0)
    # The judge says "m" on the even pairs: right on 20 of the 40, and on the 10 odd ones of the 20 decided.
    against = only(after["agreement"]["comparisons"]["judges"], rater="judge")
    assert (against["count"], against["agreement"]["value"]) == (60, 0.5)
    debiased = only(after["win_rates"]["rows"], source="ai, debiased")
    assert debiased["alone"]["value"] == pytest.approx(40 / 60)


def test_calibration_and_length_slope_are_measured_with_the_adjudication_alone():
    """Each report is that of a store in which people had said at once what was decided."""
    chance = lambda k, rater: {} if rater is not JUDGE else {"probability": (0.9, 0.2)[k % 2]}
    records = [dataclasses.replace(r, **chance(int(r.prompt[1:]), r.rater)) for r in disputed()]
    settled = [
        dataclasses.replace(r, ranks=(2, 1) if int(r.prompt[1:]) % 3 == 0 else (1, 2)) if r.rater is BOB else r
        for r in records
        if r.rater is not ANN
    ]
    after, expected = (quality(r, **FAST) for r in (records + decided(), settled))
    assert after["calibration"] == expected["calibration"] != quality(records, **FAST)["calibration"]
    assert after["length_slope"] == expected["length_slope"] != quality(records, **FAST)["length_slope"]


def test_the_latest_adjudication_of_a_task_is_the_only_one():
    first, second = decided(winner=1, time=10.0), decided(rater=OTHER_FINAL, winner=0, time=20.0)
    alone = quality(disputed() + second, **FAST)
    for both in (first + second, second + first):  # an import may bring the older one later
        report = quality(disputed() + both, **FAST)
        assert report["win_rates"] == alone["win_rates"]
        assert report["used"] == alone["used"] == 200
    untimed = [dataclasses.replace(r, time=None) for r in first]
    assert quality(disputed() + second + untimed, **FAST)["win_rates"]["rows"] != alone["win_rates"]["rows"]


def test_tasks_of_other_answers_or_principles_are_decided_apart():
    records = [
        verdict("p", ("a", "b"), FINAL, 0, time=1.0),
        verdict("p", ("b", "a"), FINAL, 0, time=2.0),  # the same task with its answers the other way round
        verdict("p", ("a", "b"), FINAL, 0, principle="kind", time=3.0),
        verdict("p", ("a", "c"), FINAL, 0, time=4.0),
        Rating(prompt="p", answers=("a",), rater=FINAL, value=3),
    ]
    assert current(records) == [1, 2, 3, 4]


def test_only_people_adjudicate():
    records = [verdict(f"p{k}", ("a", "b"), Rater("adjudicated by gpt", "ai"), 0) for k in range(4)]
    votes = read_votes(records)
    assert (len(votes.votes), len(votes.decided)) == (4, 0)


def test_ratings_are_adjudicated_alike():
    rated = lambda rater, value: [
        Rating(prompt=f"p{k}", answers=("x",), rater=rater, value=value(k), low=1, high=5) for k in range(20)
    ]
    opinions = rated(ANN, lambda k: 1 + k % 5) + rated(BOB, lambda k: 5 - k % 5) + rated(JUDGE, lambda k: 1 + k % 4)
    before, after = (
        quality(r, **FAST)["agreement"]["ratings"] for r in (opinions, opinions + rated(FINAL, lambda k: 1 + k % 4))
    )
    for part in ("sources", "raters", "alpha"):
        assert after[part] == before[part]
    assert only(before["judges"], rater="judge")["agreement"]["value"] < 1
    assert only(after["judges"], rater="judge")["agreement"]["value"] == 1


# ---- Labels


def choice(prompt, options, chosen, rater, **more):
    return Ranking(
        prompt=prompt, answers=options, rater=rater, ranks=tuple(1 if o == chosen else 2 for o in options), **more
    )


def test_what_is_a_label():
    options = ("x", "y", "z")
    labels = [choice(f"p{k}", options, options[k % 3], ANN) for k in range(4)]
    assert len(read_votes(labels).labels) == 4 and not read_votes(labels).pairs
    turned = labels[:2] + [choice("p2", options[::-1], "z", BOB)]  # the order of the options carries no meaning
    assert [label.option for label in read_votes(turned).labels] == [0, 1, 2]
    full = [*labels, Ranking(prompt="p9", answers=options, rater=BOB, ranks=(1, 2, 3))]
    assert not read_votes(full).labels  # answers that somebody ranks are ranked
    written = [dataclasses.replace(label, generators=("m", "n", "k")) for label in labels]
    assert not read_votes(written).labels and len(read_votes(written).votes) == 12
    one_prompt = [choice("p", options, "x", rater) for rater in (ANN, BOB)]
    assert not read_votes(one_prompt).labels
    two_options = [choice(f"p{k}", ("x", "y"), "x", ANN) for k in range(4)]
    assert not read_votes(two_options).labels and len(read_votes(two_options).votes) == 4


def test_labels_take_no_part_in_tables_of_pairs():
    options = tuple(f"l{k}" for k in range(5))
    report = quality([choice(f"p{k}", options, options[k % 5], r) for k in range(20) for r in (ANN, JUDGE)], **FAST)
    assert not report["habits"] and not report["agreement"]["comparisons"]["raters"] and not report["win_rates"]["rows"]
    (row,) = report["agreement"]["labels"]["raters"]
    assert (row["count"], row["agreement"]["value"], row["kappa"]["value"]) == (20, 1, 1)
    assert only(report["agreement"]["labels"]["judges"], rater="judge")["count"] == 20
    assert "Agreement of raters on labels" in quality_text(report)
