"""Batches of prompts: tokenized, left padded, in an order that a checkpoint can restore exactly.

`prompt_batches` makes an endless (or counted) iterator of batches from `Records`: the readers' (`data/readers.py`), the
world's data source, or a plain list of dicts; texts may be bytes of UTF-8. Everything here is host side and NumPy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import grain
import numpy as np
import numpy.typing as npt

from rlaif_jax.config import UserError
from rlaif_jax.data.readers import FileRecords, TfdsRecords, listed, plain
from rlaif_jax.data.tokenizers import Tokenizer
from rlaif_jax.types import Rollout

Record: TypeAlias = Mapping[str, Any]

CONVERSATIONAL = "conversational"
"""The field of a record that says whether its prompt came as messages."""


class Records(Protocol):
    """A random-access source of records."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Record: ...


def padded(
    sequences: Sequence[Sequence[int]], length: int, pad_id: int, side: Literal["left", "right"]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Stacks B sequences of token ids into one array.

    Args:
        sequences: B lists of token ids.
        length: columns of the result.
        pad_id: the token id of padding.
        side: where the padding goes: "left" for prompts, so that all end in the same column; "right" for responses.

    Returns:
        tokens [B, length] int32, and mask [B, length] bool, true where a token is real.

    Raises:
        ValueError: a sequence is longer than `length`.
    """
    tokens = np.full((len(sequences), length), pad_id, np.int32)
    mask = np.zeros((len(sequences), length), np.bool_)
    for row, ids in enumerate(sequences):
        if len(ids) > length:
            raise ValueError(f"sequence {row} has {len(ids)} tokens, more than the length {length} to pad to")
        where = slice(length - len(ids), length) if side == "left" else slice(0, len(ids))
        tokens[row, where] = ids
        mask[row, where] = True
    return tokens, mask


def bucket_length(n: int, buckets: Sequence[int] | None = None, *, smallest: int = 16) -> int:
    """Returns the smallest bucket >= n, so that a jitted function meets few different lengths.

    Args:
        n: tokens (or rows).
        buckets: the allowed lengths, in any order; by default the powers of two from `smallest`.
        smallest: a power of two.

    Raises:
        UserError: `n` exceeds every bucket.
    """
    if buckets is None:
        return max(smallest, 1 << max(n - 1, 0).bit_length())
    fitting = [bucket for bucket in buckets if bucket >= n]
    if not fitting:
        raise UserError(f"{n} tokens fit in none of the length buckets {sorted(buckets)}; add a longer one")
    return min(fitting)


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """B prompts on the host.

    Attributes:
        tokens: [B, P] int32, left padded.
        mask: [B, P] bool, true on real tokens.
        uid: [B] uint32, the stable number of a prompt, from which the random keys of its answers are derived.
        records: the B source records, byte strings as text.
    """

    tokens: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_]
    uid: npt.NDArray[np.uint32]
    records: tuple[dict[str, Any], ...]
    recorded: Rollout | None = None
    demonstrations: Rollout | None = None

    def rows(self, chosen: slice) -> PromptBatch:
        """Returns some of the prompts, with the padding of the whole batch."""
        return PromptBatch(self.tokens[chosen], self.mask[chosen], self.uid[chosen], self.records[chosen])


class PromptIterator(Iterator[PromptBatch]):
    """Iterator that `prompt_batches` makes; its position is `get_state()`, a small JSON-serialisable dict.

    Attributes:
        batches: how many batches there are from the first to the last; None: it never ends.
    """

    def __init__(
        self, dataset: Any, make: Callable[[Any], PromptBatch], identity: Mapping[str, Any], batches: int | None
    ) -> None:
        self._iterator = iter(dataset)
        self._make = make
        self._identity = dict(identity)
        self.batches = batches

    def __iter__(self) -> PromptIterator:
        return self

    def __next__(self) -> PromptBatch:
        return self._make(next(self._iterator))

    def get_state(self) -> dict[str, Any]:
        """Returns the position of the iterator and the identity of its prompts; `set_state` comes back here."""
        return {"position": self._iterator.get_state(), **self._identity}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to where `get_state` was called, in this process or another.

        Raises:
            UserError: the state is of other prompts or settings (names the first that differs, and both values).
        """
        for name, ours in self._identity.items():
            if name not in state or state[name] != ours:
                raise UserError(
                    f"the saved position is of other prompts: {name} was {state.get(name)!r} and is now "
                    f"{ours!r}; resume with the data and settings of the run"
                )
        self._iterator.set_state(state["position"])


def prompt_batches(
    records: Records,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seed: int,
    prompt_length: int,
    shuffle: bool = True,
    epochs: int | None = None,
    add_bos: bool = False,
    truncate: Literal["left"] | None = None,
    buckets: Sequence[int] | None = None,
    drop_remainder: bool = True,
) -> PromptIterator:
    """Returns batches of tokenized prompts, in a new order each epoch that depends on `seed` alone.

    All prompts are tokenized and checked here, before the first batch. An epoch holds every prompt at most once and no
    batch spans two epochs, so no prompt is twice in a batch (its answers would have the same random keys).

    Args:
        records: the source; each record has a string `prompt`, and may have an integer `uid` (else its index is used).
            Where it has a string `model_text` (`data/chat/records.py`), the model reads that instead of the prompt.
        tokenizer: encodes the prompts.
        batch_size: B, prompts.
        seed: of the order, from 0 to 2**32 - 1.
        prompt_length: P, the most tokens of a prompt, BOS included.
        shuffle: False keeps the order of the records in every epoch.
        epochs: None never ends.
        add_bos: put BOS before each prompt; a `model_text` has its own, or none.
        truncate: "left" drops the oldest tokens of a prompt that is too long (BOS stays); None refuses it.
        buckets: if given, a batch is only as long as the bucket of its longest prompt (at most `prompt_length`).
        drop_remainder: True leaves out the `len(records) % batch_size` prompts of an epoch that fill no batch (others
            each epoch if shuffled, always the last if not); False gives them as a smaller batch.

    Raises:
        UserError: no records; fewer than `batch_size`; a record without `prompt`, with a prompt of no tokens or of too
            many (names the record and both lengths), with a uid outside uint32 or a uid used twice.
    """
    _check_settings(len(records), batch_size, seed, prompt_length, epochs, drop_remainder)
    prompts, uids = _tokenized(records, tokenizer, prompt_length, add_bos, truncate)

    dataset = grain.MapDataset.range(len(records)).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    dataset = dataset.batch(batch_size, drop_remainder=drop_remainder)
    count = None if epochs is None else len(dataset) * epochs
    dataset = dataset.repeat(epochs)
    # The tokens are in memory: threads or worker processes would only cost.
    batches = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))

    def make(indices: npt.NDArray[np.int64]) -> PromptBatch:
        chosen = [prompts[i] for i in indices]
        length = prompt_length
        if buckets is not None:
            length = min(prompt_length, bucket_length(max(map(len, chosen)), buckets))
        tokens, mask = padded(chosen, length, tokenizer.pad_id, "left")
        return PromptBatch(tokens, mask, uids[indices], tuple(plain(records[int(i)]) for i in indices))

    digest = hashlib.sha256(uids.tobytes())
    for ids in prompts:
        digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
    identity = {
        "prompts": len(records),
        "batch_size": batch_size,
        "seed": seed,
        "shuffle": shuffle,
        "drop_remainder": drop_remainder,
        "fingerprint": digest.hexdigest()[:16],
    }
    return PromptIterator(batches, make, identity, count)


