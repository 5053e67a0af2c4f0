"""The tool `python -m rlaif_jax export`: the policy of a run, or an adapter, as a model's folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from rlaif_jax.config import require
from rlaif_jax.data.hub import base_of
from rlaif_jax.models.hf.adapters import save_adapter
from rlaif_jax.models.hf.files import load_with_tokenizer, save_model
from rlaif_jax.tools.runs import load_run_policy


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """All settings.

    Attributes:
        run: the folder of a run, which may be going on, or of an adapter as peft writes it.
        out: the folder to write; an older export there is replaced.
        step: of the checkpoint; None: the newest.
        adapter: write the adapter alone, in peft's format, instead of the model with the adapter merged.
    """

    run: tyro.conf.Positional[str] = ""
    out: Path | None = None
    step: int | None = None
    adapter: bool = False


def help_text() -> str:
    """Returns the description of --help: what the tool does, and examples."""
    return (
        "Writes the policy of a run's checkpoint as a folder that transformers reads, or its LoRA adapter for peft. An\n"
        "adapter's folder is written as its base model with the adapter merged.\n\n"
        "  python -m rlaif_jax export runs/rlaif --out models/mine\n"
        "  python -m rlaif_jax export runs/rlaif --out models/mine-adapter --adapter --step 80\n"
        "  python -m rlaif_jax export models/mine-adapter --out models/merged"
    )


def main(config: ExportConfig) -> None:
    """Writes the folder.

    Raises:
        UserError: no folder is named, the run's policy or the adapter cannot be read, the run has no adapter, or the folder
            cannot be written.
    """
    require(bool(config.run), "no run to export: give the folder of a run or of an adapter")
    require(config.out is not None, "no folder to write to: give --out")
    assert config.out is not None
    if (base := base_of(Path(config.run))) is not None:
        require(config.step is None, f"{config.run} is an adapter's folder: --step chooses a checkpoint of a run")
        require(not config.adapter, f"{config.run} is an adapter's folder: leave --adapter out")
        _require_other(config.out, base)
        save_model(config.out, *load_with_tokenizer(config.run))
        print(f"{config.out}: {base} with the adapter {config.run}")
        return
    policy = load_run_policy(Path(config.run), config.step)
    if policy.adapter is not None:
        _require_other(config.out, policy.adapter.base_name)
    if config.adapter:
        own = Path(config.run) / "adapter"
        if own.is_dir() and policy.step is None:
            merged = f"it has no checkpoint, and its adapter is already written to {own}"
        elif policy.step is None:
            merged = "it has no checkpoint any more, and its folder model has no adapter apart"
        else:
            merged = "this run trained all weights and has no adapter"
        require(policy.adapter is not None, f"{config.run}: {merged}: leave --adapter out")
        assert policy.adapter is not None
        lora, params, base = policy.adapter.lora, policy.adapter.params, policy.adapter.base_name
        save_adapter(config.out, policy.model, lora, params, base_name=base)
    else:
        save_model(config.out, policy.model, policy.params, policy.tokenizer)
    what = "the adapter" if config.adapter else "the policy"
    of = "its folder model" if policy.step is None else f"step {policy.step}"
    print(f"{config.out}: {what} of {config.run}, {of}")


def _require_other(out: Path, base: str) -> None:
    """Raises UserError where the folder to write is that of the model under the adapter."""
    require(
        out.resolve() != Path(base).resolve(),
        f"{out} is the model under the adapter, which cannot be read without it: name another folder",
    )
