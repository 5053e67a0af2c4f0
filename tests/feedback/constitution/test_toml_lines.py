"""Every value of a TOML file knows its line, and every message says it."""

from __future__ import annotations

import json
import time
import tomllib

import hypothesis
import hypothesis.strategies as st
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.feedback.constitution.toml_lines import read_entries

FILE = (
    '''\
# A comment, with [[rule]] in it.
name = "x"   # and another

[[rule]]
name = "one"
text = """
name = "not a field"
[[rule]]
"""
words = [
  "a",   # a ] bracket

  "b",
]
'quoted key' = 'it'''
    + """'s'

  [[ rule ]]  # indented
name = "two"
[[other]]
"""
)


def written(tmp_path, text: str | bytes):
    path = tmp_path / "file.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_values_and_lines(tmp_path):
    text = FILE.replace("'it's'", '"it\'s"')
    found, entries = read_entries(written(tmp_path, text), ["rule", "other"])
    assert found == text
    assert [(e.section, e.line) for e in entries] == [("", 1), ("rule", 4), ("rule", 17), ("other", 19)]
    assert {k: line for k, (_, line) in entries[1].values.items()} == {
        "name": 5,
        "text": 6,
        "words": 10,
        "quoted key": 15,
    }
    # The values are those of the library's parser.
    whole = tomllib.loads(text)
    assert [{k: v for k, (v, _) in e.values.items()} for e in entries] == [
        {"name": "x"},
        *whole["rule"],
        *whole["other"],
    ]


TEXTS = st.lists(st.sampled_from([*"a]}[{#=,\n\\' ", '"', '"""', "'''"]), max_size=8).map("".join)


def quoted(text: str) -> str:
    """A basic text: JSON's escapes are TOML's."""
    return json.dumps(text)


def in_several_lines(text: str) -> str:
    return '"""' + text.replace("\\", "\\\\").replace('"""', '""\\"') + '"""'


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    st.lists(st.tuples(st.sampled_from(["text", "lines", "list", "comment", "literal"]), TEXTS), max_size=6)
)
def test_every_statement_has_its_line(tmp_path, statements):
    """The file is made of statements whose lines and values are known."""
    text, expected = "", {}
    for number, (kind, value) in enumerate(statements):
        name, line = f"k{number}", text.count("\n") + 1
        if kind == "comment":
            text += "# " + value.replace("\n", " ") + "\n\n"
            continue
        if kind == "literal":
            value = value.replace("'", "").replace("\n", " ")
        written_as = {
            "text": quoted(value),
            "lines": in_several_lines(value),
            "list": f"[ # ] {value.replace(chr(10), ' ')}\n  {quoted(value)},\n\n  {{ x = {quoted(value)} }},\n]",
            "literal": f"'{value}'",
        }[kind]
        text += f"{name} = {written_as}  # {value.replace(chr(10), ' ')}\n"
        expected[name] = line
    text += "[[rule]]\n"
    _, entries = read_entries(written(tmp_path, text), ["rule"])
    assert {name: line for name, (_, line) in entries[0].values.items()} == expected
    assert {name: value for name, (value, _) in entries[0].values.items()} | {"rule": [{}]} == tomllib.loads(text)
    assert entries[1].line == text.count("\n")


def test_the_time_is_that_of_the_length(tmp_path):
    """4,000 lines of one list: 26 s where each line reads all lines before it again."""
    text = "[[rule]]\nwords = [\n" + '  "word",\n' * 4000 + "]\nname = 'x'\n"
    start = time.perf_counter()
    _, entries = read_entries(written(tmp_path, text), ["rule"])
    assert time.perf_counter() - start < 5
    assert len(entries[1].values["words"][0]) == 4000 and entries[1].values["name"] == ("x", 4004)


def test_windows_line_ends_and_a_byte_order_mark(tmp_path):
    _, entries = read_entries(written(tmp_path, b'\xef\xbb\xbf[[rule]]\r\n\r\nname = "a"\r\n[[rule]]\r\n'), ["rule"])
    assert [(e.section, e.line) for e in entries] == [("", 1), ("rule", 1), ("rule", 4)]
    assert entries[1].values == {"name": ("a", 3)}


