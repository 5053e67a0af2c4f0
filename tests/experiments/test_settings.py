"""The experiment that changes one setting at a time: which of its runs are only read."""

from __future__ import annotations

import dataclasses
import json

import pytest

from experiments import settings
from experiments.settings import SettingsConfig, base_config, run, status_of
from rlaif_jax.config import Diverged, UserError, to_json


def kept(folder, config, status):
    """Writes what a run with these settings leaves when it ends."""
    folder.mkdir(exist_ok=True)
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_json(dataclasses.replace(config, out=folder, seed=3))))
    (folder / "summary.json").write_text(json.dumps({"status": status, "metrics": {"gain": 1.0}}))


def test_a_run_is_read_gone_on_with_or_refused(tmp_path, monkeypatch):
    config, folder, taken = base_config(SettingsConfig(out=tmp_path)), tmp_path / "a-3", []

    def train(given):
        taken.append(given.resume)
        kept(given.out, config, "done")

    monkeypatch.setattr(settings.rlaif, "main", train)
    assert status_of(folder) == "" and run(config, folder, 3) == {"gain": 1.0} and taken == [False]
    assert run(config, folder, 3) == {"gain": 1.0} and taken == [False], "it is read"
    kept(folder, config, "stopped")
    assert run(config, folder, 3) == {"gain": 1.0} and taken == [False, True], "it goes on"
    kept(folder, config, "diverged")
    assert run(config, folder, 3) == {} and len(taken) == 2
    with pytest.raises(UserError, match="a run with other settings"):
        run(dataclasses.replace(config, scale_answers=77), folder, 3)


def test_a_run_that_diverges_or_stops_is_said_so(tmp_path, monkeypatch):
    config = base_config(SettingsConfig(out=tmp_path))

    def diverge(given):
        raise Diverged("the KL")

    monkeypatch.setattr(settings.rlaif, "main", diverge)
    assert run(config, tmp_path / "b-3", 3) == {}
    monkeypatch.setattr(settings.rlaif, "main", lambda given: kept(given.out, config, "stopped"))
    assert run(config, tmp_path / "c-3", 3) is None
