"""The project's own templates: each can be rendered, and each form has its own."""

from __future__ import annotations

import pytest

from rlaif_jax.feedback.api.builtin_templates import (
    CORRECTION,
    CRITIQUE,
    PAIRWISE,
    RATING,
    REVISION,
    RUBRIC,
    template_for,
)
from rlaif_jax.feedback.api.templates import Question

HASHES = {
    PAIRWISE: "22967de3ac38144a",
    RATING: "8409fcce432bb37b",
    RUBRIC: "476b97c3bbfc0974",
    CRITIQUE: "c195f5ea696bfa27",
    REVISION: "ed5911306920b124",
    CORRECTION: "a622d8b1f2ce5951",
}


@pytest.mark.parametrize("template", [PAIRWISE, RATING, RUBRIC, CRITIQUE, REVISION, CORRECTION])
def test_the_built_in_ones(template):
    count = 2 if template.form == "ranking" else 1
    question = Question("Why?", ("Because.", "So.")[:count], rubric="Be brief.", critique="Too brief.")
    for ending in ("direct", "reasons") if template.choices else ("",):
        text = template.render(question, tuple(range(count)), ending=ending).messages[-1]["content"]
        assert "Why?" in text and "Because." in text and "{" not in text
    assert template.hash != PAIRWISE.hash or template is PAIRWISE


def test_which_built_in_one():
    plain, rubric = Question("p", ("a",)), Question("p", ("a",), rubric="r")
    assert template_for("rating", [plain, rubric]) is RATING and template_for("rating", [rubric]) is RUBRIC
    assert template_for("correction", [plain]) is CORRECTION
    assert template_for("correction", [Question("p", ("a",), critique="c")]) is REVISION


def test_the_wording_is_what_it_was_when_stores_and_caches_were_written():
    assert {template: template.hash[:16] for template in HASHES} == HASHES
