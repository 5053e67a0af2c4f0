"""PPO: hand numbers, float64 NumPy, exact gradients by enumeration, the promises of the step, and learning."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from rlaif_jax.algorithms import ppo
from rlaif_jax.algorithms.optimizer import OptimizerConfig
from rlaif_jax.algorithms.ppo import (
    Agent,
    PPOConfig,
    adapt_kl,
    final_score,
    gradients,
    importance_weights,
    kl_estimates,
    minibatch_loss,
    policy_loss,
    ppo_step,
    prepare,
    side_by_side,
    value_loss,
)
from rlaif_jax.config import UserError
from rlaif_jax.models import CausalLM, ScalarModel, ValueHead
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.policies.text import generate
from rlaif_jax.types import Experience, Prompts, RewardBatch, Rollout

pytestmark = pytest.mark.slow  # as a whole: many programs to compile

NAN = float("nan")
V, P, T, B, TEMPERATURE = 10, 4, 5, 8, 0.7
DECODER = small_decoder(V, num_layers=1, width=16, num_heads=2, context_length=16)
POLICY, CRITIC = CausalLM(DECODER), ScalarModel(DECODER, "normal")
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, schedule="constant")
GAE = PPOConfig(
    num_epochs=2,
    num_minibatches=2,
    kl_coef=0.1,
    value_coef=0.3,
    entropy_coef=0.01,
    gamma=0.95,
    policy_optimizer=OPTIMIZER,
    value_optimizer=OPTIMIZER,
)
GROUP = PPOConfig(advantage="group", kl_in="loss", kl_coef=0.1, entropy_coef=0.5, policy_optimizer=OPTIMIZER)


# ---- Formulas, by hand


def test_policy_loss_hand_numbers():
    log_ratio = jnp.log(jnp.array([1.0, 1.5, 1.5, 0.5, 0.5, 1.1]))
    advantages = jnp.array([2.0, 2.0, -2.0, 2.0, -2.0, -1.0])
    # the clip bites only where it lowers the objective: a good action made likelier, a bad one made rarer
    np.testing.assert_allclose(policy_loss(log_ratio, advantages, 0.2), [-2, -2.4, 3, -1, 1.6, 1.1], rtol=1e-6)
    slope = jax.vmap(jax.grad(lambda r, a: policy_loss(r, a, 0.2)))(log_ratio, advantages)
    np.testing.assert_allclose(slope, [-2, 0, 3, -1, 0, 1.1], rtol=1e-6)


def test_value_loss_hand_numbers():
    values = jnp.array([1.0, 2.0, 0.0, 0.05])
    old, returns = jnp.zeros(4), jnp.array([0.0, 3.0, 1.0, 1.0])
    # clipped to +-0.2: 0.2, 0.2, 0, 0.05; the larger of the two errors counts
    np.testing.assert_allclose(
        value_loss(values, old, returns, 0.2), [0.5, 0.5 * 2.8**2, 0.5, 0.5 * 0.95**2], rtol=1e-6
    )


def test_kl_estimates_hand_numbers():
    k1, k2, k3 = kl_estimates(jnp.array([0.0, 0.5, -1.0, 30.0, -30.0]))
    np.testing.assert_allclose(k1, [0, 0.5, -1, 20, -20])
    np.testing.assert_allclose(k2, [0, 0.125, 0.5, 200, 200])
    np.testing.assert_allclose(
        k3, np.exp([0, -0.5, 1, -20, 20]) - 1 + np.array([0, 0.5, -1, 20, -20]), rtol=1e-6, atol=1e-7
    )
    assert (k3 >= 0).all()


def test_kl_estimates_are_unbiased_as_said():
    p, q = np.array([0.2, 0.5, 0.3]), np.array([0.4, 0.4, 0.2])
    exact = (p * np.log(p / q)).sum()
    k1, k2, k3 = (float((p * np.asarray(k)).sum()) for k in kl_estimates(jnp.log(p / q)))
    np.testing.assert_allclose([k1, k3], exact, rtol=1e-5)
    assert abs(k2 - exact) > 1e-3


def test_importance_weights():
    weights = importance_weights(jnp.log(jnp.array([0.5, 1.0, 1.9, 8.0])), 2.0)
    np.testing.assert_allclose(weights, [0.5, 1, 1.9, 2], rtol=1e-6)
    assert jax.grad(lambda x: importance_weights(x, 2.0))(0.3) == 0


def test_adapt_kl():
    config = dataclasses.replace(GAE, kl_target=4.0, kl_horizon=1000.0)
    for kl, factor in ((4.0, 1), (40.0, 1 + 0.2 * 64 / 1000), (0.0, 1 - 0.2 * 64 / 1000), (4.4, 1 + 0.1 * 64 / 1000)):
        np.testing.assert_allclose(adapt_kl(config, jnp.float32(0.5), jnp.float32(kl), 64), 0.5 * factor, rtol=1e-6)
    assert adapt_kl(GAE, jnp.float32(0.5), jnp.float32(40.0), 64) == 0.5


def test_final_score():
    score, finished = jnp.array([0.7, 0.7, -0.3]), jnp.array([True, False, False])
    for rule, expected in (("score", [0.7, 0.7, -0.3]), ("penalty", [0.7, -0.8, -1.8]), ("constant", [0.7, 1.5, 1.5])):
        config = dataclasses.replace(GAE, missing_eos=rule, missing_eos_value=1.5)
        np.testing.assert_allclose(final_score(config, score, finished), expected, rtol=1e-6)


def test_an_agent_needs_what_its_advantage_needs():
    with pytest.raises(UserError, match="needs a critic"):
        Agent(POLICY, None, GAE)
    with pytest.raises(UserError, match="takes none"):
        Agent(POLICY, CRITIC, GROUP)


# ---- An update, against NumPy in float64


def loss_of(agent, params, batch, kl_coef, count=None):
    """(loss, metrics) of padded sequences as one share."""
    count = batch.mask.sum(dtype=jnp.float32) if count is None else count
    return minibatch_loss(agent, params, *side_by_side(batch), batch, kl_coef, count)


@dataclasses.dataclass
class Case:
    """An agent, its state, a reference, a rollout with rewards, and compiled functions of the agent."""

    agent: Agent
    state: object
    reference: object
    rollout: Rollout
    rewards: RewardBatch

    def __post_init__(self):
        self.prepare = jax.jit(functools.partial(prepare, self.agent))
        self.step = jax.jit(functools.partial(ppo_step, self.agent))
        self.loss = jax.jit(functools.partial(loss_of, self.agent))

    @functools.cached_property
    def experience(self) -> Experience:
        return jax.device_get(self.prepare(self.state, self.reference, self.rollout, self.rewards))


def random_params(model, seed=0, scale=0.3):
    """Parameters drawn by NumPy, none zero or one; an initialiser would have to be compiled first."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return (centre + scale * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, jax.eval_shape(model.init, jax.random.key(0)))


