"""A reward model from comparisons, rankings or ratings: learned, measured on held-out prompts, saved."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.algorithms.fit import Arrays, FitConfig, bucketed_minibatches, fit
from rlaif_jax.algorithms.optimizer import make_optimizer
from rlaif_jax.algorithms.reward_modeling import members_step, reward_step
from rlaif_jax.config import UserError, require
from rlaif_jax.data.chat.config import ChatConfig
from rlaif_jax.data.rendering import learned_with_bos
from rlaif_jax.data.text import held_out_mask
from rlaif_jax.data.tokenizers import Tokenizer
from rlaif_jax.feedback.judges.reward_model import Scorer
from rlaif_jax.feedback.judges.reward_pairs import Pairs, tokenize, training_buckets
from rlaif_jax.feedback.records.comparisons import Comparisons, comparisons
from rlaif_jax.feedback.records.exchange import NAMED_BAD, Detected, Read
from rlaif_jax.metrics import MetricsWriter
from rlaif_jax.models import ScalarModel
from rlaif_jax.models.hf.classifiers import save_reward_model
from rlaif_jax.models.lora import LoRAConfig, joined
from rlaif_jax.parallel import ParallelConfig, Runner
from rlaif_jax.progress.plan import PlannedStage
from rlaif_jax.quality.calibration import debiased_calibration_error
from rlaif_jax.quality.intervals import bootstrap_ci, percentile_interval, resampled_rows, share_interval
from rlaif_jax.quality.statistics import calibration_columns, fold_predictions, spearman
from rlaif_jax.quality.values import sum_by_group
from rlaif_jax.quality.votes import current
from rlaif_jax.recipes.start import keep_day, keep_fingerprints, model_to_fit, on_day_of_run
from rlaif_jax.run import Run
from rlaif_jax.sinks.wandb import Tracking, tracked
from rlaif_jax.types import INIT, Params, step_key

STAGE = "reward_model"
CHECKED = 512  # held-out pairs that are scored during the training
RESAMPLES = 500
MOST_PASSES = 3  # over the training pairs, before a run warns


@dataclasses.dataclass(frozen=True)
class RewardModelConfig:
    """All settings.

    Attributes:
        model: the language model whose trunk the reward model begins with: a Hugging Face folder, a hub id, a .gguf
            file or a llama2.c .bin file.
        tokenizer: the tokenizer's file or folder, where the model's folder holds none.
        chat: another chat template than the model's, and values for its variables.
        feedback: files of pairs, rankings or ratings, feedback stores, or TFDS folders of judgements.
        eval_feedback: files whose pairs are measured on; those that are also learned are left out of them and counted.
            Empty: a share of `feedback` is held out.
        format: the format of all these files.
        principles: the criteria that count, such as HelpSteer's helpfulness; empty: all, each as a judgement.
        seed: of everything random.
        out: the run's folder.
        resume: go on with the run in `out` where it stopped.
        tracking: where the run is shown besides its folder: Weights & Biases.
        stages: the folder of finished stages, which runs may share; None: in `out`.
        max_length: tokens of prompt and answer; longer pairs are left out. None: 1024, or as many as the model can read.
        held_out: the share of the conversations that are measured on and not learned from, where `eval_feedback` gives none.
        split_seed: which conversations are held out; apart from `seed`, so that runs of several seeds are measured alike.
        members: number of reward models, of the seeds `seed`, `seed + 1` ..., trained in one program.
        margin: the difference of scores asked of two answers at both ends of the scale, or with a far preference; smaller
            differences have margins in proportion (Llama 2, Touvron 2023, section 3.2.2). 0: none.
        center_coef: weight of the term that draws the mean score to 0 (Eisenstein 2023).
        lora: train low-rank adapters and the heads instead of all weights; they need a higher rate, such as
            fit.learning_rate 3e-4. The models are written whole.
        adapter: rank and matrices of the adapters, with `lora`.
        fit: updates, pairs of a batch, peak of the learning rate.
        check_every: updates between two measurements on held-out pairs, and between two states that are kept.
        dtype: of activations.
        remat: recompute the model's blocks in the backward pass, which saves memory.
        parallel: how the devices are used.
    """

    model: str | None = None
    tokenizer: Path | None = None
    chat: ChatConfig = ChatConfig()
    feedback: tuple[Path, ...] = ()
    eval_feedback: tuple[Path, ...] = ()
    format: Detected | Read = Detected()
    principles: tuple[str, ...] = ()
    seed: int = 0
    out: Path = Path("runs/reward_model")
    resume: bool = False
    tracking: Tracking = Tracking()
    stages: Path | None = None
    max_length: int | None = None
    held_out: float = 0.1
    split_seed: int = 0
    members: int = 1
    margin: float = 0.0
    center_coef: float = 0.0
    lora: bool = False
    adapter: LoRAConfig = LoRAConfig()
    fit: FitConfig = FitConfig(updates=500, batch_size=32, learning_rate=2e-5)
    check_every: int = 50
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self) -> None:
        require(self.max_length is None or self.max_length >= 1, f"max_length must be >= 1, not {self.max_length}")
        for field in ("members", "check_every"):
            require(self.__dict__[field] >= 1, f"{field} must be >= 1, not {self.__dict__[field]}")
        for field in ("margin", "center_coef"):
            require(0 <= self.__dict__[field] < np.inf, f"{field} must be >= 0 and finite, not {self.__dict__[field]}")
        require(0 < self.held_out < 1, f"held_out must lie between 0 and 1, not {self.held_out}")
        self.adapter.check_used(self.lora)
        require(self.split_seed >= 0, f"split_seed must be >= 0, not {self.split_seed}")


# ---- Data


def read_comparisons(files: Sequence[Path], form: Detected | Read, principles: Sequence[str]) -> Comparisons:
    """Returns the comparisons in files of feedback, and prints what was read and not used.

    Args:
        files: the files.
        form: the format of all files.
        principles: the criteria that count; empty: all.

    Raises:
        UserError: a file cannot be read.
    """
    judgements = []
    for path in files:
        found = form.read(path)
        good, bad = found
        judgements += good
        print(f"{path}: {len(good)} judgements")
        for reason, count in found.unused.most_common():
            print(f"  not used: {count} x {reason}")
        for message in bad[:NAMED_BAD]:
            print(message, file=sys.stderr)
        if bad:
            print(f"{path}: {len(bad)} faults, whose rows or values are left out", file=sys.stderr)
    kept = current(judgements)
    made = comparisons([judgements[i] for i in kept], principles)
    if replaced := len(judgements) - len(kept):
        made.unused["judgement that another replaces or repeats"] += replaced
    return made


class SplitPairs(NamedTuple):
    """Pairs to learn from, and others to measure on.

    Attributes:
        learned: pairs to learn from.
        measured: pairs to measure on; none is one of those to learn from.
        unused: reason -> number of judgements, answers or pairs that are left out.
    """

    learned: Pairs
    measured: Pairs
    unused: Counter[str]


def read_split(config: RewardModelConfig, tokenizer: Tokenizer, max_length: int) -> SplitPairs:
    """Reads the pairs to learn from, and those to measure on: `eval_feedback`, else a share.

    Args:
        config: the settings.
        tokenizer: of the model.
        max_length: tokens of prompt and answer.

    Raises:
        UserError: nothing is named, a file cannot be read, or no pair is left to learn from or to measure on.
    """

    def read(files: Sequence[Path]) -> tuple[Pairs, Counter[str]]:
        found = read_comparisons(files, config.format, config.principles)
        add_bos = learned_with_bos(tokenizer)
        return tokenize(found, tokenizer, max_length=max_length, add_bos=add_bos, unused=found.unused), found.unused

    require(
        bool(config.feedback),
        "no feedback to learn from: give --feedback FILE ..., pairs, rankings or ratings of answers",
    )
    pairs, unused = read(config.feedback)
    if not config.eval_feedback:
        held_out = held_out_mask(pairs.conversation, config.held_out, config.split_seed)
        learned, measured = (pairs.chosen(np.flatnonzero(which)) for which in (~held_out, held_out))
        return SplitPairs(learned, measured, unused)
    try:
        given, without = read(config.eval_feedback)
    except UserError as error:
        raise UserError(f"eval_feedback: {error}") from error
    key = lambda ids: frozenset(map(tuple, ids))
    known = set(map(key, pairs.ids))
    new = [i for i, ids in enumerate(given.ids) if key(ids) not in known]
    unused += Counter({f"eval_feedback: {reason}": count for reason, count in without.items()})
    if both := len(given.ids) - len(new):
        unused["eval_feedback: pair that is also learned"] = both
    require(bool(new), f"eval_feedback: none of its {both} pairs is left to measure on: all are also learned")
    return SplitPairs(pairs, given.chosen(new), unused)


# ---- Scores and what they are worth


def running_check(scores: np.ndarray, pairs: Pairs) -> dict[str, float]:
    """Returns the held-out loss and accuracy of scores [n, 2, N], means over the N members."""
    gap = scores[:, 0] - scores[:, 1]
    p, weight = pairs.probability[:, None], pairs.weight / pairs.weight.sum()
    losses = p * np.logaddexp(0, -gap) + (1 - p) * np.logaddexp(0, gap)
    decided = pairs.probability != 0.5
    right = (gap > 0) == (p > 0.5)
    found = {"heldout_loss": float(weight @ losses.mean(1))}
    return found | ({"heldout_accuracy": float(right[decided].mean())} if decided.any() else {})


def measure(scores: np.ndarray, pairs: Pairs, seed: int) -> dict[str, Any]:
    """Measures how well scores [n, 2] predict held-out comparisons.

    Intervals are of 95 %, over conversations.

    `heldout_accuracy`: share of the decided pairs whose better answer has the higher score, `longer_accuracy` that of the
    longer answer, as a baseline; equal scores or lengths count half. `heldout_margin`: mean score of the better answer
    minus the other. `heldout_ece`: expected calibration error of sigmoid(s1 - s2), without the part that chance makes.
    `length_correlation`: Spearman's, of scores and lengths.

    Args:
        scores: of both answers.
        pairs: what people or judges preferred.
        seed: of the resamples.
    """
    gap = scores[:, 0] - scores[:, 1]
    numbers = np.unique(pairs.conversation, return_inverse=True)[1]
    decided = pairs.probability != 0.5
    sign = np.where(pairs.probability > 0.5, 1.0, -1.0)[decided]
    found: dict[str, Any] = {}

    def record(name: str, value: Any, low: Any, high: Any) -> None:
        if np.isfinite(value):  # a correlation with lengths that are all equal is not
            found[name] = value
        if low is not None and np.isfinite(low):
            found[f"{name}_ci95"] = [low, high]

    if decided.any():
        for name, difference in (("heldout_accuracy", gap), ("longer_accuracy", -np.diff(pairs.lengths)[:, 0])):
            record(name, *share_interval((1 + np.sign(sign * difference[decided])) / 2, groups=numbers[decided]))
        margins = sign * gap[decided]
        interval = bootstrap_ci(margins, seed=seed, groups=numbers[decided], resamples=RESAMPLES)
        record("heldout_margin", float(margins.mean()), *interval)
    columns = calibration_columns(*fold_predictions(1 / (1 + np.exp(-np.clip(gap, -700, 700))), pairs.probability))
    error = debiased_calibration_error(sum_by_group(columns, numbers, numbers.max() + 1))
    record("heldout_ece", error["value"], error["low"], error["high"])
    values, lengths = scores.ravel(), pairs.lengths.ravel()
    correlation = lambda rows: spearman(values[rows], lengths[rows])
    draws = [correlation(rows) for rows in resampled_rows(numbers.repeat(2), seed=seed, resamples=RESAMPLES)]
    record("length_correlation", correlation(slice(None)), *percentile_interval(draws, 0.95))
    return found


# ---- The run


def fit_members(
    model: ScalarModel,
    start: Params,
    base: Params,
    buckets: Sequence[Arrays],
    config: RewardModelConfig,
    *,
    runner: Runner,
    run: Run,
    writer: MetricsWriter,
    check: Callable[[Params], dict[str, float]],
) -> Params:
    """Fits the members of an ensemble and returns their parameters, host arrays with a first axis N.

    Args:
        model: the reward model.
        start: parameters to start from, each array with a first axis N.
        base: the weights under adapters; None without them.
        buckets: the training pairs, as `training_buckets` returns them.
        config: the settings.
        runner: the devices.
        run: keeps the state of the fit, and may be asked to stop.
        writer: takes the metrics.
        check: parameters -> numbers on held-out pairs.
    """
    tx = make_optimizer(config.fit.optimizer, config.fit.updates)
    one = partial(reward_step, center_coef=config.center_coef)

    def adapted(state: Any, base: Params, batch: Any, *, axis_name: str | None = None) -> Any:
        step = partial(one, weights=partial(joined, model.lora, base))
        return members_step(step, model, tx, state, batch, axis_name=axis_name)

    seeds = [config.seed + k for k in range(config.members)]
    part = run.part
    with writer.stage(STAGE, config.fit.updates, resume_from=part.done or None) as log:
        run.settled()
        state = fit(
            partial(members_step, one, model, tx) if base is None else adapted,
            (start, jax.vmap(tx.init)(start)),
            bucketed_minibatches(buckets, config.fit.batch_size, seeds),
            config.fit.updates,
            runner=runner,
            log=log.write,
            base=base,
            stop=run.stopped,
            check=lambda state: check(state[0]),
            part=part,
            every=config.check_every,
        )
    return jax.device_get(state[0])


def help_text() -> str:
    """Returns the description of --help: what the tool does, and an example."""
    return (
        "Trains a reward model on comparisons, rankings or ratings of answers.\n\n"
        "  python -m rlaif_jax reward-model --model models/smollm2 --feedback pairs.jsonl --fit.updates 500\n\n"
        "The files are Anthropic's HH, pairs and ratings as distilabel, TRL, UltraFeedback (binarised) and HelpSteer2 have "
        "them, OpenAssistant's trees, exports of Argilla and label-studio, or feedback stores. The model is written to "
        "OUT/model (members: OUT/model_0 ...) for transformers' AutoModelForSequenceClassification and for the rewards of "
        'training: --feedback "model OUT".'
    )


def main(config: RewardModelConfig) -> dict[str, Any]:
    """Trains a reward model, writes it to OUT/model (members: OUT/model_0 ...), returns the metrics."""
    config.tracking.check()
    language_model, weights, tokenizer, runner, max_length = model_to_fit(
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
    training, measured, unused = read_split(config, tokenizer, max_length)
    for reason, count in unused.most_common():
        print(f"  not used: {count} x {reason}")
    buckets, filled = training_buckets(training, tokenizer.pad_id, config.margin)
    lora = config.adapter if config.lora else None
    model, trunk = ScalarModel(language_model.config, "normal", bias=False, lora=lora), weights["trunk"]
    base = None if lora is None else runner.place({"trunk": trunk})
    scorer = Scorer(model, runner, config.fit.batch_size, tokenizer.pad_id, base)
    with (
        Run(config.out, STAGE, config, seed=config.seed, resume=config.resume, stages=config.stages) as run,
        tracked(run, config.tracking) as sinks,
        MetricsWriter(config.out, display=run.display, sinks=sinks) as writer,
    ):
        run.display.plan((PlannedStage(STAGE, "the reward model learns from the comparisons", 1),))
        run.missing = dict(unused)
        counts = {"pairs_learned": len(training.ids), "pairs_heldout": len(measured.ids)}
        run.metrics |= {**counts, "columns_filled": filled}
        known = keep_fingerprints(run, weights=trunk, pairs=buckets)
        # Apart: what is learned does not depend on them.
        keep_fingerprints(run, measured_pairs=training_buckets(measured, tokenizer.pad_id, config.margin)[0])
        keep_day(run, tokenizer)
        passes = config.fit.updates * config.fit.batch_size / len(training.ids)
        if passes > MOST_PASSES:
            run.warn(
                f"{config.fit.updates} updates of {config.fit.batch_size} pairs are {passes:.1f} passes over the "
                f"{len(training.ids)} pairs: reward models know pairs by heart after one or two (Ouyang 2022 makes one). Try: "
                f"--fit.updates {-(-len(training.ids) // config.fit.batch_size)}"
            )

        def start(trunk: Params) -> Params:
            keys = [step_key(config.seed + k, 1, INIT) for k in range(config.members)]
            first = None if lora is not None else trunk
            return jax.tree.map(lambda *x: jnp.stack(x), *(model.init(key, trunk=first) for key in keys))

        def learn() -> Params:
            checked = measured.chosen(np.arange(min(CHECKED, len(measured.ids))))
            check = lambda params: running_check(scorer(params, checked.ids), checked)
            return fit_members(
                model, start(trunk), base, buckets, config, runner=runner, run=run, writer=writer, check=check
            )

        settings = {
            "model": model.config,
            **known,
            "fit": config.fit,
            "center_coef": config.center_coef,
            "adapter": lora,
            "members": config.members,
            "runner": type(runner).__name__,
            "devices": runner.devices,
        }
        stage = run.stage(STAGE, jax.eval_shape(start, trunk), learn, settings=settings)
        scores = scorer(runner.place(stage.params), measured.ids)
        run.metrics |= measure(scores.mean(-1), measured, config.seed)
        for k in range(config.members):
            folder = run.folder / ("model" if config.members == 1 else f"model_{k}")
            member = joined(lora, {"trunk": trunk}, jax.tree.map(lambda x, k=k: x[k], stage.params), merge=True)
            save_reward_model(folder, dataclasses.replace(model, lora=None), member, tokenizer)
            if config.members > 1:
                run.metrics |= {f"member_{k}/{key}": x for key, x in running_check(scores[..., [k]], measured).items()}
        run.metrics["wall_s"] = round(run.wall_s, 1)
        run.story.append(summary_sentence(run.metrics))
    return run.metrics


def summary_sentence(metrics: dict[str, Any]) -> str:
    """Returns the held-out accuracy next to that of the longer answer, in a sentence."""
    if "heldout_accuracy" not in metrics:
        return f"{metrics['pairs_heldout']} held-out pairs, all of them ties"
    low, high = metrics.get("heldout_accuracy_ci95", (np.nan, np.nan))
    return (
        f"On {metrics['pairs_heldout']} held-out pairs the better answer has the higher score in "
        f"{metrics['heldout_accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}); it is the longer answer in "
        f"{metrics['longer_accuracy']:.1%}"
    )
