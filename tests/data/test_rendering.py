"""What a policy reads and writes as tokens: answers for a reward model, conversations to learn from."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.data.conversations import Turn, conversation_prompt
from rlaif_jax.data.prompts import prompt_batches
from rlaif_jax.data.rendering import LearnedTokens, answer_tokens, conversation_tokens, read_row, text_tokens
from rlaif_jax.data.text import held_out_mask
from rlaif_jax.data.tokenizers import HuggingFaceTokenizer, load_tokenizer, word_level_tokenizer
from tests.data.token_folders import byte_tokenizer_folder

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
# SmolLM2's template, to the letter.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
CHAT = [Turn("user", "hi"), Turn("assistant", "hello"), Turn("user", "why?"), Turn("assistant", "so<|im_end|> be it")]


def chat_tokenizer(folder: Path, template: str = CHATML, eos: str = "<|im_end|>") -> HuggingFaceTokenizer:
    settings = {"eos_token": eos, "bos_token": "<|endoftext|>", "chat_template": template}
    return load_tokenizer(byte_tokenizer_folder(folder, *SPECIAL, tokenizer_config=settings))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    return chat_tokenizer(tmp_path_factory.mktemp("chat"))


def shown(tokenizer, tokens: LearnedTokens) -> str:
    """The text of the tokens, those that are learned in brackets."""
    parts = []
    edges = [0, *(np.flatnonzero(np.diff(tokens.weights)) + 1), len(tokens.ids)]
    for start, end in itertools.pairwise(edges):
        text = tokenizer.decode(tokens.ids[start:end], skip_special=False)
        parts.append(f"[{text}]" if tokens.weights[start] else text)
    return "".join(parts)


def test_the_assistants_turns_are_learned_with_their_end_and_nothing_else(chat):
    assert shown(chat, conversation_tokens(chat, CHAT)) == (
        f"{SYSTEM}<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[hello<|im_end|>]\n"
        "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n[so<|im_end|> be it<|im_end|>]"
    )
    ends = conversation_tokens(chat, CHAT).ids.count(chat.eos_id)
    assert ends == 5, "an end of turn that a message spells is text"


def test_smollm2_learns_the_assistants_turns():
    folder = os.environ.get("RLAIF_JAX_CHAT_MODEL")
    if not folder:
        pytest.skip("needs a chat model: set RLAIF_JAX_CHAT_MODEL to the folder of SmolLM2-135M-Instruct")
    tokenizer = load_tokenizer(folder)
    assert shown(tokenizer, conversation_tokens(tokenizer, CHAT)) == (
        f"{SYSTEM}<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[hello<|im_end|>]\n"
        "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n[so<|im_end|> be it<|im_end|>]"
    )


def test_only_later_turns_are_learned_where_the_first_are_a_prompt(chat):
    text = shown(chat, conversation_tokens(chat, CHAT, first=2))
    assert text.count("[") == 1 and text.endswith("[so<|im_end|> be it<|im_end|>]")


def test_what_follows_the_last_answer_is_left_out(chat):
    assert conversation_tokens(chat, [*CHAT, Turn("user", "and?")]) == conversation_tokens(chat, CHAT)


def test_a_template_that_rewrites_earlier_turns_teaches_the_later_ones(tmp_path: Path):
    """As templates of reasoning models, it drops the thoughts of all answers except the last."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
        "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = chat_tokenizer(tmp_path, template)
    turns = [Turn("user", "a"), Turn("assistant", "x</think>b"), Turn("user", "c"), Turn("assistant", "y</think>d")]
    assert shown(tokenizer, conversation_tokens(tokenizer, turns)) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n[y</think>d<|im_end|>]"
    )


def test_without_a_template_a_conversation_is_hhs_text():
    tokenizer = word_level_tokenizer(("Human:", "Assistant:", "hi", "hello", "why", "so"))
    turns = [Turn("user", "hi"), Turn("assistant", "hello"), Turn("user", "why"), Turn("assistant", "so")]
    tokens = conversation_tokens(tokenizer, turns, add_bos=True)
    words = [tokenizer.decode([i], skip_special=False) for i in tokens.ids]
    assert words == ["<bos>", "Human:", "hi", "Assistant:", "hello", "Human:", "why", "Assistant:", "so", "<eos>"]
    assert tokens.weights == [0, 0, 0, 0, 1, 0, 0, 0, 1, 1]
    assert tokens.ends == [5, 10]


def test_a_long_conversation_is_cut_after_a_turn(chat):
    whole = conversation_tokens(chat, CHAT)
    first, last = whole.ends
    assert whole.cut(last) == whole
    cut = whole.cut(last - 1)
    assert cut is not None and cut.ids == whole.ids[:first] and cut.ids[-1] == chat.eos_id
    assert len(cut.weights) == first and whole.cut(first) == cut
    assert whole.cut(first - 1) is None


def test_a_text_is_learned_with_its_end(chat):
    tokens = text_tokens(chat, "ab<|im_end|>", context="c")
    assert tokens.ids == [*chat.encode("cab"), *chat.encode(chat.quote("<|im_end|>")), chat.eos_id]
    assert tokens.weights == [0.0] + [1.0] * (len(tokens.ids) - 1)
    assert text_tokens(chat, "a", add_bos=True).ids == [chat.bos_id, *chat.encode("a"), chat.eos_id]


