"""The models that a rater talks to."""

import sys
import threading
from http.server import ThreadingHTTPServer

import pytest

from rlaif_jax.config import UserError
from rlaif_jax.feedback.people.chats import Turn
from rlaif_jax.models.sampling import SamplingConfig
from rlaif_jax.ui.chat import local_model, open_chat_model
from tests.ui.page_browser import Model


@pytest.mark.slow
def test_a_local_model_replies_and_says_the_same_again(shared_data):
    reply = local_model(
        shared_data("lm_stories260k_hf"), shared_data("lm_stories260k/tok512.bin"), SamplingConfig(8, 0.8)
    )
    turns = [Turn("Once upon a time there was a mill.", None)]
    first = reply("", turns)
    assert first and first == reply("", turns)
    long = [Turn("word " * 100, "reply " * 100) for _ in range(5)] + turns
    assert reply("a topic", long)  # more than its context holds: the end is what it sees


def test_a_server_that_does_not_answer_is_a_message():
    pytest.importorskip("openai", reason="served models are reached with the package openai")
    with pytest.raises(UserError, match="your message is kept"):
        open_chat_model("http://127.0.0.1:9/v1")("", [Turn("hello", None)])


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r":9/v1 needs the package openai: pip install -e '\.\[api\]'"):
        open_chat_model("http://127.0.0.1:9/v1", "m")


def test_a_key_goes_only_where_it_is_named_for(monkeypatch):
    pytest.importorskip("openai", reason="served models are reached with the package openai")
    seen = []

    class Keys(Model):
        def do_POST(self):
            seen.append(self.headers["Authorization"])
            super().do_POST()

    monkeypatch.setenv("OPENAI_API_KEY", "of-another-server")
    monkeypatch.setenv("MY_KEY", "secret")
    with ThreadingHTTPServer(("127.0.0.1", 0), Keys) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        for key_env in ("", "MY_KEY"):
            open_chat_model(url, key_env=key_env)("", [Turn("hello", None)])
        server.shutdown()
    assert seen == ["Bearer none", "Bearer secret"]
    with pytest.raises(UserError, match="model_key_env: the environment variable NO_KEY is not set"):
        open_chat_model(url, key_env="NO_KEY")


@pytest.mark.parametrize("body", ['{"choices": []}', '{"choices": null}', '{"choices": [{"message": null}]}', "{}"])
def test_a_response_without_a_reply_is_a_message(body):
    """As proxies send them with status 200 when the server behind them has failed."""
    pytest.importorskip("openai", reason="served models are reached with the package openai")

    class Empty(Model):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

    with ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        reply = open_chat_model(f"http://127.0.0.1:{server.server_port}/v1")
        with pytest.raises(UserError, match="sent no reply; your message is kept"):
            reply("", [Turn("hello", None)])
        server.shutdown()


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        open_chat_model(str(tmp_path))
