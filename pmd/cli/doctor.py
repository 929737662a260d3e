"""`python -m pmd doctor --config FILE`: predicts whether a run fits into memory, and says what to change if not."""

from collections.abc import Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from pmd.cli.arguments import load_checked, make_config_parser, split_options
from pmd.config.load import LoadedConfig, load_arguments
from pmd.config.processes import gathers_in_bfloat16, num_processes
from pmd.config.schema import RunConfig
from pmd.errors import ConfigError

if TYPE_CHECKING:
    from pmd.planning.engine_memory import Gpu

PACKAGES = ("torch", "lightning", "transformers", "peft", "bitsandbytes", "vllm", "hnswlib", "sentence-transformers")

DESCRIPTION = """Predict the memory that a configuration needs, part by part, without reading any weights.

  python -m pmd doctor --config configs/tiny.yaml
  python -m pmd doctor --config configs/qwen3_8b.yaml --gpu-gb 80       for a GPU that this machine does not have

Prints versions, the predicted memory, what the device has free, and what to change if that is too little; and on how
many GPUs the run fits if they divide the weights. With rollouts.engine=vllm on a GPU also what vLLM needs while the
policy trains and while vLLM generates, and the share of the GPU that it will be given."""


def main(argv: list[str]) -> int:
    """Print the diagnosis; return 0 if the run is predicted to fit, else 1."""
    parser = make_config_parser("doctor", DESCRIPTION)
    parser.add_argument("--tokens", type=int, help="tokens of a micro-batch (default: as many as one may hold)")
    parser.add_argument("--gpu-gb", type=float, help="plan for a GPU with this many GB instead of this machine")
    arguments, rest = split_options(parser, argv)
    for flag, value in (("--tokens", arguments.tokens), ("--gpu-gb", arguments.gpu_gb)):
        if value is not None and not value > 0:
            raise ConfigError(f"{flag}={value} must be above 0.")
    if arguments.gpu_gb is None:
        loaded = load_checked("doctor", rest)
    else:  # for another machine, so what this one lacks does not matter
        loaded = load_arguments("doctor", rest)
        if loaded.problems:
            raise ConfigError(loaded.problems)
    console = Console()
    console.print(", ".join(f"{name} {_version(name)}" for name in PACKAGES), markup=False)
    code = _diagnose(loaded, arguments.tokens, arguments.gpu_gb, console)
    if arguments.gpu_gb is None:
        from pmd.model_check import check_pretrained
        from pmd.pretrained import load_model_config, load_tokenizer

        model = loaded.run.model
        check_pretrained(loaded.run, load_model_config(model), load_tokenizer(model), [])
    return code


def _diagnose(loaded: LoadedConfig, tokens: int | None, gpu_gb: float | None, console: Console) -> int:
    import torch

    from pmd.planning.choose_memory import available_bytes, choose, is_open, without_gpu
    from pmd.planning.engine_memory import Gpu, fits_on, read_cache, refuse_small_cache
    from pmd.planning.gpu_memory import (
        libraries_bytes,
        max_micro_batch_tokens,
        num_gpus_needed,
        predict,
        read_shape,
        shards_of,
    )

    on_cuda = gpu_gb is not None or (torch.cuda.is_available() and loaded.trainer.get("accelerator", "auto") != "cpu")
    free, total = _gpu_bytes(gpu_gb) if on_cuda else (0.0, 0.0)
    run, shape = loaded.run, read_shape(loaded.run.model)
    shards = shards_of(loaded.trainer)
    if is_open(run) and on_cuda:
        choice = choose(shape, run, available_bytes(run, free, total), shards)
        run = choice.applied(run)
        console.print(str(choice), markup=False, soft_wrap=True)
    elif is_open(run):
        run = without_gpu(run)
    tokens = tokens or max_micro_batch_tokens(run)
    parts = predict(shape, run, tokens, tokens, "cuda" if on_cuda else "cpu", shards)
    if run.rollouts.engine == "vllm":
        refuse_small_cache(read_cache(shards.computed(run)), run)
    if not on_cuda:
        parts["Python and libraries"] = libraries_bytes()
        code = _verdict(run, {"peak": parts}, tokens, _available_bytes(), console)
        console.print("On a CPU the process may hold half as much again, because the C library keeps what torch frees.")
        return code
    if run.memory.embedder_device == "cpu":
        _describe_embedder(run, console)
    if run.rollouts.engine == "vllm":
        code = _diagnose_beside_vllm(loaded, run, parts, tokens, Gpu(total, free), console)
    else:
        code = _verdict(run, {"peak": parts}, tokens, free, console)
    fits = partial(fits_on, shape, run, tokens, Gpu(total, free))
    enough = num_gpus_needed(fits, in_bfloat16=gathers_in_bfloat16(loaded.trainer))
    console.print(describe_ranks(run, loaded.trainer, enough, total), markup=False, soft_wrap=True)
    return code


