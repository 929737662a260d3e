"""Rollouts through our engine and through vLLM called directly, or whole training steps with vLLM on the same device.

`--part ratio` (the default): tokens per second of both, and their ratio. Both use the same vLLM engine in this process
with the same prompts, seeds, adapter and log-probs; rounds alternate, and the ratio is that of the medians. Sync, sleep
and wake are timed as well. `--part step`: steps of `configs/qwen3_8b.yaml` on made-up questions with random weights, by
part: rollouts, sleep, teacher and student, wake, sync, parity check.

On a CPU the model is tiny. With a CUDA device,

    python benchmarks/bench_rollouts.py --shape qwen3_8b --requests 256 --tokens 1024
    python benchmarks/bench_rollouts.py --shape qwen3_8b --requests 256 --tokens 1024 --part step

use a Qwen3-8B with random weights (16 GB on disk); benchmarks/gpu/run.py does both, and more. Measured on a busy 2-core
Linux machine without a GPU, one thread: ratio 0.989 with `--rounds 15` (6,277 and 6,346 tokens/s; a tiny model is the
worst case for the engine's overhead); 1.50 s per step with `--part step --tokens 64`.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from questions import make_questions

from pmd.bootstrap.random_model import make_random_model
from pmd.config.schema import ModelConfig, TeacherConfig
from pmd.engines.base import Request, Sampling
from pmd.engines.vllm import VLLMEngine
from pmd.engines.vllm_runtime import EngineSettings, VLLMRuntime
from pmd.planning.engine_bench import measure_engine
from pmd.policy import make_policy
from pmd.pretrained import load_base, load_tokenizer

QWEN3_8B = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["ratio", "step"], default="ratio")
    parser.add_argument("--shape", choices=["tiny", "qwen3_8b"], default="tiny")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64, help="tokens in a prompt; 8 completions share one")
    parser.add_argument("--rounds", type=int, default=7, help="for --part ratio")
    parser.add_argument("--steps", type=int, default=3, help="for --part step, after a warm-up step")
    arguments = parser.parse_args()
    measure = {"ratio": run, "step": colocated_step}[arguments.part]
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, make_model(Path(folder) / "model", arguments.shape))


def make_model(folder: Path, shape: str) -> Path:
    make_random_model(folder)
    if shape == "qwen3_8b":
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(
            "qwen3", max_position_embeddings=40960, eos_token_id=258, pad_token_id=256, **QWEN3_8B
        )
        with torch.device("cuda"):
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        torch.cuda.empty_cache()  # vLLM shares the GPU
    return folder


def run(arguments: argparse.Namespace, folder: Path) -> None:
    on_gpu = torch.cuda.is_available()
    model = ModelConfig(path=str(folder), finetune="lora", lora_rank=16, dtype="bfloat16" if on_gpu else "float32")
    tokenizer = load_tokenizer(model)
    policy = make_policy(load_base(model), model, TeacherConfig())
    settings = EngineSettings(
        model=str(folder), dtype=model.dtype, max_model_len=arguments.prompt + arguments.tokens,
        max_num_seqs=min(256, arguments.requests), memory_fraction=0.6,
        kv_cache_memory_bytes=None if on_gpu else 256 << 20, block_size=None if on_gpu else 32, enforce_eager=False,
        quantization="none", sleep=True, shares_weights=False,
        request_seeds=True, num_adapters=1, lora_rank=16, seed=0, on_gpu=on_gpu, stall_s=600.0,
    )  # fmt: skip
    engine = VLLMEngine(policy, tokenizer, VLLMRuntime(settings))
    draw = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(0, 250, (arguments.prompt,), generator=draw).tolist()) for _ in range(10**4)]
    batches = [
        [Request(prompts[(number * arguments.requests + i // 8) % 10**4], i) for i in range(arguments.requests)]
        for number in range(arguments.rounds + 1)
    ]
    found = measure_engine(engine, batches, Sampling(1.0, arguments.tokens))
    print(
        f"ours {found['tokens_per_s']:.0f} tokens/s, vLLM directly {found['vllm_tokens_per_s']:.0f} tokens/s, "
        f"ratio {found['share_of_vllm']:.3f}"
    )
    for name in ("sync", "sleep", "wake"):
        note = "" if on_gpu or name == "sync" else " (nothing to do on a CPU)"
        print(f"{name}: {found[f'{name}_s']:.3f} s{note}")
    engine.close()


def colocated_step(arguments: argparse.Namespace, folder: Path) -> None:
    """Take training steps with 8 rollouts per task, as `fit` does, and print the seconds of each part."""
    from pmd.cli.bench import main as bench

    tasks = max(1, arguments.requests // 8)
    sizes = {
        "model.path": folder,
        "data.path": make_questions(folder.parent, 2 * tasks * (arguments.steps + 1)),
        "data.max_train": tasks * (arguments.steps + 1),
        "rollouts.tasks_per_step": tasks,
        "rollouts.group_size": 8,
        "rollouts.max_new_tokens": arguments.tokens,
        "rollouts.vllm.max_num_seqs": min(256, arguments.requests),
        "memory.embedder": "hash",  # nothing is downloaded
    }
    files = ["--config", "configs/qwen3_8b.yaml"]
    if not torch.cuda.is_available():
        files += ["--config", "configs/overlays/cpu_vllm.yaml"]
    bench([*files, *(f"--{key}={value}" for key, value in sizes.items()), f"--steps={arguments.steps}"])


if __name__ == "__main__":
    main()
