"""A judge behind an API, for a training loop: calls run in the background of the loop.

    config = ApiConfig(server="http://127.0.0.1:8000/v1", model="qwen")
    with ApiJudge(config, store=folder / "feedback.sqlite") as judge:
        futures = judge.submit(questions, PAIRWISE)      # returns at once; the calls run in the background
        ...                                              # the next rollout
        outcomes = [future.result() for future in futures]

Every pair is asked in both orders. Each judgement is in the store before its future is done, and once only,
however often its question is asked. A call that fails for good, or that a budget forbids, is a judgement
without a value (`error`), with the reason in `raw`: it is missing, and a later run asks again and supersedes
it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sqlite3
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, Literal

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.api.cache import CallCache
from rlaif_jax.feedback.api.config import ApiConfig
from rlaif_jax.feedback.api.failures import CallFailed
from rlaif_jax.feedback.api.limits import BudgetSpent
from rlaif_jax.feedback.api.templates import Question, Template
from rlaif_jax.feedback.api.transport import ModelReply, Spent, Transport
from rlaif_jax.feedback.api.verdicts import Debias, ParsedVerdict, Preference, make_judgement, preference, read_verdict
from rlaif_jax.feedback.records.forms import ANSWERED, Call, Judgement, Rater, Rating, sha256, to_json
from rlaif_jax.feedback.records.store import Store


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A question with its judgements.

    Attributes:
        question: the question.
        judgements: of a pair one for each order and repeat, else one for each repeat.
        debias: how both orders of a pair become one probability.
    """

    question: Question
    judgements: tuple[Judgement, ...]
    debias: Debias = "logit"

    @property
    def missing(self) -> tuple[Judgement, ...]:
        """Returns the judgements without a value."""
        return tuple(entry for entry in self.judgements if not entry.answered)

    @property
    def preference(self) -> Preference | None:
        """Returns the preference of a pair, both orders together; None if an order has no answer."""
        return preference(self.judgements, debias=self.debias)

    @property
    def rating(self) -> float | None:
        """Returns the rating of an answer, the mean over the answered repeats; None without one."""
        values = [entry.value for entry in self.judgements if isinstance(entry, Rating) and entry.answered]
        return sum(values) / len(values) if values else None


