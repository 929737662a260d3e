"""A JSON schema of the configuration files, for editors: completion, help on hover, and errors while typing.

It is generated from the dataclasses and from `trainer_arguments.json`, and describes what `fit` accepts for single
keys; only `fit` checks combinations.
"""

import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from pmd.config.schema import MAX_COUNT, RunConfig
from pmd.config.trainer import (
    CLASS_KEYS,
    CLASSES,
    COUNTS,
    MAX_DEVICES,
    MINIMUM,
    NO_LIMIT,
    ONE_DEVICE,
    OWN_ARGUMENTS,
    accepted_types,
)

#: Bound in `schema.option`: its JSON schema keyword.
BOUNDS = {"minimum": "minimum", "above": "exclusiveMinimum", "maximum": "maximum", "below": "exclusiveMaximum"}
#: `${section.key}`, which OmegaConf replaces with another key's value, of any type.
INTERPOLATION = {"$ref": "#/$defs/interpolation"}
_TYPES = {type(None): "null", bool: "boolean", int: "integer", float: "number", str: "string"}


def json_schema() -> dict[str, Any]:
    """Return the schema (draft 2020-12) of a configuration file; every key is optional, as in an overlay."""
    schema = _section_schema(RunConfig, "A run of pmd, or an overlay over one.")
    schema["properties"]["trainer"] = _trainer_schema()
    wandb = schema["properties"]["wandb"]
    schema["properties"]["wandb"] = {"anyOf": [wandb["properties"]["mode"], wandb]}  # `wandb: online` is short
    interpolation = {"type": "string", "pattern": r"\$\{.+\}", "description": "The value of another key."}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "pmd configuration",
        **schema,
        "$defs": {"interpolation": interpolation},
    }


def _section_schema(section: type, description: str) -> dict[str, Any]:
    hints, defaults, properties = typing.get_type_hints(section), section(), {}
    for field in dataclasses.fields(section):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            properties[field.name] = _section_schema(typing.cast(type, hint), inspect.getdoc(hint) or "")
        else:
            facts = {"description": field.metadata["help"], "default": getattr(defaults, field.name)}
            properties[field.name] = facts | _value_schema(hint, field.metadata)
    return {
        "description": description,
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _trainer_schema() -> dict[str, Any]:
    """Describe the arguments of Lightning's Trainer that a file may set."""
    properties: dict[str, Any] = {}
    for name, hint in accepted_types().items():
        if name in COUNTS:
            several = {"type": "integer", "minimum": 1, "maximum": MAX_DEVICES}
            text = "More than one needs strategy: ddp or fsdp2."
            properties[name] = {"description": text, "anyOf": [{"enum": list(ONE_DEVICE)}, several]}
        elif name in CLASSES:
            properties[name] = _classes_schema(name)
        elif name not in OWN_ARGUMENTS:
            bounds = {"minimum": MINIMUM[name], "maximum": MAX_COUNT} if name in MINIMUM else {}
            properties[name] = _value_schema(hint, bounds)
    key, value = NO_LIMIT
    properties[key]["anyOf"].append({"const": value})
    return {
        "description": "Arguments of Lightning's Trainer.",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _classes_schema(name: str) -> dict[str, Any]:
    """Describe one class or a list of classes, each with its arguments, as LightningCLI reads them."""
    entry = {
        "type": "object",
        "additionalProperties": False,
        "required": ["class_path"],
        "properties": {key: {"type": "string" if key == "class_path" else "object"} for key in sorted(CLASS_KEYS)},
    }
    one = [{"type": "string"}, entry]
    nothing = {"type": ["boolean", "null"] if name == "logger" else "null"}
    return {
        "description": f"Lightning {name} besides those of the run, such as {CLASSES[name]}.",
        "anyOf": [*one, {"type": "array", "items": {"anyOf": one}}, nothing],
    }


def _value_schema(hint: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a value, or an interpolation in its place."""
    if hint is Any:
        return {}
    bounds = {keyword: metadata[bound] for bound, keyword in BOUNDS.items() if bound in metadata}
    options = _options(hint, bounds)
    if {"type": "string"} not in options:  # a string already allows interpolations
        options.append(INTERPOLATION)
    return options[0] if len(options) == 1 else {"anyOf": options}


def _options(hint: Any, bounds: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one schema for each alternative that the type allows; bounds apply to the numbers among them."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return [option for arg in args for option in _options(arg, bounds)]
    if origin is Literal:
        return [{"enum": [*args, False] if "off" in args else list(args)}]  # YAML 1.1 reads a bare off as false
    if origin is list:
        return [{"type": "array", "items": _value_schema(args[0], bounds)}]
    if origin is dict:
        return [{"type": "object", "additionalProperties": _value_schema(args[1], bounds)}]
    return [{"type": _TYPES[hint], **(bounds if hint in (int, float) else {})}]
