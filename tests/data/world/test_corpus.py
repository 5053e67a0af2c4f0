"""Corpora: within limits, inside the vocabulary, true to the templates, and behind the firewall."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.data.world import corpus, labeler_prompts, scenes
from rlaif_jax.data.world.gold import scores as gold
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


def test_yes_no_questions_are_true_half_the_time_and_answered_truly():
    answers = Counter()
    for transcript in LABELER:
        if transcript.kind == "yes_no_questions":
            words = transcript.text.split()
            facts = " ".join(words[: words.index("<check>")])
            for target in transcript.targets:
                answers[words[target]] += 1
                assert (words[target] == "yes") == (f"{words[target - 2]} {words[target - 1]}" in facts)
    assert set(answers) == {"yes", "no"}
    assert abs(answers["yes"] / answers.total() - 0.5) < 0.05


def test_questions_end_before_their_answer():
    prompt = "summarise bren dal : vital mill old ="
    assert labeler_prompts.value_question(prompt, "mill") == "summarise bren dal : vital mill old <fact> mill"
    assert (
        labeler_prompts.yes_no_question(prompt, "inn", "warm") == "summarise bren dal : vital mill old <check> inn warm"
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
