"""Folders that are written whole or not at all, and replace only what they may."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from rlaif_jax.config import UserError, require


@contextmanager
def whole_folder(folder: str | Path, what: str, replaceable: re.Pattern[str]) -> Iterator[Path]:
    """Yields a folder to write into, which then becomes `folder`, whole or not at all.

    Args:
        folder: the folder to make or to replace.
        what: what it holds, for messages.
        replaceable: names of the files that an older folder may hold.

    Raises:
        UserError: the folder holds other things, or cannot be written.
    """
    folder = Path(folder).resolve()
    check_replaceable(folder, what, replaceable)
    staged = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    replaced = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        staged.mkdir(parents=True)
        yield staged
        if folder.exists():
            folder.rename(replaced)
        staged.rename(folder)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(
            f"{folder}: the {what} could not be written ({reason}); nothing was left behind. Free some "
            "space or name another folder"
        ) from error
    finally:
        if replaced.exists() and not folder.exists():  # stopped between the two renames
            replaced.rename(folder)
        shutil.rmtree(staged, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def check_replaceable(folder: Path, what: str, replaceable: re.Pattern[str]) -> None:
    """Raises UserError for a folder that holds other things than what is to be written.

    Args:
        folder: the folder, which may not exist.
        what: what is to be written, for messages.
        replaceable: names of the files that may be replaced.
    """
    if folder.exists():
        require(folder.is_dir(), f"{folder} is a file; name a folder for the {what}")
        others = sorted(p.name for p in folder.iterdir() if not replaceable.fullmatch(p.name))
        require(
            not others,
            f"{folder} holds {', '.join(others[:3])}, which belongs to no {what}, and will not be "
            "replaced; name another folder",
        )
