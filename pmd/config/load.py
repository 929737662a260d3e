"""Merges configuration files and command-line overrides into one typed `RunConfig`.

Files merge left to right, and overrides come last. `${...}` is resolved afterwards, so an overlay may refer to a key of
its base. Problems with single keys are collected here, those with combinations in `check.py`; neither imports torch.
"""

import io
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent, YAMLError

from pmd.config.schema import RunConfig
from pmd.config.values import build_section, shown
from pmd.errors import ConfigError

#: What reading, merging and resolving a malformed configuration may raise, besides a missing file.
UNREADABLE = (
    OmegaConfBaseException,
    YAMLError,
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    RecursionError,
)
MAX_BYTES = 1 << 20  # of a file; complete configurations have about two thousand
MAX_NODES = 10_000  # values of a file; complete configurations have about a hundred
MAX_DEPTH = 20  # of nesting; sections of sections are three deep
MIN_SECRET = 4  # characters; a shorter value from the environment is not searched for in messages


@dataclass
class LoadedConfig:
    """A merged configuration: pmd's own sections, Lightning's, and the problems found in either so far."""

    run: RunConfig
    trainer: dict[str, Any]
    name: str  # NAME in runs/NAME: the stem of the first file
    folder: Path  # where the first file is
    problems: list[str] = field(default_factory=list)
    written: dict[str, Any] = field(default_factory=dict)  # the merged files, with ${...} in place
    resolved: dict[str, Any] = field(default_factory=dict)  # the same with values

    def without_secrets(self, message: str) -> str:
        """Return a message in which values that come from the environment are shown as they are written."""
        if not uses_environment(self.written):
            return message
        pairs = sorted(_interpolated(self.written, self.resolved), key=lambda pair: -len(pair[1]))
        for written, value in pairs:
            if len(value) >= MIN_SECRET:
                message = message.replace(value, written)
        return message


def uses_environment(written: Any) -> bool:
    """Whether any value of a configuration, as it is written, comes from an environment variable."""
    if isinstance(written, dict):
        return any(map(uses_environment, written.values()))
    if isinstance(written, list):
        return any(map(uses_environment, written))
    return isinstance(written, str) and "oc.env" in written


def _interpolated(written: Any, value: Any) -> Iterator[tuple[str, str]]:
    """Yield (as written, value) of every text that an interpolation made."""
    if isinstance(written, str) and "${" in written:
        yield written, str(value)
    elif isinstance(written, dict) and isinstance(value, dict):
        for key in written.keys() & value.keys():
            yield from _interpolated(written[key], value[key])
    elif isinstance(written, list) and isinstance(value, list):
        for one, other in zip(written, value, strict=True):
            yield from _interpolated(one, other)


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
    written, resolved = _merge(files, overrides)
    trainer = resolved.get("trainer") or {}
    own = {key: value for key, value in resolved.items() if key != "trainer"}
    run, problems = build_section(RunConfig, own, extra=["trainer"])
    if not isinstance(trainer, dict):
        problems.append(f"trainer={shown(trainer)} must be a mapping of Lightning Trainer arguments.")
        trainer = {}
    first = Path(files[0]) if files else Path("run")
    name = first.parent.absolute().name if first.stem == "config" else first.stem  # RUN/config.yaml is named RUN
    return LoadedConfig(run, trainer, name, first.parent, problems, written, resolved)


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


