"""The world as a TFDS builder: offline, seeded, array_record files, no TensorFlow.

``load_world`` builds what the cache lacks and returns a random-access source for Grain.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rlaif_jax.config import UserError
from rlaif_jax.data.tfds_offline import tfds
from rlaif_jax.data.world.scenes import SPLITS, Split, sample_scene, scene_to_json
from rlaif_jax.data.world.tasks.all import WORLD_TASKS
from rlaif_jax.data.world.tasks.base import WorldTask

TRAIN_SIZE = 20_000
TEST_SIZE = 1_000
# Scenes of demonstrations and of labeler transcripts both come from the train split; the labeler's are random draws
# below a million, the builder's are the first TRAIN_SIZE indices.
_DEMONSTRATION_STREAM = 1_000_003  # keeps the writer's noise apart from the scene's


@dataclass(kw_only=True)
class WorldConfig(tfds.core.BuilderConfig):
    """One configuration of the builder: a task, with or without planted shortcuts, of a size, from a seed."""

    task: WorldTask = WORLD_TASKS[0]
    shortcuts: bool = True
    train_size: int = TRAIN_SIZE
    test_size: int = TEST_SIZE
    seed: int = 0


def world_config(
    task: WorldTask, *, shortcuts: bool = True, train_size: int = TRAIN_SIZE, test_size: int = TEST_SIZE, seed: int = 0
) -> WorldConfig:
    """Returns the configuration whose name says everything that its examples depend on.

    Args:
        task: of the world.
        shortcuts: whether writers plant hackable features in good answers.
        train_size: examples of the train split.
        test_size: examples of each test split.
        seed: of scenes and writers.
    """
    name = f"{task.name}_{'shortcuts' if shortcuts else 'plain'}"
    if (train_size, test_size, seed) != (TRAIN_SIZE, TEST_SIZE, 0):
        name += f"_{train_size}x{test_size}_s{seed}"
    return WorldConfig(
        name=name,
        description=f"{task.name}, {'with' if shortcuts else 'without'} planted shortcuts, seed {seed}",
        task=task,
        shortcuts=shortcuts,
        train_size=train_size,
        test_size=test_size,
        seed=seed,
    )


def example(config: WorldConfig, split: Split, index: int) -> dict[str, Any]:
    """Returns one example: texts ``prompt``, ``demonstration``, ``scene`` (JSON), and ``uid``, its index.

    Args:
        config: the task, the seed and the writers' shortcuts.
        split: the split.
        index: the number of the example in its split, from 0.
    """
    scene = sample_scene(config.seed, split, index)
    stream = [config.seed, SPLITS.index(split), index, _DEMONSTRATION_STREAM]
    rng = np.random.default_rng(np.random.SeedSequence(stream))
    return {
        "prompt": config.task.prompt(scene),
        "demonstration": config.task.demonstration(rng, scene, shortcuts=config.shortcuts),
        "scene": scene_to_json(scene),
        "uid": index,
    }


class Brindlemoor(tfds.core.GeneratorBasedBuilder):
    """The synthetic town world; one configuration a task, each with and without planted shortcuts."""

    # Else TFDS looks next to the source for checksums of downloads, with a package that it does not require.
    code_path = None
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar[list[WorldConfig]] = [
        world_config(task, shortcuts=shortcuts) for task in WORLD_TASKS for shortcuts in (True, False)
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Brindlemoor: invented moor towns, described, summarised and talked about.",
            features=tfds.features.FeaturesDict(
                {
                    "prompt": tfds.features.Text(),
                    "demonstration": tfds.features.Text(),
                    "scene": tfds.features.Text(),
                    "uid": tfds.features.Scalar(np.int64),
                }
            ),
            supervised_keys=("prompt", "demonstration"),
            disable_shuffling=True,  # record i is example i
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing to download
        config = self.builder_config
        return {
            split: self._generate_examples(split, config.train_size if split == "train" else config.test_size)
            for split in SPLITS
        }

    def _generate_examples(self, split: Split, size: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in range(size):
            yield index, example(self.builder_config, split, index)


def cache_folder() -> Path:
    """Returns the folder of generated worlds: ``$RLAIF_JAX_CACHE``, or ``~/.cache/rlaif_jax``."""
    return Path(os.environ.get("RLAIF_JAX_CACHE") or Path.home() / ".cache" / "rlaif_jax")


def _fingerprint(config: WorldConfig) -> str:
    """Hashes the first examples of each split: a changed world never reads an older world's files."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for index in range(16):
            digest.update(repr(sorted(example(config, split, index).items())).encode())
    return digest.hexdigest()[:10]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock on a file (made if absent), for which other processes wait; a kill frees it, too."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build_world(config: WorldConfig, data_dir: str | Path | None = None) -> Brindlemoor:
    """Returns the TFDS builder of the world, and writes its files if absent.

    Several processes may call it at the same time: one of them writes.

    Args:
        config: the settings of the world.
        data_dir: the folder for the files; None: `cache_folder`.

    Raises:
        UserError: the folder cannot be written.
    """
    config = Brindlemoor.builder_configs.get(config.name, config)  # TFDS wants its own object for a listed name
    folder = (Path(data_dir) if data_dir is not None else cache_folder() / "tfds") / _fingerprint(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f".{config.name}.lock"):  # a second process waits, then finds the files
            builder = Brindlemoor(config=config, data_dir=str(folder), file_format="array_record")
            if not builder.is_prepared():
                tfds.disable_progress_bar()
                with redirect_stdout(io.StringIO()):  # TFDS announces a download, though nothing is downloaded
                    builder.download_and_prepare(file_format="array_record")
    except OSError as error:
        raise UserError(
            f"cannot build the world in {folder}: {error}; set RLAIF_JAX_CACHE to a folder that can be written"
        ) from error
    return builder


def load_world(
    task: WorldTask,
    split: Split,
    data_dir: str | Path | None = None,
    *,
    size: int = TRAIN_SIZE,
    test_size: int = TEST_SIZE,
    shortcuts: bool = True,
    seed: int = 0,
) -> Sequence[dict[str, Any]]:
    """Returns a split as a random-access source (``len``, ``[i]``), built into the cache if absent.

    The source is ready for Grain. An example is a dict of ``prompt``, ``demonstration`` and ``scene`` as bytes of
    UTF-8, and ``uid``.

    Args:
        task: of the world.
        split: one of SPLITS.
        data_dir: where the files are; by default in `cache_folder`.
        size: examples of the train split.
        test_size: examples of each test split.
        shortcuts: whether writers plant hackable features in good answers.
        seed: of scenes and writers.

    Raises:
        UserError: an unknown split, or a folder that cannot be written.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r} of the world: use one of {', '.join(SPLITS)}")
    config = world_config(task, shortcuts=shortcuts, train_size=size, test_size=test_size, seed=seed)
    return build_world(config, data_dir).as_data_source(split)
