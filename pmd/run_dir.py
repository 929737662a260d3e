"""The directory that holds everything of one run.

config.yaml      the resolved configuration; `pmd fit --config RUN/config.yaml` repeats the run
metrics.csv      what was logged, by step
checkpoints/     last.ckpt and best.ckpt, each the whole state: weights, optimizer, teacher, memory, positions
memory/          memory.sqlite, its index, and items/: the live items at the end of each epoch
traces/          per-token records of the steps, for `pmd inspect step`
samples.jsonl    every evaluation sample of the final table
results.json     the final table
curves.png       the picture
test-NAME/       what `pmd test` says of checkpoint NAME: results.json, samples.jsonl, pass_at_k.png
"""

import csv
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmd.config import RunConfig
from pmd.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths of one run."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.csv"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def memory(self) -> Path:
        return self.root / "memory" / "memory.sqlite"

    @property
    def items(self) -> Path:
        return self.root / "memory" / "items"

    @property
    def traces(self) -> Path:
        return self.root / "traces"

    @property
    def samples(self) -> Path:
        return self.root / "samples.jsonl"

    @property
    def results(self) -> Path:
        return self.root / "results.json"

    @property
    def curves(self) -> Path:
        return self.root / "curves.png"

    @property
    def pass_at_k(self) -> Path:
        return self.root / "pass_at_k.png"

    def checkpoint(self, name: str) -> Path:
        """Return the file that `ckpt_path` means: `last`, `best`, or a path.

        Raises:
            ConfigError: there is no such file.
        """
        path = self.checkpoints / f"{name}.ckpt" if name in ("last", "best") else Path(name)
        if not path.is_file():
            raise ConfigError(f"ckpt_path={name}: {path} does not exist; give last, best or the path of a checkpoint.")
        return path

    def read_metrics(self) -> list[dict[str, str]]:
        """Return the rows of metrics.csv; none where there is no such file."""
        if not self.metrics.is_file():
            return []
        with self.metrics.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


def choose_run_dir(wanted: str | None, name: str, resume: bool) -> RunDir:
    """Return the directory of a run: the one wanted, or the next free `runs/NAME`, `runs/NAME-2`, ...

    Raises:
        ConfigError: it already holds a run, and that run is not to be resumed; or there is nothing to resume.
    """
    if wanted is None:
        if resume:
            raise ConfigError("ckpt_path without run_dir: say which run to resume with --run_dir=runs/NAME.")
        root, number = Path("runs") / name, 1
        while root.exists():
            number += 1
            root = Path("runs") / f"{name}-{number}"
        return RunDir(root)
    root = Path(wanted)
    if root.exists() and not root.is_dir():
        raise ConfigError(f"run_dir={wanted} is a file; give a directory.")
    if not resume and root.is_dir() and any(root.iterdir()):
        raise ConfigError(
            f"run_dir={wanted} is not empty; resume it with --ckpt_path=last, or give another directory, or remove it."
        )
    return RunDir(root)


def find_run_dir(config: RunConfig, config_folder: Path, name: str) -> RunDir:
    """Return the directory that `validate` and `test` read from and write below.

    It is run_dir; else the folder of the configuration file, if that is a run's own; else, for the untrained policy, a
    new one.
    """
    if config.run_dir is not None:
        return RunDir(Path(config.run_dir))
    if (config_folder / "checkpoints").is_dir():
        return RunDir(config_folder)
    return choose_run_dir(None, name, resume=config.ckpt_path in ("last", "best"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
