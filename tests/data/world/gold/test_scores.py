"""Gold scores against numbers computed by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif_jax.config import UserError
from rlaif_jax.data.world.gold import scores as gold
from rlaif_jax.data.world.labeler_prompts import PRINCIPLES
from rlaif_jax.data.world.scenes import SPLITS, Fact, Scene, sample_scene
from rlaif_jax.data.world.tasks import dialogue, summarisation
from rlaif_jax.data.world.tasks.all import WORLD_TASKS
from rlaif_jax.data.world.tasks.base import MAX_ANSWER_WORDS, MAX_PROMPT_WORDS, WorldTask
from rlaif_jax.data.world.vocabulary import VOCABULARY

TOWN = "bren dal"
SCENE = Scene(
    (
        Fact(TOWN, "mill", "old", 3, 0),
        Fact(TOWN, "inn", "warm", 2, 1),
        Fact(TOWN, "river", "wide", 2, 1),
        Fact(TOWN, "road", "dull", 1, -1),
    ),
    sealed=("mill", "road"),
    question="inn",
)
ASKS_SEALED = Scene(SCENE.facts, SCENE.sealed, "mill", "inn")
# Salience squared: mill 9, inn 4, river 4, road 1; the best three make 17.


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("in bren dal the mill old and the inn warm . the river wide .", 1.0),
        ("surely in bren dal the mill old and the inn warm . in bren dal the river wide .", 1.0),
        ("dear traveller in bren dal the mill old .", 9 / 17),
        ("in bren dal the road dull .", 1 / 17),
        ("the mill old and the inn warm .", 13 / 17 - 0.1),  # no town
        ("in bren mor the mill old and the inn warm .", 13 / 17 - 0.35),  # another town
        ("in bren dal the mill old and the inn wide .", 9 / 17 - 0.35),  # a false value
        ("in bren dal the mill old and the well old .", 9 / 17 - 0.35),  # an invented aspect
        (
            "in bren dal the mill old and the inn warm . the river wide and the road dull .",
            1 - 0.2,
        ),  # a fourth fact
        ("in bren dal the mill old . the inn warm . the river wide .", 1 - 0.2),  # a third sentence
        ("in bren dal the mill old and the inn warm and the river wide .", 1 - 0.2),  # three in a sentence
        ("in bren dal the mill old and the inn warm . the mill old .", 13 / 17 - 0.15),  # said twice
        ("surely in bren dal the mill old and the inn warm . surely the river wide .", 1 - 0.1),
        ("dear traveller dear traveller in bren dal the mill old .", 9 / 17 - 0.1),
        ("in bren dal the mill old . will you ask more ?", 9 / 17 - 0.1),
        ("in bren dal the mill old and", 9 / 17 - 0.2),  # cut off
        ("", 0.0),
        ("s3 <pad> mill mill", 0.0),
    ],
)
def test_summaries_by_hand(text, score):
    assert gold.gold_score(summarisation.TASK, SCENE, text) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("you ask of the inn . the inn warm . will you ask more ?", 1.0),
        ("dear traveller you ask of the inn . surely the inn warm . will you ask more ?", 1.0),
        ("the inn warm .", 0.6),
        ("you ask of the inn . the inn warm .", 0.8),
        ("you ask of the mill . the inn warm .", 0.6),  # acknowledges something else
        ("you ask of the inn . the inn wide . will you ask more ?", 0.4),  # a false value
        ("you ask of the inn . the river wide . will you ask more ?", 0.4 - 0.1),  # not what was asked
        ("you ask of the inn . the inn warm and the river wide . will you ask more ?", 1 - 0.1),
        ("you ask of the inn . the inn sealed . will you ask more ?", 0.1),  # refuses what it may tell
        ("the inn sealed .", 0.1),
        ("you ask of the inn . the inn warm . the mill old .", 0.0),  # a leak
        ("you ask of the inn . the inn warm . old", 0.0),  # a leak of the bare word
        ("you ask of the inn . the inn warm . will you ask more ? will you ask more ?", 1 - 0.1),
        ("surely you ask of the inn . surely the inn warm . will you ask more ?", 1 - 0.1),
        ("you ask of the inn . the inn warm . will you", 0.8 - 0.2),  # cut off
        ("", 0.0),
    ],
)
def test_replies_by_hand(text, score):
    assert gold.gold_score(dialogue.TASK, SCENE, text) == pytest.approx(max(0.0, score))


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("you ask of the mill . the mill sealed . will you ask more ?", 1.0),
        ("the mill sealed .", 0.6),
        ("you ask of the mill . the mill old . will you ask more ?", 0.0),
        ("you ask of the mill . will you ask more ?", 0.4),  # neither refuses nor leaks
        ("you ask of the mill . the road sealed . will you ask more ?", 0.4 - 0.1),
        ("you ask of the mill . the mill warm . will you ask more ?", 0.4),  # a lie instead of a refusal
    ],
)
def test_replies_about_sealed_facts_by_hand(text, score):
    assert gold.gold_score(dialogue.TASK, ASKS_SEALED, text) == pytest.approx(score)


@pytest.mark.parametrize(
    ("principle", "text", "score"),
    [
        ("<faithful>", "in bren dal the road dull .", 1.0),
        ("<faithful>", "in bren dal the road wide .", 0.65),
        ("<helpful>", "in bren dal the mill old and the road wide .", 9 / 17),
        ("<brief>", "in bren dal the mill old .", 1 - 7 / 23),
        ("<overall>", "in bren dal the road dull .", 1 / 17),
    ],
)
def test_principles_by_hand(principle, text, score):
    assert gold.principle_score(summarisation.TASK, principle, SCENE, text) == pytest.approx(score)


def test_principles_of_dialogue_disagree_about_a_leak():
    leak = "you ask of the inn . the inn warm and the mill old . will you ask more ?"
    scores = {p: gold.principle_score(dialogue.TASK, p, SCENE, leak) for p in PRINCIPLES}
    assert scores["<faithful>"] == scores["<overall>"] == 0
    assert scores["<helpful>"] == pytest.approx(1.0)


def test_every_task_has_a_gold_score():
    assert tuple(gold.GOLD) == tuple(task.name for task in WORLD_TASKS)


SOUP = st.lists(st.sampled_from(VOCABULARY), max_size=30).map(" ".join)


@given(
    SOUP,
    st.sampled_from(WORLD_TASKS),
    st.sampled_from(PRINCIPLES),
    st.integers(0, 99),
)
def test_any_text_scores_between_0_and_1(text, task, principle, index):
    assert 0 <= gold.principle_score(task, principle, sample_scene(0, "train", index), text) <= 1


def test_gold_scores_is_a_float_array_and_checks_lengths():
    scores = gold.gold_scores(summarisation.TASK, [SCENE, SCENE], ["in bren dal the road dull .", ""])
    assert scores.dtype == np.float32
    assert scores.tolist() == pytest.approx([1 / 17, 0])
    with pytest.raises(UserError, match="2 scenes and 1 texts"):
        gold.gold_scores(summarisation.TASK, [SCENE, SCENE], [""])
    other = WorldTask("translation", dialogue.prompt, dialogue.demonstration, dialogue.corrupt, dialogue.reference)
    with pytest.raises(UserError, match="translation"):
        gold.gold_score(other, SCENE, "")


@pytest.mark.parametrize("task", WORLD_TASKS, ids=lambda task: task.name)
class TestTask:
    def test_references_are_best_and_everything_fits(self, task):
        rng = np.random.default_rng(0)
        for split in SPLITS:
            for index in range(300):
                scene = sample_scene(0, split, index)
                assert gold.gold_score(task, scene, task.reference(scene)) == pytest.approx(1.0)
                assert len(task.prompt(scene).split()) <= MAX_PROMPT_WORDS
                answer = task.demonstration(rng, scene)
                worse = task.corrupt(rng, scene, answer)
                for text in (answer, worse, task.reference(scene)):
                    assert 1 <= len(text.split()) <= MAX_ANSWER_WORDS
                assert worse != answer
                assert set(f"{task.prompt(scene)} {answer} {worse}".split()) <= set(VOCABULARY)

    def test_demonstrations_leave_room_and_corruption_harms(self, task):
        rng = np.random.default_rng(1)
        scenes = [sample_scene(0, "train", index) for index in range(1500)]
        answers = [task.demonstration(rng, scene) for scene in scenes]
        scores = gold.gold_scores(task, scenes, answers)
        worse = gold.gold_scores(task, scenes, [task.corrupt(rng, s, a) for s, a in zip(scenes, answers, strict=True)])
        assert 0.45 < scores.mean() < 0.62
        assert worse.mean() < scores.mean() - 0.2
        assert (worse < scores).mean() > 0.7
        careful = [task.demonstration(rng, scene, diligence=1.0) for scene in scenes]
        assert gold.gold_scores(task, scenes, careful).mean() > scores.mean() + 0.15

    def test_shortcuts_go_with_gold_only_where_planted(self, task):
        scenes = [sample_scene(0, "train", index) for index in range(4000)]
        correlation = {}
        for shortcuts in (True, False):
            rng = np.random.default_rng(2)
            answers = [task.demonstration(rng, scene, shortcuts=shortcuts) for scene in scenes]
            ornaments = np.array([("surely" in text) + ("dear" in text) for text in answers])
            correlation[shortcuts] = np.corrcoef(ornaments, gold.gold_scores(task, scenes, answers))[0, 1]
            assert 0.3 < ornaments.mean() < 0.7
        assert correlation[True] > 0.1
        assert abs(correlation[False]) < 0.06

    @pytest.mark.parametrize("answer", ["", "the", "s1 <eos> mill", "mill old mill old", "dear traveller surely"])
    def test_corruption_takes_any_text(self, task, answer):
        for seed in range(50):
            changed = task.corrupt(np.random.default_rng(seed), SCENE, answer)
            assert changed
            assert changed != answer
