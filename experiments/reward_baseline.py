"""Does a reward model of a language model's trunk beat counted words? Both learn the same pairs and are measured on the same.

    python experiments/reward_baseline.py --data FOLDER --model models/smollm2

The baseline is logistic regression on the differences of TF-IDF vectors (words and pairs of neighbouring words); its
regularisation is chosen on the training pairs, by cross-validation over whole conversations. The reward model is a run of
`python -m rlaif_jax reward-model` with an adapter. FOLDER holds published comparisons as their authors keep them:

    hh_harmless/test.jsonl              github.com/anthropics/hh-rlhf
    prometheus/autoj_pairwise.jsonl     github.com/GAIR-NLP/auto-j, as github.com/prometheus-eval has it

People's ties are left out. For each file: the share of held-out pairs of which the better answer has the higher score, with
its interval over conversations, for both, for their difference, and for the longer answer. It needs scikit-learn.

Expected: see experiments/RESULTS.md.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take seconds
    from rlaif_jax.progress.startup import Loading

    loading = Loading()

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.judge_agreement import PUBLISHED, of_people
from rlaif_jax.algorithms.fit import FitConfig
from rlaif_jax.command_line import command_line
from rlaif_jax.config import require, to_json
from rlaif_jax.data.rendering import learned_with_bos
from rlaif_jax.data.text import held_out_mask
from rlaif_jax.data.tokenizers import Tokenizer, load_tokenizer
from rlaif_jax.feedback.judges.reward_model import Scorer
from rlaif_jax.feedback.judges.reward_pairs import Pairs, tokenize
from rlaif_jax.feedback.records.comparisons import comparisons
from rlaif_jax.feedback.records.exchange import Detected
from rlaif_jax.files import atomic_write
from rlaif_jax.models.hf.classifiers import load_reward_model
from rlaif_jax.models.lora import LoRAConfig
from rlaif_jax.parallel import make_runner
from rlaif_jax.quality.intervals import bootstrap_ci, share_interval
from rlaif_jax.recipes import reward_model
from rlaif_jax.recipes.reward_model import RewardModelConfig, read_comparisons
from rlaif_jax.report.report import read_json
from rlaif_jax.tools.runs import run_settings

FILES = ("hh_harmless/test.jsonl", "prometheus/autoj_pairwise.jsonl")
STRENGTHS = np.logspace(-2, 2, 9)  # of the regression: inverse regularisation
FOLDS = 5


@dataclasses.dataclass(frozen=True)
class BaselineConfig:
    """All settings.

    Attributes:
        model: the language model whose trunk the reward model begins with.
        data: the folder of published comparisons.
        files: the files of it.
        passes: of the reward model over the training pairs.
        batch_size: pairs of an update.
        learning_rate: of the adapter.
        remat: recompute the model's blocks in the backward pass: long pairs need much less memory.
        adapter: its rank and matrices.
        max_length: tokens of prompt and answer; longer pairs are left out for both.
        held_out: the share of the conversations that are measured on.
        seed: of the reward model, the split and the bootstrap.
        out: the folder of the runs; those that are there already go on, and finished ones are only read.
    """

    model: str = "models/smollm2"
    data: Path | None = None
    files: tuple[str, ...] = FILES
    passes: int = 1
    batch_size: int = 4
    learning_rate: float = 1e-4
    remat: bool = True
    adapter: LoRAConfig = LoRAConfig(rank=16, alpha=32.0)
    max_length: int = 512
    held_out: float = 0.2
    seed: int = 0
    out: Path = Path("runs/reward_baseline")

    def __post_init__(self) -> None:
        unknown = sorted(set(self.files) - set(PUBLISHED))
        require(not unknown, f"files names {', '.join(unknown)}; known are {', '.join(PUBLISHED)}")
        require(self.passes >= 1, f"passes must be >= 1, not {self.passes}")


# ---- The pairs


def write_pairs(config: BaselineConfig, name: str, folder: Path) -> Path:
    """Writes the pairs of a file on which people do not tie, as prompt, chosen and rejected answer, and returns the path."""
    assert config.data is not None
    found = comparisons(of_people(config.data / name, PUBLISHED[name](config.data / name))).pairs
    rows = []
    for pair in found:
        if pair.probability != 0.5:
            chosen, rejected = pair.answers if pair.probability > 0.5 else pair.answers[::-1]
            rows.append(json.dumps({"prompt": pair.prompt, "chosen": chosen, "rejected": rejected}) + "\n")
    path, text = folder / "pairs.jsonl", "".join(rows)
    require(
        not (folder / "run").exists() or path.read_text() == text,
        f"{folder} holds a run that learned other pairs: give another --out, or move it away",
    )
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text)
    return path


def run_config(config: BaselineConfig, pairs: Path, learned: int) -> RewardModelConfig:
    """Returns the settings of the reward model's run.

    Args:
        config: the settings of the experiment.
        pairs: the file of pairs.
        learned: number of those that are learned from.
    """
    updates = max(1, config.passes * learned // config.batch_size)
    return RewardModelConfig(
        model=config.model,
        feedback=(pairs,),
        seed=config.seed,
        split_seed=config.seed,
        out=pairs.parent / "run",
        resume=(pairs.parent / "run").exists(),
        max_length=config.max_length,
        held_out=config.held_out,
        lora=True,
        adapter=config.adapter,
        fit=FitConfig(updates=updates, batch_size=config.batch_size, learning_rate=config.learning_rate),
        remat=config.remat,
        check_every=max(50, updates // 2),  # a check reads all held-out pairs
    )


# ---- Who is right


def words_differ(tokenizer: Tokenizer, training: Pairs, measured: Pairs, seed: int) -> np.ndarray:
    """Returns by how much the first answer of each measured pair is better [n], by counted words.

    Args:
        tokenizer: of the pairs.
        training: the pairs to learn from.
        measured: the pairs to judge.
        seed: of the order in which a training pair is read, which makes two classes.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, GroupKFold

    texts = lambda pairs, side: [
        tokenizer.decode(ids[side][-count:]) for ids, count in zip(pairs.ids, pairs.lengths[:, side].tolist())
    ]
    vectors = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+", sublinear_tf=True, min_df=2)
    vectors.fit(texts(training, 0) + texts(training, 1))
    difference = lambda pairs: vectors.transform(texts(pairs, 0)) - vectors.transform(texts(pairs, 1))
    sign = np.random.default_rng(seed).choice((-1.0, 1.0), len(training.ids))
    first = (training.probability > 0.5) == (sign > 0)
    regression = LogisticRegression(fit_intercept=False, max_iter=1000)
    found = GridSearchCV(regression, {"C": STRENGTHS}, cv=GroupKFold(FOLDS), scoring="neg_log_loss")
    found.fit(difference(training).multiply(sign[:, None]).tocsr(), first, groups=training.conversation)
    return np.asarray(found.decision_function(difference(measured)))


