"""The command line. `main` answers help and configuration errors without importing torch.

`fit`, `validate` and `test` check the configuration, then build the run in `pmd/build.py`. Everything else is a file
in `commands/`. This is step one of seven: cli.py -> rollouts/data.py -> module.py -> teacher/context.py ->
models/logprobs.py -> objective/divergence.py -> objective/reduce.py.
"""

import dataclasses
import sys
import typing
from collections.abc import Sequence
from importlib import import_module

from pmd.config import RunConfig
from pmd.config_check import check_config
from pmd.config_load import LoadedConfig, load_config
from pmd.errors import ConfigError, PmdError

HELP = """usage: python -m pmd COMMAND [--config FILE]... [--section.key=VALUE]...

Procedural Memory Distillation: verified rollouts become memory, memory teaches the policy token by token, and the
final model needs no memory.

  fit        train:      python -m pmd fit --config configs/tiny.yaml
                         python -m pmd fit --config configs/tiny.yaml --config configs/methods/grpo.yaml
  validate   evaluate a checkpoint on the validation problems, without any memory
  test       evaluate a checkpoint on the test problems, without any memory
  export     write the student as a plain Hugging Face checkpoint: export RUN --out DIR
  inspect    the teacher's prompt and the per-token divergence of any rollout: inspect step RUN
  compare    paired bootstrap of two or more runs
  sweep      many runs from one grid, with a table over seeds: sweep GRID.yaml
  score      verify completions that were made elsewhere
  memory     look into a memory store: stats, list, show, search, ...
  bootstrap  make the shipped tiny models again from their seed

`python -m pmd fit --help` lists every key; `python -m pmd COMMAND --help` explains a command.
"""
COMMANDS = {
    "bootstrap": "pmd.bootstrap.command",
    "compare": "pmd.commands.compare",
    "export": "pmd.commands.export",
    "inspect": "pmd.commands.inspect",
    "memory": "pmd.commands.memory",
    "score": "pmd.commands.score",
    "sweep": "pmd.commands.sweep",
}
TRAINING = ("fit", "validate", "test")


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
        raise ConfigError(f"command={command} is not known; use one of {', '.join([*TRAINING, *COMMANDS])}.")
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return 2
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
    files, overrides = split_arguments([a for a in arguments if a != "--print_config"])
    if not files:
        raise ConfigError(f"{command} needs --config FILE; start with --config configs/tiny.yaml.")
    loaded = load_config(files, overrides)
    check_config(loaded)
    if print_config:
        print(resolved_yaml(loaded))
        return 0
    return import_module("pmd.build").run(command, loaded)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split `--config FILE --a.b VALUE --c.d=VALUE` into files and `a.b=VALUE` overrides.

    Raises:
        ConfigError: an argument is no option, or has no value.
    """
    files, overrides, problems = [], [], []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if not argument.startswith("--"):
            problems.append(f"argument={argument} is no option; write --section.key=value.")
            continue
        key, equals, value = argument[2:].partition("=")
        if not equals:
            if position == len(arguments) or arguments[position].startswith("--"):
                problems.append(f"--{key} needs a value; write --{key}=VALUE.")
                continue
            value = arguments[position]
            position += 1
        if key == "config":
            files.append(value)
        else:
            overrides.append(f"{key}={value}")
    if problems:
        raise ConfigError(problems)
    return files, overrides


def resolved_yaml(loaded: LoadedConfig) -> str:
    """Return the whole configuration, defaults included, as YAML that runs again."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(loaded.run) | {"trainer": loaded.trainer}))


def _key_help(command: str) -> str:
    """List every key with its default and its sentence of help."""
    lines = [f"usage: python -m pmd {command} --config FILE [--config OVERLAY] [--section.key=VALUE]...", ""]
    lines += ["--print_config prints the resolved configuration. Keys:", ""]
    lines += _section_help(RunConfig, "")
    lines += ["trainer.*: arguments of Lightning's Trainer, e.g. trainer.max_epochs, trainer.accelerator."]
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
            lines.append(f"  {prefix}{field.name} = {default!r}: {field.metadata.get('help', '')}")
    return lines
