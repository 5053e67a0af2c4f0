"""What the raters' answers add up to: agreement and disagreement, taken up post by post."""

from __future__ import annotations

import hashlib
import time

from rlaif_jax.feedback.people.kinds import CHAT, COMMENT
from rlaif_jax.feedback.people.queue import Post, TaskQueue
from rlaif_jax.quality.annotators import AgreementTally

_STEP = 20  # posts that are read at once


class Review:
    """The agreement of the raters and the tasks on which they disagree.

    Every post is read once; the cost of a look does not grow with the number of posts before it.

    Attributes:
        agreement: the agreement of the posts that were taken up.
        disputed: the ids of tasks whose raters disagree and that nobody has adjudicated, in the order in which they
            became so.
    """

    def __init__(self, queue: TaskQueue) -> None:
        self.agreement = AgreementTally()
        self.disputed: dict[str, None] = {}
        self._queue, self._after = queue, 0
        self._verdicts: dict[str, dict[str, str]] = {}  # task -> rater -> hash of the verdict
        self._decided: set[str] = set()

    def advance(self, seconds: float) -> int:
        """Takes up new posts for at most about this long; returns the number of posts that may be left."""
        deadline = time.monotonic() + seconds
        while news := self._queue.news(self._after, _STEP):
            for number, kind, is_undone, post in news:
                self._take(kind, is_undone, post)
                self._after = number
            if time.monotonic() >= deadline:
                return self._queue.last_number() - self._after
        return 0

    def _take(self, kind: str, is_undone: bool, post: Post) -> None:
        if post.act == "adjudicate":
            self._decided.add(post.task)
        elif post.act == "undo":
            self.agreement.remove(post.task, post.rater)
            self._verdicts.get(post.task, {}).pop(post.rater, None)
        elif post.act == "answer" and not is_undone:
            self.agreement.add(kind, post)
            # No two conversations are alike, and no two comments.
            if kind not in (CHAT.name, COMMENT.name):
                self._verdicts.setdefault(post.task, {})[post.rater] = _verdict(post)
        if post.task not in self._decided and len(set(self._verdicts.get(post.task, {}).values())) > 1:
            self.disputed.setdefault(post.task)
        else:
            self.disputed.pop(post.task, None)


def _verdict(post: Post) -> str:
    """Returns the hash of the parts of a post that are equal where two raters agree.

    Margins, notes and the order on the screen are no part of it.
    """
    names = ("ranks", "beats", "both_bad", "value", "edited", "spans", "text")
    parts = [vars(record).get(name) for record in post.records for name in names]
    return hashlib.sha256(repr(parts).encode()).hexdigest()  # repr escapes what UTF-8 cannot hold
