"""Files of the Hugging Face hub, and what a folder is that lacks the files that were looked for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlaif_jax.config import UserError, require
from rlaif_jax.files import it_is

# All that says how a text becomes tokens, and which tokens end an answer.
TOKENIZER_FILES = (
    "*token*", "vocab.json", "merges.txt", "*.model", "chat_template.jinja", "additional_chat_templates/*.jinja",
    "config.json", "generation_config.json", "adapter_config.json",
)  # fmt: skip
ADAPTER = "adapter_config.json"
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*(?:/[\w.-]+)?)(?:@([\w./-]+))?")


def download(hub_id: str, files: Sequence[str], what: str) -> Path:
    """Fetches files of a hub repository and returns their local folder.

    Args:
        hub_id: `org/name`, or `org/name@revision` for the files of a commit, a tag or a branch. Without a revision a later
            call may fetch other files under the same name.
        files: patterns of their names.
        what: what is looked for (model, tokenizer), for messages.

    Raises:
        UserError: the name cannot be a hub id, or cannot be fetched.
    """
    parts = HUB_ID.fullmatch(hub_id)
    require(
        parts is not None,
        f"no {what} at {hub_id}: there is no such file or folder (and it cannot be a hub id, which looks like org/name "
        "or org/name@revision)",
    )
    assert parts is not None
    from huggingface_hub import snapshot_download  # here, because folders need no network library

    try:
        return Path(snapshot_download(parts[1], revision=parts[2], allow_patterns=list(files)))
    except Exception as error:  # the hub client raises those of its HTTP library too, which changes between versions
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"no {what} {hub_id}: there is no such folder, and it could not be fetched from the Hugging "
            f"Face hub ({reason}); check the name and the network, or give the path of a folder"
        ) from error


PICKLED = "weights in pickle, which are never read: convert them with transformers' save_pretrained"
# Files by which a folder of another kind is known, the most telling first.
EXPORTS = (
    ("model_index.json", "a diffusers pipeline, no language model"),
    ("*.gguf", "an export for llama.cpp: give that file itself"),
    ("params.json", "Meta's own export: take the folder that transformers reads (its name often ends in -hf)"),
    ("*.onnx", "an ONNX export: take the folder with safetensors"),
    ("openvino_model.xml", "an OpenVINO export: take the folder with safetensors"),
    ("*.msgpack", "a Flax export: convert it with transformers' save_pretrained"),
    ("*.h5", "a TensorFlow export: take the folder with safetensors"),
    ("pytorch_model*.bin", PICKLED),
    ("consolidated*.pth", PICKLED),
    ("*.pt", PICKLED),
    ("*.pth", PICKLED),
    ("*.parquet", "a data set, no model"),
    ("dataset_info.json", "a data set, no model"),
)


def base_of(folder: Path) -> str | None:
    """Returns the base model of an adapter's folder; None for a folder without one, or of a whole model.

    Raises:
        UserError: adapter_config.json is damaged, or names no base model.
    """
    path = folder / ADAPTER
    if not path.is_file() or any(folder.glob("model*.safetensors*")):
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON's and Unicode's errors say line or byte
        raise UserError(f"{path}: not JSON ({error}){it_is(path)}") from error
    require(isinstance(values, dict), f"{path}: expected a JSON object")
    base, revision = values.get("base_model_name_or_path"), values.get("revision")
    require(
        isinstance(base, str) and bool(base),
        f"{path}: base_model_name_or_path is {base!r}: write there the folder or the hub id of the model that the adapter "
        "was trained on",
    )
    return f"{base}@{revision}" if revision and "@" not in base and not Path(base).exists() else str(base)


def layers(name: str, files: Sequence[str], what: str) -> Iterator[Path]:
    """Yields the folder of an adapter, then that of the base which it names, and so on to a whole model.

    Args:
        name: a folder, a file or a hub id; one that is no adapter is yielded alone.
        files: patterns of the names that are fetched from the hub.
        what: what is looked for, as `download` takes it.

    Raises:
        UserError: a base is not there, or not named.
    """
    above: list[Path] = []
    base: str | None = name
    while base is not None:
        try:
            path = Path(base) if Path(base).exists() else download(base, files, what)
        except UserError as error:
            if not above:
                raise
            raise UserError(
                f"{above[-1] / ADAPTER}: base_model_name_or_path (a relative path begins in the current folder): {error}"
            ) from error
        require(path.resolve() not in above, f"{(above or [path])[-1] / ADAPTER}: the adapter is its own base model")
        above.append(path.resolve())
        yield path
        base = base_of(path)


def folder_is(folder: Path) -> str:
    """Returns, for the end of a message, what a folder is that lacks the files of a model or tokenizer.

    Args:
        folder: an existing folder.
    """
    if (folder / ADAPTER).is_file():
        return (
            "; it is the folder of an adapter, which is read over a language model alone: merge it into its base (peft: "
            "merge_and_unload, then save_pretrained) and give the merged folder"
        )
    for pattern, kind in EXPORTS:
        if found := sorted(folder.glob(pattern)):
            return f"; {found[0].name} is {kind}" if kind == PICKLED else f"; by its {found[0].name} it is {kind}"
    inner = sorted({path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/config.json")})
    if inner:
        return f"; there is one in {inner[-1]}: give that folder" + (f" (or one of {len(inner)})" if inner[1:] else "")
    names = sorted(path.name for path in folder.iterdir())
    return (
        f"; the folder holds {', '.join(names[:4])}{' ...' if names[4:] else ''}" if names else "; the folder is empty"
    )
