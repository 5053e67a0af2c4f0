"""All tasks of the world, in one tuple: a new task adds its line here and in `gold/scores.py`."""

from rlaif_jax.data.world.tasks import dialogue, summarisation
from rlaif_jax.data.world.tasks.base import WorldTask

WORLD_TASKS: tuple[WorldTask, ...] = (summarisation.TASK, dialogue.TASK)
