"""Rows of a batch one behind the other in a single row, without padding, where the attention can tell them apart.

Enters: padded rows. Leaves: the hidden states that predict each completion token. transformers sees from positions that
start anew where a row begins: flash attention then works on each row by itself (varlen); other implementations build a
mask of the whole length squared, which is right and slow.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from pmd.models.sequences import Sequences


def packs_rows(model: PreTrainedModel) -> bool:
    """Whether packing saves work under the model's attention implementation (`model.attention`)."""
    return is_flash_attention_requested(model.config)


def packed_states(backbone: nn.Module, sequences: Sequences) -> Tensor:
    """Return the final hidden states that predict each completion token, [N, H], row after row."""
    real = sequences.attention_mask.bool()
    positions = sequences.attention_mask.cumsum(1) - 1
    hidden = backbone(
        input_ids=sequences.input_ids[real][None], position_ids=positions[real][None], use_cache=False
    ).last_hidden_state[0]  # [real tokens, H]
    predicts = torch.zeros_like(real)
    predicts[:, :-1] = sequences.completion_mask[:, 1:]
    return hidden[predicts[real]]
