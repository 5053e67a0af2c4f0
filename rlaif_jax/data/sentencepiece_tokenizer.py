"""The tokenizer of a SentencePiece `.model` file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sentencepiece

from rlaif_jax.config import UserError
from rlaif_jax.data import tokenizer_files
from rlaif_jax.files import atomic_write, read_bytes


@dataclass(frozen=True, eq=False)
class SentencePieceTokenizer:
    """A SentencePiece `.model`, run by the `sentencepiece` library (Llama 2, Gemma, T5 ...).

    Texts get the model's own leading space, which `decode` takes away again at the start: `decode(encode(x))`
    is x up to the model's normalisation, and the text of a continuation alone loses its first space.
    """

    model: bytes

    @classmethod
    def read(cls, path: tokenizer_files.PathLike) -> SentencePieceTokenizer:
        """Reads a `.model` file. Raises UserError for a file that is no such model."""
        tokenizer = cls(read_bytes(path))
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
        """Returns the largest id + 1."""
        return int(self._processor.get_piece_size())

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

    @cached_property
    def eos_id(self) -> int | None:
        """Returns the id of EOS, or None."""
        i = self._processor.eos_id()
        return i if i >= 0 else None

    @cached_property
    def fingerprint(self) -> str:
        """Returns a hash of the vocabulary."""
        return tokenizer_files.hash_vocabulary(self._processor.id_to_piece(i).encode() for i in range(self.vocab_size))

    @cached_property
    def _special(self) -> frozenset[int]:
        control = [i for i in range(self.vocab_size) if self._processor.is_control(i)]
        return frozenset([*control, self.pad_id])

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        """Returns the ids of `text`, after the BOS token where `add_bos`; see `Tokenizer.encode`."""
        return tokenizer_files.bos_prefix(self.bos_id, add_bos) + list(self._processor.encode(text))

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Returns the text of `ids`, without special tokens if `skip_special`; see `Tokenizer.decode`."""
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
        """Returns the id of a text that is one token; raises UserError for other texts."""
        sp = self._processor
        for name in (token, token.replace(" ", "▁"), tokenizer_files.byte_name(token)):
            i = sp.piece_to_id(name)
            if sp.id_to_piece(i) == name:  # piece_to_id gives <unk> for what it does not know
                return int(i)
        raise tokenizer_files.not_one_token(token, sp.encode(token, out_type=str))

    def save(self, folder: tokenizer_files.PathLike) -> None:
        """Writes the tokenizer into a folder; see `Tokenizer.save`."""
        with atomic_write(tokenizer_files.own_place(folder, "tokenizer.model"), "wb") as file:
            file.write(self.model)
