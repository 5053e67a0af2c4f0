"""The dialects of the OpenAI API: what a server can do, learned from its replies and refusals."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from rlaif_jax.feedback.api.config import ApiConfig
from rlaif_jax.feedback.api.failures import CallFailed, Charge
from rlaif_jax.feedback.api.templates import Message

PROBE_TOKENS = 16  # some reasoning models refuse to write less
MOST_LEARNED_TOKENS = 4096  # a server that wants to write more wants it for this question alone
_ASKED = ("server", "model", "revision", "api", "top_logprobs", "token_field")
OPTIONAL = ("temperature", "top_p", "seed")
_REFUSED = (400, 403, 422, 501)
_UNKNOWN = re.compile(
    r"unsupported|not support|unrecogni[sz]ed|unknown|unexpected|instead|not permitted|not allowed|extra|deprecated"
)
_TOO_FEW = re.compile(r"at least|minimum|>=|greater than|higher|below|reached|too (?:small|low|few|short)")
_NO_SYSTEM = re.compile(r"system\b.{0,20}(?:role|message|prompt).{0,40}not (?:supported|allowed)|roles must alternate")


class Relearned(Exception):
    """A reply showed what the server cannot do: the question is to be asked anew, in its dialect.

    Attributes:
        charge: what the call took.
    """

    def __init__(self, charge: Charge = Charge()) -> None:
        super().__init__("the question is to be asked anew")
        self.charge = charge


@dataclasses.dataclass(frozen=True)
class ServerCapabilities:
    """What a server can do with a model.

    Attributes:
        top_logprobs: the number of log-probabilities that it gives at a token; 0 = none.
        token_field: its name for the greatest length of a reply.
        constrains: whether it can be made to choose among labels; true until it refuses.
        omitted: the fields of `OPTIONAL` that it refuses, and "system" where it takes no system message.
        least_tokens: the least greatest length that it takes.
        thinks: whether the model thinks before it answers.
    """

    top_logprobs: int
    token_field: str
    constrains: bool = True
    omitted: tuple[str, ...] = ()
    least_tokens: int = 1
    thinks: bool = False

    @classmethod
    def expected(cls, config: ApiConfig) -> ServerCapabilities:
        """Returns what is tried first."""
        return cls(config.top_logprobs, "max_tokens" if config.token_field == "auto" else config.token_field)

    @classmethod
    def question(cls, config: ApiConfig) -> dict[str, Any]:
        """Returns what the capabilities depend on: the key under which they are remembered."""
        asked = {name: vars(config)[name] for name in _ASKED}
        return asked | {"fields": [field.name for field in dataclasses.fields(cls)]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ServerCapabilities:
        """Builds the capabilities from what `dataclasses.asdict` and JSON made of them."""
        return cls(**values | {"omitted": tuple(values["omitted"])})


def request_body(
    config: ApiConfig,
    capabilities: ServerCapabilities,
    messages: Sequence[Message],
    max_tokens: int,
    *,
    logprobs: bool,
    seed: int,
    labels: Sequence[str] = (),
) -> dict[str, Any]:
    """Builds the body of a request in the server's dialect.

    Args:
        config: the server, the model and the decoding.
        capabilities: what the server can do.
        messages: the messages of the chat.
        max_tokens: the greatest length of the reply.
        logprobs: whether to ask for log-probabilities, as many as the server gives.
        seed: the seed of the sampling.
        labels: the only replies that the server may give; () = any reply.
    """
    chat = config.api == "chat"
    body: dict[str, Any] = {
        "model": config.model,
        capabilities.token_field if chat else "max_tokens": max(max_tokens, capabilities.least_tokens),
        "temperature": 1.0 if logprobs else config.temperature,
        "top_p": 1.0,
    }
    if chat and "system" in capabilities.omitted and len(messages) > 1:
        body["messages"] = [{"role": "user", "content": "\n\n".join(message["content"] for message in messages)}]
    elif chat:
        body["messages"] = list(messages)
    else:
        body["prompt"] = "\n\n".join(message["content"] for message in messages)
    if logprobs:
        top = capabilities.top_logprobs
        body |= {"logprobs": True, "top_logprobs": top} if chat else {"logprobs": top}
    body["seed"] = seed
    if labels and config.constrain == "structured_outputs":
        body["structured_outputs"] = {"choice": list(labels)}
    elif labels and config.constrain == "grammar":
        body["grammar"] = "root ::= " + " | ".join(json.dumps(label) for label in labels)
    return {name: value for name, value in body.items() if name not in capabilities.omitted}


def probe_body(config: ApiConfig, capabilities: ServerCapabilities, max_tokens: int = PROBE_TOKENS) -> dict[str, Any]:
    """Builds the request that shows what a server can do, and whether it answers.

    Args:
        config: the server, the model and the decoding.
        capabilities: what is known of the server.
        max_tokens: the greatest length of the reply.
    """
    logprobs = capabilities.top_logprobs > 0
    message = {"role": "user", "content": "Reply with the letter A."}
    return request_body(config, capabilities, [message], max_tokens, logprobs=logprobs, seed=config.seed)


def most_tokens(body: dict[str, Any]) -> int:
    """Returns the greatest length of the reply to a request."""
    return body.get("max_tokens") or body["max_completion_tokens"]


def learn(
    known: ServerCapabilities, failed: CallFailed, body: dict[str, Any], config: ApiConfig, *, probing: bool = False
) -> ServerCapabilities | None:
    """Returns the capabilities that a refused request teaches; None = it teaches nothing.

    A refusal teaches what it names. The probe has no content that could be refused, so there a refusal that names nothing,
    and an error of the server, teach as well.

    Args:
        known: the capabilities with which the request was made.
        failed: the refusal.
        body: the body of the request.
        config: its token_field and max_tokens win, if they are set.
        probing: whether the request was the probe.
    """
    if failed.status not in _REFUSED and not (probing and (failed.status or 0) >= 500):
        return None
    said = failed.message.partition(": ")[2].lower()
    asked = json.dumps(body.get("messages") or body["prompt"]).lower()
    names = lambda name: bool(re.search(rf"\b{name}", said)) and name not in asked
    numbers = [int(number) for number in re.findall(r"(?<![\w.-])\d{1,7}(?![\w.]*\w)", said)]
    change = lambda **fields: dataclasses.replace(known, **fields)

    other = "max_completion_tokens" if known.token_field == "max_tokens" else "max_tokens"
    subject = "max_completion_tokens" in said if other == "max_completion_tokens" else known.token_field in said
    if config.token_field == "auto" and config.api == "chat" and subject and _UNKNOWN.search(said):
        return change(token_field=other)
    if "logprobs" in body and re.search("log.?prob", said):
        top = known.top_logprobs
        fewer = [number for number in numbers if 0 < number < top]
        refused = bool(_UNKNOWN.search(said)) or failed.status == 403
        return change(top_logprobs=max(fewer) if fewer else 5 if top > 5 and not refused else 0)
    if omitted := tuple(name for name in OPTIONAL if name in body and names(name)):
        return change(omitted=(*known.omitted, *omitted))
    tokens = most_tokens(body)
    limited = re.search(r"max_?(?:completion_|output_|new_)?tokens|output limit", said) and "context" not in said
    if limited and _TOO_FEW.search(said) and tokens < MOST_LEARNED_TOKENS and (probing or tokens != config.max_tokens):
        wanted = [number for number in numbers if tokens < number <= MOST_LEARNED_TOKENS]
        return change(least_tokens=min(wanted) if wanted else min(4 * tokens, MOST_LEARNED_TOKENS))
    if "system" not in known.omitted and len(body.get("messages", ())) > 1 and _NO_SYSTEM.search(said):
        return change(omitted=(*known.omitted, "system"))
    if probing and "logprobs" in body:
        return change(top_logprobs=5 if known.top_logprobs > 5 and failed.status != 403 else 0)
    if probing and failed.status in (400, 422, 501) and (rest := tuple(name for name in OPTIONAL if name in body)):
        return change(omitted=(*known.omitted, *rest))
    return None
