"""The tokenizer of karpathy/llama2.c (`tok*.bin`), as its `run.c` encodes and decodes."""

from __future__ import annotations

import heapq
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from rlaif_jax.config import UserError
from rlaif_jax.data import special_tokens, tokenizer_files
from rlaif_jax.files import atomic_write, it_is, read_bytes


@dataclass(frozen=True, eq=False)
class Llama2cTokenizer:
    """The `tok512.bin` of karpathy/llama2.c, encoded and decoded as its `run.c` does.

    Ids: 0 `<unk>` (used for padding: the format has no padding token), 1 BOS, 2 EOS, 3-258 the single bytes,
    then pieces. The TinyStories models were trained on texts that each begin with BOS and never saw EOS:
    their stop token is BOS (1), as in `run.c`; `stopping_at_bos` gives their tokenizer. The format does not say
    it, so `save` writes it into generation_config.json, which `read` looks for.

    `encode` puts a space first, as SentencePiece does; `decode` takes it away at the start and after a BOS.
    (`run.c` prints piece by piece, so only after a BOS; here `decode(encode(x)) == x` with and without one.)

    Attributes:
        pieces: each token's bytes, by id.
        scores: each token's score, by id; of two possible merges the one of higher score comes first.
        max_token_length: the header of the file, in bytes; kept so that `save` writes the same file.
        stop_ids: the tokens that end an answer. The first, `eos_id`, is written at the end of texts.
    """

    pieces: tuple[bytes, ...]
    scores: tuple[float, ...]
    max_token_length: int
    stop_ids: tuple[int, ...] = (2,)

    pad_id = 0
    bos_id = 1

    @classmethod
    def read(cls, path: tokenizer_files.PathLike) -> Llama2cTokenizer:
        """Reads the file: int32 `max_token_length`, then a float32 score, int32 length and bytes a token.

        All is little-endian; the vocabulary ends where the file ends. Raises UserError for any other file.
        """
        data = read_bytes(path)
        if kind := it_is(path):
            raise UserError(f"{path} is not a llama2.c tokenizer{kind}")
        if len(data) < 4:
            raise UserError(f"{path} is not a llama2.c tokenizer: {len(data)} bytes are too few for its header")
        (longest,) = struct.unpack_from("<i", data)
        pieces: list[bytes] = []
        scores: list[float] = []
        offset = 4
        while offset < len(data):
            if offset + 8 > len(data):
                raise UserError(f"{path} is truncated: it ends within the header of token {len(pieces)}")
            score, length = struct.unpack_from("<fi", data, offset)
            offset += 8
            if not 0 <= length <= longest:
                raise UserError(
                    f"{path} is not a llama2.c tokenizer: token {len(pieces)} claims {length} bytes, "
                    f"the header allows {longest}"
                )
            if offset + length > len(data):
                raise UserError(f"{path} is truncated: it ends within token {len(pieces)}")
            pieces.append(data[offset : offset + length])
            scores.append(score)
            offset += length
        if len(pieces) < 259 or pieces[3:259] != [f"<0x{b:02X}>".encode() for b in range(256)]:
            raise UserError(f"{path} is not a llama2.c tokenizer: ids 3 to 258 should be the bytes <0x00> to <0xFF>")
        ends = tuple(special_tokens.declared_ids(Path(path).parent, "eos"))
        return cls(tuple(pieces), tuple(scores), longest, ends or (2,))

    def stopping_at_bos(self) -> Llama2cTokenizer:
        """Returns the same tokenizer for a model whose texts end where the next begins."""
        return replace(self, stop_ids=(self.bos_id,))

    @property
    def eos_id(self) -> int | None:
        """Returns the id of the token at the end of texts."""
        return self.stop_ids[0]

    @property
    def vocab_size(self) -> int:
        """Returns the largest id + 1."""
        return len(self.pieces)

    @cached_property
    def fingerprint(self) -> str:
        """Returns a hash of the vocabulary."""
        return tokenizer_files.hash_vocabulary(self.pieces)

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        return {piece: i for i, piece in reversed(list(enumerate(self.pieces)))}

    def encode(self, text: str, *, add_bos: bool = False, continues: bool = False) -> list[int]:
        """Returns the ids of `text`, after the BOS token where `add_bos`; see `Tokenizer.encode`."""
        ids: list[int] = []
        for character in text if continues or not text else " " + text:
            raw = character.encode(errors="replace")
            known = self._ids.get(raw)
            ids += [known] if known is not None else [byte + 3 for byte in raw]
        return tokenizer_files.bos_prefix(self.bos_id, add_bos) + self._merge(ids)

    def quote(self, text: str) -> str:
        """Returns `text` as it is: no text becomes a special token."""
        return text

    def _merge(self, ids: list[int]) -> list[int]:
        """Joins neighbours until no pair has a joint piece: the highest score first, the leftmost of equals.

        `run.c` scans the whole text for every merge; a heap of candidates gives the same merges in n log n.
        """
        after = [*range(1, len(ids)), -1]
        before = [*range(-1, len(ids) - 1)]
        alive = [True] * len(ids)
        heap: list[tuple[float, int, int, int, int]] = []

        def offer(left: int, right: int) -> None:
            joint = self._ids.get(self.pieces[ids[left]] + self.pieces[ids[right]])
            if joint is not None:
                heapq.heappush(heap, (-self.scores[joint], left, ids[left], ids[right], joint))

        for left in range(len(ids) - 1):
            offer(left, left + 1)
        while heap:
            _, left, left_id, right_id, joint = heapq.heappop(heap)
            right = after[left]
            # A candidate is stale when either side has since been merged into something else.
            if not alive[left] or right < 0 or ids[left] != left_id or ids[right] != right_id:
                continue
            ids[left], alive[right] = joint, False
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
                offer(left, after[left])
            if before[left] >= 0:
                offer(before[left], left)
        return [i for i, living in zip(ids, alive, strict=True) if living]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Returns the text of `ids`, without special tokens if `skip_special`; see `Tokenizer.decode`."""
        out, at_start = bytearray(), True
        row = [int(i) for i in ids]
        for i in tokenizer_files.without_padding(row, 0, 1, (1, 2)) if skip_special else row:
            if i in (0, 1, 2):
                out += b"" if skip_special and i else self.pieces[i]  # <unk> is in the place of a word
                at_start = (at_start and i > 0) or i == self.bos_id
            elif 3 <= i < 259:
                out.append(i - 3)
                at_start = False
            elif 259 <= i < self.vocab_size:
                piece = self.pieces[i]
                out += piece[1:] if at_start and piece.startswith(b" ") else piece
                at_start = False
        return out.decode(errors="replace")

    def token_id(self, token: str) -> int:
        """Returns the id of a text that is one token; raises UserError for other texts."""
        names = {"<unk>": 0, "<s>": 1, "</s>": 2}
        if token in names:
            return names[token]
        for name in (token, tokenizer_files.byte_name(token)):
            i = self._ids.get(name.encode())
            if i is not None:
                return i
        raise tokenizer_files.not_one_token(
            token, [self.pieces[i].decode(errors="replace") for i in self.encode(token)]
        )

    def save(self, folder: tokenizer_files.PathLike) -> None:
        """Writes the tokenizer into a folder; see `Tokenizer.save`."""
        rows = [struct.pack("<fi", s, len(p)) + p for p, s in zip(self.pieces, self.scores, strict=True)]
        path = tokenizer_files.own_place(folder, "tokenizer.bin")
        with atomic_write(path, "wb") as file:
            file.write(struct.pack("<i", self.max_token_length) + b"".join(rows))
        tokenizer_files.write_stop_ids(path.parent, () if self.stop_ids == (2,) else self.stop_ids)