def make_case(config: PPOConfig) -> Case:
    critic = CRITIC if config.advantage == "gae" else None
    agent = Agent(POLICY, critic, config, temperature=TEMPERATURE, answers=2)
    state = agent.init(random_params(POLICY, 0), random_params(CRITIC, 1) if agent.critic else None, seed=3)
    rng = np.random.default_rng(0)
    lengths = np.array([5, 1, 3, 5, 2, 4, 1, 5])
    mask = np.arange(T) < lengths[:, None]
    tokens = rng.integers(0, V, (B, P + T)).astype(np.int32)
    tokens[1::2, :P] = tokens[::2, :P]
    prompt_mask = np.arange(P) >= np.array([0, 0, 2, 2, 1, 1, 3, 3])[:, None]
    rollout = Rollout(
        tokens=tokens,
        prompt_mask=prompt_mask,
        response_mask=mask,
        logprobs=np.zeros((B, T), np.float32),
        finished=lengths < T,
    )
    full = np.concatenate([prompt_mask, mask], axis=1)
    rollout = rollout.replace(
        logprobs=np.where(mask, numpy_logprobs(state.params["policy"], tokens, full)[0], 0).astype(np.float32)
    )
    rewards = RewardBatch(
        score=np.float32([1, -0.5, 0.7, 0.2, NAN, 2, -1, 0.3]),
        valid=np.arange(B) != 4,
        token_rewards=(0.1 * rng.normal(size=(B, T))).astype(np.float32),
    )
    return Case(agent, state, random_params(POLICY, 2), rollout, rewards)


forward = jax.jit(lambda params, tokens, mask: POLICY(params, tokens, mask))


