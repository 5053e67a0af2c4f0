"""The tools `import-feedback` and `export-feedback`: a store and the formats of other tools.

Each format of `records/formats` that has the shape of a tool or of a well-known data set is a class here, with the settings of
its reader; `write` is there where the format can be written.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlaif_jax.config import UserError, require
from rlaif_jax.data.conversations import ASSISTANT
from rlaif_jax.feedback.records.formats import judges, pairs, tools
from rlaif_jax.feedback.records.formats.rows import ReadResult, json_rows, write_jsonl
from rlaif_jax.feedback.records.forms import Judgement, Rater, to_json
from rlaif_jax.feedback.records.parsing import each_judgement, read_judgements
from rlaif_jax.feedback.records.store import Store

NAME_FORMAT = "Name the format after all options, such as format:distilabel; --help lists them."
NAMED_BAD = 20  # bad rows that are named on the terminal


@dataclasses.dataclass(frozen=True)
class Records:
    """The project's own records, one a line, of which `import_feedback` reads any number."""

    def read(self, path: Path) -> ReadResult:
        """Reads a file; see `parsing.read_judgements`."""
        return ReadResult(*read_judgements(path), Counter())

    def write(self, judgements: Iterable[Judgement], path: Path) -> int:
        """Writes the judgements as JSON lines; returns the number of lines."""
        return write_jsonl(map(to_json, judgements), path)


@dataclasses.dataclass(frozen=True)
class HH:
    """Pairs of dialogues, as Anthropic's HH has them.

    Attributes:
        rater: the name of the people who compared.
    """

    rater: str = pairs.CROWD.name

    def read(self, path: Path) -> ReadResult:
        """Reads a file; see `pairs.read_hh`."""
        return pairs.read_hh(path, Rater(self.rater, "person"))

    def write(self, judgements: Iterable[Judgement], path: Path) -> int:
        """Writes the comparisons; see `pairs.write_hh`."""
        return pairs.write_hh(judgements, path)


@dataclasses.dataclass(frozen=True)
class Distilabel:
    """Pairs and rated generations of distilabel, TRL and the sets on the Hugging Face hub.

    Attributes:
        rater: the name of the AI judge.
        low: the lowest rating.
        high: the highest rating.
    """

    rater: str = pairs.DISTILABEL.name
    low: float = 1
    high: float = 5

    def read(self, path: Path) -> ReadResult:
        """Reads a file; see `pairs.read_distilabel`."""
        return pairs.read_distilabel(path, Rater(self.rater, "ai"), low=self.low, high=self.high)

    def write(self, judgements: Iterable[Judgement], path: Path) -> int:
        """Writes the comparisons; see `pairs.write_distilabel`."""
        return pairs.write_distilabel(judgements, path)


@dataclasses.dataclass(frozen=True)
class Annotations:
    """What the formats of annotation tools share.

    Attributes:
        prompt: the field of the prompt.
        answers: the fields of the answers.
        edits: the questions whose text is a correction.
        low: the lowest rating.
        high: the highest rating.
        about: a question (Argilla) or tag (label-studio) and the answer that it is about.
    """

    prompt: str = "prompt"
    answers: tuple[str, ...] = ("answer",)
    edits: tuple[str, ...] = tools.EDITS
    low: float = 1
    high: float = 5
    about: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Argilla(Annotations):
    """Argilla's exported records."""

    def read(self, path: Path) -> ReadResult:
        """Reads a file; see `tools.read_argilla`."""
        return tools.read_argilla(
            path, prompt=self.prompt, answers=self.answers, edits=self.edits, scale=(self.low, self.high),
            about=self.about,
        )  # fmt: skip

    def write(self, judgements: Iterable[Judgement], path: Path) -> int:
        """Writes the judgements; see `tools.write_argilla`."""
        return tools.write_argilla(judgements, path)


@dataclasses.dataclass(frozen=True)
class LabelStudio(Annotations):
    """label-studio's JSON."""

    def read(self, path: Path) -> ReadResult:
        """Reads a file; see `tools.read_label_studio`."""
        return tools.read_label_studio(
            path, prompt=self.prompt, answers=self.answers, edits=self.edits, scale=(self.low, self.high),
            about=self.about,
        )  # fmt: skip

    def write(self, judgements: Iterable[Judgement], path: Path) -> int:
        """Writes the judgements; see `tools.write_label_studio`."""
        return tools.write_label_studio(judgements, path)


@dataclasses.dataclass(frozen=True)
class AlpacaEval:
    """alpaca_eval's annotations."""

    def read(self, path: Path) -> ReadResult:
        """Reads a file; see `judges.read_alpaca_eval`."""
        return judges.read_alpaca_eval(path)

    def write(self, judgements: Iterable[Judgement], path: Path) -> int:
        """Writes the comparisons; see `judges.write_alpaca_eval`."""
        return judges.write_alpaca_eval(judgements, path)


