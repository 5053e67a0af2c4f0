"""One causal decoder that is GPT-2, Llama, Qwen2 and Qwen3 by flags (`DecoderConfig`).

Every block has separate parameter arrays (`layers_0`, `layers_1`, ...): taken out of a stack they would be copied, and
their gradients put back into it, in every pass: a second model in memory. All passes run the blocks one by one, except those
of deep models (`FLAT`) whose matrices are split over "fsdp"; decoding has a key-value cache a block (`causal_lm.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rlaif_jax.models.attention import AttentionMask, SharedPrefixMask, attend, attend_groups, build_mask, last_queries
from rlaif_jax.models.base import PaddedView, View
from rlaif_jax.models.decoder_config import DecoderConfig, RopeScaling
from rlaif_jax.models.dense import Dense, flat_dot

KeyValue = tuple[jax.Array, jax.Array]

FLAT = 12  # more blocks than these run in a loop where their matrices are split


def positions_from_mask(mask: jax.Array) -> jax.Array:
    """Returns positions [B, S] int32 of a mask [B, S]: real tokens count from 0, without the padding."""
    m = mask.astype(jnp.int32)
    return jnp.cumsum(m, axis=-1) - m


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """Computes the angular frequencies [h / 2] of the rotary embedding (Su 2021), in radians a position.

    Args:
        head_dim: h.
        theta: base of the frequencies.
        scaling: lowers frequencies for a longer context, linearly or as Llama 3 does; None: unscaled.
    """
    frequencies = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    wavelength = 2 * jnp.pi / frequencies
    low = scaling.original_context / scaling.low_freq_factor
    high = scaling.original_context / scaling.high_freq_factor
    smooth = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    return jnp.where(wavelength > low, frequencies / scaling.factor, jnp.where(wavelength < high, frequencies, blended))


def rope_table(config: DecoderConfig, positions: jax.Array) -> KeyValue | None:
    """Returns cosines and sines [..., 1, h / 2] float32 of positions [...]; None with learned positions.

    `config` gives h, the frequencies and the kind of positions.
    """
    if config.positions != "rope":
        return None
    angles = positions[..., None, None] * rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rope: KeyValue | None) -> jax.Array:
    """Rotates x [..., heads, h] to its positions, by halves of the last axis as Hugging Face splits them.

    `rope` are the cosines and sines of the positions; None leaves x as it is.
    """
    if rope is None:
        return x
    cos, sin = rope
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def block_params(config: DecoderConfig, trunk: Any) -> list[Any]:
    """Returns the parameters of each block of a trunk that has the layers of `config`."""
    return [trunk[f"layers_{layer}"] for layer in range(config.num_layers)]


def unstack_layers(config: DecoderConfig, trunk: Any) -> Any:
    """Returns a trunk's parameters with one entry `layers_0`, `layers_1` ... for each block.

    Args:
        config: its `num_layers` is the number of blocks.
        trunk: parameters whose entry "layers" holds all blocks, stacked along a first axis; other entries are
            kept.
    """
    rest = {name: x for name, x in trunk.items() if name != "layers"}
    return rest | {
        f"layers_{i}": jax.tree.map(lambda stack, i=i: stack[i], trunk["layers"]) for i in range(config.num_layers)
    }


def apply(module: nn.Module, params: Any, *args: Any, method: str | None = None) -> Any:
    """Applies a module, or one of its methods, as a pure function of its parameters.

    Args:
        module: a Flax module.
        params: its parameters.
        *args: arguments of the method.
        method: name of the method; None: `__call__`.
    """
    return module.apply({"params": params}, *args, method=method)


def in_dtype(params: Any, dtype: jax.typing.DTypeLike) -> Any:
    """Returns parameters with matrices cast to `dtype`, as the layers would; norms and biases stay."""
    matrix = lambda path: path[-1].key in ("kernel", "embedding", "lora_a", "lora_b")
    return jax.tree_util.tree_map_with_path(lambda path, x: x.astype(dtype) if matrix(path) else x, params)


def split_by_rows(x: jax.Array) -> jax.Array:
    """Marks x [B, ...] as split over the mesh's axes "data" and "fsdp" along B, and along no other axis.

    Embedding lookups from a sharded table come out split along D. Without this mark XLA moves activations between
    devices in every block, where weights would be fewer bytes. Without a mesh, or where B is no multiple of the
    two axes' devices, x is returned unmarked.
    """
    axes = _row_axes()
    shares = _shares(*axes)
    return x if shares == 1 or x.shape[0] % shares else jax.lax.with_sharding_constraint(x, PartitionSpec(axes))


def in_own_rows(fn: Callable[..., Any], params: Any, *rows: jax.Array) -> Any:
    """Returns `fn(params, *rows)`, computed by each device of a mesh for its own rows alone.

    What is split over "fsdp" of `params` is gathered once, before, and its gradient summed once, after: a loop in `fn`
    over chunks of rows needs no other device. Without a mesh, or where the number of rows is no multiple of the two axes'
    devices, it is `fn` itself. Matrices stay split over "tensor".

    Args:
        fn: a function whose results are arrays [B, ...].
        params: what all devices read.
        *rows: arrays [B, ...].
    """
    axes = _row_axes()
    shares = _shares(*axes)
    if shares == 1 or rows[0].shape[0] % shares:
        return fn(params, *rows)
    own = PartitionSpec(axes)
    split = jax.shard_map(
        fn, in_specs=(PartitionSpec(), *[own] * len(rows)), out_specs=own, axis_names=set(axes), check_vma=False
    )
    return split(params, *rows)


def _row_axes() -> tuple[str, ...]:
    """Returns the axes of the present mesh that share rows."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in ("data", "fsdp") if axis in mesh.axis_names and axis not in mesh.manual_axes)


