"""Answers and conversations as the tokens that a policy reads and writes.

A tokenizer with a chat template has the conversation of a prompt rendered by it; another one reads the text itself. Data is
passed through `quote`: a special token that a text spells is text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlaif_jax.config import UserError, require
from rlaif_jax.data.conversations import Turn, conversation_prompt, prompt_turns, read_turns
from rlaif_jax.data.huggingface_tokenizer import QUOTED, HuggingFaceTokenizer
from rlaif_jax.data.readers import listed, shown
from rlaif_jax.data.tokenizers import Tokenizer

CONVERSATIONS = ("messages", "conversations", "conversation")


def chat_tokenizer(tokenizer: Tokenizer) -> HuggingFaceTokenizer | None:
    """Returns the tokenizer if it has a chat template, else None."""
    has_template = isinstance(tokenizer, HuggingFaceTokenizer) and bool(tokenizer.settings.get("chat_template"))
    return tokenizer if has_template else None  # type: ignore[return-value]


def learned_with_bos(tokenizer: Tokenizer) -> bool:
    """Returns whether texts begin with BOS: not where it also ends them, as with GPT-2 and SmolLM2."""
    if tokenizer.bos_id is None:
        return False
    return not isinstance(tokenizer, HuggingFaceTokenizer) or tokenizer.bos_id not in tokenizer.stop_ids


def reward_text(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[str, str]:
    """Returns the texts (prompt, answer) whose tokens a policy reads and writes.

    With a chat template the prompt is rendered up to where the assistant's message begins; a dialogue in HH's text becomes
    its messages, without the blank that HH puts before an answer. The answer is not rendered as a message: a template may
    trim it or write more behind its end than a policy does, and a reward model scores what a policy has written.

    Args:
        tokenizer: of the policy.
        prompt: the prompt, a text or a dialogue in HH's text.
        answer: the answer.

    Raises:
        UserError: the chat template does not take the conversation.
    """
    chat = chat_tokenizer(tokenizer)
    if chat is None:
        return tokenizer.quote(prompt), tokenizer.quote(answer)
    turns = prompt_turns(prompt)
    messages = [{"role": turn.role, "content": chat.quote(turn.text)} for turn in turns]
    is_dialogue = turns != [Turn("user", prompt)]
    return chat.chat_text(messages), chat.quote(answer.removeprefix(" ") if is_dialogue else answer)


def answer_tokens(tokenizer: Tokenizer, prompt: str, answer: str, *, add_bos: bool = False) -> tuple[list[int], int]:
    """Returns (the tokens of prompt and answer, number of those of the answer with its stop token).

    They are the tokens of a finished rollout of these texts.

    Args:
        tokenizer: of the policy.
        prompt: as `reward_text` takes it.
        answer: the answer.
        add_bos: put BOS before the prompt, as `prompt_batches` does for the policy; a chat template writes it itself.

    Raises:
        UserError: the chat template does not take the conversation.
    """
    before, after = reward_text(tokenizer, prompt, answer)
    add_bos = add_bos and chat_tokenizer(tokenizer) is None
    written = [*tokenizer.encode(after), *_end(tokenizer)]
    return [*tokenizer.encode(before, add_bos=add_bos), *written], len(written)


def _end(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.eos_id is None else [tokenizer.eos_id]


class LearnedTokens(NamedTuple):
    """A text to learn from.

    Attributes:
        ids: its tokens.
        weights: of each token in the loss.
        ends: numbers of tokens at which the text may be cut: after each turn of the assistant.
        number: of the text in its data; the pieces of one have one number.
    """

    ids: list[int]
    weights: list[float]
    ends: list[int]
    number: int = 0

    def cut(self, length: int) -> LearnedTokens | None:
        """Returns the text up to the last turn that ends within `length` tokens; None where no turn does."""
        fitting = [end for end in self.ends if end <= length]
        if not fitting:
            return None
        return self._replace(ids=self.ids[: fitting[-1]], weights=self.weights[: fitting[-1]], ends=fitting)

    def pieces(self, length: int) -> list[LearnedTokens]:
        """Returns the text in pieces of at most `length` >= 2 tokens, in which each token is learned once.

        A later piece begins with the last token of the one before, with weight 0: a first token is learned from nothing.
        """
        starts = range(0, max(len(self.ids) - 1, 1), length - 1)
        parts = [(self.ids[i : i + length], self.weights[i : i + length]) for i in starts]
        return [
            self._replace(ids=ids, weights=weights if place == 0 else [0.0, *weights[1:]], ends=[len(ids)])
            for place, (ids, weights) in enumerate(parts)
        ]


def text_tokens(
    tokenizer: Tokenizer, text: str, *, context: str = "", add_bos: bool = False, quoted: bool = True
) -> LearnedTokens:
    """Returns a text with the stop token, all of which is learned.

    Args:
        tokenizer: encodes the text.
        text: the text.
        context: a text before it, with weight 0.
        add_bos: put BOS first, with weight 0.
        quoted: take special tokens that the texts spell for text.
    """
    quote = tokenizer.quote if quoted else str
    before = tokenizer.encode(quote(context), add_bos=add_bos)
    after = [*tokenizer.encode(quote(text), continues=bool(context)), *_end(tokenizer)]
    ids = [*before, *after]
    return LearnedTokens(ids, [0.0] * len(before) + [1.0] * len(after), [len(ids)])


def conversation_tokens(
    tokenizer: Tokenizer, turns: Sequence[Turn], *, first: int = 0, add_bos: bool = False
) -> LearnedTokens:
    """Returns a conversation of which the assistant's turns are learned, each with its end-of-turn token.

    What follows the last of them is left out. With a chat template a turn is what the template writes from where it asks
    for the turn up to the stop token. A template may write earlier turns in another way once later ones follow (without
    their reasoning): then the later turns alone are learned. Without a template the conversation is in HH's text, which
    ends no turn but the last.

    Args:
        tokenizer: its template renders the conversation.
        turns: the messages.
        first: turns before this one are not learned.
        add_bos: put BOS first where there is no template.

    Raises:
        UserError: no turn is the assistant's, or the template does not take the conversation or ends no turn.
    """
    spoken = [i for i, turn in enumerate(turns) if turn.role == "assistant" and i >= first]
    require(bool(spoken), "no turn of the assistant to learn from")
    chat = chat_tokenizer(tokenizer)
    quoted = [Turn(turn.role, tokenizer.quote(turn.text)) for turn in turns]
    parts: list[tuple[str, bool]] = []
    done = ""
    for i in spoken:
        if chat is None:
            head, turn = conversation_prompt(quoted[:i]), f" {quoted[i].text}"
        else:
            head, turn = _rendered_turn(chat, quoted, i)
        if not head.startswith(done):
            parts, done = [], ""
        parts += [(head[len(done) :], False), (turn, True)]
        done = head + turn
    ids: list[int] = []
    weights: list[float] = []
    ends: list[int] = []
    for text, learned in parts:
        own = tokenizer.encode(text, add_bos=add_bos and chat is None and not ids, continues=bool(ids))
        ids, weights = ids + own, weights + [float(learned)] * len(own)
        if learned:
            ends.append(len(ids))
    if chat is None and turns[-1].role == "assistant":
        ids, weights = ids + _end(tokenizer), weights + [1.0] * len(_end(tokenizer))
        ends[-1] = len(ids)
    return LearnedTokens(ids, weights, ends)


def _rendered_turn(chat: HuggingFaceTokenizer, turns: Sequence[Turn], i: int) -> tuple[str, str]:
    """Returns (the rendered text up to turn i, the turn with its stop token)."""
    messages = [{"role": turn.role, "content": turn.text} for turn in turns[: i + 1]]
    head, whole = chat.chat_text(messages[:-1]), chat.chat_text(messages)
    if not whole.startswith(head):
        raise UserError("the chat template writes a turn of the assistant in another way than it asks for one")
    names = "|".join(re.escape(str(chat.backend.id_to_token(stop))) for stop in chat.stop_ids)
    end = re.search(f"(?<!{QUOTED})(?:{names})", whole[len(head) :]) if names else None
    if end is None:
        raise UserError(
            f"the chat template ends a turn of the assistant by none of the stop tokens ({names or 'there are no such'}): "
            "declare its end of a turn as eos_token"
        )
    return head, whole[len(head) : len(head) + end.end()]


def read_row(row: dict[str, Any], tokenizer: Tokenizer, *, add_bos: bool) -> tuple[LearnedTokens, str]:
    """Returns (the tokens of a row, its name for a split).

    Args:
        row: has `messages` (or `conversations`), `prompt` and `completion`, or `text`.
        tokenizer: encodes the texts.
        add_bos: put BOS before each text.

    Raises:
        UserError: the row is of no such form, its text is blank, or the chat template does not take its conversation.
    """
    name = next((name for name in CONVERSATIONS if name in row), None)
    if name is not None:
        turns = read_turns(row[name], name)
        return conversation_tokens(tokenizer, turns, add_bos=add_bos), first_turn(turns)
    if {"prompt", "completion"} <= row.keys():
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list):
            before, after = read_turns(prompt, "prompt"), read_turns(completion, "completion")
            found = conversation_tokens(tokenizer, [*before, *after], first=len(before), add_bos=add_bos)
            return found, first_turn(before)
        require(
            isinstance(prompt, str) and isinstance(completion, str),
            "prompt and completion must be two texts or two lists of messages",
        )
        return text_tokens(tokenizer, completion, context=prompt, add_bos=add_bos), prompt
    require("text" in row, f"a row has messages, prompt and completion, or text; this one has {listed(row)}")
    require(
        isinstance(row["text"], str) and bool(row["text"].strip()),
        f"text must be a text that is not blank, not {shown(row['text'])}",
    )
    return text_tokens(tokenizer, row["text"], add_bos=add_bos), row["text"]


def is_plain(row: Mapping[str, Any]) -> bool:
    """Returns whether a row that `read_row` takes is a text without a prompt."""
    return not ({*CONVERSATIONS} & row.keys() or {"prompt", "completion"} <= row.keys())


def first_turn(turns: Sequence[Turn]) -> str:
    """Returns the first turn of the user, or the whole text without one."""
    return next((turn.text for turn in turns if turn.role == "user"), "\n\n".join(turn.text for turn in turns))
