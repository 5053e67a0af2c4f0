"""Attention in decoding: one query a row over the prompt's cache, which K answers share, and its own.

Plain `jnp` runs anywhere. On a TPU it would write the scores to memory and read them back; a Pallas kernel reads keys and
values once and keeps the scores where they are computed.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rlaif_jax.models.attention import LANES, MASKED
from rlaif_jax.models.decoder import KeyValue
from rlaif_jax.models.decoder_config import DecoderConfig

BUFFERS = 8 << 20  # bytes of keys and values that the kernel holds: those in use and those being fetched
SCORES = 1 << 20  # bytes of scores that it works on at a time


def lanes() -> int:
    """Returns how many numbers of a cache's last axis move at once: 128 on a TPU, else 1."""
    return LANES if jax.default_backend() == "tpu" else 1


def heads_per_lane(config: DecoderConfig) -> int:
    """Returns how many key-value heads are packed into the last axis of a cache.

    They are more than 1 where a head is narrower than the lanes. Otherwise XLA puts the columns on lanes, and writing one
    column rewrites 128. Heads of different tensor devices are never packed together.
    """
    tensor = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    return math.gcd(config.num_kv_heads, config.num_kv_heads // tensor or 1, lanes() // config.head_dim or 1)


def pack_heads(x: jax.Array, side: int) -> jax.Array:
    """Packs `side` heads into the last axis: [B, kv_heads, P, h] -> [B, kv_heads / side, P, side * h]."""
    batch, heads, columns, h = x.shape
    x = x.reshape(batch, heads // side, side, columns, h).swapaxes(2, 3)
    return x.reshape(batch, heads // side, columns, side * h)


def attend_cached(
    q: jax.Array, prompt: KeyValue, prompt_mask: jax.Array, own: KeyValue, own_mask: jax.Array
) -> jax.Array:
    """Computes attention of one query a row over its prompt's shared cache and its own.

    Scores and softmax are float32.

    Args:
        q: [B K, heads, h].
        prompt: keys and values of the prompts, [B, G, P, side * h] each, G = kv_heads / side.
        prompt_mask: [B, P] bool.
        own: keys and values of the rows, [B K, G, T, side * h] each.
        own_mask: [B K or 1, T] bool.

    Returns:
        [B K, heads * h].
    """
    rows, heads, h = q.shape
    groups, width = prompt[0].shape[1], prompt[0].shape[-1]
    side, each = width // h, heads // groups
    # In a packed cache a query is zero where the other heads are, and of the values it keeps those of its head.
    place = jnp.eye(side, dtype=q.dtype)[:, None, :, None]
    single = (q * h**-0.5).reshape(rows, groups, side, each // side, 1, h) * place
    attend = attend_kernel if lanes() > 1 and blocks(rows, each, prompt, own) else attend_plain
    out = attend(single.reshape(rows, groups, each, width), prompt, prompt_mask, own, own_mask)
    out = (out.reshape(rows, groups, side, each // side, side, h) * place).sum(-2)
    return out.reshape(rows, heads * h)


def attend_plain(
    q: jax.Array, prompt: KeyValue, prompt_mask: jax.Array, own: KeyValue, own_mask: jax.Array
) -> jax.Array:
    """Computes `attend_cached` in plain `jnp`.

    Args:
        q: [B K, G, M, W] scaled queries: M for each of G caches.
        prompt: keys and values of the prompts, [B, G, P, W] each.
        prompt_mask: [B, P] bool.
        own: keys and values of the answers' own columns, [B K, G, T, W] each.
        own_mask: [B K or 1, T] bool.

    Returns:
        [B K, G, M, W].
    """
    rows, groups, each, _ = q.shape
    batch = prompt[0].shape[0]

    def by_prompt(x: jax.Array) -> jax.Array:
        """Reshapes [B K, G, M, ...] to [B, G, K M, ...]: one matrix product then reads the cache once."""
        x = x.reshape(batch, rows // batch, groups, each, -1).swapaxes(1, 2)
        return x.reshape(batch, groups, -1, x.shape[-1])

    def by_row(x: jax.Array) -> jax.Array:
        """Reshapes [B, G, K M, ...] to [B K, G, M, ...]."""
        x = x.reshape(batch, groups, rows // batch, each, -1).swapaxes(1, 2)
        return x.reshape(rows, groups, each, -1)

    scores_prompt = jnp.einsum("bgrh,bgph->bgrp", by_prompt(q), prompt[0], preferred_element_type=jnp.float32)
    scores_prompt = jnp.where(prompt_mask[:, None, None], scores_prompt, MASKED)
    scores_own = jnp.einsum("bgrh,bgth->bgrt", q, own[0], preferred_element_type=jnp.float32)
    scores_own = jnp.where(own_mask[:, None, None], scores_own, MASKED)
    # Each part's scores stay as its product leaves them: only their maxima and sums meet.
    top = jnp.maximum(by_row(scores_prompt.max(-1, keepdims=True)), scores_own.max(-1, keepdims=True))
    e_prompt, e_own = jnp.exp(scores_prompt - by_prompt(top)), jnp.exp(scores_own - top)
    total = by_row(e_prompt.sum(-1, keepdims=True)) + e_own.sum(-1, keepdims=True)
    w_prompt = (e_prompt / by_prompt(total)).astype(prompt[1].dtype)
    out = by_row(jnp.einsum("bgrp,bgph->bgrh", w_prompt, prompt[1]))
    return out + jnp.einsum("bgrt,bgth->bgrh", (e_own / total).astype(own[1].dtype), own[1])


def to_lanes(columns: int) -> int:
    """Returns `columns` rounded up to a multiple of LANES, which is how TPU memory is tiled."""
    return -(-columns // LANES) * LANES


def blocks(rows: int, each: int, prompt: KeyValue, own: KeyValue) -> tuple[int, int] | None:
    """Returns how many answers of a prompt, and heads of their caches, one step of the kernel takes.

    Args:
        rows: R = B K, the answers of all prompts.
        each: query heads of each head of the cache.
        prompt: keys and values [B, kv_heads, P, h] of the prompts.
        own: keys and values [R, kv_heads, T, h] of the answers.

    Returns:
        (answers, heads), divisors of K and kv_heads, the most answers first; None where not even one answer and
        one head fit into the kernel's memory (past 8,000 columns of bfloat16).
    """
    batch, groups, columns, width = prompt[0].shape
    columns, length = to_lanes(columns), to_lanes(own[0].shape[2])
    column = 4 * prompt[0].dtype.itemsize * to_lanes(width)  # of keys and of values, one in use and one being fetched

    def fit(answers: int, heads: int) -> bool:
        seen = columns + answers * length
        return seen * column * heads <= BUFFERS and (answers == 1 or 4 * answers * each * seen <= SCORES)

    divisors = lambda n: [d for d in range(n, 0, -1) if n % d == 0]
    pairs = [(a, g) for a in divisors(rows // batch) for g in divisors(groups)]
    return next((pair for pair in pairs if fit(*pair)), None)


def attend_kernel(
    q: jax.Array, prompt: KeyValue, prompt_mask: jax.Array, own: KeyValue, own_mask: jax.Array
) -> jax.Array:
    """Computes `attend_cached` by a kernel that reads each cache once; it is interpreted off the TPU.

    Args:
        q: [B K, G, M, W] scaled queries: M for each of G caches.
        prompt: keys and values of the prompts, [B, G, P, W] each.
        prompt_mask: [B, P] bool.
        own: keys and values of the answers' own columns, [B K, G, T, W] each.
        own_mask: [B K or 1, T] bool.

    Returns:
        [B K, G, M, W].
    """
    run, mesh = attend_own_shard, jax.sharding.get_abstract_mesh()
    if "tensor" in set(mesh.axis_names) - set(mesh.manual_axes):
        # The compiler cannot split a kernel: heads go over tensor.
        heads = PartitionSpec(None, "tensor" if q.shape[1] % mesh.shape["tensor"] == 0 else None)
        whole = PartitionSpec()
        run = jax.shard_map(
            run, in_specs=(heads, heads, whole, heads, whole), out_specs=heads, axis_names={"tensor"}, check_vma=False
        )
    return run(q, prompt, prompt_mask, own, own_mask)


def attend_own_shard(
    q: jax.Array, prompt: KeyValue, prompt_mask: jax.Array, own: KeyValue, own_mask: jax.Array
) -> jax.Array:
    """Computes `attend_kernel` on one device.

    A step of the grid takes some answers of one prompt; the prompt's block is kept for the next ones.

    Args:
        q: [B K, G, M, W] scaled queries: M for each of G caches.
        prompt: keys and values of the prompts, [B, G, P, W] each.
        prompt_mask: [B, P] bool.
        own: keys and values of the answers' own columns, [B K, G, T, W] each.
        own_mask: [B K or 1, T] bool.

    Returns:
        [B K, G, M, W].
    """
    from jax.experimental import pallas as pl  # takes a second to import, and only TPUs need it

    rows, groups, each, width = q.shape
    batch, _, columns, _ = prompt[0].shape
    length = own[0].shape[2]
    some, heads = blocks(rows, each, prompt, own) or (1, 1)
    steps = rows // batch // some

    def filled(mask: jax.Array) -> jax.Array:
        """Returns a mask whose columns are filled up to whole lanes with masked ones."""
        return jnp.pad(mask.astype(jnp.int32), ((0, 0), (0, to_lanes(mask.shape[1]) - mask.shape[1])))

    shared = own_mask.shape[0] == 1
    seen = filled(own_mask.repeat(some, axis=0) if shared else own_mask).reshape(-1, 1, some * to_lanes(length))
    of_prompt = pl.BlockSpec((None, heads, to_lanes(columns), width), lambda b, g, s: (b, g, 0, 0))
    of_answers = pl.BlockSpec((some, heads, to_lanes(length), width), lambda b, g, s: (b * steps + s, g, 0, 0))
    of_queries = pl.BlockSpec((None, heads, some * each, width), lambda b, g, s: (b * steps + s, g, 0, 0))
    out = pl.pallas_call(
        partial(kernel, columns=columns, length=length),
        grid=(batch, groups // heads, steps),
        in_specs=[
            of_queries,
            *(of_prompt, of_prompt, pl.BlockSpec((None, 1, to_lanes(columns)), lambda b, g, s: (b, 0, 0))),
            *(of_answers, of_answers),
            pl.BlockSpec((None, 1, seen.shape[-1]), lambda b, g, s: (0 if shared else b * steps + s, 0, 0)),
        ],
        out_specs=of_queries,
        out_shape=jax.ShapeDtypeStruct((batch * steps, groups, some * each, width), q.dtype),
        interpret=jax.default_backend() != "tpu",
    )(
        q.reshape(-1, some, groups, each, width).swapaxes(1, 2).reshape(-1, groups, some * each, width),
        *(*prompt, filled(prompt_mask)[:, None]),
        *(*own, seen),
    )
    return out.reshape(-1, groups, some, each, width).swapaxes(1, 2).reshape(q.shape)


def kernel(
    q: Any,
    keys: Any,
    values: Any,
    seen: Any,
    own_keys: Any,
    own_values: Any,
    own_seen: Any,
    out: Any,
    *,
    columns: int,
    length: int,
) -> None:
    """Computes one block's attention, M queries for each of N answers and each head (a Pallas kernel).

    The answers' caches are taken as one, of which a query reads the columns of its answer: the masked scores cost less than
    many small products.

    Args:
        q: [heads, N M, W].
        keys: [heads, P, W] of the prompt, P in whole lanes.
        values: [heads, P, W].
        seen: [1, P], > 0 where a column of the prompt may be read.
        own_keys: [N, heads, T, W] of the answers, T in whole lanes.
        own_values: [N, heads, T, W].
        own_seen: [1, N T].
        out: [heads, N M, W], written.
        columns: filled columns of P.
        length: filled columns of T.
    """
    answers, heads, room, width = own_keys.shape
    each = q.shape[1] // answers
    scores = (q.shape[1], answers * room)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, scores, axis) for axis in (0, 1))
    mine = (jax.lax.div(row, each) == jax.lax.div(column, room)) & (own_seen[...] > 0)
    product = lambda a, b, axis: jax.lax.dot_general(
        a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32
    )

    def real(x: jax.Array, count: int) -> jax.Array:
        """Returns [..., C, W] with columns past `count`, which may hold anything, at zero."""
        return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 2) < count, x, jnp.zeros_like(x))

    for head in range(heads):
        in_one = lambda x: x.reshape(answers * room, width)
        s = jnp.where(seen[...] > 0, product(q[head], keys[head], 1), MASKED)
        s_own = jnp.where(mine, product(q[head], in_one(own_keys[:, head]), 1), MASKED)
        top = jnp.maximum(s.max(-1, keepdims=True), s_own.max(-1, keepdims=True))
        e, e_own = jnp.exp(s - top), jnp.exp(s_own - top)
        total = e.sum(-1, keepdims=True) + e_own.sum(-1, keepdims=True)
        weighted = product(e.astype(values.dtype), real(values[head], columns), 0)
        own = in_one(real(own_values[:, head], length))
        weighted = weighted + product(e_own.astype(own.dtype), own, 0)
        out[head] = (weighted / total).astype(out.dtype)