def numpy_logprobs(params, tokens, mask):
    """(logprobs, entropies) [B, T] at the temperature, float64, from the logits of columns P - 1 .. S - 2."""
    logits = np.asarray(forward(params, tokens, mask), np.float64)[:, P - 1 : -1] / TEMPERATURE
    logprobs = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    return np.take_along_axis(logprobs, tokens[:, P:, None], -1)[..., 0], -(np.exp(logprobs) * logprobs).sum(-1)


@pytest.fixture(scope="module")
def gae_case():
    return make_case(GAE)


@pytest.fixture(scope="module")
def group_case():
    return make_case(GROUP)


@pytest.fixture(scope="module")
def stepped(gae_case):
    return jax.device_get(gae_case.step(gae_case.state, gae_case.experience))


def full_mask(experience):
    return np.concatenate([experience.prompt_mask, experience.response_mask], axis=1)


def test_prepare_scores_at_the_sampling_temperature(gae_case):
    """Behaviour, reference and values stand where each token is predicted; all at temperature 0.7."""
    e, case = gae_case.experience, gae_case
    mask = e.response_mask
    for got, params in ((e.logprobs, case.state.params["policy"]), (e.ref_logprobs, case.reference)):
        expected = numpy_logprobs(params, e.tokens, full_mask(e))[0]
        np.testing.assert_allclose(got[mask], expected[mask], atol=2e-5)
        assert not got[~mask].any()
    values = jax.jit(CRITIC)(case.state.params["value"], e.tokens, full_mask(e))[:, P - 1 : -1]
    np.testing.assert_allclose(e.values[e.mask], values[e.mask], atol=1e-5)
    np.testing.assert_array_equal(e.mask, mask & (np.arange(B) != 4)[:, None])


def numpy_gae(rewards, values, mask, gamma, lam):
    out = np.zeros(rewards.shape)
    for row in range(B):
        advantage, value = 0.0, 0.0
        for t in np.flatnonzero(mask[row])[::-1]:
            advantage = rewards[row, t] + gamma * value - values[row, t] + gamma * lam * advantage
            value, out[row, t] = values[row, t], advantage
    return out


def test_prepare_puts_kl_and_score_where_they_belong(gae_case):
    e, case = gae_case.experience, gae_case
    rewards = case.rewards.token_rewards - 0.1 * (e.logprobs.astype(np.float64) - e.ref_logprobs)
    for row, length in enumerate(e.mask.sum(-1)):
        if length:
            rewards[row, length - 1] += case.rewards.score[row]
    advantages = numpy_gae(rewards, e.values.astype(np.float64), e.mask, 0.95, 0.95)
    np.testing.assert_allclose(e.advantages, advantages, atol=1e-5)
    np.testing.assert_allclose(e.returns, np.where(e.mask, advantages + e.values, 0), atol=1e-5)
    assert not e.advantages[4].any(), "a sequence without a judgement teaches nothing"


def test_kl_is_in_the_reward_or_in_the_loss_never_both(gae_case, group_case):
    for case, in_reward in ((gae_case, True), (group_case, False)):
        more = case.prepare(case.state.replace(kl_coef=jnp.float32(5.0)), case.reference, case.rollout, case.rewards)
        params, e = case.state.params, case.experience
        # somewhere away from the behaviour policy and the reference
        low, high = (float(case.loss(params, e, jnp.float32(kl))[0]) for kl in (0.0, 2.0))
        assert np.allclose(more.advantages, e.advantages) != in_reward
        assert (low == high) == in_reward
    kl = kl_estimates(jnp.asarray(e.logprobs - e.ref_logprobs))[2][e.mask].mean()
    np.testing.assert_allclose(high - low, 2 * kl, rtol=1e-4)


def test_gae_with_kl_in_the_loss_and_the_samplers_logprobs(gae_case):
    """The reward is left alone, and the ratio will be measured against what the sampler reported."""
    agent = Agent(POLICY, CRITIC, dataclasses.replace(GAE, kl_in="loss", behaviour="sampler"), temperature=TEMPERATURE)
    other = np.where(gae_case.rollout.response_mask, gae_case.rollout.logprobs - np.float32(0.1), 0)
    off = gae_case.rollout.replace(logprobs=other)
    e = jax.jit(functools.partial(prepare, agent))(gae_case.state, gae_case.reference, off, gae_case.rewards)
    np.testing.assert_array_equal(e.logprobs, other)
    rewards = gae_case.rewards.token_rewards.astype(np.float64)
    for row, length in enumerate(e.mask.sum(-1)):
        if length:
            rewards[row, length - 1] += gae_case.rewards.score[row]
    np.testing.assert_allclose(e.values, gae_case.experience.values, atol=1e-6)
    np.testing.assert_allclose(e.advantages, numpy_gae(rewards, np.asarray(e.values), e.mask, 0.95, 0.95), atol=1e-5)


