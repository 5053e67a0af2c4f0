"""Calls of a model behind an OpenAI-compatible API: cached, limited, paid from a budget, retried.

The key comes from an environment variable and goes only into the request: it is removed from every text that
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
from concurrent.futures import Executor
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from rlaif_jax.config import UserError, require
from rlaif_jax.feedback.api.cache import CachedReply, CallCache
from rlaif_jax.feedback.api.config import ApiConfig
from rlaif_jax.feedback.api.failures import Attempts, CallFailed, RetryPolicy, error_message, retry_after_seconds
from rlaif_jax.feedback.api.limits import Budget, BudgetSpent, ConcurrencyLimiter, RateLimiter
from rlaif_jax.feedback.api.replies import BadReply, Reply, read_reply
from rlaif_jax.feedback.api.templates import Message

T = TypeVar("T")
OVERHEAD_TOKENS = 64  # the tokens that a chat template may add to a message


@dataclasses.dataclass(frozen=True)
class ModelReply:
    """A reply with its call; a cached reply has the data of the call that was made for it.

    Attributes:
        reply: the reply.
        time: when it came, in Unix seconds.
        latency_s: how long it took, in seconds.
        cost: its price, in US dollars.
    """

    reply: Reply
    time: float
    latency_s: float
    cost: float


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
    """

    requests: int = 0
    retries: int = 0
    throttled: int = 0
    cached: int = 0
    tokens: int = 0
    usd: float = 0.0


@dataclasses.dataclass(frozen=True)
class ServerCapabilities:
    """What a server can do with a model.

    Attributes:
        top_logprobs: the number of log-probabilities that it gives at a token; 0 = none.
        token_field: its name for the greatest length of a reply.
        constrains: whether it can be made to choose among labels; true until it refuses.
    """

    top_logprobs: int
    token_field: str
    constrains: bool = True


