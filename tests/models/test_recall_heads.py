"""Recall heads: before any update, heads of a small decoder look where the docstring says.

A decoder reads texts whose second half is their first half with its blocks of four tokens in another order. The numbers are
shares of attention, means over heads, texts and columns.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.models import CausalLM
from rlaif_jax.models.decoder import Block, apply, block_params, rope_table
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.recall_heads import with_recall_heads
from tests.helpers import assert_same_leaves

CONFIG = small_decoder(  # as the quickstart's
    96, num_layers=3, width=64, num_heads=6, head_dim=16, context_length=128, qkv_bias=True, rope_theta=1e6
)
LOOKING = 2  # a third of the heads
HALF, BLOCK, ROWS = 20, 4, 8  # tokens that come again, texts


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens [ROWS, 2 HALF], and the columns [ROWS, HALF] of the earlier copies of the second half."""
    rng = np.random.default_rng(0)
    first = np.stack([rng.permutation(CONFIG.vocab_size)[:HALF] for _ in range(ROWS)])
    blocks = np.arange(HALF).reshape(-1, BLOCK)
    copies = np.stack([blocks[rng.permutation(len(blocks))].ravel() for _ in range(ROWS)])
    return np.concatenate([first, np.take_along_axis(first, copies, 1)], axis=1).astype(np.int32), copies


@jax.jit
def attention(params: dict, tokens: np.ndarray) -> list[jax.Array]:
    """Returns the attention [B, heads, S, S] of each layer, written out."""
    trunk, length = params["trunk"], tokens.shape[1]
    rope = rope_table(CONFIG, jnp.arange(length))
    x, found = trunk["embed"]["embedding"][tokens], []
    for block in block_params(CONFIG, trunk):
        q, k, v = apply(Block(CONFIG), block, x, rope, method="qkv")
        scores = jnp.einsum("bshd,bthd->bhst", q, k) / CONFIG.head_dim**0.5
        weights = jax.nn.softmax(jnp.where(np.tri(length, dtype=bool), scores, -jnp.inf), axis=-1)
        found.append(weights)
        attended = jnp.einsum("bhst,bthd->bshd", weights, v).reshape(*x.shape[:2], -1)
        x = apply(Block(CONFIG), block, x, attended, method="finish")
    return found


@functools.cache
def shares(seed: int, recall: bool, biases: bool = True) -> dict[str, np.ndarray]:
    """Returns the attention that a column of the second half pays to other columns, [layers, kinds of heads].

    They are `back`, one token back; `copy`, the earlier copy of the column's token; `next`, the token after that copy; `self`.
    The first token of a block is left out: the token before its copy is another one.
    """
    params = CausalLM(CONFIG).init(jax.random.key(seed))
    if recall:
        params = with_recall_heads(CONFIG, params)
    if not biases:
        clear = lambda path, x: 0 * x if path[-1].key == "bias" else x
        blocks = {f"layers_{i}": params["trunk"][f"layers_{i}"] for i in range(1, CONFIG.num_layers)}
        params = params | {"trunk": params["trunk"] | jax.tree_util.tree_map_with_path(clear, blocks)}
    tokens, copies = texts()
    at = np.flatnonzero(np.arange(HALF) % BLOCK)
    rows, columns = np.arange(ROWS)[:, None], np.broadcast_to(HALF + at, (ROWS, len(at)))
    copied = copies[:, at]
    found = {"back": columns - 1, "copy": copied, "next": copied + 1, "self": columns}

    def paid(weights: np.ndarray, to: np.ndarray) -> tuple[float, float]:
        by_head = weights[rows, :, columns, to].mean((0, 1))
        return by_head[:LOOKING].mean(), by_head[LOOKING:].mean()

    return {
        name: np.array([paid(weights, to) for weights in jax.device_get(attention(params, tokens))])
        for name, to in found.items()
    }


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_third_of_the_first_layers_heads_look_one_token_back(seed: int) -> None:
    looking, others = shares(seed, recall=True)["back"][0]
    assert looking > 0.7
    assert others < 0.1
    assert shares(seed, recall=False)["back"].max() < 0.1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_third_of_the_second_layers_heads_look_at_what_followed_an_earlier_copy(seed: int) -> None:
    found, plain = shares(seed, recall=True)["next"], shares(seed, recall=False)["next"]
    assert found[1, 0] > 0.25
    assert max(found[1, 1], plain.max()) < 0.1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_others_look_at_an_earlier_copy_but_not_at_themselves(seed: int) -> None:
    found, plain = shares(seed, recall=True), shares(seed, recall=False)
    assert found["copy"][1, 1] > 2 * plain["copy"].max()
    assert found["self"][1, 1] < 0.15
    assert shares(seed, recall=True, biases=False)["self"][1, 1] > 0.5


def test_the_heads_write_the_tokens_that_they_attend_to() -> None:
    fresh = CausalLM(CONFIG).init(jax.random.key(0))
    params = with_recall_heads(CONFIG, fresh)
    embedding, h = np.asarray(params["trunk"]["embed"]["embedding"]), CONFIG.head_dim

    def right(params, at) -> float:
        block = jax.device_get(block_params(CONFIG, params["trunk"])[1])
        written = embedding @ block["v"]["kernel"][:, at] @ block["o"]["kernel"][at] @ embedding.T
        return np.mean(written.argmax(-1) == np.arange(96))

    following, matching = slice(0, h), slice(LOOKING * h, LOOKING * h + h)
    assert right(params, following) > 0.8
    assert right(params, matching) > 0.3
    assert right(fresh, following) < 0.1
    assert right(fresh, matching) < 0.1


def test_the_given_parameters_are_kept() -> None:
    fresh = CausalLM(CONFIG).init(jax.random.key(0))
    before = jax.device_get(fresh)
    params = with_recall_heads(CONFIG, fresh)
    assert_same_leaves(fresh, before)
    jax.tree.map(lambda new, old: chex.assert_equal_shape([new, old]), params, fresh)


@pytest.mark.parametrize("flags", [{"qkv_bias": False}, {"positions": "learned"}, {"num_kv_heads": 2}], ids=str)
def test_other_shapes_are_refused(flags: dict) -> None:
    config = dataclasses.replace(CONFIG, **flags)
    with pytest.raises(UserError, match="qkv_bias=True"):
        with_recall_heads(config, CausalLM(config).init(jax.random.key(0)))
