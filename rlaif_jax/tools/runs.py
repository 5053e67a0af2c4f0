"""The policy of a run's folder, read from a checkpoint without the training around it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax

from rlaif_jax.checkpoint import fingerprint, load_policy_params, saved_steps
from rlaif_jax.config import UserError, from_json, require
from rlaif_jax.data.chat.config import ChatConfig
from rlaif_jax.data.tokenizers import Tokenizer
from rlaif_jax.models import CausalLM
from rlaif_jax.models.hf.files import load_with_tokenizer
from rlaif_jax.models.lora import LoRAConfig
from rlaif_jax.recipes.world.models import ModelsConfig, world_model, world_tokenizer
from rlaif_jax.types import Params

T = TypeVar("T")
Dtype = Literal["float32", "bfloat16"]
WEIGHTS = "the policy to start from"  # what the loop calls the weights whose fingerprint its checkpoints hold


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """A policy that is an adapter over a model that did not learn.

    Attributes:
        lora: its settings.
        params: its parameters.
        base_name: the model under it, as the run's settings name it.
    """

    lora: LoRAConfig
    params: Params
    base_name: str


@dataclasses.dataclass(frozen=True, eq=False)
class RunPolicy:
    """The policy of a run.

    Attributes:
        model: the model.
        params: its parameters, an adapter merged.
        tokenizer: its tokenizer.
        step: of its checkpoint; None where the run has none and left the folder `model`.
        adapter: the adapter; None where all weights learned.
        bos: whether BOS goes before a prompt without a chat template; None: as for a user's own prompts.
    """

    model: CausalLM
    params: Params
    tokenizer: Tokenizer
    step: int | None
    adapter: Adapter | None = None
    bos: bool | None = None


def is_run(folder: Path) -> bool:
    """Returns whether a path is the folder of a run, rather than that of a model."""
    inside = (folder / "checkpoints", folder / "summary.json", folder / "metrics.jsonl")
    return (folder / "config.json").is_file() and any(path.exists() for path in inside)


def run_settings(folder: Path) -> dict[str, Any]:
    """Returns the settings of a run.

    Args:
        folder: the run's folder.

    Raises:
        UserError: there is no such folder, it is not a run's, or its config.json is damaged.
    """
    require(folder.is_dir(), f"{folder}: there is no such folder; give the folder of a run")
    require(is_run(folder), f"{folder} is not the folder of a run, which holds config.json and checkpoints")
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    require(isinstance(settings, dict), f"{path}: a run's settings are one JSON object")
    return settings


def load_run_policy(folder: Path, step: int | None = None, *, dtype: Dtype = "float32") -> RunPolicy:
    """Reads the policy of a run's checkpoint, or of its folder `model` where the run has no checkpoint.

    Args:
        folder: the run's folder; the run may be going on.
        step: of the checkpoint; None: the newest.
        dtype: of activations.

    Raises:
        UserError: not a run, no checkpoint of that step, a damaged one, or a run whose policy cannot be rebuilt: its model
            is not found, has changed since, or is that of an experiment that only its script knows.
    """
    settings = run_settings(folder)
    checkpoints = folder / "checkpoints"
    steps = saved_steps(checkpoints)
    if not steps:
        require(step is None, f"{folder}: there is no checkpoint of step {step}: this run has no checkpoint")
        require(
            (folder / "model").is_dir(),
            f"{folder}: this run has no checkpoint yet, and no folder model: wait for its first one (train.save_every)",
        )
        return RunPolicy(*_own_model(folder, dtype), None)
    chosen = steps[-1] if step is None else step
    listed = ", ".join(map(str, steps))
    require(
        chosen in steps, f"{folder}: there is no checkpoint of step {chosen}; those that are left are of step {listed}"
    )
    if isinstance(settings.get("models"), Mapping):
        size = _settings_of(ModelsConfig, folder, settings["models"], "models")
        words = world_tokenizer()
        model = world_model(size, words)
        params = load_policy_params(checkpoints, chosen, _template(model)).arrays
        return RunPolicy(model, params, words, chosen, bos=False)
    lora = _lora(folder, settings)
    name = settings.get("policy") or settings.get("model")
    chat = _settings_of(ChatConfig, folder, settings.get("chat") or {}, "chat")
    model, base, tokenizer = _began_with(folder, name, settings.get("tokenizer"), chat, dtype, whole=lora is None)
    if lora is None:
        del base  # the checkpoint has all weights
        return RunPolicy(model, load_policy_params(checkpoints, chosen, _template(model)).arrays, tokenizer, chosen)
    like = jax.eval_shape(lora.init, jax.random.key(0), base)
    saved = load_policy_params(checkpoints, chosen, like)
    known = saved.host.get("weights")
    then = known.get(WEIGHTS) if isinstance(known, Mapping) else None
    require(
        then in (None, fingerprint(base)),
        f"{folder}: the adapter was trained on other weights than those that are at {name} now: they have changed since",
    )
    adapter = Adapter(lora, saved.arrays, str(name))
    return RunPolicy(model, lora.merge(base, saved.arrays), tokenizer, chosen, adapter)


def _template(model: CausalLM) -> Params:
    return jax.eval_shape(model.init, jax.random.key(0))


def _lora(folder: Path, settings: Mapping[str, Any]) -> LoRAConfig | None:
    return (
        _settings_of(LoRAConfig, folder, settings.get("adapter"), "adapter") if settings.get("lora") is True else None
    )


def _settings_of(kind: type[T], folder: Path, values: Any, name: str) -> T:
    """Returns a part of a run's settings.

    Args:
        kind: its dataclass.
        folder: the run's folder.
        values: the part, as JSON values.
        name: of the part.

    Raises:
        UserError: the part is of another version, or damaged.
    """
    try:
        return from_json(kind, values, name)
    except UserError as error:  # a check of the settings themselves does not know the file
        raise UserError(f"{folder / 'config.json'}: {error}") from error


def _own_model(folder: Path, dtype: Dtype) -> tuple[CausalLM, Params, Tokenizer]:
    """Reads what a run wrote at its end. Raises UserError where it is not a language model."""
    path = folder / "model" / "config.json"
    try:
        kinds = json.loads(path.read_text(encoding="utf-8")).get("architectures") or []
    except (OSError, ValueError, AttributeError):
        kinds = []  # load_with_tokenizer says what is wrong with it
    classifier = next((kind for kind in kinds if "Classification" in str(kind)), None)
    require(
        classifier is None,
        f"{folder}: this run trained a reward model ({classifier}), which writes no answers; its folder is {path.parent}",
    )
    return load_with_tokenizer(str(path.parent), compute_dtype=dtype)


def _began_with(
    folder: Path, name: Any, tokenizer: Any, chat: ChatConfig, dtype: Dtype, *, whole: bool
) -> tuple[CausalLM, Params, Tokenizer]:
    """Reads the model that a run began with.

    Args:
        folder: the run's folder.
        name: of the model in the run's settings; None where they have none.
        tokenizer: the file or folder of the tokenizer in the run's settings, or None.
        chat: the chat template and its variables in the run's settings.
        dtype: of activations.
        whole: whether all weights learned, so that the folder `model` of the run has the same shape and tokenizer.
    """
    require(
        tokenizer is None or isinstance(tokenizer, str),
        f"{folder / 'config.json'}: tokenizer should be a path or null, not {tokenizer!r}",
    )
    left = whole and (folder / "model").is_dir()
    if not isinstance(name, str):
        require(
            left,
            f"{folder}: its config.json names no model (policy, model or models), and it left no folder model: only the "
            "script of this experiment can read its checkpoints",
        )
        return _own_model(folder, dtype)
    try:
        return load_with_tokenizer(name, Path(tokenizer) if tokenizer else None, chat, compute_dtype=dtype)
    except UserError as error:
        if left:
            return _own_model(folder, dtype)
        raise UserError(f"{folder}: the model that this run began with cannot be read: {error}") from error
