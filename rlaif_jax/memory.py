"""How processes and programs get their memory. This module imports nothing but the standard library."""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8  # names of glibc's mallopt
NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Lets glibc keep freed memory for what is allocated next, instead of giving it back to the system.

    On CPUs XLA allocates the temporary arrays of a step anew each time. By default glibc maps those over 32 MiB as fresh pages,
    which the system fills with zeros: this takes as long as the step of a small model itself. All arrays then come from one
    arena, because the others are limited to 64 MiB. Call it before the process has several threads; it does nothing where
    the C library is another one.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((TRIM_THRESHOLD, NEVER), (MMAP_MAX, 0), (ARENA_MAX, 1)):
        mallopt(option, value)


def compiler_options(backend: str) -> dict[str, str] | None:
    """Returns XLA's options for programs of a backend; None where it needs none.

    On CPUs a pass removes the barriers before what `remat` recomputes in the backward pass; XLA then keeps it in memory.

    Args:
        backend: "cpu", "gpu" or "tpu".
    """
    return {"xla_disable_hlo_passes": "cse_barrier_expander"} if backend == "cpu" else None
