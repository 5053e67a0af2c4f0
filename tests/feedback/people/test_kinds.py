"""The table of kinds."""

import pytest

from rlaif_jax.config import UserError
from rlaif_jax.feedback.people.kinds import CHAT, KINDS, RANK, kind_named, kind_of_form
from rlaif_jax.feedback.records.forms import FORMS


def test_kinds_are_found_by_name_and_form():
    assert [kind_named(kind.name) for kind in KINDS] == list(KINDS)
    assert kind_of_form("ranking") is RANK
    assert {kind_of_form(form).form for form in FORMS} == set(FORMS)
    assert CHAT.form == ""
    with pytest.raises(UserError, match="unknown kind 'guess'; the kinds are compare, rank, rate"):
        kind_named("guess")
