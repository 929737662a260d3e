"""Writes the configuration as YAML that can be run again."""

import dataclasses
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pmd.config.load import LoadedConfig, uses_environment

NOT_SAVED = ("run_dir", "ckpt_path")


def resolved_values(loaded: LoadedConfig) -> dict[str, Any]:
    """Return the whole configuration, defaults included, as plain values.

    If any value comes from an environment variable, all interpolations are kept as they are written: what is saved must
    not hold a secret. The two keys that a saved configuration leaves out are never referred to.
    """
    values = dataclasses.asdict(loaded.run) | {"trainer": loaded.trainer}
    written = {key: value for key, value in loaded.written.items() if key not in NOT_SAVED}
    return _as_written(values, written, keep=uses_environment(loaded.written))


def _as_written(value: Any, written: Any, *, keep: bool) -> Any:
    """Return the value, or the text that stands for it if it must be kept; `\\${` is an escaped, literal `${`."""
    if isinstance(written, dict) and isinstance(value, dict):
        return {k: _as_written(v, written[k], keep=keep) if k in written else v for k, v in value.items()}
    if isinstance(written, list) and isinstance(value, list) and len(written) == len(value):
        return [_as_written(one, other, keep=keep) for one, other in zip(value, written, strict=True)]
    if isinstance(written, str) and "${" in written:
        of_this_run = any(f"${{{key}}}" in written for key in NOT_SAVED)
        return written if "\\${" in written or (keep and not of_this_run) else value
    return value


def resolved_yaml(loaded: LoadedConfig) -> str:
    """Return the whole configuration, defaults included, as YAML that can be run again."""
    return OmegaConf.to_yaml(OmegaConf.create(resolved_values(loaded)))


def saved_yaml(loaded: LoadedConfig) -> str:
    """Return the configuration in the form that is saved in a run directory."""
    return OmegaConf.to_yaml(OmegaConf.create(saved_values(loaded)))


def saved_values(loaded: LoadedConfig) -> dict[str, Any]:
    """Return the configuration as it is saved in a run directory and in its checkpoints.

    Local paths become absolute, and run_dir and ckpt_path are left out, so it means the same in any directory and in a
    copy of the run.
    """
    run = loaded.run
    model, data, memory, server = run.model, run.data, run.memory, run.rollouts.server
    if Path(model.path, "config.json").is_file():
        model = dataclasses.replace(model, path=_absolute(model.path))
    for key in ("path", "validation_path"):
        path = getattr(data, key)
        if path and Path(path).exists():
            data = dataclasses.replace(data, **{key: _absolute(path)})
    if memory.embedder != "hash" and Path(memory.embedder).is_dir():
        memory = dataclasses.replace(memory, embedder=_absolute(memory.embedder))
    if memory.import_path is not None:
        memory = dataclasses.replace(memory, import_path=_absolute(memory.import_path))
    if server.adapter_dir is not None:
        server = dataclasses.replace(server, adapter_dir=_absolute(server.adapter_dir))
    rollouts = dataclasses.replace(run.rollouts, server=server)
    portable = dataclasses.replace(
        run, run_dir=None, ckpt_path=None, model=model, data=data, memory=memory, rollouts=rollouts
    )
    return resolved_values(dataclasses.replace(loaded, run=portable))


def _absolute(path: str) -> str:
    return str(Path(path).absolute())
