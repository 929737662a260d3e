"""A server with vLLM's HTTP interface and no model: answers are made up, failures follow a script."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NUM_TOKENS = 6
#: The ways in which a script can make a completion fail, besides "hang".
FAILURES = ("empty", "half the log-probs", "no completion", "aborted", "cut off", "500", "reset")


def made_up(prompt: list[int], seed: int, stop_id: int, vocabulary: int) -> tuple[list[int], list[float]]:
    """Return a completion that depends only on prompt and seed."""
    digest = hashlib.sha256(repr((prompt, seed)).encode()).digest()
    ids = [byte % vocabulary for byte in digest[: NUM_TOKENS - 1]]
    ids = [token if token != stop_id else (token + 1) % vocabulary for token in ids]
    return [*ids, stop_id], [-1.0 - byte / 256 for byte in digest[:NUM_TOKENS]]


class ScriptedServer(ThreadingHTTPServer):
    """Counts requests by seed; `script(n)` names the failure of the n-th completion, or None."""

    daemon_threads = True
    request_queue_size = 256  # with fewer, simultaneous connections are reset

    def __init__(self, script: Callable[[int], str | None], vocabulary: int = 100):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.vocabulary = script, vocabulary
        self.adapters: set[str] = set()
        self.num_loads = Counter[str]()  # by adapter
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
                self.server.num_loads[body["lora_name"]] += 1
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
        with suppress(BrokenPipeError):  # a client that had to wait has gone
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