def compare(pairs: Pairs, gaps: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Returns for each judge how often it is right, with intervals of 95 % over conversations, and the first less the second.

    Args:
        pairs: n pairs, none of them a tie.
        gaps: name of a judge -> by how much the first answer of each pair is better [n]; 0 counts half.
        seed: of the bootstrap.
    """
    groups = np.unique(pairs.conversation, return_inverse=True)[1]
    sign = np.where(pairs.probability > 0.5, 1.0, -1.0)
    right = {name: (1 + np.sign(sign * gap)) / 2 for name, gap in gaps.items()}
    found: dict[str, Any] = {"pairs": len(pairs.ids)}
    for name, values in right.items():
        found[name] = share_interval(values, groups=groups)._asdict()
    first, second = list(right.values())[:2]
    low, high = bootstrap_ci(first - second, seed=seed, groups=groups)
    return found | {"difference": {"value": float((first - second).mean()), "low": low, "high": high}}


def main(config: BaselineConfig) -> dict[str, Any]:
    """Prints and returns the numbers of each file."""
    require(config.data is not None, "no comparisons: give --data, a folder of published ones")
    results: dict[str, Any] = {}
    tokenizer = load_tokenizer(config.model)
    for name in config.files:
        path = write_pairs(config, name, config.out / Path(name).parent)
        found = read_comparisons([path], Detected(), ())
        pairs = tokenize(
            found, tokenizer, max_length=config.max_length, add_bos=learned_with_bos(tokenizer), unused=found.unused
        )
        held_out = held_out_mask(pairs.conversation, config.held_out, config.seed)
        training, measured = (pairs.chosen(np.flatnonzero(which)) for which in (~held_out, held_out))
        run = run_config(config, path, len(training.ids))
        if read_json(run.out / "summary.json").get("status") == "done":
            require(
                {**run_settings(run.out), "resume": False} == {**to_json(run), "resume": False},
                f"{run.out} holds a run with other settings: give another --out, or move it away",
            )
        else:
            reward_model.main(run)
            if read_json(run.out / "summary.json").get("status") != "done":  # it was asked to stop
                return results
        model, params, _ = load_reward_model(run.out / "model")
        scorer = Scorer(model, make_runner(run.parallel), config.batch_size, tokenizer.pad_id)
        scores = scorer(jax.tree.map(lambda x: x[None], params), measured.ids)[..., 0]
        results[name] = compare(
            measured,
            {
                "reward model": scores[:, 0] - scores[:, 1],
                "TF-IDF": words_differ(tokenizer, training, measured, config.seed),
                "longer": measured.lengths[:, 0] - measured.lengths[:, 1],
            },
            config.seed,
        ) | {"learned": len(training.ids)}
        print(line_of(name, results[name]))
    with atomic_write(config.out / "results.json") as file:
        json.dump(results, file, indent=2)
    return results


def line_of(name: str, found: Mapping[str, Any]) -> str:
    """Returns the numbers of a file in a line."""
    said = [
        f"{judge} {kept['value']:.1%} [{kept['low']:.1%}, {kept['high']:.1%}]"
        for judge, kept in found.items()
        if isinstance(kept, dict)
    ]
    return f"{name}: {found['learned']} pairs learned, {found['pairs']} held out; {'; '.join(said)}"


if __name__ == "__main__":
    command_line(main, BaselineConfig(), __doc__, loading=loading)
