"""JSON lines with the place of every fault; files that are written whole or not at all."""

from __future__ import annotations

import errno
import gzip
import json
import os
import resource
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlaif_jax.config import UserError, require
from rlaif_jax.files import atomic_write, printable, read_bytes, read_json_lines

ROOT = Path(__file__).parents[1]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
BAD = st.sampled_from(["{", '{"a": ', "nul", '"\ud83d', "[1,]", "'a'", "refused"])


def parse(value, place):
    require(value != "refused", "this value is refused")
    return value, place


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(VALUES | st.just("") | BAD.map(lambda text: (text,)), max_size=8), end=st.booleans())
def test_good_lines_are_kept_and_bad_ones_named(tmp_path, lines, end):
    """A tuple is a line that is no JSON, an empty text a blank line."""
    path = tmp_path / "lines.jsonl"
    texts = []
    for line in lines:
        broken = line[0] if isinstance(line, tuple) else None
        text = json.dumps(line) if broken is None else '"refused"' if broken == "refused" else broken
        texts.append(b"  " if line == "" else text.encode(errors="surrogatepass"))
    path.write_bytes(b"\n".join(texts) + (b"\n" if end and texts else b""))
    good, bad = read_json_lines(path, parse)
    numbered = list(enumerate(lines, start=1))
    assert good == [(x, f"{path}:{i}") for i, x in numbered if not isinstance(x, tuple) and x != ""]
    wrong = [(i, x[0]) for i, x in numbered if isinstance(x, tuple)]
    assert len(bad) == len(wrong)
    for message, (i, text) in zip(bad, wrong):
        assert message.startswith(f"{path}:{i}: " + ("this value is refused" if text == "refused" else "no valid JSON"))


def test_only_a_last_line_without_its_newline_may_be_skipped(tmp_path):
    path = tmp_path / "lines.jsonl"
    for text, kept, faults in (
        ('{"a": 1}\n{"b": 2}', 2, 0),
        ('{"a": 1}\n{"b": ', 1, 0),
        ('{"a": 1}\n"refused"', 1, 0),
        ('{"a": 1}\n{"b": \n', 1, 1),
        ('{"a": \n{"b": 2}', 1, 1),
    ):
        path.write_text(text)
        good, bad = read_json_lines(path, parse, skip_cut=True)
        assert (len(good), len(bad)) == (kept, faults), text
    path.write_text('{"a": 1}\n{"b": ')
    assert len(read_json_lines(path, parse)[1]) == 1


def test_a_message_that_names_its_place_already_is_left_alone(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("1\n")

    def refuse(value, place):
        raise UserError(f"{place}: no {value} here")

    assert read_json_lines(path, refuse) == ([], [f"{path}:1: no 1 here"])


def test_bytes_may_be_packed_and_begin_with_a_mark(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'\xef\xbb\xbf{"a": 1}\n'))
    assert read_bytes(tmp_path / "a.jsonl.gz") == b'{"a": 1}\n'
    (tmp_path / "b.gz").write_bytes(b"this is not packed")
    packed = bytearray(gzip.compress(b"x" * 1000))
    (tmp_path / "short.gz").write_bytes(packed[:-9])
    packed[12] ^= 255
    (tmp_path / "spoilt.gz").write_bytes(packed)
    for name in ("b.gz", "short.gz", "spoilt.gz", "missing", "."):
        with pytest.raises(UserError, match=f"cannot read {tmp_path / name}: "):
            read_bytes(tmp_path / name)


# ---- Writing


def test_text_and_bytes_replace_the_file(tmp_path):
    path = tmp_path / "file"
    with atomic_write(path) as file:
        file.write("grüße\n")
    assert path.read_bytes() == "grüße\n".encode()
    with atomic_write(path, "wb") as file:
        file.write(b"\x00")
        assert path.read_bytes() == "grüße\n".encode()
    assert path.read_bytes() == b"\x00"
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_inside_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write_half():
        with atomic_write(path) as file:
            file.write("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("private", [False, True])
def test_others_may_read_what_is_not_private(tmp_path, private):
    mask = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "file", private=private) as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            file.write("secret")
    finally:
        os.umask(mask)
    assert mode == (0o600 if private else 0o640), "from the first byte on"
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_what_cannot_be_written_is_a_message(tmp_path, monkeypatch):
    (tmp_path / "text").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "no" / "file", tmp_path / "text" / "file", tmp_path / "folder"):
        with pytest.raises(UserError, match=f"cannot write {path}: "), atomic_write(path) as file:
            file.write("x")
    assert sorted(os.listdir(tmp_path)) == ["folder", "text"]

    def refuse(number):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=r"cannot write .*Input/output error"), atomic_write(tmp_path / "text") as file:
        file.write("new")
    assert (tmp_path / "text").read_text() == ""


def test_a_full_disk_is_a_message_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        with pytest.raises(UserError, match=f"cannot write {path}: File too large"), atomic_write(path) as file:
            file.write("x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_kill_9_at_any_moment_leaves_one_whole_file(tmp_path):
    program = (
        "import sys; from rlaif_jax.files import atomic_write\n"
        "for i in range(10**9):\n"
        "    with atomic_write(sys.argv[1]) as file:\n"
        "        for _ in range(200): file.write(f'{i}\\n')"
    )
    path = tmp_path / "file"
    for i in range(8):
        process = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=ROOT)
        before = path.stat().st_mtime_ns if path.exists() else 0
        while process.poll() is None and not (path.exists() and path.stat().st_mtime_ns > before):
            time.sleep(0.005)
        time.sleep(0.003 * i)
        process.kill()
        process.wait()
        lines = path.read_text().splitlines()
        assert len(lines) == 200
        assert len(set(lines)) == 1


def test_text_from_a_file_is_printed_without_control_codes(tmp_path):
    assert printable("a b\u00e9 \U0001f600") == "a b\u00e9 \U0001f600"
    assert printable("\x1b[31m\x9b\n\u2028\ud800") == "\\x1b[31m\\x9b\\n\\u2028\\ud800"
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"x\x1b": 1}))

    def refuse(value, place):
        raise UserError(f"no field {next(iter(value))}")

    assert read_json_lines(path, refuse) == ([], [f"{path}:1: no field x\\x1b"])
