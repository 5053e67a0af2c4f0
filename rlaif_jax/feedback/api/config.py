"""Settings of a judge behind an API."""

from __future__ import annotations

import dataclasses
import math
import re
import urllib.parse
from pathlib import Path
from typing import Literal

from rlaif_jax.config import require
from rlaif_jax.feedback.api.verdicts import Debias

PRICES = ("usd_per_million_prompt", "usd_per_million_completion")


def require_address(name: str, address: str) -> None:
    """Raises UserError where a text is no address of a server.

    Args:
        name: the setting, for the message.
        address: the text, such as http://127.0.0.1:8000/v1.
    """
    scheme, _, rest = address.partition("://")
    require(
        scheme in ("http", "https") and bool(rest),
        f"{name} is {address!r}; an address begins with http:// or https://",
    )
    require(
        "@" not in rest.partition("/")[0],
        f"{name} holds a user name or a key; put the key into an environment variable and name that with key_env",
    )
    try:
        parts = urllib.parse.urlsplit(address)
        whole = bool(parts.hostname) and parts.port != 0 and not re.search(r"\s", address)
    except ValueError:  # the port is no number or over 65535, or a bracket of an IPv6 address is open
        whole = False
    require(whole, f"{name} is {address!r}; an address names a host, and behind a colon a port from 1 to 65535 or none")


@dataclasses.dataclass(frozen=True)
class ApiConfig:
    """A judge behind an OpenAI-compatible server (OpenAI, vLLM, llama.cpp, Ollama, TGI ...).

    Attributes:
        server: the API's address, such as http://127.0.0.1:8000/v1.
        model: the judge's name on the server.
        revision: the revision of the model's weights, if known; replies are cached by model and revision.
        rater: the judge's name in the records; "" = the model's.
        key_env: name of the environment variable that holds the key; "" = the server needs no key.
        api: chat, or completion for models without a chat template.
        reading: direct: one label, whose log-probability is read; reasons: reasons first, then the verdict;
            auto: direct where the server gives log-probabilities, the template has a [direct] section and the model
            does not think before it answers.
        top_logprobs: how many log-probabilities to ask for at each token; a server with fewer gives fewer.
        constrain: how the server is made to choose among the labels after a reply with too little `min_mass`:
            structured_outputs (vLLM), grammar (llama.cpp), or none.
        min_mass: with less probability on all labels together than this, a verdict is missing.
        debias: how both orders of a pair become one probability, see `verdicts.preference`.
        temperature: the temperature of replies in words; it is 1 where log-probabilities are read. A server that
            takes no temperature, top_p or seed is asked without, and the summary says so.
        seed: seed of the judge's sampling.
        repeats: how often every question is asked, with the seeds seed, seed + 1, ...
        max_tokens: the greatest length of a reply in words, thoughts included; 0 = the template's, and 4,096 more for a
            model that thinks before it answers.
        token_field: the server's name for the greatest length; auto = find out.
        concurrency: calls at a time; a fifth less after "too many requests", then slowly up again.
        requests_per_minute: the limit of your account; None = none.
        tokens_per_minute: the limit of your account; None = none. What a prompt will take is estimated from earlier ones.
        timeout_s: seconds of one call, from its start to the last byte.
        attempts: attempts of a call that fails; "too many requests" does not count.
        max_wait_s: the longest sum of pauses of one call, and the longest time of "too many requests" in
            which no call at all is answered; a server that wants a longer pause gets no call.
        usd_per_million_prompt: the price of a million tokens of prompts.
        usd_per_million_completion: the price of a million tokens of replies.
        budget_usd: stop before more is spent; None = no limit.
        budget_tokens: stop before more are used, in prompts and replies together; None = no limit.
        budget_s: no call goes on longer than this many seconds after the first; None = no limit.
        cache: SQLite file of replies; None = STORE.calls.sqlite next to the store, or memory where no store
            is given.
    """

    server: str = ""
    model: str = ""
    revision: str = ""
    rater: str = ""
    key_env: str = ""
    api: Literal["chat", "completion"] = "chat"
    reading: Literal["auto", "direct", "reasons"] = "auto"
    top_logprobs: int = 20
    constrain: Literal["structured_outputs", "grammar", "none"] = "structured_outputs"
    min_mass: float = 0.5
    debias: Debias = "logit"
    temperature: float = 0.0
    seed: int = 0
    repeats: int = 1
    max_tokens: int = 0
    token_field: Literal["auto", "max_tokens", "max_completion_tokens"] = "auto"
    concurrency: int = 20
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    timeout_s: float = 60.0
    attempts: int = 6
    max_wait_s: float = 300.0
    usd_per_million_prompt: float = 0.0
    usd_per_million_completion: float = 0.0
    budget_usd: float | None = None
    budget_tokens: int | None = None
    budget_s: float | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        if self.server:
            require_address("server", self.server)
        settings = vars(self)
        for name in ("concurrency", "repeats", "attempts", "top_logprobs"):
            require(settings[name] >= 1, f"{name} must be at least 1, not {settings[name]}")
        for name in ("requests_per_minute", "tokens_per_minute", "timeout_s"):
            value = settings[name]
            require(value is None or value > 0, f"{name} must be more than 0, not {value}")
        for name in ("budget_usd", "budget_tokens", "budget_s", "temperature", "max_tokens", "max_wait_s", *PRICES):
            value = settings[name]
            require(value is None or value >= 0, f"{name} must not be negative, but is {value}")
        require(self.temperature < math.inf, "temperature must be finite")
        require(0 <= self.min_mass <= 1, f"min_mass must lie in 0 .. 1, not {self.min_mass}")
        priced = self.usd_per_million_prompt > 0 or self.usd_per_million_completion > 0
        require(
            self.budget_usd is None or priced,
            "budget_usd needs the prices: usd_per_million_prompt and usd_per_million_completion",
        )
