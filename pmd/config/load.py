"""Configuration files and command-line overrides in; one `RunConfig` and Lightning's trainer section out.

Files are merged left to right, overrides come last, `${...}` interpolation is resolved at the very end, so an overlay
may refer to a key of its base. Every problem is collected (types, bounds, unknown keys here; combinations and data in
`config_check.py`) and none of it imports torch.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pmd.config.schema import RunConfig
from pmd.errors import ConfigError


@dataclass
class LoadedConfig:
    """A merged configuration, as plain values and as objects."""

    run: RunConfig
    trainer: dict[str, Any]
    plain: dict[str, Any]  # the resolved configuration without defaults
    name: str  # stem of the first configuration file
    folder: Path  # where the first configuration file lies
    problems: list[str] = field(default_factory=list)


def load_config(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> LoadedConfig:
    """Merge files and `key=value` overrides; problems are collected in the result, not raised.

    Raises:
        ConfigError: a file is missing or is no YAML mapping; nothing further can be said then.
    """
    layers, problems = [], []
    for file in map(Path, files):
        try:
            layer = OmegaConf.load(file)
            if not OmegaConf.is_dict(layer):
                raise YAMLError("the top level must be a mapping of sections")
            layers.append(layer)
        except FileNotFoundError:
            problems.append(f"--config={file} does not exist; {_nearby(file)}")
        except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
            problems.append(
                f"--config={file} is not readable YAML ({reason}); give a file of `section: {{key: value}}`."
            )
    try:
        layers.append(OmegaConf.from_dotlist(list(overrides)))
    except (OmegaConfBaseException, YAMLError) as error:
        problems.append(f"override is not readable: {' '.join(str(error).split())}; write --section.key=value.")
    if problems:
        raise ConfigError(problems)
    try:
        plain = OmegaConf.to_container(OmegaConf.merge(*layers), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"interpolation failed: {' '.join(str(error).split())}") from None
    plain = typing.cast(dict[str, Any], plain)
    trainer = plain.get("trainer") or {}
    run, problems = build_section(RunConfig, {k: v for k, v in plain.items() if k != "trainer"}, "", extra=["trainer"])
    if not isinstance(trainer, dict):
        problems.append(f"trainer={trainer!r} must be a mapping of Lightning Trainer arguments.")
        trainer = {}
    name = Path(files[0]).stem if files else "run"
    folder = Path(files[0]).parent if files else Path()
    if name == "config":  # a run's own file
        name = folder.absolute().name
    return LoadedConfig(run, trainer, plain, name, folder, problems)


def load_arguments(command: str, arguments: Sequence[str], fixed: Sequence[str] = ()) -> LoadedConfig:
    """Load what `--config FILE --a.b=VALUE` names; `fixed` overrides come last.

    Raises:
        ConfigError: an argument is no option, no file is named, or a file is not readable.
    """
    files, overrides = split_arguments(arguments)
    if not files:
        raise ConfigError(f"{command} needs --config FILE; start with --config configs/tiny.yaml.")
    return load_config(files, [*overrides, *fixed])


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
            form = f"--config {argument}" if argument.endswith((".yaml", ".yml")) else "--section.key=value"
            problems.append(f"argument={argument} is no option; write {form}.")
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


def build_section(
    section: type, values: dict[str, Any], prefix: str, extra: Sequence[str] = ()
) -> tuple[Any, list[str]]:
    """Make a config dataclass from plain values; return it (defaults where a value is bad) and what is wrong."""
    problems: list[str] = []
    hints = typing.get_type_hints(section)
    fields = {f.name: f for f in dataclasses.fields(section)}
    for key in (name for name in values if name not in fields):
        remedy = _remedy(str(key), prefix, [*fields, *extra])
        problems.append(f"{prefix}{key}={shown(values[key])} is not a known key; {remedy}")
    kept: dict[str, Any] = {}
    for key in (name for name in fields if name in values):
        hint, value, path = hints[key], values[key], prefix + key
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                problems.append(
                    f"{path}={shown(value)} must be a section; set a key of it, such as {_example(path, hint)}."
                )
                continue
            kept[key], nested = build_section(typing.cast(type, hint), value, path + ".")
            problems += nested
            continue
        converted = convert(value, hint)
        if converted is _WRONG:
            problems.append(f"{path}={shown(value)} must be {describe(hint)}.")
            continue
        bound = _bound_problem(path, converted, fields[key].metadata)
        if bound:
            problems.append(bound)
        else:
            kept[key] = converted
    return section(**kept), problems


def _nearby(file: Path) -> str:
    close = get_close_matches(file.name, [p.name for p in file.parent.glob("*.yaml")], n=1)
    if close:
        return f"did you mean {file.parent / close[0]}?"
    return "configs/ holds the complete runs, configs/methods/ and ablations/ the overlays."


def _remedy(key: str, prefix: str, known: Sequence[str]) -> str:
    """Point from a misspelt or misplaced key to the right one."""
    if close := get_close_matches(key, known, n=1):
        return f"did you mean {prefix}{close[0]}?"
    if elsewhere := [name for name in _all_keys(RunConfig) if name.split(".")[-1] == key]:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"known keys: {', '.join(known)}."


def _all_keys(section: type, prefix: str = "") -> Iterator[str]:
    for name, hint in typing.get_type_hints(section).items():
        if dataclasses.is_dataclass(hint):
            yield from _all_keys(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            yield prefix + name


def _example(path: str, section: Any) -> str:
    return f"{path}.{dataclasses.fields(section)[0].name}"


_WRONG = object()


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the hinted type."""
    return convert(value, hint) is not _WRONG


