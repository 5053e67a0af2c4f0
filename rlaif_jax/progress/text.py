"""Times, and text from outside, as a terminal shows them."""

from __future__ import annotations

import re
import unicodedata

from rich.cells import cell_len, set_cell_size

# CSI sequences, then OSC and other strings up to their end, then two-character sequences.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b[PX\]^_]|[\x90\x98\x9d-\x9f]).*?(?:\x07|\x1b\\|\x9c|$)|\x1b.?", re.S
)


def one_line(text: str) -> str:
    """Returns text from outside as one line that is safe to print.

    Escape sequences, control characters and those that change the direction of writing are removed.
    """
    shown = (" " if c.isspace() else c for c in _ESCAPES.sub("", text))
    return " ".join("".join(c for c in shown if unicodedata.category(c)[0] != "C").split())


def escaped(text: str) -> str:
    """Returns text from outside in which all that a terminal obeys is written as an escape.

    Escaped are control characters except line ends and tabs, and invisible ones such as those that change the direction
    of writing. The joiners of emoji and of some scripts stay.
    """
    return "".join(c if _harmless(c) else c.encode("unicode_escape").decode() for c in text)


def _harmless(c: str) -> bool:
    return c in "\n\t\u200c\u200d" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def cut_end(text: str, width: int) -> str:
    """Returns a text that takes at most `width` columns: its beginning, where it is longer."""
    return text if cell_len(text) <= width else set_cell_size(text, width - 3) + "..."


def cut_start(text: str, width: int) -> str:
    """Returns a text that takes at most `width` columns: its end, where it is longer."""
    if cell_len(text) <= width:
        return text
    text = text[-width:]
    while cell_len(text) > width - 3:
        text = text[1:]
    return "..." + text


def duration(seconds: float) -> str:
    """Returns seconds as 0:07, 12:34 or 1:02:03."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
