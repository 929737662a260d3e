"""Has an external model write the behaviours, at any OpenAI-compatible endpoint (`reflection.behaviour_writer`).

The paper's authors let such a model write them; by default the policy does (our choice). Whatever the endpoint does,
the run goes on: a call that fails is counted, and its cluster is asked about again at the next update. What it writes
is not reproduced by the run's seed. The key comes from the environment, and is in no configuration, log or message.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2
from tqdm.auto import tqdm

from pmd.config.schema import ReflectionConfig
from pmd.tasks.prompts.base import PromptFormat
from pmd.tasks.prompts.parsing import printable_line

MAX_TRIES = 3  # of one call, while the endpoint is unreachable or busy
PAUSE_S = 1.0  # before the second try; doubles
BUSY = {429, 500, 502, 503, 504}
MAX_FAILURES = 3  # in a row; the rest of the update is then put off, so that a dead endpoint costs little time
MAX_BYTES = 1 << 20  # of an answer
CHARACTERS_PER_TOKEN = 4  # the endpoint's tokenizer is unknown
MAX_QUOTED = 200  # characters of an answer in a message


@dataclass(frozen=True, slots=True)
class Written:
    """The behaviours of an update or of an epoch, and what they cost; calls are those of an external writer."""

    texts: list[str | None] = field(default_factory=list)  # one for each cluster; None if there is none (yet)
    num_tokens: int = 0  # generated, retries included; of an endpoint those that it reports
    num_calls: int = 0
    num_failed: int = 0  # calls without an answer
    num_malformed: int = 0  # answers without a well-formed behaviour
    num_deferred: int = 0  # clusters put off to the next update, by `max_calls_per_step` or because calls failed
    problem: str = ""  # the first failure

    def describe_problem(self) -> str:
        """Return a sentence on calls that came to nothing; empty if there are none."""
        if not self.num_failed and not self.num_malformed:
            return ""
        put_off = f", {self.num_deferred} clusters put off" if self.num_deferred else ""
        return (
            f"reflection.behaviour_writer: {self.num_failed} of {self.num_calls} calls failed, {self.num_malformed} "
            f"answers malformed{put_off}; e.g. {self.problem}."
        )


class CallFailed(Exception):
    """A call gave no answer. `is_final`: further calls would fail too."""

    def __init__(self, reason: str, *, is_final: bool = False):
        super().__init__(reason)
        self.is_final = is_final


class BehaviourWriter:
    """Asks the endpoint, over pooled connections, for one behaviour per cluster."""

    def __init__(self, config: ReflectionConfig, prompts: PromptFormat):
        self.config, self.endpoint, self.prompts = config, config.behaviour_writer, prompts
        self.key = os.environ.get(self.endpoint.api_key_env or "", "").strip()
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        self.url = f"{(self.endpoint.base_url or '').rstrip('/')}/chat/completions"
        self.client = httpx2.Client(headers=headers, timeout=self.endpoint.timeout_s)
        self.limits: dict[str, Any] = {"max_tokens": config.max_new_tokens, "temperature": config.temperature}

    def write(self, clusters: Sequence[Sequence[str]], num_steps: int) -> Written:
        """Return a text for each cluster of insight texts; never raises because of the endpoint.

        Args:
            clusters: the best supported first.
            num_steps: optimizer steps since behaviours were last written, each of which allows `max_calls_per_step`
                calls.
        """
        texts: list[str | None] = [None] * len(clusters)
        budget = self.endpoint.max_calls_per_step * num_steps
        calls = failed = malformed = deferred = failures_in_row = tokens = 0
        problem = ""
        for position, insights in tqdm(
            list(enumerate(clusters)), desc="behaviours", leave=False, delay=2.0, disable=None
        ):
            prompt = self._fitting(insights)
            if not prompt:
                continue
            if calls >= budget or failures_in_row >= MAX_FAILURES:
                deferred += 1
                continue
            calls += 1
            try:
                answer, num_tokens = self._ask(prompt)
            except CallFailed as error:
                failed, problem = failed + 1, problem or str(error)
                failures_in_row = MAX_FAILURES if error.is_final else failures_in_row + 1
                continue
            failures_in_row, texts[position] = 0, self.prompts.parse_abstraction(answer)
            tokens += num_tokens
            if texts[position] is None:
                malformed, problem = malformed + 1, problem or f"it wrote {self._quoted(answer)}"
        return Written(texts, tokens, calls, failed, malformed, deferred, problem)

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def _fitting(self, insights: Sequence[str]) -> str:
        """Return a cluster's prompt; if it is too long, that of its first half, quarter, ..., the best supported."""
        limit = CHARACTERS_PER_TOKEN * self.config.max_prompt_tokens
        prompt = self.prompts.abstraction_text(insights)
        while len(prompt) > limit and len(insights) > 1:
            insights = insights[: len(insights) // 2]
            prompt = self.prompts.abstraction_text(insights)
        return prompt[:limit]

    def _ask(self, prompt: str) -> tuple[str, int]:
        """Return the endpoint's answer, and its tokens; try again while it is unreachable or busy."""
        for pause_s in (*_pauses(), None):
            try:
                status, text = self._post(prompt)
            except httpx2.TimeoutException:
                raise CallFailed(f"no answer within timeout_s={self.endpoint.timeout_s}") from None
            except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError, ValueError) as error:
                reason = f"{type(error).__name__}: {self._quoted(str(error))}"
            else:
                if status == 200:
                    return self._content(text)
                if status in (401, 403):  # without the text, which may repeat the key
                    raise CallFailed(f"status {status}: the key is missing or refused", is_final=True)
                if status == 400 and "max_tokens" in self.limits and ("max_tokens" in text or "temperature" in text):
                    self.limits = {"max_completion_tokens": self.config.max_new_tokens}  # as reasoning models want it
                    continue
                reason = f"status {status}: {self._quoted(text)}"
                if status not in BUSY:
                    raise CallFailed(reason)
            if pause_s is None:
                raise CallFailed(reason)
            time.sleep(pause_s)
        raise CallFailed("status 400")  # the last try only changed the limits

    def _post(self, prompt: str) -> tuple[int, str]:
        """Return status and body, both within `timeout_s` and `MAX_BYTES`."""
        deadline, body = time.monotonic() + self.endpoint.timeout_s, bytearray()
        message = {"role": "user", "content": prompt.encode(errors="replace").decode()}
        payload = {"model": self.endpoint.model, "messages": [message], **self.limits}
        with self.client.stream("POST", self.url, json=payload) as response:
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > MAX_BYTES:
                    raise CallFailed(f"the answer is longer than {MAX_BYTES} bytes")
                if time.monotonic() > deadline:
                    raise httpx2.ReadTimeout("the answer does not end")
            return response.status_code, body.decode("utf-8", "replace")

    def _content(self, text: str) -> tuple[str, int]:
        """Return a completion's text, and the number of its tokens; 0 if the endpoint does not report it."""
        try:
            completion = json.loads(text)
            content = completion["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            completion, content = {}, None
        if not isinstance(content, str):
            raise CallFailed(f"no chat completion: {self._quoted(text)}")
        usage = completion.get("usage")
        reported = usage.get("completion_tokens") if isinstance(usage, dict) else None
        return content, reported if isinstance(reported, int) else 0

    def _quoted(self, text: str) -> str:
        """Return the beginning of a text for a message, on one printable line and without the key."""
        if self.key:
            text = text.replace(self.key, "[the key]")
        return repr(printable_line(text[: 4 * MAX_QUOTED])[:MAX_QUOTED])


def _pauses() -> Iterator[float]:
    yield from (PAUSE_S * 2**number for number in range(MAX_TRIES - 1))
