"""The header and tensors of GGUF files: against llama.cpp's library and hand numbers; damaged files."""

from __future__ import annotations

import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.data.gguf.file import read_gguf
from tests.data.gguf.files import gguf, write_gguf

KEYS = {
    "general.architecture": "llama",
    "a.text": "é\n",
    "a.count": 7,
    "a.share": 0.5,
    "a.flag": True,
    "a.texts": ["x", "", "漢"],
    "a.numbers": [1, -2, 3],
    "a.floats": [0.25, -1.5],
    "a.flags": [True, False],
}


def test_header_and_floats(tmp_path: Path):
    rng = np.random.default_rng(0)
    tensors = {
        "matrix": rng.standard_normal((3, 5)).astype(np.float32),
        "half": rng.standard_normal((2, 2, 4)).astype(np.float16),
        "vector": rng.standard_normal(7).astype(np.float32),
    }
    path = write_gguf(tmp_path / "m.gguf", KEYS, tensors)
    found = read_gguf(path)
    assert {name: found.metadata[name] for name in KEYS} == KEYS
    library = gguf.GGUFReader(path)
    assert {t.name: (*t.shape.tolist()[::-1],) for t in library.tensors} == {
        n: s.shape for n, s in found.tensors.items()
    }
    for name, value in tensors.items():
        assert found.tensor(name).dtype == np.float32
        np.testing.assert_array_equal(found.tensor(name), value.astype(np.float32))


def test_a_file_of_another_alignment(tmp_path: Path):
    path, tensors = tmp_path / "m.gguf", {"a": np.arange(5, dtype=np.float32), "b": np.arange(3, dtype=np.float32)}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(8)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    for name, value in tensors.items():
        np.testing.assert_array_equal(read_gguf(path).tensor(name), value)


def test_quantisations_by_hand(tmp_path: Path):
    """Blocks of 32 values: a scale and 32 bytes (Q8_0); a scale, a minimum and 32 halves of bytes, low ones first (Q4_1)."""
    eight = np.frombuffer(struct.pack("<e32b", 0.5, *range(-16, 16)), np.uint8)
    nibbles = [i | (15 - i) << 4 for i in range(16)]
    four = np.frombuffer(struct.pack("<ee16B", 0.25, -1.0, *nibbles), np.uint8)
    kinds = gguf.GGMLQuantizationType
    blocks = {"eight": (np.stack([eight, eight]), kinds.Q8_0), "four": (np.concatenate([four, four])[None], kinds.Q4_1)}
    found = read_gguf(write_gguf(tmp_path / "m.gguf", KEYS, blocks))
    np.testing.assert_array_equal(found.tensor("eight"), np.tile(0.5 * np.arange(-16, 16), (2, 1)))
    low, high = 0.25 * np.arange(16) - 1, 0.25 * np.arange(15, -1, -1) - 1
    np.testing.assert_array_equal(found.tensor("four"), np.concatenate([low, high, low, high])[None])


@pytest.mark.parametrize("kind", list(gguf.GGMLQuantizationType), ids=lambda kind: kind.name)
def test_every_quantisation_is_read_or_named(tmp_path: Path, kind):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if kind.name in ("F32", "F16", "F64", "I8", "I16", "I32", "I64"):
        dtype = {"F": "<f", "I": "<i"}[kind.name[0]] + str(size)
        stored = np.arange(6).reshape(2, 3).astype(dtype)
        path = write_gguf(tmp_path / "m.gguf", KEYS, {"x": stored})
    else:
        stored = np.random.default_rng(0).integers(0, 60, (2, 3 * size)).astype(np.uint8)
        path = write_gguf(tmp_path / "m.gguf", KEYS, {"x": (stored, kind)})
    try:
        with np.errstate(all="ignore"):
            wanted = gguf.quants.dequantize(stored, kind)
    except NotImplementedError:
        with pytest.raises(UserError, match=rf"m\.gguf: the tensor x is of the type {kind.name}, which"):
            read_gguf(path).tensor("x")
        return
    with np.errstate(all="ignore"):
        got = read_gguf(path).tensor("x")
    assert got.shape == (2, 3 * block) and got.dtype == np.float32
    np.testing.assert_array_equal(got, wanted.astype(np.float32))


# ------------------------------------------------------------------------------------------------- bad files


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "m.gguf", KEYS, {"x": np.ones((2, 32), np.float32), "y": np.ones(9, np.float32)})


def read_all(path: Path) -> None:
    found = read_gguf(path)
    for name in found.tensors:
        found.tensor(name)


def test_a_file_cut_anywhere_is_one_line(tmp_path: Path, whole: Path):
    data = whole.read_bytes()
    cut, padding = tmp_path / "cut.gguf", 32 - 9 * 4 % 32  # behind the last tensor
    for length in range(len(data) - padding):
        cut.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"not a GGUF file|not a whole GGUF file|is not whole") as error:
            read_all(cut)
        assert str(error.value).count(str(cut)) == 1 and "\n" not in str(error.value)
    cut.write_bytes(data[: len(data) - padding])
    read_all(cut)


