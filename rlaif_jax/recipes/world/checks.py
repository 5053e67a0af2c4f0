"""Held-out checks of the world's models: has a model learned what its stage is for?

A check compares the words that a model would write with those of texts about towns that no model has seen. The texts are of
simulated people who err rarely; no gold score and no policy's answer is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.config import require
from rlaif_jax.data.text import text_arrays
from rlaif_jax.data.tokenizers import Tokenizer
from rlaif_jax.data.world.corpus import Transcript
from rlaif_jax.data.world.scenes import SALIENCE_WORDS, VALUES
from rlaif_jax.feedback.judges.batching import in_batches
from rlaif_jax.models import CausalLM
from rlaif_jax.parallel import Runner
from rlaif_jax.types import Params

LEAST = 20  # occurrences of a kind; a rarer kind is left out
FACTS: Mapping[str, frozenset[str]] = {
    "values": frozenset(VALUES),
    "salience": frozenset(SALIENCE_WORDS),
    "claims": frozenset(("yes", "no")),
}
"""What a base model should know: the value of an aspect, its salience, whether a claim is true."""
NOTES: Mapping[str, frozenset[str]] = {
    "salience": frozenset(SALIENCE_WORDS),
    **{word: frozenset((word,)) for word in ("right", "again", "leak", "fine")},
}
"""What a labeler should note on a claim. False claims ("wrong") take small models several times as long as everything else,
and these policies hardly make any, so a labeler is not held up by them."""


def next_words(
    model: CausalLM, params: Params, batch: dict[str, jax.Array], *, axis_name: str | None = None
) -> jax.Array:
    """Returns the likeliest token after each prefix, [B, S] int32.

    Args:
        model: the language model.
        params: its parameters.
        batch: `tokens` [B, S] int32 and `mask` [B, S] bool, right padded.
        axis_name: not used; `Runner.map` passes it.
    """
    del axis_name
    hidden = model.sequence_hidden(params, batch["tokens"], batch["mask"])
    return jnp.argmax(model.logits(params, hidden), axis=-1).astype(jnp.int32)


class WordCheck:
    """How often a model writes the right word, by kind of word: parameters -> share right of each kind.

    Args:
        model: the language model.
        tokenizer: of the world's words.
        runner: the devices.
        texts: the transcripts; their target words are checked, each after the true words before it.
        kinds: the kinds of words; other words are not checked.
        length: tokens that a text is padded to.
        once: words that a list should not name twice, checked as the kind "unsaid": what the model writes in place of one
            is right unless the list has named it.

    Raises:
        UserError: no kind of words occurs `LEAST` times in the texts.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        runner: Runner,
        texts: Sequence[Transcript],
        kinds: Mapping[str, frozenset[str]],
        length: int,
        once: frozenset[str] = frozenset(),
    ) -> None:
        self._model, self._runner = model, runner
        arrays = text_arrays(tokenizer, [[(word, 1.0) for word in text.text.split()] for text in texts], length=length)
        self._batch = {name: arrays[name] for name in ("tokens", "mask")}
        places: dict[str, list[tuple[int, int]]] = {kind: [] for kind in kinds}
        for row, text in enumerate(texts):
            words = text.text.split()
            for kind, column in ((k, t) for t in text.targets for k, of in kinds.items() if words[t] in of):
                places[kind].append((row, column))
        self._places = {kind: np.array(found).T for kind, found in places.items() if len(found) >= LEAST}
        self._lists: list[tuple[int, int, set[int]]] = []
        for row, text in enumerate(texts):
            words = text.text.split()
            for column in text.targets:
                if words[column] in once:
                    said = {tokenizer.token_id(word) for word in words[text.targets[0] - 2 : column] if word in once}
                    self._lists.append((row, column, said))
        require(
            bool(self._places or self._lists),
            f"a check needs texts that hold {LEAST} words of a kind ({', '.join(kinds)}); {len(texts)} texts do not",
        )

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        return self._runner.map(partial(next_words, self._model))

    def __call__(self, params: Params) -> dict[str, float]:
        """Returns the share of right words of each kind that occurs often enough, in [0, 1]."""
        written = in_batches(partial(self._compiled, self._runner.place(params)), self._batch, 128)
        tokens = self._batch["tokens"]
        right = {
            kind: float(np.mean(written[rows, columns - 1] == tokens[rows, columns]))
            for kind, (rows, columns) in self._places.items()
        }
        if self._lists:
            right["unsaid"] = float(np.mean([written[row, at - 1] not in said for row, at, said in self._lists]))
        return right
