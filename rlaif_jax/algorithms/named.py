"""Settings of policy gradients under the names of their papers, each a `PPOConfig`.

The numbers are the papers', for models of billions of parameters: learning rates and batches of your own model differ (see the
guide on settings). `NAMED` lists them all; the documentation and the tests are made from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rlaif_jax.algorithms.advantages import (
    GAE,
    GreedyBaseline,
    GroupMean,
    GroupNormalised,
    LeaveOneOut,
    LengthWeighted,
    MovingBaseline,
    ReturnToGo,
)
from rlaif_jax.algorithms.objectives import CISPO, SAPO, Clipped, NoRatio
from rlaif_jax.algorithms.optimizer import OptimizerConfig
from rlaif_jax.algorithms.ppo import PPOConfig
from rlaif_jax.algorithms.surrogate import AnswerRatio, OverAnswers, OverLength

RATE = OptimizerConfig(learning_rate=1e-6, schedule="constant")
_ONCE = PPOConfig(num_epochs=1, kl_coef=0.0, policy_optimizer=RATE)
_PLAIN = replace(_ONCE, objective=NoRatio(), average=OverLength(1))
_GROUP = replace(_ONCE, advantage=GroupNormalised(), objective=Clipped(0.2), answers_per_prompt=8)

REINFORCE = replace(
    _PLAIN,
    advantage=MovingBaseline(),
)
"""REINFORCE (Williams 1992): gradient = (R - b) sum_t d log pi_t, b the moving mean of earlier steps' rewards."""

RLOO = replace(
    _PLAIN,
    advantage=LeaveOneOut(),
    answers_per_prompt=4,
    kl_coef=0.03,
)
"""RLOO (Ahmadian 2024, equation 7): A_i = R_i - mean of the other K - 1 rewards, each less kl_coef log(pi / pi_ref).

K = 2 or 4, learning rate 1e-6, batch 512, coefficient .03 on TL;DR and .10 on HH.
"""

REMAX = replace(
    _PLAIN,
    advantage=GreedyBaseline(),
    kl_coef=0.1,
)
"""ReMax (Li 2024): A = R - R of the greedy answer, one sampled answer a prompt, learning rate 1e-6, coefficient .1."""

OPO = replace(
    _PLAIN,
    advantage=LengthWeighted(),
    answers_per_prompt=8,
)
"""OPO (Hao 2025): A_i = R_i - sum_j l_j R_j / sum_j l_j, l the lengths; exactly on-policy, neither KL nor entropy terms."""

GRPO = replace(
    _GROUP,
    average=OverAnswers(),
    answers_per_prompt=64,
    kl_in="loss",
    kl_gradient="k3",
    kl_coef=0.04,
)
"""GRPO (Shao 2024, equation 3): A_i = (R_i - mean) / std of the group, clipped, mean over tokens, then answers; k3 in the loss.

64 answers a prompt, learning rate 1e-6, coefficient .04.
"""

DR_GRPO = replace(
    _ONCE,
    advantage=GroupMean(),
    objective=Clipped(0.2),
    average=OverLength(),
    answers_per_prompt=8,
)
"""Dr. GRPO (Liu 2025): neither the group's deviation nor the answer's length divides; 8 answers, learning rate 1e-6, no KL."""

DAPO = replace(
    _GROUP,
    objective=Clipped(0.2, clip_higher=0.28),
    answers_per_prompt=16,
    num_minibatches=16,
)
"""DAPO (Yu 2025, equations 8 to 13): clip-higher .2 / .28, mean over all tokens, no KL.

16 answers to each of 512 prompts, 16 minibatches, learning rate 1e-6. Its dynamic sampling is `train.oversample`, its overlong
punishment `ppo.shaping.overlong_from`: both depend on the task.
"""

GSPO = replace(
    _GROUP,
    objective=Clipped(3e-4, clip_higher=4e-4),
    ratio=AnswerRatio(),
    average=OverAnswers(),
    num_minibatches=4,
)
"""GSPO (Zheng 2025, equations 5 and 7): one ratio an answer, (pi / pi_old)^(1 / length), clips 3e-4 / 4e-4; 4 minibatches."""

REINFORCE_PLUS_PLUS = replace(
    _ONCE,
    advantage=ReturnToGo(whiten=True),
    objective=Clipped(0.2),
    kl_coef=0.01,
)
"""REINFORCE++ (Hu 2025): A_t = R - kl_coef sum_{i >= t} log(pi / pi_ref)_i, brought to mean 0 and variance 1 over the step."""

REINFORCE_PLUS_PLUS_BASELINE = replace(
    _ONCE,
    advantage=GroupMean(whiten=True),
    objective=Clipped(0.2),
    answers_per_prompt=8,
    kl_in="loss",
    kl_coef=0.01,
)
"""REINFORCE++ with a baseline (Hu 2025): A = R - the group's mean, whitened over the step; k2 in the loss."""

CISPO_ = replace(
    _GROUP,
    objective=CISPO(5.0),
    answers_per_prompt=16,
    num_minibatches=16,
)
"""CISPO (MiniMax 2025): -sg(min(rho, m)) A log pi, mean over all tokens; m = 5 as ScaleRL (Khatri 2025) found good."""

SAPO_ = replace(
    _GROUP,
    objective=SAPO(1.0, 1.05),
    average=OverAnswers(),
    num_minibatches=4,
)
"""SAPO (Gao 2025): -A (4 / t) s(t (rho - 1)), t = 1 where A > 0, else 1.05; mean over tokens, then answers."""

A2C = replace(
    _PLAIN,
    advantage=GAE(gae_lambda=1.0, whiten=False),
    kl_coef=0.05,
    value_clip_range=None,
    value_optimizer=RATE,
)
"""A2C (Mnih 2016): A_t = the return from t on - V_t, a plain policy gradient and the critic's squared error."""

PPO_RLHF = PPOConfig(
    policy_optimizer=OptimizerConfig(learning_rate=3e-6), value_optimizer=OptimizerConfig(learning_rate=3e-6)
)
"""PPO (Schulman 2017; Stiennon 2020; Huang 2024): GAE .95, clips .2, 4 epochs, KL .05 in the reward, learning rate 3e-6."""

VAPO = replace(
    _ONCE,
    advantage=GAE(value_lambda=1.0, length_alpha=0.05),
    objective=Clipped(0.2, clip_higher=0.28),
    answers_per_prompt=16,
    num_minibatches=16,
    value_warmup=50,
    value_optimizer=OptimizerConfig(learning_rate=2e-6, schedule="constant"),
)
"""VAPO (Yue 2025): lambda = 1 - 1 / (.05 length), 1 for the critic, which learns alone for 50 steps; clips .2 / .28.

Its language-model loss on right answers is not here.
"""

NAMED: Mapping[str, PPOConfig] = {
    "reinforce": REINFORCE,
    "rloo": RLOO,
    "remax": REMAX,
    "opo": OPO,
    "grpo": GRPO,
    "dr-grpo": DR_GRPO,
    "dapo": DAPO,
    "gspo": GSPO,
    "reinforce++": REINFORCE_PLUS_PLUS,
    "reinforce++-baseline": REINFORCE_PLUS_PLUS_BASELINE,
    "cispo": CISPO_,
    "sapo": SAPO_,
    "a2c": A2C,
    "ppo": PPO_RLHF,
    "vapo": VAPO,
}
"""Name -> settings."""
