"""Merges configuration files and command-line overrides into one typed `RunConfig`.

Files merge left to right, and overrides come last. `${...}` is resolved afterwards, so an overlay may refer to a key of
its base. Problems with single keys are collected here, those with combinations in `check.py`; neither imports torch.
"""

import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pmd.config.schema import RunConfig
from pmd.config.values import build_section
from pmd.errors import ConfigError


@dataclass
class LoadedConfig:
    """A merged configuration: pmd's own sections, Lightning's, and the problems found in either so far."""

    run: RunConfig
    trainer: dict[str, Any]
    name: str  # NAME in runs/NAME: the stem of the first file
    folder: Path  # where the first file is
    problems: list[str] = field(default_factory=list)


def load_arguments(command: str, arguments: Sequence[str], fixed: Sequence[str] = ()) -> LoadedConfig:
    """Load the configuration that `--config FILE --a.b=VALUE` describes; the `fixed` overrides come last.

    Raises:
        ConfigError: an argument is not an option, no file is named, or a file cannot be read.
    """
    arguments, allowed = take_allowed_modules(arguments)
    files, overrides = split_arguments(arguments)
    if not files:
        raise ConfigError(f"{command} needs --config FILE; start with --config configs/tiny.yaml.")
    loaded = load_config(files, [*overrides, *fixed])
    data = loaded.run.data
    data.allow_modules = list(dict.fromkeys([*data.allow_modules, *allowed]))
    return loaded


def take_allowed_modules(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments without `--allow-module NAME`, and the names.

    Raises:
        ConfigError: a name is missing.
    """
    rest, allowed = list[str](), list[str]()
    waiting = iter(arguments)
    for argument in waiting:
        flag, equals, name = argument.partition("=")
        if flag != "--allow-module":
            rest.append(argument)
            continue
        name = name if equals else next(waiting, "")
        if not name or name.startswith("-"):
            raise ConfigError("--allow-module needs the name of a module; write --allow-module NAME.")
        allowed.append(name)
    return rest, allowed


def load_config(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> LoadedConfig:
    """Merge files and `key=value` overrides; the result lists problems with single keys, for `check_config` to raise.

    Raises:
        ConfigError: a file is missing or is not a YAML mapping, so nothing more can be checked.
    """
    plain = _merge(files, overrides)
    trainer = plain.pop("trainer", None) or {}
    run, problems = build_section(RunConfig, plain, extra=["trainer"])
    if not isinstance(trainer, dict):
        problems.append(f"trainer={trainer!r} must be a mapping of Lightning Trainer arguments.")
        trainer = {}
    first = Path(files[0]) if files else Path("run")
    name = first.parent.absolute().name if first.stem == "config" else first.stem  # RUN/config.yaml is named RUN
    return LoadedConfig(run, trainer, name, first.parent, problems)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split `--config FILE --a.b VALUE --c.d=VALUE` into files and `a.b=VALUE` overrides.

    Raises:
        ConfigError: an argument is not an option, or has no value.
    """
    files, overrides, problems = [], [], []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if not argument.startswith("--"):
            form = f"--config {argument}" if argument.endswith((".yaml", ".yml")) else "--section.key=value"
            problems.append(f"argument={argument} is not an option; write {form}.")
            continue
        key, equals, value = argument[2:].partition("=")
        if not equals:
            if position == len(arguments) or arguments[position].startswith("--"):
                problems.append(f"--{key} needs a value; write --{key}=VALUE.")
                continue
            value = arguments[position]
            position += 1
        if not key:
            problems.append(f"argument={argument} has no key; write --section.key=value.")
        elif key == "config":
            files.append(value)
        else:
            overrides.append(f"{key}={value}")
    if problems:
        raise ConfigError(problems)
    return files, overrides


def _merge(files: Sequence[str | Path], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the merged, interpolated layers as plain values."""
    layers, problems = [], []
    for file in map(Path, files):
        try:
            layers.append(_read(file))
        except FileNotFoundError:
            problems.append(f"--config={file} does not exist; {_nearby(file)}")
        except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else _one_line(error)
            problems.append(
                f"--config={file} is not readable YAML ({reason}); give a file of `section: {{key: value}}`."
            )
    try:
        layers.append(OmegaConf.from_dotlist(list(overrides)))
    except (OmegaConfBaseException, YAMLError) as error:
        problems.append(f"an override cannot be read: {_one_line(error)}; write --section.key=value.")
    if problems:
        raise ConfigError(problems)
    try:
        return typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.merge(*layers), resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"interpolation failed: {_one_line(error)}") from None


def _read(file: Path) -> Any:
    layer = OmegaConf.load(file)
    if not OmegaConf.is_dict(layer):
        raise YAMLError("the top level must be a mapping of sections")
    return layer


def _nearby(file: Path) -> str:
    close = get_close_matches(file.name, [p.name for p in file.parent.glob("*.yaml")], n=1)
    if close:
        return f"did you mean {file.parent / close[0]}?"
    return "complete runs are in configs/, overlays in configs/methods/ and ablations/."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
