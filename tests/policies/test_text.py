"""The engine against the trainer's forward pass, a cache-free loop, and itself in another batch, order or layout."""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from rlaif_jax.algorithms.advantages import GroupNormalised
from rlaif_jax.algorithms.ppo import PPOConfig
from rlaif_jax.algorithms.scoring import policy_logprobs
from rlaif_jax.config import UserError
from rlaif_jax.data.prompts import prompt_batches
from rlaif_jax.data.readers import FileRecords
from rlaif_jax.data.tokenizers import word_level_tokenizer
from rlaif_jax.models import CausalLM, attention_cached
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import (
    BATCH,
    JitRunner,
    PmapRunner,
    ShardRunner,
    make_mesh,
    state_shardings,
)
from rlaif_jax.policies import decoding
from rlaif_jax.policies.base import Draw, to_prompts
from rlaif_jax.policies.text import TextPolicy, answer_texts, generate, make_generator
from rlaif_jax.programs import CompilationClock
from rlaif_jax.types import Frozen, Prompts, RewardBatch, StepData
from tests.helpers import random_params

TOKENIZER = word_level_tokenizer(("a", "b", "c", "d", "e"))
V, EOS, PAD, P, T, ROWS = TOKENIZER.vocab_size, TOKENIZER.eos_id, TOKENIZER.pad_id, 6, 8, 8
MODEL = CausalLM(small_decoder(V, num_layers=2, width=16, num_heads=4, num_kv_heads=2, context_length=32))
SAMPLING = SamplingConfig(max_new_tokens=T, temperature=0.8)
GREEDY = SamplingConfig(max_new_tokens=T, temperature=0)
KEY = jax.random.key(7)
POLICY = TextPolicy(MODEL, SAMPLING, EOS, PAD)


def test_one_compilation_a_prompt_length_bucket(params):
    records = [{"prompt": " ".join("abcde"[: 1 + i % 5])} for i in (0, 1, 3, 2, 4, 0, 3)]
    stream = prompt_batches(
        FileRecords(tuple(records), tuple("" for _ in records)),
        TOKENIZER,
        batch_size=1,
        seed=0,
        prompt_length=5,
        shuffle=False,
        epochs=1,
        buckets=(2, 5),
    )
    generator = make_generator(JitRunner(), MODEL, TOKENIZER, SAMPLING)
    clock, lengths = CompilationClock(), []
    for batch in stream:
        before = clock.programs
        generator((params, KEY), to_prompts(batch))
        lengths.append((batch.tokens.shape[1], clock.programs - before > 0))
    assert lengths == [(2, True), (2, False), (5, True), (5, False), (5, False), (2, False), (5, False)]


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


def make_prompts(pads: int = 0) -> Prompts:
    """Eight prompts of 2 to 6 tokens behind at least `pads` columns of padding (of junk)."""
    rng = np.random.default_rng(0)
    mask = np.arange(P) >= np.arange(ROWS)[:, None] % 5
    tokens = rng.integers(3, V, (ROWS, P))
    mask = np.concatenate([np.zeros((ROWS, pads), bool), mask], axis=1)
    tokens = np.concatenate([rng.integers(0, V, (ROWS, pads)), tokens], axis=1)
    return Prompts(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask), jnp.arange(100, 100 + ROWS, dtype=jnp.uint32))


def slotted(slots):
    return dataclasses.replace(SAMPLING, slots=slots)


@functools.cache
def compiled(answers=2, sampling=SAMPLING, slots=0):
    """`generate`, compiled once for any pad."""
    run = functools.partial(generate, MODEL, sampling=dataclasses.replace(sampling, slots=slots), answers=answers)
    jitted = jax.jit(lambda params, prompts, key, pad_id: run(params, prompts, key, eos_id=EOS, pad_id=pad_id))
    return lambda params, prompts, key, pad_id=PAD: jitted(params, prompts, key, pad_id)


@pytest.fixture(scope="module")
def rolled(params):
    """Two answers to each of eight prompts."""
    return jax.device_get(compiled()(params, make_prompts(), KEY))


def rows(rollout, keep):
    """The response side of some rows, by name."""
    return {
        name: np.asarray(x)[keep]
        for name, x in (
            ("responses", rollout.responses),
            ("mask", rollout.response_mask),
            ("finished", rollout.finished),
        )
    }


