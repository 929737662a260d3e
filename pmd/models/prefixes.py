"""Rollouts of one group begin with the same prompt: it is computed once and kept as keys and values.

Gradients pass through the kept keys and values, so that the student may share as well as the teacher.
"""

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from pmd.models.sequences import SharedPrefixes


def can_share_prefixes(model: PreTrainedModel) -> bool:
    """Whether all layers attend to everything before them, and no gradient checkpointing forbids a cache."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kinds == {"full_attention"} and not (model.training and model.is_gradient_checkpointing)


class KeptPrefixes:
    """Keys and values of prefixes, from which any rows go on."""

    def __init__(self, backbone: nn.Module, prefixes: SharedPrefixes):
        """Compute the prefixes [P, W], padded on the left, in one pass."""
        real = prefixes.attention_mask
        positions = (real.cumsum(1) - 1).clamp(min=0)
        self.cache = backbone(
            input_ids=prefixes.input_ids, attention_mask=real, position_ids=positions, use_cache=True
        ).past_key_values
        self.backbone, self.prefixes = backbone, prefixes

    def states(self, rows: slice, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the final hidden states [B, L, H] of the batch's `rows`, padded on the right."""
        of_row = self.prefixes.of_row[rows]
        before = self.prefixes.attention_mask[of_row]
        kept = ((layer.keys[of_row], layer.values[of_row]) for layer in self.cache.layers)
        return self.backbone(
            input_ids=input_ids,
            attention_mask=torch.cat([before, attention_mask], dim=1),
            position_ids=before.sum(1, keepdim=True) + torch.arange(input_ids.shape[1], device=input_ids.device),
            past_key_values=DynamicCache(kept),
            use_cache=True,
        ).last_hidden_state
