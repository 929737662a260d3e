"""Random rollouts and models, for measurements without weights, data or generation."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
from torch.utils.data import IterableDataset

from pmd.batch import Batch, Example
from pmd.config.schema import ModelConfig
from pmd.pretrained import DTYPES, load_model_config, load_tokenizer
from pmd.teacher import TeacherContext
from pmd.types import Completion, Rollout, Verdict


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths in tokens. Those of completions are drawn between the two bounds, short ones more often."""

    prompt: int
    teacher_prompt: int
    min_completion: int
    max_completion: int


def synthetic_examples(num_groups: int, group_size: int, lengths: Lengths, vocabulary: int) -> list[Example]:
    """Return examples of random ids; a group shares both prompts, as real ones do up to the demonstration."""
    draw, examples = Random(0), []

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, vocabulary) for _ in range(length))

    for group in range(num_groups):
        prompt, teacher_prompt = ids(lengths.prompt), ids(lengths.teacher_prompt)
        for number in range(group_size):
            spread = lengths.max_completion - lengths.min_completion
            completion = ids(lengths.min_completion + int(spread * draw.random() ** 2))
            record = Completion(completion, (-1.0,) * len(completion), "", "stop", 0)
            verdict = Verdict(float(number % 2), number % 2 == 1, "ok" if number % 2 else "wrong_answer")
            rollout = Rollout(f"{group}#{number}", f"{group}", f"{group}", prompt, record, verdict)
            context = TeacherContext(rollout.rollout_id, teacher_prompt, success="shown")
            examples.append(Example(rollout, number % 2 - 0.5, context))
    return examples


class FixedBatches(IterableDataset):
    """Yields the same examples in every step."""

    def __init__(self, examples: list[Example], steps: int):
        self.examples = tuple(examples)
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.steps):
            yield Batch(self.examples, 0, step, {"rollout/reward": 0.5})


def write_random_model(config: ModelConfig, folder: Path) -> ModelConfig:
    """Write a model of the same architecture with random weights, and its tokenizer; return a config with its path.

    Only config.json and the tokenizer are read from `config.path`, a directory or a model on the Hub.
    """
    from transformers import AutoModelForCausalLM

    architecture = load_model_config(config)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(architecture, dtype=DTYPES[config.dtype])
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()  # or its memory would count as taken when the GPU is divided
    load_tokenizer(config).save_pretrained(folder)
    return replace(config, path=str(folder))
