"""Checks the rules of the house that no public linter knows: words, docstrings, sizes, capabilities.

    python .ci/house.py               # one line FILE:LINE: RULE: MESSAGE for each violation; exit status 1 if any
    python .ci/house.py --counts      # the number of violations of each rule, and of each rule and folder

CONTRIBUTING.md states the rules, and its section "Long functions" lists the functions that may exceed the limit.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "rlaif_jax"
WORDS = ("told", "beside", "stands", "so many", "is none", "of its own", "could be had")
FIRST_LINE = 100  # columns of a docstring's first line
PARAMETERS = 4  # a public function with more of them documents each
FILE_LINES = 450
FUNCTION_LINES = 80  # without the docstring
ROOM_FILES = 16
# Prompts of judge models: a verdict is stored with the hash of its prompt, so a changed word would make all stored
# verdicts old. The rule on words passes over the string constants of these files; it reads docstrings and comments.
PROMPT_FILES = ("rlaif_jax/feedback/api/builtin_templates.py",)
LONG_FUNCTIONS = "Long functions"  # the heading in CONTRIBUTING.md

Function = ast.FunctionDef | ast.AsyncFunctionDef
# What may lie between two words of a phrase: line ends, comment signs, quotes of adjacent literals.
_GAP = r"[\s#\"'*/]+"
# A capital may begin a phrase, but "is None" in code and prose is Python's.
_PHRASES = re.compile("|".join(rf"\b(?i:{words[0]}){_GAP.join(words[1:].split(' '))}\b" for words in WORDS))
_JS_COMMENT = re.compile(r"/\*.*?\*/|(?<![:\"'\w])//[^\n]*", re.DOTALL)
_CODE_SPAN = re.compile(r"(`+)[^`].*?\1", re.DOTALL)
_ENTRY = re.compile(r"^(\s+)(\*{0,2}\w+(?:\s*,\s*\*{0,2}\w+)*)(?:\s*\([^)]*\))?:")
_SEE_ARGS = re.compile(r"^\s*Args:\s+\S.*`[\w.]+`", re.MULTILINE)


class Violation(NamedTuple):
    """One place that breaks one rule."""

    path: str
    line: int
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}: {self.message}"


# --- words ---


def phrases(text: str) -> Iterator[tuple[int, str]]:
    """Yields (line, phrase) of every forbidden phrase in `text`, also of one that a line end splits."""
    for match in _PHRASES.finditer(text):
        yield text.count("\n", 0, match.start()) + 1, re.sub(_GAP, " ", match[0]).lower()


def blank_code(source: str, constants: bool = True) -> str:
    """Returns Python source in which all but comments and string literals is blanked, line numbers kept.

    Without `constants`, literals that do not begin a line are blanked too: all but docstrings.
    """
    lines = source.splitlines(keepends=True)
    kept = [re.sub(r"\S", "\0", line) for line in lines]
    literals = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in literals:
            (first, begin), (last, end) = token.start, token.end
            if token.type != tokenize.COMMENT and not constants and lines[first - 1][:begin].strip():
                continue
            for row in range(first, last + 1):
                low, high = begin if row == first else 0, end if row == last else len(lines[row - 1])
                kept[row - 1] = kept[row - 1][:low] + lines[row - 1][low:high] + kept[row - 1][high:]
    return "".join(kept)


def keep_lines(match: re.Match[str]) -> str:
    """Returns the line ends of a match, so that a removed span moves no line."""
    return "\n" * match[0].count("\n")


def readable(name: str, text: str) -> str:
    """Returns the part of a file that the rule on words applies to, line numbers kept."""
    path = Path(name)
    if path.suffix == ".py":
        return blank_code(text, constants=name not in PROMPT_FILES)
    if path.suffix == ".js":
        comments, end = [], 0
        for match in _JS_COMMENT.finditer(text):
            comments += ["\n" * text.count("\n", end, match.start()), match[0]]
            end = match.end()
        return "".join(comments)
    if path.suffix == ".md":
        return _CODE_SPAN.sub(keep_lines, text)
    return text


def identifiers(source: str) -> Iterator[tuple[int, str]]:
    """Yields (line, name) of every name in Python source that has a forbidden word as a part."""
    words = {word for word in WORDS if " " not in word}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and words & set(token.string.lower().split("_")):
            yield token.start[0], token.string


# --- docstrings ---


def definitions(tree: ast.AST, prefix: str = "", protocol: bool = False) -> Iterator[tuple[str, Function, bool]]:
    """Yields (dotted name, function, whether its class is a Protocol) for functions and methods, not for nested functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield prefix + node.name, node, protocol
        elif isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases}
            yield from definitions(node, f"{prefix}{node.name}.", "Protocol" in bases)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from definitions(node, prefix, protocol)


