"""Audits memory items: does an item make correct attempts more likely under the teacher, but not wrong ones?

Each item gets one `ItemAudit` per group of an epoch. Lift = per-token mean of log T(attempt | item) - log T(attempt |
placebo), each token's difference clipped. The placebo is a line of the same length that says nothing about the task,
because any line in the prompt shifts the teacher a little. A second measurement leaves out the answer's tokens, which
exposes an item that only gives away the answer. Works without Lightning and writes nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from pmd.config.schema import MemoryConfig
from pmd.memory.judge import ItemAudit
from pmd.seeds import derive_seed
from pmd.tasks.prompts.base import PromptFormat
from pmd.types import MemoryItem, PromptAndCompletion, Role, Rollout, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Per-token log-probs of each completion, in nats, under a role of the policy.
Scorer = Callable[[Sequence[PromptAndCompletion], Role], list[list[float]]]

MAX_TOKEN_LIFT = 5.0  # nats; a single token must not dominate a completion of hundreds
MAX_ATTEMPTS = 2  # scored per outcome and group; the cost is items x attempts x 2
MAX_SPAN = 40  # characters between the parts of an answer; with more, the answer has no span


@dataclass(frozen=True, slots=True)
class ShownGroup:
    """One group of rollouts, with the items to audit on it."""

    step: int
    task: Task
    rollouts: tuple[Rollout, ...]
    items: tuple[MemoryItem, ...]
    past_success: tuple[int, ...] = ()  # token ids of a verified success from an earlier epoch

    @property
    def group_id(self) -> str:
        """The id that its rollouts share."""
        return self.rollouts[0].group_id

    @property
    def correct(self) -> list[Rollout]:
        """Its verified successes, without duplicates."""
        return _distinct([r for r in self.rollouts if r.verdict.correct])

    @property
    def wrong(self) -> list[Rollout]:
        """Its verified failures, without duplicates; unscored attempts are in neither list."""
        return _distinct([r for r in self.rollouts if r.verdict.scored and not r.verdict.correct])

    @property
    def attempts(self) -> list[tuple[tuple[int, ...], bool, Rollout | None]]:
        """(completion ids, is correct, rollout); without a success, a past one is used (rollout: None)."""
        found = [(r.completion.token_ids, True, r) for r in self.correct[:MAX_ATTEMPTS]]
        past = [] if found or not self.past_success else [(self.past_success, True, None)]
        return [*found, *past, *((r.completion.token_ids, False, r) for r in self.wrong[:MAX_ATTEMPTS])]

    @property
    def solved(self) -> bool:
        """Whether every attempt succeeded."""
        return all(r.verdict.correct for r in self.rollouts)


@dataclass(frozen=True, slots=True)
class AuditResult:
    """The result and the cost of one round of audits."""

    audits: tuple[ItemAudit, ...] = ()
    num_tokens: int = 0  # scored, prompts included


def choose_groups(groups: Sequence[ShownGroup], config: MemoryConfig, key: str) -> list[ShownGroup]:
    """Draw `memory.audit_groups` groups with items: half of them mixed if possible, all-wrong ones last."""
    drawn = sorted((group for group in groups if group.items), key=lambda group: group.group_id)
    Random(derive_seed(key, "groups")).shuffle(drawn)
    mixed = [group for group in drawn if group.correct and group.wrong][: -(-config.audit_groups // 2)]
    chosen = {group.group_id for group in mixed}
    rest = [group for group in drawn if group.group_id not in chosen]
    rest.sort(key=lambda group: not (group.correct or group.past_success))
    return [*mixed, *rest][: config.audit_groups]


def audit(
    groups: Sequence[ShownGroup],
    scorer: Scorer,
    prompts: PromptFormat,
    tokenizer: "PreTrainedTokenizerBase",
    max_prompt_tokens: int,
) -> AuditResult:
    """Score each item of each group by itself against its placebo; items too long for a prompt are skipped."""
    asked: list[tuple[_Lifts, PromptAndCompletion, PromptAndCompletion, bool, Rollout | None]] = []
    for group in groups:
        for item in group.items:
            with_item = tuple(prompts.teacher(group.task, [item.text], None, None))
            placebo = tuple(prompts.teacher(group.task, [prompts.placebo(item.text)], None, None))
            if max(len(with_item), len(placebo)) <= max_prompt_tokens:
                lifts = _Lifts(group, item)
                asked += [(lifts, (with_item, ids), (placebo, ids), ok, r) for ids, ok, r in group.attempts]
    pairs = [pair for _, one, other, *_ in asked for pair in (one, other)]
    student_pairs = [pair for lifts, one, other, *_ in asked if lifts.group.solved for pair in (one, other)]
    teacher, cost = _score(scorer, pairs, "teacher")
    student, student_cost = _score(scorer, student_pairs, "student")
    for lifts, with_item, placebo, correct, rollout in asked:
        per_token = _clipped(teacher[with_item], teacher[placebo])
        lifts.add(correct, per_token, answer_span(rollout, tokenizer) if rollout is not None else None)
        if lifts.group.solved:
            lifts.student.append(_mean(_clipped(student[with_item], student[placebo])))
    audited = dict.fromkeys(lifts for lifts, *_ in asked)
    return AuditResult(tuple(lifts.result() for lifts in audited), cost + student_cost)


class _Lifts:
    """The lifts of one item on one group's attempts."""

    def __init__(self, group: ShownGroup, item: MemoryItem):
        self.group, self.item = group, item
        self.whole: dict[bool, list[float]] = {True: [], False: []}
        self.masked: dict[bool, list[float]] = {True: [], False: []}
        self.student: list[float] = []

    def add(self, correct: bool, per_token: list[float], span: tuple[int, int] | None) -> None:
        self.whole[correct].append(_mean(per_token))
        if span is not None and (rest := per_token[: span[0]] + per_token[span[1] :]):
            self.masked[correct].append(_mean(rest))

    def result(self) -> ItemAudit:
        return ItemAudit(
            self.group.step, self.group.group_id, self.item.level, self.item.item_id,
            len(self.whole[True]), len(self.whole[False]),
            _mean_or_none(self.whole[True]), _mean_or_none(self.whole[False]),
            _mean_or_none(self.masked[True]), _mean_or_none(self.masked[False]), _mean_or_none(self.student),
        )  # fmt: skip


