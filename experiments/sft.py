"""A language model learns from conversations, from answers to prompts, or from texts.

    python -m experiments.sft --model FOLDER --data chats.jsonl --fit.updates 500

Rows have `messages`, or `prompt` and `completion` (as TRL has them), or `text`: see `rlaif_jax.recipes.sft`. The model is
written to OUT/model, for `load_model` and for transformers.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take seconds
    from rlaif_jax.progress.startup import Loading

    loading = Loading()

from rlaif_jax.command_line import command_line
from rlaif_jax.recipes.sft import SFTConfig, main


def get_config() -> SFTConfig:
    """Returns the default settings."""
    return SFTConfig()


if __name__ == "__main__":
    command_line(main, get_config(), __doc__, loading=loading)
