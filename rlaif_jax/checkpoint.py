"""Checkpoints by Orbax: of a training loop's complete state, and of the finished stages before it.

After a resume every later number is the same, bit for bit: a checkpoint holds all the arrays that the loop is given
back, the host's side (position of the data, counters) and the settings that it was made with. Everything is written to
a temporary folder that is then renamed, so a process that is killed while it saves leaves the previous checkpoint whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from rlaif_jax.config import StopRequested, UserError, differing, require
from rlaif_jax.types import Params

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax reports every file it opens; its errors are raised, too
_report_lost_error = sys.unraisablehook


def _report_all_but_closed_loops(lost: Any) -> None:
    """Reports an error that nobody can catch, unless it follows from one that is raised.

    At the first array that cannot be written, Orbax raises and ends its event loop. The threads that write the other
    arrays then find the loop closed, each with a traceback: hundreds of lines on a full disk.
    """
    if not (isinstance(lost.exc_value, RuntimeError) and str(lost.exc_value) == "Event loop is closed"):
        _report_lost_error(lost)


sys.unraisablehook = _report_all_but_closed_loops


def _is_no_later_write(record: logging.LogRecord) -> bool:
    """Returns whether asyncio's message is not about the arrays after the first that cannot be written.

    Orbax raises the first error and asks for none of the others, which asyncio then logs, each with a traceback.
    """
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, ValueError) and "os_error_code=" in str(error))


logging.getLogger("asyncio").addFilter(_is_no_later_write)


class Restored(NamedTuple):
    """A checkpoint that was read.

    Attributes:
        step: the step after which it was saved.
        arrays: the pytree of arrays.
        host: the JSON values that were saved with them.
    """

    step: int
    arrays: Any
    host: dict[str, Any]


class Checkpointer:
    """Writes and reads the checkpoints of one run, and keeps the newest ones.

    Args:
        folder: holds one folder per checkpoint; made if missing.
        settings: the run's settings as JSON values; a checkpoint of other settings is refused.
        weights: name -> `fingerprint` of arrays that a checkpoint does not hold and that the run depends on; a
            checkpoint of a run with others is refused.
        keep: number of checkpoints to keep.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(
        self, folder: Path, settings: dict[str, Any], *, weights: Mapping[str, str] | None = None, keep: int = 2
    ) -> None:
        self.folder = folder.absolute()
        self.settings, self.weights = settings, dict(weights or {})
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("arrays", "host"))
        except OSError as error:
            raise UserError(f"{folder}: checkpoints cannot be written here ({error.strerror or error})") from error

    def save(self, step: int, arrays: Any, host: dict[str, Any]) -> None:
        """Starts to save a checkpoint; does nothing if `step` has one already.

        It returns while the files are still being written.

        Args:
            step: the step that is done.
            arrays: a pytree of arrays.
            host: JSON values, such as the position of the data and counters.

        Raises:
            UserError: it, or the checkpoint before it, cannot be written; earlier checkpoints are whole.
        """
        if step in self._manager.all_steps():
            return
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave(arrays),
                    host=ocp.args.JsonSave({"settings": self.settings, "weights": self.weights, **host}),
                ),
            )

    def latest(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def restore(self, like: Any) -> Restored | None:
        """Reads the newest checkpoint; returns None if there is no checkpoint.

        Args:
            like: a pytree of arrays with the shapes, dtypes and placement that the result shall have.

        Raises:
            UserError: the checkpoint was made with other settings or weights (they are named), does not fit or is
                damaged.
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
        require_weights(self.folder / str(step), host.pop("weights", {}), self.weights)
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

    def drop_after(self, step: int) -> str:
        """Deletes the checkpoints of later steps; returns a sentence about the newest one that is left.

        Args:
            step: the last step whose checkpoint may stay.

        Raises:
            UserError: a checkpoint cannot be written or deleted.
        """
        with self._writing():
            self._manager.wait_until_finished()
            for later in [saved for saved in self._manager.all_steps() if saved > step]:
                self._manager.delete(later)
        left = self.latest()
        if left is None:
            return f"no checkpoint is left in {self.folder}"
        return f"the newest checkpoint that is left is that of step {left} in {self.folder}"

    def close(self) -> None:
        """Waits until all files are written and releases the folder.

        Raises UserError if the files cannot be written.
        """
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except UserError:
            if error is None or isinstance(error, StopRequested):  # else the first error counts
                raise

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.folder}: a checkpoint cannot be written ({_reason(error)}); earlier checkpoints are whole"
            ) from error


def _reason(error: OSError | ValueError) -> str:
    """Returns why something cannot be written.

    Orbax raises ValueError for a full disk, with the number of the system's error at the end of a long message.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else str(error)[-200:]


def require_weights(place: Path, began: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raises a UserError where weights are not those that a run began with.

    Args:
        place: what says which weights the run began with: a checkpoint or a folder.
        began: name -> `fingerprint` then; a name that is missing may be any weights.
        now: name -> `fingerprint` now.
    """
    moved = [name for name in now if began.get(name, now[name]) != now[name]]
    require(
        not moved,
        f"{place}: this run began with other weights ({', '.join(moved)}): the model's files, or what its name leads to on "
        "the Hugging Face hub, have changed since. Resume with the model that it began with, or start a new run without "
        "--resume",
    )


def fingerprint(tree: Any) -> str:
    """Returns a text that differs where pytrees of arrays do, however they are split over devices."""
    digest = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        # One by one: XLA's CPU client stops for ever with more than 32 programs of several devices under way.
        digest.update(f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape} {jax.device_get(_checksum(x))}\n".encode())
    return digest.hexdigest()[:16]


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """Computes the sum modulo 2^32 of the numbers' bits, each mixed with its place (as MurmurHash3 ends).

    A sum of the bits themselves would not see a change that is the same for all numbers, such as of their signs.
    """
    width = 8 * x.dtype.itemsize
    bits = x if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}"))
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    mixed = bits.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + place * jnp.uint32(0x85EBCA77)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


# ---- The policy of a checkpoint, without the training around it


def saved_steps(folder: Path) -> list[int]:
    """Returns the steps of the complete checkpoints of a run, in their order.

    Without the folder there are no steps.

    Args:
        folder: the run's folder of checkpoints.
    """
    return sorted(map(int, ocp.utils.checkpoint_steps(folder.absolute()))) if folder.is_dir() else []


def load_policy_params(folder: Path, step: int, like: Params) -> Restored:
    """Reads the policy's parameters of a checkpoint, and none of its other arrays, onto one device.

    Args:
        folder: the run's folder of checkpoints.
        step: of the checkpoint.
        like: a pytree of arrays or `jax.ShapeDtypeStruct`, of the parameters' shapes and dtypes.

    Raises:
        UserError: the checkpoint is damaged, or holds a policy of other shapes.
    """
    path = folder.absolute() / str(step)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            host = dict(reader.restore(path / "host"))
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            saved = reader.metadata(path / "arrays").item_metadata.tree
            there, wanted = _shapes(saved[0]["params"]["policy"]), _shapes(like)
            if there == wanted:
                item = jax.tree.map(lambda _: ocp.PLACEHOLDER, saved)
                item[0]["params"]["policy"] = jax.tree.map(
                    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like
                )
                how = ocp.checkpoint_utils.construct_restore_args(item)
                args = ocp.args.PyTreeRestore(item=item, restore_args=how)
                arrays = reader.restore(path / "arrays", args=args)[0]["params"]["policy"]
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path}: no policy can be read from this checkpoint ({reason}); it is damaged, or another version "
            "of rlaif_jax wrote it"
        ) from error
    wrong = sorted(name for name in there.keys() | wanted.keys() if there.get(name) != wanted.get(name))
    require(
        not wrong,
        f"{path}: the policy of this checkpoint is of another model or adapter: "
        + "; ".join(f"{name} is {there.get(name)} there and {wanted.get(name)} by the settings" for name in wrong[:2]),
    )
    return Restored(step, arrays, host)


def _shapes(tree: Params) -> dict[str, str]:
    """Returns {path of an array: its dtype and shape}."""
    return {
        "/".join(str(key.key) for key in path): f"{x.dtype}{list(x.shape)}"
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


# ---- Stages: parameters with the settings that they were made with

_TAKEN = (errno.EEXIST, errno.ENOTEMPTY)  # the errors of a rename when another process has been quicker


def save_params(folder: Path, params: Params, settings: dict[str, Any]) -> bool:
    """Writes a pytree of arrays and `settings.json` into a new folder, whole or not at all.

    A process that is killed leaves a folder whose name begins with a dot; nothing reads it, and it may be deleted.

    Args:
        folder: the folder to make; its parents are made too.
        params: a pytree of arrays.
        settings: JSON values: all that the arrays depend on.

    Returns:
        False if another process has written `folder` in the meantime; its content is then left as it is.

    Raises:
        UserError: it cannot be written.
    """
    temporary = folder.absolute().with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(temporary / "arrays", params)
        (temporary / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
        os.rename(temporary, folder)  # fails if the folder exists and holds something
        return True
    except (OSError, ValueError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _TAKEN and folder.is_dir():
            return False
        raise UserError(
            f"{folder}: these parameters cannot be written ({_reason(error)}); nothing of them was kept"
        ) from error


def load_params(folder: Path, like: Params) -> tuple[Params, dict[str, Any]]:
    """Reads what `save_params` wrote and returns (the arrays, the settings).

    Args:
        folder: the folder that `save_params` made.
        like: a pytree of arrays or `jax.ShapeDtypeStruct`, of the result's shapes and dtypes.

    Raises:
        UserError: a file is missing or damaged, or the arrays have other shapes.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
        settings = json.loads((folder / "settings.json").read_text())
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder.absolute() / "arrays", abstract), settings
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder}: these parameters do not fit or cannot be read ({str(error)[:300]}); "
            "remove this folder to make them again"
        ) from error


