"""Feedback of real people and real judges: what this package's readers and models make of published data.

    python experiments/feedback_real.py --data FOLDER
    python experiments/feedback_real.py --data FOLDER --json > real.json

FOLDER holds the published files as their authors keep them, each data set in its folder:

    get_another_label/BarzanMozafari_labels.txt, _evaluation.txt      github.com/ipeirotis/Get-Another-Label
    mlqe_pe/pe.en-de-dev.tar.gz, da.en-de-dev.tar.gz, da.en-de-train.tar.gz  github.com/sheffieldnlp/mlqe-pe
    llmbar/LLMBar_SUBSET.json, llmbar_judges/SUBSET.MODEL.WAY.json     github.com/princeton-nlp/LLMBar
    pandalm/testset-v1.jsonl, *-testset-v1.jsonl                       github.com/WeOpenML/PandaLM
    prometheus/vicuna_eval.json                                        github.com/prometheus-eval/prometheus-eval
    squality/all-responses.jsonl                                       github.com/nyu-mll/SQuALITY
    sentiment/rt-polarity.pos, rt-polarity.neg                         github.com/harvardnlp/sent-conv-torch

A data set that is missing is skipped with a message. A minute on two CPU cores.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from rlaif_jax.command_line import command_line
from rlaif_jax.config import require
from rlaif_jax.feedback.judges.sentiment import SentimentConfig
from rlaif_jax.recipes.published import (
    Finding,
    Findings,
    crowd_labels,
    judge_in_both_orders,
    people_and_judges,
    post_edits,
    ratings,
    remarks,
    summaries,
)


@dataclasses.dataclass(frozen=True)
class RealConfig:
    """All settings.

    Attributes:
        data: the folder of the data sets.
        json: print JSON instead of tables.
        seed: of the bootstraps and the folds.
        sentiment: how the reader of comments is trained.
    """

    data: Path = Path("data")
    json: bool = False
    seed: int = 0
    sentiment: SentimentConfig = SentimentConfig(updates=400, max_words=192)


def get_config() -> RealConfig:
    """Returns the settings of the figures in RESULTS.md."""
    return RealConfig()


class Section(NamedTuple):
    """Measures of one data set: a title, its files or folders, and a function that is called with their paths."""

    title: str
    files: tuple[str, ...]
    measure: Callable[..., Findings]


def sections(config: RealConfig) -> tuple[Section, ...]:
    """Returns the measures of all data sets."""
    seed = config.seed
    panda = tuple(f"pandalm/{name}testset-v1.jsonl" for name in ("", "gpt-3.5-turbo-", "pandalm-7b-"))
    barzan = tuple(f"get_another_label/BarzanMozafari_{name}.txt" for name in ("labels", "evaluation"))
    subsets = sorted(path.name for path in (config.data / "llmbar").glob("LLMBar_*.json")) or ["LLMBar_Natural.json"]
    read_remarks = partial(remarks, seed=seed, sentiment=config.sentiment, reviews=config.data / "sentiment")
    return (
        Section("BarzanMozafari: 5,000 labels of 83 workers", barzan, crowd_labels),
        Section("MLQE-PE: post-edits", ("mlqe_pe/pe.en-de-dev.tar.gz",), partial(post_edits, seed=seed)),
        Section(
            "MLQE-PE: ratings by many",
            ("mlqe_pe/da.en-de-dev.tar.gz", "mlqe_pe/da.en-de-train.tar.gz"),
            partial(ratings, seed=seed),
        ),
        *(
            Section(
                f"{subset.removesuffix('.json').replace('_', ' ')}: AI judges in both orders",
                (f"llmbar/{subset}", "llmbar_judges"),
                judge_in_both_orders,
            )
            for subset in subsets
        ),
        Section("PandaLM: people and AI judges", panda, people_and_judges),
        Section("prometheus: GPT-4's remarks and scores", ("prometheus/vicuna_eval.json",), read_remarks),
        Section("SQuALITY: workers on summaries", ("squality/all-responses.jsonl",), summaries),
    )


def main(config: RealConfig) -> dict[str, Any]:
    """Prints the findings of every data set that exists and returns them, title -> list of `Finding`."""
    require(config.data.is_dir(), f"--data {config.data}: there is no such folder")
    console = Console(stderr=config.json)
    found: dict[str, list[Finding]] = {}
    for title, files, measure in sections(config):
        missing = [name for name in files if not (config.data / name).exists()]
        if missing:
            console.print(f"{title}: skipped, {config.data} has no {', '.join(missing)}")
            continue
        found[title] = list(measure(*(config.data / name for name in files)))
        if not config.json:
            console.print(table(title, found[title]))
    if config.json:
        print(json.dumps({title: [dataclasses.asdict(f) for f in rows] for title, rows in found.items()}, indent=2))
    return found


def table(title: str, rows: Iterable[Finding]) -> Table:
    """Returns findings as a table for the terminal."""
    made = Table(title=title, title_justify="left", show_edge=False)
    made.add_column("", justify="left")
    for name in ("value", "95 % interval", "by others"):
        made.add_column(name, justify="right")
    made.add_column("", justify="left")
    for row in rows:
        interval = "" if row.low is None else f"{row.low:.3f} .. {row.high:.3f}"
        made.add_row(row.name, f"{row.value:.3f}".removesuffix(".000"), interval, row.reference, row.note)
    return made


if __name__ == "__main__":
    command_line(main, get_config(), __doc__)