def _shares(*axes: str) -> int:
    """Returns the number of devices along axes of the present mesh; absent or manual axes count 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[a] for a in axes if a in mesh.axis_names and a not in mesh.manual_axes)


class Block(nn.Module):
    """Pre-norm transformer block; `qkv` and `finish` are its halves before and after attention.

    With `last` > 0 only the last `last` columns are computed; the others give keys and values.
    """

    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)

        def dense(features: int, bias: bool, scale: float = 1.0) -> Dense:
            init = nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal")
            return Dense(features, use_bias=bias, dtype=dtype, kernel_init=init, dot_general=flat_dot)

        def norm() -> nn.Module:
            if c.norm == "layer":
                return nn.LayerNorm(epsilon=c.norm_eps, dtype=dtype, use_fast_variance=False)
            return nn.RMSNorm(epsilon=c.norm_eps, dtype=dtype)

        residual = 1 / (2 * c.num_layers)  # GPT-2: projections onto the residual stream shrink with depth
        self.norm1, self.norm2 = norm(), norm()
        self.q = dense(c.num_heads * c.head_dim, c.qkv_bias)
        self.k = dense(c.num_kv_heads * c.head_dim, c.qkv_bias)
        self.v = dense(c.num_kv_heads * c.head_dim, c.qkv_bias)
        self.o = dense(c.width, c.output_bias, residual)
        self.up = dense(c.mlp_width, c.mlp_bias)
        self.down = dense(c.width, c.mlp_bias, residual)
        if c.mlp == "swiglu":
            self.gate = dense(c.mlp_width, c.mlp_bias)
        if c.qk_norm:
            self.q_norm = nn.RMSNorm(epsilon=c.norm_eps, dtype=dtype)
            self.k_norm = nn.RMSNorm(epsilon=c.norm_eps, dtype=dtype)

    def qkv(self, x: jax.Array, rope: KeyValue | None, last: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Computes the queries, keys and values of a block.

        Args:
            x: [B, S, D], the residual stream.
            rope: cosines and sines of the positions, which rotate queries and keys; None: no rotation.
            last: queries are those of the last `last` columns only; 0: of all.

        Returns:
            q [B, S or last, heads, h], k and v [B, S, kv_heads, h].
        """
        c = self.config
        y = self.norm1(x)
        asking = y[:, -last:] if last else y
        q = self.q(asking).reshape(*asking.shape[:-1], c.num_heads, c.head_dim)
        k = self.k(y).reshape(*x.shape[:-1], c.num_kv_heads, c.head_dim)
        v = self.v(y).reshape(*x.shape[:-1], c.num_kv_heads, c.head_dim)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        at = jax.tree.map(lambda r: r[:, -last:], rope) if last else rope
        return rotate(q, at), rotate(k, rope), v

    def finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Adds a block's attention output and its MLP to the residual stream.

        Args:
            x: [..., D], the residual stream.
            attended: [..., heads * h], what `attend` returned.

        Returns:
            [..., D].
        """
        x = x + self.o(attended)
        y = self.norm2(x)
        if self.config.mlp == "swiglu":
            return x + self.down(nn.silu(self.gate(y)) * self.up(y))
        return x + self.down(nn.gelu(self.up(y), approximate=True))

    def __call__(self, x: jax.Array, rope: KeyValue | None, visible: Any, last: int = 0) -> tuple[jax.Array, KeyValue]:
        """Returns (x [B, S or last, D], (keys, values) [B, kv_heads, S, h]).

        `visible` is what `build_mask` returned.
        """
        q, k, v = self.qkv(x, rope, last)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        if last:
            x, visible = x[:, -last:], last_queries(visible, last)
        attention = attend_groups if isinstance(visible, SharedPrefixMask) else attend
        return self.finish(x, attention(self.config, q, k, v, visible)), (k, v)


class Trunk(nn.Module):
    """Embedding, blocks and final norm: tokens to hidden states. Every head reads from one of these."""

    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        self.embed = nn.Embed(c.vocab_size, c.width, dtype=dtype, embedding_init=nn.initializers.normal(c.width**-0.5))
        if c.positions == "learned":
            self.position_embed = nn.Embed(
                c.context_length, c.width, dtype=dtype, embedding_init=nn.initializers.normal(0.02)
            )
        # For `init` alone, which compiles quickly as a loop; `unstack_layers` takes what it made apart.
        self.layers = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=c.num_layers
        )(c)
        self.norm = (
            nn.LayerNorm(epsilon=c.norm_eps, dtype=dtype, use_fast_variance=False)
            if c.norm == "layer"
            else nn.RMSNorm(epsilon=c.norm_eps, dtype=dtype)
        )

    def embedded(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """Returns embeddings [..., D] of tokens and learned positions; ids that are no token read row 0."""
        c = self.config
        x = self.embed(jnp.where((tokens >= 0) & (tokens < c.vocab_size), tokens, 0))
        return x + self.position_embed(positions) if c.positions == "learned" else x

    def final(self, x: jax.Array) -> jax.Array:
        """Applies the final norm."""
        return self.norm(x)

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, list[KeyValue]]:
        """Returns (hidden [B, S, D] after the final norm, keys and values by layer) of tokens, mask [B, S]."""
        return self.last(tokens, mask, 0)

    def last(self, tokens: jax.Array, mask: jax.Array, last: int) -> tuple[jax.Array, list[KeyValue]]:
        """Returns the hidden states of the last columns, and the keys and values of all.

        Args:
            tokens: [B, S] int32.
            mask: [B, S] bool, true for real tokens.
            last: number of columns with hidden states; 0: all.
        """
        real = mask.astype(jnp.int32)
        return self.columns(tokens, positions_from_mask(mask), AttentionMask(real, real), last)

    def columns(
        self, tokens: jax.Array, positions: jax.Array, visible: AttentionMask | SharedPrefixMask, last: int = 0
    ) -> tuple[jax.Array, list[KeyValue]]:
        """Returns the hidden states of the last columns, and the keys and values of all, for any layout.

        Args:
            tokens: [B, S] int32.
            positions: [B, S] int32.
            visible: which columns each column reads.
            last: number of columns with hidden states; 0: all.
        """
        c = self.config
        x, rope = split_by_rows(self.embedded(tokens, positions)), rope_table(c, positions)
        seen = build_mask(c, visible)
        if self.is_initializing():
            return self.norm(self.layers(x, rope, seen)[0]), []
        blocks = block_params(c, self.variables["params"])
        run: Callable[..., Any] = partial(apply, Block(c, parent=None))
        caches: list[KeyValue] = []
        # The stack has a share of each matrix on each device, and the loop gathers one block's matrices at a time.
        if c.num_layers > FLAT and _shares("fsdp") > 1:
            body = lambda x, block: run(block, x, rope, seen)
            stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *in_dtype(blocks, c.compute_dtype))
            x, stacks = jax.lax.scan(jax.checkpoint(body, prevent_cse=False) if c.remat else body, x, stacked)
            caches = [jax.tree.map(lambda stack, i=i: stack[i], stacks) for i in range(c.num_layers)]
            return split_by_rows(self.norm(x[:, -last:])), caches  # -0: all of them
        if c.remat:
            run = jax.checkpoint(run, static_argnums=4)
        for layer, block in enumerate(blocks):
            # Columns of the last block that nobody reads give keys and values only.
            x, cache = run(block, x, rope, seen, last if layer == c.num_layers - 1 else 0)
            caches.append(cache)
        return split_by_rows(self.norm(x)), caches

    def groups(self, prompts: jax.Array, prompt_mask: jax.Array, answers: jax.Array, mask: jax.Array) -> jax.Array:
        """Computes the hidden states [G, K, T, D] of K answers to each of G prompts.

        A prompt's columns are computed once for its K answers, which saves P (K - 1) of K (P + T) columns.

        Args:
            prompts: [G, P] int32, left padded.
            prompt_mask: [G, P] bool.
            answers: [G, K, T] int32, right padded.
            mask: [G, K, T] bool, true for real tokens of the answers.
        """
        count, each, length = answers.shape
        start = prompt_mask.astype(jnp.int32).sum(-1)
        after = jnp.broadcast_to(start[:, None, None] + jnp.arange(length), answers.shape)
        positions = jnp.concatenate([positions_from_mask(prompt_mask), after.reshape(count, -1)], axis=1)
        tokens = jnp.concatenate([prompts, answers.reshape(count, -1)], axis=1)
        real = prompt_mask.astype(jnp.int32)
        own = mask.astype(jnp.int32).reshape(-1, length)
        visible = SharedPrefixMask(
            prompts=AttentionMask(real, real),
            # The prompt's last token is an answer's first column: real, as all that may be read here.
            answers=AttentionMask(own, jnp.concatenate([real.repeat(each, axis=0), own], axis=1)),
        )
        hidden, _ = self.columns(tokens, positions, visible, each * length)
        return hidden.reshape(*answers.shape, -1)


class Decoder(nn.Module):
    """The language model: a trunk and, unless the embeddings are tied, an output matrix."""

    config: DecoderConfig

    def setup(self) -> None:
        self.trunk = Trunk(self.config)
        if not self.config.tie_embeddings:
            self.lm_head = nn.Dense(self.config.vocab_size, use_bias=False, dtype=jnp.dtype(self.config.compute_dtype))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns logits [..., V] float32 of hidden states [..., D]."""
        if self.config.tie_embeddings:
            return self.trunk.embed.attend(hidden).astype(jnp.float32)
        return self.lm_head(hidden).astype(jnp.float32)

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns logits [B, S, V] float32 of tokens, mask [B, S]."""
        return self.logits(self.trunk(tokens, mask)[0])


def view_hidden(config: DecoderConfig, trunk: Any, view: View) -> jax.Array:
    """Returns the hidden states [..., D], by parameters `trunk` of `config`, that predict `view.targets`."""
    if isinstance(view, PaddedView):
        return response_hidden(config, trunk, view)
    # Segments alone separate prompts where each has one answer.
    mask = AttentionMask(view.segments, view.segments, view.answers, view.answers)
    return apply(Trunk(config), trunk, view.tokens, view.positions, mask, method="columns")[0]


def response_hidden(config: DecoderConfig, trunk: Any, view: PaddedView) -> jax.Array:
    """Computes the hidden states [B, T, D] that predict the response tokens, one column before each.

    With K = `view.answers` > 1 the columns of a prompt are computed once for the K rows that share it.

    Args:
        config: shape and flags of the decoder.
        trunk: parameters of the trunk.
        view: B sequences.
    """
    tokens, prompt_mask, response_mask, answers = view.tokens, view.prompt_mask, view.response_mask, view.answers
    start = prompt_mask.shape[1]
    # The last token predicts nothing here: it is not fed.
    if answers == 1 or start == 1:  # nothing to share
        mask = jnp.concatenate([prompt_mask, response_mask], axis=1)
        return apply(Trunk(config), trunk, tokens[:, :-1], mask[:, :-1], response_mask.shape[1], method="last")[0]
    # The prompt's last token, which predicts the first of each answer, is fed once an answer.
    mask = jnp.concatenate([prompt_mask[:, -1:], response_mask[:, :-1]], axis=1)
    grouped = (-1, answers, mask.shape[1])
    hidden = apply(
        Trunk(config),
        trunk,
        tokens[::answers, : start - 1],
        prompt_mask[::answers, :-1],
        tokens[:, start - 1 : -1].reshape(grouped),
        mask.reshape(grouped),
        method="groups",
    )
    return hidden.reshape(*mask.shape, -1)
