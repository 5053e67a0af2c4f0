"""A constitution: one TOML file of principles for judges, and of rules and formulas for machines.

    name = "kind and brief"            # the rater of its feedback is named rule/kind and brief
    logic = "lukasiewicz"              # or "product": see `rewards.logic.truth`

    [[principle]]                      # for judges, and for critique and revision
    name = "kind"
    text = "Choose the answer that is kinder."
    critique = "Say where the answer is unkind."            # optional, as are revision and weight (of being drawn)
    revision = "Rewrite the answer so that it is kind."

    [[rule]]                           # a predicate of an answer, in [0, 1] or missing
    name = "rude"
    words = ["idiot", "shut up"]       # exactly one of words, pattern, length, predicate, exemplar
    at_least = 1                       # the bounds of the measure; this one is the default for words and patterns

    [[rule]]
    name = "brief"
    length = "words"                   # characters, words, sentences, lines, paragraphs
    at_most = 50
    soft = 20                          # falls from 1 at 50 words to 0 at 70

    [[rule]]
    name = "fresh"
    # A function of (prompt, answer). It is imported: read only files that you trust.
    predicate = "rlaif_jax.feedback.constitution.rules:fresh_words"

    [[rule]]
    name = "like_this"
    exemplar = "Of course, I am glad to help."              # cosine under the caller's encoder
    at_least = 0.8
    soft = 0.4

    [[formula]]                        # the reward is the weighted sum of the formulas' truths
    name = "decent"
    formula = "brief & !rude"
    weight = 2.0
    praise = "Kind and to the point."  # optional: the comment where the formula holds, and where not
    blame = "Rude, or too long."

Every message about a file begins with its name and the line.
"""

from __future__ import annotations

import hashlib
import pkgutil
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import regex

from rlaif_jax.config import UserError, require
from rlaif_jax.data.prompts import Record
from rlaif_jax.feedback.constitution.rules import (
    Exemplar,
    Length,
    Measure,
    MeasuredText,
    Pattern,
    Predicate,
    Rule,
    Unit,
    apply_rule,
    word_pattern,
)
from rlaif_jax.feedback.constitution.toml_lines import TomlEntry, read_entries
from rlaif_jax.feedback.judges.embeddings import Encoder, similarities
from rlaif_jax.feedback.sources import FeedbackSource
from rlaif_jax.rewards.logic import Formula, TNorm, atoms, logic_rewards, parse_formula
from rlaif_jax.rewards.shaping import Masked
from rlaif_jax.types import Feedback, Rollout

SECTIONS = ("principle", "rule", "formula")
MEASURES = ("words", "pattern", "length", "predicate", "exemplar")


@dataclass(frozen=True)
class ConstitutionPrinciple:
    """A principle in words.

    Attributes:
        name: its name.
        text: the principle as a judge reads it.
        critique, revision: the requests to a writer (Bai 2022).
        weight: how often it is drawn, in relation to the other principles.
        line: the line of its [[principle]] in the file.
    """

    name: str
    text: str
    critique: str
    revision: str
    weight: float = 1.0
    line: int = 0


@dataclass(frozen=True)
class WeightedFormula:
    """A formula over rules.

    Attributes:
        name: its name.
        formula: the formula.
        weight: the reward of its full truth; below 0 where the formula is unwanted.
        praise: the comment on an answer that is right by this formula.
        blame: the comment on any other answer.
        line: the line of its [[formula]] in the file.
    """

    name: str
    formula: Formula
    weight: float
    praise: str
    blame: str
    line: int = 0


@dataclass(frozen=True)
class Constitution:
    """The content of a constitution file.

    Attributes:
        name: the name of the constitution.
        principles, rules, formulas: the entries, in the order of the file.
        logic: the t-norm by which truths of formulas are computed.
        path: the file.
        hash: the SHA-256 of its text.
    """

    name: str
    principles: tuple[ConstitutionPrinciple, ...]
    rules: tuple[Rule, ...]
    formulas: tuple[WeightedFormula, ...]
    logic: TNorm
    path: Path
    hash: str

    @cached_property
    def rule_names(self) -> tuple[str, ...]:
        """Returns the names of the rules, in the order of the axis P of `RuleValues`."""
        return tuple(rule.name for rule in self.rules)

    @property
    def scale(self) -> tuple[float, float]:
        """Returns the lowest and the highest possible reward, which depend on the signs of the weights."""
        weights = [formula.weight for formula in self.formulas]
        return sum(min(w, 0.0) for w in weights), sum(max(w, 0.0) for w in weights)

    def where(self, line: int) -> str:
        """Returns `file:line`."""
        return f"{self.path}:{line}"


# ---- Reading