class Transport:
    """The calls of one `ApiConfig`, all in one asyncio loop.

    Args:
        config: the server, the model and the limits.
        cache: the cache of replies.
        disk: runs the methods of the cache, because an SQLite object stays in the thread that made it.

    Raises:
        UserError: the package openai is missing, or the server, the model or the key is.
    """

    def __init__(self, config: ApiConfig, cache: CallCache, disk: Executor) -> None:
        try:
            import openai
        except ImportError as error:
            raise UserError('a judge behind an API needs the package openai: pip install "rlaif-jax[api]"') from error
        require(bool(config.server), "server is missing: the API's address, such as http://127.0.0.1:8000/v1")
        require(bool(config.model), "model is missing: the model's name on the server")
        key = os.environ.get(config.key_env, "") if config.key_env else ""
        require(
            not config.key_env or bool(key),
            f"key_env: the environment variable {config.key_env} is not set; it must hold the server's key",
        )
        self._openai, self._key, self._cache, self._disk = openai, key, cache, disk
        self.config = config
        self._client = openai.AsyncOpenAI(
            base_url=config.server, api_key=key or "none", max_retries=0, timeout=config.timeout_s
        )
        self._concurrency = ConcurrencyLimiter(config.concurrency)
        self._rate = RateLimiter(config.requests_per_minute, config.tokens_per_minute)
        self._budget = Budget(config.budget_tokens, config.budget_usd, config.budget_s)
        self._not_before = 0.0  # the server's Retry-After holds for all calls
        self._last_answer = -math.inf
        self._overhead = OVERHEAD_TOKENS
        self._retry = RetryPolicy(config.attempts, config.max_wait_s)
        self._capabilities: ServerCapabilities | None = None
        self._probe_failed: tuple[float, CallFailed] | None = None
        self._probing = asyncio.Lock()
        self._fatal: CallFailed | None = None
        self._random = random.Random()
        self._counts = Spent()

    def __repr__(self) -> str:
        return f"Transport({self.config.server}, {self.config.model})"

    @property
    def spent(self) -> Spent:
        """Returns the requests, tokens and money used so far."""
        return dataclasses.replace(self._counts, tokens=self._budget.tokens, usd=self._budget.usd)

    @property
    def concurrency(self) -> int:
        """Returns how many calls may run at a time now."""
        return max(int(self._concurrency.limit), 1)

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    def scrub(self, text: str) -> str:
        """Returns `text` without the key."""
        return text.replace(self._key, "[key]") if self._key else text

    async def _on_disk(self, method: Callable[..., T], *arguments: Any) -> T:
        """Calls a method of the cache in the thread of the disk."""
        return await asyncio.get_running_loop().run_in_executor(self._disk, method, *arguments)

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
                known = await self._on_disk(self._cache.capabilities, self.config.server, self.config.model)
                try:
                    self._capabilities = ServerCapabilities(**known) if known else await self._probe()
                except CallFailed as failed:
                    self._probe_failed = (time.monotonic(), failed)
                    raise
            return self._capabilities

    async def _remember(self, capabilities: ServerCapabilities) -> None:
        fields = dataclasses.asdict(capabilities)
        await self._on_disk(self._cache.put_capabilities, self.config.server, self.config.model, fields)

    async def _probe(self) -> ServerCapabilities:
        """Asks for fewer and fewer log-probabilities until the server answers.

        The greatest length of the reply is tried by both of its names.
        """
        message = [{"role": "user", "content": "Reply with the letter A."}]
        field = "max_tokens" if self.config.token_field == "auto" else self.config.token_field
        certain = True
        tops = [self.config.top_logprobs, 5, 0] if self.config.top_logprobs > 5 else [self.config.top_logprobs, 0]
        while tops:
            try:
                body = self._body(message, 1, ServerCapabilities(tops[0], field), logprobs=tops[0] > 0, seed=None)
                reply = read_reply(json.loads(await self._with_retries(body)))
            except CallFailed as failed:
                other_name = "max_completion_tokens" in str(failed)
                if self.config.token_field == "auto" and field == "max_tokens" and other_name:
                    field = "max_completion_tokens"
                    continue
                if len(tops) == 1 or failed.status in (None, 401, 403, 404, 429):
                    raise
                certain = certain and failed.status in (400, 422, 501)
                tops.pop(0)
                continue
            found = ServerCapabilities(tops[0] if reply.tokens and reply.tokens[0].top else 0, field)
            if certain:
                await self._remember(found)
            return found
        raise AssertionError("the last try returns or raises")

    # ---- one question

    def _body(
        self,
        messages: Sequence[Message],
        max_tokens: int,
        capabilities: ServerCapabilities,
        *,
        logprobs: bool,
        seed: int | None,
        labels: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Builds the body of a request; `labels` are the only replies that the server may give."""
        chat = self.config.api == "chat"
        body: dict[str, Any] = {
            "model": self.config.model,
            capabilities.token_field if chat else "max_tokens": max_tokens,
            "temperature": 1.0 if logprobs else self.config.temperature,
            "top_p": 1.0,
        }
        if chat:
            body["messages"] = list(messages)
        else:
            body["prompt"] = "\n\n".join(message["content"] for message in messages)
        if logprobs:
            top = capabilities.top_logprobs
            body |= {"logprobs": True, "top_logprobs": top} if chat else {"logprobs": top}
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
    ) -> ModelReply:
        """Returns the reply to the messages, from the cache where it has one.

        Args:
            messages: the messages of the chat.
            max_tokens: the greatest length of the reply.
            logprobs: whether to ask for log-probabilities, as many as the server gives.
            order: the order in which the answers are shown; a part of the cache's key.
            seed: the seed of the sampling.
            labels: the only replies that the server may give; () = any reply.

        Raises:
            CallFailed: no usable reply after all attempts.
            BudgetSpent: the call might pass a limit.
        """
        capabilities = await self.capabilities()
        body = self._body(messages, max_tokens, capabilities, logprobs=logprobs, seed=seed, labels=labels)
        decoding = {name: value for name, value in body.items() if name not in ("model", "messages", "prompt", "seed")}
        request = {
            "model": [self.config.model, self.config.revision],
            "messages": list(messages),
            "decoding": decoding | {"api": self.config.api},
            "order": list(order),
            "repeat": seed,
        }
        cached = await self._on_disk(self._cache.get, request)
        if cached is not None:
            self._counts.cached += 1
        else:
            started = time.monotonic()
            try:
                text = await self._with_retries(body)
            except CallFailed as failed:
                if labels and failed.status in (400, 422, 501):
                    self._capabilities = dataclasses.replace(capabilities, constrains=False)
                    await self._remember(self._capabilities)
                raise
            cached = CachedReply(text, time.time(), time.monotonic() - started)
            if not read_reply(json.loads(text)).refusal:
                await self._on_disk(self._cache.put, request, cached)
        reply = read_reply(json.loads(cached.response))
        cost = self._price(reply.prompt_tokens or 0, reply.completion_tokens or 0)
        return ModelReply(reply, cached.time, cached.latency_s, cost)

    def _price(self, prompt: int, completion: int) -> float:
        config = self.config
        return (prompt * config.usd_per_million_prompt + completion * config.usd_per_million_completion) / 1e6

    async def _with_retries(self, body: dict[str, Any]) -> str:
        """Returns the text of a good response, after as many attempts as are needed and allowed."""
        attempts = Attempts()
        while True:
            try:
                return await self._attempt(body)
            except CallFailed as failed:
                if failed.fatal or failed.status == 401 or (failed.status in (403, 404) and self._last_answer < 0):
                    self._fatal = failed
                attempts, pause = self._retry.after(
                    failed,
                    attempts,
                    now=time.monotonic(),
                    last_answer=self._last_answer,
                    seconds_left=self._budget.seconds_left,
                    jitter=self._random.uniform(0.5, 1.0),
                )
                if pause is None:
                    times = f" ({attempts.failures} attempts)" if attempts.failures > 1 else ""
                    raise CallFailed(f"{failed}{times}", status=failed.status) from None
                self._counts.retries += 1
                await asyncio.sleep(pause)

    async def _attempt(self, body: dict[str, Any]) -> str:
        """Sends one request within all limits and returns the text of a good response.

        The budget is charged the usage in the response; nothing for an error of the server; the most that the
        call can have used where nobody knows (a time-out, a cut response).
        """
        completion = body.get("max_tokens") or body["max_completion_tokens"]
        # A token is at least one byte of the text, so this is the most that a prompt can be.
        prompt = len(json.dumps(body.get("messages") or body["prompt"], ensure_ascii=False).encode()) + self._overhead
        worst, usd = prompt + completion, self._price(prompt, completion)
        async with self._concurrency.slot(), AsyncExitStack() as stack:
            await self._wait_as_asked()
            rated = await self._rate.reserve(worst, lambda: self._budget.check(worst, usd))
            try:
                charged = await stack.enter_async_context(self._budget.reserve(worst, usd))
            except BaseException:
                self._rate.release(rated)
                raise
            self._counts.requests += 1
            generation = self._concurrency.generation
            try:
                async with asyncio.timeout(min(self.config.timeout_s, self._budget.seconds_left)):
                    text = self.scrub(await self._post(body))
            except CallFailed as failed:
                if failed.free:
                    charged.settle(0)
                    rated.settle(0)
                if failed.throttled:
                    self._counts.throttled += 1
                    self._concurrency.refused(generation)
                    if failed.retry_after is not None:
                        self._not_before = max(self._not_before, time.monotonic() + failed.retry_after)
                raise
            except TimeoutError:
                if self._budget.seconds_left <= 0:
                    raise BudgetSpent("the time budget was over before the server answered") from None
                raise CallFailed(f"no answer within {self.config.timeout_s:g} s", retry=True) from None
            self._concurrency.answered()
            self._last_answer = time.monotonic()
            try:
                reply = read_reply(json.loads(text))
            except ValueError as error:  # cut or wrong
                kind = str(error) if isinstance(error, BadReply) else f"the response is no valid JSON ({error})"
                raise CallFailed(self.scrub(kind)[:300], retry=True) from None
            if reply.prompt_tokens is not None and reply.completion_tokens is not None:
                used = reply.prompt_tokens + reply.completion_tokens
                self._overhead = max(self._overhead, self._overhead + reply.prompt_tokens - prompt)
                charged.settle(used, self._price(reply.prompt_tokens, reply.completion_tokens))
                rated.settle(used)
            return text

    async def _wait_as_asked(self) -> None:
        """Waits until the server's Retry-After is over.

        Raises CallFailed where that is too long, or where no call can succeed.
        """
        if self._fatal is not None:
            raise self._fatal
        while (pause := self._not_before - time.monotonic()) > 0:
            if pause > self.config.max_wait_s or pause >= self._budget.seconds_left:
                message = f"the server wants no call for {pause:.0f} s, longer than this one may wait"
                raise CallFailed(message, throttled=True, free=True)
            await asyncio.sleep(pause)

    async def _post(self, body: dict[str, Any]) -> str:
        """Returns the body of the response; every failure becomes a CallFailed without the key."""
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
            message = self.scrub(f"status {status}: {error_message(error.response)}")
            retry = status in (408, 409, 425, 429) or status >= 500
            after = retry_after_seconds(headers)
            if "insufficient_quota" in (error.code, error.type):  # a 429 that no waiting ends
                raise CallFailed(message, status=status, fatal=True) from None
            raise CallFailed(
                message, retry=retry, throttled=status == 429, retry_after=after if retry else None, status=status
            ) from None
        except openai.APITimeoutError:
            raise TimeoutError from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            message = self.scrub(f"no connection: {type(cause).__name__} {cause}")[:300]
            raise CallFailed(message, retry=True, free=type(cause).__name__ == "ConnectError") from None
        except (openai.OpenAIError, UnicodeDecodeError) as error:
            raise CallFailed(self.scrub(f"{type(error).__name__}: {error}")[:300], retry=True) from None
