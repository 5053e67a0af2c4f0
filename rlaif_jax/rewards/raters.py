"""Who is reliable, and what the answer probably is: Dawid-Skene with and without pooling, majority, Crowd-BT.

N labels, I items, W workers (people, AI judges and rules alike, in one model), C classes, G kinds of worker. Every
function takes flat arrays and static sizes; weight [N] or None (= 1 each) is a number of equal labels, 0 is a missing
one. Pure: under jit, vmap, pmap and sharded; with `axis_name` each device holds a share of the labels and all get the
result of the whole. float32 inside, float64 where the weights or soft labels are. An item nobody has labelled is
`valid = False`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp
import optax

from rlaif_jax.parallel import psum
from rlaif_jax.rewards.optimise import lbfgs
from rlaif_jax.rewards.ratings import Utilities, as_float, group_sum

_SMALLEST = 1e-10  # of a count, as in crowd-kit: keeps logarithms finite


@flax.struct.dataclass
class Consensus:
    """What the labels of many workers say.

    Attributes:
        posterior: [I, C] probability of each class; where not valid, the class prior.
        valid: [I] bool, whether the item has a label.
        confusion: [W, C, C] P(worker says l | truth is k), rows k.
        class_prior: [C].
        pseudo_counts: [G, C, C] Dirichlet prior of each kind's confusion rows, in labels (0 without pooling).
        log_likelihood: [] of the labels, in nats.
        iterations: [] int32.
    """

    posterior: jax.Array
    valid: jax.Array
    confusion: jax.Array
    class_prior: jax.Array
    pseudo_counts: jax.Array
    log_likelihood: jax.Array
    iterations: jax.Array

    @property
    def accuracy(self) -> jax.Array:
        """[W] probability that a worker's label is right, over the class prior."""
        return jnp.einsum("wkk,k->w", self.confusion, self.class_prior)


class _Labels(NamedTuple):
    item: jax.Array  # [N]
    worker: jax.Array  # [N]
    label: jax.Array  # [N, C] probabilities
    weight: jax.Array  # [N]


def _labels(item: Any, worker: Any, label: Any, weight: Any, num_classes: int) -> _Labels:
    """Labels as probabilities [N, C]; one that is no class (or not finite) has weight 0."""
    label = jnp.asarray(label)
    if label.ndim == 1:
        chex.assert_type(label, int)
        present = (label >= 0) & (label < num_classes)
        dtype = jnp.float32 if weight is None else as_float(weight).dtype
        label = jax.nn.one_hot(label, num_classes, dtype=dtype)
    else:
        chex.assert_shape(label, (None, num_classes))
        label = as_float(label)
        present = jnp.isfinite(label).all(-1)
    weight = jnp.ones(label.shape[0], label.dtype) if weight is None else jnp.asarray(weight).astype(label.dtype)
    item, worker = jnp.asarray(item, jnp.int32), jnp.asarray(worker, jnp.int32)
    chex.assert_equal_shape((item, worker, weight))
    weight = jnp.where(present, weight, 0.0)
    return _Labels(item, worker, jnp.where(weight[:, None] > 0, label, 0.0), weight)


