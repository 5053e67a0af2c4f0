"""Classes of items and reliability of raters from labels: majority and Dawid-Skene.

`crowd_bt` is for comparisons.

N labels, I items, W workers (people, AI judges and rules alike, in one model), C classes, G kinds of worker. Every
function takes flat arrays and static sizes; weight [N] or None (= 1 each) is a number of equal labels, 0 is a missing
one. Pure: under jit, vmap, pmap and sharded; with `axis_name` each device holds a share of the labels and all get the
result of the whole. float32 inside, float64 where the weights or soft labels are. An item without a label is
`valid = False`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp

from rlaif_jax.rewards.ratings import as_float, group_sum

_SMALLEST = 1e-10  # of a count, as in crowd-kit: keeps logarithms finite


@flax.struct.dataclass
class Consensus:
    """The classes of items and the reliability of workers, from the labels of many workers.

    Attributes:
        posterior: [I, C] probability of each class; where not valid, the class prior.
        valid: [I] bool, whether the item has a label.
        confusion: [W, C, C] P(worker says l | truth is k), rows k.
        class_prior: [C].
        pseudo_counts: [G, C, C] Dirichlet prior of each kind's confusion rows, in labels (0 without pooling).
        log_likelihood: [] of the labels, in nats.
        iterations: [] int32, steps of EM.
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
        """Returns the probability [W] that a worker's label is right, over the class prior."""
        return jnp.einsum("wkk,k->w", self.confusion, self.class_prior)


class _Labels(NamedTuple):
    item: jax.Array  # [N]
    worker: jax.Array  # [N]
    label: jax.Array  # [N, C] probabilities
    weight: jax.Array  # [N]


def _labels(item: Any, worker: Any, label: Any, weight: Any, num_classes: int) -> _Labels:
    """Returns labels as probabilities [N, C]; a label that is no class (or not finite) has weight 0."""
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
    """Computes the share of the votes that each class got.

    Args:
        item: [N] int.
        label: [N] int, or [N, C] probabilities.
        weight: [N], number of equal labels; 0 = missing. None: 1 each.
        num_items: I.
        num_classes: C.
        axis_name: the labels are split over the devices of this pmap axis; all get the same shares.

    Returns:
        (shares [I, C], 1/C each where not valid; valid [I] bool).
    """
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
    """Finds the class with most votes.

    Args:
        item: [N] int.
        label: [N] int, or [N, C] probabilities.
        weight: [N], number of equal labels; 0 = missing. None: 1 each.
        num_items: I.
        num_classes: C.
        axis_name: the labels are split over the devices of this pmap axis; all get the same majority.

    Returns:
        (majority [I, C], 1 for the class with most votes, 1/n each for n classes that tie; valid [I] bool).
    """
    shares, valid = vote_shares(item, label, weight, num_items=num_items, num_classes=num_classes, axis_name=axis_name)
    return _largest(shares), valid