def load_constitution(path: Path) -> Constitution:
    """Reads the constitution in a TOML file of the shape above.

    The modules that its predicates name are imported: read only files that you would run.

    Raises:
        UserError: with file and line: no valid TOML, an unknown section or field, a field that is missing or
            of the wrong kind, a name used twice, a pattern that is no regular expression, a predicate that
            cannot be imported, a formula that cannot be read or names an unknown rule, bounds that no measure
            can meet.
    """
    text, entries = read_entries(Path(path), SECTIONS)
    top = entries[0]
    name = top.text("name", Path(path).stem)
    logic: TNorm = top.choice("logic", get_args(TNorm), "lukasiewicz")  # type: ignore[assignment]
    top.done()
    chosen = {section: [entry for entry in entries if entry.section == section] for section in SECTIONS}
    for section in SECTIONS:
        _distinct_names(chosen[section])
    rules = tuple(_rule(entry) for entry in chosen["rule"])
    return Constitution(
        name=name,
        principles=tuple(_principle(entry) for entry in chosen["principle"]),
        rules=rules,
        formulas=tuple(_formula(entry, [rule.name for rule in rules]) for entry in chosen["formula"]),
        logic=logic,
        path=Path(path),
        hash=hashlib.sha256(text.encode()).hexdigest(),
    )


def _distinct_names(entries: Sequence[TomlEntry]) -> None:
    first: dict[str, TomlEntry] = {}
    for entry in entries:
        name = entry.text("name")
        if name in first:
            raise entry.wrong("name", f"name {name!r} is taken by line {first[name].line}")
        first[name] = entry


def _principle(entry: TomlEntry) -> ConstitutionPrinciple:
    text = entry.text("text")
    principle = ConstitutionPrinciple(
        name=entry.text("name"),
        text=text,
        critique=entry.text(
            "critique", f"Identify specific ways in which the answer falls short of this principle: {text}"
        ),
        revision=entry.text("revision", f"Rewrite the answer so that it follows this principle: {text}"),
        weight=entry.number("weight", 1.0),
        line=entry.line,
    )
    if principle.weight < 0:
        raise entry.wrong("weight", f"weight is {principle.weight:g}: a principle is drawn with a weight of 0 or more")
    entry.done()
    return principle


def _rule(entry: TomlEntry) -> Rule:
    name = entry.text("name")
    if not re.fullmatch(r"[^\W\d][\w.]*", name) or name in ("and", "or", "not"):
        raise entry.wrong(
            "name", f"name {name!r} cannot be used in a formula: letters, digits, _ and ., the first a letter or _"
        )
    kinds = [kind for kind in MEASURES if entry.has(kind)]
    if len(kinds) != 1:
        raise entry.wrong(
            kinds[1] if kinds else "",
            f"rule {name} needs exactly one of {', '.join(MEASURES)}; it has {' and '.join(kinds) or 'none'}",
        )
    kind = kinds[0]
    measure = _measure(entry, kind)
    at_least = entry.number("at_least") if entry.has("at_least") else None
    at_most = entry.number("at_most") if entry.has("at_most") else None
    bounded = at_least is not None or at_most is not None
    if kind == "length" and not bounded:
        raise entry.wrong("length", f"rule {name} needs at_least or at_most, in {entry.text('length')}")
    if at_least is not None and at_most is not None and at_least > at_most:
        raise entry.wrong("at_most", f"rule {name}: nothing is at least {at_least:g} and at most {at_most:g}")
    if not bounded and kind in ("words", "pattern", "exemplar"):
        at_least = 1.0
    soft = entry.number("soft", 1.0 if kind == "exemplar" and not bounded else 0.0)
    if soft < 0:
        raise entry.wrong("soft", f"soft is {soft:g}; it is 0 or more, in the unit of the measure")
    of: MeasuredText = entry.choice("of", get_args(MeasuredText), "answer")  # type: ignore[assignment]
    replace = None
    if entry.has("replace"):
        replace = entry.text("replace", empty=True)
        if kind not in ("words", "pattern") or of == "prompt":
            raise entry.wrong("replace", "replace is for words and patterns of the answer")
    entry.done()
    return Rule(name, measure, of, at_least, at_most, soft, replace, entry.line)


