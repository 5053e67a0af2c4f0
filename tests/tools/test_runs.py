"""The policy of a run's folder: of each of its checkpoints, bit for bit, or a line that says why not."""

import json
import shutil

import jax
import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.data.world.vocabulary import VOCABULARY
from rlaif_jax.models import ScalarModel
from rlaif_jax.models.hf.classifiers import save_reward_model
from rlaif_jax.models.hf.files import load_model, save_model
from rlaif_jax.models.lora import LoRAConfig
from rlaif_jax.recipes.world.models import ModelsConfig, world_model, world_tokenizer
from rlaif_jax.tools.runs import is_run, load_run_policy
from tests.helpers import assert_same_leaves, random_params
from tests.tools.run_folders import (
    LORA,
    MODEL,
    TOKENIZER,
    policy_of,
    write_checkpoints,
    write_folder,
    write_lm,
    write_run,
)


@pytest.mark.parametrize(("step", "read"), [(None, 4), (2, 2), (4, 4)])
def test_the_weights_are_those_of_the_checkpoint_on_one_device(made, step, read):
    policy = load_run_policy(made / "whole", step)
    assert policy.step == read and policy.adapter is None and policy.model.config == MODEL.config
    assert_same_leaves(policy.params, policy_of(read))
    assert all(len(x.devices()) == 1 for x in jax.tree.leaves(policy.params))
    assert policy.tokenizer.encode("a b") == TOKENIZER.encode("a b") and policy.tokenizer.settings["chat_template"]


def test_an_adapter_is_merged_and_kept(made):
    policy = load_run_policy(made / "lora", 2)
    adapter, base = policy_of(2, LORA), load_model(made / "lm")[1]
    assert policy.adapter.lora == LORA and policy.adapter.base_name == str(made / "lm")
    assert_same_leaves(policy.adapter.params, adapter)
    q = adapter["trunk"]["layers_0"]["q"]
    product = np.asarray(q["lora_a"], np.float64) @ np.asarray(q["lora_b"], np.float64)
    want = np.asarray(base["trunk"]["layers_0"]["q"]["kernel"], np.float64) + 32.0 / 2 * product
    np.testing.assert_allclose(policy.params["trunk"]["layers_0"]["q"]["kernel"], want, atol=1e-5)
    assert_same_leaves(policy.params["trunk"]["layers_0"]["k"], base["trunk"]["layers_0"]["k"])


def test_the_dtype_is_that_of_activations_alone(made):
    policy = load_run_policy(made / "whole", dtype="bfloat16")
    assert policy.model.config.compute_dtype == "bfloat16"
    assert {x.dtype.name for x in jax.tree.leaves(policy.params)} == {"float32"}


def test_a_run_of_the_world_needs_no_file_of_a_model(tmp_path):
    size = ModelsConfig(num_layers=1, width=12, num_heads=2, head_dim=6)
    model = world_model(size, world_tokenizer())
    write_folder(tmp_path / "run", size)
    settings = json.loads((tmp_path / "run/config.json").read_text())
    (tmp_path / "run/config.json").write_text(json.dumps({"seed": 0, "task": "dialogue", "models": settings}))
    write_checkpoints(tmp_path / "run", {7: policy_of(7, model=model)})
    policy = load_run_policy(tmp_path / "run")
    assert policy.step == 7 and policy.bos is False and policy.model.config == model.config
    assert policy.tokenizer.vocab_size == len(VOCABULARY)
    assert_same_leaves(policy.params, policy_of(7, model=model))


def test_a_run_without_a_checkpoint_has_the_model_that_it_left(tmp_path):
    write_folder(tmp_path / "run", LORA)
    params = random_params(MODEL, 5)
    save_model(tmp_path / "run/model", MODEL, params, TOKENIZER)
    policy = load_run_policy(tmp_path / "run")
    assert policy.step is None
    assert_same_leaves(policy.params, params)