def assert_same_answers(a, b):
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_layout(rolled):
    prompts = make_prompts()
    assert rolled.tokens.shape == (2 * ROWS, P + T)
    np.testing.assert_array_equal(rolled.tokens[:, :P], np.repeat(prompts.tokens, 2, axis=0))
    np.testing.assert_array_equal(rolled.prompt_mask, np.repeat(prompts.mask, 2, axis=0))
    assert (rolled.responses[0::2] != rolled.responses[1::2]).any(axis=1).all(), "answers to a prompt differ"


def test_the_mask_ends_with_the_stop_token(rolled):
    """response_mask = t <= first stop, whatever comes behind it; `finished` says whether there is one."""
    stops = rolled.responses == EOS
    first = np.where(stops.any(-1), stops.argmax(-1), T)
    np.testing.assert_array_equal(rolled.response_mask, np.arange(T) <= first[:, None])
    np.testing.assert_array_equal(rolled.finished, stops.any(-1))
    assert rolled.finished.any()
    assert not rolled.finished.all()
    assert (rolled.responses[~rolled.response_mask] == PAD).all()
    assert (rolled.logprobs[~rolled.response_mask] == 0).all()
    at_stop = rolled.logprobs[np.flatnonzero(rolled.finished), first[rolled.finished]]
    assert (at_stop < -1e-3).all(), "the stop token keeps its log-prob"


def test_pad_that_is_the_stop_token(params, rolled):
    """The same answers and masks as with another pad token."""
    same = jax.device_get(compiled()(params, make_prompts(), KEY, pad_id=EOS))
    np.testing.assert_array_equal(same.response_mask, rolled.response_mask)
    np.testing.assert_array_equal(same.finished, rolled.finished)
    np.testing.assert_array_equal(same.logprobs, rolled.logprobs)
    np.testing.assert_array_equal(same.responses, np.where(rolled.response_mask, rolled.responses, EOS))


@pytest.fixture(scope="module")
def scored():
    """Log-probs of a rollout's answers by the trainer's forward pass."""
    return jax.jit(functools.partial(policy_logprobs, POLICY))


def test_the_sampler_and_the_trainer_agree_on_every_logprob(params, rolled, scored):
    logprobs = np.asarray(scored(params, rolled))
    np.testing.assert_allclose(rolled.logprobs, logprobs, atol=1e-5)
    assert logprobs[rolled.response_mask].std() > 0.1
    shared = jax.jit(functools.partial(policy_logprobs, POLICY, answers=2))(params, rolled)
    np.testing.assert_allclose(shared, logprobs, atol=1e-5)


def test_answers_depend_on_prompt_and_index_alone(params, rolled, scored):
    """Another order of the prompts, other neighbours, seven more columns of padding, another number of answers: answer
    i to prompt uid is the same, and so is its log-prob."""
    order = np.array([5, 2, 7, 2])
    prompts = jax.tree.map(lambda x: x[order], make_prompts(pads=7))
    few = jax.device_get(compiled(answers=3)(params, prompts, KEY))
    np.testing.assert_allclose(few.logprobs, scored(params, few), atol=1e-5)
    for place, prompt in enumerate(order):
        here, there = [3 * place, 3 * place + 1], [2 * prompt, 2 * prompt + 1]
        assert_same_answers(rows(few, here), rows(rolled, there))
        np.testing.assert_allclose(few.logprobs[here], rolled.logprobs[there], atol=1e-5)


def test_another_uid_or_key_gives_other_answers(params, rolled):
    prompts = make_prompts()
    for other, key in ((prompts.replace(uid=prompts.uid + 1), KEY), (prompts, jax.random.key(8))):
        assert (np.asarray(compiled()(params, other, key).responses) != rolled.responses).any(axis=1).mean() > 0.8


def test_the_number_of_devices_changes_no_answer(params, rolled):
    prompts = make_prompts()
    batch = SimpleNamespace(
        tokens=np.asarray(prompts.tokens), mask=np.asarray(prompts.mask), uid=np.asarray(prompts.uid)
    )
    generator = make_generator(PmapRunner(), MODEL, TOKENIZER, SAMPLING, answers=2)
    spread = jax.device_get(generator((params, KEY), to_prompts(batch)))
    assert_same_answers(rows(spread, slice(None)), rows(rolled, slice(None)))
    np.testing.assert_allclose(spread.logprobs, rolled.logprobs, atol=1e-5)


