"""LoRA adapters in and out of peft's folders: adapter_config.json and safetensors, never pickle.

GPT-2 keeps q, k and v in one matrix, `c_attn`, with one adapter; here each of the three has one. Their A are written next to
one another and their B as the blocks of a block-diagonal matrix: the same function, of n times the rank (`rank_pattern`).
Where all three have the same A, as what peft made has before it is trained here, the rank stays.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from rlaif_jax.config import require
from rlaif_jax.data.hub import ADAPTER
from rlaif_jax.models.causal_lm import CausalLM
from rlaif_jax.models.hf.base import Family, Fields, read_object
from rlaif_jax.models.hf.families import family_of
from rlaif_jax.models.hf.folders import whole_folder
from rlaif_jax.models.hf.weights import file_module, open_weights, parameter_shapes, read_tensor
from rlaif_jax.models.lora import TARGETS, LoRAConfig, Target
from rlaif_jax.types import Params

CONFIG, WEIGHTS = ADAPTER, "adapter_model.safetensors"
# What `save_adapter` may replace: all that peft writes.
ADAPTER_FILES = re.compile(r"adapter_config\.json|adapter_model\.safetensors|README\.md")
PREFIX = "base_model.model."
TENSOR = re.compile(r"(.+)\.lora_[AB]\.weight")
Pair = tuple[np.ndarray, np.ndarray]  # A [in, r], B [r, out]
# Settings of peft that change what an adapter computes, and the values that are read; null and no value are, too.
PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False,),
    "use_qalora": (False,),
    "lora_bias": (False,),
    "modules_to_save": ([],),
    "layers_to_transform": ([],),
    "layer_replication": ([],),
    "trainable_token_indices": ([],),
    "target_parameters": ([],),
    "alora_invocation_tokens": ([],),
    # pissa, olora, corda and loftq begin with changed weights of the base.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The matrices of a model's blocks, as its files name them.

    Attributes:
        family: the model family.
        layers: number of blocks.
        shapes: [in, out] of the matrices that the blocks have.
    """

    family: Family
    layers: int
    shapes: Mapping[Target, tuple[int, int]]

    @classmethod
    def of(cls, model: CausalLM) -> Blocks:
        """Returns the blocks of a model."""
        shapes = parameter_shapes(model.config)
        paths = {target: f"trunk/layers_0/{target}/kernel" for target in TARGETS}
        there = {target: (shapes[path][0], shapes[path][1]) for target, path in paths.items() if path in shapes}
        return cls(family_of(model.config), model.config.num_layers, there)

    @property
    def held(self) -> dict[str, list[Target]]:
        """Returns {module of a block in files: the matrices in it}, such as c_attn: q, k and v in GPT-2."""
        found: dict[str, list[Target]] = {}
        for target in self.shapes:
            found.setdefault(self.family.names[target], []).append(target)
        return found

    def widths(self, module: str) -> list[int]:
        """Returns the numbers of outputs of the matrices that a module holds, in the order of its columns."""
        return [self.shapes[target][1] for target in self.held[module]]

    def name(self, layer: int, module: str) -> str:
        """Returns the name that a module of block `layer` has in peft's files."""
        return f"{PREFIX}{self.family.prefix}{file_module(self.family, f'layers_{layer}')}.{module}"


# ------------------------------------------------------------------------------------------------------- writing