@dataclasses.dataclass(frozen=True)
class FastChat:
    """FastChat's judgements of models, which name questions and models.

    Attributes:
        questions: question.jsonl with the texts of the questions.
        answers: model_answer/*.jsonl with the texts of the answers.
    """

    questions: Path | None = None
    answers: tuple[Path, ...] = ()

    def read(self, path: Path) -> ReadResult:
        """Reads a file; see `judges.read_fastchat`."""
        return judges.read_fastchat(path, self.questions, self.answers)


@dataclasses.dataclass(frozen=True)
class CrowdLabels:
    """crowd-kit's table of labels.

    Attributes:
        options: the labels to choose from; by default all that occur.
        tabs: the columns are separated by tabs, not commas.
    """

    options: tuple[str, ...] = ()
    tabs: bool = False

    def read(self, path: Path) -> ReadResult:
        """Reads a file; see `tools.read_crowd_labels`."""
        return tools.read_crowd_labels(path, self.options, delimiter="\t" if self.tabs else ",")

    def write(self, judgements: Iterable[Judgement], path: Path) -> int:
        """Writes the labels; see `tools.write_crowd_labels`."""
        return tools.write_crowd_labels(judgements, path)


@dataclasses.dataclass(frozen=True)
class CrowdPairs:
    """crowd-kit's table of comparisons.

    Attributes:
        prompt: the prompt of all comparisons.
    """

    prompt: str = ""

    def read(self, path: Path) -> ReadResult:
        """Reads a file; see `tools.read_crowd_pairs`."""
        return tools.read_crowd_pairs(path, self.prompt)

    def write(self, judgements: Iterable[Judgement], path: Path) -> int:
        """Writes the comparisons; see `tools.write_crowd_pairs`."""
        return tools.write_crowd_pairs(judgements, path)


@dataclasses.dataclass(frozen=True)
class Oasst:
    """OpenAssistant's trees of conversations with ranked replies.

    Attributes:
        rater: the name of the people who ranked.
    """

    rater: str = pairs.CROWD.name

    def read(self, path: Path) -> ReadResult:
        """Reads a file; see `pairs.read_oasst`."""
        return pairs.read_oasst(path, Rater(self.rater, "person"))


@dataclasses.dataclass(frozen=True)
class HelpSteer:
    """HelpSteer's answers rated by five criteria, and HelpSteer2's preferences.

    Attributes:
        rater: the name of the people who judged.
    """

    rater: str = pairs.CROWD.name

    def read(self, path: Path) -> ReadResult:
        """Reads a file; see `pairs.read_helpsteer`."""
        return pairs.read_helpsteer(path, Rater(self.rater, "person"))


Written = Records | HH | Distilabel | Argilla | LabelStudio | AlpacaEval | CrowdLabels | CrowdPairs
Read = Written | FastChat | Oasst | HelpSteer


@dataclasses.dataclass(frozen=True)
class Detected:
    """The format that a file shows: a feedback store, a TFDS folder, or what its first row is like."""

    def of(self, path: Path) -> Detected | Read:
        """Returns the format of a file of rows; `self` for a feedback store and a TFDS folder.

        Raises:
            UserError: the file cannot be read, or its first row is of no known shape.
        """
        require(path.exists(), f"{path}: there is no such file of feedback")
        return self if path.is_dir() or _is_store(path) else detect_format(path)

    def read(self, path: Path) -> ReadResult:
        """Reads a file of any format that differs from the others in its fields.

        Raises:
            UserError: the file cannot be read, or its first row is of no known shape.
        """
        form = self.of(path)
        if not isinstance(form, Detected):
            return form.read(path)
        if path.is_dir():
            from rlaif_jax.feedback.records.dataset import read  # here, because TFDS takes seconds to import

            return ReadResult(*read(path), Counter())
        with Store(path) as store:
            return ReadResult(store.judgements(), [], Counter())


