"""Metrics of a policy-gradient step: of its minibatches, and of the rollout it learned from."""

from __future__ import annotations

import jax.numpy as jnp

from rlaif_jax.algorithms.objectives import kl_estimates
from rlaif_jax.algorithms.update import Batch
from rlaif_jax.parallel import masked_mean
from rlaif_jax.types import Metrics


def summarise(history: Metrics) -> Metrics:
    """Returns the metrics of a step: means over its minibatches, and `first/*` of the first minibatch.

    `history` has the same metrics of each minibatch, arrays [number of minibatches] in order.
    """
    # The sampler's log-probs are compared with the trainer's before it has moved: later the gap would mean nothing.
    metrics = {name: x.mean() for name, x in history.items() if not name.startswith("sampler_")}
    first = {name: x[0] for name, x in history.items()}
    for name in ("ratio_error", "approx_kl", "clip_fraction", "sampler_gap", "sampler_gap_max"):
        metrics[f"first/{name}"] = first[name]
    squared = jnp.maximum(first["sampler_weight_squared"], 1e-8)
    metrics["first/effective_sample_size"] = first["sampler_weight"] ** 2 / squared
    metrics["nonfinite"] = history["nonfinite"].sum()
    return metrics


def batch_metrics(batch: Batch, axis_name: str | None, *, with_critic: bool) -> Metrics:
    """Computes the metrics of a rollout.

    Args:
        batch: the rollout with its token fields.
        axis_name: the mapped axis of the devices, or None; means are over all devices.
        with_critic: whether to add `explained_variance` and the mean `return`.

    Returns:
        `kl` and `kl_k3` of a whole answer to the reference, in nats; `entropy` of a token, estimated from the
        sampled tokens; `length` of an answer in tokens.
    """
    mask, fields = batch.mask, batch.fields
    rows = mask.any(-1)
    log_ratio = jnp.where(mask, fields.logprobs - fields.ref_logprobs, 0.0)
    k1, _, k3 = kl_estimates(log_ratio)
    metrics = {
        "kl": masked_mean(jnp.where(mask, k1, 0.0).sum(-1), rows, axis_name),
        "kl_k3": masked_mean(jnp.where(mask, k3, 0.0).sum(-1), rows, axis_name),
        "entropy": masked_mean(-fields.logprobs, mask, axis_name),  # Monte Carlo, over the behaviour policy's tokens
        "length": masked_mean(batch.response_mask.sum(-1).astype(jnp.float32), rows, axis_name),
    }
    if with_critic:
        error = masked_mean((fields.returns - fields.values) ** 2, mask, axis_name)
        mean = masked_mean(fields.returns, mask, axis_name)
        variance = masked_mean((fields.returns - mean) ** 2, mask, axis_name)
        metrics |= {"explained_variance": 1 - error / jnp.maximum(variance, 1e-8), "return": mean}
    return metrics
