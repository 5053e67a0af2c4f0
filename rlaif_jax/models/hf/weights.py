"""The tensors of a Hugging Face folder: which of its safetensors hold which parameters.

`tensors` lists which tensor of the files holds which parameters; reading and writing walk the list in opposite
directions.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError, safe_open

from rlaif_jax.config import UserError, require
from rlaif_jax.data.hub import folder_is
from rlaif_jax.files import it_is
from rlaif_jax.models.causal_lm import CausalLM
from rlaif_jax.models.decoder_config import DecoderConfig
from rlaif_jax.models.hf.base import Family
from rlaif_jax.models.hf.families import family_of

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Constant buffers that old checkpoints hold in addition to their weights.
BUFFERS = re.compile(r".*(\.attn\.(bias|masked_bias)|rotary_emb\.inv_freq)")
LM_HEAD, SCORE = "lm_head.weight", "score.weight"
HEADS = {"lm_head": LM_HEAD, "head": SCORE}  # module of the parameters -> tensor, without the prefix of the trunk's
DELETE_INDEX = (
    "index is of another sharding: fetch that of these shards, or delete it (without one, the shards are read by their "
    "own headers)"
)
CLASSIFIER = (
    "a classifier or a reward model (transformers' ...ForSequenceClassification), not a language model: it has no matrix "
    "of output words; give the folder of the language model that it was made from"
)
ADAPTER = "an adapter (LoRA) next to its base model: merge it (peft: merge_and_unload, then save_pretrained)"
QUANTISED = "quantised; take the folder of the unquantised model"
# Parts of the names of tensors that no language model has, and what has them.
PARTS = {
    ".score.": CLASSIFIER,
    ".classifier.": CLASSIFIER,
    ".qa_outputs.": "a model that marks spans of a text (transformers' ...ForQuestionAnswering), not a language model",
    ".v_head.": "a language model with a value head (TRL): save the language model alone, by save_pretrained of its "
    "`pretrained_model`",
    ".value_head.": "a model with a value head, of critics and reward models: give the folder of a language model alone",
    ".lora_": ADAPTER,
    ".base_layer.": ADAPTER,
    ".qweight": QUANTISED,
    ".weight.absmax": QUANTISED,
    ".scales": QUANTISED,
    ".weight_scale": QUANTISED,
    ".vision_": "a model that sees images, too; give the folder of a language model alone",
}
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
        return self.name if self.name in HEADS.values() else self.name.partition(".")[2]

    def shape(self, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Returns the shape in the file, given those of all parameters."""
        parts = [shapes[p] for p in self.parameters]
        whole = (*parts[0][:-1], sum(part[-1] for part in parts))
        return whole[::-1] if self.transposed else whole

    def parts(self, array: np.ndarray, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        """Splits the array of a file into {path: parameter}; `shapes` are those of all parameters."""
        array = array.T if self.transposed else array
        ends = np.cumsum([shapes[p][-1] for p in self.parameters])[:-1]
        return dict(zip(self.parameters, np.split(array, ends, axis=-1), strict=True))


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
        if modules[0] in HEADS:
            name, transposed = HEADS[modules[0]], True
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


def weight_files(folder: Path) -> dict[str, Path]:
    """Returns {tensor name: file} of a folder's safetensors. Raises UserError for missing files."""
    single, index = folder / WEIGHTS, folder / INDEX
    if single.exists():
        return tensor_names([single])
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    if not index.exists():
        wanted = sorted({f"model-{n:05d}-of-{path.stem[-5:]}.safetensors" for path in shards for n in range_of(path)})
        missing = [name for name in wanted if not (folder / name).exists()]
        require(not missing, f"{folder}: {INDEX} and the shard {', '.join(missing[:4])} are missing; fetch them again")
        kind = folder_is(folder)
        hint = (
            ""
            if "never read" in kind or "adapter" in kind
            else "; load_model reads safetensors alone, never pickle: convert weights with transformers' save_pretrained"
        )
        require(bool(shards), f"{folder}: neither {WEIGHTS} nor {INDEX} is there{kind}{hint}")
        return tensor_names(shards)
    try:
        placed = json.loads(index.read_text())["weight_map"]
        places = {name: folder / Path(shard).name for name, shard in placed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index}: expected JSON with an object `weight_map` of tensor and file names "
            f"({type(error).__name__}: {error}){it_is(index)}"
        ) from error
    missing = sorted({path.name for path in places.values() if not path.exists()})
    if missing:
        strange = [path.name for path in shards if path not in places.values()]
        raise UserError(
            f"{folder}: the shard {', '.join(missing[:4])} named in {INDEX} is missing; "
            + (f"there are {', '.join(strange)}: the {DELETE_INDEX}" if strange else "fetch it again")
        )
    there = tensor_names(sorted(set(places.values())))
    moved = next((name for name, path in places.items() if there.get(name, path) != path), None)
    if moved is not None:
        raise UserError(
            f"{folder}: the tensor {moved} is in {there[moved].name}, but {INDEX} places it in {places[moved].name}: "
            f"the {DELETE_INDEX}"
        )
    return places


