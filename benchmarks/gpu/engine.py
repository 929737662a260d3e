"""The whole step with vLLM on the trainer's GPU: Qwen3-8B, LoRA rank 32, 256 rollouts of 1,024 tokens; by part.

Figures: the start of vLLM; what sharing the base saves; seconds of a step by part; the engine beside vLLM called alone,
with and without a seed for each request; sleep, wake and sync. Weights are random, so all rollouts have full length.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pmd.bootstrap.random_model import make_random_model
from pmd.callbacks.sync import WeightSyncCallback
from pmd.cli.run import Run, build
from pmd.config.load import load_config
from pmd.engines.base import Request, Sampling
from pmd.engines.vllm import VLLMEngine
from pmd.planning.bench import measure_steps, summarise
from pmd.planning.engine_bench import measure_engine
from pmd.run_dir import RunDir

QWEN3_8B = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS = Path(__file__).parents[2] / "configs"
GROUP_SIZE = 8


def measure(device: str, quick: bool) -> Iterator[dict[str, Any]]:
    """Yield the figures, more each time."""
    shared_memory = Path("/dev/shm")
    parent = shared_memory if not quick and shared_memory.is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="pmd-bench-", dir=parent))
    try:
        yield from _measure(device, quick, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measure(device: str, quick: bool, folder: Path) -> Iterator[dict[str, Any]]:
    tasks, tokens, steps = (2, 16, 1) if quick else (32, 1024, 1)
    found: dict[str, Any] = {"rollouts": tasks * GROUP_SIZE, "tokens_each": tokens}
    started = time.perf_counter()
    model = write_model(folder / "model", quick)
    found["write_model_s"] = time.perf_counter() - started
    run = start(device, model, write_questions(folder, 2 * tasks * (steps + 1)), tasks, tokens, steps)
    engine = run.data.engine
    assert isinstance(engine, VLLMEngine)
    with closing(engine):
        found |= {"start_s": dict(engine.runtime.seconds), "shared_gb": shared_bytes(run, engine) / 1e9}
        found["vllm"] = {"version": engine.runtime.version, "fraction": engine.runtime.settings.memory_fraction}
        yield found
        callbacks = [WeightSyncCallback(engine, run.parity)]
        step = summarise(
            measure_steps(run.module, run.data, steps + 1, "gpu" if device == "cuda" else "cpu", callbacks)
        )
        kept = ("step_s", "tokens_per_s", "training_tokens_per_s", "rollout_tokens_per_s", "mfu", "peak_memory_gb")
        found["step"] = step["seconds"] | {name: step[name] for name in (*kept, "reserved_memory_gb")}
        turns = ("sleep", "wake", "sync")
        found["step"]["sleep_wake_sync_s"] = sum(step["seconds"].get(part, 0.0) for part in turns)
        yield found
        for name, seeded in (("one_stream", False), ("request_seeds", True)):
            engine.runtime.settings = replace(engine.runtime.settings, request_seeds=seeded)
            found[name] = measure_engine(engine, batches_of(run), Sampling(1.0, tokens))
            yield found


def start(device: str, model: Path, questions: Path, tasks: int, tokens: int, steps: int) -> Run:
    """Build the run that `configs/qwen3_8b.yaml` describes, on made-up questions."""
    files = [CONFIGS / "qwen3_8b.yaml", *([CONFIGS / "overlays" / "cpu_vllm.yaml"] if device == "cpu" else [])]
    overrides = {
        "model.path": model,
        "data.path": questions,
        "data.max_train": tasks * (steps + 1),
        "rollouts.tasks_per_step": tasks,
        "rollouts.group_size": GROUP_SIZE,
        "rollouts.max_new_tokens": tokens,
        "rollouts.vllm.max_num_seqs": min(256, tasks * GROUP_SIZE),
    }
    loaded = load_config(files, [f"{key}={value}" for key, value in overrides.items()])
    return build(loaded.run, RunDir(Path(tempfile.mkdtemp(prefix="pmd-run-"))))


def batches_of(run: Run) -> list[list[Request]]:
    """Return a small batch to warm up, and one of a whole step."""
    tasks = run.tasks["train"][: run.config.rollouts.tasks_per_step]
    prompts = [run.data.prompts.student(task) for task in tasks for _ in range(GROUP_SIZE)]
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    return [requests[:GROUP_SIZE], requests]


def shared_bytes(run: Run, engine: VLLMEngine) -> int:
    """Return the bytes of the trainer's weights that are vLLM's own."""
    held = {tensor.untyped_storage().data_ptr() for tensor in engine.runtime.weights().tensors.values()}
    shared = {p.data_ptr(): p for p in run.module.parameters() if p.untyped_storage().data_ptr() in held}
    return sum(parameter.numel() * parameter.element_size() for parameter in shared.values())


def write_model(folder: Path, quick: bool) -> Path:
    """Write a model with random weights: tiny, or of Qwen3-8B's shape, built on the device."""
    make_random_model(folder)
    if not quick:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(
            "qwen3", max_position_embeddings=40960, eos_token_id=258, pad_token_id=256, **QWEN3_8B
        )
        with torch.device("cuda"):
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        torch.cuda.empty_cache()
    return folder


def write_questions(folder: Path, count: int) -> Path:
    """Write made-up questions in SciKnowEval's format; answers are right only by chance."""
    rows = [
        {
            "question": f"Which element has {number} protons?",
            "choices": {"text": ["helium", "boron", "neon", "iron"], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[number % 4],
            "type": "mcq-4-choices",
            "domain": "Chemistry",
            "details": {"level": "L3", "task": "t", "subtask": "s"},
        }
        for number in range(count)
    ]
    path = folder / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path
