"""How often a policy's answers win against those before training, by a judge that reads both."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlaif_jax.config import UserError
from rlaif_jax.evaluate import Answers
from rlaif_jax.quality.win_rates import pair_outcomes, verdict_of
from rlaif_jax.recipes.improve import win_rates
from rlaif_jax.recipes.judge_rewards import Compare, Verdicts
from rlaif_jax.run import Run

SCORE = "eval_reward"
"""The name in metrics of the rewards of held-out answers, combined as in training."""

CONSISTENT = 0.5
"""A judge that prefers the same answer in both orders less often has no say: a coin reaches this."""

SECOND = "second"
"""The name in metrics of a judge that training never sees."""

JUDGE = "judge"
"""The name in metrics of the judge that the policy learns from."""


@dataclasses.dataclass(eq=False)
class AgainstStart:
    """Compares answers with those before training, each pair in both orders.

    Attributes:
        compare: the judge.
        name: of the judge in metrics.
        prompts: the held-out prompts as text.
        start: the answers before training; None until they are drawn.
        known: the verdicts that were asked for last, with the answers that they are on; they are not asked for twice.
    """

    compare: Compare
    name: str
    prompts: Sequence[str]
    start: Answers | None = None
    known: list[tuple[Answers, Verdicts]] = dataclasses.field(default_factory=list)

    def __call__(self, answers: Answers) -> dict[str, float]:
        """Returns `win_rate_NAME`, the share of prompts whose new answer is preferred."""
        found = self.verdicts(answers)
        return {f"win_rate_{self.name}": _mean(_outcomes(found.probability), found.valid)}

    def verdicts(self, answers: Answers) -> Verdicts:
        """Returns the verdicts on (new answer, answer before training) of each prompt; equal answers are ties."""
        if not (self.known and self.known[0][0] is answers):
            self.known[:] = [(answers, self._asked(answers))]
        return self.known[0][1]

    def _asked(self, answers: Answers) -> Verdicts:
        assert self.start is not None
        differ = [i for i, pair in enumerate(zip(answers.texts, self.start.texts)) if pair[0] != pair[1]]
        size = len(self.prompts)
        whole = Verdicts(
            np.full(size, 0.5), np.ones(size, bool), np.full(size, 0.5), np.ones(size, bool), np.full(size, np.nan)
        )
        if differ:
            texts = ([x[i] for i in differ] for x in (self.prompts, answers.texts, self.start.texts))
            for all_rows, rows in zip(whole, self.compare(*texts)):
                all_rows[differ] = rows
        return whole

    def metrics(self, answers: Answers) -> dict[str, Any]:
        """Returns the win rate, also at equal lengths, and an audit of the judge on these answers.

        The audit is of the pairs that the judge was asked about, whose answers differ: `NAME_order_consistency`, the share
        whose two orders prefer the same answer; `NAME_first_shown`, the mean probability that the answer shown first is
        better (.5 without position bias); `NAME_missing`, the share without a verdict; `NAME_agrees`, the share in
        which the judge prefers the answer with the higher reward. Where no pair differs, nothing is audited.
        """
        assert self.start is not None
        found = self.verdicts(answers)
        valid = found.valid
        asked = np.array([pair[0] != pair[1] for pair in zip(answers.texts, self.start.texts)])
        outcomes = np.where(valid, _outcomes(found.probability), np.nan)
        metrics: dict[str, Any] = {f"{self.name}_missing": float(1 - valid[asked].mean())} if asked.any() else {}
        if (asked.any() and not valid[asked].any()) or valid.sum() < 2:
            return metrics
        gained = answers.scores - self.start.scores
        decided = valid & np.isfinite(gained) & (gained != 0) & (found.probability != 0.5)
        if (valid & asked).any():
            metrics |= {
                f"{self.name}_order_consistency": _mean(found.consistent, valid & asked),
                f"{self.name}_first_shown": _mean(found.first_shown, valid & asked),
            }
        if decided.any():
            metrics[f"{self.name}_agrees"] = _mean((gained > 0) == (found.probability > 0.5), decided)
        return metrics | win_rates(self.name, outcomes, answers.lengths - self.start.lengths)


def audit(run: Run, compare: Compare, ranks: bool, prompts: Sequence[str], before: Answers, after: Answers) -> None:
    """Adds to a run's metrics how the judge that it learned from compares the final answers.

    Args:
        run: the run; it gets `AgainstStart.metrics` by the name `JUDGE`.
        compare: the judge.
        ranks: whether its rewards are comparisons; then the run warns of a judge that chooses by position.
        prompts: the held-out prompts as text.
        before: the answers before training.
        after: those after training.
    """
    try:
        found = AgainstStart(compare, JUDGE, prompts, before).metrics(after)
    except UserError as error:  # one that scores may lack what a comparison needs, such as a token for its labels
        run.warn(f"The judge that the policy learned from cannot compare answers, so it is not audited: {error}")
        return
    run.metrics |= found
    consistent = found.get(f"{JUDGE}_order_consistency", 1.0)
    if ranks and consistent < CONSISTENT:
        run.warn(
            f"The judge that the policy learned from prefers the same answer in both orders in only {consistent:.0%} of the "
            "pairs of answers before and after training: mostly it chooses by position. Try: a stronger judge, or form=rating."
        )


def by_opinion(before: Answers, after: Answers) -> dict[str, Any]:
    """Returns how often the new answers win by a second opinion that is a score and no comparison.

    The mean opinions are `second_opinion_before` and `_after`. With fewer than two prompts whose answers both have an opinion
    there is nothing to say.

    Args:
        before: the answers before training.
        after: those after training.
    """
    if before.second is None or after.second is None:
        return {}
    outcomes = pair_outcomes(after.second, before.second)
    if np.isfinite(outcomes).sum() < 2:
        return {}
    return win_rates(SECOND, outcomes, after.lengths - before.lengths) | {
        "second_opinion_before": float(np.nanmean(before.second)),
        "second_opinion_after": float(np.nanmean(after.second)),
    }


def _outcomes(probability: np.ndarray) -> np.ndarray:
    """Returns 1 where the first answer is preferred, 0 where the second is, .5 for a tie."""
    return np.where(probability == 0.5, 0.5, probability > 0.5)


def _mean(x: np.ndarray, valid: np.ndarray) -> float:
    return float(np.mean(x[valid])) if valid.any() else float("nan")


def conclude(run: Run, judge: str | None) -> None:
    """Writes what came out to the run's story, with its verdict, and warns where the reward was exploited.

    Args:
        run: has the metrics of `improve`, and those of the judge where one compared answers.
        judge: the judge's name in metrics; None: nobody compared.
    """
    numbers = run.metrics
    known = "gain_ci95" in numbers
    rose = known and numbers["gain_ci95"][0] > 0
    moved = (
        "nobody judged them" if not known else f"{numbers[f'{SCORE}_before']:.2f} -> {numbers[f'{SCORE}_after']:.2f}"
    )
    kl = f"{numbers['kl']:.1f}" if numbers["kl"] >= 1 else f"{round(numbers['kl'], 2) + 0.0:.2f}"
    run.story.append(
        f"Reward on held-out prompts: {moved} at KL {kl} nats an answer; answers of "
        f"{numbers['length_before']:.0f} -> {numbers['length_after']:.0f} tokens."
    )
    name = judge if judge is not None and f"win_rate_{judge}" in numbers else SCORE
    if judge is not None and name == SCORE:
        run.warn(
            f"{'The second judge' if judge == SECOND else 'The judge'} compared hardly any of the answers before and after "
            "training, so the verdict is that of the reward itself. Try: a smaller min_mass, or a look at the judge's replies."
        )
    elif name != SCORE and numbers.get(f"{name}_order_consistency", 1.0) < CONSISTENT:
        run.warn(
            f"The judge that compares the answers prefers the same one in both orders in only "
            f"{numbers[f'{name}_order_consistency']:.0%} of the pairs: mostly it chooses by position, and its win rate "
            f"({numbers[f'win_rate_{name}']:.0%}) does not count. Try: a stronger judge for --second."
        )
        judge, name = None, SCORE
    if not known and name == SCORE:
        return
    low, high = numbers[f"win_rate_{name}_ci95"]
    if np.isfinite([low, high]).all():
        run.verdict = verdict_of(low, high)
    if name != SCORE:
        said = "a second judge, which training never saw," if judge == SECOND else "the judge that it learned from"
        run.story.append(
            f"By {said} the new answers win {numbers[f'win_rate_{name}']:.0%} [{low:.0%}, {high:.0%}] of the comparisons "
            "with those before training."
        )
    exploited = rose and judge == SECOND and high < 0.5
    equal_low, equal_high = numbers.get(f"win_rate_{SCORE}_length_controlled_ci95", (1.0, 1.0))
    longer = numbers["length_after"] / max(numbers["length_before"], 1.0)
    by_length = rose and (longer > 1.25 or longer < 0.8) and equal_low <= 0.5  # not where it is NaN
    if exploited:
        run.verdict = "worse"
        run.story.insert(
            0,
            "The reward was exploited: it rose, but the second judge prefers the answers before training. Do not use this "
            "policy.",
        )
    if by_length:
        if name == SCORE:
            run.verdict = verdict_of(equal_low, equal_high)
        changed = "longer" if longer > 1 else "shorter"
        run.story.insert(
            0,
            f"The reward may be exploited by length: the answers became {longer:.2g} times as long ({changed}), and at equal "
            f"lengths no gain is left (win rate by the reward {numbers[f'win_rate_{SCORE}_length_controlled']:.0%}, interval "
            f"[{equal_low:.0%}, {equal_high:.0%}]).",
        )
    if exploited or by_length:
        run.warn(
            f"{run.story[0]} Try: a second reward with the opposite weakness, a larger ppo.kl_coef, fewer steps, or a better "
            "judge."
        )
