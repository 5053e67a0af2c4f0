"""What the settings allow together: every pair of values of two settings is run, or refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from rlaif_jax.algorithms.advantages import GroupNormalised, LeaveOneOut
from rlaif_jax.config import UserError
from rlaif_jax.metrics import MetricsWriter, read_metrics
from rlaif_jax.models import decoder
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import ParallelConfig
from rlaif_jax.run import Run
from rlaif_jax.train import TrainConfig, train
from tests.builders import DECODER, GROUP, LENGTH, PROMPT, TOKENIZER, adapted, adversarial, dpo, encoder_decoder, ppo
from tests.covering import covering, one_by_one

pytestmark = pytest.mark.slow

MESH = lambda *shape: ParallelConfig("shard", *shape)
SETTINGS: dict[str, dict[str, Any]] = {
    "algorithm": {
        "PPO": (ppo, {}),
        "GRPO": (ppo, {"advantage": GroupNormalised()} | GROUP),
        "RLOO": (ppo, {"advantage": LeaveOneOut()} | GROUP),
        "DPO of recorded pairs": (dpo, {}),
        "DPO of its own answers": (dpo, {"answers": "policy", "answers_per_prompt": 3}),
        "inverse RL": (adversarial, {}),
        "RLOO of an encoder-decoder": (encoder_decoder, {}),
        "PPO of adapters": (adapted, {}),
        "GRPO of adapters": (adapted, {"advantage": GroupNormalised()} | GROUP),
    },
    "layout": {
        "one device": MESH(1),
        "pmap": ParallelConfig(),
        "8x1x1": MESH(8),
        "2x4x1": MESH(2, 4),
        "1x8x1": MESH(1, 8),
        "2x2x2": MESH(2, 2, 2),
    },
    "dtype": {"float32": "float32", "bfloat16": "bfloat16"},
    "rows": {"padded": 0, "packed": 1, "packed by prompts": 3},
    "staleness": {"on-policy": 0, "a step behind": 1},
    "depth": {"one by one": 2, "deep": 0},  # more blocks than these are deep: they run in a loop where they are split
    "backward": {"kept": False, "remat": True},
    "decoding": {"all at once": 0, "slots": 4},
    "rollout": {"whole": 1, "two parts": 2},
}
REFUSED = {
    ("DPO of recorded pairs", "a step behind"): "train.staleness=1 is for policy gradients",
    ("DPO of its own answers", "a step behind"): "train.staleness=1 is for policy gradients",
    ("RLOO of an encoder-decoder", "packed"): "this policy's model reads padded rows only",
    ("RLOO of an encoder-decoder", "packed by prompts"): "this policy's model reads padded rows only",
    ("RLOO of an encoder-decoder", "remat"): "remat=False",
}


def run(case: tuple[str, ...], folder: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Trains for two steps, with all checks on, and returns their metrics."""
    chosen = {name: SETTINGS[name][value] for name, value in zip(SETTINGS, case, strict=True)}
    monkeypatch.setattr(decoder, "FLAT", chosen["depth"])
    build, options = chosen["algorithm"]
    shape = dataclasses.replace(DECODER, compute_dtype=chosen["dtype"], remat=chosen["backward"])
    sampling = SamplingConfig(max_new_tokens=LENGTH, slots=chosen["decoding"])
    setup = build(shape, sampling=sampling, packed_rows=chosen["rows"], **options)
    config = TrainConfig(
        2,
        16,
        prompt_length=PROMPT,
        rollout_parts=chosen["rollout"],
        staleness=chosen["staleness"],
        parallel=chosen["layout"],
    )
    with Run(folder, "combination", config, seed=0) as run, MetricsWriter(folder, terminal=False, sinks=()) as writer:
        final = train(
            config,
            run,
            writer,
            algorithm=setup.algorithm,
            policy=setup.policy,
            params=setup.params,
            base=setup.base,
            tokenizer=TOKENIZER,
            prompts=setup.prompts(16),
            feedback=setup.feedback,
        )["policy"]
    assert run.checks
    assert all(run.checks.values())
    moved = [
        float(np.abs(np.asarray(a) - np.asarray(b)).max())
        for a, b in zip(*map(jax.tree.leaves, (final, setup.params["policy"])))
    ]
    assert all(moved), "every weight learns"
    return read_metrics(folder / "metrics.jsonl")


CASES = covering([one_by_one(values) for values in SETTINGS.values()], REFUSED)


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_it_runs(case, tmp_path, monkeypatch):
    rows = run(case, tmp_path / "run", monkeypatch)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(np.isfinite(row["loss"]) for row in rows)


@pytest.mark.parametrize("refused", REFUSED, ids=", ".join)
def test_it_is_refused(refused, tmp_path, monkeypatch):
    """With a message that says what to set, and no folder."""
    case = tuple(next((v for v in refused if v in values), next(iter(values))) for values in SETTINGS.values())
    with pytest.raises(UserError, match=REFUSED[refused]):
        run(case, tmp_path / "run", monkeypatch)
    assert not (tmp_path / "run").exists()
