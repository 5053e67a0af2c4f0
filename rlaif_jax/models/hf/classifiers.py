"""Reward models in and out of Hugging Face folders: transformers' classifiers with one label.

`LlamaForSequenceClassification` and its kin read the score, `score.weight` [1, D], at the last token that is no padding.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from rlaif_jax.config import UserError, require
from rlaif_jax.data.special_tokens import declared_ids, token_name
from rlaif_jax.data.tokenizers import HuggingFaceTokenizer, Tokenizer, check_tokenizer, load_tokenizer
from rlaif_jax.models.heads import ScalarModel
from rlaif_jax.models.hf.families import read_config, write_config
from rlaif_jax.models.hf.files import check_shapes, download_model, special_ids, write_folder
from rlaif_jax.models.hf.weights import read_weights
from rlaif_jax.types import Params

CLASSIFIER = "ForSequenceClassification"
OWN_PADDING = "<|reward_padding|>"


def load_reward_model(
    folder_or_hub_id: str | Path, *, compute_dtype: Literal["float32", "bfloat16"] = "float32", remat: bool = False
) -> tuple[ScalarModel, Params, Tokenizer]:
    """Reads a reward model, a classifier of one label, from a Hugging Face folder or a hub id.

    Its trunk is of a family that `load_model` reads.

    Args:
        folder_or_hub_id: a folder, or the name of a repository.
        compute_dtype: of activations.
        remat: recompute blocks in the backward pass.

    Returns:
        (the model, its float32 parameters, its tokenizer).

    Raises:
        UserError: the folder holds no classifier of one label, or something is missing, damaged or not supported; the
            message names file and field.
    """
    folder = Path(folder_or_hub_id)
    folder = folder if folder.exists() else download_model(str(folder_or_hub_id))
    config = read_config(folder / "config.json")
    _check_one_label(folder / "config.json")
    model = ScalarModel(dataclasses.replace(config, compute_dtype=compute_dtype, remat=remat), "normal", bias=False)
    flat = read_weights(folder, config, scalar_shapes(model))
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, config.vocab_size, str(folder))
    if set(declared_ids(folder, "pad")) & set(tokenizer.stop_ids):
        print(
            f"warning: {folder} takes its stop token for padding: transformers reads its score one token before the stop "
            "token, rlaif_jax at it",
            file=sys.stderr,
        )
    return model, unflatten_dict({name: jnp.array(flat.pop(name)) for name in list(flat)}, sep="/"), tokenizer


def load_ensemble(
    folder_or_hub_id: str | Path, *, compute_dtype: Literal["float32", "bfloat16"] = "float32"
) -> tuple[ScalarModel, Params, Tokenizer]:
    """Reads the members of a reward model: all that a run wrote, or the one of a folder or hub id.

    Args:
        folder_or_hub_id: the folder of a run, which holds `model`, or model_0, model_1 ... of several members; a folder
            of one reward model; or the name of a repository.
        compute_dtype: of activations.

    Returns:
        (the model, host arrays of its N members' float32 parameters, each with a first axis N, their tokenizer).

    Raises:
        UserError: a member is missing, cannot be read, or has another shape or tokenizer than the first.
    """
    folders: list[str | Path] = [*_members(Path(folder_or_hub_id))] or [folder_or_hub_id]
    model, params, tokenizer = load_reward_model(folders[0], compute_dtype=compute_dtype)
    members = [jax.device_get(params)]
    for folder in folders[1:]:
        another, params, its_tokenizer = load_reward_model(folder, compute_dtype=compute_dtype)
        require(another == model, f"{folder}: this member of the ensemble has another shape than {folders[0]}")
        require(
            _how_it_reads(its_tokenizer) == _how_it_reads(tokenizer),
            f"{folder}: this member of the ensemble has another tokenizer or chat template than {folders[0]}",
        )
        members.append(jax.device_get(params))
    return model, jax.tree.map(lambda *arrays: np.stack(arrays), *members), tokenizer


def _members(run: Path) -> list[Path]:
    """Returns the folders of the members that a run wrote; none where the folder is no run's."""
    numbers = sorted(int(path.name[6:]) for path in run.glob("model_*") if re.fullmatch(r"model_\d+", path.name))
    if (run / "model").is_dir():
        require(not numbers, f"{run}: it holds `model` and `model_{numbers[0] if numbers else 0}`; name one of them")
        return [run / "model"]
    require(
        numbers == list(range(len(numbers))),
        f"{run}: an ensemble of reward models is model_0, model_1 ...; here are {', '.join(f'model_{k}' for k in numbers)}",
    )
    return [run / f"model_{k}" for k in numbers]


def _how_it_reads(tokenizer: Tokenizer) -> tuple[Any, ...]:
    """Returns what two tokenizers have in common that make the same tokens of a conversation."""
    template = tokenizer.settings.get("chat_template") if isinstance(tokenizer, HuggingFaceTokenizer) else None
    return tokenizer.fingerprint, tokenizer.bos_id, tokenizer.stop_ids, tokenizer.pad_id, template


def _check_one_label(path: Path) -> None:
    """Raises UserError unless config.json is of a classifier with one label."""
    values = json.loads(path.read_text(encoding="utf-8"))
    names = values.get("architectures") or []
    require(
        any(str(name).endswith(CLASSIFIER) for name in names),
        f"{path}: a reward model is a ...{CLASSIFIER} of transformers, not {', '.join(map(str, names)) or 'unnamed'}: "
        "train one with `python -m rlaif_jax reward-model`",
    )
    labels = values.get("num_labels") or len(values.get("id2label") or {0: "", 1: ""})
    require(labels == 1, f"{path}: this classifier has {labels} labels; a reward model has one")


def save_reward_model(folder: str | Path, model: ScalarModel, params: Params, tokenizer: Tokenizer) -> None:
    """Writes a folder that `load_reward_model` and transformers' AutoModelForSequenceClassification read.

    Transformers takes each token with the id of padding for padding. Where the policy's padding is its stop token, the
    folder's tokenizer therefore pads with another token.

    Args:
        folder: the folder to make or to replace.
        model: the reward model, whose head has no bias.
        params: its parameters.
        tokenizer: of the policy whose answers the model scores.

    Raises:
        UserError: no Hugging Face architecture has these flags, the head has a bias, the tokenizer knows more ids than the
            model, or the folder cannot be written.
    """
    require(
        not model.bias, "save_reward_model: Hugging Face's classifiers have no bias: make the model with bias=False"
    )
    flat = flatten_dict(params, sep="/")
    check_shapes("save_reward_model", flat, scalar_shapes(model))
    special_ids(tokenizer, model.config.vocab_size)  # checks the policy's own ids
    tokenizer = _padded_apart(tokenizer)
    config = dataclasses.replace(model.config, vocab_size=max(model.config.vocab_size, tokenizer.vocab_size))
    embedding = "trunk/embed/embedding"
    if missing := config.vocab_size - model.config.vocab_size:
        flat[embedding] = jnp.pad(jnp.asarray(flat[embedding]), ((0, missing), (0, 0)))
    values = write_config(config, special_ids(tokenizer, config.vocab_size))
    kind = str(values["architectures"][0]).removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    labels = {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    write_folder(folder, {**values, "architectures": [kind + CLASSIFIER], **labels}, config, flat, tokenizer)


def scalar_shapes(model: ScalarModel) -> dict[str, tuple[int, ...]]:
    """Returns {path with "/": shape} of the parameters of a reward model."""
    tree = jax.eval_shape(model.init, jax.random.key(0))
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def _padded_apart(tokenizer: Tokenizer) -> Tokenizer:
    """Returns the same tokenizer with a padding token that ends no answer.

    That is <unk>, where it is a special token, or a new token.
    """
    if tokenizer.pad_id not in tokenizer.stop_ids:
        return tokenizer
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise UserError("save_reward_model: the padding of this tokenizer is its stop token")
    name = token_name(tokenizer.settings.get("unk_token"))
    special = {token.content: i for i, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    backend: Any = tokenizer.backend
    if name is None or special.get(name) is None or special[name] in (tokenizer.bos_id, *tokenizer.stop_ids):
        name = OWN_PADDING
        backend = Backend.from_str(tokenizer.backend.to_str())
        backend.add_special_tokens([AddedToken(name, normalized=False, special=True)])
    settings = {**tokenizer.settings, "pad_token": name}
    return dataclasses.replace(tokenizer, backend=backend, pad_id=backend.token_to_id(name), settings=settings)
