"""Rollouts, examples, modules and steps that many tests share."""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Qwen3Config, Qwen3ForCausalLM

from pmd.batch import Batch, Example, MicroBatch
from pmd.config.schema import ModelConfig, ObjectiveConfig, RolloutsConfig, RunConfig, TeacherConfig
from pmd.losses.distillation import TokenTerms
from pmd.module import PMDModule, combined_loss
from pmd.teacher import TeacherContext
from pmd.types import Completion, Rollout, Verdict

CPU = torch.device("cpu")
VERDICTS = {True: Verdict(1.0, True, "ok"), False: Verdict(0.0, False, "wrong_answer")}


def random_ids(draw: random.Random, length: int, vocabulary: int = 110) -> tuple[int, ...]:
    """Return token ids that are neither special nor beyond the tiny model's vocabulary."""
    return tuple(draw.randrange(3, vocabulary) for _ in range(length))


def make_rollout(
    number: int,
    completion_ids: Sequence[int] = (1,),
    *,
    group: int = 0,
    prompt_ids: Sequence[int] = (),
    logprobs: Sequence[float | None] | None = None,
    policy_version: int = 0,
    verdict: Verdict = VERDICTS[True],
) -> Rollout:
    """Return rollout `number` of a group; the engine's log-probs are -1 unless they are given."""
    logprobs = [-1.0] * len(completion_ids) if logprobs is None else logprobs
    completion = Completion(tuple(completion_ids), tuple(logprobs), f"answer{number}", "stop", policy_version)
    return Rollout(f"r{number}", f"g{group}", f"t{group}", tuple(prompt_ids), completion, verdict)


def make_example(
    rollout: Rollout, teacher_prompt_ids: Sequence[int], *, advantage: float = 0.5, success: str | None = "yes"
) -> Example:
    """Return the rollout with its teacher's prompt; without `success` that prompt shows nothing extra."""
    context = TeacherContext(rollout.rollout_id, tuple(teacher_prompt_ids), success=success)
    return Example(rollout, advantage, context)


def varied_examples(count: int = 8) -> list[Example]:
    """Pairs of rollouts of many lengths; some of older weights, one without a log-prob, some without context."""
    draw, made = random.Random(0), []
    for number in range(count):
        lengths = [draw.randrange(low, high) for low, high in ((4, 20), (6, 40), (1, 9))]
        prompt, shown, completion = (random_ids(draw, length) for length in lengths)
        logprobs = [-1.0, *(-draw.random() * 4 for _ in completion[1:])]
        if number == 3:
            logprobs[0] = None
        rollout = make_rollout(
            number,
            completion,
            group=number // 2,
            prompt_ids=prompt,
            logprobs=logprobs,
            policy_version=number % 2,
        )
        success = "yes" if number % 3 else None
        made.append(make_example(rollout, shown, advantage=draw.random() - 0.5, success=success))
    return made


def examples_of_one_prompt(count: int = 8, prompt_length: int = 160) -> list[Example]:
    """One group whose prompts are long enough to be computed once, for student and teacher."""
    draw = random.Random(3)
    prompt, shown = random_ids(draw, prompt_length), random_ids(draw, prompt_length + 10)
    completions = [random_ids(draw, draw.randrange(1, 9)) for _ in range(count)]
    return [make_example(make_rollout(n, ids, prompt_ids=prompt), shown) for n, ids in enumerate(completions)]


def tiny_module(
    objective: ObjectiveConfig | None = None,
    *,
    teacher: TeacherConfig | None = None,
    rollouts: RolloutsConfig | None = None,
    optimizer: Any = None,
    **model: Any,
) -> PMDModule:
    """Return the module of a run on the shipped tiny model; `model` holds fields of ModelConfig."""
    sections = {"objective": objective, "teacher": teacher, "rollouts": rollouts, "optimizer": optimizer}
    given = {name: section for name, section in sections.items() if section is not None}
    return PMDModule(RunConfig(model=ModelConfig(path="tiny", **{"lora_rank": 4} | model), **given))


def small_qwen(vocabulary: int = 50, **changes: Any) -> Qwen3ForCausalLM:
    """Return a random two-layer Qwen3 in float32 and eval mode, the same at every call."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
    }  # fmt: skip
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, **shape | changes)).eval()


@dataclass(frozen=True)
class Backward:
    """What one backward pass over a step's micro-batches gave, beside the gradient that lies in the parameters."""

    scored: list[tuple[MicroBatch, TokenTerms]]
    totals: dict[str, float]  # loss parts and entropy, summed over micro-batches


def backward(module: PMDModule, examples: Iterable[Example]) -> Backward:
    """Take the gradient of a step as `training_step` does; nothing is updated."""
    module.zero_grad()
    scored, totals = [], defaultdict[str, float](float)
    for micro_batch in Batch(tuple(examples), 0, 0).micro_batches(module.layout, CPU):
        terms = module._score(micro_batch)
        loss = combined_loss(terms, micro_batch.tokens, module.policy_version, module.objective)
        loss.total.backward()
        entropy = float((terms.entropy * micro_batch.tokens.token_weights).sum())
        for name, value in (loss.parts | {"student/entropy": entropy}).items():
            totals[name] += value
        scored.append((micro_batch, terms))
    return Backward(scored, dict(totals))


def trained(module: PMDModule) -> dict[str, torch.nn.Parameter]:
    """Return the trainable parameters by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def gradient_of(module: PMDModule) -> Tensor:
    """Return the gradient that lies in the trainable parameters, as one vector."""
    return torch.cat([p.grad.flatten() for p in trained(module).values() if p.grad is not None])


def take_steps(
    module: PMDModule, batches: Sequence[Sequence[Example]], *callbacks: Callback, **options: Any
) -> Trainer:
    """Take one optimizer step on each batch of examples under Lightning's trainer, as a run does."""
    metrics = {"rollout/reward": 0.5, "rollout/mean_length": 5.0}
    made = [Batch(tuple(rows), 0, step, metrics) for step, rows in enumerate(batches)]
    return fit_batches(module, made, *callbacks, **options)


def fit_batches(
    module: PMDModule,
    batches: Sequence[Batch],
    *callbacks: Callback,
    max_steps: int = -1,
    resume_from: Path | None = None,
    plugins: Any = None,
) -> Trainer:
    """Take one optimizer step on each batch, as long as `max_steps` allows; in a second epoch if resumed."""
    trainer = Trainer(
        max_epochs=2 if resume_from else 1, max_steps=max_steps, accelerator="cpu", devices=1, logger=False,
        callbacks=list(callbacks), plugins=plugins,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(list(batches), batch_size=None), ckpt_path=resume_from)
    return trainer