def _merge(files: Sequence[str | Path], overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the merged layers as plain values, as they are written and with interpolations resolved."""
    layers, problems = list[tuple[str, Any]](), list[str]()
    for file in map(Path, files):
        try:
            layers.append((f"--config={file}", _with_sections(read_yaml(file))))
        except FileNotFoundError:
            problems.append(f"--config={file} does not exist; {_nearby(file)}")
        except UNREADABLE as error:
            reason = error.strerror if isinstance(error, OSError) else _one_line(error)
            problems.append(
                f"--config={shown(str(file))} is not readable YAML ({reason}); give a file of "
                "`section: {key: value}`."
            )
    for override in overrides:
        try:
            check_yaml(override.partition("=")[2])
            layers.append((f"--{override}", _with_sections(OmegaConf.from_dotlist([override]))))
        except UNREADABLE as error:
            problems.append(f"--{shown(override)} cannot be read: {_one_line(error)}; write --section.key=value.")
    if problems:
        raise ConfigError(problems)
    merged = OmegaConf.create({})
    for name, layer in layers:
        try:
            merged = OmegaConf.merge(merged, layer)
        except UNREADABLE as error:
            problems.append(
                f"{shown(name)} does not fit the layers before it ({_one_line(error)}); a section is a mapping of "
                "keys, also where it is replaced."
            )
    if problems:
        raise ConfigError(problems)
    try:
        both = (OmegaConf.to_container(merged, resolve=resolve) for resolve in (False, True))
        written, resolved = (typing.cast(dict[str, Any], plain) for plain in both)
    except UNREADABLE as error:
        raise ConfigError(f"interpolation failed: {_one_line(error)}; write ${{section.key}}.") from None
    return written, resolved


def _with_sections(layer: DictConfig) -> DictConfig:
    """Write the short form `wandb: online` out, so that layers merge key by key."""
    if "wandb" in layer and not isinstance(layer["wandb"], DictConfig):
        mode = OmegaConf.to_container(layer, resolve=False)["wandb"]  # type: ignore[index]
        return OmegaConf.merge(layer, {"wandb": None}, {"wandb": {"mode": mode}})  # type: ignore[return-value]
    return layer


def read_yaml(file: Path) -> DictConfig:
    """Return a YAML file of sections.

    Raises:
        OSError, YAMLError, ValueError, OmegaConfBaseException or RecursionError (together `UNREADABLE`): it is none.
    """
    with file.open("rb") as opened:
        raw = opened.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise YAMLError(f"it has more than {MAX_BYTES} bytes")
    text = raw.decode("utf-8")
    check_yaml(text)
    layer = OmegaConf.load(io.StringIO(text))
    if not isinstance(layer, DictConfig):
        raise YAMLError("the top level must be a mapping of sections")
    if not layer:
        raise YAMLError("it is empty")
    return layer


def check_yaml(text: str) -> None:
    """Refuse YAML that would take long to build: aliases that repeat each other, or very deep nesting.

    Raises:
        YAMLError: it is such a text, or no YAML.
    """
    sizes: dict[str, int] = {}  # values that an anchor stands for; 0 while they are counted
    counts, anchors = [0], list[str | None]()  # of the collections around the current event
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, CollectionStartEvent):
            counts.append(1)
            anchors.append(event.anchor)
            sizes |= {event.anchor: 0} if event.anchor else {}
            if len(anchors) > MAX_DEPTH:
                raise YAMLError(f"it is nested more than {MAX_DEPTH} deep")
        elif isinstance(event, CollectionEndEvent):
            count, anchor = counts.pop(), anchors.pop()
            counts[-1] += count
            sizes |= {anchor: count} if anchor else {}
        elif isinstance(event, AliasEvent):
            counts[-1] += sizes.get(event.anchor, 1)
            if sizes.get(event.anchor) == 0:
                raise YAMLError(f"*{event.anchor} is part of what it stands for")
        elif isinstance(event, ScalarEvent):
            counts[-1] += 1
            sizes |= {event.anchor: 1} if event.anchor else {}
        if counts[-1] > MAX_NODES:
            raise YAMLError(f"it has more than {MAX_NODES} values, counting what aliases repeat")


def _nearby(file: Path) -> str:
    close = get_close_matches(file.name, [p.name for p in file.parent.glob("*.yaml")][:MAX_NODES], n=1)
    if close:
        return f"did you mean {file.parent / close[0]}?"
    if not Path("configs").is_dir():
        return "`python -m pmd config export .` writes those that come with pmd into configs/ and ablations/."
    return "complete runs are in configs/, overlays in configs/methods/ and ablations/."


def _one_line(error: Exception) -> str:
    return shown(" ".join(str(error).split()), 300) or type(error).__name__
