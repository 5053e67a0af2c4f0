"""The engine: prompts in, answers with their log-probabilities out, for any `LanguageModel`.

A prompt is read once for its K answers. Decoding has two ways, which give the same answers up to rounding:

- all at once (`slots=0`): the K answers read one copy of their prompt's part, each answer keeps a cache for its own
  tokens only, and the loop ends when every answer has stopped;
- in slots: `slots` answers at a time; the slot of an answer that has stopped goes to the next one in the queue. The work
  is that of the tokens drawn, not that of the longest answer, and the caches are those of the slots.
"""

from __future__ import annotations

import dataclasses
from functools import partial, reduce
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from rlaif_jax.models.base import LanguageModel, Prefill
from rlaif_jax.models.sampling import SamplingConfig, sample
from rlaif_jax.types import Params, Prompts

FIRST_BUCKET = 128
StopIds: TypeAlias = int | tuple[int, ...] | None


def stop_ids(eos_id: StopIds) -> tuple[int, ...]:
    """Returns the tokens that end an answer, given as one, several or none."""
    return eos_id if isinstance(eos_id, tuple) else () if eos_id is None else (eos_id,)


class Drawn(NamedTuple):
    """R answers as the engine draws them: tokens, logprobs, mask [R, T] and finished [R]; see `Rollout`."""

    tokens: jax.Array
    logprobs: jax.Array
    mask: jax.Array
    finished: jax.Array


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How answers are drawn.

    Attributes:
        sampling: temperature, truncation and length.
        answers: K, answers to each prompt.
        eos_id: the stop token or tokens; none: answers end at the length limit only.
        pad_id: what columns after the stop hold.
        first_answer: index of the first of the K answers, from which their random numbers are derived.
    """

    sampling: SamplingConfig
    answers: int
    eos_id: StopIds
    pad_id: int
    first_answer: int = 0

    def is_stop(self, tokens: jax.Array) -> jax.Array:
        """Returns whether each token is a stop token."""
        stops = [tokens == stop for stop in stop_ids(self.eos_id)]
        return reduce(jnp.logical_or, stops, jnp.zeros(tokens.shape, bool))


def answer_uniforms(key: jax.Array, uid: jax.Array, answers: int, length: int, first: int = 0) -> jax.Array:
    """Returns uniform numbers in [0, 1), float32 [B K, T, 2], from which the tokens of answers are drawn.

    Each depends on (key, prompt uid, answer index, token index) only, not on the batch or the device. The two
    numbers of a token come from separate keys.

    Args:
        key: the key of the step.
        uid: [B] uint32, identifies the prompts.
        answers: K.
        length: T.
        first: index of the first answer.
    """

    def one(uid: jax.Array, index: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, uid), index)
        return jnp.stack([jax.random.uniform(k, (length,)) for k in (own, jax.random.fold_in(own, 1))], axis=-1)

    indices = first + jnp.arange(answers)
    return jax.vmap(lambda u: jax.vmap(lambda i: one(u, i))(indices))(uid).reshape(-1, length, 2)


def decode_all(model: LanguageModel, params: Params, prompts: Prompts, key: jax.Array, how: Decoding) -> Drawn:
    """Draws all answers at once, column by column, until every one has stopped.

    Args:
        model: the model.
        params: its parameters, matrices in the compute dtype.
        prompts: [B, P].
        key: the key of the step.
        how: K, sampling and stop token.
    """
    rows, length = prompts.tokens.shape[0] * how.answers, how.sampling.max_new_tokens
    prompt = model.prefill(params, prompts.tokens, prompts.mask, hold_last=False)
    uniforms = answer_uniforms(key, prompts.uid, how.answers, length, how.first_answer).swapaxes(0, 1)
    first = prompt.positions.repeat(how.answers)
    offset = 0 if prompt.hidden is not None else 1  # tokens that are fed before the first one is drawn

    def draw(t: jax.Array, logits: jax.Array, done: jax.Array, out: tuple[jax.Array, ...]) -> Any:
        tokens, logprobs = sample(logits, uniforms[t], how.sampling)
        tokens, logprobs = jnp.where(done, how.pad_id, tokens), jnp.where(done, 0.0, logprobs)
        written = (out[0].at[t].set(tokens), out[1].at[t].set(logprobs), out[2].at[t].set(~done))
        return tokens, done | (how.is_stop(tokens) & ~done), written

    out = (jnp.full((length, rows), how.pad_id, jnp.int32), jnp.zeros((length, rows)), jnp.zeros((length, rows), bool))
    t, tokens, done = jnp.int32(0), prompt.first_tokens.repeat(how.answers), jnp.zeros(rows, bool)
    if prompt.hidden is not None:
        logits = model.logits(params, prompt.hidden).repeat(how.answers, axis=0)
        tokens, done, out = draw(t, logits, done, out)
        t = jnp.int32(1)

    def step(carry: Any) -> Any:
        t, tokens, done, cache, out = carry
        column = t - 1 + offset
        seen = jnp.arange(jax.tree.leaves(cache)[0].shape[2])[None] <= column
        logits, cache = model.decode_step(params, prompt.shared, cache, tokens, first + column, column, seen)
        tokens, done, out = draw(t, logits, done, out)
        return t + 1, tokens, done, cache, out

    cache = model.start_cache(rows, 0)
    for bound in length_buckets(length):
        columns = max(bound - 1 + offset, 1)  # the last token is not fed
        room = ((0, 0), (0, 0), (0, columns - jax.tree.leaves(cache)[0].shape[2]), (0, 0))
        cache = jax.tree.map(partial(jnp.pad, pad_width=room), cache)
        running = lambda carry, bound=bound: (carry[0] < bound) & ~carry[2].all()  # t, tokens, done, cache, out
        t, tokens, done, cache, out = jax.lax.while_loop(running, step, (t, tokens, done, cache, out))
    return Drawn(out[0].T, out[1].T, out[2].T, done)


def length_buckets(length: int) -> list[int]:
    """Returns the lengths up to which answers of at most `length` tokens are decoded in one loop.

    A step reads the whole of its caches, so the caches of each loop are as long as its bound. Each loop must be compiled, so
    the bounds double.
    """
    buckets = [length]
    while buckets[0] > FIRST_BUCKET:
        buckets.insert(0, max(FIRST_BUCKET, (buckets[0] + 1) // 2))
    return buckets


class Slots(NamedTuple):
    """The state of `decode_in_slots`: N slots, R answers to draw.

    Attributes:
        step: [] decoding steps so far.
        queue: [] answers handed out so far.
        row: [N] the answer that a slot works on, R where the slot is idle.
        drawn: [N] tokens drawn so far.
        token: [N] the token to feed next.
        shared: the slots' prompts (`Prefill.shared`).
        cache: what `LanguageModel.start_cache` makes for N rows.
        tokens, logprobs: [R + 1, T]; the last row takes what idle slots write.
        lengths, finished: [R + 1].
    """

    step: jax.Array
    queue: jax.Array
    row: jax.Array
    drawn: jax.Array
    token: jax.Array
    shared: Any
    cache: Any
    tokens: jax.Array
    logprobs: jax.Array
    lengths: jax.Array
    finished: jax.Array


def decode_in_slots(
    model: LanguageModel, params: Params, prompts: Prompts, key: jax.Array, how: Decoding, *, slots: int
) -> Drawn:
    """Draws `slots` answers at a time; free slots are filled from the queue.

    They are filled once an eighth of the slots, at least one, is free. All slots write into the same column, step mod T, of
    their caches. A slot that began t steps ago reads the last t + 1 columns: no answer is longer than T, so none of them has
    been overwritten.

    Args:
        model: the model.
        params: its parameters, matrices in the compute dtype.
        prompts: [B, P].
        key: the key of the step.
        how: K, sampling and stop token.
        slots: N, answers that are decoded at a time.
    """
    length, rows = how.sampling.max_new_tokens, prompts.tokens.shape[0] * how.answers
    # The last token of a prompt is the first that its answers feed.
    whole = model.prefill(params, prompts.tokens, prompts.mask, hold_last=True)
    uniforms = answer_uniforms(key, prompts.uid, how.answers, length, how.first_answer)
    portion = max(1, slots // 8)

    def step(state: Slots) -> Slots:
        row, drawn = state.row, state.drawn
        column = state.step % length
        age = (column - jnp.arange(length)) % length
        position = whole.positions[jnp.minimum(row, rows - 1) // how.answers] + drawn
        seen = age[None] <= drawn[:, None]
        logits, cache = model.decode_step(params, state.shared, state.cache, state.token, position, column, seen)
        token, logprobs = sample(logits, uniforms[jnp.minimum(row, rows - 1), drawn], how.sampling)
        stopped = how.is_stop(token)
        done = stopped | (drawn + 1 == length)
        return state._replace(
            step=state.step + 1,
            row=jnp.where(done, rows, row),
            drawn=jnp.where(done, 0, drawn + 1),
            token=token,
            cache=cache,
            tokens=state.tokens.at[row, drawn].set(token),
            logprobs=state.logprobs.at[row, drawn].set(logprobs),
            lengths=state.lengths.at[row].set(drawn + 1),
            finished=state.finished.at[row].set(stopped),
        )

    def waiting(state: Slots) -> jax.Array:
        return state.queue < rows

    def busy(state: Slots) -> jax.Array:
        idle = jnp.sum(state.row == rows)
        return (idle < slots) & ~(waiting(state) & (idle >= portion))

    state = Slots(
        step=jnp.int32(0),
        queue=jnp.int32(0),
        row=jnp.full(slots, rows),
        drawn=jnp.zeros(slots, jnp.int32),
        token=jnp.zeros(slots, jnp.int32),
        shared=jax.tree.map(lambda x: jnp.zeros((slots, *x.shape[1:]), x.dtype), whole.shared),
        cache=model.start_cache(slots, length),
        tokens=jnp.full((rows + 1, length), how.pad_id, jnp.int32),
        logprobs=jnp.zeros((rows + 1, length)),
        lengths=jnp.zeros(rows + 1, jnp.int32),
        finished=jnp.zeros(rows + 1, bool),
    )
    # A loop in a loop and no `cond`, whose two branches would each need a copy of the caches.
    state = jax.lax.while_loop(
        lambda s: waiting(s) | jnp.any(s.row < rows),
        lambda s: jax.lax.while_loop(busy, step, _fill(s, whole, how.answers, rows, portion)),
        state,
    )
    real = jnp.arange(length) < state.lengths[:rows, None]
    return Drawn(state.tokens[:rows], state.logprobs[:rows], real, state.finished[:rows])


def _fill(state: Slots, whole: Prefill, answers: int, rows: int, portion: int) -> Slots:
    """Gives up to `portion` idle slots the next answers of the queue; `whole` are all prompts, prefilled."""
    slots = state.row.shape[0]
    free = state.row == rows
    rank = jnp.cumsum(free) - 1
    taken = free & (rank < portion) & (state.queue + rank < rows)
    row = jnp.where(taken, state.queue + rank, state.row)
    chosen = jnp.nonzero(taken, size=portion, fill_value=slots)[0]  # `slots` is out of bounds: dropped
    source = row.at[chosen].get(mode="clip") // answers
    put = lambda mine, theirs: mine.at[chosen].set(theirs[source], mode="drop")
    return state._replace(
        queue=state.queue + taken.sum(),
        row=row,
        drawn=jnp.where(taken, 0, state.drawn),
        token=put(state.token, whole.first_tokens),
        shared=jax.tree.map(put, state.shared, whole.shared),
    )
