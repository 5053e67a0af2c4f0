"""A real chat model learns to follow constraints that a program can check, on questions and constraints it never saw.

    python experiments/instruct.py --model models/smollm2 --tasks seed_tasks.jsonl --dialogues test.jsonl

The model is SmolLM2-135M-Instruct (`make smollm2`). The questions are the tasks of Self-Instruct (Wang et al. 2023) and the
first turns of HH dialogues (Bai et al. 2022); to each is added a constraint, such as "Use at most 20 words." The reward is 1
where the answer keeps it, else 0. The held-out questions are asked with constraints that training never has: other values
of its kinds (at most 15 words), and kinds that it never has.

Each arm (GRPO or PPO, a LoRA adapter or all weights) is a run of `python -m rlaif_jax train` with its own folder and page, on
three seeds. The original model says how fluent the held-out answers are (their log-prob under it), and with
`--judge "judge models/smollm2 min_mass=0.05"` a judge compares those before and after in both orders. OUT/compare.html
compares the runs; OUT/curves.svg shows what was kept in training over answers and over seconds, OUT/results.json has all
numbers: both also of the runs that `experiments.benchmarks.instruct_trl` takes by TRL.

Expected: see experiments/RESULTS.md.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take seconds
    from rlaif_jax.progress.startup import Loading

    loading = Loading()

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from rlaif_jax.algorithms.advantages import GAE
from rlaif_jax.algorithms.optimizer import OptimizerConfig
from rlaif_jax.command_line import command_line
from rlaif_jax.config import Diverged, require, to_json
from rlaif_jax.data.readers import jsonl_records
from rlaif_jax.feedback.verifiers.constraints import (
    Constraint,
    Constraints,
    EndsWith,
    JsonKeys,
    ListItems,
    MaxWords,
    MinWords,
    NoCommas,
    Paragraphs,
    Sentences,
    StartsWith,
    WithoutWord,
    WithWord,
    constraint_json,
)
from rlaif_jax.files import atomic_write
from rlaif_jax.models.lora import LoRAConfig
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import ParallelConfig, make_runner
from rlaif_jax.quality.intervals import bootstrap_ci
from rlaif_jax.quality.win_rates import win_rate_ci
from rlaif_jax.recipes import rlaif
from rlaif_jax.recipes.judge_rewards import Surroundings
from rlaif_jax.recipes.rewards import Judging, read_reward
from rlaif_jax.report.compare import write_comparison
from rlaif_jax.tools.runs import run_settings

Arm = Literal["grpo-lora", "grpo-full", "ppo-lora", "ppo-full"]

TRAINED: Mapping[str, tuple[tuple[Constraint, ...], tuple[Constraint, ...]]] = {
    "sentences": ((Sentences(1), Sentences(3)), (Sentences(2),)),
    "max_words": ((MaxWords(5), MaxWords(10), MaxWords(20), MaxWords(30)), (MaxWords(8), MaxWords(15))),
    "list_items": ((ListItems(2), ListItems(4)), (ListItems(3),)),
    "starts_with": (
        tuple(map(StartsWith, ("Sure", "Hello", "Well,", "In short", "My answer:", "Yes", "First", "Thank you"))),
        tuple(map(StartsWith, ("Of course", "Indeed,", "Listen:"))),
    ),
    "without_word": (
        tuple(map(WithoutWord, ("the", "is", "and", "you", "in"))),
        tuple(map(WithoutWord, ("to", "of", "a"))),
    ),
    "json_keys": (
        (JsonKeys(("answer",)), JsonKeys(("title", "text")), JsonKeys(("name", "reason"))),
        (JsonKeys(("reply",)), JsonKeys(("topic", "advice"))),
    ),
}
"""Kinds of constraints that training has: the values that it has, and those of the held-out questions."""

NEW: Mapping[str, tuple[Constraint, ...]] = {
    "ends_with": tuple(map(EndsWith, ("Good luck!", "That is all.", "Goodbye."))),
    "with_word": tuple(map(WithWord, ("water", "today", "friend"))),
    "paragraphs": (Paragraphs(2),),
    "min_words": (MinWords(25),),
    "no_commas": (NoCommas(),),
}
"""Kinds that training never has."""

HELD_OUT = 30  # questions of each kind
CHARACTERS = 160  # of a question at most: with its template it fits into PROMPT_LENGTH tokens
PROMPT_LENGTH, ANSWER_LENGTH = 96, 48


@dataclasses.dataclass(frozen=True)
class InstructConfig:
    """All settings.

    Attributes:
        model: the chat model, a Hugging Face folder or a hub id.
        tasks: Self-Instruct's seed_tasks.jsonl.
        dialogues: HH's pairs, a .jsonl file with `chosen`.
        arms: the algorithms, each with an adapter or with all weights.
        seeds: of the runs.
        steps: policy steps of a run.
        prompts_per_step: prompts of a step.
        answers_per_prompt: answers to each.
        lora_rate: learning rate of an adapter.
        full_rate: learning rate of all weights.
        adapter: its rank and matrices.
        kl_coef: of the KL to the original model.
        temperature: of the answers, in training and on held-out questions; at 1 the answers of so small a model make little
            sense.
        judge: what compares the held-out answers before and after in both orders, as a line of words; "" = nothing.
        out: the folder of the runs; those that are there already go on, and finished ones are only read.
    """

    model: str = "models/smollm2"
    tasks: Path | None = None
    dialogues: Path | None = None
    arms: tuple[Arm, ...] = ("grpo-lora", "grpo-full", "ppo-lora", "ppo-full")
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 32
    prompts_per_step: int = 8
    answers_per_prompt: int = 8
    lora_rate: float = 2e-4
    full_rate: float = 1e-5
    adapter: LoRAConfig = LoRAConfig(rank=16, alpha=32.0)
    kl_coef: float = 0.1
    temperature: float = 0.7
    judge: str = ""
    out: Path = Path("runs/instruct")

    def __post_init__(self) -> None:
        require(bool(self.arms) and bool(self.seeds), "arms and seeds must name at least one each")


# ---- The data


def questions(config: InstructConfig) -> list[str]:
    """Returns the questions of both files, each once, without those that are long."""
    require(config.tasks is not None, "no questions: give --tasks, Self-Instruct's seed_tasks.jsonl")
    assert config.tasks is not None
    found = []
    for record in jsonl_records(config.tasks, required=("instruction",)).records:
        given = record["instances"][0]["input"]
        found.append(f"{record['instruction']}\n{given}" if given else record["instruction"])
    if config.dialogues is not None:
        pairs = jsonl_records(config.dialogues, required=("chosen",)).records
        found += [pair["chosen"].split("\n\nHuman:")[1].split("\n\nAssistant:")[0] for pair in pairs]
    stripped = (text.strip() for text in found)
    return [text for text in dict.fromkeys(stripped) if 15 <= len(text) <= CHARACTERS]


def is_held_out(question: str) -> bool:
    """Returns whether a question is only measured on: a fifth of them, by their hash."""
    return hashlib.sha256(question.encode()).digest()[0] < 256 // 5


def row(question: str, kind: str, constraint: Constraint) -> dict[str, Any]:
    """Returns a line of a file of prompts."""
    return {"prompt": f"{question}\n{constraint.text()}", "kind": kind, "constraints": [constraint_json(constraint)]}


def prompt_rows(asked: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns (rows to learn on, held-out rows): each question once, the kinds in turns.

    Raises:
        UserError: there are too few questions.
    """
    rng = np.random.default_rng(14)
    shuffled = [asked[i] for i in rng.permutation(len(asked))]
    training = [text for text in shuffled if not is_held_out(text)]
    held_out = [text for text in shuffled if is_held_out(text)]
    measured = {kind: values for kind, (_, values) in TRAINED.items()} | dict(NEW)
    require(
        len(held_out) >= HELD_OUT * len(measured),
        f"{len(held_out)} questions are held out, {HELD_OUT * len(measured)} are needed: give --dialogues, too",
    )
    learned = {kind: values for kind, (values, _) in TRAINED.items()}
    return _in_turns(training, learned), _in_turns(held_out[: HELD_OUT * len(measured)], measured)


