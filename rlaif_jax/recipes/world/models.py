"""The models of the text world: a base language model, an AI labeler, a supervised policy.

Each is a stage of a run: made once, kept, and read back by a resumed run and by runs that share the folder of stages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from rlaif_jax.algorithms.fit import Arrays, FitConfig, UntilConfig, fit_model, fit_until
from rlaif_jax.algorithms.optimizer import OptimizerConfig
from rlaif_jax.algorithms.ppo import PPOConfig
from rlaif_jax.algorithms.supervised import supervised_step
from rlaif_jax.config import require
from rlaif_jax.data.prompts import PromptBatch, PromptIterator, Record, prompt_batches
from rlaif_jax.data.readers import TfdsRecords
from rlaif_jax.data.text import Segments, packed_text_arrays
from rlaif_jax.data.tokenizers import HuggingFaceTokenizer, word_level_tokenizer
from rlaif_jax.data.world import corpus, labeler_prompts
from rlaif_jax.data.world.builder import load_world
from rlaif_jax.data.world.gold import scores as gold
from rlaif_jax.data.world.scenes import ASPECTS, Split, scene_from_json
from rlaif_jax.data.world.tasks.base import WorldTask
from rlaif_jax.data.world.vocabulary import SPECIALS, VOCABULARY
from rlaif_jax.feedback.judges.language_model import LanguageModelJudge, Reasoning
from rlaif_jax.metrics import MetricsWriter
from rlaif_jax.models import CausalLM
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.recall_heads import with_recall_heads
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import Runner
from rlaif_jax.policies.text import TextPolicy
from rlaif_jax.recipes.world.checks import FACTS, NOTES, WordCheck
from rlaif_jax.rewards.shaping import Shaping
from rlaif_jax.run import FinishedStage, Run
from rlaif_jax.types import INIT, Params, step_key

PROMPT_LENGTH, ANSWER_LENGTH, TRANSCRIPT_LENGTH = 32, 24, 76  # tokens
ROW, TRANSCRIPT_ROW = 64, 104  # columns of rows of texts, and of transcripts, behind one another
TEXTS_A_ROW = 2.25  # at most, on average
RANKINGS = {"summarisation": 0.4, "dialogue": 0.0}  # share of such lines in the base corpus
CHECKED = 512  # texts of a held-out check
SLACK = 0.05  # by which a check may fall in the cool-down without a warning

SAMPLING = SamplingConfig(max_new_tokens=ANSWER_LENGTH)
PPO = PPOConfig(
    num_epochs=2,
    num_minibatches=2,
    kl_coef=0.03,
    value_coef=1.0,
    shaping=Shaping(missing_eos="penalty"),
    policy_optimizer=OptimizerConfig(learning_rate=3e-4),
    value_optimizer=OptimizerConfig(learning_rate=1e-3),
)


@dataclasses.dataclass(frozen=True)
class StageConfig(FitConfig):
    """A supervised stage whose examples are made for it.

    Attributes:
        examples: number of examples.
    """

    examples: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.examples >= self.batch_size,
            f"a stage of batches of {self.batch_size} needs at least as many examples, not {self.examples}",
        )


@dataclasses.dataclass(frozen=True)
class ModelsConfig:
    """The size of the models and how they are trained.

    Attributes:
        num_layers: layers of all models.
        width: D, of the hidden states.
        num_heads: H, attention heads of a layer.
        head_dim: h, the width of a head.
        recall_heads: whether the base model's first parameters can look things up (`with_recall_heads`).
        questions: whether the base model's corpus has questions about facts and rankings, or demonstrations alone.
        reasons: whether the labeler writes its reasons before it scores, or scores at first sight.
        base: training of the base language model.
        labeler: training of the AI labeler, from the base model.
        sft: training of the supervised policy, from the base model.
    """

    num_layers: int = 3
    width: int = 64
    num_heads: int = 6
    head_dim: int = 16
    recall_heads: bool = True
    questions: bool = True
    reasons: bool = True
    base: UntilConfig = UntilConfig(updates=2_400, required=0.85, batch_size=16, learning_rate=2e-3)
    labeler: UntilConfig = UntilConfig(updates=2_000, required=0.9, cooldown=400, batch_size=16, learning_rate=2e-3)
    sft: StageConfig = StageConfig(updates=400, examples=12_800, batch_size=16, learning_rate=1e-3)

    def __post_init__(self) -> None:
        require(
            self.num_heads >= 2 or not self.recall_heads,
            f"models.num_heads must be >= 2 (recall heads are of two kinds), not {self.num_heads}",
        )


def world_tokenizer() -> HuggingFaceTokenizer:
    """Returns the tokenizer of the world's words."""
    return word_level_tokenizer(VOCABULARY[len(SPECIALS) :])


