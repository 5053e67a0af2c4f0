"""The cache of replies: by content, on disk, for several processes."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from rlaif_jax.config import UserError
from rlaif_jax.feedback.api.cache import CachedReply, CallCache

REQUEST = {
    "model": ["m", "r1"],
    "messages": [{"role": "user", "content": "é"}],
    "decoding": {"t": 0.5},
    "order": [0, 1],
}


def test_the_same_request_is_found_and_another_is_not(tmp_path: Path):
    cache = CallCache(tmp_path / "deep" / "calls.sqlite")
    cache.put(REQUEST, CachedReply("{}", 1.5, 0.25))
    cache.put(REQUEST, CachedReply("other", 2.0, 0.5))
    again = CallCache(tmp_path / "deep" / "calls.sqlite")
    assert again.get(dict(reversed(REQUEST.items()))) == CachedReply("{}", 1.5, 0.25) and len(again) == 1
    for change in ({"model": ["m", "r2"]}, {"order": [1, 0]}, {"decoding": {"t": 0.6}}, {"repeat": 1}):
        assert again.get(REQUEST | change) is None


def test_a_reply_that_could_not_be_read_is_replaced(tmp_path: Path):
    cache = CallCache(tmp_path / "calls.sqlite")
    cache.put(REQUEST, CachedReply("{}", 1.5, 0.25))
    cache.put(REQUEST, CachedReply("better", 2.0, 0.5), True)
    assert cache.get(REQUEST) == CachedReply("better", 2.0, 0.5) and len(cache) == 1


def test_capabilities_are_of_what_was_asked():
    cache = CallCache(None)
    asked = {"server": "http://a", "model": "m", "api": "chat"}
    cache.put_capabilities(asked, {"top_logprobs": 5})
    cache.put_capabilities(asked, {"top_logprobs": 20})
    assert cache.capabilities(asked) == {"top_logprobs": 20}
    assert cache.capabilities(asked | {"api": "completion"}) is None and cache.capabilities({}) is None


def test_a_file_that_is_no_cache(tmp_path: Path):
    (tmp_path / "x").write_text("this is no database, however long it may be " * 10)
    with pytest.raises(UserError, match="no cache can be opened"):
        CallCache(tmp_path / "x")
    db = sqlite3.connect(tmp_path / "new")
    db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(UserError, match="a cache of version 9"):
        CallCache(tmp_path / "new")
