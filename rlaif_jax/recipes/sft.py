"""Supervised fine-tuning on conversations, answers to prompts, or texts: learned, measured, saved."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from rlaif_jax.algorithms.fit import Arrays, FitConfig, fit_model
from rlaif_jax.algorithms.supervised import supervised_step, target_logprobs
from rlaif_jax.config import UserError, require
from rlaif_jax.data.chat.config import ChatConfig
from rlaif_jax.data.readers import each_row
from rlaif_jax.data.rendering import LearnedTokens, is_plain, learned_with_bos, read_row
from rlaif_jax.data.text import held_out_mask, packed_sequences
from rlaif_jax.data.tokenizers import Tokenizer
from rlaif_jax.feedback.judges.batching import in_batches
from rlaif_jax.metrics import MetricsWriter
from rlaif_jax.models import CausalLM
from rlaif_jax.models.hf.adapters import save_adapter
from rlaif_jax.models.hf.files import save_model
from rlaif_jax.models.lora import LoRAConfig, joined
from rlaif_jax.parallel import ParallelConfig, Runner
from rlaif_jax.progress.plan import PlannedStage
from rlaif_jax.quality.intervals import Estimate, Jackknife, as_estimate
from rlaif_jax.quality.values import Floats
from rlaif_jax.recipes.start import keep_day, keep_fingerprints, model_to_fit, on_day_of_run
from rlaif_jax.run import Run
from rlaif_jax.sinks.wandb import Tracking, tracked
from rlaif_jax.types import INIT, Params, step_key

STAGE = "sft"
CHECKED = 64  # held-out rows that are read during the training
MOST_NATS = 700.0  # a token; exp of more is no float64, and a ruined model may have it


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """All settings.

    Attributes:
        model: the language model to begin with: a Hugging Face folder, a hub id, a .gguf file or a llama2.c .bin file.
        tokenizer: the tokenizer's file or folder, where the model's folder holds none.
        chat: another chat template than the model's, and values for its variables.
        data: files of JSON lines or Parquet, or names or folders of TFDS data sets, whose rows have `messages` (all turns
            of the assistant are learned), `prompt` and `completion`, as texts or messages (the completion is learned), or
            a `text` (all of it is learned); or plain text, .txt.
        split: the split of TFDS data sets.
        eval_data: texts that are measured on, of the same forms; those that are also learned are left out of them and
            counted. Empty: a share of `data` is held out.
        eval_split: the split of TFDS data sets in `eval_data`.
        seed: of everything random.
        out: the run's folder.
        resume: go on with the run in `out` where it stopped.
        tracking: where the run is shown besides its folder: Weights & Biases.
        stages: the folder of finished stages, which runs may share; None: in `out`.
        max_length: tokens of a row of packed texts. A longer conversation is cut after the last turn of the assistant that
            fits, a `text` is read in pieces, and a longer completion is left out. None: 1024, or as many as the model can
            read.
        held_out: the share of the rows, or of the pieces of a .txt file, that are measured on and not learned from,
            where `eval_data` gives none.
        split_seed: which rows are held out; apart from `seed`, so that runs of several seeds are measured alike.
        lora: train a low-rank adapter instead of all weights; it needs a higher rate, such as fit.learning_rate 3e-4. The
            model is written whole, too.
        adapter: rank and matrices of the adapter, with `lora`.
        fit: updates, rows of a batch, peak of the learning rate.
        check_every: updates between two measurements on held-out texts, and between two states that are kept.
        dtype: of activations.
        remat: recompute the model's blocks in the backward pass, which saves memory.
        parallel: how the devices are used.
    """

    model: str | None = None
    tokenizer: Path | None = None
    chat: ChatConfig = ChatConfig()
    data: tuple[str, ...] = ()
    split: str = "train"
    eval_data: tuple[str, ...] = ()
    eval_split: str = "test"
    seed: int = 0
    out: Path = Path("runs/sft")
    resume: bool = False
    tracking: Tracking = Tracking()
    stages: Path | None = None
    max_length: int | None = None
    held_out: float = 0.05
    split_seed: int = 0
    lora: bool = False
    adapter: LoRAConfig = LoRAConfig()
    fit: FitConfig = FitConfig(updates=500, batch_size=16, learning_rate=2e-5)
    check_every: int = 50
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self) -> None:
        length = self.max_length
        require(
            length is None or length >= 2, f"max_length must be >= 2, as a token is learned from another, not {length}"
        )
        require(self.check_every >= 1, f"check_every must be >= 1, not {self.check_every}")
        require(0 < self.held_out < 1, f"held_out must lie between 0 and 1, not {self.held_out}")
        self.adapter.check_used(self.lora)
        require(self.split_seed >= 0, f"split_seed must be >= 0, not {self.split_seed}")


# ---- Data


class Texts(NamedTuple):
    """Texts to learn from.

    Attributes:
        tokens: of each text.
        names: of each text, equal for texts that belong on one side of a split: the first turn of the user, or the text.
            The pieces of a .txt file are texts by themselves, else a single file could not be split.
        unused: reason -> number of rows that are left out or cut.
    """

    tokens: list[LearnedTokens]
    names: list[str]
    unused: Counter[str]


def read_texts(data: Sequence[str], split: str, tokenizer: Tokenizer, max_length: int) -> Texts:
    """Reads, tokenizes and cuts all rows of some data; what is left out or cut is counted and printed.

    Args:
        data: paths of files, or names or folders of data sets.
        split: the split of data sets.
        tokenizer: of the model.
        max_length: tokens of a row.

    Raises:
        UserError: a file cannot be read, or no row can be used; the message names the first row and its fault.
    """
    found = Texts([], [], Counter())
    faults: list[str] = []
    longer = f"longer than max_length = {max_length} tokens"
    for place, row in each_row(data, split):
        try:
            tokens, name = read_row(row, tokenizer, add_bos=learned_with_bos(tokenizer))
        except UserError as error:
            faults.append(f"{place}: {error}")
            found.unused["row with a fault"] += 1
            continue
        number, alone = found.tokens[-1].number + 1 if found.tokens else 0, Path(place).suffix == ".txt"
        if is_plain(row):
            for i, piece in enumerate(tokens.pieces(max_length)):
                found.tokens.append(piece._replace(number=number + i if alone else number))
                found.names.append(str(piece.ids) if alone else name)
            continue
        cut = tokens.cut(max_length)
        if cut is None:
            found.unused[f"row {longer}"] += 1
            continue
        if len(cut.ids) < len(tokens.ids):
            found.unused[f"conversation cut at a turn: {longer}"] += 1
        found.tokens.append(cut._replace(number=number))
        found.names.append(name)
    for fault in faults[:3]:
        print(fault)
    for reason, count in found.unused.most_common():
        print(f"  {count} x {reason}")
    require(bool(found.tokens), f"{', '.join(data)}: no text is left ({'; '.join([*faults[:1], *found.unused])})")
    return found


class SplitTexts(NamedTuple):
    """Texts to learn from, and others to measure on.

    Attributes:
        learned: texts to learn from.
        measured: texts to measure on; none is one of those to learn from.
        unused: reason -> number of rows that are left out or cut.
    """

    learned: list[LearnedTokens]
    measured: list[LearnedTokens]
    unused: Counter[str]


def read_split(config: SFTConfig, tokenizer: Tokenizer, max_length: int) -> SplitTexts:
    """Reads the texts to learn from, and those to measure on: `eval_data`, else a share.

    Args:
        config: the settings.
        tokenizer: of the model.
        max_length: tokens of a row.

    Raises:
        UserError: nothing is named, a file cannot be read, or no text is left to learn from or to measure on.
    """
    require(bool(config.data), "no texts to learn from: give --data FILE.jsonl ..., or the name of a TFDS data set")
    texts = read_texts(config.data, config.split, tokenizer, max_length)
    if not config.eval_data:
        require(
            len(set(texts.names)) > 1,
            f"{', '.join(config.data)}: this is one text, of which no other can be held out: give more texts, --eval-data, or "
            "a .txt file, which is split into pieces of max_length tokens",
        )
        held_out = held_out_mask(texts.names, config.held_out, config.split_seed)
        learned, measured = ([texts.tokens[i] for i in np.flatnonzero(which)] for which in (~held_out, held_out))
        return SplitTexts(learned, measured, texts.unused)
    known = {tuple(tokens.ids) for tokens in texts.tokens}
    given = read_texts(config.eval_data, config.eval_split, tokenizer, max_length)
    measured = [tokens for tokens in given.tokens if tuple(tokens.ids) not in known]
    unused = texts.unused + Counter({f"eval_data: {reason}": count for reason, count in given.unused.items()})
    if both := len(given.tokens) - len(measured):
        unused["eval_data: text that is also learned"] = both
        print(f"  not measured on: {both} x text of eval_data that is also learned")
    require(bool(measured), f"eval_data: none of its {both} texts is left to measure on: all are also learned")
    return SplitTexts(texts.tokens, measured, unused)


def packed(texts: Sequence[LearnedTokens], length: int, pad_id: int) -> Arrays:
    """Returns the rows of packed texts that `supervised_step` takes.

    Args:
        texts: the texts.
        length: columns of a row.
        pad_id: the token of empty columns.
    """
    return packed_sequences([x.ids for x in texts], [x.weights for x in texts], length=length, pad_id=pad_id)


def measured_rows(texts: Sequence[LearnedTokens], length: int, pad_id: int) -> Arrays:
    """Returns the rows of `packed` with `text`, 1 + the number of each column's text; 0 where empty.

    Args:
        texts: the texts.
        length: columns of a row.
        pad_id: the token of empty columns.
    """
    numbers = [[1.0 + x.number] * len(x.ids) for x in texts]
    rows = packed_sequences([x.ids for x in texts], numbers, length=length, pad_id=pad_id)
    return packed(texts, length, pad_id) | {"text": rows["weights"].astype(np.int32)}


# ---- Measurement


@dataclasses.dataclass(frozen=True)
class PerplexityMeter:
    """Measures the perplexity of the learned tokens of packed texts.

    Attributes:
        model: the language model.
        runner: the devices.
        batch_size: rows of a compiled call.
        lora: settings of the adapter that is measured; None: the parameters are whole.
        base: the weights under it, where the runner has them.
    """

    model: CausalLM
    runner: Runner
    batch_size: int
    lora: LoRAConfig | None = None
    base: Params = None

    @cached_property
    def _read(self) -> Any:
        return self.runner.map(partial(token_losses, self.model, self.lora))

    def losses(self, params: Params, rows: Arrays) -> Floats:
        """Returns (nats, tokens) of each text, all its pieces together, [n, 2] float64.

        Args:
            params: the model's parameters, or the adapter's.
            rows: of `measured_rows`.
        """
        nats, weights = in_batches(partial(self._read, (self.base, params)), rows, self.batch_size)
        number = rows["text"].ravel()
        sums = [np.bincount(number, x.astype(np.float64).ravel()) for x in (nats, weights)]
        columns = np.stack(sums, axis=1, dtype=np.float64)
        return columns[columns[:, 1] > 0]

    def __call__(self, params: Params, rows: Arrays) -> Estimate:
        """Returns the perplexity with its interval of 95 %, over texts."""
        return perplexity(self.losses(params, rows))


def token_losses(
    model: CausalLM,
    lora: LoRAConfig | None,
    params: tuple[Params, Params],
    batch: dict[str, jax.Array],
    *,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (weighted losses in nats, weights), each [R, C], of the tokens that follow each column.

    Args:
        model: the language model.
        lora: settings of an adapter; None: the parameters are whole.
        params: (the weights under an adapter or None, the model's parameters or the adapter's).
        batch: rows of packed texts.
        axis_name: not used; `Runner.map` passes it.
    """
    del axis_name
    logprobs, weights = target_logprobs(model, joined(lora, *params), batch)
    return -logprobs * weights, weights


