"""The connection to an OpenAI-compatible server: one request, one response.

The key comes from an environment variable and goes only into the request: it is removed from every text that leaves this
module. Needs the extra `api`.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from typing import Any, TypeVar

from rlaif_jax.config import missing_extra, require
from rlaif_jax.feedback.api.config import ApiConfig
from rlaif_jax.feedback.api.failures import CallFailed, ServerError, error_in, failure_of, read_error
from rlaif_jax.feedback.api.replies import BadReply, Reply, read_reply, read_usage

T = TypeVar("T")
_LONG = 50_000  # characters that take a millisecond to read
MOST_BRACKETS = 100_000
"""Brackets in a response, besides one in 20 characters: while `json` makes very many lists, no other thread runs."""


async def off_loop(length: int, work: Callable[..., T], *arguments: Any) -> T:
    """Returns what `work` returns; a long text is read in a thread, so that all other calls go on.

    Args:
        length: the length of the text, in characters.
        work: the function.
        *arguments: its arguments.
    """
    return work(*arguments) if length < _LONG else await asyncio.to_thread(work, *arguments)


class TooManyLists(Exception):
    """A response that takes long to parse and is no completion.

    Args:
        response: the response.
        brackets: how many it has.
    """

    def __init__(self, response: Any, brackets: int) -> None:
        super().__init__(f"{brackets} lists or objects in {len(response.content)} bytes: {response.text[:100]!r}")
        self.response = response


async def refuse_lists(response: Any) -> None:
    """Raises TooManyLists for a response with very many brackets, before the client of the API parses it."""
    body = await response.aread()
    brackets = body.count(b"[") + body.count(b"{")
    if brackets > MOST_BRACKETS + len(body) // 20:
        raise TooManyLists(response, brackets)


class Connection:
    """A connection with the server of a config.

    Args:
        config: the server, the name of the key, and the longest time of a call.

    Raises:
        UserError: the package openai is missing, or the server, the model or the key is.
    """

    def __init__(self, config: ApiConfig) -> None:
        try:
            import openai
        except ImportError as error:
            raise missing_extra("a judge behind an API needs the package openai", "api") from error
        require(bool(config.server), "server is missing: the API's address, such as http://127.0.0.1:8000/v1")
        require(bool(config.model), "model is missing: the model's name on the server")
        key = os.environ.get(config.key_env, "") if config.key_env else ""
        require(
            not config.key_env or bool(key),
            f"key_env: the environment variable {config.key_env} is not set; it must hold the server's key",
        )
        self._openai, self._key, self._server = openai, key, config.server
        self._client = openai.AsyncOpenAI(
            base_url=config.server,
            api_key=key or "none",
            max_retries=0,
            timeout=config.timeout_s,
            http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [refuse_lists]}),
        )
        self._calls = self._client.chat.completions if config.api == "chat" else self._client.completions

    async def close(self) -> None:
        """Closes the connection."""
        await self._client.close()

    def scrub(self, text: str) -> str:
        """Returns `text` without the key."""
        return text.replace(self._key, "[key]") if self._key else text

    async def exchange(self, body: dict[str, Any]) -> tuple[str, Reply]:
        """Sends a request and returns the response, as text and read.

        Raises:
            CallFailed: there is no completion; without the key.
            TimeoutError: the longest time of a call is over.
        """
        text, headers = await self._post(body)
        return await off_loop(len(text), self._read, self.scrub(text), headers)

    def _read(self, text: str, headers: Any) -> tuple[str, Reply]:
        """Reads the body of a good response, which may hold an error all the same."""
        try:
            content = json.loads(text)
            error_found = error_in(content)
        except (ValueError, RecursionError) as error:  # cut or wrong
            message = f"the response is no valid JSON ({error}): {text[:100]!r}"
            raise CallFailed(message, retry=True) from None
        if error_found is not None:
            failed = failure_of(error_found, error_found.status, headers)
            failed.usage = read_usage(content)
            raise failed
        try:
            return text, read_reply(content)
        except BadReply as error:
            raise CallFailed(str(error)[:300], retry=True, usage=read_usage(content)) from None

    async def _post(self, body: dict[str, Any]) -> tuple[str, Any]:
        """Returns the body and the headers of the response."""
        openai = self._openai
        own = ("structured_outputs", "grammar")
        extra = {name: value for name, value in body.items() if name in own}
        rest = {name: value for name, value in body.items() if name not in own}
        try:
            response = await self._calls.with_raw_response.create(**rest, extra_body=extra or None)
            return response.http_response.text, response.http_response.headers
        except openai.APIStatusError as error:
            found = read_error(error.response)
            found = found._replace(message=self.scrub(found.message))
            raise failure_of(found, error.status_code, error.response.headers) from None
        except openai.APITimeoutError:
            raise TimeoutError from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            if isinstance(cause, TooManyLists):  # openai 2; openai 3 lets it pass
                raise self._failure(cause) from None
            message = self.scrub(f"no connection to {self._server}: {type(cause).__name__} {cause}")[:300]
            raise CallFailed(message, retry=True, free=type(cause).__name__ == "ConnectError") from None
        except TooManyLists as error:
            raise self._failure(error) from None
        except (openai.OpenAIError, UnicodeDecodeError) as error:
            raise CallFailed(self.scrub(f"{type(error).__name__}: {error}")[:300], retry=True) from None

    def _failure(self, error: TooManyLists) -> CallFailed:
        message, response = self.scrub(f"the response is no completion: {error}"), error.response
        if response.is_success:  # it is charged for
            return CallFailed(message)
        return failure_of(ServerError(message, None, False), response.status_code, response.headers)
