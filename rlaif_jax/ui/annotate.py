"""`python -m rlaif_jax annotate`: serves the annotation page of a feedback store."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlaif_jax.config import UserError, missing_extra, require
from rlaif_jax.feedback.people.kinds import CHAT
from rlaif_jax.feedback.people.queue import TaskQueue
from rlaif_jax.feedback.people.tasks import PersonTask, read_tasks
from rlaif_jax.feedback.records.sqlite import searchable
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.ui.check import CheckQuestion
from rlaif_jax.ui.service import AnnotationService
from rlaif_jax.ui.tokens import rater_tokens
from rlaif_jax.ui.worker import BLINK_S, Worker

if TYPE_CHECKING:
    from fastapi import FastAPI

    from rlaif_jax.ui.chat import ChatModel

INSTRUCTIONS = """\
You will see a prompt and one or more answers that language models wrote to it. Judge the answers, not the topic.

Read everything before you choose. An answer is not better for being longer or for sounding sure.

If two answers are equally good, call it a tie. If neither is acceptable, say that both are bad.

If you cannot judge, skip and say why: a guess is worth less than a skip.

You can undo your last answer at any time. What you have sent is saved, even if you close the page.
"""

CHECK = (
    CheckQuestion(
        "Two answers are equally good, but one is much longer. What do you choose?",
        ("The longer one", "A tie", "Both bad"),
        1,
        "Length alone does not make an answer better: equally good is a tie.",
    ),
    CheckQuestion(
        "You do not know the topic well enough to judge an answer. What do you do?",
        ("Guess", "Take the one that sounds sure", "Skip and say why"),
        2,
        "A guess is worth less than a skip with its reason.",
    ),
)


@dataclasses.dataclass(frozen=True)
class AnnotateConfig:
    """Serves the annotation page; every rater gets a personal address.

    Stop it with Ctrl-C: nothing that was sent is lost.

    Attributes:
        store: the feedback store that everything goes into; created if absent.
        items: JSONL files of tasks to add: {"kind": "compare", "prompt": ..., "answers": [..., ...]}; kinds are compare,
          rank, rate, edit, comment, chat; `rlaif_jax.feedback.people.tasks.PersonTask` has all fields. The same task in two
          lines is one task.
        raters: the names of the raters.
        coordinator: the rater who adjudicates, exports and may stop a run; the first rater if empty.
        simulated: those of the raters that are programs; their records say so.
        overlap: the number of raters who answer each task.
        instructions: a text file shown before the work; a short general text if absent.
        check: a JSON file of questions on the instructions, [{"question", "options": [...], "answer": index, "why"}]. If
          absent, the built-in questions on the built-in instructions; none on other instructions.
        model: the model that chats talk to: the URL of an OpenAI-compatible server, or a folder with a language model.
        model_name: the model's name on that server.
        model_tokenizer: the tokenizer of the model in the folder, if it is in another place.
        model_key_env: name of the environment variable that holds the key of the model's server; none is sent if empty.
        title: the title of the page.
        host: address or name to listen on; the page is reached under this name and the loopback names only. Any but a
          loopback address sends the raters' tokens over the network in the clear.
        port: the port to listen on; 0 takes a free one.
        seed: seed of the order in which answers are shown.
        lease_minutes: minutes after which a task that was taken and not answered is offered to others.
    """

    store: Path = Path("feedback.sqlite")
    items: tuple[Path, ...] = ()
    raters: tuple[str, ...] = ("rater",)
    coordinator: str = ""
    simulated: tuple[str, ...] = ()
    overlap: int = 1
    instructions: Path | None = None
    check: Path | None = None
    model: str = ""
    model_name: str = ""
    model_tokenizer: Path | None = None
    model_key_env: str = ""
    title: str = "Annotation"
    host: str = "127.0.0.1"
    port: int = 0
    seed: int = 0
    lease_minutes: float = 15.0

    def __post_init__(self) -> None:
        require(len(self.raters) >= 1, "raters is empty: name at least one")
        require(all(name.strip() for name in self.raters), "one of the raters has an empty name")
        half = [name for name in self.raters if searchable(name) != name]
        require(not half, f"the name {half[:1]} of a rater is no UTF-8 text")
        require(len(set(self.raters)) == len(self.raters), f"two raters have one name: {', '.join(self.raters)}")
        unknown = [name for name in (*self.simulated, *filter(None, [self.coordinator])) if name not in self.raters]
        require(not unknown, f"{', '.join(unknown)}: not among the raters ({', '.join(self.raters)})")
        require(self.overlap >= 1, f"overlap must be at least 1, not {self.overlap}")
        require(
            self.overlap <= len(self.raters), f"overlap is {self.overlap}, but there are only {len(self.raters)} raters"
        )
        require(self.lease_minutes > 0, f"lease_minutes must be positive, not {self.lease_minutes}")
        require(0 <= self.port < 65_536, f"port must lie between 0 (a free one) and 65535, not {self.port}")


def help_text() -> str:
    """Returns the description of --help: what the tool does, and an example."""
    return (
        "Serves the annotation page of a feedback store; prints a personal address for each rater. Ctrl-C ends it: nothing\n"
        "that was sent is lost.\n\n"
        "  python -m rlaif_jax annotate --store runs/rlaif/feedback.sqlite --raters anna ben\n"
        "  python -m rlaif_jax annotate --store feedback.sqlite --items tasks.jsonl --raters anna ben --overlap 2"
    )


def read_check(path: Path) -> tuple[CheckQuestion, ...]:
    """Returns the questions of a check file. Raises UserError where the file is no check."""
    try:
        entries = json.loads(path.read_text())
        require(isinstance(entries, list) and bool(entries), f"{path}: a check is a list of questions")
        return tuple(
            CheckQuestion(str(e["question"]), tuple(map(str, e["options"])), int(e["answer"]), str(e.get("why", "")))
            for e in entries
        )
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: a check is a list of objects with question, options, answer ({error})") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _listen(host: str, port: int) -> socket.socket:
    is_ipv6 = ":" in host
    family = socket.AF_INET6 if is_ipv6 else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128, dualstack_ipv6=is_ipv6)
    except (OSError, ValueError) as error:  # a UnicodeError of the host's name is a ValueError
        raise UserError(f"cannot listen on {host}:{port} ({error}); port 0 takes a free one") from error


def main(config: AnnotateConfig) -> None:
    """Serves the page until interrupted. Prints `NAME: URL` for each rater once the page can be opened.

    Raises UserError where the extra is missing, a file cannot be read or the port is taken.
    """
    try:
        import uvicorn  # noqa: F401  # only looked for here: `_serve` uses it

        from rlaif_jax.ui.server import create_app
    except ImportError as error:
        raise missing_extra(f"the annotation page needs packages that are not installed ({error})", "ui") from error

    instructions = INSTRUCTIONS if config.instructions is None else _read_text(config.instructions)
    questions = read_check(config.check) if config.check else CHECK if config.instructions is None else ()
    items = {path: read_tasks(path) for path in config.items}
    chat = None
    if config.model:
        from rlaif_jax.ui.chat import open_chat_model

        chat = open_chat_model(config.model, config.model_name, config.model_tokenizer, config.model_key_env)
    with Worker() as worker:
        service = worker.call(_open_service, config, items, questions, chat, worker)
        try:
            tokens = rater_tokens(config.store, config.raters)
            app = create_app(service, tokens, instructions=instructions, title=config.title, host=config.host)
            _serve(config, app, tokens)
        finally:
            worker.call(service.close)


def _open_service(
    config: AnnotateConfig,
    items: Mapping[Path, tuple[Sequence[PersonTask], Sequence[str]]],
    questions: tuple[CheckQuestion, ...],
    chat: ChatModel | None,
    worker: Worker,
) -> AnnotationService:
    """Opens the files, in the worker's thread, and adds the tasks.

    Args:
        config: the settings of the page.
        items: file -> the result of `read_tasks`.
        questions: the check.
        chat: the model of the chats.
        worker: the thread.
    """
    store = Store(config.store, patience_s=BLINK_S)
    queue = TaskQueue(config.store, lease_s=60 * config.lease_minutes, patience_s=BLINK_S)
    with TaskQueue(config.store) as patient, Store(config.store) as place:  # a start may wait for another writer
        patient.team.register(config.raters)
        if delivered := patient.deliver(place):
            print(f"finished {delivered} posts that a crash had cut short")
        _add_items(items, config, patient)
    coordinator = config.coordinator or config.raters[0]
    simulated = frozenset(config.simulated)
    return AnnotationService(
        store,
        queue,
        config.raters,
        coordinator,
        simulated,
        questions,
        config.seed,
        chat,
        in_thread=asyncio.to_thread,
        worker=worker,
    )


def _serve(config: AnnotateConfig, app: FastAPI, tokens: Mapping[str, str]) -> None:
    """Serves the page until interrupted and prints the raters' addresses."""
    import uvicorn

    from rlaif_jax.ui.security import LOOPBACK, allowed_hosts

    with _listen(config.host, config.port) as listening:
        if config.host not in LOOPBACK:
            print(
                f"warning: {config.host} is not loopback: tokens cross the network in the clear. Safer: keep the "
                "default host and reach the page through `ssh -L`.\nthe page is reached under these names only: "
                f"{', '.join(allowed_hosts(config.host))}; under another with --host NAME",
                file=sys.stderr,
            )
        name = f"[{config.host}]" if ":" in config.host else config.host
        for rater in config.raters:
            print(f"{rater}: http://{name}:{listening.getsockname()[1]}/?token={tokens[rater]}", flush=True)
        # No access log: an address may hold a token.
        settings = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan="off")
        uvicorn.Server(settings).run(sockets=[listening])


def _add_items(
    items: Mapping[Path, tuple[Sequence[PersonTask], Sequence[str]]], config: AnnotateConfig, queue: TaskQueue
) -> None:
    """Puts the tasks of files into the queue and prints what was left out.

    items: file -> the result of `read_tasks`.
    """
    for path, (tasks, bad) in items.items():
        new = queue.put(tasks, overlap=config.overlap, origin=path.name)
        print(f"{path}: {len(tasks)} tasks, {new} of them new")
        for message in bad[:20]:
            print(f"  left out: {message}", file=sys.stderr)
        if bad:
            print(f"  {len(bad)} bad lines were left out", file=sys.stderr)
    chats = sum(group.tasks for group in queue.groups() if group.kind == CHAT.name)
    if chats and not config.model:
        print(f"warning: {chats} tasks are chats, but there is no --model to talk to", file=sys.stderr)
