"""A constitution file: its rules and formulas judge as written; its errors are reported with file and line."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.feedback.constitution import constitution as constitution_module
from rlaif_jax.feedback.constitution.constitution import (
    ConstitutionPrinciple,
    ConstitutionSource,
    constitution_rewards,
    evaluate_rules,
    load_constitution,
)
from rlaif_jax.feedback.constitution.rules import Exemplar, Length, Pattern, fresh_words
from tests.rewards.everywhere import same_everywhere

EXAMPLE = Path(__file__).resolve().parents[3] / "experiments" / "constitution.toml"
FILE = """\
name = "kind"
logic = "product"

[[principle]]
name = "kind"
text = "Be kind."
weight = 2

[[principle]]
name = "brief"
text = "Be brief."
critique = "Where is it long?"
revision = "Make it short."

[[rule]]
name = "rude"
words = ["idiot", "shut up"]

[[rule]]
name = "brief"
length = "words"
at_most = 4
soft = 4

[[rule]]
name = "asked"
pattern = '\\?'
of = "prompt"

[[rule]]
name = "fresh"
predicate = "rlaif_jax.feedback.constitution.rules:fresh_words"

[[rule]]
name = "like"
exemplar = "my pleasure"

[[formula]]
name = "decent"
formula = "brief & !rude"
weight = 2.0

[[formula]]
name = "answers"
formula = "asked -> like"

