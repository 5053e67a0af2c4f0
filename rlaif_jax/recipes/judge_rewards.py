"""Rewards by judges: a language model on the same devices, or one behind a server."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from rlaif_jax.config import UserError, require
from rlaif_jax.data.chat.config import ChatConfig
from rlaif_jax.data.prompts import Record
from rlaif_jax.data.rendering import chat_tokenizer
from rlaif_jax.data.tokenizers import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from rlaif_jax.feedback.api import builtin_templates as builtin
from rlaif_jax.feedback.api.config import ApiConfig
from rlaif_jax.feedback.api.judge import ApiJudge
from rlaif_jax.feedback.api.source import ApiJudgeSource
from rlaif_jax.feedback.api.template_files import read_template
from rlaif_jax.feedback.api.templates import Question, Template, loose
from rlaif_jax.feedback.constitution.constitution import Constitution, load_constitution
from rlaif_jax.feedback.constitution.revision import draw_principle
from rlaif_jax.feedback.judges.language_model import LanguageModelJudge, Reasoning
from rlaif_jax.feedback.judges.recorded import RecordedJudgeSource
from rlaif_jax.feedback.records.forms import Judgement, Ranking, Rater, Rating, sha256
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.feedback.sources import FeedbackSource, Missing, other_answer
from rlaif_jax.models import CausalLM
from rlaif_jax.models.hf.files import load_model
from rlaif_jax.parallel import Runner
from rlaif_jax.recipes.reasons import Reasons, ranking_words, rating_words, reply_words
from rlaif_jax.types import Params

BASELINE = "baseline"
"""The field of a record that holds the answer of the policy before training."""

Form = Literal["rating", "ranking"]
Compare = Callable[[Sequence[str], Sequence[str], Sequence[str]], "Verdicts"]


class Verdicts(NamedTuple):
    """Verdicts on B pairs of answers.

    Attributes:
        probability: [B], P(the first answer is better), both orders together; .5 where missing.
        consistent: [B] bool, whether both orders prefer the same answer.
        first_shown: [B], the mean over both orders of P(the answer shown first is better); .5 without position bias.
        valid: [B] bool, whether both orders were answered.
        mass: [B], the probability of the labels together in the order where it is lower, also where it is too low for a
            verdict; NaN where it is unknown.
    """

    probability: np.ndarray
    consistent: np.ndarray
    first_shown: np.ndarray
    valid: np.ndarray
    mass: np.ndarray = np.array(np.nan)


@dataclasses.dataclass(frozen=True, eq=False)
class Surroundings:
    """What a reward may need of the run that it is built for.

    Attributes:
        folder: the run's folder.
        seed: of everything random.
        runner: the devices.
        stopped: returns whether the run was asked to stop.
        open: closes what a reward opens, such as a connection, when the run ends.
        loaded: models that are loaded already, by folder and dtype.
        judges: judges behind servers that are open already, by their settings.
        raters: who the judges on the devices are in the records, by their settings.
        day: returns the day that chat templates print, YYYY-MM-DD; "": today.
    """

    folder: Path
    seed: int
    runner: Runner
    stopped: Callable[[], bool]
    open: ExitStack
    loaded: dict[tuple[str, str], tuple[CausalLM, Params]] = dataclasses.field(default_factory=dict)
    judges: dict[ApiConfig, ApiJudge] = dataclasses.field(default_factory=dict)
    raters: dict[JudgeReward, Rater] = dataclasses.field(default_factory=dict)
    day: Callable[[], str] = lambda: ""

    @property
    def store(self) -> Path:
        """Returns the file of the run's judgements."""
        return self.folder / "feedback.sqlite"

    def load(self, name: str, dtype: Literal["float32", "bfloat16"]) -> tuple[CausalLM, Params]:
        """Returns a model and its parameters, loaded once for all rewards."""
        if (name, dtype) not in self.loaded:
            self.loaded[name, dtype] = load_model(name, compute_dtype=dtype)
        return self.loaded[name, dtype]

    def on_its_day(self, tokenizer: Tokenizer) -> Tokenizer:
        """Returns a tokenizer whose chat template prints the day of the run, where it prints one."""
        prints = isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.prints_day
        return tokenizer.on_day(self.day()) if prints else tokenizer  # type: ignore[attr-defined]

    def api_judge(self, config: ApiConfig) -> ApiJudge:
        """Returns the judge of these settings: one, with one budget, for all that is asked by them."""
        if config not in self.judges:
            self.judges[config] = self.open.enter_context(ApiJudge(config, store=self.store))
        return self.judges[config]


