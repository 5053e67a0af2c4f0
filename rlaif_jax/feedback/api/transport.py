"""Calls of a model behind an OpenAI-compatible API: cached, limited, paid from a budget, retried.

A call that cannot succeed is not made: after a wrong key, on a server that does not answer, past a limit.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import random
import sqlite3
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import AsyncExitStack, suppress
from typing import Any, NamedTuple, TypeVar

from rlaif_jax.feedback.api.cache import CachedReply, CallCache
from rlaif_jax.feedback.api.config import ApiConfig
from rlaif_jax.feedback.api.connection import Connection, off_loop
from rlaif_jax.feedback.api.dialects import (
    Relearned,
    ServerCapabilities,
    learn,
    most_tokens,
    probe_body,
    request_body,
)
from rlaif_jax.feedback.api.failures import Attempts, CallFailed, Charge, RetryPolicy
from rlaif_jax.feedback.api.limits import Budget, BudgetSpent, ConcurrencyLimiter, RateLimiter, Spent
from rlaif_jax.feedback.api.replies import Reply, Usage, read_reply
from rlaif_jax.feedback.api.templates import Message
from rlaif_jax.feedback.api.verdicts import ParsedVerdict

T = TypeVar("T")
OVERHEAD_TOKENS = 64  # the tokens that a chat template may add to a message
TOKENS_PER_BYTE = 0.35  # before any reply: English has about .25, Chinese .35
SECOND_PROBE_TOKENS = 512
BREAK_AFTER = 5  # attempts that fail in a row, after which no new call begins until it is known why
CHECK_AGAIN_S = 5.0
_ACCOUNT = (401, 402, 403, 404)  # the key, the balance, the rights, the model's name; or this one question
_ASKED_AGAIN = ("unparsed", "refused")  # what a reply in the cache may say without being asked for again


@dataclasses.dataclass(frozen=True)
class ModelReply:
    """A reply with its call; a cached reply has the data of the call that was made for it.

    Attributes:
        reply: the reply.
        verdict: its verdict.
        time: when it came, in Unix seconds.
        latency_s: how long it took, in seconds.
        charge: what it took, failed attempts included.
        paid: the part of `charge` that was paid now; nothing for a reply from the cache.
    """

    reply: Reply
    verdict: ParsedVerdict
    time: float
    latency_s: float
    charge: Charge
    paid: Charge


class Answer(NamedTuple):
    """A good response.

    Attributes:
        text: its body.
        reply: the same, read.
        charge: what it took, failed attempts included.
    """

    text: str
    reply: Reply
    charge: Charge


class Transport:
    """The calls of one `ApiConfig`, all in one asyncio loop.

    Args:
        config: the server, the model and the limits.
        cache: the cache of replies.
        disk: runs the methods of the cache, because an SQLite object stays in the thread that made it.

    Raises:
        UserError: see `Connection`.
    """

    def __init__(self, config: ApiConfig, cache: CallCache, disk: Executor) -> None:
        self.config = config
        self._connection = Connection(config)
        self._cache, self._disk = cache, disk
        self._concurrency = ConcurrencyLimiter(config.concurrency)
        self._rate = RateLimiter(config.requests_per_minute, config.tokens_per_minute)
        self._budget = Budget(config.budget_tokens, config.budget_usd, config.budget_s)
        self._not_before = 0.0  # the server's Retry-After holds for all calls
        self._last_answer = -math.inf
        self._overhead, self._tokens_per_byte = OVERHEAD_TOKENS, TOKENS_PER_BYTE
        self._retry = RetryPolicy(config.attempts, config.max_wait_s)
        self._capabilities: ServerCapabilities | None = None
        self._probe_failed: tuple[float, CallFailed] | None = None
        self._probing, self._checking = asyncio.Lock(), asyncio.Lock()
        self._fatal: CallFailed | None = None
        self._failed_in_a_row, self._down, self._check_after = 0, "", 0.0
        self._hopeful = asyncio.Event()  # cleared while attempts fail in a row: calls that have not begun wait
        self._hopeful.set()
        self._cache_failed = ""
        self.ending = False  # no further request is sent
        self.begun: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()  # the tasks that have sent one
        self._random = random.Random()
        self._counts = Spent()

    def __repr__(self) -> str:
        return f"Transport({self.config.server}, {self.config.model})"

    @property
    def spent(self) -> Spent:
        """Returns the requests, tokens and money used so far."""
        notes = [self._cache_failed] if self._cache_failed else []
        if self._capabilities is not None and (omitted := self._capabilities.omitted):
            notes.append(f"the server does not take {', '.join(omitted)}: its own settings hold there")
        return dataclasses.replace(self._counts, tokens=self._budget.tokens, usd=self._budget.usd, notes=tuple(notes))

    @property
    def concurrency(self) -> int:
        """Returns how many calls may run at a time now."""
        return max(int(self._concurrency.limit), 1)

    async def close(self) -> None:
        """Closes the connection."""
        await self._connection.close()

    def scrub(self, text: str) -> str:
        """Returns `text` without the key."""
        return self._connection.scrub(text)

    async def _on_disk(self, method: Callable[..., T], *arguments: Any) -> T:
        """Calls a method of the cache in the thread of the disk."""
        return await asyncio.get_running_loop().run_in_executor(self._disk, method, *arguments)

    async def _keep(self, method: Callable[..., None], *arguments: Any) -> None:
        """Writes to the cache. Where that fails, what was paid for is used all the same, and no more is asked."""
        try:
            await self._on_disk(method, *arguments)
        except sqlite3.Error as error:
            self._cache_failed = self.scrub(
                f"the cache {self.config.cache or 'of replies'} cannot be written ({error}), so no more calls are made"
            )

    # ---- what the server can do

    async def capabilities(self) -> ServerCapabilities:
        """Asks the server once what it can do, and remembers the answer in the cache.

        Raises:
            CallFailed: the server does not answer at all; all who waited for the answer share the failure.
        """
        since = time.monotonic()
        async with self._probing:
            if self._capabilities is None:
                if self._probe_failed is not None and self._probe_failed[0] >= since:
                    raise self._probe_failed[1]
                known = await self._on_disk(self._cache.capabilities, ServerCapabilities.question(self.config))
                try:
                    self._capabilities = ServerCapabilities.from_json(known) if known else await self._probe()
                except CallFailed as failed:
                    self._probe_failed = (time.monotonic(), dataclasses.replace(failed, charge=Charge()))
                    raise
            return self._capabilities

    async def learned(self, known: ServerCapabilities, learned: ServerCapabilities) -> None:
        """Replaces the capabilities `known` by what was `learned`, unless another call has learned meanwhile."""
        if self._capabilities == known:
            self._capabilities = learned
            await self._remember(learned)

    async def _remember(self, found: ServerCapabilities) -> None:
        key, values = ServerCapabilities.question(self.config), dataclasses.asdict(found)
        await self._keep(self._cache.put_capabilities, key, values)

    async def _probe(self) -> ServerCapabilities:
        """Asks for a letter in simpler and simpler ways until the server answers."""
        config, found, certain = self.config, ServerCapabilities.expected(self.config), True
        for _ in range(12):
            body = probe_body(config, found)
            try:
                reply = (await self._with_retries(body, probing=True)).reply
            except CallFailed as failed:
                learned = learn(found, failed, body, config, probing=True)
                if learned is None or learned == found:
                    if failed.status in _ACCOUNT:
                        self._fatal = failed
                    raise
                found, certain = learned, certain and (failed.status or 500) < 500
            else:
                break
        else:
            raise CallFailed("the server refuses each way to ask for one letter")
        tokens = any(token.top for token in reply.tokens)
        thinks = reply.thinks or (reply.cut and not reply.text.strip())
        if reply.cut and not thinks and config.api == "chat":  # thoughts whose opening tag is the chat template's?
            most = min(config.max_tokens or SECOND_PROBE_TOKENS, SECOND_PROBE_TOKENS)
            with suppress(CallFailed):
                thinks = (await self._with_retries(probe_body(config, found, most), probing=True)).reply.thinks
        found = dataclasses.replace(found, top_logprobs=found.top_logprobs if tokens else 0, thinks=thinks)
        if certain:
            await self._remember(found)
        return found

    async def _check(self, since: float) -> None:
        """Finds out whether the server answers at all, unless it has answered since `since`.

        Sets what all other calls fail with if it does not.
        """
        async with self._checking:
            now, capabilities = time.monotonic(), self._capabilities
            if (
                self._fatal
                or self._last_answer >= since
                or capabilities is None
                or (self._down and now < self._check_after)
            ):
                return
            try:
                await self._attempt(probe_body(self.config, capabilities), checking=True)
            except CallFailed as failed:
                if failed.status in _ACCOUNT:
                    self._fatal = failed
                elif failed.unwell:
                    self._down = f"{failed}; the server has answered none of the last calls, so this one was not made"
                    self._check_after = time.monotonic() + CHECK_AGAIN_S
            except BudgetSpent:
                return

    # ---- one question

    async def ask(
        self,
        messages: Sequence[Message],
        capabilities: ServerCapabilities,
        parse: Callable[[Reply], ParsedVerdict],
        *,
        max_tokens: int,
        logprobs: bool,
        order: tuple[int, ...],
        seed: int,
        labels: Sequence[str] = (),
    ) -> ModelReply:
        """Returns the reply to the messages, from the cache where it has one that can be read.

        Args:
            messages: the messages of the chat.
            capabilities: what the server can do.
            parse: reads the verdict of a reply.
            max_tokens: the greatest length of the reply.
            logprobs: whether to ask for log-probabilities, as many as the server gives.
            order: the order in which the answers are shown; a part of the cache's key.
            seed: the seed of the sampling.
            labels: the only replies that the server may give; () = any reply.

        Raises:
            Relearned: the server does not take the request, and `capabilities` has now what it takes.
            CallFailed: no usable reply after all attempts.
            BudgetSpent: the call might pass a limit.
        """
        body = request_body(
            self.config, capabilities, messages, max_tokens, logprobs=logprobs, seed=seed, labels=labels
        )
        decoding = {name: value for name, value in body.items() if name not in ("model", "messages", "prompt", "seed")}
        request = {
            "model": [self.config.model, self.config.revision],
            "messages": body.get("messages", list(messages)),
            "decoding": decoding | {"api": self.config.api},
            "order": list(order),
            "repeat": seed,
        }
        cached = await self._on_disk(self._cache.get, request)
        if cached is not None:
            length = len(cached.response)
            reply = await off_loop(length, lambda text: read_reply(json.loads(text)), cached.response)
            verdict = await off_loop(length, parse, reply)
            if verdict.status not in _ASKED_AGAIN:
                self._counts.cached += 1
                return ModelReply(reply, verdict, cached.time, cached.latency_s, self._charge(reply.usage), Charge())
        started = time.monotonic()
        try:
            answer = await self._with_retries(body)
        except CallFailed as failed:
            learned = learn(capabilities, failed, body, self.config)
            if learned is None and labels and failed.status in (400, 422, 501):
                await self.learned(capabilities, dataclasses.replace(capabilities, constrains=False))
            if learned is None or learned == capabilities:
                raise
            await self.learned(capabilities, learned)
            raise Relearned(failed.charge) from None
        kept = CachedReply(answer.text, time.time(), time.monotonic() - started)
        verdict = await off_loop(len(answer.text), parse, answer.reply)
        if verdict.status != "refused":
            await self._keep(self._cache.put, request, kept, cached is not None)
        return ModelReply(answer.reply, verdict, kept.time, kept.latency_s, answer.charge, answer.charge)

    def _charge(self, usage: Usage | None) -> Charge:
        """Returns what a call of this usage takes."""
        prompt, completion = (usage.prompt, usage.completion) if usage else (0, 0)
        config = self.config
        usd = (prompt * config.usd_per_million_prompt + completion * config.usd_per_million_completion) / 1e6
        return Charge(prompt, completion, usd)

    async def _with_retries(self, body: dict[str, Any], *, probing: bool = False) -> Answer:
        """Returns a good response, after as many attempts as are needed and allowed."""
        attempts, charge, since = Attempts(), Charge(), time.monotonic()
        if self._down:
            await self._check(since)
        while True:
            try:
                answer = await self._attempt(body, first=not attempts.failures + attempts.throttles)
                return answer._replace(charge=charge.plus(answer.charge))
            except BudgetSpent as spent:
                spent.charge = charge.plus(spent.charge)
                self._hopeful.set()  # another call may find out
                raise
            except CallFailed as failed:
                charge = charge.plus(failed.charge)
                attempts, pause = self._retry.after(
                    failed,
                    attempts,
                    now=time.monotonic(),
                    last_answer=self._last_answer,
                    seconds_left=self._budget.seconds_left,
                    jitter=self._random.uniform(0.5, 1.0),
                )
                if pause is None:
                    if failed.fatal:
                        self._fatal = failed
                    elif not probing and (failed.status in _ACCOUNT or not self._hopeful.is_set()):
                        await self._check(since)
                    self._hopeful.set()
                    times = f" ({attempts.failures} attempts)" if attempts.failures > 1 else ""
                    raise CallFailed(
                        f"{failed}{times}", status=failed.status, retry=failed.retry, charge=charge
                    ) from None
                self._counts.retries += 1
                await asyncio.sleep(pause)

    async def _attempt(self, body: dict[str, Any], *, first: bool = False, checking: bool = False) -> Answer:
        """Sends one request within all limits and returns a good response.

        The budget is charged the usage in the response; nothing for an error of the server; the most that the
        call can have used where nobody knows (a time-out, a cut response).

        Args:
            body: the request.
            first: whether it is a call's first attempt, which waits while the server seems to be down.
            checking: whether the request finds out if the server answers, for which no other call is waited for.
        """
        completion = most_tokens(body)
        size = len(json.dumps(body.get("messages") or body["prompt"], ensure_ascii=False).encode())
        # A token is at least one byte of the text, so this is the most that a prompt can be.
        most = self._charge(Usage(size + self._overhead, completion))
        worst = most.prompt + most.completion
        likely = min(int(size * self._tokens_per_byte * 1.1), size) + OVERHEAD_TOKENS + completion
        async with AsyncExitStack() as stack:
            if not checking:
                await self._begin(stack, first)
            await self._wait_as_asked(checking)
            rated = await self._rate.reserve(likely, lambda: self._budget.check(worst, most.usd))
            try:
                charged = await stack.enter_async_context(self._budget.reserve(worst, most.usd))
            except BaseException:
                self._rate.release(rated)
                raise
            if self.ending:
                charged.settle(0, 0.0)
                raise asyncio.CancelledError
            if (task := asyncio.current_task()) is not None:
                self.begun.add(task)
            self._counts.requests += 1
            generation = self._concurrency.generation
            try:
                async with asyncio.timeout(min(self.config.timeout_s, self._budget.seconds_left)):
                    text, reply = await self._connection.exchange(body)
            except CallFailed as failed:
                failed.charge = self._charge(failed.usage) if failed.usage or failed.free else most
                charged.settle(failed.charge.prompt + failed.charge.completion, failed.charge.usd)
                rated.settle(charged.tokens)
                if failed.throttled:
                    self._counts.throttled += 1
                    self._concurrency.refused(generation)
                    if failed.retry_after is not None:
                        self._not_before = max(self._not_before, time.monotonic() + failed.retry_after)
                self._note(failed.unwell)
                raise
            except TimeoutError:
                self._note(True)
                if self._budget.seconds_left <= 0:
                    raise BudgetSpent("the time budget was over before the server answered", most) from None
                message = f"no answer within {self.config.timeout_s:g} s"
                raise CallFailed(message, retry=True, charge=most) from None
            self._concurrency.answered()
            self._last_answer, self._down = time.monotonic(), ""
            self._note(False)
            if reply.usage is None:
                return Answer(text, reply, most)
            charge = self._charge(reply.usage)
            self._overhead = max(self._overhead, self._overhead + charge.prompt - most.prompt)
            self._tokens_per_byte += 0.2 * (min(charge.prompt / size, 1.0) - self._tokens_per_byte)
            charged.settle(charge.prompt + charge.completion, charge.usd)
            rated.settle(charged.tokens)
            return Answer(text, reply, charge)

    async def _begin(self, stack: AsyncExitStack, first: bool) -> None:
        """Takes one of the places of calls that run at a time, until `stack` is left."""
        while True:
            if first:
                await self._hopeful.wait()
            place = self._concurrency.slot()
            await place.__aenter__()
            if not first or self._hopeful.is_set():
                stack.push_async_exit(place)
                return
            await place.__aexit__(None, None, None)

    def _note(self, unwell: bool) -> None:
        """Counts attempts that failed in a row because the server is `unwell`; any other attempt ends the row."""
        self._failed_in_a_row = self._failed_in_a_row + 1 if unwell else 0
        if not unwell:
            self._hopeful.set()
        elif self._failed_in_a_row >= BREAK_AFTER:
            self._hopeful.clear()

    async def _wait_as_asked(self, checking: bool) -> None:
        """Waits until the server's Retry-After is over.

        Raises CallFailed where that is too long, or where no call can succeed.
        """
        if self._fatal is not None:
            raise dataclasses.replace(self._fatal, charge=Charge())
        if (reason := self._down or self._cache_failed) and not checking:
            raise CallFailed(reason, free=True)
        while (pause := self._not_before - time.monotonic()) > 0:
            if pause > self.config.max_wait_s or pause >= self._budget.seconds_left:
                message = f"the server wants no call for {pause:.0f} s, longer than this one may wait"
                raise CallFailed(message, throttled=True, free=True)
            await asyncio.sleep(pause)