[[formula]]
name = "repeats"
formula = "!fresh"
weight = -1
"""


def written(tmp_path, text: str) -> Path:
    path = tmp_path / "kind.toml"
    path.write_text(text)
    return path


@pytest.fixture
def constitution(tmp_path):
    return load_constitution(written(tmp_path, FILE))


def encode(texts):
    """The share of each vowel: "my pleasure" is like itself."""
    return np.array([[text.count(v) for v in "aeiou"] for text in texts], float)


def test_everything_in_the_file_is_read(constitution):
    assert (constitution.name, constitution.logic) == ("kind", "product")
    kind, brief = constitution.principles
    assert kind.text == "Be kind."
    assert kind.text in kind.critique
    assert kind.text in kind.revision
    assert (kind.weight, kind.line) == (2.0, 4)
    assert brief == ConstitutionPrinciple("brief", "Be brief.", "Where is it long?", "Make it short.", 1.0, 9)
    assert constitution.rule_names == ("rude", "brief", "asked", "fresh", "like")
    rude, length, asked, fresh, like = constitution.rules
    assert isinstance(rude.measure, Pattern)
    assert (rude.at_least, rude.at_most) == (1.0, None)
    assert (length.measure, length.at_least, length.at_most, length.soft) == (Length("words"), None, 4.0, 4.0)
    assert asked.of == "prompt"
    assert fresh.measure.function is fresh_words
    assert (like.measure, like.at_least, like.soft) == (Exemplar("my pleasure"), 1.0, 1.0)
    assert [str(f.formula) for f in constitution.formulas] == ["(brief & !rude)", "(asked -> like)", "!fresh"]
    assert constitution.scale == (-1.0, 3.0)


def test_rules_and_rewards_by_hand(constitution):
    prompts = ["How?", "Go", "How?"]
    answers = ["my pleasure", "shut up you idiot now now", "a a a a a a a a a"]
    values, valid, problems = evaluate_rules(constitution, prompts, answers, encode)
    # Vowels a e i o u: "my pleasure" (1, 2, 0, 0, 1), "shut up you idiot now now" (0, 0, 2, 4, 3), (9, 0, 0, 0, 0).
    cosine = 1 / np.sqrt(6)
    expected = [[0, 1, 1, 0, 1], [1, 0.5, 0, 1, 3 / np.sqrt(6 * 29)], [0, 0, 1, 1 / 7, cosine]]
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert valid.tolist() == [[True, True, True, False, True], [True] * 5, [True] * 5]
    assert problems == ()  # fresh_words of two words is None: missing, and no fault
    rewards, truths = constitution_rewards(constitution, values, valid)
    np.testing.assert_allclose(truths.values[2], [0, cosine, 6 / 7], rtol=1e-5)
    np.testing.assert_allclose(rewards.values[1:], [0 + 1 + 0, cosine - 6 / 7], atol=1e-5)
    np.testing.assert_allclose(rewards.values[0], 3.0, rtol=1e-6)  # all that is known is as it should be
    assert rewards.valid.all()


def test_the_source_gives_rewards_and_warns_of_problems(tmp_path):
    text = '[[rule]]\nname = "r"\npredicate = "operator:truediv"\n\n[[formula]]\nname = "f"\nformula = "r"\n'
    source = ConstitutionSource(load_constitution(written(tmp_path, text)))
    with pytest.warns(RuntimeWarning, match=r"kind\.toml:1: rule r: operator:truediv failed: TypeError"):
        feedback = source([{"prompt": "p"}] * 2, ["a", "b"], None)
    assert feedback.valid.tolist() == [[False], [False]]
    good = ConstitutionSource(load_constitution(written(tmp_path, FILE)), encode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feedback = good([{"prompt": "How?"}] * 2, ["my pleasure", "shut up"], None)
    assert feedback.values[0, 0] > feedback.values[1, 0]
    assert feedback.values.dtype == np.float32
    assert isinstance(feedback.valid, np.ndarray)


def test_an_exemplar_without_an_encoder_and_a_reward_without_formulas(tmp_path, constitution):
    with pytest.raises(UserError, match=r"kind\.toml:34: rule like compares with an exemplar: give an encoder"):
        evaluate_rules(constitution, ["p"], ["a"])
    with pytest.raises(UserError, match="2 prompts for 1 answers"):
        evaluate_rules(constitution, ["p", "p"], ["a"])
    only_rules = load_constitution(written(tmp_path, '[[rule]]\nname = "r"\nwords = ["a"]\n'))
    rule_values = evaluate_rules(only_rules, ["p"], ["a"])
    with pytest.raises(UserError, match=r"kind\.toml:1: no \[\[formula\]\]"):
        constitution_rewards(only_rules, rule_values.values, rule_values.valid)
    assert load_constitution(written(tmp_path, '[[principle]]\nname = "a"\ntext = "b"\n')).rules == ()


def test_the_hash_is_of_the_text(tmp_path):
    first = load_constitution(written(tmp_path, FILE)).hash
    assert load_constitution(written(tmp_path, FILE)).hash == first
    assert load_constitution(written(tmp_path, FILE + "# more\n")).hash != first


def test_rewards_are_pure_and_the_same_everywhere(constitution):
    rng = np.random.default_rng(0)
    values = rng.random((8, 5)).astype(np.float32)
    same_everywhere(lambda v, ok: constitution_rewards(constitution, v, ok), values, rng.random((8, 5)) > 0.2)
    gradient = jax.grad(lambda v: constitution_rewards(constitution, v, np.ones((8, 5), bool))[0].values.sum())(values)
    assert np.abs(gradient).min() > 0


# ---- Files that are wrong

GOOD_RULE = '[[rule]]\nname = "r"\nwords = ["a"]\n'


@pytest.mark.parametrize(
    "text, message",
    [
        ("", r":1: the file is empty"),
        ('name = "x"\nlogik = "product"\n', r":2: the top of the file: has no field logik; did you mean logic\?"),
        ('logic = "fuzzy"\n', r":1: .*logic is 'fuzzy'; it is one of lukasiewicz, product"),
        ('[[princple]]\nname = "a"\n', r":1: unknown section \[\[princple\]\]"),
        ('[[principle]]\nname = "a"\n', r":1: \[\[principle\]\]: needs text"),
        ('[[principle]]\ntext = "a"\n', r":1: \[\[principle\]\]: needs name"),
        ('[[principle]]\nname = "a"\ntext = "b"\nweight = -1\n', r":4: .*weight is -1: .*0 or more"),
        ('[[principle]]\nname = "a"\ntext = "b"\nweight = "1"\n', r":4: .*weight must be a number, not '1'"),
        ('[[principle]]\nname = "a"\ntext = "b"\n\n[[principle]]\nname = "a"\ntext = "c"\n', r":6: .*'a' is taken by line 1"),
        (GOOD_RULE + "\n" + GOOD_RULE, r":6: \[\[rule\]\]: name 'r' is taken by line 1"),
        ('[[rule]]\nname = "is rude"\nwords = ["a"]\n', r":2: .*'is rude' cannot be used in a formula"),
        ('[[rule]]\nname = "not"\nwords = ["a"]\n', r":2: .*'not' cannot be used in a formula"),
        ('[[rule]]\nname = "r"\n', r":1: .*exactly one of words, pattern, .*; it has none"),
        ('[[rule]]\nname = "r"\nwords = ["a"]\npattern = "b"\n', r":4: .*it has words and pattern"),
        ('[[rule]]\nname = "r"\nwords = "a"\n', r":3: .*words must be a list of texts"),
        ('[[rule]]\nname = "r"\n\npattern = "a(b"\n', r":4: .*'a\(b' is no regular expression: missing \) at position 3"),
        ('[[rule]]\nname = "r"\npattern = "a"\nignore_case = 1\n', r":4: .*ignore_case must be true or false"),
        ('[[rule]]\nname = "r"\nlength = "word"\nat_most = 1\n', r":3: .*length is 'word'; it is one of characters, words"),
        ('[[rule]]\nname = "r"\nlength = "words"\n', r":3: .*rule r needs at_least or at_most, in words"),
        (GOOD_RULE + 'at_least = "2"\n', r":4: .*at_least must be a number, not '2'"),
        (GOOD_RULE + "at_least = 3\nat_most = 2\n", r":5: .*nothing is at least 3 and at most 2"),
        (GOOD_RULE + "soft = -1\n", r":4: .*soft is -1"),
        (GOOD_RULE + 'of = "both"\n', r":4: .*of is 'both'; it is one of answer, prompt"),
        (GOOD_RULE + "ignore_case = true\n", r":4: .*has no field ignore_case"),
        (GOOD_RULE + "at_lest = 1\n", r":4: .*has no field at_lest; did you mean at_least\?"),
        ('[[rule]]\nname = "r"\nlength = "words"\nat_most = 3\nreplace = "x"\n', r":5: .*replace is for words and patterns"),
        ('[[rule]]\nname = "r"\npredicate = "fresh_words"\n', r":3: .*'fresh_words'; expected module:function"),
        ('[[rule]]\nname = "r"\npredicate = "no.such:f"\n', r":3: .*cannot import no\.such:f: ModuleNotFoundError"),
        ('[[rule]]\nname = "r"\npredicate = "math:no"\n', r":3: .*cannot import math:no: AttributeError"),
        ('[[rule]]\nname = "r"\npredicate = "math:pi"\n', r":3: .*math:pi is no function but float"),
        ('[[formula]]\nname = "f"\nformula = "r"\n', r":3: .*the unknown rule r; there are no rules"),
        (GOOD_RULE + '\n[[formula]]\nname = "f"\nformula = "r & q"\n', r":7: .*unknown rule q; the rules are r"),
        (GOOD_RULE + '\n[[formula]]\nname = "f"\nformula = "r &"\n', r":7: .*expected the name of a rule at character 4"),
        (GOOD_RULE + '\n[[formula]]\nname = "f"\nformula = "r"\nweight = 0\n', r":8: .*weight is 0"),
        (GOOD_RULE + '\n[[formula]]\nname = "f"\nformula = "r"\nweight = [1]\n', r":8: .*weight must be a number"),
        (GOOD_RULE + '\n[[formula]]\nname = "f"\nformula = "r"\nlogic = "product"\n', r":8: .*has no field logic"),
    ],
)  # fmt: skip
def test_a_broken_file_is_reported_with_its_line(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(UserError, match=message) as caught:
        load_constitution(path)
    assert str(caught.value).startswith(str(path))


def test_a_module_that_fails_while_it_is_imported(tmp_path, monkeypatch):
    (tmp_path / "breaks_on_import.py").write_text("raise SystemError('no')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r":3: .*cannot import breaks_on_import:f: SystemError: no"):
        load_constitution(written(tmp_path, '[[rule]]\nname = "r"\npredicate = "breaks_on_import:f"\n'))
    sys.modules.pop("breaks_on_import", None)


def test_the_example_says_what_it_means():
    constitution = load_constitution(EXAMPLE)
    assert len(constitution.principles) >= 2
    prompts = ["Give me a list of three fruits."] * 4 + ["How are you?"]
    answers = [
        "Here you are:\n- apples\n- pears\n- plums",
        "Apples, pears and plums are fruits that you may like.",
        "You idiot, here you are:\n- apples\n- pears\n- plums",
        "As an AI language model I cannot eat any fruit.",
        "I am very well today, thank you for asking.",
    ]
    rule_values = evaluate_rules(constitution, prompts, answers)
    rewards, _ = constitution_rewards(constitution, rule_values.values, rule_values.valid)
    np.testing.assert_allclose(rewards.values, [4, 3, 2, 2, 4], atol=1e-6)
    assert rewards.valid.all()


def test_the_file_in_the_documentation_can_be_read(tmp_path):
    lines = [line[4:] for line in (constitution_module.__doc__ or "").splitlines() if line.startswith("    ")]
    constitution = load_constitution(written(tmp_path, "\n".join(lines)))
    assert constitution.rule_names == ("rude", "brief", "fresh", "like_this")
    assert constitution.formulas[0].praise == "Kind and to the point."
