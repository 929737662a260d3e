"""The exam model before training: a byte-level Qwen3 of under 0.2 million parameters."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pmd.bootstrap.exam_tokenizer import END, END_OF_TEXT, MAX_POSITIONS, VOCABULARY_SIZE, make_exam_tokenizer


def make_exam_model(seed: int) -> Qwen3ForCausalLM:
    """Build the model in float32."""
    torch.manual_seed(seed)
    tokenizer = make_exam_tokenizer()
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
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
    )
    return Qwen3ForCausalLM(config)
