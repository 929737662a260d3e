"""A server that speaks vLLM's HTTP interface without a model: answers are made up, failures come as a script says."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NUM_TOKENS = 6
#: What a script may answer: a complete completion, or one of the ways in which a server fails.
FAILURES = ("empty", "half the log-probs", "no completion", "aborted", "cut off", "500", "reset")


def made_up(prompt: list[int], seed: int, stop_id: int, vocabulary: int) -> tuple[list[int], list[float]]:
    """A completion that depends on prompt and seed alone."""
    digest = hashlib.sha256(repr((prompt, seed)).encode()).digest()
    ids = [byte % vocabulary for byte in digest[: NUM_TOKENS - 1]]
    ids = [token if token != stop_id else (token + 1) % vocabulary for token in ids]
    return [*ids, stop_id], [-1.0 - byte / 256 for byte in digest[:NUM_TOKENS]]


class ScriptedServer(ThreadingHTTPServer):
    """Counts what it was asked; `script(n)` says how the n-th completion is answered, None in full."""

    daemon_threads = True
    request_queue_size = 256  # or connections made at once are reset

    def __init__(self, script: Callable[[int], str | None], vocabulary: int = 100):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.vocabulary = script, vocabulary
        self.adapters: set[str] = set()
        self.takes_adapters, self.asked, self.count = True, Counter[int](), 0
        self.lock, self.released = threading.Lock(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: ScriptedServer

    def do_GET(self) -> None:
        names = ["base", *sorted(self.server.adapters)]
        self._answer(200, {"data": [{"id": name} for name in names]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/completions":
            self._complete(body)
        elif self.path == "/v1/load_lora_adapter":
            if self.server.takes_adapters:
                self.server.adapters.add(body["lora_name"])
            self._answer(200 if self.server.takes_adapters else 400, {})
        else:
            self.server.adapters.discard(body["lora_name"])
            self._answer(200, {})

    def _complete(self, body: dict) -> None:
        server = self.server
        with server.lock:
            number, server.count = server.count, server.count + 1
            server.asked[body["seed"]] += 1
        failure = server.script(number)
        if body["model"] not in {"base", *server.adapters}:
            return self._answer(404, {})
        ids, logprobs = made_up(body["prompt"], body["seed"], body["stop_token_ids"][0], server.vocabulary)
        choice = {"token_ids": ids, "logprobs": {"token_logprobs": logprobs}, "finish_reason": "stop"}
        match failure:
            case "empty":
                choice |= {"token_ids": [], "logprobs": {"token_logprobs": []}}
            case "half the log-probs":
                choice["logprobs"] = {"token_logprobs": logprobs[:3]}
            case "aborted":
                choice |= {"token_ids": ids[:2], "logprobs": {"token_logprobs": logprobs[:2]}, "finish_reason": "abort"}
            case "hang":
                server.released.wait(60)
            case "reset":
                return self.connection.close()
            case "500":
                return self._answer(500, {})
        self._answer(200, {} if failure == "no completion" else {"choices": [choice]}, cut=failure == "cut off")

    def _answer(self, status: int, content: dict, *, cut: bool = False) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        with suppress(BrokenPipeError):  # a client that was kept waiting has gone
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else data)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@contextmanager
def serving(script: Callable[[int], str | None], vocabulary: int = 100):
    server = ScriptedServer(script, vocabulary)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
