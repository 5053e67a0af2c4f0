"""Small whole set-ups of every algorithm: all that `train`, or one step by hand, needs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from rlaif_jax.algorithms.advantages import GreedyBaseline, GroupNormalised, LeaveOneOut, MovingBaseline
from rlaif_jax.algorithms.base import Algorithm
from rlaif_jax.algorithms.irl import DiscriminatorConfig
from rlaif_jax.algorithms.objectives import Clipped, Masked, NoRatio
from rlaif_jax.algorithms.optimizer import OptimizerConfig
from rlaif_jax.algorithms.ppo import PPOConfig
from rlaif_jax.algorithms.preference import DPOConfig
from rlaif_jax.algorithms.surrogate import AnswerRatio, ClipCov, OverAnswers, OverLength
from rlaif_jax.data.prompts import PromptIterator, prompt_batches
from rlaif_jax.data.readers import FileRecords
from rlaif_jax.data.recorded import WithRecorded
from rlaif_jax.data.tokenizers import word_level_tokenizer
from rlaif_jax.feedback.sources import FeedbackSource, FunctionSource, RecordedPreferences
from rlaif_jax.models import CausalLM, ScalarModel
from rlaif_jax.models.decoder_config import DecoderConfig, small_decoder
from rlaif_jax.models.encoder_decoder import EncoderDecoder
from rlaif_jax.models.lora import LoRAConfig
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.policies.text import TextPolicy

WORDS = tuple("abcdefgh")
TOKENIZER = word_level_tokenizer(WORDS)
PROMPT, LENGTH = 4, 5
DECODER = small_decoder(TOKENIZER.vocab_size, num_layers=2, width=16, num_heads=2, context_length=16)
SAMPLING = SamplingConfig(max_new_tokens=LENGTH)
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, schedule="constant")
RECORDS = FileRecords(
    tuple(
        {
            "prompt": f"{x} {y} {z}",
            "chosen": f"a a {x}",
            "rejected": f"b {y} b c",
            "demonstration": f"a {x} a",
            "probability": 1.0 if x != "d" else 0.7,
        }
        for x in "abcd"
        for y in "efgh"
        for z in "ab"
    ),
    tuple(f"records:{i}" for i in range(32)),
)


@dataclasses.dataclass(frozen=True)
class Setup:
    """An algorithm with its parameters, data and feedback; with an adapter, `base` has the weights under it.

    `oversample` prompts are drawn for each that is learned from.
    """

    algorithm: Algorithm
    policy: TextPolicy
    params: dict[str, Any]
    feedback: FeedbackSource | None
    bring: dict[str, Any] = dataclasses.field(default_factory=dict)  # what the batches bring (`WithRecorded`)
    base: Any = None
    oversample: int = 1

    def prompts(self, count: int) -> PromptIterator:
        stream = prompt_batches(RECORDS, TOKENIZER, batch_size=count, seed=0, prompt_length=PROMPT)
        return WithRecorded(stream, TOKENIZER, LENGTH, **self.bring) if self.bring else stream


def _count_a(record: Any, answer: str) -> float | None:
    return None if answer.startswith("h") else float(answer.split().count("a"))


def text_policy(model: Any, sampling: SamplingConfig = SAMPLING, lora: LoRAConfig | None = None) -> TextPolicy:
    return TextPolicy(model, sampling, TOKENIZER.eos_id, TOKENIZER.pad_id, lora)


def ppo(decoder: DecoderConfig = DECODER, *, sampling: SamplingConfig = SAMPLING, **settings: Any) -> Setup:
    """PPO with its own critic, GRPO or RLOO, by the settings."""
    base: dict[str, Any] = {
        "num_epochs": 2,
        "num_minibatches": 2,
        "kl_coef": 0.05,
        "policy_optimizer": OPTIMIZER,
        "value_optimizer": OPTIMIZER,
    }
    config = PPOConfig(**base | settings)
    policy = text_policy(CausalLM(decoder), sampling)
    critic = ScalarModel(decoder, "normal") if config.advantage.needs_critic else None
    params = {"policy": policy.model.init(jax.random.key(0))}
    if critic is not None:
        params["value"] = critic.init(jax.random.key(1))
    return Setup(config.build(policy, critic, steps=4), policy, params, FunctionSource(_count_a))


def adapted(
    decoder: DecoderConfig = DECODER,
    *,
    sampling: SamplingConfig = SAMPLING,
    lora: LoRAConfig = LoRAConfig(rank=2, alpha=8.0),
    encoder_decoder: bool = False,
    **settings: Any,
) -> Setup:
    """PPO with its own critic, or GRPO and RLOO, in which adapters learn over one base."""
    model = EncoderDecoder(decoder, start_id=TOKENIZER.pad_id) if encoder_decoder else CausalLM(decoder)
    whole = ppo(decoder, sampling=sampling, **settings)
    policy, critic = text_policy(model, sampling, lora), None
    base = model.init(jax.random.key(0))
    params = {"policy": lora.init(jax.random.key(1), base)}
    if whole.algorithm.critic is not None:
        critic = ScalarModel(decoder, "normal", lora=lora)
        params["value"] = critic.init(jax.random.key(2))
    algorithm = whole.algorithm.config.build(policy, critic, steps=4)
    return Setup(algorithm, policy, params, whole.feedback, base=base)


def dpo(decoder: DecoderConfig = DECODER, *, sampling: SamplingConfig = SAMPLING, **settings: Any) -> Setup:
    """DPO on recorded pairs, or on the policy's answers ordered by score."""
    policy = text_policy(CausalLM(decoder), sampling)
    config = DPOConfig(**{"num_minibatches": 2, "beta": 0.5, "policy_optimizer": OPTIMIZER} | settings)
    params = {"policy": policy.model.init(jax.random.key(0))}
    if config.answers == "policy":
        return Setup(config.build(policy, steps=4), policy, params, FunctionSource(_count_a))
    bring = {"pair": ("chosen", "rejected")}
    return Setup(config.build(policy, steps=4), policy, params, RecordedPreferences(), bring)