def decorators(function: Function) -> set[str]:
    """Returns the last parts of the decorators' names: `overload`, `setter`, `override` ..."""
    names = (ast.unparse(node).partition("(")[0] for node in function.decorator_list)
    return {name.rpartition(".")[2] for name in names}


def parameters(function: Function) -> list[str]:
    """Returns the names of the parameters, without `self` and `cls`."""
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args)]
    if names[:1] in (["self"], ["cls"]):
        names = names[1:]
    variable = [a.arg for a in (given.vararg, given.kwarg) if a is not None]
    return names + [a.arg for a in given.kwonlyargs] + variable


def documented(docstring: str) -> set[str]:
    """Returns the names that the section `Args:` of a docstring has entries for."""
    names: set[str] = set()
    lines = docstring.expandtabs().splitlines()
    heads = [i for i, line in enumerate(lines) if line.strip() == "Args:"]
    if not heads:
        return names
    margin, indent = len(lines[heads[0]]) - len(lines[heads[0]].lstrip()), 0
    for line in lines[heads[0] + 1 :]:
        depth = len(line) - len(line.lstrip())
        if line.strip() and depth <= margin:
            break
        if (entry := _ENTRY.match(line)) and depth == (indent := indent or depth):
            names |= {name.strip().lstrip("*") for name in entry[2].split(",")}
    return names