def _in_turns(asked: Sequence[str], kinds: Mapping[str, tuple[Constraint, ...]]) -> list[dict[str, Any]]:
    names = list(kinds)
    found = []
    for number, question in enumerate(asked):
        turn, kind = divmod(number, len(names))
        values = kinds[names[kind]]
        found.append(row(question, names[kind], values[turn % len(values)]))
    return found


# ---- The runs


def run_config(config: InstructConfig, arm: Arm, seed: int) -> rlaif.RlaifConfig:
    """Returns the settings of a run."""
    base = rlaif.get_config()
    algorithm, _, weights = arm.partition("-")
    rate = OptimizerConfig(
        learning_rate=config.lora_rate if weights == "lora" else config.full_rate,
        schedule="constant",
        warmup_updates=2,
        eps=1e-8,
    )
    ppo = dataclasses.replace(
        base.ppo, answers_per_prompt=config.answers_per_prompt, kl_coef=config.kl_coef, policy_optimizer=rate
    )
    if algorithm == "ppo":
        # The first words of an answer decide about most constraints, and the critic of so few steps is poor.
        fast = dataclasses.replace(rate, learning_rate=3 * rate.learning_rate)
        ppo = dataclasses.replace(ppo, advantage=GAE(gae_lambda=1.0), kl_in="reward", num_minibatches=2)
        ppo = dataclasses.replace(ppo, value_optimizer=fast)
    train = dataclasses.replace(
        base.train,
        steps=config.steps,
        prompts_per_step=config.prompts_per_step,
        prompt_length=PROMPT_LENGTH,
        eval_every=config.steps,
        save_every=8,
    )
    return dataclasses.replace(
        base,
        policy=config.model,
        prompts=str(config.out / "training.jsonl"),
        eval_prompts=str(config.out / "held_out.jsonl"),
        held_out=HELD_OUT * (len(TRAINED) + len(NEW)),
        feedback=(read_reward("constraints"),),
        scale="none",
        scale_answers=64,
        lora=weights == "lora",
        adapter=config.adapter if weights == "lora" else LoRAConfig(),
        seed=seed,
        out=config.out / f"{arm}-{seed}",
        train=train,
        sampling=SamplingConfig(max_new_tokens=ANSWER_LENGTH, temperature=config.temperature),
        ppo=ppo,
    )