class ApiJudge:
    """A judge behind an API: asks a server's model and records its judgements.

    The calls run in the judge's own thread; all methods may be called from any thread.

    Args:
        config: the server, the model and the limits.
        store: the feedback store in which each judgement is recorded as it arrives; None = nowhere.
        listener: is called with each judgement, in the judge's thread.

    Raises:
        UserError: the package openai is missing, the server, the model or the key is, or a file cannot be
            opened.
    """

    def __init__(
        self, config: ApiConfig, *, store: Path | None = None, listener: Callable[[Judgement], None] | None = None
    ) -> None:
        self.config = config
        self._listener = listener
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._disk = ThreadPoolExecutor(1, "judge-disk")  # SQLite objects stay in the thread that made them
        self._thread: Thread | None = None
        self._tasks: dict[str, asyncio.Task[Judgement]] = {}
        try:
            cache = config.cache or (store and Path(store).with_suffix(".calls.sqlite"))
            self._cache = self._disk.submit(CallCache, cache).result()
            self._recorder = self._disk.submit(Recorder, store).result()
            self._transport = Transport(config, self._cache, self._disk)
        except BaseException:
            self._disk.shutdown()
            self._loop.close()
            raise
        self._thread = Thread(target=self._loop.run_forever, name="judge", daemon=True)
        self._thread.start()

    def __enter__(self) -> ApiJudge:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops all calls and closes the files.

        Futures that are not done are cancelled; all judgements so far are on disk.
        """
        if self._closed:
            return
        self._closed = True
        self._on_loop(self._stop()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        assert self._thread is not None
        self._thread.join()
        self._loop.close()
        self._disk.submit(self._cache.close).result()
        self._disk.submit(self._recorder.close).result()
        self._disk.shutdown()

    async def _stop(self) -> None:
        """Cancels all tasks of the loop and closes the connections."""
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._transport.close()

    def _on_loop(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    @property
    def spent(self) -> Spent:
        """Returns the requests, tokens and money used so far."""
        return self._transport.spent

    @property
    def concurrency(self) -> int:
        """Returns how many calls may run at a time now: fewer than in the config after "too many requests"."""
        return self._transport.concurrency

    # ---- questions

    def submit(self, questions: Sequence[Question], template: Template) -> list[Future[Outcome]]:
        """Starts to ask and returns a future for each question, in their order.

        The same question twice is asked once.

        Args:
            questions: the prompts with the answers to judge.
            template: the wording of the request and the form of the verdict.

        Raises:
            UserError: the template cannot ask a question; the message names it. Where the server's
                log-probabilities decide between [direct] and [reasons], a question that only the chosen
                section cannot ask is an `error`.
        """
        require(not self._closed, "this judge is closed")
        orders = ((0, 1), (1, 0)) if template.form == "ranking" else ((0,),)
        for question in questions:
            self._require_askable(question, template, orders[0])
        return [self._on_loop(self._judge(question, template, orders)) for question in questions]

    def _ending(self, template: Template, logprobs: bool) -> Literal["direct", "reasons", ""]:
        """Chooses the section that ends a question, on a server with or without log-probabilities."""
        if not template.choices:
            return ""
        reading = self.config.reading
        wanted = reading == "direct" or (reading == "auto" and logprobs and template.scorable)
        return "direct" if not template.reasoned or (wanted and template.direct) else "reasons"

    def _require_askable(self, question: Question, template: Template, order: tuple[int, ...]) -> None:
        """Raises UserError if no ending that may be used can ask this."""
        try:
            template.render(question, order, ending=self._ending(template, True))
        except UserError:
            template.render(question, order, ending=self._ending(template, False))

    def judge(self, questions: Sequence[Question], template: Template) -> list[Outcome]:
        """Asks all questions with a template and waits for their outcomes, which it returns in their order.

        Args:
            questions: the prompts with the answers to judge.
            template: the wording of the request and the form of the verdict.
        """
        return [future.result() for future in self.submit(questions, template)]

    async def _judge(self, question: Question, template: Template, orders: tuple[tuple[int, ...], ...]) -> Outcome:
        seeds = range(self.config.seed, self.config.seed + self.config.repeats)
        tasks = [self._task(question, template, order, seed) for seed in seeds for order in orders]
        return Outcome(question, tuple(await asyncio.gather(*tasks)), self.config.debias)

    def _task(
        self, question: Question, template: Template, order: tuple[int, ...], seed: int
    ) -> asyncio.Future[Judgement]:
        """Returns the one task that asks this, started now or before."""
        key = sha256([dataclasses.asdict(question) | {"where": ""}, template.hash, order, seed])
        task = self._tasks.get(key)
        if task is None:
            task = self._loop.create_task(self._record_verdict(question, template, order, seed))
            self._tasks[key] = task
            task.add_done_callback(lambda _: self._tasks.pop(key, None))
        return asyncio.shield(task)

    def rater(self, question: Question, template: Template) -> Rater:
        """Returns the rater of the records.

        Its prompt hash covers the template's wording and what the question adds to it.
        """
        config = self.config
        added = [question.rubric, question.reference, question.critique]
        return Rater(
            name=config.rater or config.model,
            source="ai",
            model=f"{config.model}@{config.revision}" if config.revision else config.model,
            prompt_hash=sha256([template.hash, *added]) if any(added) else template.hash,
        )

    async def _record_verdict(
        self, question: Question, template: Template, order: tuple[int, ...], seed: int
    ) -> Judgement:
        """Asks once and records the judgement; a failure of this question is recorded as an `error`."""
        make = partial(make_judgement, question, template, order=order, rater=self.rater(question, template), seed=seed)
        try:
            verdict, replies = await self._verdict(question, template, order, seed)
            raw = replies[-1].reply.refusal or replies[-1].reply.text
            made = make(verdict, raw=raw, time=replies[-1].time, call=_call(replies))
        except (CallFailed, BudgetSpent, UserError, ValueError, sqlite3.Error) as failed:
            # The failure is this question's alone: the other questions go on.
            made = make(ParsedVerdict("error"), raw=self._transport.scrub(str(failed)), time=time.time())
        recorded: Judgement = await self._loop.run_in_executor(self._disk, self._recorder.record, made)
        if self._listener is not None:
            self._listener(recorded)
        return recorded

    async def _verdict(
        self, question: Question, template: Template, order: tuple[int, ...], seed: int
    ) -> tuple[ParsedVerdict, list[ModelReply]]:
        """Returns the verdict, and the one or two replies that it took."""
        config, transport = self.config, self._transport
        capabilities = await transport.capabilities()
        logprobs = capabilities.top_logprobs > 0
        ending = self._ending(template, logprobs)
        direct = ending == "direct"
        rendered = template.render(question, order, ending=ending)
        scored = logprobs and template.choices and template.scorable
        length = (1 if scored else 8) if direct else config.max_tokens or template.max_tokens
        ask = partial(transport.ask, rendered.messages, max_tokens=length, logprobs=scored, order=order, seed=seed)
        parse = lambda answer: read_verdict(answer.reply, template, rendered, direct=direct, min_mass=config.min_mass)
        first = await ask()
        verdict = parse(first)
        if verdict.status != "abstained" or config.constrain == "none" or not capabilities.constrains:
            return verdict, [first]
        try:  # the judge's reply is no label: make it choose
            again = await ask(labels=[label for label, _ in template.labels])
        except (CallFailed, BudgetSpent):
            return verdict, [first]
        chosen = parse(again)
        return (chosen, [first, again]) if chosen.status in ANSWERED else (verdict, [first, again])


def _call(replies: Sequence[ModelReply]) -> Call:
    """Adds up what the replies of one judgement took."""
    return Call(
        latency_s=sum(r.latency_s for r in replies),
        prompt_tokens=sum(r.reply.prompt_tokens or 0 for r in replies),
        completion_tokens=sum(r.reply.completion_tokens or 0 for r in replies),
        cost=sum(r.cost for r in replies),
    )


class Recorder:
    """Records judgements in a store; a new judgement on the same subject supersedes the old one."""

    def __init__(self, store: Path | None) -> None:
        self._store = Store(store) if store is not None else None

    def close(self) -> None:
        """Closes the store's file, if there is one."""
        if self._store is not None:
            self._store.close()

    def record(self, made: Judgement) -> Judgement:
        """Records a judgement and returns what is on record now.

        A missing judgement never replaces an answer, and a judgement with the same content is not recorded
        twice.

        Raises:
            UserError: the store cannot be written.
        """
        if self._store is None:
            return made
        subject = _subject(made)
        try:  # looked up now: another process may have recorded the same meanwhile
            about = [entry.judgement for entry in self._store.read(source="ai", item=made.item)]
            known = next((entry for entry in reversed(about) if _subject(entry) == subject), None)
            if known is not None:
                if (known.answered and not made.answered) or _content(known) == _content(made):
                    return known
                made = dataclasses.replace(made, supersedes=known.id)
            self._store.add([made])
        except sqlite3.Error as error:
            raise UserError(f"{self._store.path}: a judgement cannot be recorded ({error})") from error
        return made


def _subject(entry: Judgement) -> str:
    """Returns the key of what a judgement is about: rater, prompt, answers as shown, principle and seed."""
    shown = [entry.answers[i] for i in entry.shown] if entry.shown else list(entry.answers)
    if len(set(shown)) < len(shown):  # two answers of the same words still are two orders
        shown.append(str(entry.shown))
    rater = [entry.rater.name, entry.rater.model, entry.rater.prompt_hash]
    return sha256([entry.form, rater, entry.prompt, shown, entry.principle, entry.seed])


def _content(entry: Judgement) -> dict[str, Any]:
    """Returns the record without the data of its call, for comparing two judgements on the same subject."""
    values = to_json(entry)
    for name in ("call", "supersedes", "time"):
        del values[name]
    return values
