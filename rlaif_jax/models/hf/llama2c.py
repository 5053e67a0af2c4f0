"""Checkpoints of llama2.c, version 0.

The format is that of `legacy_export` in export.py of https://github.com/karpathy/llama2.c: a header of seven int32, then
float32 matrices one after another, each with all layers stacked. Rotary embeddings rotate neighbouring pairs of rows
there and the two halves of a head here, so the rows of q and k change places.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from rlaif_jax.config import require
from rlaif_jax.files import it_is
from rlaif_jax.models.decoder_config import DecoderConfig
from rlaif_jax.models.hf.weights import require_finite

SIZES = ("width", "mlp_width", "num_layers", "num_heads", "num_kv_heads", "vocab_size", "context_length")
HEADER = np.dtype([(name, "<i4") for name in SIZES])
LATER_VERSION = int.from_bytes(b"24ka", "little")  # the magic number "ak42" that versions 1 and 2 start with


def read_header(path: Path) -> DecoderConfig:
    """Returns the shape of the model in a llama2.c file, and checks the file's length against it.

    Raises:
        UserError: not a version 0 file, or one of another length than its header says.
    """
    size = path.stat().st_size
    expected = "expected a llama2.c checkpoint of version 0, such as stories260K.bin"
    require(size > HEADER.itemsize, f"{path}: {size} bytes are too few for a model; {expected}{it_is(path)}")
    header = np.fromfile(path, HEADER, count=1)[0]
    require(
        int(header["width"]) != LATER_VERSION,
        f"{path}: a llama2.c checkpoint of version 1 or 2; {expected} (export.py --version 0)",
    )
    fields: dict[str, Any] = {name: int(header[name]) for name in SIZES}
    tied = fields["vocab_size"] > 0  # an untied output matrix is announced by a negative size
    fields["vocab_size"] = abs(fields["vocab_size"])
    require(
        all(0 < value < 2**24 for value in fields.values())
        and fields["width"] % (2 * fields["num_heads"]) == 0
        and fields["num_heads"] % fields["num_kv_heads"] == 0,
        f"{path}: the first 28 bytes are no shape of a model ({fields}); {expected}{it_is(path)}",
    )
    config = DecoderConfig(
        **fields,
        head_dim=fields["width"] // fields["num_heads"],
        norm_eps=1e-5,
        rope_theta=10_000.0,
        tie_embeddings=tied,
    )
    needed = HEADER.itemsize + 4 * sum(math.prod(shape) for _, shape in layout(config))
    require(
        size == needed,
        f"{path}: its header asks for {needed} bytes, the file has {size}: "
        + ("it was cut short; fetch it again" if size < needed else f"not such a file; {expected}"),
    )
    return config


def layout(config: DecoderConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Returns (parameter path, shape in the file) in the order of the file.

    An empty path is skipped; in a path, `layers` means the stacked matrices of all blocks.
    """
    c = config
    depth, kv_width = c.num_layers, c.num_kv_heads * c.head_dim
    tensors = [
        ("trunk/embed/embedding", (c.vocab_size, c.width)),
        ("trunk/layers/norm1/scale", (depth, c.width)),
        ("trunk/layers/q/kernel", (depth, c.width, c.width)),
        ("trunk/layers/k/kernel", (depth, kv_width, c.width)),
        ("trunk/layers/v/kernel", (depth, kv_width, c.width)),
        ("trunk/layers/o/kernel", (depth, c.width, c.width)),
        ("trunk/layers/norm2/scale", (depth, c.width)),
        ("trunk/layers/gate/kernel", (depth, c.mlp_width, c.width)),
        ("trunk/layers/down/kernel", (depth, c.width, c.mlp_width)),
        ("trunk/layers/up/kernel", (depth, c.mlp_width, c.width)),
        ("trunk/norm/scale", (c.width,)),
        ("", (2, c.context_length, c.head_dim // 2)),  # cosines and sines of the rotary embedding
    ]
    return tensors if c.tie_embeddings else [*tensors, ("lm_head/kernel", (c.vocab_size, c.width))]


def half_split(kernel: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders each head's rows in a kernel [L, heads * h, D]: rotary pairs -> first rows, then second.

    `head_dim` is h.
    """
    depth, rows, width = kernel.shape
    pairs = kernel.reshape(depth, rows // head_dim, head_dim // 2, 2, width)
    return pairs.swapaxes(2, 3).reshape(kernel.shape)


def read_llama2c(path: Path) -> tuple[DecoderConfig, dict[str, Any]]:
    """Returns the shape and the parameters {path with "/": float32 array} of a llama2.c file.

    Raises:
        UserError: as `read_header`, or a tensor holds NaN.
    """
    config = read_header(path)
    values = np.fromfile(path, "<f4", offset=HEADER.itemsize)
    flat: dict[str, Any] = {}
    start = 0
    for name, shape in layout(config):
        stop = start + math.prod(shape)
        tensor = values[start:stop].reshape(shape)
        start = stop
        if name:  # the others are tables of rotary embeddings, which nobody reads
            require_finite(tensor, path, name)
        if name.endswith(("/q/kernel", "/k/kernel")):
            tensor = half_split(tensor, config.head_dim)
        if name.endswith("kernel"):
            tensor = tensor.swapaxes(-1, -2)
        if "/layers/" in name:
            flat |= {name.replace("layers", f"layers_{i}"): layer for i, layer in enumerate(tensor)}
        elif name:
            flat[name] = tensor
    return config, flat
