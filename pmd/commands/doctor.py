"""`python -m pmd doctor --config FILE`: will it fit and will it run?

Enters: a configuration, as `fit` reads it. Leaves: versions, missing packages, the memory that a step is predicted to
need by part, what the device has, and what to change if that is too little. No weights are read.
"""

import argparse
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pmd.config import RunConfig
from pmd.config_check import check_config
from pmd.config_load import load_arguments

PACKAGES = ("torch", "lightning", "transformers", "peft", "bitsandbytes", "vllm", "hnswlib", "sentence-transformers")


def main(argv: list[str]) -> int:
    """Print the diagnosis; return 0 if the run is predicted to fit, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m pmd doctor",
        usage="python -m pmd doctor --config FILE [--config OVERLAY]... [--section.key=VALUE]... [options]",
        description="Predict the memory that the steps of a configuration need.",
        allow_abbrev=False,
    )
    parser.add_argument("--tokens", type=int, help="tokens of a micro-batch; default: as many as it may hold")
    arguments, rest = parser.parse_known_args(argv)
    loaded = load_arguments("doctor", rest)
    check_config(loaded)
    console = Console()
    console.print(", ".join(f"{name} {_version(name)}" for name in PACKAGES), markup=False)

    import torch

    from pmd.doctor.memory import libraries_bytes, predict, read_shape

    on_cuda = torch.cuda.is_available() and loaded.trainer.get("accelerator", "auto") != "cpu"
    shape, tokens = read_shape(loaded.run.model), arguments.tokens or most_tokens(loaded.run)
    parts = predict(shape, loaded.run, tokens, tokens, "cuda" if on_cuda else "cpu")
    if not on_cuda:
        parts["Python and libraries"] = libraries_bytes()
    table = Table("part", "GB", title=f"predicted peak memory, micro-batches of {tokens} tokens")
    for part, size in parts.items():
        table.add_row(part, f"{size / 1e9:.3f}")
    total = sum(parts.values())
    table.add_row("all", f"{total / 1e9:.3f}")
    console.print(table)
    available = torch.cuda.mem_get_info()[0] if on_cuda else _available_bytes()
    console.print(f"free now: {available / 1e9:.1f} GB", markup=False)
    if total <= available:
        console.print("It fits.")
        return 0
    console.print("It does not fit: " + "; ".join(remedies(loaded.run)) + ".", markup=False)
    return 1


def most_tokens(run: RunConfig) -> int:
    """Return the padded tokens of the largest micro-batch that the configuration allows."""
    prompt = max(run.rollouts.max_prompt_tokens, run.teacher.max_prompt_tokens)
    longest = prompt + run.rollouts.max_new_tokens
    rollouts = run.rollouts.problems_per_step * run.rollouts.group_size // run.rollouts.updates_per_batch
    return min(max(run.rollouts.micro_batch_tokens, longest), rollouts * longest)


def remedies(run: RunConfig) -> list[str]:
    """Name what would need less memory, the cheapest change first."""
    found = []
    if not run.model.gradient_checkpointing:
        found.append("set model.gradient_checkpointing=true")
    if run.rollouts.micro_batch_tokens > 4096:
        found.append("lower rollouts.micro_batch_tokens")
    if run.rollouts.engine == "hf":
        found.append("lower rollouts.engine_batch")
    if run.model.dtype == "float32":
        found.append("set model.dtype=bfloat16")
    if run.model.finetune != "qlora":
        found.append("set model.finetune=" + ("lora" if run.model.finetune == "full" else "qlora"))
    return found or ["use a smaller model"]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def _available_bytes() -> float:
    """Return main memory that programs may still take (Linux); infinity where that is not known."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return float("inf")
    line = next(line for line in info.read_text().splitlines() if line.startswith("MemAvailable"))
    return 1024.0 * int(line.split()[1])
