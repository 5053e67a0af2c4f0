"""How judges came to their judgements, in words: by hand, and read from a run's store among those of other judges."""

import dataclasses
import re
from contextlib import ExitStack

import pytest

from rlaif_jax.config import UserError
from rlaif_jax.data.tokenizers import load_tokenizer, word_level_tokenizer
from rlaif_jax.feedback.api.builtin_templates import PAIRWISE, RATING
from rlaif_jax.feedback.records.forms import Ranking, Rater, Rating
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.models import CausalLM
from rlaif_jax.models.decoder_config import small_decoder
from rlaif_jax.models.hf.files import save_model
from rlaif_jax.parallel import JitRunner
from rlaif_jax.recipes.judge_rewards import ApiReward, JudgeReward, Surroundings
from rlaif_jax.recipes.reasons import joined_reasons, ranking_words, rating_words
from tests.data.chat.styles import THINKING, chat_folder
from tests.helpers import random_params

LM = Rater("lm", "ai", "weights", RATING.hash)
LABELS = ("1", "2", "3", "4")
RECORDS = [{"prompt": "Why?", "baseline": "Before."}]


def rating(rater=LM, value=2.5, **more):
    shared = {"prompt": "Why?", "answers": ("Because.",), "rater": rater, "label_mass": 0.875}
    return Rating(**shared | {"value": value, "low": 1.0, "high": 4.0, "probabilities": (0.1, 0.25, 0.45, 0.2)} | more)


def ranking(shown, probability, **more):
    ranks = (1, 2) if probability > 0.5 else (2, 1)
    shared = {"prompt": "Why?", "answers": ("Because.", "Before."), "shown": shown, "label_mass": 0.9}
    rater = Rater("lm", "ai", "weights", PAIRWISE.hash)
    return Ranking(**shared | {"rater": rater, "ranks": ranks, "probability": probability} | more)


def test_a_score_names_its_most_probable_labels():
    assert rating_words(rating(), LABELS) == (
        "Expected score 2.50 on a scale from 1 to 4: 3 with 45%, 2 with 25%, 4 with 20%. The labels have 88% of the "
        "judge's probability."
    )


def test_a_preference_names_both_orders_and_the_other_answer():
    assert ranking_words(ranking((0, 1), 0.8), ranking((1, 0), 0.4), "the answer before training") == (
        "Better than the answer before training with 60%: with 80% where it is shown first, with 40% where it is shown "
        "second. The labels have 90% of the judge's probability. The answer before training: Before."
    )


@pytest.mark.parametrize(
    "mass, words", [(0.25, "No judgement. The labels have 25% of"), (0.0, "No judgement: the question was too long.")]
)
def test_a_judgement_that_is_missing_says_so(mass, words):
    nothing = {"status": "unparsed", "label_mass": mass}
    one = rating(value=float("nan"), probabilities=(), **nothing)
    pair = [
        dataclasses.replace(ranking(shown, 0.4), **nothing, ranks=(), probability=None) for shown in ((0, 1), (1, 0))
    ]
    assert rating_words(one, LABELS).startswith(words)
    assert ranking_words(*pair, "another").startswith(words)


def test_reasons_that_a_judge_wrote_follow_its_judgement():
    assert rating_words(rating(raw="It is short."), LABELS).endswith(" probability.\nIts reasons: It is short.")
    pair = ranking((0, 1), 0.8, raw="One."), ranking((1, 0), 0.4, raw="Two.")
    assert ranking_words(*pair, "another").endswith(
        ": Before.\nIts reasons where the answer is shown first: One.\nIts reasons where the answer is shown second: Two."
    )
    unread = rating(value=float("nan"), probabilities=(), status="unparsed", raw="Well.")
    assert rating_words(unread, LABELS).endswith("\nIts reasons: Well.")


@pytest.fixture
def around(tmp_path):
    with ExitStack() as opened:
        yield Surroundings(tmp_path, 0, JitRunner(), lambda: False, opened)