def _diagnose_beside_vllm(
    loaded: LoadedConfig, run: RunConfig, parts: dict[str, float], tokens: int, gpu: "Gpu", console: Console
) -> int:
    """Say what the trainer, whose `parts` are predicted, and vLLM need in turn; return 0 if that fits, else 1."""
    from pmd.planning.engine_memory import plan_engine, read_cache, shares_base
    from pmd.planning.gpu_memory import read_shape, shards_of

    shape, shards = read_shape(run.model), shards_of(loaded.trainer)
    served = shards.computed(run)
    shares_weights, lines = shares_base(run, on_gpu=True, divides=shards.number > 1)
    try:
        plan = plan_engine(shape, read_cache(served), served, parts, gpu, shares_weights=shares_weights)
    except ConfigError as error:
        _verdict(run, {"training": parts}, tokens, gpu.free, console)
        console.print(f"vLLM does not fit beside it: {error}", markup=False)
        return 1
    code = _verdict(run, plan.phases(parts), tokens, gpu.free, console)
    for line in [*lines, str(plan), *describe_hours(run, loaded.trainer)]:
        console.print(line, markup=False)
    return code


def _gpu_bytes(gpu_gb: float | None) -> tuple[float, float]:
    """Return the free and the total memory of the GPU, this machine's or one of `gpu_gb` GB."""
    import torch

    return (gpu_gb * 1e9, gpu_gb * 1e9) if gpu_gb is not None else torch.cuda.mem_get_info()


def _describe_embedder(run: RunConfig, console: Console) -> None:
    """Say how much main memory the embedder takes beside a training on the GPU."""
    from pmd.planning.embedder_memory import embedder_bytes

    try:
        size = embedder_bytes(run.memory)
    except ConfigError as error:  # the GPU's plan does not depend on it
        console.print(f"Main memory for the embedder is unknown. {error}", markup=False)
        return
    if size:
        console.print(f"memory.embedder={run.memory.embedder} takes {size / 1e9:.1f} GB of main memory.", markup=False)


def _verdict(
    run: RunConfig, phases: Mapping[str, Mapping[str, float]], tokens: int, available: float, console: Console
) -> int:
    """Print bytes by part and phase; return 0 if every phase fits, else 1."""
    names = list(dict.fromkeys(part for parts in phases.values() for part in parts))
    table = Table("part")
    for name in phases:
        table.add_column(f"GB, {name}", justify="right")
    for part in names:
        table.add_row(part, *(f"{parts[part] / 1e9:.3f}" if part in parts else "" for parts in phases.values()))
    totals = [sum(parts.values()) for parts in phases.values()]
    table.add_row("all", *(f"{total / 1e9:.3f}" for total in totals))
    console.print(f"Predicted memory, with micro-batches of {tokens} tokens:")
    console.print(table)
    console.print(f"free now: {available / 1e9:.1f} GB", markup=False)
    if max(totals) <= available:
        console.print("It fits.")
        return 0
    console.print("It does not fit: " + "; ".join(remedies(run)) + ".", markup=False)
    return 1


def describe_hours(run: RunConfig, trainer: Mapping[str, Any]) -> list[str]:
    """Return a line with the predicted hours of a run whose data and model are known, with LoRA on one GPU."""
    from pmd.planning.hours import predict_hours

    if run.model.finetune != "lora" or num_processes(trainer) > 1:
        return []
    try:
        hours = predict_hours(run, dict(trainer))
    except ValueError:
        return []
    return [
        f"A run is predicted to take {hours.total:.0f} hours of one H200, {hours.training:.0f} of them in training "
        "(pmd/planning/hours.py says from what)."
    ]


def describe_ranks(run: RunConfig, trainer: Mapping[str, Any], enough: int | None, gpu_bytes: float) -> str:
    """Say what the prediction is of, and among how many GPUs the weights would have to be divided.

    Args:
        enough: the fewest GPUs of `gpu_bytes` that the run fits on with trainer.strategy=fsdp2; None if it never does.
    """
    strategy, size = trainer.get("strategy"), num_processes(trainer)
    if strategy == "fsdp2":
        of = f"This is for each of {size} GPUs, which divide the weights."
    else:
        of = "This is for each GPU: with trainer.strategy=ddp, every one holds all of it."
    if run.model.finetune == "qlora":
        return f"{of} trainer.strategy=fsdp2 cannot divide 4-bit weights."
    if enough is None:
        return f"{of} Divided among any number of GPUs (fsdp2), it does not fit: what is not divided is too large."
    if enough == 1:
        return f"{of} One GPU is enough."
    return f"{of} With trainer.strategy=fsdp2, {enough} GPUs of {gpu_bytes / 1e9:.0f} GB are enough."


def remedies(run: RunConfig) -> list[str]:
    """Return changes that would need less memory, the cheapest first."""
    found = []
    if run.model.gradient_checkpointing is not True:
        found.append("set model.gradient_checkpointing=true")
    if run.rollouts.micro_batch_tokens == "auto" or run.rollouts.micro_batch_tokens > 4096:
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
    """Return the free main memory in bytes (Linux); infinity if it is unknown."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return float("inf")
    line = next(line for line in info.read_text().splitlines() if line.startswith("MemAvailable"))
    return 1024.0 * int(line.split()[1])
