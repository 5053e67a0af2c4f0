"""Folders of models: what is damaged or missing is named, and nothing half written is left."""

import dataclasses
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlaif_jax.config import UserError
from rlaif_jax.data.tokenizers import load_tokenizer, word_level_tokenizer
from rlaif_jax.models import CausalLM
from rlaif_jax.models.hf import files
from rlaif_jax.models.hf.files import load_model, save_model
from tests.models.hf.references import (
    TINY,
    assert_same_params,
    random_params,
)

# --------------------------------------------------------------------------------------------------- bad input


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        values = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))

    return edit


def edit_weights(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return edit


def edit_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return edit


def shard(then: Callable[[Path], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        save_model(folder, *load_model(folder), max_shard_bytes=4000)
        then(folder)

    return edit


def move_tensor(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_of_another_sharding(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    placed = {name: shard.partition("-of-")[0] + "-of-00030.safetensors" for name, shard in index["weight_map"].items()}
    path.write_text(json.dumps(index | {"weight_map": placed}))


def only(**files: bytes | str) -> Callable[[Path], None]:
    """Leaves a folder with some files alone; `__` in a name is a dot, `_in_` a folder."""

    def edit(folder: Path) -> None:
        for path in list(folder.iterdir()):
            path.unlink()
        for name, content in files.items():
            path = folder / name.replace("_in_", "/").replace("__", ".")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return edit


LFS = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daa\nsize 9\n"
)
ADAPTER = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 8})
NO_LANGUAGE_MODEL = ["score.weight", "a classifier or a reward model", "the language model that it was made from"]
ONE = np.zeros((1, 16), np.float32)
Q = "model.layers.1.self_attn.q_proj.weight"
BAD = {
    "no config.json": (lambda f: (f / "config.json").unlink(), ["no config.json"]),
    "malformed config.json": (
        lambda f: (f / "config.json").write_text('{\n"model_type": }'),
        ["config.json", "line 2"],
    ),
    "config.json is a list": (lambda f: (f / "config.json").write_text("[]"), ["config.json", "object"]),
    "unknown model_type": (edit_config(model_type="mamba"), ["config.json", "model_type='mamba'", "llama"]),
    "no model_type": (edit_config(model_type="absent"), ["config.json", "model_type"]),
    "a size is missing": (edit_config(hidden_size="absent"), ["config.json", "hidden_size"]),
    "a size is text": (edit_config(hidden_size="16"), ["config.json", "hidden_size", "'16'"]),
    "a size is zero": (edit_config(num_hidden_layers=0), ["config.json", "num_hidden_layers"]),
    "heads do not divide": (edit_config(num_key_value_heads=3), ["config.json", "num_kv_heads"]),
    "another activation": (edit_config(hidden_act="gelu"), ["config.json", "hidden_act='gelu'", "silu"]),
    "quantised by config": (
        edit_config(quantization_config={"bits": 4}),
        ["config.json", "quantization_config"],
    ),
    "sliding window": (
        edit_config(model_type="mistral", sliding_window=8),
        ["config.json", "sliding_window=8"],
    ),
    "sliding window by default": (
        edit_config(model_type="mistral", max_position_embeddings=9999),
        ["config.json", "sliding_window=4096"],
    ),
    "sliding window of qwen": (
        edit_config(model_type="qwen3", use_sliding_window=True, max_window_layers=1, sliding_window=8),
        ["config.json", "sliding_window=8"],
    ),
    "unknown rope": (
        edit_config(rope_scaling={"rope_type": "yarn", "factor": 2.0}),
        ["config.json", "rope_scaling", "rope_type='yarn'"],
    ),
    "rope without a factor": (
        edit_config(rope_parameters={"rope_type": "linear"}),
        ["config.json", "rope_parameters", "factor"],
    ),
    "rope for each kind of layer": (
        edit_config(rope_parameters={"full_attention": {"rope_type": "default"}}),
        ["config.json", "rope_parameters", "full_attention"],
    ),
    "partial rotary": (edit_config(partial_rotary_factor=0.5), ["config.json", "partial_rotary_factor=0.5"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors", "pickle"]),
    "missing tensor": (edit_weights(lambda w: w.pop(Q)), [Q, "model.safetensors"]),
    "missing tensors": (edit_config(num_hidden_layers=3), ["model.layers.2.", "and 8 more"]),
    "missing output matrix": (
        edit_config(tie_word_embeddings=False),
        ["lm_head.weight", "tie_word_embeddings=true"],
    ),
    "output matrix is not the embeddings": (
        edit_weights(lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1})),
        ["lm_head.weight", "tie_word_embeddings=true"],
    ),
    "a tensor too many": (
        edit_config(num_hidden_layers=1),
        ["model.layers.1.", "model.safetensors", "1 layers"],
    ),
    "wrong shape": (edit_weights(lambda w: w.update({Q: w[Q][:-1].copy()})), [Q, "(15, 16)", "(16, 16)"]),
    "another width": (edit_config(intermediate_size=44), ["model.safetensors", "mlp.", "(16, 44)"]),
    "integers": (edit_weights(lambda w: w.update({Q: w[Q].astype(np.int8)})), [Q, "I8", "quantised"]),
    "empty file": (edit_bytes(lambda d: b""), ["model.safetensors", "0 bytes"]),
    "half a header": (edit_bytes(lambda d: d[:100]), ["model.safetensors", "100 bytes"]),
    "half a tensor": (edit_bytes(lambda d: d[:-40]), ["model.safetensors", "is not whole", "bytes of"]),
    "bytes behind the end": (edit_bytes(lambda d: d + b"more"), ["model.safetensors", "bytes of"]),
    "a web page": (edit_bytes(lambda d: b"<!doctype html>" * 99), ["model.safetensors", "whole header"]),
    "missing shard": (
        shard(lambda f: next(f.glob("model-00002-of-*")).unlink()),
        ["model-00002-of-", "missing"],
    ),
    "missing shard and index": (
        shard(lambda f: [(f / "model.safetensors.index.json").unlink(), next(f.glob("model-00002-of-*")).unlink()]),
        ["model-00002-of-", "missing"],
    ),
    "index of another sharding": (
        shard(index_of_another_sharding),
        ["model-00001-of-00030.safetensors", "there are model-00001-of-0000", "delete it"],
    ),
    "shards of two models": (
        shard(
            lambda f: [
                (f / "model.safetensors.index.json").unlink(),
                (f / "model-00001-of-00001.safetensors").write_bytes(next(f.glob("model-00002-*")).read_bytes()),
            ]
        ),
        ["both model-00001-of-00001.safetensors and model-00002-of-", "hold the tensor"],
    ),
    "reward model": (edit_weights(lambda w: w.update({"score.weight": ONE})), NO_LANGUAGE_MODEL),
    "untied reward model": (
        lambda f: [
            edit_config(tie_word_embeddings=False, architectures=["LlamaForSequenceClassification"])(f),
            edit_weights(lambda w: w.update({"score.weight": ONE}))(f),
        ],
        NO_LANGUAGE_MODEL,
    ),
    "classifier of tokens": (
        edit_weights(lambda w: w.update({"classifier.weight": ONE})),
        ["classifier.weight", "a classifier"],
    ),
    "value head": (
        edit_weights(lambda w: w.update({"v_head.summary.weight": ONE})),
        ["v_head.summary.weight", "value head", "pretrained_model"],
    ),
    "adapter in the weights": (
        edit_weights(lambda w: w.update({f"base_model.model.{Q}".replace(".weight", ".lora_A.default.weight"): ONE})),
        ["lora_A", "merge_and_unload"],
    ),
    "packed integers": (
        edit_weights(lambda w: [w.pop(Q), w.update({Q.replace("weight", "qweight"): ONE.astype(np.int32)})]),
        ["qweight", "quantised"],
    ),
    "names of another export": (
        edit_weights(lambda w: [w.update({f"blocks.{i}.x": w.pop(name)}) for i, name in enumerate(sorted(w))]),
        ["model.embed_tokens.weight (and 19 more)", "blocks.0.x", "another export"],
    ),
    "two models": (
        edit_weights(lambda w: [w.update({"a." + n: w[n], "b." + n: w.pop(n)}) for n in sorted(w)]),
        ["several models, a.model.*, b.model.*"],
    ),
    "adapter": (
        only(adapter_config__json=ADAPTER, adapter_model__safetensors=b""),
        [
            "adapter_config.json: base_model_name_or_path (a relative path begins in the current folder): no model some/base"
        ],
    ),
    "adapter with a config.json": (
        lambda f: [(f / "model.safetensors").unlink(), (f / "adapter_config.json").write_text(ADAPTER)],
        ["model/adapter_config.json", "no model some/base"],
    ),
    "pointers": (edit_bytes(lambda d: LFS), ["model.safetensors", "Git LFS pointer", "git lfs pull"]),
    "pointer to the config": (lambda f: (f / "config.json").write_bytes(LFS), ["config.json", "Git LFS pointer"]),
    "data set": (only(train__parquet=b"PAR1"), ["train.parquet", "data set"]),
    "llama.cpp": (only(tiny__gguf=b"GGUF"), ["tiny.gguf", "llama.cpp", "give that file itself"]),
    "Meta's export": (only(params__json="{}", consolidated__00__pth=b"PK"), ["params.json", "Meta's own export"]),
    "nested folder": (only(**{"step_9_in_config__json": "{}"}), ["step_9", "give that folder"]),
    "folder of a run": (
        only(config__json='{"type": "Config"}', **{"model_in_config__json": "{}"}),
        ["config.json", "model_type", "/model/model: give that folder"],
    ),
    "empty folder": (only(), ["no config.json", "the folder is empty"]),
    "pickled": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        ["pytorch_model.bin", "never read", "save_pretrained"],
    ),
    "malformed index": (
        shard(lambda f: (f / "model.safetensors.index.json").write_text("{}")),
        ["model.safetensors.index.json", "weight_map"],
    ),
    "index names another shard": (shard(move_tensor), ["model.norm.weight", "model-00001-of-"]),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_folders_are_refused_by_name(bad: str, tmp_path: Path) -> None:
    spoil, named = BAD[bad]
    model = CausalLM(TINY)
    folder = tmp_path / "model"
    save_model(folder, model, random_params(model))
    spoil(folder)
    with pytest.raises(UserError) as error:
        load_model(folder)
    for part in (str(tmp_path), *named):
        assert part in str(error.value)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    ("off", "on"),
    [
        ("", "_orig_mod."),  # torch.compile
        ("", "module."),  # DataParallel
        ("", "module._orig_mod."),
        ("", "pretrained_model."),  # TRL
        ("", "base_model.model."),  # an adapter that was merged in place
        ("model.", ""),  # the trunk saved alone
        ("model.", "module."),
    ],
)
def test_names_with_what_a_wrapper_puts_before_them_are_read(tmp_path: Path, off: str, on: str, tie: bool) -> None:
    model = CausalLM(dataclasses.replace(TINY, tie_embeddings=tie))
    params = random_params(model)
    save_model(tmp_path / "model", model, params)
    edit_weights(lambda w: [w.update({on + name.removeprefix(off): w.pop(name)}) for name in sorted(w)])(
        tmp_path / "model"
    )
    assert_same_params(load_model(tmp_path / "model")[1], params)


def test_shards_are_read_without_an_index_and_the_advice_to_delete_it_is_right(tmp_path: Path) -> None:
    model = CausalLM(TINY)
    params = random_params(model)
    for spoil in (index_of_another_sharding, move_tensor):
        save_model(tmp_path / "model", model, params, max_shard_bytes=4000)
        spoil(tmp_path / "model")
        with pytest.raises(UserError, match="delete it"):
            load_model(tmp_path / "model")
        (tmp_path / "model" / "model.safetensors.index.json").unlink()
        assert_same_params(load_model(tmp_path / "model")[1], params)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("m.bin", b"GGUF\x03\0\0\0", "GGUF file of llama.cpp, which is read under a name that ends in .gguf"),
        ("m.parquet", b"PAR1\x15", "Parquet file"),
        ("m.bin", LFS, "Git LFS pointer"),
        ("pytorch_model.bin", b"PK\x03\x04" + b"\0" * 99, "never read: convert"),
        ("model.safetensors", LFS, "Git LFS pointer"),
        ("m.bin", b"<!DOCTYPE html><html>" + b" " * 99, "web page"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    for load in (load_model, load_tokenizer):
        with pytest.raises(UserError, match=f"{name}.*{said}"):
            load(tmp_path / name)


def test_names_that_are_neither_a_folder_nor_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="there is no such file or folder"):
        load_model(tmp_path / "nothing")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="give the folder"):
        load_model(tmp_path / "model.safetensors")

    def offline(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match=r"some-org/some-model.*hub.*no route to host"):
        load_model("some-org/some-model")