def encoder_decoder(decoder: DecoderConfig = DECODER, *, sampling: SamplingConfig = SAMPLING, **settings: Any) -> Setup:
    """RLOO on an encoder-decoder."""
    config = dataclasses.replace(decoder, num_layers=1)
    policy = text_policy(EncoderDecoder(config, start_id=TOKENIZER.pad_id), sampling)
    ppo = PPOConfig(
        **{
            "advantage": LeaveOneOut(),
            "answers_per_prompt": 2,
            "kl_in": "loss",
            "num_epochs": 2,
            "policy_optimizer": OPTIMIZER,
        }
        | settings
    )
    params = {"policy": policy.model.init(jax.random.key(0))}
    return Setup(ppo.build(policy, None, steps=4), policy, params, FunctionSource(_count_a))


def adversarial(decoder: DecoderConfig = DECODER, *, sampling: SamplingConfig = SAMPLING, **settings: Any) -> Setup:
    """RLOO against a discriminator of demonstrations."""
    inner = ppo(
        decoder, sampling=sampling, **{"advantage": LeaveOneOut(), "answers_per_prompt": 2, "kl_in": "loss"} | settings
    )
    discriminator = ScalarModel(dataclasses.replace(decoder, num_layers=1), "normal")
    algorithm = DiscriminatorConfig(optimizer=OPTIMIZER).build(inner.algorithm, discriminator, steps=4)
    params = inner.params | {"discriminator": discriminator.init(jax.random.key(2))}
    return Setup(algorithm, inner.policy, params, None, {"demonstration": "demonstration"})


GROUP = {"answers_per_prompt": 4, "kl_in": "loss"}
GSPO = {
    "ratio": AnswerRatio(),
    "objective": Clipped(0.02, 0.03),
    "average": OverAnswers(),
    "importance": Masked("answer"),
}
SUMS = {"average": OverLength(1), "num_epochs": 1}
SETUPS = {
    "ppo": lambda: ppo(),
    "ppo_packed": lambda: ppo(packed_rows=2),
    "grpo": lambda: ppo(advantage=GroupNormalised(), **GROUP),
    "rloo": lambda: ppo(advantage=LeaveOneOut(), **GROUP),
    "rloo_packed": lambda: ppo(advantage=LeaveOneOut(), packed_rows=1, **GROUP),
    "gspo": lambda: ppo(advantage=GroupNormalised(), **GSPO, **GROUP),
    "gspo_packed": lambda: ppo(advantage=GroupNormalised(), packed_rows=1, **GSPO, **GROUP),
    "remax": lambda: ppo(advantage=GreedyBaseline(), objective=NoRatio(), **SUMS, answers_per_prompt=3),
    "clip_cov": lambda: ppo(advantage=GroupNormalised(), clip_cov=ClipCov(0.3, 0.0, 9.0), **GROUP),
    "reinforce": lambda: ppo(advantage=MovingBaseline(), objective=NoRatio(), **SUMS, answers_per_prompt=2),
    "dpo": dpo,
    "dpo_packed": lambda: dpo(packed_rows=1),
    "dpo_policy": lambda: dpo(answers="policy", answers_per_prompt=3),
    "encoder_decoder": encoder_decoder,
    "adapted": lambda: adapted(answers_per_prompt=2),
    "adapted_packed": lambda: adapted(answers_per_prompt=2, packed_rows=2),
    "adapted_grpo": lambda: adapted(advantage=GroupNormalised(), **GROUP),
    "adapted_encoder_decoder": lambda: adapted(
        dataclasses.replace(DECODER, num_layers=1), encoder_decoder=True, advantage=LeaveOneOut(), **GROUP
    ),
    "grpo_oversampled": lambda: dataclasses.replace(
        ppo(advantage=GroupNormalised(), packed_rows=1, **GROUP), oversample=2
    ),
    "adversarial": adversarial,
    "adversarial_packed": lambda: adversarial(packed_rows=2),
}
PROOFS = [
    *("gspo", "gspo_packed", "remax", "clip_cov"),
    *("grpo_oversampled", "rloo", "rloo_packed", "dpo", "dpo_packed", "encoder_decoder", "adversarial"),
    *("adapted", "adapted_packed", "adapted_encoder_decoder"),
]