def convert(value: Any, hint: Any) -> Any:
    """Return `value` as the hinted type, without guessing: only int -> float is widened."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        results = [convert(value, option) for option in get_args(hint)]
        return next((result for result in results if result is not _WRONG), _WRONG)
    if origin is Literal:
        value = "off" if value is False and "off" in get_args(hint) else value  # YAML reads a bare off as false
        return next((option for option in get_args(hint) if option == value and type(option) is type(value)), _WRONG)
    if origin is list:
        items = [convert(item, get_args(hint)[0]) for item in value] if isinstance(value, list) else [_WRONG]
        return _WRONG if any(item is _WRONG for item in items) else items
    if origin is dict:
        pairs = {str(k): convert(v, get_args(hint)[1]) for k, v in value.items()} if isinstance(value, dict) else None
        return _WRONG if pairs is None or any(v is _WRONG for v in pairs.values()) else pairs
    if hint is Any:
        return value
    if hint is type(None):
        return None if value is None else _WRONG
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value if type(value) is hint else _WRONG


def describe(hint: Any) -> str:
    """Say in words what the type admits."""
    origin = get_origin(hint)
    args = list(get_args(hint))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in args)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(str(option) for option in args)
    if origin is list:
        return f"a list, each {describe(args[0])}"
    if origin is dict:
        return f"a mapping, each value {describe(args[1])}"
    names = {
        Any: "anything",
        type(None): "null",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
    }
    return names.get(hint, str(hint))


def _bound_problem(path: str, value: Any, metadata: typing.Mapping[str, Any]) -> str | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    if value != value:
        return f"{path}={value} must be a number."
    if "minimum" in metadata and value < metadata["minimum"]:
        return f"{path}={value} must be at least {metadata['minimum']}."
    if "above" in metadata and value <= metadata["above"]:
        return f"{path}={value} must be above {metadata['above']}."
    if "maximum" in metadata and value > metadata["maximum"]:
        return f"{path}={value} must be at most {metadata['maximum']}."
    return None


def shown(value: Any) -> str:
    """Return a value as YAML would write it, cut to a length that a message can hold."""
    is_word = value is None or isinstance(value, bool)
    text = json.dumps(value) if is_word else value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
