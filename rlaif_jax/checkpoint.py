"""Checkpoints of the complete state by Orbax: after a resume every later number is the same, bit for bit.

A checkpoint holds the train state (policy, critic, both optimisers, KL coefficient, seed and step), the reward
normaliser, the data iterator's position, the number of missing judgements and the settings it was made with.
Orbax writes to a temporary folder and renames it: a process killed while saving leaves the previous checkpoint whole.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from rlaif_jax.config import UserError, differing, require
from rlaif_jax.types import Params

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every file it opens


class Restored(NamedTuple):
    """What came back: the step it was saved after, the arrays, and the host's side."""

    step: int
    arrays: Any
    host: dict[str, Any]


class Checkpointer:
    """The checkpoints of one run, the newest `keep` of them.

    `settings` (JSON-like) must be those of the run that is resumed; a difference raises UserError and names it.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, keep: int = 2) -> None:
        self.folder = folder.absolute()
        self.settings = settings
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("arrays", "host"))
        except OSError as error:
            raise UserError(f"{folder}: checkpoints cannot be written here ({error.strerror or error})") from error

    def save(self, step: int, arrays: Any, host: dict[str, Any]) -> None:
        """Save after `step`. `host` is JSON: the data iterator's state, counters. Returns while files are still written."""
        if step in self._manager.all_steps():
            return
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave(arrays), host=ocp.args.JsonSave({"settings": self.settings, **host})
                ),
            )
        except OSError as error:
            raise UserError(
                f"{self.folder}: the checkpoint of step {step} cannot be written "
                f"({error.strerror or error}); earlier checkpoints are whole"
            ) from error

    def latest(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    def restore(self, like: Any) -> Restored | None:
        """The newest checkpoint, its arrays placed and shaped as in `like`; None where there is none.

        Raises UserError when the checkpoint was made with other settings (names them) or is damaged.
        """
        step = self.latest()
        if step is None:
            return None
        try:
            host = dict(self._manager.restore(step, args=ocp.args.Composite(host=ocp.args.JsonRestore()))["host"])
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{self.folder / str(step)}: this checkpoint cannot be read ({error}); "
                "remove its folder to resume from the one before"
            ) from error
        changed = differing(host.pop("settings", None), self.settings)
        require(not changed, f"{self.folder / str(step)}: the checkpoint is of another config: " + "; ".join(changed))
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            arrays = self._manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract)))[
                "arrays"
            ]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{self.folder / str(step)}: this checkpoint cannot be read ({str(error)[:300]}); if it is damaged, remove its "
                "folder to resume from the one before; if another version of rlaif_jax wrote it, resume with that one"
            ) from error
        return Restored(step, arrays, host)

    def close(self) -> None:
        """Wait for the files and let go."""
        self._manager.wait_until_finished()
        self._manager.close()


def save_params(folder: Path, params: Params) -> None:
    """Write one pytree of parameters (a finished stage of a run), replacing what stood there."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), params, force=True)


def load_params(folder: Path, like: Params) -> Params:
    """Read what `save_params` wrote, shaped as `like`; UserError when it does not fit."""
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder.absolute(), jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: these parameters do not fit or cannot be read ({str(error)[:300]})") from error