def perplexity(losses: Floats) -> Estimate:
    """Returns exp(nats / tokens) over all texts, with its interval of 95 %; at most exp(`MOST_NATS`).

    Args:
        losses: [n, 2], nats and tokens of each text.
    """
    found = as_estimate(Jackknife().estimate(losses, lambda sums: sums[..., 0] / sums[..., 1]))
    return Estimate(*(math.exp(min(x, MOST_NATS)) for x in found))


# ---- The run


def fit_texts(
    model: CausalLM,
    start: Params,
    base: Params,
    training: Arrays,
    config: SFTConfig,
    *,
    runner: Runner,
    run: Run,
    writer: MetricsWriter,
    check: Callable[[Params], dict[str, float]],
) -> Params:
    """Fits a model, or an adapter, to packed texts and returns what has learned, host arrays.

    Args:
        model: the language model.
        start: parameters to start from.
        base: the weights under an adapter, where the runner has them; None without one.
        training: the packed texts.
        config: the settings.
        runner: the devices.
        run: keeps the state of the fit, and may be asked to stop.
        writer: takes the metrics.
        check: parameters -> numbers on held-out texts.
    """
    part = run.part
    with writer.stage(STAGE, config.fit.updates, resume_from=part.done or None) as log:
        run.settled()
        return fit_model(
            supervised_step,
            model,
            start,
            training,
            config.fit,
            config.seed,
            runner=runner,
            log=log.write,
            stop=run.stopped,
            lora=config.adapter if config.lora else None,
            base=base,
            check=check,
            part=part,
            every=config.check_every,
        )


