"""A disk that is truly full, a small tmpfs in a mount namespace, at five moments of a run."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rlaif_jax.parallel import JitRunner
from tests import full_disk, tiny
from tests.tiny import leaves, numbers

ROOT = Path(__file__).parents[1]
MOUNTED = 'mount -t tmpfs -o "size=$1" tmpfs "$2"'  # in a namespace of its own user: nobody needs to be root
RUN = f'{MOUNTED} && "$3" -m tests.full_disk "$2" "$4" "$5"; code=$?; rm -f "$2/filler"; cp -a "$2/." "$6"; exit $code'


def in_namespace(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A shell script in which a mounted disk is seen by nobody else and is gone at the end."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    return subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", *map(str, arguments)],
        env=os.environ
        | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on a disk with room, and the prompts of all runs."""
    folder = tmp_path_factory.mktemp("whole")
    if shutil.which("unshare") is None or in_namespace(MOUNTED, "1m", folder).returncode:
        pytest.skip("needs a user and a mount namespace for a small disk (unshare --map-root-user --mount)")
    prompts = tiny.write_prompts(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlaif_jax.train.make_runner", lambda parallel, rules: JitRunner())
        full_disk.judged(full_disk.settings(folder / "run", prompts), folder / "whole.sqlite")
    return folder / "run", prompts


@pytest.mark.parametrize(("error", "logged"), [("Failed to write; os_error_code='28'", 0), ("something else", 1)])
def test_only_the_first_array_that_cannot_be_written_is_an_error(error, logged, caplog):
    async def write() -> None:
        raise ValueError(error)

    async def save() -> None:  # as Orbax does: it waits for one array after the other
        tasks = [asyncio.create_task(write()) for _ in range(2)]
        await asyncio.sleep(0)
        for task in tasks:
            await task

    with pytest.raises(ValueError, match=error[:5]):
        asyncio.run(save())
    gc.collect()
    assert len([record for record in caplog.records if record.name == "asyncio"]) == logged


@pytest.mark.slow
@pytest.mark.parametrize("moment", full_disk.MOMENTS)
def test_a_full_disk_is_one_line_and_what_was_computed_stays(moment, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("rlaif_jax.train.make_runner", lambda parallel, rules: JitRunner())
    done, prompts = whole
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    result = in_namespace(RUN, full_disk.DISK_BYTES, disk, sys.executable, prompts, moment, kept)
    print(result.stderr)
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2
    assert str(disk) in message and re.search("No space left|disk is full", message)
    assert "Traceback" not in result.stderr
    if moment == "config":
        assert list(kept.iterdir()) == [], "no half-written run"
        return
    assert len(result.stderr.splitlines()) == 1, "nothing but the message"
    saved = {path.name for path in (kept / "run" / "checkpoints").iterdir() if path.name.isdigit()}
    # The fourth step's checkpoint may still have been on its way to the disk when the judge's step began.
    right = {"metrics": [set()], "judge": [{"2"}, {"2", "4"}], "checkpoint": [{"2"}], "report": [{"4", "6"}]}
    assert saved in right[moment]
    lines = numbers(kept / "run")
    assert lines == numbers(done)[: len(lines)]
    assert len(lines) == {"metrics": 0, "judge": 4, "report": 6}.get(moment, len(lines))

    config = full_disk.settings(kept / "run", prompts)
    full_disk.judged(dataclasses.replace(config, resume=True), tmp_path / "store.sqlite")
    assert numbers(kept / "run") == numbers(done)
    assert all(np.array_equal(a, b) for a, b in zip(leaves(kept / "run"), leaves(done), strict=True))
