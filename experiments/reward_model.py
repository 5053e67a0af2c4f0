"""A reward model learns from people's or judges' comparisons of answers.

    python -m experiments.reward_model --model FOLDER --feedback pairs.jsonl --fit.updates 500

The files are Anthropic's HH, pairs and ratings as distilabel, TRL, UltraFeedback (binarised) and HelpSteer2 have them,
OpenAssistant's trees, exports of Argilla and label-studio, or feedback stores: see `rlaif_jax.recipes.reward_model`. The
model is written to OUT/model for `load_reward_model` and for transformers' AutoModelForSequenceClassification.

Expected: see experiments/RESULTS.md.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take seconds
    from rlaif_jax.progress.startup import Loading

    loading = Loading()

from rlaif_jax.command_line import command_line
from rlaif_jax.recipes.reward_model import RewardModelConfig, main


def get_config() -> RewardModelConfig:
    """Returns the default settings."""
    return RewardModelConfig()


if __name__ == "__main__":
    command_line(main, get_config(), __doc__, loading=loading)
