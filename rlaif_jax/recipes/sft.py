"""Supervised fine-tuning on conversations, answers to prompts, or texts: learned, measured, saved."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from rlaif_jax.algorithms.fit import Arrays, FitConfig, fit_model
from rlaif_jax.algorithms.supervised import supervised_step, target_logprobs
from rlaif_jax.config import UserError, require
from rlaif_jax.data.chat.config import ChatConfig
from rlaif_jax.data.conversations import Turn, read_turns
from rlaif_jax.data.readers import jsonl_records, listed, plain, plain_text, tfds_records
from rlaif_jax.data.rendering import LearnedTokens, conversation_tokens, learned_with_bos, text_tokens
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
CONVERSATIONS = ("messages", "conversations", "conversation")


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """All settings.

    Attributes:
        model: the language model to begin with: a Hugging Face folder, a hub id, a .gguf file or a llama2.c .bin file.
        tokenizer: the tokenizer's file or folder, where the model's folder holds none.
        chat: another chat template than the model's, and values for its variables.
        data: files of JSON lines, or names or folders of TFDS data sets, whose rows have `messages` (all turns of the
            assistant are learned), `prompt` and `completion`, as texts or messages (the completion is learned), or `text`
            (all of it is learned); or plain text, .txt.
        split: the split of TFDS data sets.
        seed: of everything random.
        out: the run's folder.
        resume: go on with the run in `out` where it stopped.
        tracking: where the run is shown besides its folder: Weights & Biases.
        stages: the folder of finished stages, which runs may share; None: in `out`.
        max_length: tokens of a row of packed texts. A longer conversation is cut after the last turn of the assistant that
            fits, a `text` is read in pieces, and a longer completion is left out. None: 1024, or as many as the model can
            read.
        held_out: the share of the rows that are measured on and not learned from.
        split_seed: which rows are held out; apart from `seed`, so that runs of several seeds are measured alike.
        lora: train a low-rank adapter instead of all weights; it needs a higher rate, such as fit.learning_rate 3e-4. The
            model is written whole, too.
        adapter: rank and matrices of the adapter, with `lora`.
        fit: updates, rows of a batch, peak of the learning rate.
        check_every: updates between two measurements on held-out texts, and between two states that are kept.
        compute_dtype: of activations.
        remat: recompute the model's blocks in the backward pass, which saves memory.
        parallel: how the devices are used.
    """

    model: str | None = None
    tokenizer: Path | None = None
    chat: ChatConfig = ChatConfig()
    data: tuple[str, ...] = ()
    split: str = "train"
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
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self) -> None:
        require(
            self.max_length is None or self.max_length >= 2,
            f"max_length must be >= 2, not {self.max_length}: a token is learned from those before it",
        )
        require(self.check_every >= 1, f"check_every must be >= 1, not {self.check_every}")
        require(0 < self.held_out < 1, f"held_out must lie between 0 and 1, not {self.held_out}")


# ---- Data


class Texts(NamedTuple):
    """Texts to learn from.

    Attributes:
        tokens: of each text.
        names: of each text, equal for texts that belong on one side of a split: the first turn of the user, or the text;
            the pieces of a .txt file have names of their own.
        unused: reason -> number of rows that are left out or cut.
    """

    tokens: list[LearnedTokens]
    names: list[str]
    unused: Counter[str]


def each_row(data: Sequence[str], split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, row) of files of JSON lines and of TFDS data sets; a .txt file is a row with `text`.

    Args:
        data: paths of files, or names or folders of data sets.
        split: the split of data sets.

    Raises:
        UserError: nothing is named, or a file or data set cannot be read.
    """
    require(bool(data), "no texts to learn from: give --data FILE.jsonl ..., or the name of a TFDS data set")
    for name in data:
        if Path(name).suffix == ".txt":
            yield name, {"text": plain_text(name)}
            continue
        is_file = Path(name).is_file() or Path(name).suffix in (".jsonl", ".json", ".gz")
        records = jsonl_records(name, required=()) if is_file else tfds_records(name, split)
        for index in range(len(records)):
            yield records.place(index), plain(records[index])


def read_row(row: dict[str, Any], tokenizer: Tokenizer, *, add_bos: bool) -> tuple[LearnedTokens, str]:
    """Returns (the tokens of a row, its name for a split).

    Args:
        row: a row of one of the forms that `SFTConfig.data` lists.
        tokenizer: encodes the texts.
        add_bos: put BOS before each text.

    Raises:
        UserError: the row is of no such form, or the chat template does not take its conversation.
    """
    name = next((name for name in CONVERSATIONS if name in row), None)
    if name is not None:
        turns = read_turns(row[name], name)
        return conversation_tokens(tokenizer, turns, add_bos=add_bos), first_turn(turns)
    if {"prompt", "completion"} <= row.keys():
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list):
            before, after = read_turns(prompt, "prompt"), read_turns(completion, "completion")
            found = conversation_tokens(tokenizer, [*before, *after], first=len(before), add_bos=add_bos)
            return found, first_turn(before)
        require(
            isinstance(prompt, str) and isinstance(completion, str),
            "prompt and completion must be two texts or two lists of messages",
        )
        return text_tokens(tokenizer, completion, context=prompt, add_bos=add_bos), prompt
    require(
        isinstance(row.get("text"), str),
        f"a row has messages, prompt and completion, or text; this one has {listed(row)}",
    )
    return text_tokens(tokenizer, row["text"], add_bos=add_bos), row["text"]


