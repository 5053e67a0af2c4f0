"""The lint of the house finds each kind of violation, and nothing in sources that keep the rules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / ".ci" / "house.py"
GOOD = '''"""Adds numbers."""

import dataclasses
from typing import Protocol, overload


class Adder(Protocol):
    """Adds numbers in one of several ways."""

    def add(self, a: int, b: int) -> int:
        """Returns the sum."""

    def reset(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class PlainAdder:
    """Adds numbers as Python does."""

    start: int = 0

    def add(self, a: int, b: int) -> int:
        return self.start + a + b

    def __len__(self) -> int:
        return 2

    def _helper(self, a, b, c, d, e):
        return a

    class Inner:
        """Is nested."""

        def value(self, key: str) -> int:
            """Returns the value of `key`; besides, it is the reason why `x is None` may be said."""

            def inside():
                return 1

            return inside()


@overload
def total(a: int) -> int: ...
def total(a, b=0, *more, scale=1, **named):
    """Returns the total.

    Args:
        a, b: numbers.
        *more: more numbers,
            as many as
            wished: none, too.
        scale (float): a factor.
        **named: numbers with names.

    Returns:
        The sum.
    """
    return getattr(a, "real")  # user-named


def again(a, b, c, d, e):
    """Returns the same.

    Args: those of `total`.
    """
    # user-named
    return getattr(
        a,
        b,
    )
'''


@pytest.fixture(scope="module")
def house() -> ModuleType:
    spec = importlib.util.spec_from_file_location("house", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def found(house: ModuleType, root: Path, files: dict[str, str]) -> list[str]:
    """The violations of a repository that has these files, as `file:line: rule`."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return [f"{v.path}:{v.line}: {v.rule}" for v in house.check(root)]


def test_a_good_module_passes(house, tmp_path, capsys):
    assert found(house, tmp_path, {"rlaif_jax/good.py": GOOD, "README.md": "Say `told` never, besides."}) == []
    assert house.main(["--root", str(tmp_path)]) == 0
    assert "all rules hold" in capsys.readouterr().err


@pytest.mark.parametrize(
    "source, line",
    [
        ('"""Says what it was told."""\n', 1),
        ('"""Is good.\n\nThere are so\nmany of them.\n"""\n', 3),
        ("# It has a name of its\n# own.\n", 1),
        ("x = 1  # None stands here\n", 1),
        ('raise ValueError(f"{1} could be had " "now")\n', 1),
        ('x = ("nothing of its "\n     "own")\n', 1),
        ("told = 1\n", 1),
        ("x = 1\nbefore_told = x\n", 2),
        ("# Told: a word.\n", 1),
    ],
)
def test_forbidden_words_of_python(house, tmp_path, source, line):
    assert found(house, tmp_path, {"experiments/bad.py": source}) == [f"experiments/bad.py:{line}: word"]


def test_prompts_of_judge_models_are_exempt(house, tmp_path):
    source = '"""Prompts as told."""\n\nTEXT = """\\\nWhat stands here.\n"""\n# beside\n'
    (name,) = house.PROMPT_FILES
    assert found(house, tmp_path, {name: source}) == [f"{name}:1: word", f"{name}:6: word"]


@pytest.mark.parametrize(
    "source",
    ["x = so; many = x\n", "x = None  # is None\n", "retold = untold = 1  # besides\n", "# withstands a storm\n"],
)
def test_other_words_of_python(house, tmp_path, source):
    assert found(house, tmp_path, {"experiments/good.py": source}) == []


@pytest.mark.parametrize(
    "name, text, lines",
    [
        ("README.md", "One\nof its\nown, `beside` it, ```\nstands\n``` and told.\n", [2, 5]),
        ("docs/guide/a.md", "is none\n", [1]),
        ("experiments/RESULTS.md", "a\nbeside\n", [2]),
        ("rlaif_jax/page.html.jinja", "<p>told</p>\n", [1]),
        ("rlaif_jax/page.js", 'told("http://told"); // as told\nf(); /* so\n * many */\nbeside();\n', [1, 2]),
        ("tests/test_a.py", "told = 'beside'\n", []),
        ("rlaif_jax/data.txt", "told\n", []),
    ],
)
def test_forbidden_words_elsewhere(house, tmp_path, name, text, lines):
    assert found(house, tmp_path, {name: text}) == [f"{name}:{line}: word" for line in lines]


