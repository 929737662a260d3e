"""Generates completions with vLLM servers, on other GPUs or machines.

At every sync the adapter is written to a folder that the servers can read, and loaded under a new name. A server that
does not know a name (because it was restarted) returns an error, never a completion from older weights. Cached
prefixes are tied to a name, so they cannot be stale either.

Each request is handled by one thread at a time. If its server fails, the request goes back to the queue, where any
server can pick it up.
"""

import queue
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from uuid import uuid4

from transformers import PreTrainedTokenizerBase

from pmd.config.schema import ServerConfig
from pmd.engines.base import Request, Sampling
from pmd.engines.hf import TextDecoder
from pmd.engines.server_client import BASE_MODEL, AdapterNotLoaded, ServerClient, ServerUnavailable
from pmd.engines.vllm import save_adapter, to_completion
from pmd.engines.vllm_runtime import RawCompletion
from pmd.errors import EngineError
from pmd.policy import AdapterPolicy
from pmd.pretrained import stop_ids
from pmd.types import Completion, Role

MAX_BACKOFF_S = 30.0


@dataclass(eq=False, slots=True)
class GenerateCall:
    """The state of one call of `generate`, shared by its worker threads. Requests are identified by position."""

    requests: Sequence[Request]
    sampling: Sampling
    model: str  # the name under which the servers know the weights
    waiting: queue.Queue[int] = field(default_factory=queue.Queue)
    in_flight: dict[int, tuple[str, float]] = field(default_factory=dict)  # position -> (server, sent at)
    results: queue.Queue[RawCompletion | EngineError] = field(default_factory=queue.Queue)
    num_failures: Counter[int] = field(default_factory=Counter)  # by position
    failed_at: dict[int, ServerClient] = field(default_factory=dict)  # position -> where it failed last
    ended: threading.Event = field(default_factory=threading.Event)

    def oldest_pending(self) -> int:
        """Return the request that has been in flight longest, or the first that waits."""
        in_flight = dict(self.in_flight)
        if in_flight:
            return min(in_flight, key=lambda position: in_flight[position][1])
        return min(list(self.waiting.queue), default=0)


