"""How good is a judge? It compares answers that people have compared, in both orders, before a policy learns from it.

    python experiments/judge_agreement.py --data FOLDER --judge "judge models/smollm2"
    python experiments/judge_agreement.py --feedback pairs.jsonl --judge "api http://127.0.0.1:8000/v1 model=NAME"

The judge is a line of words as in `python -m rlaif_jax train --feedback`. FOLDER holds published comparisons as their authors
keep them (those that are missing are left out):

    pandalm/testset-v1.jsonl            three people a pair           github.com/WeOpenML/PandaLM
    hh_harmless/test.jsonl              one person a pair             github.com/anthropics/hh-rlhf
    llmbar/LLMBar_Natural.json          its authors                   github.com/princeton-nlp/LLMBar
    prometheus/autoj_pairwise.jsonl     people                        github.com/GAIR-NLP/auto-j

`--feedback` takes your own files, in any format that is known by its fields. People's ties are left out. For each file:
the share of pairs on which judge and people agree, with its interval over prompts; the same for those pairs alone on which
both orders of the judge agree; how often they do (order consistency) and how often it prefers the answer shown first;
missing verdicts; the label mass, the mean probability that the judge gives to its labels together, in the order where it is
lower (where it is small, the judge would say something else; a served judge without log-probabilities has none); and how often
the longer answer is the one that people prefer, which a judge should beat.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take seconds
    from rlaif_jax.progress.startup import Loading

    loading = Loading()

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from rlaif_jax.command_line import command_line
from rlaif_jax.config import require
from rlaif_jax.feedback.records.comparisons import Comparison, comparisons
from rlaif_jax.feedback.records.exchange import Detected
from rlaif_jax.feedback.records.formats.judges import read_autoj_pairs, read_llmbar, read_pandalm
from rlaif_jax.feedback.records.forms import Judgement
from rlaif_jax.files import atomic_write
from rlaif_jax.parallel import ParallelConfig, make_runner
from rlaif_jax.progress.display import ProgressDisplay
from rlaif_jax.quality.intervals import bootstrap_ci
from rlaif_jax.quality.votes import current
from rlaif_jax.recipes.judge_rewards import Compare, Surroundings, Verdicts
from rlaif_jax.recipes.rewards import Judging, read_reward

PART = 32  # pairs that a judge is asked about at a time
PUBLISHED: dict[str, Callable[[Path], Sequence[Judgement]]] = {
    "pandalm/testset-v1.jsonl": lambda path: read_pandalm(path)[0],
    "hh_harmless/test.jsonl": lambda path: Detected().read(path)[0],
    "llmbar/LLMBar_Natural.json": lambda path: read_llmbar(path)[0],
    "prometheus/autoj_pairwise.jsonl": lambda path: read_autoj_pairs(path)[0],
}


@dataclasses.dataclass(frozen=True)
class AgreementConfig:
    """All settings.

    Attributes:
        judge: the judge, as a line of words.
        data: the folder of published comparisons.
        feedback: your own files of comparisons.
        pairs: pairs of each file that are judged, drawn by `seed`; 0 = all.
        seed: of the draw and the bootstraps.
        out: the folder of the results, and of a served judge's replies, which are not paid for twice.
        parallel: how the devices are used.
    """

    judge: str = ""
    data: Path | None = None
    feedback: tuple[Path, ...] = ()
    pairs: int = 300
    seed: int = 0
    out: Path = Path("runs/judge_agreement")
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self) -> None:
        require(self.pairs >= 0, f"pairs must be >= 0, not {self.pairs}")


def main(config: AgreementConfig) -> dict[str, dict[str, Any]]:
    """Prints and returns the agreement on each file."""
    require(bool(config.judge), "no judge: give --judge 'judge MODEL' or --judge 'api SERVER model=NAME'")
    judge = read_reward(config.judge, "--judge").reward
    require(isinstance(judge, Judging), f"--judge {config.judge!r} compares no answers; give a judge or an api")
    assert isinstance(judge, Judging)
    files = {
        str(path): (path, read)
        for path, read in [
            *((config.data / name, read) for name, read in PUBLISHED.items() if config.data is not None),
            *((path, read_own) for path in config.feedback),
        ]
        if path.exists() or path in config.feedback
    }
    require(bool(files), "no comparisons: give --data, a folder of published ones, or --feedback FILE ...")
    config.out.mkdir(parents=True, exist_ok=True)
    found = {}
    with ExitStack() as opened:
        around = Surroundings(config.out, config.seed, make_runner(config.parallel), lambda: False, opened)
        compare, display = judge.comparer(around), opened.enter_context(ProgressDisplay(stderr=True))
        for name, (path, read) in files.items():
            pairs = drawn(comparisons(of_people(path, read(path))).pairs, config.pairs, config.seed)
            found[name] = agreement(in_parts(compare, display, path.name), pairs, config.seed)
            print("\n".join(lines(path, found[name])))
    with atomic_write(config.out / "agreement.json") as file:
        json.dump({"judge": config.judge, "files": found}, file, indent=2)
    return found


def of_people(path: Path, found: Sequence[Judgement]) -> list[Judgement]:
    """Returns the judgements that count: those of people where the file has any, and none that another one replaces.

    Pairs of chosen and rejected answers do not say who chose; they are taken for people's.
    """
    own = [entry for entry in found if entry.rater.source == "person"] or list(found)
    if others := len(found) - len(own):
        print(f"{path}: {others} judgements that are not by people are left out")
    return [own[i] for i in current(own)]


def read_own(path: Path) -> Sequence[Judgement]:
    """Returns the judgements of a user's file, and prints the faults of its rows."""
    good, bad = Detected().read(path)
    for message in bad[:3]:
        print(message, file=sys.stderr)
    if bad:
        print(f"{path}: {len(bad)} faults, whose rows or values are left out", file=sys.stderr)
    return good


