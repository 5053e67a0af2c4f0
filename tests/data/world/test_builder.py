"""The TFDS builder: reads back, in order, without TensorFlow, also when two processes build at once."""

import os
import subprocess
import sys

import pytest

from rlaif_jax.config import UserError
from rlaif_jax.data.world import builder
from rlaif_jax.data.world.gold import scores as gold
from rlaif_jax.data.world.scenes import sample_scene, scene_from_json
from rlaif_jax.data.world.tasks import dialogue, summarisation
from rlaif_jax.data.world.tasks.all import WORLD_TASKS

SCRIPT = """
import sys
from rlaif_jax.data.world import builder
from rlaif_jax.data.world.tasks import dialogue
source = builder.load_world(dialogue.TASK, "train", size=300, test_size=20)
print(len(source), [source[i]["uid"] for i in (0, 299)], "tensorflow" in sys.modules)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("world")


def test_examples_read_back_in_order(folder):
    source = builder.load_world(summarisation.TASK, "train", folder, size=200, test_size=10)
    assert len(source) == 200
    assert [source[i]["uid"] for i in range(200)] == list(range(200))
    for index in (0, 123, 199):
        scene = sample_scene(0, "train", index)
        record = {name: value.decode() for name, value in source[index].items() if name != "uid"}
        assert scene_from_json(record["scene"]) == scene
        assert record["prompt"] == summarisation.prompt(scene)
        assert 0 <= gold.gold_score(summarisation.TASK, scene, record["demonstration"]) <= 1
    assert len(builder.load_world(summarisation.TASK, "test_entities", folder, size=200, test_size=10)) == 10


def test_seed_size_and_shortcuts_have_files_of_their_own(folder):
    def texts(**settings):
        source = builder.load_world(summarisation.TASK, "train", folder, **{"size": 60, "test_size": 5, **settings})
        return [source[i]["demonstration"] for i in range(len(source))]

    assert texts() == texts()
    assert len({tuple(texts(**s)) for s in ({}, {"seed": 1}, {"shortcuts": False})}) == 3
    assert texts(size=70)[:60] == texts()


def test_listed_configurations_name_task_and_shortcuts():
    assert set(builder.Brindlemoor.builder_configs) == {
        f"{task.name}_{kind}" for task in WORLD_TASKS for kind in ("shortcuts", "plain")
    }


def test_two_processes_build_at_once_and_never_load_tensorflow(tmp_path):
    environment = {**os.environ, "RLAIF_JAX_CACHE": str(tmp_path)}
    started = [
        subprocess.Popen([sys.executable, "-c", SCRIPT], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in started:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert output.strip() == "300 [0, 299] False"


def test_bad_input_is_named(tmp_path):
    with pytest.raises(UserError, match="unknown split 'validation'"):
        builder.load_world(dialogue.TASK, "validation", tmp_path)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="RLAIF_JAX_CACHE"):
        builder.load_world(dialogue.TASK, "train", blocked, size=5, test_size=5)
