"""The model that a rater talks to: a server with the OpenAI API, or weights in a local folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import TypeAlias

from rlaif_jax.config import UserError, missing_extra, require
from rlaif_jax.feedback.api.config import require_address
from rlaif_jax.feedback.people.chats import Turn
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.ui.records import chat_prompt

ChatModel: TypeAlias = Callable[[str, Sequence[Turn]], str]
"""(topic of the chat, turns so far, of which the last has no reply yet) -> the reply.

It may be slow, runs in a separate thread, and may raise UserError."""


def open_chat_model(model: str, name: str = "", tokenizer: Path | None = None, key_env: str = "") -> ChatModel:
    """Returns the chat model at a URL or in a folder.

    Args:
        model: a URL such as `http://localhost:8000/v1`, or a Hugging Face folder.
        name: the model's name on the server.
        tokenizer: the tokenizer of the folder's model, if it is in another place.
        key_env: name of the environment variable that holds the server's key; "" = the server needs no key. No other
            key is sent: a URL may be anybody's.

    Raises:
        UserError: the model cannot be used.
    """
    if model.startswith(("http://", "https://")):
        return _served_model(model, name, key_env)
    return local_model(Path(model), tokenizer)


def _served_model(url: str, name: str, key_env: str) -> ChatModel:
    try:
        import openai
    except ImportError as error:
        raise missing_extra(f"talking to {url} needs the package openai", "api") from error
    key = os.environ.get(key_env, "") if key_env else "none"
    require(bool(key), f"model_key_env: the environment variable {key_env} is not set; it must hold the server's key")
    require_address("model", url)
    client = openai.OpenAI(base_url=url, api_key=key, timeout=120, max_retries=2)

    def reply(prompt: str, turns: Sequence[Turn]) -> str:
        messages = [{"role": "system", "content": prompt}] if prompt else []
        for turn in turns:
            messages.append({"role": "user", "content": turn.message})
            if turn.reply is not None:
                messages.append({"role": "assistant", "content": turn.reply})
        try:
            found = client.chat.completions.create(model=name or "default", messages=messages)  # type: ignore[arg-type]
        except openai.OpenAIError as error:
            raise UserError(
                f"the model does not answer ({type(error).__name__}); your message is kept, try again"
            ) from error
        message = found.choices[0].message if found.choices else None
        if message is None:  # as a proxy may write it whose own server failed
            raise UserError("the model's server sent no reply; your message is kept, try again")
        return (message.content or "").strip()

    return reply


def local_model(
    folder: Path, tokenizer_file: Path | None = None, sampling: SamplingConfig = SamplingConfig(64, 0.8), seed: int = 0
) -> ChatModel:
    """Returns the language model of a Hugging Face folder as a chat model.

    It reads the last tokens of a conversation that its context holds.

    A reply is drawn with a key of (seed, conversation), so the same conversation gets the same reply.

    Args:
        folder: the model's folder.
        tokenizer_file: the tokenizer, if it is not in the folder.
        sampling: how replies are drawn.
        seed: seed of the replies.

    Raises:
        UserError: the folder holds no usable model, or the context is too short.
    """
    import jax

    from rlaif_jax.data.tokenizers import check_tokenizer, load_tokenizer
    from rlaif_jax.feedback.records.forms import sha256
    from rlaif_jax.models.hf.files import load_model
    from rlaif_jax.parallel import JitRunner
    from rlaif_jax.policies.text import answer_texts, make_generator
    from rlaif_jax.types import Prompts

    tokenizer = load_tokenizer(tokenizer_file or folder)
    model, params = load_model(folder)
    check_tokenizer(tokenizer, model.config.vocab_size, "the chat model")
    length = min(model.config.context_length - sampling.max_new_tokens, 512)
    if length < 16:
        raise UserError(f"{folder}: a context of {model.config.context_length} tokens is too short for a conversation")
    generate = make_generator(JitRunner(), model, tokenizer, sampling)
    lock = Lock()  # one compiled program on one set of devices

    def reply(prompt: str, turns: Sequence[Turn]) -> str:
        import jax.numpy as jnp
        import numpy as np

        from rlaif_jax.data.prompts import padded

        text = chat_prompt(prompt, turns)
        begin = tokenizer.bos_id is not None
        ids = tokenizer.encode(tokenizer.quote(text), add_bos=begin)
        ids = ids if len(ids) <= length else [*ids[:begin], *ids[begin - length :]]
        tokens, mask = padded([ids], length, tokenizer.pad_id, "left")
        uid = np.array([int(sha256([seed, text])[:8], 16)], np.uint32)
        with lock:
            rollout = generate(
                (params, jax.random.key(seed)), Prompts(jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(uid))
            )
            return answer_texts(rollout, tokenizer)[0].split("\n\nHuman:")[0].strip() or "(no words)"

    return reply
