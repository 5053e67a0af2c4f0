"""Generates the API pages from the package tree: a page for each room and for each module, none listed by hand."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rlaif_jax"
Nav = list[dict[str, Any]]


def first_sentence(path: Path) -> str:
    """Returns the first line of a module's docstring, or nothing."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def page(path: Path) -> str:
    """Returns the address of the page of a module or of a room, below docs/."""
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("rlaif_jax", "api", 1) + ".md"


def room_page(room: Path) -> str:
    """Returns the Markdown of a room's page: its docstring and own members, and a table of its modules."""
    name = ".".join(room.relative_to(ROOT).parts)
    body = ast.parse((room / "__init__.py").read_text()).body
    own = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    rows = []
    for path in sorted(room.iterdir()):
        source = path / "__init__.py" if path.is_dir() else path
        if source.suffix == ".py" and source.exists() and path.name != "__init__.py":
            link = f"{path.name}/index.md" if path.is_dir() else f"{path.stem}.md"
            rows.append(f"| [`{path.stem}`]({link}) | {first_sentence(source)} |")
    return "\n".join(
        [
            f"# {name}",
            "",
            f"::: {name}",
            f"    options: {{members: {json.dumps(own)}}}",
            "",
            "| module | content |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def generate(room: Path, pages: dict[str, str]) -> Nav:
    """Adds the pages of a room and of all that it holds to `pages`; returns the room's entries of the navigation."""
    pages[page(room / "index")] = room_page(room)
    nav: Nav = [{"Overview": page(room / "index")}]
    for path in sorted(room.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if (path / "__init__.py").exists():
            nav.append({path.name: generate(path, pages)})
        elif path.suffix == ".py" and path.name != "__init__.py":
            pages[page(path)] = f"# {path.stem}\n\n::: {'.'.join(path.relative_to(ROOT).with_suffix('').parts)}\n"
            nav.append({path.stem: page(path)})
    return nav


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Appends the API, and the table of papers if it exists, to the navigation of mkdocs.yml."""
    assert config.nav is not None
    if (ROOT / "docs" / "papers.md").exists():
        config.nav.append({"Papers": "papers.md"})
    config.nav.append({"API": generate(PACKAGE, {})})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages to the files of the site."""
    pages: dict[str, str] = {}
    generate(PACKAGE, pages)
    missing = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" and page(path) not in pages]
    assert not missing, f"modules without a page (a folder without __init__.py?): {missing}"
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files
