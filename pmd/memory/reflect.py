"""Reflection by the policy: verified groups -> insights; clusters of insights -> behaviours (paper, levels 1 and 2).

A reflection proposes changes to a task's insights, linked by id to the attempts they came from. A malformed output is
retried once, then dropped and counted; its meaning is never guessed. A group whose prompt is too long is asked with
fewer attempts, then with shortened ones. Works without Lightning and writes nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from random import Random
from typing import TypeVar

from tqdm.auto import tqdm

from pmd.config.schema import ReflectionConfig
from pmd.engines.base import Engine, Request, Sampling
from pmd.memory.behaviour_writer import BehaviourWriter, Written
from pmd.seeds import derive_seed
from pmd.tasks.prompts.base import Extent, PromptFormat
from pmd.tasks.prompts.parsing import ParsedInsight, printable_line
from pmd.types import Completion, InsightChange, MemoryItem, Rollout, Task

RETRY_TEMPERATURE = 0.7  # greedy decoding would repeat the same output
MAX_KNOWN = 12  # insights of one task listed in a reflection prompt
#: What a prompt that is too long is tried with: whole attempts are left out first, then each is shortened.
EXTENTS = (
    *(Extent(attempts) for attempts in (3, 2, 1)),
    *(Extent(1, characters) for characters in (8192, 4096, 2048, 1024, 512, 256)),
)
MIN_READABLE = 0.1  # share of reflections that must be well-formed, or else the memory is called dead
MAX_QUOTED = 100  # characters of a malformed output in a message
T = TypeVar("T")
Known = Callable[[str], Sequence[MemoryItem]]  # task id -> the insights that a reflection on it may change


@dataclass(frozen=True, slots=True)
class Reflections:
    """The result and the cost of one round of reflection."""

    changes: tuple[InsightChange, ...] = ()
    num_prompts: int = 0
    num_malformed: int = 0  # outputs without a single well-formed item
    num_tokens: int = 0  # generated
    num_overlong: int = 0  # prompts skipped because they exceed reflection.max_prompt_tokens even when shortened
    num_retried: int = 0  # malformed at first, and retried
    num_unknown: int = 0  # changes to an insight that the prompt does not list; dropped
    num_rejected: int = 0  # malformed or surplus items, in any output
    num_groups: int = 0
    num_silent: int = 0  # groups without a prompt: no attempt succeeded, and nothing is known of why
    num_shortened: int = 0  # groups whose prompt shows fewer or shorter attempts
    num_cut_off: int = 0  # malformed outputs that reached reflection.max_new_tokens
    example: str = ""  # the first malformed output

    def plus(self, other: "Reflections") -> "Reflections":
        """Return the counts of both rounds together, without the changes that they propose."""
        counts = {
            each.name: getattr(self, each.name) + getattr(other, each.name)
            for each in fields(self)
            if each.name.startswith("num_")
        }
        return Reflections(example=self.example or other.example, **counts)

    def describe_failure(self, config: ReflectionConfig) -> str:
        """Return what keeps the memory empty and its likely cause; empty if enough reflections are well-formed."""
        num_readable = self.num_prompts - self.num_malformed
        if self.num_groups == 0 or num_readable > MIN_READABLE * self.num_prompts:
            return ""
        if self.num_prompts == 0:
            reasons = []
            if self.num_silent:
                reasons.append(f"{self.num_silent} had no success and no feedback on any failure")
            if self.num_overlong:
                reasons.append(f"{self.num_overlong} prompts exceed reflection.max_prompt_tokens")
            return f"memory: none of {self.num_groups} groups could be reflected on: {'; '.join(reasons)}."
        if 2 * self.num_cut_off >= self.num_malformed:
            cause = f"most were cut off, so raise reflection.max_new_tokens={config.max_new_tokens}"
        elif not self.example.strip():
            cause = "the policy writes nothing, so check its chat template"
        else:
            cause = "the policy does not keep to the form asked for, so it may be too small, or not instruction-tuned"
        quoted = printable_line(self.example[: 4 * MAX_QUOTED])[:MAX_QUOTED]
        share = f"{num_readable} of {self.num_prompts}"
        return f'memory: {share} reflections readable, e.g. "{quoted}". Likely cause: {cause}.'

    def figures(self) -> dict[str, float]:
        """Return the metrics of this round."""
        return {
            "reflect/num_prompts": float(self.num_prompts),
            "reflect/num_insights": float(len(self.changes)),
            "reflect/malformed": float(self.num_malformed),
            "reflect/rejected_items": float(self.num_rejected),
            "reflect/retried": float(self.num_retried),
            "reflect/unknown_targets": float(self.num_unknown),
            "reflect/overlong": float(self.num_overlong),
            "reflect/shortened": float(self.num_shortened),
            "reflect/nothing_to_say": float(self.num_silent),
            "reflect/num_tokens": float(self.num_tokens),
        }


def reflect(
    engine: Engine,
    tasks: Mapping[str, Task],
    groups: Sequence[Sequence[Rollout]],
    prompts: PromptFormat,
    config: ReflectionConfig,
    key: str,
    known: Known = lambda task_id: (),
) -> Reflections:
    """Ask the policy what it learned from each group of verified rollouts. Seeds are derived from `key`.

    A reflection may also keep, edit or retire known insights of its task, which the prompt numbers.
    """
    chosen = list(groups)
    if config.max_groups is not None and len(chosen) > config.max_groups:
        chosen = Random(derive_seed(key, "groups")).sample(chosen, config.max_groups)
    wanted: list[_Question] = []
    num_silent = num_shortened = 0
    for group in chosen:
        listed = tuple(known(group[0].task_id)[:MAX_KNOWN])
        found, shortened = _prompts_of(group, tasks[group[0].task_id], listed, prompts, config.max_prompt_tokens)
        wanted += [_Question(group, ids, listed) for ids in found]
        num_silent += not found
        num_shortened += shortened
    asked = [question for question in wanted if len(question.prompt_ids) <= config.max_prompt_tokens]
    answers, num_retried, num_tokens = _ask(
        engine, [q.prompt_ids for q in asked], prompts.parse_reflection, lambda reply: bool(reply.items), config, key
    )
    replies = [reply for reply, _ in answers]
    changes = [question.change(item) for question, reply in zip(asked, replies, strict=True) for item in reply.items]
    malformed = [completion for reply, completion in answers if not reply.items]
    return Reflections(
        tuple(change for change in changes if change is not None),
        num_prompts=len(asked),
        num_malformed=len(malformed),
        num_tokens=num_tokens,
        num_overlong=len(wanted) - len(asked),
        num_retried=num_retried,
        num_unknown=sum(change is None for change in changes),
        num_rejected=sum(reply.num_rejected for reply in replies),
        num_groups=len(chosen),
        num_silent=num_silent,
        num_shortened=num_shortened,
        num_cut_off=sum(completion.finish_reason == "length" for completion in malformed),
        example=malformed[0].text if malformed else "",
    )


def _prompts_of(
    group: Sequence[Rollout], task: Task, listed: Sequence[MemoryItem], prompts: PromptFormat, limit: int
) -> tuple[list[list[int]], bool]:
    """Return a group's prompts, and whether they show less than the whole group so that they fit into `limit` tokens.

    If they do not fit however little is shown, they are returned whole.
    """
    known = [item.text for item in listed]
    whole = prompts.reflection(task, group, known)
    if all(len(ids) <= limit for ids in whole):
        return whole, False
    for extent in EXTENTS:
        found = prompts.reflection(task, group, known, extent)
        if all(len(ids) <= limit for ids in found):
            return found, True
    return whole, False


@dataclass(frozen=True, slots=True)
class _Question:
    """One reflection prompt, with its rollouts and the insights it lists."""

    group: Sequence[Rollout]
    prompt_ids: list[int]
    listed: tuple[MemoryItem, ...]  # the insights that the prompt lists

    def change(self, item: ParsedInsight) -> InsightChange | None:
        """Link an item to its attempts and to the insight it changes; None if the prompt lists no such insight."""
        rollout_ids = tuple(rollout.rollout_id for rollout in self.group)
        task_id = self.group[0].task_id
        successes = [rollout.verdict.correct for rollout in self.group if rollout.verdict.scored]
        share = sum(successes), len(successes)
        if item.action == "add":
            return InsightChange(task_id, item.kind, item.text, rollout_ids, "add", None, *share)
        if item.number is None or not 1 <= item.number <= len(self.listed):
            return None
        target = self.listed[item.number - 1]
        return InsightChange(task_id, target.kind, item.text, rollout_ids, item.action, target.item_id, *share)


def _ask(
    engine: Engine,
    asked: Sequence[list[int]],
    parse: Callable[[str], T],
    usable: Callable[[T], bool],
    config: ReflectionConfig,
    key: str,
) -> tuple[list[tuple[T, Completion]], int, int]:
    """Return each answer as parsed and as written, the number of retried prompts, and of generated tokens."""
    answers = [(parse(written.text), written) for written in _write(engine, asked, config, key)]
    num_tokens = sum(len(written.token_ids) for _, written in answers)
    failed = [position for position, (answer, _) in enumerate(answers) if not usable(answer)] if config.retry else []
    if failed:
        warmer = replace(config, temperature=max(config.temperature, RETRY_TEMPERATURE))
        again = _write(engine, [asked[position] for position in failed], warmer, f"{key}/again")
        for position, written in zip(failed, again, strict=True):
            answers[position] = parse(written.text), written
            num_tokens += len(written.token_ids)
    return answers, len(failed), num_tokens


def abstract(
    engine: Engine,
    clusters: Sequence[Sequence[str]],
    prompts: PromptFormat,
    config: ReflectionConfig,
    key: str,
) -> Written:
    """Write a behaviour for each cluster of insight texts; None if no prompt fits or the output is malformed."""
    wanted = [(position, _fitting(prompts, insights, config)) for position, insights in enumerate(clusters)]
    asked = [(position, ids) for position, ids in wanted if ids]
    answers, _, num_tokens = _ask(
        engine, [ids for _, ids in asked], prompts.parse_abstraction, lambda text: text is not None, config, key
    )
    behaviours: list[str | None] = [None] * len(clusters)
    for (position, _), (text, _) in zip(asked, answers, strict=True):
        behaviours[position] = text
    return Written(behaviours, num_tokens)


def _fitting(prompts: PromptFormat, insights: Sequence[str], config: ReflectionConfig) -> list[int]:
    """Return a cluster's prompt; if it is too long, that of its first half, quarter, ...; empty if none fits.

    Large clusters have the most support, so they are shortened rather than skipped; their texts are sorted by support.
    """
    ids = prompts.abstraction(insights)
    while len(ids) > config.max_prompt_tokens and len(insights) > 1:
        insights = insights[: len(insights) // 2]
        ids = prompts.abstraction(insights)
    return ids if len(ids) <= config.max_prompt_tokens else []


def _write(engine: Engine, prompts: Sequence[list[int]], config: ReflectionConfig, key: str) -> list[Completion]:
    """Generate one completion per prompt, and return them in order."""
    requests = [Request(tuple(ids), derive_seed(key, "reflect", i)) for i, ids in enumerate(prompts)]
    sampling = Sampling(config.temperature, config.max_new_tokens)
    written = engine.generate(requests, sampling, config.by)
    progress = tqdm(written, total=len(requests), desc="reflections", leave=False, delay=2.0, disable=None)
    found = dict(progress)
    return [found[position] for position in range(len(requests))]


@dataclass(frozen=True, slots=True)
class Reflector:
    """The policy as it reflects in one run: its engine, prompts, settings and tasks, and who writes behaviours."""

    engine: Engine
    prompts: PromptFormat
    config: ReflectionConfig
    tasks: Mapping[str, Task]
    seed: int
    writer: BehaviourWriter | None = None  # None: the policy itself

    def reflect(self, groups: Sequence[Sequence[Rollout]], name: str, known: Known) -> Reflections:
        """Ask what these groups teach; see `reflect`. Seeds are derived from `name`."""
        if not self.config.enabled:
            return Reflections()
        return reflect(self.engine, self.tasks, groups, self.prompts, self.config, f"{self.seed}/reflect/{name}", known)

    def abstract(self, clusters: Sequence[Sequence[str]], name: str, num_steps: int) -> Written:
        """Describe clusters of insights; see `abstract`. Seeds are derived from `name`.

        Args:
            num_steps: optimizer steps since behaviours were last written, for the limits of an external writer.
        """
        if self.writer is not None:
            return self.writer.write(clusters, num_steps)
        return abstract(self.engine, clusters, self.prompts, self.config, f"{self.seed}/abstract/{name}")

    def figures_of(self, written: Written | None) -> dict[str, float]:
        """Return the metrics of the behaviours of an update; None if none were due."""
        written = written or Written()
        if self.writer is None:
            return {"reflect/num_behaviour_tokens": float(written.num_tokens)}
        return {
            "memory/behaviour_calls": float(written.num_calls),
            "memory/behaviour_calls_failed": float(written.num_failed),
            "memory/behaviours_deferred": float(written.num_deferred),
            "memory/behaviour_writer_tokens": float(written.num_tokens),
        }
