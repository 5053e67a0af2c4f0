"""The machine and the versions of libraries that a run was made with."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from pathlib import Path

from rlaif_jax.files import atomic_write

_PACKAGES = ("rlaif_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def save_environment(run_folder: Path) -> Path:
    """Writes `environment.json`, {"machine": ..., "versions": ...}, and returns its path.

    A run calls it when it starts.

    A page that is made later, perhaps on another machine, then still says what the run ran on.

    Raises:
        UserError: it cannot be written.
    """
    path = Path(run_folder) / "environment.json"
    with atomic_write(path) as file:
        file.write(json.dumps({"machine": machine(), "versions": versions()}, indent=1) + "\n")
    return path


def environment_here() -> dict[str, dict[str, str | int | float]]:
    """Returns the environment of this process.

    Devices are left out if the process has not loaded JAX: to ask for them would start a backend.
    """
    return {"machine": machine() if "jax" in sys.modules else _host(), "versions": {**versions()}}


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the installed libraries that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def machine() -> dict[str, str | int | float]:
    """Returns a description of the machine that this process runs on.

    It has system, CPU, cores that the process may use, memory (GiB), JAX backend and devices.

    Starts JAX's backend if it has not started yet. Holds no name or address of the machine.
    """
    import jax

    return _host() | {
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "accelerator": ", ".join(sorted({device.device_kind for device in jax.devices()})),
        "processes": jax.process_count(),
    }


def _host() -> dict[str, str | int | float]:
    host: dict[str, str | int | float] = {"system": f"{platform.system()} {platform.machine()}"}
    name = platform.processor()
    with contextlib.suppress(OSError):
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = match.group(1) if match else name
    if name:
        host["cpu"] = name
    host["cores"] = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with contextlib.suppress(ValueError, OSError, AttributeError):
        host["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return host
