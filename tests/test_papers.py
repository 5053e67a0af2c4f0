"""The table of papers names functions and files that exist, and knows which functions nothing but a test uses."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "papers.md").read_text().splitlines()
    if line.startswith("|") and "`" in line
]
FUNCTIONS = {name: row[3] for row in ROWS for name in re.findall(r"`(rlaif_jax\.[\w.]+)`", row[2])}
NAMES = sorted(set(re.findall(r"`(rlaif_jax\.[\w.]+)`", "\n".join(cell for row in ROWS for cell in row))))


@pytest.mark.parametrize("path", NAMES)
def test_every_name_in_the_table_exists(path):
    module, name = path.rsplit(".", 1)
    assert name in vars(importlib.import_module(module))


def test_every_file_in_the_table_exists():
    files = {file for row in ROWS for file in re.findall(r"`(experiments/[\w.]+)`", row[3])}
    assert len(files) >= 5
    assert not [file for file in files if not (ROOT / file).is_file()]


def names_in(file):
    tree = ast.parse(file.read_text())
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
    }


def test_what_only_the_library_has_is_called_so():
    """A function of rewards/, quality/ or selection that no file but its own uses is "library only", and no other is."""
    used_in = {file: names_in(file) for room in ("rlaif_jax", "experiments") for file in (ROOT / room).rglob("*.py")}
    for path, users in FUNCTIONS.items():
        module, name = path.rsplit(".", 1)
        own = ROOT / (module.replace(".", "/") + ".py")
        elsewhere = [file for file, names in used_in.items() if name in names and file != own]
        if path.startswith(("rlaif_jax.rewards", "rlaif_jax.quality", "rlaif_jax.feedback.selection")):
            assert elsewhere or users == "library only" or module in users or name in ("align", "token_blame"), path
            assert not elsewhere or users != "library only", (path, elsewhere)
