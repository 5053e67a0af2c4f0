"""Concurrency, requests and tokens a minute, budgets: on a fake clock where time matters."""

from __future__ import annotations

import asyncio
import random

import pytest

from rlaif_jax.feedback.api.limits import Budget, BudgetSpent, ConcurrencyLimiter, RateLimiter


def test_the_limit_falls_once_for_calls_that_are_refused_together():
    limiter = ConcurrencyLimiter(20)
    generation = limiter.generation
    for _ in range(15):
        limiter.refused(generation)
    assert limiter.limit == 16
    limiter.refused(limiter.generation)
    assert limiter.limit == pytest.approx(12.8)
    for _ in range(50):
        limiter.refused(limiter.generation)
    assert limiter.limit == 1
    for _ in range(10_000):
        limiter.answered()
    assert limiter.limit == 20


def test_never_more_calls_than_the_limit():
    async def run() -> int:
        limiter, most = ConcurrencyLimiter(5), 0

        async def work() -> None:
            nonlocal most
            async with limiter.slot():
                most = max(most, limiter.active)
                await asyncio.sleep(0.0005)

        await asyncio.gather(*(work() for _ in range(100)))
        return most

    assert asyncio.run(run()) == 5


@pytest.mark.parametrize(("requests", "tokens"), [(3, None), (None, 100), (4, 90)])
def test_no_period_ever_holds_more(requests: int | None, tokens: int | None):
    period, done = 0.2, []

    async def run() -> None:
        limiter, rng = RateLimiter(requests, tokens, period=period), random.Random(0)

        async def one(size: int) -> None:
            reservation = await limiter.reserve(size)
            done.append((reservation.time, size))

        await asyncio.gather(*(one(rng.randint(10, 50)) for _ in range(12)))

    asyncio.run(run())
    assert len(done) == 12
    for at, _ in done:
        inside = [size for other, size in done if at - period < other <= at]
        assert len(inside) <= (requests or 99) and sum(inside) <= (tokens or 9999)


def test_a_call_that_seems_too_long_is_made_alone():
    async def run() -> float:
        limiter = RateLimiter(None, 10, period=0.3)
        first = await limiter.reserve(1)
        return (await limiter.reserve(11)).time - first.time

    assert asyncio.run(run()) >= 0.3


def test_less_used_than_reserved_makes_room_at_once():
    async def run() -> float:
        limiter = RateLimiter(None, 100, period=30.0)
        reservation = await limiter.reserve(100)
        reservation.settle(5)
        started = asyncio.get_running_loop().time()
        await asyncio.wait_for(limiter.reserve(90), 2)
        return asyncio.get_running_loop().time() - started

    assert asyncio.run(run()) < 1


def test_a_call_that_was_not_made_leaves_the_rate_limit():
    async def run() -> None:
        limiter = RateLimiter(2, None, period=30.0)
        first, second = await limiter.reserve(1), await limiter.reserve(1)
        limiter.release(second)
        limiter.release(second)
        await asyncio.wait_for(limiter.reserve(1), 2)
        assert first in limiter._reservations and second not in limiter._reservations

    asyncio.run(run())


def test_waiting_for_the_rate_limit_ends_with_the_budget():
    async def run() -> None:
        limiter, budget = RateLimiter(1, None, period=30.0), Budget(seconds=0.3)
        await limiter.reserve(1, lambda: budget.check(1, 0))
        for _ in range(2):
            with pytest.raises(BudgetSpent, match="time budget"):
                await asyncio.wait_for(limiter.reserve(1, lambda: budget.check(1, 0)), 2)

    asyncio.run(run())


@pytest.mark.parametrize("limits", [{"tokens": 1000}, {"usd": 1.0}])
def test_a_budget_is_never_passed_whatever_the_calls_take(limits: dict[str, float]):
    async def run(seed: int) -> Budget:
        rng, budget = random.Random(seed), Budget(**limits)  # type: ignore[arg-type]
        refused = 0

        async def call() -> None:
            nonlocal refused
            worst = rng.randint(10, 120)
            try:
                async with budget.reserve(worst, worst / 1000) as reservation:
                    await asyncio.sleep(rng.uniform(0, 0.002))
                    assert budget.tokens <= 1000
                    used = rng.randint(0, worst)
                    if rng.random() < 0.8:
                        reservation.settle(used, used / 1000)
                    elif rng.random() < 0.5:
                        raise RuntimeError
            except BudgetSpent:
                refused += 1
            except RuntimeError:
                pass

        await asyncio.gather(*(call() for _ in range(60)))
        assert refused > 0
        return budget

    for seed in range(5):
        budget = asyncio.run(run(seed))
        assert 850 < budget.tokens <= 1000 and budget.usd == pytest.approx(budget.tokens / 1000)


def test_a_call_waits_for_what_others_give_back():
    async def run() -> bool:
        budget = Budget(tokens=100)

        async def first() -> None:
            async with budget.reserve(90, 0) as reservation:
                await asyncio.sleep(0.01)
                reservation.settle(10, 0)

        async def second() -> None:
            async with budget.reserve(80, 0) as reservation:
                reservation.settle(80, 0)

        await asyncio.gather(first(), second())
        return budget.tokens == 90

    assert asyncio.run(run())


def test_time_runs_from_the_first_call():
    now = [100.0]
    budget = Budget(seconds=10, clock=lambda: now[0])

    async def call() -> None:
        async with budget.reserve(1, 0):
            pass

    asyncio.run(call())
    now[0] = 109.0
    asyncio.run(call())
    now[0] = 110.0
    with pytest.raises(BudgetSpent, match="time budget of 10 s"):
        asyncio.run(call())
