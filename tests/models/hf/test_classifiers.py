"""Reward models as transformers' classifiers of one label: the same scores, out and in."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.data.tokenizers import load_tokenizer, word_level_tokenizer
from rlaif_jax.models import CausalLM, ScalarModel
from rlaif_jax.models.heads import gather_last
from rlaif_jax.models.hf.classifiers import load_reward_model, save_reward_model
from rlaif_jax.models.hf.files import load_model, save_model
from tests.data.token_folders import byte_tokenizer_folder
from tests.helpers import assert_same_leaves, random_params
from tests.models.hf.references import REFERENCES, TINY, build_reference

TOKENIZER = word_level_tokenizer(tuple(f"w{i}" for i in range(93)))  # 97 ids, as the models of the references
STOP = TOKENIZER.stop_ids[0]
FAMILIES = ("gpt2", "llama-untied", "llama-tied-linear", "llama-biases", "qwen2", "qwen3")


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Three texts of 19, 12 and 1 tokens, right padded, each closed by the stop token."""
    tokens = np.random.default_rng(0).integers(4, 97, (3, 19)).astype(np.int32)
    mask = np.arange(19) < np.array([19, 12, 1])[:, None]
    tokens[np.arange(3), mask.sum(1) - 1] = STOP
    return np.where(mask, tokens, TOKENIZER.pad_id), mask


def theirs(folder: Path, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The scores that transformers computes from a folder, which it finds out the class of."""
    torch = pytest.importorskip("torch", reason="torch is the oracle of these tests and is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle and is not installed")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    assert model.config.num_labels == 1
    with torch.no_grad():
        out = model(input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long())
    return out.logits[:, 0].float().numpy()


def ours(model: ScalarModel, params: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.asarray(gather_last(jax.jit(model)(params, tokens, mask), mask))


@pytest.fixture(scope="module", params=FAMILIES)
def trunk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    build_reference(REFERENCES[request.param], folder)
    return folder


def test_transformers_computes_the_scores_of_what_we_save(trunk: Path, tmp_path: Path) -> None:
    language_model, params = load_model(trunk)
    model = ScalarModel(language_model.config, "normal", bias=False)
    params = model.init(jax.random.key(1), trunk=params["trunk"])
    save_reward_model(tmp_path / "rm", model, params, TOKENIZER)
    scores = ours(model, params, *texts())
    assert np.ptp(scores) > 0.1
    np.testing.assert_allclose(theirs(tmp_path / "rm", *texts()), scores, atol=1e-4)
    again, read, tokenizer = load_reward_model(tmp_path / "rm")
    assert again == model
    assert_same_leaves(read, params)
    assert tokenizer.fingerprint == TOKENIZER.fingerprint


def test_a_classifier_of_transformers_is_read(trunk: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is the oracle of these tests and is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle and is not installed")
    torch.manual_seed(1)
    made = transformers.AutoModelForSequenceClassification.from_pretrained(
        trunk, num_labels=1, pad_token_id=TOKENIZER.pad_id
    )
    made.save_pretrained(tmp_path)
    TOKENIZER.save(tmp_path)
    model, params, _ = load_reward_model(tmp_path)
    scores = ours(model, params, *texts())
    assert np.ptp(scores) > 1e-3
    np.testing.assert_allclose(scores, theirs(tmp_path, *texts()), atol=1e-4)


def rewarding(tokenizer: Any, vocab_size: int = 0) -> tuple[ScalarModel, Any]:
    config = dataclasses.replace(TINY, vocab_size=vocab_size or tokenizer.vocab_size)
    model = ScalarModel(config, "normal", bias=False)
    return model, random_params(model, scale=0.2)


@pytest.mark.parametrize("unknown", ["<|unk|>", None])
def test_a_stop_token_that_is_also_padding_is_read_all_the_same(unknown: str | None, tmp_path: Path) -> None:
    """With the stop token as padding transformers would read the score one token too early."""
    special = ["<|end|>", *([unknown] if unknown else [])]
    settings = {"eos_token": "<|end|>", "pad_token": "<|end|>", **({"unk_token": unknown} if unknown else {})}
    folder = byte_tokenizer_folder(tmp_path / "t", *special, tokenizer_config=settings)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_id == tokenizer.eos_id
    model, params = rewarding(tokenizer)
    save_reward_model(tmp_path / "rm", model, params, tokenizer)
    read, read_params, saved = load_reward_model(tmp_path / "rm")
    assert saved.pad_id not in saved.stop_ids and saved.stop_ids == tokenizer.stop_ids
    assert read.config.vocab_size == tokenizer.vocab_size + (unknown is None)
    ids = [*tokenizer.encode("hello"), tokenizer.eos_id]
    assert saved.encode("hello") == ids[:-1]
    tokens, mask = np.full((2, 9), saved.pad_id, np.int32), np.zeros((2, 9), bool)
    tokens[:, : len(ids)], mask[:, : len(ids)] = ids, True
    tokens[1, 0] = tokenizer.encode("x")[0]
    scores = ours(model, params, np.where(mask, tokens, 0), mask)
    np.testing.assert_allclose(theirs(tmp_path / "rm", tokens, mask), scores, atol=1e-4)
    np.testing.assert_allclose(ours(read, read_params, tokens, mask), scores, atol=1e-6)


def test_a_classifier_that_pads_with_its_stop_token_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, params = rewarding(TOKENIZER)
    save_reward_model(tmp_path, model, params, TOKENIZER)
    edit(tmp_path, pad_token_id=STOP)
    load_reward_model(tmp_path)
    assert "takes its stop token for padding" in capsys.readouterr().err


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


BAD = {
    "two labels": ({"num_labels": 2}, "this classifier has 2 labels"),
    "labels by name": (
        {"num_labels": None, "id2label": {"0": "a", "1": "b", "2": "c"}},
        "this classifier has 3 labels",
    ),
    "a language model": ({"architectures": ["LlamaForCausalLM"]}, "not LlamaForCausalLM"),
    "no architecture": ({"architectures": None}, "not unnamed"),
}


@pytest.mark.parametrize("bad", BAD)
def test_other_folders_are_refused(bad: str, tmp_path: Path) -> None:
    model, params = rewarding(TOKENIZER)
    save_reward_model(tmp_path, model, params, TOKENIZER)
    edit(tmp_path, **BAD[bad][0])
    with pytest.raises(UserError, match=BAD[bad][1]):
        load_reward_model(tmp_path)


def test_weights_without_a_score_are_refused(tmp_path: Path) -> None:
    language_model = CausalLM(dataclasses.replace(TINY, vocab_size=TOKENIZER.vocab_size))
    save_model(tmp_path, language_model, random_params(language_model), TOKENIZER)
    edit(tmp_path, architectures=["LlamaForSequenceClassification"], num_labels=1)
    with pytest.raises(UserError, match=r"asks for the tensor score\.weight"):
        load_reward_model(tmp_path)


def test_a_bias_and_other_parameters_are_not_written(tmp_path: Path) -> None:
    model, params = rewarding(TOKENIZER)
    with pytest.raises(UserError, match="have no bias"):
        save_reward_model(tmp_path / "a", dataclasses.replace(model, bias=True), params, TOKENIZER)
    with pytest.raises(UserError, match="not of this model: head/scalar/kernel"):
        save_reward_model(tmp_path / "a", model, {"trunk": params["trunk"]}, TOKENIZER)
    with pytest.raises(UserError, match="of another vocabulary"):
        save_reward_model(tmp_path / "a", *rewarding(TOKENIZER, 40), TOKENIZER)
    assert not (tmp_path / "a").exists()