def test_caches_that_grow_change_no_answer(params, rolled, monkeypatch):
    """One program with a loop a bucket, each over caches of the bucket's length."""
    monkeypatch.setattr(decoding, "FIRST_BUCKET", 2)
    assert decoding.length_buckets(T) == [2, 4, 8]
    run = functools.partial(generate, MODEL, sampling=SAMPLING, answers=2, eos_id=EOS, pad_id=PAD)
    program = jax.jit(lambda params, prompts, key: run(params, prompts, key))
    assert_same_answers(
        rows(jax.device_get(program(params, make_prompts(), KEY)), slice(None)), rows(rolled, slice(None))
    )
    loops = program.lower(params, make_prompts(), KEY).as_text().count("stablehlo.while")
    plain = jax.jit(lambda params, prompts, key: run(params, prompts, key))
    monkeypatch.undo()
    assert loops == plain.lower(params, make_prompts(), KEY).as_text().count("stablehlo.while") + 2


def test_length_buckets():
    assert [decoding.length_buckets(n) for n in (1, 128, 129, 300, 512)] == [
        [1],
        [128],
        [128, 129],
        [128, 150, 300],
        [128, 256, 512],
    ]


def test_bfloat16_reports_its_mismatch(params):
    """Sampler and trainer round differently: the greatest gap and the effective sample size say by how much."""
    model = CausalLM(dataclasses.replace(MODEL.config, compute_dtype="bfloat16"))
    policy = TextPolicy(model, SAMPLING, EOS, PAD)
    config = PPOConfig(advantage=GroupNormalised(), answers_per_prompt=2, kl_in="loss", num_epochs=1)
    algorithm = config.build(policy, None, steps=1)

    @jax.jit
    def step(params, prompts, key):
        frozen = Frozen(reference=params)
        rollout = policy.sample(params, frozen, prompts, key, algorithm.draws)
        ones = jnp.ones(2 * ROWS)
        rewards = RewardBatch(score=ones, valid=ones > 0, token_rewards=jnp.zeros((2 * ROWS, T)))
        state = algorithm.init({"policy": params}, np.uint32(0))
        batch = algorithm.prepare(state, frozen, StepData(prompts), rollout, rewards)
        return batch, algorithm.step(state, Frozen(), batch)[1]

    batch, metrics = jax.device_get(step(params, make_prompts(), KEY))
    gap = (batch.fields.logprobs - batch.fields.sampler_logprobs)[batch.mask].astype(np.float64)
    weights = np.exp(gap)
    size = weights.sum() ** 2 / (weights**2).sum() / len(weights)
    # the update's own forward pass rounds in a third way
    np.testing.assert_allclose(metrics["first/sampler_gap_max"], np.abs(gap).max(), rtol=0.3)
    np.testing.assert_allclose(1 - metrics["first/effective_sample_size"], 1 - size, rtol=0.3)
    assert 1e-4 < np.abs(gap).max() < 0.2
    assert 0.99 < size < 1 - 1e-6


@pytest.mark.parametrize("slots", [1, 5])
def test_slots_change_no_answer(params, rolled, slots):
    """Sixteen answers, one or five at a time: each slot works for several answers of unequal lengths, one after another."""
    got = jax.device_get(compiled(slots=slots)(params, make_prompts(), KEY))
    assert_same_answers(rows(got, slice(None)), rows(rolled, slice(None)))
    np.testing.assert_array_equal(got.tokens, rolled.tokens)
    np.testing.assert_allclose(got.logprobs, rolled.logprobs, atol=1e-5)


@pytest.mark.parametrize("slots", [0, 5])
def test_decoding_as_on_a_tpu_changes_no_answer(params, rolled, monkeypatch, slots):
    """As on a TPU, whose 128 lanes both key-value heads share and whose kernel, interpreted here, attends to them."""
    monkeypatch.setattr(attention_cached, "lanes", lambda: 128)
    assert MODEL.start_cache(3, 5)[0][0].shape == (3, 1, 5, 2 * MODEL.config.head_dim)
    run = functools.partial(generate, MODEL, sampling=slotted(slots), answers=2, eos_id=EOS, pad_id=PAD)
    got = jax.device_get(jax.jit(run)(params, make_prompts(), KEY))
    np.testing.assert_array_equal(got.tokens, rolled.tokens)
    np.testing.assert_allclose(got.logprobs, rolled.logprobs, atol=1e-5)


@pytest.mark.parametrize("runner", [PmapRunner, lambda: ShardRunner(make_mesh(2, 2, 2))], ids=["pmap", "mesh"])
def test_slots_on_many_devices_change_no_answer(params, rolled, runner):
    run = functools.partial(
        generate,
        MODEL,
        key=KEY,
        sampling=slotted(1 if runner is PmapRunner else 5),
        answers=2,
        eos_id=EOS,
        pad_id=PAD,
    )
    spread = runner().map(lambda params, prompts, *, axis_name: run(params, prompts))(params, make_prompts())
    assert_same_answers(rows(spread, slice(None)), rows(rolled, slice(None)))
    np.testing.assert_allclose(spread.logprobs, rolled.logprobs, atol=1e-5)