@pytest.mark.parametrize(
    "source, rule, line",
    [
        ("def f():\n    pass\n", "docstring", 1),
        ("class A:\n    def f(self):\n        pass\n", "docstring", 2),
        ("class A:\n    class B:\n        def f(self):\n            pass\n", "docstring", 3),
        ("if 1:\n    async def f():\n        pass\n", "docstring", 2),
        (f'def f():\n    """{"a" * 100}."""\n', "first-line", 2),
        ('def f():\n    """Returns a number"""\n', "first-line", 2),
        ('def _f():\n    """Returns a number that\n    is large."""\n', "first-line", 2),
        ('"""Module: things"""\n', "first-line", 1),
        ('def f(a, b, c, d, e):\n    """Returns a."""\n', "args", 1),
        (
            'def f(a, b, *, c, d, e):\n    """Returns a.\n\n    Args:\n        a, b: x.\n        c, d: y.\n    """\n',
            "args",
            1,
        ),
        (
            'def f(a, b, c, d, **e):\n    """Returns a.\n\n    Args:\n        a, b, c, d: x.\n    e: z.\n    """\n',
            "args",
            1,
        ),
        ('def f(a):\n    """Returns a.\n\n    Args:\n        a: x.\n        b: z.\n    """\n', "args", 1),
        ("x = hasattr(1, 'a')\n", "capability", 1),
        ("y = 1\nx = getattr(1, 'a', None)\n", "capability", 2),
    ],
)
def test_docstrings_and_capabilities(house, tmp_path, source, rule, line):
    assert found(house, tmp_path, {"rlaif_jax/bad.py": source}) == [f"rlaif_jax/bad.py:{line}: {rule}"]
    (tmp_path / "rlaif_jax" / "bad.py").unlink()
    assert found(house, tmp_path, {"experiments/script.py": source}) == [], "these rules are of the package alone"


def test_the_missing_parameters_are_named(house, tmp_path):
    source = 'def f(a, b, c, d, e):\n    """Returns a.\n\n    Args:\n        a, c, e: numbers.\n    """\n'
    assert house.main(["--root", str(tmp_path)]) == 0
    (tmp_path / "rlaif_jax").mkdir()
    (tmp_path / "rlaif_jax" / "bad.py").write_text(source)
    (violation,) = house.check(tmp_path)
    assert violation.message == "f has 5 parameters; `Args:` lacks b, d"


def function(name: str, lines: int) -> str:
    return f"def {name}():\n    '''Does it.\n\n    Long.\n    '''\n" + "    x = 1\n" * (lines - 1)


def test_sizes(house, tmp_path):
    files = {
        "experiments/long.py": "x = 1\n" * 451,
        "tests/test_long.py": "x = 1\n" * 450,
        "rlaif_jax/functions.py": function("f", 80) + function("g", 81),
        "tests/test_functions.py": "class TestA:\n    def test_a(self):\n" + "        x = 1\n" * 80,
    }
    assert found(house, tmp_path, files) == [
        "experiments/long.py:1: file-length",
        "rlaif_jax/functions.py:85: function-length",
        "tests/test_functions.py:2: function-length",
    ]


def test_long_functions_need_a_row_with_a_reason(house, tmp_path):
    table = "# Contributing\n\n| `rlaif_jax/a.py: f` | elsewhere |\n\n## Long functions\n\n| function | reason |\n|---|---|\n"
    rows = "| `rlaif_jax/a.py: g` | one scan |\n| `rlaif_jax/a.py: h` | |\n| `rlaif_jax/a.py: short` | gone |\n"
    source = "".join(function(name, 81) for name in "fgh")
    assert found(house, tmp_path, {"rlaif_jax/a.py": source, "CONTRIBUTING.md": table + rows}) == [
        "CONTRIBUTING.md:11: function-length",
        "rlaif_jax/a.py:1: function-length",
        "rlaif_jax/a.py:171: function-length",
    ]


def test_a_room_has_at_most_sixteen_files(house, tmp_path):
    rooms = {"rlaif_jax/a": 17, "rlaif_jax/b": 16, "tests": 17}
    files = {f"{room}/m{i}.py": "" for room, count in rooms.items() for i in range(count)}
    files["rlaif_jax/b/__pycache__/m.py"] = "told = 1"
    assert found(house, tmp_path, files) == ["rlaif_jax/a:1: room-size"]


def test_counts(house, tmp_path, capsys):
    found(house, tmp_path, {"experiments/a.py": "told = 1\n", "rlaif_jax/a/b.py": "told = 'told'\n"})
    assert house.main(["--root", str(tmp_path), "--counts"]) == 1
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed == [["3", "word"], ["1", "word", "experiments"], ["2", "word", "rlaif_jax/a"]]