class VLLMServerEngine:
    """Spreads requests over servers; tolerates the loss of all of them for up to `config.recovery_s`."""

    def __init__(self, policy: AdapterPolicy, tokenizer: PreTrainedTokenizerBase, config: ServerConfig, adapters: Path):
        self.policy, self.tokenizer, self.config = policy, tokenizer, config
        self.policy_version = 0
        with policy.weights("student") as model:
            self.stop_ids = tuple(stop_ids(model, tokenizer))
        self.decode = TextDecoder(tokenizer, self.stop_ids)
        self.servers = [ServerClient(url, config.request_timeout_s) for url in config.urls]
        self.adapters = adapters
        self._names: dict[Role, str] = {}  # of the adapters that are loaded
        self._lock = threading.RLock()
        self._call: GenerateCall | None = None  # the latest
        self._closed = False

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, role: Role = "student"
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (position, completion) as completions finish."""
        with self._lock:
            if self._closed:  # a prefetching thread may call after the run has ended
                raise EngineError("the engine was closed before it generated.")
            call = self._call = GenerateCall(requests, sampling, self._model(self.policy.resolve(role)))
            for position in range(len(requests)):
                call.waiting.put(position)
            self._start_workers(call)
            try:
                for _ in range(len(requests)):
                    raw = self._next_result(call)
                    decode = partial(self.decode, prompt_ids=requests[raw.position].prompt_ids)
                    completion = to_completion(raw, sampling, decode, self.stop_ids, self.policy_version)
                    yield raw.position, completion
            finally:
                call.ended.set()

    def sync(self, policy_version: int) -> None:
        """Load the student's adapter into every server that answers; the others load it when they recover."""
        with self._lock:
            self.policy_version = policy_version
            self._load("student")

    def sleep(self) -> None:
        """Do nothing: the servers have GPUs of their own."""

    def wake(self) -> None:
        """Wait until a batch that another thread has asked for is complete (`rollouts.prefetch`)."""
        with self._lock:
            pass

    def close(self) -> None:
        """Abort a call in another thread, unload the adapters and remove their files; the servers keep running."""
        self._closed = True
        if self._call is not None:
            self._call.results.put(EngineError("the engine was closed while it generated."))
        for role in list(self._names):
            self._unload(self._names.pop(role))
        shutil.rmtree(self.adapters, ignore_errors=True)

    def _model(self, role: Role) -> str:
        """Return the name of the weights of `role`, loading its adapter first if the servers may lack it."""
        if role == "reference":
            return BASE_MODEL
        if role == "teacher" or role not in self._names:  # a teacher's own weights may have changed since
            self._load(role)
        return self._names[role]

    def _load(self, role: Role) -> None:
        """Save the adapter of `role` under a new name, load it into all servers, and unload the previous one."""
        name, previous = f"{role}-{self.policy_version}-{uuid4().hex[:8]}", self._names.get(role)
        save_adapter(self.policy, role, self.adapters / name)
        self._names[role] = name
        for server in self.servers:
            try:
                server.load_adapter(name, self.adapters / name / role)
            except ServerUnavailable:
                server.is_healthy()
        if previous is not None:
            self._unload(previous)

    def _unload(self, name: str) -> None:
        for server in self.servers:
            try:
                server.unload_adapter(name)
            except (ServerUnavailable, EngineError):  # it is down, or was restarted and does not know the adapter
                server.is_healthy()
        shutil.rmtree(self.adapters / name, ignore_errors=True)

    def _start_workers(self, call: GenerateCall) -> None:
        for _ in range(min(self.config.concurrency, len(call.requests))):
            for server in self.servers:  # in turns, or the first would take all requests of a small batch
                threading.Thread(target=self._work, args=(server, call), daemon=True).start()

    def _work(self, server: ServerClient, call: GenerateCall) -> None:
        """Have `server` complete waiting requests until the call has ended; runs in its own thread."""
        while not call.ended.is_set():
            try:
                position = call.waiting.get(timeout=0.1)
            except queue.Empty:
                continue
            if self._should_leave(server, position, call):
                call.waiting.put(position)
                call.ended.wait(0.1)
                continue
            try:
                call.in_flight[position] = server.url, time.monotonic()
                raw = server.complete(position, call.requests[position], call.sampling, self.stop_ids, call.model)
                call.in_flight.pop(position)
                call.results.put(raw)
            except (ServerUnavailable, AdapterNotLoaded) as error:
                call.failed_at[position] = server
                self._requeue(call, position, error)
                self._recover(server, call)
            except EngineError as error:
                call.results.put(error)

    def _should_leave(self, server: ServerClient, position: int, call: GenerateCall) -> bool:
        """Whether a request has failed at this server, and another is up: one that answers badly must not use it up."""
        others_up = any(other.down_since is None for other in self.servers if other is not server)
        return others_up and call.failed_at.get(position) is server

    def _requeue(self, call: GenerateCall, position: int, error: Exception) -> None:
        """Put a failed request back into the queue, or end the call if it has failed too often."""
        call.in_flight.pop(position, None)
        call.num_failures[position] += 1
        if call.num_failures[position] > self.config.retries:
            call.results.put(
                EngineError(
                    f"request {position} failed {call.num_failures[position]} times, most recently: {error}; the "
                    "batch was discarded. Look at the servers' logs."
                )
            )
        else:
            call.waiting.put(position)

    def _recover(self, server: ServerClient, call: GenerateCall) -> None:
        """Wait with growing pauses until the server is healthy and has the adapter, or the call has ended."""
        pause_s = self.config.backoff_s
        while not call.ended.is_set():
            try:
                if server.is_healthy():
                    if call.model != BASE_MODEL:
                        role = call.model.partition("-")[0]
                        server.load_adapter(call.model, self.adapters / call.model / role)
                    server.down_since = None
                    return
            except (ServerUnavailable, EngineError):
                server.mark_down()
            call.ended.wait(pause_s)
            pause_s = min(2 * pause_s, MAX_BACKOFF_S)

    def _next_result(self, call: GenerateCall) -> RawCompletion:
        """Wait for a completion; raise if none can arrive any more."""
        while True:
            try:
                result = call.results.get(timeout=1.0)
            except queue.Empty:
                self._check_servers(call)
                continue
            if isinstance(result, EngineError):
                raise result
            return result

    def _check_servers(self, call: GenerateCall) -> None:
        """Raise if every server has been down too long, or a request has been in flight longer than its timeout."""
        now = time.monotonic()
        down_s = [now - server.down_since for server in self.servers if server.down_since is not None]
        oldest = call.oldest_pending()
        request = f"request {oldest} (prompt of {len(call.requests[oldest].prompt_ids)} tokens)"
        if len(down_s) == len(self.servers) and min(down_s) > self.config.recovery_s:
            raise EngineError(
                f"no server answered for rollouts.server.recovery_s={self.config.recovery_s:g} s while {request} "
                f"waits: {', '.join(self.config.urls)}; start them (python -m pmd serve)."
            )
        server, sent_at = call.in_flight.get(oldest, ("", now))
        if now - sent_at > self.config.request_timeout_s + self.config.recovery_s:
            raise EngineError(f"{request} has been at {server} for {now - sent_at:.0f} s; restart that server.")