BAD = {
    "no assistant": (CHATML, "<|im_end|>", [Turn("user", "a")], "no turn of the assistant"),
    "no end": (
        CHATML.replace("<|im_end|>", "###"), "<|endoftext|>", CHAT,
        r"none of the stop tokens \(<.*endoftext.*: declare its end",
    ),
    "another way": (
        CHATML.replace("<|im_start|>assistant\n' }}{% endif %}", "<|im_start|>assistant:' }}{% endif %}"),
        "<|im_end|>", CHAT, "in another way than it asks",
    ),
    "refused": ("{{ raise_exception('roles must alternate') }}", "<|im_end|>", CHAT, "roles must alternate"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_a_conversation_that_cannot_be_learned_is_named(bad, tmp_path):
    template, eos, turns, message = BAD[bad]
    with pytest.raises(UserError, match=message):
        conversation_tokens(chat_tokenizer(tmp_path, template, eos), turns)


# ---- Rows


def test_what_is_learned_of_each_form_of_row():
    tokenizer = word_level_tokenizer(("Human:", "Assistant:", *"abef"))
    user, assistant = {"role": "user", "content": "a b"}, {"role": "assistant", "content": "e f"}
    turn = "Human: a b Assistant:"
    forms = [
        ({"messages": [user, assistant] * 2}, "a b", f"<bos> {turn}[e f]{turn}[e f <eos>]"),
        ({"prompt": "a b", "completion": "e f"}, "a b", "<bos> a b[e f <eos>]"),
        ({"prompt": [user], "completion": [assistant]}, "a b", f"<bos> {turn}[e f <eos>]"),
        ({"text": "a b e f"}, "a b e f", "<bos>[a b e f <eos>]"),
    ]
    for row, name, learned in forms:
        tokens, found = read_row(row, tokenizer, add_bos=True)
        assert (shown(tokenizer, tokens), found) == (learned, name)
    with pytest.raises(UserError, match="text must be a text that is not blank"):
        read_row({"text": " \n"}, tokenizer, add_bos=False)


def test_rows_of_a_chat_model_have_its_template(chat):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "an<|im_end|>swer"}]
    for row in ({"messages": turns}, {"prompt": turns[:1], "completion": turns[1:]}):
        tokens, name = read_row(row, chat, add_bos=True)
        learned = [i for i, weight in zip(tokens.ids, tokens.weights) if weight]
        assert name == "q"
        assert learned == [*chat.encode(chat.quote("an<|im_end|>swer")), chat.eos_id]
        assert learned.count(chat.eos_id) == 1


# ---- Answers for a reward model


def rollout_ids(tokenizer, prompt: str, answer: str, *, add_bos: bool = False) -> list[int]:
    """The tokens of a finished rollout of a policy that has read `prompt` as the loop reads it and written `answer`."""
    batch = next(
        prompt_batches([{"prompt": prompt}], tokenizer, batch_size=1, seed=0, prompt_length=400, add_bos=add_bos)
    )
    return [*batch.tokens[0][batch.mask[0]].tolist(), *tokenizer.encode(answer), tokenizer.stop_ids[0]]


def test_a_chat_answer_has_the_tokens_of_a_rollout(chat):
    ids, written = answer_tokens(chat, "why?", "so be it ", add_bos=True)
    assert chat.bos_id not in ids, "a template writes its BOS itself"
    assert conversation_tokens(chat, CHAT, add_bos=True) == conversation_tokens(chat, CHAT)
    prompt = chat.chat_text([{"role": "user", "content": "why?"}])
    assert ids == rollout_ids(chat, prompt, "so be it ") and written == len("so be it ") + 1
    assert ids[-1] == chat.eos_id and ids[-2] == chat.encode(" ")[0], "no template trims an answer"


def test_a_dialogue_in_hhs_text_becomes_messages(chat):
    prompt = conversation_prompt([Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c<|im_end|>")])
    ids, _ = answer_tokens(chat, prompt, " d")
    messages = [("user", "a"), ("assistant", "b"), ("user", chat.quote("c<|im_end|>"))]
    text = chat.chat_text([{"role": role, "content": content} for role, content in messages])
    assert ids == rollout_ids(chat, text, "d")
    assert ids.count(chat.eos_id) == 5


@pytest.mark.parametrize("add_bos", [True, False])
def test_a_base_models_answer_has_the_tokens_of_a_rollout(add_bos):
    tokenizer = word_level_tokenizer(("a", "b", "c"))
    ids, written = answer_tokens(tokenizer, "a b", "c a", add_bos=add_bos)
    assert ids == rollout_ids(tokenizer, "a b", "c a", add_bos=add_bos)
    assert written == 3 and len(ids) == 5 + add_bos


# ---- Splits


def test_no_name_is_on_both_sides():
    names = [f"p{i % 20}" for i in range(100)]
    mask = held_out_mask(names, 0.25, 3)
    sides = [{name for name, held in zip(names, mask) if held == side} for side in (True, False)]
    assert len(sides[0]) == 5 and not sides[0] & sides[1]
    again = held_out_mask(names[::-1], 0.25, 3)
    np.testing.assert_array_equal(again, mask[::-1])
    assert any((held_out_mask(names, 0.25, seed) != mask).any() for seed in (4, 5))
    assert held_out_mask(["a", "b"], 0.01, 0).sum() == held_out_mask(["a", "b"], 0.99, 0).sum() == 1


@pytest.mark.parametrize(
    "names, share, message",
    [(["a", "b"], 0.0, "between 0 and 1, not 0.0"), (["a", "b"], 1.0, "not 1.0"), (["a", "a"], 0.5, "of 1 prompt")],
)
def test_a_split_that_cannot_be_is_refused(names, share, message):
    with pytest.raises(UserError, match=message):
        held_out_mask(names, share, 0)