def is_plain(row: Mapping[str, Any]) -> bool:
    """Returns whether a row of one of the forms that `SFTConfig.data` lists is a text without a prompt."""
    return not ({*CONVERSATIONS} & row.keys() or {"prompt", "completion"} <= row.keys())


def first_turn(turns: Sequence[Turn]) -> str:
    """Returns the first turn of the user, or the whole text without one."""
    return next((turn.text for turn in turns if turn.role == "user"), "\n\n".join(turn.text for turn in turns))


def read_texts(config: SFTConfig, tokenizer: Tokenizer, max_length: int) -> Texts:
    """Reads, tokenizes and cuts all rows of the data; what is left out or cut is counted.

    Args:
        config: the settings.
        tokenizer: of the model.
        max_length: tokens of a row.

    Raises:
        UserError: a file cannot be read, or no row can be used; the message names the first row and its fault.
    """
    found = Texts([], [], Counter())
    faults: list[str] = []
    longer = f"longer than max_length = {max_length} tokens"
    for place, row in each_row(config.data, config.split):
        try:
            tokens, name = read_row(row, tokenizer, add_bos=learned_with_bos(tokenizer))
        except UserError as error:
            faults.append(f"{place}: {error}")
            found.unused["row with a fault"] += 1
            continue
        if is_plain(row):
            parts = tokens.pieces(max_length)
            found.tokens.extend(parts)
            found.names.extend(f"{place} {i}" if Path(place).suffix == ".txt" else name for i in range(len(parts)))
            continue
        cut = tokens.cut(max_length)
        if cut is None:
            found.unused[f"row {longer}"] += 1
            continue
        if len(cut.ids) < len(tokens.ids):
            found.unused[f"conversation cut at a turn: {longer}"] += 1
        found.tokens.append(cut)
        found.names.append(name)
    for fault in faults[:3]:
        print(fault)
    for reason, count in found.unused.most_common():
        print(f"  {count} x {reason}")
    require(bool(found.tokens), f"no text is left to learn from ({'; '.join([*faults[:1], *found.unused])})")
    return found


def packed(texts: Texts, which: np.ndarray, length: int, pad_id: int) -> Arrays:
    """Returns the rows of packed texts that `supervised_step` takes.

    Args:
        texts: N texts.
        which: [N] bool, those to pack.
        length: columns of a row.
        pad_id: the token of empty columns.
    """
    chosen = [tokens for tokens, is_chosen in zip(texts.tokens, which) if is_chosen]
    return packed_sequences([x.ids for x in chosen], [x.weights for x in chosen], length=length, pad_id=pad_id)


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

    def losses(self, params: Params, rows: Arrays) -> Floats:
        """Returns (nats, tokens) of each text, [n, 2] float64.

        Args:
            params: the model's parameters, or the adapter's.
            rows: packed texts.
        """
        read = self.runner.map(partial(token_losses, self.model, self.lora))
        nats, weights = in_batches(partial(read, (self.base, params)), rows, self.batch_size)
        texts = rows["segments"].max() + 1
        number = np.arange(len(nats))[:, None] * texts + rows["segments"]
        sums = [np.bincount(number.ravel(), x.astype(np.float64).ravel(), len(nats) * texts) for x in (nats, weights)]
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
    """Returns exp(nats / tokens) over all texts, with its interval of 95 %.

    Args:
        losses: [n, 2], nats and tokens of each text.
    """
    found = as_estimate(Jackknife().estimate(losses, lambda sums: sums[..., 0] / sums[..., 1]))
    return Estimate(*(math.exp(x) for x in found))


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
        dtype=config.compute_dtype,
        remat=config.remat,
        parallel=config.parallel,
    )
    tokenizer = on_day_of_run(tokenizer, config.out, resume=config.resume)
    texts = read_texts(config, tokenizer, max_length)
    mask = held_out_mask(texts.names, config.held_out, config.split_seed)
    held_out, training = (packed(texts, which, max_length, tokenizer.pad_id) for which in (mask, ~mask))
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
            "texts_learned": int((~mask).sum()),
            "texts_heldout": int(mask.sum()),
            "columns_filled": float((training["segments"] > 0).mean()),
        }
        known = keep_fingerprints(run, weights=params, texts=training)
        keep_day(run, tokenizer)
        checked = {key: rows[:CHECKED] for key, rows in held_out.items()}

        def check(params: Params) -> dict[str, float]:
            return {"heldout_loss": math.log(meter(params, checked).value)}

        def learn() -> Params:
            return fit_texts(model, start, base, training, config, runner=runner, run=run, writer=writer, check=check)

        settings = {
            "model": model.config,
            **known,
            "fit": config.fit,
            "adapter": lora,
            "runner": type(runner).__name__,
            "devices": runner.devices,
        }
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
