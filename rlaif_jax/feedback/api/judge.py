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
from rlaif_jax.feedback.api.connection import off_loop
from rlaif_jax.feedback.api.dialects import Relearned, ServerCapabilities
from rlaif_jax.feedback.api.failures import CallFailed, Charge
from rlaif_jax.feedback.api.limits import BudgetSpent, Spent
from rlaif_jax.feedback.api.templates import Question, Template
from rlaif_jax.feedback.api.transport import ModelReply, Transport
from rlaif_jax.feedback.api.verdicts import Debias, ParsedVerdict, Preference, make_judgement, preference, read_verdict
from rlaif_jax.feedback.records.forms import ANSWERED, Call, Judgement, Rater, Rating, sha256
from rlaif_jax.feedback.records.recorder import Recorder

DIALECTS = 8  # the ways in which a question is asked before the server is given up
GRACE_S = 3.0  # for replies under way when a run is asked to stop
CUT = "cut at max_tokens"  # how the record of a reply begins that breaks off
DIRECT_TOKENS = 8  # the greatest length of a label without reasons
THOUGHT_TOKENS = 4096  # more for a model that thinks before it answers


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

    def finish(self, seconds: float = GRACE_S) -> None:
        """Sends no further request and waits for the replies to those under way, which are paid for.

        The replies are kept. For the end of a run that was asked to stop; the judge can then only be closed. A second call
        does nothing.

        Args:
            seconds: the longest wait; a reply that comes later is lost.
        """
        if not (self._closed or self._transport.ending):
            self._on_loop(self._finish(seconds)).result()

    async def _finish(self, seconds: float) -> None:
        self._transport.ending = True
        begun = [task for task in self._tasks.values() if task in self._transport.begun]
        for task in set(self._tasks.values()).difference(begun):
            task.cancel()
        if begun:
            await asyncio.wait(begun, timeout=seconds)

    def close(self) -> None:
        """Stops all calls and closes the files.

        Replies under way are waited for as `finish` does. Then futures that are not done are cancelled; all judgements so
        far are on disk.
        """
        if self._closed:
            return
        self.finish()
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
        require(not (self._closed or self._transport.ending), "this judge is closed")
        orders = ((0, 1), (1, 0)) if template.form == "ranking" else ((0,),)
        for question in questions:
            self._require_askable(question, template, orders[0])
        futures: list[Future[Outcome]] = [Future() for _ in questions]
        for future, question in zip(futures, questions):
            # The coroutine is made in the loop: a stop that interrupts this leaves none that nobody awaits.
            self._loop.call_soon_threadsafe(self._begin, question, template, orders, future)
        return futures

    def _begin(
        self, question: Question, template: Template, orders: tuple[tuple[int, ...], ...], future: Future[Outcome]
    ) -> None:
        """Starts to ask, in the loop, and lets `future` end as the asking does."""

        def ended(task: asyncio.Task[Outcome]) -> None:
            if task.cancelled():
                future.cancel()
            if not future.set_running_or_notify_cancel():
                return
            if (error := task.exception()) is not None:
                future.set_exception(error)
            else:
                future.set_result(task.result())

        self._loop.create_task(self._judge(question, template, orders)).add_done_callback(ended)

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
        expense = Expense()
        try:
            verdict, raw, when = await self._verdict(question, template, order, seed, expense)
            made = make(verdict, raw=raw, time=when, call=expense.call)
        except (CallFailed, BudgetSpent, UserError, ValueError, sqlite3.Error) as failed:
            # The failure is this question's alone: the other questions go on.
            if isinstance(failed, (CallFailed, BudgetSpent)):
                expense.add(failed.charge)
            raw = self._transport.scrub(str(failed))
            made = make(ParsedVerdict("error"), raw=raw, time=time.time(), call=expense.call)
        recorded: Judgement = await self._loop.run_in_executor(self._disk, self._recorder.record, made, expense.paid)
        if self._listener is not None:
            self._listener(recorded)
        return recorded

    async def _verdict(
        self, question: Question, template: Template, order: tuple[int, ...], seed: int, expense: Expense
    ) -> tuple[ParsedVerdict, str, float]:
        """Returns the verdict, the words for the record and the time, asking in the server's dialect."""
        for _ in range(DIALECTS):
            capabilities = await self._transport.capabilities()
            try:
                reply, limit = await self._reply(question, template, order, seed, capabilities, expense)
            except Relearned as refused:
                expense.add(refused.charge)
                continue
            raw = reply.reply.refusal or reply.reply.text
            ended = bool(template.choices) or (template.verdict and template.verdict_frame("")[1])
            if reply.reply.cut and (reply.verdict.status == "unparsed" or (reply.verdict.status == "ok" and not ended)):
                option = "--max-tokens raises the limit" if limit > DIRECT_TOKENS else "--reading reasons gives it more"
                raw = f"{CUT} = {limit} ({option}): {raw}"
            return reply.verdict, raw, reply.time
        raise CallFailed("the server refuses each way to ask this", free=True)

    async def _reply(
        self,
        question: Question,
        template: Template,
        order: tuple[int, ...],
        seed: int,
        capabilities: ServerCapabilities,
        expense: Expense,
    ) -> tuple[ModelReply, int]:
        """Returns the reply that counts, one of one or two, and its greatest length in tokens."""
        config, transport, thinks = self.config, self._transport, capabilities.thinks
        logprobs = capabilities.top_logprobs > 0
        ending = self._ending(template, logprobs and not thinks)
        direct = ending == "direct"
        length = len(question.prompt) + sum(map(len, question.answers))
        rendered = await off_loop(length, partial(template.render, ending=ending), question, order)
        scored = logprobs and template.choices and template.scorable
        if direct and not thinks:
            length = 1 if scored else DIRECT_TOKENS
        else:
            length = config.max_tokens or template.max_tokens + (THOUGHT_TOKENS if thinks else 0)
        parse = partial(read_verdict, template=template, rendered=rendered, direct=direct, min_mass=config.min_mass)
        ask = partial(transport.ask, rendered.messages, capabilities, logprobs=scored, order=order, seed=seed)
        first = await ask(parse, max_tokens=length)
        expense.add(first.charge, first.paid, first.latency_s)
        if first.reply.thinks and not thinks:
            await transport.learned(capabilities, dataclasses.replace(capabilities, thinks=True))
            if first.verdict.status not in ANSWERED:  # a model that thinks first needs more room, or reasons
                raise Relearned
        if first.verdict.status != "abstained" or config.constrain == "none" or not capabilities.constrains:
            return first, length
        try:  # the judge's reply is no label: make it choose
            again = await ask(
                partial(parse, constrained=True),
                max_tokens=max(length, DIRECT_TOKENS),
                labels=[label for label, _ in template.labels],
            )
        except (CallFailed, BudgetSpent) as failed:
            expense.add(failed.charge)
            return first, length
        expense.add(again.charge, again.paid, again.latency_s)
        return (again if again.verdict.status in ANSWERED else first), length


class Expense:
    """What one judgement takes: failed attempts, replies, and replies from the cache."""

    def __init__(self) -> None:
        self._all, self._paid, self._latency_s = Charge(), Charge(), 0.0

    def add(self, charge: Charge, paid: Charge | None = None, latency_s: float = 0.0) -> None:
        """Adds what a call took, in `latency_s` seconds, and the part that was `paid` now; None = all of it."""
        self._all = self._all.plus(charge)
        self._paid = self._paid.plus(charge if paid is None else paid)
        self._latency_s += latency_s

    @property
    def call(self) -> Call:
        """Returns the expense with that of replies from the cache, which were paid for earlier."""
        return Call(self._latency_s or None, self._all.prompt, self._all.completion, self._all.usd)

    @property
    def paid(self) -> Call:
        """Returns the expense of now."""
        return Call(None, self._paid.prompt, self._paid.completion, self._paid.usd)
