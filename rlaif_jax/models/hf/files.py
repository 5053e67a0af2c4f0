"""Models in and out of Hugging Face folders: config.json and safetensors, never pickle, never torch.

`tensors` lists which tensor of the files holds which parameters; reading and writing walk the list in opposite
directions. The meaning of config.json is in `families.py`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rlaif_jax.config import UserError, require
from rlaif_jax.models.causal_lm import CausalLM
from rlaif_jax.models.decoder_config import DecoderConfig
from rlaif_jax.models.hf.base import Family
from rlaif_jax.models.hf.families import family_of, read_config, write_config
from rlaif_jax.models.hf.llama2c import read_llama2c
from rlaif_jax.types import Params

if TYPE_CHECKING:
    from rlaif_jax.data.tokenizers import Tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
DOWNLOADED = [
    "config.json",
    "*.safetensors",
    INDEX,
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
]
# What `save_model` may replace when it overwrites a folder.
MODEL_FILES = re.compile(
    r"(config|generation_config|tokenizer.*|vocab|special_tokens_map|added_tokens)\.json"
    r"|model.*\.safetensors(\.index\.json)?|tokenizer\.(bin|model)|merges\.txt|chat_template\.jinja"
)
# Constant buffers that old checkpoints hold in addition to their weights.
BUFFERS = re.compile(r".*(\.attn\.(bias|masked_bias)|rotary_emb\.inv_freq)")
LM_HEAD = "lm_head.weight"
FLOATS = ("F32", "F16", "BF16", "F64")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file.

    Attributes:
        name: in the file.
        parameters: paths of the parameters that it holds, concatenated on their last axis (q, k, v in GPT-2).
        transposed: stored as [out, in]; the parameters here are [in, out].
    """

    name: str
    parameters: tuple[str, ...]
    transposed: bool

    @property
    def bare_name(self) -> str:
        """Returns the name in files that were written from the trunk alone."""
        return self.name if self.name == LM_HEAD else self.name.partition(".")[2]

    def shape(self, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Returns the shape in the file, given those of all parameters."""
        parts = [shapes[p] for p in self.parameters]
        whole = (*parts[0][:-1], sum(part[-1] for part in parts))
        return whole[::-1] if self.transposed else whole


def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Returns {path with "/": shape} of all parameters of a model."""
    tree = jax.eval_shape(CausalLM(config).init, jax.random.key(0))
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def tensors(family: Family, shapes: dict[str, tuple[int, ...]]) -> list[Tensor]:
    """Returns every tensor of a model's files, named as the model's `family` names it in transformers.

    `shapes` are those of all parameters, by path.
    """
    groups: dict[tuple[str, bool], list[str]] = {}
    for path in shapes:
        *modules, leaf = path.split("/")
        if modules[0] == "lm_head":
            name, transposed = LM_HEAD, True
        else:
            inner = [file_module(family, module) for module in modules[1:]]
            name = family.prefix + ".".join([*inner, "bias" if leaf == "bias" else "weight"])
            transposed = leaf == "kernel" and family.transposed
        groups.setdefault((name, transposed), []).append(path)
    # Only q, k and v may share a tensor, in this order.
    return [
        Tensor(name, tuple(sorted(paths, key=lambda path: "qkv".find(path.split("/")[-2]))), transposed)
        for (name, transposed), paths in groups.items()
    ]


def file_module(family: Family, module: str) -> str:
    """Returns the name that a module of the decoder has in files, such as "h.0" for GPT-2's "layers_0".

    Args:
        family: the model family, which has the table of names.
        module: name of the module in the parameters.
    """
    return family.names.get(module) or f"{family.names['layers']}.{module.removeprefix('layers_')}"


# ------------------------------------------------------------------------------------------------------- reading


def load_model(
    folder_or_hub_id: str | Path, *, compute_dtype: Literal["float32", "bfloat16"] = "float32", remat: bool = False
) -> tuple[CausalLM, Params]:
    """Reads a language model from a Hugging Face folder, a hub id, or a llama2.c `.bin` file.

    Folders hold config.json (GPT-2, Llama, Mistral without sliding window, Qwen2, Qwen3) and model.safetensors or
    its shards. Weights of any float type are read to float32, onto JAX's default device; a model that is too large
    for it is read under `jax.default_device(jax.devices("cpu")[0])` and sharded from there.

    Args:
        folder_or_hub_id: a folder or `.bin` file; a name with no such path (`org/name`) is fetched from the hub.
        compute_dtype: of activations.
        remat: recompute blocks in the backward pass.

    Returns:
        The model and its float32 parameters.

    Raises:
        UserError: naming the file and the field or tensor that is missing, damaged or not supported.
    """
    path = Path(folder_or_hub_id)
    if path.is_file():
        require(
            path.suffix == ".bin",
            f"{path}: load_model reads a model's folder or a llama2.c .bin file; give the folder, {path.parent}",
        )
        config, flat = read_llama2c(path)
    else:
        folder = path if path.is_dir() else download(str(folder_or_hub_id))
        config = read_config(folder / "config.json")
        flat = read_weights(folder, config)
    config = dataclasses.replace(config, compute_dtype=compute_dtype, remat=remat)
    return CausalLM(config), unflatten_dict({name: jnp.array(flat.pop(name)) for name in list(flat)}, sep="/")


def download(hub_id: str) -> Path:
    """Fetches config, safetensors and tokenizer files of a hub repository and returns their local folder.

    Raises UserError for a name that cannot be a hub id, or that cannot be fetched.
    """
    require(
        HUB_ID.fullmatch(hub_id) is not None,
        f"no model at {hub_id}: there is no such folder (and it cannot be a hub id, which looks like org/name)",
    )
    from huggingface_hub import snapshot_download  # here, because folders need no network library

    try:
        return Path(snapshot_download(hub_id, allow_patterns=DOWNLOADED))
    except Exception as error:  # the hub client raises those of its HTTP library too, which changes between versions
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"no model {hub_id}: there is no such folder, and it could not be fetched from the Hugging "
            f"Face hub ({reason}); check the name and the network, or give the path of a folder"
        ) from error


