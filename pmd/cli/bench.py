"""`python -m pmd bench --config FILE`: where the time of a step goes, tokens/s, model FLOPs utilisation, peak memory.

Enters: a configuration, as `fit` reads it. Leaves: a table, and JSON with --json. With `--prompt-tokens` the rollouts
are random ids of fixed lengths and nothing is generated or verified; without, steps are those of the run itself. With
`--random-init` the weights are random: of model.path only config.json and the tokenizer are read.
"""

import argparse
import dataclasses
import json
import tempfile
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from pmd.config.check import check_config
from pmd.config.load import LoadedConfig, load_arguments
from pmd.errors import ConfigError

if TYPE_CHECKING:
    from pmd.module import PMDModule
    from pmd.planning.bench import StepRecord


def main(argv: list[str]) -> int:
    """Measure and print; return 0."""
    arguments, rest = _parser().parse_known_args(argv)
    if arguments.steps < 1:
        raise ConfigError(f"--steps={arguments.steps} must be at least 1.")
    loaded = load_arguments("bench", rest)
    check_config(loaded)

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

        module, records = _measure(loaded, arguments, Path(folder))
        result = {"model": dataclasses.asdict(loaded.run.model), "lengths": _lengths(arguments)} | summarise(
            module, records
        )
    _show(result, Console())
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pmd bench",
        usage="python -m pmd bench --config FILE [--config OVERLAY]... [--section.key=VALUE]... [options]",
        description="Measure the training steps of a configuration, given as to fit.",
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=int, default=3, help="steps to measure, after one that warms up")
    parser.add_argument("--random-init", action="store_true", help="random weights: no download but config, tokenizer")
    parser.add_argument("--prompt-tokens", type=int, help="random rollouts with prompts of this length; no generation")
    parser.add_argument("--completion-tokens", type=int, default=128, help="their completions")
    parser.add_argument("--teacher-tokens", type=int, help="their teacher's prompts; default: twice the student's")
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


def _measure(loaded: LoadedConfig, arguments: argparse.Namespace, folder: Path) -> "tuple[PMDModule, list[StepRecord]]":
    """Take one step more than asked for: the first warms up."""
    from pmd.planning.bench import measure_steps

    config, accelerator = loaded.run, str(loaded.trainer.get("accelerator", "auto"))
    lengths = _lengths(arguments)
    if lengths is None:
        from pmd.callbacks.sync import WeightSyncCallback
        from pmd.run_dir import RunDir

        builder = import_module("pmd.cli.run")
        run = builder.build(config, RunDir(folder / "run"))
        parity = builder.parity_of(run)
        callbacks = [WeightSyncCallback(run.data.engine, config.rollouts.updates_per_batch, parity)]
        with closing(run.data.engine):
            return run.module, measure_steps(run.module, run.data, arguments.steps + 1, accelerator, callbacks)
    from pmd.module import PMDModule
    from pmd.planning.synthetic import FixedBatches, Lengths, synthetic_examples

    module = PMDModule(config)
    completion = lengths["completion"]
    examples = synthetic_examples(
        config.rollouts.tasks_per_step,
        config.rollouts.group_size,
        Lengths(lengths["prompt"], lengths["teacher_prompt"], completion, completion),
        len(module.tokenizer),
    )
    return module, measure_steps(module, FixedBatches(examples, arguments.steps + 1), arguments.steps + 1, accelerator)


def _show(result: dict[str, Any], console: Console) -> None:
    table = Table("part", "seconds", "share", title=f"one step on {result['device']}, mean of {result['steps']}")
    for part, seconds in result["seconds"].items():
        table.add_row(part, f"{seconds:.3f}", f"{100 * seconds / result['step_s']:.0f} %")
    table.add_row("step", f"{result['step_s']:.3f}", "")
    console.print(table)
    mfu = "unknown (no known peak)" if result["mfu"] is None else f"{100 * result['mfu']:.1f} %"
    console.print(
        f"{result['tokens_per_step']:.0f} tokens a step; {result['tokens_per_s']:.0f} tokens/s in all, "
        f"{result['training_tokens_per_s']:.0f} in training; {result['tflops_per_s']:.3f} TFLOP/s, MFU {mfu}; "
        f"peak memory {result['peak_memory_gb']:.2f} GB"
    )
