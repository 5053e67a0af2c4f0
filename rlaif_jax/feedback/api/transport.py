"""One call of a model behind an OpenAI-compatible API: cached, limited, paid from a budget, retried.

The key comes from an environment variable and goes nowhere but into the request: it is taken out of every text that
leaves this module. Needs `pip install "rlaif-jax[api]"`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from email.utils import parsedate_to_datetime
from typing import Any

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.api.cache import Kept
from rlaif_jax.feedback.api.config import ApiConfig
from rlaif_jax.feedback.api.limits import Budget, BudgetSpent, Gate, Window
from rlaif_jax.feedback.api.templates import Message
from rlaif_jax.feedback.api.verdicts import BadReply, Reply, read_reply

OVERHEAD_TOKENS = 64  # what a chat template may add to a message


class CallFailed(Exception):
    """A call without a usable reply, after all its attempts. The message holds no key. fatal: no other will have one."""

    def __init__(
        self,
        message: str,
        *,
        retry: bool = False,
        throttled: bool = False,
        retry_after: float | None = None,
        status: int | None = None,
        free: bool = False,
        fatal: bool = False,
    ) -> None:
        super().__init__(message)
        self.retry, self.throttled, self.retry_after, self.status = retry, throttled, retry_after, status
        self.fatal = fatal
        self.free = free or status is not None  # nobody charges for an error, or for what was never sent


@dataclasses.dataclass(frozen=True)
class Answered:
    """A reply; when it came; what it took (a kept reply: what it once took)."""

    reply: Reply
    time: float
    latency_s: float
    cost: float
    kept: bool


@dataclasses.dataclass
class Spent:
    """What a client has used: requests that were sent, of them retries and "too many requests", replies from the cache."""

    requests: int = 0
    retries: int = 0
    throttled: int = 0
    kept: int = 0
    tokens: int = 0
    usd: float = 0.0


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a server can do: how many log-probabilities a token (0 = none), its name for the token limit, and whether it
    can be told to choose among labels (True until it refuses)."""

    top_logprobs: int
    token_field: str
    constrains: bool = True


