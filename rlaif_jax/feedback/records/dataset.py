"""Judgements as a TFDS data set: array_record files, no TensorFlow, random access for Grain.

Each example has the searchable fields of a record and the complete record as JSON (`record`), from which `read` restores
the judgement bit for bit. `data.readers.tfds_records` reads the same folder as plain records.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlaif_jax.config import UserError, require
from rlaif_jax.data.readers import tfds_records
from rlaif_jax.data.tfds_offline import tfds
from rlaif_jax.feedback.records.forms import Judgement, canonical, to_json
from rlaif_jax.feedback.records.parsing import from_json
from rlaif_jax.files import printable

NAME = "judgements"
_TEXTS = ("id", "form", "item", "prompt", "rater", "source", "principle", "status", "record")


class JudgementBuilder(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder of splits of judgements."""

    name = NAME
    code_path = None  # TFDS looks next to the source for checksums of downloads: nothing is downloaded
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, judgements: Mapping[str, Sequence[Judgement]], data_dir: Path) -> None:
        self._judgements = judgements
        super().__init__(data_dir=str(data_dir), file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features: dict[str, Any] = {name: tfds.features.Text() for name in _TEXTS}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Comments, ratings, corrections and rankings of answers to prompts.",
            features=tfds.features.FeaturesDict(features | {"answers": tfds.features.Sequence(tfds.features.Text())}),
            disable_shuffling=True,  # example i is judgement i
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing to download
        return {split: self._generate_examples(judgements) for split, judgements in self._judgements.items()}

    def _generate_examples(self, judgements: Sequence[Judgement]) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, judgement in enumerate(judgements):
            yield index, _example(judgement)


def _example(judgement: Judgement) -> dict[str, Any]:
    rater, record = judgement.rater, canonical(to_json(judgement))
    about = (judgement.id, judgement.form, judgement.item, judgement.prompt)
    texts = dict(zip(_TEXTS, (*about, rater.name, rater.source, judgement.principle, judgement.status, record)))
    # `record` is ASCII and keeps everything; the other fields are UTF-8, which cannot hold lone surrogates.
    readable = {name: text.encode(errors="replace").decode() for name, text in texts.items()}
    return readable | {"answers": [answer.encode(errors="replace").decode() for answer in judgement.answers]}


def write(judgements: Mapping[str, Sequence[Judgement]], folder: Path) -> Path:
    """Writes splits of judgements as a TFDS data set and returns its folder, `FOLDER/judgements/1.0.0`.

    The folder appears whole or not at all. `read`, `data.readers.tfds_records` and `tfds.builder_from_directory` take it.

    Args:
        judgements: the judgements of each split, such as {"train": [...], "test": [...]}.
        folder: the folder under which the data set is written.

    Raises:
        UserError: the data set exists already, a split is empty, or the folder cannot be written.
    """
    for split, entries in judgements.items():
        require(len(entries) > 0, f"there are no judgements to write into the split {split!r}")
    final = Path(folder) / NAME / str(JudgementBuilder.VERSION)
    require(not final.exists(), f"{final} is there already: give another folder, or remove it first")
    temporary = Path(folder) / f".{NAME}.{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        builder = JudgementBuilder(judgements, temporary)
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):  # messages about downloads, although nothing is downloaded
            builder.download_and_prepare(file_format="array_record")
        final.parent.mkdir(parents=True, exist_ok=True)
        Path(builder.data_dir).rename(final)
    except OSError as error:
        raise UserError(f"cannot write the data set to {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def read(folder: Path, split: str = "train") -> tuple[list[Judgement], list[str]]:
    """Returns (the judgements of a split as they were written, a message for each bad record).

    Args:
        folder: the folder that `write` returned, or the one that it was given.
        split: the name of the split.

    Raises:
        UserError: the data set or the split does not exist.
    """
    inner = Path(folder) / NAME / str(JudgementBuilder.VERSION)
    records = tfds_records(str(inner if inner.is_dir() else folder), split)
    good: list[Judgement] = []
    bad: list[str] = []
    for index in range(len(records)):
        place = records.place(index)
        try:
            good.append(from_json(json.loads(records[index]["record"]), place))
        except UserError as error:
            bad.append(printable(str(error)))
        except (KeyError, ValueError, TypeError) as error:
            bad.append(f"{place}: no judgement in the field record ({error!r})")
    return good, bad