def test_the_judges_own_score_is_read_from_the_store(around):
    """Not that of another judge, of another wording, or of another answer."""
    others = [
        Rater("other", "ai", "weights", RATING.hash),
        Rater("lm", "ai", "weights", "other wording"),
        Rater("lm", "ai", "other weights", RATING.hash),
    ]
    with Store(around.store) as store:
        store.add([rating(others[0], 1.0), rating(value=3.25), rating(others[1], 2.0), rating(others[2], 2.0)])
        store.add([rating(answers=("No.",), value=1.5), rating(value=1.0, principle="Be brief.")])
    around.raters[JudgeReward("models/lm")] = LM
    said = JudgeReward("models/lm").reasons(around)(RECORDS * 3, ["Because.", "No.", "Never asked."])
    assert said[0].startswith("Expected score 3.25") and said[1].startswith("Expected score 1.50") and said[2] == ""


def test_the_judges_own_preference_is_read_from_the_store(around):
    with Store(around.store) as store:
        store.add([ranking((0, 1), 0.9), ranking((1, 0), 0.7)])
        # The same two answers the other way round: the policy gave what it had given before.
        store.add([ranking((0, 1), 0.1, answers=("Before.", "Because."), ranks=(2, 1))])
    around.raters[JudgeReward("models/lm", "ranking")] = Rater("lm", "ai", "weights", PAIRWISE.hash)
    said = JudgeReward("models/lm", "ranking").reasons(around)(RECORDS * 2, ["Because.", "Before."])
    assert said[0].startswith("Better than the answer before training with 80%") and said[0].endswith(": Before.")
    assert said[1] == "", "one order alone is no judgement"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a judge that knows letters."""
    path = tmp_path_factory.mktemp("judge")
    tokenizer = word_level_tokenizer(tuple("ABCDEFGHIJabcdef"))
    model = CausalLM(small_decoder(tokenizer.vocab_size, num_layers=1, width=16, num_heads=2, context_length=512))
    save_model(path, model, random_params(model), tokenizer)
    return str(path)


@pytest.mark.parametrize("form", ["rating", "ranking"])
def test_a_judge_on_the_devices_gives_reasons_first(around, folder, form):
    """Its reasons are recorded with its judgement and shown; the rater is not the judge without reasons."""
    reward = JudgeReward(folder, form, reasoning=4, min_mass=0.0, batch_size=2)
    found = reward.build(around)(RECORDS, ["Because."])
    assert found.valid.all()
    with Store(around.store) as store:
        kept = store.judgements()
    assert len(kept) == {"rating": 1, "ranking": 2}[form]
    assert all(0 < len(entry.raw.split()) <= 4 for entry in kept)
    assert all(entry.rater.name.endswith(" reasoning=4") for entry in kept)
    (said,) = reward.reasons(around)(RECORDS, ["Because."])
    assert all(entry.raw in said for entry in kept) and "Its reasons" in said
    at_once = dataclasses.replace(reward, reasoning=0).build(around)(RECORDS, ["Because."])
    assert at_once.values != found.values


def test_the_label_is_read_on_the_line_of_the_verdict(around, folder):
    """The judge's own line is left out, also where it is bold and in small letters; reasons that were cut get one."""
    judge, _ = JudgeReward(folder, reasoning=4)._judge(around, "rating")
    asked = judge.reasoning.prompt("Why?", "Because.")
    nonce = re.search(r"<request-(\w+)>", asked)[1]
    assert "First give your reasons" in asked and "nothing else" not in asked
    line = f"\nScore {nonce}: "
    for reasons in ("It is short", f"It is short\n\nscore  {nonce}: B", f"It is short Score {nonce}: B"):
        assert judge.reasoning.before_label(("Why?", "Because."), reasons) == f"{asked}It is short{line}"
    pairs, _ = JudgeReward(folder, "ranking", reasoning=4)._judge(around, "ranking")
    assert pairs.verdicts == ("A", "B", "C")
    assert JudgeReward(folder, "ranking")._judge(around, "ranking")[0].verdicts == ("A", "B")


def test_reasons_that_nothing_asks_for_are_refused(around, folder, tmp_path):
    (tmp_path / "direct.txt").write_text(
        "form: rating\nlabels: A = 1, B = 2\n[user]\n{prompt} {answer}\n[direct]\nA or B?\n"
    )
    with pytest.raises(UserError, match=r"template direct.*: no \[reasons\] section .* reasoning=4 needs one"):
        JudgeReward(folder, template=tmp_path / "direct.txt", reasoning=4).build(around)
    with pytest.raises(UserError, match="reasons of 512 tokens leave no room for a question within the judge's 512"):
        JudgeReward(folder, reasoning=512).build(around)
    with pytest.raises(UserError, match="reasoning must be >= 0, not -1"):
        JudgeReward(folder, reasoning=-1)


