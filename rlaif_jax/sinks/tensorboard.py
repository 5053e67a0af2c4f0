"""TensorBoard events as a sink."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlaif_jax.sinks.base import Numbers, unwritable


class TensorBoard:
    """Writes TensorBoard events to `folder/STAGE`: each stage is a TensorBoard run.

    (A purge hides every event of its run from a step on, whatever the tag, so stages cannot share one.) The
    calling thread writes the events: tensorboardX's `SummaryWriter` hands them to a thread through a short
    queue, and when a full disk ends that thread the training would wait for the queue for ever.
    """

    FLUSH_EVERY_S = 10.0

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}  # stage -> its EventsWriter
        self._flushed_at = -math.inf

    def start(self, stage: str, total: int | None, resume_from: int | None) -> None:
        # Lazy: half a second that `--help` need not pay.
        """Opens the events of `stage`; events after the step `resume_from` (None: all events) become void.

        `total` is not read.

        Raises:
            UserError: the file cannot be written.
        """
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        purge = 0 if resume_from is None else resume_from + 1
        with self._writable(stage):
            (self._folder / stage).mkdir(parents=True, exist_ok=True)
            # The name has whole seconds only: the suffix keeps a quick restart from overwriting the file.
            self._files[stage] = EventsWriter(str(self._folder / stage / "events"), f".{time.time_ns()}")
            self._files[stage].write_event(event_pb2.Event(wall_time=time.time(), step=purge, session_log=log))

    def write(self, stage: str, step: int, values: Numbers) -> None:
        """Writes the finite ones of `values` as scalars of `stage` at `step`; flushes every 10 seconds.

        Raises:
            UserError: the file cannot be written.
        """
        from tensorboardX.proto import event_pb2, summary_pb2

        finite = {key: value for key, value in values.items() if value is not None}
        summary = summary_pb2.Summary(
            value=[summary_pb2.Summary.Value(tag=key, simple_value=value) for key, value in finite.items()]
        )
        with self._writable(stage):
            self._files[stage].write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed_at > self.FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Writes all events to disk.

        Raises:
            UserError: a file cannot be written.
        """
        self._flushed_at = time.monotonic()
        for stage, file in self._files.items():
            with self._writable(stage):
                file.flush()

    def end(self, stage: str) -> None:
        """Closes the events of `stage`.

        Raises:
            UserError: the file cannot be written.
        """
        with self._writable(stage):
            self._files.pop(stage).close()

    def close(self) -> None:
        """Does nothing: `end` has closed the file of each stage."""

    @contextmanager
    def _writable(self, stage: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise unwritable(self._folder / stage, error) from error