def vote_shares(
    item: Any, label: Any, weight: Any = None, *, num_items: int, num_classes: int, axis_name: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """(share of the votes of each class [I, C], valid [I]); 1/C each where not valid."""
    item = jnp.asarray(item, jnp.int32)
    labels = _labels(item, jnp.zeros_like(item), label, weight, num_classes)
    return _shares(labels, num_items, axis_name)


def _shares(labels: _Labels, num_items: int, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
    votes = group_sum(labels.weight[:, None] * labels.label, labels.item, num_items, axis_name)
    total = votes.sum(-1)
    valid = total > 0
    even = jnp.full_like(votes, 1 / votes.shape[1])
    return jnp.where(valid[:, None], votes / jnp.where(valid, total, 1.0)[:, None], even), valid


def majority_vote(
    item: Any, label: Any, weight: Any = None, *, num_items: int, num_classes: int, axis_name: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """(majority [I, C], valid [I]): 1 for the class with most votes, 1/n each for n classes that tie."""
    shares, valid = vote_shares(item, label, weight, num_items=num_items, num_classes=num_classes, axis_name=axis_name)
    top = shares >= shares.max(-1, keepdims=True) * (1 - 1e-6)
    return top / top.sum(-1, keepdims=True), valid


# ---- Dawid-Skene


def dawid_skene(
    item: Any,
    worker: Any,
    label: Any,
    weight: Any = None,
    *,
    num_items: int,
    num_workers: int,
    num_classes: int,
    max_iterations: int = 100,
    tol: float = 1e-4,
    axis_name: str | None = None,
) -> Consensus:
    """Maximum likelihood by EM from the vote shares: Dawid & Skene 1979, equations 2.3-2.5.

    item, worker [N] int; label [N] int, or [N, C] probabilities of a judge that is not sure. Stops when no posterior
    moves by `tol` or more. max_iterations: as many steps of EM at most; 0 gives the vote shares.
    """
    labels = _labels(item, worker, label, weight, num_classes)
    group = jnp.zeros(num_workers, jnp.int32)
    return _em(labels, group, 1, num_items, max_iterations, tol, axis_name, pooled=False)


def hierarchical_dawid_skene(
    item: Any,
    worker: Any,
    label: Any,
    weight: Any = None,
    *,
    num_items: int,
    num_workers: int,
    num_classes: int,
    group: Any = None,
    num_groups: int = 1,
    max_iterations: int = 200,
    tol: float = 1e-4,
    axis_name: str | None = None,
) -> Consensus:
    """Dawid-Skene in which workers of one kind resemble each other: the model to use where workers label little.

    Each row of a worker's confusion matrix has a Dirichlet prior of its kind, group [W] int (people 0, AI judges 1;
    default: all one kind), so that a worker with few labels is taken for a typical one of its kind. The priors
    themselves are learned from the labels (empirical Bayes: Minka 2000, "Estimating a Dirichlet distribution",
    equation 55, under a weak Gamma hyper-prior that expects workers to be better than chance). Compare Paun 2018,
    "Comparing Bayesian models of annotation", HierD&S. Arguments otherwise as for `dawid_skene`.
    """
    labels = _labels(item, worker, label, weight, num_classes)
    group = jnp.zeros(num_workers, jnp.int32) if group is None else jnp.asarray(group, jnp.int32)
    chex.assert_shape(group, (num_workers,))
    return _em(labels, group, num_groups, num_items, max_iterations, tol, axis_name, pooled=True)


def _em(
    labels: _Labels,
    group: jax.Array,
    num_groups: int,
    num_items: int,
    max_iterations: int,
    tol: float,
    axis_name: str | None,
    *,
    pooled: bool,
) -> Consensus:
    item, worker, label, weight = labels
    num_classes, dtype = label.shape[1], label.dtype
    shares, valid = _shares(labels, num_items, axis_name)
    # Modes of the hyper-prior: 4 labels for the right class, 1 for each wrong one.
    mode = 1 + 3 * jnp.broadcast_to(jnp.eye(num_classes, dtype=dtype), (num_groups, num_classes, num_classes))

    # As in crowd-kit, only labels that a worker has used share the mass of a class it never met.
    used = group_sum(weight[:, None] * label, worker, group.shape[0], axis_name)[:, None, :] > 0
    smallest = jnp.where(used, _SMALLEST, 1e-30)

    def maximise(posterior: jax.Array, pseudo: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Class prior [C], confusion [W, C, C], pseudo counts [G, C, C]."""
        each = jnp.where(valid[:, None], posterior, 0.0)
        prior = each.sum(0) / jnp.maximum(valid.sum(), 1)
        prior = jnp.where(valid.any(), prior, 1 / num_classes)
        joint = weight[:, None, None] * each[item][:, :, None] * label[:, None, :]
        counts = group_sum(joint, worker, group.shape[0], axis_name)
        if pooled:
            pseudo = _dirichlet(counts, group, pseudo, mode)
            counts = counts + pseudo[group]
        counts = jnp.maximum(counts, smallest)
        return prior, counts / counts.sum(-1, keepdims=True), pseudo

    def expect(prior: jax.Array, confusion: jax.Array) -> tuple[jax.Array, jax.Array]:
        single = jnp.einsum("nkl,nl->nk", jnp.log(jnp.maximum(confusion, 1e-30))[worker], label)
        joint = group_sum(weight[:, None] * single, item, num_items, axis_name)
        joint += jnp.log(jnp.maximum(prior, _SMALLEST))
        evidence = jax.nn.logsumexp(joint, axis=1)
        return jnp.exp(joint - evidence[:, None]), jnp.sum(jnp.where(valid, evidence, 0.0))

    def more(carry: Any) -> jax.Array:
        return (carry[-1] < max_iterations) & (carry[-2] >= tol)

    def update(carry: Any) -> Any:
        posterior, (prior, confusion, pseudo), _, _, step = carry
        new, likelihood = expect(prior, confusion)
        change = jnp.max(jnp.where(valid[:, None], jnp.abs(new - posterior), 0.0))
        return new, maximise(new, pseudo), likelihood, change, step + 1

    start = (shares, maximise(shares, mode), jnp.full((), -jnp.inf, dtype), jnp.full((), jnp.inf, dtype), jnp.int32(0))
    posterior, (prior, confusion, pseudo), likelihood, _, step = jax.lax.while_loop(more, update, start)
    return Consensus(
        posterior=jnp.where(valid[:, None], posterior, prior),
        valid=valid,
        confusion=confusion,
        class_prior=prior,
        pseudo_counts=pseudo if pooled else jnp.zeros_like(pseudo),
        log_likelihood=likelihood,
        iterations=step,
    )


def _dirichlet(counts: jax.Array, group: jax.Array, pseudo: jax.Array, mode: jax.Array, rate: float = 0.5) -> jax.Array:
    """Five of Minka's fixed-point steps towards the Dirichlet [G, C, C] that the counts [W, C, C] come from; hyper-prior
    Gamma(1 + rate mode, rate) of each pseudo count."""
    digamma = jax.scipy.special.digamma
    rows = counts.sum(-1)

    def step(_: Any, pseudo: jax.Array) -> jax.Array:
        own = pseudo[group]
        total = own.sum(-1)
        above = jax.ops.segment_sum(digamma(counts + own) - digamma(own), group, pseudo.shape[0])
        below = jax.ops.segment_sum(digamma(rows + total) - digamma(total), group, pseudo.shape[0])
        return (pseudo * above + rate * mode) / (below[..., None] + rate)

    return jax.lax.fori_loop(0, 5, step, pseudo)


# ---- Crowd-BT


@flax.struct.dataclass
class CrowdBT:
    """items: utilities whose differences are log odds (the standard errors take the other items and the workers as
    known); reliability [W]: eta, P(a worker reports what it should): 1/2 guesses, below 1/2 reports the opposite;
    log_likelihood [] in nats; steps [] int32 and gradient [] of the optimiser, as in `RatingModel`."""

    items: Utilities
    reliability: jax.Array
    log_likelihood: jax.Array
    steps: jax.Array
    gradient: jax.Array


def crowd_bt_log_prob(difference: jax.Array, logit: jax.Array, first_wins: jax.Array) -> jax.Array:
    """log of eta sigma(D) + (1 - eta) sigma(-D) where the first wins, of its complement where the second does: Chen
    2013, "Pairwise ranking aggregation in a crowdsourced setting", equation 4. difference D, logit = log(eta/(1 - eta)),
    first_wins in [0, 1], of a soft label or a tie (1/2) its expectation [...]. In nats."""
    sigmoid = jax.nn.log_sigmoid
    agrees = jnp.logaddexp(sigmoid(logit) + sigmoid(difference), sigmoid(-logit) + sigmoid(-difference))
    differs = jnp.logaddexp(sigmoid(logit) + sigmoid(-difference), sigmoid(-logit) + sigmoid(difference))
    return first_wins * agrees + (1 - first_wins) * differs


def crowd_bt(
    first: Any,
    second: Any,
    worker: Any,
    first_wins: Any,
    weight: Any = None,
    *,
    num_items: int,
    num_workers: int,
    prior: Any = (4.0, 1.0),
    utility_std: float = 2.0,
    max_steps: int = 200,
    axis_name: str | None = None,
) -> CrowdBT:
    """Utilities and reliabilities from comparisons, as the maximum of their posterior (Chen 2013, section 3).

    first, second [N] int items, worker [N] int; first_wins [N] in [0, 1]: 1, 0, 1/2 for a tie, or the probability a
    judge gives. prior: ([W] or []) pairs: eta's Beta pseudo-counts of right and wrong reports; the default takes
    workers for better than chance, which also settles the sign. utilities ~ N(0, utility_std^2). A comparison of an
    item with itself, or one that is not finite, is missing.
    """
    wins = as_float(first_wins)
    weight = jnp.ones_like(wins) if weight is None else jnp.asarray(weight).astype(wins.dtype)
    first, second, worker = (jnp.asarray(x, jnp.int32) for x in (first, second, worker))
    chex.assert_equal_shape((first, second, worker, wins, weight))
    weight = jnp.where(jnp.isfinite(wins) & (first != second), weight, 0.0)
    wins = jnp.where(weight > 0, wins, 0.5)
    right, wrong = (jnp.broadcast_to(jnp.asarray(p, wins.dtype), (num_workers,)) for p in prior)
    total = jnp.maximum(psum(weight.sum(), axis_name), 1.0)

    def likelihood(params: Any) -> jax.Array:
        utility, logit = params
        found = crowd_bt_log_prob(utility[first] - utility[second], logit[worker], wins)
        return jnp.sum(jnp.where(weight > 0, weight * found, 0.0))

    def penalty(params: Any) -> jax.Array:
        # The Beta density of the logit, so that its mode is right / (right + wrong) and never on the border.
        utility, logit = params
        reliability = right * jax.nn.log_sigmoid(logit) + wrong * jax.nn.log_sigmoid(-logit)
        return 0.5 * jnp.sum((utility / utility_std) ** 2) - jnp.sum(reliability)

    def objective(params: Any) -> tuple[jax.Array, Any]:
        value, gradient = jax.value_and_grad(lambda p: -likelihood(p))(params)
        own_value, own = jax.value_and_grad(penalty)(params)
        value, gradient = psum(value, axis_name) + own_value, optax.tree.add(psum(gradient, axis_name), own)
        return value / total, optax.tree.scale(1 / total, gradient)

    shown = group_sum(weight, first, num_items, axis_name) + group_sum(weight, second, num_items, axis_name)
    seen = group_sum(weight, worker, num_workers, axis_name)
    start = (jnp.zeros(num_items, wins.dtype), jnp.log(right / wrong))
    scale = (
        jnp.sqrt(total / (shown / 4 + utility_std**-2)),
        jnp.sqrt(total / ((seen + right + wrong) / 4)),
    )
    (utility, logit), steps, gradient = lbfgs(objective, start, scale, max_steps=max_steps)
    valid = shown > 0
    # At the maximum the utilities have mean 0; the optimiser is slowest along that direction, so make it exact.
    utility -= jnp.sum(jnp.where(valid, utility, 0.0)) / jnp.maximum(valid.sum(), 1)
    information = _information(utility[first] - utility[second], logit[worker]) * weight
    information = group_sum(information, first, num_items, axis_name) + group_sum(
        information, second, num_items, axis_name
    )
    return CrowdBT(
        items=Utilities(
            value=jnp.where(valid, utility, 0.0),
            stderr=jnp.where(valid, jax.lax.rsqrt(information + utility_std**-2), jnp.inf),
            valid=valid,
        ),
        reliability=jax.nn.sigmoid(logit),
        log_likelihood=psum(likelihood((utility, logit)), axis_name),
        steps=steps,
        gradient=gradient,
    )


def _information(difference: jax.Array, logit: jax.Array) -> jax.Array:
    """Fisher information of one comparison about D: p'(D)^2 / (p (1 - p))."""
    p = jnp.exp(crowd_bt_log_prob(difference, logit, jnp.ones_like(difference)))
    slope = jnp.tanh(logit / 2) * jax.nn.sigmoid(difference) * jax.nn.sigmoid(-difference)
    return slope**2 / jnp.maximum(p * (1 - p), 1e-12)


def pair_probability(utility: jax.Array, first: Any, second: Any) -> jax.Array:
    """Soft labels [...]: P(first is better than second) = sigma(s_first - s_second) of `crowd_bt`'s utilities [I]."""
    return jax.nn.sigmoid(utility[jnp.asarray(first)] - utility[jnp.asarray(second)])


def judgement_probability(fit: CrowdBT, first: Any, second: Any, worker: Any, first_wins: Any) -> jax.Array:
    """P(first is better | this worker's report, utilities) [...]: Bayes on top of `pair_probability`, for a comparison
    of its own that the report is about; a soft report is the mean over what it may be."""
    prior = pair_probability(fit.items.value, first, second)
    eta, wins = fit.reliability[jnp.asarray(worker)], as_float(first_wins)
    if_first = eta * prior / jnp.maximum(eta * prior + (1 - eta) * (1 - prior), _SMALLEST)
    if_second = (1 - eta) * prior / jnp.maximum((1 - eta) * prior + eta * (1 - prior), _SMALLEST)
    return wins * if_first + (1 - wins) * if_second
