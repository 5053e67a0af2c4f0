"""The tokenizer of a SentencePiece `.model` file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece

from rlaif_jax.config import UserError
from rlaif_jax.data import special_tokens, tokenizer_files
from rlaif_jax.files import atomic_write, it_is, read_bytes


@dataclass(frozen=True, eq=False)
class SentencePieceTokenizer:
    """A SentencePiece `.model`, run by the `sentencepiece` library (Llama 2, Gemma, T5 ...).

    Texts get the model's own leading space, which `decode` takes away again at the start: `decode(encode(x))`
    is x up to the model's normalisation, and the text of a continuation alone loses its first space. A special token
    that a text spells out is text.

    Attributes:
        model: the content of the file.
        stop_ids: the tokens that end an answer. The first, `eos_id`, is written at the end of texts.
    """

    model: bytes
    stop_ids: tuple[int, ...] = ()

    @classmethod
    def read(cls, path: tokenizer_files.PathLike) -> SentencePieceTokenizer:
        """Reads a `.model` file, and the tokens that end an answer from the other files of its folder.

        Raises:
            UserError: the file is no such model, or the folder names an end token that no vocabulary has.
        """
        tokenizer = cls(read_bytes(path))
        try:
            size = tokenizer.vocab_size
        except Exception as error:
            raise UserError(
                f"{path} is not a readable SentencePiece model: {error or 'it cannot be parsed'}{it_is(path)}"
            ) from error
        if size == 0:
            raise UserError(f"{path} is not a readable SentencePiece model: it has no pieces{it_is(path)}")
        return replace(tokenizer, stop_ids=tokenizer._declared_ends(Path(path).parent))

    def _declared_ends(self, folder: Path) -> tuple[int, ...]:
        """Returns the ids that end an answer: those that the folder declares, then the model's own EOS."""
        ends: list[int] = []
        if named := special_tokens.named_token(folder, "eos"):
            added = {token.content: i for i, token in special_tokens.added_tokens(folder).items()}
            index = self._processor.piece_to_id(named[0])
            if self._processor.id_to_piece(index) != named[0]:
                if named[0] not in added:
                    raise special_tokens.not_in_vocabulary(folder, *named)
                index = added[named[0]]
            ends.append(index)
        ends += special_tokens.declared_ids(folder, "eos")
        own = self._processor.eos_id()
        return tuple(dict.fromkeys([*ends, *([own] if own >= 0 else [])]))

    def stopping_at_bos(self) -> SentencePieceTokenizer:
        """Returns the same tokenizer for a model whose texts end where the next begins; see `Tokenizer`."""
        return replace(self, stop_ids=tuple(tokenizer_files.bos_prefix(self.bos_id, True)))

    @cached_property
    def _processor(self) -> Any:
        # An empty model is parsed as a valid empty message, and the library then aborts later.
        if not self.model:
            raise ValueError("it is empty")
        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    @cached_property
    def _size(self) -> int:
        """The number of the model's own pieces; ids behind them are added tokens."""
        return int(self._processor.get_piece_size())

    @cached_property
    def vocab_size(self) -> int:
        """Returns the largest id + 1."""
        return max(self._size, 1 + max(self.stop_ids[:1], default=-1))

    @cached_property
    def pad_id(self) -> int:
        """Returns the id to pad with."""
        sp = self._processor
        roles = {"pad": sp.pad_id(), "unk": sp.unk_id(), "eos": sp.eos_id()}
        return tokenizer_files.choose_pad_id({role: i for role, i in roles.items() if i >= 0})

    @cached_property
    def bos_id(self) -> int | None:
        """Returns the id of BOS, or None."""
        i = self._processor.bos_id()
        return i if i >= 0 else None

    @property
    def eos_id(self) -> int | None:
        """Returns the id of the token at the end of texts, or None."""
        return self.stop_ids[0] if self.stop_ids else None

    @cached_property
    def fingerprint(self) -> str:
        """Returns a hash of the vocabulary."""
        return tokenizer_files.hash_vocabulary(self._processor.id_to_piece(i).encode() for i in range(self._size))

    @cached_property
    def _special(self) -> frozenset[int]:
        control = {i for i in range(self._size) if self._processor.is_control(i)}
        # <unk> is in the place of a word, also where it serves as padding.
        return frozenset((control | {self.pad_id, *self.stop_ids}) - {self._processor.unk_id()})

    @cached_property
    def _spelled(self) -> str:
        """A pattern of the tokens in brackets that a text can spell (Gemma's `<start_of_turn>`)."""
        sp = self._processor
        names = ((i, sp.id_to_piece(i)) for i in range(self._size) if not (sp.is_control(i) or sp.is_byte(i)))
        brackets = [(i, name) for i, name in names if re.fullmatch(r"<.+>|\[.+\]", name)]
        return "|".join(re.escape(name) for i, name in brackets if i in sp.encode(name))

    def quote(self, text: str) -> str:
        """Returns `text` with a blank within each token in brackets that it spells; see `Tokenizer.quote`."""
        broken = lambda found: f"{found[0][0]} {found[0][1:]}"
        return re.sub(self._spelled, broken, text) if self._spelled else text

    def encode(self, text: str, *, add_bos: bool = False, continues: bool = False) -> list[int]:
        """Returns the ids of `text`, after the BOS token where `add_bos`; see `Tokenizer.encode`."""
        tokenizer_files.require_unicode(text)
        if continues:
            return tokenizer_files.continued(self.encode, text)
        return tokenizer_files.bos_prefix(self.bos_id, add_bos) + list(self._processor.encode(text))

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Returns the text of `ids`, without special tokens if `skip_special`; see `Tokenizer.decode`."""
        known = [i for i in map(int, ids) if 0 <= i < self._size]
        if skip_special:
            row = tokenizer_files.without_padding(known, self.pad_id, self.bos_id, self.stop_ids)
            return self._processor.decode([i for i in row if i not in self._special])
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
        """Returns the id of a text that is one token; raises UserError for other texts."""
        sp = self._processor
        for name in (token, token.replace(" ", "▁"), tokenizer_files.byte_name(token)):
            i = sp.piece_to_id(name)
            if sp.id_to_piece(i) == name:  # piece_to_id gives <unk> for what it does not know
                return int(i)
        raise tokenizer_files.not_one_token(token, sp.encode(token, out_type=str))

    def save(self, folder: tokenizer_files.PathLike) -> None:
        """Writes the tokenizer into a folder; see `Tokenizer.save`."""
        path = tokenizer_files.own_place(folder, "tokenizer.model")
        with atomic_write(path, "wb") as file:
            file.write(self.model)
        own = self._processor.eos_id()
        tokenizer_files.write_stop_ids(
            path.parent, () if self.stop_ids == ((own,) if own >= 0 else ()) else self.stop_ids
        )
