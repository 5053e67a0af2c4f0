"""Corpora: within limits, inside the vocabulary, true to the templates, and behind the firewall."""

import dataclasses
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.data.world import corpus, labeler_prompts, scenes
from rlaif_jax.data.world.gold import scores as gold
from rlaif_jax.data.world.people import Commenter
from rlaif_jax.data.world.scenes import sample_scene
from rlaif_jax.data.world.tasks.all import WORLD_TASKS
from rlaif_jax.data.world.vocabulary import VOCABULARY

LABELER = corpus.labeler_corpus(np.random.default_rng(0), 3000)
BASE = corpus.base_corpus(np.random.default_rng(0), 1000)


def test_vocabulary_has_no_doubles_and_starts_with_the_specials():
    assert VOCABULARY[:4] == ("<pad>", "<bos>", "<eos>", "<unk>")
    assert len(set(VOCABULARY)) == len(VOCABULARY) <= 128
    assert all(word == "".join(word.split()) for word in VOCABULARY)


@pytest.mark.parametrize("transcripts", [LABELER, BASE], ids=["labeler", "base"])
def test_transcripts_fit_and_their_targets_lie_inside(transcripts):
    for transcript in transcripts:
        words = transcript.text.split()
        assert len(words) <= corpus.MAX_TRANSCRIPT_WORDS
        assert set(words) <= set(VOCABULARY)
        assert transcript.targets
        assert all(0 < target < len(words) for target in transcript.targets)
        assert transcript.text == " ".join(words)


def test_only_training_towns_and_combinations_occur():
    held_out = set(scenes.names(test=True))
    for transcript in LABELER + BASE:
        words = transcript.text.split()
        start = next(index for index, word in enumerate(words) if word in ("summarise", "talk"))
        assert f"{words[start + 1]} {words[start + 2]}" not in held_out


def test_all_kinds_principles_and_verdicts_occur_about_as_often_as_asked():
    kinds = Counter(transcript.kind for transcript in LABELER)
    mix = corpus.LabelerMix()
    total = sum(mix.weights.values())
    for name, weight in mix.weights.items():
        assert kinds[name] / len(LABELER) == pytest.approx(weight / total, abs=0.03)
    judged = [transcript.text.split() for transcript in LABELER if transcript.kind.startswith("pairwise")]
    assert {words[0] for words in judged} == set(labeler_prompts.PRINCIPLES)
    verdicts = Counter(words[-1] for words in judged)
    assert set(verdicts) == {"1", "2"}
    assert abs(verdicts["1"] / verdicts.total() - 0.5) < 0.05
    scored = Counter(t.text.split()[-1] for t in LABELER if t.kind.startswith("score"))
    assert set(scored) == set(labeler_prompts.SCORES)


def test_training_and_labelling_share_the_templates():
    for transcript in LABELER:
        if transcript.kind != "pairwise":
            continue
        words = transcript.text.split()
        first, second, end = words.index("<1>"), words.index("<2>"), words.index("<answer>")
        prompt, answer1, answer2 = words[1:first], words[first + 1 : second], words[second + 1 : end]
        again = labeler_prompts.pairwise_prompt(words[0], " ".join(prompt), " ".join(answer1), " ".join(answer2))
        assert transcript.text == f"{again} {words[-1]}"
        assert transcript.targets == (len(words) - 1,)


def test_verdicts_follow_gold_under_noise():
    task = WORLD_TASKS[0]
    rng, agree = np.random.default_rng(1), []
    mix = corpus.LabelerMix(principles=("<overall>",))
    scene = sample_scene(0, "train", 11)
    for _ in range(400):
        words = corpus._pairwise(rng, task, scene, mix, True, False).text.split()
        first, second, end = words.index("<1>"), words.index("<2>"), words.index("<answer>")
        answers = " ".join(words[first + 1 : second]), " ".join(words[second + 1 : end])
        score1, score2 = (gold.gold_score(task, scene, answer) for answer in answers)
        if abs(score1 - score2) > 0.05:
            agree.append((score1 > score2) == (words[-1] == "1"))
    assert 0.85 < np.mean(agree) < 0.995  # people err, but not often


