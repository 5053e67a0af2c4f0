"""Formulas over predicates as differentiable soft logic in [0, 1], and Boolean logic on {0, 1}.

A formula is a small tree, built in Python (`Atom("polite") & ~Atom("long")`) or read from text. It is part of the
program, not of the data: under `jit` it is a constant, the predicates are arrays.

A missing predicate is neither true nor false. Truth is computed as the interval that it leaves open (every connective
is monotone in each argument, so the interval's ends are the truth at the ends): `rude & missing` is known to be 0 where
`rude` is 0, and is missing where `rude` is 1.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from rlaif_jax.config import UserError, require
from rlaif_jax.rewards.shaping import Masked, combine

TNorm = Literal["lukasiewicz", "product"]


class _Connectives:
    """Python's operators on formulas: `&`, `|`, `~`, and `>>` for "implies"."""

    def __and__(self: Formula, other: Formula) -> And:  # type: ignore[misc]
        return And((self, other))

    def __or__(self: Formula, other: Formula) -> Or:  # type: ignore[misc]
        return Or((self, other))

    def __rshift__(self: Formula, other: Formula) -> Implies:  # type: ignore[misc]
        return Implies(self, other)

    def __invert__(self: Formula) -> Not:  # type: ignore[misc]
        return Not(self)


@dataclasses.dataclass(frozen=True)
class Atom(_Connectives):
    """A predicate by its name."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class Not(_Connectives):
    """1 - x."""

    part: Formula

    def __str__(self) -> str:
        return f"!{self.part}"


@dataclasses.dataclass(frozen=True)
class And(_Connectives):
    """All of the parts."""

    parts: tuple[Formula, ...]

    def __str__(self) -> str:
        return f"({' & '.join(map(str, self.parts))})"


@dataclasses.dataclass(frozen=True)
class Or(_Connectives):
    """At least one of the parts."""

    parts: tuple[Formula, ...]

    def __str__(self) -> str:
        return f"({' | '.join(map(str, self.parts))})"


@dataclasses.dataclass(frozen=True)
class Implies(_Connectives):
    """If `left` then `right`: !left | right."""

    left: Formula
    right: Formula

    def __str__(self) -> str:
        return f"({self.left} -> {self.right})"


Formula: TypeAlias = Atom | Not | And | Or | Implies


def atoms(formula: Formula) -> tuple[str, ...]:
    """Returns the names of the predicates of a formula, each once, in order of appearance."""
    match formula:
        case Atom(name):
            return (name,)
        case Not(part):
            return atoms(part)
        case And(parts) | Or(parts):
            return tuple(dict.fromkeys(name for part in parts for name in atoms(part)))
        case Implies(left, right):
            return tuple(dict.fromkeys(atoms(left) + atoms(right)))


# ---- From text

_TOKEN = re.compile(r"\s*(?:(?P<name>[^\W\d][\w.]*)|(?P<mark><->|->|[!&|()])|(?P<end>$)|(?P<bad>\S))")
_WORDS = {"and": "&", "or": "|", "not": "!"}


class _Token(NamedTuple):
    """A token of a formula's text.

    kind: "name", "mark" or "end"; place: its first character, counted from 1.
    """

    kind: str
    text: str
    place: int


def parse_formula(text: str) -> Formula:
    """Reads a formula from text such as `polite & !(long | rude) -> ok`.

    Names are letters, digits, `_` and `.`, and begin with a letter or `_`. `!` (or `not`) binds tightest, then `&`
    (`and`), `|` (`or`), `->` and last `<->`; `a -> b -> c` is `a -> (b -> c)`; parentheses as usual.

    Raises:
        UserError: the text is no formula; the message says at which character, counted from 1.
    """
    parser = _Parser(text, _tokens(text)[::-1])
    try:
        formula = parser.equivalence()
    except RecursionError as error:
        raise UserError(f"formula {text[:60]!r} ...: nested too deeply") from error
    if parser.rest[-1].kind != "end":
        raise parser.wrong("& or | or -> or <-> or the end")
    return formula


def _tokens(text: str) -> list[_Token]:
    """Returns the tokens of a formula's text; the last one is its end."""
    tokens: list[_Token] = []
    position = 0
    while not tokens or tokens[-1].kind != "end":
        found = _TOKEN.match(text, position)
        assert found is not None and found.lastgroup is not None
        kind, token = found.lastgroup, found[found.lastgroup]
        place, position = found.start(kind) + 1, found.end()
        if kind == "bad":
            raise UserError(
                f"formula {text!r}: {token!r} at character {place} is neither a name nor one of ! & | -> <-> ( )"
            )
        word = _WORDS.get(token)
        tokens.append(_Token("mark", word, place) if word else _Token(kind, token, place))
    return tokens


