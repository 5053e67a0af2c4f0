"""Which algorithm, learning rate, KL coefficient, number of answers and rank? A sweep, one setting at a time, on a real model.

    python experiments/settings.py --model stories260K.bin --tokenizer tok512.bin

The policy is stories260K (folder stories260K of huggingface.co/karpathy/tinyllamas). It continues beginnings of stories; the
reward is the share of happy words in a continuation. Each run is one of `python -m rlaif_jax train` with its own folder and
page. The table has the gain of the reward on held-out beginnings, the KL to the start and the variety of the answers: means
over the seeds with the smallest and the largest, and how many runs diverged.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take seconds
    from rlaif_jax.progress.startup import Loading

    loading = Loading()

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from rlaif_jax.algorithms.advantages import GAE, LeaveOneOut
from rlaif_jax.algorithms.optimizer import OptimizerConfig
from rlaif_jax.command_line import command_line
from rlaif_jax.config import Diverged, require, to_json
from rlaif_jax.files import atomic_write
from rlaif_jax.models.lora import LoRAConfig
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.recipes import rlaif
from rlaif_jax.recipes.rewards import read_reward
from rlaif_jax.tools.runs import run_settings

HAPPY = frozenset(
    [
        "happy",
        "love",
        "loved",
        "fun",
        "smile",
        "smiled",
        "play",
        "played",
        "friend",
        "friends",
        "laugh",
        "laughed",
        "good",
        "nice",
        "joy",
        "hug",
    ]
)
NAMES = ("Lily", "Tom", "Ben", "Mia", "Sam", "Anna", "Max", "Sue")
THINGS = (
    "a red ball",
    "an old tree",
    "a big dog",
    "a small boat",
    "a blue hat",
    "a cold lake",
    "a tall tower",
    "a lost key",
)
PLACES = ("in the park", "near the house", "by the sea", "at school", "in the forest")


def happy(answer: str) -> float | None:
    """Returns the share of happy words; None for an answer without a word."""
    words = re.findall("[a-z]+", answer.lower())
    return sum(word in HAPPY for word in words) / len(words) if words else None


@dataclasses.dataclass(frozen=True)
class SettingsConfig:
    """All settings.

    Attributes:
        model: stories260K.bin.
        tokenizer: tok512.bin.
        seeds: of the runs.
        steps: policy steps of a run.
        out: the folder of the runs.
    """

    model: str = "stories260K.bin"
    tokenizer: Path | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 16
    out: Path = Path("runs/settings")


# ---- What is compared

Change = Callable[[rlaif.RlaifConfig], rlaif.RlaifConfig]


def _ppo(**changed: Any) -> Change:
    return lambda config: dataclasses.replace(config, ppo=dataclasses.replace(config.ppo, **changed))


def _rate(rate: float) -> OptimizerConfig:
    return OptimizerConfig(learning_rate=rate, schedule="constant", warmup_updates=2, eps=1e-8)


def _adapter(rank: int, rate: float, **settings: Any) -> Change:
    adapter = LoRAConfig(rank=rank, **settings)
    return lambda config: dataclasses.replace(_ppo(policy_optimizer=_rate(rate))(config), lora=True, adapter=adapter)


def _group(answers: int) -> Change:
    """Returns the change to groups of `answers`, with as many answers a step."""

    def change(config: rlaif.RlaifConfig) -> rlaif.RlaifConfig:
        prompts = config.train.prompts_per_step * config.ppo.answers_per_prompt // answers
        train = dataclasses.replace(config.train, prompts_per_step=prompts)
        return dataclasses.replace(_ppo(answers_per_prompt=answers)(config), train=train)

    return change


SWEEP: Mapping[str, Change] = {
    "GRPO, learning rate 1e-4, KL coefficient .1, 8 answers a prompt": lambda config: config,
    "RLOO": _ppo(advantage=LeaveOneOut()),
    "PPO": _ppo(advantage=GAE(), kl_in="reward", value_optimizer=_rate(3e-4)),
    "PPO, 4 epochs": _ppo(advantage=GAE(), kl_in="reward", num_epochs=4, value_optimizer=_rate(3e-4)),
    **{f"learning rate {rate:g}": _ppo(policy_optimizer=_rate(rate)) for rate in (3e-5, 3e-4, 1e-3)},
    **{f"KL coefficient {coef:g}": _ppo(kl_coef=coef) for coef in (0.0, 0.02, 0.5)},
    **{f"{answers} answers a prompt": _group(answers) for answers in (2, 4, 16)},
    **{f"adapter of rank {rank}, learning rate 1e-3": _adapter(rank, 1e-3) for rank in (1, 4, 16)},
    "adapter of rank 16, learning rate 1e-4": _adapter(16, 1e-4),
    "adapter of rank 16, learning rate 3e-3": _adapter(16, 3e-3),
}
"""What a run changes in the first one, by its row in the table."""


def base_config(config: SettingsConfig) -> rlaif.RlaifConfig:
    """Returns the settings of the first row."""
    base = rlaif.get_config()
    train = dataclasses.replace(
        base.train,
        steps=config.steps,
        prompts_per_step=16,
        prompt_length=32,
        eval_every=config.steps,
        save_every=config.steps,
    )
    return dataclasses.replace(
        base,
        policy=config.model,
        tokenizer=config.tokenizer,
        prompts=str(config.out / "beginnings.txt"),
        held_out=128,
        feedback=(read_reward(f"function {Path(__file__).resolve()}:happy"),),
        train=train,
        sampling=SamplingConfig(max_new_tokens=48),
        ppo=dataclasses.replace(base.ppo, kl_coef=0.1, policy_optimizer=_rate(1e-4)),
    )


def beginnings() -> list[str]:
    """Returns beginnings of stories."""
    return [
        f"Once upon a time, {name} saw {thing} {place}."
        for name, thing, place in itertools.product(NAMES, THINGS, PLACES)
    ]


# ---- The runs


def main(config: SettingsConfig) -> dict[str, Any]:
    """Takes all runs, prints the table and returns its rows; runs that are finished already are only read."""
    config.out.mkdir(parents=True, exist_ok=True)
    with atomic_write(config.out / "beginnings.txt") as file:
        file.writelines(f"{line}\n" for line in beginnings())
    rows: dict[str, Any] = {}
    for name, change in SWEEP.items():
        found = []
        for seed in config.seeds:
            numbers = run(change(base_config(config)), config.out / f"{_folder(name)}-{seed}", seed)
            if numbers is None:  # it was asked to stop
                return rows
            found.append(numbers)
        rows[name] = {key: [numbers[key] for numbers in found if numbers] for key in ("gain", "kl", "distinct2_after")}
        rows[name]["diverged"] = sum(not numbers for numbers in found)
        print(line_of(name, rows[name]))
    with atomic_write(config.out / "settings.json") as file:
        json.dump(rows, file, indent=2)
    return rows


def run(settings: rlaif.RlaifConfig, folder: Path, seed: int) -> dict[str, Any] | None:
    """Takes a run and returns its metrics; {} where it diverged, None where it was asked to stop."""
    settings = dataclasses.replace(settings, out=folder, seed=seed)
    if status_of(folder) not in ("done", "diverged"):
        try:
            rlaif.main(dataclasses.replace(settings, resume=(folder / "config.json").exists()))
        except Diverged:
            return {}
        finally:
            jax.clear_caches()  # no other run can use its programs, and those of all runs are too many for a process
    require(
        {**run_settings(folder), "resume": False} == {**to_json(settings), "resume": False},
        f"{folder} holds a run with other settings: give another --out, or move it away",
    )
    found = json.loads((folder / "summary.json").read_text())
    return found["metrics"] if found["status"] == "done" else {} if found["status"] == "diverged" else None


def status_of(folder: Path) -> str:
    """Returns how a run ended; "" without one."""
    summary = folder / "summary.json"
    return str(json.loads(summary.read_text())["status"]) if summary.exists() else ""


def _folder(name: str) -> str:
    return re.sub("[^a-z0-9.]+", "-", name.lower())


def line_of(name: str, row: Mapping[str, Sequence[float]]) -> str:
    """Returns a line of the table in Markdown."""

    def spread(key: str) -> str:
        values = row[key]
        return f"{sum(values) / len(values):.3f} ({min(values):.3f} .. {max(values):.3f})" if values else "-"

    return f"| {name} | {spread('gain')} | {spread('kl')} | {spread('distinct2_after')} | {row['diverged']} |"


if __name__ == "__main__":
    command_line(main, SettingsConfig(), __doc__, loading=loading)
