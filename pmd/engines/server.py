"""vLLM servers, on other GPUs or machines, as the rollout engine.

Enters: requests, the policy, the servers' addresses. Leaves: completions. The adapter is written to a folder that the
servers read and loaded under a name of its own at every sync. A name that a server does not know (it was restarted) is
answered by an error, never by older weights, and cached prefixes belong to a name; so no stale answer is possible.

A request is in one thread's hands at a time. If its server dies it goes back to the queue, and any server takes it up.
"""

import queue
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from transformers import PreTrainedTokenizerBase

from pmd.config.schema import ServerConfig
from pmd.engines.base import Request, Sampling
from pmd.engines.server_client import BASE_MODEL, AdapterMissing, ServerClient, ServerGone
from pmd.engines.vllm import save_adapter, to_completion
from pmd.engines.vllm_runtime import Generation
from pmd.errors import EngineError
from pmd.policy import AdapterPolicy
from pmd.pretrained import stop_ids
from pmd.types import Completion, Role

MAX_BACKOFF_S = 30.0


@dataclass(eq=False, slots=True)
class Dispatch:
    """One call of `generate`: what waits, what is out, what came back."""

    requests: Sequence[Request]
    sampling: Sampling
    model: str
    waiting: queue.Queue[int] = field(default_factory=queue.Queue)
    arrived: queue.Queue[Generation | EngineError] = field(default_factory=queue.Queue)
    out: dict[int, tuple[str, float]] = field(default_factory=dict)  # position -> server, since when
    tries: Counter[int] = field(default_factory=Counter)
    ended: threading.Event = field(default_factory=threading.Event)


