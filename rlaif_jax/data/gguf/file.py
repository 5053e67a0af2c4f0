"""The header and the tensors of a GGUF file of llama.cpp, versions 2 and 3.

The header is read here, because the reader of the library `gguf` takes seconds for a vocabulary and follows damaged lengths
without an end. The library knows the quantisations: it is imported for tensors alone.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlaif_jax.config import UserError, missing_extra, require
from rlaif_jax.files import it_is

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
DIMENSIONS = 4  # at most, of a tensor


@dataclass(frozen=True)
class Stored:
    """Where a tensor is in a file.

    Attributes:
        shape: in NumPy's order.
        kind: the number of its quantisation.
        start: its first byte in the file.
    """

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True, eq=False)
class GgufFile:
    """A GGUF file.

    Attributes:
        path: the file.
        metadata: all keys with their values.
        tensors: name -> place.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    def tensor(self, name: str) -> np.ndarray:
        """Returns a tensor as float32, dequantised.

        Raises:
            UserError: the tensor is not whole, or of a quantisation that the library does not read.
        """
        gguf, stored = library(), self.tensors[name]
        where = f"{self.path}: the tensor {name}"
        try:
            kind = gguf.GGMLQuantizationType(stored.kind)
            block, size = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{where} is of the quantisation number {stored.kind}, which the library gguf does not know: update it, or "
                "take another file of the model, such as Q8_0"
            ) from error
        require(
            bool(stored.shape) and stored.shape[-1] % block == 0,
            f"{where} has shape {stored.shape}: rows of {kind.name} are of a multiple of {block} values; the file is damaged",
        )
        rows = (*stored.shape[:-1], stored.shape[-1] // block * size)
        total = math.prod(rows)
        require(
            stored.start + total <= self.path.stat().st_size,
            f"{where} is not whole: {self.path.stat().st_size} bytes of {stored.start + total}; the file was cut short: fetch "
            "it again",
        )
        data = np.fromfile(self.path, np.uint8, total, offset=stored.start).reshape(rows)
        try:
            return np.asarray(gguf.quants.dequantize(data, kind), np.float32)
        except NotImplementedError as error:
            raise UserError(
                f"{where} is of the type {kind.name}, which the library gguf does not dequantise; take another file of the "
                "model, such as Q8_0"
            ) from error


def library() -> Any:
    """Returns the library `gguf`. Raises UserError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise missing_extra("the weights of GGUF files are read with the package gguf", "gguf") from error
    return gguf


class _Damaged(Exception):
    """The bytes are not those of a GGUF file."""


class _Cursor:
    """Reads values one after another, and never beyond the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise _Damaged(f"{len(self.data)} bytes end within the header")
        self.at += count
        return self.data[self.at - count : self.at]

    def scalar(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        try:
            return self.take(self.scalar("<Q")).decode()
        except UnicodeDecodeError as error:
            raise _Damaged(f"byte {self.at} of the header is no UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array(self.scalar("<I"), self.scalar("<Q"))
        if kind not in SCALARS:
            raise _Damaged(f"byte {self.at} of the header names the type {kind}, which there is not")
        return self.scalar(SCALARS[kind])

    def array(self, kind: int, count: int) -> list[Any]:
        if kind == STRING and 8 * count <= len(self.data) - self.at:
            return [self.string() for _ in range(count)]
        if kind not in SCALARS:
            raise _Damaged(f"byte {self.at} of the header is no array of texts or numbers")
        size = struct.calcsize(SCALARS[kind])
        return np.frombuffer(self.take(count * size), SCALARS[kind]).tolist()


def read_gguf(path: str | Path) -> GgufFile:
    """Reads the header of a GGUF file.

    Raises:
        UserError: the file cannot be read, is no GGUF file of version 2 or 3, is cut short or damaged, or is one of several
            parts.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(8)
            require(
                start[:4] == b"GGUF" and len(start) == 8,
                f"{path} is not a GGUF file: it does not begin with GGUF and a version{it_is(path)}",
            )
            version = int.from_bytes(start[4:], "little")
            require(
                version in (2, 3),
                f"{path}: version {version} of GGUF is not read, only 2 and 3"
                + ("; the file is for processors of the other byte order" if version % 2**16 == 0 else ""),
            )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                found = _read_header(path, _Cursor(data))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except _Damaged as error:
        raise UserError(
            f"{path}: not a whole GGUF file: {error}; it was probably cut short or damaged on its way: fetch it again"
        ) from error
    part = re.search(r"-(\d{5})-of-(\d{5})\.gguf$", path.name)
    parts = int(part[2]) if part else found.metadata.get("split.count") or 1
    require(
        parts == 1,
        f"{path}: this file is one of {parts} parts of a model: join them (llama-gguf-split --merge) and give the one file",
    )
    return found


def _read_header(path: Path, cursor: _Cursor) -> GgufFile:
    cursor.take(8)
    tensor_count, key_count = cursor.scalar("<Q"), cursor.scalar("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        name = cursor.string()
        metadata[name] = cursor.value(cursor.scalar("<I"))
    tensors: dict[str, Stored] = {}
    for _ in range(tensor_count):
        name, count = cursor.string(), cursor.scalar("<I")
        if count > DIMENSIONS or name in tensors:
            raise _Damaged(f"the tensor {name[:60]!r} is there twice, or has {count} dimensions")
        shape = tuple(cursor.scalar("<Q") for _ in range(count))
        tensors[name] = Stored(shape[::-1], cursor.scalar("<I"), cursor.scalar("<Q"))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise _Damaged(f"general.alignment is {alignment!r}")
    data = -(-cursor.at // alignment) * alignment
    return GgufFile(
        path,
        metadata,
        {name: Stored(place.shape, place.kind, data + place.start) for name, place in tensors.items()},
    )
