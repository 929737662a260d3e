"""The policy reflects: verified groups -> insights; clusters of insights -> behaviours (paper, levels 1 and 2).

Enters: groups of rollouts with verdicts. Leaves: drafts of memory lines, tied by id to the attempts they came from.
Works without Lightning; nothing is written here. Malformed output is dropped and counted, never guessed at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from pmd.config import ReflectionConfig
from pmd.prompts.format import PromptFormat
from pmd.rollouts.engine import Engine, Request, Sampling
from pmd.seeds import derive_seed
from pmd.types import InsightDraft, Rollout, Task


@dataclass(frozen=True, slots=True)
class Reflections:
    """What one round of reflection gave, and what it cost."""

    drafts: tuple[InsightDraft, ...]
    num_prompts: int
    num_malformed: int
    num_tokens: int  # generated
    num_overlong: int = 0  # prompts that were not asked: above reflection.max_prompt_tokens


def reflect(
    engine: Engine,
    tasks: Mapping[str, Task],
    groups: Sequence[Sequence[Rollout]],
    prompts: PromptFormat,
    config: ReflectionConfig,
    key: str,
) -> Reflections:
    """Ask the policy what each group of verified rollouts teaches. `key` names the occasion; seeds derive from it."""
    chosen = list(groups)
    if config.max_groups is not None and len(chosen) > config.max_groups:
        chosen = Random(derive_seed(key, "groups")).sample(chosen, config.max_groups)
    wanted = [(group, ids) for group in chosen for ids in prompts.reflection(tasks[group[0].task_id], group)]
    asked = [(group, ids) for group, ids in wanted if len(ids) <= config.max_prompt_tokens]
    texts, num_tokens = _write(engine, [ids for _, ids in asked], config, key)
    drafts, num_malformed = [], 0
    for (group, _), text in zip(asked, texts, strict=True):
        lines = prompts.parse_reflection(text)
        num_malformed += not lines
        rollout_ids = tuple(rollout.rollout_id for rollout in group)
        drafts += [InsightDraft(group[0].task_id, kind, line, rollout_ids) for kind, line in lines]
    return Reflections(tuple(drafts), len(asked), num_malformed, num_tokens, len(wanted) - len(asked))


def abstract(
    engine: Engine,
    clusters: Sequence[Sequence[str]],
    prompts: PromptFormat,
    config: ReflectionConfig,
    key: str,
) -> list[str | None]:
    """Return the behaviour behind each cluster of insight texts; None where there is none or it is malformed."""
    wanted = [(position, prompts.abstraction(insights)) for position, insights in enumerate(clusters)]
    asked = [(position, ids) for position, ids in wanted if 0 < len(ids) <= config.max_prompt_tokens]
    texts, _ = _write(engine, [ids for _, ids in asked], config, key)
    behaviours: list[str | None] = [None] * len(clusters)
    for (position, _), text in zip(asked, texts, strict=True):
        behaviours[position] = prompts.parse_abstraction(text)
    return behaviours


def _write(engine: Engine, prompts: Sequence[list[int]], config: ReflectionConfig, key: str) -> tuple[list[str], int]:
    """Generate one text per prompt; return the texts in order and the number of tokens generated."""
    requests = [Request(tuple(ids), derive_seed(key, "reflect", i)) for i, ids in enumerate(prompts)]
    sampling = Sampling(config.temperature, config.max_new_tokens)
    texts, num_tokens = [""] * len(requests), 0
    for position, completion in engine.generate(requests, sampling, config.by):
        texts[position] = completion.text
        num_tokens += len(completion.token_ids)
    return texts, num_tokens