def numpy_loss(e, logprobs, entropies, values, config, rows):
    """The loss and metrics written out: one sum over all tokens of `rows`, one count."""
    m = e.mask[rows]
    new, old, adv = logprobs[rows][m], e.logprobs[rows][m].astype(np.float64), e.advantages[rows][m].astype(np.float64)
    ratio = np.exp(new - old)
    out = {
        "policy_loss": np.maximum(-adv * ratio, -adv * ratio.clip(0.8, 1.2)).mean(),
        "approx_kl": (ratio - 1 - (new - old)).mean(),
        "clip_fraction": (np.abs(ratio - 1) > 0.2).mean(),
        "ratio_error": np.abs(ratio - 1).mean(),
        "sampler_gap": np.abs(new - e.sampler_logprobs[rows][m]).mean(),
        "sampler_gap_max": np.abs(new - e.sampler_logprobs[rows][m]).max(),
        "sampler_weight": np.exp(new - e.sampler_logprobs[rows][m]).mean(),
        "sampler_weight_squared": np.exp(2 * (new - e.sampler_logprobs[rows][m])).mean(),
        "entropy_exact": entropies[rows][m].mean(),
    }
    loss = out["policy_loss"] - config.entropy_coef * out["entropy_exact"]
    if values is not None:
        v, before, r = values[rows][m], e.values[rows][m].astype(np.float64), e.returns[rows][m].astype(np.float64)
        out["value_loss"] = 0.5 * np.maximum((v - r) ** 2, (v.clip(before - 0.2, before + 0.2) - r) ** 2).mean()
        loss += config.value_coef * out["value_loss"]
    if config.kl_in == "loss":
        d = new - e.ref_logprobs[rows][m]
        out["kl_loss"] = (np.exp(-d) - 1 + d).mean()
        loss += 0.1 * out["kl_loss"]
    return loss, out


@pytest.fixture(scope="module")
def moved(gae_case):
    """Parameters some way from the behaviour policy's: ratios on both sides of the clip."""
    shift = jax.tree.map(lambda a, b: a + 0.05 * (b - a), gae_case.state.params["policy"], gae_case.reference)
    return gae_case.state.params | {"policy": shift}


@pytest.mark.parametrize("name", ["gae", "group"])
def test_the_loss_is_a_global_sum_over_a_global_count(request, moved, name):
    case = request.getfixturevalue(f"{name}_case")
    e = case.experience
    params = {part: moved[part] for part in case.state.params}
    logprobs, entropies = numpy_logprobs(params["policy"], e.tokens, full_mask(e))
    values = None
    if case.agent.critic:
        values = np.asarray(jax.jit(CRITIC)(params["value"], e.tokens, full_mask(e)), np.float64)[:, P - 1 : -1]
    loss, metrics = case.loss(params, e, jnp.float32(0.1))
    expected, parts = numpy_loss(e, logprobs, entropies, values, case.agent.config, slice(None))
    assert 0.1 < parts["clip_fraction"] < 0.9
    assert set(metrics) == set(parts)
    for key, value in parts.items():
        np.testing.assert_allclose(metrics[key], value, rtol=2e-4, atol=1e-6, err_msg=key)
    np.testing.assert_allclose(loss, expected, rtol=2e-4)
    # ... and not a mean of the sequences' or the halves' means, which differ here
    halves = [numpy_loss(e, logprobs, entropies, values, case.agent.config, np.arange(B) % 2 == i)[0] for i in range(2)]
    assert abs(np.mean(halves) - expected) > 1e-3 * abs(expected)