def facts_of(prompt: list[str]) -> dict[str, tuple[str, str]]:
    """Returns aspect -> (value, word of salience), as a prompt lists them; no salience in a dialogue."""
    listed = prompt[prompt.index(":") + 1 :]
    if prompt[0] == "summarise":
        return {listed[i]: (listed[i + 1], listed[i + 2]) for i in range(0, len(listed), 3)}
    starts = [i for i, word in enumerate(listed) if word in ("open", "sealed") and listed[i - 2] != "asked"]
    return {listed[i + 1]: (listed[i + 2], "") for i in starts}


def asked(transcript: corpus.Transcript) -> tuple[dict, list[tuple[str, str | None, str, str]]]:
    """Returns (facts, [(aspect, claimed value, value, word that follows)]) of questions; checks their targets."""
    words = transcript.text.split()
    claims = transcript.kind == "yes_no_questions"
    at = words.index("<check>" if claims else "<fact>")
    facts, at = facts_of(words[:at]), at + 1
    concluded = claims or words[0] == "summarise"
    found, written = [], []
    while at < len(words):
        if claims and words[at + 2] == "again":
            assert (words[at], words[at + 1]) in [(aspect, value) for aspect, _, value, _ in found]
            written.append(at + 2)
            at += 3
            continue
        written += [at] if found else []
        value = at + 1 + claims
        written += range(value, value + 1 + concluded)
        found.append(
            (words[at], words[at + 1] if claims else None, words[value], words[value + 1] if concluded else "")
        )
        at = value + 1 + concluded
    assert transcript.targets == tuple(written)
    return facts, found


@pytest.mark.parametrize("kind", ["value_questions", "yes_no_questions"])
def test_every_question_is_answered_truly(kind):
    """The value, and after it "no" exactly where the claim is false, else the salience, or "yes" where none is shown."""
    chosen = [transcript for transcript in LABELER + BASE if transcript.kind == kind]
    assert {transcript.text.split()[0] for transcript in chosen} == {"summarise", "talk"}
    for transcript in chosen:
        facts, found = asked(transcript)
        assert sorted(aspect for aspect, *_ in found) == sorted(facts), "each fact once"
        for aspect, claim, value, word in found:
            truth, salience = facts[aspect]
            assert value == truth
            if claim is not None and claim != truth:
                assert word == "no"
            else:
                assert word == (salience or ("yes" if claim is not None else ""))
    orders = [[aspect for aspect, *_ in found] == list(facts) for facts, found in map(asked, chosen) if len(facts) > 3]
    assert np.mean(orders) < 0.1, "in random order"


def test_some_claims_are_made_again_and_rankings_begin_with_what_matters():
    again = [t.text.split().count("again") for t in LABELER + BASE if t.kind == "yes_no_questions"]
    assert max(again) == 2
    assert 0.3 < np.mean(again) < 1.2
    task = next(task for task in WORLD_TASKS if task.name == "summarisation")
    orders = []
    for transcript in corpus.base_corpus(np.random.default_rng(0), 50, tasks=(task,), rankings=1.0):
        words = transcript.text.split()
        at = words.index("<rank>")
        facts, listed = facts_of(words[:at]), words[at + 1 :]
        assert transcript.kind == "ranking"
        assert transcript.targets == tuple(range(at + 1, len(words)))
        assert sorted(listed) == sorted(facts)
        salience = [scenes.SALIENCE_WORDS.index(facts[aspect][1]) for aspect in listed]
        assert salience == sorted(salience, reverse=True)
        orders.append(listed == sorted(facts, key=lambda a: -scenes.SALIENCE_WORDS.index(facts[a][1])))
    assert np.mean(orders) < 0.9, "facts that matter alike are in random order"