def save_adapter(
    folder: str | Path, model: CausalLM, lora: LoRAConfig, params: Params, *, base_name: str | None = None
) -> None:
    """Writes a folder that `load_adapter` and `peft.PeftModel.from_pretrained` read.

    The folder appears whole or not at all, and replaces an older adapter of that name. Tensors are float32.

    Args:
        folder: the folder to make or to replace.
        model: the base model.
        lora: settings of the adapter.
        params: the adapter; arrays may be sharded over the devices of this process.
        base_name: hub id, folder or file of the base, which `load_model` and peft's automatic classes load; None: not known.
            The absolute path is written, so that the adapter is read from any folder.

    Raises:
        UserError: the adapter is not of this model; the folder holds other things than an adapter, or cannot be written.
    """
    flat = {path: np.asarray(x, np.float32) for path, x in flatten_dict(params, sep="/").items()}
    check_adapter(model, lora, flat)
    blocks = Blocks.of(model)
    tensors: dict[str, np.ndarray] = {}
    patterns: dict[str, dict[str, float]] = {"rank_pattern": {}, "alpha_pattern": {}}
    modules = {module: held for module, held in blocks.held.items() if set(held) & set(lora.targets)}
    for module, held in modules.items():
        chosen = [target for target in held if target in lora.targets]
        pairs = [
            [
                (flat[f"trunk/layers_{i}/{target}/lora_a"], flat[f"trunk/layers_{i}/{target}/lora_b"])
                for target in chosen
            ]
            for i in range(blocks.layers)
        ]
        shared = chosen == held and all(np.array_equal(layer[0][0], a) for layer in pairs for a, _ in layer)
        count, ends = 1 if shared else len(chosen), np.cumsum([0, *blocks.widths(module)])
        if count > 1:
            patterns["rank_pattern"][module] = count * lora.rank
            patterns["alpha_pattern"][module] = lora.alpha * (math.sqrt(count) if lora.rslora else count)
        for i, layer in enumerate(pairs):
            b = np.zeros((count * lora.rank, ends[-1]), np.float32)
            for place, (target, (_, part)) in enumerate(zip(chosen, layer)):
                row, column = 0 if shared else place * lora.rank, held.index(target)
                b[row : row + lora.rank, ends[column] : ends[column + 1]] = part
            a = np.concatenate([a for a, _ in layer[:count]], axis=1)
            tensors[f"{blocks.name(i, module)}.lora_A.weight"] = np.ascontiguousarray(a.T)
            tensors[f"{blocks.name(i, module)}.lora_B.weight"] = np.ascontiguousarray(b.T)
    if base_name and Path(base_name).exists():
        base_name = str(Path(base_name).resolve())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": lora.rslora,
        "target_modules": list(modules),
        "fan_in_fan_out": not blocks.family.transposed,
        **patterns,
    }
    with whole_folder(folder, "adapter", ADAPTER_FILES) as staged:
        (staged / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        save_file(tensors, staged / WEIGHTS, metadata={"format": "pt"})
        (staged / WEIGHTS).chmod((staged / CONFIG).stat().st_mode)  # safetensors leaves it readable by us alone


def check_adapter(model: CausalLM, lora: LoRAConfig, flat: Mapping[str, np.ndarray]) -> None:
    """Raises UserError where parameters are no adapter of a model.

    Args:
        model: the base model.
        lora: settings of the adapter.
        flat: path of a parameter, with "/" -> array.
    """
    tree = jax.eval_shape(lambda key: lora.init(key, model.init(key)), jax.random.key(0))
    wanted = {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}
    found = {path: array.shape for path, array in flat.items()}
    wrong = sorted(path for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path))
    require(
        not wrong,
        f"save_adapter: the parameters are not an adapter of this model with these settings: {', '.join(wrong[:2])}",
    )


# ------------------------------------------------------------------------------------------------------- reading


def load_adapter(folder: str | Path, model: CausalLM) -> tuple[LoRAConfig, Params]:
    """Reads an adapter that peft or `save_adapter` wrote, for the base model that it was trained on.

    A dropout is not read: it acts only while peft trains.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        model: the base model.

    Returns:
        The settings, and the adapter as float32 arrays.

    Raises:
        UserError: naming the file and the field or tensor that is missing, damaged, not supported, or of another base.
    """
    folder, blocks = Path(folder), Blocks.of(model)
    fields = read_settings(folder)
    path = folder / WEIGHTS
    pickled = "; adapter_model.bin is in pickle, which is never read: save it with safe_serialization=True"
    hint = pickled if (folder / "adapter_model.bin").exists() else "; fetch it again"
    require(path.is_file(), f"{folder}: {WEIGHTS} is missing{hint}")
    rank, alpha, rslora = fields.size("r"), fields.get("lora_alpha", float), fields.get("use_rslora", bool, False)
    require(0 < alpha < math.inf, f"{fields.where}: lora_alpha must be > 0 and finite, not {alpha}")
    flat: dict[str, np.ndarray] = {}
    targets: list[Target] = []
    with open_weights(path) as file:
        modules = adapted_modules(list(file.keys()), path, blocks)
        patterns = read_patterns(fields, [module for module in modules if len(blocks.held[module]) > 1])
        for module in modules:
            own_rank, own_alpha = patterns.get(module, (rank, alpha))
            pairs = [read_pair(file, path, blocks, layer, module, own_rank) for layer in range(blocks.layers)]
            own = LoRAConfig(own_rank, own_alpha, rslora=rslora)
            gain = own.scale / LoRAConfig(rank, alpha, rslora=rslora).scale
            if not math.isclose(gain, 1.0):
                pairs = [(a, b * np.float32(gain)) for a, b in pairs]
            split = split_blocks(pairs, rank, dict(zip(blocks.held[module], blocks.widths(module))))
            require(
                bool(split),
                f"{fields.where}: rank_pattern gives {module} the rank {own_rank}, but one r={rank} is read for all "
                "matrices, or a block of that rank for each of q, k and v, as save_adapter writes them",
            )
            targets += split
            for target, matrices in split.items():
                for layer, (a, b) in enumerate(matrices):
                    flat |= {f"trunk/layers_{layer}/{target}/lora_a": a, f"trunk/layers_{layer}/{target}/lora_b": b}
    lora = LoRAConfig(rank, alpha, tuple(target for target in TARGETS if target in targets), rslora)
    return lora, unflatten_dict({name: jnp.array(x) for name, x in flat.items()}, sep="/")


def read_settings(folder: Path) -> Fields:
    """Returns the fields of a folder's adapter_config.json. Raises UserError for what is no plain LoRA."""
    path = folder / CONFIG
    require(path.is_file(), f"{folder}: no {CONFIG} there; an adapter's folder holds {CONFIG} and {WEIGHTS}")
    fields = read_object(path)
    fields.only("peft_type", ("LORA",), None)
    for key, supported in PLAIN.items():
        if fields.values.get(key) is not None:
            fields.only(key, supported, None)
    return fields