def test_the_devices_shares_add_up(gae_case, moved):
    """Two halves of unequal lengths: the shares' sums are the loss and the metrics of the whole."""
    e = gae_case.experience
    whole, metrics = gae_case.loss(moved, e, jnp.float32(0.1))
    halves = jax.tree.map(lambda x: x.reshape(2, B // 2, *x.shape[1:]), e)
    assert len(set(halves.mask.sum((1, 2)))) == 2
    shares, spread = jax.jit(
        jax.vmap(lambda b: loss_of(gae_case.agent, moved, b, jnp.float32(0.1), e.mask.sum(dtype=np.float32)))
    )(halves)
    np.testing.assert_allclose(shares.sum(), whole, rtol=1e-5)
    for key, value in metrics.items():
        together = spread[key].max() if key.endswith("_max") else spread[key].sum()
        np.testing.assert_allclose(together, value, rtol=1e-4, atol=1e-6, err_msg=key)


# ---- Gradients


def test_the_kl_loss_has_the_gradient_of_the_exact_kl():
    """All V one-token answers to one prompt, weighed by their probabilities: d KL(policy || reference) / d theta. The
    gradient of k3 itself is another one."""
    agent = Agent(POLICY, None, dataclasses.replace(GROUP, entropy_coef=0.0))
    params, reference = {"policy": random_params(POLICY, 0)}, random_params(POLICY, 2)
    tokens = np.concatenate([np.full((V, P), 3), np.arange(V)[:, None]], axis=1).astype(np.int32)
    ones, zeros = np.ones((V, 1), bool), np.zeros((V, 1), np.float32)

    def distribution(policy):
        return jax.nn.log_softmax(POLICY(policy, tokens[:1, :P], np.ones((1, P), bool))[0, -1])

    logprobs, ref = jax.jit(lambda a, b: (distribution(a), distribution(b)))(params["policy"], reference)
    e = Experience(
        tokens=tokens,
        prompt_mask=np.ones((V, P), bool),
        response_mask=ones,
        mask=ones,
        logprobs=logprobs[:, None],
        sampler_logprobs=logprobs[:, None],
        ref_logprobs=ref[:, None],
        values=zeros,
        advantages=zeros,
        returns=zeros,
    )
    flat, unravel = ravel_pytree(params)
    rows = jax.tree.map(lambda x: jnp.asarray(x)[:, None], e)  # V minibatches of one row
    weights = jnp.exp(logprobs)  # the expectations are over the fixed sampling distribution

    def ours(x):
        return weights @ jax.vmap(lambda row: loss_of(agent, unravel(x), row, jnp.float32(1.0))[0])(rows)

    def exact_kl(x):
        new = distribution(unravel(x)["policy"])
        return jnp.exp(new) @ (new - ref)

    def third(x):
        return weights @ kl_estimates(distribution(unravel(x)["policy"]) - ref)[2]

    (loss, gradient), (kl, exact), (_, k3) = jax.jit(
        lambda x: [jax.value_and_grad(f)(x) for f in (ours, exact_kl, third)]
    )(flat)
    norm = np.linalg.norm(exact)
    assert norm > 0.1
    assert np.linalg.norm(gradient - exact) < 1e-4 * norm
    assert np.linalg.norm(k3 - exact) > 0.05 * norm
    # the loss's value is k3's, whose expectation is the KL; the policy gradient's part is zero
    np.testing.assert_allclose(loss, kl, rtol=1e-4)


def test_the_entropy_bonus_raises_the_entropy(group_case):
    e = group_case.experience
    silent = jax.tree.map(np.asarray, e).replace(advantages=np.zeros_like(e.advantages))
    entropy = lambda p: float(group_case.loss(p, silent, jnp.float32(0.0))[1]["entropy_exact"])
    gradient = jax.jit(jax.grad(lambda p: loss_of(group_case.agent, p, silent, jnp.float32(0.0))[0]))(
        group_case.state.params
    )
    moved = jax.tree.map(lambda p, g: p - 0.01 * g, group_case.state.params, gradient)
    assert entropy(moved) > entropy(group_case.state.params) + 1e-4


# ---- The step


def test_the_first_minibatch_is_on_policy(stepped):
    _, metrics = stepped
    assert metrics["first/ratio_error"] < 1e-5
    assert abs(metrics["first/approx_kl"]) < 1e-6
    assert metrics["first/clip_fraction"] == 0
    assert metrics["first/sampler_gap"] < 1e-5
    assert metrics["first/sampler_gap_max"] < 1e-5
    assert metrics["first/effective_sample_size"] > 1 - 1e-6
    assert metrics["ratio_error"] > 1e-3, "later minibatches have moved away"
    assert metrics["nonfinite"] == 0


def test_metrics_of_the_batch(gae_case, stepped):
    e, (state, metrics) = gae_case.experience, stepped
    rows = e.mask.any(-1)
    d = np.where(e.mask, e.logprobs.astype(np.float64) - e.ref_logprobs, 0)
    returns, errors = e.returns[e.mask], (e.returns - e.values)[e.mask]
    expected = {
        "kl": d.sum(-1)[rows].mean(),
        "kl_k3": np.where(e.mask, np.exp(-d) - 1 + d, 0).sum(-1)[rows].mean(),
        "entropy": -e.logprobs[e.mask].mean(),
        "length": e.response_mask.sum(-1)[rows].mean(),
        "explained_variance": 1 - (errors**2).mean() / returns.var(),
        "return": returns.mean(),
        "kl_coef": 0.1,
    }
    for key, value in expected.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-4, err_msg=key)
    assert int(state.step) == 1
    for part in ("policy", "value"):
        assert ravel_pytree(state.params[part])[0] @ ravel_pytree(state.params[part])[0] > 0
        change = ravel_pytree(state.params[part])[0] - ravel_pytree(gae_case.state.params[part])[0]
        assert np.abs(change).max() > 1e-3, part


def assert_same_state(a, b):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def test_masked_slots_may_hold_anything(gae_case, stepped):
    """NaN, infinity and random tokens outside the masks change no bit of the update."""
    e = gae_case.experience
    dirty = e.replace(
        **{
            name: np.where(e.mask, getattr(e, name), junk).astype(np.float32)
            for name, junk in (
                ("logprobs", NAN),
                ("sampler_logprobs", NAN),
                ("ref_logprobs", np.inf),
                ("values", NAN),
                ("advantages", NAN),
                ("returns", -np.inf),
            )
        }
    )
    outside = ~full_mask(e)
    dirty = dirty.replace(
        tokens=np.where(outside, np.random.default_rng(5).integers(-3, 3 * V, e.tokens.shape), e.tokens)
    )
    state, metrics = jax.device_get(gae_case.step(gae_case.state, dirty))
    assert_same_state(state, stepped[0])
    for key, value in metrics.items():
        np.testing.assert_array_equal(value, stepped[1][key], err_msg=key)


def test_prepare_ignores_what_is_masked(gae_case):
    """The score of an answer without a judgement, dense rewards after the end, pads of whatever id."""
    e, case = gae_case.experience, gae_case
    rng = np.random.default_rng(6)
    tokens = np.where(full_mask(e), e.tokens, rng.integers(-3, 3 * V, e.tokens.shape)).astype(np.int32)
    rewards = case.rewards.replace(
        score=np.where(case.rewards.valid, case.rewards.score, 1e6).astype(np.float32),
        token_rewards=np.where(e.mask, case.rewards.token_rewards, NAN).astype(np.float32),
    )
    again = jax.device_get(case.prepare(case.state, case.reference, case.rollout.replace(tokens=tokens), rewards))
    assert_same_state(again.replace(tokens=e.tokens), e)


def test_a_loss_that_is_not_finite_changes_nothing(gae_case):
    e = gae_case.experience
    for name in ("advantages", "returns"):
        broken = np.array(getattr(e, name))
        broken[[0, 1, 2, 3, 5, 6, 7], 0] = np.inf
        state, metrics = jax.device_get(gae_case.step(gae_case.state, e.replace(**{name: broken})))
        assert metrics["nonfinite"] == 4, "every minibatch of both epochs is reported"
        assert_same_state((state.params, state.opt_state), (gae_case.state.params, gae_case.state.opt_state))


def test_minibatches_that_do_not_divide_are_refused(gae_case):
    agent = Agent(POLICY, CRITIC, dataclasses.replace(GAE, num_minibatches=4))
    six = jax.tree.map(lambda x: x[:6], gae_case.experience)
    with pytest.raises(UserError, match="6 sequences cannot be cut into 4 minibatches"):
        ppo_step(agent, gae_case.state, six)


@pytest.fixture
def minibatches():
    """`minibatches(case, state)`: the rows and the advantages that each minibatch of an update saw; no model runs."""

    seen = []

    def recorded(batch, rows, axis_name):
        advantages = batch[0].advantages
        jax.debug.callback(lambda r, a: seen.append((np.array(r), np.array(a))), rows, advantages, ordered=True)
        return batch

    def still(agent, params, batch, kl_coef, axis_name, answers, group):
        names = jax.eval_shape(lambda: gradients(agent, params, batch, kl_coef, axis_name))[2]
        return jax.tree.map(jnp.zeros_like, params), jnp.float32(0), {name: jnp.float32(0) for name in names}

    @functools.cache
    def compiled(agent):
        return jax.jit(lambda state, experience: ppo_step(agent, state, experience))

    def run(case, state):
        seen.clear()
        compiled(case.agent)(state, case.experience)
        jax.effects_barrier()
        return np.array([rows for rows, _ in seen]), [advantages for _, advantages in seen]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "global_rows", recorded)
        patch.setattr(ppo, "gradients", still)
        yield run


