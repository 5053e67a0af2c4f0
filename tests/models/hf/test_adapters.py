"""Adapters in peft's format: the same logits and gradients as peft's, both ways; what is foreign or damaged is named."""

import copy
import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
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
from rlaif_jax.models.hf.adapters import load_adapter, save_adapter
from rlaif_jax.models.hf.files import load_model, load_with_tokenizer, save_model
from rlaif_jax.models.lora import LoRAConfig
from tests.helpers import assert_same_leaves, relative_distance
from tests.models.hf.references import REFERENCES, TINY, build_reference, padded_batch, random_params, reference_logits

needs_peft = pytest.mark.skipif(
    find_spec("peft") is None, reason="peft is the oracle of these tests and is not installed"
)
GPT2 = ("q", "k", "v", "o", "up", "down")
FAMILIES = {
    "llama-untied": LoRAConfig(3, 5.0),
    "qwen2": LoRAConfig(3, 5.0, ("q", "v"), rslora=True),
    "qwen3": LoRAConfig(2, 7.0, ("q", "k", "gate", "down")),
    "gpt2": LoRAConfig(3, 5.0, GPT2),
    "gpt2 rslora": LoRAConfig(3, 5.0, GPT2, rslora=True),
    "gpt2 part": LoRAConfig(2, 4.0, ("q", "v", "down")),
}
TOKENS, MASK = padded_batch()


def random_adapter(lora: LoRAConfig, model: CausalLM, seed: int = 1) -> Any:
    tree = jax.eval_shape(lambda key: lora.init(key, model.init(key)), jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), jnp.float32), tree)


@functools.cache
def reference(name: str, root: Path) -> tuple[Any, CausalLM, Any]:
    """A transformers model and ours with the same weights."""
    folder = root / name
    made = build_reference(REFERENCES[name.partition(" ")[0]], folder)
    return made, *load_model(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("references")


def with_adapter(made: Any, folder: Path) -> Any:
    """peft's model of an adapter; a copy of the base, whose layers peft replaces."""
    import peft

    return peft.PeftModel.from_pretrained(copy.deepcopy(made), folder, is_trainable=True).eval()


def our_logits(model: CausalLM, params: Any) -> np.ndarray:
    return np.asarray(jax.jit(model)(params, TOKENS, MASK))


# ---- With peft


@needs_peft
@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # of transformers, by peft
@pytest.mark.parametrize("name", FAMILIES)
def test_base_and_adapter_equal_merged_and_peft(name, root, tmp_path):
    made, model, base = reference(name, root)
    lora = FAMILIES[name]
    adapter = random_adapter(lora, model)
    save_adapter(tmp_path / "adapter", model, lora, adapter)
    want = reference_logits(with_adapter(made, tmp_path / "adapter"), TOKENS, MASK)
    got, merged = (our_logits(model, over(base, adapter)) for over in (lora.join, lora.merge))
    np.testing.assert_allclose(got[MASK], want[MASK], atol=1e-5)
    np.testing.assert_allclose(merged[MASK], want[MASK], atol=1e-5)
    assert np.abs(want - our_logits(model, base))[MASK].max() > 0.5
    read, params = load_adapter(tmp_path / "adapter", model)
    assert read == lora
    assert_same_leaves(params, adapter)
    save_model(tmp_path / "merged", model, lora.merge(base, adapter))
    again, whole = load_model(tmp_path / "merged")
    np.testing.assert_array_equal(our_logits(again, whole), merged)


@needs_peft
@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # of transformers, by peft
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama-untied", {"target_modules": "all-linear"}),
        ("qwen3", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "lora_dropout": 0.1}),
        ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": ["c_attn"], "alpha_pattern": {"attn.c_attn": 9}, "fan_in_fan_out": True}),
    ],
)
def test_what_peft_writes_is_read(name, settings, root, tmp_path):
    import peft
    import torch

    made, model, base = reference(name, root)
    settings = {"r": 4, "lora_alpha": 6} | settings
    wrapped = peft.get_peft_model(copy.deepcopy(made), peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for key, p in wrapped.named_parameters():
            if "lora_B" in key:
                p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(key))))
    wrapped.save_pretrained(tmp_path)
    lora, adapter = load_adapter(tmp_path, model)
    want = reference_logits(wrapped, TOKENS, MASK)
    np.testing.assert_allclose(our_logits(model, lora.join(base, adapter))[MASK], want[MASK], atol=1e-5)
    assert (lora.rank, lora.alpha, lora.rslora) == (4, 6.0, "use_rslora" in settings)
    # Written again it is the same adapter, of the same rank also in GPT-2.
    save_adapter(tmp_path / "again", model, lora, adapter)
    first, again = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(first[key].shape == again[key].shape for key in first)
    np.testing.assert_allclose(
        reference_logits(with_adapter(made, tmp_path / "again"), TOKENS, MASK)[MASK], want[MASK], atol=1e-5
    )


