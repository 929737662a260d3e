"""The configuration as YAML that runs again."""

import dataclasses
from pathlib import Path

from pmd.config.load import LoadedConfig


def resolved_yaml(loaded: LoadedConfig) -> str:
    """Return the whole configuration, defaults included, as YAML that runs again."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(loaded.run) | {"trainer": loaded.trainer}))


def saved_yaml(loaded: LoadedConfig) -> str:
    """Return the configuration as a run directory keeps it: it means the same from any directory, and in any copy."""
    run = loaded.run
    paths = {"path": run.data.path, "validation_path": run.data.validation_path}
    absolute = {key: str(Path(path).absolute()) for key, path in paths.items() if path and Path(path).exists()}
    data = dataclasses.replace(run.data, **absolute)
    model, embedder, import_path = run.model, run.memory.embedder, run.memory.import_path
    if Path(model.path, "config.json").is_file():
        model = dataclasses.replace(model, path=str(Path(model.path).absolute()))
    if Path(embedder).is_dir() and embedder != "hash":
        embedder = str(Path(embedder).absolute())
    if import_path is not None:
        import_path = str(Path(import_path).absolute())
    memory = dataclasses.replace(run.memory, embedder=embedder, import_path=import_path)
    server = run.rollouts.server
    if server.adapter_dir is not None:
        server = dataclasses.replace(server, adapter_dir=str(Path(server.adapter_dir).absolute()))
    rollouts = dataclasses.replace(run.rollouts, server=server)
    own = {"data": data, "model": model, "memory": memory, "rollouts": rollouts}
    portable = dataclasses.replace(run, run_dir=None, ckpt_path=None, **own)
    return resolved_yaml(dataclasses.replace(loaded, run=portable))