def _largest(shares: jax.Array) -> jax.Array:
    """Returns 1 for the class with the largest share, 1/n each for n classes that tie; shares are [I, C]."""
    top = shares >= shares.max(-1, keepdims=True) * (1 - 1e-6)
    return top / top.sum(-1, keepdims=True)


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
    """Fits classes and workers' confusion by maximum likelihood: EM from the vote shares.

    Dawid & Skene 1979, equations 2.3-2.5.

    Args:
        item: [N] int.
        worker: [N] int.
        label: [N] int, or [N, C] probabilities of a judge that is not sure.
        weight: [N], number of equal labels; 0 = missing. None: 1 each.
        num_items: I.
        num_workers: W.
        num_classes: C.
        max_iterations: most steps of EM; 0 gives the vote shares.
        tol: EM stops when no posterior moves by this or more.
        axis_name: the labels are split over the devices of this pmap axis; all get the same result.
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
    evidence: Any = None,
    max_iterations: int = 200,
    tol: float = 1e-4,
    axis_name: str | None = None,
) -> Consensus:
    """Fits Dawid-Skene with workers of one kind alike: the model to use where workers label little.

    Each row of a worker's confusion matrix has a Dirichlet prior of the worker's kind, so that a worker with few labels
    counts as a typical one of the kind. The priors are learned from the labels (empirical Bayes: Minka 2000, "Estimating
    a Dirichlet distribution", equation 55, under a weak Gamma hyper-prior that expects workers to be better than
    chance). Compare Paun 2018, "Comparing Bayesian models of annotation", HierD&S.

    Args:
        item: [N] int.
        worker: [N] int.
        label: [N] int, or [N, C] probabilities of a judge that is not sure.
        weight: [N], number of equal labels; 0 = missing. None: 1 each.
        num_items: I.
        num_workers: W.
        num_classes: C.
        group: [W] int, kind of each worker (people 0, AI judges 1). None: all of one kind.
        num_groups: G.
        evidence: [N], by how much each label counts in what is believed of its item, times its weight. A worker whose
            labels have 0 is judged by the labels of the others and believed in nothing; an item without evidence is not
            valid. EM then begins at the majority of the evidence. None: 1 each, from the vote shares.
        max_iterations: most steps of EM; 0 gives the vote shares.
        tol: EM stops when no posterior moves by this or more.
        axis_name: the labels are split over the devices of this pmap axis; all get the same result.
    """
    labels = _labels(item, worker, label, weight, num_classes)
    group = jnp.zeros(num_workers, jnp.int32) if group is None else jnp.asarray(group, jnp.int32)
    chex.assert_shape(group, (num_workers,))
    if evidence is not None:
        evidence = jnp.asarray(evidence).astype(labels.weight.dtype)
        chex.assert_equal_shape((labels.weight, evidence))
    return _em(labels, group, num_groups, num_items, max_iterations, tol, axis_name, pooled=True, evidence=evidence)


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
    evidence: jax.Array | None = None,
) -> Consensus:
    """Runs EM from the vote shares, or from the majority of the evidence.

    With `pooled`, workers of one `group` [W] share a Dirichlet prior.
    """
    item, worker, label, weight = labels
    num_classes, dtype = label.shape[1], label.dtype
    believed = labels if evidence is None else labels._replace(weight=weight * evidence)
    shares, valid = _shares(believed, num_items, axis_name)
    begin = shares if evidence is None else _largest(shares)
    # Modes of the hyper-prior: 4 labels for the right class, 1 for each wrong one.
    mode = 1 + 3 * jnp.broadcast_to(jnp.eye(num_classes, dtype=dtype), (num_groups, num_classes, num_classes))

    # As in crowd-kit, only labels that a worker has used share the mass of a class it never met.
    used = group_sum(weight[:, None] * label, worker, group.shape[0], axis_name)[:, None, :] > 0
    smallest = jnp.where(used, _SMALLEST, 1e-30)

    def maximise(posterior: jax.Array, pseudo: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns class prior [C], confusion [W, C, C], pseudo counts [G, C, C]."""
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

    def unfinished(carry: Any) -> jax.Array:
        return (carry[-1] < max_iterations) & (carry[-2] >= tol)

    def update(carry: Any) -> Any:
        posterior, (prior, confusion, pseudo), _, _, step = carry
        new, evidence = _expect(believed, prior, confusion, num_items, axis_name)
        likelihood = jnp.sum(jnp.where(valid, evidence, 0.0))
        change = jnp.max(jnp.where(valid[:, None], jnp.abs(new - posterior), 0.0))
        return new, maximise(new, pseudo), likelihood, change, step + 1

    start = (begin, maximise(begin, mode), jnp.full((), -jnp.inf, dtype), jnp.full((), jnp.inf, dtype), jnp.int32(0))
    posterior, (prior, confusion, pseudo), likelihood, _, step = jax.lax.while_loop(unfinished, update, start)
    return Consensus(
        posterior=jnp.where(valid[:, None], posterior, prior),
        valid=valid,
        confusion=confusion,
        class_prior=prior,
        pseudo_counts=pseudo if pooled else jnp.zeros_like(pseudo),
        log_likelihood=likelihood,
        iterations=step,
    )


def _expect(
    labels: _Labels, prior: jax.Array, confusion: jax.Array, num_items: int, axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
    """Returns posterior [I, C] and log evidence [I] of the items.

    The class prior is `prior` [C], the workers' confusion matrices are `confusion` [W, C, C].
    """
    item, worker, label, weight = labels
    single = jnp.einsum("nkl,nl->nk", jnp.log(jnp.maximum(confusion, 1e-30))[worker], label)
    joint = group_sum(weight[:, None] * single, item, num_items, axis_name)
    joint += jnp.log(jnp.maximum(prior, _SMALLEST))
    evidence = jax.nn.logsumexp(joint, axis=1)
    return jnp.exp(joint - evidence[:, None]), evidence


def _dirichlet(counts: jax.Array, group: jax.Array, pseudo: jax.Array, mode: jax.Array, rate: float = 0.5) -> jax.Array:
    """Takes five of Minka's fixed-point steps towards the Dirichlet that the workers' counts come from.

    Args:
        counts: [W, C, C], labels of each worker by class.
        group: [W] int, kind of each worker.
        pseudo: [G, C, C], the Dirichlet so far.
        mode: [G, C, C], modes of the hyper-prior.
        rate: the hyper-prior of each pseudo count is Gamma(1 + rate mode, rate).

    Returns:
        [G, C, C].
    """
    digamma = jax.scipy.special.digamma
    rows = counts.sum(-1)

    def step(_: Any, pseudo: jax.Array) -> jax.Array:
        own = pseudo[group]
        total = own.sum(-1)
        above = jax.ops.segment_sum(digamma(counts + own) - digamma(own), group, pseudo.shape[0])
        below = jax.ops.segment_sum(digamma(rows + total) - digamma(total), group, pseudo.shape[0])
        return (pseudo * above + rate * mode) / (below[..., None] + rate)

    return jax.lax.fori_loop(0, 5, step, pseudo)
