"""The engine: prompts in, answers with their log-probabilities out, in one jitted call.

A prompt is prefilled once for its K answers. Decoding runs the blocks unrolled, each with its own cache, in one of two
ways that give the same answers up to rounding:

- all at once (`slots=0`): queries of the K answers meet one copy of their prompt's keys and values, each answer keeps a
  cache for its own T tokens only, and the loop stops when every answer has;
- in slots: so many answers at a time, and the slot of one that has stopped goes to the next in the queue. The work is
  then that of the tokens there are, not that of the longest answer, and the cache is that of the slots.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlaif_jax.data.prompts import PromptBatch
from rlaif_jax.data.tokenizers import Tokenizer
from rlaif_jax.models.attention_cached import attend_cached, beside, heads_beside
from rlaif_jax.models.decoder import Block, KeyValue, Trunk, apply, block_params, in_dtype, rope_table
from rlaif_jax.models.decoder_config import DecoderConfig
from rlaif_jax.models.heads import LanguageModel
from rlaif_jax.models.sampling import SamplingConfig, sample
from rlaif_jax.parallel import Runner, on_own_rows
from rlaif_jax.types import Params, Prompts, Rollout

Drawn = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # tokens, logprobs, mask [R, T], finished [R]


class Prefill(NamedTuple):
    """What the prompts leave behind: hidden [B, D] at the last token, per-layer caches [B, kv_heads / side, P, side * h],
    mask [B, P]."""

    hidden: jax.Array
    caches: tuple[KeyValue, ...]
    mask: jax.Array


def prefill(model: LanguageModel, params: Params, tokens: jax.Array, mask: jax.Array) -> Prefill:
    """Run left-padded prompts [B, P] once."""
    hidden, caches = apply(Trunk(model.config), params["trunk"], tokens, mask, 1, method="last")
    side = heads_beside(model.config)
    caches = tuple((beside(keys, side), beside(values, side)) for keys, values in caches)
    return Prefill(hidden[:, -1], caches, mask.astype(bool))


def decode_step(
    model: LanguageModel,
    params: Params,
    prompt: Prefill,
    caches: tuple[KeyValue, ...],
    tokens: jax.Array,
    position: jax.Array,
    column: jax.Array,
    own_mask: jax.Array,
) -> tuple[jax.Array, tuple[KeyValue, ...]]:
    """Feed one token a row and return logits for the next.

    tokens, position [R] (R = B*K rows), column [] of the own caches where they land, own_mask [R or 1, T] the columns
    that a row may see -> (logits [R, V] float32, new caches).
    """
    config = model.config
    x = apply(Trunk(config), params["trunk"], tokens, position, method="embedded")
    rope = rope_table(config, position)
    updated = []
    for block, shared, (keys, values) in zip(block_params(config, params["trunk"]), prompt.caches, caches):
        q, k, v = apply(Block(config), block, x, rope, method="qkv")
        one = (*keys.shape[:2], 1, keys.shape[3])
        keys = jax.lax.dynamic_update_slice_in_dim(keys, k.reshape(one), column, axis=2)
        values = jax.lax.dynamic_update_slice_in_dim(values, v.reshape(one), column, axis=2)
        attended = attend_cached(q, shared, prompt.mask, (keys, values), own_mask)
        x = apply(Block(config), block, x, attended, method="finish")
        updated.append((keys, values))
    hidden = apply(Trunk(config), params["trunk"], x, method="final")
    return model.logits(params, hidden), tuple(updated)


def empty_caches(config: DecoderConfig, rows: int, length: int) -> tuple[KeyValue, ...]:
    """Zeroed own caches [rows, kv_heads / side, length, side * h], one pair a layer, `side` heads side by side."""
    side = heads_beside(config)
    shape = (rows, config.num_kv_heads // side, length, side * config.head_dim)
    zeros = jnp.zeros(shape, jnp.dtype(config.compute_dtype))
    return tuple((zeros, zeros) for _ in range(config.num_layers))


def answer_uniforms(key: jax.Array, uid: jax.Array, answers: int, length: int) -> jax.Array:
    """Uniform numbers [B*K, T, 2] that depend on (key, prompt uid, answer index) only: not on slot, batch or device."""

    def one(uid: jax.Array, index: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, uid), index)
        return jnp.stack([jax.random.uniform(k, (length,)) for k in (own, jax.random.fold_in(own, 1))], axis=-1)

    return jax.vmap(lambda u: jax.vmap(lambda i: one(u, i))(jnp.arange(answers)))(uid).reshape(-1, length, 2)


def generate(
    model: LanguageModel,
    params: Params,
    prompts: Prompts,
    key: jax.Array,
    *,
    sampling: SamplingConfig,
    answers: int = 1,
    eos_id: int | None,
    pad_id: int,
    slots: int = 0,
) -> Rollout:
    """Draw `answers` answers to every prompt; the B*K rows stand prompt by prompt.

    `key` is the same for the whole batch: every answer derives its own from it, the prompt's uid and the answer index.
    A row stops with `eos_id` (None: never) or at sampling.max_new_tokens; columns after the stop hold `pad_id`.
    `slots` answers are decoded at a time on each device, 0 or more than it has: all. It changes no answer but where a
    matrix product of another shape rounds a draw to the other side of a bound.
    """

    def on_device(replicated: tuple[Params, jax.Array], prompts: Prompts) -> Rollout:
        params, key = replicated
        rows = prompts.tokens.shape[0] * answers
        decode = partial(decode_in_slots, slots=slots) if 0 < slots < rows else decode_all
        tokens, logprobs, real, finished = decode(model, params, prompts, key, sampling, answers, eos_id, pad_id)
        return Rollout(
            tokens=jnp.concatenate([prompts.tokens.repeat(answers, axis=0), tokens], axis=1),
            prompt_mask=prompts.mask.astype(bool).repeat(answers, axis=0),
            response_mask=real,
            logprobs=logprobs,
            finished=finished,
        )

    # No step casts the matrices then, and a mesh gathers half the bytes.
    return on_own_rows(on_device, (in_dtype(params, model.config.compute_dtype), key), prompts)


def decode_all(
    model: LanguageModel,
    params: Params,
    prompts: Prompts,
    key: jax.Array,
    sampling: SamplingConfig,
    answers: int,
    eos_id: int | None,
    pad_id: int,
) -> Drawn:
    """All answers side by side, column by column, until every one has stopped."""
    rows, length = prompts.tokens.shape[0] * answers, sampling.max_new_tokens
    prompt = prefill(model, params, prompts.tokens, prompts.mask)
    uniforms = answer_uniforms(key, prompts.uid, answers, length).swapaxes(0, 1)
    first = prompts.mask.astype(jnp.int32).sum(-1).repeat(answers)

    def draw(t: jax.Array, logits: jax.Array, done: jax.Array, out: tuple[jax.Array, ...]) -> Any:
        tokens, logprobs = sample(logits, uniforms[t], sampling)
        tokens, logprobs = jnp.where(done, pad_id, tokens), jnp.where(done, 0.0, logprobs)
        written = (out[0].at[t].set(tokens), out[1].at[t].set(logprobs), out[2].at[t].set(~done))
        stop = tokens == eos_id if eos_id is not None else jnp.zeros_like(done)
        return tokens, done | (stop & ~done), written

    out = (jnp.full((length, rows), pad_id, jnp.int32), jnp.zeros((length, rows)), jnp.zeros((length, rows), bool))
    logits = model.logits(params, prompt.hidden).repeat(answers, axis=0)
    tokens, done, out = draw(jnp.int32(0), logits, jnp.zeros(rows, bool), out)

    def step(carry: Any) -> Any:
        t, tokens, done, caches, out = carry
        seen = jnp.arange(caches[0][0].shape[2])[None] <= t - 1
        logits, caches = decode_step(model, params, prompt, caches, tokens, first + t - 1, t - 1, seen)
        tokens, done, out = draw(t, logits, done, out)
        return t + 1, tokens, done, caches, out

    t, caches = jnp.int32(1), empty_caches(model.config, rows, 0)
    for bound in length_buckets(length):
        room = ((0, 0), (0, 0), (0, max(bound - 1, 1) - caches[0][0].shape[2]), (0, 0))  # the last token is not fed
        caches = jax.tree.map(partial(jnp.pad, pad_width=room), caches)
        running = lambda carry, bound=bound: (carry[0] < bound) & ~carry[2].all()  # t, tokens, done, caches, out
        t, tokens, done, caches, out = jax.lax.while_loop(running, step, (t, tokens, done, caches, out))
    return out[0].T, out[1].T, out[2].T, done


FIRST_BUCKET = 128


def length_buckets(length: int) -> list[int]:
    """The lengths up to which answers of at most `length` tokens are decoded in one loop, with caches of just that length: a
    step reads the whole of its caches. Each is a loop to compile, so they double."""
    buckets = [length]
    while buckets[0] > FIRST_BUCKET:
        buckets.insert(0, max(FIRST_BUCKET, (buckets[0] + 1) // 2))
    return buckets


class Slots(NamedTuple):
    """The state of `decode_in_slots`: N slots, R answers to draw.

    step [] counts decoding steps, queue [] the answers handed out; row [N] the answer that a slot works on (R: idle),
    drawn [N] how many of its tokens there are, token [N] the one to feed next; prompt: the slots' prompts; caches
    as `empty_caches` makes them; tokens, logprobs [R + 1, T] and lengths, finished [R + 1], whose last row takes what
    idle slots write.
    """

    step: jax.Array
    queue: jax.Array
    row: jax.Array
    drawn: jax.Array
    token: jax.Array
    prompt: Prefill
    caches: tuple[KeyValue, ...]
    tokens: jax.Array
    logprobs: jax.Array
    lengths: jax.Array
    finished: jax.Array


def decode_in_slots(
    model: LanguageModel,
    params: Params,
    prompts: Prompts,
    key: jax.Array,
    sampling: SamplingConfig,
    answers: int,
    eos_id: int | None,
    pad_id: int,
    slots: int,
) -> Drawn:
    """`slots` answers at a time; free slots are filled from the queue, an eighth of them (one at least) in one go.

    All slots write into the same column, step mod T, of their caches. A slot that began t steps ago sees the last t + 1
    columns: no longer answer than T is drawn, so none of them has been overwritten.
    """
    config, length = model.config, sampling.max_new_tokens
    rows = prompts.tokens.shape[0] * answers
    if prompts.tokens.shape[1] == 1:  # at least one column is prefilled
        left = lambda x: jnp.pad(x, ((0, 0), (1, 0)))
        prompts = Prompts(tokens=left(prompts.tokens), mask=left(prompts.mask), uid=prompts.uid)
    some = max(1, slots // 8)
    # The last token of a prompt is the first that its answers feed.
    whole = prefill(model, params, prompts.tokens[:, :-1], prompts.mask[:, :-1])
    before = prompts.mask[:, :-1].astype(jnp.int32).sum(-1)
    uniforms = answer_uniforms(key, prompts.uid, answers, length)

    def fill(state: Slots) -> Slots:
        free = state.row == rows
        rank = jnp.cumsum(free) - 1
        taken = free & (rank < some) & (state.queue + rank < rows)
        row = jnp.where(taken, state.queue + rank, state.row)
        chosen = jnp.nonzero(taken, size=some, fill_value=slots)[0]  # `slots` is out of bounds: dropped
        source = row.at[chosen].get(mode="clip") // answers
        put = lambda mine, theirs: mine.at[chosen].set(theirs[source], mode="drop")
        return state._replace(
            queue=state.queue + taken.sum(),
            row=row,
            drawn=jnp.where(taken, 0, state.drawn),
            token=put(state.token, prompts.tokens[:, -1]),
            prompt=Prefill(
                state.prompt.hidden,
                jax.tree.map(put, state.prompt.caches, whole.caches),
                put(state.prompt.mask, whole.mask),
            ),
        )

    def step(state: Slots) -> Slots:
        row, drawn = state.row, state.drawn
        column = state.step % length
        age = (column - jnp.arange(length)) % length
        position = before[jnp.minimum(row, rows - 1) // answers] + drawn
        logits, caches = decode_step(
            model,
            params,
            state.prompt,
            state.caches,
            state.token,
            position,
            column,
            age[None] <= drawn[:, None],
        )
        token, logprobs = sample(logits, uniforms[jnp.minimum(row, rows - 1), drawn], sampling)
        stopped = token == eos_id if eos_id is not None else jnp.zeros(slots, bool)
        over = stopped | (drawn + 1 == length)
        return state._replace(
            step=state.step + 1,
            row=jnp.where(over, rows, row),
            drawn=jnp.where(over, 0, drawn + 1),
            token=token,
            caches=caches,
            tokens=state.tokens.at[row, drawn].set(token),
            logprobs=state.logprobs.at[row, drawn].set(logprobs),
            lengths=state.lengths.at[row].set(drawn + 1),
            finished=state.finished.at[row].set(stopped),
        )

    def waiting(state: Slots) -> jax.Array:
        return state.queue < rows

    def busy(state: Slots) -> jax.Array:
        idle = jnp.sum(state.row == rows)
        return (idle < slots) & ~(waiting(state) & (idle >= some))

    state = Slots(
        step=jnp.int32(0),
        queue=jnp.int32(0),
        row=jnp.full(slots, rows),
        drawn=jnp.zeros(slots, jnp.int32),
        token=jnp.zeros(slots, jnp.int32),
        prompt=jax.tree.map(lambda x: jnp.zeros((slots, *x.shape[1:]), x.dtype), whole),
        caches=empty_caches(config, slots, length),
        tokens=jnp.full((rows + 1, length), pad_id, jnp.int32),
        logprobs=jnp.zeros((rows + 1, length)),
        lengths=jnp.zeros(rows + 1, jnp.int32),
        finished=jnp.zeros(rows + 1, bool),
    )
    # A loop in a loop and no `cond`, whose two branches would each need a copy of the caches.
    state = jax.lax.while_loop(
        lambda s: waiting(s) | jnp.any(s.row < rows), lambda s: jax.lax.while_loop(busy, step, fill(s)), state
    )
    real = jnp.arange(length) < state.lengths[:rows, None]
    return state.tokens[:rows], state.logprobs[:rows], real, state.finished[:rows]


def to_prompts(batch: PromptBatch) -> Prompts:
    """A host batch as the pytree that `generate` takes."""
    return Prompts(tokens=jnp.asarray(batch.tokens), mask=jnp.asarray(batch.mask), uid=jnp.asarray(batch.uid))


def answer_texts(rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
    """The B*K answers as text, up to the stop token and without it."""
    tokens, mask, finished = jax.device_get((rollout.responses, rollout.response_mask, rollout.finished))
    lengths = mask.sum(-1) - finished
    return [tokenizer.decode(row[:length].tolist()).strip() for row, length in zip(tokens, lengths)]


def make_generator(
    runner: Runner,
    model: LanguageModel,
    tokenizer: Tokenizer,
    sampling: SamplingConfig,
    answers: int = 1,
) -> Callable[[tuple[Params, jax.Array], Prompts], Rollout]:
    """`generate` compiled for all devices, outside the training loop: call it with ((params, key), prompts)."""

    def run(replicated: tuple[Params, jax.Array], prompts: Prompts, *, axis_name: str | None = None) -> Rollout:
        params, key = replicated
        return generate(
            model,
            params,
            prompts,
            key,
            sampling=sampling,
            answers=answers,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
        )

    return runner.map(run)