def test_claims_are_true_half_the_time_and_a_quarter_of_another_fact():
    true, elsewhere = [], []
    for facts, found in (asked(transcript) for transcript in LABELER if transcript.kind == "yes_no_questions"):
        values = {value for value, _ in facts.values()}
        true += [claim == value for _, claim, value, _ in found]
        elsewhere += [claim in values - {value} for _, claim, value, _ in found]
    assert len(true) > 1000
    assert np.mean(true) == pytest.approx(0.5 + 0.25 / 20, abs=0.04)
    assert np.mean(elsewhere) == pytest.approx(0.25 + 0.25 * 3.7 / 20, abs=0.04)  # 3.7 other facts, by chance


def test_only_reasons_are_written_and_no_note_is_wrong():
    mix = corpus.LabelerMix(principles=("<helpful>", "<overall>"), commenter=Commenter(0.5))
    careful = corpus.only_reasons(mix)
    assert careful.weights == dict.fromkeys(mix.weights, 0.0) | {"score_reasoning": 1.0}
    assert (careful.principles, careful.raters) == (mix.principles, mix.raters)
    task = next(task for task in WORLD_TASKS if task.name == "summarisation")
    kinds, slips = Counter(), {}
    for name, part in (("careful", careful), ("careless", dataclasses.replace(careful, commenter=mix.commenter))):
        slips[name] = []
        for transcript in corpus.labeler_corpus(np.random.default_rng(0), 200, tasks=(task,), mix=part):
            kinds[transcript.kind] += 1
            words = transcript.text.split()
            facts = facts_of(words[1 : words.index("=")])
            notes = words[words.index("<because>") + 1 : words.index("<score>")]
            for i in range(0, len(notes) - 2, 3):
                if notes[i] not in scenes.ASPECTS:
                    break
                false = facts.get(notes[i], ("", ""))[0] != notes[i + 1]
                slips[name].append((notes[i + 2] == "wrong") != false)
    assert set(kinds) == {"score_reasoning"}
    assert len(slips["careful"]) > 300
    assert not any(slips["careful"])
    assert np.mean(slips["careless"]) == pytest.approx(0.5, abs=0.07)


def test_texts_of_a_check_are_about_towns_of_no_training_text():
    held_out = set(scenes.names(test=True))
    for make in (corpus.base_corpus, corpus.labeler_corpus):
        for transcript in make(np.random.default_rng(0), 100, split="test_entities"):
            words = transcript.text.split()
            start = next(index for index, word in enumerate(words) if word in ("summarise", "talk"))
            assert f"{words[start + 1]} {words[start + 2]}" in held_out


def test_questions_end_before_their_answer():
    prompt = "summarise bren dal : mill old vital ="
    assert labeler_prompts.value_question(prompt, "mill") == "summarise bren dal : mill old vital <fact> mill"
    assert (
        labeler_prompts.yes_no_question(prompt, "inn", "warm") == "summarise bren dal : mill old vital <check> inn warm"
    )
    with pytest.raises(UserError, match="<kind>"):
        labeler_prompts.score_prompt("<kind>", prompt, "")


def test_the_same_generator_gives_the_same_corpus():
    assert corpus.labeler_corpus(np.random.default_rng(0), 50) != corpus.labeler_corpus(np.random.default_rng(1), 50)
    counted = []
    count = lambda done, of: counted.append((done, of))
    again = corpus.labeler_corpus(np.random.default_rng(3), 50, progress=count)
    assert corpus.labeler_corpus(np.random.default_rng(3), 50) == again
    corpus.base_corpus(np.random.default_rng(3), 1100, progress=count)
    assert counted == [(50, 50), (500, 1100), (1000, 1100), (1100, 1100)]


@pytest.mark.parametrize(
    "module",
    [
        "labeler_prompts",
        "scenes",
        "grammar",
        "vocabulary",
        "tasks.all",
        "tasks.summarisation",
        "tasks.dialogue",
        "builder",
    ],
)
def test_what_a_labeler_may_import_loads_no_gold(module):
    code = (
        f"import sys, rlaif_jax.data.world.{module};"
        "world = 'rlaif_jax.data.world.';"
        "print([name for name in ('gold', 'people', 'corpus') if world + name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
