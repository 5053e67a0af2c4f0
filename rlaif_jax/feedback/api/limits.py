"""What a judge may use: calls at a time, requests and tokens a minute, tokens, money and time in all.

Everything here belongs to one asyncio loop. A budget is asked *before* a call, for the most that the call can use, and
gets back what it did not use: what is spent never passes the limit.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

Clock = Callable[[], float]


class BudgetSpent(Exception):
    """The next call might pass a limit; the message says which."""


class Gate:
    """At most `limit` calls at a time. Shrinks by a fifth when the server says "too many"; never for another reason.

    Calls that were under way together are told so together: only the first of them shrinks the gate. After ten rounds of
    answers without another "too many" it opens by one, up to where it began.
    """

    def __init__(self, limit: int) -> None:
        self.limit = float(limit)
        self.active = 0
        self._widest, self._calm = limit, 0
        self.generation = 0
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def enter(self) -> AsyncIterator[None]:
        """A place."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.active < max(int(self.limit), 1))
            self.active += 1
        try:
            yield
        finally:
            async with self._changed:
                self.active -= 1
                self._changed.notify(2)  # all of thousands would be too many; two, as the gate may have opened by one

    def shrink(self, generation: int) -> None:
        """After a 429 to a call that began when the gate's generation was this."""
        if generation == self.generation:
            self.generation += 1
            self.limit, self._calm = max(1.0, self.limit * 0.8), 0

    def answered(self) -> None:
        """After a call that was answered."""
        self._calm += 1
        if self._calm >= 10 * self.limit:
            self.limit, self._calm = min(self.limit + 1, float(self._widest)), 0


@dataclasses.dataclass(eq=False)
class Use:
    """A call in the window: when, and how many tokens (the most it can use, then what it did use)."""

    at: float
    tokens: int


class Window:
    """At most `requests` calls and `tokens` tokens in any `period` seconds; None = no limit."""

    def __init__(
        self, requests: int | None, tokens: int | None, *, period: float = 60.0, clock: Clock = time.monotonic
    ) -> None:
        self._requests, self._tokens, self._period, self._clock = requests, tokens, period, clock
        self._uses: deque[Use] = deque()
        self._turn = asyncio.Lock()

    async def enter(self, tokens: int, check: Callable[[], None] = lambda: None) -> Use:
        """Wait until a call of up to `tokens` fits. BudgetSpent if it never will. Set the use's tokens afterwards.

        check: called again and again meanwhile; what it raises ends the waiting.
        """
        if self._tokens is not None and tokens > self._tokens:
            raise BudgetSpent(f"a call of up to {tokens} tokens never fits tokens_per_minute = {self._tokens}")
        check()
        async with self._turn:  # first come, first served
            check()
            while (pause := self._pause(tokens)) > 0:
                await asyncio.sleep(min(pause, 0.25))  # a call that used less than it might makes room earlier
                check()
            use = Use(self._clock(), tokens)
            self._uses.append(use)
            return use

    def leave(self, use: Use) -> None:
        """The call was not made."""
        with suppress(ValueError):  # it is out of the window already
            self._uses.remove(use)

    def _pause(self, tokens: int) -> float:
        now = self._clock()
        while self._uses and self._uses[0].at <= now - self._period:
            self._uses.popleft()
        count, used, pause = len(self._uses), sum(use.tokens for use in self._uses), 0.0
        for use in self._uses:  # until when must the oldest leave?
            if (self._requests is None or count < self._requests) and (
                self._tokens is None or used + tokens <= self._tokens
            ):
                break
            count, used, pause = count - 1, used - use.tokens, max(use.at + self._period - now, 1e-3)
        return pause


class Charge:
    """What one call may use; `settle` says what it did. A call that never settles is taken to have used it all."""

    def __init__(self, tokens: int, usd: float) -> None:
        self.tokens, self.usd = tokens, usd

    def settle(self, tokens: int, usd: float) -> None:
        """The call used this."""
        self.tokens, self.usd = tokens, usd


class Budget:
    """Tokens, US dollars and seconds in all; None = no limit. The clock starts with the first call."""

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
        """Until the time is up; infinite without a limit."""
        if self._limits[2] is None:
            return math.inf
        if self._started is None:
            self._started = self._clock()
        return self._limits[2] - (self._clock() - self._started)

    @asynccontextmanager
    async def reserve(self, tokens: int, usd: float) -> AsyncIterator[Charge]:
        """Room for a call that uses up to this much. Waits for calls under way if what they give back may make room.

        Raises BudgetSpent before anything is used if there is none.
        """
        async with self._changed:
            while self._short(tokens, usd):
                self.check(tokens, usd)
                await self._changed.wait()
            self._reserved_tokens += tokens
            self._reserved_usd += usd
            self._under_way += 1
        charge = Charge(tokens, usd)
        try:
            yield charge
        finally:
            async with self._changed:
                self._reserved_tokens -= tokens
                self._reserved_usd = self._reserved_usd - usd if self._under_way > 1 else 0.0
                self._under_way -= 1
                self.tokens += charge.tokens
                self.usd += charge.usd
                self._changed.notify_all()

    def check(self, tokens: int, usd: float) -> None:
        """BudgetSpent if there is no room for such a call and what is under way cannot make any."""
        short = self._short(tokens, usd)
        if short and (self.seconds_left <= 0 or not self._under_way):
            raise BudgetSpent(short)

    def _short(self, tokens: int, usd: float) -> str:
        """Which limit the call might pass; "" = none."""
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