@dataclasses.dataclass(frozen=True)
class _Parser:
    """Reads a formula by recursive descent, with a method for each strength of binding.

    `rest` has the next token last.
    """

    text: str
    rest: list[_Token]

    def accept(self, mark: str) -> bool:
        """Removes the next token if it is `mark`, and returns whether it was."""
        if self.rest[-1][:2] != ("mark", mark):
            return False
        self.rest.pop()
        return True

    def wrong(self, expected: str) -> UserError:
        """Returns the error that the next token is not what was expected."""
        _, token, place = self.rest[-1]
        return UserError(f"formula {self.text!r}: expected {expected} at character {place}, found {token or 'the end'}")

    def unary(self) -> Formula:
        if self.accept("!"):
            return Not(self.unary())
        if self.accept("("):
            inside = self.equivalence()
            if not self.accept(")"):
                raise self.wrong("a closing )")
            return inside
        if self.rest[-1].kind != "name":
            raise self.wrong("the name of a rule")
        return Atom(self.rest.pop().text)

    def chain(self, below: Callable[[], Formula], mark: str, made: type[And] | type[Or]) -> Formula:
        parts = [below()]
        while self.accept(mark):
            parts.append(below())
        return parts[0] if len(parts) == 1 else made(tuple(parts))

    def disjunction(self) -> Formula:
        return self.chain(lambda: self.chain(self.unary, "&", And), "|", Or)

    def implication(self) -> Formula:
        left = self.disjunction()
        return Implies(left, self.implication()) if self.accept("->") else left

    def equivalence(self) -> Formula:
        left = self.implication()
        while self.accept("<->"):
            right = self.implication()
            left = And((Implies(left, right), Implies(right, left)))
        return left


# ---- Truth


def truth(
    formula: Formula,
    names: Sequence[str],
    predicates: jax.Array,
    valid: jax.Array | None = None,
    *,
    tnorm: TNorm = "lukasiewicz",
) -> Masked:
    """Computes the truth of a formula from its predicates.

    Both t-norms have !a = 1 - a and a -> b = !a | b, which for Lukasiewicz is its residuum min(1, 1 - a + b), and for
    the product Reichenbach's implication 1 - a + ab, which unlike the residuum has a gradient everywhere (van Krieken
    2022, section 5). On {0, 1} each is Boolean logic, exactly.

    Args:
        formula: its atoms are among `names`.
        names: names of the P predicates.
        predicates: [..., P] in [0, 1]; NaN is missing, a value outside is clipped.
        valid: [..., P] bool, false where a predicate is missing. None: all are valid.
        tnorm: "lukasiewicz": a & b = max(0, a + b - 1), a | b = min(1, a + b). "product": a & b = ab,
            a | b = a + b - ab.

    Returns:
        The truth [...]; valid where the missing predicates leave its interval at most 1e-6 wide. An atom that occurs
        twice counts as two, so `a | !a` is missing where `a` is.

    Raises:
        UserError: the formula has an atom that is not in `names`, or there are not P names.
    """
    require(
        predicates.shape[-1] == len(names),
        f"{predicates.shape[-1]} predicates, but {len(names)} names: {', '.join(names)}",
    )
    place = {name: index for index, name in enumerate(names)}
    unknown = [name for name in atoms(formula) if name not in place]
    require(not unknown, f"formula {formula}: no predicate is named {', '.join(unknown)}; there are {', '.join(names)}")
    known = ~jnp.isnan(predicates) if valid is None else valid.astype(bool) & ~jnp.isnan(predicates)
    values = _within(jnp.where(known, predicates, 0).astype(jnp.float32))
    low, high = _interval(formula, place, values, jnp.where(known, values, 1.0), tnorm)
    certain = high - low <= 1e-6
    return Masked(jnp.where(certain, 0.5 * (low + high), 0.0), certain)