class _Wording(NamedTuple):
    """How a judge is asked: the template, and the principle by which the answers to a prompt are judged."""

    template: Template
    principle: Callable[[str], str]

    def question(self, prompt: str, *answers: str) -> Question:
        return Question(prompt, answers, principle=self.principle(prompt))


def _wording(form: Form, template: Path | None, principle: str, constitution: Path | None, seed: int) -> _Wording:
    """Returns the wording of a judge's questions. Raises UserError where settings do not fit together."""
    require(not (principle and constitution), "a judge has a principle or a constitution, not both")
    built = read_template(template) if template else builtin.PAIRWISE if form == "ranking" else builtin.RATING
    require(built.form == form, f"{template}: this is a template for a {built.form}; form={form} was asked for")
    if constitution is None:
        return _Wording(built, lambda prompt: principle)
    rules: Constitution = load_constitution(constitution)
    require(bool(rules.principles), f"{rules.where(1)}: no [[principle]] that a judge could go by")
    return _Wording(built, lambda prompt: draw_principle(rules.principles, prompt, "", seed, 0).text)


def _from_store(
    reward: JudgeReward | ApiReward,
    around: Surroundings,
    wording: _Wording,
    rater: Callable[[Question], Rater],
    words: Callable[[Mapping[tuple[int, ...], Judgement], str], str],
) -> Reasons:
    """Returns what a judge said about answers, read from the run's store.

    Args:
        reward: the judge's settings.
        around: the run.
        wording: how the judge was asked.
        rater: who the judge is in the record of a question.
        words: from the judge's own judgements of an answer, by the order in which answers were shown, and the name of the
            other answer, to what the page says.
    """
    other = "the answer before training" if reward.against == BASELINE else f"the answer in {reward.against}"

    def about(store: Store, record: Record, answer: str) -> str:
        second = other_answer(record, reward.against) if reward.form == "ranking" else ""
        if isinstance(second, Missing):
            return ""
        question = wording.question(str(record["prompt"]), answer, *([second] if reward.form == "ranking" else []))
        item = sha256([question.prompt, sorted(question.answers)])
        asked = (rater(question), question.principle, question.answers)
        found = store.judgements(item=item, form=reward.form)
        return words({e.shown: e for e in found if (e.rater, e.principle, e.answers) == asked}, other)

    def written(records: Sequence[Record], answers: Sequence[str]) -> list[str]:
        with Store(around.store) as store:
            return [about(store, record, answer) for record, answer in zip(records, answers)]

    return written


