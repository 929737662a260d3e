"""The training loop of the shipped models.

The recipe counts steps and tokens, never seconds, so a seed gives the same model on slow and fast machines. Muon
updates the matrices, AdamW the embeddings and norms.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Qwen3ForCausalLM

from pmd.bootstrap.muon import Muon
from pmd.bootstrap.sample import Sample

#: (random stream, progress in [0, 1]) -> one sample
DrawSample = Callable[[random.Random, float], Sample]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Number of steps, batch size and learning rates."""

    steps: int
    tokens_per_batch: int  # padding included
    matrix_lr: float  # Muon
    other_lr: float  # AdamW
    warmup_steps: int = 50
    decay_from: float = 0.5  # share of the steps after which the rates decay linearly
    final_share: float = 0.02  # of the rates, at the end
    max_grad_norm: float = 1.0
    pool: int = 1024  # samples drawn at once and sorted by length, to reduce padding

    def rate(self, step: int) -> float:
        """Return the factor on the learning rates at this step."""
        left = (1 - step / self.steps) / (1 - self.decay_from)
        return min(1.0, (step + 1) / self.warmup_steps) * max(self.final_share, min(1.0, left))


def train(
    model: Qwen3ForCausalLM, draw_sample: DrawSample, recipe: Recipe, seed: int, on_step: Callable[[int, float], None]
) -> None:
    """Train in place; calls `on_step` with each step and its loss, in nats per unit of weight."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = Muon(matrices, lr=recipe.matrix_lr)
    adamw = torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    progress = Progress()
    batches = _batches(draw_sample, recipe, random.Random(seed), progress)
    model.train()
    for step in range(recipe.steps):
        progress.share = step / recipe.steps
        rate = recipe.rate(step)
        muon.param_groups[0]["lr"] = recipe.matrix_lr * rate
        adamw.param_groups[0]["lr"] = recipe.other_lr * rate
        loss = batch_loss(model, next(batches))
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        muon.step()
        adamw.step()
        on_step(step, loss.item())
    model.eval()


@dataclass(slots=True)
class Progress:
    """The progress of training, shared with the stream of samples."""

    share: float = 0.0


def _batches(
    draw_sample: DrawSample, recipe: Recipe, draw: random.Random, progress: Progress
) -> Iterator[list[Sample]]:
    while True:
        pool = sorted((draw_sample(draw, progress.share) for _ in range(recipe.pool)), key=lambda s: len(s.ids))
        batches: list[list[Sample]] = [[]]
        for sample in pool:
            if (len(batches[-1]) + 1) * len(sample.ids) > recipe.tokens_per_batch and batches[-1]:
                batches.append([])
            batches[-1].append(sample)
        draw.shuffle(batches)
        yield from batches


def batch_loss(model: Qwen3ForCausalLM, samples: list[Sample]) -> Tensor:
    """Return the weighted mean of KL(label || model) over learned tokens; cross-entropy if the label is one token."""
    length = max(len(sample.ids) for sample in samples)
    input_ids = torch.tensor([sample.ids + [0] * (length - len(sample.ids)) for sample in samples])
    learned = [(row, position, weight) for row, s in enumerate(samples) for position, weight in s.weights.items()]
    rows = torch.tensor([row for row, _, _ in learned])
    positions = torch.tensor([position for _, position, _ in learned])
    weights = torch.tensor([weight for _, _, weight in learned])
    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state  # [B, T, D]
    logits = model.lm_head(hidden[rows, positions - 1])  # [N, V], learned tokens only
    logprobs = functional.log_softmax(logits.float(), -1)
    labels = torch.zeros_like(logprobs)
    labels[torch.arange(len(learned)), input_ids[rows, positions]] = 1.0
    for index, (row, position, _) in enumerate(learned):
        uniform = samples[row].uniform_over.get(position)
        if uniform is not None and len(uniform) > 1:
            labels[index] = 0.0
            labels[index, list(uniform)] = 1 / len(uniform)
        if shares := samples[row].shares.get(position):
            labels[index] = 0.0
            labels[index, list(shares)] = torch.tensor(list(shares.values()))
    per_token = (torch.special.xlogy(labels, labels) - labels * logprobs).sum(-1)  # [N]
    return (per_token * weights).sum() / weights.sum()


def rounded_to_bfloat16(model: Qwen3ForCausalLM) -> None:
    """Round the weights in place to bfloat16 precision, as in the shipped file; they stay float32."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
