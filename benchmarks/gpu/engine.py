"""The whole step with vLLM on the trainer's GPU: Qwen3-8B, LoRA rank 32, 256 rollouts of 1,024 tokens; by part.

Figures: the start of vLLM; what sharing the base saves; sleep, wake and sync; seconds of a step by part; the engine
beside vLLM called alone, with and without a seed for each request. Weights are random, so all rollouts have full
length. A stage that fails says why, and the others go on.
"""

import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.bench_rollouts import make_model, make_questions
from pmd.callbacks.sync import WeightSyncCallback
from pmd.cli.run import Run, build
from pmd.config.load import LoadedConfig, load_config
from pmd.engines.base import Request, Sampling
from pmd.engines.vllm import VLLMEngine
from pmd.planning.bench import measure_steps, summarise
from pmd.planning.engine_bench import measure_engine, measure_turns
from pmd.run_dir import RunDir

CONFIGS = Path(__file__).parents[2] / "configs"
GROUP_SIZE = 8


def measure(device: str, quick: bool) -> Iterator[dict[str, Any]]:
    """Yield the figures, more each time."""
    shared_memory = Path("/dev/shm")
    parent = shared_memory if not quick and shared_memory.is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="pmd-bench-", dir=parent))
    try:
        yield from measure_in(folder, device, quick)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure_in(folder: Path, device: str, quick: bool, num_tasks: int = 32) -> Iterator[dict[str, Any]]:
    """The same with the weights in a folder, and with steps of `num_tasks` x 8 rollouts."""
    tasks, tokens, steps = (2, 16, 1) if quick else (num_tasks, 1024, 1)
    found: dict[str, Any] = {"rollouts": tasks * GROUP_SIZE, "tokens_each": tokens}
    started = time.perf_counter()
    model = make_model(folder / "model", "tiny" if quick else "qwen3_8b")
    found["write_model_s"] = time.perf_counter() - started
    run = start(device, model, make_questions(folder, 2 * tasks * (steps + 1)), tasks, tokens, steps)
    engine = run.data.engine
    assert isinstance(engine, VLLMEngine)
    with closing(engine):
        found |= {"start_s": dict(engine.runtime.seconds), "shared_gb": shared_bytes(run, engine) / 1e9}
        found["vllm"] = {"version": engine.runtime.version, "fraction": engine.runtime.settings.memory_fraction}
        yield found
        stages: dict[str, Callable[[], dict[str, float]]] = {
            "turns": lambda: measure_turns(engine),
            "step": lambda: measure_colocated(run, engine, device, steps),
            "one_stream": lambda: measure_sampling(run, engine, tokens, seeded=False),
            "request_seeds": lambda: measure_sampling(run, engine, tokens, seeded=True),
        }
        for name, measure_stage in stages.items():
            try:
                found[name] = measure_stage()
            except Exception as error:
                traceback.print_exc()
                found[name] = {"problem": f"{type(error).__name__}: {str(error)[:200]}"}
            yield found


def measure_colocated(run: Run, engine: VLLMEngine, device: str, steps: int) -> dict[str, float]:
    """Return the seconds of whole steps by part, after one to warm up."""
    callbacks = [WeightSyncCallback(engine, run.parity)]
    step = summarise(measure_steps(run.module, run.data, steps + 1, "gpu" if device == "cuda" else "cpu", callbacks))
    kept = ("step_s", "tokens_per_s", "training_tokens_per_s", "rollout_tokens_per_s", "mfu", "peak_memory_gb")
    figures = step["seconds"] | {name: step[name] for name in (*kept, "reserved_memory_gb") if name in step}
    figures["sleep_wake_sync_s"] = sum(step["seconds"].get(part, 0.0) for part in ("sleep", "wake", "sync"))
    return figures


def measure_sampling(run: Run, engine: VLLMEngine, tokens: int, *, seeded: bool) -> dict[str, float]:
    """Return the engine's rate beside that of vLLM called directly, on a step's prompts."""
    engine.runtime.settings = replace(engine.runtime.settings, request_seeds=seeded)
    return measure_engine(engine, batches_of(run), Sampling(1.0, tokens))


def start(device: str, model: Path, questions: Path, tasks: int, tokens: int, steps: int) -> Run:
    """Build the run that `config_of` describes."""
    loaded = config_of(device, model, questions, tasks, tokens, steps)
    return build(loaded.run, RunDir(Path(tempfile.mkdtemp(prefix="pmd-run-"))))


def config_of(device: str, model: Path, questions: Path, tasks: int, tokens: int, steps: int) -> LoadedConfig:
    """Return `configs/qwen3_8b.yaml` on made-up questions, without anything that would be downloaded."""
    files = [CONFIGS / "qwen3_8b.yaml", *([CONFIGS / "overlays" / "cpu_vllm.yaml"] if device == "cpu" else [])]
    overrides = {
        "model.path": model,
        "data.path": questions,
        "data.max_train": tasks * (steps + 1),
        "rollouts.tasks_per_step": tasks,
        "rollouts.group_size": GROUP_SIZE,
        "rollouts.max_new_tokens": tokens,
        "rollouts.vllm.max_num_seqs": min(256, tasks * GROUP_SIZE),
        "memory.embedder": "hash",
    }
    return load_config(files, [f"{key}={value}" for key, value in overrides.items()])


def batches_of(run: Run) -> list[list[Request]]:
    """Return a small batch to warm up, and one of a whole step."""
    tasks = run.tasks["train"][: run.config.rollouts.tasks_per_step]
    prompts = [tuple(run.data.prompts.student(task)) for task in tasks for _ in range(GROUP_SIZE)]
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    return [requests[:GROUP_SIZE], requests]


def shared_bytes(run: Run, engine: VLLMEngine) -> int:
    """Return the bytes of the trainer's weights that are vLLM's own."""
    held = {tensor.untyped_storage().data_ptr() for tensor in engine.runtime.weights().tensors.values()}
    shared = {p.data_ptr(): p for p in run.module.parameters() if p.untyped_storage().data_ptr() in held}
    return sum(parameter.numel() * parameter.element_size() for parameter in shared.values())