@pytest.mark.parametrize("slots", [0, 3])
def test_the_decoding_loop_copies_no_cache_and_gathers_no_weights(slots):
    """In the compiled program for a mesh 2x2x2, of which each group of two tensor devices has 2 prompts, 4 answers."""
    mesh = make_mesh(2, 2, 2)
    # Of two key-value heads a device: with one, XLA on CPUs drops the axis and updates a copy of the cache for that.
    model = CausalLM(dataclasses.replace(MODEL.config, num_kv_heads=4))
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    params = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(place, params, state_shardings(params, mesh))
    prompts = jax.tree.map(lambda x: place(x, NamedSharding(mesh, BATCH)), make_prompts())
    run = functools.partial(generate, model, sampling=slotted(slots), answers=2, eos_id=EOS, pad_id=PAD)
    with jax.set_mesh(mesh):
        program = jax.jit(run).lower(params, prompts, KEY).compile().as_text()
    computations = {c.split()[0]: c for c in re.split(r"\n(?=%|ENTRY )", program)}
    steps = [computations[name] for name in re.findall(r"body=(%[\w.-]+)", program)]
    steps = [step for step in steps if "dynamic-update-slice" in step and "dot" in step]
    assert len(steps) == 1, "one loop decodes"
    rows, columns = (slots, T) if slots else (4, T - 1)
    cache = f"f32[{rows},2,{columns},{model.config.head_dim}]"
    assert steps[0].count(cache) >= 4, "keys and values of two layers"
    copied = re.findall(rf"= {re.escape(cache)}\S* copy\(", steps[0])
    gathered = re.findall(r"= (\S+) all-gather(?:-start)?\(", steps[0])
    assert not copied
    # Only the logits of this group's rows: the vocabulary is split over the tensor devices.
    assert all(x.startswith((f"f32[{rows},{V}]", f"f32[{rows},1,{V}]")) for x in gathered), gathered


def counted_columns(monkeypatch):
    """The list to which every decoding step of a program compiled from now on adds its column."""
    decoded, original = [], CausalLM.decode_step

    def counted(*args):
        jax.debug.callback(lambda column: decoded.append(int(column)), args[-2])
        return original(*args)

    monkeypatch.setattr(CausalLM, "decode_step", counted)
    return decoded


def test_a_free_slot_is_filled_at_once(params, rolled, monkeypatch):
    """Five slots decode no longer than it takes to share the tokens out, and a last answer that began late."""
    decoded = counted_columns(monkeypatch)
    run = functools.partial(generate, MODEL, sampling=slotted(5), answers=2, eos_id=EOS, pad_id=PAD)
    jax.block_until_ready(jax.jit(run)(params, make_prompts(), KEY))
    jax.effects_barrier()
    tokens = int(rolled.response_mask.sum())
    assert tokens / 5 <= len(decoded) <= tokens / 5 + T
    assert len(decoded) < 4 * T, "less than four batches of five or fewer, each as long as its longest"


def test_prompts_of_one_token(params):
    """A beginning-of-text token alone, as for text without a prompt."""
    one = Prompts(jnp.full((ROWS, 1), 4), jnp.ones((ROWS, 1), bool), jnp.arange(ROWS, dtype=jnp.uint32))
    together, in_slots = (jax.device_get(compiled(slots=slots)(params, one, KEY)) for slots in (0, 5))
    assert_same_answers(rows(in_slots, slice(None)), rows(together, slice(None)))
    assert len({tuple(row) for row in together.responses.tolist()}) > ROWS


def test_greedy_equals_a_loop_without_a_cache(params):
    prompts = make_prompts()
    got = jax.jit(functools.partial(generate, MODEL, sampling=GREEDY, eos_id=None, pad_id=PAD))(params, prompts, KEY)
    forward = jax.jit(MODEL)
    tokens = np.concatenate([prompts.tokens, np.zeros((ROWS, T), np.int32)], axis=1)
    mask = np.concatenate([prompts.mask, np.ones((ROWS, T), bool)], axis=1)
    logprobs = np.zeros((ROWS, T))
    for t in range(T):
        logits = np.asarray(forward(params, tokens, mask))[:, P + t - 1]
        tokens[:, P + t] = logits.argmax(-1)
        logprobs[:, t] = np.asarray(jax.nn.log_softmax(logits))[np.arange(ROWS), tokens[:, P + t]]
    np.testing.assert_array_equal(got.tokens, tokens)
    np.testing.assert_allclose(got.logprobs, logprobs, atol=1e-5)
    assert got.response_mask.all(), "without a stop token an answer runs to the limit"
    assert not got.finished.any()