def test_every_epoch_of_every_step_has_its_own_permutation(gae_case, minibatches):
    orders = []
    for changes in ({}, {"step": jnp.int32(1)}, {"seed": jnp.uint32(4)}, {}):
        rows, _ = minibatches(gae_case, gae_case.state.replace(**changes))
        assert rows.shape == (4, B // 2)
        epochs = rows.reshape(2, B)
        for epoch in epochs:
            assert sorted(epoch) == list(range(B)), "each sequence once an epoch"
            assert (epoch[1::2] == epoch[::2] + 1).all(), "the answers to a prompt stay together"
        orders += [tuple(epoch) for epoch in epochs]
    assert len(set(orders[:6])) == 6
    assert orders[6:] == orders[:2], "the same seed and step, the same order"


def test_advantages_are_whitened_over_the_whole_batch(gae_case, group_case, minibatches):
    e = gae_case.experience
    _, (white, *_) = minibatches(gae_case, gae_case.state)
    raw = e.advantages[e.mask].astype(np.float64)
    np.testing.assert_allclose(white[e.mask], (raw - raw.mean()) / raw.std(), rtol=1e-4, atol=1e-5)
    assert not white[~e.mask].any()
    _, (group, *_) = minibatches(group_case, group_case.state)
    np.testing.assert_array_equal(group, group_case.experience.advantages)


def test_group_advantages(group_case):
    """Pairs (1, -.5), (.7, .2), (missing, 2), (-1, .3) and the sums of their dense rewards: of a pair each is one
    standard deviation from the mean; an answer without its partner says nothing."""
    e = group_case.experience
    dense = np.where(e.mask, group_case.rewards.token_rewards, 0).sum(-1, dtype=np.float64)
    scores = np.array([1, -0.5, 0.7, 0.2, 0, 2, -1, 0.3]) + dense
    half = (scores[0::2] - scores[1::2]) / 2
    expected = np.stack([half, -half], axis=1) / (np.abs(half) + 1e-4)[:, None]
    expected[2] = 0
    np.testing.assert_allclose(e.advantages, np.where(e.mask, expected.reshape(-1)[:, None], 0), rtol=1e-5)
    np.testing.assert_array_equal(e.values, 0)


def test_without_a_critic_the_samplers_logprobs_need_no_forward_pass(group_case):
    agent = dataclasses.replace(group_case.agent, config=dataclasses.replace(GROUP, behaviour="sampler"))
    shapes = jax.eval_shape(
        functools.partial(prepare, agent),
        group_case.state,
        group_case.reference,
        group_case.rollout,
        group_case.rewards,
    )
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, group_case.experience)


