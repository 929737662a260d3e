"""One `vllm serve` process, spoken to over HTTP. Token ids in and out; one connection per request.

What vLLM's version decides about its HTTP interface stands here; how the server is started stands in
`vllm_adapter.py`.
"""

import http.client
import json
import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pmd.engines.base import Request, Sampling
from pmd.engines.vllm_runtime import Generation
from pmd.errors import EngineError

BASE_MODEL = "base"  # the name under which a server offers its weights without any adapter
SHORT_TIMEOUT_S = 60.0


class ServerGone(Exception):
    """The server did not answer, or answered with an error of its own: the request may be sent again."""


class AdapterMissing(Exception):
    """The server does not know the adapter: it was started after the adapter was pushed."""


class ServerClient:
    """Requests to one server, and since when it has not answered."""

    def __init__(self, url: str, request_timeout_s: float):
        self.url, self.request_timeout_s = url, request_timeout_s
        self.down_since: float | None = None
        self.pushing = threading.Lock()  # one thread loads an adapter, the others wait for it
        self.unloaded: set[str] = set()  # adapters that a thread which still recovers must not load again

    def healthy(self) -> bool:
        """Ask once; remember since when the server has been down."""
        try:
            self._ask("GET", "/health", None, min(SHORT_TIMEOUT_S, self.request_timeout_s))
        except ServerGone:
            self.note_down()
            return False
        return True

    def note_down(self) -> None:
        """Remember since when the server has not done what it is for; being healthy alone does not end that."""
        self.down_since = self.down_since or time.monotonic()

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load an adapter from a folder that the server can read; nothing happens if it has it or had to forget it."""
        with self.pushing:
            if name not in self.unloaded and name not in self.models():
                self._ask(
                    "POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, SHORT_TIMEOUT_S
                )
        self.down_since = None

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter for good."""
        with self.pushing:
            self.unloaded.add(name)
            self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name}, SHORT_TIMEOUT_S)

    def models(self) -> list[str]:
        """Return the names of the base and of the loaded adapters."""
        return [model["id"] for model in self._ask("GET", "/v1/models", None, SHORT_TIMEOUT_S)["data"]]

    def complete(
        self, key: int, request: Request, sampling: Sampling, stop_ids: Sequence[int], model: str
    ) -> Generation:
        """Generate one completion with the adapter `model`, or with BASE_MODEL.

        Raises:
            ServerGone, AdapterMissing: see there. An empty or unfinished completion counts as the former.
            EngineError: the server refuses the request, which would not change if it were sent again.
        """
        payload = {
            "model": model,
            "prompt": list(request.prompt_ids),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": request.seed % (1 << 63),
            "stop_token_ids": list(stop_ids),
            "ignore_eos": True,  # stop_ids alone decide, as they do for every engine
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        answer = self._ask("POST", "/v1/completions", payload, self.request_timeout_s)
        try:
            choice = answer["choices"][0]
            token_ids = tuple(int(token) for token in choice["token_ids"])
            logprobs = tuple(math.nan if p is None else float(p) for p in choice["logprobs"]["token_logprobs"])
            generation = Generation(key, token_ids, logprobs, choice["finish_reason"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ServerGone(f"{self.url} answered no completion: {type(error).__name__} {error}") from None
        if generation.finish_reason not in ("stop", "length") or not token_ids or len(token_ids) != len(logprobs):
            raise ServerGone(
                f"{self.url} gave up on the request: finish reason {generation.finish_reason}, {len(token_ids)} "
                f"tokens, {len(logprobs)} log-probs"
            )
        self.down_since = None
        return generation

    def _ask(self, method: str, path: str, payload: Any, timeout_s: float) -> Any:
        address = urlsplit(self.url)
        secure = address.scheme == "https"
        connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = connect(address.hostname or "", address.port, timeout=timeout_s)
        try:
            body = None if payload is None else json.dumps(payload)
            connection.request(method, address.path.rstrip("/") + path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            status, text = response.status, response.read().decode("utf-8", "replace")
            if status == 404 and path == "/v1/completions":
                raise AdapterMissing(text)
            if status >= 500:
                raise ServerGone(f"{self.url}{path} answered {status}: {text[:200]}")
            if status >= 400:
                raise EngineError(f"{self.url}{path} refused the request ({status}): {text[:300]}")
            return json.loads(text) if text.startswith(("{", "[")) else text
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
            raise ServerGone(f"{self.url}{path}: {type(error).__name__}: {error}") from None
        finally:
            connection.close()
