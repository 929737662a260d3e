"""What sharing a prompt saves: a group's hidden states, with whole rows and with the prompt computed once.

    python benchmarks/bench_prefix.py                                     # the teacher: no gradient
    python benchmarks/bench_prefix.py --gradient                          # the student: forward and backward

Random weights of a Qwen3 shape. Each variant runs once to warm up; then they alternate and the lowest processor time
counts, which a busy machine distorts less than the wall clock.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pmd.batch import Pair, pad_after_prefixes, pad_sequences
from pmd.scoring import completion_hidden_states


def make_model(arguments: argparse.Namespace) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=1000,
        hidden_size=arguments.hidden,
        intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=max(1, arguments.hidden // 128),
        head_dim=64,
    )
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    return Qwen3ForCausalLM(config).to(arguments.device, dtype).eval()


def make_group(arguments: argparse.Namespace) -> list[Pair]:
    prompt = torch.randint(1, 1000, (arguments.prompt,)).tolist()
    return [(prompt, torch.randint(1, 1000, (arguments.completion,)).tolist()) for _ in range(arguments.group)]


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=2000)
    parser.add_argument("--completion", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--gradient", action="store_true", help="the student: forward and backward")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, group, device = make_model(arguments), make_group(arguments), torch.device(arguments.device)
    variants = {
        "whole": pad_sequences(group, 0, device),
        "shared": pad_after_prefixes(group, [0] * len(group), 0, device),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    hidden = {}
    for _ in range(1 + arguments.repeats):
        for name, sequences in variants.items():
            started = clock(arguments.device)
            with torch.set_grad_enabled(arguments.gradient):
                hidden[name] = completion_hidden_states(model, sequences)
                if arguments.gradient:
                    hidden[name].square().sum().backward()
            seconds[name].append(clock(arguments.device) - started)
    lowest = {name: min(times[1:]) for name, times in seconds.items()}
    result = {
        "whole_s": lowest["whole"],
        "shared_s": lowest["shared"],
        "speedup": lowest["whole"] / lowest["shared"],
        "largest_difference": (hidden["whole"] - hidden["shared"]).abs().max().item(),
    }
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(vars(arguments) | result, indent=1, default=str))


if __name__ == "__main__":
    main()
