"""The tokenizer in the header of a GGUF file, made into that of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers as hf

from rlaif_jax.config import UserError, require
from rlaif_jax.data import tokenizer_files
from rlaif_jax.data.gguf.file import GgufFile, read_gguf
from rlaif_jax.data.huggingface_tokenizer import HuggingFaceTokenizer

CONTROL, USER_DEFINED = 3, 4  # types of tokens
BYTES = "'(?:s|t|re|ve|m|ll|d)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"  # GPT-2's rule
LETTERS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+"
REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
LLAMA3 = (f"{LETTERS}|\\p{{N}}{{1,3}}{REST}",)
TEKKEN = (
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+"
    "|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*"
    "|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
)
QWEN2 = (f"{LETTERS}|\\p{{N}}{REST}",)
# tokenizer.ggml.pre -> the patterns that split a text into words, one after another (src/llama-vocab.cpp of llama.cpp).
SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": (BYTES,),
    "smollm": ("\\p{N}", BYTES),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), LLAMA3),
    "tekken": TEKKEN,
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), QWEN2),
}
# Of these, a word that is a token is that token, also where no merges lead to it.
WHOLE_WORDS = (LLAMA3, TEKKEN)


def read_gguf_tokenizer(path: str | Path) -> HuggingFaceTokenizer:
    """Reads the tokenizer of a GGUF file, with its chat template.

    Two kinds are read: byte-level BPE (`gpt2`) with the rules of `SPLITS`, and SentencePiece BPE (`llama`).

    Raises:
        UserError: the file is not readable (`read_gguf`), or holds no tokenizer of these kinds.
    """
    file = read_gguf(path)
    where, kind = f"{file.path}: tokenizer.ggml", _get(file, "model", str)
    tokens, types = _get(file, "tokens", list), _get(file, "token_type", list, [])
    require(
        bool(tokens) and all(isinstance(token, str) for token in tokens) and len(types) in (0, len(tokens)),
        f"{where}.tokens and token_type must be as many texts and numbers, not {len(tokens)} and {len(types)}",
    )
    require(kind in ("gpt2", "llama"), f"{where}.model={kind!r} is not supported; supported: 'gpt2', 'llama'")
    try:
        backend = _byte_level(file, tokens) if kind == "gpt2" else _sentencepiece(file, tokens)
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{where}.tokens and merges are of no tokenizer: {error}") from error
    special = [token for token, type_ in zip(tokens, types) if type_ == CONTROL]
    own = [token for token, type_ in zip(tokens, types) if type_ == USER_DEFINED]
    ids = {role: _id(file, name, tokens) for role, name in ROLES.items()}
    found = {role: i for role, i in ids.items() if i is not None}
    special += [tokens[found[role]] for role in ("bos", "eos", "pad") if role in found]
    backend.add_special_tokens([hf.AddedToken(token, normalized=False, special=True) for token in special])
    backend.add_tokens([hf.AddedToken(token, normalized=False, special=False) for token in own])
    settings: dict[str, Any] = {f"{role}_token": tokens[i] for role, i in found.items()}
    chat = file.metadata.get("tokenizer.chat_template")
    settings |= {} if chat is None else {"chat_template": chat}
    turns = [_id(file, name, tokens) for name in ("eot_token_id", "eom_token_id")]
    others = tuple(dict.fromkeys(i for i in turns if i is not None and i != ids["eos"]))
    return HuggingFaceTokenizer(
        backend,
        tokenizer_files.choose_pad_id(found),
        ids["bos"],
        ids["eos"],
        settings,
        others,
        f"{file.path} (tokenizer.chat_template)",
    )


ROLES = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id", "unk": "unknown_token_id"}


def _get(file: GgufFile, key: str, kind: type, default: Any = None) -> Any:
    value = file.metadata.get(f"tokenizer.ggml.{key}", default)
    require(
        isinstance(value, kind),
        f"{file.path}: tokenizer.ggml.{key} must be of type {kind.__name__}, not {str(value)[:40]}: without it the file "
        "holds no tokenizer",
    )
    return value


def _id(file: GgufFile, name: str, tokens: list[str]) -> int | None:
    value = file.metadata.get(f"tokenizer.ggml.{name}")
    require(
        value is None or (type(value) is int and 0 <= value < len(tokens)),
        f"{file.path}: tokenizer.ggml.{name} must be an id below {len(tokens)}, not {value!r}",
    )
    return value


def _byte_level(file: GgufFile, tokens: list[str]) -> hf.Tokenizer:
    split = file.metadata.get("tokenizer.ggml.pre")
    require(
        split in SPLITS,
        f"{file.path}: tokenizer.ggml.pre={split!r}, the rule that splits texts into words, is not supported; supported: "
        + ", ".join(SPLITS),
    )
    rules = SPLITS[str(split)]
    merges = [tuple(merge.split(" ")) for merge in _get(file, "merges", list)]
    wrong = next((merge for merge in merges if len(merge) != 2), None)
    require(wrong is None, f"{file.path}: tokenizer.ggml.merges has {wrong!r}, which is no pair of tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = hf.Tokenizer(hf.models.BPE(vocab=vocab, merges=merges, ignore_merges=rules in WHOLE_WORDS))
    if rules == QWEN2:
        backend.normalizer = hf.normalizers.NFC()  # as Qwen's own tokenizer.json; the file has no word of it
    backend.pre_tokenizer = hf.pre_tokenizers.Sequence(
        [hf.pre_tokenizers.Split(hf.Regex(rule), "isolated") for rule in rules]
        + [hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = hf.decoders.ByteLevel()
    return backend


def _sentencepiece(file: GgufFile, tokens: list[str]) -> hf.Tokenizer:
    """Returns the tokenizer of a vocabulary with scores: merges come in the order of their scores."""
    scores = _get(file, "scores", list)
    require(
        len(scores) == len(tokens),
        f"{file.path}: tokenizer.ggml.scores and tokens must be as many, not {len(scores)} and {len(tokens)}",
    )
    vocab = {token: i for i, token in reversed(list(enumerate(tokens)))}
    merges: list[tuple[str, str]] = []
    for i in sorted(vocab.values(), key=lambda i: (-scores[i], i)):
        splits = [(tokens[i][:cut], tokens[i][cut:]) for cut in range(1, len(tokens[i]))]
        merges += [(left, right) for left, right in splits if left in vocab and right in vocab]
    unknown = _id(file, "unknown_token_id", tokens)
    backend = hf.Tokenizer(
        hf.models.BPE(
            vocab=vocab,
            merges=merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space, decoders = hf.normalizers.Replace(" ", "▁"), hf.decoders
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if _get(file, "add_space_prefix", bool, True):
        backend.normalizer = hf.normalizers.Sequence([hf.normalizers.Prepend("▁"), space])
        parts.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = space
    backend.decoder = decoders.Sequence(parts)
    return backend
