"""Imports point one way, without circles, and Flax's modules are known in one room."""

import ast
import re
import sys
import tomllib
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import rlaif_jax

ROOT = Path(rlaif_jax.__file__).parent
LEVELS = [
    {"types", "config", "files", "memory", "progress"},
    {"models", "data", "rewards", "parallel"},
    {"policies", "feedback", "algorithms"},
    {"programs", "steps", "train", "watch", "evaluate", "report", "quality"},
    {"recipes"},
    {"ui", "tools", "__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# Helpers with few friends: what each may import; nothing below the loop may import them.
HELPERS = {
    "sinks": {"config", "files", "progress"},
    "metrics": {"config", "files", "progress", "sinks"},
    "report": {"config", "files", "metrics", "quality"},
    "checkpoint": {"types", "config", "files"},
    "command_line": {"config", "progress"},
    "run": {"types", "config", "files", "metrics", "progress", "report", "checkpoint"},
}
Imports = dict[str, set[str]]


def imported(source: str, module: str, *, is_package: bool = False) -> set[str]:
    """Every module that `source` imports, wherever in the file, by its full name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def sources() -> dict[str, Path]:
    """Module name -> file."""
    return {
        ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(ROOT.rglob("*.py"))
    }


def own_imports(files: dict[str, Path]) -> Imports:
    """Module -> the package's own modules that it imports."""
    return {
        name: (imported(path.read_text(), name, is_package=path.name == "__init__.py") & set(files))
        - {name, "rlaif_jax"}
        for name, path in files.items()
    }


def room(module: str) -> str:
    return module.split(".")[1]


def wrong_way(imports: Imports) -> list[str]:
    """Imports that point up, or that a helper or its users may not have."""
    found = []
    for module, targets in imports.items():
        for target in targets:
            here, there = room(module), room(target)
            if here == there:
                continue
            if here in HELPERS:
                allowed = there in HELPERS[here]
            elif there in HELPERS:
                allowed = LEVEL[here] >= LEVEL["train"]
            else:
                allowed = LEVEL[there] <= LEVEL[here]
            if not allowed:
                found.append(f"{module} imports {target}")
    return found


def libraries(requirements: Sequence[str]) -> set[str]:
    """The distributions that requirements name, each in the one spelling of PEP 503."""
    return {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", line)[0]).lower() for line in requirements}


def not_listed(
    project: Mapping[str, Any],
    imports: Imports,
    named: Mapping[str, Collection[str]],
    providers: Mapping[str, Sequence[str]],
) -> list[str]:
    """Imports of libraries that a user may not have.

    Args:
        project: the table `project` of pyproject.toml.
        imports: module -> modules that it imports.
        named: room or room inside a room -> the extras that its messages name.
        providers: top-level module -> the distributions that bring it.
    """
    found = []
    core = libraries(project["dependencies"])
    extras = {extra: libraries(lines) for extra, lines in project["optional-dependencies"].items()}
    for module, targets in imports.items():
        for top in sorted({target.split(".")[0] for target in targets} - sys.stdlib_module_names - {"rlaif_jax"}):
            brought = libraries(providers.get(top, [top]))
            fitting = {extra for extra, own in extras.items() if own & brought}
            if not (brought & core or fitting & set(named.get(module.rpartition(".")[0], ()))):
                found.append(f"{module} imports {top}")
    return found


def circle(imports: dict[str, set[str]]) -> list[str]:
    """The names on one circle, or nothing."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        for target in sorted(imports.get(name, ())):
            if found := walk(target, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(imports) if (found := walk(name, []))), [])


def by_room(imports: Imports) -> Imports:
    rooms: Imports = {}
    for module, targets in imports.items():
        rooms.setdefault(room(module), set()).update({room(t) for t in targets} - {room(module)})
    return rooms


FILES = {name: path for name, path in sources().items() if name != "rlaif_jax"}
IMPORTS = own_imports(FILES)


def test_every_file_has_a_room():
    assert {room(module) for module in FILES} <= set(LEVEL) | set(HELPERS)
    assert "rlaif_jax.algorithms.base" in IMPORTS["rlaif_jax.train"]


def test_every_module_that_is_imported_exists():
    for path in (*FILES.values(), *ROOT.parent.glob("experiments/**/*.py"), *ROOT.parent.glob("tests/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlaif_jax."):
                assert node.module in FILES, f"{path}:{node.lineno}: there is no {node.module}"


def test_imports_point_one_way():
    assert wrong_way(IMPORTS) == []


def test_no_circles_between_modules_or_rooms():
    assert circle(IMPORTS) == []
    assert circle(by_room(IMPORTS)) == []


def test_the_package_never_imports_its_experiments_or_tests():
    for name, path in FILES.items():
        outside = {target.split(".")[0] for target in imported(path.read_text(), name)}
        assert not outside & {"experiments", "tests", "torch", "transformers", "rlax"}, name


EXTRA = re.compile(r'missing_extra\([^"]*"[^"]*",\s*"(\w+)"')
"""Where the code names the extra of a package that is missing."""


def test_each_library_is_a_dependency_or_of_an_extra_that_the_code_names():
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    imports = {name: imported(path.read_text(), name) for name, path in FILES.items()}
    named: dict[str, set[str]] = {}
    for name, path in FILES.items():
        named.setdefault(name.rpartition(".")[0], set()).update(re.findall(EXTRA, path.read_text()))
    assert set().union(*named.values()) == set(project["optional-dependencies"])
    assert not_listed(project, imports, named, packages_distributions()) == []


def test_verifiers_know_sources_alone_and_their_sandbox_nothing():
    """The sandbox starts with each answer: what it imports is waited for, and is within reach of the answer."""
    here = "rlaif_jax.feedback.verifiers"
    known = {f"rlaif_jax.{name}" for name in ("config", "files", "types", "data.prompts", "feedback.sources")}
    verifiers = {name: targets for name, targets in IMPORTS.items() if name.startswith(f"{here}.")}
    assert f"{here}.sandbox.tester" in verifiers
    for name, targets in verifiers.items():
        inside = f"{here}.sandbox" if name.startswith(f"{here}.sandbox") else here
        outside = {target for target in targets if not target.startswith(inside)}
        assert outside <= (known if inside == here else set()), f"{name} imports {outside}"


def test_only_models_know_flax_modules():
    for name, path in FILES.items():
        modules = {
            target
            for target in imported(path.read_text(), name)
            if target.startswith(("flax.linen", "flax.nnx", "flax.training"))
        }
        assert not modules or room(name) == "models", f"{name} imports {modules}"


def test_the_package_itself_imports_nothing():
    """`import rlaif_jax` is free, so every room can be imported alone."""
    assert not {
        t
        for t in imported((ROOT / "__init__.py").read_text(), "rlaif_jax", is_package=True)
        if t.startswith("rlaif_jax")
    }


def test_the_checks_see_what_they_look_for():
    assert wrong_way({"rlaif_jax.config": {"rlaif_jax.types"}}) == []
    assert wrong_way({"rlaif_jax.models.heads": {"rlaif_jax.policies.text"}}) == [
        "rlaif_jax.models.heads imports rlaif_jax.policies.text"
    ]
    assert wrong_way({"rlaif_jax.metrics": {"rlaif_jax.types"}}) != []
    assert wrong_way({"rlaif_jax.feedback.judges.language_model": {"rlaif_jax.run"}}) != []
    assert wrong_way({"rlaif_jax.checkpoint": {"rlaif_jax.models"}}) != []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    project = {"dependencies": ["array_record>=1"], "optional-dependencies": {"ui": ["Fast-API[all]>=1"]}}
    imports = {"rlaif_jax.ui.a": {"os.path", "array_record.python", "fastapi.routing", "rlaif_jax.ui"}}
    providers = {"array_record": ["array-record"], "fastapi": ["fast_api"]}
    assert not_listed(project, imports, {"rlaif_jax.ui": {"ui"}}, providers) == []
    assert not_listed(project, imports, {"rlaif_jax.data": {"ui"}}, providers) == ["rlaif_jax.ui.a imports fastapi"]
    assert not_listed(project, {"rlaif_jax.a": {"rich"}}, {}, {}) == ["rlaif_jax.a imports rich"]
    source = "from . import ppo\nfrom ..config import require\ndef f():\n    import rlaif_jax.train as t\n"
    assert {"rlaif_jax.algorithms.ppo", "rlaif_jax.config", "rlaif_jax.train"} <= imported(
        source, "rlaif_jax.algorithms.fit"
    )