def check_docstrings(path: str, tree: ast.Module) -> Iterator[Violation]:
    """Checks that public functions have docstrings, what their first lines are, and the sections `Args:`.

    Without a docstring may be: stubs of a Protocol, methods that a Protocol of the same file documents, Flax's `setup`.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | Function) and (text := ast.get_docstring(node)):
            first = text.splitlines()[0].rstrip()
            line = node.body[0].lineno
            if len(first) > FIRST_LINE:
                yield Violation(path, line, "first-line", f"{len(first)} columns; at most {FIRST_LINE}")
            if not re.search(r"[.!?][\"'`)\]]*$", first):
                yield Violation(path, line, "first-line", f"the first sentence does not end on it: {first!r}")
    contracts = {"setup"} | {f.name for _, f, protocol in definitions(tree) if protocol and ast.get_docstring(f)}
    for name, function, protocol in definitions(tree):
        private = any(part.startswith("_") for part in name.split("."))
        if private or decorators(function) & {"overload", "override", "setter", "deleter"}:
            continue
        text = ast.get_docstring(function) or ""
        if not text:
            inherited = "." in name and (protocol or function.name in contracts)
            if not inherited:
                yield Violation(path, function.lineno, "docstring", f"{name} has none")
            continue
        wanted = parameters(function)
        if len(wanted) > PARAMETERS and not _SEE_ARGS.search(text):
            missing = [parameter for parameter in wanted if parameter not in documented(text)]
            if missing:
                message = f"{name} has {len(wanted)} parameters; `Args:` lacks {', '.join(missing)}"
                yield Violation(path, function.lineno, "args", message)
        if unknown := sorted(documented(text) - set(wanted)):
            yield Violation(path, function.lineno, "args", f"{name} has no parameter {', '.join(unknown)}")


# --- sizes and capabilities ---


def long_functions(contributing: str) -> dict[str, int]:
    """Returns the functions that the table of CONTRIBUTING.md allows to be long, each with its line there.

    A row reads "| `rlaif_jax/train.py: train` | reason |"; a row without a reason is passed over.
    """
    allowed, inside = {}, False
    for number, line in enumerate(contributing.splitlines(), start=1):
        if line.startswith("#"):
            inside = line.strip("# ") == LONG_FUNCTIONS
        row = re.match(r"\|\s*`([^`]+):\s*([\w.]+)`\s*\|\s*\S[^|]*\w", line)
        if inside and row:
            allowed[f"{row[1]}: {row[2]}"] = number
    return allowed


def function_lines(function: Function) -> int:
    """Returns the number of lines of a function, its docstring not counted."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        assert docstring.end_lineno is not None
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def check_capabilities(path: str, source: str, tree: ast.Module) -> Iterator[Violation]:
    """Checks that each `getattr` and `hasattr` has a comment with its reason, on its line or on the line above."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            assert node.end_lineno is not None
            if not comments & set(range(node.lineno - 1, node.end_lineno + 1)):
                yield Violation(path, node.lineno, "capability", f"{node.func.id} without a comment that says why")


# --- the whole house ---


def files(root: Path) -> Iterator[Path]:
    """Yields the files that the rules apply to: package, experiments, tests, pages."""
    for folder in (PACKAGE, "experiments", "tests", "docs"):
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and not any(p.startswith((".", "__pycache__")) for p in path.relative_to(root).parts):
                yield path
    yield from sorted(root.glob("*.md"))


def check_file(root: Path, path: Path, long: set[str]) -> Iterator[Violation]:
    """Checks one file; adds the functions found to be long to `long`."""
    name = path.relative_to(root).as_posix()
    room = name.split("/")[0]
    if path.suffix not in (".py", ".js", ".css", ".jinja", ".md"):
        return
    text = path.read_text()
    if room != "tests":
        for line, phrase in phrases(readable(name, text)):
            yield Violation(name, line, "word", f"{phrase!r} is one of the forbidden words of CONTRIBUTING.md")
    if path.suffix != ".md" and room != "docs" and text.count("\n") > FILE_LINES:
        yield Violation(name, 1, "file-length", f"{text.count(chr(10))} lines; at most {FILE_LINES}")
    if path.suffix != ".py":
        return
    tree = ast.parse(text)
    if room != "tests":
        for line, identifier in identifiers(text):
            yield Violation(name, line, "word", f"the name {identifier} contains a forbidden word")
    for function, node, _ in definitions(tree):
        if function_lines(node) > FUNCTION_LINES:
            long.add(f"{name}: {function}")
            yield Violation(name, node.lineno, "function-length", f"{function}: {function_lines(node)} lines")
    if room == PACKAGE:
        yield from check_docstrings(name, tree)
        yield from check_capabilities(name, text, tree)


def check(root: Path = ROOT) -> list[Violation]:
    """Returns all violations under `root`, by file and line."""
    contributing = root / "CONTRIBUTING.md"
    allowed = long_functions(contributing.read_text()) if contributing.exists() else {}
    found: list[Violation] = []
    long: set[str] = set()
    rooms: Counter[Path] = Counter()
    for path in files(root):
        found += check_file(root, path, long)
        rooms[path.parent] += path.relative_to(root).parts[0] == PACKAGE
    found = [
        v for v in found if v.rule != "function-length" or f"{v.path}: {v.message.partition(':')[0]}" not in allowed
    ]
    for name, line in allowed.items():
        if name not in long:
            message = f"{name} is not above {FUNCTION_LINES} lines, or does not exist: remove its row"
            found.append(Violation("CONTRIBUTING.md", line, "function-length", message))
    for folder, count in rooms.items():
        if count > ROOM_FILES:
            message = f"{count} files side by side; at most {ROOM_FILES}"
            found.append(Violation(folder.relative_to(root).as_posix(), 1, "room-size", message))
    return sorted(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 1 if a rule is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", action="store_true", help="print numbers instead of places")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository (default: this one)")
    options = parser.parse_args(arguments)
    found = check(options.root)
    if options.counts:
        for rule, count in sorted(Counter(v.rule for v in found).items()):
            print(f"{count:6} {rule}")
        for (rule, folder), count in sorted(Counter((v.rule, str(Path(v.path).parent)) for v in found).items()):
            print(f"{count:6} {rule:16} {folder}")
    else:
        for violation in found:
            print(violation)
    print(f"house: {len(found)} violations" if found else "house: all rules hold", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
