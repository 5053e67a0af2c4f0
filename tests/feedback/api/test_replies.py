"""Responses of a server as replies, in both shapes of log-probabilities."""

from __future__ import annotations

import pytest

from rlaif_jax.feedback.api.replies import BadReply, Token, read_reply


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
    assert read_reply(older).prompt_tokens is None


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