class VLLMServerEngine:
    """Spreads requests over servers; survives the death of any of them for `config.recovery_s`."""

    def __init__(self, policy: AdapterPolicy, tokenizer: PreTrainedTokenizerBase, config: ServerConfig, adapters: Path):
        self.policy, self.tokenizer, self.config = policy, tokenizer, config
        self.policy_version = 0
        with policy.weights("student") as model:
            self.stop_ids = tuple(stop_ids(model, tokenizer))
        self.servers = [ServerClient(url, config.request_timeout_s) for url in config.urls]
        self.adapters = adapters
        self._names: dict[Role, str] = {}
        self._lock = threading.RLock()
        self._dispatch: Dispatch | None = None  # the latest
        self._closed = False

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, role: Role = "student"
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (position, completion) as completions finish."""
        with self._lock:
            if self._closed:  # a thread that generates ahead may come too late
                raise EngineError("the engine was closed before it generated.")
            dispatch = self._dispatch = Dispatch(requests, sampling, self._model(self.policy.resolve(role)))
            for position in range(len(requests)):
                dispatch.waiting.put(position)
            self._start_workers(dispatch)
            try:
                for _ in range(len(requests)):
                    generation = self._next(dispatch)
                    completion = to_completion(generation, sampling, self.tokenizer, self.stop_ids, self.policy_version)
                    yield generation.key, completion
            finally:
                dispatch.ended.set()

    def sync(self, policy_version: int) -> None:
        """Give the student's adapter to every server that answers; the others get it when they are back."""
        with self._lock:
            self.policy_version = policy_version
            self._push("student")

    def sleep(self) -> None:
        """The servers have GPUs of their own."""

    def wake(self) -> None:
        """The servers have GPUs of their own."""

    def close(self) -> None:
        """End what another thread still generates, unload the adapters and remove their files; the servers go on."""
        self._closed = True
        if self._dispatch is not None:
            self._dispatch.arrived.put(EngineError("the engine was closed while it generated."))
        for role in list(self._names):
            self._forget(self._names.pop(role))
        shutil.rmtree(self.adapters, ignore_errors=True)

    def _model(self, role: Role) -> str:
        if role == "reference":
            return BASE_MODEL
        if role == "teacher" or role not in self._names:
            self._push(role)
        return self._names[role]

    def _push(self, role: Role) -> None:
        name, earlier = f"{role}-{self.policy_version}-{uuid4().hex[:8]}", self._names.get(role)
        save_adapter(self.policy, role, self.adapters / name)
        self._names[role] = name
        for server in self.servers:
            try:
                server.load_adapter(name, self.adapters / name / role)
            except ServerGone:
                server.healthy()
        if earlier is not None:
            self._forget(earlier)

    def _forget(self, name: str) -> None:
        for server in self.servers:
            try:
                server.unload_adapter(name)
            except (ServerGone, EngineError):  # it died, or was restarted and never had it
                server.healthy()
        shutil.rmtree(self.adapters / name, ignore_errors=True)

    def _start_workers(self, dispatch: Dispatch) -> None:
        count = min(self.config.concurrency, len(dispatch.requests))
        for server in self.servers:
            for _ in range(count):
                threading.Thread(target=self._work, args=(server, dispatch), daemon=True).start()

    def _work(self, server: ServerClient, dispatch: Dispatch) -> None:
        """Take requests off the queue and have `server` complete them until the call has ended."""
        while not dispatch.ended.is_set():
            try:
                position = dispatch.waiting.get(timeout=0.1)
            except queue.Empty:
                continue
            try:
                dispatch.out[position] = server.url, time.monotonic()
                generation = server.complete(
                    position, dispatch.requests[position], dispatch.sampling, self.stop_ids, dispatch.model
                )
                dispatch.out.pop(position)
                dispatch.arrived.put(generation)
            except (ServerGone, AdapterMissing) as error:
                self._again(dispatch, position, error)
                self._recover(server, dispatch)
            except EngineError as error:
                dispatch.arrived.put(error)

    def _again(self, dispatch: Dispatch, position: int, error: Exception) -> None:
        """Put a request back, unless it was tried too often."""
        dispatch.out.pop(position, None)
        dispatch.tries[position] += 1
        if dispatch.tries[position] > self.config.retries:
            dispatch.arrived.put(
                EngineError(
                    f"request {position} failed {dispatch.tries[position]} times, at last: {error}; nothing of it is "
                    "used. Look at the servers' logs."
                )
            )
        else:
            dispatch.waiting.put(position)

    def _recover(self, server: ServerClient, dispatch: Dispatch) -> None:
        """Wait, ever longer, until the server is healthy and has the adapter, or the call has ended."""
        pause_s = self.config.backoff_s
        while not dispatch.ended.is_set():
            try:
                if server.healthy():
                    if dispatch.model != BASE_MODEL:
                        role = dispatch.model.partition("-")[0]
                        server.load_adapter(dispatch.model, self.adapters / dispatch.model / role)
                    server.down_since = None
                    return
            except (ServerGone, EngineError):
                server.note_down()
            dispatch.ended.wait(pause_s)
            pause_s = min(2 * pause_s, MAX_BACKOFF_S)

    def _next(self, dispatch: Dispatch) -> Generation:
        """Wait for a generation; name what is pending when none can be expected any more."""
        while True:
            try:
                arrival = dispatch.arrived.get(timeout=1.0)
            except queue.Empty:
                self._watch(dispatch)
                continue
            if isinstance(arrival, EngineError):
                raise arrival
            return arrival

    def _watch(self, dispatch: Dispatch) -> None:
        """Raise if every server has been down too long, or a request has been out longer than its timeout allows."""
        now = time.monotonic()
        down = [now - server.down_since for server in self.servers if server.down_since is not None]
        out = dict(dispatch.out)
        pending = min(out, key=lambda p: out[p][1]) if out else min(list(dispatch.waiting.queue), default=0)
        named = f"request {pending} (prompt of {len(dispatch.requests[pending].prompt_ids)} tokens)"
        if len(down) == len(self.servers) and min(down) > self.config.recovery_s:
            raise EngineError(
                f"no server answered for rollouts.server.recovery_s={self.config.recovery_s:g} s while {named} waits: "
                f"{', '.join(self.config.urls)}; start them (python -m pmd serve)."
            )
        if out and now - out[pending][1] > self.config.request_timeout_s + self.config.recovery_s:
            raise EngineError(
                f"{named} has been at {out[pending][0]} for {now - out[pending][1]:.0f} s; restart that server."
            )
