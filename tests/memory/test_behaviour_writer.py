"""Behaviours from an OpenAI-compatible endpoint: asked over real HTTP, and whatever it does, the run goes on."""

import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pmd.config.schema import BehaviourWriterConfig, ReflectionConfig
from pmd.memory import behaviour_writer
from pmd.memory.behaviour_writer import BehaviourWriter
from pmd.tasks.prompts.base import PromptFormat
from pmd.tasks.prompts.parsing import parse_line

KEY = "sk-very-secret-0123456789"
GOOD = '```json\n{"title": "Units", "content": "Check them."}\n```'
CLUSTERS = [["one", "two"], ["three"], ["four"], ["five"], ["six"]]


class Plain(PromptFormat):
    """The insights, one to a line; a cluster of `none` asks nothing."""

    def abstraction_text(self, insights):
        return "" if insights == ["none"] else "\n".join(insights)

    def parse_abstraction(self, text):
        return parse_line(text)


def chat(text: str, **more) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}], **more}).encode()


class Endpoint(ThreadingHTTPServer):
    """Answers the n-th request as `respond(n, payload)` says: a status and a body, or a callable that writes."""

    daemon_threads = True

    def __init__(self, respond: Callable):
        super().__init__(("127.0.0.1", 0), Handler)
        self.respond, self.asked = respond, []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, dict(self.headers), payload, self.client_address))
        found = self.server.respond(len(self.server.asked), payload)
        if callable(found):
            found(self.wfile)
            self.close_connection = True
            return
        status, body = found
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_): ...


@pytest.fixture
def serve(monkeypatch):
    """Start an endpoint; returns it and a writer that asks it."""
    monkeypatch.setenv("WRITER_KEY", KEY)
    monkeypatch.setattr(behaviour_writer, "PAUSE_S", 0.01)
    started = []

    def start(respond, *, url=None, max_prompt_tokens=1000, **settings):
        server = Endpoint(respond)
        endpoint = BehaviourWriterConfig(
            url or server.url, "large", "WRITER_KEY", **{"max_calls_per_step": 9} | settings
        )
        config = ReflectionConfig(
            max_new_tokens=77, max_prompt_tokens=max_prompt_tokens, behaviour_writer=endpoint, temperature=0.25
        )
        writer = BehaviourWriter(config, Plain())
        started.append((server, writer))
        return server, writer

    yield start
    for server, writer in started:
        writer.close()
        server.shutdown()
        server.server_close()


def test_one_call_per_cluster_over_one_connection(serve):
    server, writer = serve(lambda n, payload: (200, chat(GOOD.replace("Units", payload["messages"][0]["content"][:3]))))
    written = writer.write([["one", "two"], ["none"], ["three"]], 1)
    assert written.texts == ["one: Check them.", None, "thr: Check them."]
    assert (written.num_calls, written.num_failed, written.num_deferred, written.describe_problem()) == (2, 0, 0, "")
    (path, headers, payload, client), (*_, other) = server.asked
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert payload == {
        "model": "large", "messages": [{"role": "user", "content": "one\ntwo"}], "max_tokens": 77, "temperature": 0.25,
    }  # fmt: skip
    assert client == other


@pytest.mark.parametrize(
    ("more", "num_tokens"),
    [
        ({"usage": {"completion_tokens": 9}}, 18),
        ({"usage": {"completion_tokens": "9"}}, 0),
        ({"usage": [9]}, 0),
        ({}, 0),
    ],
)
def test_tokens_are_those_that_the_endpoint_reports(serve, more, num_tokens):
    _, writer = serve(lambda n, payload: (200, chat(GOOD, **more)))
    assert writer.write(CLUSTERS[:2], 1).num_tokens == num_tokens


def test_calls_are_limited_by_the_steps_since_the_last_update(serve):
    server, writer = serve(lambda n, payload: (200, chat(GOOD)), max_calls_per_step=2)
    written = writer.write(CLUSTERS, 2)
    assert [text is not None for text in written.texts] == [True] * 4 + [False]
    assert (len(server.asked), written.num_deferred) == (4, 1)


def test_a_busy_endpoint_is_asked_again(serve):
    server, writer = serve(lambda n, payload: (200, chat(GOOD)) if n == 3 else (503, b"busy"))
    written = writer.write(CLUSTERS[:1], 1)
    assert written.texts == ["Units: Check them."]
    assert (len(server.asked), written.num_calls, written.num_failed) == (3, 1, 0)


