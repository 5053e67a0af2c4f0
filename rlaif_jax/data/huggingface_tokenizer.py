"""The tokenizer of a Hugging Face folder, run by the `tokenizers` library."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers as hf

from rlaif_jax.config import UserError
from rlaif_jax.data import special_tokens, tokenizer_files
from rlaif_jax.data.chat import template
from rlaif_jax.files import atomic_write, it_is

# Characters for private use, which no text has: the first is before a special token that is meant as text.
QUOTED, ALIAS = "\U0010fffd", "\U0010fffc"


def _steps(rule: Any) -> list[Mapping[str, Any]]:
    """Returns a rule of a tokenizer.json, or those of a sequence of rules."""
    if not isinstance(rule, Mapping):
        return []
    parts = rule.get("normalizers", rule.get("pretokenizers"))
    return [step for part in parts for step in _steps(part)] if isinstance(parts, list) else [rule]


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
        template_file: the file of the chat template, for messages.
        day: what a chat template that prints the day takes for it, YYYY-MM-DD; "": today. See `on_day`.
    """

    backend: hf.Tokenizer
    pad_id: int
    bos_id: int | None
    eos_id: int | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    other_stop_ids: tuple[int, ...] = ()
    template_file: str = "tokenizer"
    day: str = ""

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
        chat, file = template.read_templates(folder, settings)
        settings |= {} if chat is None else {"chat_template": chat}
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
        return cls(backend, tokenizer_files.choose_pad_id(found), found.get("bos"), eos, settings, others, file)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Returns the ids that end an answer, `eos_id` first; that of the chat template's turns last."""
        declared = ((self.eos_id,) if self.eos_id is not None else ()) + self.other_stop_ids
        if not self.settings.get("chat_template"):
            return declared
        added = {token.content: i for i, token in self.backend.get_added_tokens_decoder().items()}
        turn = template.turn_end(self.settings, self.template_file, list(added))
        return tuple(dict.fromkeys(declared + (() if turn is None else (added[turn],))))

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

    @cached_property
    def _puts_blank(self) -> bool:
        """Whether the vocabulary puts a blank before a text."""
        rules = json.loads(self.backend.to_str())
        steps = [step for key in ("normalizer", "pre_tokenizer") for step in _steps(rules.get(key))]
        return any(
            step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
            for step in steps
        )

    def encode(self, text: str, *, add_bos: bool = False, continues: bool = False) -> list[int]:
        """Returns the ids of `text`, after the BOS token where `add_bos`; see `Tokenizer.encode`."""
        tokenizer_files.require_unicode(text)
        if continues and self._puts_blank:
            return tokenizer_files.continued(self.encode, text)
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
        """Returns the same tokenizer for a model whose texts end where the next begins; see `Tokenizer`.

        It has no chat template, whose turns would end in another way.
        """
        bos = tokenizer_files.bos_prefix(self.bos_id, True)[0]
        settings = {**self.settings, "eos_token": self.backend.id_to_token(bos), "chat_template": None}
        return replace(self, eos_id=bos, other_stop_ids=(), settings=settings)

    def chat_text(self, messages: Sequence[template.Message]) -> str:
        """Returns a conversation as the text that a chat model reads, up to where its next message begins.

        The text has the BOS of the chat template. Data in a message is passed through `quote` first.

        Args:
            messages: each with `role` (system, user, assistant) and `content`.

        Raises:
            UserError: as `template.render`.
        """
        return template.render(self.settings, messages, self.template_file, day=self.day)

    @property
    def prints_day(self) -> bool:
        """Returns whether the chat template asks for the day."""
        return "strftime_now" in str(self.settings.get("chat_template"))

    def on_day(self, day: str) -> HuggingFaceTokenizer:
        """Returns the same tokenizer, for which it always is that day, YYYY-MM-DD: a resumed run needs it."""
        return replace(self, day=day)

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
        tokenizer_files.write_stop_ids(path.parent, self.stop_ids if len(self.stop_ids) > 1 else ())


def _alias(index: int) -> str:
    """Returns the name of a special token that a question writes next to quoted text."""
    return f"{ALIAS}{index}{ALIAS}"
