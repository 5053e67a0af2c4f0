"""Text to token ids and back: three kinds of tokenizer behind one small interface.

========================  ==========================================  ==========================
kind                      read from                                   saved as
========================  ==========================================  ==========================
`HuggingFaceTokenizer`    `tokenizer.json`, `vocab.json + merges.txt`  `tokenizer.json` (+ config)
`SentencePieceTokenizer`  `*.model`                                   `tokenizer.model`
`Llama2cTokenizer`        llama2.c's `tok*.bin`                       `tokenizer.bin`
========================  ==========================================  ==========================

All are immutable. `load_tokenizer(folder_or_file)` finds out which kind it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import tokenizers as hf

from rlaif_jax.config import UserError
from rlaif_jax.data import chat_template, hub, special_tokens, tokenizer_files
from rlaif_jax.data.llama2c import Llama2cTokenizer
from rlaif_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rlaif_jax.files import atomic_write, it_is

# Characters for private use, which no text has: the first is before a special token that is meant as text.
QUOTED, ALIAS = "\U0010fffd", "\U0010fffc"


class Tokenizer(Protocol):
    """The interface of a tokenizer that the rest of the project uses."""

    @property
    def vocab_size(self) -> int:
        """Returns the largest id + 1."""

    @property
    def pad_id(self) -> int:
        """Returns an id that a model can look up: the padding token, else <unk>, else EOS, else 0.

        Masks must never be made by comparing with it.
        """

    @property
    def bos_id(self) -> int | None:
        """Returns the id of the token that begins a text; None where the vocabulary has none."""

    @property
    def eos_id(self) -> int | None:
        """Returns the id of the token that is written at the end of texts; None without such a token."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Returns the ids that end an answer: `eos_id` first, then each other that the model's files declare."""

    @property
    def fingerprint(self) -> str:
        """Returns a hash of the vocabulary: where two are equal, every id is the same token in both."""

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        """Returns the ids of `text`, without any special token except the BOS that `add_bos` puts first.

        A text that begins with its BOS already, as chat templates write it, gets no second one.

        Raises:
            UserError: `add_bos` and the vocabulary has no BOS token.
        """

    def quote(self, text: str) -> str:
        """Returns `text` so that `encode` takes special tokens that it spells for text.

        It is for data within a question, such as the answer that a judge reads.
        """

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Returns the text of token ids.

        The token for what the vocabulary lacks (<unk>) is no special token: it is in the place of a word.
        Models whose embedding is padded beyond the tokenizer's vocabulary can sample ids outside it: they have no text.

        Args:
            ids: a list or one-dimensional array.
            skip_special: leave special tokens such as EOS out of the text.
        """

    def token_id(self, token: str) -> int:
        """Returns the id of the one token that `token` becomes in the middle of a text.

        A space counts: `" yes"` is another token than `"yes"` (the world's words have no spaces).
        A special token is named as it is spelled (`"</s>"`).

        Raises:
            UserError: `token` is not one token of the vocabulary.
        """

    def stopping_at_bos(self) -> Tokenizer:
        """Returns the same tokenizer for a model whose texts end where the next begins.

        Raises:
            UserError: the vocabulary has no BOS token.
        """

    def save(self, folder: tokenizer_files.PathLike) -> None:
        """Writes into `folder` (made if missing) what `load_tokenizer` needs to give the same tokenizer back.

        Raises:
            UserError: the folder is not writable, or holds another kind that would be found first.
        """


def load_tokenizer(folder_or_file: tokenizer_files.PathLike) -> Tokenizer:
    """Reads the tokenizer of a folder (a model's, or what `save` wrote), of one file, or from the hub.

    Args:
        folder_or_file: a folder, searched for `tokenizer_files.FILE_NAMES` in that order; a `tokenizer.json`,
            `*vocab.json` (with `*merges.txt` in its folder), `*.model` or `*.bin`; or, where there is no such path, a hub
            id, as `load_model` takes it.

    Raises:
        UserError: nothing there, no tokenizer in it (lists what was looked for), an unreadable file, or an end token that
            is in no vocabulary.
    """
    path = Path(folder_or_file)
    if not path.exists():
        path = hub.download(str(folder_or_file), hub.TOKENIZER_FILES, "tokenizer")
    if path.is_dir():
        path = tokenizer_files.find(path)
    if path.name.endswith("vocab.json"):
        return HuggingFaceTokenizer.read_pair(path, tokenizer_files.merges_of(path))
    if path.suffix == ".json":
        return HuggingFaceTokenizer.read(path)
    if path.suffix == ".model":
        return SentencePieceTokenizer.read(path)
    if path.suffix == ".bin":
        return Llama2cTokenizer.read(path)
    raise UserError(
        f"{path} is not a tokenizer file: expected tokenizer.json, vocab.json, *.model or *.bin{it_is(path)}"
    )


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int, where: str) -> None:
    """Raises UserError for a tokenizer that knows more ids than the model has embeddings.

    A smaller tokenizer is fine: many models pad their embedding to a round number.

    Args:
        tokenizer: the tokenizer.
        vocab_size: the number of the model's embeddings.
        where: begins the message, such as the model's folder.
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

    Special tokens that a text spells out (`<|endoftext|>`) become their ids, as in `transformers`, because chat
    templates rely on it; those in a text from `quote` do not. The post-processor is not applied: `encode` adds nothing
    unasked.

    Attributes:
        backend: the library's tokenizer.
        pad_id: see `Tokenizer`, as for the next two.
        bos_id: the token that begins a text.
        eos_id: the token that is written at the end of a text.
        other_stop_ids: further tokens that end an answer.
        settings: the folder's `tokenizer_config.json`, completed by the names of the special tokens that the other
            files of the folder gave; `save` writes it back, chat template included.
    """

    backend: hf.Tokenizer
    pad_id: int
    bos_id: int | None
    eos_id: int | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    other_stop_ids: tuple[int, ...] = ()

    @classmethod
    def read(cls, path: tokenizer_files.PathLike) -> HuggingFaceTokenizer:
        """Reads a `tokenizer.json`, and the special ids from the other files of its folder.

        Raises:
            UserError: the file is not a readable tokenizer.json.
        """
        path = Path(path)
        text = tokenizer_files.read_text(path)
        try:
            backend = hf.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} is not a readable tokenizer.json: {error}{it_is(path)}") from error
        return cls._with_special_tokens(backend, path.parent)

    @classmethod
    def read_pair(cls, vocab: tokenizer_files.PathLike, merges: tokenizer_files.PathLike) -> HuggingFaceTokenizer:
        """Reads GPT-2's older form, `vocab.json` and `merges.txt`, with GPT-2's rule for splitting words.

        Raises:
            UserError: the folder names a tokenizer of other rules (as Qwen2's), whose ids would differ.
        """
        vocab, merges = Path(vocab), Path(merges)
        if not merges.is_file():
            raise UserError(f"{vocab} needs its merges: there is no file {merges}")
        settings = tokenizer_files.read_json_object(vocab.parent / "tokenizer_config.json")
        kind = settings.get("tokenizer_class")
        if kind is not None and not str(kind).startswith(("GPT2", "PreTrainedTokenizer")):
            raise UserError(
                f"{vocab.parent}: vocab.json and merges.txt alone are read by GPT-2's rules, but the "
                f"folder names {kind}; add its tokenizer.json (transformers' save_pretrained writes one)"
            )
        try:
            model = hf.models.BPE.from_file(str(vocab), str(merges))
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"{vocab} and {merges} are not a readable vocabulary and merges: {error}{it_is(vocab)}"
            ) from error
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
        settings = tokenizer_files.read_json_object(folder / "tokenizer_config.json")
        template = folder / "chat_template.jinja"
        if template.is_file():
            settings["chat_template"] = tokenizer_files.read_text(template)
        special_tokens.add_missing(backend, folder)
        named = {role: special_tokens.named_token(folder, role) for role in ("bos", "eos", "pad", "unk")}
        declared = {role: special_tokens.declared_ids(folder, role) for role in named}
        found: dict[str, int] = {}
        for role, of_role in named.items():
            index = backend.token_to_id(of_role[0]) if of_role else None
            if role == "eos" and of_role and index is None:
                raise special_tokens.not_in_vocabulary(folder, *of_role)
            known = [i for i in (index, *declared[role]) if i is not None and backend.id_to_token(i) is not None]
            if known:
                found[role] = known[0]
                if not special_tokens.token_name(settings.get(f"{role}_token")):
                    settings[f"{role}_token"] = backend.id_to_token(known[0])
        if not (named["bos"] or named["eos"] or {"bos", "eos"} & set(found)):
            # No other file names them; GPT-2's one special token is both.
            end = backend.token_to_id("<|endoftext|>")
            if end is not None:
                found["bos"] = found["eos"] = end
                settings.update(bos_token="<|endoftext|>", eos_token="<|endoftext|>")
        special = [backend.id_to_token(found[r]) for r in ("bos", "eos", "pad") if r in found]
        backend.add_special_tokens([hf.AddedToken(t, normalized=False, special=True) for t in special])
        eos = found.get("eos")
        others = tuple(i for i in declared["eos"] if i != eos)
        return cls(backend, tokenizer_files.choose_pad_id(found), found.get("bos"), eos, settings, others)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Returns the ids that end an answer, `eos_id` first."""
        return ((self.eos_id,) if self.eos_id is not None else ()) + self.other_stop_ids

    @cached_property
    def vocab_size(self) -> int:
        """Returns the largest id + 1."""
        return 1 + max(self._ids.values(), default=-1)

    @cached_property
    def fingerprint(self) -> str:
        """Returns a hash of the vocabulary."""
        return tokenizer_files.hash_vocabulary(
            f"{i}\t{t}".encode(errors="replace") for t, i in sorted(self._ids.items(), key=lambda x: x[1])
        )

    @cached_property
    def _ids(self) -> dict[str, int]:
        return self.backend.get_vocab(with_added_tokens=True)

    @cached_property
    def _byte_level(self) -> bool:
        parts = (self.backend.pre_tokenizer, self.backend.decoder)
        return any(b"ByteLevel" in part.__getstate__() for part in parts if part is not None)

    @cached_property
    def _special(self) -> dict[str, int]:
        """The special tokens of the vocabulary and their ids, the longest first."""
        added = self.backend.get_added_tokens_decoder().items()
        return {t.content: i for i, t in sorted(added, key=lambda x: -len(x[1].content)) if t.special}

    @cached_property
    def _plain(self) -> tuple[hf.Tokenizer, dict[int, int]]:
        """The tokenizer for quoted texts, which takes special tokens for text, and {its id: the id}.

        A special token that the question itself has is written by another name there (`_alias`).
        """
        plain = hf.Tokenizer.from_str(self.backend.to_str())
        plain.encode_special_tokens = True
        meant: dict[int, int] = {}
        for index, token in self.backend.get_added_tokens_decoder().items():
            if token.special:
                flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
                plain.add_tokens([hf.AddedToken(_alias(index), normalized=False, special=False, **flags)])
                alias = plain.token_to_id(_alias(index))
                assert alias is not None
                meant[alias] = index
        return plain, meant

    @cached_property
    def _words(self) -> frozenset[str]:
        """The special tokens that are words of the vocabulary too: text that spells them has their id."""
        plain = self._plain[0]
        return frozenset(name for name, i in self._special.items() if i in plain.encode(name).ids)

    def _pattern(self, before: str = "") -> re.Pattern[str]:
        return re.compile(before + "(?:" + "|".join(map(re.escape, self._special)) + ")")

    def quote(self, text: str) -> str:
        """Returns `text` with a mark before each special token that it spells; see `Tokenizer.quote`.

        Where the vocabulary looks up whole words, a mark does not help: there `<eos>` becomes `< eos>`.
        """
        if not self._special:
            return text
        broken = lambda name: f"{name[0]} {name[1:]}" if name in self._words else QUOTED + name
        return self._pattern().sub(lambda found: broken(found[0]), text)

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        """Returns the ids of `text`, after the BOS token where `add_bos`; see `Tokenizer.encode`."""
        if QUOTED in text and self._special:
            plain, meant = self._plain
            name = lambda found: _alias(self._special[found[0]])
            text = self._pattern(f"(?<!{QUOTED})").sub(name, text.replace(ALIAS, "")).replace(QUOTED, "")
            ids = [meant.get(i, i) for i in plain.encode(text, add_special_tokens=False).ids]
        else:
            ids = self.backend.encode(text, add_special_tokens=False).ids
        bos = tokenizer_files.bos_prefix(self.bos_id, add_bos)
        return ids if ids[:1] == bos else bos + ids

    def stopping_at_bos(self) -> HuggingFaceTokenizer:
        """Returns the same tokenizer for a model whose texts end where the next begins; see `Tokenizer`."""
        bos = tokenizer_files.bos_prefix(self.bos_id, True)[0]
        settings = {**self.settings, "eos_token": self.backend.id_to_token(bos)}
        return replace(self, eos_id=bos, other_stop_ids=(), settings=settings)

    def chat_text(self, messages: Sequence[chat_template.Message]) -> str:
        """Returns a conversation as the text that a chat model reads, up to where its next message begins.

        The text has the BOS of the chat template. Data in a message is passed through `quote` first.

        Args:
            messages: each with `role` (system, user, assistant) and `content`.

        Raises:
            UserError: the folder has no chat template, or it does not take these messages.
        """
        return chat_template.render(self.settings, messages)

    @cached_property
    def _skipped(self) -> frozenset[int]:
        """The special tokens that are in the place of no word."""
        unknown = self._ids.get(special_tokens.token_name(self.settings.get("unk_token")) or "")
        return frozenset(i for i in self._special.values() if i != unknown or i in (self.bos_id, *self.stop_ids))

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Returns the text of `ids`, without special tokens if `skip_special`; see `Tokenizer.decode`."""
        known = [i for i in map(int, ids) if 0 <= i < self.vocab_size]
        if skip_special:
            row = tokenizer_files.without_padding(known, self.pad_id, self.bos_id, self.stop_ids)
            known = [i for i in row if i not in self._skipped]
        return self.backend.decode(known, skip_special_tokens=False)

    def token_id(self, token: str) -> int:
        """Returns the id of a text that is one token; raises UserError for other texts."""
        if token in {t.content for t in self.backend.get_added_tokens_decoder().values()}:
            return self._ids[token]
        if self._byte_level:
            # Spelled in the vocabulary with one printable character for each byte: " yes" is "Ġyes".
            spell = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            spelled = "".join(piece for piece, _ in spell.pre_tokenize_str(token))
        else:
            spelled = token.replace(" ", "▁")
        for name in (spelled, token, tokenizer_files.byte_name(token)):
            if name in self._ids:
                return self._ids[name]
        ids = self.encode(token)
        unknown = self._ids.get(special_tokens.token_name(self.settings.get("unk_token")) or "")
        if len(ids) != 1 or ids[0] == unknown:
            raise tokenizer_files.not_one_token(token, [self.backend.id_to_token(i) for i in ids])
        return ids[0]

    def save(self, folder: tokenizer_files.PathLike) -> None:
        """Writes the tokenizer into a folder, made if missing; see `Tokenizer.save`."""
        path = tokenizer_files.own_place(folder, "tokenizer.json")
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **self.settings}
        with atomic_write(path) as file:
            file.write(self.backend.to_str(pretty=True))
        with atomic_write(path.with_name("tokenizer_config.json")) as file:
            json.dump(settings, file, indent=2, ensure_ascii=False)
        tokenizer_files.write_stop_ids(path.parent, self.stop_ids if self.other_stop_ids else ())


def _alias(index: int) -> str:
    """Returns the name of a special token that a question writes next to quoted text."""
    return f"{ALIAS}{index}{ALIAS}"


WORD_SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")  # the first ids of `word_level_tokenizer`


def word_level_tokenizer(words: Sequence[str]) -> HuggingFaceTokenizer:
    """Returns a tokenizer with one id for each word between white space: that of the synthetic world.

    Ids 0 to 3 are `WORD_SPECIALS`, then come `words` in their order. Any other word is `<unk>`.

    Raises:
        UserError: a word that is empty, holds white space, or is in the vocabulary already.
    """
    ids = {token: i for i, token in enumerate(WORD_SPECIALS)}
    for i, word in enumerate(words):
        if not isinstance(word, str) or not word or word.split() != [word]:
            raise UserError(f"word {i} of the vocabulary is {word!r}: it should be a string without white space")
        if word in ids:
            raise UserError(f"word {i} of the vocabulary is {word!r}, which is in it already")
        ids[word] = len(ids)
    backend = hf.Tokenizer(hf.models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    # <unk> is not special: it replaces a word of the text, so `decode` keeps it.
    backend.add_special_tokens([hf.AddedToken(t, normalized=False, special=True) for t in WORD_SPECIALS[:3]])
    settings = {f"{token[1:-1]}_token": token for token in WORD_SPECIALS}
    return HuggingFaceTokenizer(backend, pad_id=0, bos_id=1, eos_id=2, settings=settings)
