"""Critique and revision with a scripted writer: who asks what, what is kept, what a failed call leaves behind."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.data.tokenizers import word_level_tokenizer
from rlaif_jax.feedback.constitution.constitution import ConstitutionPrinciple
from rlaif_jax.feedback.constitution.revision import LanguageModelWriter, Revised, critique_revision, draw_principle
from rlaif_jax.feedback.records.forms import Rater, to_json
from rlaif_jax.feedback.records.parsing import from_json
from rlaif_jax.models import CausalLM
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.parallel import JitRunner, ParallelConfig, make_runner

RATER = Rater("writer", "ai")
PRINCIPLES = [ConstitutionPrinciple(name, name, f"C {name}?", f"R {name}!") for name in ("kind", "brief", "true")]


class Writer:
    """Critiques count up, revisions add a +; what `fails` says of a text fails."""

    def __init__(self, fails=lambda text: False):
        self.asked: list[list[str]] = []
        self.fails = fails

    def __call__(self, texts):
        self.asked.append(list(texts))
        return [None if self.fails(text) else self.reply(text) for text in texts]

    def reply(self, text: str) -> str:
        answer = text.split("Assistant: ")[1].split("\n")[0]
        return f"  {answer}+\n" if text.endswith("Revision:") else f" too plain ({answer}) "


def run(write, prompts=("p", "q"), answers=("a", "b"), rounds=2, principles=PRINCIPLES, seed=0):
    return critique_revision(write, principles, prompts, answers, seed=seed, rounds=rounds, rater=RATER)


def test_each_round_criticises_and_revises_the_last_revision():
    write = Writer()
    first, second = run(write)
    assert first.answers == ("a", "a+", "a++")
    assert second.answers == ("b", "b+", "b++")
    assert first.pair == ("p", "a++")
    assert [len(texts) for texts in write.asked] == [2, 2, 2, 2]  # one call a phase, however many answers
    by = first.corrections[1].principle
    assert write.asked[2][0] == f"Human: p\n\nAssistant: a+\n\nCritique Request: C {by}?\n\nCritique:"
    assert write.asked[3][0] == f"{write.asked[2][0]} too plain (a+)\n\nRevision Request: R {by}!\n\nRevision:"


def test_corrections_are_records_of_each_step():
    first, _ = run(Writer())
    assert [(c.answers, c.edited, c.raw, c.status) for c in first.corrections] == [
        (("a",), "a+", "too plain (a)", "ok"),
        (("a+",), "a++", "too plain (a+)", "ok"),
    ]
    for correction in first.corrections:
        assert correction.rater == RATER
        assert correction.principle in ("kind", "brief", "true")
        assert from_json(to_json(correction)) == correction


@pytest.mark.parametrize("phase", ["Critique:", "Revision:"])
def test_a_failed_call_is_recorded_and_leaves_the_answer(phase):
    write = Writer(lambda text: "Assistant: a\n" in text and text.endswith(phase) and len(write.asked) <= 2)
    first, second = run(write, rounds=3)
    assert first.answers == ("a", "a+", "a++")
    assert [c.status for c in first.corrections] == ["error", "ok", "ok"]
    assert first.corrections[0].edited is None
    assert first.corrections[0].raw == ("" if phase == "Critique:" else "too plain (a)")
    assert second.answers == ("b", "b+", "b++", "b+++")
    if phase == "Critique:":
        assert len(write.asked[1]) == 1  # no revision is asked for without a critique


def test_nothing_was_revised():
    (only,) = run(Writer(lambda text: True), ["p"], ["a"])
    assert only.pair is None
    assert only.answers == ("a",)
    assert [c.status for c in only.corrections] == ["error", "error"]
    assert len({c.id for c in only.corrections}) == len({c.principle for c in only.corrections})
    (blank,) = run(lambda texts: ["  "] * len(texts), ["p"], ["a"], rounds=1)
    assert blank.pair is None
    assert run(Writer(), [], []) == []


def test_principles_are_drawn_by_weight_and_do_not_depend_on_the_company():
    drawn = [draw_principle(PRINCIPLES, f"p{i}", "a", 0, 0).name for i in range(300)]
    assert {drawn.count(p.name) // 50 for p in PRINCIPLES} <= {1, 2}
    weighted = [
        ConstitutionPrinciple("a", "", "", "", 3.0),
        ConstitutionPrinciple("b", "", "", "", 1.0),
        ConstitutionPrinciple("c", "", "", "", 0.0),
    ]
    drawn = [draw_principle(weighted, f"p{i}", "a", 0, 0).name for i in range(400)]
    assert 270 < drawn.count("a") < 330
    assert drawn.count("c") == 0
    alone, both = run(Writer(), ["q"], ["b"]), run(Writer())
    assert alone[0] == both[1]
    assert run(Writer(), seed=1) != both
    assert isinstance(alone[0], Revised)


def test_what_cannot_be_done_is_said():
    with pytest.raises(UserError, match=r"no \[\[principle\]\] with a weight above 0"):
        run(Writer(), principles=[])
    with pytest.raises(UserError, match="rounds must be >= 1, not 0"):
        run(Writer(), rounds=0)
    with pytest.raises(UserError, match="2 prompts for 1 answers"):
        run(Writer(), ["p", "q"], ["a"])
    with pytest.raises(UserError, match="the writer gave 1 texts for 2"):
        run(lambda texts: ["x"])


# ---- A language model as the writer


@pytest.fixture(scope="module")
def local() -> LanguageModelWriter:
    tokenizer = word_level_tokenizer(tuple("abcdefgh"))
    model = CausalLM(small_decoder(tokenizer.vocab_size, num_layers=1, width=16, num_heads=2, context_length=16))
    return LanguageModelWriter(
        model,
        model.init(jax.random.key(0)),
        tokenizer,
        JitRunner(),
        SamplingConfig(max_new_tokens=6),
        prompt_length=8,
        batch_size=8,
    )


def test_a_language_model_writes_the_same_to_the_same_text_whatever_the_company_and_the_devices(local):
    texts = ["a b c", "d e", "f", "a a a a a a a a a a a a", "a b c"]
    written = local(texts)
    assert written[3] is None  # more than it reads
    assert all(isinstance(text, str) for i, text in enumerate(written) if i != 3)
    assert written[0] == written[4]
    assert local(["f", *texts * 2])[:4] == [written[2], *written[:3]]
    assert local([]) == []
    assert dataclasses.replace(local, seed=1)(texts) != written
    eight = dataclasses.replace(local, runner=make_runner(ParallelConfig()))
    assert eight(texts) == written


def test_a_writer_that_does_not_fit_its_model(local):
    with pytest.raises(UserError, match=r"\(11\) \+ sampling.max_new_tokens \(6\) = 17 is more than .*: 16 tokens"):
        dataclasses.replace(local, prompt_length=11)
    with pytest.raises(UserError, match=r"writer.batch_size \(0\)"):
        dataclasses.replace(local, batch_size=0)
