"""`python -m pmd bench --config FILE`: measures step time by part, tokens/s, model FLOPs utilisation and memory."""

import argparse
import dataclasses
import json
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from pmd.cli.arguments import load_checked, make_config_parser, split_options
from pmd.config.load import LoadedConfig
from pmd.errors import ConfigError

if TYPE_CHECKING:
    from pmd.cli.run import Run
    from pmd.planning.bench import Measurement


DESCRIPTION = """Measure training steps of a configuration, given the same way as for `fit`.

  python -m pmd bench --config configs/tiny.yaml --steps 5
  python -m pmd bench --config configs/qwen3_8b.yaml --random-init --prompt-tokens 512 --completion-tokens 1024

Without --prompt-tokens the steps are those of the run: tasks are attempted, verified and trained on. With it, rollouts
are random token ids of fixed lengths, and nothing is generated or verified."""


def main(argv: list[str]) -> int:
    """Measure and print; return 0."""
    arguments, rest = split_options(_parser(), argv)
    if arguments.steps < 1:
        raise ConfigError(f"--steps={arguments.steps} must be at least 1.")
    loaded = load_checked("bench", rest)

    import torch

    from pmd.cli.trainer import quieten

    quieten()
    if loaded.run.cpu_threads is not None:
        torch.set_num_threads(loaded.run.cpu_threads)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.random_init:
            from pmd.planning.synthetic import write_random_model

            loaded.run.model = write_random_model(loaded.run.model, Path(folder) / "model")
        from pmd.planning.bench import summarise

        measured, engine = _measure(loaded, arguments, Path(folder))
        facts = {"model": dataclasses.asdict(loaded.run.model), "lengths": _lengths(arguments)}
        result = facts | summarise(measured) | {"engine": engine}
    _show(result, Console())
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = make_config_parser("bench", DESCRIPTION)
    parser.add_argument("--steps", type=int, default=3, help="steps to measure, after one to warm up (default: 3)")
    parser.add_argument("--random-init", action="store_true", help="random weights; model.path gives shape, tokenizer")
    parser.add_argument("--prompt-tokens", type=int, help="random rollouts with prompts of this length")
    parser.add_argument("--completion-tokens", type=int, default=128, help="length of their completions (default: 128)")
    parser.add_argument("--teacher-tokens", type=int, help="length of the teacher's prompts (default: twice as long)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser


def _lengths(arguments: argparse.Namespace) -> dict[str, int] | None:
    if arguments.prompt_tokens is None:
        return None
    teacher = arguments.teacher_tokens or 2 * arguments.prompt_tokens
    lengths = {"prompt": arguments.prompt_tokens, "teacher_prompt": teacher, "completion": arguments.completion_tokens}
    for name, value in lengths.items():
        if value < 1:
            raise ConfigError(f"{name} tokens={value} must be at least 1.")
    return lengths


def _measure(
    loaded: LoadedConfig, arguments: argparse.Namespace, folder: Path
) -> tuple["Measurement", dict[str, float] | None]:
    """Take one step more than requested, because the first one is a warm-up; then measure vLLM if it is the engine."""
    from pmd.planning.bench import measure_steps

    config, accelerator = loaded.run, str(loaded.trainer.get("accelerator", "auto"))
    precision = loaded.trainer.get("precision")
    lengths = _lengths(arguments)
    if lengths is None:
        from pmd.callbacks.sync import WeightSyncCallback
        from pmd.cli.run import build
        from pmd.run_dir import RunDir

        run = build(config, RunDir(folder / "run"))
        callbacks = [WeightSyncCallback(run.data.engine, run.parity)]
        with closing(run.data.engine):
            measured = measure_steps(run.module, run.data, arguments.steps + 1, accelerator, callbacks, precision)
            return measured, _measure_engine(run)
    from pmd.module import PMDModule
    from pmd.planning.choose_memory import choose_here
    from pmd.planning.synthetic import FixedBatches, Lengths, synthetic_examples

    config, chosen = choose_here(config)
    if chosen is not None:
        print(chosen)
    module = PMDModule(config)
    completion = lengths["completion"]
    examples = synthetic_examples(
        config.rollouts.tasks_per_step,
        config.rollouts.group_size,
        Lengths(lengths["prompt"], lengths["teacher_prompt"], completion, completion),
        len(module.tokenizer),
    )
    batches = FixedBatches(examples, arguments.steps + 1)
    return measure_steps(module, batches, arguments.steps + 1, accelerator, precision=precision), None


def _measure_engine(run: "Run") -> dict[str, float] | None:
    """Generate a batch of the run's prompts through vLLM, ours and alone; None for other engines."""
    from pmd.engines.base import Request, Sampling
    from pmd.engines.vllm import VLLMEngine
    from pmd.planning.engine_bench import measure_engine

    if not isinstance(run.data.engine, VLLMEngine):
        return None
    rollouts = run.config.rollouts
    tasks = run.tasks["train"][: rollouts.tasks_per_step]
    prompts = [tuple(run.data.prompts.student(task)) for task in tasks for _ in range(rollouts.group_size)]
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    return measure_engine(run.data.engine, [requests], Sampling(rollouts.temperature, rollouts.max_new_tokens))


def _show(result: dict[str, Any], console: Console) -> None:
    table = Table("part", "seconds", "share", title=f"one step on {result['device']}, mean of {result['steps']}")
    for part, seconds in result["seconds"].items():
        table.add_row(part, f"{seconds:.3f}", f"{100 * seconds / result['step_s']:.0f} %")
    table.add_row("step", f"{result['step_s']:.3f}", "")
    console.print(table)
    mfu = "unknown (no known peak)" if result["mfu"] is None else f"{100 * result['mfu']:.1f} %"
    console.print(
        f"{result['tokens_per_step']:.0f} tokens a step; {result['tokens_per_s']:.0f} tokens/s in all, "
        f"{result['training_tokens_per_s']:.0f} in training; {result['tflops_per_s']:.3f} TFLOP/s, "
        f"model FLOPs utilisation {mfu}; peak memory {result['peak_memory_gb']:.2f} GB{_reserved(result)}"
    )
    if result["rollout_tokens_per_s"] is not None:
        console.print(f"{result['rollout_tokens_per_s']:.0f} tokens/s in rollouts, verification included")
    if result["engine"] is not None:
        engine = result["engine"]
        console.print(
            f"engine alone {engine['tokens_per_s']:.0f} tokens/s, {100 * engine['share_of_vllm']:.0f} % of vLLM called "
            f"directly; sleep {engine['sleep_s']:.2f} s, wake {engine['wake_s']:.2f} s, sync {engine['sync_s']:.2f} s"
        )


def _reserved(result: dict[str, Any]) -> str:
    reserved = result["reserved_memory_gb"]
    return "" if reserved is None else f" allocated, {reserved:.2f} GB reserved by torch"
