"""Held-out checks of the world's models: shares of hand-made texts, by a model that knows one next word for each word."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.data.tokenizers import word_level_tokenizer
from rlaif_jax.data.world.corpus import Transcript, base_corpus
from rlaif_jax.data.world.scenes import ASPECTS
from rlaif_jax.data.world.tasks.summarisation import TASK
from rlaif_jax.data.world.vocabulary import SPECIALS, VOCABULARY
from rlaif_jax.models import CausalLM
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.parallel import JitRunner, PmapRunner, Runner
from rlaif_jax.recipes.world.checks import FACTS, LEAST, NOTES, WordCheck, next_words
from rlaif_jax.recipes.world.models import ModelsConfig, WorldModels
from rlaif_jax.run import FinishedStage
from tests.helpers import random_params

TOKENIZER = word_level_tokenizer(VOCABULARY[len(SPECIALS) :])


@dataclasses.dataclass(frozen=True)
class Bigrams:
    """A language model whose parameters name the next token of each token."""

    def sequence_hidden(self, params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return params["next"][tokens]

    def logits(self, params: Any, hidden: jax.Array) -> jax.Array:
        return jax.nn.one_hot(hidden, TOKENIZER.vocab_size)


def bigrams(**following: str) -> dict[str, jax.Array]:
    """Returns parameters of `Bigrams`; after every other word comes the padding."""
    table = np.zeros(TOKENIZER.vocab_size, np.int32)
    for word, after in following.items():
        table[TOKENIZER.token_id(word)] = TOKENIZER.token_id(after)
    return {"next": jnp.asarray(table)}


def transcript(given: str, *parts: str) -> Transcript:
    """Returns a text of which the model writes every second part, the first of `parts` being written."""
    words, targets = given.split(), []
    for number, part in enumerate(parts):
        if number % 2 == 0:
            targets += range(len(words), len(words) + len(part.split()))
        words += part.split()
    return Transcript(" ".join(words), "value_questions", tuple(targets))


def check(texts: list[Transcript], once: frozenset[str] = frozenset(), runner: Runner | None = None, **kinds: str):
    named = {kind: frozenset(words.split()) for kind, words in kinds.items()}
    return WordCheck(Bigrams(), TOKENIZER, runner or JitRunner(), texts, named, 24, once)


GIVEN = "summarise bren dal : mill old vital inn warm minor <fact>"
LISTS = [  # the words that are written: a value and its salience, then each time an aspect, its value and salience
    *[transcript(f"{GIVEN} mill", "old vital inn warm minor")] * 15,
    *[transcript(f"{GIVEN} inn", "warm minor mill old vital")] * 9,
]


@pytest.mark.parametrize("runner", [JitRunner, PmapRunner])
def test_shares_are_exact(runner):
    """All 24 times "warm" follows "inn"; "vital" follows "old" in all texts, "minor" never follows "warm" here."""
    found = check(LISTS, runner=runner(), values="old warm", salience="vital minor", aspects="mill inn")(
        bigrams(mill="old", inn="warm", old="vital", warm="notable", vital="inn")
    )
    # Aspects that are written: "inn" after "vital" in 15 texts, which is right; "mill" after "minor" in 9, which is not.
    assert found == {"values": 1.0, "salience": 0.5, "aspects": 15 / 24}


def test_only_targets_count():
    """The facts of the prompt hold each value once more, where this model is right; it is wrong where it writes."""
    texts = [transcript("mill old <fact> inn", "old")] * LEAST
    assert check(texts, values="old")(bigrams(mill="old", inn="warm")) == {"values": 0.0}
    assert check(texts, values="old")(bigrams(mill="warm", inn="old")) == {"values": 1.0}


def test_rare_kinds_are_left_out():
    texts = [transcript("mill <check> inn old", "warm", "mill old", "yes")] * (LEAST - 1)
    one_more = transcript("mill <check> inn old", "warm")
    found = check([*texts, one_more], values="warm", claims="yes no")(bigrams(old="warm"))
    assert found == {"values": 1.0}
    with pytest.raises(UserError, match=rf"{LEAST} words of a kind \(values, claims\); 19 texts"):
        check(texts, values="warm", claims="yes no")


def test_an_aspect_that_was_named_is_not_written_again():
    """The list begins with the aspect of the first question; what the prompt names before it does not count."""
    once = frozenset(ASPECTS)
    first, second = LISTS[0], LISTS[-1]
    share = lambda texts, **following: check(texts, once)(bigrams(**following))["unsaid"]
    assert share([first], vital="mill") == 0.0
    assert share([first], vital="inn") == 1.0
    assert share([first], vital="river") == 1.0, "false, but not a repeat"
    assert share([second], minor="inn") == 0.0
    longer = transcript(
        "mill old vital <check> mill warm", "old no", "inn warm", "warm minor river", "wide", "wide yes"
    )
    assert longer.targets == (6, 7, 10, 11, 12, 14, 15)
    assert share([longer], minor="mill") == 0.0
    assert share([longer], minor="inn") == 0.0
    assert share([longer], minor="river") == 1.0
    assert share([first, first, first, second], vital="mill", minor="mill") == 0.25


def test_words_are_the_likeliest_of_a_real_model():
    model = CausalLM(small_decoder(12, num_layers=1, width=16, num_heads=2, context_length=8))
    params = random_params(model)
    tokens = np.random.default_rng(0).integers(0, 12, (3, 6)).astype(np.int32)
    mask = np.arange(6) < np.array([[6], [4], [5]])
    want = jax.jit(model)(params, tokens, mask).argmax(-1)
    got = jax.jit(lambda p, batch: next_words(model, p, batch))(params, {"tokens": tokens, "mask": mask})
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, want)
    assert len(np.unique(got[mask])) > 3


def test_texts_of_the_world_hold_every_kind():
    texts = base_corpus(np.random.default_rng(0), 64, tasks=(TASK,), questions=1.0, yes_no=0.5)
    known = WordCheck(Bigrams(), TOKENIZER, JitRunner(), texts, FACTS, 64, frozenset(ASPECTS))(bigrams())
    assert known == {"values": 0.0, "salience": 0.0, "claims": 0.0, "unsaid": 1.0}
    assert {"salience", "right", "again", "leak", "fine"} == set(NOTES)


def test_a_model_that_has_not_learned_is_called_out():
    warned: list[str] = []
    run = SimpleNamespace(metrics={}, warn=warned.append)
    world: Any = WorldModels(TASK, False, ModelsConfig(), run, SimpleNamespace(), JitRunner())  # type: ignore[arg-type]
    stage = FinishedStage("labeler-0", {})
    world.report_check("labeler", stage, lambda params: {"again": 0.9, "right": 0.95}, 0.9)
    assert warned == []
    assert run.metrics == {"labeler_check_again": 0.9, "labeler_check_right": 0.95}
    world.report_check("base", stage, lambda params: {"values": 0.4, "claims": 0.95}, 0.9)
    assert len(warned) == 1
    assert "base model has not learned" in warned[0]
    assert "values 0.40" in warned[0]
    assert "claims" not in warned[0]
    assert "Try: another seed, or a larger models.base.updates" in warned[0]
