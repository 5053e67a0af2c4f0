"""Models in and out of Hugging Face folders: config.json and safetensors, never pickle, never torch.

The meaning of config.json is in `families.py`, that of the tensors in `weights.py`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from rlaif_jax.config import require
from rlaif_jax.data.chat.config import ChatConfig
from rlaif_jax.data.hub import TOKENIZER_FILES, download, layers
from rlaif_jax.data.llama2c import Llama2cTokenizer
from rlaif_jax.data.special_tokens import declared_ids
from rlaif_jax.data.tokenizers import HuggingFaceTokenizer, Tokenizer, check_tokenizer, load_tokenizer
from rlaif_jax.files import it_is
from rlaif_jax.models.causal_lm import CausalLM
from rlaif_jax.models.decoder_config import DecoderConfig
from rlaif_jax.models.hf.adapters import load_adapter, read_settings
from rlaif_jax.models.hf.families import family_of, read_config, write_config
from rlaif_jax.models.hf.folders import whole_folder
from rlaif_jax.models.hf.gguf import read_gguf_model
from rlaif_jax.models.hf.llama2c import read_llama2c
from rlaif_jax.models.hf.weights import INDEX, WEIGHTS, Tensor, parameter_shapes, read_weights, tensors
from rlaif_jax.types import Params

# What `save_model` may replace when it overwrites a folder.
MODEL_FILES = re.compile(
    r"(config|generation_config|tokenizer.*|vocab|special_tokens_map|added_tokens)\.json"
    r"|model.*\.safetensors(\.index\.json)?|tokenizer\.(bin|model)|merges\.txt|chat_template\.jinja"
)
DOWNLOADED = (*TOKENIZER_FILES, "*.safetensors", INDEX)


# ------------------------------------------------------------------------------------------------------- reading


def load_model(
    folder_or_hub_id: str | Path, *, compute_dtype: Literal["float32", "bfloat16"] = "float32", remat: bool = False
) -> tuple[CausalLM, Params]:
    """Reads a language model from a Hugging Face folder, a hub id, a GGUF or a llama2.c file.

    Folders hold config.json (GPT-2, Llama, Mistral without sliding window, Qwen2, Qwen3) and model.safetensors or
    its shards. The folder of a LoRA adapter, as peft writes it, gives the base model that it names, with the adapter
    merged. Weights of any float type are read to float32, onto JAX's default device; a model that is too large
    for it is read under `jax.default_device(jax.devices("cpu")[0])` and sharded from there.

    Args:
        folder_or_hub_id: a folder, a `.gguf` file (needs the extra `gguf`) or a `.bin` file; a name with no such
            path (`org/name`) is fetched from the hub, and `org/name@revision` always gives the files of one commit or tag.
        compute_dtype: of activations.
        remat: recompute blocks in the backward pass.

    Returns:
        The model and its float32 parameters.

    Raises:
        UserError: naming the file and the field or tensor that is missing, damaged or not supported.
    """
    *adapters, path = layers(str(folder_or_hub_id), DOWNLOADED, "model")
    for folder in adapters:
        read_settings(folder)  # before the base is read, which may take long
    if path.is_file():
        require(
            path.suffix in (".bin", ".gguf"),
            f"{path}: load_model reads a model's folder, a .gguf file or a llama2.c .bin file"
            + (it_is(path) or f"; give the folder, {path.parent}"),
        )
        config, flat = read_gguf_model(path) if path.suffix == ".gguf" else read_llama2c(path)
    else:
        config = read_config(path / "config.json")
        flat = read_weights(path, config)
    model = CausalLM(dataclasses.replace(config, compute_dtype=compute_dtype, remat=remat))
    params = unflatten_dict({name: jnp.array(flat.pop(name)) for name in list(flat)}, sep="/")
    for folder in reversed(adapters):
        lora, adapter = load_adapter(folder, model)
        params = lora.merge(params, adapter)
    return model, params


def load_with_tokenizer(
    name: str,
    tokenizer_path: Path | None = None,
    chat: ChatConfig = ChatConfig(),
    *,
    compute_dtype: Literal["float32", "bfloat16"] = "float32",
    remat: bool = False,
) -> tuple[CausalLM, Params, Tokenizer]:
    """Reads a language model and its tokenizer.

    The tokenizer's `eos_id` is the token that really ends the model's texts. That of an adapter's folder also stops where
    the base declares an end.

    Args:
        name: as `load_model` takes it.
        tokenizer_path: the tokenizer's file or folder; None: it is next to the model.
        chat: the chat template and its variables.
        compute_dtype: of activations.
        remat: recompute blocks in the backward pass.

    Raises:
        UserError: one of the files is missing or damaged, or they do not fit each other.
    """
    model, params = load_model(name, compute_dtype=compute_dtype, remat=remat)
    *adapters, base = layers(name, DOWNLOADED, "model")
    llama2c = base.suffix == ".bin"
    own = adapters[0] if adapters else base.parent if llama2c else base
    tokenizer = load_tokenizer(tokenizer_path or own)
    check_tokenizer(tokenizer, model.config.vocab_size, name)
    if adapters and tokenizer_path is None and isinstance(tokenizer, HuggingFaceTokenizer):
        # A tokenizer in an adapter's folder has no generation_config.json next to it, which declares further ends.
        others = tuple(i for i in declared_ids(base, "eos") if i not in tokenizer.stop_ids)
        tokenizer = dataclasses.replace(tokenizer, other_stop_ids=tokenizer.other_stop_ids + others)
    if llama2c or isinstance(tokenizer, Llama2cTokenizer):
        # A llama2.c model has learned texts that each begin with BOS, and never saw EOS, whatever file its tokenizer is in.
        require(
            tokenizer.bos_id is not None,
            f"{tokenizer_path or own}: this tokenizer has no BOS token to begin a story with",
        )
        tokenizer = tokenizer.stopping_at_bos()
    return model, params, chat.apply(tokenizer)


def download_model(hub_id: str) -> Path:
    """Fetches config, safetensors and tokenizer files of a hub repository and returns their local folder.

    Args:
        hub_id: see `rlaif_jax.data.hub.download`.
    """
    return download(hub_id, DOWNLOADED, "model")


# ------------------------------------------------------------------------------------------------------- writing


def save_model(
    folder: str | Path,
    model: CausalLM,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a folder that `load_model` and transformers read.

    It holds config.json, float32 safetensors and the tokenizer. The folder appears whole or not at all, and replaces an
    older model of that name.

    Args:
        folder: the folder to make or to replace.
        model: the shape of the model.
        params: its parameters; arrays may be sharded over the devices of this process.
        tokenizer: saved with the model; None saves none.
        max_shard_bytes: weights of more bytes are split over several files.

    Raises:
        UserError: no Hugging Face architecture has these flags; the tokenizer knows more ids than the model; the
            folder holds other things than a model, or cannot be written.
    """
    flat = flatten_dict(params, sep="/")
    check_shapes("save_model", flat, parameter_shapes(model.config))
    config = write_config(model.config, special_ids(tokenizer, model.config.vocab_size))
    write_folder(folder, config, model.config, flat, tokenizer, max_shard_bytes)


