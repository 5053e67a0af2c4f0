"""Critique and revision under sampled principles: a writer corrects its own answers.

Constitutional AI, Bai 2022, section 3.1.

An answer is criticised by a principle that is drawn at random, then revised by the critique; the revision is
criticised in the next round. The prompt and the last revision are a supervised pair; every round is a
correction like one by a person.
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
from rlaif_jax.feedback.constitution.constitution import ConstitutionPrinciple
from rlaif_jax.feedback.judges.batching import check_batch_size, in_batches
from rlaif_jax.feedback.records.forms import Correction, Rater
from rlaif_jax.models.causal_lm import CausalLM
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import Runner
from rlaif_jax.policies.text import answer_texts, make_generator
from rlaif_jax.types import FEEDBACK, Params, Prompts, step_key

Writer = Callable[[Sequence[str]], Sequence[str | None]]
"""Any text generator: a continuation of each text, None where it is missing (a failed call, a refusal)."""


def critique_text(prompt: str, answer: str, principle: ConstitutionPrinciple) -> str:
    """Returns the text that a writer continues with its critique of an answer (Bai 2022, section 3.1).

    Args:
        prompt: the prompt of the answer.
        answer: the answer.
        principle: its `critique` asks for the critique.
    """
    return f"Human: {prompt}\n\nAssistant: {answer}\n\nCritique Request: {principle.critique}\n\nCritique:"


def revision_text(prompt: str, answer: str, critique: str, principle: ConstitutionPrinciple) -> str:
    """Returns the text that a writer continues with the revised answer.

    Args:
        prompt: the prompt of the answer.
        answer: the answer.
        critique: the critique of the answer.
        principle: its `revision` asks for the revision.
    """
    request = critique_text(prompt, answer, principle)
    return f"{request} {critique}\n\nRevision Request: {principle.revision}\n\nRevision:"


@dataclass(frozen=True)
class Revised:
    """One answer and its revisions.

    Attributes:
        prompt: the prompt.
        answers: the first answer and each revision.
        corrections: one record a round, with the status `error` where the writer gave no critique or no
            revision.
    """

    prompt: str
    answers: tuple[str, ...]
    corrections: tuple[Correction, ...]

    @property
    def pair(self) -> tuple[str, str] | None:
        """Returns the pair (prompt, last revision) to learn from; None without a revision."""
        return (self.prompt, self.answers[-1]) if len(self.answers) > 1 else None


def _digest(prompt: str, answer: str) -> int:
    """Hashes a prompt and an answer to 64 bits."""
    data = f"{len(prompt)}:{prompt}{answer}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(data).digest()[:8])


def draw_principle(
    principles: Sequence[ConstitutionPrinciple], prompt: str, answer: str, seed: int, step: int
) -> ConstitutionPrinciple:
    """Draws a principle by its weight.

    The draw depends on the seed, the round, the prompt and the answer alone, not on other answers of the
    batch.

    Args:
        principles: the principles to draw from.
        prompt: the prompt.
        answer: the answer that will be criticised.
        seed: the seed of the run.
        step: the number of the round.

    Raises:
        UserError: no principle has a weight above 0.
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
    principles: Sequence[ConstitutionPrinciple],
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    seed: int,
    rounds: int,
    rater: Rater,
    critique: Callable[[str, str, ConstitutionPrinciple], str] = critique_text,
    revision: Callable[[str, str, str, ConstitutionPrinciple], str] = revision_text,
) -> list[Revised]:
    """Criticises and revises each of B answers `rounds` times (Bai 2022 took 4).

    A round without a critique or a revision is recorded and leaves the answer as it was; the next round goes
    on from this answer by another principle.

    Args:
        write: is called twice a round with a text for every answer that can be continued.
        principles: the principles to draw from.
        prompts: the prompts [B].
        answers: the first answers [B].
        seed: draws the principles.
        rounds: how often each answer is revised.
        rater: the writer's identity in the records.
        critique: from (prompt, answer, principle) to the request for a critique.
        revision: from (prompt, answer, critique, principle) to the request for a revision.

    Raises:
        UserError: no principle can be drawn, or the writer did not return one text for each request.
    """
    require(len(prompts) == len(answers), f"{len(prompts)} prompts for {len(answers)} answers: expected one each")
    require(rounds >= 1, f"rounds must be >= 1, not {rounds}")
    chains = [[answer] for answer in answers]
    records: list[list[Correction]] = [[] for _ in answers]
    for step in range(rounds):
        drawn = [draw_principle(principles, prompt, answer, seed, step) for prompt, answer in zip(prompts, answers)]
        requests = [critique(p, chain[-1], by) for p, chain, by in zip(prompts, chains, drawn)]
        critiques = _written(write, requests)
        able = [i for i, text in enumerate(critiques) if text is not None]
        requests = [revision(prompts[i], chains[i][-1], critiques[i] or "", drawn[i]) for i in able]
        revisions = dict(zip(able, _written(write, requests)))
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
    """Returns the continuations without blanks around them; a blank continuation becomes None."""
    if not texts:
        return []
    written = list(write(texts))
    require(
        len(written) == len(texts), f"the writer gave {len(written)} texts for {len(texts)}: expected one each, or None"
    )
    return [text.strip() or None if text is not None else None for text in written]


@dataclass(frozen=True, eq=False)
class LanguageModelWriter:
    """A language model on these devices as a writer: it continues each text.

    A text gets the same continuation in any batch; another `seed` gives another
    continuation.

    Attributes:
        model, params, tokenizer: the language model's own.
        runner: runs the compiled function on all devices.
        sampling: how continuations are sampled.
        prompt_length: the greatest length of a text in tokens, BOS included; a longer text gets no
            continuation.
        batch_size: texts of one compiled call.
        seed: the seed of the sampling.
    """

    model: CausalLM
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
        check_batch_size("writer", self.batch_size, self.runner)

    @cached_property
    def _generate(self) -> Any:
        return make_generator(self.runner, self.model, self.tokenizer, self.sampling)

    def __call__(self, texts: Sequence[str]) -> list[str | None]:
        """Continues each text up to the stop token or the length limit; None for a text that is too long."""
        bos = self.tokenizer.bos_id is not None
        ids = [self.tokenizer.encode(self.tokenizer.quote(text), add_bos=bos) for text in texts]
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