@needs_peft
@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # of transformers, by peft
@pytest.mark.parametrize("name", ["llama-untied", "qwen2", "gpt2"])
def test_gradients_equal_peft_s(name, root, tmp_path):
    """Of the cross-entropy of one batch, by torch's autograd through peft's layers; of c_attn by its blocks."""
    import torch

    made, model, base = reference(name, root)
    lora = FAMILIES[name]
    adapter = random_adapter(lora, model)
    save_adapter(tmp_path, model, lora, adapter)
    wrapped = with_adapter(made, tmp_path)
    tokens = TOKENS[:1]
    wrapped(input_ids=torch.tensor(tokens).long(), labels=torch.tensor(tokens).long()).loss.backward()
    grads = {key: p.grad.numpy() for key, p in wrapped.named_parameters() if p.grad is not None}

    def loss(adapter):
        logits = jax.nn.log_softmax(model(lora.join(base, adapter), tokens, np.ones_like(tokens, bool))[:, :-1])
        return -jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1))

    got = jax.jit(jax.grad(loss))(adapter)
    # The gradients of peft's tensors, read as an adapter: those outside of B's blocks are not trained here.
    file = tmp_path / "adapter_model.safetensors"
    written = load_file(file)
    assert len(grads) == len(written)
    named = {key.replace(".default", ""): value for key, value in grads.items()}
    inside = {key: np.where(written[key] != 0, named[key], 0) for key in written}
    save_file(inside, file)
    _, want = load_adapter(tmp_path, model)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert relative_distance(x, y) < 2e-5, jax.tree_util.keystr(path)


@needs_peft
@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # of transformers, by peft
@pytest.mark.parametrize("name", ["llama-untied", "gpt2"])
def test_the_folder_of_an_adapter_is_read_as_the_model_that_peft_makes_of_it(name, root, tmp_path):
    import peft

    _, model, base = reference(name, root)
    lora = FAMILIES[name]
    adapter = random_adapter(lora, model)
    save_adapter(tmp_path / "adapter", model, lora, adapter, base_name=str(root / name))
    again, params = load_model(tmp_path / "adapter")
    assert again == model
    assert_same_leaves(params, lora.merge(base, adapter))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").merge_and_unload().eval()
    want = reference_logits(theirs, TOKENS, MASK)
    np.testing.assert_allclose(our_logits(again, params)[MASK], want[MASK], atol=1e-5)


# ---- Without it


def test_names_and_shapes_are_peft_s(tmp_path):
    model, lora = CausalLM(TINY), LoRAConfig(3, 5.0, ("q", "down"))
    save_adapter(tmp_path / "a", model, lora, random_adapter(lora, model), base_name="org/base")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["self_attn.q_proj", "mlp.down_proj"]
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 5.0, "org/base")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 2
    assert tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].shape == (3, 16)
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"].shape == (3, TINY.mlp_width)
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].shape == (16, 3)


def test_an_older_adapter_is_replaced_and_nothing_else(tmp_path):
    model, lora = CausalLM(TINY), LoRAConfig(1)
    for seed in (1, 2):
        save_adapter(tmp_path / "a", model, lora, random_adapter(lora, model, seed))
    assert_same_leaves(load_adapter(tmp_path / "a", model)[1], random_adapter(lora, model, 2))
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt, which belongs to no adapter"):
        save_adapter(tmp_path / "a", model, lora, random_adapter(lora, model))
    with pytest.raises(
        UserError, match=r"not an adapter of this model with these settings: trunk/layers_0/down/lora_a"
    ):
        save_adapter(tmp_path / "b", model, LoRAConfig(2), random_adapter(lora, model))
    with pytest.raises(UserError, match=r"not an adapter of this model .*: trunk/"):
        save_adapter(tmp_path / "b", model, lora, random_params(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
A, B = NAME.format("A"), NAME.format("B")
ZEROS = np.zeros((16, 16), np.float32)


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in values.items() if value != "absent"}))

    return edit


def edit_tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return edit


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