@dataclasses.dataclass(frozen=True)
class JudgeReward:
    """A language model on the same devices that scores answers or compares them.

    The reward is the expected score of an answer, or P(it beats another answer). Labels are read by their probability; a
    comparison is asked in both orders.

    Attributes:
        model: a Hugging Face folder or a hub id; a model with a chat template is asked by it.
        form: rating: each answer alone; ranking: against another answer.
        against: of a ranking, the field of the prompt's record with the other answer; `baseline` is what the policy
            answered before training.
        principle: the criterion, a sentence; "" = the template's.
        constitution: a constitution file, of which a principle is drawn for each prompt.
        template: a template file with a [direct] section, with `reasoning` with a [reasons] section; None = the built-in
            one.
        reasoning: the most tokens of reasons that the judge writes before its verdict; longer ones are cut there. 0 = none.
        chat_variables: values for the model's chat template, NAME=VALUE, such as enable_thinking=false for Qwen3.
        dtype: of the judge's matrix products.
        batch_size: questions of one compiled call.
        min_mass: with less probability on all labels together, a judgement is missing.
        max_length: tokens of a question and its reasons at most; 0 = the model's context, 2,048 at most.
    """

    model: str
    form: Form = "rating"
    against: str = BASELINE
    principle: str = ""
    constitution: Path | None = None
    template: Path | None = None
    reasoning: int = 0
    chat_variables: tuple[str, ...] = ()
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = 16
    min_mass: float = 0.5
    max_length: int = 0

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"batch_size must be >= 1, not {self.batch_size}")
        require(self.max_length >= 0, f"max_length must be >= 0, not {self.max_length}")
        require(self.reasoning >= 0, f"reasoning must be >= 0, not {self.reasoning}")
        require(0 <= self.min_mass <= 1, f"min_mass must lie in 0 .. 1, not {self.min_mass}")
        ChatConfig(variables=self.chat_variables)  # which checks them

    @property
    def needs_baseline(self) -> bool:
        """Returns whether answers are compared with what the policy answered before training."""
        return self.form == "ranking" and self.against == BASELINE

    def _judge(self, around: Surroundings, form: Form) -> tuple[LanguageModelJudge, _Wording]:
        wording = _wording(form, self.template, self.principle, self.constitution, around.seed)
        template = wording.template
        require(
            bool(template.direct or self.reasoning),
            f"{self.template}: no [direct] section; a local judge is read by its labels",
        )
        model, params = around.load(self.model, self.dtype)
        tokenizer = around.on_its_day(ChatConfig(variables=self.chat_variables).apply(load_tokenizer(self.model)))

        def text(prompt: str, *answers: str) -> str:
            return _as_text(tokenizer, template, wording.question(prompt, *answers), "direct")

        labels = {value: label for label, value in template.labels}
        values = (1.0, 0.0, 0.5) if self.reasoning else (1.0, 0.0)  # a [direct] section names no tie
        reasoning = _reasoning(tokenizer, wording, self.reasoning) if self.reasoning else None
        judge = LanguageModelJudge(
            model,
            params,
            tokenizer,
            around.runner,
            pairwise_prompt=text,
            score_prompt=text,
            verdicts=tuple(labels[x] for x in values if x in labels) if form == "ranking" else ("1", "2"),
            scale=template.labels,
            reasoning=reasoning,
            pairwise_reasoning=reasoning,
            batch_size=self.batch_size * around.runner.devices,
            max_length=min(self.max_length or 2048, model.config.context_length),
            min_mass=self.min_mass,
        )
        return judge, wording

    def build(self, around: Surroundings) -> FeedbackSource:
        """Returns the source: its judgements go to the run's store."""
        judge, wording = self._judge(around, self.form)
        reasoning = (f"reasoning={self.reasoning}",) if self.reasoning else ()
        name = " ".join((Path(self.model).name, *reasoning, *self.chat_variables))
        rater = around.raters[self] = Rater(name, "ai", judge.hash, wording.template.hash)
        against = self.against if self.form == "ranking" else ""
        return RecordedJudgeSource(judge, rater, around.store, wording.principle, against)

    def reasons(self, around: Surroundings) -> Reasons:
        """Returns how the built judge came to its judgements: its reasons, the labels' probabilities."""
        wording = _wording(self.form, self.template, self.principle, self.constitution, around.seed)
        labels = [label for label, _ in wording.template.labels]

        def words(own: Mapping[tuple[int, ...], Judgement], other: str) -> str:
            forward, swapped, rating = own.get((0, 1)), own.get((1, 0)), own.get(())
            if isinstance(forward, Ranking) and isinstance(swapped, Ranking):
                return ranking_words(forward, swapped, other)
            return rating_words(rating, labels) if isinstance(rating, Rating) else ""

        return _from_store(self, around, wording, lambda question: around.raters[self], words)

    def comparer(self, around: Surroundings) -> Compare:
        """Returns the judge as a function that compares answers in both orders."""
        only = self if self.form == "ranking" else dataclasses.replace(self, template=None)
        judge, _ = only._judge(around, "ranking")

        def compare(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Verdicts:
            found = judge.compare(prompts, first, second)
            agree = (found.forward > 0.5) == (found.swapped < 0.5)
            mass = np.where(found.mass > 0, found.mass, np.nan)  # 0: the question is too long
            return Verdicts(found.probability, agree, (found.forward + found.swapped) / 2, found.valid, mass)

        return compare


def _reasoning(tokenizer: Tokenizer, wording: _Wording, max_tokens: int) -> Reasoning:
    """Returns how a judge writes reasons: by the template's [reasons], up to the line of its verdict.

    The judge's own line is left out, and the template's, up to the label, is put after the reasons: also after those that
    were cut.
    """
    template = wording.template
    require(
        template.reasoned and bool(template.verdict),
        f"template {template.name}: no [reasons] section that ends with a verdict; reasoning={max_tokens} needs one",
    )

    def ask(*texts: str) -> str:
        return _as_text(tokenizer, template, wording.question(*texts), "reasons")

    def before_label(texts: tuple[str, ...], reasons: str) -> str:
        question = wording.question(*texts)
        nonce = template.render(question, tuple(range(len(question.answers))), ending="reasons").nonce
        line, _ = template.verdict_frame(nonce)
        own = list(re.finditer(loose(line), reasons, re.IGNORECASE)) if line.strip() else []
        return f"{ask(*texts)}{reasons[: own[-1].start()] if own else reasons}".rstrip() + f"\n{line}"

    return Reasoning(ask, "", max_tokens, before_label)


def _as_text(tokenizer: Tokenizer, template: Template, question: Question, ending: Literal["direct", "reasons"]) -> str:
    """Returns a question as the text before its label or reasons, by the chat template where there is one."""
    messages = template.render(question, tuple(range(len(question.answers))), ending=ending).messages
    chat = chat_tokenizer(tokenizer)
    if chat is not None:
        try:
            return chat.chat_text(messages)
        except UserError:  # many templates know no system message
            return chat.chat_text([{"role": "user", "content": "\n\n".join(m["content"] for m in messages)}])
    return "\n\n".join(message["content"] for message in messages) + "\n\nAnswer: "


@dataclasses.dataclass(frozen=True)
class ApiReward(ApiConfig):
    """A model behind an OpenAI-compatible server. Replies are kept: no judgement is paid for twice.

    Attributes:
        form: rating: each answer alone; ranking: against another answer, in both orders.
        against: of a ranking, the field of the prompt's record with the other answer; `baseline` is what the policy
            answered before training.
        principle: the criterion, a sentence; "" = the template's.
        constitution: a constitution file, of which a principle is drawn for each prompt.
        template: a template file; None = the built-in one.
    """

    form: Form = "rating"
    against: str = BASELINE
    principle: str = ""
    constitution: Path | None = None
    template: Path | None = None

    @property
    def needs_baseline(self) -> bool:
        """Returns whether answers are compared with what the policy answered before training."""
        return self.form == "ranking" and self.against == BASELINE

    def build(self, around: Surroundings) -> FeedbackSource:
        """Returns the source: its judgements go to the run's store."""
        wording = _wording(self.form, self.template, self.principle, self.constitution, around.seed)
        judge = around.api_judge(self)

        def question(record: Any, answer: str) -> Question | Missing:
            if self.form == "rating":
                return wording.question(str(record["prompt"]), answer)
            other = other_answer(record, self.against)
            return other if isinstance(other, Missing) else wording.question(str(record["prompt"]), answer, other)

        return ApiJudgeSource(judge, wording.template, question)

    def reasons(self, around: Surroundings) -> Reasons:
        """Returns what the judge wrote about answers, read from the store."""
        wording = _wording(self.form, self.template, self.principle, self.constitution, around.seed)
        judge = around.api_judge(self)

        def words(own: Mapping[tuple[int, ...], Judgement], other: str) -> str:
            if self.form == "rating":
                return next((entry.raw for entry in own.values()), "")
            return reply_words(own[0, 1], own[1, 0], other) if len(own) == 2 else ""

        return _from_store(self, around, wording, lambda question: judge.rater(question, wording.template), words)

    def comparer(self, around: Surroundings) -> Compare:
        """Returns the judge as a function that compares answers in both orders."""
        wording = _wording(
            "ranking", self.template if self.form == "ranking" else None, self.principle, self.constitution, around.seed
        )
        judge = around.api_judge(self)

        def compare(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Verdicts:
            questions = [wording.question(*texts) for texts in zip(prompts, first, second)]
            outcomes = judge.judge(questions, wording.template)
            found = [outcome.preference for outcome in outcomes]
            masses = [np.array([entry.label_mass for entry in outcome.judgements], float) for outcome in outcomes]
            return Verdicts(
                np.array([0.5 if p is None else p.probability for p in found]),
                np.array([p is not None and p.consistent for p in found]),
                np.array([0.5 if p is None or p.bias is None else 1 / (1 + np.exp(-p.bias)) for p in found]),
                np.array([p is not None for p in found]),
                np.array([of_pair.min() for of_pair in masses]),  # NaN where one is None
            )

        return compare
