"""A language model as judge, on the same devices as everything else: one batched prefill a question.

A judge reads *text*: the policy's tokens are decoded and tokenized again with the judge's own tokenizer, so any pair
of vocabularies works. Comparisons are asked in both orders and averaged (Lee 2023, section 2.2): a position bias that
is additive in the probability cancels, one in the log-odds keeps the sign of the verdict. Direct scores are the
expectation over the score tokens (d-RLAIF), after the judge's own reasons if it gives them.
A question that the judge cannot answer (too long for its context, or nearly no mass on the choice tokens) is *missing*:
it is masked and counted, it never becomes a score.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.config import UserError, require
from rlaif_jax.data.prompts import Record, padded
from rlaif_jax.data.tokenizers import Tokenizer, check_tokenizer
from rlaif_jax.feedback.sources import FeedbackSource
from rlaif_jax.models.causal_lm import CausalLM
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import Runner
from rlaif_jax.policies.text import answer_texts, generate
from rlaif_jax.rewards.rankings import both_orders
from rlaif_jax.types import Feedback, Params, Prompts, Rollout

Floats = np.ndarray


class Comparison(NamedTuple):
    """Verdicts on B pairs.

    probability [B]: P(first answer is better), the mean of both orders; forward [B] and swapped [B]: P(the answer
    shown *first* is better) in each order; valid [B] bool. Entries that are not valid hold 0.5.
    """

    probability: Floats
    forward: Floats
    swapped: Floats
    valid: np.ndarray


class Scores(NamedTuple):
    """Direct scores of B answers.

    expected [B] in the units of the scale (0 where not valid); probabilities [B, C] of the C scores; valid [B] bool.
    """

    expected: Floats
    probabilities: Floats
    valid: np.ndarray


def preference(first: Scores, second: Scores) -> tuple[Floats, np.ndarray]:
    """P(first answer is better) [B] from two answers' score distributions, and where both are valid [B].

    P(s1 > s2) + P(s1 = s2) / 2 with the two scores independent: each answer was judged alone, so there is no position
    to be biased by. The scale must be in rising order. 0.5 where not valid.
    """
    p1, p2 = first.probabilities, second.probabilities
    below = np.cumsum(p2, axis=-1) - p2  # P(s2 < s1), score by score
    valid = first.valid & second.valid
    return np.where(valid, (p1 * (below + 0.5 * p2)).sum(-1), 0.5), valid


def weights_hash(params: Params) -> str:
    """SHA-256 over names, shapes and bytes of all parameters: which judge this was, for the record."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def choice_probabilities(
    model: CausalLM,
    ids: tuple[int, ...],
    params: Params,
    batch: dict[str, jax.Array],
    *,
    axis_name: str | None = None,
) -> dict[str, jax.Array]:
    """Distribution over the choice tokens after each left-padded text: `choices` [B, C] (normalised), `mass` [B]."""
    del axis_name
    hidden = model.sequence_hidden(params, batch["tokens"], batch["mask"])[:, -1]
    logprobs = jax.nn.log_softmax(model.logits(params, hidden), axis=-1)[:, jnp.array(ids)]
    return {"choices": jax.nn.softmax(logprobs, axis=-1), "mass": jnp.exp(jax.nn.logsumexp(logprobs, axis=-1))}


