"""Brindlemoor: a procedurally generated text world whose quality can be computed exactly.

This package re-exports what a labeler may know. Gold scores (``world.gold``), simulated people
(``world.annotators``) and the training corpora (``world.corpus``) are imported by their module's name, so that code
behind the labeler's firewall never loads them by accident.
"""

from rlaif_jax.data.world.grammar import ParseResult as ParseResult
from rlaif_jax.data.world.grammar import parse as parse
from rlaif_jax.data.world.grammar import wrong_tokens as wrong_tokens
from rlaif_jax.data.world.scenes import SPLITS as SPLITS
from rlaif_jax.data.world.scenes import Fact as Fact
from rlaif_jax.data.world.scenes import Scene as Scene
from rlaif_jax.data.world.scenes import Split as Split
from rlaif_jax.data.world.scenes import sample_scene as sample_scene
from rlaif_jax.data.world.scenes import scene_from_json as scene_from_json
from rlaif_jax.data.world.scenes import scene_to_json as scene_to_json
from rlaif_jax.data.world.tasks.base import Task as Task
from rlaif_jax.data.world.vocabulary import VOCABULARY as VOCABULARY
