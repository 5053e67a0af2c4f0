"""Small models, parameters and comparisons that many tests share."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.metrics import read_metrics
from rlaif_jax.models.base import PaddedView
from rlaif_jax.parallel import JitRunner
from rlaif_jax.report.glossary import label


def random_params(model: Any, seed: int = 0, scale: float = 0.3) -> Any:
    """Returns parameters drawn by NumPy, none zero or one; an initialiser would have to be compiled first."""
    rng = np.random.default_rng(seed)

    def one(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return (centre + scale * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, jax.eval_shape(model.init, jax.random.key(0)))


class CountingRunner(JitRunner):
    """Counts the functions that it is given to compile."""

    compiled = 0

    def map(self, fn: Any) -> Any:
        self.compiled += 1
        return super().map(fn)


def fresh(tree: Any) -> Any:
    """Returns a copy of all arrays, for steps that donate their state."""
    return jax.tree.map(jnp.array, tree)


def assert_same_leaves(a: Any, b: Any) -> None:
    """Asserts that two trees have the same leaves, bit for bit."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def relative_distance(a: Any, b: Any) -> float:
    """Returns the norm of the difference of two trees over the norm of the second."""
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in jax.device_get((a, b))]
    return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1]))


def sequences_view(tokens: Any, prompt_mask: Any, response_mask: Any, answers: int = 1) -> PaddedView:
    """Returns sequences [B, P + T] as a model reads them; the targets are the response tokens as they are."""
    return PaddedView(tokens, prompt_mask, response_mask, tokens[:, prompt_mask.shape[1] :], answers)


def unexplained(folder: Path) -> list[str]:
    """Returns the names of a run's numbers that the page's glossary does not explain."""
    summary = json.loads((folder / "summary.json").read_text())
    names = {key for row in read_metrics(folder) for key in row} - {"step", "stage"}
    return sorted(key for key in names | set(summary["metrics"]) if not label(key).term)


def read_terminal(parent: int) -> str:
    """Returns all that is shown on a terminal until its last program has ended, and closes `parent`, its other end."""
    shown = b""
    try:
        while data := os.read(parent, 65536):
            shown += data
    except OSError:  # the other end has closed
        pass
    os.close(parent)
    return shown.decode()
