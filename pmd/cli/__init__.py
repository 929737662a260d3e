"""The command line: `main` runs one command. Help and configuration errors do not import torch.

`fit`, `validate` and `test` check the configuration here and continue in `run.py`; every other command has its own
file.
"""

import dataclasses
import os
import sys
import typing
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from pmd import __version__
from pmd.cli.printable import printable
from pmd.config.check import check_config
from pmd.config.load import load_arguments
from pmd.config.processes import is_other_rank, process_problems, starts_ranks
from pmd.config.save import resolved_yaml
from pmd.config.schema import RunConfig
from pmd.config.values import describe, shown
from pmd.errors import ConfigError, PmdError, RankKilled, RunInterrupted
from pmd.run_dir import describe_run_dir_problems
from pmd.tasks import describe_task_problems

HELP = """usage: python -m pmd COMMAND [--config FILE]... [--section.key=VALUE]...

  python -m pmd fit --config configs/tiny.yaml        the whole method on one CPU core, in minutes

Procedural Memory Distillation: a policy's verified rollouts become a memory, a teacher that sees the memory trains the
policy token by token, and the final model needs no memory.

  fit        train:      python -m pmd fit --config configs/tiny.yaml
                         python -m pmd fit --config configs/tiny.yaml --config configs/methods/tiny/grpo.yaml
  validate   evaluate a checkpoint on the validation tasks, without any memory
  test       evaluate a checkpoint on the test tasks, without any memory
  check      try what a run needs before it starts, without weights: check --config FILE
  init       write a commented configuration: init --model ID --data FILE --out mine.yaml
  generate   prompt a checkpoint of a run: generate RUN --prompt TEXT
  completion print a script that completes commands and keys in bash or zsh: completion bash
  prompts    write the texts of the prompts to a folder, to edit: prompts export DIR
  config     write the configurations that come with pmd: config export .
             print the JSON schema of such files, for editors: config schema
  doctor     predict whether a run fits into memory, part by part: doctor --config FILE
  export     write the student as a plain Hugging Face checkpoint: export RUN --out DIR
  inspect    show the teacher's prompt and the per-token divergence of a rollout: inspect step RUN
             show every kind of prompt before a run: inspect prompts --config FILE
  bench      measure a step: seconds by part, tokens/s, peak memory: bench --config FILE
  runs       list runs with method, state and score: runs [FOLDER]
  compare    compare runs by a paired bootstrap: compare RUN RUN
  sweep      run a grid of configurations and tabulate it over seeds: sweep GRID.yaml
  serve      serve rollouts with vLLM, restarted when it dies: serve --config FILE
  score      verify completions that were generated elsewhere
  memory     inspect a memory store: stats, list, show, search, ...
  bootstrap  rebuild the shipped tiny models from a seed

`python -m pmd fit --help` lists every key, `python -m pmd COMMAND --help` explains a command, and `python -m pmd
--version` prints the version.
"""
COMMANDS = {
    "bench": "pmd.cli.bench",
    "bootstrap": "pmd.bootstrap.command",
    "check": "pmd.cli.check",
    "compare": "pmd.cli.compare",
    "completion": "pmd.cli.completion",
    "config": "pmd.cli.config",
    "doctor": "pmd.cli.doctor",
    "export": "pmd.cli.export",
    "generate": "pmd.cli.generate",
    "init": "pmd.cli.init",
    "inspect": "pmd.cli.inspect",
    "memory": "pmd.cli.memory",
    "prompts": "pmd.cli.prompts",
    "runs": "pmd.cli.runs",
    "score": "pmd.cli.score",
    "serve": "pmd.cli.serve",
    "sweep": "pmd.cli.sweep",
}
TRAINING = {
    "fit": """Train. All output goes to runs/NAME (or run_dir): config.yaml, metrics.csv, checkpoints,
memory, traces, results.json and curves.png.

  python -m pmd fit --config configs/tiny.yaml
  python -m pmd fit --config configs/tiny.yaml --config configs/methods/tiny/grpo.yaml --optimizer.lr=1e-3
  python -m pmd fit --config runs/tiny/config.yaml --ckpt_path last       continue after the last finished epoch""",
    "validate": """Evaluate a checkpoint on the validation tasks. No memory is opened.

  python -m pmd validate --config runs/tiny/config.yaml --ckpt_path best""",
    "test": """Evaluate a checkpoint (without --ckpt_path: the untrained policy) on the test tasks. No memory is opened,
unless --memory STORE names one that another run built: then the policy, of any size, sees --memory.k items of it in
its prompt, and every output says so.

  python -m pmd test --config runs/tiny/config.yaml --ckpt_path last
  python -m pmd test --config configs/tiny.yaml --memory runs/tiny --memory.k 3""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code.

    0; 1 for a failed run; 2 for bad input; 130 for an interrupt; 128 + the number of a signal that ended a rank.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    try:
        return _run_command(command, rest)
    except SystemExit as stop:  # argparse has printed its help or an error
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except ConfigError as error:
        print(printable(f"ConfigError: {error}"), file=sys.stderr)
        return 2
    except RunInterrupted as error:
        print(error, file=sys.stderr)
        return 130
    except PmdError as error:
        print(printable(f"{type(error).__name__}: {error}"), file=sys.stderr)
        return 128 + error.signal_number if isinstance(error, RankKilled) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run_command(command: str, arguments: list[str]) -> int:
    if command in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if command in ("--version", "version"):
        print(f"pmd {__version__}")
        return 0
    if command in TRAINING:
        return _train(command, arguments)
    if command in COMMANDS:
        return import_module(COMMANDS[command]).main(arguments)
    known = [*TRAINING, *COMMANDS]
    close = get_close_matches(command, known, n=1)
    remedy = f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}."
    raise ConfigError(f"command={command} is not known; {remedy}")


def _train(command: str, arguments: list[str]) -> int:
    """Check the configuration before anything imports torch, then fit or evaluate."""
    if "-h" in arguments or "--help" in arguments:
        print(_key_help(command))
        return 0
    print_config = "--print_config" in arguments
    store, arguments = _take_memory(command, arguments)
    loaded = load_arguments(command, [a for a in arguments if a != "--print_config"])
    trainer, run_dir_problems = loaded.trainer if command == "fit" else None, []
    if not is_other_rank(os.environ):  # rank 0 chooses the directory, and may hold it already
        run_dir_problems = describe_run_dir_problems(command, loaded.run, loaded.folder, loaded.name)
    problems = [*process_problems(os.environ, trainer), *run_dir_problems, *describe_task_problems(loaded.run)]
    check_config(loaded, problems)
    if print_config:
        print(resolved_yaml(loaded))
        return 0
    if trainer is not None and starts_ranks(trainer, os.environ):
        from pmd.cli.ranks import launch

        return launch(arguments, trainer)
    if not is_other_rank(os.environ):
        print(f"{command} {loaded.name}: loading PyTorch and the model ...", flush=True)
    from pmd.cli.run import run

    return run(command, loaded, store)


def _take_memory(command: str, arguments: list[str]) -> tuple[Path | None, list[str]]:
    """Return the store that `test --memory STORE` names, and the other arguments.

    Raises:
        ConfigError: no store is named.
        MemoryStoreError: there is none at that place.
    """
    rest, found = list[str](), None
    waiting = iter(arguments)
    for argument in waiting:
        flag, equals, value = argument.partition("=")
        if flag != "--memory" or command != "test":
            rest.append(argument)
            continue
        value = value if equals else next(waiting, "")
        if not value or value.startswith("-"):
            raise ConfigError("--memory needs a memory; write --memory STORE, such as a run directory.")
        from pmd.cli.memory import find_store

        found = find_store(Path(value))
    return found, rest


def _key_help(command: str) -> str:
    """Explain the command, then list every key by section with its default, its values and its meaning."""
    lines = [f"usage: python -m pmd {command} --config FILE [--config OVERLAY]... [--section.key=VALUE]...", ""]
    lines += [TRAINING[command], ""]
    lines += [
        "Files merge from left to right; keys on the command line come last. --print_config prints the result, with",
        "defaults, and stops; saved to a file, it can be given to --config. --allow-module NAME lets task files name",
        "the verifiers of that module.",
        "",
    ]
    lines += _section_help(RunConfig, "")
    lines += [
        "",
        "trainer: arguments of Lightning's Trainer, such as trainer.max_epochs, trainer.accelerator, trainer.precision",
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
            lines.append(f"      {field.metadata['help']}")
    return lines