class Server:
    """The calls of one `ApiConfig`. Lives in one asyncio loop; `keep` runs functions of the cache in their thread."""

    def __init__(self, config: ApiConfig, keep: Callable[..., Any]) -> None:
        try:
            import openai
        except ImportError as error:
            raise UserError('a judge behind an API needs the package openai: pip install "rlaif-jax[api]"') from error
        require(bool(config.server), "server is missing: the API's address, such as http://127.0.0.1:8000/v1")
        require(bool(config.model), "model is missing: the name that the server knows it by")
        key = os.environ.get(config.key_env, "") if config.key_env else ""
        require(
            not config.key_env or bool(key),
            f"key_env: the environment variable {config.key_env} is not set; it must hold the server's key",
        )
        self._openai, self._key, self._keep = openai, key, keep
        self.config = config
        self._client = openai.AsyncOpenAI(
            base_url=config.server, api_key=key or "none", max_retries=0, timeout=config.timeout_s
        )
        self._gate = Gate(config.concurrency)
        self._window = Window(config.requests_per_minute, config.tokens_per_minute)
        self._budget = Budget(config.budget_tokens, config.budget_usd, config.budget_s)
        self._not_before = 0.0  # the server's Retry-After holds for all calls
        self._answered = -math.inf  # when a call was last answered
        self._overhead = OVERHEAD_TOKENS
        self._facts: Facts | None = None
        self._no_facts: tuple[float, CallFailed] | None = None
        self._asking = asyncio.Lock()
        self._fatal: CallFailed | None = None
        self._random = random.Random()
        self._counts = Spent()

    def __repr__(self) -> str:
        return f"Server({self.config.server}, {self.config.model})"

    @property
    def spent(self) -> Spent:
        """So far."""
        return dataclasses.replace(self._counts, tokens=self._budget.tokens, usd=self._budget.usd)

    @property
    def concurrency(self) -> int:
        """Calls at a time, now."""
        return max(int(self._gate.limit), 1)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def scrub(self, text: str) -> str:
        """`text` without the key."""
        return text.replace(self._key, "[key]") if self._key else text

    # ---- what the server can do

    async def facts(self) -> Facts:
        """Asked once and remembered in the cache. CallFailed if the server does not answer at all; all who waited for
        that share the failure."""
        since = time.monotonic()
        async with self._asking:
            if self._facts is None:
                if self._no_facts is not None and self._no_facts[0] >= since:
                    raise self._no_facts[1]
                known = await self._keep("facts", self.config.server, self.config.model)
                try:
                    self._facts = Facts(**known) if known else await self._probe()
                except CallFailed as failed:
                    self._no_facts = (time.monotonic(), failed)
                    raise
            return self._facts

    async def _learn(self, facts: Facts) -> None:
        await self._keep("learn", self.config.server, self.config.model, dataclasses.asdict(facts))

    async def _probe(self) -> Facts:
        message = [{"role": "user", "content": "Reply with the letter A."}]
        field = "max_tokens" if self.config.token_field == "auto" else self.config.token_field
        certain = True
        tops = [self.config.top_logprobs, 5, 0] if self.config.top_logprobs > 5 else [self.config.top_logprobs, 0]
        while tops:
            try:
                body = self._body(message, 1, Facts(tops[0], field), logprobs=tops[0] > 0, seed=None)
                reply = read_reply(json.loads(await self._persist(body)))
            except CallFailed as failed:
                if (
                    self.config.token_field == "auto"
                    and field == "max_tokens"
                    and "max_completion_tokens" in str(failed)
                ):
                    field = "max_completion_tokens"
                    continue
                if len(tops) == 1 or failed.status in (None, 401, 403, 404, 429):
                    raise
                certain = certain and failed.status in (400, 422, 501)
                tops.pop(0)
                continue
            facts = Facts(tops[0] if reply.tokens and reply.tokens[0].top else 0, field)
            if certain:
                await self._learn(facts)
            return facts
        raise AssertionError("the last try returns or raises")

    # ---- one question

    def _body(
        self,
        messages: Sequence[Message],
        max_tokens: int,
        facts: Facts,
        *,
        logprobs: bool,
        seed: int | None,
        labels: Sequence[str] = (),
    ) -> dict[str, Any]:
        """The request as the server gets it."""
        chat = self.config.api == "chat"
        body: dict[str, Any] = {
            "model": self.config.model,
            facts.token_field if chat else "max_tokens": max_tokens,
            "temperature": 1.0 if logprobs else self.config.temperature,
            "top_p": 1.0,
        }
        if chat:
            body["messages"] = list(messages)
        else:
            body["prompt"] = "\n\n".join(message["content"] for message in messages)
        if logprobs:
            body |= {"logprobs": True, "top_logprobs": facts.top_logprobs} if chat else {"logprobs": facts.top_logprobs}
        if seed is not None:
            body["seed"] = seed
        if labels and self.config.constrain == "structured_outputs":
            body["structured_outputs"] = {"choice": list(labels)}
        elif labels and self.config.constrain == "grammar":
            body["grammar"] = "root ::= " + " | ".join(json.dumps(label) for label in labels)
        return body

    async def ask(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        logprobs: bool,
        order: tuple[int, ...],
        seed: int,
        labels: Sequence[str] = (),
    ) -> Answered:
        """The reply to the messages, from the cache if it is there. labels: the only replies that the server may give.

        Raises CallFailed, BudgetSpent.
        """
        facts = await self.facts()
        body = self._body(messages, max_tokens, facts, logprobs=logprobs, seed=seed, labels=labels)
        decoding = {name: value for name, value in body.items() if name not in ("model", "messages", "prompt", "seed")}
        request = {
            "model": [self.config.model, self.config.revision],
            "messages": list(messages),
            "decoding": decoding | {"api": self.config.api},
            "order": list(order),
            "repeat": seed,
        }
        kept: Kept | None = await self._keep("get", request)
        if kept is not None:
            self._counts.kept += 1
            reply = read_reply(json.loads(kept.response))
            return Answered(reply, kept.time, kept.latency_s, self._cost(reply), True)
        started = time.monotonic()
        try:
            text = await self._persist(body)
        except CallFailed as failed:
            if labels and failed.status in (400, 422, 501):
                self._facts = dataclasses.replace(facts, constrains=False)
                await self._learn(self._facts)
            raise
        reply = read_reply(json.loads(text))
        answered = Answered(reply, time.time(), time.monotonic() - started, self._cost(reply), False)
        if not reply.refusal:
            await self._keep("put", request, Kept(text, answered.time, answered.latency_s))
        return answered

    def _price(self, prompt: int, completion: int) -> float:
        config = self.config
        return (prompt * config.usd_per_million_prompt + completion * config.usd_per_million_completion) / 1e6

    def _cost(self, reply: Reply) -> float:
        return self._price(reply.prompt_tokens or 0, reply.completion_tokens or 0)

    async def _persist(self, body: dict[str, Any]) -> str:
        """The text of a good response, after as many attempts as it takes and is allowed."""
        failures, throttles, waited, throttled_at = 0, 0, 0.0, math.inf
        while True:
            try:
                return await self._attempt(body)
            except CallFailed as failed:
                failures, throttles = failures + (not failed.throttled), throttles + failed.throttled
                if failed.fatal or failed.status == 401 or (failed.status in (403, 404) and self._answered < 0):
                    self._fatal = failed
                jitter = self._random.uniform(0.5, 1.0)
                pause = min(30.0, 0.25 * 2.0 ** (failures + throttles)) * jitter
                if failed.retry_after is not None:
                    pause = max(pause, failed.retry_after * (1.5 - jitter / 2) + 0.01)  # never earlier than asked
                wait = waited + pause
                if failed.throttled:  # a queue in which calls are answered is no such wait, one of throttled calls is
                    throttled_at = min(throttled_at, time.monotonic())
                    wait = max(wait, time.monotonic() + pause - max(throttled_at, self._answered))
                more = failed.retry and failures < self.config.attempts and wait <= self.config.max_wait_s
                if not more or pause >= self._budget.seconds_left:
                    times = f" ({failures} attempts)" if failures > 1 else ""
                    raise CallFailed(f"{failed}{times}", status=failed.status) from None
                self._counts.retries += 1
                waited += pause
                await asyncio.sleep(pause)

    async def _attempt(self, body: dict[str, Any]) -> str:
        """One request. The budget pays: what the response says it took; nothing for an error of the server; the most it
        can have taken where no one knows (a time-out, a cut response)."""
        completion = body.get("max_tokens") or body["max_completion_tokens"]
        # A token is at least one byte of the text, so this is the most that a prompt can be.
        prompt = len(json.dumps(body.get("messages") or body["prompt"], ensure_ascii=False).encode()) + self._overhead
        worst, usd = prompt + completion, self._price(prompt, completion)
        async with self._gate.enter(), AsyncExitStack() as stack:
            if self._fatal is not None:
                raise self._fatal
            while (pause := self._not_before - time.monotonic()) > 0:
                if pause > self.config.max_wait_s or pause >= self._budget.seconds_left:
                    told = f"the server wants no call for {pause:.0f} s, longer than this one may wait"
                    raise CallFailed(told, throttled=True, free=True)
                await asyncio.sleep(pause)
            use = await self._window.enter(worst, lambda: self._budget.check(worst, usd))
            try:
                charge = await stack.enter_async_context(self._budget.reserve(worst, usd))
            except BaseException:
                self._window.leave(use)
                raise
            self._counts.requests += 1
            generation = self._gate.generation
            try:
                async with asyncio.timeout(min(self.config.timeout_s, self._budget.seconds_left)):
                    text = self.scrub(await self._post(body))
            except CallFailed as failed:
                if failed.free:
                    charge.settle(0, 0.0)
                    use.tokens = 0
                if failed.throttled:
                    self._counts.throttled += 1
                    self._gate.shrink(generation)
                    if failed.retry_after is not None:
                        self._not_before = max(self._not_before, time.monotonic() + failed.retry_after)
                raise
            except TimeoutError:
                if self._budget.seconds_left <= 0:
                    raise BudgetSpent("the time budget was over before the server answered") from None
                raise CallFailed(f"no answer within {self.config.timeout_s:g} s", retry=True) from None
            self._gate.answered()
            self._answered = time.monotonic()
            try:
                reply = read_reply(json.loads(text))
            except ValueError as error:  # cut or wrong
                kind = str(error) if isinstance(error, BadReply) else f"the response is no valid JSON ({error})"
                raise CallFailed(self.scrub(kind)[:300], retry=True) from None
            if reply.prompt_tokens is not None and reply.completion_tokens is not None:
                used = reply.prompt_tokens + reply.completion_tokens
                self._overhead = max(self._overhead, self._overhead + reply.prompt_tokens - prompt)
                charge.settle(used, self._price(reply.prompt_tokens, reply.completion_tokens))
                use.tokens = used
            return text

    async def _post(self, body: dict[str, Any]) -> str:
        """The body of the response; every failure as CallFailed, without the key."""
        openai = self._openai
        own = ("structured_outputs", "grammar")
        extra = {name: value for name, value in body.items() if name in own}
        rest = {name: value for name, value in body.items() if name not in own}
        calls = self._client.chat.completions if self.config.api == "chat" else self._client.completions
        try:
            response = await calls.with_raw_response.create(**rest, extra_body=extra or None)
            return response.http_response.text
        except openai.APIStatusError as error:
            status, headers = error.status_code, error.response.headers
            message = self.scrub(f"status {status}: {_told(error.response)}")
            retry = status in (408, 409, 425, 429) or status >= 500
            after = _retry_after(headers)
            if "insufficient_quota" in (error.code, error.type):  # a 429 that no waiting ends
                raise CallFailed(message, status=status, fatal=True) from None
            raise CallFailed(
                message, retry=retry, throttled=status == 429, retry_after=after if retry else None, status=status
            ) from None
        except openai.APITimeoutError:
            raise TimeoutError from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            told = self.scrub(f"no connection: {type(cause).__name__} {cause}")[:300]
            raise CallFailed(told, retry=True, free=type(cause).__name__ == "ConnectError") from None
        except (openai.OpenAIError, UnicodeDecodeError) as error:
            raise CallFailed(self.scrub(f"{type(error).__name__}: {error}")[:300], retry=True) from None


def _told(response: Any) -> str:
    """What an error response says, in short."""
    try:
        told = response.json()
        error = told.get("error", told) if isinstance(told, dict) else told
        text = error.get("message", error) if isinstance(error, dict) else error
    except ValueError:
        text = response.text
    return " ".join(str(text).split())[:300]


def _retry_after(headers: Any) -> float | None:
    """Seconds of the headers retry-after-ms or Retry-After (a number or a date); None = not said."""
    try:
        if "retry-after-ms" in headers:
            return max(float(headers["retry-after-ms"]) / 1000, 0.0)
        value = headers.get("retry-after")
        if value is None:
            return None
        if value.strip().replace(".", "", 1).isdigit():
            return float(value)
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return None