def _is_store(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(15) == b"SQLite format 3"


def detect_format(path: Path) -> Read:
    """Returns the format of a JSON file, by its first row.

    Raises:
        UserError: the file cannot be read, or its first row is of no known shape.
    """
    row: Any = next((value for _, value in json_rows(path, [])), None)
    fields = row.keys() if isinstance(row, dict) else set()
    if {"form", "rater", "answers"} <= fields:
        return Records()
    if {"chosen", "rejected"} <= fields:
        texts = [row[name] for name in ("chosen", "rejected")]
        return HH() if all(isinstance(text, str) and ASSISTANT in text for text in texts) else Distilabel()
    known: tuple[tuple[Read, list[set[str]]], ...] = (
        (Distilabel(), [{"generations"}]),
        (HelpSteer(), [{"prompt", "response", "helpfulness"}, {"prompt", "response_1", "preference_strength"}]),
        (AlpacaEval(), [{"output_1", "output_2", "preference"}]),
        (Argilla(), [{"fields", "responses"}, {"fields", "suggestions"}]),
        (LabelStudio(), [{"data", "annotations"}]),
    )
    for form, signs in known:
        if any(sign <= fields for sign in signs):
            return form
    if any(str(name).endswith((".responses", ".suggestion")) for name in fields):
        return Argilla()
    if isinstance(row, dict) and isinstance(row.get("prompt"), dict) and "replies" in row["prompt"]:
        return Oasst()
    shown = ", ".join(map(str, fields))[:200] or f"no object: {str(row)[:60]!r}"
    raise UserError(
        f"{path}: its first row is of no format that is known by its fields ({shown}); name it after all options, such as "
        "format:hh"
    )


@dataclasses.dataclass(frozen=True)
class ImportConfig:
    """Adds the feedback in files of other tools to a feedback store.

    Attributes:
        files: the files.
        format: the format of all files; by default each file's, known by its first row.
        store: the feedback store; created if absent.
    """

    files: tuple[Path, ...] = ()
    format: Detected | Read = Detected()
    store: Path = Path("feedback.sqlite")


def import_help() -> str:
    """Returns the description of --help of `import-feedback`: what the tool does, and examples."""
    return (
        "Adds the feedback in files of other tools and data sets to a feedback store. The format is known by a file's\n"
        "first row, or named after all options.\n\n"
        "  python -m rlaif_jax import-feedback --files pairs.jsonl --store feedback.sqlite\n"
        "  python -m rlaif_jax import-feedback --files export.json format:argilla --format.answers answer_1 answer_2"
    )


def import_feedback(config: ImportConfig) -> int:
    """Adds the files to the store, prints what was read and not, and returns the number of faults.

    Raises:
        UserError: no files, or a file or the store cannot be read.
    """
    require(bool(config.files), "files is missing: --files FILE ...")
    bad = 0
    with Store(config.store) as store:
        for path in config.files:
            messages: list[str] = []
            unused: Counter[str] = Counter()
            form = config.format.of(path) if isinstance(config.format, Detected) else config.format
            if isinstance(form, Records):
                judgements: Iterable[Judgement] = each_judgement(path, messages)
            else:
                found = form.read(path)
                (judgements, messages), unused = found, found.unused
            given, new = store.add_all(judgements)
            print(f"{path}: {given} judgements, {new} of them new in {config.store}")
            for reason, count in unused.most_common():
                print(f"  not used: {count} x {reason}")
            for message in messages[:NAMED_BAD]:
                print(message, file=sys.stderr)
            if messages:
                more = f", of which {NAMED_BAD} are named here" if len(messages) > NAMED_BAD else ""
                print(f"{path}: {len(messages)} faults, whose rows or values are left out{more}", file=sys.stderr)
                if isinstance(form, Records) and not given:
                    print(f"{path}: no row is a record of this project. {NAME_FORMAT}", file=sys.stderr)
            bad += len(messages)
    return bad


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Writes the feedback of a store in the format of another tool.

    Attributes:
        file: the file to write; it is replaced.
        format: the format.
        store: the feedback store.
        superseded: write records that others replace or withdraw, too.
    """

    file: Path | None = None
    format: Written = Records()
    store: Path = Path("feedback.sqlite")
    superseded: bool = False


def export_help() -> str:
    """Returns the description of --help of `export-feedback`: what the tool does, and an example."""
    return (
        "Writes the feedback of a store in the format of another tool, which is named after all options.\n\n"
        "  python -m rlaif_jax export-feedback --store runs/rlaif/feedback.sqlite --file pairs.jsonl format:distilabel"
    )


def export_feedback(config: ExportConfig) -> None:
    """Writes the file and prints how many rows and judgements it has.

    Raises:
        UserError: no file, no store, or the file cannot be written.
    """
    if config.file is None:
        raise UserError("file is missing: --file FILE")
    require(config.store.exists(), f"there is no feedback store {config.store}")
    require(
        config.file.resolve() != config.store.resolve(),
        f"{config.file} is the store, which the rows would replace: name another file by --file",
    )
    forms: Counter[str] = Counter()
    answered: Counter[bool] = Counter()

    def counted(store: Store) -> Iterator[Judgement]:
        for _, judgement in store.read(superseded=config.superseded):
            forms[judgement.form] += 1
            answered[judgement.answered] += 1
            yield judgement

    with Store(config.store) as store:
        rows = config.format.write(counted(store), config.file)
    listed = ", ".join(f"{count} x {form}" for form, count in forms.most_common()) or "none"
    print(f"{config.file}: {rows} rows of {forms.total()} judgements ({listed}; {answered[False]} without a value)")