def world_model(size: ModelsConfig, tokenizer: HuggingFaceTokenizer) -> CausalLM:
    """Returns the shape of the world's models."""
    return CausalLM(
        small_decoder(
            tokenizer.vocab_size,
            num_layers=size.num_layers,
            width=size.width,
            num_heads=size.num_heads,
            head_dim=size.head_dim,
            context_length=128,
            qkv_bias=True,
            rope_theta=1e6,
        )
    )


def segments(transcript: corpus.Transcript, context: float = 0.0) -> Segments:
    """Returns a transcript's words with weights: 1 for what the labeler learns to write, else `context`.

    Args:
        transcript: the text and the indices of its words that are to be written.
        context: the weight of all other words.
    """
    targets = set(transcript.targets)
    return [(word, 1.0 if i in targets else context) for i, word in enumerate(transcript.text.split())]


@dataclasses.dataclass(frozen=True, eq=False)
class WorldModels:
    """One task of the world, the shape of its models, and the run that keeps them.

    Attributes:
        task: the task.
        shortcuts: whether the world's writers plant features that look like quality.
        config: size and training of the models.
        run: keeps the models as stages.
        writer: takes the metrics of the stages.
        runner: the devices.
        tokenizer: of the world's words.
    """

    task: WorldTask
    shortcuts: bool
    config: ModelsConfig
    run: Run
    writer: MetricsWriter
    runner: Runner
    tokenizer: HuggingFaceTokenizer = world_tokenizer()

    @property
    def model(self) -> CausalLM:
        """Returns the shape of all models."""
        return world_model(self.config, self.tokenizer)

    @property
    def template(self) -> Params:
        """Returns the shapes of the model's parameters."""
        return jax.eval_shape(self.model.init, jax.random.key(0))

    def policy(self, sampling: SamplingConfig) -> TextPolicy:
        """Returns the policy that draws answers by `sampling`; its parameters are kept apart."""
        return TextPolicy(self.model, sampling, self.tokenizer.stop_ids, self.tokenizer.pad_id)

    # ---- Data

    def records(self, split: Split) -> TfdsRecords:
        """Returns the scenes of a split."""
        return TfdsRecords(
            load_world(self.task, split, size=self.config.sft.examples, shortcuts=self.shortcuts),
            f"brindlemoor/{self.task.name}/{split}",
            None,
        )

    def prompts(self, records: TfdsRecords, batch_size: int, *, shuffle: bool = True) -> PromptIterator:
        """Returns an iterator over the prompts of a split.

        Args:
            records: the split.
            batch_size: prompts of a batch.
            shuffle: whether each pass is in another order; the run's seed gives the order.
        """
        return prompt_batches(
            records,
            self.tokenizer,
            batch_size=batch_size,
            seed=self.run.seed,
            prompt_length=PROMPT_LENGTH,
            shuffle=shuffle,
        )

    def first_prompts(self, records: TfdsRecords, count: int) -> PromptBatch:
        """Returns the first `count` prompts of `records`, a split, for evaluation."""
        return next(self.prompts(records, count, shuffle=False))

    def gold(self, records: Sequence[Record], answers: Sequence[str]) -> np.ndarray:
        """Returns the gold scores [B] of answers: a `Measure` for evaluations, never for judges.

        Args:
            records: the record of each answer's prompt, with its scene.
            answers: the B answers.
        """
        return gold.gold_scores(self.task, [scene_from_json(record["scene"]) for record in records], answers)

    # ---- Stages

    def stage_settings(self, **settings: Any) -> dict[str, Any]:
        """Returns what every stage of these models depends on, with the `settings` of one stage."""
        return {
            "task": self.task.name,
            "shortcuts": self.shortcuts,
            "model": self.model.config,
            "runner": type(self.runner).__name__,
            "devices": self.runner.devices,
            **settings,
        }

    def fit(
        self,
        name: str,
        step: Callable[..., Any],
        model: Any,
        start: Params,
        examples: Arrays,
        settings: FitConfig,
    ) -> Params:
        """Fits a model to examples and returns its parameters; the metrics go to the stage `name`.

        Args:
            name: of the stage.
            step: as `fit_model` takes it.
            model: the model.
            start: the parameters to start from.
            examples: arrays with a common first axis.
            settings: updates, batch size and optimiser.
        """
        with self.writer.stage(name, settings.updates) as log:
            self.run.settled()
            return fit_model(
                step,
                model,
                start,
                examples,
                settings,
                self.run.seed,
                runner=self.runner,
                log=log.write,
                stop=self.run.stopped,
            )

    def supervised(
        self,
        name: str,
        start: Params,
        examples: Sequence[Segments],
        settings: FitConfig,
    ) -> Params:
        """Returns parameters after maximum likelihood on texts.

        Args:
            name: of the stage.
            start: the parameters to start from.
            examples: the texts, each in parts with weights.
            settings: updates, batch size and optimiser.
        """
        arrays = packed_text_arrays(self.tokenizer, examples, length=ROW)
        return self.fit(name, supervised_step, self.model, start, arrays, settings)

    def learned(
        self,
        name: str,
        start: Params,
        texts: Callable[[int, int], Sequence[corpus.Transcript]],
        check: WordCheck,
        settings: UntilConfig,
        *,
        length: int,
        end_weight: float = 1.0,
    ) -> Params:
        """Returns parameters after maximum likelihood on fresh texts until `check` holds.

        Args:
            name: of the stage.
            start: the parameters to start from.
            texts: (round, number) -> that many texts.
            check: a held-out check of the model.
            settings: updates, checks and optimiser.
            length: columns of a row of texts.
            end_weight: weight of the stop token.
        """

        def examples(number: int, size: int) -> Arrays:
            lines = [segments(text) for text in texts(number, round(TEXTS_A_ROW * size))]
            rows = packed_text_arrays(self.tokenizer, lines, length=length, end_weight=end_weight)
            return {name: values[:size] for name, values in rows.items()}

        part = self.run.part
        with self.writer.stage(name, settings.updates + settings.cooldown, resume_from=part.done or None) as log:
            self.run.settled()
            return fit_until(
                supervised_step,
                self.model,
                start,
                examples,
                check,
                settings,
                runner=self.runner,
                log=log.write,
                stop=self.run.stopped,
                part=part,
            )

    def report_check(self, name: str, stage: FinishedStage, check: WordCheck, required: float) -> None:
        """Records how far a model has learned what its stage is for, and warns where it has not.

        Args:
            name: of the model, and of its settings in `ModelsConfig`.
            stage: the model.
            check: the held-out check.
            required: what its smallest value should be.
        """
        values = check(stage.params)
        self.run.metrics |= {f"{name}_check_{kind}": value for kind, value in values.items()}
        weak = [f"{kind} {value:.2f}" for kind, value in values.items() if value < required - SLACK]
        if weak:
            self.run.warn(
                f"The {name} model has not learned what it should ({', '.join(weak)} on its held-out check, "
                f"{required:.2f} asked for). Try: another seed, or a larger models.{name}.updates"
            )

    def base(self) -> FinishedStage:
        """Returns a language model of the world: scenes, demonstrations, questions about facts."""
        settings = self.config.base
        rankings, questions = (RANKINGS[self.task.name], 0.6) if self.config.questions else (0.0, 0.0)
        corpus_of = partial(corpus.base_corpus, tasks=(self.task,), shortcuts=self.shortcuts)
        rng = np.random.default_rng((self.run.seed, 10))
        held_out = corpus_of(
            rng, CHECKED, split="test_entities", questions=1.0, yes_no=0.5, rankings=RANKINGS[self.task.name]
        )
        check = WordCheck(self.model, self.tokenizer, self.runner, held_out, FACTS, ROW, frozenset(ASPECTS))

        def texts(number: int, size: int) -> Sequence[corpus.Transcript]:
            rng = np.random.default_rng((self.run.seed, 0, number))
            return corpus_of(rng, size, questions=questions, yes_no=0.4, rankings=rankings)

        def learn() -> Params:
            fresh = self.model.init(step_key(self.run.seed, 0, INIT))
            if self.config.recall_heads:
                fresh = with_recall_heads(self.model.config, fresh)
            return self.learned("lm", fresh, texts, check, settings, length=ROW)

        described = self.stage_settings(
            fit=settings, recall_heads=self.config.recall_heads, questions=self.config.questions
        )
        stage = self.run.stage("lm", self.template, learn, settings=described)
        self.report_check("base", stage, check, settings.required)
        return stage

    def labeler(self, base: FinishedStage, mix: corpus.LabelerMix) -> FinishedStage:
        """Returns the AI labeler: trained on simulated people's transcripts of training towns.

        Args:
            base: the base model.
            mix: shares of the kinds of transcripts.
        """
        settings = self.config.labeler
        corpus_of = partial(corpus.labeler_corpus, tasks=(self.task,), shortcuts=self.shortcuts)
        careful = corpus.only_reasons(mix)
        held_out = corpus_of(np.random.default_rng((self.run.seed, 11)), CHECKED, split="test_entities", mix=careful)
        check = WordCheck(self.model, self.tokenizer, self.runner, held_out, NOTES, TRANSCRIPT_LENGTH)
        end = 1.0 if mix.revision else 0.0  # a score is the last word; a revision has to learn where it ends

        def texts(number: int, size: int) -> Sequence[corpus.Transcript]:
            return corpus_of(np.random.default_rng((self.run.seed, 1, number)), size, mix=mix)

        def learn(base: Params) -> Params:
            return self.learned("labeler", base, texts, check, settings, length=TRANSCRIPT_ROW, end_weight=end)

        described = self.stage_settings(fit=settings, mix=mix)
        stage = self.run.stage("labeler", self.template, learn, settings=described, after=(base,))
        self.report_check("labeler", stage, check, settings.required)
        return stage

    def sft(self, base: FinishedStage, training: TfdsRecords) -> FinishedStage:
        """Returns the supervised policy: it imitates the demonstrations of a mediocre writer.

        Args:
            base: the base model.
            training: scenes with demonstrations.
        """

        def learn(base: Params) -> Params:
            examples: list[Segments] = [
                [(training[i]["prompt"], 0.0), (training[i]["demonstration"], 1.0)] for i in range(len(training))
            ]
            return self.supervised("sft", base, examples, self.config.sft)

        settings = self.stage_settings(fit=self.config.sft)
        return self.run.stage("sft", self.template, learn, settings=settings, after=(base,))

    def judge(self, labeler: Params, principle: labeler_prompts.WorldPrinciple) -> LanguageModelJudge:
        """Returns the labeler as a judge by one principle; it writes its reasons first where it learned to.

        Args:
            labeler: the parameters of the labeler.
            principle: the principle by which it compares and scores answers.
        """
        reasoning = Reasoning(partial(labeler_prompts.score_reasoning_prompt, principle), "<score>")
        return LanguageModelJudge(
            self.model,
            labeler,
            self.tokenizer,
            self.runner,
            pairwise_prompt=partial(labeler_prompts.pairwise_prompt, principle),
            score_prompt=partial(labeler_prompts.score_prompt, principle),
            verdicts=(labeler_prompts.VERDICTS[0], labeler_prompts.VERDICTS[1]),
            scale=tuple((s, float(i)) for i, s in enumerate(labeler_prompts.SCORES, 1)),
            reasoning=reasoning if self.config.reasons else None,
            max_length=TRANSCRIPT_LENGTH,
        )
