"""Text to token ids and back: four kinds of tokenizer behind one small interface.

========================  ==========================================  ==========================
kind                      read from                                   saved as
========================  ==========================================  ==========================
`HuggingFaceTokenizer`    `tokenizer.json`, `vocab.json + merges.txt`  `tokenizer.json` (+ config)
`SentencePieceTokenizer`  `*.model`                                   `tokenizer.model`
`Llama2cTokenizer`        llama2.c's `tok*.bin`                       `tokenizer.bin`
`WordTokenizer`           `words.json`                                `words.json`
========================  ==========================================  ==========================

All four are immutable. `load_tokenizer(folder_or_file)` finds out which kind it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers as hf

from rlaif_jax.config import UserError
from rlaif_jax.data.llama2c import Llama2cTokenizer
from rlaif_jax.data.tokenizer_files import (
    TOKENIZER_FILES,
    PathLike,
    bos_prefix,
    byte_name,
    choose_pad_id,
    hash_vocabulary,
    merges_beside,
    not_one_token,
    own_place,
    read_bytes,
    read_json_object,
    read_text,
    write_file,
)

__all__ = [
    "HuggingFaceTokenizer",
    "Llama2cTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "WordTokenizer",
    "check_tokenizer",
    "load_tokenizer",
]


class Tokenizer(Protocol):
    """What the rest of the project knows about a tokenizer.

    `vocab_size` is the largest id + 1. `pad_id` is always an id that a model can look up: where there is no
    padding token it is <unk>, else EOS, else 0. So masks must never be made by comparing with it.
    `fingerprint` hashes the vocabulary: tokenizers with equal fingerprints give every id the same token.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        """The ids of `text`, without any special token except the BOS that `add_bos` puts first.

        Raises:
            UserError: `add_bos` and the vocabulary has no BOS token.
        """
        ...

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids` (list or one-dimensional array); ids outside the vocabulary stand for nothing.

        Models whose embedding is padded beyond the tokenizer's vocabulary can sample such ids.
        """
        ...

    def token_id(self, token: str) -> int:
        """The id of the one token that stands for `token` in the middle of a text.

        A space counts: `" yes"` is another token than `"yes"` (the world's words have no spaces).
        A special token is named as it is spelled (`"</s>"`).

        Raises:
            UserError: `token` is not one token of the vocabulary.
        """
        ...

    def save(self, folder: PathLike) -> None:
        """Write into `folder` (made if missing) what `load_tokenizer` needs to give the same tokenizer back.

        Raises:
            UserError: the folder is not writable, or holds another kind that would be found first.
        """
        ...


def load_tokenizer(folder_or_file: PathLike) -> Tokenizer:
    """The tokenizer in a folder (a Hugging Face model folder, or what `save` wrote), or in one file.

    Args:
        folder_or_file: a folder, searched for `TOKENIZER_FILES` in that order; or a `tokenizer.json`,
            `*vocab.json` (with `*merges.txt` beside it), `*.model`, `*.bin` or `words.json`.

    Raises:
        UserError: nothing there, no tokenizer in it (lists what was looked for), or an unreadable file.
    """
    path = Path(folder_or_file)
    if path.is_dir():
        for name in TOKENIZER_FILES:
            if (path / name).is_file() and (name != "vocab.json" or merges_beside(path / name).is_file()):
                return load_tokenizer(path / name)
        looked_for = ", ".join(n if n != "vocab.json" else "vocab.json with merges.txt" for n in TOKENIZER_FILES)
        raise UserError(f"no tokenizer in the folder {path}: looked for {looked_for}")
    if not path.exists():
        raise UserError(f"no tokenizer at {path}: there is no such file or folder")
    if path.name == "words.json":
        return WordTokenizer.read(path)
    if path.name.endswith("vocab.json"):
        return HuggingFaceTokenizer.read_pair(path, merges_beside(path))
    if path.suffix == ".json":
        return HuggingFaceTokenizer.read(path)
    if path.suffix == ".model":
        return SentencePieceTokenizer.read(path)
    if path.suffix == ".bin":
        return Llama2cTokenizer.read(path)
    raise UserError(
        f"{path} is not a tokenizer file: expected tokenizer.json, vocab.json, *.model, *.bin or words.json"
    )


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int, where: str) -> None:
    """Refuse a tokenizer that knows more ids than the model has embeddings (`vocab_size`).

    A smaller tokenizer is fine: many models pad their embedding to a round number.

    Args:
        where: what the message should name, such as the model's folder.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{where}: this tokenizer is of another vocabulary: it has {tokenizer.vocab_size} ids, "
            f"the model only {vocab_size}; use the tokenizer that the model was trained with"
        )


# ---------------------------------------------------------------------------------------------- Hugging Face


@dataclass(frozen=True, eq=False)
class HuggingFaceTokenizer:
    """A `tokenizer.json`, run by the `tokenizers` library.

    Special tokens that a text spells out (`<|endoftext|>`) become their ids, as in `transformers`: chat
    templates rest on it. The template's post-processor is not applied: `encode` adds nothing unasked.

    Attributes:
        settings: the folder's `tokenizer_config.json`, completed by the names of the special tokens that the
            other files of the folder gave; `save` writes it back, chat template included.
    """

    backend: hf.Tokenizer
    pad_id: int
    bos_id: int | None
    eos_id: int | None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: PathLike) -> HuggingFaceTokenizer:
        """Read a `tokenizer.json`; special ids from the files beside it."""
        path = Path(path)
        try:
            backend = hf.Tokenizer.from_str(read_text(path))
        except Exception as error:  # the library raises bare Exception
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is not a readable tokenizer.json: {error}") from error
        return cls._with_special_tokens(backend, path.parent)

    @classmethod
    def read_pair(cls, vocab: PathLike, merges: PathLike) -> HuggingFaceTokenizer:
        """Read GPT-2's older form, `vocab.json` and `merges.txt`, with GPT-2's rule for splitting words.

        Raises:
            UserError: the folder names a tokenizer of other rules (as Qwen2's), whose ids would differ.
        """
        vocab, merges = Path(vocab), Path(merges)
        if not merges.is_file():
            raise UserError(f"{vocab} needs its merges beside it: there is no file {merges}")
        settings = read_json_object(vocab.parent / "tokenizer_config.json")
        kind = settings.get("tokenizer_class")
        if kind is not None and not str(kind).startswith(("GPT2", "PreTrainedTokenizer")):
            raise UserError(
                f"{vocab.parent}: vocab.json and merges.txt alone are read by GPT-2's rules, but the "
                f"folder names {kind}; add its tokenizer.json (transformers' save_pretrained writes one)"
            )
        try:
            model = hf.models.BPE.from_file(str(vocab), str(merges))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{vocab} and {merges} are not a readable vocabulary and merges: {error}") from error
        backend = hf.Tokenizer(model)
        backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(
            add_prefix_space=bool(settings.get("add_prefix_space", False))
        )
        backend.decoder = hf.decoders.ByteLevel()
        if backend.token_to_id("<|endoftext|>") is not None:
            backend.add_special_tokens([hf.AddedToken("<|endoftext|>", normalized=False, special=True)])
        return cls._with_special_tokens(backend, vocab.parent)

    @classmethod
    def _with_special_tokens(cls, backend: hf.Tokenizer, folder: Path) -> HuggingFaceTokenizer:
        # A file may carry the truncation and padding of whoever saved it; here every text is encoded whole.
        backend.no_truncation()
        backend.no_padding()
        settings = read_json_object(folder / "tokenizer_config.json")
        template = folder / "chat_template.jinja"
        if template.is_file():
            settings.setdefault("chat_template", read_text(template))
        names = read_json_object(folder / "special_tokens_map.json")
        models = [read_json_object(folder / f) for f in ("generation_config.json", "config.json")]

        found: dict[str, int] = {}
        for role in ("bos", "eos", "pad", "unk"):
            ids = [backend.token_to_id(n) for n in (_name(d.get(f"{role}_token")) for d in (settings, names)) if n]
            for model in models:
                value = model.get(f"{role}_token_id")
                # Llama 3 lists several EOS ids; the first is the one that ends a text.
                value = value[0] if isinstance(value, list) and value else value
                if isinstance(value, int) and backend.id_to_token(value) is not None:
                    ids.append(value)
            known = [i for i in ids if i is not None]
            if known:
                found[role] = known[0]
                settings.setdefault(f"{role}_token", backend.id_to_token(known[0]))
        if not {"bos", "eos"} & set(found):
            # Nothing beside the vocabulary says; GPT-2's one special token is both.
            end = backend.token_to_id("<|endoftext|>")
            if end is not None:
                found["bos"] = found["eos"] = end
                settings.update(bos_token="<|endoftext|>", eos_token="<|endoftext|>")
        special = [backend.id_to_token(found[r]) for r in ("bos", "eos", "pad") if r in found]
        backend.add_special_tokens([hf.AddedToken(t, normalized=False, special=True) for t in special])
        return cls(backend, choose_pad_id(found), found.get("bos"), found.get("eos"), settings)

    @cached_property
    def vocab_size(self) -> int:
        return 1 + max(self._ids.values(), default=-1)

    @cached_property
    def fingerprint(self) -> str:
        return hash_vocabulary(
            f"{i}\t{t}".encode(errors="replace") for t, i in sorted(self._ids.items(), key=lambda x: x[1])
        )

    @cached_property
    def _ids(self) -> dict[str, int]:
        return self.backend.get_vocab(with_added_tokens=True)

    @cached_property
    def _byte_level(self) -> bool:
        parts = (self.backend.pre_tokenizer, self.backend.decoder)
        return any(b"ByteLevel" in part.__getstate__() for part in parts if part is not None)

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        return bos_prefix(self.bos_id, add_bos) + self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        known = [i for i in map(int, ids) if 0 <= i < self.vocab_size]
        return self.backend.decode(known, skip_special_tokens=skip_special)

    def token_id(self, token: str) -> int:
        if token in {t.content for t in self.backend.get_added_tokens_decoder().values()}:
            return self._ids[token]
        if self._byte_level:
            # Spelled in the vocabulary with one printable character for each byte: " yes" is "Ġyes".
            spell = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            spelled = "".join(piece for piece, _ in spell.pre_tokenize_str(token))
        else:
            spelled = token.replace(" ", "▁")
        for name in (spelled, token, byte_name(token)):
            if name in self._ids:
                return self._ids[name]
        ids = self.encode(token)
        unknown = self._ids.get(_name(self.settings.get("unk_token")) or "")
        if len(ids) != 1 or ids[0] == unknown:
            raise not_one_token(token, [self.backend.id_to_token(i) for i in ids])
        return ids[0]

    def save(self, folder: PathLike) -> None:
        path = own_place(folder, "tokenizer.json")
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **self.settings}
        write_file(path, self.backend.to_str(pretty=True).encode())
        write_file(
            path.with_name("tokenizer_config.json"),
            json.dumps(settings, indent=2, ensure_ascii=False).encode(),
        )


def _name(token: Any) -> str | None:
    """A special token's name: the files hold a plain string or `{"content": "..."}`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


# ---------------------------------------------------------------------------------------------- SentencePiece


@dataclass(frozen=True, eq=False)
class SentencePieceTokenizer:
    """A SentencePiece `.model`, run by the `sentencepiece` library (Llama 2, Gemma, T5 ...).

    Texts get the model's own leading space, which `decode` takes away again at the start: `decode(encode(x))`
    is x up to the model's normalisation, and the text of a continuation alone loses its first space.
    """

    model: bytes

    @classmethod
    def read(cls, path: PathLike) -> SentencePieceTokenizer:
        """Read a `.model` file."""
        tokenizer = cls(read_bytes(Path(path)))
        try:
            size = tokenizer.vocab_size
        except Exception as error:
            raise UserError(
                f"{path} is not a readable SentencePiece model: {error or 'it cannot be parsed'}"
            ) from error
        if size == 0:
            raise UserError(f"{path} is not a readable SentencePiece model: it has no pieces")
        return tokenizer

    @cached_property
    def _processor(self) -> Any:
        # An empty model is parsed as a valid empty message, and the library then aborts later.
        if not self.model:
            raise ValueError("it is empty")
        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    @cached_property
    def vocab_size(self) -> int:
        return int(self._processor.get_piece_size())

    @cached_property
    def pad_id(self) -> int:
        sp = self._processor
        roles = {"pad": sp.pad_id(), "unk": sp.unk_id(), "eos": sp.eos_id()}
        return choose_pad_id({role: i for role, i in roles.items() if i >= 0})

    @cached_property
    def bos_id(self) -> int | None:
        i = self._processor.bos_id()
        return i if i >= 0 else None

    @cached_property
    def eos_id(self) -> int | None:
        i = self._processor.eos_id()
        return i if i >= 0 else None

    @cached_property
    def fingerprint(self) -> str:
        return hash_vocabulary(self._processor.id_to_piece(i).encode() for i in range(self.vocab_size))

    @cached_property
    def _special(self) -> frozenset[int]:
        control = [i for i in range(self.vocab_size) if self._processor.is_control(i)]
        return frozenset([*control, self.pad_id])

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        return bos_prefix(self.bos_id, add_bos) + list(self._processor.encode(text))

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        known = [i for i in map(int, ids) if 0 <= i < self.vocab_size]
        if skip_special:
            return self._processor.decode([i for i in known if i not in self._special])
        parts: list[str] = []
        run: list[int] = []
        for i in known:
            if i in self._special:
                parts += [self._processor.decode(run), self._processor.id_to_piece(i)]
                run = []
            else:
                run.append(i)
        return "".join([*parts, self._processor.decode(run)])

    def token_id(self, token: str) -> int:
        sp = self._processor
        for name in (token, token.replace(" ", "▁"), byte_name(token)):
            i = sp.piece_to_id(name)
            if sp.id_to_piece(i) == name:  # piece_to_id gives <unk> for what it does not know
                return int(i)
        raise not_one_token(token, sp.encode(token, out_type=str))

    def save(self, folder: PathLike) -> None:
        write_file(own_place(folder, "tokenizer.model"), self.model)


# ---------------------------------------------------------------------------------------------- words


@dataclass(frozen=True)
class WordTokenizer:
    """One id for each word between white space: the tokenizer of the synthetic world.

    Ids 0 to 3 are `<pad> <bos> <eos> <unk>`, then `words` in their order. A word not listed is `<unk>`.
    """

    words: tuple[str, ...]

    specials = ("<pad>", "<bos>", "<eos>", "<unk>")
    pad_id = 0
    bos_id = 1
    eos_id = 2
    unk_id = 3

    def __post_init__(self) -> None:
        seen = set(self.specials)
        for i, word in enumerate(self.words):
            if not isinstance(word, str) or not word or word.split() != [word]:
                raise UserError(f"word {i} of the vocabulary is {word!r}: it should be a string without white space")
            if word in seen:
                raise UserError(f"word {i} of the vocabulary is {word!r}, which is in it already")
            seen.add(word)

    @classmethod
    def read(cls, path: PathLike) -> WordTokenizer:
        """Read a `words.json`: `{"words": ["...", ...]}`."""
        words = read_json_object(Path(path)).get("words")
        if not isinstance(words, list):
            raise UserError(f'{path} should be {{"words": ["...", ...]}}: it has no list "words"')
        try:
            return cls(tuple(words))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    @cached_property
    def fingerprint(self) -> str:
        return hash_vocabulary(token.encode() for token in self._tokens)

    @cached_property
    def _tokens(self) -> tuple[str, ...]:
        return self.specials + self.words

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self._tokens)}

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        return bos_prefix(self.bos_id, add_bos) + [self._ids.get(word, self.unk_id) for word in text.split()]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        # <unk> stands for a word that was there, so it stays.
        skipped = {self.pad_id, self.bos_id, self.eos_id} if skip_special else set()
        return " ".join(self._tokens[i] for i in map(int, ids) if 0 <= i < self.vocab_size and i not in skipped)

    def token_id(self, token: str) -> int:
        if token not in self._ids:
            raise not_one_token(token, [self._tokens[i] for i in self.encode(token)])
        return self._ids[token]

    def save(self, folder: PathLike) -> None:
        write_file(
            own_place(folder, "words.json"),
            json.dumps({"words": self.words}, indent=0, ensure_ascii=False).encode(),
        )