def help_text() -> str:
    """Returns the description of --help: what the tool does, and an example."""
    return (
        "Fine-tunes a language model on conversations, on answers to prompts, or on texts.\n\n"
        "  python -m rlaif_jax sft --model models/smollm2 --data chats.jsonl --fit.updates 500\n\n"
        "The model is written to OUT/model, a folder that `python -m rlaif_jax train --policy` and transformers read."
    )


def main(config: SFTConfig) -> dict[str, Any]:
    """Fine-tunes a language model, writes it to OUT/model and returns the run's metrics."""
    config.tracking.check()
    model, params, tokenizer, runner, max_length = model_to_fit(
        config.model,
        config.tokenizer,
        config.chat,
        max_length=config.max_length,
        batch_size=config.fit.batch_size,
        dtype=config.dtype,
        remat=config.remat,
        parallel=config.parallel,
    )
    tokenizer = on_day_of_run(tokenizer, config.out, resume=config.resume)
    texts = read_split(config, tokenizer, max_length)
    training = packed(texts.learned, max_length, tokenizer.pad_id)
    held_out = measured_rows(texts.measured, max_length, tokenizer.pad_id)
    require(
        len(training["tokens"]) >= config.fit.batch_size,
        f"the texts fill {len(training['tokens'])} rows of max_length = {max_length} tokens, fewer than "
        f"fit.batch_size ({config.fit.batch_size})",
    )
    lora, start, base = None, params, None
    if config.lora:
        lora, base = config.adapter, runner.place(params)
        start = lora.init(step_key(config.seed, 0, INIT), params)
    meter = PerplexityMeter(model, runner, config.fit.batch_size, lora, base)
    with (
        Run(config.out, STAGE, config, seed=config.seed, resume=config.resume, stages=config.stages) as run,
        tracked(run, config.tracking) as sinks,
        MetricsWriter(config.out, display=run.display, sinks=sinks) as writer,
    ):
        run.display.plan((PlannedStage(STAGE, "the model learns from the texts", 1),))
        run.missing = dict(texts.unused)
        run.metrics |= {
            "texts_learned": len({tokens.number for tokens in texts.learned}),
            "texts_heldout": len({tokens.number for tokens in texts.measured}),
            "columns_filled": float((training["segments"] > 0).mean()),
        }
        known = keep_fingerprints(run, weights=params, texts=training)
        keep_fingerprints(run, measured_texts=held_out)  # apart: what is learned does not depend on them
        keep_day(run, tokenizer)
        checked = {key: rows[:CHECKED] for key, rows in held_out.items()}

        def check(params: Params) -> dict[str, float]:
            nats, tokens = meter.losses(params, checked).sum(0)
            return {"heldout_loss": float(nats / tokens) if tokens else math.nan}

        def learn() -> Params:
            return fit_texts(model, start, base, training, config, runner=runner, run=run, writer=writer, check=check)

        settings: dict[str, Any] = {"model": model.config, **known, "fit": config.fit, "adapter": lora}
        settings |= {"runner": type(runner).__name__, "devices": runner.devices}
        stage = run.stage(STAGE, jax.eval_shape(lambda: start), learn, settings=settings)
        for when, of in (("before", start), ("after", stage.params)):
            measured = meter(runner.place(of), held_out)
            run.metrics |= {f"perplexity_{when}": measured.value}
            if math.isfinite(measured.low):
                run.metrics |= {f"perplexity_{when}_ci95": [measured.low, measured.high]}
        save_model(run.folder / "model", model, joined(lora, params, stage.params, merge=True), tokenizer)
        if lora is not None:
            save_adapter(run.folder / "adapter", model, lora, stage.params, base_name=config.model)
        run.metrics["wall_s"] = round(run.wall_s, 1)
        before, after = run.metrics["perplexity_before"], run.metrics["perplexity_after"]
        run.story.append(f"Perplexity of {run.metrics['texts_heldout']} held-out texts: {before:.3g} -> {after:.3g}")
    return run.metrics
