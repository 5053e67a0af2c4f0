"""Soft logic: Boolean logic on {0, 1}, numbers by hand in between, missing predicates against every completion."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.rewards.logic import And, Atom, Implies, Not, Or, atoms, logic_rewards, parse_formula, truth
from tests.rewards.everywhere import same_everywhere

NAMES = ("a", "b", "c", "d")
TNORMS = ("lukasiewicz", "product")
NAN = float("nan")

# Each formula with the Python expression that means the same.
FORMULAS = {
    "a": "a",
    "!a": "not a",
    "a & b & c": "a and b and c",
    "a | b | c": "a or b or c",
    "a -> b": "(not a) or b",
    "a <-> b": "a == b",
    "a & b | c & d": "(a and b) or (c and d)",
    "!a & b": "(not a) and b",
    "a | b & c -> d": "(not (a or (b and c))) or d",
    "a -> b -> c": "(not a) or ((not b) or c)",
    "a <-> b <-> c": "(a == b) == c",
    "a <-> b -> c": "a == ((not b) or c)",
    "a & !(b | c) -> d": "(not (a and not (b or c))) or d",
    "not a and (b or not not c)": "(not a) and (b or c)",
    "(a | !a) & (b -> (c & d))": "(not b) or (c and d)",
}
ALL = np.array(list(itertools.product([0, 1], repeat=4)), np.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.bool_])
@pytest.mark.parametrize("tnorm", TNORMS)
def test_boolean_logic_on_zero_and_one_in_every_assignment(tnorm, dtype):
    for text, meaning in FORMULAS.items():
        got = truth(parse_formula(text), NAMES, jnp.asarray(ALL, dtype), tnorm=tnorm)
        expected = [float(eval(meaning, dict(zip(NAMES, map(bool, row))))) for row in ALL]
        np.testing.assert_array_equal(got.values, expected, err_msg=text)
        assert got.valid.all()
        assert got.values.dtype == jnp.float32


def random_formula(rng: np.random.Generator, depth: int):
    """A formula and the Python expression that means the same."""
    kind = rng.integers(5) if depth else 0
    if kind == 0:
        name = str(rng.choice(NAMES))
        return Atom(name), name
    first, first_text = random_formula(rng, depth - 1)
    if kind == 1:
        return ~first, f"(not {first_text})"
    second, second_text = random_formula(rng, depth - 1)
    return [
        (first & second, f"({first_text} and {second_text})"),
        (first | second, f"({first_text} or {second_text})"),
        (first >> second, f"((not {first_text}) or {second_text})"),
    ][kind - 2]


def test_fifty_random_formulas_are_boolean_and_survive_being_written():
    rng = np.random.default_rng(0)
    for _ in range(50):
        formula, meaning = random_formula(rng, 3)
        expected = [float(eval(meaning, dict(zip(NAMES, map(bool, row))))) for row in ALL]
        for tnorm in TNORMS:
            np.testing.assert_array_equal(truth(formula, NAMES, ALL, tnorm=tnorm).values, expected, err_msg=meaning)
        assert str(parse_formula(str(formula))) == str(formula)


@pytest.mark.parametrize(
    "text, lukasiewicz, product",
    [
        ("a & b", 0.4, 0.48),
        ("a | b", 1.0, 0.92),
        ("!a", 0.2, 0.2),
        ("a -> b", 0.8, 0.68),
        ("b -> a", 1.0, 0.88),
        ("a & b & c", 0.0, 0.144),
        ("c & b", 0.0, 0.18),
        ("c | b", 0.9, 0.72),
        ("a <-> b", 0.8, 0.68 * 0.88),
    ],
)
def test_numbers_by_hand(text, lukasiewicz, product):
    predicates = jnp.array([0.8, 0.6, 0.3])
    for tnorm, expected in (("lukasiewicz", lukasiewicz), ("product", product)):
        value = truth(parse_formula(text), ("a", "b", "c"), predicates, tnorm=tnorm).values
        np.testing.assert_allclose(value, expected, atol=1e-6)


def test_text_becomes_the_expected_tree():
    a, b, c = map(Atom, "abc")
    assert parse_formula("a&b|!c") == Or((And((a, b)), Not(c)))
    assert parse_formula(" a -> b -> c ") == Implies(a, Implies(b, c))
    assert parse_formula("polite & !(long | rude) -> ok") == (
        (Atom("polite") & ~(Atom("long") | Atom("rude"))) >> Atom("ok")
    )
    assert atoms(parse_formula("b & (a | !b) -> x.y_2")) == ("b", "a", "x.y_2")
    assert parse_formula("Überlang & notable") == Atom("Überlang") & Atom("notable")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "expected the name of a rule at character 1, found the end"),
        ("a &", "the name of a rule at character 4, found the end"),
        ("a b", "expected & or .* at character 3, found b"),
        ("(a | b", r"a closing \) at character 7"),
        ("a ) b", "at character 3"),
        ("a = b", "'=' at character 3 is neither"),
        ("a & -b", "'-' at character 5"),
        ("!", "the name of a rule at character 2"),
        ("a or and b", "the name of a rule at character 6"),
        ("3a", "'3' at character 1"),
        ("(" * 5_000, "nested too deeply"),
    ],
)
def test_text_that_is_no_formula(text, message):
    with pytest.raises(UserError, match=message):
        parse_formula(text)


def test_an_unknown_predicate_and_a_wrong_number_of_them():
    with pytest.raises(UserError, match="no predicate is named z; there are a, b"):
        truth(parse_formula("a & z"), ("a", "b"), jnp.zeros((3, 2)))
    with pytest.raises(UserError, match="3 predicates, but 2 names"):
        truth(Atom("a"), ("a", "b"), jnp.zeros((3, 3)))


@pytest.mark.parametrize("tnorm", TNORMS)
def test_a_truth_is_known_where_every_completion_agrees(tnorm):
    """Formulas in which each predicate occurs once: the interval is then exact."""
    for text in ("a & b & c", "a | !b | c", "a & (b | !c)", "a -> b", "(a | b) -> (c & d)", "!(a & b) | (c -> d)"):
        formula, names = parse_formula(text), atoms(parse_formula(text))
        assignments = list(itertools.product([0.0, 1.0], repeat=len(names)))
        table = dict(zip(assignments, truth(formula, names, jnp.array(assignments), tnorm=tnorm).values.tolist()))
        rows = list(itertools.product([0.0, 1.0, None], repeat=len(names)))
        values = jnp.array([[7.0 if v is None else v for v in row] for row in rows])
        got = truth(formula, names, values, jnp.array([[v is not None for v in row] for row in rows]), tnorm=tnorm)
        for row, value, valid in zip(rows, got.values.tolist(), got.valid.tolist()):
            completions = {table[c] for c in itertools.product(*([0.0, 1.0] if v is None else [v] for v in row))}
            assert valid == (len(completions) == 1), (text, row)
            assert value == (completions.pop() if valid else 0.0)


def test_soft_predicates_leave_room_in_proportion():
    formula = parse_formula("a & b")
    known = truth(formula, ("a", "b"), jnp.array([[1e-8, NAN], [0.5, NAN], [0.0, 0.3]]), tnorm="product")
    assert known.valid.tolist() == [True, False, True]
    assert known.values[1] == 0.0


@pytest.mark.parametrize("tnorm", TNORMS)
def test_gradients_are_those_of_finite_differences_and_no_nan_gets_in(tnorm):
    formula = parse_formula("(a & b) | !(c -> d)")
    point = jnp.array([0.9, 0.7, 0.4, 0.35])

    def value(x):
        return truth(formula, NAMES, x, tnorm=tnorm).values

    numeric = [(value(point.at[i].add(1e-2)) - value(point.at[i].add(-1e-2))) / 2e-2 for i in range(4)]
    np.testing.assert_allclose(jax.grad(value)(point), numeric, atol=1e-3)
    assert np.abs(jax.grad(value)(point)).min() > 0.05
    missing = jnp.array([0.0, NAN, 0.4, NAN])
    gradient = jax.grad(lambda x: truth(formula, NAMES, x, jnp.isfinite(x), tnorm=tnorm).values)(missing)
    assert np.isfinite(gradient).all()


def test_gradients_at_the_corners_where_boolean_predicates_are():
    formula = parse_formula("a & b")
    for tnorm, point, expected in (
        ("product", [0.0, 0.0], [0, 0]),
        ("product", [0.0, 0.5], [0.5, 0]),
        ("product", [1.0, 0.0], [0, 1]),
        ("lukasiewicz", [1.0, 1.0], [1, 1]),
        ("lukasiewicz", [1.0, 0.0], [1, 1]),
        ("lukasiewicz", [0.0, 0.5], [0, 0]),
    ):
        gradient = jax.grad(lambda x, t=tnorm: truth(formula, ("a", "b"), x, tnorm=t).values)(jnp.array(point))
        np.testing.assert_array_equal(gradient, expected, err_msg=f"{tnorm} {point}")


def test_predicates_off_the_unit_interval_are_held_to_it():
    got = truth(parse_formula("a & b"), ("a", "b"), jnp.array([[1.7, 0.5], [-0.2, 0.5]]), tnorm="product")
    np.testing.assert_allclose(got.values, [0.5, 0.0])


# ---- Rewards

THREE = [parse_formula(text) for text in ("a", "!b", "a & b")]


def test_a_reward_is_the_weighted_sum_of_truths():
    predicates = jnp.array([[1.0, 0.0], [0.5, 1.0], [0.0, 0.25]])
    rewards, truths = logic_rewards(THREE, jnp.array([2.0, 1.0, -0.5]), ("a", "b"), predicates)
    np.testing.assert_allclose(truths.values, [[1, 1, 0], [0.5, 0, 0.5], [0, 0.75, 0]])
    np.testing.assert_allclose(rewards.values, [3.0, 0.75, 0.75], atol=1e-6)
    assert rewards.valid.all()
    assert truths.valid.all()


def test_missing_formulas_are_spoken_for_within_the_scale():
    predicates = jnp.array([[1.0, NAN], [NAN, NAN], [0.0, NAN]])
    rewards, truths = logic_rewards(THREE, jnp.array([2.0, 1.0, -0.5]), ("a", "b"), predicates)
    assert truths.valid.tolist() == [[True, False, False], [False] * 3, [True, False, True]]
    # Row 0: only `a` is known and it is true: as good as can be. Row 2: a is false, a & b surely is: .5 of 2.5 points.
    np.testing.assert_allclose(rewards.values, [3.0, 0.0, -0.5 + 3.5 * 0.5 / 2.5], atol=1e-6)
    assert rewards.valid.tolist() == [True, False, True]


def test_weights_learn():
    predicates = jnp.array([[1.0, 0.0], [0.5, 1.0]])
    gradient = jax.grad(lambda w: logic_rewards(THREE, w, ("a", "b"), predicates)[0].values.sum())(
        jnp.array([2.0, 1.0, 0.5])
    )
    np.testing.assert_allclose(gradient, [1.5, 1.0, 0.5], atol=1e-6)


def test_no_formula_no_reward():
    with pytest.raises(UserError, match="at least one formula"):
        logic_rewards([], jnp.zeros(0), ("a",), jnp.zeros((2, 1)))


@pytest.mark.parametrize("tnorm", TNORMS)
def test_everywhere(tnorm):
    rng = np.random.default_rng(1)
    predicates = rng.random((8, 4)).astype(np.float32)
    valid = rng.random((8, 4)) > 0.3
    predicates[~valid] = NAN
    formulas = [parse_formula(text) for text in list(FORMULAS)[-4:]]
    weights = jnp.linspace(-1, 2, len(formulas))

    def fn(predicates, valid):
        return logic_rewards(formulas, weights, NAMES, predicates, valid, tnorm=tnorm)

    _, truths = same_everywhere(fn, predicates, valid)
    assert 0 < truths.valid.mean() < 1
