"""`python -m pmd bootstrap`: makes one of the shipped models from a seed.

The model is written only if it passes its probes after rounding to the precision of the file.
"""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pmd.errors import ConfigError, PmdError

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

    from pmd.bootstrap.catalogue import Blueprint
    from pmd.bootstrap.probe import Probe

MODEL_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
}
MODELS = ("tiny", "tiny_large", "tiny_hard", "tiny_hard_large", "tiny_exam")
DESCRIPTION = """\
Make one of the models that ship with pmd, from a seed, on one CPU core.

  python -m pmd bootstrap                                   # tiny, seed 0, into ./bootstrapped/tiny
  python -m pmd bootstrap --model tiny_exam --seed 3 --out my_exam
  python -m pmd fit --config configs/tiny.yaml --model.path bootstrapped/tiny

  tiny       half a million parameters, the tiny world's language. It attempts puzzles, uses memory lines in its
             prompt, reflects on attempts and abstracts patterns; it knows no family's rule. About 12 minutes.
  tiny_large one million parameters, otherwise like tiny. For experiments across model sizes, such as using a memory
             that a model of another size has built. About 25 minutes.
  tiny_hard  0.3 million parameters, the language of the hard tiny world. It hardly ever opens a rare box unless memory
             excludes the common ones, and its reflections name a wrong box now and then. About 7 minutes.
  tiny_hard_large  0.7 million parameters, otherwise like tiny_hard. About 8 minutes.
  tiny_exam  0.2 million parameters, bytes. It writes in the format of a multiple-choice exam but knows nothing: it
             picks letters uniformly and repeats stock study tips. For running the whole loop on real questions
             without downloading weights. About 5 minutes.
"""
EPILOG = """\
The probes measure the model after its weights are rounded to bfloat16. If any probe fails, nothing is written and the
exit code is 1. The same seed gives the same model on the same machine.
"""


def main(argv: list[str]) -> int:
    """Run the command; return 0 if a model was written."""
    arguments = _parser().parse_args(argv)
    console = Console()
    directory = Path(arguments.out or Path("bootstrapped") / arguments.model)
    try:
        check_directory(directory)
        return _bootstrap(arguments, directory, console)
    except PmdError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
        return 1


def check_directory(directory: Path) -> None:
    """Raise ConfigError, before any work, if writing to the directory would destroy other files."""
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"--out {directory} is a file; name a new directory.")
    foreign = (
        sorted(path.name for path in directory.iterdir() if path.name not in MODEL_FILES) if directory.exists() else []
    )
    if foreign:
        raise ConfigError(
            f"--out {directory} contains {foreign[0]!r}, which is not part of a bootstrapped model and would be lost; "
            "name a new directory."
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pmd bootstrap",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=MODELS, default="tiny", help="which model (default: tiny)")
    parser.add_argument("--seed", type=int, default=0, help="draws initial weights and samples (default: 0)")
    parser.add_argument("--out", metavar="DIR", help="where to write it (default: bootstrapped/MODEL)")
    parser.add_argument("--steps", type=int, help="train for this many steps instead of the recipe's, for experiments")
    parser.add_argument("--probe-samples", type=int, help="fresh samples per probe (default: the model's own)")
    return parser


def _bootstrap(arguments: argparse.Namespace, directory: Path, console: Console) -> int:
    from dataclasses import replace

    import torch

    from pmd.bootstrap.catalogue import find_blueprint
    from pmd.bootstrap.ship import write_model

    torch.set_num_threads(1)  # at this size a second thread only slows it down
    blueprint = find_blueprint(arguments.model)
    if arguments.steps is not None:
        blueprint = replace(blueprint, recipe=replace(blueprint.recipe, steps=arguments.steps))
    started = time.process_time()
    model = blueprint.make_model(arguments.seed)
    _train_with_progress(model, blueprint, arguments.seed, console)
    blueprint.finish(model)
    seconds = time.process_time() - started
    with console.status("probing"):
        # A separate seed, far from the training seeds that people use.
        probes = blueprint.probes(model, arguments.probe_samples or blueprint.probe_samples, arguments.seed + 1_000_003)
    console.print(_table(arguments.model, arguments.seed, seconds, probes))
    failed = [probe for probe in probes if not probe.passed]
    if failed:
        console.print(
            f"{len(failed)} of {len(probes)} probes failed, so nothing was written. "
            "Try another --seed; with --steps, use at least the recipe's.",
            style="red",
        )
        return 1
    write_model(model, blueprint.make_tokenizer(), directory)
    console.print(f"written to {directory}; use it with --model.path {directory}")
    return 0


def _train_with_progress(model: "Qwen3ForCausalLM", blueprint: "Blueprint", seed: int, console: Console) -> None:
    from pmd.bootstrap.train import train

    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}")),
        *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
    )
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        bar = progress.add_task("training", total=blueprint.recipe.steps, loss="-")
        smooth: list[float] = []

        def on_step(step: int, loss: float) -> None:
            smooth.append(loss if not smooth else 0.97 * smooth[-1] + 0.03 * loss)
            del smooth[:-1]
            progress.update(bar, completed=step + 1, loss=f"{smooth[-1]:.4f}")

        train(model, blueprint.draw_sample, blueprint.recipe, seed, on_step)


def _table(name: str, seed: int, seconds: float, probes: "list[Probe]") -> Table:
    table = Table(title=f"{name}, seed {seed}: probes of the bfloat16 weights ({seconds:,.0f} CPU seconds)")
    table.add_column("probe")
    table.add_column("measured", justify="right")
    table.add_column("wanted")
    table.add_column("")
    for probe in probes:
        verdict = "[green]passed[/green]" if probe.passed else "[red]failed[/red]"
        table.add_row(probe.name, f"{probe.value:.4f}", probe.rule, verdict)
    return table