def _interval(
    formula: Formula, place: dict[str, int], low: jax.Array, high: jax.Array, tnorm: TNorm
) -> tuple[jax.Array, jax.Array]:
    """Returns the least and the greatest truth [...] of a formula.

    Each predicate lies between `low` and `high` [..., P].
    """

    def inside(part: Formula) -> tuple[jax.Array, jax.Array]:
        return _interval(part, place, low, high, tnorm)

    match formula:
        case Atom(name):
            return low[..., place[name]], high[..., place[name]]
        case Not(part):
            least, most = inside(part)
            return 1 - most, 1 - least
        case And(parts):
            lows, highs = zip(*map(inside, parts))
            return _conjunction(lows, tnorm), _conjunction(highs, tnorm)
        case Or(parts):
            return inside(Not(And(tuple(Not(part) for part in parts))))
        case Implies(left, right):
            return inside(Or((Not(left), right)))


def _conjunction(parts: Sequence[jax.Array], tnorm: TNorm) -> jax.Array:
    stacked = jnp.stack(parts)
    if tnorm == "product":
        return stacked.prod(0)
    return _within(1.0 - (1.0 - stacked).sum(0))


def _within(x: jax.Array) -> jax.Array:
    """Returns x clipped to [0, 1], with gradient 1 at 0 and 1.

    Boolean predicates are at 0 and 1, where the gradient of `jnp.clip` is a half.
    """
    return jnp.where(x < 0, 0.0, jnp.where(x > 1, 1.0, x))


def logic_rewards(
    formulas: Sequence[Formula],
    weights: jax.Array,
    names: Sequence[str],
    predicates: jax.Array,
    valid: jax.Array | None = None,
    *,
    tnorm: TNorm = "lukasiewicz",
) -> tuple[Masked, Masked]:
    """Computes rewards sum_f weights[f] truth_f of F formulas over predicates.

    Formulas whose truth is missing are left out and the others represent them (`combine`, with a negative weight read as
    a positive weight of the formula's contrary), so that a reward always lies between the sum of the negative and the
    sum of the positive weights. A reward without any valid truth is missing.

    Args:
        formulas: at least one.
        weights: [F], negative for what should not hold; may be traced.
        names: names of the P predicates.
        predicates: [..., P] in [0, 1].
        valid: [..., P] bool, false where a predicate is missing. None: all are valid.
        tnorm: as in `truth`.

    Returns:
        (rewards [...], truths [..., F]).

    Raises:
        UserError: there is no formula, or one has an atom that is not in `names`.
    """
    require(bool(formulas), "a reward by logic needs at least one formula")
    each = [truth(formula, names, predicates, valid, tnorm=tnorm) for formula in formulas]
    truths = Masked(jnp.stack([one.values for one in each], -1), jnp.stack([one.valid for one in each], -1))
    weights = jnp.asarray(weights).astype(jnp.float32)
    # -w t = w (1 - t) - w: with all weights positive the present formulas are a fair sample of the scale.
    wanted = jnp.where(weights < 0, 1.0 - truths.values, truths.values)
    rewards = combine(wanted, truths.valid, jnp.abs(weights))
    lowest = jnp.minimum(weights, 0.0).sum(-1)
    return Masked(jnp.where(rewards.valid, rewards.values + lowest, 0.0), rewards.valid), truths
