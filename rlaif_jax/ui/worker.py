"""The one thread that uses the database of a page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

from rlaif_jax.feedback.records.sqlite import Busy

T = TypeVar("T")
BLINK_S = 0.05
"""How long a connection of the page waits in SQLite for another writer: the other requests wait behind it."""


class Worker:
    """Runs functions one after the other in one thread: the page's event loop never waits for the disk.

    While another program writes for long, a change is tried again until `patience_s` is over; others take their turn in
    between, and what only reads goes on.

    Args:
        patience_s: seconds after which `run` gives up on a function that raises `Busy`.
    """

    def __init__(self, patience_s: float = 5.0) -> None:
        self._thread = ThreadPoolExecutor(1, "database")
        self._patience_s = patience_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs the function in the thread, waits for it and returns what it returns."""
        return self._thread.submit(function, *arguments).result()

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs the function in the thread and returns what it returns.

        It must be safe to run again after `Busy`, as everything is that a rater may send twice.

        Raises Busy where another program has been writing for too long.
        """
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
            except Busy:
                if time.monotonic() >= deadline:
                    raise
            await asyncio.sleep(BLINK_S)