def test_judges_behind_servers_speak_for_themselves(around):
    """Two models, one of them by two criteria, rate the same answer; each says what it wrote."""
    judges = [
        ApiReward("http://127.0.0.1:9/v1", model, principle=principle)
        for model, principle in (("gpt", ""), ("qwen", ""), ("qwen", "Be brief."))
    ]
    with Store(around.store) as store:
        for number, judge in enumerate(judges):
            rater = Rater(judge.model, "ai", judge.model, RATING.hash)
            store.add([rating(rater, principle=judge.principle, raw=f"written by {number}")])
        store.add([rating(raw="of a judge on the devices")])
    said = [judge.reasons(around)(RECORDS, ["Because."]) for judge in judges]
    assert said == [[f"written by {number}"] for number in range(3)]
    assert judges[0].reasons(around)(RECORDS, ["Never asked."]) == [""]


def test_a_judge_behind_a_server_says_what_it_replied_to_both_orders(around):
    """The newest reply counts; one order alone, or the answers the other way round, are no comparison of this answer."""
    judge = ApiReward("http://127.0.0.1:9/v1", "gpt", form="ranking")
    own = {"rater": Rater("gpt", "ai", "gpt", PAIRWISE.hash)}
    with Store(around.store) as store:
        store.add([ranking((0, 1), 0.9, raw="an old reply", **own), ranking((0, 1), 0.8, raw="B rambles. A", **own)])
        store.add([ranking((1, 0), 0.7, raw="A is short. B", **own), ranking((1, 0), 0.7, raw="of another judge")])
        store.add([ranking((0, 1), 0.1, answers=("Before.", "Because."), raw="the other way round", **own)])
    said = judge.reasons(around)(RECORDS * 2 + [{"prompt": "Why?"}], ["Because.", "Before.", "Because."])
    assert said == [
        "With the answer shown first: B rambles. A\nWith the answer shown second: A is short. B\n"
        "The answer before training: Before.",
        "",
        "",
    ]


def test_several_judges_speak_under_their_names():
    one = lambda records, answers: [f"{record['prompt']} {answer}" for record, answer in zip(records, answers)]
    silent = lambda records, answers: ["", "b"]
    assert joined_reasons([]) is None
    assert joined_reasons([("x", one)]) is one
    both = joined_reasons([("x", one), ("y", silent)])
    assert both(RECORDS * 2, ["A.", "B."]) == ["x: Why? A.", "x: Why? B.\ny: b"]


def test_a_judges_chat_template_takes_variables(around, tmp_path):
    """They are part of who the judge is: its judgements are not those of the judge that thinks."""
    tokenizer = load_tokenizer(chat_folder(tmp_path / "tokenizer", THINKING))
    model = CausalLM(small_decoder(tokenizer.vocab_size, num_layers=1, width=16, num_heads=2, context_length=2048))
    save_model(tmp_path / "qwen", model, random_params(model), tokenizer)
    thinks = JudgeReward(str(tmp_path / "qwen"), min_mass=0.0)
    at_once = dataclasses.replace(thinks, chat_variables=("enable_thinking=false",))
    asked = [reward._judge(around, "rating")[0].score_prompt("Why?", "Because.") for reward in (thinks, at_once)]
    assert asked[0].endswith("<|im_start|>assistant\n") and asked[1].endswith("<think>\n\n</think>\n\n")
    for reward in (thinks, at_once):
        reward.build(around)(RECORDS, ["Because."])
    assert [around.raters[reward].name for reward in (thinks, at_once)] == ["qwen", "qwen enable_thinking=false"]
    with Store(around.store) as store:
        assert len({entry.rater for entry in store.judgements()}) == 2
    with pytest.raises(UserError, match="the chat template takes no variable mood"):
        dataclasses.replace(thinks, chat_variables=("mood=1",)).build(around)
    with pytest.raises(UserError, match="'mood' should be NAME=VALUE"):
        dataclasses.replace(thinks, chat_variables=("mood",))
