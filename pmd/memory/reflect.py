"""Reflection by the policy: verified groups -> insights; clusters of insights -> behaviours (paper, levels 1 and 2).

A reflection proposes changes to a task's insights, linked by id to the attempts they came from. A malformed output is
retried once, then dropped and counted; its meaning is never guessed. Works without Lightning and writes nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TypeVar

from tqdm.auto import tqdm

from pmd.config.schema import ReflectionConfig
from pmd.engines.base import Engine, Request, Sampling
from pmd.seeds import derive_seed
from pmd.tasks.prompts.base import PromptFormat
from pmd.tasks.prompts.parsing import ParsedInsight
from pmd.types import InsightChange, MemoryItem, Rollout, Task

RETRY_TEMPERATURE = 0.7  # greedy decoding would repeat the same output
MAX_KNOWN = 12  # insights of one task listed in a reflection prompt
T = TypeVar("T")
Known = Callable[[str], Sequence[MemoryItem]]  # task id -> the insights that a reflection on it may change


@dataclass(frozen=True, slots=True)
class Reflections:
    """The result and the cost of one round of reflection."""

    changes: tuple[InsightChange, ...] = ()
    num_prompts: int = 0
    num_malformed: int = 0  # outputs without a single well-formed item
    num_tokens: int = 0  # generated
    num_overlong: int = 0  # prompts skipped because they exceed reflection.max_prompt_tokens
    num_retried: int = 0  # malformed at first, and retried
    num_unknown: int = 0  # changes to an insight that the prompt does not list; dropped
    num_rejected: int = 0  # malformed or surplus items, in any output

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
    for group in chosen:
        task, listed = tasks[group[0].task_id], tuple(known(group[0].task_id)[:MAX_KNOWN])
        wanted += [_Question(group, ids, listed) for ids in prompts.reflection(task, group, [i.text for i in listed])]
    asked = [question for question in wanted if len(question.prompt_ids) <= config.max_prompt_tokens]
    answers, num_retried, num_tokens = _ask(
        engine, [q.prompt_ids for q in asked], prompts.parse_reflection, lambda reply: bool(reply.items), config, key
    )
    changes = [question.change(item) for question, reply in zip(asked, answers, strict=True) for item in reply.items]
    return Reflections(
        tuple(change for change in changes if change is not None),
        len(asked),
        sum(not reply.items for reply in answers),
        num_tokens,
        len(wanted) - len(asked),
        num_retried,
        sum(change is None for change in changes),
        sum(reply.num_rejected for reply in answers),
    )


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
) -> tuple[list[T], int, int]:
    """Return the parsed answers, the number of retried prompts, and the number of generated tokens."""
    texts, num_tokens = _write(engine, asked, config, key)
    answers = [parse(text) for text in texts]
    failed = [position for position, answer in enumerate(answers) if not usable(answer)] if config.retry else []
    if failed:
        again = replace(config, temperature=max(config.temperature, RETRY_TEMPERATURE))
        texts, more = _write(engine, [asked[position] for position in failed], again, f"{key}/again")
        num_tokens += more
        for position, text in zip(failed, texts, strict=True):
            answers[position] = parse(text)
    return answers, len(failed), num_tokens


def abstract(
    engine: Engine,
    clusters: Sequence[Sequence[str]],
    prompts: PromptFormat,
    config: ReflectionConfig,
    key: str,
) -> list[str | None]:
    """Return the behaviour for each cluster of insight texts; None if no prompt fits or the output is malformed."""
    wanted = [(position, _fitting(prompts, insights, config)) for position, insights in enumerate(clusters)]
    asked = [(position, ids) for position, ids in wanted if ids]
    texts, _, _ = _ask(
        engine, [ids for _, ids in asked], prompts.parse_abstraction, lambda text: text is not None, config, key
    )
    behaviours: list[str | None] = [None] * len(clusters)
    for (position, _), text in zip(asked, texts, strict=True):
        behaviours[position] = text
    return behaviours


def _fitting(prompts: PromptFormat, insights: Sequence[str], config: ReflectionConfig) -> list[int]:
    """Return a cluster's prompt; if it is too long, that of its first half, quarter, ...; empty if none fits.

    Large clusters have the most support, so they are shortened rather than skipped; their texts are sorted by support.
    """
    ids = prompts.abstraction(insights)
    while len(ids) > config.max_prompt_tokens and len(insights) > 1:
        insights = insights[: len(insights) // 2]
        ids = prompts.abstraction(insights)
    return ids if len(ids) <= config.max_prompt_tokens else []


def _write(engine: Engine, prompts: Sequence[list[int]], config: ReflectionConfig, key: str) -> tuple[list[str], int]:
    """Generate one text per prompt; return the texts in order and the number of tokens generated."""
    requests = [Request(tuple(ids), derive_seed(key, "reflect", i)) for i, ids in enumerate(prompts)]
    sampling = Sampling(config.temperature, config.max_new_tokens)
    texts, num_tokens = [""] * len(requests), 0
    written = engine.generate(requests, sampling, config.by)
    for position, completion in tqdm(
        written, total=len(requests), desc="reflections", leave=False, delay=2.0, disable=None
    ):
        texts[position] = completion.text
        num_tokens += len(completion.token_ids)
    return texts, num_tokens


@dataclass(frozen=True, slots=True)
class Reflector:
    """The policy as it reflects in one run: its engine, prompts, settings and tasks."""

    engine: Engine
    prompts: PromptFormat
    config: ReflectionConfig
    tasks: Mapping[str, Task]
    seed: int

    def reflect(self, groups: Sequence[Sequence[Rollout]], name: str, known: Known) -> Reflections:
        """Ask what these groups teach; see `reflect`. Seeds are derived from `name`."""
        if not self.config.enabled:
            return Reflections()
        return reflect(self.engine, self.tasks, groups, self.prompts, self.config, f"{self.seed}/reflect/{name}", known)

    def abstract(self, clusters: Sequence[Sequence[str]], name: str) -> list[str | None]:
        """Describe clusters of insights; see `abstract`. Seeds are derived from `name`."""
        return abstract(self.engine, clusters, self.prompts, self.config, f"{self.seed}/abstract/{name}")
