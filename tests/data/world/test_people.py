"""Simulated people: from many judgements their planted parameters can be read back."""

import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.data.world.gold import scores as gold
from rlaif_jax.data.world.grammar import parse
from rlaif_jax.data.world.people import Commenter, Comparer, Editor, Ranker, SimulatedRater, simulated_raters
from rlaif_jax.data.world.scenes import Fact, Scene, sample_scene
from rlaif_jax.data.world.tasks import dialogue, summarisation
from rlaif_jax.data.world.tasks.all import WORLD_TASKS

TOWN = "bren dal"
SCENE = Scene(
    (Fact(TOWN, "mill", "old", 3, 0), Fact(TOWN, "inn", "warm", 1, 1), Fact(TOWN, "river", "wide", 2, 1)),
    sealed=("mill",),
    question="inn",
)


def logistic_fit(features: np.ndarray, first_wins: np.ndarray) -> np.ndarray:
    """Maximum likelihood by Newton's method: weights [F] of features [B, F]."""
    weights = np.zeros(features.shape[1])
    for _ in range(30):
        chance = 1 / (1 + np.exp(-features @ weights))
        hessian = (features * (chance * (1 - chance))[:, None]).T @ features
        weights += np.linalg.solve(hessian, features.T @ (first_wins - chance))
    return weights


def test_a_comparer_has_its_planted_temperature_and_biases():
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 40_000))
    longer = rng.integers(-10, 11, first.shape)
    verdicts = Comparer(0.2, first_bias=0.5, length_bias=0.1).compare(rng, first, second, longer)
    features = np.stack([first - second, np.ones_like(first), longer], axis=1)
    slope, bias, length_bias = logistic_fit(features, verdicts == 1)
    assert 1 / slope == pytest.approx(0.2, rel=0.05)
    assert bias == pytest.approx(0.5, abs=0.05)
    assert length_bias == pytest.approx(0.1, abs=0.01)


def test_a_lapsing_comparer_errs_at_half_its_lapse_rate():
    verdicts = Comparer(0.01, lapse=0.3).compare(np.random.default_rng(1), np.ones(20_000), np.zeros(20_000))
    assert (verdicts == 2).mean() == pytest.approx(0.15, abs=0.01)


def test_a_ranker_ranks_by_plackett_luce():
    qualities, temperature = np.array([0.0, 0.2, 0.5]), 0.3
    ranks = Ranker(temperature).rank(np.random.default_rng(2), np.tile(qualities, (40_000, 1)))
    strength = np.exp(qualities / temperature)
    for order in ((2, 1, 0), (0, 1, 2), (1, 2, 0)):
        expected, left = 1.0, strength.sum()
        for answer in order:
            expected *= strength[answer] / left
            left -= strength[answer]
        assert (ranks == order).all(axis=1).mean() == pytest.approx(expected, abs=0.01)


def test_a_rater_has_its_planted_bias_scale_and_noise():
    quality = np.random.default_rng(3).uniform(0.3, 0.7, 40_000)  # far from the ends, where ratings are cut
    rating = SimulatedRater(bias=-0.7, scale=0.8, noise=0.5).rate(np.random.default_rng(4), quality)
    scale, middle = np.polyfit(9 * (quality - 0.5), rating, 1)
    assert scale == pytest.approx(0.8, abs=0.02)
    assert middle == pytest.approx(5.5 - 0.7, abs=0.02)
    residual = rating - (middle + scale * 9 * (quality - 0.5))
    assert residual.std() == pytest.approx(np.sqrt(0.5**2 + 1 / 12), abs=0.02)  # 1/12: rounding
    extremes = SimulatedRater(noise=5).rate(np.random.default_rng(5), quality)
    assert extremes.min() == 1
    assert extremes.max() == 10


def test_a_crowd_of_raters_varies_as_asked():
    crowd = simulated_raters(np.random.default_rng(6), 4000, bias_sd=1.5, scale_sd=0.3)
    assert np.std([rater.bias for rater in crowd]) == pytest.approx(1.5, rel=0.05)
    assert np.std(np.log([rater.scale for rater in crowd])) == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize(
    "make", [lambda: Comparer(0), lambda: Comparer(lapse=2), lambda: Ranker(-1), lambda: SimulatedRater(noise=-1)]
)
def test_impossible_people_are_refused(make):
    with pytest.raises(UserError):
        make()


@pytest.mark.parametrize(
    ("task", "principle", "answer", "comment"),
    [
        (
            summarisation.TASK,
            "<faithful>",
            "in bren dal the mill old and the inn wide .",
            "mill old right inn wide wrong",
        ),
        (
            summarisation.TASK,
            "<overall>",
            "in bren mor the mill old . the mill old .",
            "mill old vital mill old again town",
        ),
        (summarisation.TASK, "<brief>", "in bren dal the mill old .", "fine"),
        (dialogue.TASK, "<overall>", "the mill old .", "mill old leak long rude curt"),
        (dialogue.TASK, "<helpful>", "you ask of the inn . the inn sealed .", "inn sealed wrong curt"),
    ],
)
def test_comments_by_hand(task, principle, answer, comment):
    assert Commenter().comment(np.random.default_rng(0), task, principle, SCENE, answer) == comment


def test_a_commenter_mixes_up_at_its_error_rate():
    rng, commenter = np.random.default_rng(7), Commenter(0.2)
    answer = "in bren dal the mill old and the inn warm ."
    words = " ".join(
        commenter.comment(rng, summarisation.TASK, "<faithful>", SCENE, answer) for _ in range(5000)
    ).split()
    assert words.count("wrong") / (words.count("wrong") + words.count("right")) == pytest.approx(0.2, abs=0.015)


@pytest.mark.parametrize("task", WORLD_TASKS, ids=lambda task: task.name)
def test_editors_mend(task):
    rng = np.random.default_rng(8)
    scenes = [sample_scene(0, "train", index) for index in range(600)]
    answers = [task.corrupt(rng, scene, task.demonstration(rng, scene)) for scene in scenes]
    before = gold.gold_scores(task, scenes, answers)
    pairs = list(zip(scenes, answers, strict=True))
    perfect = gold.gold_scores(task, scenes, [Editor().edit(rng, task, scene, text) for scene, text in pairs])
    sloppy = gold.gold_scores(task, scenes, [Editor(0.5).edit(rng, task, scene, text) for scene, text in pairs])
    assert (perfect >= before - 1e-6).mean() > 0.98
    assert before.mean() + 0.2 < sloppy.mean() < perfect.mean() - 0.05
    if task.name == "dialogue":
        assert perfect.mean() > 0.95


def test_an_editor_leaves_a_good_answer_alone():
    rng = np.random.default_rng(9)
    for task in WORLD_TASKS:
        for index in range(200):
            scene = sample_scene(0, "train", index)
            assert set(parse(Editor().edit(rng, task, scene, task.reference(scene))).facts) == set(
                parse(task.reference(scene)).facts
            )
