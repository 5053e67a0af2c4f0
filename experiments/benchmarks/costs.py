"""Counts the floating-point operations and bytes that rollouts and updates need in any system."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from experiments.benchmarks.ceilings import Ceilings
from experiments.benchmarks.works import Work


def block_flops(work: Work, sequences: int, first: int, last: int, read: bool = True) -> float:
    """Returns the FLOPs of the blocks' matrix products; a multiply-add counts as 2, attention is causal.

    Args:
        work: the size.
        sequences: number of sequences.
        first, last: the columns first .. last - 1 are computed.
        read: whether the hidden states of the columns are read; otherwise the last block computes keys and values only.
    """
    whole = work.layers if read else work.layers - 1
    block = whole * (4 * work.width**2 + 3 * work.width * work.hidden) + (work.layers - whole) * 2 * work.width**2
    attention = 2 * whole * work.width * (last * (last + 1) - first * (first + 1)) / 2
    return 2.0 * sequences * ((last - first) * block + attention)


class RolloutCost(NamedTuple):
    """The work that a rollout needs in any system.

    Attributes:
        prefill: FLOPs of the pass over the prompts with the logits of the first token.
        decode: FLOPs of the decoded tokens' products with weights.
        attention: FLOPs of the decoded tokens' attention.
        steps: how often the weights are read: once for each token of the longest answer except the first.
        weights: bytes of the weights that a step reads.
        cache: bytes of keys and values that all steps read.
    """

    prefill: float
    decode: float
    attention: float
    steps: int
    weights: float
    cache: float

    def seconds(self, ceilings: Ceilings) -> float:
        """Returns the least time at these ceilings for any order of drawing.

        Products with weights either compute or wait for the weights; attention computes or waits for its
        cache.
        """
        return (
            self.prefill / ceilings.flops
            + max(self.decode / ceilings.flops, self.steps * self.weights / ceilings.read)
            + max(self.attention / ceilings.flops, self.cache / ceilings.read)
        )


def rollout_cost(work: Work, lengths: np.ndarray, itemsize: int = 4) -> RolloutCost:
    """Returns the cost of answers of `lengths` [prompts, K] tokens; a number has `itemsize` bytes.

    A prompt is computed once for its K answers, and its cache is read once per step for those answers that
    still run.
    """
    prompts, column = lengths.shape[0], work.layers * work.width  # numbers in a column's keys
    fed = lengths - 1  # no answer's last token is fed
    weights = work.layers * (4 * work.width**2 + 3 * work.width * work.hidden) + work.width * work.vocab
    own = float((fed * (fed + 1) / 2).sum())  # answer columns seen
    return RolloutCost(
        prefill=block_flops(work, prompts, 0, work.prompt - 1, read=False)
        + block_flops(work, prompts, work.prompt - 1, work.prompt)
        + 2.0 * prompts * work.width * work.vocab,
        decode=2.0 * float(fed.sum()) * weights,
        attention=4.0 * column * (work.prompt * float(fed.sum()) + own),
        steps=int(fed.max()),
        weights=float(itemsize * weights),
        cache=2.0 * itemsize * column * (work.prompt * float(fed.max(-1).sum()) + own),
    )


def trained_flops(work: Work, lengths: np.ndarray) -> tuple[float, float]:
    """Returns (FLOPs of the blocks, of the head) of a forward pass over answers of `lengths` [prompts, K] tokens.

    All columns of a prompt except the last are computed once for its answers, and no hidden state of them is
    read.
    """
    prompts, first = lengths.shape[0], work.prompt - 1
    blocks = block_flops(work, prompts, 0, first, read=False)
    blocks += sum(block_flops(work, 1, first, first + int(n)) for n in lengths.flat)
    return blocks, 2.0 * float(lengths.sum()) * work.width * work.vocab
