"""A language model as judge, on the same devices as the policy: one batched prefill for each question.

A judge reads *text*: the policy's tokens are decoded and tokenized again with the judge's own tokenizer, so
any pair of vocabularies works. Special tokens that the data spells are text in the question. A comparison is
asked in both orders and averaged (Lee 2023, section 2.2): a position bias that is additive in the probability
cancels; a bias in the log-odds keeps the sign of the verdict. A direct score is the expectation over the score
tokens (d-RLAIF). Both may follow the judge's own reasons (`Reasoning`). A question that the judge cannot answer
(too long for its context, or little probability on the labels) is *missing*: it is masked and counted, and it never
becomes a score.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.config import UserError, require
from rlaif_jax.data.prompts import Record, padded
from rlaif_jax.data.text import shared_prefix
from rlaif_jax.data.tokenizers import HuggingFaceTokenizer, Tokenizer, check_tokenizer
from rlaif_jax.feedback.judges.batching import check_batch_size, in_batches
from rlaif_jax.feedback.sources import CountingSource, Missing
from rlaif_jax.models.causal_lm import CausalLM
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import Runner
from rlaif_jax.policies.text import answer_texts, generate
from rlaif_jax.progress.count import Count, count_nothing
from rlaif_jax.rewards.rankings import both_orders
from rlaif_jax.types import Feedback, Params, Prompts, Rollout


class Comparison(NamedTuple):
    """Verdicts on B pairs of answers.

    Attributes:
        probability: P(first answer is better), the mean of both orders, [B]; 0.5 where not valid.
        forward: P(the answer shown first is better) with the first answer shown first, [B]; 0.5 where not
            valid.
        swapped: P(the answer shown first is better) with the second answer shown first, [B]; 0.5 where not
            valid.
        valid: whether both orders were answered, [B] bool.
        mass: probability of the verdicts together in the order where it is lower, [B]; 0 for a question that does not fit.
        missing: why there is no verdict, [B] texts, "" where there is one.
        reasons: what the judge wrote before its verdict in either order, [B, 2] texts; "" where it wrote nothing.
    """

    probability: np.ndarray
    forward: np.ndarray
    swapped: np.ndarray
    valid: np.ndarray
    mass: np.ndarray
    missing: np.ndarray
    reasons: np.ndarray


class AnswerScores(NamedTuple):
    """Direct scores of B answers.

    Attributes:
        expected: the expected score in the units of the scale, [B]; 0 where not valid.
        probabilities: the distribution over the C scores of the scale, [B, C].
        valid: whether the judge gave a score, [B] bool.
        mass: probability of all scores of the scale together, [B]; 0 for a question that does not fit.
        missing: why there is no score, [B] texts, "" where there is one; [0] where not recorded.
        reasons: what the judge wrote before its scores, [B] texts, "" where it wrote nothing; [0] where not recorded.
    """

    expected: np.ndarray
    probabilities: np.ndarray
    valid: np.ndarray
    mass: np.ndarray
    missing: np.ndarray = np.array((), object)
    reasons: np.ndarray = np.array((), object)


def preference_from_scores(first: AnswerScores, second: AnswerScores) -> tuple[np.ndarray, np.ndarray]:
    """Computes P(first answer is better) [B] from two score distributions, and where both are valid [B].

    The probability is P(s1 > s2) + P(s1 = s2) / 2 with independent scores, and 0.5 where not valid. Each
    answer was judged alone, so no position bias arises. The scale must be in rising order.

    Args:
        first: scores of B first answers.
        second: scores of the B second answers to the same prompts.
    """
    p1, p2 = first.probabilities, second.probabilities
    below = np.cumsum(p2, axis=-1) - p2  # P(s2 < s1), score by score
    valid = first.valid & second.valid
    return np.where(valid, (p1 * (below + 0.5 * p2)).sum(-1), 0.5), valid


def weights_hash(params: Params) -> str:
    """Hashes the names, shapes and bytes of all parameters (SHA-256), to identify a judge in records."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def choice_probabilities(
    model: CausalLM,
    ids: tuple[tuple[int, ...], ...],
    params: Params,
    batch: dict[str, jax.Array],
    *,
    axis_name: str | None = None,
) -> dict[str, jax.Array]:
    """Computes the distribution over the choice tokens after each left-padded text.

    Args:
        model: the judge.
        ids: the tokens of each of the C choices: a choice may be written in several ways ("A" and " A").
        params: the judge's parameters.
        batch: `tokens` [B, S] int32 and `mask` [B, S] bool, left padded.
        axis_name: the device axis under pmap; unused, because rows are independent.

    Returns:
        `choices` [B, C], the probabilities of the choices among themselves, and `mass` [B], their sum before
        that.
    """
    del axis_name
    hidden = model.sequence_hidden(params, batch["tokens"], batch["mask"])[:, -1]
    logprobs = jax.nn.log_softmax(model.logits(params, hidden), axis=-1)
    choices = jnp.stack([jax.nn.logsumexp(logprobs[:, jnp.array(ways)], axis=-1) for ways in ids], axis=-1)
    return {"choices": jax.nn.softmax(choices, axis=-1), "mass": jnp.exp(jax.nn.logsumexp(choices, axis=-1))}


