"""Writes TRL's losses of policy gradients, and their slopes, for random log-probs: `policy_gradients.json` next to this file.

    pip install trl==1.16.0 torch            # in an environment of its own
    python tests/oracles/trl_policy_gradients.py

`tests/algorithms/test_against_trl.py` compares this package with them. TRL's own `_compute_loss` runs, on a trainer without a
model: its log-probs are given.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import trl
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

B, T = 6, 5
LENGTHS = (5, 1, 3, 4, 2, 5)
GRPO: dict[str, dict[str, Any]] = {
    "grpo": {},
    "grpo, clip-higher": {"epsilon_high": 0.28},
    "grpo, two-sided clip": {"delta": 1.5},
    "grpo, kl": {"beta": 0.3},
    "bnpo": {"loss_type": "bnpo", "beta": 0.3},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
    "sapo": {"loss_type": "sapo"},
    "gspo": {"importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.08},
    "gspo, kl": {"importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.08, "beta": 0.3},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.08},
    "token_truncate": {"mode": "token_truncate", "clip_max": 1.2},
    "token_mask": {"mode": "token_mask", "clip_min": 0.8, "clip_max": 1.2},
    "sequence_truncate": {"mode": "sequence_truncate", "clip_max": 1.2},
    "sequence_mask": {"mode": "sequence_mask", "clip_min": 0.8, "clip_max": 1.2},
    "gspo, sequence_truncate": {"mode": "sequence_truncate", "clip_max": 1.2, "importance_sampling_level": "sequence"},
}
RLOO: dict[str, dict[str, Any]] = {"rloo": {}, "rloo, clip-higher": {"epsilon_high": 0.5}}


def trainer(logprobs: torch.Tensor, **settings: Any) -> SimpleNamespace:
    """Returns what `_compute_loss` reads of a trainer."""
    given = {
        "loss_type": "grpo", "epsilon_low": 0.2, "epsilon_high": settings.get("epsilon_low", 0.2), "beta": 0.0,
        "importance_sampling_level": "token", "delta": None,
    } | settings  # fmt: skip
    args = SimpleNamespace(
        delta=given.pop("delta"), use_bias_correction_kl=False, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05
    )
    accelerator = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1)
    return SimpleNamespace(
        **given,
        args=args,
        accelerator=accelerator,
        model=SimpleNamespace(training=False),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        max_completion_length=T,
        use_vllm="mode" in settings,
        vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=False,
        _metrics={"eval": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros(B, T), None),
    )


def ratios(data: dict[str, torch.Tensor], mode: str, clip_max: float, clip_min: float | None = None) -> torch.Tensor:
    """Returns TRL's importance weights by its mode (`_generate_and_score_completions`)."""
    difference = (data["old"] - data["sampler"]) * data["mask"]
    if mode.startswith("sequence"):
        difference = difference.sum(-1, keepdim=True)
    ratio = torch.exp(difference)
    if mode.endswith("truncate"):
        return torch.clamp(ratio, min=clip_min, max=clip_max)
    return ratio.masked_fill((ratio < (clip_min or 0.0)) | (ratio > clip_max), 0.0)


def main() -> None:
    """Writes the file."""
    rng = np.random.default_rng(0)
    mask = torch.tensor(np.arange(T) < np.array(LENGTHS)[:, None], dtype=torch.float64)
    new = torch.tensor(rng.normal(-2, 0.5, (B, T)))
    data = {"new": new, "mask": mask} | {
        name: new + torch.tensor(rng.normal(0, size, (B, T)))
        for name, size in (("old", 0.5), ("reference", 0.5), ("sampler", 0.5))
    }
    data["advantages"] = torch.tensor(rng.normal(0, 1, B))
    ids = torch.zeros(B, T, dtype=torch.long)
    shared = {
        "prompt_ids": ids[:, :0], "prompt_mask": ids[:, :0], "completion_ids": ids, "completion_mask": mask,
        "advantages": data["advantages"], "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    cases = {}
    for kind, named in ((GRPOTrainer, GRPO), (RLOOTrainer, RLOO)):
        for name, settings in named.items():
            logprobs = new.clone().requires_grad_()
            own = {key: value for key, value in settings.items() if key not in ("clip_max", "clip_min")}
            inputs = shared | {"old_per_token_logps": data["old"], "ref_per_token_logps": data["reference"]}
            inputs["old_logps"] = (data["old"] * mask).sum(1)
            if "mode" in settings:
                limits = {key: settings[key] for key in ("clip_max", "clip_min") if key in settings}
                inputs["importance_sampling_ratio"] = ratios(data, settings["mode"], **limits)
            loss = kind._compute_loss(trainer(logprobs, **own), None, inputs)
            loss.backward()
            assert logprobs.grad is not None
            cases[name] = {"loss": loss.item(), "slopes": (logprobs.grad * mask).tolist()}
    content = {
        "versions": {"trl": trl.__version__, "torch": torch.__version__},
        "data": {name: value.tolist() for name, value in data.items()},
        "cases": cases,
    }
    Path(__file__).with_name("policy_gradients.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
