"""The command line. `main` answers help and configuration errors without importing torch.

`fit`, `validate` and `test` check the configuration, then hand over to `run.py`; every other command is a file here.
"""

import dataclasses
import sys
import typing
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

from pmd.config.check import check_config
from pmd.config.load import load_arguments
from pmd.config.save import resolved_yaml
from pmd.config.schema import RunConfig
from pmd.config.values import describe, shown
from pmd.errors import ConfigError, PmdError, RunInterrupted
from pmd.run_dir import describe_run_dir_problems

HELP = """usage: python -m pmd COMMAND [--config FILE]... [--section.key=VALUE]...

Procedural Memory Distillation: verified rollouts become memory, memory teaches the policy token by token, and the
final model needs no memory.

  fit        train:      python -m pmd fit --config configs/tiny.yaml
                         python -m pmd fit --config configs/tiny.yaml --config configs/methods/grpo.yaml
  validate   evaluate a checkpoint on the validation problems, without any memory
  test       evaluate a checkpoint on the test problems, without any memory
  doctor     will it fit and will it run: predicted memory by part, versions: doctor --config FILE
  export     write the student as a plain Hugging Face checkpoint: export RUN --out DIR
  inspect    the teacher's prompt and the per-token divergence of any rollout: inspect step RUN
  bench      seconds of a step by part, tokens/s, peak memory: bench --config FILE
  compare    paired bootstrap of two or more runs
  sweep      many runs from one grid, with a table over seeds: sweep GRID.yaml
  serve      a vLLM server for rollouts.engine=vllm_server, restarted when it dies: serve --config FILE
  score      verify completions that were made elsewhere
  memory     look into a memory store: stats, list, show, search, ...
  bootstrap  make the shipped tiny models again from their seed

`python -m pmd fit --help` lists every key; `python -m pmd COMMAND --help` explains a command.
"""
COMMANDS = {
    "bench": "pmd.cli.bench",
    "bootstrap": "pmd.bootstrap.command",
    "compare": "pmd.cli.compare",
    "doctor": "pmd.cli.doctor",
    "export": "pmd.cli.export",
    "inspect": "pmd.cli.inspect",
    "memory": "pmd.cli.memory",
    "score": "pmd.cli.score",
    "serve": "pmd.cli.serve",
    "sweep": "pmd.cli.sweep",
}
TRAINING = {
    "fit": """Train. Leaves runs/NAME (or run_dir) with config.yaml, metrics.csv, checkpoints, memory, traces,
results.json and curves.png.

  python -m pmd fit --config configs/tiny.yaml
  python -m pmd fit --config configs/tiny.yaml --config configs/methods/grpo.yaml --optimizer.lr=1e-3
  python -m pmd fit --config runs/tiny/config.yaml --ckpt_path last       go on from the last finished epoch""",
    "validate": """Evaluate a checkpoint on the validation problems. No memory is opened.

  python -m pmd validate --config runs/tiny/config.yaml --ckpt_path best""",
    "test": """Evaluate a checkpoint (without --ckpt_path: the untrained policy) on the test problems, with no memory.

  python -m pmd test --config runs/tiny/config.yaml --ckpt_path last""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for a failed run, 2 for bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    try:
        if command in ("-h", "--help", "help"):
            print(HELP)
            return 0
        if command in TRAINING:
            return _train(command, rest)
        if command in COMMANDS:
            return import_module(COMMANDS[command]).main(rest)
        known = [*TRAINING, *COMMANDS]
        close = get_close_matches(command, known, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}."
        raise ConfigError(f"command={command} is not known; {remedy}")
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return 2
    except RunInterrupted as error:
        print(error, file=sys.stderr)
        return 130
    except PmdError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _train(command: str, arguments: list[str]) -> int:
    """Check the configuration, then hand over to what imports torch."""
    if "-h" in arguments or "--help" in arguments:
        print(_key_help(command))
        return 0
    print_config = "--print_config" in arguments
    loaded = load_arguments(command, [a for a in arguments if a != "--print_config"])
    check_config(loaded, describe_run_dir_problems(command, loaded.run, loaded.folder, loaded.name))
    if print_config:
        print(resolved_yaml(loaded))
        return 0
    return import_module("pmd.cli.run").run(command, loaded)


def _key_help(command: str) -> str:
    """Say what the command does and leaves, then list every key by section: default, values, sentence."""
    lines = [f"usage: python -m pmd {command} --config FILE [--config OVERLAY]... [--section.key=VALUE]...", ""]
    lines += [TRAINING[command], ""]
    lines += [
        "Files merge left to right, keys on the command line come last. --print_config prints the result, defaults",
        "included, and stops; what it prints can be saved and given to --config.",
        "",
    ]
    lines += _section_help(RunConfig, "")
    lines += [
        "",
        "trainer: arguments of Lightning's Trainer, e.g. trainer.max_epochs, trainer.accelerator, trainer.precision",
    ]
    return "\n".join(lines)


def _section_help(section: type, prefix: str) -> list[str]:
    hints, lines = typing.get_type_hints(section), []
    defaults = section()
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[field.name]):
            nested = typing.cast(type, hints[field.name])
            summary = (nested.__doc__ or "").splitlines()[0]
            lines += ["", f"{prefix}{field.name}: {summary}", *_section_help(nested, f"{prefix}{field.name}.")]
        else:
            default = getattr(defaults, field.name)
            lines.append(f"  {prefix}{field.name} = {shown(default)}  ({describe(hints[field.name])})")
            lines.append(f"      {field.metadata.get('help', '')}")
    return lines
