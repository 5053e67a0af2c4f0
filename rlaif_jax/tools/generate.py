"""The tool `python -m rlaif_jax generate`: answers of a model or a run, or of two side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlaif_jax.config import UserError, require
from rlaif_jax.data.chat.config import ChatConfig
from rlaif_jax.data.readers import FileRecords
from rlaif_jax.files import atomic_write
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import ParallelConfig
from rlaif_jax.progress.display import ProgressDisplay
from rlaif_jax.progress.text import escaped
from rlaif_jax.recipes.own_prompts import Template, read_records
from rlaif_jax.tools.runs import Dtype, is_run, run_settings
from rlaif_jax.tools.writers import Answer, Writer, load_writer

NEW = "/new"


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """All settings.

    Attributes:
        model: what answers: the folder of a run (its newest checkpoint), a Hugging Face folder, a hub id, a .gguf file or a
            llama2.c .bin file.
        against: another one that answers the same prompts with the same random numbers; "" = none.
        prompts: a .jsonl or .parquet file with a field `prompt` (a text or a list of messages), a .txt file with one prompt
            a line, or tfds:NAME/SPLIT; "" = none.
        prompt: one prompt. Without prompts you type them: the conversation is kept, /new starts over, Ctrl-D ends.
        out: the file to write, a JSON line a prompt with prompt, answers and generators, as `judge --items` reads it; None:
            the answers are printed.
        step: the checkpoint of the run `model`; None: the newest.
        adapter: the folder of an adapter, as peft writes it, to put on `model`; `model` may itself be such a folder, which
            names its base.
        tokenizer: the tokenizer's file or folder, where the model's folder holds none.
        template: auto: prompts become messages in the model's chat template where it has one; chat: they must; plain: the
            prompt itself is continued. None: of a run, as it was trained; else auto.
        system: the system message of conversations without one; "" = none. None: of a run, as it was trained; else none.
        chat: another chat template, and values for its variables, of both models. A run has those that it was trained with.
        temperature: divides the logits; 0 takes the most probable token.
        max_new_tokens: most tokens of an answer.
        top_k: only the k most probable tokens may be drawn; 0: all.
        top_p: only the smallest set of most probable tokens with this mass may be drawn; 1: all.
        seed: of the answers.
        batch_size: prompts that are answered at a time, over all devices.
        dtype: of matrix products.
        parallel: how the devices are used.
    """

    model: str = ""
    against: str = ""
    prompts: str = ""
    prompt: str = ""
    out: Path | None = None
    step: int | None = None
    adapter: Path | None = None
    tokenizer: Path | None = None
    template: Template | None = None
    system: str | None = None
    chat: ChatConfig = ChatConfig()
    temperature: float = 1.0
    max_new_tokens: int = 256
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 16
    dtype: Dtype = "float32"
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"batch_size must be >= 1, not {self.batch_size}")
        require(0 <= self.seed < 2**32, f"seed must lie in 0 .. 2**32 - 1, not {self.seed}")
        require(not (self.prompts and self.prompt), "give --prompts, a file, or --prompt, one prompt, not both")
        _ = self.sampling  # which checks its settings

    @property
    def sampling(self) -> SamplingConfig:
        """Returns how answers are drawn."""
        return SamplingConfig(self.max_new_tokens, self.temperature, self.top_k, self.top_p)


def help_text() -> str:
    """Returns the description of --help: what the tool does, and examples."""
    return (
        "Answers prompts by a model or by the policy of a run, or by two of them side by side.\n\n"
        "  python -m rlaif_jax generate --model runs/rlaif --against models/smollm2\n"
        "  python -m rlaif_jax generate --model runs/rlaif --prompts prompts.jsonl --out answers.jsonl"
    )


class Row(NamedTuple):
    """A prompt and the answer of each writer.

    Attributes:
        prompt: as text for people.
        answers: one of each writer.
    """

    prompt: str
    answers: list[Answer]


def main(config: GenerateConfig) -> None:
    """Answers the prompts of a file, one prompt, or what is typed.

    Raises:
        UserError: no model, or input that cannot be read or does not fit together.
    """
    require(bool(config.model), "no model to answer: give --model, the folder of a run or of a model, or a hub id")
    typed = not (config.prompts or config.prompt)
    require(
        not (typed and config.out), "--out takes the answers to --prompts or --prompt; a typed conversation is printed"
    )
    require(config.out is None or not config.out.is_dir(), f"{config.out} is a folder; --out is a file")
    same = (
        config.prompts and config.out and config.out.exists() and config.out.resolve() == Path(config.prompts).resolve()
    )
    require(not same, f"{config.out} holds the prompts, which the answers would replace: name another file by --out")
    asked = None
    if config.prompts:
        asked = read_records(config.prompts)
    elif config.prompt:
        asked = FileRecords(({"prompt": config.prompt},), ("--prompt",))
    writers = _writers(config)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without UTF-8 gets escapes rather than an error
        sys.stdout.reconfigure(errors="backslashreplace")
    if asked is None:
        converse(writers)
        return
    rows = answer_all(writers, [writer.read(asked) for writer in writers], config.batch_size)
    if config.out is None:
        for number, row in enumerate(rows):
            show(row, writers, end=number < len(asked) - 1)
    else:
        _write(config.out, rows, writers, len(asked))


def _writers(config: GenerateConfig) -> list[Writer]:
    """Loads the one or two models that answer."""
    folder = Path(config.model)
    trained: Mapping[str, Any] = run_settings(folder) if is_run(folder) else {}
    template, system = config.template, config.system
    if template is None:
        kept = trained.get("template")
        template = kept if kept in ("auto", "chat", "plain") else "auto"
    if system is None:
        system = str(trained.get("system") or "")
    load = partial(load_writer, chat=config.chat, dtype=config.dtype)
    loaded = [load(config.model, step=config.step, adapter=config.adapter, tokenizer=config.tokenizer)]
    if config.against:
        loaded.append(load(config.against, step=None, adapter=None, tokenizer=None))
    return [
        Writer(one, config.sampling, seed=config.seed, template=template, system=system, parallel=config.parallel)
        for one in loaded
    ]


def answer_all(writers: Sequence[Writer], read: Sequence[FileRecords], batch_size: int) -> Iterator[Row]:
    """Yields each prompt with the answers to it, in the order of the prompts.

    Args:
        writers: who answers.
        read: the same prompts as each of the writers reads them.
        batch_size: prompts that are answered at a time; rounded to a multiple of the devices.
    """
    count, devices = len(read[0]), writers[0].devices
    rows = max(min(batch_size, count) // devices, 1) * devices
    for first in range(0, count, rows):
        batches = [records.records[first : first + rows] for records in read]
        drawn = [writer.answer(batch, first, rows) for writer, batch in zip(writers, batches)]
        for record, *answers in zip(batches[0], *drawn):
            yield Row(str(record["prompt"]), answers)


def _write(path: Path, rows: Iterator[Row], writers: Sequence[Writer], count: int) -> None:
    """Writes a JSON line for each row, also of those that there are when Ctrl-C comes."""
    names = [writer.name for writer in writers]
    cut, done, stopped = [0] * len(writers), 0, None
    with atomic_write(path) as file, ProgressDisplay(stderr=True) as display:
        bar = display.add("generate", count, unit="prompt")
        try:
            for done, row in enumerate(rows, 1):
                values = {"prompt": row.prompt, "answers": [answer.text for answer in row.answers], "generators": names}
                file.write(json.dumps(values) + "\n")
                cut = [before + (not answer.finished) for before, answer in zip(cut, row.answers)]
                bar.update(done, "")
        except KeyboardInterrupt as error:
            stopped = error
        finally:
            bar.close()
    for name, number in zip(names, cut):
        if number:
            print(f"{escaped(name)}: {number} of {done} answers are cut at max_new_tokens", file=sys.stderr)
    print(f"{done} of {count} prompts are answered in {path}", file=sys.stderr)
    if stopped is not None:
        raise stopped


# ---- On the terminal


def show(row: Row, writers: Sequence[Writer], *, end: bool) -> None:
    """Prints a prompt and its answers, two of them side by side.

    Args:
        row: the prompt and the answers; what a terminal would obey in them is escaped.
        writers: who answered.
        end: whether to print a line behind it.
    """
    console = Console(highlight=False)
    console.print(Text(escaped(row.prompt), style="bold"), soft_wrap=True)
    _print_answers(console, row.answers, writers)
    if end:
        console.rule()


def _print_answers(console: Console, answers: Sequence[Answer], writers: Sequence[Writer]) -> None:
    cells = [Text(escaped(answer.text) or "(empty answer)") for answer in answers]
    for cell, answer in zip(cells, answers):
        if not answer.finished:
            cell.append(" [cut at max_new_tokens]", style="dim")
    if len(cells) == 1:
        console.print(cells[0], soft_wrap=True)
        return
    table = Table(expand=True)
    for writer in writers:
        table.add_column(Text(escaped(writer.name)), ratio=1, overflow="fold")
    table.add_row(*cells)
    console.print(table)


def converse(writers: Sequence[Writer]) -> None:
    """Reads messages from the standard input and prints answers until the input ends.

    Each writer goes on with the conversation that has its own answers.

    Raises:
        UserError: the input is not UTF-8.
    """
    with contextlib.suppress(ImportError):  # the arrow keys then edit the line
        import readline  # noqa: F401
    console = Console(highlight=False)
    here = sys.stdin.isatty()
    if here:
        print(f"type a message; {NEW} starts over, Ctrl-D ends", file=sys.stderr)
    said: list[list[dict[str, str]]] = [[] for _ in writers]
    number = 0  # another one for each message, so that the same message is answered in another way
    while True:
        try:
            line = input("> " if here else "").strip()
        except EOFError:
            print(end="\n" if here else "")
            return
        except UnicodeDecodeError as error:
            raise UserError(f"the standard input is no UTF-8 text: {error}") from error
        if line == NEW:
            said = [[] for _ in writers]
        if line in ("", NEW):
            continue
        asked = [[*before, {"role": "user", "content": line}] for before in said]
        try:
            answers = []
            for writer, messages in zip(writers, asked):
                read = writer.read(FileRecords(({"messages": messages},), ("this conversation",)))
                answers += writer.answer(read.records, number, writer.devices)
        except UserError as error:  # such as a conversation that has become too long
            print(f"error: {error}; {NEW} starts over", file=sys.stderr)
            continue
        number += 1
        _print_answers(console, answers, writers)
        said = [[*messages, {"role": "assistant", "content": answer.text}] for messages, answer in zip(asked, answers)]
