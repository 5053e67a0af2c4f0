"""Critique and revision under sampled principles: a writer corrects itself (Constitutional AI, Bai 2022, section 3.1).

An answer is criticised by one principle, drawn at random, then revised in the light of the critique, and so on with the
revision. The first answer and the last are a supervised pair; every step is a correction like one made by a person.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from rlaif_jax.config import require
from rlaif_jax.data.prompts import padded
from rlaif_jax.data.tokenizers import Tokenizer, check_tokenizer
from rlaif_jax.feedback.constitution.constitution import Principle
from rlaif_jax.feedback.judges.batching import in_batches
from rlaif_jax.feedback.records.forms import Correction, Rater
from rlaif_jax.models.heads import LanguageModel
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import Runner
from rlaif_jax.policies.text import answer_texts, make_generator
from rlaif_jax.types import FEEDBACK, Params, Prompts, step_key

Writer = Callable[[Sequence[str]], Sequence[str | None]]
"""Any text generator: a continuation of each text, None where there is none (a failed call, a refusal)."""


def critique_text(prompt: str, answer: str, principle: Principle) -> str:
    """What a writer continues with a critique (the wording of Bai 2022, section 3.1)."""
    return f"Human: {prompt}\n\nAssistant: {answer}\n\nCritique Request: {principle.critique}\n\nCritique:"


def revision_text(prompt: str, answer: str, critique: str, principle: Principle) -> str:
    """What a writer continues with the revised answer."""
    asked = critique_text(prompt, answer, principle)
    return f"{asked} {critique}\n\nRevision Request: {principle.revision}\n\nRevision:"


@dataclass(frozen=True)
class Revised:
    """What became of one answer.

    answers: the first one and each revision that was had; corrections: one record a round, status `error` where the
    writer gave no critique or no revision.
    """

    prompt: str
    answers: tuple[str, ...]
    corrections: tuple[Correction, ...]

    @property
    def pair(self) -> tuple[str, str] | None:
        """(prompt, final revision) to learn from; None if no revision was had."""
        return (self.prompt, self.answers[-1]) if len(self.answers) > 1 else None


def _digest(prompt: str, answer: str) -> int:
    """64 bits of a prompt and an answer."""
    data = f"{len(prompt)}:{prompt}{answer}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(data).digest()[:8])


def draw_principle(principles: Sequence[Principle], prompt: str, answer: str, seed: int, step: int) -> Principle:
    """A principle drawn by its weight from (seed, round, prompt and answer), whatever else is revised beside it.

    Raises:
        UserError: there is none to draw.
    """
    weights = np.array([principle.weight for principle in principles], float)
    require(
        bool(weights.sum() > 0),
        "no principle to revise by: the constitution has no [[principle]] with a weight above 0",
    )
    generator = np.random.default_rng([seed, step, _digest(prompt, answer)])
    return principles[int(generator.choice(len(principles), p=weights / weights.sum()))]


def critique_revision(
    write: Writer,
    principles: Sequence[Principle],
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    seed: int,
    rounds: int,
    rater: Rater,
    critique: Callable[[str, str, Principle], str] = critique_text,
    revision: Callable[[str, str, str, Principle], str] = revision_text,
) -> list[Revised]:
    """Criticise and revise each of B answers `rounds` times (Bai 2022 took 4).

    write: is called twice a round with a text for every answer still to be done. A round without a critique or a
    revision is recorded and leaves the answer as it was; the next round goes on from there by another principle.
    rater: who writes, for the records. critique, revision: the wording of the requests.

    Raises:
        UserError: no principle, or a writer that returns another number of texts than it was asked for.
    """
    require(len(prompts) == len(answers), f"{len(prompts)} prompts for {len(answers)} answers: expected one each")
    require(rounds >= 1, f"rounds must be >= 1, not {rounds}")
    chains = [[answer] for answer in answers]
    records: list[list[Correction]] = [[] for _ in answers]
    for step in range(rounds):
        drawn = [draw_principle(principles, prompt, answer, seed, step) for prompt, answer in zip(prompts, answers)]
        asked = [critique(p, chain[-1], by) for p, chain, by in zip(prompts, chains, drawn)]
        critiques = _written(write, asked)
        able = [i for i, text in enumerate(critiques) if text is not None]
        asked = [revision(prompts[i], chains[i][-1], critiques[i] or "", drawn[i]) for i in able]
        revisions = dict(zip(able, _written(write, asked)))
        for i, prompt in enumerate(prompts):
            revised = revisions.get(i)
            records[i].append(
                Correction(
                    prompt=prompt,
                    answers=(chains[i][-1],),
                    rater=rater,
                    principle=drawn[i].name,
                    edited=revised,
                    raw=critiques[i] or "",
                    seed=seed,
                    status="error" if revised is None else "ok",
                )
            )
            if revised is not None:
                chains[i].append(revised)
    return [Revised(*row) for row in zip(prompts, map(tuple, chains), map(tuple, records))]


def _written(write: Writer, texts: Sequence[str]) -> list[str | None]:
    """The continuations without blanks around them; a blank one is none."""
    if not texts:
        return []
    written = list(write(texts))
    require(
        len(written) == len(texts), f"the writer gave {len(written)} texts for {len(texts)}: expected one each, or None"
    )
    return [text.strip() or None if text is not None else None for text in written]


@dataclass(frozen=True, eq=False)
class LanguageModelWriter:
    """A language model on these devices as a writer: it continues each text in its own words.

    The same text gets the same continuation, whatever is written beside it; `seed` gives others. A text of more than
    `prompt_length` tokens (BOS included) gets none. Texts are continued `batch_size` at a time: one compiled shape.
    """

    model: LanguageModel
    params: Params
    tokenizer: Tokenizer
    runner: Runner
    sampling: SamplingConfig
    prompt_length: int
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        check_tokenizer(self.tokenizer, self.model.config.vocab_size, "the writer")
        longest = self.prompt_length + self.sampling.max_new_tokens
        require(
            longest <= self.model.config.context_length,
            f"writer.prompt_length ({self.prompt_length}) + sampling.max_new_tokens ({self.sampling.max_new_tokens}) = "
            f"{longest} is more than the model can read: {self.model.config.context_length} tokens",
        )
        require(
            self.batch_size >= 1 and self.batch_size % self.runner.devices == 0,
            f"writer.batch_size ({self.batch_size}) must be a multiple of the {self.runner.devices} devices",
        )

    @cached_property
    def _generate(self) -> Any:
        return make_generator(self.runner, self.model, self.tokenizer, self.sampling)

    def __call__(self, texts: Sequence[str]) -> list[str | None]:
        """The continuation of each text, up to the stop token or the length limit; None for a text that is too long."""
        bos = self.tokenizer.bos_id is not None
        ids = [self.tokenizer.encode(text, add_bos=bos) for text in texts]
        able = [i for i, tokens in enumerate(ids) if 0 < len(tokens) <= self.prompt_length]
        written: list[str | None] = [None] * len(texts)
        if not able:
            return written
        tokens, mask = padded([ids[i] for i in able], self.prompt_length, self.tokenizer.pad_id, "left")
        uid = np.array([_digest(texts[i], "") % 2**32 for i in able], np.uint32)
        generate = partial(self._generate, (self.params, step_key(self.seed, 0, FEEDBACK)))
        rollout = in_batches(generate, Prompts(tokens, mask, uid), self.batch_size)  # type: ignore[arg-type]
        for i, text in zip(able, answer_texts(rollout, self.tokenizer)):
            written[i] = text
        return written
