"""The machine, the versions of libraries and the code that a run was made with."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlaif_jax.files import atomic_write

_PACKAGES = ("rlaif_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def save_environment(run_folder: Path) -> Path:
    """Writes `environment.json`, {"machine": ..., "versions": ...}, and returns its path.

    The versions hold the commit of the code, too (see `commit`). A run calls it when it starts.

    A page that is made later, perhaps on another machine, then still says what the run ran on.

    Raises:
        UserError: it cannot be written.
    """
    path = Path(run_folder) / "environment.json"
    with atomic_write(path) as file:
        file.write(json.dumps({"machine": machine(), "versions": {**versions(), "commit": commit()}}, indent=1) + "\n")
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


def made_by(function: Callable[..., Any]) -> dict[str, str]:
    """Returns what decides, apart from its arguments, which numbers a function computes.

    These are the versions, JAX's backend, and hashes of this package and of the function's file.

    Args:
        function: a function, or a `functools.partial` of one.
    """
    import jax

    while isinstance(function, functools.partial):
        function = function.func
    script = Path(inspect.getsourcefile(function) or "")
    return {
        **versions(),
        "backend": jax.default_backend(),
        "sources": package_sources(),
        "script": _digest(script.read_text()) if script.is_file() else "",
    }


@functools.cache
def package_sources() -> str:
    """Returns a hash of all Python files of this package, any of which may matter to a number."""
    root = Path(__file__).parents[1]
    return _digest({str(path.relative_to(root)): path.read_text() for path in sorted(root.rglob("*.py"))})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def commit(package: Path = Path(__file__).parents[1]) -> str | None:
    """Returns the git commit of the code, with " (modified)" if tracked files differ from it.

    Returns None where git does not track the package, as in an installed one. Never fails.

    Args:
        package: the folder of the package.
    """

    def git(*arguments: str) -> str:
        # Variables such as GIT_DIR, which a git hook sets, would name another repository.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        command = ["git", "--no-optional-locks", "-C", str(package), *arguments]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=10)
        return found.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # an environment inside a work tree is not a part of it
        return git("rev-parse", "HEAD") + (" (modified)" if git("status", "--porcelain", "-uno") else "")
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


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