def test_no_logits_of_a_whole_batch_are_held_at_a_large_vocabulary():
    """64 answers of 64 tokens over 152,000 words: 2.5 GB of logits in float32, scored and updated in less than half."""
    rows, vocab = 64, 152_000
    agent = Agent(CausalLM(dataclasses.replace(DECODER, vocab_size=vocab)), None, GROUP, answers=2)
    shape = lambda *size, dtype=jnp.float32: jax.ShapeDtypeStruct(size, dtype)
    rollout = Rollout(
        tokens=shape(rows, P + 64, dtype=jnp.int32),
        prompt_mask=shape(rows, P, dtype=bool),
        response_mask=shape(rows, 64, dtype=bool),
        logprobs=shape(rows, 64),
        finished=shape(rows, dtype=bool),
    )
    rewards = RewardBatch(score=shape(rows), valid=shape(rows, dtype=bool), token_rewards=shape(rows, 64))
    policy = jax.eval_shape(agent.policy.init, jax.random.key(0))
    state = jax.eval_shape(lambda p: agent.init(p, None, 0), policy)
    score = jax.jit(functools.partial(prepare, agent))
    experience = score.eval_shape(state, policy, rollout, rewards)
    update = jax.jit(functools.partial(ppo_step, agent), donate_argnums=0)
    for program in (score.lower(state, policy, rollout, rewards), update.lower(state, experience)):
        held = program.compile().memory_analysis().temp_size_in_bytes
        assert held < rows * 64 * vocab * 4 / 2, f"{held / 1e9:.2f} GB"