def adapted_modules(names: Sequence[str], path: Path, blocks: Blocks) -> list[str]:
    """Returns the modules of a block that an adapter's tensors belong to.

    Args:
        names: of all tensors of the file.
        path: the file, for messages.
        blocks: of the base model.

    Raises:
        UserError: a tensor has no place in the base model, or is missing.
    """
    base, layers = f"the base model ({blocks.family.model_types[0]}, {blocks.layers} layers)", range(blocks.layers)
    places = {blocks.name(layer, module): module for layer in layers for module in blocks.held}
    require(bool(names), f"{path}: holds no tensors")
    found: set[str] = set()
    for name in sorted(names):
        match = TENSOR.fullmatch(name)
        require(
            match is not None,
            f"{path}: the tensor {name} is no LoRA matrix; embeddings, heads and whole modules of an adapter are not read",
        )
        assert match is not None
        require(
            match[1] in places,
            f"{path}: the tensor {name} has no place in {base}: the adapter is of another model, or of another part "
            f"than its blocks' {', '.join(blocks.held)}",
        )
        found.add(places[match[1]])
    wanted = (f"{blocks.name(i, module)}.lora_{part}.weight" for module in found for i in layers for part in "AB")
    absent = sorted(set(wanted) - set(names))
    require(
        not absent,
        f"{path}: the tensor {absent[0] if absent else ''} is missing: the adapter is of a model with other layers than "
        f"{base}, or of some layers only",
    )
    return [module for module in blocks.held if module in found]


def read_patterns(fields: Fields, fused: Sequence[str]) -> dict[str, tuple[int, float]]:
    """Returns {module: its own (rank, alpha)} for modules that hold several matrices.

    Args:
        fields: of adapter_config.json.
        fused: the modules that hold several matrices.

    Raises:
        UserError: another module has a rank or alpha that differs from that of the whole adapter.
    """
    values = {key: fields.get(key, dict, {}) for key in ("rank_pattern", "alpha_pattern")}
    for key, pattern in values.items():
        other = [module for module in pattern if module not in fused]
        require(not other, f"{fields.where}: {key} for {other[:1]} is not supported: one r and one lora_alpha are")
    own = {}
    for module in {name for pattern in values.values() for name in pattern}:
        ranks, alphas = (Fields(pattern, f"{fields.where}: {key}") for key, pattern in values.items())
        alpha = alphas.get(module, float, fields.get("lora_alpha", float))
        require(0 < alpha < math.inf, f"{alphas.where}: {module} must be > 0 and finite, not {alpha}")
        own[module] = ranks.size(module, fields.size("r")), alpha
    return own


def read_pair(file: Any, path: Path, blocks: Blocks, layer: int, module: str, rank: int) -> Pair:
    """Reads the matrices of a module as A [in, r] and B [r, out].

    Args:
        file: the opened safetensors file.
        path: its path, for messages.
        blocks: of the base model.
        layer: number of the block.
        module: its module.
        rank: r of the module.

    Raises:
        UserError: a tensor is of another shape, or not of a floating type.
    """
    name, fan_in, fan_out = blocks.name(layer, module), blocks.shapes[blocks.held[module][0]][0], blocks.widths(module)
    asker = f"the base model with r={rank}"
    a = read_tensor(file, path, f"{name}.lora_A.weight", (rank, fan_in), asker)
    b = read_tensor(file, path, f"{name}.lora_B.weight", (sum(fan_out), rank), asker)
    return a.T, b.T


def split_blocks(pairs: Sequence[Pair], rank: int, held: Mapping[Target, int]) -> dict[Target, list[Pair]]:
    """Returns the adapters of the matrices that one module holds, each with its A and B in every layer.

    Args:
        pairs: A [in, n r] and B [n r, out] of the module in each layer. n = 1: all its matrices have this A. Else B has
            n blocks of r rows, each with numbers in the columns of one matrix only.
        rank: r.
        held: the matrices of the module -> their numbers of outputs, in the order of its columns.

    Returns:
        An empty dict where B has no such blocks.
    """
    ends = np.cumsum(list(held.values()))[:-1]
    columns = [dict(zip(held, np.split(b, ends, axis=1), strict=True)) for _, b in pairs]
    count, rest = divmod(pairs[0][0].shape[1], rank)
    if (count, rest) == (1, 0):
        return {target: [(a, of[target]) for (a, _), of in zip(pairs, columns)] for target in held}
    rows = [slice(i * rank, (i + 1) * rank) for i in range(count)]
    for chosen in () if rest else itertools.combinations(held, count):
        outside = (of[t][at] for of in columns for t in held for c, at in zip(chosen, rows) if t != c)
        if not any(part.any() for part in outside):
            cut = lambda target, at: [(a[:, at], of[target][at]) for (a, _), of in zip(pairs, columns)]
            return {target: cut(target, at) for target, at in zip(chosen, rows)}
    return {}
