"""Builds the exam model, a byte-level Qwen3 of under 0.2 million parameters, and sharpens it after training."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pmd.bootstrap.exam_tokenizer import END_ID, END_OF_TEXT_ID, MAX_POSITIONS, VOCABULARY_SIZE

SHARPNESS = 2.0


def make_exam_model(seed: int) -> Qwen3ForCausalLM:
    """Build the model in float32."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=END_OF_TEXT_ID,
    )
    return Qwen3ForCausalLM(config)


@torch.no_grad()
def sharpen(model: Qwen3ForCausalLM) -> None:
    """Scale the logits so that sampling at temperature 1 equals sampling at 1 / SHARPNESS before.

    A model this small gives wrong bytes a little probability, and one wrong byte can spoil an answer. The uniform
    distribution over the letters does not change.
    """
    model.get_parameter("model.norm.weight").mul_(SHARPNESS)
