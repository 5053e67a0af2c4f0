"""The simulated annotators' client and the start of the page."""

import socket
import subprocess
import sys
import threading
import time

import pytest

from rlaif_jax.config import UserError
from rlaif_jax.recipes.world.crowd import PageClient, _printed_urls


@pytest.mark.parametrize("status", ["200 OK", "400 Bad Request"])
def test_an_answer_that_breaks_off_is_asked_for_again(status):
    body = b'{"task": null}'
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            for sent in (body[:5], body):
                with listening.accept()[0] as connection:
                    connection.recv(65_536)
                    connection.sendall(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + sent)

        threading.Thread(target=serve, daemon=True).start()
        client = PageClient(f"http://127.0.0.1:{listening.getsockname()[1]}/?token=x")
        if status.startswith("200"):
            assert client.call("/api/me") == {"task": None}
        else:
            with pytest.raises(UserError, match=r'/api/me: 400 \{"task": null\}'):
                client.call("/api/me")


def test_a_page_that_says_nothing_is_not_waited_for():
    started = time.monotonic()
    command = [sys.executable, "-c", "import time; time.sleep(20)"]
    words = pytest.raises(UserError, match=r"did not start within 0\.2 s")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as silent, words:
        _printed_urls(silent, ("anna",), 0.2)
    assert time.monotonic() - started < 15
