"""Trains your own model on your own prompts by feedback: the same as `python -m rlaif_jax train`.

python experiments/rlaif.py --policy models/smollm2 --prompts prompts.jsonl --feedback "judge models/smollm2 min_mass=0.1"
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take seconds
    from rlaif_jax.progress.startup import Loading

    loading = Loading()

from rlaif_jax.command_line import command_line, ended_worse
from rlaif_jax.recipes.rlaif import NAMED_SETTINGS, PAGES, get_config, help_text, main

if __name__ == "__main__":
    command_line(
        main,
        get_config(),
        help_text(),
        loading=loading,
        failed=ended_worse,
        pages=PAGES,
        named=NAMED_SETTINGS,
    )
