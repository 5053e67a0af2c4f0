"""An exported policy is what transformers and peft read; what cannot be exported is one line."""

import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.data.tokenizers import load_tokenizer
from rlaif_jax.models.hf.adapters import load_adapter
from rlaif_jax.models.hf.files import load_model
from rlaif_jax.tools.export import ExportConfig, main
from rlaif_jax.tools.runs import load_run_policy
from tests.helpers import assert_same_leaves
from tests.models.hf.references import reference_logits
from tests.tools.run_folders import LORA, MODEL, TOKENIZER, policy_of

TOKENS = np.random.default_rng(0).integers(3, TOKENIZER.vocab_size, (2, 9)).astype(np.int32)
MASK = np.ones((2, 9), bool)


def in_transformers(folder):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle and is not installed")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def our_logits(params):
    return np.asarray(jax.jit(MODEL)(params, TOKENS, MASK))


@pytest.mark.parametrize(("run", "step"), [("whole", None), ("whole", 2), ("lora", 2)])
def test_the_exported_model_has_the_logits_of_the_checkpoint(made, tmp_path, capsys, run, step):
    main(ExportConfig(str(made / run), tmp_path / "out", step))
    assert capsys.readouterr().out.endswith(f"the policy of {made / run}, step {step or 4}\n")
    policy = load_run_policy(made / run, step)
    want = our_logits(policy.params)
    np.testing.assert_allclose(reference_logits(in_transformers(tmp_path / "out"), TOKENS, MASK), want, atol=1e-5)
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.fingerprint == TOKENIZER.fingerprint and tokenizer.settings["chat_template"]


@pytest.mark.skipif(find_spec("peft") is None, reason="peft is the oracle of this test and is not installed")
@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # of transformers, by peft
def test_peft_puts_the_exported_adapter_on_the_base(made, tmp_path):
    import peft

    main(ExportConfig(str(made / "lora"), tmp_path / "out", adapter=True))
    wrapped = peft.PeftModel.from_pretrained(in_transformers(made / "lm"), tmp_path / "out").eval()
    want = our_logits(load_run_policy(made / "lora").params)
    np.testing.assert_allclose(reference_logits(wrapped, TOKENS, MASK), want, atol=1e-5)
    lora, params = load_adapter(tmp_path / "out", MODEL)
    assert lora == LORA
    assert_same_leaves(params, policy_of(4, LORA))


def test_an_adapter_is_written_as_its_base_with_it(made, tmp_path, capsys):
    main(ExportConfig(str(made / "lora"), tmp_path / "adapter", adapter=True))
    main(ExportConfig(str(tmp_path / "adapter"), tmp_path / "out"))
    assert capsys.readouterr().out.endswith(
        f"{tmp_path / 'out'}: {made / 'lm'} with the adapter {tmp_path / 'adapter'}\n"
    )
    assert_same_leaves(load_model(tmp_path / "out")[1], load_run_policy(made / "lora").params)
    assert load_tokenizer(tmp_path / "out").settings == load_tokenizer(made / "lm").settings
    for wrong, message in {"step": "--step chooses a checkpoint of a run", "adapter": "leave --adapter out"}.items():
        with pytest.raises(UserError, match=f"adapter is an adapter's folder: {message}"):
            main(ExportConfig(str(tmp_path / "adapter"), tmp_path / "other", **{wrong: 1}))


def test_an_older_export_is_replaced_and_the_run_stays(made, tmp_path):
    before = sorted(str(path) for path in (made / "whole").rglob("*"))
    for step in (2, 4):
        main(ExportConfig(str(made / "whole"), tmp_path / "out", step))
    assert_same_leaves(load_model(tmp_path / "out")[1], policy_of(4))
    assert sorted(str(path) for path in (made / "whole").rglob("*")) == before


BAD = {
    "no run": ({"run": ""}, "no run to export"),
    "no out": ({"out": None}, "no folder to write to: give --out"),
    "no such folder": ({"run": "HERE/none"}, "HERE/none: there is no such folder"),
    "a model": ({"run": "HERE/lm"}, "HERE/lm is not the folder of a run"),
    "no such step": ({"step": 3}, "there is no checkpoint of step 3"),
    "no adapter": ({"adapter": True}, "this run trained all weights and has no adapter: leave --adapter out"),
    "merged": ({"run": "HERE/left", "adapter": True}, "its folder model has no adapter apart: leave --adapter out"),
    "written": (
        {"run": "HERE/fitted", "adapter": True},
        "it has no checkpoint, and its adapter is already written to HERE/fitted/adapter: leave --adapter out",
    ),
    "over its base": (
        {"run": "HERE/lora", "out": Path("HERE/lm")},
        "HERE/lm is the model under the adapter, which cannot be",
    ),
    "other things": (
        {"out": Path("HERE/lora")},
        "HERE/lora holds checkpoints, summary.json, which belongs to no model",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_exported_is_one_line(bad, made, tmp_path):
    if not (made / "left").exists():
        shutil.copytree(made / "lora", made / "left", ignore=shutil.ignore_patterns("checkpoints"))
        shutil.copytree(made / "lm", made / "left/model")
        shutil.copytree(made / "left", made / "fitted")
        (made / "fitted/adapter").mkdir()
    changed, message = BAD[bad]
    here = lambda x: type(x)(str(x).replace("HERE", str(made))) if isinstance(x, (str, Path)) else x
    settings = {"run": str(made / "whole"), "out": tmp_path / "out"} | {name: here(x) for name, x in changed.items()}
    with pytest.raises(UserError, match=re.escape(here(message))) as error:
        main(ExportConfig(**settings))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
