"""Files for the readers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write("name", value, ...)`: a file of one JSON value a line, or of the text as it is."""

    def make(name: str, *values: Any) -> Path:
        path = tmp_path / name
        path.write_text("\n".join(v if isinstance(v, str) else json.dumps(v) for v in values))
        return path

    return make
