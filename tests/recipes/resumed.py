"""A run that was stopped and resumed, compared bit for bit with one that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from rlaif_jax.metrics import read_metrics, without_time
from tests.helpers import assert_same_leaves


def rows(folder: Path) -> list[dict[str, Any]]:
    """Returns the metrics of a run without those that depend on the clock."""
    return [without_time(row) for row in read_metrics(folder / "metrics.jsonl")]


def summary(folder: Path) -> dict[str, Any]:
    """Returns the summary of a run."""
    return json.loads((folder / "summary.json").read_text())


def checkpoint(folder: Path, step: int) -> tuple[Any, dict[str, Any]]:
    """Returns (the arrays of a run's checkpoint, its values of the host): no code of the package reads them."""
    path = folder.absolute() / "checkpoints" / str(step)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(path / "arrays").item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        arrays = reader.restore(path / "arrays", args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return arrays, dict(reader.restore(path / "host"))


def assert_same_runs(whole: Path, part: Path, steps: int) -> Any:
    """Asserts that two runs have the same metrics, state and answers, and returns the arrays of their last checkpoint."""
    assert json.dumps(rows(part)) == json.dumps(rows(whole)), "NaN is equal to NaN"
    (one, host), (other, other_host) = (checkpoint(folder, steps) for folder in (whole, part))
    assert_same_leaves(one, other)
    for values in (host, other_host):
        values.pop("settings")
    assert host == other_host
    assert (whole / "samples.jsonl").read_text() == (part / "samples.jsonl").read_text()
    found = [summary(folder) for folder in (whole, part)]
    for numbers in found:
        numbers["metrics"].pop("wall_s")
    for name in ("metrics", "checks", "verdict", "steps"):
        assert json.dumps(found[0].get(name)) == json.dumps(found[1].get(name)), name
    return one
