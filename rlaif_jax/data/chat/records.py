"""Prompts for chat models: records with questions or messages, and the text that the model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlaif_jax.config import UserError, require
from rlaif_jax.data.conversations import ANSWERED, Turn, prompt_text, prompt_turns, read_turns
from rlaif_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from rlaif_jax.data.prompts import CONVERSATIONAL, Records, place
from rlaif_jax.data.readers import FileRecords, listed, plain
from rlaif_jax.data.tokenizers import Tokenizer


def chat_records(records: Records, tokenizer: Tokenizer, *, system: str = "", template: bool) -> FileRecords:
    """Returns records whose conversations are prompts, for `prompt_batches`.

    A record has a `prompt`, a text or a list of messages (`{"role", "content"}`), or else a list `messages`; a text that
    is a dialogue as HH writes them (`conversations.prompt_turns`) is that dialogue. A field `system` or `system_prompt`,
    or else the argument, becomes a system message of a conversation that has none. The new records have, with all other
    fields as they were:

    - `messages`: the conversation;
    - `conversational`: whether it came as messages, so that TRL's reward functions expect messages;
    - `prompt`: the conversation as plain text, which judges, people and pages read (`conversations.prompt_text`): a single
      question is that question;
    - `model_text`, with `template`: what the policy reads, by its chat template, up to where its answer begins. A special
      token that a message spells is text there.

    Args:
        records: the source.
        tokenizer: the policy's.
        system: the system message of conversations without one; "" = no message.
        template: whether the policy is a chat model. Without, it reads `prompt` itself.

    Raises:
        UserError: a record asks nothing, has a malformed or unsupported message, or ends with a message of the assistant;
            the tokenizer has no chat template, or the template does not take a conversation. Messages name the record.
    """
    require(
        not template or isinstance(tokenizer, HuggingFaceTokenizer),
        "this tokenizer has no chat template: chat models are read with a tokenizer.json; give the folder that has one, or "
        "set template=False for a base model",
    )
    made, places = [], []
    for index in range(len(records)):
        record = plain(records[index])
        where = place(records, index)
        try:
            turns = read_conversation(record, system)
            new = {
                **record,
                "messages": [{"role": turn.role, "content": turn.text} for turn in turns],
                CONVERSATIONAL: not isinstance(record.get("prompt"), str) or _own_messages(record) is not None,
                "prompt": prompt_text(turns),
            }
            if template and isinstance(tokenizer, HuggingFaceTokenizer):
                quoted = [{"role": turn.role, "content": tokenizer.quote(turn.text)} for turn in turns]
                new["model_text"] = tokenizer.chat_text(quoted)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        made.append(new)
        places.append(where)
    return FileRecords(tuple(made), tuple(places))


def read_conversation(record: Mapping[str, Any], system: str = "") -> list[Turn]:
    """Returns the conversation of a record, which a model is to continue.

    Args:
        record: see `chat_records`.
        system: the system message of a record without one; "" = no message.

    Raises:
        UserError: as `chat_records`, about the record.
    """
    turns = _asked(record)
    own = [record[name] for name in ("system", "system_prompt") if record.get(name) is not None]
    require(all(isinstance(text, str) for text in own), f"system must be text, not {str(own[0])[:40]!r}" if own else "")
    first = next((text for text in [*own, system] if text.strip()), "")
    if first and not any(turn.role == "system" for turn in turns):
        turns = [Turn("system", first), *turns]
    require(
        any(turn.role == "user" and turn.text.strip() for turn in turns),
        "the conversation has no words of the user: there is nothing to answer",
    )
    require(
        turns[-1].role != "assistant",
        f"the last message is by the assistant: {ANSWERED}",
    )
    return turns


def _asked(record: Mapping[str, Any]) -> list[Turn]:
    """Returns the turns of a record's `prompt`, or of its `messages` if they are the prompt or alone."""
    prompt, messages = record.get("prompt"), _in_rows(record.get("messages"))
    if prompt is None:
        require(messages is not None, f'no field "prompt" or "messages"; the record has {listed(record)}')
        return read_turns(messages, "messages")
    if not isinstance(prompt, str):
        return read_turns(_in_rows(prompt), "prompt")
    require(bool(prompt.strip()), 'field "prompt" is empty: there is nothing to answer')
    # A message may spell the marks of a dialogue, so the messages say more than their text.
    return _own_messages(record) or prompt_turns(prompt)


def _own_messages(record: Mapping[str, Any]) -> list[Turn] | None:
    """Returns the turns of a record's `messages` where its `prompt` is their text."""
    messages = _in_rows(record.get("messages"))
    if not isinstance(messages, list):
        return None
    try:
        turns = read_turns(messages, "messages")
    except UserError:  # the prompt itself is whole; the messages are of something else
        return None
    return turns if turns and prompt_text(turns) == record.get("prompt") else None


def _in_rows(value: Any) -> Any:
    """Returns messages as a list; TFDS gives them in columns, `{"role": [...], "content": [...]}`."""
    if isinstance(value, Mapping) and all(isinstance(value.get(name), list) for name in ("role", "content")):
        columns: list[Sequence[Any]] = [value["role"], value["content"]]
        return [{"role": role, "content": content} for role, content in zip(*columns, strict=True)]
    return value
