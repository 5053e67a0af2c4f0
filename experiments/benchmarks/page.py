"""Measures the annotation page and the store at many tasks and records: `python -m experiments.benchmarks.page`.

    python -m experiments.benchmarks.page                       # 100,000 tasks, 20 raters; 100,000 records
    python -m experiments.benchmarks.page --tasks 2000 --records 2000

It fills a store in a temporary folder, starts the real page on it and prints milliseconds as a person at the page would
meet them, over HTTP; then seconds and memory of an export and an import of the store.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rlaif_jax.feedback.people.kinds import RATE
from rlaif_jax.feedback.people.queue import TaskQueue
from rlaif_jax.feedback.people.tasks import PersonTask
from rlaif_jax.feedback.records.forms import Rater, Rating, canonical, to_json
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.recipes.world.crowd import PageClient, running_page

IMPORT = """
import resource, sys, time
from pathlib import Path
from rlaif_jax.feedback.records.store import Store
with Store(Path(sys.argv[2])) as store:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started, busy = time.perf_counter(), time.process_time()
    added, bad = store.import_jsonl(Path(sys.argv[1]))
    wall, cpu = time.perf_counter() - started, time.process_time() - busy
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(f"import: {added} records, {len(bad)} bad lines, {added / wall:,.0f} a second ({added / cpu:,.0f} a processor's second), "
      f"{before:.0f} MB before, at most {peak:.0f} MB")
"""


def rating(task: PersonTask, rater: str, number: int) -> Rating:
    """Returns a rating of a task by a rater."""
    who = Rater(rater, "person")
    return Rating(
        prompt=task.prompt, answers=task.answers, rater=who, value=1.0 + number % 5, high=5.0, time=float(number)
    )


def fill(path: Path, tasks: list[PersonTask], raters: list[str], overlap: int) -> None:
    """Puts the tasks; half of them are answered, each by `overlap` raters in turn."""
    with TaskQueue(path) as queue:
        queue.put(tasks, overlap=overlap, origin="items.jsonl")
        rows = []
        for number, task in enumerate(tasks[: len(tasks) // 2]):
            for k in range(overlap):
                rater = raters[(number + k) % len(raters)]
                records = canonical([to_json(rating(task, rater, number + k))])
                rows.append((rater, f"request {number} {k}", "", task.id, records, float(number)))
        with queue.write() as db:
            db.executemany(
                "INSERT INTO page_post (rater, request, body, act, task, payload, records, seconds, time, informed, "
                "is_delivered) VALUES (?, ?, ?, 'answer', ?, '{\"value\": 3}', ?, 1.0, ?, 0, 1)",
                rows,
            )


def milliseconds(name: str, action: Callable[[], object], count: int) -> None:
    """Prints the median and the 95th percentile of the duration of an action."""
    spent = []
    for _ in range(count):
        started = time.perf_counter()
        action()
        spent.append(1000 * (time.perf_counter() - started))
    middle, high, most = np.percentile(spent, [50, 95, 100])
    print(
        f"{name}: {middle:.1f} ms in the middle, {high:.1f} ms at 95 %, at most {most:.1f} ms, {count} times",
        flush=True,
    )


def measure_page(folder: Path, count: int, raters: list[str], overlap: int) -> None:
    """Fills a queue and measures the page on it."""
    words = "word " * 100
    tasks = [PersonTask(kind=RATE, prompt=f"prompt {i} {words}", answers=("an answer " * 50,)) for i in range(count)]
    started = time.perf_counter()
    fill(folder / "page.sqlite", tasks, raters, overlap)
    print(f"{count} tasks, {count // 2 * overlap} posts put in {time.perf_counter() - started:.1f} s", flush=True)
    with running_page(folder / "page.sqlite", raters, "--overlap", str(overlap), timeout_s=600.0) as page:
        clients = [PageClient(page.urls[rater]) for rater in raters]
        for client in clients:
            client.call("/api/check", {"answers": [1, 2]})
        turn = iter(range(10**9))

        def work() -> None:
            client = clients[next(turn) % len(clients)]
            task = client.next()
            assert task is not None
            client.answer(task, {"value": 3})

        milliseconds("progress page, the first looks", lambda: clients[0].call("/api/team"), 3)
        milliseconds("next and answer, while the page counts the posts that it found", work, 5 * len(raters))
        while clients[0].call("/api/team")["uncounted"]:
            time.sleep(2.0)
        milliseconds("next and answer", work, 10 * len(raters))
        milliseconds("progress page", lambda: clients[0].call("/api/team"), 20)
        milliseconds("disputes", lambda: clients[0].call("/api/disputes"), 5)
        milliseconds("undo", clients[0].undo, 3)


def measure_store(folder: Path, count: int) -> None:
    """Fills a store and measures export and import, the import in another process for its memory."""
    words = "word " * 100
    with Store(folder / "store.sqlite") as store:
        started = time.perf_counter()
        for first in range(0, count, 10_000):
            store.add(
                Rating(
                    prompt=f"prompt {i} {words}", answers=("an answer " * 20,), rater=Rater("anna", "person"), value=3.0
                )
                for i in range(first, min(first + 10_000, count))
            )
        print(f"add: {count / (time.perf_counter() - started):,.0f} records a second", flush=True)
        started = time.perf_counter()
        store.export_jsonl(folder / "out.jsonl")
        print(f"export: {count / (time.perf_counter() - started):,.0f} records a second", flush=True)
    subprocess.run([sys.executable, "-c", IMPORT, folder / "out.jsonl", folder / "other.sqlite"], check=True)


def main() -> None:
    """Runs the measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=100_000, help="tasks of the page; 0: the page is not measured")
    parser.add_argument("--raters", type=int, default=20, help="raters of the page")
    parser.add_argument("--overlap", type=int, default=2, help="raters who answer each task")
    parser.add_argument("--records", type=int, default=100_000, help="records of the store; 0: it is not measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.tasks:
            raters = [f"rater {i}" for i in range(options.raters)]
            measure_page(Path(folder), options.tasks, raters, options.overlap)
        if options.records:
            measure_store(Path(folder), options.records)
    print(f"this process: at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
