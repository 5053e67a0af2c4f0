"""First parameters of a small decoder that can look things up in its prompt from the start."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.config import require
from rlaif_jax.models.decoder import block_params, rope_frequencies
from rlaif_jax.models.decoder_config import DecoderConfig

BACK = (5.6, 3.6)  # biases that look one token back: of fast and of slow frequencies
SHARPNESS = (10.0, 4.0)  # of the heads that look for what followed, and of those that look for the same
QUIET = 0.3  # scale of what else the blocks write at first
COPY = 0.1  # how much of a token a head writes that it attends to


def with_recall_heads(config: DecoderConfig, params: Any) -> Any:
    """Returns fresh parameters whose attention can look things up in the prompt from the start.

    A third of the heads of the first layer attend to the previous token, by biases alone: with k = w u and q = w R(-1) u the
    rotary score is sum_f w_f^2 cos(theta_f (distance - 1)), largest one token back. In every later layer as many heads look for
    what followed an earlier copy of the query's token: they compare its own content with what the first layer wrote about the
    token before each key (the induction heads of Olsson 2022). The other heads look for an earlier copy itself; biases keep
    them from matching themselves. Both kinds write a little of the token that they attend to. Whatever else the blocks write
    begins small, so that the comparisons are not drowned. Small decoders otherwise take thousands of updates to find such
    heads, or never do. Slow rotary frequencies (a large `rope_theta`) make the comparisons sharper.

    Args:
        config: shape and flags of the decoder.
        params: what `CausalLM.init` returned; it is not changed.

    Raises:
        UserError: the config has no qkv_bias, no rotary positions, several query heads for a key-value head, or a single
            head.
    """
    require(
        config.qkv_bias and config.positions == "rope" and config.num_kv_heads == config.num_heads > 1,
        "recall heads need qkv_bias=True, positions='rope' and num_kv_heads == num_heads >= 2",
    )
    heads, h = config.num_heads, config.head_dim
    half, count = h // 2, max(heads // 3, 1)
    following, matching = slice(0, count * h), slice(count * h, heads * h)  # columns of the two kinds of heads
    frequencies = np.asarray(rope_frequencies(h, config.rope_theta, config.rope_scaling))
    slow = np.tile(frequencies < 0.1, 2 * count)  # the others turn too far between a word and its copy
    blocks = [jax.tree.map(np.array, block) for block in block_params(config, params["trunk"])]
    keys, queries = np.zeros((2, len(blocks), heads, h), np.float32)
    back = np.where(frequencies > 0.5, *BACK)  # the fast ones tell one token back from two
    keys[0, :count, :half] = back
    queries[0, :count, :half], queries[0, :count, half:] = back * np.cos(frequencies), -back * np.sin(frequencies)
    keys[1:, count:, :half], queries[1:, count:, :half] = 1.0, -6.0

    first = blocks[0]
    for name in ("q", "k"):
        first[name]["kernel"][:, following] *= 0.25  # contents hardly matter there
    first["o"]["kernel"][following] *= 1.5
    first["o"]["kernel"][matching] *= QUIET
    first["down"]["kernel"] *= QUIET
    seen, written = first["v"]["kernel"][:, following], first["o"]["kernel"][following]  # of the previous token
    read = np.linalg.pinv(written)
    own = np.eye(config.width, dtype=np.float32) - read @ written  # leaves what is not about the previous token
    for block in blocks[1:]:
        q, k, v, o = (block[name]["kernel"] for name in "qkvo")
        o *= QUIET
        block["down"]["kernel"] *= QUIET
        q[:, following], k[:, following] = SHARPNESS[0] * own @ seen * slow, read * slow
        q[:, matching] = k[:, matching] = SHARPNESS[1] * own @ q[:, matching]
        v[:, following] = own @ v[:, following]
        o[following] = COPY * v[:, following].T
        o[matching] += COPY * v[:, matching].T
    trunk = dict(params["trunk"])
    for layer, block in enumerate(blocks):
        block["q"]["bias"], block["k"]["bias"] = queries[layer].ravel(), keys[layer].ravel()
        trunk[f"layers_{layer}"] = jax.tree.map(jnp.asarray, block)
    return params | {"trunk": trunk}
