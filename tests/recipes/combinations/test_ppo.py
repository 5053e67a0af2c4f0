"""What `train` allows together, with PPO: each pair of settings is in a whole run, killed and resumed bit for bit."""

from __future__ import annotations

import pytest

from tests.recipes.combinations.runs import CASES, resumed_bit_for_bit


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if "PPO" in case], ids=", ".join)
def test_a_killed_run_is_resumed_bit_for_bit(case, inputs, server, tmp_path, monkeypatch):
    resumed_bit_for_bit(case, inputs, server.url, tmp_path, monkeypatch)