def test_decoding_stops_when_every_answer_has(params, monkeypatch):
    """With the greedy first token as the stop nothing is decoded; with a stop that never comes all columns are."""
    decoded = counted_columns(monkeypatch)
    one = jax.tree.map(lambda x: x[:1], make_prompts())
    run = jax.jit(lambda eos: generate(MODEL, params, one, KEY, sampling=GREEDY, eos_id=eos, pad_id=PAD))
    free = run(-1)
    jax.effects_barrier()
    assert sorted(decoded) == list(range(T - 1))
    decoded.clear()
    stopped = run(free.responses[0, 0])
    jax.effects_barrier()
    assert decoded == []
    np.testing.assert_array_equal(stopped.response_mask, [[True] + [False] * (T - 1)])
    assert stopped.finished.all()


def test_a_single_new_token(params, scored):
    got = compiled(sampling=SamplingConfig(max_new_tokens=1, temperature=0.8))(params, make_prompts(), KEY)
    assert got.tokens.shape == (2 * ROWS, P + 1)
    assert got.response_mask.all()
    np.testing.assert_array_equal(got.finished, got.responses[:, 0] == EOS)
    np.testing.assert_allclose(got.logprobs, scored(params, got), atol=1e-5)


def test_answer_texts_end_before_the_stop_token(rolled):
    texts = answer_texts(rolled, TOKENIZER)
    for text, tokens, mask, finished in zip(texts, rolled.responses, rolled.response_mask, rolled.finished):
        kept = tokens[mask][:-1] if finished else tokens[mask]
        assert text == TOKENIZER.decode(kept.tolist())


# ---- The policy


def test_a_policy_draws_what_its_engine_does(params, rolled):
    got = jax.jit(lambda p: POLICY.sample(p, Frozen(), make_prompts(), KEY, (Draw(2),)))(params)
    assert_same_answers(rows(got, slice(None)), rows(rolled, slice(None)))
    np.testing.assert_array_equal(got.tokens, rolled.tokens)


def test_several_draws_are_ordered_prompt_by_prompt(params, rolled):
    """Of each prompt: the policy's two answers as alone, the reference's greedy one, the policy's fourth of four."""
    reference = random_params(MODEL, seed=5)
    draws = (Draw(2), Draw(1, by="reference", greedy=True), Draw(1))
    got = jax.jit(lambda p, r: POLICY.sample(p, Frozen(reference=r), make_prompts(), KEY, draws))(params, reference)
    assert got.tokens.shape == (4 * ROWS, P + T)
    place = np.arange(4 * ROWS) % 4
    assert_same_answers(rows(got, place < 2), rows(rolled, slice(None)))
    greedy = jax.jit(functools.partial(generate, MODEL, sampling=GREEDY, eos_id=EOS, pad_id=PAD))
    assert_same_answers(rows(got, place == 2), rows(greedy(reference, make_prompts(), KEY), slice(None)))
    four = compiled(answers=4)(params, make_prompts(), KEY)
    assert_same_answers(rows(got, place == 3), rows(four, place == 3))
    np.testing.assert_array_equal(got.prompt_mask, np.repeat(make_prompts().mask, 4, axis=0))


def test_the_checks_of_a_rollout(rolled):
    assert POLICY.checks(rolled) == {"eos_is_kept_in_the_mask": True}
    cut = rolled.replace(response_mask=rolled.response_mask & (rolled.responses != EOS))
    assert POLICY.checks(cut) == {"eos_is_kept_in_the_mask": False}
    empty = POLICY.empty_rollout(2 * ROWS, P)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), empty) == jax.tree.map(lambda x: (x.shape, x.dtype), rolled)


def test_a_policy_that_does_not_fit_is_refused():
    POLICY.check(P, TOKENIZER)
    fit = dataclasses.replace
    for policy, length, named in (
        (POLICY, 25, r"25\) \+ sampling.max_new_tokens \(8\) = 33 is more than the policy's context of 32"),
        (fit(POLICY, sampling=GREEDY), P, "sampling.temperature is 0"),
        (fit(POLICY, eos_id=None), P, "stops at token None"),
    ):
        with pytest.raises(UserError, match=named):
            policy.check(length, TOKENIZER)
    with pytest.raises(UserError, match=r"sampling\.slots must be >= 0"):
        slotted(-1)
