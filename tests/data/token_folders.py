"""Folders with a tokenizer of the 256 bytes and special tokens, as models' folders declare them in several files."""

import json
from pathlib import Path

import tokenizers as hf


def byte_tokenizer_folder(folder: Path, *special: str, **files: object) -> Path:
    """Writes a tokenizer.json of the 256 bytes with `special` tokens from id 256 on, and JSON files by name."""
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    made = hf.Tokenizer(hf.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = hf.decoders.ByteLevel()
    made.add_special_tokens([hf.AddedToken(token, normalized=False, special=True) for token in special])
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder
