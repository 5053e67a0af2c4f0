"""What `train` allows together, with GRPO: each pair of settings is in a whole run, killed and resumed bit for bit."""

from __future__ import annotations

import itertools

import pytest

from rlaif_jax.recipes.rewards import KINDS
from tests.recipes.combinations.runs import CASES, FEEDBACK, PROGRAM, SECOND, resumed_bit_for_bit


def test_each_pair_of_settings_is_in_a_run():
    assert set(FEEDBACK) == set(KINDS)
    found = {frozenset(pair) for case in CASES for pair in itertools.combinations(case, 2)}
    settings = [*PROGRAM.values(), SECOND, ("alone", "two"), FEEDBACK]
    wanted = {
        frozenset(pair) for one, two in itertools.combinations(settings, 2) for pair in itertools.product(one, two)
    }
    assert not wanted - found


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if "GRPO" in case], ids=", ".join)
def test_a_killed_run_is_resumed_bit_for_bit(case, inputs, server, tmp_path, monkeypatch):
    resumed_bit_for_bit(case, inputs, server.url, tmp_path, monkeypatch)