def _measure(entry: TomlEntry, kind: str) -> Measure:
    if kind == "words":
        return word_pattern(entry.texts("words"))
    if kind == "pattern":
        pattern = Pattern(entry.text("pattern"), entry.flag("ignore_case", False))
        try:
            _ = pattern.compiled
        except regex.error as error:
            raise entry.wrong("pattern", f"{pattern.pattern!r} is no regular expression: {error}") from error
        return pattern
    if kind == "length":
        unit: Unit = entry.choice("length", get_args(Unit))  # type: ignore[assignment]
        return Length(unit)
    if kind == "exemplar":
        return Exemplar(entry.text("exemplar"))
    name = entry.text("predicate")
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise entry.wrong("predicate", f"predicate is {name!r}; expected module:function")
    try:
        found = pkgutil.resolve_name(name)
    except Exception as error:  # a module may raise anything while it is imported
        raise entry.wrong("predicate", f"cannot import {name}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise entry.wrong("predicate", f"{name} is no function but {type(found).__name__}")
    return Predicate(name, found)


def _formula(entry: TomlEntry, rules: Sequence[str]) -> WeightedFormula:
    text = entry.text("formula")
    try:
        formula = parse_formula(text)
    except UserError as error:
        raise entry.wrong("formula", str(error)) from error
    unknown = [name for name in atoms(formula) if name not in rules]
    if unknown:
        known = f"the rules are {', '.join(rules)}" if rules else "there are no rules"
        raise entry.wrong("formula", f"formula {text!r} names the unknown rule {unknown[0]}; {known}")
    name, weight = entry.text("name"), entry.number("weight", 1.0)
    if weight == 0:
        raise entry.wrong("weight", "weight is 0: the formula would count for nothing")
    praise = entry.text("praise", f"Good: {name}.")
    blame = entry.text("blame", f"Bad: not {name}." if weight > 0 else f"Bad: {name}.")
    entry.done()
    return WeightedFormula(name, formula, weight, praise, blame, entry.line)


# ---- Judging


class RuleValues(NamedTuple):
    """The values of P rules for B answers.

    Attributes:
        values: [B, P] float32 in [0, 1]; 0 where not valid.
        valid: [B, P] bool; false where a rule could not be measured.
        problems: a sentence about each different problem.
    """

    values: np.ndarray
    valid: np.ndarray
    problems: tuple[str, ...] = ()


def evaluate_rules(
    constitution: Constitution, prompts: Sequence[str], answers: Sequence[str], encoder: Encoder | None = None
) -> RuleValues:
    """Evaluates every rule for B answers.

    Args:
        constitution: the rules.
        prompts: the prompts [B].
        answers: the answers [B].
        encoder: embeds texts for the rules that compare with an exemplar.

    Raises:
        UserError: a rule compares with an exemplar, and no encoder is given.
    """
    require(len(prompts) == len(answers), f"{len(prompts)} prompts for {len(answers)} answers: expected one each")
    values = np.zeros((len(answers), len(constitution.rules)), np.float32)
    valid = np.zeros(values.shape, bool)
    problems: list[str] = []
    for column, rule in enumerate(constitution.rules):
        numbers = None
        if isinstance(rule.measure, Exemplar):
            require(
                encoder is not None,
                f"{constitution.where(rule.line)}: rule {rule.name} compares with an exemplar: give an encoder, "
                "such as embeddings.HiddenStateEncoder",
            )
            assert encoder is not None
            numbers = similarities(encoder, rule.measure.text, answers if rule.of == "answer" else prompts)
        found, met = apply_rule(rule, prompts, answers, numbers)
        valid[:, column] = [value is not None for value in found]
        values[:, column] = [value or 0.0 for value in found]
        problems += [f"{constitution.where(rule.line)}: {problem}" for problem in met]
    return RuleValues(values, valid, tuple(problems))


def constitution_rewards(
    constitution: Constitution, values: jax.Array | np.ndarray, valid: jax.Array | np.ndarray
) -> tuple[Masked, Masked]:
    """Computes rewards from the truths of a constitution's rules; pure, may be jitted.

    The reward is the weighted sum of the formulas' truths: see `rewards.logic.logic_rewards`.

    Args:
        constitution: with F formulas over P rules.
        values: [..., P] in [0, 1], truth of each rule, in the order of `Constitution.rule_names`.
        valid: [..., P] bool, false where a rule gave no value.

    Returns:
        (rewards [...], truths [..., F]); each is missing where missing rules leave it open.

    Raises:
        UserError: the constitution has no formula.
    """
    require(bool(constitution.formulas), f"{constitution.where(1)}: no [[formula]] makes a reward of the rules")
    return logic_rewards(
        [weighted.formula for weighted in constitution.formulas],
        jnp.array([weighted.weight for weighted in constitution.formulas], jnp.float32),
        constitution.rule_names,
        jnp.asarray(values),
        jnp.asarray(valid),
        tnorm=constitution.logic,
    )


@dataclass(frozen=True, eq=False)
class ConstitutionSource(FeedbackSource):
    """A constitution's rules and formulas as a feedback source.

    The reward of an answer is missing where no formula can be evaluated. Each problem of a rule is a
    RuntimeWarning.

    Attributes:
        constitution: the rules and formulas.
        encoder: embeds texts for the rules that compare with an exemplar.
    """

    constitution: Constitution
    encoder: Encoder | None = None

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout) -> Feedback:
        prompts = [str(record["prompt"]) for record in records]
        rule_values = evaluate_rules(self.constitution, prompts, answers, self.encoder)
        for problem in rule_values.problems:
            warnings.warn(problem, RuntimeWarning, stacklevel=2)
        rewards, _ = constitution_rewards(self.constitution, rule_values.values, rule_values.valid)
        return Feedback.single(*map(np.asarray, rewards))