def test_a_hub_id_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CausalLM(TINY)
    params = random_params(model)
    words = word_level_tokenizer(tuple(f"w{i}" for i in range(36)))
    save_model(tmp_path / "snapshot", model, params, words)
    asked: list[tuple[str, str | None]] = []

    def snapshot(hub_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        """Returns a copy with the files of these patterns alone, as the hub's client does."""
        asked.append((hub_id, revision))
        fetched = tmp_path / f"fetched{len(asked)}"
        fetched.mkdir()
        for path in (tmp_path / "snapshot").iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copyfile(path, fetched / path.name)
        return str(fetched)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    (tmp_path / "snapshot" / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "snapshot" / "generation_config.json").write_text('{"eos_token_id": [5, 2]}')
    (tmp_path / "snapshot" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    got, got_params = load_model("some-org/some-model", compute_dtype="bfloat16", remat=True)
    assert got.config == dataclasses.replace(TINY, compute_dtype="bfloat16", remat=True)
    assert_same_params(got_params, params)
    tokenizer = load_tokenizer("some-org/some-model@v1.0")
    assert asked == [("some-org/some-model", None), ("some-org/some-model", "v1.0")]
    # What decides between tokens is fetched with either: end tokens, added tokens, the chat template.
    for fetched in ("fetched1", "fetched2"):
        assert load_tokenizer(tmp_path / fetched).stop_ids == tokenizer.stop_ids == (2, 5)
        assert tokenizer.chat_text([{"role": "user", "content": "hi"}]) == "hi"
        assert not (tmp_path / fetched / "pytorch_model.bin").exists()
    assert not (tmp_path / "fetched2" / "model.safetensors").exists()


# ----------------------------------------------------------------------------------------------------- writing


def test_shards_of_ours(tmp_path: Path) -> None:
    model = CausalLM(dataclasses.replace(TINY, tie_embeddings=False))
    params = random_params(model)
    save_model(tmp_path / "model", model, params, max_shard_bytes=4000)
    files = sorted(p.name for p in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    again, params_again = load_model(tmp_path / "model")
    assert again == model
    assert_same_params(params_again, params)


def test_a_model_replaces_an_older_one_whole(tmp_path: Path) -> None:
    model = CausalLM(TINY)
    params = random_params(model)
    save_model(tmp_path / "model", model, jax.tree.map(jnp.zeros_like, params), max_shard_bytes=4000)
    save_model(tmp_path / "model", model, params)
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert_same_params(load_model(tmp_path / "model")[1], params)


def test_other_peoples_files_are_not_replaced(tmp_path: Path) -> None:
    model = CausalLM(TINY)
    (tmp_path / "metrics.jsonl").write_text("dear\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        save_model(tmp_path, model, random_params(model))
    with pytest.raises(UserError, match="is a file"):
        save_model(tmp_path / "metrics.jsonl", model, random_params(model))
    assert (tmp_path / "metrics.jsonl").read_text() == "dear\n"


def test_a_full_disk_leaves_the_old_model_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CausalLM(TINY)
    params = random_params(model)
    save_model(tmp_path / "model", model, params)

    def full(tensors: Any, path: Path, **kwargs: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    for name in ("model", "new"):
        with pytest.raises(UserError, match=f"{name}.*No space left on device"):
            save_model(tmp_path / name, model, jax.tree.map(jnp.zeros_like, params))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert_same_params(load_model(tmp_path / "model")[1], params)


def test_an_interrupt_between_the_renames_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CausalLM(TINY)
    params = random_params(model)
    save_model(tmp_path / "model", model, params)
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name.endswith(".new"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(tmp_path / "model", model, jax.tree.map(jnp.zeros_like, params))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert_same_params(load_model(tmp_path / "model")[1], params)


def test_parameters_and_tokenizer_of_another_model_are_not_written(tmp_path: Path) -> None:
    model = CausalLM(TINY)
    other = CausalLM(dataclasses.replace(TINY, mlp_width=8))
    with pytest.raises(UserError, match="trunk/layers_0/"):
        save_model(tmp_path / "model", model, random_params(other))

    class Large:
        vocab_size, bos_id, eos_id, pad_id = 41, 0, 1, 2

    with pytest.raises(UserError, match="41 ids, the model only 40"):
        save_model(tmp_path / "model", model, random_params(model), Large())  # type: ignore[arg-type]
    assert not (tmp_path / "model").exists()