def never_ending(out):
    out.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    try:
        for _ in range(10_000):
            out.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
    except OSError:
        pass


def dripping(out):
    out.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    try:
        for _ in range(60):
            out.write(b"x")
            time.sleep(0.05)
    except OSError:
        pass


@pytest.mark.parametrize(
    ("respond", "told", "num_requests"),
    [
        (lambda n, payload: (500, b"internal"), "status 500: 'internal'", 3 * 3),
        (lambda n, payload: (404, f"no model; {KEY}".encode()), "status 404: 'no model; [the key]'", 3),
        (lambda n, payload: (401, f"wrong key {KEY}".encode()), "status 401: the key is missing or refused", 1),
        (lambda n, payload: (307, b""), "status 307", 3),
        (lambda n, payload: (200, b"<html>\x1b[2J"), "no chat completion: '<html> [2J'", 3),
        (lambda n, payload: (200, b'{"choices": []}'), "no chat completion", 3),
        (lambda n, payload: (200, b'{"choices": [{"message": {"content": null}}]}'), "no chat completion", 3),
        (lambda n, payload: (200, b"[" * 100_000), "no chat completion", 3),
        (lambda n, payload: lambda out: out.write(b"nonsense\r\n\r\n"), "RemoteProtocolError", 3 * 3),
        (lambda n, payload: lambda out: None, "RemoteProtocolError", 3 * 3),
        (lambda n, payload: lambda out: time.sleep(1), "no answer within timeout_s=0.2", 3),
        (lambda n, payload: dripping, "no answer within timeout_s=0.2", 3),
        (lambda n, payload: never_ending, "is longer than 1048576 bytes", 3),
    ],
)  # fmt: skip
def test_whatever_the_endpoint_does_is_counted_and_the_rest_put_off(serve, respond, told, num_requests):
    server, writer = serve(respond, timeout_s=0.2)
    written = writer.write(CLUSTERS, 1)
    assert written.texts == [None] * 5
    failed = 1 if num_requests == 1 else 3  # no use in asking again with a wrong key
    assert (written.num_calls, written.num_failed, written.num_deferred) == (failed, failed, 5 - failed)
    assert len(server.asked) == num_requests
    assert told in written.describe_problem()
    assert KEY not in written.describe_problem()
    assert written.describe_problem().isprintable()


def test_nobody_listens(serve):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
        _, writer = serve(None, url=url)
        written = writer.write(CLUSTERS, 1)
    assert written.num_failed == 3
    assert "ConnectError" in written.describe_problem()


def test_a_malformed_answer_costs_its_cluster_alone(serve):
    _, writer = serve(lambda n, payload: (200, chat("I think so." if n == 1 else GOOD)))
    written = writer.write(CLUSTERS[:3], 1)
    assert written.texts == [None, "Units: Check them.", "Units: Check them."]
    assert (written.num_malformed, written.num_failed) == (1, 0)
    assert "e.g. it wrote 'I think so.'" in written.describe_problem()


def test_a_reasoning_model_is_asked_as_it_wants_to_be(serve):
    def respond(n, payload):
        refused = "max_tokens" in payload
        return (
            (400, b"Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'.")
            if refused
            else (200, chat(GOOD))
        )

    server, writer = serve(respond)
    assert writer.write(CLUSTERS[:2], 1).num_failed == 0
    assert [set(payload) - {"model", "messages"} for _, _, payload, _ in server.asked] == [
        {"max_tokens", "temperature"}, {"max_completion_tokens"}, {"max_completion_tokens"},
    ]  # fmt: skip


def test_a_cluster_too_large_is_asked_about_by_its_best_supported_insights(serve):
    server, writer = serve(lambda n, payload: (200, chat(GOOD)), max_prompt_tokens=10)
    writer.write([[f"insight {n}" for n in range(16)], ["x" * 1000 + "\ud800"]], 1)
    asked = [payload["messages"][0]["content"] for _, _, payload, _ in server.asked]
    assert asked == ["\n".join(f"insight {n}" for n in range(4)), "x" * 40]


def test_no_key_no_header(serve, monkeypatch):
    monkeypatch.delenv("WRITER_KEY")
    server, writer = serve(lambda n, payload: (200, chat(GOOD)))
    writer.write(CLUSTERS[:1], 1)
    assert "Authorization" not in server.asked[0][1]