def drawn(pairs: Sequence[Comparison], count: int, seed: int) -> list[Comparison]:
    """Returns at most `count` pairs on which people do not tie, drawn at random; 0: all of them."""
    decided = [pair for pair in pairs if pair.probability != 0.5]
    order = np.random.default_rng(seed).permutation(len(decided))
    return [decided[i] for i in sorted(order[: count or len(decided)])]


def in_parts(compare: Compare, display: ProgressDisplay, name: str) -> Compare:
    """Returns the same judge, which is asked about `PART` pairs at a time, under a bar with a name."""

    def judged(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Verdicts:
        parts, bar = [], display.add(name, len(prompts), unit="pair")
        for start in range(0, len(prompts), PART):
            rows = slice(start, start + PART)
            parts.append(compare(prompts[rows], first[rows], second[rows]))
            bar.update(min(start + PART, len(prompts)), "")
        bar.close()
        return Verdicts(*(np.concatenate(columns) for columns in zip(*parts)))

    return judged


def agreement(compare: Compare, pairs: Sequence[Comparison], seed: int) -> dict[str, Any]:
    """Returns how a judge's verdicts agree with people's.

    Args:
        compare: the judge.
        pairs: what people prefer; without ties.
        seed: of the bootstraps.
    """
    require(bool(pairs), "no pair is left on which people prefer one of the two answers")
    prompts = [pair.prompt for pair in pairs]
    verdicts = compare(prompts, *([pair.answers[i] for pair in pairs] for i in (0, 1)))
    first = np.array([pair.probability > 0.5 for pair in pairs])
    longer = np.array([np.sign(len(pair.answers[0]) - len(pair.answers[1])) for pair in pairs])
    right = np.where(verdicts.probability == 0.5, 0.5, (verdicts.probability > 0.5) == first)
    valid, consistent = verdicts.valid, verdicts.valid & verdicts.consistent

    def share(hits: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
        kept = np.where(rows, hits, np.nan)
        groups = np.unique(prompts, return_inverse=True)[1]
        enough = rows.sum() > 1
        return {
            "pairs": int(rows.sum()),
            "share": float(np.nanmean(kept)) if rows.any() else None,
            "ci95": list(bootstrap_ci(kept, seed=seed, groups=groups)) if enough else None,
        }

    return {
        "pairs": len(pairs),
        "missing": float(1 - valid.mean()),
        "label_mass": float(np.nanmean(verdicts.mass)) if np.isfinite(verdicts.mass).any() else None,
        "agrees": share(right, valid),
        "agrees_where_consistent": share(right, consistent),
        "order_consistency": float(consistent.sum() / max(valid.sum(), 1)),
        "first_shown": float(verdicts.first_shown[valid].mean()) if valid.any() else None,
        "longer_is_preferred": share(np.where(longer == 0, 0.5, (longer > 0) == first), np.ones(len(pairs), bool)),
    }


def lines(path: Path, found: dict[str, Any]) -> list[str]:
    """Returns a file's numbers as lines for the terminal."""

    def interval(part: dict[str, Any]) -> str:
        if part["ci95"] is None:
            return "-"
        return f"{part['share']:.1%} [{part['ci95'][0]:.1%}, {part['ci95'][1]:.1%}] of {part['pairs']}"

    shown, mass = ("-" if found[name] is None else f"{found[name]:.2f}" for name in ("first_shown", "label_mass"))
    return [
        f"{path}: {found['pairs']} pairs",
        f"  judge and people agree            {interval(found['agrees'])}",
        f"  where both orders agree           {interval(found['agrees_where_consistent'])}",
        f"  both orders agree                 {found['order_consistency']:.1%}",
        f"  P(the answer shown first wins)    {shown}",
        f"  missing                           {found['missing']:.1%}",
        f"  label mass                        {mass}",
        f"  people prefer the longer answer   {interval(found['longer_is_preferred'])}",
    ]


if __name__ == "__main__":
    command_line(main, AgreementConfig(), __doc__, loading=loading)
