"""`python -m pmd.bootstrap.random_model --architecture olmo3 --out DIR`: a tiny model with random weights.

Such a model learns nothing useful. It shows that a configuration, an architecture and an engine work together, without
a download.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

ARCHITECTURES = ("qwen3", "olmo3")
#: A head size of 32 is the smallest that vLLM's CPU attention supports.
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32768,
    "initializer_range": 0.1,
}
HEAD_DIM = {"qwen3": {"head_dim": 32, "tie_word_embeddings": True}, "olmo3": {}}


def make_random_model(folder: Path, architecture: str = "qwen3", seed: int = 0) -> Path:
    """Write a checkpoint with the tokenizer of the shipped exam model; return `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from pmd.tiny import shipped_model_path

    tokenizer = AutoTokenizer.from_pretrained(shipped_model_path("tiny_exam"))
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    shape = SHAPE | HEAD_DIM[architecture] | special
    config = AutoConfig.for_model(architecture, vocab_size=len(tokenizer), **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m pmd.bootstrap.random_model", description=__doc__)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="qwen3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    arguments = parser.parse_args(argv)
    print(f"wrote {make_random_model(arguments.out, arguments.architecture, arguments.seed)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
