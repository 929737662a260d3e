"""Plain batched generation for the probes: no engine, no log-probs.

Continuations include the end-of-sequence token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

#: Prompt tokens in a batch, padding included: short prompts share large batches, and long ones get little padding.
MAX_BATCH_TOKENS = 8192


def greedy(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos: int) -> list[list[int]]:
    """Return the greedy continuation of each prompt."""
    return _continue(model, prompts, max_new_tokens, eos, None)


def sampled(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos: int, seed: int
) -> list[list[int]]:
    """Return one continuation of each prompt, sampled at temperature 1."""
    return _continue(model, prompts, max_new_tokens, eos, torch.Generator().manual_seed(seed))


def next_token_probabilities(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Return the distribution after each prompt, [N, V], float32."""
    rows: list[Tensor] = [torch.empty(0)] * len(prompts)
    for chosen in _batches(prompts):
        input_ids, attention_mask = _left_padded([prompts[index] for index in chosen])
        with torch.inference_mode():
            output = model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=_positions(attention_mask),
                use_cache=False,
                logits_to_keep=1,
            )
        for index, row in zip(chosen, output.logits[:, -1].float().softmax(-1), strict=True):
            rows[index] = row
    return torch.stack(rows)


@torch.inference_mode()
def _continue(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos: int,
    generator: torch.Generator | None,
) -> list[list[int]]:
    written: list[list[int]] = [[] for _ in prompts]
    for chosen in _batches(prompts):
        input_ids, attention_mask = _left_padded([prompts[index] for index in chosen])
        position_ids, cache, done = _positions(attention_mask), None, torch.zeros(len(chosen), dtype=torch.bool)
        for _ in range(max_new_tokens):
            output = model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            logits = output.logits[:, -1].float()
            if generator is None:
                next_ids = logits.argmax(-1)
            else:
                next_ids = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
            for index, token, ended in zip(chosen, next_ids.tolist(), done.tolist(), strict=True):
                if not ended:
                    written[index].append(token)
            done |= next_ids == eos
            if done.all():
                break
            input_ids = next_ids[:, None]
            attention_mask = torch.cat([attention_mask, torch.ones(len(chosen), 1, dtype=torch.long)], 1)
            position_ids = attention_mask.sum(1, keepdim=True) - 1
    return written


def _batches(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return batches of prompt indices, short prompts first."""
    batches: list[list[int]] = [[]]
    for index in sorted(range(len(prompts)), key=lambda index: len(prompts[index])):
        if batches[-1] and (len(batches[-1]) + 1) * len(prompts[index]) > MAX_BATCH_TOKENS:
            batches.append([])
        batches[-1].append(index)
    return batches


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    length = max(len(prompt) for prompt in prompts)
    input_ids = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    attention_mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return input_ids, attention_mask


def _positions(attention_mask: Tensor) -> Tensor:
    return (attention_mask.cumsum(1) - 1).clamp(min=0)