BAD = {
    "no folder": (shutil.rmtree, ["no adapter_config.json there"]),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), ["no adapter_config.json there", "safetensors"]),
    "config is cut": (lambda f: (f / "adapter_config.json").write_text('{"r": 3,'), ["config.json: not JSON", "line 1"]),
    "config is a list": (lambda f: (f / "adapter_config.json").write_text("[]"), ["adapter_config.json", "object"]),
    "another method": (edit_config(peft_type="IA3"), ["peft_type='IA3'", "'LORA'"]),
    "DoRA": (edit_config(use_dora=True), ["use_dora=True is not supported", "False"]),
    "biases": (edit_config(bias="lora_only"), ["bias='lora_only'", "'none'"]),
    "whole modules": (edit_config(modules_to_save=["lm_head"]), ["modules_to_save=['lm_head']"]),
    "some layers": (edit_config(layers_to_transform=[0]), ["layers_to_transform=[0]"]),
    "a changed base": (edit_config(init_lora_weights="pissa"), ["init_lora_weights='pissa'"]),
    "no alpha": (edit_config(lora_alpha="absent"), ["adapter_config.json: the field lora_alpha is missing"]),
    "alpha of infinity": (edit_config(lora_alpha=float("inf")), ["adapter_config.json: lora_alpha must be > 0 and finite"]),
    "alpha of 0": (edit_config(lora_alpha=0), ["lora_alpha must be > 0"]),
    "no rank": (edit_config(r="absent"), ["adapter_config.json: the field r is missing"]),
    "rank of 0": (edit_config(r=0), ["r must be at least 1"]),
    "ranks by module": (edit_config(rank_pattern={"q_proj": 8}), ["rank_pattern for ['q_proj']", "one r"]),
    "alphas by module": (edit_config(alpha_pattern={"self_attn.q_proj": 8}), ["alpha_pattern for ['self_attn.q_proj']"]),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), ["adapter_model.safetensors is missing", "fetch"]),
    "pickle": (pickled, ["adapter_model.safetensors is missing", "safe_serialization=True"]),
    "cut short": (cut, ["adapter_model.safetensors", "is not whole"]),
    "empty": (edit_tensors(lambda t: t.clear()), ["holds no tensors"]),
    "another rank": (edit_config(r=4), ["layers.0.self_attn.q_proj.lora_A.weight has shape (3, 16)", "r=4 asks for (4, 16)"]),
    "another width": (edit_tensors(lambda t: t.update({B: np.zeros((24, 3), np.float32)})), [B, "(24, 3)", "asks for (16, 3)"]),
    "fewer layers": (
        edit_tensors(lambda t: [t.pop(key) for key in list(t) if ".layers.1." in key]),
        [".layers.1.", "is missing", "other layers than the base model (llama, 2 layers)"],
    ),
    "more layers": (
        edit_tensors(lambda t: t.update({A.replace(".1.", ".2."): t[A]})),
        [A.replace(".1.", ".2."), "no place in the base model (llama, 2 layers)"],
    ),
    "half a pair": (edit_tensors(lambda t: t.pop(B)), [B, "is missing"]),
    "another family": (
        edit_tensors(lambda t: t.update({"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": ZEROS})),
        ["transformer.h.0.attn.c_attn", "no place in the base model (llama"],
    ),
    "magnitudes": (
        edit_tensors(lambda t: t.update({A.replace("lora_A.weight", "lora_magnitude_vector"): ZEROS})),
        ["lora_magnitude_vector is no LoRA matrix"],
    ),
    "embeddings": (
        edit_tensors(lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": ZEROS})),
        ["lora_embedding_A is no LoRA matrix"],
    ),
    "NaN": (edit_tensors(lambda t: t.update({A: t[A] * np.float32("nan")})), [A, "holds NaN or infinite numbers"]),
    "integers": (edit_tensors(lambda t: t.update({A: t[A].astype(np.int8)})), [A, "I8"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def written(root) -> Path:
    lora = LoRAConfig(3, 5.0)
    save_adapter(root / "written", CausalLM(TINY), lora, random_adapter(lora, CausalLM(TINY)))
    return root / "written"


@pytest.mark.parametrize("case", BAD)
def test_foreign_and_damaged_adapters(case, written, tmp_path):
    edit, wanted = BAD[case]
    folder = shutil.copytree(written, tmp_path / "adapter")
    edit(folder)
    with pytest.raises(UserError) as caught:
        load_adapter(folder, CausalLM(TINY))
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message
    for part in wanted:
        assert part in message, message


# ---- As a model


def words(*names: str) -> Any:
    return word_level_tokenizer([*names, *(f"w{i}" for i in range(TINY.vocab_size - 4 - len(names)))])


@pytest.fixture
def over(tmp_path, monkeypatch) -> Callable[..., Path]:
    """Writes an adapter of rank 1 over a base, by default over a model that it writes, too."""
    monkeypatch.chdir(tmp_path)
    model, lora = CausalLM(TINY), LoRAConfig(1)
    save_model(tmp_path / "base", model, random_params(model), words("base"))

    def write(name: str, base: str | None, **changes: Any) -> Path:
        save_adapter(tmp_path / name, model, lora, random_adapter(lora, model), base_name=base)
        edit_config(**changes)(tmp_path / name)
        return tmp_path / name

    return write


def test_an_adapter_may_be_over_another_and_have_its_own_tokenizer(over, tmp_path, monkeypatch):
    lora, base = LoRAConfig(1), load_model("base")[1]
    merged = lora.merge(base, random_adapter(lora, CausalLM(TINY)))
    one, two = over("one", "base"), over("two", "one")
    monkeypatch.chdir("/")  # the paths of the bases are absolute
    assert_same_leaves(load_model(one)[1], merged)
    _, params, tokenizer = load_with_tokenizer(str(two))
    assert_same_leaves(params, lora.merge(merged, random_adapter(lora, CausalLM(TINY))))
    assert tokenizer.fingerprint == load_tokenizer(two).fingerprint == words("base").fingerprint
    words("own").save(one)
    for name in (one, two):
        found = load_with_tokenizer(str(name))[2].fingerprint
        assert found == load_tokenizer(name).fingerprint == words("own").fingerprint
    given = load_with_tokenizer(str(two), tmp_path / "base")[2]
    assert given.fingerprint == words("base").fingerprint


def test_an_adapter_with_its_own_tokenizer_ends_where_its_base_does(over, tmp_path):
    """As in transformers: the base's generation_config.json counts, and peft's folders have none."""
    one = over("one", "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load_with_tokenizer(str(one))[2].stop_ids == (2, 7)
    words("own").save(one)
    assert load_with_tokenizer(str(one))[2].stop_ids == (2, 7)
    assert load_with_tokenizer(str(one), one)[2].stop_ids == (2,), "a tokenizer that is named is taken as it is"


def test_the_files_of_an_adapter_of_the_hub_are_fetched(over, tmp_path, monkeypatch):
    over("hub/org/adapter", "none", base_model_name_or_path="org/base", revision="v1")
    shutil.move("base", "hub/org/base")
    asked = []

    def snapshot(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        folder = shutil.copytree(tmp_path / "hub" / name, tmp_path / "fetched" / name, dirs_exist_ok=True)
        for path in folder.iterdir():
            if not any(path.match(pattern) for pattern in allow_patterns):
                path.unlink()
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    _, params, tokenizer = load_with_tokenizer("org/adapter")
    lora = LoRAConfig(1)
    want = lora.merge(load_model("hub/org/base")[1], random_adapter(lora, CausalLM(TINY)))
    assert_same_leaves(params, want)
    assert tokenizer.fingerprint == words("base").fingerprint
    assert set(asked) == {("org/adapter", None), ("org/base", "v1")}


BAD_BASES = {
    "no such folder": ({"base_model_name_or_path": "/none/base"}, "no model at /none/base: there is no such file or folder"),
    "relative": ({"base_model_name_or_path": "../x/base"}, "(a relative path begins in the current folder): no model at ../x/"),
    "null": ({"base_model_name_or_path": None}, "base_model_name_or_path is None: write there the folder or the hub id"),
    "absent": ({"base_model_name_or_path": "absent"}, "base_model_name_or_path is None"),
    "a number": ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3"),
    "itself": ({"base_model_name_or_path": "adapter"}, "the adapter is its own base model"),
    "another method": ({"peft_type": "IA3"}, "peft_type='IA3' is not supported"),
    "another base": ({"r": 2}, "r=2 asks for (2, 16)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_BASES)
def test_an_adapter_whose_base_cannot_be_read(case, over):
    changes, message = BAD_BASES[case]
    folder = over("adapter", "base", **changes)
    with pytest.raises(UserError) as caught:
        load_model(folder)
    assert message in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_whole_model_is_read_although_an_adapter_s_settings_are_next_to_it(over):
    (over("adapter", "base") / "adapter_config.json").rename("base/adapter_config.json")
    assert_same_leaves(load_model("base")[1], random_params(CausalLM(TINY)))


def test_the_adapter_of_another_model_is_refused(over, tmp_path):
    deeper = CausalLM(dataclasses.replace(TINY, num_layers=3))
    save_adapter(tmp_path / "deep", deeper, LoRAConfig(1), random_adapter(LoRAConfig(1), deeper), base_name="base")
    with pytest.raises(UserError, match=r"has no place in the base model \(llama, 2 layers\)"):
        load_model("deep")


def test_a_fused_matrix_of_mixed_blocks_is_refused(tmp_path):
    config = dataclasses.replace(
        TINY,
        positions="learned",
        norm="layer",
        mlp="gelu",
        num_kv_heads=4,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    )
    model, lora = CausalLM(config), LoRAConfig(3, 5.0, ("q", "k", "v"))
    save_adapter(tmp_path, model, lora, random_adapter(lora, model))
    key = "base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"
    edit_tensors(lambda t: t[key].__setitem__((0, 8), 1.0))(tmp_path)
    with pytest.raises(UserError, match=re.escape("rank_pattern gives attn.c_attn the rank 9, but one r=3 is read")):
        load_adapter(tmp_path, model)
