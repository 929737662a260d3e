"""Where the Hub does not answer, nothing is retried, and a run says so; where it does, nothing changes."""

import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants
from transformers import AutoConfig

from pmd import hub


@pytest.fixture
def endpoint(monkeypatch):
    """Set the Hub's address."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    hub._answers.cache_clear()
    yield lambda address: monkeypatch.setattr(constants, "ENDPOINT", address)
    hub._answers.cache_clear()


def test_a_hub_that_does_not_answer_is_asked_once(endpoint, caplog):
    endpoint("http://127.0.0.1:9")
    started = time.monotonic()
    for _ in range(3):
        hub.prepare_hub("some/model")
    with pytest.raises(OSError, match="connect"):
        AutoConfig.from_pretrained("some/model")
    assert time.monotonic() - started < 5.0
    assert [record.levelno for record in caplog.records if record.name == "pmd.hub"] == [logging.WARNING]
    assert "only what is in its cache is used" in caplog.text


def test_a_hub_that_answers_is_used(endpoint):
    class NotFound(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), NotFound) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        endpoint(f"http://127.0.0.1:{server.server_port}")
        hub.prepare_hub("some/model")
        server.shutdown()
    assert not constants.is_offline_mode()


def test_a_local_path_asks_nobody(endpoint, tmp_path):
    endpoint("http://127.0.0.1:9")
    hub.prepare_hub(str(tmp_path))
    assert not constants.is_offline_mode()
