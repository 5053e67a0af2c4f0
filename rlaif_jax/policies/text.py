"""Text: a policy whose answer is drawn token by token, up to a stop token or a length limit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.config import require
from rlaif_jax.data.tokenizers import Tokenizer, check_tokenizer
from rlaif_jax.models.base import LanguageModel, Rules, View
from rlaif_jax.models.decoder import in_dtype
from rlaif_jax.models.lora import LoRAConfig, joined
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import Runner, on_own_rows
from rlaif_jax.policies.base import Draw, Scores
from rlaif_jax.policies.decoding import Decoding, StopIds, decode_all, decode_in_slots, stop_ids
from rlaif_jax.types import Frozen, Params, Prompts, Rollout


@dataclasses.dataclass(frozen=True)
class TextPolicy:
    """A `Policy` that answers in text.

    Attributes:
        model: decoder or encoder-decoder.
        sampling: how answers are drawn.
        eos_id: the tokenizer's stop token or tokens (`stop_ids`); none: answers end at the length limit only.
        pad_id: the tokenizer's pad token.
        lora: None: the parameters are the model's. Else they are an adapter of `Frozen.base`, and a reference is one, too:
            an empty dict where the reference is the base alone.
    """

    model: LanguageModel
    sampling: SamplingConfig
    eos_id: StopIds
    pad_id: int
    lora: LoRAConfig | None = None

    @property
    def rules(self) -> Rules:
        """Returns how matrices are split over a mesh."""
        return self.model.rules

    @property
    def tolerance(self) -> float:
        """Returns the largest gap in nats that rounding explains."""
        return 1e-3 if self.model.compute_dtype == "float32" else 5e-2

    @property
    def reads_packed(self) -> bool:
        """Returns whether the model reads rows of several sequences."""
        return self.model.reads_packed

    def check(self, prompt_length: int, tokenizer: Tokenizer) -> None:
        """Raises UserError where lengths, tokenizer or sampling do not fit a policy that learns.

        Args:
            prompt_length: P in tokens, padding included.
            tokenizer: its vocabulary, EOS and padding are compared with those of the policy.
        """
        check_tokenizer(tokenizer, self.model.vocab_size, "the policy")
        require(
            (set(stop_ids(self.eos_id)), self.pad_id) == (set(tokenizer.stop_ids), tokenizer.pad_id),
            f"the policy stops at token {_listed(self.eos_id)} and pads with {self.pad_id}, the tokenizer's are "
            f"{_listed(tokenizer.stop_ids)} and {tokenizer.pad_id}: build both from the same tokenizer (stop_ids, pad_id)",
        )
        self.model.check_lengths(prompt_length, self.sampling.max_new_tokens)
        require(self.sampling.temperature > 0, "sampling.temperature is 0 (greedy): a policy learns only from samples")
        # The update knows the log-probs of the whole distribution, not those of the tokens that were left to draw from.
        for name, value, whole in (("top_k", self.sampling.top_k, 0), ("top_p", self.sampling.top_p, 1.0)):
            require(
                value == whole,
                f"sampling.{name} is {value}: a policy learns only from answers that are drawn from its whole distribution. "
                f"Set sampling.{name}={whole}; a lower sampling.temperature makes answers surer, too",
            )

    def empty_rollout(self, rows: int, prompt_length: int) -> Rollout:
        """Returns a rollout of zeros with the shapes of `rows` answers to prompts of `prompt_length` tokens."""
        length = self.sampling.max_new_tokens
        return Rollout(
            tokens=jnp.zeros((rows, prompt_length + length), jnp.int32),
            prompt_mask=jnp.zeros((rows, prompt_length), bool),
            response_mask=jnp.zeros((rows, length), bool),
            logprobs=jnp.zeros((rows, length)),
            finished=jnp.zeros(rows, bool),
        )

    def sample(
        self, params: Params, frozen: Frozen, prompts: Prompts, key: jax.Array, draws: tuple[Draw, ...]
    ) -> Rollout:
        """Draws answers to B prompts: B K rows, those of a prompt consecutive and in the order of `draws`.

        Args:
            params: the policy's parameters.
            frozen: its reference answers the draws by "reference"; its base has the weights under an adapter.
            prompts: [B, P].
            key: one key for the whole step; every answer derives its own from it, the prompt's uid and its index.
            draws: who answers, how often.
        """
        # Merged once: every step of decoding would pay for the adapter's small products. The gap to `score` is rounding's.
        parts, first, weights = [], 0, partial(self.weights, frozen=frozen, merge=True)
        for draw in draws:
            parts.append(
                generate(
                    self.model,
                    weights(params if draw.by == "policy" else frozen.reference),
                    prompts,
                    key,
                    sampling=dataclasses.replace(self.sampling, temperature=0.0) if draw.greedy else self.sampling,
                    answers=draw.count,
                    eos_id=self.eos_id,
                    pad_id=self.pad_id,
                    first_answer=first,
                )
            )
            first += draw.count
        if len(parts) == 1:
            return parts[0]
        count = prompts.tokens.shape[0]
        by_prompt = lambda *xs: jnp.concatenate([x.reshape(count, -1, *x.shape[1:]) for x in xs], axis=1)
        return jax.tree.map(lambda *xs: by_prompt(*xs).reshape(-1, *xs[0].shape[1:]), *parts)

    def score(self, params: Params, frozen: Frozen, view: View, *, entropy: bool = False) -> Scores:
        """Computes log-probs, entropies and hidden states of every target of `view`.

        Args:
            params: the policy's parameters.
            frozen: its base has the weights under an adapter.
            view: padded or packed sequences.
            entropy: whether to compute entropies; they are 0 otherwise.

        Returns:
            Log-probs (nats, at the sampling temperature) and entropies in the layout of `view.targets`, float32.
        """
        params = self.weights(params, frozen)
        hidden = self.model.hidden(params, view)
        logprobs, entropies = self.model.token_logprobs(
            params, hidden, view.targets, self.sampling.temperature, entropy=entropy
        )
        return Scores(logprobs, entropies, hidden)

    def weights(self, params: Params, frozen: Frozen, *, merge: bool = False) -> Params:
        """Returns the parameters that the model reads, an adapter joined with its base.

        Args:
            params: the policy's parameters, or the reference's.
            frozen: its base has the weights under an adapter.
            merge: add the adapter to the base's matrices instead; for passes without gradients.

        Raises:
            UserError: an adapter without a base, or the other way round.
        """
        require(
            self.lora is not None or frozen.base is None,
            "a base was given, but the policy has no adapter: set its `lora`, or leave `base` out",
        )
        return joined(self.lora, frozen.base, params, merge=merge)

    def texts(self, rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
        """Returns the B answers of a rollout as text, decoded by `tokenizer`; see `answer_texts`."""
        return answer_texts(rollout, tokenizer)

    def checks(self, rollout: Rollout) -> dict[str, bool]:
        """Returns whether the last token in the mask of every finished answer is a stop token."""
        tokens, mask, finished = jax.device_get((rollout.responses, rollout.response_mask, rollout.finished))
        last = tokens[np.arange(len(tokens)), mask.sum(-1) - 1]
        return {"eos_is_kept_in_the_mask": bool(np.isin(last[finished], stop_ids(self.eos_id)).all())}


def generate(
    model: LanguageModel,
    params: Params,
    prompts: Prompts,
    key: jax.Array,
    *,
    sampling: SamplingConfig,
    answers: int = 1,
    eos_id: StopIds,
    pad_id: int,
    first_answer: int = 0,
) -> Rollout:
    """Draws `answers` answers to every prompt; the B K rows are ordered prompt by prompt.

    An answer ends with a stop token or at sampling.max_new_tokens; columns after the end hold `pad_id`.

    Args:
        model: the model.
        params: its parameters.
        prompts: [B, P].
        key: the same for the whole batch: every answer derives its own from it, the prompt's uid and the answer index.
        sampling: temperature, truncation, length and slots.
        answers: K.
        eos_id: the stop token or tokens; none: no answer stops before the length limit.
        pad_id: the pad token.
        first_answer: index of the first answer, from which random numbers are derived.
    """

    def on_device(replicated: tuple[Params, jax.Array], prompts: Prompts) -> Rollout:
        params, key = replicated
        rows = prompts.tokens.shape[0] * answers
        slots = sampling.slots
        decode = partial(decode_in_slots, slots=slots) if 0 < slots < rows else decode_all
        how = Decoding(sampling, answers, eos_id, pad_id, first_answer)
        drawn = decode(model, params, prompts, key, how)
        return Rollout(
            tokens=jnp.concatenate([prompts.tokens.repeat(answers, axis=0), drawn.tokens], axis=1),
            prompt_mask=prompts.mask.astype(bool).repeat(answers, axis=0),
            response_mask=drawn.mask,
            logprobs=drawn.logprobs,
            finished=drawn.finished,
        )

    # No step casts the matrices then, and a mesh gathers half the bytes.
    return on_own_rows(on_device, (in_dtype(params, model.compute_dtype), key), prompts)


def _listed(eos_id: StopIds) -> str:
    return " or ".join(map(str, stop_ids(eos_id))) or "None"


def answer_texts(rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
    """Returns the B answers of a rollout as text, without the stop token.

    White space at both ends is stripped.

    Args:
        rollout: B answers.
        tokenizer: decodes their tokens.
    """
    tokens, mask, finished = jax.device_get((rollout.responses, rollout.response_mask, rollout.finished))
    lengths = mask.sum(-1) - finished
    return [tokenizer.decode(row[:length].tolist()).strip() for row, length in zip(tokens, lengths)]


def make_generator(
    runner: Runner,
    model: LanguageModel,
    tokenizer: Tokenizer,
    sampling: SamplingConfig,
    answers: int = 1,
) -> Callable[[tuple[Params, jax.Array], Prompts], Rollout]:
    """Returns `generate` compiled for use outside the loop: call it with ((params, key), prompts).

    Args:
        runner: the devices.
        model: the model.
        tokenizer: gives the stop tokens and the pad token.
        sampling: temperature, truncation and length.
        answers: K.
    """

    def run(replicated: tuple[Params, jax.Array], prompts: Prompts, *, axis_name: str | None = None) -> Rollout:
        params, key = replicated
        return generate(
            model,
            params,
            prompts,
            key,
            sampling=sampling,
            answers=answers,
            eos_id=tokenizer.stop_ids,
            pad_id=tokenizer.pad_id,
        )

    return runner.map(run)
