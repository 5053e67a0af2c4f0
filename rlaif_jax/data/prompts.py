"""Prompts and preference pairs: from a JSONL file, a TFDS data set or the world, to batches through Grain.

A source is any random-access sequence of dict records (`Records`): `jsonl_records`, `pair_records`,
`tfds_records`, the world's data source, or a plain list; texts may be bytes of UTF-8. `prompt_batches` makes of it
an endless (or counted) iterator of left-padded batches, whose position can be saved in a checkpoint and restored
exactly.

Everything here is host side and NumPy.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import grain
import numpy as np
import numpy.typing as npt

from rlaif_jax.config import UserError
from rlaif_jax.data.tokenizers import Tokenizer
from rlaif_jax.types import Rollout

PathLike: TypeAlias = str | os.PathLike[str]
Record: TypeAlias = Mapping[str, Any]


class Records(Protocol):
    """A random-access source of records; one that also has `place(i) -> str` is named by it in messages."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Record: ...


# ---------------------------------------------------------------------------------------------- arrays


def padded(
    sequences: Sequence[Sequence[int]], length: int, pad_id: int, side: Literal["left", "right"]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Stack B sequences of ids into one array.

    Args:
        side: where the padding goes: "left" for prompts, so that all end at the same place; "right" for
            responses.

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


def bucket_length(n: int, buckets: Sequence[int] | None = None) -> int:
    """The smallest bucket >= n (tokens), so that a jitted function meets few different lengths.

    Args:
        buckets: the allowed lengths, in any order; by default the powers of two from 16.

    Raises:
        UserError: `n` exceeds every bucket.
    """
    if buckets is None:
        return max(16, 1 << max(n - 1, 0).bit_length())
    fitting = [bucket for bucket in buckets if bucket >= n]
    if not fitting:
        raise UserError(f"{n} tokens fit in none of the length buckets {sorted(buckets)}; add a longer one")
    return min(fitting)


# ---------------------------------------------------------------------------------------------- JSONL


@dataclass(frozen=True)
class FileRecords:
    """Records in memory, each with the place it came from (`file:line`)."""

    records: tuple[dict[str, Any], ...]
    places: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        return self.records[index]

    def place(self, index: int) -> str:
        return self.places[index]


def jsonl_records(path: PathLike, *, required: Sequence[str] = ("prompt",)) -> FileRecords:
    """Read and check a whole file of one JSON object a line (`.jsonl` or `.jsonl.gz`).

    Args:
        required: fields that every record must have, each a string. Other fields are kept as they are.

    Raises:
        UserError: the file is missing, empty, or a line of it is not as it should be (names file, line and
            field).
    """
    path = Path(path)
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    records, places = [], []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        place = f"{path}:{number}"
        if line.strip():
            records.append(_parse_line(line, place, required))
            places.append(place)
    if not records:
        raise UserError(f"{path} is empty: expected one JSON object a line, with {_listed(required)}")
    return FileRecords(tuple(records), tuple(places))


def pair_records(path: PathLike) -> FileRecords:
    """Read preference pairs from JSONL: `prompt`, `chosen`, `rejected`, and if given `probability`.

    `probability` is that of `chosen` being the better one, in [0, 1] (a soft label); without it the pair is
    certain.

    Raises:
        UserError: as `jsonl_records`, or a probability that is no number from 0 to 1.
    """
    records = jsonl_records(path, required=("prompt", "chosen", "rejected"))
    for record, place in zip(records.records, records.places, strict=True):
        value = record.get("probability", 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
            raise UserError(f'{place}: field "probability" should be a number from 0 to 1, not {_shown(value)}')
    return records


def _parse_line(line: bytes, place: str, required: Sequence[str]) -> dict[str, Any]:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 text: {error.reason} at byte {error.start} of the line") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place}: not valid JSON: {error.msg} at column {error.colno}; expected one JSON object a line"
        ) from error
    if not isinstance(record, dict):
        raise UserError(f"{place}: expected a JSON object with {_listed(required)}, not {_shown(record)}")
    for name in required:
        if name not in record:
            raise UserError(f'{place}: field "{name}" is missing; the line has {_listed(record)}')
        if not isinstance(record[name], str):
            raise UserError(f'{place}: field "{name}" should be a string, not {_shown(record[name])}')
        try:
            record[name].encode()
        except UnicodeEncodeError as error:  # "\ud83d" alone is valid JSON, but no text; tokenizers fail on it later
            raise UserError(f'{place}: field "{name}" holds half of a Unicode surrogate pair') from error
    return record


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(f'"{name}"' for name in names) or "no fields"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------------------------------------- TFDS


@dataclass(frozen=True, eq=False)
class TfdsRecords:
    """Records of one split of a TFDS data set, read from disk one at a time; `place(i)` is `name/split[i]`.

    Byte strings become text, arrays lists, and NumPy scalars Python numbers.
    """

    source: Any
    name: str
    mapping: Mapping[str, str] | None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        record = self.source[index]
        if self.mapping is None:
            return {name: _plain(value) for name, value in record.items()}
        return {ours: _plain(_field(record, theirs)) for ours, theirs in self.mapping.items()}

    def place(self, index: int) -> str:
        return f"{self.name}[{index}]"


def tfds_records(
    name: str, split: str, data_dir: PathLike | None = None, mapping: Mapping[str, str] | None = None
) -> TfdsRecords:
    """A prepared TFDS data set by its name, without TensorFlow and without a network.

    Args:
        name: `"data_set"`, `"data_set/config"` or `"data_set/config:1.0.0"`; or the folder of one prepared
            version.
        split: such as `"train"` or `"train[:10%]"`.
        data_dir: where data sets are prepared; by default TFDS's own (`TFDS_DATA_DIR`,
            `~/tensorflow_datasets`).
        mapping: our field -> theirs, such as `{"prompt": "article"}`; a nested field is spelled `"a/b"`.
            None keeps all fields under their own names.

    Raises:
        UserError: unknown data set, split or field; not prepared; or prepared in a file format that has no
            random access (TFDS's default, tfrecord).
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.utils import gcs_utils

    # Some releases look a data set up in TFDS's public bucket, which imports TensorFlow and needs a network.
    gcs_utils._is_gcs_disabled = True

    remedy = (
        f'prepare it once with tfds.builder("{name}", file_format="array_record").download_and_prepare()'
        " and give its data_dir"
    )
    if name.partition("/")[0].count(":") and not name.partition(":")[2][:1].isdigit():
        raise UserError(f"TFDS data set {name}: community data sets need a network; {remedy}")
    try:
        if Path(name).is_dir():
            builder = tfds.builder_from_directory(name)
        else:
            builder = tfds.builder(name, data_dir=None if data_dir is None else os.fspath(data_dir))
    except Exception as error:  # TFDS raises many kinds, from its own, from the builder's code and from the disk
        raise UserError(f"there is no TFDS data set {name!r}: {_first_line(error)}; {remedy}") from error
    if not builder.info.splits:
        raise UserError(f"the TFDS data set {name} is not prepared in {builder.data_dir}; {remedy}")
    try:
        source = builder.as_data_source(split=split)
    except Exception as error:
        raise UserError(
            f"cannot read split {split!r} of the TFDS data set {name} in {builder.data_dir} (splits: "
            f"{', '.join(builder.info.splits)}; file format: {builder.info.file_format}): "
            f"{_first_line(error)}; random access needs the file format array_record"
        ) from error
    records = TfdsRecords(source, f"{name}/{split}", None if mapping is None else dict(mapping))
    if len(records) == 0:
        raise UserError(f"split {split!r} of the TFDS data set {name} holds no records")
    records[0]  # a wrong mapping shows before the run starts
    return records


def _field(record: Mapping[str, Any], path: str) -> Any:
    value: Any = record
    for part in path.split("/"):
        if not isinstance(value, Mapping) or part not in value:
            raise UserError(f'the TFDS records have no field "{path}"; they have {_listed(record)}')
        value = value[part]
    return value


def _plain(value: Any) -> Any:
    """What TFDS gives, as plain Python: bytes of UTF-8 as text, arrays as lists, scalars as numbers."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# ---------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """B prompts on the host.

    tokens [B, P] int32, left padded; mask [B, P] bool, true on real tokens; uid [B] uint32, the stable number
    of a prompt, from which the keys of its answers are derived; records, the B source records, byte strings as text;
    recorded and demonstrations, answers that the data brings (`data.recorded`), or None.
    """

    tokens: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_]
    uid: npt.NDArray[np.uint32]
    records: tuple[dict[str, Any], ...]
    recorded: Rollout | None = None
    demonstrations: Rollout | None = None

    def rows(self, chosen: slice) -> PromptBatch:
        """Some of the prompts, as padded as all."""
        return PromptBatch(self.tokens[chosen], self.mask[chosen], self.uid[chosen], self.records[chosen])


class PromptIterator(Iterator[PromptBatch]):
    """Made by `prompt_batches`; its position is `get_state()`, a small JSON-serialisable dict."""

    def __init__(self, batches: Any, make: Callable[[Any], PromptBatch], identity: Mapping[str, Any]) -> None:
        self._iterator = iter(batches)
        self._make = make
        self._identity = dict(identity)

    def __iter__(self) -> PromptIterator:
        return self

    def __next__(self) -> PromptBatch:
        return self._make(next(self._iterator))

    def get_state(self) -> dict[str, Any]:
        """How far the iterator is, and of what; `set_state` makes it come back here."""
        return {"position": self._iterator.get_state(), **self._identity}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go to where `get_state` was called, in this process or another.

        Raises:
            UserError: the state is of other prompts or settings (names the first that differs, and both
                values).
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
    """Batches of tokenized prompts, in an order that depends on `seed` alone; a new order each epoch.

    All prompts are tokenized and checked here, before the first batch. An epoch holds every prompt at most
    once and no batch spans two epochs, so no prompt is twice in a batch (its answers would have the same
    random keys). With `drop_remainder` each epoch leaves out the `len(records) % batch_size` prompts that
    fill no batch: others each epoch if shuffled, always the last if not.

    Args:
        records: the source; each record has a string `prompt`, and may have an integer `uid` (else its index
            is used).
        batch_size: B, prompts.
        prompt_length: P, the most tokens of a prompt, BOS included.
        epochs: None never ends.
        add_bos: put BOS before each prompt.
        truncate: "left" drops the oldest tokens of a prompt that is too long (BOS stays); None refuses it.
        buckets: if given, a batch is only as long as the bucket of its longest prompt (at most
            `prompt_length`).
        drop_remainder: False gives the last prompts of an epoch as a smaller batch, for evaluating on all of
            them.

    Raises:
        UserError: no records; fewer than `batch_size`; a record without `prompt`, with a prompt of no tokens
            or of too many (names the record and both lengths), with a uid outside uint32 or a uid used twice.
    """
    for name, value in (("batch_size", batch_size), ("prompt_length", prompt_length), ("epochs", epochs)):
        if value is not None and value < 1:
            raise UserError(f"{name} should be at least 1, not {value}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed should be from 0 to 2**32 - 1, not {seed}")
    count = len(records)
    if count == 0:
        raise UserError("there are no prompts: the source is empty")
    if drop_remainder and batch_size > count:
        raise UserError(
            f"batch_size is {batch_size}, but there are only {count} prompts and a batch holds each at most "
            f"once; use batch_size <= {count} (and more answers a prompt), or more prompts"
        )
    prompts, uids = _tokenized(records, tokenizer, prompt_length, add_bos, truncate)

    dataset = grain.MapDataset.range(count).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    dataset = dataset.batch(batch_size, drop_remainder=drop_remainder).repeat(epochs)
    # The tokens are in memory: threads or worker processes would only cost.
    batches = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))

    def make(indices: npt.NDArray[np.int64]) -> PromptBatch:
        chosen = [prompts[i] for i in indices]
        length = prompt_length
        if buckets is not None:
            length = min(prompt_length, bucket_length(max(map(len, chosen)), buckets))
        tokens, mask = padded(chosen, length, tokenizer.pad_id, "left")
        return PromptBatch(tokens, mask, uids[indices], tuple(_plain(records[int(i)]) for i in indices))

    digest = hashlib.sha256(uids.tobytes())
    for ids in prompts:
        digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
    identity = {
        "prompts": count,
        "batch_size": batch_size,
        "seed": seed,
        "shuffle": shuffle,
        "drop_remainder": drop_remainder,
        "fingerprint": digest.hexdigest()[:16],
    }
    return PromptIterator(batches, make, identity)


def _tokenized(
    records: Records,
    tokenizer: Tokenizer,
    prompt_length: int,
    add_bos: bool,
    truncate: Literal["left"] | None,
) -> tuple[list[npt.NDArray[np.int32]], npt.NDArray[np.uint32]]:
    prompts: list[npt.NDArray[np.int32]] = []
    index_of: dict[int, int] = {}
    for index in range(len(records)):
        record = _plain(records[index])
        prompt = record.get("prompt")
        if not isinstance(prompt, str):
            raise UserError(
                f'{_place(records, index)}: field "prompt" should be a string, not {type(prompt).__name__}; '
                f"the record has {_listed(record)}"
            )
        ids = tokenizer.encode(prompt, add_bos=add_bos)
        if not ids:
            raise UserError(f"{_place(records, index)}: the prompt has no tokens; write one, or set add_bos")
        if len(ids) > prompt_length:
            if truncate is None:
                raise UserError(
                    f"{_place(records, index)}: the prompt has {len(ids)} tokens, more than prompt_length = "
                    f'{prompt_length}; raise prompt_length, shorten the prompt, or set truncate="left"'
                )
            head = ids[:1] if add_bos else []
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


def _place(records: Records, index: int) -> str:
    place = getattr(records, "place", None)
    named = place(index) if place is not None else f"record {index}"
    uid = records[index].get("uid")
    return named if uid is None else f"{named} (uid {uid})"