def test_a_damaged_header_is_read_or_refused_at_once(tmp_path: Path, whole: Path):
    """Any bytes may have changed: lengths and counts of billions end in a line, not in a long wait or a full memory."""
    data, rng = whole.read_bytes(), np.random.default_rng(0)
    end = read_gguf(whole).tensors["x"].start
    said: list[str] = []
    for _ in range(400):
        changed = bytearray(data)
        for at in rng.integers(4, end, 3):
            changed[at] = rng.integers(256)
        path = tmp_path / "damaged.gguf"
        path.write_bytes(bytes(changed))
        try:
            read_all(path)
        except UserError as error:
            said.append(str(error))
    assert len(said) > 100
    assert all(text.startswith(str(tmp_path)) or text.startswith(f"cannot read {tmp_path}") for text in said)
    assert max(map(len, said)) < 500


def patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1 and len(old) == len(new)
    return data.replace(old, new)


NAME = struct.pack("<Q", 1)  # the length of a tensor's name
TEXTS, INTS = struct.pack("<II", 9, 8), struct.pack("<II", 9, 5)  # types of the keys that hold arrays


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("m.gguf", lambda d: b"<!DOCTYPE html>", "is not a GGUF file: it does not begin with GGUF and a version; it is a web"),
        ("m.gguf", lambda d: b"", "is not a GGUF file"),
        ("m.gguf", lambda d: d[:4] + b"\1\0\0\0" + d[8:], "version 1 of GGUF is not read, only 2 and 3"),
        ("m.gguf", lambda d: d[:4] + b"\0\0\0\3" + d[8:], "for processors of the other byte order"),
        ("m-00001-of-00003.gguf", lambda d: d, "this file is one of 3 parts of a model: join them (llama-gguf-split --merge)"),
        ("m.gguf", lambda d: patched(d, struct.pack("<Q", 2) + struct.pack("<Q", 9), struct.pack("<QQ", 2**60, 9)),
         "not a whole GGUF file"),
        ("m.gguf", lambda d: patched(d, INTS + b"\3" + bytes(7), INTS + b"\xff" * 8), "end within the header"),
        ("m.gguf", lambda d: patched(d, TEXTS + b"\3" + bytes(7), TEXTS + b"\xff" * 8), "no array of texts or"),
        ("m.gguf", lambda d: patched(d, NAME + b"y", NAME + b"x"), "the tensor 'x' is there twice"),
        ("m.gguf", lambda d: patched(d, NAME + b"x\2", NAME + b"x\5"), "or has 5 dimensions"),
        ("m.gguf", lambda d: patched(d, "漢".encode(), b"\xff\xff\xff"), "is no UTF-8"),
    ],
)  # fmt: skip
def test_what_is_no_whole_gguf_file(tmp_path: Path, whole: Path, name: str, change, said: str):
    path = tmp_path / "bad" / name
    path.parent.mkdir()
    path.write_bytes(change(whole.read_bytes()))
    with pytest.raises(UserError, match=re.escape(said)) as error:
        read_gguf(path)
    assert str(path) in str(error.value)


def test_parts_are_known_by_their_key_too(tmp_path: Path):
    path = write_gguf(tmp_path / "first.gguf", {**KEYS, "split.count": 3}, {"x": np.ones(4, np.float32)})
    with pytest.raises(UserError, match=r"first\.gguf: this file is one of 3 parts"):
        read_gguf(path)


def test_an_unknown_quantisation_and_rows_of_another_length(tmp_path: Path):
    kinds = gguf.GGMLQuantizationType
    path = write_gguf(tmp_path / "m.gguf", KEYS, {"x": (np.zeros((1, 34), np.uint8), kinds.Q8_0)})
    data, place = path.read_bytes(), struct.pack("<QQIQ", 32, 1, 8, 0)
    path.write_bytes(patched(data, place, struct.pack("<QQIQ", 32, 1, 31, 0)))
    with pytest.raises(UserError, match=r"m\.gguf: the tensor x is of the quantisation number 31, which the library"):
        read_gguf(path).tensor("x")
    path.write_bytes(patched(data, place, struct.pack("<QQIQ", 16, 2, 8, 0)))
    with pytest.raises(
        UserError, match=r"the tensor x has shape \(2, 16\): rows of Q8_0 are of a multiple of 32 values"
    ):
        read_gguf(path).tensor("x")
    with pytest.raises(UserError, match=r"cannot read .*none\.gguf: No such file"):
        read_gguf(tmp_path / "none.gguf")


def test_without_the_library_the_extra_is_named(whole: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert read_gguf(whole).metadata["a.count"] == 7, "the header needs no library"
    with pytest.raises(UserError, match=re.escape("pip install -e '.[gguf]' in the project's folder")):
        read_gguf(whole).tensor("x")
