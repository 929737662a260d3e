"""Talks to one vLLM server over HTTP, in token ids, with one connection per request.

Everything that depends on vLLM's HTTP interface is here; `vllm_runtime.py` starts the server.
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
from pmd.engines.vllm_runtime import RawCompletion
from pmd.errors import EngineError

BASE_MODEL = "base"  # the name under which a server offers its weights without an adapter
CONTROL_TIMEOUT_S = 60.0  # for requests that do not generate


class ServerUnavailable(Exception):
    """The server did not answer, or failed while answering: the request may be retried."""


class AdapterNotLoaded(Exception):
    """The server does not know the adapter: it was started after the adapter was loaded."""


class ServerClient:
    """Sends requests to one server, and remembers since when it has been down."""

    def __init__(self, url: str, request_timeout_s: float):
        self.url, self.request_timeout_s = url, request_timeout_s
        self.down_since: float | None = None
        self.adapter_lock = threading.Lock()  # one thread loads an adapter, the others wait for it
        self.unloaded: set[str] = set()  # adapters that a thread in recovery must not load again

    def is_healthy(self) -> bool:
        """Ask the server once; mark it as down if it does not answer."""
        try:
            self._ask("GET", "/health", None, min(CONTROL_TIMEOUT_S, self.request_timeout_s))
        except ServerUnavailable:
            self.mark_down()
            return False
        return True

    def mark_down(self) -> None:
        """Mark the server as down from now on, unless it already was; a health check alone does not clear the mark."""
        self.down_since = self.down_since or time.monotonic()

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load an adapter from a folder that the server can read, unless it has it or `unload_adapter` removed it."""
        with self.adapter_lock:
            if name not in self.unloaded and name not in self.models():
                self._ask(
                    "POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, CONTROL_TIMEOUT_S
                )
        self.down_since = None

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter permanently."""
        with self.adapter_lock:
            self.unloaded.add(name)
            self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name}, CONTROL_TIMEOUT_S)

    def models(self) -> list[str]:
        """Return the names of the base model and of the loaded adapters."""
        return [model["id"] for model in self._ask("GET", "/v1/models", None, CONTROL_TIMEOUT_S)["data"]]

    def complete(
        self, position: int, request: Request, sampling: Sampling, stop_ids: Sequence[int], model: str
    ) -> RawCompletion:
        """Generate one completion with the adapter `model`, or with BASE_MODEL.

        Raises:
            ServerUnavailable: no answer, or an empty or unfinished completion.
            AdapterNotLoaded: the server does not know `model`.
            EngineError: the server refuses the request, so a retry is pointless.
        """
        payload = {
            "model": model,
            "prompt": list(request.prompt_ids),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": request.seed % (1 << 63),
            "stop_token_ids": list(stop_ids),
            "ignore_eos": True,  # only stop_ids end a completion, as with every engine
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        answer = self._ask("POST", "/v1/completions", payload, self.request_timeout_s)
        try:
            choice = answer["choices"][0]
            token_ids = tuple(int(token) for token in choice["token_ids"])
            logprobs = tuple(math.nan if p is None else float(p) for p in choice["logprobs"]["token_logprobs"])
            raw = RawCompletion(position, token_ids, logprobs, choice["finish_reason"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ServerUnavailable(f"{self.url} returned no completion: {type(error).__name__} {error}") from None
        if raw.finish_reason not in ("stop", "length") or not token_ids or len(token_ids) != len(logprobs):
            raise ServerUnavailable(
                f"{self.url} returned an unfinished completion: finish reason {raw.finish_reason}, {len(token_ids)} "
                f"tokens, {len(logprobs)} log-probs"
            )
        self.down_since = None
        return raw

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
                raise AdapterNotLoaded(text)
            if status >= 500:
                raise ServerUnavailable(f"{self.url}{path} answered {status}: {text[:200]}")
            if status >= 400:
                raise EngineError(f"{self.url}{path} refused the request ({status}): {text[:300]}")
            return json.loads(text) if text.startswith(("{", "[")) else text
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
            raise ServerUnavailable(f"{self.url}{path}: {type(error).__name__}: {error}") from None
        finally:
            connection.close()