def test_where_the_first_model_is_gone_the_one_that_the_run_left_has_its_shape(made, tmp_path):
    shutil.copytree(made / "lm", tmp_path / "lm")
    write_run(tmp_path / "run", tmp_path / "lm")
    shutil.move(tmp_path / "lm", tmp_path / "run/model")
    assert_same_leaves(load_run_policy(tmp_path / "run").params, policy_of(4))


def test_what_is_a_run(made, tmp_path):
    assert is_run(made / "whole")
    assert not is_run(made / "lm") and not is_run(tmp_path) and not is_run(tmp_path / "none")


# ---- Faults


def edit(folder, **changed):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def no_folder(path):
    shutil.rmtree(path / "run")


def no_settings(path):
    (path / "run/config.json").unlink()


def damaged_settings(path):
    (path / "run/config.json").write_text("{")


def settings_are_a_list(path):
    (path / "run/config.json").write_text("[]")


def no_checkpoint(path):
    shutil.rmtree(path / "run/checkpoints")


def damaged_checkpoint(path):
    shutil.rmtree(path / "run/checkpoints/4/arrays/d")


def no_host(path):
    shutil.rmtree(path / "run/checkpoints/4/host")


def other_shape(path):
    edit(path / "run", adapter={"rank": 3, "alpha": 32.0, "targets": ["q", "v", "down"]})


def bad_adapter(path):
    edit(path / "run", adapter={"rank": 0})


def changed_base(path):
    write_lm(path / "lm", seed=8)


def no_base(path):
    shutil.rmtree(path / "lm")


def no_base_but_a_merged_model(path):
    shutil.move(path / "lm", path / "run/model")


def unknown_experiment(path):
    (path / "run/config.json").write_text(json.dumps({"seed": 0, "words": 9}))


def bad_world(path):
    (path / "run/config.json").write_text(json.dumps({"models": {"width": "wide"}}))


def a_reward_model(path):
    no_checkpoint(path)
    scorer = ScalarModel(MODEL.config, bias=False)
    save_reward_model(path / "run/model", scorer, random_params(scorer), TOKENIZER)


FAULTS = {
    no_folder: "there is no such folder",
    no_settings: "is not the folder of a run, which holds config.json",
    damaged_settings: "config.json: cannot be read as JSON",
    settings_are_a_list: "a run's settings are one JSON object",
    no_checkpoint: "this run has no checkpoint yet, and no folder model",
    damaged_checkpoint: "checkpoints/4: no policy can be read from this checkpoint",
    no_host: "checkpoints/4: no policy can be read from this checkpoint",
    other_shape: "of another model or adapter: trunk/layers_0/down/lora_a is float32[48, 2] there and "
    "float32[48, 3] by the settings; trunk/layers_0/down/lora_b",
    bad_adapter: "lora.rank must be >= 1, not 0",
    changed_base: "the adapter was trained on other weights than those that are at",
    no_base: "the model that this run began with cannot be read: no model at",
    no_base_but_a_merged_model: "the model that this run began with cannot be read: no model at",
    unknown_experiment: "config.json names no model (policy, model or models)",
    bad_world: "config.json: models: width: should be a whole number, not 'wide'",
    a_reward_model: "this run trained a reward model (LlamaForSequenceClassification), which writes no answers",
}


# Orbax ends its event loop at the first array that it cannot read: see `checkpoint._report_all_but_closed_loops`.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_cannot_be_read_is_one_line(fault, tmp_path):
    write_lm(tmp_path / "lm")
    write_run(tmp_path / "run", tmp_path / "lm", lora=LoRAConfig(rank=2, targets=LORA.targets), steps=(4,))
    fault(tmp_path)
    with pytest.raises(UserError) as error:
        load_run_policy(tmp_path / "run")
    assert FAULTS[fault] in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_that_is_not_there_is_named_with_those_that_are(made):
    with pytest.raises(UserError, match=r"there is no checkpoint of step 3; those that are left are of step 2, 4"):
        load_run_policy(made / "whole", 3)