def answer_span(rollout: Rollout, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, int] | None:
    """Return start and end (exclusive) of the tokens in which the attempt states its answer; None if not found.

    The parts of the answer are searched backwards from the end of the attempt, ignoring white space.
    """
    words = (rollout.verdict.answer or "").split()
    if not words:
        return None
    text, owners = "", list[int]()
    for position, token in enumerate(rollout.completion.token_ids):
        piece = "".join(str(tokenizer.decode([token])).split())
        text += piece
        owners += [position] * len(piece)
    end = start = len(text)
    for number, word in enumerate(reversed(words)):
        start = text.rfind(word, 0, start)
        if start < 0:
            return None
        if number == 0:
            end = start + len(word)
    if end - start > MAX_SPAN + sum(map(len, words)):
        return None
    return owners[start], owners[end - 1] + 1


def _score(
    scorer: Scorer, pairs: Sequence[PromptAndCompletion], role: str
) -> tuple[dict[PromptAndCompletion, list[float]], int]:
    """Score each distinct pair once; return its log-probs and the number of tokens scored."""
    distinct = list(dict.fromkeys(pairs))
    if not distinct:
        return {}, 0
    scores = scorer(distinct, "student" if role == "student" else "teacher")
    return dict(zip(distinct, scores, strict=True)), sum(len(prompt) + len(ids) for prompt, ids in distinct)


def _clipped(with_item: list[float], placebo: list[float]) -> list[float]:
    return [
        max(-MAX_TOKEN_LIFT, min(MAX_TOKEN_LIFT, one - other)) for one, other in zip(with_item, placebo, strict=True)
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_or_none(values: Sequence[float]) -> float | None:
    return _mean(values) if values else None


def _distinct(rollouts: Sequence[Rollout]) -> list[Rollout]:
    return list({rollout.completion.token_ids: rollout for rollout in rollouts}.values())
