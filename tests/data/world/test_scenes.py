"""Scenes: deterministic, well formed, and split as promised."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif_jax.config import UserError
from rlaif_jax.data.world import scenes
from rlaif_jax.data.world.scenes import SPLITS, sample_scene, scene_from_json, scene_to_json

SAMPLE = {split: [sample_scene(0, split, index) for index in range(400)] for split in SPLITS}
POLARITY = {value: polarity for polarity, values in scenes.VALUES_BY_POLARITY for value in values}
FACTS = {split: [fact for scene in group for fact in scene.facts] for split, group in SAMPLE.items()}


def test_the_same_arguments_give_the_same_scene_in_another_process():
    code = (
        "from rlaif_jax.data.world.scenes import sample_scene, scene_to_json;"
        "print(*[scene_to_json(sample_scene(7, 'test_entities', i)) for i in range(20)], sep='\\n')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = [scene_to_json(sample_scene(7, "test_entities", index)) for index in range(20)]
    assert result.stdout.split("\n")[:20] == here


def test_seed_split_and_index_all_matter():
    drawn = {sample_scene(seed, split, index) for seed in (0, 1) for split in SPLITS for index in range(5)}
    assert len(drawn) == 2 * len(SPLITS) * 5


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_are_well_formed(split):
    for scene in SAMPLE[split]:
        aspects = [fact.aspect for fact in scene.facts]
        values = [fact.value for fact in scene.facts]
        assert len(set(aspects)) == len(aspects)
        assert len(set(values)) == len(values)
        assert {fact.entity for fact in scene.facts} == {scene.entity}
        assert all(fact.salience in (1, 2, 3) for fact in scene.facts)
        assert all(fact.polarity == POLARITY[fact.value] for fact in scene.facts)
        assert scene.question in aspects
        assert set(scene.sealed) <= set(aspects)
        assert scene.earlier is None or (scene.earlier in aspects and scene.earlier != scene.question)


def test_test_names_never_occur_in_the_other_splits():
    held_out = {fact.entity for fact in FACTS["test_entities"]}
    assert held_out <= set(scenes.names(test=True))
    for split in ("train", "test_combinations", "test_length"):
        assert not held_out & {fact.entity for fact in FACTS[split]}
    assert len(scenes.names(True)) + len(scenes.names(False)) == 20 * 19


def test_every_syllable_is_trained_on_both_sides():
    firsts, seconds = zip(*(name.split() for name in scenes.names(test=False)), strict=True)
    assert set(firsts) == set(seconds) == set(scenes.SYLLABLES)


def test_held_out_combinations_occur_in_their_split_alone():
    held_out = set(scenes.combinations(test=True))
    for split in ("train", "test_entities", "test_length"):
        assert not held_out & {(fact.aspect, fact.value) for fact in FACTS[split]}
    for scene in SAMPLE["test_combinations"]:
        assert sum((fact.aspect, fact.value) in held_out for fact in scene.facts) == 1
    trained = scenes.combinations(test=False)
    assert {aspect for aspect, _ in trained} == set(scenes.ASPECTS)
    assert {value for _, value in trained} == set(scenes.VALUES)


def test_long_scenes_are_longer_than_any_training_scene():
    assert max(len(scene.facts) for scene in SAMPLE["train"]) == 6
    assert {len(scene.facts) for scene in SAMPLE["test_length"]} == {scenes.LONG_FACTS}


@given(seed=st.integers(0, 2**31), split=st.sampled_from(SPLITS), index=st.integers(0, 2**40))
def test_json_gives_the_scene_back(seed, split, index):
    scene = sample_scene(seed, split, index)
    assert scene_from_json(scene_to_json(scene)) == scene


@pytest.mark.parametrize("arguments", [(0, "testing", 1), (-1, "train", 0), (0, "train", -1)])
def test_bad_arguments_are_named(arguments):
    with pytest.raises(UserError, match=r"split|negative"):
        sample_scene(*arguments)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"facts": [{"entity": "a"}], "sealed": []}'])
def test_bad_json_is_named(text):
    with pytest.raises(UserError, match="not a scene"):
        scene_from_json(text)