class StagePart:
    """How far a stage is that is being made, kept in a folder of its run until the stage is done.

    Args:
        folder: holds the newest state; made when there is one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _states(self) -> list[Path]:
        """Returns the folders of states, the oldest first: two at most."""
        return sorted(self._folder.glob("[0-9]*"), key=lambda path: int(path.name))

    @property
    def done(self) -> int:
        """Returns the number of updates after which the newest state was kept; 0 without one."""
        states = self._states()
        return int(states[-1].name) if states else 0

    def load(self, like: Params) -> tuple[Params, dict[str, Any]] | None:
        """Reads the newest state; returns (arrays, JSON values), or None if no state can be read.

        Args:
            like: a pytree of arrays of the state's shapes and dtypes.
        """
        try:
            return load_params(self._states()[-1], like) if self.done else None
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr)
            self.remove()
            return None

    def save(self, done: int, arrays: Params, values: dict[str, Any]) -> None:
        """Keeps a state in the place of the one before.

        Args:
            done: updates so far.
            arrays: a pytree of arrays.
            values: JSON values.

        Raises:
            UserError: it cannot be written; the state before is whole.
        """
        before = self._states()
        save_params(self._folder / str(done), arrays, values)
        for path in before:
            shutil.rmtree(path)

    def remove(self) -> None:
        """Removes what is kept."""
        shutil.rmtree(self._folder, ignore_errors=True)
