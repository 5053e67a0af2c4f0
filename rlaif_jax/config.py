"""Settings: frozen dataclasses, the only schema. A config names a function or another dataclass, never a string key."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any, Literal


class CheckFailed(RuntimeError):
    """The run contradicts what must hold of any correct run; its numbers would mean nothing."""


class UserError(ValueError):
    """Input that a person can mend: the message says what is wrong, where, and what would be right."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def check_choices(config: Any, name: str) -> None:
    """UserError when a field whose type is a Literal holds another value; `name` is how messages call the config."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        choices = typing.get_args(hints[field.name])
        if typing.get_origin(hints[field.name]) is Literal and getattr(config, field.name) not in choices:
            named = ", ".join(map(str, choices))
            raise UserError(f"{name}.{field.name} is {getattr(config, field.name)!r}; it is one of {named}")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pretraining context.

    `linear` divides every frequency by `factor` (Chen et al. 2023); `llama3` divides only the long wavelengths
    and blends between (Llama 3.1 model card, `original_context` tokens).
    """

    kind: Literal["linear", "llama3"] = "linear"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        check_choices(self, "rope_scaling")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a causal decoder: GPT-2, Llama, Qwen2 and Qwen3 differ only in these flags.

    `mlp="swiglu"` has a gate matrix; `mlp="gelu"` is GPT-2's two-layer perceptron with the tanh approximation.
    `attention` names who computes it over whole sequences (`models/attention.py`); "auto" is the backend's fused kernel
    where there is one for this shape.
    """

    vocab_size: int
    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    context_length: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    positions: Literal["rope", "learned"] = "rope"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = True
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"

    def __post_init__(self) -> None:
        check_choices(self, "DecoderConfig")
        for field in ("num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "context_length"):
            require(getattr(self, field) >= 1, f"DecoderConfig: {field} must be >= 1, not {getattr(self, field)}")
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"DecoderConfig: num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})",
        )
        require(
            self.positions != "rope" or self.head_dim % 2 == 0,
            f"DecoderConfig: head_dim ({self.head_dim}) must be even with rotary positions",
        )


def small_decoder(
    vocab_size: int,
    *,
    num_layers: int = 3,
    width: int = 96,
    num_heads: int = 6,
    num_kv_heads: int | None = None,
    context_length: int = 128,
    mlp_width: int | None = None,
    **flags: Any,
) -> DecoderConfig:
    """A Llama-shaped decoder of the given size, heads of width/num_heads, SwiGLU of about 8/3 width."""
    return DecoderConfig(
        vocab_size=vocab_size,
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads or num_heads,
        head_dim=width // max(num_heads, 1),
        mlp_width=mlp_width or (8 * width // 3 + 7) // 8 * 8,
        context_length=context_length,
        **flags,
    )


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How answers are drawn. `temperature=0` is greedy. `top_k=0` and `top_p=1` leave the full vocabulary."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, f"sampling.max_new_tokens must be >= 1, not {self.max_new_tokens}")
        require(self.temperature >= 0, f"sampling.temperature must be >= 0, not {self.temperature}")
        require(self.top_k >= 0, f"sampling.top_k must be >= 0 (0 = off), not {self.top_k}")
        require(0 < self.top_p <= 1, f"sampling.top_p must lie in (0, 1], not {self.top_p}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up, then constant or linear to zero over the updates of the run (N+ details, Huang 2024)."""

    learning_rate: float = 3e-6
    schedule: Literal["linear", "constant", "cosine"] = "linear"
    warmup_updates: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        check_choices(self, "optimizer")
        require(self.learning_rate > 0, f"optimizer.learning_rate must be > 0, not {self.learning_rate}")


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimisation for language models (Schulman 2017; Stiennon 2020; N+ details, Huang 2024).

    advantage: `gae` needs a value model; `group` normalises the scores of the K answers to one prompt (GRPO,
      Shao 2024) and needs K >= 2 and no value model.
    kl_in: where the KL to the reference policy enters: the per-token `reward`, or the `loss` (k3 value with the
      gradient of k2), never both.
    behaviour: whose log-probs the ratio is measured against: `recompute` scores the answers once more with the
      trainer's forward pass, `sampler` takes what the sampler reported; the gap between the two is logged always.
      With `recompute` a token counts by its importance weight min(trainer's / sampler's probability, `importance_cap`),
      which is 1 up to rounding where both compute alike; with `sampler` the ratio itself corrects.
    packed_rows: 0 computes the sequences of a minibatch side by side, padded to one length. Else every device packs its
      answers into rows of prompt_length + max_new_tokens - 1 columns and adds up the gradient over so many rows at a
      time: the same gradient with less work where lengths are uneven, and in the memory of so many rows.
    missing_eos: what an answer cut by the length limit gets: its `score`, its score minus `missing_eos_value`
      (`penalty`), or the constant `missing_eos_value` instead of its score (`constant`).
    A cut answer is treated like a finished one in its last value: no bootstrap (V = 0 after the last token).
    kl_target: when set, the KL coefficient follows Ziegler 2019's controller with `kl_horizon` in sequences.
    """

    advantage: Literal["gae", "group"] = "gae"
    num_epochs: int = 4
    num_minibatches: int = 1
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    whiten_advantages: bool = True
    kl_in: Literal["reward", "loss"] = "reward"
    kl_coef: float = 0.05
    kl_target: float | None = None
    kl_horizon: float = 10_000.0
    behaviour: Literal["recompute", "sampler"] = "recompute"
    importance_cap: float = 2.0
    packed_rows: int = 0
    missing_eos: Literal["score", "penalty", "constant"] = "score"
    missing_eos_value: float = 1.0
    policy_optimizer: OptimizerConfig = OptimizerConfig()
    value_optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self) -> None:
        check_choices(self, "ppo")
        for field in ("num_epochs", "num_minibatches"):
            require(getattr(self, field) >= 1, f"ppo.{field} must be >= 1, not {getattr(self, field)}")
        require(0 <= self.gae_lambda <= 1, f"ppo.gae_lambda must lie in [0, 1], not {self.gae_lambda}")
        require(0 < self.gamma <= 1, f"ppo.gamma must lie in (0, 1], not {self.gamma}")
        require(
            self.advantage != "group" or self.kl_in == "loss" or self.kl_coef == 0,
            "ppo.kl_in='reward' has no place with ppo.advantage='group', whose advantages are of whole answers: "
            "set ppo.kl_in='loss', or ppo.kl_coef=0",
        )
        for field in ("kl_target", "kl_horizon"):
            value = getattr(self, field)
            require(value is None or value > 0, f"ppo.{field} must be > 0, not {value}")
        require(self.importance_cap >= 1, f"ppo.importance_cap must be >= 1, not {self.importance_cap}")
        require(self.packed_rows >= 0, f"ppo.packed_rows must be >= 0 (0: not packed), not {self.packed_rows}")
        require(self.clip_range > 0, f"ppo.clip_range must be > 0, not {self.clip_range}")
        require(self.kl_coef >= 0, f"ppo.kl_coef must be >= 0, not {self.kl_coef}")


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How the devices are used.

    `pmap`: every device holds the whole state and a share of the batch (all local devices).
    `shard`: a mesh of data x fsdp x tensor devices; parameters are split over fsdp and tensor. `data=0` takes what
    fsdp and tensor leave.
    """

    mode: Literal["pmap", "shard"] = "pmap"
    data: int = 0
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        check_choices(self, "parallel")
        require(
            self.data >= 0 and self.fsdp >= 1 and self.tensor >= 1, "parallel: data must be >= 0, fsdp and tensor >= 1"
        )
        require(
            self.mode == "shard" or (self.data, self.fsdp, self.tensor) == (0, 1, 1),
            "parallel.data, fsdp and tensor shape a mesh: set parallel.mode='shard' with them",
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop: how many steps, of what size, and how often it looks up.

    One step rolls out `prompts_per_step` x `answers_per_prompt` sequences (over all devices) and updates the policy
    `ppo.num_epochs` x `ppo.num_minibatches` times on them. Training ends early at `target_reward` (mean reward of a
    step) when it is set. With `rollout_parts` a step's prompts are rolled out in so many parts, and a feedback source
    that can `prefetch` (a judge behind an API) judges each while the next ones are generated; the answers are the same.
    `decode_slots` answers are decoded at a time on each device, and whenever some have ended the next ones take their
    places: faster where answers are many and of uneven length, and the same answers up to rounding. 0: all at once.
    With `staleness` 1 a step's answers are drawn by the policy of one update before, so that the devices generate while
    feedback for the step before is waited for; the loss is then the decoupled one (`ppo.importance_cap`). 0: never stale.
    """

    steps: int = 100
    prompts_per_step: int = 64
    answers_per_prompt: int = 1
    rollout_parts: int = 1
    decode_slots: int = 0
    staleness: int = 0
    prompt_length: int = 64
    sampling: SamplingConfig = SamplingConfig()
    ppo: PPOConfig = PPOConfig()
    parallel: ParallelConfig = ParallelConfig()
    eval_every: int = 20
    save_every: int = 20
    keep_checkpoints: int = 2
    target_reward: float | None = None

    def __post_init__(self) -> None:
        for field in ("steps", "prompts_per_step", "answers_per_prompt", "prompt_length", "rollout_parts"):
            require(getattr(self, field) >= 1, f"train.{field} must be >= 1, not {getattr(self, field)}")
        for field in ("eval_every", "save_every", "keep_checkpoints"):
            require(getattr(self, field) >= 1, f"train.{field} must be >= 1, not {getattr(self, field)}")
        require(self.decode_slots >= 0, f"train.decode_slots must be >= 0 (0: all at once), not {self.decode_slots}")
        require(self.staleness in (0, 1), f"train.staleness must be 0 or 1 (one step off-policy), not {self.staleness}")
        require(
            not self.staleness or self.ppo.behaviour == "recompute",
            "train.staleness=1 corrects for the older policy by importance weights and needs the current one's "
            "log-probs beside the sampler's: set ppo.behaviour='recompute'",
        )
        require(
            self.ppo.advantage != "group" or self.answers_per_prompt >= 2,
            "train.answers_per_prompt is 1, but ppo.advantage='group' compares the answers to one prompt: "
            "set answers_per_prompt to 2 or more, or ppo.advantage='gae'",
        )
        require(
            self.prompts_per_step % self.rollout_parts == 0,
            f"train.rollout_parts ({self.rollout_parts}) must divide train.prompts_per_step ({self.prompts_per_step})",
        )
        sequences = self.prompts_per_step * self.answers_per_prompt
        require(
            sequences % self.ppo.num_minibatches == 0,
            f"ppo.num_minibatches ({self.ppo.num_minibatches}) must divide the {sequences} sequences of a step "
            f"(prompts_per_step x answers_per_prompt)",
        )


def to_json(config: Any) -> dict[str, Any]:
    """The complete settings as plain JSON types."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_json(cls: type, values: dict[str, Any], where: str = "config.json") -> Any:
    """Rebuild a config dataclass from `to_json`'s output; unknown or missing fields are named."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    require(not unknown, f"{where}: {cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(fields)}")
    built = {}
    for name, value in values.items():
        nested = [t for t in (hints[name], *typing.get_args(hints[name])) if dataclasses.is_dataclass(t)]
        if nested and isinstance(value, dict):
            value = from_json(nested[0], value, f"{where}: {name}")  # type: ignore[arg-type]
        elif isinstance(value, list):
            value = tuple(value)
        built[name] = value
    missing = [
        n
        for n, f in fields.items()
        if n not in built and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    require(not missing, f"{where}: {cls.__name__} misses {', '.join(missing)}")
    return cls(**built)


def differing(saved: Any, now: Any, prefix: str = "") -> list[str]:
    """The dotted names of settings that differ between two nested dicts, with both values."""
    if isinstance(saved, dict) and isinstance(now, dict):
        found = []
        for name in sorted(set(saved) | set(now)):
            found += differing(saved.get(name), now.get(name), f"{prefix}{name}.")
        return found
    return [] if saved == now else [f"{prefix[:-1]} was {saved!r} and is now {now!r}"]


def save_config(config: Any, path: Path) -> None:
    """Write `config` as indented JSON."""
    path.write_text(json.dumps(to_json(config), indent=1) + "\n")
