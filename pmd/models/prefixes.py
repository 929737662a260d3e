"""Rollouts of one group begin with the same prompt: its hidden states are computed once and kept as keys and values.

Enters: right-padded sequences and, for runs of rows, how many ids their prompts share. Leaves: the same hidden states
[N, H] as `completion_hidden_states` gives, to rounding. Gradients pass through the kept keys and values, so that the
student may share as well as the teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pmd.models.logprobs import backbone, completion_hidden_states

#: A prefix pays if it saves at least this many tokens (two passes cost more overhead than one) ...
LEAST_SAVED_TOKENS = 256
#: ... and this share of the run's tokens (keys and values are copied for every row).
LEAST_SAVED_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class PrefixRun:
    """Neighbouring rows whose first `prefix` ids are the same; nothing real stands beyond column `width`."""

    start: int
    stop: int
    prefix: int  # 0: nothing is shared
    width: int

    @property
    def num_tokens(self) -> int:
        """Tokens, padding included, that the model is given."""
        return self.prefix + (self.stop - self.start) * (self.width - self.prefix)


def prefix_run(prompts: Sequence[Sequence[int]], lengths: Sequence[int], start: int = 0) -> PrefixRun:
    """Describe rows of `lengths` tokens that begin with `prompts`; the prefix is 0 where sharing would not pay.

    The prefix ends before the last token of the shortest prompt: what is scored needs a real token before it.
    """
    rows, width = len(prompts), max(lengths)
    common, first = min(len(prompt) for prompt in prompts) - 1, prompts[0]
    for prompt in prompts[1:]:
        if prompt[:common] != first[:common]:
            common = next(i for i in range(common) if prompt[i] != first[i])
    saved = (rows - 1) * common
    pays = saved >= max(LEAST_SAVED_TOKENS, LEAST_SAVED_SHARE * rows * width)
    return PrefixRun(start, start + rows, common if pays else 0, width)


def run_hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    runs: Sequence[PrefixRun],
) -> Tensor:
    """Return the hidden states that predict each completion token, [N, H], row after row; `runs` cover all rows.

    A model that cannot keep keys and values here (see `can_share_prefixes`) computes every row whole.
    """
    if not runs or not can_share_prefixes(model):
        return completion_hidden_states(model, input_ids, attention_mask, completion_mask)
    parts = []
    for run in runs:
        where = slice(run.start, run.stop), slice(run.width)
        tensors = input_ids[where], attention_mask[where], completion_mask[where]
        parts.append(
            _shared_hidden_states(model, *tensors, run.prefix)
            if run.prefix
            else completion_hidden_states(model, *tensors)
        )
    return torch.cat(parts)


def can_share_prefixes(model: PreTrainedModel) -> bool:
    """Whether all layers attend to everything before them, and no gradient checkpointing forbids a cache."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kinds == {"full_attention"} and not (model.training and model.is_gradient_checkpointing)


def _shared_hidden_states(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, prefix: int
) -> Tensor:
    forward = backbone(model)
    cache = forward(input_ids=input_ids[:1, :prefix], use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(input_ids))
    positions = torch.arange(prefix, input_ids.shape[1], device=input_ids.device)
    hidden = forward(
        input_ids=input_ids[:, prefix:],
        attention_mask=attention_mask,
        position_ids=positions.expand(len(input_ids), -1),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state  # [rows, width - prefix, H]
    return hidden[:, :-1][completion_mask[:, prefix + 1 :]]
