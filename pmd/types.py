"""The records that flow through one training step. Plain data: no torch, no I/O, nothing mutable.

Task -> (engine) Completion -> Rollout -> (verifier) Verdict -> (reflection) MemoryItem. Records are joined by id,
never by list position.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Split = Literal["train", "validation", "test"]
Role = Literal["student", "teacher", "reference"]  # which weights of the policy
PromptAndCompletion = tuple[tuple[int, ...], tuple[int, ...]]  # token ids
Level = Literal[0, 1, 2]
ItemKind = Literal["experience", "strategy", "lesson", "contrast", "behaviour"]
#: Kinds of insights (level 1); the other two kinds are levels of their own.
INSIGHT_KINDS: tuple[ItemKind, ...] = ("strategy", "lesson", "contrast")
InsightAction = Literal["add", "keep", "edit", "retire"]
VerdictStatus = Literal[
    "ok",
    "wrong_answer",
    "format",
    "runtime_error",
    "timeout",
    "memory",
    "output_limit",
    "sandbox_error",
    "error",
]
#: Statuses that say nothing about the completion: counted, retried where possible, never learned from.
UNSCORED: frozenset[str] = frozenset({"sandbox_error", "error"})


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Task:
    """A problem whose solution a program can verify."""

    task_id: str  # unique in its data set, the same in every run
    messages: tuple[Message, ...]  # what the student sees; never any memory
    verifier: str  # a name (`mcq`, `exact`, `boxes`, ...) or a class path
    split: Split
    answer: str = ""  # what the verifier compares with; never shown to a model
    tests: Mapping[str, Any] = field(default_factory=dict)  # for verifiers that run tests
    memory_key: str = ""  # what the task is about, without template words; retrieval looks this up
    domain: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)  # of its row, for reward functions
    place: str = field(default="", compare=False, repr=False)  # FILE:LINE it was read from, for error messages

    @property
    def lookup_key(self) -> str:
        """What retrieval looks up: the memory key, or the question where there is none."""
        return self.memory_key or self.question

    @property
    def question(self) -> str:
        """The user message: the task itself, without the system prompt. Where there are several, the conversation."""
        turns = [message for message in self.messages if message.role != "system"]
        return turns[0].content if len(turns) == 1 else "\n\n".join(f"{m.role.title()}: {m.content}" for m in turns)


@dataclass(frozen=True, slots=True)
class CaseCounts:
    """How many tests of a program passed. A test skipped because others failed counts as not passed."""

    num_tests: int
    num_passed: int
    num_public: int = 0  # tests that may be used to choose among several programs
    num_public_passed: int = 0

    @property
    def share(self) -> float:
        """The share of all tests that passed."""
        return self.num_passed / self.num_tests

    @property
    def hidden_pass(self) -> bool:
        """Whether every test that is not public passed."""
        return self.num_passed - self.num_public_passed == self.num_tests - self.num_public


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier says about one completion."""

    reward: float
    correct: bool
    status: VerdictStatus
    feedback: str = ""  # shown to the model; never the expected answer
    answer: str | None = None  # the answer extracted from the completion, None where there is none
    seconds: float = 0.0
    tests: CaseCounts | None = None  # of verifiers that run tests
    explanation: str = ""  # for people: may state the expected answer, so no prompt ever holds it

    @property
    def scored(self) -> bool:
        """Whether the verdict says something about the completion."""
        return self.status not in UNSCORED


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine returns for one request. Token ids end to end; the text is for verifiers and people."""

    token_ids: tuple[int, ...]  # includes the end-of-sequence token if it was sampled
    logprobs: tuple[float | None, ...]  # of the sampling policy, in nats; None where the engine reports none
    text: str
    finish_reason: Literal["stop", "length"]
    policy_version: int


@dataclass(frozen=True, slots=True)
class Rollout:
    """One attempt of the student at one task, and its verdict."""

    rollout_id: str
    group_id: str  # the G attempts at one task in one step share it
    task_id: str
    prompt_ids: tuple[int, ...]
    completion: Completion
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class InsightChange:
    """One change to a task's insights that a reflection asks for, not yet in memory."""

    task_id: str
    kind: ItemKind
    text: str
    rollout_ids: tuple[str, ...]  # the attempts it was learned from
    action: InsightAction = "add"
    target_id: int | None = None  # the insight that is kept, edited or retired
    num_successes: int = 0  # of the attempts it was learned from: how sure one can be of it
    num_attempts: int = 0


@dataclass(frozen=True, slots=True)
class MemoryItem:
    """One memory entry, as retrieval hands it to the teacher."""

    item_id: int
    level: Level
    kind: ItemKind
    text: str
    task_row: int | None  # of the store; None for behaviours, which belong to several tasks
    task_id: str | None  # the train task it was learned from
    similarity: float = 0.0  # of the query to the task (levels 0, 1) or to the behaviour, in [-1, 1]
    score: float = 0.0  # what ranks it within its kind
    num_successes: int = 0  # of an insight: among the attempts that it was last learned from
    num_attempts: int = 0  # 0 where this is not known