# ---- Packed rows


@pytest.mark.parametrize("name", ["gae", "group"])
def test_packed_rows_give_the_same_numbers(request, moved, name):
    """Scores, gradient, loss and metrics with two rows at a time, on prompts that are shared, padded and left alone."""
    case = request.getfixturevalue(f"{name}_case")
    shared = 1 if name == "gae" else 2  # answers that stand with their prompt
    config = dataclasses.replace(case.agent.config, packed_rows=2)
    packed = dataclasses.replace(case.agent, config=config, answers=shared)
    args = (case.state, case.reference, case.rollout, case.rewards)
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(jax.jit(functools.partial(prepare, packed))(*args)),
        jax.tree.leaves(case.experience),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, atol=2e-5, err_msg=jax.tree_util.keystr(path))
    params = {part: moved[part] for part in case.state.params}
    compute = lambda agent: jax.jit(lambda p, e: gradients(agent, p, e, jnp.float32(0.1), None, agent.answers))
    (grads, loss, metrics), (want, whole, parts) = (
        compute(agent)(params, case.experience) for agent in (packed, case.agent)
    )
    got, want = ravel_pytree(grads)[0], ravel_pytree(want)[0]
    assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)
    np.testing.assert_allclose(loss, whole, rtol=1e-5)
    assert set(metrics) == set(parts)
    for key, value in parts.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-4, atol=1e-6, err_msg=key)


# ---- It learns


LEARN = PPOConfig(
    num_epochs=2,
    num_minibatches=2,
    kl_coef=0.0,
    value_coef=0.5,
    policy_optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant"),
    value_optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant"),
)


@pytest.mark.parametrize("name", ["own_trunk", "shared_trunk", "group"])
def test_it_learns_to_say_the_word_that_is_rewarded(name):
    """Reward: the share of token 5 in an answer of three tokens; chance is 1 in 10. Thirty updates."""
    config, answers = LEARN, 1
    critic = {"own_trunk": ScalarModel(DECODER), "shared_trunk": ValueHead(DECODER.width), "group": None}[name]
    if name == "group":
        config, answers = dataclasses.replace(LEARN, advantage="group", kl_in="loss", kl_coef=0.01), 4
    agent = Agent(POLICY, critic, config, answers=answers)
    policy = random_params(POLICY, scale=0.1)
    state = agent.init(policy, critic and random_params(critic, 1, scale=0.1), seed=0)
    count = 64 // answers
    prompts = Prompts(jnp.full((count, 2), 4), jnp.ones((count, 2), bool), jnp.arange(count, dtype=jnp.uint32))
    sampling = SamplingConfig(max_new_tokens=3)

    @jax.jit
    def one(state):
        key = jax.random.fold_in(jax.random.key(1), state.step)
        rollout = generate(
            POLICY, state.params["policy"], prompts, key, sampling=sampling, answers=answers, eos_id=None, pad_id=0
        )
        score = (rollout.responses == 5).mean(-1, dtype=jnp.float32)
        rewards = RewardBatch(score=score, valid=jnp.ones(64, bool), token_rewards=jnp.zeros((64, 3)))
        experience = prepare(agent, state, policy, rollout, rewards)
        state, metrics = ppo_step(agent, state, experience)
        return state, score.mean(), metrics

    scores = []
    for _ in range(30):
        state, score, metrics = one(state)
        scores.append(float(score))
        assert metrics["first/ratio_error"] < 1e-4
    assert scores[0] < 0.25
    assert np.mean(scores[-3:]) > 0.6, scores