def weight_files(folder: Path) -> dict[str, Path]:
    """Returns {tensor name: file} of a folder's safetensors. Raises UserError for missing files."""
    single, index = folder / WEIGHTS, folder / INDEX
    if single.exists():
        with open_weights(single) as file:
            return dict.fromkeys(file.keys(), single)
    require(
        index.exists(),
        f"{folder}: neither {WEIGHTS} nor {INDEX} is there; weights in pickle (.bin, .pt) are "
        f"never read: convert them with transformers' save_pretrained",
    )
    try:
        placed = json.loads(index.read_text())["weight_map"]
        shards = {name: folder / Path(shard).name for name, shard in placed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index}: expected JSON with an object `weight_map` of tensor and file names "
            f"({type(error).__name__}: {error})"
        ) from error
    missing = sorted({path.name for path in shards.values() if not path.exists()})
    require(not missing, f"{folder}: the shard {', '.join(missing)} named in {INDEX} is missing; fetch it again")
    return shards


def open_weights(path: Path) -> Any:
    """Opens a safetensors file. Raises UserError for one that is damaged or cut short."""
    try:
        return safe_open(path, framework="numpy")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    except SafetensorError as error:
        raise UserError(
            f"{path}: not a whole safetensors file: {damage(path)} ({error}); it was probably cut short or damaged on "
            "its way: fetch it again"
        ) from error


