"""Losses and their slopes against TRL's own, which `tests/oracles/trl_policy_gradients.py` has written."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.algorithms.advantages import GroupMean
from rlaif_jax.algorithms.objectives import CISPO, SAPO, Clipped, Masked, Truncated
from rlaif_jax.algorithms.ppo import PPOConfig
from rlaif_jax.algorithms.surrogate import (
    AnswerRatio,
    OverAnswers,
    OverLength,
    OverTokens,
    TokenFields,
    answer_fields,
    answer_loss,
    token_loss,
)
from rlaif_jax.algorithms.update import Batch, Scored, count_totals

WRITTEN = json.loads((Path(__file__).parents[1] / "oracles" / "policy_gradients.json").read_text())
DATA = {name: np.array(value) for name, value in WRITTEN["data"].items()}
MASK = DATA["mask"].astype(bool)
GRPO = PPOConfig(
    advantage=GroupMean(), answers_per_prompt=2, average=OverAnswers(), kl_in="loss", kl_gradient="k3", kl_coef=0.0,
    behaviour="sampler",
)  # fmt: skip
GSPO = dataclasses.replace(GRPO, ratio=AnswerRatio(), objective=Clipped(0.05, 0.08))
SETTINGS = {
    "grpo": {},
    "grpo, clip-higher": {"objective": Clipped(0.2, 0.28)},
    "grpo, two-sided clip": {"objective": Clipped(0.2, dual_clip=1.5)},
    "grpo, kl": {"kl_coef": 0.3},
    "bnpo": {"average": OverTokens(), "kl_coef": 0.3},
    "dapo": {"average": OverTokens(), "objective": Clipped(0.2, 0.28)},
    "dr_grpo": {"average": OverLength()},
    "cispo": {"average": OverTokens(), "objective": CISPO(1.2)},
    "sapo": {"objective": SAPO()},
    "gspo": vars(GSPO),
    "gspo, kl": vars(GSPO) | {"kl_coef": 0.3},
    "luspo": vars(GSPO) | {"average": OverLength(1)},
    "token_truncate": {"importance": Truncated("token", 1.2)},
    "token_mask": {"importance": Masked("token", 0.8, 1.2)},
    "sequence_truncate": {"importance": Truncated("answer", 1.2)},
    "sequence_mask": {"importance": Masked("answer", 0.8, 1.2)},
    "gspo, sequence_truncate": {"ratio": AnswerRatio(), "importance": Truncated("answer", 1.2)},
    "rloo": {"ratio": AnswerRatio(normalised=False)},
    "rloo, clip-higher": {"ratio": AnswerRatio(normalised=False), "objective": Clipped(0.2, 0.5)},
}


def ours(config: PPOConfig, corrected: bool, new: jax.Array) -> jax.Array:
    """The loss of the answers as one minibatch; what masked slots hold is not a number."""
    only = lambda x: jnp.where(MASK, x, jnp.nan)
    old, sampler = only(DATA["old"]), only(DATA["sampler"])
    advantages = jnp.broadcast_to(DATA["advantages"][:, None], MASK.shape)
    weights = config.importance(old - sampler, MASK) if corrected else jnp.ones(MASK.shape)
    nothing = jnp.zeros(MASK.shape)
    fields = TokenFields(
        old, sampler, only(DATA["reference"]), nothing, advantages, nothing, weights, config.average.shares(MASK)
    )
    batch = Batch(jnp.zeros((len(MASK), 9)), MASK[:, :4], MASK, MASK, fields)
    totals = count_totals(batch, 2, None)
    scored = Scored(jnp.where(MASK, new, jnp.nan), nothing)
    loss, _ = token_loss(config, config.kl_coef, scored, fields, MASK, totals)
    if config.ratio.of_answers:
        sums = jnp.where(MASK, new, 0.0).sum(-1)
        loss += answer_loss(config, sums, answer_fields(batch), MASK.any(-1), totals)[0]
    return loss


def test_every_case_of_theirs_is_compared():
    assert SETTINGS.keys() == WRITTEN["cases"].keys()
    assert len({case["loss"] for case in WRITTEN["cases"].values()}) == len(SETTINGS), "two settings that are the same"


@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_slopes_are_those_of_trl(name):
    config = dataclasses.replace(GRPO, **SETTINGS[name])
    corrected = "truncate" in name or "mask" in name
    loss, slopes = jax.jit(jax.value_and_grad(functools.partial(ours, config, corrected)))(jnp.asarray(DATA["new"]))
    theirs = WRITTEN["cases"][name]
    np.testing.assert_allclose(loss, theirs["loss"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slopes, theirs["slopes"], atol=1e-6)