def _check_settings(
    count: int, batch_size: int, seed: int, prompt_length: int, epochs: int | None, drop_remainder: bool
) -> None:
    for name, value in (("batch_size", batch_size), ("prompt_length", prompt_length), ("epochs", epochs)):
        if value is not None and value < 1:
            raise UserError(f"{name} should be at least 1, not {value}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed should be from 0 to 2**32 - 1, not {seed}")
    if count == 0:
        raise UserError("there are no prompts: the source is empty")
    if drop_remainder and batch_size > count:
        raise UserError(
            f"batch_size is {batch_size}, but there are only {count} prompts and a batch holds each at most "
            f"once; use batch_size <= {count} (and more answers a prompt), or more prompts"
        )


def _tokenized(
    records: Records, tokenizer: Tokenizer, prompt_length: int, add_bos: bool, truncate: Literal["left"] | None
) -> tuple[list[npt.NDArray[np.int32]], npt.NDArray[np.uint32]]:
    prompts: list[npt.NDArray[np.int32]] = []
    index_of: dict[int, int] = {}
    for index in range(len(records)):
        record = plain(records[index])
        prompt = record.get("prompt")
        if not isinstance(prompt, str):
            raise UserError(
                f'{_place(records, index)}: field "prompt" should be a string, not {type(prompt).__name__}; '
                f"the record has {listed(record)}"
            )
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise UserError(f'{_place(records, index)}: field "prompt" holds half of a Unicode surrogate pair')
        text = record.get("model_text")
        templated = isinstance(text, str)
        ids = tokenizer.encode(text, add_bos=False) if templated else tokenizer.encode(prompt, add_bos=add_bos)
        if not ids:
            raise UserError(f"{_place(records, index)}: the prompt has no tokens; write one, or set add_bos")
        if len(ids) > prompt_length:
            if truncate is None:
                raise UserError(
                    f"{_place(records, index)}: the prompt has {len(ids)} tokens, more than prompt_length = "
                    f'{prompt_length}; raise prompt_length, shorten the prompt, or set truncate="left"'
                )
            head = ids[:1] if (ids[0] == tokenizer.bos_id if templated else add_bos) else []
            ids = head + ids[len(ids) - prompt_length + len(head) :]
        uid = _uid(records, index, record)
        if uid in index_of:
            raise UserError(
                f"{_place(records, index)} and {_place(records, index_of[uid])} have the same uid, {uid}; "
                "their answers would be drawn with the same random keys: give each prompt its own"
            )
        index_of[uid] = index
        prompts.append(np.asarray(ids, np.int32))
    return prompts, np.fromiter(index_of, np.uint32, len(index_of))


def _uid(records: Records, index: int, record: Record) -> int:
    uid = record.get("uid")
    if isinstance(uid, bool) or not isinstance(uid, int | np.integer):
        return index  # a textual uid stays in the record
    if not 0 <= uid < 2**32:
        raise UserError(f'{_place(records, index)}: field "uid" should be from 0 to 2**32 - 1, not {uid}')
    return int(uid)


def place(records: Records, index: int) -> str:
    """Returns the name of a record for messages: its place in a file or data set, or its number."""
    return records.place(index) if isinstance(records, FileRecords | TfdsRecords) else f"record {index}"


def _place(records: Records, index: int) -> str:
    uid = records[index].get("uid")
    return place(records, index) if uid is None else f"{place(records, index)} (uid {uid})"