@pytest.mark.parametrize(
    "text, message",
    [
        ("", r"file\.toml:1: the file is empty: expected \[\[rule\]\]"),
        ("# only a comment\n\n", r":1: the file is empty"),
        ("[[rule]]\nname = \n", r":2: no valid TOML at column 8"),
        ("a = 1\n\na = 2\n", r":3: no valid TOML at column \d+: Cannot overwrite"),
        ('[[rule]]\nname = "a"\n\nwords = ["a",\n"b"\n[[rule]]\nname = "c"\n', r":[46]: no valid TOML"),
        ('[[rule]]\nname = "a"\n\ntext = """never closed\n\n[[rule]]\n', r":4: no valid TOML: Unterminated"),
        ("[[rule]]\n[[rules]]\n", r":2: unknown section \[\[rules\]\]; there are \[\[rule\]\]"),
        ("\n[rule]\n", r":2: write \[\[rule\]\], with two brackets"),
        ("[[rule]]\n[rule.more]\n", r":2: unknown section \[rule\.more\]"),
        (b'[[rule]]\nname = "\xff"\n', r":2: this is no UTF-8 text \(byte 0xff\)"),
        ("a = " + "[" * 100_000, r"no valid TOML"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_entries(written(tmp_path, text), ["rule"])


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none\.toml: No such file"):
        read_entries(tmp_path / "none.toml", ["rule"])


def entry(tmp_path, text: str):
    return read_entries(written(tmp_path, "[[rule]]\n" + text), ["rule"])[1][1]


def test_fields_by_kind(tmp_path):
    found = entry(tmp_path, 'a = "x"\nb = 2\nc = ["y"]\nd = true\n')
    assert (found.text("a"), found.number("b"), found.texts("c"), found.flag("d", False)) == ("x", 2.0, ("y",), True)
    assert (found.text("e", "z"), found.number("e", 3.0), found.flag("e", False)) == ("z", 3.0, False)
    found.done()


@pytest.mark.parametrize(
    "text, read, message",
    [
        ("\na = 1", lambda e: e.text("a"), r":3: \[\[rule\]\]: a must be a text in quotes, not 1"),
        ('a = " "', lambda e: e.text("a"), r":2: \[\[rule\]\]: a is empty"),
        ('a = "x"', lambda e: e.number("a"), r":2: \[\[rule\]\]: a must be a number, not 'x'"),
        ("a = true", lambda e: e.number("a"), r"a must be a number, not True"),
        ("a = nan", lambda e: e.number("a"), r"a must be a number, not nan"),
        ("a = inf", lambda e: e.number("a"), r"a must be a number, not inf"),
        ('a = "x"', lambda e: e.texts("a"), r"a must be a list of texts"),
        ("a = []", lambda e: e.texts("a"), r"a must be a list of texts"),
        ('a = ["x", 1]', lambda e: e.texts("a"), r"a must be a list of texts"),
        ("a = 1", lambda e: e.flag("a", True), r"a must be true or false, not 1"),
        ('a = "x"', lambda e: e.choice("a", ("y", "z")), r"a is 'x'; it is one of y, z"),
        ("", lambda e: e.text("a"), r":1: \[\[rule\]\]: needs a, a text"),
        ("name = 1\nat_lest = 2", lambda e: (e.has("name"), e.has("at_least"), e.done()), r":3: .*did you mean at_least"),
        ('"z\\u001b[31m" = 2', lambda e: e.done(), r":2: .*has no field z\\x1b\[31m; it has "),
        ("zzz = 2", lambda e: (e.has("name"), e.done()), r":2: .*has no field zzz; it has name"),
    ],
)  # fmt: skip
def test_fields_that_are_wrong(tmp_path, text, read, message):
    with pytest.raises(UserError, match=message):
        read(entry(tmp_path, text))
