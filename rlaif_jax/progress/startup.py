"""A script's command line, and what it does first, before the imports, which take seconds.

This module imports nothing but the standard library.
"""

from __future__ import annotations

import re
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from rlaif_jax.memory import keep_freed_memory

ALIVE_EVERY_S = 2.0
"""Seconds between two lines while the imports run."""


class Loading:
    """Prints at once that this script is loading, and again every few seconds until `done`.

    The lines go to the standard error, so that the output of `--help` stays what it is. Before any thread exists, it
    calls `keep_freed_memory`.
    """

    def __init__(self) -> None:
        keep_freed_memory()
        self._name = Path(sys.argv[0]).stem
        self._done = threading.Event()
        self._started = time.monotonic()
        print(f"{self._name}: loading JAX and this package", file=sys.stderr, flush=True)
        threading.Thread(target=self._beat, daemon=True).start()

    def done(self) -> None:
        """Ends the lines; a second call does nothing."""
        self._done.set()

    def _beat(self) -> None:
        while not self._done.wait(ALIVE_EVERY_S):
            seconds = time.monotonic() - self._started
            print(f"{self._name}: still loading, {seconds:.0f} s", file=sys.stderr, flush=True)


def command_text(arguments: Sequence[str]) -> str:
    """Returns a command line as a shell reads it, with the interpreter's name alone and without secrets.

    Args:
        arguments: the interpreter and its arguments. The value of an option that is named as a key, token, secret or
            password becomes ***, as does the password of an address.
    """
    shown, hide = [Path(arguments[0]).name], False
    for argument in arguments[1:]:
        name, given, _ = argument.partition("=")
        secret = re.fullmatch(r"--?(.*[-_.])?(key|token|secret|password)", name, re.IGNORECASE)
        if hide:
            argument = "***"
        elif secret and given:
            argument = f"{name}=***"
        hide = bool(secret) and not given
        shown.append(re.sub(r"(://[^/@\s:]*:)[^/@\s]+@", r"\1***@", argument))
    return shlex.join(shown)
