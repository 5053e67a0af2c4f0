"""Limits of a judge's calls: concurrent calls, requests and tokens a minute, and a budget.

The budget limits tokens, money and time.

Every limiter belongs to one asyncio loop. A call reserves *beforehand* the most that it can use and gives
back afterwards what it did not use, so that no limit is ever passed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from rlaif_jax.feedback.api.failures import Charge

Clock = Callable[[], float]


class BudgetSpent(Exception):
    """The next call might pass a limit; the message names the limit.

    Attributes:
        charge: what the attempts of the call took before.
    """

    def __init__(self, message: str, charge: Charge = Charge()) -> None:
        super().__init__(message)
        self.charge = charge


@dataclasses.dataclass
class Spent:
    """The use of an API.

    Attributes:
        requests: the requests that were sent.
        retries: the pauses after which a call was tried again.
        throttled: the requests that were answered with "too many requests".
        cached: the replies from the cache.
        tokens: the tokens of prompts and replies.
        usd: their price in US dollars.
        notes: what the user should know about the server or the cache.
    """

    requests: int = 0
    retries: int = 0
    throttled: int = 0
    cached: int = 0
    tokens: int = 0
    usd: float = 0.0
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(eq=False)
class Reservation:
    """The most that one call can use; after `settle`, what the call did use.

    Attributes:
        tokens: prompt and reply together.
        usd: US dollars.
        time: when the call began, by the clock of the `RateLimiter`, in seconds.
    """

    tokens: int
    usd: float = 0.0
    time: float = 0.0

    def settle(self, tokens: int, usd: float = 0.0) -> None:
        """Replaces the reserved amounts by what the call did use: `tokens`, and `usd` in US dollars."""
        self.tokens, self.usd = tokens, usd


class ConcurrencyLimiter:
    """Allows at most `limit` calls at a time; only "too many requests" lowers the limit, by a fifth.

    Calls that run together are refused together, so only the first refusal of a generation of calls lowers
    the limit. After 10 x limit answers without a refusal the limit rises by one, up to where it began.

    Attributes:
        limit: the calls that may run at a time.
        active: the calls that run now.
        generation: the number of times that the limit fell; a call that may be refused notes it when it
            begins.
    """

    def __init__(self, limit: int) -> None:
        self.limit = float(limit)
        self.active = 0
        self.generation = 0
        self._widest, self._answers_since_refusal = limit, 0
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Waits until fewer than `limit` calls run, and counts one more while the `async with` block runs."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.active < max(int(self.limit), 1))
            self.active += 1
        try:
            yield
        finally:
            async with self._changed:
                self.active -= 1
                self._changed.notify(2)  # two, as the limit may have risen by one; thousands may wait: not all

    def refused(self, generation: int) -> None:
        """Lowers the limit by a fifth, to 1 at the least, after a reply "too many requests".

        Args:
            generation: the generation in which the refused call began. Only the first refusal of a generation counts,
                because the calls that ran at the same time are refused for the same reason.
        """
        if generation == self.generation:
            self.generation += 1
            self.limit, self._answers_since_refusal = max(1.0, self.limit * 0.8), 0

    def answered(self) -> None:
        """Counts an answer; after 10 x limit answers without a refusal, raises the limit by one.

        The limit never exceeds the one that the limiter was made with.
        """
        self._answers_since_refusal += 1
        if self._answers_since_refusal >= 10 * self.limit:
            self.limit, self._answers_since_refusal = min(self.limit + 1, float(self._widest)), 0


class RateLimiter:
    """Allows at most `requests` calls and `tokens` tokens in any `period` seconds; None = no limit."""

    def __init__(
        self, requests: int | None, tokens: int | None, *, period: float = 60.0, clock: Clock = time.monotonic
    ) -> None:
        self._requests, self._tokens, self._period, self._clock = requests, tokens, period, clock
        self._reservations: deque[Reservation] = deque()
        self._turn = asyncio.Lock()

    async def reserve(self, tokens: int, check: Callable[[], None] = lambda: None) -> Reservation:
        """Waits until a call of about `tokens` tokens fits, and reserves them.

        The caller settles the reservation after the call. A call that seems too long for the limit is made when no other
        call is in the period: the server counts, and this is an estimate.

        Args:
            tokens: what the call will probably use.
            check: is called again and again during the wait; an exception of `check` ends the wait.
        """
        tokens = tokens if self._tokens is None else min(tokens, self._tokens)
        check()
        async with self._turn:  # first come, first served
            check()
            while (pause := self._pause(tokens)) > 0:
                await asyncio.sleep(min(pause, 0.25))  # a call that used less than it might makes room earlier
                check()
            reservation = Reservation(tokens, time=self._clock())
            self._reservations.append(reservation)
            return reservation

    def release(self, reservation: Reservation) -> None:
        """Gives back the reservation of a call that was not made."""
        with suppress(ValueError):  # its period may be over already
            self._reservations.remove(reservation)

    def _pause(self, tokens: int) -> float:
        """Computes the seconds until a call of `tokens` tokens fits."""
        now = self._clock()
        while self._reservations and self._reservations[0].time <= now - self._period:
            self._reservations.popleft()
        count, used, pause = len(self._reservations), sum(r.tokens for r in self._reservations), 0.0
        for reservation in self._reservations:  # until when must the oldest leave?
            if (self._requests is None or count < self._requests) and (
                self._tokens is None or used + tokens <= self._tokens
            ):
                break
            count, used = count - 1, used - reservation.tokens
            pause = max(reservation.time + self._period - now, 1e-3)
        return pause


class Budget:
    """A budget of tokens, US dollars and seconds in all; None = no limit.

    The clock starts with the first call.

    Attributes:
        tokens: the tokens used by the calls that have ended.
        usd: the US dollars spent by the calls that have ended.
    """

    def __init__(
        self,
        tokens: int | None = None,
        usd: float | None = None,
        seconds: float | None = None,
        *,
        clock: Clock = time.monotonic,
    ) -> None:
        self._limits = (tokens, usd, seconds)
        self._clock = clock
        self._started: float | None = None
        self._reserved_tokens, self._reserved_usd, self._under_way = 0, 0.0, 0
        self.tokens, self.usd = 0, 0.0
        self._changed = asyncio.Condition()

    @property
    def seconds_left(self) -> float:
        """Returns the seconds until the time budget is used up; infinite without a limit."""
        if self._limits[2] is None:
            return math.inf
        if self._started is None:
            self._started = self._clock()
        return self._limits[2] - (self._clock() - self._started)

    @asynccontextmanager
    async def reserve(self, tokens: int, usd: float) -> AsyncIterator[Reservation]:
        """Reserves the most that a call can use, while the `async with` block runs.

        A call that never settles its reservation is charged all of it. Waits while calls under way may give back
        enough.

        Args:
            tokens: the most tokens of the call, prompt and reply together.
            usd: its highest cost in US dollars.

        Raises:
            BudgetSpent: no room for the call; nothing was used.
        """
        async with self._changed:
            while self._short(tokens, usd):
                self.check(tokens, usd)
                await self._changed.wait()
            self._reserved_tokens += tokens
            self._reserved_usd += usd
            self._under_way += 1
        reservation = Reservation(tokens, usd)
        try:
            yield reservation
        finally:
            async with self._changed:
                self._reserved_tokens -= tokens
                self._reserved_usd = self._reserved_usd - usd if self._under_way > 1 else 0.0
                self._under_way -= 1
                self.tokens += reservation.tokens
                self.usd += reservation.usd
                self._changed.notify_all()

    def check(self, tokens: int, usd: float) -> None:
        """Raises BudgetSpent if a call has no room in the budget and none can come free.

        Room can come free while other calls are under way, because they give back what they do not use.

        Args:
            tokens: the most tokens of the call, prompt and reply together.
            usd: its highest cost in US dollars.
        """
        short = self._short(tokens, usd)
        if short and (self.seconds_left <= 0 or not self._under_way):
            raise BudgetSpent(short)

    def _short(self, tokens: int, usd: float) -> str:
        """Names the limit that the call might pass; "" = none."""
        most_tokens, most_usd, most_seconds = self._limits
        if self.seconds_left <= 0:
            return f"the time budget of {most_seconds:g} s is over"
        if most_tokens is not None and self.tokens + self._reserved_tokens + tokens > most_tokens:
            return (
                f"the budget of {most_tokens} tokens: {self.tokens} are used and the next call may use {tokens}, "
                "so it was not made"
            )
        if most_usd is not None and self.usd + self._reserved_usd + usd > most_usd:
            return (
                f"the budget of ${most_usd:g}: ${self.usd:.6f} is spent and the next call may cost ${usd:.6f}, "
                "so it was not made"
            )
        return ""
