"""Checkpoints of llama2.c: the real stories260K model, damaged files, and one written by hand."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.data.tokenizers import load_tokenizer
from rlaif_jax.models.hf.files import load_model, save_model
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.policies.text import generate
from rlaif_jax.types import Prompts
from tests.models.hf.references import (
    DATA,
    assert_same_params,
    needs_stories,
    padded_batch,
    reference_logits,
)

# -------------------------------------------------------------------------------------------------- stories260K


@needs_stories
def test_stories260k_is_the_same_from_the_binary_and_the_folder() -> None:
    model, params = load_model(DATA / "lm_stories260k" / "stories260K.bin")
    other, others = load_model(DATA / "lm_stories260k_hf")
    assert model == other
    assert_same_params(params, others)


@needs_stories
def test_stories260k_tells_the_reference_story(tmp_path: Path) -> None:
    """Greedy text equals the published one; through the cache, and every token is the argmax of one whole pass."""
    page = (DATA / "lm_stories260k" / "stories260K.md").read_text()
    story = page.split("tok512.bin -t 0.0\n")[1].split("\n```")[0]
    assert story.startswith("Once upon a time")
    assert len(story) > 500
    tokenizer = load_tokenizer(DATA / "lm_stories260k" / "tok512.bin")
    save_model(tmp_path / "saved", *load_model(DATA / "lm_stories260k" / "stories260K.bin"), tokenizer)
    model, params = load_model(tmp_path / "saved")
    tokenizer = load_tokenizer(tmp_path / "saved")
    start = Prompts(tokens=jnp.array([[tokenizer.bos_id]]), mask=jnp.ones((1, 1), bool), uid=jnp.zeros(1, jnp.uint32))
    rollout = jax.jit(
        lambda p: generate(
            model,
            p,
            start,
            jax.random.key(0),
            sampling=SamplingConfig(256, temperature=0.0),
            eos_id=tokenizer.bos_id,
            pad_id=0,
        )
    )(params)
    assert tokenizer.decode(np.asarray(rollout.tokens[0]).tolist()).strip().startswith(story)
    logits = jax.jit(model)(params, rollout.tokens, np.ones(rollout.tokens.shape, bool))
    np.testing.assert_array_equal(np.argmax(logits[0, :-1], axis=-1), rollout.tokens[0, 1:])


@needs_stories
def test_stories260k_in_transformers(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is the oracle of this test and is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle and is not installed")
    model, params = load_model(DATA / "lm_stories260k" / "stories260K.bin")
    save_model(tmp_path / "saved", model, params, load_tokenizer(DATA / "lm_stories260k" / "tok512.bin"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager").eval()
    assert theirs.config.bos_token_id == 1
    tokens, mask = padded_batch()
    want = reference_logits(theirs, tokens, mask)
    got = np.asarray(jax.jit(model)(params, tokens, mask))
    assert np.abs(got - want)[mask].max() <= 1e-4


@needs_stories
@pytest.mark.parametrize(
    "spoil, named",
    [
        (lambda data: data[:-4], "cut short"),
        (lambda data: data + b"0000", "header asks for"),
        (lambda data: data[:20], "too few"),
        (lambda data: data[:28] + b"\0\0\xc0\x7f" + data[32:], "embedding holds NaN"),
        (lambda data: b"24ka" + data[4:], "version 1 or 2"),
        (lambda data: b"PK\x03\x04" + data[4:], "no shape of a model"),
    ],
)
def test_bad_llama2c_files(spoil: Callable[[bytes], bytes], named: str, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(spoil((DATA / "lm_stories260k" / "stories260K.bin").read_bytes()))
    with pytest.raises(UserError, match=rf"model\.bin.*{named}"):
        load_model(path)


def test_untied_llama2c_file(tmp_path: Path) -> None:
    """A file written out by hand: the sign of the vocabulary, the order of the matrices, the pairs of rows."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    depth, width, hidden, heads, groups, vocab, context, h = 2, 8, 6, 2, 1, 5, 3, 4
    embedding, norm1, q, k, v = (
        draw(vocab, width),
        draw(depth, width),
        draw(depth, width, width),
        draw(depth, groups * h, width),
        draw(depth, groups * h, width),
    )
    o, norm2, gate = draw(depth, width, width), draw(depth, width), draw(depth, hidden, width)
    down, up, norm, head = (
        draw(depth, width, hidden),
        draw(depth, hidden, width),
        draw(width),
        draw(vocab, width),
    )
    header = np.array([width, hidden, depth, heads, groups, -vocab, context], np.int32)
    tensors = [embedding, norm1, q, k, v, o, norm2, gate, down, up, norm, draw(context, h), head]
    (tmp_path / "model.bin").write_bytes(b"".join(x.tobytes() for x in (header, *tensors)))
    model, params = load_model(tmp_path / "model.bin")
    assert not model.config.tie_embeddings
    order = [0, 2, 1, 3]
    for i in range(depth):
        block = params["trunk"][f"layers_{i}"]
        np.testing.assert_array_equal(block["q"]["kernel"].T, q[i][[*order, *(4 + i for i in order)]])
        np.testing.assert_array_equal(block["k"]["kernel"].T, k[i][order])
        for name, want in {"v": v, "o": o, "gate": gate, "up": up, "down": down}.items():
            np.testing.assert_array_equal(block[name]["kernel"], want[i].T, err_msg=name)
        np.testing.assert_array_equal(block["norm2"]["scale"], norm2[i])
    np.testing.assert_array_equal(params["trunk"]["norm"]["scale"], norm)
    np.testing.assert_array_equal(params["lm_head"]["kernel"], head.T)