def as_chat(tokenizer: HuggingFaceTokenizer, wording: Callable[..., str], system: str = "") -> Callable[..., str]:
    """Returns a wording as the message of a user to a chat model, up to where the model's answer begins.

    Args:
        tokenizer: has the model's chat template.
        wording: from data to the text of the message, such as a judge's `pairwise_prompt`.
        system: the system's message before it; "" = none.
    """
    first = [{"role": "system", "content": system}] if system else []
    return lambda *data: tokenizer.chat_text([*first, {"role": "user", "content": wording(*data)}])


@dataclasses.dataclass(frozen=True)
class Reasoning:
    """How a judge writes reasons, greedily, before its label (chain of thought, Lee 2023, section 2.1.3).

    Attributes:
        prompt: from (prompt, answer), or (prompt, first, second), to the text that the reasons continue.
        marker: the token that ends the reasons and that the label follows; without it a judgement is missing. "": a stop
            token or `max_tokens` ends them.
        max_tokens: the greatest length of the reasons.
        verdict: from (what `prompt` takes, the reasons) to the text that ends right before the label; None: the text of
            `prompt`, the reasons and the marker.
    """

    prompt: Callable[..., str]
    marker: str
    max_tokens: int = 24
    verdict: Callable[[tuple[str, ...], str], str] | None = None

    def before_label(self, data: tuple[str, ...], reasons: str) -> str:
        """Returns the text that ends right before the label, after reasons about what `prompt` takes."""
        if self.verdict is not None:
            return self.verdict(data, reasons)
        return f"{self.prompt(*data)} {reasons} {self.marker}"


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModelJudge:
    """A frozen language model and the wording of its questions.

    Attributes:
        model, params, tokenizer: the judge's own.
        runner: runs the compiled functions on all devices.
        pairwise_prompt: from (prompt, first, second) to the text that ends right before the verdict; `as_chat` makes a
            question to a chat model of it.
        score_prompt: from (prompt, answer) to the text that ends right before the score.
        verdicts: the labels for "the first is better", "the second is better" and perhaps a tie, each one token; all its
            ways of writing count ("1" and " 1"). Half of a tie's probability is that of either answer.
        scale: the scores' labels with their numbers.
        reasoning: how the judge writes reasons before its score; None = it scores at once.
        pairwise_reasoning: how it writes reasons before its verdict on a pair; None = it compares at once.
        batch_size: questions of one compiled call.
        max_length: tokens of a question at most; None = the model's context.
        debias: how the two orders of a comparison become one probability (`rewards.rankings.both_orders`).
        min_mass: with less probability on all labels together than this, an answer is missing; as for a judge behind an
            API.
        add_bos: put BOS before each question, where the model has learned with one (a chat template has its own).
    """

    model: CausalLM
    params: Params
    tokenizer: Tokenizer
    runner: Runner
    pairwise_prompt: Callable[[str, str, str], str]
    score_prompt: Callable[[str, str], str]
    verdicts: tuple[str, ...] = ("1", "2")
    scale: tuple[tuple[str, float], ...] = tuple((str(i), float(i)) for i in range(1, 11))
    reasoning: Reasoning | None = None
    pairwise_reasoning: Reasoning | None = None
    batch_size: int = 128
    max_length: int | None = None
    debias: Literal["mean", "logit"] = "mean"
    min_mass: float = 0.5
    add_bos: bool = False

    def __post_init__(self) -> None:
        check_tokenizer(self.tokenizer, self.model.config.vocab_size, "the judge")
        check_batch_size("judge", self.batch_size, self.runner)
        length = self._length
        require(
            length <= self.model.config.context_length,
            f"judge.max_length ({length}) is longer than the judge's context ({self.model.config.context_length})",
        )
        longest = max((part.max_tokens for part in (self.reasoning, self.pairwise_reasoning) if part), default=0)
        require(
            longest + 1 < length,
            f"reasons of {longest} tokens leave no room for a question within the judge's {length} tokens: raise max_length",
        )

    @property
    def _length(self) -> int:
        return self.max_length or self.model.config.context_length

    @cached_property
    def hash(self) -> str:
        """Returns the hash of the judge's parameters, hexadecimal text that identifies the judge in records."""
        return weights_hash(self.params)

    @cached_property
    def _placed(self) -> Params:
        """The parameters on the devices of the runner, moved once."""
        return self.runner.place(self.params)

    @cached_property
    def _compare(self) -> Any:
        return self._compiled(self.verdicts)

    @cached_property
    def _score(self) -> Any:
        return self._compiled(tuple(token for token, _ in self.scale))

    def _compiled(self, labels: tuple[str, ...]) -> Any:
        """Returns the compiled reading of some labels: (parameters, questions) -> (choices, mass)."""
        ids = tuple(self._ways.get(label.strip()) or (self.tokenizer.token_id(label),) for label in labels)
        every = [i for ways in ids for i in ways]
        if len(set(every)) < len(every):
            raise UserError(f"the judge's tokenizer does not tell the choices {', '.join(labels)} apart")

        return self.runner.map(partial(choice_probabilities, self.model, ids))

    @cached_property
    def _ways(self) -> dict[str, tuple[int, ...]]:
        """The tokens that are a text, up to blanks around it."""
        found: dict[str, tuple[int, ...]] = {}
        for i in range(self.tokenizer.vocab_size):
            text = self.tokenizer.decode([i], skip_special=False).strip()
            if text and "\ufffd" not in text:
                found[text] = (*found.get(text, ()), i)
        return found

    @cached_property
    def _writers(self) -> dict[Reasoning, Any]:
        """The compiled writing of reasons: (parameters, questions) -> rollout."""
        return {}

    def _writer(self, reasoning: Reasoning) -> Any:
        tokenizer, sampling = self.tokenizer, SamplingConfig(reasoning.max_tokens, 0.0)
        stop = tokenizer.token_id(reasoning.marker) if reasoning.marker else tokenizer.stop_ids

        def run(params: Params, batch: dict[str, jax.Array], *, axis_name: str | None = None) -> Rollout:
            prompts = Prompts(batch["tokens"], batch["mask"], jnp.zeros(batch["tokens"].shape[0], jnp.uint32))
            key, pad_id = jax.random.key(0), tokenizer.pad_id
            return generate(self.model, params, prompts, key, sampling=sampling, eos_id=stop, pad_id=pad_id)

        return self.runner.map(run)

    def reasons(
        self, prompts: Sequence[str], answers: Sequence[str], *, progress: Count = count_nothing
    ) -> tuple[list[str], np.ndarray]:
        """Lets the judge write its reasons before a score; needs a judge with a `reasoning`.

        Args:
            prompts: the B prompts.
            answers: the B answers.
            progress: called while the judge works with (answers that are done, B).

        Returns:
            (the B texts of reasons; [B] bool: the question fitted into the context and the reasons ended).
        """
        assert self.reasoning is not None
        return self._write(self.reasoning, self._quoted(prompts, answers), progress)

    def _write(
        self, reasoning: Reasoning, data: Sequence[tuple[str, ...]], progress: Count
    ) -> tuple[list[str], np.ndarray]:
        """Returns (the reasons about quoted data, "" where the question is too long; whether they ended [B])."""
        rows, fits = self._rows([reasoning.prompt(*own) for own in data], self._length - reasoning.max_tokens - 1)
        if reasoning not in self._writers:
            self._writers[reasoning] = self._writer(reasoning)
        rollout = in_batches(partial(self._writers[reasoning], self._placed), rows, self.batch_size, progress)
        written = answer_texts(rollout, self.tokenizer)
        ended = fits & (np.asarray(rollout.finished) | (reasoning.marker == ""))
        return [text if fit else "" for text, fit in zip(written, fits)], ended

    def _quoted(self, *data: Sequence[str]) -> list[tuple[str, ...]]:
        """Returns the prompts and answers of each question, in which special tokens are text."""
        return list(zip(*(map(self.tokenizer.quote, texts) for texts in data)))

    def _rows(
        self, texts: Sequence[str], length: int, labels: Sequence[str] = ()
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Returns the texts left padded to one length, and whether each text fits [B].

        A text that does not fit becomes one padding token.

        Args:
            texts: the questions.
            length: the most tokens of a question. The rows are as long as the next power of two that holds the longest one.
            labels: what may follow a question.
        """
        ids = [self._question(text, labels) for text in texts]
        fits = np.array([0 < len(sequence) <= length for sequence in ids], bool)
        shown = [sequence if ok else [self.tokenizer.pad_id] for sequence, ok in zip(ids, fits)]
        longest = max(map(len, shown), default=1)
        length = min(length, 1 << (longest - 1).bit_length())
        tokens, mask = padded(shown, length, self.tokenizer.pad_id, "left")
        return {"tokens": tokens, "mask": mask}, fits

    def _question(self, text: str, labels: Sequence[str]) -> list[int]:
        """Returns the tokens of a question, without blanks at its end that are one token with a label.

        After "Verdict: " a label is written " A": the question ends with the colon, as where the model has learned it.
        """
        ids = self.tokenizer.encode(text, add_bos=self.add_bos)
        if text[-1:].isspace():
            end = text[-32:]  # how a label is joined depends on what is near it
            alone = self.tokenizer.encode(end)
            joined = (self.tokenizer.encode(end + label) for label in labels)
            shared = min((shared_prefix(alone, other) for other in joined), default=len(alone))
            if not self.tokenizer.decode(alone[shared:], skip_special=False).strip():
                return ids[: len(ids) - len(alone) + shared]
        return ids

    def _read(
        self,
        compiled: Any,
        labels: Sequence[str],
        wording: Callable[..., str],
        reasoning: Reasoning | None,
        data: Sequence[tuple[str, ...]],
        progress: Count,
    ) -> AnswerScores:
        """Returns the distributions over the labels after each question and its reasons, not yet the scores."""
        count, total = len(data), len(data) * (1 if reasoning is None else 2)
        written, ended = [""] * count, np.ones(count, bool)
        if reasoning is None:
            texts = [wording(*own) for own in data]
        else:
            written, ended = self._write(reasoning, data, lambda done, _: progress(done, total))
            texts = [reasoning.before_label(own, self.tokenizer.quote(said)) for own, said in zip(data, written)]
        rows, fits = self._rows(texts, self._length, labels)
        counted = lambda done, _: progress(total - count + done, total)
        found = in_batches(partial(compiled, self._placed), rows, self.batch_size, counted)
        choices, mass = found["choices"], np.where(fits, found["mass"], 0.0)
        valid = fits & np.isfinite(choices).all(-1) & (mass >= self.min_mass)
        missing = [self._why_missing(*facts) for facts in zip(valid, ended, mass)]
        said = (np.array(texts, object) for texts in (missing, written))
        return AnswerScores(np.zeros(count), choices, valid & ended, mass, *said)

    def compare(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], *, progress: Count = count_nothing
    ) -> Comparison:
        """Compares two answers to each of B prompts in both orders.

        P(first better) = (P(verdict 1 | first, second) + P(verdict 2 | second, first)) / 2, or by log-odds:
        `debias`.

        Args:
            prompts: B prompts.
            first: B first answers.
            second: B second answers.
            progress: called while the judge works with (questions that are done, how many there are): 2 B, or 4 B
                where it writes its reasons first.

        Returns:
            The comparison, arrays [B]; it is not valid for a question longer than the context, or with too little
            probability on the verdicts (`min_mass`).
        """
        count = len(prompts)
        data = [*self._quoted(prompts, first, second), *self._quoted(prompts, second, first)]
        read = self._read(self._compare, self.verdicts, self.pairwise_prompt, self.pairwise_reasoning, data, progress)
        shown_first = read.probabilities[:, 0] + read.probabilities[:, 2:].sum(-1) / 2  # and half of a tie
        forward, swapped = shown_first[:count], shown_first[count:]
        both = read.valid[:count] & read.valid[count:]
        better, _ = both_orders(jnp.asarray(forward), jnp.asarray(swapped), how=self.debias)
        fill = lambda x: np.where(both, x, 0.5)
        mass = np.minimum(read.mass[:count], read.mass[count:])
        missing = np.where(read.missing[:count] == "", read.missing[count:], read.missing[:count])
        reasons = np.stack([read.reasons[:count], read.reasons[count:]], axis=1)
        return Comparison(fill(np.asarray(better)), fill(forward), fill(swapped), both, mass, missing, reasons)

    def score(self, prompts: Sequence[str], answers: Sequence[str], *, progress: Count = count_nothing) -> AnswerScores:
        """Scores each of B answers by its expected score, sum_i i P(i).

        Lee 2023, section 2.2.2, direct RLAIF. Where the judge has a `reasoning`, it first writes its reasons, and
        the score is read after them.

        Args:
            prompts: the B prompts.
            answers: the B answers.
            progress: called while the judge works with (questions that are done, how many there are): B, or 2 B
                where it writes its reasons first.
        """
        labels = [label for label, _ in self.scale]
        data = self._quoted(prompts, answers)
        read = self._read(self._score, labels, self.score_prompt, self.reasoning, data, progress)
        numbers = np.array([number for _, number in self.scale])
        return read._replace(expected=np.where(read.valid, read.probabilities @ numbers, 0.0))

    def _why_missing(self, valid: bool, ended: bool, mass: float) -> str:
        """Returns why a judgement is missing, "" where the labels could be read after reasons that ended."""
        if not ended:
            return "the judge's reasons did not fit or did not end"
        if valid:
            return ""
        if mass == 0:
            return "the question is too long for the judge"
        return f"the judge gave its labels less probability together than min_mass = {self.min_mass:g}"


@dataclasses.dataclass(frozen=True, eq=False)
class DirectScoreSource(CountingSource):
    """Direct RLAIF: the judge's expected score of each answer is its reward (Lee 2023, section 2.2.2)."""

    judge: LanguageModelJudge

    def __call__(self, records: Sequence[Record], answers: Sequence[str], rollout: Rollout) -> Feedback:
        scores = self.judge.score([str(record["prompt"]) for record in records], answers)
        missing = scores.missing if len(scores.missing) else ["the judge gave no score"] * len(answers)
        judged = zip(scores.expected.tolist(), scores.valid, missing)
        return self.feedback([value if valid else Missing(reason) for value, valid, reason in judged])