def main(config: InstructConfig) -> dict[str, Any]:
    """Takes all runs and returns their results."""
    training, held_out = prompt_rows(questions(config))
    config.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("training", training), ("held_out", held_out)):
        with atomic_write(config.out / f"{name}.jsonl") as file:
            file.writelines(json.dumps(record) + "\n" for record in rows)
    results: dict[str, Any] = {}
    folders = []
    for seed in config.seeds:
        for arm in config.arms:
            settings = run_config(config, arm, seed)
            if not is_finished(settings):
                with suppress(Diverged):  # its page says so, and the other runs go on
                    rlaif.main(dataclasses.replace(settings, resume=settings.out.exists()))
                jax.clear_caches()  # no other run can use its programs, and those of all runs are too many for a process
                if not is_finished(settings):  # it was asked to stop
                    return results
            folders.append(settings.out)
            if (settings.out / "answers.jsonl").exists():
                results[settings.out.name] = result(settings.out, held_out)
            else:
                print(f"{settings.out.name} has diverged")
    for summary in sorted(config.out.glob("trl-*/summary.json")):
        results[summary.parent.name] = result(summary.parent, held_out)
    keep(config, results)
    if config.judge:
        compared(config, results)
        keep(config, results)
    for name, found in results.items():
        print(line_of(name, found))
    print(draw_curves(config, list(results)))
    if len(folders) > 1:
        print(write_comparison(folders, config.out / "compare.html"))
    return results


def keep(config: InstructConfig, results: Mapping[str, Any]) -> None:
    """Writes the results of all runs."""
    with atomic_write(config.out / "results.json") as file:
        json.dump(results, file, indent=2)


def is_finished(settings: rlaif.RlaifConfig) -> bool:
    """Returns whether a run with these settings is finished, or has diverged.

    Raises:
        UserError: a run with other settings is finished in its folder.
    """
    summary = settings.out / "summary.json"
    if not summary.exists() or json.loads(summary.read_text())["status"] not in ("done", "diverged"):
        return False
    require(
        {**run_settings(settings.out), "resume": False} == {**to_json(settings), "resume": False},
        f"{settings.out} holds a run with other settings: give another --out, or move it away",
    )
    return True


# ---- What came out


