"""Replies as verdicts: log-probabilities, words, both orders."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, logit

from rlaif_jax.config import UserError
from rlaif_jax.feedback.api.builtin_templates import CORRECTION, CRITIQUE, PAIRWISE, RATING
from rlaif_jax.feedback.api.replies import Reply, Token
from rlaif_jax.feedback.api.template_files import parse_template
from rlaif_jax.feedback.api.templates import Question, RenderedQuestion
from rlaif_jax.feedback.api.verdicts import (
    ParsedVerdict,
    choice_distribution,
    make_judgement,
    preference,
    read_verdict,
)
from rlaif_jax.feedback.records.forms import Ranking, Rater

ASKED = RenderedQuestion((), "abc123")
JUDGE = Rater("judge", "ai")


def top(**probabilities: float) -> list[tuple[str, float]]:
    return [(name.replace("_", " "), math.log(p)) for name, p in probabilities.items()]


def test_variants_of_a_label_are_summed_and_the_mass_is_recorded():
    probabilities, mass = choice_distribution(top(A=0.4, _A=0.2, B=0.1, _B=0.1, The=0.1), ["A", "B"])
    assert probabilities == pytest.approx((0.75, 0.25)) and mass == pytest.approx(0.8)


def test_a_label_that_is_not_shown_is_at_most_the_smallest_shown():
    # .7 + .2 are shown, the rest is .1: B can have .1 at most
    probabilities, mass = choice_distribution(top(A=0.7, The=0.2), ["A", "B"])
    assert probabilities == pytest.approx((0.7 / 0.8, 0.1 / 0.8)) and mass == pytest.approx(0.7)
    # the smallest shown is .02, though more is left over
    probabilities, _ = choice_distribution(top(A=0.7, The=0.02), ["A", "B"])
    assert probabilities == pytest.approx((0.7 / 0.72, 0.02 / 0.72))
    # the sampled token was added by the server: its .001 is no bound
    probabilities, _ = choice_distribution(top(A=0.7, The=0.02, x=0.001), ["A", "B"], "x")
    assert probabilities == pytest.approx((0.7 / 0.72, 0.02 / 0.72))
    assert choice_distribution(top(The=0.9), ["A", "B"]) == ((), 0.0)


def test_a_label_that_is_not_shown_is_never_impossible():
    for rounded_up in (1.0, 1.0 + 1e-9):  # what is shown has all the mass, by rounding
        shown = [("A", math.log(0.75)), ("The", math.log(rounded_up - 0.75))]
        probabilities, _ = choice_distribution(shown, ["A", "B", "C"])
        assert probabilities[1] == probabilities[2] == pytest.approx(0.5e-7 / (0.75 + 1e-7))
    tiny = [("A", 0.0), ("The", math.log(1e-12))]
    assert choice_distribution(tiny, ["A", "B"])[0][1] == pytest.approx(1e-12)


def test_words_as_labels_are_known_by_how_they_begin():
    probabilities, mass = choice_distribution(top(Ye=0.5, _Yes=0.1, N=0.2, yes=0.1), ["Yes", "No"])
    assert probabilities == pytest.approx((0.75, 0.25)) and mass == pytest.approx(0.8)
    assert choice_distribution(top(N=0.5, No=0.3, Yes=0.1), ["Yes", "No", "Neither"])[1] == pytest.approx(0.4)


def direct(*tokens: tuple[str, dict[str, float]], template=PAIRWISE, **settings) -> ParsedVerdict:
    made = tuple(Token(text, tuple(top(**probabilities))) for text, probabilities in tokens)
    return read_verdict(Reply("".join(t.text for t in made), made), template, ASKED, direct=True, **settings)


def test_a_direct_label():
    verdict = direct(("A", {"A": 0.6, "B": 0.3}))
    assert verdict.status == "ok" and verdict.label == "A"
    tie = min(0.3, 0.1)  # C is not shown
    assert verdict.value == pytest.approx((0.6 + tie / 2) / (0.9 + tie))
    verdict = direct(("B", {"A": 0.3, "B": 0.2, "C": 0.5}))
    assert verdict.status == "tie" and verdict.value == pytest.approx(0.55)
    verdict = direct((" ", {"_": 1.0}), ("A", {"A": 0.9, "B": 0.1}))
    assert verdict.label == "A"


def test_little_mass_is_no_answer():
    verdict = direct(("Well", {"Well": 0.6, "A": 0.2, "B": 0.1}))
    assert verdict.status == "abstained" and verdict.label_mass == pytest.approx(0.3) and verdict.probabilities == ()
    assert direct(("Well", {"Well": 0.6, "A": 0.2, "B": 0.1}), min_mass=0.25).status == "ok"


def test_a_rating_is_the_expected_score():
    letters = dict(zip("ABCDEFGHIJ", [0.01, 0.01, 0.01, 0.01, 0.01, 0.05, 0.5, 0.3, 0.05, 0.05]))
    verdict = direct(("G", letters), template=RATING)
    assert verdict.value == pytest.approx(sum(p * (i + 1) for i, p in enumerate(letters.values())))
    assert verdict.label == "G"


def words(text: str, template=PAIRWISE) -> ParsedVerdict:
    return read_verdict(Reply(text), template, ASKED, direct=False)


def test_the_last_verdict_counts():
    assert words("Verdict abc123: A\nNo, wait.\nVerdict abc123: B").label == "B"
    assert words("... so **Verdict abc123: B**.").value == 0.0
    assert words("Verdict  abc123:\n A").label == "A"
    assert words("Verdict abc123: C").status == "tie"


@pytest.mark.parametrize(
    "text",
    [
        "A is better",
        "Verdict: A",
        "Verdict 123abc: A",
        "[[A]]",
        "Verdict abc123: LETTER",
        "Verdict abc123: A or B",
        "Verdict abc123: a tie",
        "Verdict abc123:",
        "",
    ],
)
def test_prose_is_no_verdict(text: str):
    assert words(text).status == "unparsed"


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m sorry, I cannot compare these.",
        "Sorry, I am unable to judge this.",
        "I cannot assist with this request.",
        "As an AI, I have no opinions.",
    ],
)
def test_refusals(text: str):
    assert words(text).status == "refused" and words(text, CRITIQUE).status == "refused"


def test_what_is_no_refusal():
    assert words("I cannot see any fault in this answer.", CRITIQUE).status == "ok"
    assert words("I'm sorry, I can't like it. Verdict abc123: B").status == "ok"
    assert read_verdict(Reply("", refusal="no"), PAIRWISE, ASKED, direct=True).status == "refused"


def test_probabilities_after_reasons_are_those_at_the_verdict():
    tokens = (
        Token("A", tuple(top(A=0.9, B=0.1))),
        Token(" is fine.\n", ()),
        Token("Verdict", ()),
        Token(" abc123:", ()),
        Token(" B", tuple(top(_A=0.3, _B=0.5, _C=0.2))),
        Token("</s>", ()),
    )
    reply = Reply("A is fine.\nVerdict abc123: B", tokens)
    verdict = read_verdict(reply, PAIRWISE, ASKED, direct=False)
    assert verdict.label == "B" and verdict.value == pytest.approx(0.3 + 0.1) and verdict.label_mass == pytest.approx(1)


def test_words_between_tags():
    assert words("Sure. <corrected-abc123>\nA b.\n</corrected-abc123>", CORRECTION).text == "A b."
    assert (
        words(
            "Between <corrected-abc123> and </corrected-abc123>: <corrected-abc123>x</corrected-abc123>", CORRECTION
        ).text
        == "x"
    )
    assert words("<corrected-abc123></corrected-abc123>", CORRECTION)[:1] == ("ok",)  # everything was wrong
    assert words("<corrected-abc123>cut short", CORRECTION).status == "unparsed"
    assert words("<corrected>x</corrected>", CORRECTION).status == "unparsed"


def ranking(p_first_slot: float, order: tuple[int, int], *, soft: bool = True) -> Ranking:
    verdict = ParsedVerdict("ok", "A", p_first_slot, (p_first_slot, 1 - p_first_slot) if soft else ())
    made = make_judgement(Question("p", ("a", "b")), PAIRWISE, verdict, order=order, rater=JUDGE)
    assert isinstance(made, Ranking)
    return made


@given(st.floats(-8, 8), st.floats(-8, 8))
def test_a_bias_in_the_log_odds_cancels_exactly(delta: float, bias: float):
    pair = [ranking(float(expit(delta + bias)), (0, 1)), ranking(float(expit(-delta + bias)), (1, 0))]
    found = preference(pair)
    assert found is not None and found.bias is not None
    assert logit(found.probability) == pytest.approx(delta, abs=1e-6)
    assert found.bias == pytest.approx(bias, abs=1e-6)


def test_the_mean_of_probabilities_is_lees():
    found = preference([ranking(0.9, (0, 1)), ranking(0.6, (1, 0))], debias="mean")
    assert found is not None and found.probability == pytest.approx((0.9 + 0.4) / 2)


def test_an_order_conflict_is_kept_as_such_and_a_missing_order_gives_nothing():
    found = preference([ranking(1.0, (0, 1), soft=False), ranking(1.0, (1, 0), soft=False)])
    assert found == (0.5, None, False)
    assert preference([ranking(1.0, (0, 1), soft=False), ranking(0.0, (1, 0), soft=False)]) == (1.0, None, True)
    missing = make_judgement(Question("p", ("a", "b")), PAIRWISE, ParsedVerdict("error"), order=(1, 0), rater=JUDGE)
    assert preference([ranking(0.9, (0, 1)), missing]) is None
    with pytest.raises(UserError, match="rankings of two answers"):
        preference(
            [make_judgement(Question("p", ("a",)), RATING, ParsedVerdict("ok", "A", 1.0), order=(0,), rater=JUDGE)]
        )


def test_ranks_follow_the_answers_and_not_the_order_shown():
    assert ranking(0.9, (0, 1)).ranks == (1, 2) and ranking(0.9, (1, 0)).ranks == (2, 1)
    assert ranking(0.9, (1, 0)).probability == pytest.approx(0.1)
    assert ranking(0.9, (1, 0)).shown == (1, 0)


NUMBERS = parse_template("form: rating\nlabels: 1 .. 10\nverdict: Score: {label}\n[user]\n{prompt} {answer}\n", "n")
FALLING = parse_template(
    "form: rating\nlabels: 5 = 5, 4 = 4, 3 = 3, 2 = 2, 1 = 1\nverdict: Score: {label}\n[user]\n{prompt} {answer}\n", "f"
)


@pytest.mark.parametrize(
    "text",
    ["**Verdict abc123:** A", "**Verdict abc123: A**", "**Verdict abc123**: A", "Verdict abc123: [A]", "Verdict abc123: `A`",
     "Verdict abc123: <A>", "Verdict abc123: (A)", 'Verdict abc123: "A"', "Verdict abc123: $\\boxed{A}$", "Verdict abc123 : A",
     "Verdict abc123: \\boxed{\\text{A}}", "verdict abc123: A", "Verdict abc123:\n\n**A**", "Verdict `abc123`: A",
     "Verdict abc123: A.", "Verdict abc123: A, because B is short", "Verdict abc123: A\nB is short"],
)  # fmt: skip
def test_spellings_of_a_label(text: str):
    assert words(text).label == "A"


@pytest.mark.parametrize(
    "rest", [" or B", ", B", " > B", ">B", "/B", " = B", " | B", " vs. B", " B", "-B", "+", "-", "** or **B**"]
)
def test_two_labels_are_no_verdict(rest: str):
    assert words(f"Verdict abc123: A{rest}").status == "unparsed"


@pytest.mark.parametrize(
    ("text", "value"),
    [("8.5/10", 8.5), ("8/10", 8), ("8 / 10.", 8), ("**8**/10", 8), ("8 out of 10", 8), ("7 (out of 10)", 7), ("8.75", 8.75),
     ("7.", 7), ("10", 10), ("\\boxed{8.5}", 8.5), ("[8]", 8), ("7 points", 7), ("+8", 8), ("8.5/10.0", 8.5),
     ("9.5 or 10", None), ("4.5-5", None), ("9.5\u201310", None), ("8 to 9", None), ("85/100", None), ("8/100", None),
     ("8 (out of 100)", None), ("8,5", None), ("1,000", None), ("8%", None), ("8th", None), ("1e1", None), ("8 1/2", None),
     ("7.5.1", None), ("12", None), ("-3", None), ("8 9", None)],
)  # fmt: skip
def test_numbers(text: str, value: float | None):
    verdict = words(f"Fine. Score: {text}", NUMBERS)
    assert (verdict.status, verdict.value) == ("ok", value) if value is not None else verdict.status == "unparsed"


@given(st.integers(100, 1000))
def test_a_number_is_read_whole_or_not_at_all(hundredths: int):
    number = f"{hundredths / 100:g}"
    for text in (number, f"**{number}**", f"{number}/10", f"{number} out of 10."):
        assert words(f"Score: {text}", NUMBERS).value == hundredths / 100
    for text in (f"{number}/100", f"{number}-{number}", f"{number} or 3", f"{number}x", f"{number},5"):
        assert words(f"Score: {text}", NUMBERS).status == "unparsed"


def test_a_falling_scale():
    assert [words(f"Score: {number}", FALLING).value for number in (1, 2.5, 5)] == [1, 2.5, 5]
    assert words("Score: 6", FALLING).status == "unparsed" == words("Score: 0", FALLING).status


def test_labels_with_marks_of_their_own():
    text = "form: ranking\nlabels: (a) = first, (b) = second\nverdict: Best: {label}\n[user]\n{prompt} {answer_1} {answer_2}\n"
    template = parse_template(text, "marks")
    assert words("Best: (a)", template).label == "(a)" and words("Best: **(b)**", template).label == "(b)"
    assert words("Best: a", template).status == "unparsed"


@pytest.mark.parametrize(
    "text",
    ["Sorry to be harsh, but the answer can't be trusted.", "I am sorry but the answer cannot be called accurate.",
     "As an AI answer it is fine.", "As an AI assistant's reply, this is good: it is polite.", "I can't fault it."],
)  # fmt: skip
def test_critiques_that_begin_like_refusals(text: str):
    assert words(text, CRITIQUE).status == "ok"


def test_what_was_cut_is_no_verdict():
    cut = lambda text, template: read_verdict(Reply(text, finish="length"), template, ASKED, direct=False)
    assert cut("Score: 1", NUMBERS).status == "unparsed"  # of "10", perhaps
    assert cut("Score: 8.", NUMBERS).value == 8
    assert cut("Verdict abc123: A", PAIRWISE).status == "unparsed"  # of "A or B", perhaps
    assert cut("Verdict abc123: A\nThis is", PAIRWISE).label == "A"
    assert cut("<corrected-abc123>a b", CORRECTION).status == "unparsed"
    whole = parse_template("form: correction\n[user]\n{prompt} {answer}\n", "whole")
    assert cut("a b", whole).status == "unparsed" and words("a b", whole).text == "a b"
    assert cut("It is", CRITIQUE).text == "It is"
    thoughts = lambda finish: Reply("", finish=finish, thoughts="Verdict abc123: A?\nNo.\nVerdict abc123: B")
    assert read_verdict(thoughts("length"), PAIRWISE, ASKED, direct=False).status == "unparsed"
    # Some servers file a whole reply under thoughts.
    assert read_verdict(thoughts("stop"), PAIRWISE, ASKED, direct=False).label == "B"
    assert read_verdict(Reply("", thoughts="It is fine."), CRITIQUE, ASKED, direct=False).status == "unparsed"


def test_a_label_after_thoughts_has_its_log_probabilities():
    tokens = (
        Token("<think>", tuple(top(x=1.0))),
        Token("A</think>", ()),
        Token("\n", ()),
        Token("B", tuple(top(A=0.2, B=0.8))),
    )
    verdict = read_verdict(Reply("\nB", tokens, thoughts="<think>A</think>"), PAIRWISE, ASKED, direct=True)
    assert verdict.label == "B" and verdict.label_mass == pytest.approx(1)


def test_a_constrained_reply_counts_by_its_text_where_the_log_probabilities_are_older():
    tokens = (Token("A", tuple(top(Well=0.9, A=0.06, B=0.04))),)
    for constrained, status in ((False, "abstained"), (True, "ok")):
        verdict = read_verdict(Reply("A", tokens), PAIRWISE, ASKED, direct=True, constrained=constrained)
        assert verdict.status == status and verdict.label_mass == pytest.approx(0.1) and verdict.probabilities == ()
    assert read_verdict(Reply("Well", tokens), PAIRWISE, ASKED, direct=True, constrained=True).status == "abstained"


@pytest.mark.parametrize("template", [PAIRWISE, CORRECTION, CRITIQUE, NUMBERS], ids=lambda template: template.name)
def test_the_time_of_reading_grows_with_the_length(template):
    """A reply that a limit has cut may be blanks, or whatever else a sampler repeats: CPU time, whatever else runs."""
    units = [" ", "\n", "<", "[", "*", "1", "1.", "A or ", "Score: ", "Score: *", "<think>", "Verdict abc123: (", "I can't ",
             "<corrected-abc123>", "<corrected-abc123> ", "</corrected-abc123>", "sorry "]  # fmt: skip
    for unit in units:
        for before in ("", "<corrected-abc123>", "Verdict abc123: ", "Score: "):
            text = before + unit * (100_000 // len(unit))
            started = time.thread_time()
            read_verdict(Reply(text), template, ASKED, direct=False)
            assert time.thread_time() - started < 0.05, (before, unit)  # a quadratic pattern takes minutes
