"""Attention over whole sequences: one meaning (`AttentionMask`), three ways to compute it.

`xla` is plain `jnp` and runs anywhere; `cudnn` is cuDNN's fused kernel on NVIDIA GPUs; `splash` is the Pallas kernel of
TPUs, which skips masked blocks. `auto` takes the backend's fused kernel where it fits the shape. Decoding attends over
caches (`attention_cached.py`).
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rlaif_jax.config import require
from rlaif_jax.models.decoder_config import DecoderConfig

MASKED = -1e30  # finite, so that a row with nothing to attend to stays finite
LANES = 128  # the splash kernel's blocks are multiples of this


class AttentionMask(NamedTuple):
    """Which keys a query reads: those of the same segment, up to the query's column.

    Attributes:
        queries: [B, S] int32 segments of the queries, which are the last S of the C columns.
        keys: [B, C] int32 segments of the keys; padding has a segment that no real token has.
        query_answers, key_answers: [B, S] and [B, C] int32 where several answers share their prompt within a segment: 0
            for the prompt, else the number of the answer, which reads the prompt and itself. None: one answer a segment.
    """

    queries: jax.Array
    keys: jax.Array
    query_answers: jax.Array | None = None
    key_answers: jax.Array | None = None

    def dense(self) -> jax.Array:
        """Returns the mask as [B, S, C] bool, true where query s reads key c."""
        length, columns = self.queries.shape[1], self.keys.shape[1]
        seen = jnp.tril(jnp.ones((length, columns), bool), columns - length)
        seen = seen & (self.queries[:, :, None] == self.keys[:, None, :])
        if self.query_answers is None or self.key_answers is None:
            return seen
        mine = self.query_answers[:, :, None] == self.key_answers[:, None, :]
        return seen & (mine | (self.key_answers == 0)[:, None, :])


class SharedPrefixMask(NamedTuple):
    """Mask of rows that hold a prompt and its K answers.

    Attributes:
        prompts: of the prompt's columns, [G, P, P], causal.
        answers: of each answer's columns to the prompt's and the answer's, [G K, T, P + T].
    """

    prompts: AttentionMask | jax.Array
    answers: AttentionMask | jax.Array


def implementation(config: DecoderConfig) -> str:
    """Returns "xla", "cudnn" or "splash": what `config.attention` means on this backend."""
    if config.attention != "auto":
        return config.attention
    if jax.default_backend() == "gpu":
        fits = config.compute_dtype == "bfloat16" and config.head_dim % 8 == 0 and config.head_dim <= 128
        return "cudnn" if fits else "xla"
    return "splash" if jax.default_backend() == "tpu" and config.head_dim % LANES == 0 else "xla"


def build_mask(
    config: DecoderConfig, visible: AttentionMask | SharedPrefixMask
) -> AttentionMask | SharedPrefixMask | jax.Array:
    """Returns the mask in the form that the decoder's implementation of attention reads.

    Args:
        config: names the implementation (`implementation`).
        visible: which keys each query reads.

    Returns:
        The mask itself for the splash kernel (where each segment has one answer), else bool arrays [B, S, C]; of
        a `SharedPrefixMask`, one of the two in each part.
    """

    def one(part: AttentionMask) -> AttentionMask | jax.Array:
        splash = implementation(config) == "splash" and part.query_answers is None
        return part if splash else part.dense()

    if isinstance(visible, SharedPrefixMask):
        return SharedPrefixMask(one(visible.prompts), one(visible.answers))  # type: ignore[arg-type]
    return one(visible)


def last_queries(
    visible: AttentionMask | SharedPrefixMask | jax.Array, last: int
) -> AttentionMask | SharedPrefixMask | jax.Array:
    """Returns the mask of the last `last` queries alone.

    Args:
        visible: which keys each query reads, as a mask or bool [B, S, C]. A `SharedPrefixMask` is returned
            unchanged: its answers are already separate.
        last: the number of queries that are kept.
    """
    if isinstance(visible, SharedPrefixMask):
        return visible
    if isinstance(visible, AttentionMask):
        return visible._replace(queries=visible.queries[:, -last:])
    return visible[:, -last:]


def attend(
    config: DecoderConfig, q: jax.Array, k: jax.Array, v: jax.Array, visible: AttentionMask | jax.Array
) -> jax.Array:
    """Computes grouped-query attention [B, S, heads * h]; scores and softmax are in float32.

    Args:
        config: shape and flags of the decoder.
        q: [B, S, heads, h] queries.
        k: [B, kv_heads, C, h] keys.
        v: [B, kv_heads, C, h] values.
        visible: what `build_mask` returned.
    """
    if isinstance(visible, AttentionMask):
        return attend_splash(q, k, v, visible)
    if implementation(config) == "cudnn":
        return attend_library(q, k, v, visible, "cudnn")
    batch, length, heads, h = q.shape
    groups = k.shape[1]
    # Keys lie as [B, kv_heads, S, h] in the cache already; queries in the same order make plain matrix products.
    q = (q * h**-0.5).reshape(batch, length, groups, heads // groups, h).transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum("bgrsh,bgth->bgrst", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, MASKED), axis=-1).astype(v.dtype)
    attended = jnp.einsum("bgrst,bgth->bgrsh", weights, v)
    return attended.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads * h)


def attend_groups(
    config: DecoderConfig, q: jax.Array, k: jax.Array, v: jax.Array, visible: SharedPrefixMask
) -> jax.Array:
    """Computes attention in rows of a prompt and its K answers; an answer reads its prompt and itself.

    Args:
        config: shape and flags of the decoder.
        q: [G, P + K T or K T, heads, h] queries.
        k: [G, kv_heads, P + K T, h] keys.
        v: [G, kv_heads, P + K T, h] values.
        visible: what `build_mask` returned.

    Returns:
        [G, P + K T or K T, heads * h].
    """
    groups = q.shape[0]
    prompt = jax.tree.leaves(visible.prompts)[0].shape[1]
    rows, length = jax.tree.leaves(visible.answers)[0].shape[:2]
    answers = rows // groups
    if q.shape[1] > answers * length:
        of_prompts = attend(config, q[:, :prompt], k[:, :, :prompt], v[:, :, :prompt], visible.prompts)
        of_answers = attend_groups(config, q[:, prompt:], k, v, visible)
        return jnp.concatenate([of_prompts, of_answers], axis=1)
    if implementation(config) == "xla":
        return attend_prompt_and_own(q, k, v, visible.answers)  # type: ignore[arg-type]

    def keys(x: jax.Array) -> jax.Array:
        """Reshapes [G, kv_heads, P + K T, h] to [G K, kv_heads, P + T, h], one answer a row."""
        heads, h = x.shape[1], x.shape[-1]
        shared = jnp.broadcast_to(x[:, None, :, :prompt], (groups, answers, heads, prompt, h))
        own = x[:, :, prompt:].reshape(groups, heads, answers, length, h).swapaxes(1, 2)
        return jnp.concatenate([shared, own], axis=3).reshape(rows, heads, prompt + length, h)

    own = attend(config, q.reshape(rows, length, *q.shape[2:]), keys(k), keys(v), visible.answers)
    return own.reshape(groups, answers * length, -1)


def attend_prompt_and_own(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    """Computes the answers' part of `attend_groups`, reading a prompt's keys once for all its answers.

    Copies of the prompt's keys for every answer are more to write, and their gradient crashes YNNPACK in jaxlib 0.10.2
    from about 128 columns on.

    Args:
        q: [G, K T, heads, h].
        k: [G, kv_heads, P + K T, h].
        v: [G, kv_heads, P + K T, h].
        visible: [G K, T, P + T] bool.

    Returns:
        [G, K T, heads * h].
    """
    groups, columns, heads, h = q.shape
    length, seen = visible.shape[1:]
    prompt, answers, kv_heads = seen - length, columns // length, k.shape[1]
    per_group = heads // kv_heads
    q = (q * h**-0.5).reshape(groups, answers, length, kv_heads, per_group, h).transpose(0, 3, 4, 1, 2, 5)
    own = lambda x: x[:, :, prompt:].reshape(groups, kv_heads, answers, length, h)
    scores = jnp.concatenate(
        [
            jnp.einsum("ngrkth,ngph->ngrktp", q, k[:, :, :prompt], preferred_element_type=jnp.float32),
            jnp.einsum("ngrkth,ngksh->ngrkts", q, own(k), preferred_element_type=jnp.float32),
        ],
        axis=-1,
    )
    visible = visible.reshape(groups, 1, 1, answers, length, seen)
    weights = jax.nn.softmax(jnp.where(visible, scores, MASKED), axis=-1).astype(v.dtype)
    attended = jnp.einsum("ngrktp,ngph->ngrkth", weights[..., :prompt], v[:, :, :prompt])
    attended = attended + jnp.einsum("ngrkts,ngksh->ngrkth", weights[..., prompt:], own(v))
    return attended.transpose(0, 3, 4, 1, 2, 5).reshape(groups, columns, heads * h)


def attend_library(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, kernel: Literal["xla", "cudnn"]
) -> jax.Array:
    """Computes `attend` by `jax.nn.dot_product_attention`, padded to the even lengths that cuDNN takes.

    Args:
        q: [B, S, heads, h].
        k: [B, kv_heads, C, h].
        v: [B, kv_heads, C, h].
        visible: [B, S, C] bool.
        kernel: "xla" or "cudnn".

    Raises:
        UserError: "cudnn" without an NVIDIA GPU.
    """
    length, columns = visible.shape[1:]
    queries, keys = (length % 2, columns % 2)
    require(
        kernel != "cudnn" or jax.default_backend() == "gpu",
        "attention='cudnn' needs an NVIDIA GPU; 'auto' takes what the machine has",
    )
    padded = lambda x, n: jnp.pad(x, ((0, 0), (0, n), (0, 0), (0, 0)))
    out = jax.nn.dot_product_attention(
        padded(q, queries),
        padded(k.swapaxes(1, 2), keys),
        padded(v.swapaxes(1, 2), keys),
        mask=jnp.pad(visible, ((0, 0), (0, queries), (0, keys)))[:, None],
        implementation=kernel,
    )
    return out[:, :length].reshape(*q.shape[:2], -1)


def attend_splash(q: jax.Array, k: jax.Array, v: jax.Array, visible: AttentionMask) -> jax.Array:
    """Computes `attend` by the TPU's splash kernel; off the TPU the kernel is interpreted.

    Lengths are padded to multiples of `LANES` inside.

    Args:
        q: [B, S, heads, h] queries.
        k: [B, kv_heads, C, h] keys.
        v: [B, kv_heads, C, h] values.
        visible: segments of queries and keys.

    Returns:
        [B, S, heads * h].
    """
    # Pallas takes a second to import, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask import CausalMask, MultiHeadMask

    length, columns = visible.queries.shape[1], visible.keys.shape[1]
    after, behind = -length % LANES, -columns % LANES
    causal = CausalMask((length + after, columns + behind), offset=columns - length)
    block = lambda n: next(size for size in (512, 384, 256, 128) if n % size == 0)
    rows, seen = block(length + after), block(columns + behind)
    sizes = splash.BlockSizes(
        block_q=rows, block_kv=seen, block_q_dkv=rows, block_kv_dkv=seen, block_q_dq=rows, block_kv_dq=seen
    )

    def run(q: jax.Array, k: jax.Array, v: jax.Array, queries: jax.Array, keys: jax.Array) -> jax.Array:
        kernel = splash.make_splash_mha(
            MultiHeadMask([causal] * q.shape[1]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            interpret=jax.default_backend() != "tpu",
        )
        return jax.vmap(kernel)(q, k, v, splash.SegmentIds(queries, keys))

    mesh = jax.sharding.get_abstract_mesh()
    free = set(mesh.axis_names) - set(mesh.manual_axes)
    if "tensor" in free:
        # The compiler cannot split a kernel: rows go over data and fsdp, heads over tensor.
        batch_axes = tuple(axis for axis in ("data", "fsdp") if axis in free) or None
        heads = "tensor" if k.shape[1] % mesh.shape["tensor"] == 0 else None
        arrays, ids = PartitionSpec(batch_axes, heads), PartitionSpec(batch_axes)
        run = jax.shard_map(
            run, in_specs=(arrays, arrays, arrays, ids, ids), out_specs=arrays, axis_names=free, check_vma=False
        )
    put_behind = lambda x, n: jnp.pad(x, ((0, 0), (0, 0), (0, n), (0, 0)))
    pads = partial(jnp.pad, constant_values=-1)  # a segment that no token has
    out = run(
        put_behind(q.swapaxes(1, 2) * q.shape[-1] ** -0.5, after),
        put_behind(k, behind),
        put_behind(v, behind),
        pads(visible.queries, ((0, 0), (0, after))),
        pads(visible.keys, ((0, 0), (0, behind))),
    )
    return out[:, :, :length].swapaxes(1, 2).reshape(*q.shape[:2], -1).astype(v.dtype)