def damage(path: Path) -> str:
    """Describes for a message how long a safetensors file should be, and the first tensor that is cut."""
    data = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, data)))
        ends = {8 + length + info["data_offsets"][1]: name for name, info in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return f"its {data} bytes do not begin with a whole header"
    cut = [ends[end] for end in sorted(ends) if end > data]
    return f"{data} bytes of {max(ends, default=8)}" + (f", the tensor {cut[0]} is not whole" if cut else "")


def read_weights(folder: Path, config: DecoderConfig) -> dict[str, np.ndarray]:
    """Returns all parameters {path: float32 array} from the safetensors of a folder, each tensor checked.

    `config` is the model's. Raises UserError where a tensor is missing, unknown or of another shape.
    """
    shapes = parameter_shapes(config)
    values: dict[str, np.ndarray] = {}
    places = weight_files(folder)
    bare = not any(name.startswith(("model.", "transformer.")) for name in places)
    wanted = {t: t.bare_name if bare else t.name for t in tensors(family_of(config), shapes)}
    check_names(folder, config, set(wanted.values()), places)
    with ExitStack() as stack:
        files = {path: stack.enter_context(open_weights(path)) for path in sorted(set(places.values()))}

        def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
            return read_tensor(files[places[name]], places[name], name, shape)

        for tensor, name in wanted.items():
            array = read(name, tensor.shape(shapes))
            array = array.T if tensor.transposed else array
            ends = np.cumsum([shapes[p][-1] for p in tensor.parameters])[:-1]
            for parameter, part in zip(tensor.parameters, np.split(array, ends, axis=-1), strict=True):
                values[parameter] = part
        if config.tie_embeddings and LM_HEAD in places:
            embedding = values["trunk/embed/embedding"]
            require(
                np.array_equal(read(LM_HEAD, embedding.shape), embedding),
                f"{places[LM_HEAD]}: the tensor {LM_HEAD} differs from the embeddings, but config.json has "
                "tie_word_embeddings=true; false would be right",
            )
    return values


def check_names(folder: Path, config: DecoderConfig, wanted: set[str], places: dict[str, Path]) -> None:
    """Raises UserError if files lack a tensor of the model, or hold one that the model would leave out.

    Args:
        folder: the model's folder, for messages.
        config: the model's settings.
        wanted: names of the tensors that the model has.
        places: name of each tensor in the files -> its file.
    """
    files = ", ".join(sorted({path.name for path in places.values()})) or WEIGHTS
    absent = sorted(wanted - set(places))
    if absent:
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        hint = "; if it shares the embeddings, set tie_word_embeddings=true there" if absent == [LM_HEAD] else ""
        raise UserError(f"{folder}: config.json asks for the tensor {absent[0]}{more}, which {files} lacks{hint}")
    strange = sorted(name for name in set(places) - wanted - {LM_HEAD} if not BUFFERS.fullmatch(name))
    if strange:
        raise UserError(
            f"{places[strange[0]]}: the tensor {strange[0]} has no place in the model that config.json "
            f"describes ({family_of(config).model_types[0]}, {config.num_layers} layers): one of the two files is of "
            "another model, or a field like attention_bias is wrong"
        )


def read_tensor(file: Any, path: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Reads one tensor as float32.

    Args:
        file: the opened safetensors file.
        path: its path, for messages.
        name: name of the tensor.
        shape: the shape that the model asks for.

    Raises:
        UserError: the tensor is absent, of another shape, or not of a floating type.
    """
    try:
        stored = file.get_slice(name)
    except SafetensorError as error:
        raise UserError(f"{path}: the tensor {name} is not there, though {INDEX} says so; fetch it again") from error
    require(
        tuple(stored.get_shape()) == shape,
        f"{path}: the tensor {name} has shape {tuple(stored.get_shape())}; config.json asks for {shape}",
    )
    require(
        stored.get_dtype() in FLOATS,
        f"{path}: the tensor {name} is of type {stored.get_dtype()}; quantised "
        f"weights are not read, only {', '.join(FLOATS)}",
    )
    return np.asarray(file.get_tensor(name)).astype(np.float32)


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
    folder = Path(folder).resolve()
    flat = flatten_dict(params, sep="/")
    shapes = parameter_shapes(model.config)
    wrong = sorted(p for p in shapes.keys() | flat.keys() if p not in flat or shapes.get(p) != np.shape(flat[p]))
    require(not wrong, f"save_model: the parameters are not of this model: {', '.join(wrong[:3])}")
    config = write_config(model.config, special_ids(tokenizer, model.config.vocab_size))
    check_replaceable(folder)
    staged = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    replaced = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        staged.mkdir(parents=True)
        (staged / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        write_weights(staged, model.config, flat, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(staged)
        if folder.exists():
            folder.rename(replaced)
        staged.rename(folder)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(
            f"{folder}: the model could not be written ({reason}); nothing was left behind. Free some "
            "space or name another folder"
        ) from error
    finally:
        if replaced.exists() and not folder.exists():  # stopped between the two renames
            replaced.rename(folder)
        shutil.rmtree(staged, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


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


def check_replaceable(folder: Path) -> None:
    """Raises UserError for a folder that holds other things than a model."""
    if folder.exists():
        require(folder.is_dir(), f"{folder} is a file; name a folder for the model")
        others = sorted(p.name for p in folder.iterdir() if not MODEL_FILES.fullmatch(p.name))
        require(
            not others,
            f"{folder} holds {', '.join(others[:3])}, which belongs to no model, and will not be "
            "replaced; name another folder",
        )


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
