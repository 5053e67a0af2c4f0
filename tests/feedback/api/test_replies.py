"""Responses of a server as replies, in both shapes of log-probabilities."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif_jax.feedback.api.replies import BadReply, Reply, Token, Usage, read_reply, read_usage, split_thoughts


def test_both_shapes_of_log_probabilities():
    chat = {
        "choices": [
            {
                "message": {"content": "A"},
                "logprobs": {
                    "content": [
                        {"token": "A", "top_logprobs": [{"token": "\u0120A", "bytes": [32, 65], "logprob": -0.1}]},
                    ]
                },
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1},
    }
    assert read_reply(chat).tokens == (Token("A", ((" A", -0.1),)),)
    older = {"choices": [{"text": "A", "logprobs": {"tokens": ["A"], "top_logprobs": [{"A": -0.1, "B": -3}]}}]}
    assert read_reply(older).tokens == (Token("A", (("A", -0.1), ("B", -3.0))),)
    assert read_reply(older).usage is None


@pytest.mark.parametrize(
    "body",
    [None, [], "text", {}, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": None}]},
     {"choices": [{"message": {"content": 3}}]}, {"choices": [{"message": {"content": None}}]},
     {"choices": [{"message": {"content": "A"}, "logprobs": {"content": [{"token": "A", "top_logprobs": [{}]}]}}]},
     {"choices": [{"message": {"content": "A"}}], "usage": "none"}],
)  # fmt: skip
def test_what_is_no_completion(body):
    with pytest.raises(BadReply):
        read_reply(body)


@pytest.mark.parametrize("impossible", [None, -9999.0, float("-inf"), "-inf"])
def test_tokens_that_cannot_come_are_left_out(impossible):
    tops = [{"token": "A", "logprob": -0.1}, {"token": "B", "logprob": impossible}]
    chat = {"choices": [{"message": {"content": "A"}, "logprobs": {"content": [{"token": "A", "top_logprobs": tops}]}}]}
    older = {"choices": [{"text": "A", "logprobs": {"tokens": ["A"], "top_logprobs": [{"A": -0.1, "B": impossible}]}}]}
    for body in (chat, older):
        assert read_reply(body).tokens == (Token("A", (("A", -0.1),)),)


@pytest.mark.parametrize("logprobs", [None, {}, {"content": None}, {"content": []}, {"tokens": ["A"]},
                                      {"content": [{"token": "A", "top_logprobs": None}]}])  # fmt: skip
def test_missing_log_probabilities(logprobs):
    reply = read_reply({"choices": [{"message": {"content": "A"}, "logprobs": logprobs}]})
    assert reply.text == "A" and not any(token.top for token in reply.tokens)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>a</think>b", "b"),
        ("\n<thinking>a</thinking>\nb", "\nb"),
        ("a</think>b", "b"),  # the chat template opened the tag
        ("<think>a", ""),
        ("[THINK]a[/THINK]b", "b"),
        ("<think>a</think><think>c</think>b", "b"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b", "b"),
        ("\u25c1think\u25b7a\u25c1/think\u25b7b", "b"),
        ("<seed:think>a</seed:think>b", "b"),
        ("b <think> c", "b <think> c"),
        ("b", "b"),
        ("", ""),
    ],
)
def test_thoughts_are_no_part_of_the_answer(text: str, answer: str):
    assert split_thoughts(text) == (answer, text[: len(text) - len(answer)])
    reply = read_reply({"choices": [{"message": {"content": text}}]})
    assert reply.text == answer and reply.thinks == (answer != text)


@given(st.text("<think>/ab \n"))
def test_splitting_loses_nothing(text: str):
    answer, thoughts = split_thoughts(text)
    assert thoughts + answer == text


def test_thoughts_in_fields_and_parts():
    of = lambda **message: read_reply({"choices": [{"message": message}]})
    for field in ("reasoning_content", "reasoning"):
        assert of(content="b", **{field: "a"}) == Reply("b", thoughts="a")
        assert of(content=None, **{field: "a"}) == Reply("", thoughts="a")
        assert not of(content="b", **{field: None}).thinks
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "a"}]}, {"type": "text", "text": "b"}]
    assert of(content=parts) == Reply("b", thoughts="a")


def test_usage():
    of = lambda **usage: read_usage({"usage": usage})
    assert of(prompt_tokens=3, completion_tokens=2, total_tokens=5) == Usage(3, 2)
    assert of(prompt_tokens=3, total_tokens=5) == Usage(3, 2) == of(completion_tokens=2, total_tokens=5)
    details = {"reasoning_tokens": 7}
    assert of(prompt_tokens=3, completion_tokens=9, completion_tokens_details=details) == Usage(3, 9, 7)
    assert of(prompt_tokens=3) is None and of() is None and of(prompt_tokens="3", completion_tokens=-1) is None
    assert read_usage({"usage": None}) is None and read_usage([]) is None