def check_shapes(caller: str, flat: dict[str, jax.Array], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises UserError where parameters are missing, unknown or of another shape.

    Args:
        caller: begins the message.
        flat: path of each parameter, joined by "/" -> array.
        shapes: those of the model, by path.
    """
    wrong = sorted(p for p in shapes.keys() | flat.keys() if p not in flat or shapes.get(p) != np.shape(flat[p]))
    require(not wrong, f"{caller}: the parameters are not of this model: {', '.join(wrong[:3])}")


def write_folder(
    folder: str | Path,
    values: dict[str, Any],
    config: DecoderConfig,
    flat: dict[str, jax.Array],
    tokenizer: Tokenizer | None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes the folder of a model, whole or not at all; an older model of that name is replaced.

    Args:
        folder: the folder to make or to replace.
        values: the content of config.json.
        config: shape of the decoder.
        flat: path of each parameter, joined by "/" -> array.
        tokenizer: saved with the model; None saves none.
        max_shard_bytes: weights of more bytes are split over several files.

    Raises:
        UserError: the folder holds other things than a model, or cannot be written.
    """
    with whole_folder(folder, "model", MODEL_FILES) as staged:
        (staged / "config.json").write_text(json.dumps(values, indent=1) + "\n")
        write_weights(staged, config, flat, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(staged)


def special_ids(tokenizer: Tokenizer | None, vocab_size: int) -> dict[str, int | None]:
    """Returns `bos_token_id`, `eos_token_id` and `pad_token_id`, as config.json names them.

    Args:
        tokenizer: has the ids; None: all three are None.
        vocab_size: of the model.

    Raises:
        UserError: the tokenizer has more ids than the model.
    """
    if tokenizer is None:
        return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    require(
        tokenizer.vocab_size <= vocab_size,
        f"save_model: the tokenizer has {tokenizer.vocab_size} ids, the model "
        f"only {vocab_size}; it is of another vocabulary",
    )
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


def write_weights(folder: Path, config: DecoderConfig, flat: dict[str, jax.Array], max_shard_bytes: int) -> None:
    """Writes model.safetensors, or several shards and their index.

    Args:
        folder: the model's folder; its config.json is written already.
        config: the model's settings, which give the family's names of the tensors.
        flat: path of each parameter, joined by "/" -> array.
        max_shard_bytes: largest sum of the tensors of a file, in bytes; a larger tensor has a file by itself.
    """
    shapes = {path: np.shape(value) for path, value in flat.items()}
    shards: list[list[Tensor]] = [[]]
    filled = total = 0
    for tensor in tensors(family_of(config), shapes):
        size = 4 * math.prod(tensor.shape(shapes))
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled, total = filled + size, total + size
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({tensor.name: gather(tensor, flat) for tensor in shard}, folder / name, metadata={"format": "pt"})
        (folder / name).chmod((folder / "config.json").stat().st_mode)  # safetensors leaves it readable by us alone
        placed |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def gather(tensor: Tensor, flat: dict[str, jax.Array]) -> np.ndarray:
    """Returns a tensor of a file as a float32 array, made from the parameters that it holds.

    Args:
        tensor: names its parameters, and whether the file holds them transposed.
        flat: path of a parameter, with "/" -> its array.
    """
    array = np.concatenate([np.asarray(flat[p], np.float32) for p in tensor.parameters], axis=-1)
    return np.ascontiguousarray(array.T if tensor.transposed else array)