def range_of(shard: Path) -> range:
    """Returns the numbers of all shards of a model, by the name of one of them."""
    count = shard.stem.rpartition("-of-")[2]
    return range(1, int(count) + 1 if count.isdecimal() else 1)


def tensor_names(paths: Sequence[Path]) -> dict[str, Path]:
    """Returns {tensor name: file} by the headers of safetensors.

    Raises:
        UserError: a file is damaged, or two of them hold the same tensor.
    """
    found: dict[str, Path] = {}
    for path in paths:
        with open_weights(path) as file:
            names = list(file.keys())
        twice = next((name for name in names if name in found), None)
        if twice is not None:
            raise UserError(
                f"{path.parent}: both {found[twice].name} and {path.name} hold the tensor {twice}: these are shards of "
                "two models; keep those of one"
            )
        found |= dict.fromkeys(names, path)
    return found


def open_weights(path: Path) -> Any:
    """Opens a safetensors file. Raises UserError for one that is damaged or cut short."""
    try:
        return safe_open(path, framework="numpy")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    except SafetensorError as error:
        raise UserError(
            f"{path}: not a whole safetensors file: {damage(path)} ({error})"
            + (it_is(path) or "; it was probably cut short or damaged on its way: fetch it again")
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


def read_weights(
    folder: Path, config: DecoderConfig, shapes: dict[str, tuple[int, ...]] | None = None
) -> dict[str, np.ndarray]:
    """Returns all parameters {path: float32 array} from the safetensors of a folder, each tensor checked.

    Args:
        folder: the model's folder.
        config: the model's settings.
        shapes: of the parameters, by path; None: those of the language model.

    Raises:
        UserError: a tensor is missing, unknown, of another shape, or holds NaN.
    """
    shapes = shapes or parameter_shapes(config)
    values: dict[str, np.ndarray] = {}
    places = weight_files(folder)
    wanted = stored_names(folder, config, tensors(family_of(config), shapes), places)
    check_names(folder, config, set(wanted.values()), places)
    lm_head = next((name for name in places if name == LM_HEAD or name.endswith("." + LM_HEAD)), "")
    with ExitStack() as stack:
        files = {path: stack.enter_context(open_weights(path)) for path in sorted(set(places.values()))}

        def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
            return read_tensor(files[places[name]], places[name], name, shape)

        for tensor, name in wanted.items():
            values |= tensor.parts(read(name, tensor.shape(shapes)), shapes)
        if config.tie_embeddings and lm_head:
            embedding = values["trunk/embed/embedding"]
            require(
                np.array_equal(read(lm_head, embedding.shape), embedding),
                f"{places[lm_head]}: the tensor {lm_head} differs from the embeddings, but config.json has "
                "tie_word_embeddings=true; false would be right",
            )
    return values


def stored_names(
    folder: Path, config: DecoderConfig, listed: Sequence[Tensor], places: dict[str, Path]
) -> dict[Tensor, str]:
    """Returns the name that each tensor of a model has in its files.

    The embeddings show what the files put before all names: nothing where the trunk was written alone, or what a wrapper
    puts there (`_orig_mod.` of torch.compile, `module.` of DataParallel, `pretrained_model.` of TRL).

    Args:
        folder: the model's folder, for messages.
        config: the model's settings.
        listed: the tensors of the model.
        places: name of each tensor in the files -> its file.

    Raises:
        UserError: the files hold several models.
    """
    prefix = family_of(config).prefix
    embedding = next(tensor.bare_name for tensor in listed if "trunk/embed/embedding" in tensor.parameters)
    fronts = sorted(name.removesuffix(embedding) for name in places if f".{name}".endswith(f".{embedding}"))
    if prefix in fronts or not fronts:
        fronts = [prefix]
    require(
        len(fronts) == 1,
        f"{folder}: the weights hold several models, {', '.join(front + '*' for front in fronts)}; save the one to read "
        "alone",
    )
    outer = fronts[0].removesuffix(prefix)
    return {t: (outer if t.name in HEADS.values() else fronts[0]) + t.bare_name for t in listed}


def check_names(folder: Path, config: DecoderConfig, wanted: set[str], places: dict[str, Path]) -> None:
    """Raises UserError if files lack a tensor of the model, or hold one that the model would leave out.

    Args:
        folder: the model's folder, for messages.
        config: the model's settings.
        wanted: names of the tensors that the model has.
        places: name of each tensor in the files -> its file.
    """
    files = ", ".join(sorted({path.name for path in places.values()})) or WEIGHTS
    strange = sorted(
        name for name in set(places) - wanted if f".{LM_HEAD}" not in f".{name}" and not BUFFERS.fullmatch(name)
    )
    for name in strange:
        for part, kind in PARTS.items():
            require(part not in f".{name}", f"{places[name]}: by its tensor {name} it is {kind}")
    absent = sorted(wanted - set(places))
    if absent:
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        hint = "; if it shares the embeddings, set tie_word_embeddings=true there"
        if not absent[0].endswith(LM_HEAD) or more:
            hint = f", such as {', '.join(strange[:2])}: files of another model or another export" if strange else ""
            hint = f"; it holds other names{hint}" if hint else hint
        raise UserError(f"{folder}: config.json asks for the tensor {absent[0]}{more}, which {files} lacks{hint}")
    if strange:
        raise UserError(
            f"{places[strange[0]]}: the tensor {strange[0]} has no place in the model that config.json "
            f"describes ({family_of(config).model_types[0]}, {config.num_layers} layers): one of the two files is of "
            "another model, or a field like attention_bias is wrong"
        )


def read_tensor(file: Any, path: Path, name: str, shape: tuple[int, ...], asker: str = "config.json") -> np.ndarray:
    """Reads one tensor as float32.

    Args:
        file: the opened safetensors file.
        path: its path, for messages.
        name: name of the tensor.
        shape: the shape that the model asks for.
        asker: what gives that shape, for messages.

    Raises:
        UserError: the tensor is absent, of another shape, not of a floating type, or holds NaN.
    """
    try:
        stored = file.get_slice(name)
    except SafetensorError as error:
        raise UserError(
            f"{path}: the tensor {name} is not there, though {INDEX} says so: the {DELETE_INDEX}"
        ) from error
    require(
        tuple(stored.get_shape()) == shape,
        f"{path}: the tensor {name} has shape {tuple(stored.get_shape())}; {asker} asks for {shape}",
    )
    require(
        stored.get_dtype() in FLOATS,
        f"{path}: the tensor {name} is of type {stored.get_dtype()}; quantised "
        f"weights are not read, only {', '.join(FLOATS)}",
    )
    array = np.asarray(file.get_tensor(name)).astype(np.float32)
    require_finite(array, path, name)
    return array


def require_finite(array: np.ndarray, path: Path, name: str) -> None:
    """Raises UserError where a tensor holds NaN or an infinite number.

    Args:
        array: the tensor.
        path: its file.
        name: the name that it has there.
    """
    finite = not array.size or bool(np.isfinite([array.min(), array.max()]).all())  # NaN passes through both
    require(
        finite,
        f"{path}: the tensor {name} holds NaN or infinite numbers: the model diverged before it was saved, or the file is "
        "damaged; take an earlier checkpoint, or fetch it again",
    )