@dataclasses.dataclass(frozen=True)
class Reasoning:
    """How a judge thinks before it scores: `prompt(prompt, answer)` ends where its reasons begin, and they end with the
    token `marker`, after which the score stands. Reasons of more than `max_tokens` are no answer: missing."""

    prompt: Callable[[str, str], str]
    marker: str
    max_tokens: int = 24


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModelJudge:
    """A frozen language model and the wording of its questions.

    pairwise_prompt(prompt, first, second) and score_prompt(prompt, answer) return the text that ends right before the
    verdict; verdicts are the two choice tokens (first, second); scale maps score tokens to numbers.
    reasoning: when set, a score is given in two steps (chain of thought, Lee 2023, section 2.1.3): the judge first
    writes its reasons, greedily, then the score.
    debias: how the two orders of a comparison become one (`rewards.rankings.both_orders`).
    min_mass: below this probability of all choice tokens together the judge did not answer.
    """

    model: CausalLM
    params: Params
    tokenizer: Tokenizer
    runner: Runner
    pairwise_prompt: Callable[[str, str, str], str]
    score_prompt: Callable[[str, str], str]
    verdicts: tuple[str, str] = ("1", "2")
    scale: tuple[tuple[str, float], ...] = tuple((str(i), float(i)) for i in range(1, 11))
    reasoning: Reasoning | None = None
    batch_size: int = 128
    max_length: int | None = None
    debias: Literal["mean", "logit"] = "mean"
    min_mass: float = 0.01

    def __post_init__(self) -> None:
        check_tokenizer(self.tokenizer, self.model.config.vocab_size, "the judge")
        require(
            self.batch_size % self.runner.devices == 0,
            f"judge.batch_size ({self.batch_size}) must be a multiple of the {self.runner.devices} devices",
        )
        length = self._length
        require(
            length <= self.model.config.context_length,
            f"judge.max_length ({length}) is longer than the judge's context ({self.model.config.context_length})",
        )

    @property
    def _length(self) -> int:
        return self.max_length or self.model.config.context_length

    @cached_property
    def hash(self) -> str:
        """Hash of the weights."""
        return weights_hash(self.params)

    @cached_property
    def _placed(self) -> Params:
        """The weights where the compiled functions want them, moved once."""
        return self.runner.place(self.params)

    @cached_property
    def _compare(self) -> Any:
        return self._compiled(self.verdicts)

    @cached_property
    def _score(self) -> Any:
        return self._compiled(tuple(token for token, _ in self.scale))

    def _compiled(self, tokens: tuple[str, ...]) -> Any:
        ids = tuple(self.tokenizer.token_id(token) for token in tokens)
        if len(set(ids)) < len(ids):
            raise UserError(f"the judge's tokenizer does not tell the choices {', '.join(tokens)} apart")

        def run(params: Params, batch: dict[str, jax.Array], *, axis_name: str | None = None) -> dict[str, jax.Array]:
            return choice_probabilities(self.model, ids, params, batch, axis_name=axis_name)

        return self.runner.map(run)

    @cached_property
    def _reason(self) -> Any:
        assert self.reasoning is not None
        stop, sampling = self.tokenizer.token_id(self.reasoning.marker), SamplingConfig(self.reasoning.max_tokens, 0.0)

        def run(params: Params, batch: dict[str, jax.Array], *, axis_name: str | None = None) -> Rollout:
            prompts = Prompts(batch["tokens"], batch["mask"], jnp.zeros(batch["tokens"].shape[0], jnp.uint32))
            return generate(
                self.model,
                params,
                prompts,
                jax.random.key(0),
                sampling=sampling,
                eos_id=stop,
                pad_id=self.tokenizer.pad_id,
            )

        return self.runner.map(run)

    def reasons(self, prompts: Sequence[str], answers: Sequence[str]) -> tuple[list[str], np.ndarray]:
        """The judge's written reasons for each answer [B], and whether it came to an end with them [B]."""
        assert self.reasoning is not None
        texts = [self.reasoning.prompt(p, a) for p, a in zip(prompts, answers)]
        batches, fits = self._batches(texts, self._length - self.reasoning.max_tokens - 1)
        rollouts = [self._reason(self._placed, batch) for batch in batches]
        written = [text for rollout in rollouts for text in answer_texts(rollout, self.tokenizer)]
        ended = np.concatenate([np.asarray(rollout.finished) for rollout in rollouts])
        return written[: len(texts)], fits & ended[: len(texts)]

    def _batches(self, texts: Sequence[str], length: int) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
        """All texts left padded to `length`, in batches of one shape, and which of them [B] fit."""
        ids = [self.tokenizer.encode(text) for text in texts]
        fits = np.array([0 < len(sequence) <= length for sequence in ids], bool)
        rows = max(-(-len(texts) // self.batch_size), 1) * self.batch_size
        asked = [s if ok else [self.tokenizer.pad_id] for s, ok in zip(ids, fits)]
        asked += [[self.tokenizer.pad_id]] * (rows - len(texts))
        tokens, mask = padded(asked, length, self.tokenizer.pad_id, "left")
        return [
            {"tokens": tokens[i : i + self.batch_size], "mask": mask[i : i + self.batch_size]}
            for i in range(0, rows, self.batch_size)
        ], fits

    def _ask(self, compiled: Any, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(distributions [B, C], valid [B]) of all texts."""
        batches, fits = self._batches(texts, self._length)
        outs = jax.device_get([compiled(self._placed, batch) for batch in batches])  # all dispatched, then waited for
        choices = np.concatenate([out["choices"] for out in outs])[: len(texts)]
        mass = np.concatenate([out["mass"] for out in outs])[: len(texts)]
        return choices, fits & np.isfinite(choices).all(-1) & (mass >= self.min_mass)

    def compare(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Comparison:
        """Which of two answers [B] to each prompt is better: asked in both orders, averaged.

        P(first better) = (P(verdict 1 | first, second) + P(verdict 2 | second, first)) / 2, or by log-odds: `debias`.
        """
        count = len(prompts)
        texts = [self.pairwise_prompt(p, a, b) for p, a, b in zip(prompts, first, second)]
        texts += [self.pairwise_prompt(p, b, a) for p, a, b in zip(prompts, first, second)]
        choices, valid = self._ask(self._compare, texts)
        forward, swapped = choices[:count, 0], choices[count:, 0]
        both = valid[:count] & valid[count:]
        better, _ = both_orders(jnp.asarray(forward), jnp.asarray(swapped), how=self.debias)
        fill = lambda x: np.where(both, x, 0.5)
        return Comparison(fill(np.asarray(better)), fill(forward), fill(swapped), both)

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> Scores:
        """Expected score sum_i i P(i) of each answer [B] (Lee 2023, section 2.2.2, direct RLAIF), after the judge's own
        reasons where it has a `reasoning`."""
        if self.reasoning is None:
            texts, ended = [self.score_prompt(p, a) for p, a in zip(prompts, answers)], np.ones(len(prompts), bool)
        else:
            written, ended = self.reasons(prompts, answers)
            texts = [
                f"{self.reasoning.prompt(p, a)} {reasons} {self.reasoning.marker}"
                for p, a, reasons in zip(prompts, answers, written)
            ]
        choices, valid = self._ask(self._score, texts)
        valid = valid & ended
        numbers = np.array([number for _, number in self.scale])
        return Scores(np.where(valid, choices @ numbers, 0.0), choices, valid)


@dataclasses.dataclass(frozen=True, eq=False)
class DirectScoreSource(FeedbackSource):
    """Direct RLAIF: the judge's expected score of each answer is its reward (Lee 2023, section 2.2.2)."""

    judge: LanguageModelJudge

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout) -> Feedback:
        scores = self.judge.score([str(record["prompt"]) for record in records], answers)
        return Feedback.single(scores.expected, scores.valid)
