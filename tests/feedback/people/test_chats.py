"""The conversations of raters with a model."""

import pytest

from rlaif_jax.feedback.people.kinds import CHAT
from rlaif_jax.feedback.people.queue import TaskQueue
from rlaif_jax.feedback.people.tasks import PersonTask


@pytest.fixture
def queue(tmp_path):
    with TaskQueue(tmp_path / "f.sqlite") as queue:
        yield queue


def test_a_reply_with_half_a_character_is_kept_and_the_first_one_stays(queue):
    chat = PersonTask(kind=CHAT, prompt="talk")
    queue.put([chat])
    queue.chats.say(chat.id, "anna", "r1", "hello")
    queue.chats.reply("anna", "r1", "half \ud83d of it")
    queue.chats.reply("anna", "r1", "another")
    assert [turn.reply for turn in queue.chats.turns(chat.id, "anna")] == ["half ? of it"]