def result(folder: Path, held_out: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the numbers of a run: the share of constraints kept by kind, KL, fluency, the second judge.

    Args:
        folder: of the run.
        held_out: the rows of the held-out prompts, in any order.
    """
    kinds = {record["prompt"]: record for record in held_out}
    kept: dict[str, list[tuple[float, float]]] = {}
    for line in (folder / "answers.jsonl").read_text().splitlines():
        answers = json.loads(line)
        require(answers["prompt"] in kinds, f"{folder} answered other held-out questions: move it away")
        record = kinds[answers["prompt"]]
        before, after = (Constraints().verify(record, text) for text in answers["answers"])
        assert isinstance(before, float) and isinstance(after, float)
        part = "new values" if record["kind"] in TRAINED else "new kinds"
        for name in (part, record["kind"]):
            kept.setdefault(name, []).append((before, after))
    numbers = json.loads((folder / "summary.json").read_text())["metrics"]
    return {
        "kept": {name: kept_share(np.array(pairs)) for name, pairs in kept.items()},
        "kl": numbers["kl"],
        "fluency_change": numbers["reference_logprob_change"],
        "fluency_change_ci95": numbers["reference_logprob_change_ci95"],
        **{name: numbers.get(name) for name in ("length_before", "length_after", "distinct2_after", "wall_s")},
    }


def compared(config: InstructConfig, results: dict[str, Any]) -> None:
    """Adds to the results of each run what a judge thinks of its answers; its verdicts are kept in the run's folder.

    Args:
        config: names the judge.
        results: by the name of the run.
    """
    judge = read_reward(config.judge, "--judge").reward
    require(isinstance(judge, Judging), f"--judge {config.judge!r} compares no answers; give a judge or an api")
    assert isinstance(judge, Judging)
    with ExitStack() as opened:
        runner = make_runner(ParallelConfig())
        compare = judge.comparer(Surroundings(config.out, 0, runner, lambda: False, opened))
        for name, found in results.items():
            path = config.out / name / "judge.json"
            kept = json.loads(path.read_text()) if path.exists() else {}
            if config.judge not in kept:
                rows = [json.loads(line) for line in (config.out / name / "answers.jsonl").read_text().splitlines()]
                after, before = ([row["answers"][i] for row in rows] for i in (1, 0))
                verdicts = compare([row["prompt"] for row in rows], after, before)
                won = np.where(verdicts.valid, verdicts.probability, np.nan)
                said: dict[str, Any] = {"missing": float(1 - verdicts.valid.mean())}
                if verdicts.valid.any():
                    rate = win_rate_ci(won, 1 - won)
                    said |= {
                        "win_rate": rate.value,
                        "win_rate_ci95": [rate.low, rate.high],
                        "order_consistency": float(verdicts.consistent[verdicts.valid].mean()),
                    }
                kept[config.judge] = said
                with atomic_write(path) as file:
                    json.dump(kept, file, indent=2)
            found["judge"] = kept[config.judge]


def kept_share(pairs: np.ndarray) -> dict[str, Any]:
    """Returns the share of constraints kept before and after, and the gain with its interval over prompts.

    Args:
        pairs: [prompts, 2], 1 where the answer before and the answer after keep the constraint.
    """
    gained = pairs[:, 1] - pairs[:, 0]
    return {
        "prompts": len(pairs),
        "before": float(pairs[:, 0].mean()),
        "after": float(pairs[:, 1].mean()),
        "gain": float(gained.mean()),
        "gain_ci95": list(bootstrap_ci(gained, seed=0)),
    }


def curve(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns (seconds since training began, share of constraints kept) after each step of a run, by its metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "score" in row]
    parts = ("time/rollout_s", "time/feedback_s", "time/update_s")  # not the evaluations in between, which TRL has not
    seconds = np.array([row["time/elapsed_s"] for row in rows])
    if all(part in row for row in rows for part in parts):
        seconds = np.cumsum([sum(row[part] for part in parts) for row in rows])
    return seconds, np.array([row["score"] for row in rows])


def draw_curves(config: InstructConfig, names: Sequence[str]) -> Path:
    """Draws what was kept in training, over answers and over minutes, a line a run, and returns the path.

    A point is the mean of the last four steps; the runs of an arm have one colour.

    Args:
        config: of the runs.
        names: of their folders, such as grpo-lora-0.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    arms = list(dict.fromkeys(name.rpartition("-")[0] for name in names))
    for name in names:
        arm = name.rpartition("-")[0]
        seconds, kept = curve(config.out / name)
        smooth = [kept[max(0, i - 3) : i + 1].mean() for i in range(len(kept))]
        answers = config.prompts_per_step * config.answers_per_prompt * np.arange(1, len(kept) + 1)
        for axes, x in ((left, answers), (right, seconds / 60)):
            axes.plot(x, smooth, color=f"C{arms.index(arm)}", alpha=0.8)
    for number, arm in enumerate(arms):
        right.plot([], [], color=f"C{number}", label=arm)
    left.set(xlabel="answers", ylabel="share of constraints kept")
    right.set(xlabel="minutes of training")
    right.legend(fontsize="small", frameon=False)
    path = config.out / "curves.svg"
    figure.savefig(path)
    return path


def line_of(name: str, found: Mapping[str, Any]) -> str:
    """Returns a run's main numbers in a line."""
    parts = [
        f"{part} {kept['before']:.2f} -> {kept['after']:.2f} (gain [{kept['gain_ci95'][0]:+.2f}, {kept['gain_ci95'][1]:+.2f}])"
        for part, kept in ((part, found["kept"][part]) for part in ("new values", "new kinds"))
    ]
    return (
        f"{name}: constraints kept, {'; '.join(parts)}; KL {found['kl']:.1f} nats an answer; fluency "
        f"{found['fluency_change']:+.2f} [{found['fluency_change_ci95'][0]:+.2f}, {found['fluency_change_ci95'][1]:+.2f}] "
        "nats a token" + (f"; judge {found['judge'].get('win_rate', float('nan')):.2f}" if "judge" in found else "")
    )


if __name__ == "__main__":
    command_line(main, InstructConfig(), __doc__, loading=loading)
