"""Reads what W&B keeps on disk, by the format of its file alone (records of LevelDB's log)."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

from rlaif_jax.metrics import read_metrics, without_time
from rlaif_jax.sinks.wandb import Tracking

KEPT = Tracking("offline" if importlib.util.find_spec("wandb") else "disabled")
"""Tracking of a recipe's run, where the package is installed."""

BLOCK, HEADER = 32768, 7


def records(run_folder: Path) -> list[Any]:
    """All records of the W&B files in a run folder, in the order of writing."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(run_folder.glob("wandb/*run-*/*.wandb")):
        data, at, part = path.read_bytes(), HEADER, b""
        while at + HEADER <= len(data):
            if BLOCK - at % BLOCK < HEADER:
                at += BLOCK - at % BLOCK
                continue
            _, size, kind = struct.unpack_from("<IHB", data, at)
            part += data[at + HEADER : at + HEADER + size]
            at += HEADER + size
            if kind in (1, 4):  # whole, or the last part
                found.append(Record.FromString(part))
                part = b""
    return found


def values(items: Any) -> dict[str, Any]:
    """{name: value} of the items of a record."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def history(run_folder: Path) -> list[dict[str, Any]]:
    """The rows that the run has logged, without what W&B adds to them."""
    rows = [values(record.history.item) for record in records(run_folder) if record.HasField("history")]
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]


def assert_same_numbers(run_folder: Path) -> None:
    """Asserts that W&B has every finite number of metrics.jsonl, and no other, apart from times."""
    expected, found = {}, {}
    for line in map(without_time, read_metrics(run_folder)):
        stage, step = line.pop("stage"), line.pop("step")
        expected[stage, step] = {f"{stage}/{name}": value for name, value in line.items() if value is not None}
    for row in history(run_folder):
        if "samples" in row or not (axis := [name for name in row if name.endswith("/step")]):
            continue
        stage = axis[0].removesuffix("/step")
        finite = {name: value for name, value in row.items() if not name.startswith(f"{stage}/time/")}
        found[stage, finite.pop(axis[0])] = finite
    assert found == expected and found
