"""`python -m rlaif_jax annotate`: serve the annotation page of a feedback store."""

from __future__ import annotations

import dataclasses
import json
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.people.queue import TaskQueue
from rlaif_jax.feedback.people.tasks import read_tasks
from rlaif_jax.feedback.records.store import Store
from rlaif_jax.ui.service import Desk, Question
from rlaif_jax.ui.tokens import rater_tokens

INSTRUCTIONS = """\
You will see a prompt and one or more answers that language models wrote to it. Judge the answers, not the topic.

Read everything before you choose. An answer is not better for being longer or for sounding sure.

If two answers are equally good, call it a tie. If neither is acceptable, say that both are bad.

If you cannot judge, skip and say why: a guess is worth less than a skip.

You can undo your last answer at any time. What you have sent is saved, even if you close the page.
"""

CHECK = (
    Question(
        "Two answers are equally good, but one is much longer. What do you choose?",
        ("The longer one", "A tie", "Both bad"),
        1,
        "Length alone does not make an answer better: equally good is a tie.",
    ),
    Question(
        "You do not know the topic well enough to judge an answer. What do you do?",
        ("Guess", "Take the one that sounds sure", "Skip and say why"),
        2,
        "A guess is worth less than a skip with its reason.",
    ),
)


@dataclasses.dataclass(frozen=True)
class AnnotateConfig:
    """Serve the annotation page; every rater gets an address of their own. Stop it with Ctrl-C: nothing sent is lost.

    Attributes:
        store: the feedback store that everything goes into; created if absent.
        items: JSONL files of tasks to add: {"kind": "compare", "prompt": ..., "answers": [..., ...]}; kinds are compare,
          rank, rate, edit, comment, chat; `rlaif_jax.feedback.people.tasks.Task` has all fields. The same task twice is one.
        raters: who annotates.
        coordinator: the rater who adjudicates, exports and may stop a run; the first rater if empty.
        simulated: those of the raters that are programs; their records say so.
        overlap: how many raters answer each task.
        instructions: a text file shown before the work; a short general text if absent.
        check: a JSON file of questions on the instructions, [{"question", "options": [...], "answer": index, "why"}]; the
          built-in ones if absent and there are no instructions of your own.
        model: what chats talk to: the URL of an OpenAI-compatible server or a folder with a language model.
        model_name: its name on that server.
        model_tokenizer: the tokenizer of the model in the folder, if it lies elsewhere.
        title: of the page.
        host: address or name to listen on; under it and the loopback ones the page is reached, under no other. Any but a
          loopback address sends the raters' tokens over the network in the clear.
        port: to listen on; 0 takes a free one.
        seed: of the order in which answers are shown.
        lease_minutes: after which a task that was taken and not answered goes to others.
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
    title: str = "Annotation"
    host: str = "127.0.0.1"
    port: int = 0
    seed: int = 0
    lease_minutes: float = 15.0

    def __post_init__(self) -> None:
        require(len(self.raters) >= 1, "raters is empty: name at least one")
        require(all(name.strip() for name in self.raters), "one of the raters has an empty name")
        require(len(set(self.raters)) == len(self.raters), f"two raters have one name: {', '.join(self.raters)}")
        unknown = [name for name in (*self.simulated, *filter(None, [self.coordinator])) if name not in self.raters]
        require(not unknown, f"{', '.join(unknown)}: not among the raters ({', '.join(self.raters)})")
        require(self.overlap >= 1, f"overlap must be at least 1, not {self.overlap}")
        require(
            self.overlap <= len(self.raters), f"overlap is {self.overlap}, but there are only {len(self.raters)} raters"
        )
        require(self.lease_minutes > 0, f"lease_minutes must be positive, not {self.lease_minutes}")
        require(0 <= self.port < 65_536, f"port must lie between 0 (a free one) and 65535, not {self.port}")


def read_questions(path: Path) -> tuple[Question, ...]:
    """The questions of a check file; UserError for a file that holds none."""
    try:
        entries = json.loads(path.read_text())
        require(isinstance(entries, list) and bool(entries), f"{path}: a check is a list of questions")
        return tuple(
            Question(str(e["question"]), tuple(map(str, e["options"])), int(e["answer"]), str(e.get("why", "")))
            for e in entries
        )
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: a check is a list of objects with question, options, answer ({error})") from error


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(128)
    except (OSError, UnicodeError) as error:
        found.close()
        raise UserError(f"cannot listen on {host}:{port} ({error}); port 0 takes a free one") from error
    return found


def main(config: AnnotateConfig) -> None:
    """Serve until interrupted. Prints `NAME: URL` for each rater once the page can be opened."""
    try:
        import uvicorn
        from starlette.concurrency import run_in_threadpool

        from rlaif_jax.ui.server import LOOPBACK, create_app, names_let_in
    except ImportError as error:
        raise UserError(f"the annotation page needs an extra ({error}): pip install 'rlaif-jax[ui]'") from error

    instructions = INSTRUCTIONS if config.instructions is None else _read(config.instructions)
    questions = read_questions(config.check) if config.check else CHECK if config.instructions is None else ()
    added = [read_tasks(path) for path in config.items]
    model: dict[str, Any] = {}
    if config.model:
        from rlaif_jax.ui.chat import open_chat_model

        model = {
            "chat": open_chat_model(config.model, config.model_name, config.model_tokenizer),
            "in_thread": run_in_threadpool,
        }
    with ExitStack() as closing:
        store = closing.enter_context(Store(config.store))
        queue = closing.enter_context(TaskQueue(config.store, lease_s=60 * config.lease_minutes))
        queue.register(config.raters)
        if delivered := queue.deliver(store):
            print(f"finished {delivered} posts that a crash had cut short")
        for path, (tasks, bad) in zip(config.items, added):
            new = queue.put(tasks, overlap=config.overlap, origin=path.name)
            print(f"{path}: {len(tasks)} tasks, {new} of them new")
            for message in bad[:20]:
                print(f"  left out: {message}", file=sys.stderr)
            if bad:
                print(f"  {len(bad)} bad lines were left out", file=sys.stderr)
        chats = sum(waiting.task.kind == "chat" for waiting in queue.tasks())
        if chats and not config.model:
            print(f"warning: {chats} tasks are chats, but there is no --model to talk to", file=sys.stderr)
        desk = Desk(
            store,
            queue,
            config.raters,
            config.coordinator or config.raters[0],
            frozenset(config.simulated),
            questions,
            config.seed,
            **model,
        )
        tokens = rater_tokens(config.store, config.raters)
        app = create_app(desk, tokens, instructions=instructions, title=config.title, host=config.host)
        listening = closing.enter_context(_listen(config.host, config.port))
        port = listening.getsockname()[1]
        if config.host not in LOOPBACK:
            print(
                f"warning: {config.host} is not loopback: tokens cross the network in the clear. Safer: keep the default "
                "host and reach the page through `ssh -L`.",
                file=sys.stderr,
            )
            names = ", ".join(names_let_in(config.host))
            print(
                f"the page is reached under these names only: {names}; under another with --host NAME", file=sys.stderr
            )
        name = f"[{config.host}]" if ":" in config.host else config.host
        for rater in config.raters:
            print(f"{rater}: http://{name}:{port}/?token={tokens[rater]}", flush=True)
        # No access log: an address may hold a token.
        settings = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan="off")
        uvicorn.Server(settings).run(sockets=[listening])


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(AnnotateConfig))
    except UserError as problem:
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:
        pass
